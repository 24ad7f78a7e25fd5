"""The page of `estimate.explore`: the numbers as text, and explore.js, which shows those of the chosen combination.

A combination is one row, in the order variant, layout, shape (recompute and micro-batch), rows divided by ";":

    !R                 refused: line R of `refusals`
    ?states,time..     only the states were counted
    parts..,highest..,reserved,its upper end,device,its upper end,outside,host,fits,verdict,peak,time..

Numbers are written to the base 36. time: milliseconds of a step,
tokens per second and GPU, MFU in tenths of a percent.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from configs.errors import ConfigError, EnvironmentProblem
from configs.schema import Config
from trainer.estimate.render import LABELS
from trainer.estimate.search.candidates import Candidate
from trainer.estimate.search.cost import StepTime
from trainer.estimate.search.explore import Explored, Point
from trainer.estimate.search.render import batch_override, kept
from trainer.estimate.timeline import COMPONENTS
from trainer.html import COLOURS, page
from trainer.process.files import replace_text

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
SCHEDULE = "pipeline.schedule"
SAID = {("reshard_after_forward", "false"): "kept gathered", ("sequence_parallel", "true"): "sequence parallel"}
NAMED = {"data.seq_len": "sequence length", "optimizer": "optimizer", "precision": "precision"}


@dataclass(frozen=True, slots=True)
class Control:
    """One swept option. overrides: the override of each of its values."""

    key: str
    overrides: tuple[str, ...]

    def record(self) -> dict[str, object]:
        values = [word.partition("=")[2] for word in self.overrides]
        return {
            "name": NAMED.get(self.key, self.key),
            "values": values,
            "overrides": [shlex.quote(w) for w in self.overrides],
        }


class _Numbered:
    """Texts that rows refer to by number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def check_file(config: Config) -> None:
    """Check before an hour of work that the page can be written. Raises ConfigError and EnvironmentProblem."""
    path = _path(config)
    if path.suffix != ".html":
        raise ConfigError(f"estimate.explore={config.estimate.explore}: writes .html; name the file so")
    if not path.parent.is_dir():
        raise EnvironmentProblem(f"estimate.explore={config.estimate.explore}: there is no folder {path.parent}")


def save_page(found: Sequence[Explored], controls: Sequence[Control], overrides: Sequence[str], config: Config) -> int:
    """Write the page. found: in the order of the controls' product. overrides: those that all share. Returns its
    bytes."""
    title = f"{config.model.preset} on {_machine(found[0])}"
    body = (files("trainer.estimate.search") / "explore.html").read_text()
    body = body.replace("TITLE", escape(title))
    script, style = ((files("trainer.estimate.search") / f"explore.{kind}").read_text() for kind in ("js", "css"))
    data = {"base": [*map(shlex.quote, ["python", "-m", "launch", *kept(overrides)])], **page_data(found, controls)}
    text = page(title, body, style=style, script=script, data=data)
    try:
        replace_text(_path(config), text)
    except OSError as error:
        raise EnvironmentProblem(
            f"estimate.explore={config.estimate.explore}: cannot be written: {error.strerror}"
        ) from None
    return len(text.encode())


def page_data(found: Sequence[Explored], controls: Sequence[Control]) -> dict[str, object]:
    layouts = {point.candidate.layout: point.candidate for each in found for point in each.points}
    shapes = {_shape(point.candidate): point.candidate for each in found for point in each.points}
    refusals, verdicts, peaks = _Numbered(), _Numbered(), _Numbered()
    elsewhere = refusals("this cluster has no such layout")
    rows: list[str] = []
    for each in found:
        points = {(point.candidate.layout, _shape(point.candidate)): point for point in each.points}
        for layout in layouts:
            for shape in shapes:
                point = points.get((layout, shape))
                row = f"!{_digits(elsewhere)}" if point is None else _row(point, refusals, verdicts, peaks)
                rows.append(row)
    devices = [{"name": e.device.name, "bytes": e.device.capacity_bytes, "assumed": e.device.assumed} for e in found]
    return {
        "devices": devices,
        "controls": [control.record() for control in controls],
        "batches": [batch_override(each.config) for each in found],
        "layouts": [_layout(candidate) for candidate in layouts.values()],
        "shapes": [_named_shape(candidate) for candidate in shapes.values()],
        "components": [[LABELS[name], colour] for name, colour in zip(COMPONENTS, COLOURS, strict=True)],
        "refusals": list(refusals.numbers),
        "verdicts": list(verdicts.numbers),
        "peaks": list(peaks.numbers),
        "rows": ";".join(rows),
    }


def _shape(candidate: Candidate) -> tuple[str, ...]:
    return tuple(word for word in candidate.overrides if word not in candidate.layout)


def _layout(candidate: Candidate) -> dict[str, object]:
    """The preset, and its degrees as a person says them: tp 2, dp_shard 4, 1f1b."""
    degrees = [word.removeprefix("parallel.").rpartition("=") for word in candidate.layout[1:]]
    said = [SAID.get((key, value)) or (value if key == SCHEDULE else f"{key} {value}") for key, _, value in degrees]
    return {"preset": candidate.preset, "degrees": ", ".join(said), "overrides": list(candidate.layout)}


def _named_shape(candidate: Candidate) -> dict[str, object]:
    recompute = candidate.keys["train.activation_checkpointing"]
    return {
        "recompute": str(recompute),
        "size": candidate.keys["train.micro_batch_size"],
        "overrides": list(_shape(candidate)),
    }


def _row(point: Point, refusals: _Numbered, verdicts: _Numbered, peaks: _Numbered) -> str:
    if point.refused is not None:
        return f"!{_digits(refusals(point.refused))}"
    assert point.time is not None
    time, memory = list(_times(point.time)), point.memory
    if memory is None:
        return "?" + _joined([point.states, *time])
    texts = [verdicts(memory.verdict), peaks(memory.peak)]
    sizes = [*memory.parts, *memory.highest, *memory.reserved, *memory.device, memory.outside, memory.host]
    return _joined([*sizes, int(point.fits), *texts, *time])


def _times(time: StepTime) -> Iterator[int]:
    yield round(time.total * 1000)
    yield round(time.tokens_per_second_per_gpu)
    yield round(time.mfu * 1000)


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(_digits, numbers))


def _digits(number: int) -> str:
    text = ""
    while number >= 36:
        number, digit = divmod(number, 36)
        text = DIGITS[digit] + text
    return DIGITS[number] + text


def _machine(found: Explored) -> str:
    return f"{found.world_size} x {found.device.name}" + (" (assumed)" if found.device.assumed else "")


def _path(config: Config) -> Path:
    return Path(config.estimate.explore or "").expanduser()
