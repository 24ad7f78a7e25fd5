"""What one process of a job lives in: its world, the signals it gets, the disks it writes to."""
