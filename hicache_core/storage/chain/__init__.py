"""The chain: several backends, one behind the other."""
