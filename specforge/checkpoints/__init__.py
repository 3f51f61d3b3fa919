"""Checkpoint formats of drafts: writing, reading, and checking them against the rules of their readers."""
