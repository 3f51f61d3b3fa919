"""Checks that an export is the trained draft and computes what it should."""
