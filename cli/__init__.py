"""The onelaunch command."""
