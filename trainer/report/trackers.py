"""Experiment trackers: Weights & Biases through its own client, every other one through Accelerate.

A tracker gets the numbers of metrics.jsonl and the resolved configuration, on rank 0 only. Keys never pass through the
configuration, which is written to the run folder: each client finds its own in its login file or environment.

Torch-free at import; the clients are imported when one is started.
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import yaml

from configs.by_path import arguments, described
from configs.errors import EnvironmentProblem
from configs.load import to_yaml
from configs.schema import Config, Logging
from trainer.plan.trackers import CUSTOM, GIVEN, NO_TRACKER, TRACKERS, custom_tracker, flat
from trainer.process.files import replace_text
from trainer.report.metrics import SampleMetrics

if TYPE_CHECKING:
    from trainer.plan.plan import Plan

Number = int | float

WANDB_ID = "wandb-id.txt"
# The name, which is that of the Python module and of Accelerate's tracker -> the package to install.
LAUNCHER_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Tracker(Protocol):
    def log(self, values: Mapping[str, Number], step: int) -> None:
        """Numbers of one line of metrics.jsonl. Steps never decrease."""
        ...

    def texts(self, lines: Sequence[SampleMetrics], step: int) -> None:
        """Texts of one validation, if the tracker shows text."""
        ...

    def finish(self, *, failed: bool) -> None:
        """Flush and close; `failed` marks the run as failed, if the tracker has such a mark."""
        ...


def check_tracker_installed(tracker: str) -> None:
    """Raises EnvironmentProblem when the tracker's package is missing."""
    if tracker not in (NO_TRACKER, CUSTOM) and find_spec(tracker) is None:
        raise EnvironmentProblem(
            f"logging.tracker={tracker}: its package is not installed; pip install {TRACKERS[tracker]},"
            " or set logging.tracker=none"
        )


def start_tracker(config: Config, plan: Plan, folder: Path, *, run_name: str, after_step: int = 0) -> Tracker | None:
    """The tracker that the configuration names, started; None for `none`. For rank 0.

    after_step: where the run continues, if it does: Weights & Biases and TensorBoard then continue the existing run;
    metrics.jsonl must have been cut there. Raises EnvironmentProblem if its client refuses to start.
    """
    name = config.logging.tracker
    if name == NO_TRACKER:
        return None
    record = {**yaml.safe_load(to_yaml(config)), "plan": _plain(plan)}
    try:
        if name == "wandb":
            return _Wandb(config.logging, folder, record, config.logging.run_name or run_name, after_step)
        if name == CUSTOM:
            return _own(config.logging, folder, record, config.logging.run_name or run_name, after_step)
        return _FromAccelerate(config.logging, folder, record, config.logging.run_name or run_name, after_step)
    except Exception as error:  # each client has its own errors
        raise EnvironmentProblem(
            f"logging.tracker={name}: does not start ({described(error)}); mend logging.options or its"
            " environment, or set logging.tracker=none"
        ) from None


