"""What a run will take, before it begins: tokens, disk, memory, floating point operations, time."""
