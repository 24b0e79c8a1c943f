"""Random projections W, (M, D), drawn in float64: rows w with E exp(w.z) equal, or close, to exp(|z|^2 / 2).

Every function takes a generator, draws on its device (the CPU without one), and gives ``(*batch, M, D)``, one
independent draw for each entry of ``batch``. A size of which there is no such projection is a ValueError.

Source:
    Performers (arXiv 2009.14794) section 2.4 for orthogonal rows; Choromanski et al. (arXiv 1703.00864) for Hadamard
    matrices times random signs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_choice, fail
from ..ops.features import fwht

Generator = torch.Generator | None


def gaussian(M: int, D: int, *, batch: tuple[int, ...] = (), generator: Generator = None) -> Tensor:
    """Independent entries N(0, 1)."""
    return _normal(*batch, M, D, generator=generator)


def haar(D: int, *, batch: tuple[int, ...] = (), generator: Generator = None) -> Tensor:
    """Uniform over the orthogonal matrices, (*batch, D, D).

    The Q of a QR decomposition alone is not: LAPACK's fixes signs of R that depend on the matrix, so that every first
    coordinate of a row of Q^T would be negative, and features biased. Q times the signs of R's diagonal is uniform.
    """
    q, r = torch.linalg.qr(_normal(*batch, D, D, generator=generator))
    return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT


def orthogonal(
    M: int, D: int, *, norms: str = "chi", batch: tuple[int, ...] = (), generator: Generator = None
) -> Tensor:
    """Rows of Haar matrices, D at a time (block-orthogonal where M > D, the last block cut off), times norms.

    With ``norms="chi"``, those of independent Gaussian vectors, each row is Gaussian: features stay unbiased, and rows
    of a block repel. ``norms="sqrt"`` makes all rows sqrt(D) long: biased, with less variance.
    """
    check_choice("orthogonal", "norms", norms, ("chi", "sqrt"))
    blocks = -(-M // D)
    rows = haar(D, batch=(*batch, blocks), generator=generator).flatten(-3, -2)[..., :M, :]
    return rows * (_norms(M, D, batch, generator) if norms == "chi" else D**0.5)


def simplex(M: int, D: int, *, batch: tuple[int, ...] = (), generator: Generator = None) -> Tensor:
    """Rows of each block of D point to the corners of a regular simplex, turned at random, with norms chi_D.

    The sums of two rows are shorter than orthogonal ones', hence less variance of positive features: the least of any
    arrangement of directions alone (Reid et al., Simplex random features, arXiv 2301.13856).
    """
    if D < 2:
        raise fail("simplex", "D", "be at least 2", D)
    corners = torch.eye(D, dtype=torch.float64, device="cpu") * (D / (D - 1)) ** 0.5
    corners[:-1, :-1] -= (D**0.5 + 1) / (D - 1) ** 1.5
    corners[-1] = (D - 1) ** -0.5
    corners[:, -1] = 0
    blocks = -(-M // D)
    turned = corners.to(_device(generator)) @ haar(D, batch=(*batch, blocks), generator=generator)
    return turned.flatten(-3, -2)[..., :M, :] * _norms(M, D, batch, generator)


def rademacher(M: int, D: int, *, batch: tuple[int, ...] = (), generator: Generator = None) -> Tensor:
    """Independent signs: E exp(w.z) = prod cosh z_l, at most exp(|z|^2 / 2), so features are biased towards 0."""
    return _signs(*batch, M, D, generator=generator)


def orthogonal_rademacher(M: int, D: int, *, batch: tuple[int, ...] = (), generator: Generator = None) -> Tensor:
    """M rows of H P diag(e): H Hadamard, P a random permutation of its columns, e random signs, no row twice.

    Rows are orthogonal exactly and uniform over the signs. P matters: without it the rows agree in the coordinate of
    H's constant column.
    """
    if not 1 <= M <= D:
        raise fail("orthogonal_rademacher", "M", f"lie between 1 and D={D}: no more signs are orthogonal", M)
    H = hadamard(D).to(_device(generator))
    rows, columns = (_rand(*batch, D, generator=generator).argsort(-1) for _ in range(2))
    W = H[rows[..., :M, None], columns[..., None, :]]
    return W * _signs(*batch, 1, D, generator=generator)


def hadamard(D: int) -> Tensor:
    """A Hadamard matrix, (D, D), signs with H H^T = D I: Sylvester's, Paley's or a Kronecker product of the two.

    There is none for other D than 1, 2 and multiples of 4; Paley's construction, which needs a prime, leaves some out,
    the first 52 and 92.
    """
    if D > 0 and D & (D - 1) == 0:
        return fwht(torch.eye(D, dtype=torch.float64, device="cpu"))
    twos = 1
    while D > 0 and D % twos == 0:
        core = _paley(D // twos)
        if core is not None:
            return torch.kron(hadamard(twos), core)
        twos *= 2
    raise fail("hadamard", "D", "be 1, 2 or a multiple of 4 that Sylvester's or Paley's construction reaches", D)


def precondition(
    omega: Tensor,  # (..., M, D)
    *,
    generator: Generator = None,
) -> Tensor:
    """W H diag(e) / sqrt(D), which is W after x -> H diag(e) x / sqrt(D), one e for all rows.

    The map keeps dot products and norms, so kernel and features stay what they were, and spreads x over all
    coordinates: the bias of Rademacher projections falls as sum z_l^4, to three times its least in the mean. Being
    linear, it costs nothing once it is part of W.
    """
    D = omega.shape[-1]
    signs = _signs(*omega.shape[:-2], 1, D, generator=generator).to(omega)
    spread = fwht(omega, scale=D**-0.5) if D & (D - 1) == 0 else omega @ hadamard(D).to(omega) * D**-0.5
    return spread * signs


PROJECTIONS: dict[str, Callable[..., Tensor]] = {
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "simplex": simplex,
    "rademacher": rademacher,
    "orthogonal_rademacher": orthogonal_rademacher,
}


def _paley(D: int) -> Tensor | None:
    """A Hadamard matrix from the squares modulo a prime: D - 1 = 3 mod 4, or D / 2 - 1 = 1 mod 4; None elsewhere."""
    if D >= 4 and D % 4 == 0 and _is_prime(D - 1):  # a multiple of 4, so the prime is 3 mod 4
        q = _residues(D - 1)
        H = torch.ones(D, D, dtype=torch.float64, device="cpu")
        H[1:, 0] = -1
        H[1:, 1:] = q + torch.eye(D - 1, dtype=torch.float64, device="cpu")
        return H
    half = D // 2
    if D >= 4 and D % 4 == 0 and half % 4 == 2 and _is_prime(half - 1):
        S = torch.zeros(half, half, dtype=torch.float64, device="cpu")
        S[0, 1:] = S[1:, 0] = 1
        S[1:, 1:] = _residues(half - 1)
        eye = torch.eye(half, dtype=torch.float64, device="cpu")
        one, other = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64, device="cpu")
        return torch.kron(S, one) + torch.kron(eye, other)
    return None


def _residues(q: int) -> Tensor:
    """(q, q): 1 where i - j is a square modulo the prime q, 0 on the diagonal, -1 elsewhere."""
    character = -torch.ones(q, dtype=torch.float64, device="cpu")
    character[torch.arange(1, q, device="cpu").square() % q] = 1
    character[0] = 0
    index = torch.arange(q, device="cpu")
    return character[(index[:, None] - index) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def _norms(M: int, D: int, batch: tuple[int, ...], generator: Generator) -> Tensor:
    return _normal(*batch, M, D, generator=generator).norm(dim=-1, keepdim=True)


def _device(generator: Generator) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _normal(*size: int, generator: Generator) -> Tensor:
    return torch.randn(size, dtype=torch.float64, device=_device(generator), generator=generator)


def _rand(*size: int, generator: Generator) -> Tensor:
    return torch.rand(size, dtype=torch.float64, device=_device(generator), generator=generator)


def _signs(*size: int, generator: Generator) -> Tensor:
    return torch.randint(2, size, device=_device(generator), generator=generator).double() * 2 - 1
