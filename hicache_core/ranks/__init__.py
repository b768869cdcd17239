"""The processes that share one request, and how they agree."""
