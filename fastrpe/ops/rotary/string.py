"""The mathematics of STRING: rotations by commuting skew generators, written as a basis and frequencies for `rotate`.

Every continuous relative encoding R(r) = exp(sum_k r_k L_k) with commuting skew-symmetric L_k equals P RoPE(r) P^T
(STRING, arXiv 2502.02562, theorems 3.2 and 3.4), and the outer P cancels in a score. The functions here turn each
parametrisation into P and RoPE's frequencies. All are differentiable and compute in float32 at least.
"""

import math

import torch
from torch import Tensor

from ...checks import fail
from ..cayley import cayley_basis as cayley_basis
from ..cayley.reference import cayley as cayley
from ..cayley.reference import skew as skew


def fourier_basis(
    size: int,
    block: int | None = None,
    *,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """The real Fourier basis (d, d) of circulants, or of d / block circulant blocks: rows in the order of `rotate`.

    A block of even size gives the planes (constant, alternating) and (cos_k, sin_k), k = 1 ... block / 2 - 1; one of
    odd size gives (cos_k, sin_k), k = 1 ... (block - 1) / 2, and its constant row comes last, where nothing rotates.
    """
    block = _block("fourier_basis", size, block)
    t = torch.arange(block, device=device)
    k = torch.arange(block // 2, device=device).unsqueeze(-1) + block % 2
    angle = (k * t % block).to(torch.float64) * (2 * math.pi / block)  # reduced while it is an integer
    first, second = angle.cos() * math.sqrt(2 / block), angle.sin() * math.sqrt(2 / block)
    constant = angle.new_full((1, block), 1 / math.sqrt(block))
    rest = constant[: block % 2]
    if block % 2 == 0:
        first = torch.cat((constant, first[1:]))
        second = torch.cat((constant * (1 - 2 * (t % 2)), second[1:]))
    eye = torch.eye(size // block, dtype=angle.dtype, device=device)
    first, second, rest = (torch.kron(eye, rows) for rows in (first, second, rest))
    planes = torch.stack((first, second), 1).flatten(0, 1) if interleaved else torch.cat((first, second))
    return torch.cat((planes, rest)).to(dtype)


def circulant_freqs(c: Tensor, block: int | None = None) -> Tensor:
    """The frequencies (..., R) of the generators L = C - C^T, C circulant with first column ``c`` (..., d).

    They are -2 Im FFT(c)_k, for the planes of `fourier_basis`; the plane (constant, alternating) never turns.
    """
    block = _block("circulant_freqs", c.shape[-1], block)
    imag: Tensor = torch.fft.rfft(_blocks(c, block)).imag
    return (-2 * imag[..., block % 2 : block % 2 + block // 2]).flatten(-2)


def circulant_sines(
    size: int,
    block: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """The matrix (R, d) of `circulant_freqs`, which are ``(c.unsqueeze(-2) * sines).sum(-1)``."""
    block = _block("circulant_sines", size, block)
    t = torch.arange(block, device=device)
    k = torch.arange(block // 2, device=device).unsqueeze(-1) + block % 2
    angle = (k * t % block).to(torch.float64) * (2 * math.pi / block)
    eye = torch.eye(size // block, dtype=angle.dtype, device=device)
    return torch.kron(eye, 2 * angle.sin()).to(dtype)


def circulant_params(freqs: Tensor, size: int, block: int | None = None) -> Tensor:
    """The first columns (..., d) of least norm whose frequencies are ``freqs`` (..., R): c = irfft(-i freqs / 2).

    Frequencies of the planes (constant, alternating), which do not turn, are lost.
    """
    block = _block("circulant_params", size, block)
    imag = _blocks(freqs, block // 2) / -2
    pad = block % 2, 1 - block % 2  # the constant's bin where no plane has it, and the alternating one's
    imag = torch.nn.functional.pad(imag, pad)
    c: Tensor = torch.fft.irfft(torch.complex(torch.zeros_like(imag), imag), n=block)
    return c.flatten(-2)


def circulant_rotate(
    x: Tensor,  # (B, H, L, d)
    positions: Tensor,  # (L, C) or (B, L, C)
    c: Tensor,  # (Hk, C, d)
    block: int | None = None,
) -> Tensor:
    """Circulant-STRING as the paper computes it: R(r) x = irfft(exp(2 i sum_k r_k Im rfft(c_k)) rfft(x)).

    The specification that `rotate` with `fourier_basis` and `circulant_freqs` meets, up to the outer Fourier basis,
    which this form applies and which no score can see.
    """
    block = _block("circulant_rotate", x.shape[-1], block)
    imag = torch.fft.rfft(_blocks(c.double(), block)).imag
    phase = 2 * torch.einsum("...lc,hcnk->...hlnk", positions.double(), imag)
    if c.shape[0] > 1:
        phase = phase.repeat_interleave(x.shape[1] // c.shape[0], -4)
    spectrum = torch.fft.rfft(_blocks(x, block))
    turned = torch.complex(phase.cos(), phase.sin()).to(spectrum.dtype) * spectrum
    y: Tensor = torch.fft.irfft(turned, n=block)
    return y.flatten(-2).to(x.dtype)


def _block(op: str, size: int, block: int | None) -> int:
    block = size if block is None else block
    if block < 3 or size % block:
        raise fail(op, "block", f"be at least 3 and divide d={size}", block)
    return block


def _blocks(x: Tensor, block: int) -> Tensor:
    """(..., d) as (..., d / block, block), in float32 at least, which FFTs need."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.reshape(*x.shape[:-1], -1, block)
