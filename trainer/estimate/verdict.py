"""Does it fit? The three words that an estimate ends in, and the range that they are said of: the one place for both.

    lower end    what the replay of torch's allocator asks of the device, with CUDA context and NCCL
    upper end    the lower end, times what public runs have shown above such a replay (`ABOVE`)

    fits            the upper end is on the device
    tight           the lower end is, the upper end is not
    does not fit    not even the lower end is

Between the two lies what the replay does not see: cached blocks of sizes that no later request has, which sequences of
other lengths, a validation or a checkpoint leave; blocks that another stream still uses when they are freed; workspaces
of libraries; a context or a communicator that is larger than assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

ABOVE = {False: 1 / 0.80, True: 1.12}
"""By whether segments grow. Fixed ones: of 14 public runs whose nvidia-smi was compared with this replay the largest
shows 1 / 0.80 of it, the median 1 / 0.93. Growing ones merge what is free, and leave gaps between streams and pages
alone: a published run with them reserves 1.12 of the bytes in use, of which the replay sees a part. Neither number was
measured here; `python -m tests.gpu.all` says how many of its cases lie in the range."""


COMPILED_KEEPS = 0.61
"""Of the activations that an eager layer keeps, what a compiled one does at least: a Llama layer under autocast, by
`compiled`'s graphs; in bfloat16 it is 0.69. For layouts whose compiled layers are traced as eager ones."""


class Verdict(StrEnum):
    fits = "fits"
    tight = "tight"
    does_not_fit = "does not fit"
    unknown = "no device to compare with"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """What makes a range of a replay. outside: bytes that torch's allocator does not know of. above: the factor of the
    upper end. spared: the part of the activations that a run may do without."""

    outside: int
    above: float
    spared: float = 0.0

    def device(self, reserved: int, activations: int) -> tuple[int, int]:
        """The lower and the upper end of what is on the device."""
        whole = reserved + self.outside
        return whole - int(self.spared * activations), int(self.above * whole)


def judge(lower: int, upper: int, capacity: int | None) -> Verdict:
    """capacity: None where there is no device, as on the CPU."""
    if capacity is None:
        return Verdict.unknown
    if lower > capacity:
        return Verdict.does_not_fit
    return Verdict.fits if upper <= capacity else Verdict.tight
