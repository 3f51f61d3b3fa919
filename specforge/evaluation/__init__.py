"""Evaluation of drafts on prompt sets: conversations -> decoding with and without speculation -> results."""
