"""Muon: SGD with momentum whose update is orthogonalised, matrix by matrix.

    B <- momentum B + (1 - momentum) G                  on each rank's own piece, as torch.optim.Muon has it
    U <- NewtonSchulz(G + momentum (B - G))             on the whole matrix (without nesterov: of B)
    W <- (1 - lr weight_decay) W - lr r(shape) U        on each rank's own piece; r: `owners.adjusted`

Jordan 2024 (kellerjordan.github.io/posts/muon); decay and `match_rms_adamw` from Liu et al. 2025, "Muon is scalable for
LLM training" (Moonlight, arXiv:2502.16982). Orthogonalisation is not elementwise: the update of a piece differs from
the piece of the update. `exchange` sends matrices to their owners and updates back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trainer.optim.muon.exchange import Cells, Fleet, Job, Placed, block
from trainer.optim.muon.newton_schulz import JORDAN, orthogonalize_
from trainer.optim.muon.owners import BUCKET_BYTES, Piece, adjusted, boxes
from trainer.optim.placed import local, local_gradient

MUON_DEFAULTS = {
    "momentum": 0.95,
    "nesterov": True,
    "steps": 5,
    "coefficients": JORDAN,
    "adjust_lr": "original",
    "dtype": torch.bfloat16,
}


class Muon(torch.optim.Optimizer):
    """Param groups hold `params`, `lr`, `weight_decay`, `matrices`, one `owners.Matrices` per parameter, and the keys
    of MUON_DEFAULTS. State: momentum_buffer.

    replicas: the group of ranks that hold the same plain tensors (DDP), or None. The mesh of a DTensor names its own.
    bucket_bytes: maximum size of the matrices that a rank gathers at once; a larger matrix is gathered alone. See
    `owners.update_bytes`.

    All ranks that share a parameter must agree on whether it has a gradient, as FSDP and DDP require too.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        replicas: Any = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.replicas, self.bucket_bytes = replicas, bucket_bytes
        self._fleets: dict[tuple[Any, ...], list[Fleet]] = {}
        self._groups: dict[tuple[int, ...], Any] = {}
        super().__init__(groups, {"lr": 0.02, "weight_decay": 0.0, **MUON_DEFAULTS})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter, matrices in zip(group["params"], group["matrices"], strict=True):
            boxes(parameter.shape, matrices)
            adjusted(parameter.shape, group["adjust_lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        """Momentum and decay on the pieces, all parameters at once; then the orthogonalised updates, round by round."""
        weights: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        momenta: list[torch.Tensor] = []
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if not held:
                continue
            for parameter in held:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            begin = len(weights)
            weights += [local(parameter) for parameter in held]
            gradients += [local_gradient(parameter) for parameter in held]
            momenta += [local(self.state[parameter]["momentum_buffer"]) for parameter in held]
            torch._foreach_lerp_(momenta[begin:], gradients[begin:], 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_mul_(weights[begin:], 1 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        if not weights:
            return

        def fill(job: Job, piece: Piece, into: torch.Tensor) -> None:
            group = self.param_groups[job.group]
            momentum = block(momenta[job.parameter], piece.local)
            if group["nesterov"]:
                momentum = block(gradients[job.parameter], piece.local).lerp(momentum, group["momentum"])
            into.copy_(momentum)

        def iterate(number: int, x: torch.Tensor) -> torch.Tensor:
            group = self.param_groups[number]
            return orthogonalize_(x, steps=group["steps"], coefficients=group["coefficients"])

        def apply(job: Job, piece: Piece, update: torch.Tensor) -> None:
            weight, group = weights[job.parameter], self.param_groups[job.group]
            rate = group["lr"] * adjusted(job.shape, group["adjust_lr"], transposed=job.transposed)
            block(weight, piece.local).add_(update.to(weight.device), alpha=-rate)

        dtypes = [group["dtype"] for group in self.param_groups]
        for fleet in self._assigned():
            fleet.run(fill, iterate, dtypes, apply)

    def _assigned(self) -> list[Fleet]:
        """The parameters with a gradient, by their ranks and by the dtype of the messages."""
        live = tuple(
            (number, place)
            for number, group in enumerate(self.param_groups)
            for place, parameter in enumerate(group["params"])
            if parameter.grad is not None
        )
        if live not in self._fleets:
            self._fleets[live] = self._assign(live)
        return self._fleets[live]

    def _assign(self, live: tuple[tuple[int, int], ...]) -> list[Fleet]:
        found: dict[Any, tuple[torch.Tensor, list[Job], set[Any]]] = {}
        for count, (number, place) in enumerate(live):
            group = self.param_groups[number]
            parameter, matrices = group["params"][place], group["matrices"][place]
            placements = tuple(parameter.placements) if isinstance(parameter, DTensor) else ()
            placed = Placed(shape=tuple(parameter.shape), placements=placements)
            wire = _narrower(group["dtype"], parameter.dtype)
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            ranks = () if mesh is None else (tuple(mesh.shape), *mesh.mesh.flatten().tolist())
            _, jobs, seen = found.setdefault((ranks, wire), (parameter, [], set()))
            seen.add(placements)
            jobs += [
                Job(
                    parameter=count,
                    group=number,
                    placed=placed,
                    box=box,
                    steps=group["steps"],
                    transposed=matrices.transposed,
                )
                for box in boxes(parameter.shape, matrices)
            ]
        fleets = []
        for (_, wire), (parameter, jobs, seen) in found.items():
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            cells = Cells(mesh, seen, self.replicas, self._groups)
            device = local(parameter).device
            fleets.append(Fleet(cells, jobs, wire=wire, device=device, bucket_bytes=self.bucket_bytes))
        return fleets


def _narrower(iteration: torch.dtype, parameter: torch.dtype) -> torch.dtype:
    return parameter if parameter.itemsize < iteration.itemsize else iteration
