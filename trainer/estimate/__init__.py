"""Memory of a run, before it runs: bytes per rank over one step, from the plan and the trainer's own tables."""
