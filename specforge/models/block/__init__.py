"""Drafts that propose a whole block of tokens in one pass: anchors, what a block attends to, how it drafts."""
