"""The guard: protects the cache from a store that is slow, failing or gone."""
