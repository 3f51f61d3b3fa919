"""Decoding with a draft: one verifier pass a round, lossless verification, and replay, which needs no verifier."""
