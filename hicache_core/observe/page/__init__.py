"""The page ``/hicache/``: files for a browser, and the answers that they ask for."""
