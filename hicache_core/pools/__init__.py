"""L1 and L2: the memory of the device and host tiers."""
