"""A small model runner on transformers (extra: engine)."""
