"""A loaded kernel bound to buffers, and the calls of a step."""
