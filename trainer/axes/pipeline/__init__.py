"""Pipeline parallel: which rank runs which layers, and in which order."""
