"""Drafts in the forms that other programs read: written, read, and checked against what those programs demand."""
