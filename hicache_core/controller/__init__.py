"""The way of a page: decides, submits and settles; owns the tree, the pools and the jobs."""
