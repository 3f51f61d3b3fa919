"""Is an export the draft that was trained, and does it do what it should?"""
