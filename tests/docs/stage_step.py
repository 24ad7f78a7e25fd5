"""One optimizer step of one rank under a ZeRO stage: what it computes, what it sends, and what it holds meanwhile.

    bytes      the estimator's layouts, whose hooks are called here in the order of a step (without activations)
    seconds    the planner's step time and network
    order      a gather starts when the computation before its own does; a reduction when its gradients are there

The model is Llama 3.1 8B with fewer layers. Groups are numbered in the order of the forward: the embedding is 0, the
head is last. The final norm counts as memory and is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from configs.load import load_config
from configs.schema import Config
from trainer.axes import REPLICATE, SHARD
from trainer.engine.deepspeed.config import deepspeed_config
from trainer.estimate.layouts.common import Layout, Setting
from trainer.estimate.layouts.deepspeed import zero_layout
from trainer.estimate.layouts.replicated import Replicated
from trainer.estimate.layouts.sharded import FullySharded
from trainer.estimate.layouts.zero import Bucketed, model_size
from trainer.estimate.layouts.zero3 import ZeroStage3
from trainer.estimate.profile import Anatomy, Outline, Parameter, Profile, Trace
from trainer.estimate.search.cost import dimensions, step_time
from trainer.estimate.search.network import build_network, group_of
from trainer.estimate.timeline import COMPONENTS, Timeline
from trainer.make_plan import make_plan
from trainer.model.roles import Described
from trainer.plan.devices import Gpu, find_gpu
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan

STAGES = {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3", "FSDP": "fsdp"}
"""The layout of each stage."""
SHOWN = ("parameters", "gradients", "optimizer", "buffers")
PER_NODE = 8
HIDDEN, MIDDLE, KEY_VALUE, VOCABULARY = 4096, 14336, 1024, 128256
LAYER = {
    "input_layernorm": (HIDDEN,),
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KEY_VALUE, HIDDEN),
    "v_proj": (KEY_VALUE, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "post_attention_layernorm": (HIDDEN,),
    "gate_proj": (MIDDLE, HIDDEN),
    "up_proj": (MIDDLE, HIDDEN),
    "down_proj": (HIDDEN, MIDDLE),
}


@dataclass(slots=True)
class Work:
    """Something that the rank does. kind: F forward, B backward, U update; G gather of parameters, R reduction of
    gradients, P gather of updated parameters; D, which takes no time: gathered parameters are dropped.

    group: of a reduction the last one, in the order of the backward, whose gradients are in it.
    held: bytes of `SHOWN`, of a computation only. begin, end: seconds.
    """

    kind: str
    group: int
    size: float = 0.0
    held: tuple[int, ...] = ()
    begin: float = 0.0
    end: float = 0.0

    @property
    def computes(self) -> bool:
        return self.kind in "FBU"


def anatomy(layers: int) -> Anatomy:
    def parameter(name: str, shape: tuple[int, ...]) -> Parameter:
        return Parameter(name, shape, whole=Described(name=name, shape=shape))

    return Anatomy(
        kinds=(tuple(parameter(*each) for each in LAYER.items()),),
        layers=(0,) * layers,
        groups=(
            ("root", (parameter("norm", (HIDDEN,)),)),
            ("embedding", (parameter("embedding", (VOCABULARY, HIDDEN)),)),
            ("head", (parameter("head", (VOCABULARY, HIDDEN)),)),
        ),
        buffers_bytes=0,
        name="llama",
    )


def outline(layers: int) -> Outline:
    """Of a model whose layers see all that came before, with a kernel that leaves out what is masked."""
    return Outline(
        anatomy=anatomy(layers),
        layer_costs=(),
        head_cost=0.0,
        hidden_size=HIDDEN,
        layer_buffers_bytes=(0,),
        spans=(None,) * layers,
        scores=False,
    )


@cache
def _composed(stage: str) -> Config:
    overrides = ("model=llama3_1_8b", "precision=bf16", "cluster=8xh100", f"parallel={STAGES[stage]}")
    return load_config([*overrides, "train.micro_batch_size=1"])


def _config(stage: str, ranks: int, tokens: int) -> Config:
    config, nodes = _composed(stage), max(1, ranks // PER_NODE)
    cluster = replace(config.cluster, nodes=nodes, gpus_per_node=ranks // nodes)
    return replace(config, cluster=cluster, data=replace(config.data, seq_len=tokens))


def step(stage: str, ranks: int, layers: int, tokens: int) -> list[Work]:
    """A step after the first, with one micro-batch of so many tokens on each rank."""
    config = _config(stage, ranks, tokens)
    plan = make_plan(config, Machine())
    model = anatomy(layers)
    timeline = Timeline(gpu=True, expandable=True)
    setting = Setting(profile=Profile(model, Trace((0,), {})), plan=plan, optimizer=config.optimizer, timeline=timeline)
    layout = _layout(config, plan, setting)
    layout.start()
    recorder = Recorder(layout, timeline, layers)
    for number in (1, 2):
        works = recorder.step(number)
    return _timed(works, config, plan, model)


def _layout(config: Config, plan: Plan, setting: Setting) -> Layout:
    if plan.zero_stage:
        return zero_layout(setting, deepspeed_config(config, plan, model_size(setting.profile.anatomy), swap_folder=""))
    return FullySharded(setting) if plan.fully_sharded else Replicated(setting)


class Recorder:
    """Calls a layout's hooks as a step does, and writes down what it does in answer."""

    def __init__(self, layout: Layout, timeline: Timeline, layers: int) -> None:
        self.layout, self.timeline = layout, timeline
        self.names = ["embedding", *map(str, range(layers)), "head"]
        self.groups = dict(layout.anatomy.all_groups())
        self.works: list[Work] = []
        self.reduced_to = 0
        if isinstance(layout, Bucketed):
            self._watch_bucket(layout)

    def _watch_bucket(self, layout: Bucketed) -> None:
        reduce_bucket = layout.reduce_bucket

        def reduce() -> None:
            self.works.append(Work("R", self.reduced_to, layout.filled * layout.reduce))
            reduce_bucket()

        layout.reduce_bucket = reduce

    def step(self, number: int) -> list[Work]:
        self.works, layout = [], self.layout
        self.reduced_to = len(self.names)
        layout.begin_micro_batch(number, first=True, last=True)
        layout.before_forward("root")
        for place, name in enumerate(self.names):
            self._compute("F", place, self._needed(place, lambda name=name: layout.before_forward(name)))
            self._dropping(lambda name=name: layout.after_forward(name))
        layout.after_forward("root")
        layout.begin_backward()
        self.works += self._needed(-1, lambda: layout.before_backward("root"))
        for place, name in reversed([*enumerate(self.names)]):
            ahead = self._needed(place, lambda name=name: layout.before_backward(name))
            self._compute("B", place, ahead, lambda place=place: self._gradients(place))
            self._dropping(lambda name=name: layout.after_backward(name))
        layout.end_backward()
        whole = sum(parameter.numel for parameter in layout.anatomy.parameters())
        if self.whole_gradients:
            self.works.append(Work("R", 0, whole * layout.reduce))
        self._compute("U", 0, [], lambda: layout.update(number))
        if layout.plan.zero_stage in (1, 2):
            self.works.append(Work("P", 0, whole * layout.param))
        return self.works

    @property
    def whole_gradients(self) -> bool:
        """Stage 1: they are reduced when the backward is done."""
        return self.layout.plan.zero_stage == 1

    @property
    def gathered(self) -> set[str]:
        """Groups that are here whole or on their way."""
        layout = self.layout
        if isinstance(layout, FullySharded):
            return {*layout.whole, *layout.pending}
        return {*layout.whole} if isinstance(layout, ZeroStage3) else set()

    def _needed(self, place: int, hook: Callable[[], None]) -> list[Work]:
        """Call a hook that gathers. What this computation needs was fetched while the one before it ran. Returns the
        gathers that were made ahead, for a later computation."""
        before = self.gathered
        hook()
        ahead = []
        last = max((number for number, work in enumerate(self.works, 1) if work.computes), default=0)
        for name in self.gathered - before - {"root"}:
            work = Work("G", self.names.index(name), self._numel(name) * self.layout.param)
            if work.group == place:
                self.works.insert(last, work)
            else:
                ahead.append(work)
        return ahead

    def _compute(self, kind: str, place: int, ahead: list[Work], during: Callable[[], None] = lambda: None) -> None:
        self.timeline.sample()
        work = Work(kind, place)
        self.works += [work, *ahead]
        during()
        # A moment is taken at an allocation.
        self.timeline.free(self.timeline.allocate("workspace", 1))
        self.timeline.sample()
        work.held = self._held()

    def _held(self) -> tuple[int, ...]:
        parts = dict(zip(COMPONENTS, self.timeline.curve[-1].parts, strict=True))
        return tuple(parts[name] for name in SHOWN)

    def _gradients(self, place: int) -> None:
        """The gradients of a group come, and are reduced where the layout does that at once."""
        layout, name = self.layout, self.names[place]
        width = layout.master if isinstance(layout, Replicated) else layout.param
        for parameter in reversed(self.groups[name]):
            layout.gradient(name, parameter.name, self.timeline.allocate("gradients", parameter.numel * width))
        self.reduced_to = place
        if isinstance(layout, Replicated | FullySharded):
            self.works.append(Work("R", place, self._numel(name) * layout.reduce))

    def _dropping(self, hook: Callable[[], None]) -> None:
        before = self.gathered
        hook()
        self.works += [Work("D", self.names.index(name)) for name in before - self.gathered - {"root"}]

    def _numel(self, name: str) -> int:
        return sum(parameter.numel for parameter in self.groups[name])


