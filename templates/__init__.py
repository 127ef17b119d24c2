"""The Jinja templates that onelaunch renders: package data, read through importlib.resources."""
