"""Stored states of a verifier: what is in a store, how it is written and checked, and how batches read it."""