def _timed(works: list[Work], config: Config, plan: Plan, model: Anatomy) -> list[Work]:
    """Give each its begin and end: computation and communication each do one thing after another."""
    forward, update = _computing(config, plan, model)
    network = build_network(config, gpu(), plan.gpus_per_node)
    group = group_of(plan, SHARD if plan.fully_sharded or plan.zero_stage else REPLICATE)
    waits = plan.zero_stage in (1, 2)
    computed = sent = started = 0.0
    ready: dict[int, float] = {}
    for work in works:
        if work.kind == "D":
            work.begin = work.end = computed
        elif work.computes:
            seconds = update if work.kind == "U" else forward(work.group) * (2 if work.kind == "B" else 1)
            work.begin = max(computed, ready.get(work.group, 0.0), sent if work.kind == "U" else 0.0)
            started, computed = work.begin, work.begin + seconds
            work.end = computed
        else:
            earliest = {"G": started, "R": computed, "P": computed}[work.kind]
            send = network.all_reduce if plan.degree(REPLICATE) > 1 else network.gather
            work.begin = max(sent, earliest)
            work.end = sent = work.begin + send(work.size, group)
            if work.kind == "G":
                ready[work.group] = sent
            elif waits:
                computed = sent
    return works


def _computing(config: Config, plan: Plan, model: Anatomy) -> tuple[Callable[[int], float], float]:
    """Seconds of the forward of a group, and of the update, as the planner times a step of each size: one layer is
    what a step takes longer with one layer more."""

    def seconds(layers: int) -> dict[str, float]:
        fields = {**config.model.architecture, "num_hidden_layers": layers}
        sized = dimensions(fields, outline(layers), config.optimizer)
        return dict(step_time(config, plan, sized, gpu()).seconds)

    count = len(model.layers)
    now, more = seconds(count), seconds(count + 1)
    both = [each["matmuls"] + each["around them"] for each in (now, more)]
    layer = (both[1] - both[0]) / 3
    head = both[0] / 3 - count * layer
    return lambda group: 0.0 if group == 0 else head if group > count else layer, now["update"]


@cache
def gpu() -> Gpu:
    found = find_gpu("H100-SXM")
    assert found is not None
    return found


def waiting(works: list[Work]) -> float:
    """The share of the step in which the rank computes nothing."""
    return 1 - sum(work.end - work.begin for work in works if work.computes) / length(works)


def length(works: list[Work]) -> float:
    return max(work.end for work in works)


def sent_bytes(works: list[Work]) -> float:
    """Of what is gathered or reduced, whole."""
    return sum(work.size for work in works)


def highest(works: list[Work]) -> tuple[int, ...]:
    """What the rank holds at the moment at which it holds most."""
    return max((work.held for work in works if work.held), key=sum)
