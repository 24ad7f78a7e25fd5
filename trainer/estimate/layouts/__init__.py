"""What each layout adds to the model's own memory, at the points at which its hooks fire."""
