"""Configuration to a loaded kernel: from memory, disk or a build; ahead of time, in bulk and over machines."""
