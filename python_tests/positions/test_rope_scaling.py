"""Length extensions: SPEC 1.4, bar 1.7.5, and agreement with transformers."""

import math
from typing import Any

import pytest
import torch

from fastrpe.positions import RoPE
from fastrpe.positions.frequencies import geometric, scale
from fastrpe.testing.asserts import assert_bitwise, assert_within
from fastrpe.testing.bars import TRANSFORMERS_FREQS

SIZE, PLANES, LENGTH = 64, 32, 256

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "ntk": {"rope_type": "ntk", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": LENGTH},
    "yarn": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": LENGTH},
    "yarn-options": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 20, "beta_slow": 2,
        "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": LENGTH, "attention_factor": 1.5,
    },
    "yarn-one-plane": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 2},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
    "longrope": {
        "rope_type": "longrope", "factor": 3.0, "original_max_position_embeddings": LENGTH,
        "short_factor": [1 + 0.01 * t for t in range(PLANES)], "long_factor": [1 + t for t in range(PLANES)],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in SCALINGS if n != "ntk"])
@pytest.mark.parametrize("length", (LENGTH // 2, LENGTH, 3 * LENGTH, 8191))
@pytest.mark.parametrize("partial", (1.0, 0.5))
def test_frequencies_are_those_of_transformers(name: str, length: int, partial: float) -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    scaling = dict(SCALINGS[name])
    if partial != 1:
        scaling["partial_rotary_factor"] = partial
        for key in ("short_factor", "long_factor"):
            if key in scaling:
                scaling[key] = scaling[key][: PLANES // 2]
    config = _config(scaling)
    expected, factor = utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=length)
    module = RoPE(SIZE, base=500000.0, scaling=scaling)
    actual = module.frequencies(length)
    assert actual.shape == (1, int(PLANES * partial))
    assert_within(actual[0] / expected, torch.ones_like(expected), TRANSFORMERS_FREQS)
    assert math.isclose(module.factor, factor, rel_tol=TRANSFORMERS_FREQS)


def _config(scaling: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4 * SIZE,
        num_attention_heads=4,
        max_position_embeddings=scaling.get("original_max_position_embeddings", LENGTH),
        rope_parameters={"rope_theta": 500000.0} | scaling,
    )


@pytest.mark.parametrize("kind", ("linear", "ntk", "yarn", "llama3", "dynamic"))
def test_5_factor_one_is_the_base(kind: str) -> None:
    freqs, factor = scale(SCALINGS[kind] | {"factor": 1.0}, PLANES, 10000.0)
    assert_bitwise(freqs, geometric(PLANES, 10000.0))
    assert factor == 1


def test_5_factor_one_is_the_base_at_any_length() -> None:
    module = RoPE(SIZE, scaling=SCALINGS["dynamic"] | {"factor": 1.0})
    assert_bitwise(module.frequencies(LENGTH), RoPE(SIZE).freqs)
    # At length L the base grows by L / L0 whatever the factor: (s L / L0 - (s - 1)) with s = 1.
    lowest = float(module.frequencies(4 * LENGTH)[0, -1] / module.freqs[0, -1])
    assert math.isclose(lowest, 1 / 4, rel_tol=TRANSFORMERS_FREQS)


def test_5_yarn_keeps_fast_planes_and_divides_slow_ones() -> None:
    base, factor = 10000.0, 3.0
    freqs, attention = scale(SCALINGS["yarn"] | {"factor": factor}, PLANES, base)
    plain = geometric(PLANES, base)

    def plane(turns: float) -> float:
        return SIZE * math.log(LENGTH / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = max(math.floor(plane(32)), 0), math.ceil(plane(1))
    assert low < high < PLANES - 1
    assert_bitwise(freqs[: low + 1], plain[: low + 1])
    assert_bitwise(freqs[high:], plain[high:] / factor)
    assert ((freqs < plain) & (freqs > plain / factor))[low + 1 : high].all()
    assert attention == 0.1 * math.log(factor) + 1


def test_ntk_divides_the_lowest_frequency_and_keeps_the_highest() -> None:
    freqs, _ = scale(SCALINGS["ntk"], PLANES, 10000.0)
    base = 10000.0 * 3 ** (SIZE / (SIZE - 2))
    torch.testing.assert_close(freqs, geometric(PLANES, base))
    torch.testing.assert_close(freqs[-1], geometric(PLANES, 10000.0)[-1] / 3)
    assert freqs[0] == 1


def test_legacy_key_and_values_of_the_dict() -> None:
    module = RoPE(SIZE, scaling={"type": "linear", "factor": 2.0, "rope_theta": 50.0, "partial_rotary_factor": 0.25})
    assert (module.kind, module.base, module.rotary_dim) == ("linear", 50.0, 16)
    assert_bitwise(module.freqs, RoPE(16, base=50.0).freqs / 2)
    assert RoPE(SIZE, base=9.0, rotary_dim=8, scaling=module.scaling).freqs.shape == (1, 4)
    assert RoPE(SIZE, base=9.0, scaling=module.scaling).base == 9
    assert_bitwise(RoPE(SIZE, scaling={"rope_type": "default"}).freqs, RoPE(SIZE).freqs)


def test_longrope_takes_its_factor_from_the_two_lengths() -> None:
    scaling = dict(SCALINGS["longrope"], max_position_embeddings=3 * LENGTH)
    del scaling["factor"]
    assert RoPE(SIZE, scaling=scaling).factor == RoPE(SIZE, scaling=SCALINGS["longrope"]).factor
    assert RoPE(SIZE, scaling=SCALINGS["longrope"] | {"factor": 1.0}).factor == 1


@pytest.mark.parametrize("kind", ("dynamic", "longrope"))
def test_frequencies_go_by_the_length_of_the_call(kind: str) -> None:
    module = RoPE(SIZE, scaling=SCALINGS[kind])
    q = torch.randn(1, 1, 9, SIZE)
    near, far = module(q, None)[0], module(q, None, offset=LENGTH)[0]
    plain = RoPE(SIZE, scaling=SCALINGS[kind])
    plain.original_length = None
    assert_bitwise(near, module.factor * RoPE(SIZE)(q, None)[0] if kind == "dynamic" else plain(q, None)[0])
    assert not torch.allclose(far, plain(q, None, offset=LENGTH)[0])
    # The prefix has no position, and so no length.
    at_limit = torch.randn(1, 1, LENGTH + 2, SIZE)
    assert_bitwise(module(at_limit, None, prefix=2)[0], plain(at_limit, None, prefix=2)[0])


def test_attention_factor_multiplies_what_turns() -> None:
    scaling = SCALINGS["yarn-attention-factor"]
    q = torch.randn(1, 2, 5, SIZE)
    y, _ = RoPE(SIZE, rotary_dim=32, scaling=scaling)(q, None, prefix=1)
    torch.testing.assert_close(y[:, :, 1:, :32].norm(dim=-1), 1.5 * q[:, :, 1:, :32].norm(dim=-1))
    assert_bitwise(y[..., 32:], q[..., 32:])
    assert_bitwise(y[:, :, :1], q[:, :, :1])


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("scaling['rope_type'] must be one of", {"scaling": {"rope_type": "cubic"}}),
        ("scaling must have keys among", {"scaling": {"rope_type": "linear", "factr": 2}}),
        ("scaling must have the key 'factor' for 'linear', got rope_type", {"scaling": {"rope_type": "linear"}}),
        ("scaling['factor'] must be positive, got 0", {"scaling": SCALINGS["yarn"] | {"factor": 0}}),
        ("scaling must have the key 'factor' for 'dynamic'", {"scaling": SCALINGS["dynamic"] | {"factor": None}}),
        (
            "scaling must have the key 'original_max_position_embeddings' for 'dynamic'",
            {"scaling": {"rope_type": "dynamic", "factor": 2.0}},
        ),
        (
            "scaling['long_factor'] must have R=32 numbers, got 3",
            {"scaling": SCALINGS["longrope"] | {"long_factor": [1.0, 2.0, 3.0]}},
        ),
        ("scaling must be None or 'default' unless coords = 1", {"scaling": SCALINGS["linear"], "coords": 2}),
        (
            "scaling must be None or 'default' unless coords = 1 and mode = 'axial', got 'linear'",
            {"scaling": SCALINGS["linear"], "mode": "mixed", "num_heads": 1},
        ),
        (
            "learned must be False for scaling 'dynamic', which sets freqs by length, got True",
            {"scaling": SCALINGS["dynamic"], "learned": True},
        ),
        ("rotary_dim must be even, at least 4", {"scaling": SCALINGS["ntk"], "rotary_dim": 2}),
    ],
)
def test_bad_scalings_raise(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        RoPE(SIZE, **options)
    assert str(error.value).startswith(f"RoPE: {message}")
