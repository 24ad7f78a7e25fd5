"""Applications of Hydra that train and that plan; docs/hydra.md shows how to run them."""