def _plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON knows it, with the derived numbers people filter runs by."""
    return {**json.loads(json.dumps(plan.record())), "global_batch_size": plan.batch.global_batch_size}


class _Wandb:
    def __init__(self, logging: Logging, folder: Path, record: dict[str, Any], run_name: str, after_step: int) -> None:
        import wandb

        options: dict[str, Any] = {
            "project": logging.project,
            "name": run_name,
            "dir": str(folder),
            "id": _kept_id(folder / WANDB_ID),
            # Steps that the run already has are not logged twice: the client refuses a step that goes back.
            "resume": "allow",
            **logging.options,
        }
        if "mode" not in options and "WANDB_MODE" not in os.environ and not _wandb_login():
            # Otherwise the client would ask for a key, and a job on a cluster would wait for an answer.
            options["mode"] = "offline"
        self.run = wandb.init(config=record, **options)
        if after_step and self.run.offline:
            self._tell_again(folder / "metrics.jsonl")

    def _tell_again(self, metrics: Path) -> None:
        """Offline each start has its own file. After a kill it lacks unflushed steps, and `wandb sync` may replace one
        start's history by another's. So this start's file gets all steps from the first one on, from metrics.jsonl, and
        the files of earlier starts go where `wandb sync` does not look."""
        ours = Path(self.run.dir).parent
        aside = ours.parent / "earlier"
        for path in ours.parent.glob(f"offline-run-*-{self.run.id}"):
            if path.name != ours.name:
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)
        for line in metrics.read_text().splitlines():
            values = json.loads(line)
            if values["kind"] == SampleMetrics.kind:
                continue
            step = values.pop("step")
            self.log({key: value for key, value in values.items() if isinstance(value, Number)}, step)

    def log(self, values: Mapping[str, Number], step: int) -> None:
        self.run.log(dict(values), step=step)

    def texts(self, lines: Sequence[SampleMetrics], step: int) -> None:
        import wandb

        rows: list[Any] = [[line.number, line.prompt, line.text] for line in lines]
        self.run.log({"samples": wandb.Table(columns=["sample", "prompt", "text"], data=rows)}, step=step)

    def finish(self, *, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)


def _kept_id(path: Path) -> str:
    """The id of this folder's run at the tracker: drawn at its first start, the same at each later one."""
    if not path.exists():
        replace_text(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _wandb_login() -> bool:
    """Whether the client will find a login: in the environment, its settings or the login file.

    `wandb.login` would also tell, but it asks the server for the user's name, and waits if there is no network.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    settings = wandb.setup().settings
    if settings.api_key:
        return True
    try:
        logins = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    # The client's default server has changed its name; logins with the old one still count.
    return bool({urlsplit(settings.base_url).netloc, "api.wandb.ai"} & logins.hosts.keys())


def _own(logging: Logging, folder: Path, record: dict[str, Any], run_name: str, after_step: int) -> Tracker:
    """A user's own class, which gets the arguments that its constructor names."""
    found = custom_tracker(logging)
    given = {
        "project": logging.project,
        "run_name": run_name,
        "folder": folder,
        "config": record,
        "after_step": after_step,
    }
    named = arguments(found)
    return found(**{name: given[name] for name in GIVEN if name in named}, **logging.options)


class _FromAccelerate:
    """One of `accelerate.tracking`, without an Accelerator."""

    def __init__(self, logging: Logging, folder: Path, record: dict[str, Any], run_name: str, after_step: int) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        _lone_accelerate_state()
        self.name = logging.tracker
        arguments = {**_arguments(logging, folder, run_name, after_step), **logging.options}
        first = run_name if logging.tracker in ("aim", "tensorboard") else logging.project
        self.tracker = LOGGER_TYPE_TO_CLASS[logging.tracker](first, **arguments)
        self.tracker.start()
        if logging.tracker == "comet_ml":
            self.tracker.tracker.set_name(run_name)
        self.tracker.store_init_configuration(dict(flat(record)))

    def log(self, values: Mapping[str, Number], step: int) -> None:
        self.tracker.log(dict(values), step=step)

    def texts(self, lines: Sequence[SampleMetrics], step: int) -> None:
        if self.name == "tensorboard":  # it reads Markdown, in which indented text is shown verbatim
            quoted = {line: f"{line.prompt}{line.text}".replace("\n", "\n    ") for line in lines}
            self.tracker.log({f"sample/{line.number}": f"    {text}" for line, text in quoted.items()}, step=step)

    def finish(self, *, failed: bool) -> None:
        self.tracker.finish()


def _arguments(logging: Logging, folder: Path, run_name: str, after_step: int) -> dict[str, Any]:
    """Arguments with which each client gets the run's name and, if it writes files, the run folder."""
    return {
        "aim": {"logging_dir": folder, "experiment": logging.project},
        "clearml": {"project_name": logging.project, "task_name": run_name},
        "comet_ml": {},
        "dvclive": {
            "dir": str(folder / "dvclive"),
            "dvcyaml": str(folder / "dvclive" / "dvc.yaml"),
            "exp_name": run_name,
        },
        "mlflow": {"run_name": run_name},
        "swanlab": {"experiment_name": run_name, "logdir": str(folder / "swanlab")},
        # What an earlier start logged after its last checkpoint is hidden: this one makes these steps again.
        "tensorboard": {"logging_dir": folder / "tensorboard", "purge_step": after_step + 1 if after_step else None},
        "trackio": {"name": run_name},
    }[logging.tracker]


def _lone_accelerate_state() -> None:
    """Accelerate's trackers ask its `PartialState` whether this is the main process. Declare a single process.

    Otherwise the state would read the launcher's variables: in a CPU rank it changes torch's number of threads, in a
    GPU rank it selects a device, and under `accelerate launch --use_deepspeed` it starts DeepSpeed.
    """
    from accelerate.state import PartialState

    with _hidden(LAUNCHER_VARIABLES):
        PartialState(cpu=True)


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)
