"""The words that keys of the configuration choose between; `configs.schema` says what each means."""

from enum import StrEnum


class Weights(StrEnum):
    random = "random"
    pretrained = "pretrained"


class MissingWeights(StrEnum):
    refuse = "refuse"
    random = "random"


class Attention(StrEnum):
    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class DataSource(StrEnum):
    builtin = "builtin"
    files = "files"
    chat = "chat"
    hub = "hub"
    synthetic = "synthetic"


class Bos(StrEnum):
    auto = "auto"
    always = "always"
    never = "never"


class EngineName(StrEnum):
    torch = "torch"
    deepspeed = "deepspeed"


class OffloadDevice(StrEnum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class DType(StrEnum):
    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class TuningMethod(StrEnum):
    full = "full"
    lora = "lora"
    qlora = "qlora"


class OptimizerName(StrEnum):
    adamw = "adamw"
    sgd = "sgd"
    adafactor = "adafactor"
    adamw_8bit = "adamw_8bit"
    muon = "muon"


class Implementation(StrEnum):
    auto = "auto"
    fused = "fused"
    foreach = "foreach"
    for_loop = "for_loop"
    deepspeed_cpu = "deepspeed_cpu"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    warmup_stable_decay = "warmup_stable_decay"


class Checkpointing(StrEnum):
    none = "none"
    full = "full"
    selective = "selective"


class NonFinite(StrEnum):
    stop = "stop"
    skip = "skip"


class OnFailure(StrEnum):
    stop = "stop"
    warn = "warn"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class EstimateFormat(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


class Gate(StrEnum):
    off = "off"
    warn = "warn"
    refuse = "refuse"


class LauncherName(StrEnum):
    python = "python"
    torchrun = "torchrun"
    deepspeed = "deepspeed"
    accelerate = "accelerate"


class ClusterKind(StrEnum):
    local = "local"
    slurm = "slurm"


class GpuRequest(StrEnum):
    gpus_per_node = "gpus_per_node"
    gres = "gres"
    none = "none"


class Progress(StrEnum):
    auto = "auto"
    bar = "bar"
    lines = "lines"
    off = "off"


class ContextMethod(StrEnum):
    ulysses = "ulysses"
    gather = "gather"
