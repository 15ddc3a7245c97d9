"""The launch environment and what is reduced over processes."""
