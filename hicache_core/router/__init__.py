"""The router in front of prefill and decode nodes."""
