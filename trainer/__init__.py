"""The trainer. Read in order: plan, model, parallelize, data, optimizer, engine, loop. Knows nothing of `launch`."""
