"""The prefix index over packed token ids. Imports no torch."""
