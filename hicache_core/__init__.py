"""HiCache: a prefix cache for LLM servers in three tiers: device, host and shared storage."""
