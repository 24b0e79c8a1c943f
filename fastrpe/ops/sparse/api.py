"""The public function of the sparse Cayley transform."""

import torch
from torch import Tensor

from ...checks import check_choice, check_device, check_dtype, check_shape, check_type, fail
from .solvers import matrix, problem

SOLVERS = ("matrix", "lu", "superlu", "components", "cg", "dense")


def sparse_cayley(
    x: Tensor,  # (..., H, L, D)
    theta: Tensor,  # (Hk, K)
    pairs: Tensor,  # (K, 2) or (Hk, K, 2)
    *,
    inverse: bool = False,
    solver: str = "auto",
) -> Tensor:
    r"""Apply the orthogonal matrix whose Cayley parameters are a few numbers at fixed places: STRING with a sparse S.

    .. math:: y = P x, \quad P = (I - S)(I + S)^{-1} = 2 (I + S)^{-1} - I, \qquad S_{ab} = \theta_k = -S_{ba}

    for the pair (a, b) of each k, and 0 elsewhere. Equivalent to::

        S = zeros(Hk, D, D); S[:, a, b] = theta; S[:, b, a] = -theta
        y = 2 * solve(eye(D) + S, x.mT).mT - x                   # for each head

    Args:
        x: tokens, ``(..., H, L, D)``, any strides; float16, bfloat16, float32 or float64.
        theta: the learned numbers, ``(Hk, K)``, ``H`` a multiple of ``Hk`` (a key head and its group of queries).
        pairs: where they stand, ``(K, 2)`` for all heads or ``(Hk, K, 2)``, int64: two different coordinates each, and
            no two pairs alike in a head. The analysis of a pattern is kept for as long as the tensor lives.
        inverse: apply P^T, the inverse.
        solver: what solves for (I + S)^{-1} x; all in float64:

            - ``"matrix"``: P as a dense matrix, from one inverse, then a product in the precision of the result.
            - ``"dense"``: batched dense LU with pivoting, then triangular solves for all tokens.
            - ``"lu"``: sparse LU without pivoting, analysed once for a pattern and factorised anew in each call. On a
              CPU the native library's; on a GPU cuDSS's (``pip install fastrpe[cudss]``).
            - ``"superlu"``: the same by SuperLU, on a CPU (``pip install fastrpe[superlu]``).
            - ``"components"``: the connected components of the pattern as batched small dense inverses.
            - ``"cg"``: conjugate gradients on I + S^T S.
            - ``"auto"``: the fastest by a rule measured on random patterns, from the shapes, the device and whether
              gradients are wanted.

    Returns:
        The shape and dtype of ``x``, contiguous, rounded once. Deterministic, but for cuDSS, which is so for a single
        right-hand side alone. Gradients flow to ``x`` and ``theta``; that of ``theta`` never forms a dense dS but where
        the solver is dense itself. ``"matrix"`` can be differentiated twice, the others with respect to ``x``. On a GPU
        ``"lu"`` and ``"components"`` read a pattern from the device when they first see it; nothing else waits for the
        device.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or choice.
        RuntimeError: the named solver does not run on this machine.

    Source:
        STRING (arXiv 2502.02562) section 3.2, with an S that is sparse.
    """
    op = "sparse_cayley"
    check_type(op, "x", x, Tensor)
    if x.dim() < 3:
        raise fail(op, "x", "have shape (..., H, L, D)", tuple(x.shape))
    check_dtype(op, "x", x)
    check_shape(op, "theta", theta, ("Hk", "K"))
    check_dtype(op, "theta", theta)
    check_device(op, "theta", theta, x.device, "x")
    heads, size = theta.shape[0], x.shape[-1]
    if heads == 0 or x.shape[-3] % heads:
        raise fail(op, "theta", f"have a number of heads that divides H={x.shape[-3]}", heads)
    check_shape(op, "pairs", pairs, ("K", "2"), ("Hk", "K", "2"), **{"Hk": heads, "K": theta.shape[1], "2": 2})
    check_dtype(op, "pairs", pairs, (torch.int64,))
    check_device(op, "pairs", pairs, x.device, "x")
    check_type(op, "inverse", inverse, bool)
    check_choice(op, "solver", solver, ("auto", *SOLVERS))
    if solver == "auto":
        tokens, grad = x.numel() // max(1, heads * size), differentiated(x, theta)
        solver = fastest(x.device.type, size, theta.shape[1], heads, tokens, grad)
    elif why := problem(solver, x.device.type):
        raise RuntimeError(f"{op}: solver must be available on {x.device.type}, got {solver!r}: {why}")
    if solver == "matrix":
        return matrix(x, theta, pairs, inverse)
    y: Tensor = torch.ops.fastrpe.sparse_cayley(x, theta, pairs, inverse, solver)
    return y


def differentiated(*inputs: Tensor) -> bool:
    """Whether gradients of some input are wanted."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def fastest(
    device_type: str, size: int, count: int, heads: int, tokens: int, grad: bool, lu: bool | None = None
) -> str:
    """The solver that ``"auto"`` takes for K = ``count`` pairs placed at random and so many tokens of each head.

    What should take the least time, forward alone or, with ``grad``, forward and backward, which solves three times for
    each token and factorises twice; ``lu`` says whether sparse LU may be taken, by default where it runs. On a CPU
    nanoseconds for each token, on two cores, fitted to examples/string_vit/results/solvers-cpu.json; on a GPU
    milliseconds of two heads on an H100, fitted to solvers-cuda.json beside it.
    """
    if device_type == "cuda" and lu is None and _is_recorded():
        return "matrix"
    if lu is None:
        lu = not problem("lu", device_type)
    each = count / size
    # Elimination fills a random graph in from about one pair for each coordinate on.
    fill = min(size * (size - 1) / 2, count + max(0.0, (each - 1.2) / (each + 8)) * size**2 / 2)
    if device_type == "cuda":
        times = {"matrix": (0.3 if size <= 128 else 1.3 + 1.05e-5 * size**2) + 0.75 * grad}
        if lu:
            once = 0.9 + 2e-6 * size * tokens + (1.5e-5 + 1.5e-8 * tokens) * fill
            times["lu"] = 3 * once + 0.7 if grad else once
        if each <= 0.5:  # beyond, one component holds most coordinates
            times["components"] = (2.45 if grad else 1) * (0.85 + 0.0038 * size)
        return min(times, key=times.__getitem__)
    if device_type != "cpu" or not lu:
        return "matrix"
    solves, factors = (3, 2 / max(tokens, 1)) if grad else (1, 1 / max(tokens, 1))
    sparse = solves * (0.17 * fill + size) + factors * 0.35 * fill**2 / size
    matrix = solves * 0.014 * size**2 + factors * (0.067 * size**3 + 22 * count + 560_000 / heads)
    dense = solves * (0.05 * size**2 + 5.2 * size) + factors * (0.024 * size**3 + 190_000 / heads)
    if dense < min(sparse, matrix):
        return "dense"
    return "lu" if sparse < matrix else "matrix"


def _is_recorded() -> bool:
    """Whether kernels may be recorded, not run: sparse solvers see a pattern, and cuDSS works, on the host."""
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()
