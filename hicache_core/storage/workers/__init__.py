"""The worker: jobs of a backend on threads, with deadlines."""
