"""Estimates of a run's cost before it starts: tokens, disk, memory, floating point operations, time."""
