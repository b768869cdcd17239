"""A fleet of servers under a virtual clock: the real tree, controller and policies, and no bytes.

Read ``simulation.py`` first, then ``server.py`` and ``links.py``.
"""
