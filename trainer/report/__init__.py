"""Output of a run: its folder, its metrics, the terminal, trackers.

    folder      where the run's files go, and the record of what ran: config, plan, versions, git state
    metrics     the lines of metrics.jsonl, key by key
    terminal    a live bar, or single lines with a fixed form
    trackers    Weights & Biases through its own client, others through Accelerate
    measure     the clock of a step, peak memory
    prediction  the memory estimate against what was measured
    memory_curve  the same over two steps, as a picture: part of `trainer.run.profiling`
    flops       FLOPs per token and MFU
    reporter    all of these together, as the loop sees them

Only rank 0 writes. The other ranks take part if the maximum over all ranks is reported, and they learn of problems on
rank 0, so that all of them end.
"""
