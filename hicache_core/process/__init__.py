"""What concerns the whole process: its owner thread, its main thread, interrupts, its log."""
