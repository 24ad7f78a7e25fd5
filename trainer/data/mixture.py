"""`data.mixture`: several sources, each with a weight: the keys, and their problems; torch-free.

    data.mixture.code.weight=3   data.mixture.code.paths=[src/]        a source by a name of the user's own:
    data.mixture.web.weight=7    data.mixture.web.paths=[web.jsonl]    its weight, and keys of `data` for it alone

All other code asks for `parts`: data without a mixture is one part without a name. Next: `mixed`, which reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fractions import Fraction
from math import floor, isfinite, lcm
from typing import Any, cast

from omegaconf import OmegaConf

from configs.choices import DataSource
from configs.keys import broken_rule, schema_keys
from configs.ranges import RANGES
from configs.schema import Config, Data
from trainer.data import custom

SLOTS = 2**16
"""Maximum number of turns in a round. Weights whose ratios need more are rounded to this many parts."""
SHARED = (
    *("mixture", "exhausted", "seq_len", "tokenizer", "document_mask", "num_workers", "cache_dir"),
    "validation_sets",
)
"""Keys of `data` that hold for all sources."""
ENDLESS = (DataSource.hub, DataSource.synthetic)
"""Sources with an unknown number of samples; for a user's own class, a stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One source. name: the user's, empty without a mixture. config: as if it was the only source."""

    name: str
    weight: float | None
    config: Config

    @property
    def label(self) -> str:
        """Prefix of a message about this source."""
        return f"data.mixture.{self.name}: " if self.name else ""

    @property
    def endless(self) -> bool:
        data = self.config.data
        return data.source in ENDLESS or (data.source is DataSource.custom and custom.is_stream(data))


def parts(config: Config) -> list[Part]:
    """The sources in their order. Needs a config in which `problems` finds nothing."""
    if not config.data.mixture:
        return [Part(name="", weight=None, config=config)]
    return [
        Part(name=name, weight=_weight(source), config=replace(config, data=_data(config.data, source)))
        for name, source in _sources(config.data).items()
    ]


def shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights: the turns of each source in a round of their sum.

    They are exact if a round of SLOTS turns can express them. Otherwise each is rounded down, and the remaining turns
    go to the largest remainders.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    parts_of_all = [weight / sum(exact) for weight in exact]
    round_length = lcm(*(part.denominator for part in parts_of_all))
    if round_length <= SLOTS:
        return [int(part * round_length) for part in parts_of_all]
    whole = [floor(part * SLOTS) for part in parts_of_all]
    remainders = sorted(range(len(whole)), key=lambda i: whole[i] - parts_of_all[i] * SLOTS)
    for number in remainders[: SLOTS - sum(whole)]:
        whole[number] += 1
    return whole


def check_name(key: str, name: str) -> Iterator[str]:
    """Problems of a name that appears in metrics and lines of the log."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        yield f"{key}.{name}: a name has letters, digits, - and _ only; choose another name"


def problems(config: Config) -> Iterator[str]:
    """One line for each problem of the mixture itself. The rules for `data` check each source."""
    data = config.data
    for name, source in cast("dict[str, Any]", data.mixture).items():
        yield from check_name("data.mixture", name)
        if not isinstance(source, Mapping):
            yield f"data.mixture.{name}={source}: must be the keys of a source, such as {{weight: 1, paths: [corpus/]}}"
            continue
        for key, value in cast("Mapping[str, Any]", source).items():
            if (problem := _problem(key, value)) is not None:
                yield f"data.mixture.{name}.{key}{problem}"


def problems_of_parts(found: Sequence[Part]) -> Iterator[str]:
    """Problems of the sources together. found: from `parts`."""
    weights = {part.name: part.weight for part in found if part.weight is not None}
    if not found[0].name:
        return
    for part in found:
        if weights and part.weight is None:
            yield (
                f"data.mixture.{part.name}.weight=null: {', '.join(weights)} has one; give every source a weight, or"
                " none, with which every sample comes once in an epoch"
            )
        elif not weights and part.endless:
            yield (
                f"data.mixture.{part.name}.weight=null: the size of data={part.config.data.source} is not known, so no"
                " weight follows from it; give every source a weight"
            )
    if not weights and len({part.config.data.shuffle for part in found}) > 1:
        yield "data.mixture: without weights all samples are shuffled together; set data.shuffle for all sources"
    if len(weights) == len(found):
        for name, share in zip(weights, shares(list(weights.values())), strict=True):
            if not share:
                yield (
                    f"data.mixture.{name}.weight={weights[name]}: is less than 1/{SLOTS:,} of all weights, and the"
                    " source would never be read; give a larger one, or leave the source out"
                )


def _problem(key: str, value: Any) -> str | None:
    """Message after the name of a source's key, if there is a problem with it."""
    if key == "weight":
        good = value is None or (type(value) in (int, float) and isfinite(value) and 0 < value < 1e9)
        return None if good else f"={value}: must be a number greater than 0"
    known = [name.removeprefix("data.") for name in schema_keys() if name.startswith("data.")]
    if key in SHARED:
        return f"={value}: is the same for all sources; set data.{key}"
    if key not in known:
        close = get_close_matches(key, ["weight", *known], n=1)
        return f": a source has no such key{f'; did you mean {close[0]}?' if close else ''}"
    if (rule := broken_rule(f"data.{key}", value)) is not None:
        return f"={value}: {rule}"
    limits = RANGES.get(f"data.{key}")
    if limits is not None and not limits.holds(float(value)):
        return f"={value}: {limits.rule(float(value))}"
    return None


def _sources(data: Data) -> dict[str, Mapping[str, Any]]:
    return cast("dict[str, Mapping[str, Any]]", data.mixture)


def _weight(source: Mapping[str, Any]) -> float | None:
    return source.get("weight")


def _data(data: Data, source: Mapping[str, Any]) -> Data:
    """`data` with a source's own values, in the schema's types."""
    own = {key: value for key, value in source.items() if key != "weight"}
    return cast(Data, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(replace(data, mixture={})), own)))
