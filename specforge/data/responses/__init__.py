"""Responses that a verifier writes to prompts: how they are asked for, kept on the way and put together."""
