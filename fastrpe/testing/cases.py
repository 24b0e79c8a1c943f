"""Every workload once: read by the conformance suite and by the benchmarks. Names say where sizes come from."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
Make = Callable[[torch.device, torch.dtype, int], Arguments]


@dataclass(frozen=True)
class Case:
    """A call of ``op``: ``make(device, dtype, seed)`` gives its arguments by name, options included.

    Tags: ``tiny`` (for numerical derivatives and interpreted kernels), ``far`` (positions up to a million), ``bench``
    and ``cpu-bench`` (timed on a GPU, on a CPU; too large for the suite), ``twin`` (a bench case made small),
    ``learned`` (frequencies, and a basis, that require grad where it is timed), ``length`` (one of a sweep),
    ``stop-gradient`` (its gradient is not its derivative), ``not-triton`` (beyond the limits of the Triton kernels).
    """

    op: str
    name: str
    make: Make = field(repr=False, compare=False)
    tags: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def rope_freqs(coords: int, planes: int, base: float = 10000.0) -> Tensor:
    """Axial frequencies (C, R): the planes fall into one group for each coordinate, each with geometric frequencies."""
    freqs = torch.zeros(coords, planes, dtype=torch.float64)
    for c, group in enumerate(torch.arange(planes).tensor_split(coords)):
        n = len(group)
        freqs[c, group] = base ** (-torch.arange(n, dtype=torch.float64) / max(n, 1))
    return freqs


def fourier_basis(size: int) -> Tensor:
    """The real orthogonal Fourier basis (D, D), rows cos then sin, as circulant-STRING uses it in the half layout."""
    n = torch.arange(size, dtype=torch.float64)
    rows = torch.arange(size // 2, dtype=torch.float64)[:, None]
    cos, sin = torch.cos(2 * math.pi * rows * n / size), torch.sin(2 * math.pi * rows * n / size)
    if size % 2:
        # No Nyquist row to pair with the constant: planes are k = 1, 2, ..., and the constant comes last.
        cos, sin = torch.cos(2 * math.pi * (rows + 1) * n / size), torch.sin(2 * math.pi * (rows + 1) * n / size)
        basis = torch.cat((cos, sin, torch.full((1, size), 0.5**0.5, dtype=torch.float64)))
        return basis * (2 / size) ** 0.5
    cos[0] = 0.5**0.5
    sin[0] = torch.cos(math.pi * n) * 0.5**0.5
    return torch.cat((cos, sin)) * (2 / size) ** 0.5


def _grid(coords: int, grid: tuple[int, ...], length: int) -> Tensor:
    """Positions (L, C): token numbers, or the cells of a grid with x first, row-major, or scattered points."""
    if grid:
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
        return torch.stack([a.flatten() for a in reversed(axes)], -1)
    if coords == 1:
        return torch.arange(length, dtype=torch.float64)[:, None]
    draw = torch.Generator().manual_seed(length)
    return torch.rand(length, coords, generator=draw, dtype=torch.float64) * 60 - 30


def _layout(x: Tensor, layout: str) -> Tensor:
    """The same values seen through other strides."""
    if layout == "transposed":  # (B, L, H, D) memory, what a projection gives
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":  # every second number of a row: no vector loads
        return torch.stack((x, torch.full_like(x, math.nan)), -1).flatten(-2)[..., ::2]
    if layout == "shifted":  # contiguous rows that start off 16 bytes
        return torch.cat((torch.full_like(x[..., :1], math.nan), x), -1)[..., 1:]
    if layout == "expanded":
        return x[:, :1].expand_as(x)
    return x


def _qk(
    device: torch.device, dtype: torch.dtype, seed: int, B: int, H: int, Hk: int | None, L: int, D: int, layout: str
) -> tuple[torch.Generator, Tensor, Tensor | None]:
    draw = torch.Generator(device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        return _layout(torch.randn(B, heads, L, D, device=device, dtype=dtype, generator=draw), layout)

    return draw, normal(H), None if Hk is None else normal(Hk)


def _angle_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate_case(
    name: str,
    *tags: str,
    B: int = 2,
    H: int = 4,
    Hk: int | None = -1,  # -1: as H; None: no keys
    L: int = 33,
    D: int = 32,
    C: int = 1,
    R: int | None = None,
    grid: tuple[int, ...] = (),
    per_head: bool = False,
    packed: bool = False,
    basis: str = "",
    far: float = 0.0,
    layout: str = "",
    prefix: int = 0,
    **options: Any,
) -> Case:
    heads = H if Hk == -1 else Hk
    sets = heads or H  # what per-head tensors have

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        draw, q, k = _qk(device, dtype, seed, B, H, heads, L, D, layout)
        angle: Arguments = dict(device=device, dtype=_angle_dtype(dtype))
        positions = _grid(C, grid, L - prefix).to(**angle)
        if packed:  # documents that restart at zero, of another split in each row of the batch
            cut = torch.arange(1, B + 1, device=device) * (L - prefix) // (B + 1)
            index = torch.arange(L - prefix, device=device)[None]
            positions = positions[torch.where(index < cut[:, None], index, index - cut[:, None])]
        if far:
            sign = 2 * torch.rand(positions.shape, generator=draw, **angle) - 1
            positions = (far * sign).round()
        freqs = rope_freqs(C, D // 2 if R is None else R).to(**angle)
        if per_head:  # rope-vit's mixed frequencies: every plane sees every coordinate, each head its own direction
            size = freqs.sum(0)
            direction = torch.randn(sets, C, size.numel(), generator=draw, **angle)
            freqs = size * direction / direction.norm(dim=1, keepdim=True)
        p = None
        if basis == "dense":
            p = torch.linalg.qr(torch.randn(sets, D, D, generator=draw, **angle))[0].to(dtype)
        elif basis == "shared":
            p = fourier_basis(D).to(device=device, dtype=dtype)
        return dict(q=q, k=k, positions=positions, freqs=freqs, basis=p, prefix=prefix, **options)

    return Case("rotate", name, make, frozenset(tags))


def cos_sin_case(
    name: str,
    *tags: str,
    B: int = 2,
    H: int = 4,
    Hk: int | None = -1,
    L: int = 33,
    D: int = 32,
    R: int | None = None,
    packed: bool = False,
    layout: str = "",
    prefix: int = 0,
    **options: Any,
) -> Case:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        draw, q, k = _qk(device, dtype, seed, B, H, H if Hk == -1 else Hk, L, D, layout)
        angle = _grid(1, (), L - prefix).to(device) * rope_freqs(1, D // 2 if R is None else R).to(device)
        if packed:
            angle = angle + torch.rand(B, 1, 1, device=device, generator=draw, dtype=torch.float64)
        tables = (t.to(_angle_dtype(dtype)) for t in (angle.cos(), angle.sin()))
        return dict(q=q, k=k, **dict(zip(("cos", "sin"), tables)), prefix=prefix, **options)

    return Case("rotate_cos_sin", name, make, frozenset(tags))


def features_case(
    name: str,
    *tags: str,
    B: int = 2,
    H: int = 3,
    L: int = 65,
    D: int = 32,
    M: int | None = 48,  # None: no projection
    kind: str = "positive",
    per_head: bool = False,
    a: float | None = None,
    layout: str = "",
    **options: Any,
) -> Case:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        draw = torch.Generator(device).manual_seed(seed)
        # Of half the size of normalised queries: exponentials of larger ones would be told by their largest alone.
        x = _layout(torch.randn(B, H, L, D, device=device, dtype=dtype, generator=draw) / 2, layout)
        wide: Arguments = dict(device=device, dtype=_angle_dtype(dtype))
        arguments: Arguments = dict(x=x, omega=None, kind=kind, **options)
        if M is not None:
            shape = (H, M, D) if per_head else (M, D)
            omega = torch.randn(shape, generator=draw, **wide)
            arguments["omega"] = omega.to(dtype).to(omega.dtype)  # as it is read
        if a is not None:
            arguments["a"] = torch.full((), a, **wide)
        return arguments

    stops = {"stop-gradient"} if options.get("stabilizer") else set()
    return Case("random_features", name, make, frozenset(tags) | stops)


def linear_case(
    name: str,
    *tags: str,
    B: int = 2,
    H: int = 4,
    Hk: int = 2,
    L: int = 70,
    S: int | None = None,  # as L
    D: int = 16,
    V: int = 24,
    M: int | None = 20,  # None: no projection
    kind: str = "positive",
    per_head: bool = False,
    a: float | None = None,
    masked: bool = False,
    packed: tuple[int, ...] = (),  # lengths
    size: float = 1.0,
    layout: str = "",
    **options: Any,
) -> Case:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        draw = torch.Generator(device).manual_seed(seed)
        keys = L if S is None else S

        def normal(*shape: int) -> Tensor:
            return _layout(torch.randn(shape, device=device, dtype=dtype, generator=draw), layout)

        arguments: Arguments = dict(q=size * normal(B, H, L, D), k=size * normal(B, Hk, keys, D))
        arguments |= dict(v=normal(B, Hk, keys, V), omega=None, kind=kind, **options)
        wide: Arguments = dict(device=device, dtype=_angle_dtype(dtype))
        if kind == "features":  # positive: weights that sum to nearly 0 make every error large
            arguments |= {n: arguments[n].abs() for n in ("q", "k")}
        elif M is not None:
            omega = torch.randn((Hk, M, D) if per_head else (M, D), generator=draw, **wide)
            arguments["omega"] = omega.to(dtype).to(omega.dtype)  # as it is read
        if a is not None:
            arguments["a"] = torch.full((), a, **wide)
        if masked:
            arguments["mask"] = torch.rand(B, keys, device=device, generator=draw) < 0.7
        if packed:
            ends = torch.tensor(packed, device=device).cumsum(0)
            arguments["cu_seqlens"] = torch.nn.functional.pad(ends, (1, 0)).int()
        return arguments

    eps, exponential = options.get("eps", 0.0), kind in ("positive", "hyperbolic", "oprf", "exp")
    signed = kind == "trigonometric" and (options.get("causal", False) or not options.get("normalize", True))
    limits = {"not-triton"} if packed or signed or (eps and exponential) else set()
    return Case("linear_attention", name, make, frozenset(tags) | limits)


VIT: Arguments = dict(
    B=2, H=3, L=197, D=64, C=2, grid=(14, 14), prefix=1
)  # ViT-Ti/16 at 224 pixels: 14 x 14 patches and CLS
LLM: Arguments = dict(B=8, H=32, L=4096, D=128)
LONG: Arguments = dict(B=1, H=32, L=131072, D=128)
VIT_256: Arguments = dict(B=64, H=12, L=256, D=64, C=2, grid=(16, 16))
CPU_2048: Arguments = dict(B=1, H=8, L=2048, D=64)
TINY: Arguments = dict(B=2, H=2, L=3, D=4)

PERFORMER: Arguments = dict(B=16, H=12, L=1024, D=64, M=128)

TINY_LINEAR: Arguments = dict(B=2, H=2, Hk=1, L=5, D=3, V=2, M=4)

CASES: tuple[Case, ...] = (
    # Sizes that people have
    rotate_case("vit-197", **VIT),
    rotate_case("vit-197-mixed", **VIT, per_head=True),
    rotate_case("vit-197-cayley", **VIT, per_head=True, basis="dense"),
    rotate_case("decode-1", B=3, H=8, Hk=2, L=1, D=64, packed=True),
    rotate_case("gqa", H=8, Hk=2),
    rotate_case("gqa-mixed", H=6, Hk=2, C=2, per_head=True),
    rotate_case("mqa", H=5, Hk=1, per_head=True),
    rotate_case("packed", B=3, packed=True),
    rotate_case("packed-prefix-mixed", B=3, C=3, packed=True, prefix=2, per_head=True),
    # Edges of the sizes
    rotate_case("one-token", L=1),
    rotate_case("batch-0", B=0),
    rotate_case("batch-0-packed-mixed", B=0, packed=True, per_head=True, basis="dense"),
    rotate_case("length-0", L=0),
    rotate_case("ragged-65", L=65, H=3),
    rotate_case("ragged-127", B=1, L=127, H=1, D=128),
    rotate_case("head-256", B=1, L=9, H=2, D=256),
    rotate_case("odd-head-65", D=65),
    rotate_case("odd-head-65-basis", D=65, basis="dense", prefix=1),
    rotate_case("head-2", D=2),
    rotate_case("head-80", D=80),
    rotate_case("partial", D=64, R=12),
    rotate_case("partial-interleaved", D=64, R=12, interleaved=True),
    rotate_case("partial-7", D=30, R=7, C=2),
    rotate_case("no-planes", R=0),
    rotate_case("no-planes-basis", R=0, basis="dense"),
    rotate_case("prefix-all", L=5, prefix=5),
    rotate_case("prefix-all-basis", L=5, prefix=5, basis="dense"),
    # Options
    rotate_case("interleaved", interleaved=True),
    rotate_case("inverse", inverse=True),
    rotate_case("factor", factor=1.25),
    rotate_case("interleaved-inverse-factor", interleaved=True, inverse=True, factor=0.75, C=2, per_head=True),
    rotate_case("space-3", C=3),
    rotate_case("space-4-mixed", C=4, per_head=True),
    rotate_case("queries-alone", Hk=None),
    rotate_case("queries-alone-mixed-basis", Hk=None, per_head=True, basis="dense"),
    rotate_case("basis-dense", basis="dense"),
    rotate_case("basis-shared", basis="shared", per_head=True),
    rotate_case("basis-inverse", basis="dense", inverse=True),
    rotate_case("basis-shared-inverse", basis="shared", inverse=True, interleaved=True),
    rotate_case("basis-prefix-gqa", H=8, Hk=2, basis="dense", prefix=3, C=2, per_head=True),
    rotate_case("basis-prefix-gqa-inverse", H=8, Hk=2, basis="dense", prefix=3, inverse=True),
    rotate_case("basis-partial", D=64, R=10, basis="dense"),
    rotate_case("basis-head-64", D=64, L=70, basis="dense", per_head=True),
    # Any strides
    rotate_case("transposed", layout="transposed"),
    rotate_case("strided", layout="strided"),
    rotate_case("shifted", layout="shifted"),
    rotate_case("expanded", layout="expanded"),
    rotate_case("transposed-interleaved-prefix", layout="transposed", interleaved=True, prefix=1),
    rotate_case("strided-basis", layout="strided", basis="dense"),
    rotate_case("transposed-basis", layout="transposed", basis="shared"),
    # Far out
    rotate_case("far", "far", far=1e6),
    rotate_case("far-mixed", "far", far=1e6, C=2, per_head=True, packed=True),
    rotate_case("far-basis", "far", far=1e6, basis="dense"),
    # For numerical derivatives and interpreted kernels: every feature once, as small as it gets
    rotate_case("tiny", "tiny", **TINY),
    rotate_case("tiny-image-gqa-prefix", "tiny", **TINY | dict(H=4), Hk=2, C=2, per_head=True, prefix=1),
    rotate_case("tiny-packed-partial", "tiny", **TINY | dict(D=6), R=2, packed=True, interleaved=True, factor=1.5),
    rotate_case("tiny-inverse-mixed", "tiny", **TINY, inverse=True, per_head=True, factor=1.5),
    rotate_case("tiny-queries-alone", "tiny", **TINY, Hk=None, per_head=True),
    rotate_case("tiny-basis", "tiny", **TINY, basis="dense", per_head=True),
    rotate_case("tiny-basis-shared-gqa-prefix", "tiny", **TINY, Hk=1, basis="shared", prefix=1, packed=True),
    rotate_case("tiny-basis-inverse", "tiny", **TINY, basis="dense", inverse=True, factor=1.5),
    rotate_case("tiny-basis-16", "tiny", B=1, H=2, Hk=1, L=18, D=16, basis="dense", prefix=1, per_head=True),
    rotate_case("tiny-basis-16-inverse", "tiny", B=1, H=2, Hk=1, L=18, D=16, basis="shared", inverse=True),
    rotate_case("tiny-transposed", "tiny", **TINY, layout="transposed"),
    # Tables
    cos_sin_case("llama-65", B=2, H=8, Hk=2, L=65, D=64),
    cos_sin_case("one-token", L=1),
    cos_sin_case("batch-0", B=0),
    cos_sin_case("length-0", L=0),
    cos_sin_case("packed", B=3, packed=True),
    cos_sin_case("packed-prefix", B=3, packed=True, prefix=2),
    cos_sin_case("odd-head-65", D=65),
    cos_sin_case("partial", D=64, R=12),
    cos_sin_case("no-planes", R=0),
    cos_sin_case("prefix-all", L=5, prefix=5),
    cos_sin_case("interleaved", interleaved=True),
    cos_sin_case("interleaved-inverse-partial", interleaved=True, inverse=True, D=64, R=7),
    cos_sin_case("inverse", inverse=True),
    cos_sin_case("queries-alone", Hk=None),
    cos_sin_case("transposed", layout="transposed"),
    cos_sin_case("strided", layout="strided"),
    cos_sin_case("shifted", layout="shifted"),
    cos_sin_case("expanded", layout="expanded"),
    cos_sin_case("tiny", "tiny", **TINY),
    cos_sin_case("tiny-gqa-prefix-packed", "tiny", **TINY, Hk=1, prefix=1, packed=True),
    cos_sin_case("tiny-inverse-interleaved", "tiny", **TINY | dict(D=6), R=2, inverse=True, interleaved=True),
    cos_sin_case("tiny-queries-alone", "tiny", **TINY, Hk=None),
    # Small twins of the bench cases, on the same code paths
    rotate_case("llm-4096-twin", "twin", **LLM | dict(B=1, H=2, L=96)),
    rotate_case("llm-4096-gqa-twin", "twin", **LLM | dict(B=1, H=8, L=96), Hk=2),
    rotate_case("llm-4096-cayley-twin", "twin", **LLM | dict(B=1, H=2, L=96), basis="dense"),
    rotate_case("llm-4096-circulant-twin", "twin", **LLM | dict(B=1, H=2, L=96), basis="shared", per_head=True),
    rotate_case("llm-4096-learned-twin", "twin", **LLM | dict(B=1, H=2, L=96), per_head=True),
    rotate_case("vit-256-twin", "twin", **VIT_256 | dict(B=2, H=2)),
    cos_sin_case("llm-4096-twin", "twin", **LLM | dict(B=1, H=2, L=96)),
    # Random features
    features_case("vit-197", B=2, H=3, L=197, D=64, M=128),
    *(
        features_case(f"{kind}-{stabilizer}", kind=kind, stabilizer=stabilizer, a=-0.1 if kind == "oprf" else None)
        for kind in ("positive", "hyperbolic", "trigonometric", "oprf", "exp")
        for stabilizer in ("row", "global")
    ),
    features_case("eps-row", stabilizer="row", eps=1e-4),
    features_case("hyperbolic", kind="hyperbolic"),
    features_case("trigonometric", kind="trigonometric"),
    features_case("relu", kind="relu", eps=1e-3),
    features_case("elu", kind="elu", eps=1e-3),
    features_case("exp-small", kind="exp", scale=0.1),
    features_case("oprf-heads", kind="oprf", a=-0.2, per_head=True),
    features_case("heads-global", per_head=True, stabilizer="global"),
    features_case("relu-alone", kind="relu", M=None),
    features_case("exp-alone-row", kind="exp", M=None, stabilizer="row"),
    features_case("elu-alone", kind="elu", M=None, scale=0.5),
    features_case("one-feature", M=1),
    features_case("one-token", L=1, stabilizer="global"),
    features_case("one-coordinate", D=1),
    features_case("ragged", L=33, D=33, M=67, stabilizer="row"),
    features_case("many", L=40, D=96, M=300, stabilizer="row"),
    features_case("batch-0", B=0, stabilizer="global"),
    features_case("length-0", L=0, per_head=True, stabilizer="row"),
    features_case("heads-0", H=0, per_head=True),
    features_case("transposed", layout="transposed"),
    features_case("strided", layout="strided", stabilizer="row"),
    features_case("shifted", layout="shifted"),
    features_case("expanded", layout="expanded"),
    features_case("tiny", "tiny", **TINY, M=5),
    features_case("tiny-hyperbolic", "tiny", **TINY, M=3, kind="hyperbolic", eps=0.1),
    features_case("tiny-trigonometric", "tiny", **TINY, M=3, kind="trigonometric", scale=0.5),
    features_case("tiny-oprf-heads", "tiny", **TINY, M=3, kind="oprf", a=-0.3, per_head=True, eps=0.1),
    features_case("tiny-relu-alone", "tiny", **TINY, M=None, kind="relu", eps=0.001),
    features_case("tiny-relu", "tiny", **TINY, M=3, kind="relu", eps=0.001),
    features_case("tiny-elu", "tiny", **TINY, M=3, kind="elu"),
    features_case("tiny-exp-alone", "tiny", **TINY, M=None, kind="exp"),
    features_case("tiny-row", "tiny", **TINY, M=3, stabilizer="row", eps=0.1),
    features_case("tiny-global-heads", "tiny", **TINY, M=3, stabilizer="global", per_head=True, kind="hyperbolic"),
    # Linear attention
    *(
        linear_case(kind + "-causal" * causal, kind=kind, causal=causal, a=-0.1 if kind == "oprf" else None, eps=eps)
        for kind, eps in (
            ("positive", 0.0),
            ("hyperbolic", 0.0),
            ("oprf", 0.0),
            ("exp", 0.0),
            ("relu", 1e-3),
            ("elu", 0.0),
            ("features", 0.0),
        )
        for causal in (False, True)
    ),
    # Weights of both signs that cancel have no accuracy to compare: what they multiply has
    linear_case("trigonometric", kind="trigonometric", normalize=False),
    linear_case("trigonometric-causal", kind="trigonometric", normalize=False, causal=True),
    linear_case("vit-197", B=2, H=3, Hk=3, L=197, D=64, V=64, M=128),
    linear_case("causal-197", B=1, H=2, Hk=2, L=197, D=64, V=64, M=128, causal=True),
    linear_case(
        "causal-oprf", H=4, Hk=2, L=150, D=64, V=64, M=64, causal=True, masked=True, kind="oprf", a=-0.1, per_head=True
    ),
    linear_case("causal-700", B=1, H=1, Hk=1, L=700, D=64, V=64, M=64, causal=True),  # a head's tokens in parts
    # Keys with nearly all of a feature's weight: their value and the feature's mean differ by little
    linear_case("dominated", H=3, Hk=3, L=130, D=64, V=64, M=128, size=2.0),
    linear_case("cross", L=33, S=150),
    # Heads that are taken at once
    linear_case("short", L=64, D=64, V=64, M=128),
    linear_case("short-cross", L=49, S=33, D=64, V=32, M=64, per_head=True, masked=True, kind="oprf", a=-0.1),
    linear_case("short-relu", H=2, Hk=2, L=49, D=64, V=64, M=64, per_head=True, masked=True, kind="relu", eps=1e-3),
    linear_case("short-exp", H=2, Hk=2, L=17, D=64, V=64, M=64, kind="exp", scale=0.4),
    linear_case("short-oprf", H=3, Hk=3, L=49, S=64, D=64, V=64, M=64, per_head=True, masked=True, kind="oprf", a=-0.1),
    linear_case("short-tiles", H=3, Hk=3, L=100, S=128, D=64, V=64, M=128, per_head=True),
    linear_case("cross-heads-masked", L=150, S=33, per_head=True, masked=True),
    linear_case("heads-causal-masked", per_head=True, masked=True, causal=True, L=150),
    linear_case("sum", normalize=False, scale=0.2),
    linear_case("sum-causal", normalize=False, causal=True, scale=0.2, kind="oprf", a=-0.1),
    linear_case("eps", eps=0.1, masked=True),
    linear_case("eps-causal", eps=0.1, causal=True, masked=True, kind="hyperbolic"),
    linear_case("relu-alone", kind="relu", M=None, eps=1e-3),
    linear_case("exp-alone-causal", kind="exp", M=None, causal=True),
    linear_case("elu-alone-causal", kind="elu", M=None, causal=True, scale=0.5),
    linear_case("packed", B=1, L=150, packed=(7, 64, 0, 66, 13)),
    linear_case("packed-causal-masked", B=1, L=150, packed=(7, 64, 0, 66, 1), causal=True, masked=True),
    linear_case("large", size=8.0),
    linear_case("large-causal", size=8.0, causal=True, L=150),
    linear_case("one-feature", M=1),
    linear_case("one-feature-causal", M=1, causal=True),
    linear_case("one-token", L=1, causal=True),
    linear_case("one-coordinate", D=1, V=1),
    *(
        linear_case(f"heads-of-{D}" + "-causal" * causal, H=2, Hk=1, L=150, D=D, V=D, M=128, causal=causal)
        for D in (32, 128)
        for causal in (False, True)
    ),
    linear_case("ragged-causal", L=129, D=33, V=17, M=67, causal=True),
    linear_case("many", B=1, L=40, D=96, V=80, M=300),
    linear_case("group-8", H=8, Hk=1, causal=True),
    linear_case("batch-0", B=0),
    linear_case("length-0", L=0, causal=True),
    linear_case("no-queries", L=0, S=9),
    linear_case("no-keys", L=9, S=0),
    linear_case("transposed", layout="transposed"),
    linear_case("strided-causal", layout="strided", causal=True),
    linear_case("expanded", layout="expanded"),
    linear_case("expanded-causal", L=130, D=64, V=64, M=128, layout="expanded", causal=True),
    linear_case("tiny", "tiny", **TINY_LINEAR),
    linear_case("tiny-causal", "tiny", **TINY_LINEAR, causal=True, eps=0.1),
    linear_case("tiny-hyperbolic-causal", "tiny", **TINY_LINEAR, kind="hyperbolic", causal=True, masked=True),
    linear_case("tiny-oprf-heads", "tiny", **TINY_LINEAR | dict(Hk=2), kind="oprf", a=-0.3, per_head=True, eps=0.1),
    linear_case("tiny-trigonometric", "tiny", **TINY_LINEAR, kind="trigonometric", normalize=False, causal=True),
    linear_case("tiny-relu-alone", "tiny", **TINY_LINEAR | dict(M=None), kind="relu", eps=0.1),
    linear_case("tiny-elu-causal", "tiny", **TINY_LINEAR, kind="elu", causal=True),
    linear_case("tiny-features-masked", "tiny", **TINY_LINEAR, kind="features", S=7, masked=True),
    linear_case("tiny-exp-sum-causal", "tiny", **TINY_LINEAR, kind="exp", normalize=False, causal=True),
    # Timed
    *(
        linear_case(name + "-causal" * causal, "bench", **PERFORMER | dict(Hk=12, V=64) | sizes, causal=causal)
        for name, sizes in (
            ("b16-l256-m64", dict(B=16, H=12, L=256, M=64)),
            ("b16-l512", dict(B=16, H=12, L=512, M=128)),
            ("b16-l1024", dict(B=16, H=12, L=1024, M=128)),
            ("b4-l16384", dict(B=4, H=12, L=16384, M=128)),
            ("b1-l131072", dict(B=1, H=12, L=131072, M=128)),
        )
        for causal in (False, True)
    ),
    linear_case("cpu-4096", "cpu-bench", B=1, H=4, Hk=4, L=4096, D=64, V=64, M=128),
    linear_case("cpu-4096-causal", "cpu-bench", B=1, H=4, Hk=4, L=4096, D=64, V=64, M=128, causal=True),
    features_case("b16-l1024", "bench", **PERFORMER),
    features_case("cpu-4096", "cpu-bench", **PERFORMER | dict(B=1, H=4, L=4096)),
    *(
        case
        for name, sizes in (("llm-4096", LLM), ("long-131072", LONG), ("vit-256", VIT_256))
        for case in (
            rotate_case(name, "bench", **sizes),
            rotate_case(f"{name}-cayley", "bench", **sizes, basis="dense"),
            rotate_case(f"{name}-circulant", "bench", **sizes, basis="shared", per_head=True),
            rotate_case(f"{name}-learned", "bench", "learned", **sizes, per_head=True),
        )
    ),
    rotate_case("llm-4096-gqa", "bench", **LLM, Hk=8),
    rotate_case("llm-4096-cayley-learned", "bench", "learned", **LLM, basis="dense"),
    rotate_case("vit-256-cayley-learned", "bench", "learned", **VIT_256, per_head=True, basis="dense"),
    *(rotate_case(f"length-{n}", "bench", "length", **LONG | dict(L=n)) for n in (1024, 4096, 16384, 65536)),
    cos_sin_case("llm-4096", "bench", **LLM),
    rotate_case("cpu-2048", "cpu-bench", **CPU_2048),
    rotate_case("cpu-vit-196", "cpu-bench", **VIT | dict(L=196, prefix=0)),
)


def cases(op: str | None = None, *tags: str, without: tuple[str, ...] = ("bench", "cpu-bench")) -> list[Case]:
    """The cases of ``op`` (of all when None) with all of ``tags`` and none of ``without``."""
    return [
        c
        for c in CASES
        if op in (None, c.op) and c.tags.issuperset(tags) and not c.tags.intersection(set(without) - set(tags))
    ]


def case(op: str, name: str) -> Case:
    return next(c for c in CASES if (c.op, c.name) == (op, name))
