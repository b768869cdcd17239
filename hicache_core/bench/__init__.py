"""Load for a running server, and what it measures. Needs httpx (the extra ``bench``)."""
