"""Serving engines: what is asked of them, what they answer, what they count."""
