"""A training run from its first check to its last step."""
