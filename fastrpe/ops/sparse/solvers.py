"""The solvers of (I + S) u = x and (I - S) u = x for all tokens: each factorises once and is then called for either."""

import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ...backend import problem as backend_problem
from ..cayley import cayley_basis
from .pattern import patterns_of
from .reference import skew

# Solves for tokens (H, N, D) in float64; with True, the transpose.
Solve = Callable[[Tensor, bool], Tensor]
# From theta (H, K) in float64, pairs (K, 2) or (H, K, 2), and D.
Solver = Callable[[Tensor, Tensor, int], Solve]


def _missing(package: str, needed: str, extra: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{needed} is not installed; run 'pip install fastrpe[{extra}]'"


# Why a solver cannot run on a type of device; an empty string where it can. Looked up once, as in backend.py.
PROBLEMS: dict[str, dict[str, str]] = {
    "cpu": {"lu": backend_problem("native", "cpu"), "superlu": _missing("scipy", "SciPy", "superlu")},
    "cuda": {"lu": _missing("nvmath", "nvmath-python", "cudss"), "superlu": "SuperLU runs on a CPU"},
}


def problem(solver: str, device_type: str) -> str:
    """Why ``solver`` cannot run on this type of device, or an empty string."""
    unknown = dict.fromkeys(("lu", "superlu"), f"there is none for device type {device_type!r}")
    return PROBLEMS.get(device_type, unknown).get(solver, "")


def basis(theta: Tensor, pairs: Tensor, size: int) -> Tensor:
    """P of each head, (H, D, D), in float32 at least."""
    low, high = pairs.amin(-1), pairs.amax(-1)
    place = low * (2 * size - low - 1) // 2 + high - low - 1  # among the entries above the diagonal, by rows
    upper = torch.where(pairs[..., 0] < pairs[..., 1], theta, -theta)
    params = theta.new_zeros(len(theta), size * (size - 1) // 2).scatter(1, place.expand(theta.shape), upper)
    return cayley_basis(params)


def matrix(x: Tensor, theta: Tensor, pairs: Tensor, inverse: bool) -> Tensor:
    """P as a matrix, once for all tokens: differentiable PyTorch, and no op of its own."""
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):  # which would round P and the sums
            return matrix(x, theta, pairs, inverse)
    wide = x if x.dtype == torch.float64 else x.float()
    P = basis(theta.to(wide.dtype), pairs, x.shape[-1]).repeat_interleave(x.shape[-3] // len(theta), 0)
    return (wide @ (P if inverse else P.mT)).to(x.dtype)


def dense(theta: Tensor, pairs: Tensor, size: int) -> Solve:
    """Batched dense LU with partial pivoting."""
    parts = zip(*(torch.linalg.lu_factor_ex(A)[:2] for A in _batches(_system(skew(theta, pairs, size)))))
    factors, pivots = (torch.cat(part) for part in parts)

    def solve(x: Tensor, adjoint: bool) -> Tensor:
        u: Tensor = torch.linalg.lu_solve(factors, pivots, x.mT, adjoint=adjoint)
        return u.mT

    return solve


def components(theta: Tensor, pairs: Tensor, size: int) -> Solve:
    """Batched dense inverses of the connected components, those of one size together; what stands alone is copied."""
    parts = []
    for i, pattern in enumerate(patterns_of(pairs, size).each):
        heads = slice(None) if pairs.dim() == 2 else slice(i, i + 1)
        for group in pattern.groups(theta.device):
            n, m = group.vertices.shape
            S = theta.new_zeros(len(theta[heads]), n, m, m)
            component, row, column = group.places
            S[:, component, row, column] = theta[heads][:, group.entries]
            inverse = torch.cat([torch.linalg.inv_ex(A)[0] for A in _batches(_system(S - S.mT).flatten(0, 1))])
            parts.append((heads, group.vertices.flatten(), inverse.unflatten(0, S.shape[:2])))

    def solve(x: Tensor, adjoint: bool) -> Tensor:
        u = x.clone(memory_format=torch.contiguous_format)
        for heads, vertices, inverse in parts:
            part = x[heads][..., vertices].unflatten(-1, inverse.shape[1:3]).transpose(1, 2)  # (H, n, N, m)
            part = part @ (inverse if adjoint else inverse.mT)
            u[heads, :, vertices] = part.transpose(1, 2).flatten(-2)
        return u

    return solve


def cg(theta: Tensor, pairs: Tensor, size: int) -> Solve:
    """Conjugate gradients on I + S^T S, in the form that never squares the condition number (CGLS).

    S has at most D / 2 frequencies, and so many steps suffice in exact arithmetic; rounding asks for more of them where
    S is large. A GPU takes all the steps there may be, since nobody asks it whether it is done.
    """
    heads, steps = len(theta), 4 * size + 16
    S = _sparse(theta, pairs, size)

    def sums(v: Tensor) -> Tensor:  # of squares, for each token
        each: Tensor = v.square().unflatten(0, (heads, size))
        return each.sum(1, keepdim=True)

    def scaled(v: Tensor, by: Tensor) -> Tensor:
        each: Tensor = v.unflatten(0, (heads, size)) * by
        return each.flatten(0, 1)

    def solve(x: Tensor, adjoint: bool) -> Tensor:
        sign = -1 if adjoint else 1
        r = x.mT.reshape(heads * size, -1)  # (H D, N)
        u, s = torch.zeros_like(r), r - sign * (S @ r)
        p, gamma = s, sums(s)
        enough = torch.finfo(r.dtype).eps ** 2 * gamma
        for step in range(steps):
            active = gamma > enough
            if step % 8 == 0 and r.device.type == "cpu" and not active.any():
                break
            q = p + sign * (S @ p)
            alpha = torch.where(active, gamma / sums(q), 0)
            u, r = u + scaled(p, alpha), r - scaled(q, alpha)
            s = r - sign * (S @ r)
            before, gamma = gamma, torch.where(active, sums(s), gamma)
            p = s + scaled(p, torch.where(active, gamma / before, 0))
        found: Tensor = u.unflatten(0, (heads, size))
        return found.mT

    return solve


def superlu(theta: Tensor, pairs: Tensor, size: int) -> Solve:
    """SuperLU, by SciPy: the order of elimination comes from the pattern's analysis, so each call is numeric alone."""
    from scipy.sparse import csc_array
    from scipy.sparse.linalg import splu

    patterns, diagonal, systems = patterns_of(pairs, size).each, torch.arange(size), []
    for i, values in enumerate(theta):
        order = torch.tensor(patterns[i % len(patterns)].order)
        step = torch.empty_like(order).scatter(0, order, diagonal)
        a, b = step[pairs[i] if pairs.dim() == 3 else pairs].unbind(-1)
        places = torch.cat((diagonal, a, b)).numpy(), torch.cat((diagonal, b, a)).numpy()
        entries = torch.cat((torch.ones_like(diagonal, dtype=theta.dtype), values, -values)).numpy()
        matrix = csc_array((entries, places), shape=(size, size))
        options = dict(permc_spec="NATURAL", diag_pivot_thresh=0.0, options=dict(SymmetricMode=True))
        systems.append((matrix, splu(matrix, **options), order, step))

    def solve(x: Tensor, adjoint: bool) -> Tensor:
        u = torch.empty_like(x, memory_format=torch.contiguous_format)
        for i, (matrix, factors, order, step) in enumerate(systems):
            rhs, form = x[i][:, order].mT.numpy(), "T" if adjoint else "N"
            found = factors.solve(rhs, form)
            # Without pivots the factors of a large S grow as |S|^2: one refinement brings back the last digits.
            found += factors.solve(rhs - (matrix.T if adjoint else matrix) @ found, form)
            u[i] = torch.from_numpy(found).mT[:, step]
        return u

    return solve


def cudss(theta: Tensor, pairs: Tensor, size: int) -> Solve:
    """cuDSS, by nvmath-python: one analysis for each pattern and number of tokens."""
    from .cudss import system

    def solve(x: Tensor, adjoint: bool) -> Tensor:
        matrix = _sparse(theta, pairs, size, sign=-1 if adjoint else 1, identity=True)
        one = system(pairs, matrix, x.shape[1], adjoint)
        one.factorise(matrix.values())
        u: Tensor = one.solve(x.mT.flatten(0, 1)).unflatten(0, (len(theta), size))
        return u.mT

    return solve


def _batches(
    x: Tensor,  # (n, D, D)
) -> list[Tensor]:
    """The matrices (D, D) that PyTorch may factorise together: on a CPU a large one goes alone.

    With MKL and after torch.set_num_threads, a batch of them is factorised by threads that spoil each other's pivots,
    and the result is wrong without an error (pytorch/pytorch#142815, seen from D = 151 on).
    """
    alone = x.device.type == "cpu" and x.shape[-1] > 128
    return list(x.split(1)) if alone else [x]


def _system(S: Tensor) -> Tensor:
    return torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) + S


def sampled_product(
    left: Tensor,  # (H, N, D)
    right: Tensor,  # (H, N, D)
    pairs: Tensor,  # (K, 2) or (H, K, 2)
) -> Tensor:
    """sum over n of left_a right_b - left_b right_a for each pair (a, b), (H, K): no other product is computed."""
    H, _, D = left.shape
    K = pairs.shape[-2]
    start, column, order = _structure(pairs, H, D)
    empty = _csr(start, column, left.new_zeros(2 * H * K), H * D)
    rows = left.mT.reshape(H * D, -1), right.mT.reshape(H * D, -1)
    found: Tensor = torch.sparse.sampled_addmm(empty, rows[0], rows[1].mT, beta=0.0).values()
    both = torch.empty_like(found).scatter(0, order, found).view(2, H, K)
    return both[0] - both[1]


def _sparse(theta: Tensor, pairs: Tensor, size: int, *, sign: int = 1, identity: bool = False) -> Tensor:
    """All heads' S as the blocks of one matrix (H D, H D) in CSR, made where theta is; or -S, or I + S, or I - S."""
    n = len(theta) * size
    start, column, order = _structure(pairs, len(theta), size, identity)
    upper = sign * theta.flatten()
    values = torch.cat((upper, -upper, upper.new_ones(n * identity)))
    return _csr(start, column, values[order], n)


def _structure(pairs: Tensor, heads: int, size: int, identity: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Row starts and columns of that matrix, and which of all (a, b), all (b, a) and the diagonal each entry is."""
    n, device = heads * size, pairs.device
    first = size * torch.arange(heads, device=device)[:, None, None]
    a, b = (first + pairs).flatten(0, 1).unbind(-1)
    diagonal = torch.arange(n * identity, device=device)
    row, column = torch.cat((a, b, diagonal)), torch.cat((b, a, diagonal))
    order = (row * n + column).argsort()
    return torch.searchsorted(row[order], torch.arange(n + 1, device=device)), column[order], order


def _csr(start: Tensor, column: Tensor, values: Tensor, size: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # CSR is in beta
        return torch.sparse_csr_tensor(start, column, values, size=(size, size))


# By name. The native library's "lu", for the CPU, is an operator and not a function of these arguments: see op.py.
SOLVERS: dict[str, Solver] = {"components": components, "cg": cg, "dense": dense, "superlu": superlu, "lu": cudss}
