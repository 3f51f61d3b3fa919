"""Token rows on disk: built from sources, checked as they are read, cached by content."""
