"""Newton-Schulz iteration: approximates the nearest orthogonal matrix by matmuls alone.

Jordan 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon). With
X = U S V^T scaled to a spectral norm of at most 1, each step

    A = X X^T;    X <- a X + (b A + c A A) X

applies s -> a s + b s^3 + c s^5 to every singular value and leaves U and V alone. Jordan's coefficients have the
largest slope at zero, so five steps bring nearly all singular values into 0.7 ... 1.2; they do not converge to 1.
(2, -1.5, 0.5) converges. A tall X is iterated as X^T, which has the same singular values and a smaller A.

In bfloat16 an update differs from that in float64 by 1 to 2 % of its norm (`tests/test_muon.py` holds it below 4 %).
"""

from __future__ import annotations

import torch

JORDAN = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # lower bound on the norm that a matrix is divided by: zeros stay zeros


def orthogonalize_(
    x: torch.Tensor, *, steps: int = 5, coefficients: tuple[float, float, float] = JORDAN
) -> torch.Tensor:
    """The iteration's result, in the dtype of x. x is overwritten.

    x: one matrix [m, n], or a batch of them [k, m, n]; contiguous. Allocates one more X and two A: `owners.
    iteration_bytes`.
    """
    a, b, c = coefficients
    memory, tall = x, x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    # One number for one matrix is torch.optim.Muon's own order of additions.
    norm = x.norm() if x.ndim == 2 else x.norm(dim=(-2, -1), keepdim=True)
    x.div_(norm.clamp(min=EPS))
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    following, spare = x.new_empty(x.shape), memory.view(x.shape)
    gram, inner = (x.new_empty((*x.shape[:-1], x.shape[-2])) for _ in range(2))
    for _ in range(steps):
        torch.matmul(x, x.mT, out=gram)
        multiply_add(gram, gram, gram, beta=b, alpha=c, out=inner)
        multiply_add(x, inner, x, beta=a, out=following)
        x, following, spare = following, spare, following
    return x.mT if tall else x
