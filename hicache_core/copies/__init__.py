"""Copies between device pages and host pages (the io backend)."""
