"""``hicache demo``: a real model, a conversation, and where each turn's prefix came from."""
