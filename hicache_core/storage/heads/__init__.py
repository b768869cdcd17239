"""Head groups: objects that servers of different tensor parallelism share."""
