"""Serving engines: requests, responses, and their acceptance counters."""
