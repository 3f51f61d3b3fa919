"""What a batch is made of: text -> rows (cached) -> packing, with features -> loader -> module."""
