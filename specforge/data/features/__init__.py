"""A verifier's hidden states on disk: format, writing, verification, and reading into batches."""
