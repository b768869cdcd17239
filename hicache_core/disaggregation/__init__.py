"""Prefill and decode on different nodes: KV transfer, roles, router."""
