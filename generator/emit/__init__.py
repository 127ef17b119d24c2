"""Configuration to text."""
