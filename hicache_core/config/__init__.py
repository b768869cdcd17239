"""The settings: what they are, where they come from, and how errors in them read."""
