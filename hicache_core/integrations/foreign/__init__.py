"""Storage for engines that have a cache of their own: their keys, their memory, their threads."""
