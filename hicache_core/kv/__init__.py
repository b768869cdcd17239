"""What is cached: the shape of KV, the keys of its pages and the fingerprint of a model."""
