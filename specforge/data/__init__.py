"""From text to batches: text -> token rows (cached) -> packing, with features -> loader -> module."""
