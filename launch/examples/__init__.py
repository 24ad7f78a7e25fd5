"""Example Hydra applications that train and plan; docs/hydra.md shows how to run them."""
