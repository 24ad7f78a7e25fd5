"""The values that choice keys of the configuration accept; `configs.schema` documents each."""

from enum import StrEnum

Weights = StrEnum("Weights", "random pretrained")
MissingWeights = StrEnum("MissingWeights", "refuse random")
Attention = StrEnum("Attention", "auto sdpa eager flash_attention_2")
DataSource = StrEnum("DataSource", "builtin files chat hub synthetic custom")
Exhausted = StrEnum("Exhausted", "repeat stop")
ChatFormat = StrEnum("ChatFormat", "auto messages sharegpt alpaca completion")
BadRows = StrEnum("BadRows", "refuse skip")
Bos = StrEnum("Bos", "auto always never")
EngineName = StrEnum("EngineName", "torch deepspeed")
OffloadDevice = StrEnum("OffloadDevice", "none cpu nvme")
DType = StrEnum("DType", "float64 float32 bfloat16 float16")
Recipe = StrEnum("Recipe", "none tensorwise rowwise rowwise_with_gw_hp mxfp8")
TuningMethod = StrEnum("TuningMethod", "full lora qlora ia3 adapter prompt p_tuning prefix")
AdapterInit = StrEnum("AdapterInit", "kaiming gaussian pissa olora")
Balance = StrEnum("Balance", "none micro_batch sequence global_batch")
OptimizerName = StrEnum("OptimizerName", "adamw sgd adafactor adamw_8bit muon lion schedule_free mezo custom")
Implementation = StrEnum("Implementation", "auto fused foreach for_loop deepspeed_cpu")
Schedule = StrEnum("Schedule", "constant linear cosine warmup_stable_decay")
Checkpointing = StrEnum("Checkpointing", "none full selective")
NonFinite = StrEnum("NonFinite", "stop skip")
OnFailure = StrEnum("OnFailure", "stop warn")
Device = StrEnum("Device", "auto cpu cuda")
EstimateFormat = StrEnum("EstimateFormat", "table json csv")
Gate = StrEnum("Gate", "off warn refuse strict")
LauncherName = StrEnum("LauncherName", "python torchrun deepspeed accelerate")
ClusterKind = StrEnum("ClusterKind", "local slurm kubernetes ray")
GpuRequest = StrEnum("GpuRequest", "gpus_per_node gres none")
ProgressDisplay = StrEnum("ProgressDisplay", "auto bar lines off")
ContextMethod = StrEnum("ContextMethod", "ulysses gather")

BYTES: dict[str, int] = {DType.float64: 8, DType.float32: 4, DType.bfloat16: 2, DType.float16: 2, "uint8": 1}
"""Bytes of one value, by the name of its dtype."""
