"""Where concrete classes are chosen: the cache, its storage and what observes it."""
