"""The guard: what stands between the cache and a store that may be slow, failing or gone."""
