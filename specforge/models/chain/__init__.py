"""Drafts that feed themselves back: each step of a chain reads what the one before it computed."""
