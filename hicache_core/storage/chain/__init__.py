"""The chain: several backends used as one."""
