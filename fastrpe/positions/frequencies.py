"""Frequencies of rotary encodings, radians per unit of position, in float64 on the host: RoPE's and its extensions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, fail

SCALINGS = ("default", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope")
_KEYS = frozenset(
    "rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings max_position_embeddings "
    "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate low_freq_factor high_freq_factor "
    "short_factor long_factor".split()
)


def axial(groups: Sequence[int], base: float) -> Tensor:
    """(C, R): coordinate c alone turns a group of g = groups[c] planes, at base^(-t / g) for t = 0 ... g - 1."""
    freqs: Tensor = torch.block_diag(*(geometric(g, base) for g in groups))
    return freqs


def geometric(planes: int, base: float) -> Tensor:
    """(R,): base^(-t / R), RoPE's theta_t for a head of d = 2 R."""
    return base ** (-torch.arange(planes, dtype=torch.float64, device="cpu") / max(planes, 1))


def mixed(heads: int, coords: int, planes: int, base: float, generator: torch.Generator | None = None) -> Tensor:
    """(H, C, R): every plane turns with every coordinate, each head along its own random axes.

    With magnitudes m_t = base^(-t / n), n = R / C, and a rotation Q of R^C for each head, plane j n + t has frequency
    m_t Q_j. For C = 2 these are rope-vit's m_t (cos a, sin a) and m_t (cos(a + pi / 2), sin(a + pi / 2)), a uniform.
    """
    device = "cpu" if generator is None else generator.device
    normal = torch.randn(heads, coords, coords, dtype=torch.float64, device=device, generator=generator).cpu()
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # makes Q uniform over O(C)
    q[:, 0] *= torch.linalg.det(q).sign().unsqueeze(-1)
    return torch.einsum("hjc,t->hcjt", q, geometric(planes // coords, base)).flatten(-2)


def rope_type(scaling: Mapping[str, Any]) -> str:
    """The kind of a Hugging Face ``rope_scaling`` (``rope_parameters``) dict."""
    unknown = sorted(set(scaling) - _KEYS)
    if unknown:
        raise fail("RoPE", "scaling", "have keys among " + ", ".join(sorted(_KEYS)), ", ".join(unknown))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    check_choice("RoPE", "scaling['rope_type']", kind, SCALINGS)
    return str(kind)


def scale(scaling: Mapping[str, Any], planes: int, base: float) -> tuple[Tensor, float]:
    """Frequencies (R,) up to the original length, and the attention factor, of a ``rope_scaling`` dict."""
    kind = rope_type(scaling)
    freqs = geometric(planes, base)
    if kind == "default":
        return freqs, 1.0
    if kind == "dynamic":
        get(scaling, "factor")  # `RoPE` stretches by it when the length is known
        return freqs, 1.0
    if kind == "linear":
        return freqs / get(scaling, "factor"), 1.0
    if kind == "ntk":
        return stretch(freqs, get(scaling, "factor")), 1.0
    if kind == "yarn":
        return _yarn(scaling, freqs, base)
    if kind == "llama3":
        return _llama3(scaling, freqs), 1.0
    return _longrope(scaling, freqs, "short_factor")


def scale_beyond(scaling: Mapping[str, Any], planes: int, base: float) -> Tensor:
    """LongRoPE's frequencies (R,) for sequences beyond the original length."""
    return _longrope(scaling, geometric(planes, base), "long_factor")[0]


def stretch(freqs: Tensor, growth: float) -> Tensor:
    """NTK scaling: raise the base to base growth^(d / (d - 2)), which divides the lowest frequency by ``growth``."""
    planes = freqs.shape[-1]
    exponent = torch.arange(planes, dtype=torch.float64, device=freqs.device) / (1 - planes)
    # A tensor, because torch.compile cannot take a power of a number that depends on the length.
    return (freqs * exponent.new_full((), growth) ** exponent).to(freqs.dtype)


def original_length(scaling: Mapping[str, Any]) -> int:
    for key in ("original_max_position_embeddings", "max_position_embeddings"):
        if scaling.get(key) is not None:
            return int(scaling[key])
    return int(get(scaling, "original_max_position_embeddings"))


def get(scaling: Mapping[str, Any], key: str) -> Any:
    if scaling.get(key) is None:
        raise fail("RoPE", "scaling", f"have the key {key!r} for {rope_type(scaling)!r}", ", ".join(sorted(scaling)))
    if key == "factor" and not scaling[key] > 0:
        raise fail("RoPE", "scaling['factor']", "be positive", scaling[key])
    return scaling[key]


def _yarn(scaling: Mapping[str, Any], freqs: Tensor, base: float) -> tuple[Tensor, float]:
    factor, length = _factor(scaling), original_length(scaling)
    d = 2 * len(freqs)

    def plane(turns: float) -> float:
        """The plane that turns so often over the original length."""
        return d * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = plane(scaling.get("beta_fast") or 32), plane(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(len(freqs), dtype=torch.float64, device="cpu") - low) / (high - low)).clamp(0, 1)
    freqs = torch.lerp(freqs, freqs / factor, ramp)  # exact at both ends

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = mscale(over) / mscale(under) if over and under else mscale(1)
    return freqs, float(attention)


def _llama3(scaling: Mapping[str, Any], freqs: Tensor) -> Tensor:
    factor, length = get(scaling, "factor"), original_length(scaling)
    low, high = get(scaling, "low_freq_factor"), get(scaling, "high_freq_factor")
    turns = length * freqs / (2 * math.pi)  # over the original length: at most low divides, high or more keeps
    return torch.lerp(freqs / factor, freqs, ((turns - low) / (high - low)).clamp(0, 1))


def _longrope(scaling: Mapping[str, Any], freqs: Tensor, key: str) -> tuple[Tensor, float]:
    factors, length = get(scaling, key), original_length(scaling)
    if len(factors) != len(freqs):
        raise fail("RoPE", f"scaling[{key!r}]", f"have R={len(freqs)} numbers", len(factors))
    attention = scaling.get("attention_factor")
    if attention is None:
        factor = _factor(scaling)
        attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return freqs / torch.tensor(factors, dtype=torch.float64, device="cpu"), float(attention)


def _factor(scaling: Mapping[str, Any]) -> float:
    if scaling.get("factor") is None and scaling.get("max_position_embeddings") is not None:
        return float(scaling["max_position_embeddings"] / get(scaling, "original_max_position_embeddings"))
    return float(get(scaling, "factor"))
