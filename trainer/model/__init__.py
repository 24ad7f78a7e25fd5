"""The model: built from its config, filled with weights, and described by parameter."""
