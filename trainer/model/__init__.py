"""The model: built from its config, filled with weights, and what is known of its parameters."""
