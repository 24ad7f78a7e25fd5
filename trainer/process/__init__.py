"""The surroundings of one process of a job: its world, its signals, its disks."""
