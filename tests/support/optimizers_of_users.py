"""User-defined optimizers for tests of `optimizer.target`."""

from __future__ import annotations

import torch


class Signs(torch.optim.Optimizer):
    """Updates each element by its own gradients. Counts its updates in a Python number, as older optimizers do.

    slow: decay factor of the mean.
    """

    def __init__(self, params, lr=1e-3, slow=0.9):
        super().__init__(params, {"lr": lr, "slow": slow})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["mean"] = p.grad + group["slow"] * state.get("mean", torch.zeros_like(p))  # a new tensor
                p.data = p.data - group["lr"] * state["mean"].sign() / state["step"]


class Columns(Signs):
    """Divides each row of a gradient by its norm."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / p.grad.norm(dim=-1, keepdim=True))


class Together(Signs):
    """Scales the updates of all parameters by the sum of the gradients' maxima."""

    @torch.no_grad()
    def step(self, closure=None):
        everything = [p for group in self.param_groups for p in group["params"]]
        size = sum(p.grad.abs().max() for p in everything)
        for p in everything:
            p.sub_(self.param_groups[0]["lr"] * p.grad.sign() * (size if len(everything) > 1 else 1.0))


class Forgets(Signs):
    """Decays its learning rate by a counter in its param groups."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / group["k"])


class Rounds(Signs):
    """Rounds bfloat16 parameters up or down at random."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                new = p.float() - group["lr"] * p.grad.float()
                noise = torch.randint(0, 2**16, p.shape, dtype=torch.int32) if p.dtype == torch.bfloat16 else 0
                p.copy_(((new.view(torch.int32) + noise) & -(2**16)).view(torch.float32))
