"""Chooses the concrete classes of the cache, its storage and its observers."""
