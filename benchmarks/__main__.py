"""``python -m benchmarks``."""

from benchmarks.harness import main

main()
