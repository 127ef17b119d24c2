"""The laboratory: what measures and exercises onelaunch. Nothing outside imports it, and its verbs load it by name."""
