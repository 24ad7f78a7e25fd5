"""The memory that each layout adds to the model's own, at the points at which its hooks fire."""
