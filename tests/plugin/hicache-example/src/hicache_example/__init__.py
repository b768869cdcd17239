"""A third party's backend for HiCache."""
