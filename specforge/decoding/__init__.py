"""Decoding with a draft: one verifier forward pass per round, lossless verification, and replay without a verifier."""
