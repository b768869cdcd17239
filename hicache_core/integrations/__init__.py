"""Thin adapters into other engines."""
