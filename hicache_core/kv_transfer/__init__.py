"""The wire between prefill and decode nodes: transfer backends and the built-in ``tcp``."""
