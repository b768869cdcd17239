"""The reference server: an engine behind HTTP (extra: server)."""
