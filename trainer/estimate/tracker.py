"""Every tensor storage from its birth to its death, in order: the one instrument behind prediction and measurement.

    with StorageTracker() as tracker:
        ...                              any eager code, on real tensors or on fake ones
    tracker.events                       Born and Died in the order in which they happened

A storage is born when an operator first returns it and dies when nothing refers to it any more. FSDP2 frees a tensor
by resizing its storage to nothing; the tracker sees that too. On fake tensors nothing is allocated and the sizes are
the same: this is how a model of 405B parameters is traced on a laptop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True, slots=True)
class Born:
    """number: identifies the storage (an id is not used twice). operator: the one that made it."""

    number: int
    size_bytes: int
    operator: str


@dataclass(frozen=True, slots=True)
class Died:
    number: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A point that the traced code passed: `tracker.mark("...")`."""

    name: str


Event = Born | Died | Mark
CAST = "cast of a parameter"
CASTS = ("aten::_to_copy", "prims::convert_element_type")  # the latter in graphs that are compiled
DEVICE = torch.ops.prim.device.default
"""What a fake tensor's device is read by: more than half of the operators of a trace, which make no storage."""
FLATTEN = "__tensor_flatten__"
"""The method of a tensor that wraps others: the tensor has the size of the whole, and holds no memory of its own."""


class StorageTracker(TorchDispatchMode):
    """Records storages that operators create inside the `with` block. `devices`: kinds that count. on_birth: called at
    each birth; what it raises ends the block."""

    def __init__(
        self,
        devices: tuple[str, ...] = ("cpu",),
        on_event: Callable[[Event], None] | None = None,
        on_birth: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._on_birth = on_birth
        self.events: list[Event] = []
        self._on_event = on_event or self.events.append
        self._devices = devices
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._count = 0
        self._mode_on_entry: Any = None
        self._resize = torch.UntypedStorage.resize_

    def mark(self, name: str) -> None:
        self._on_event(Mark(name))

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor's storage; None if it was not born in here."""
        box = self._known.get(tensor.untyped_storage())
        return box[0] or None if box else None

    def __enter__(self) -> StorageTracker:
        self._mode_on_entry = active_fake_mode()
        tracker, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            tracker._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor) and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device
        if any(hasattr(kind, FLATTEN) for kind in types):
            return NotImplemented  # a DTensor or another wrapper: its operators on the tensors inside come by again
        counts = active_fake_mode() is self._mode_on_entry
        if counts:
            # A storage from outside is older than the tracker: a view of it is no new memory.
            for tensor in _tensors((args, kwargs)):
                self._known.setdefault(tensor.untyped_storage(), [0, 0])
        result = func(*args, **(kwargs or {}))
        # DTensor works out shapes under a fake mode of its own: those tensors are no memory.
        if counts:
            operator = func.name()
            if operator in CASTS and self._known[args[0].untyped_storage()][0] == 0:
                operator = CAST
            for tensor in _tensors(result):
                if tensor.device.type in self._devices and not hasattr(tensor, FLATTEN):
                    self._see(tensor, operator)
        return result

    def _see(self, tensor: torch.Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._born(storage, operator)
            if self._on_birth is not None:
                self._on_birth()

    def _born(self, storage: torch.UntypedStorage, operator: str) -> None:
        size = storage.nbytes()
        self._count += 1
        box = [self._count, size]
        self._known[storage] = box
        # A storage of no bytes is recorded too: FSDP2 makes one and resizes it at each gathering.
        if size:
            self._on_event(Born(self._count, size, operator))
        weakref.finalize(storage, self._died, box).atexit = False

    def _died(self, box: list[int]) -> None:
        if box[1]:
            self._on_event(Died(box[0]))
            box[1] = 0

    def _resized(self, storage: torch.UntypedStorage) -> None:
        box = self._known.get(storage)
        if box is None or box[0] == 0:
            return
        size = storage.nbytes()
        if size == box[1]:
            return
        self._died(box)
        if size:
            self._count += 1
            box[0], box[1] = self._count, size
            self._on_event(Born(self._count, size, "resize_"))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Those that an operator is given or returns. torch's own walk knows more containers, and takes as long as a fifth
    of a trace."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


class Alive:
    """Bytes alive after each event."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self.total = 0

    def count(self, event: Event) -> bool:
        """Whether the event changed it."""
        match event:
            case Born(number, size, _):
                self._sizes[number] = size
                self.total += size
            case Died(number):
                self.total -= self._sizes.pop(number)
            case _:
                return False
        return True
