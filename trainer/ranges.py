"""Numbers that are out of range, whatever else the config says. Torch-free; read by `rules`."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Config


def check_ranges(config: Config) -> Iterator[str]:
    """One line for each number outside its range: key, value, range."""
    train, data, optimizer, scheduler = config.train, config.data, config.optimizer, config.scheduler
    at_least: list[tuple[str, float | None, float]] = [
        ("train.steps", train.steps, 1),
        ("train.micro_batch_size", train.micro_batch_size, 1),
        ("train.gradient_accumulation_steps", train.gradient_accumulation_steps, 1),
        ("train.global_batch_size", train.global_batch_size, 1),
        ("train.clip_grad_norm", train.clip_grad_norm, 0),
        ("train.eval_every", train.eval_every, 0),
        ("train.eval_samples", train.eval_samples, 0),
        ("train.seed", train.seed, 0),
        ("checkpoint.every", config.checkpoint.every, 0),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("launcher.max_restarts", config.launcher.max_restarts, 0),
        ("checkpoint.keep_every", config.checkpoint.keep_every, 0),
        ("data.seq_len", data.seq_len, 2),
        ("data.num_workers", data.num_workers, 0),
        ("data.shuffle_buffer", data.shuffle_buffer, 1),
        ("parallel.dp_replicate", config.parallel.dp_replicate, 1),
        ("parallel.dp_shard", config.parallel.dp_shard, 1),
        ("parallel.tp", config.parallel.tp, 1),
        ("parallel.cp", config.parallel.cp, 1),
        ("parallel.pp", config.parallel.pp, 1),
        ("optimizer.weight_decay", optimizer.weight_decay, 0),
        ("scheduler.warmup_steps", scheduler.warmup_steps, 0),
        ("scheduler.decay_steps", scheduler.decay_steps, 0),
        ("cluster.nodes", config.cluster.nodes, 1),
        ("cluster.gpus_per_node", config.cluster.gpus_per_node, 1),
        ("logging.every", config.logging.every, 1),
        ("estimate.context_gib", config.estimate.context_gib, 0),
        ("estimate.nccl_gib", config.estimate.nccl_gib, 0),
        ("precision.loss_scale_window", config.precision.loss_scale_window, 1),
    ]
    for key, value, least in at_least:
        if value is not None and not value >= least:
            yield f"{key}={value}: must be {least} or more"
    positive = [
        ("optimizer.lr", optimizer.lr),
        ("optimizer.eps", optimizer.eps),
        ("train.timeout_minutes", train.timeout_minutes),
        ("precision.loss_scale_init", config.precision.loss_scale_init),
        ("precision.loss_scale", config.precision.loss_scale),
        ("cluster.gpu_memory_gib", config.cluster.gpu_memory_gib),
    ]
    for key, value in positive:
        if value is not None and not value > 0:
            yield f"{key}={value}: must be greater than 0"
    fractions = [
        ("data.validation_fraction", data.validation_fraction),
        ("data.ignore_fraction", data.ignore_fraction),
        ("optimizer.beta1", optimizer.beta1),
        ("optimizer.beta2", optimizer.beta2),
    ]
    for key, value in fractions:
        if not 0 <= value < 1:
            yield f"{key}={value}: must be 0 or more and less than 1"
    if not 0 <= scheduler.min_lr_ratio <= 1:
        yield f"scheduler.min_lr_ratio={scheduler.min_lr_ratio}: must lie between 0 and 1"
    if not 0 <= config.parallel.zero_stage <= 3:
        yield f"parallel.zero_stage={config.parallel.zero_stage}: must be 0, 1, 2 or 3"
