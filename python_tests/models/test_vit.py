import copy
import json
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from fastrpe.feature_maps import LearnableFeatures, PositiveFeatures, step
from fastrpe.models import ViT, ViTConfig
from fastrpe.models.vit import FEATURES, POSITIONS
from fastrpe.testing.asserts import LAW_FLOAT64, assert_accurate, assert_within

SMALL = ViTConfig(image_size=16, patch_size=4, channels=3, classes=7, dim=32, depth=2, heads=2)
ENCODINGS = [p for p in POSITIONS if p not in ("none", "learned")]


@pytest.fixture(params=[*POSITIONS, *FEATURES])
def config(request):
    """Every position encoding, and every kernel with one of them."""
    if request.param in POSITIONS:
        return replace(SMALL, position=request.param)
    return replace(SMALL, kernel=request.param)


@pytest.fixture
def compiler():
    """Graphs of other configurations count against the limit on recompilations."""
    torch.compiler.reset()
    yield torch.compile
    torch.compiler.reset()


def images(batch=2, height=16, width=16, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def trained(config, dtype=torch.float32):
    """A model whose position parameters have left their initial values."""
    torch.manual_seed(0)
    model = ViT(config).to(dtype)
    for name, p in model.named_parameters():
        if "position" in name:
            p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("tokens", [{}, {"pool": "cls"}, {"registers": 3}, {"pool": "cls", "registers": 2}])
def test_every_parameter_gets_a_finite_gradient(config, tokens):
    model = ViT(replace(config, dropout=0.1, drop_path=0.2, **tokens))
    logits = model(images())
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("size", [(16, 24), (8, 8), (28, 20)])
def test_other_image_sizes(config, size):
    assert ViT(config)(images(2, *size)).shape == (2, 7)


def test_only_no_position_ignores_the_order_of_patches(config):
    model = trained(config, torch.float64).eval()
    x = images(dtype=torch.float64)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, torch.randperm(16)]  # (B, 3, 16, 4, 4)
    shuffled = patches.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape_as(x)
    y, z = model(x), model(shuffled)
    with nullcontext() if config.position == "none" else pytest.raises(AssertionError):
        assert_within(z, y, LAW_FLOAT64)


@pytest.mark.parametrize("position", ENCODINGS)
@pytest.mark.parametrize("registers", [0, 2])
def test_fold_keeps_the_output_and_unfold_restores_it(position, registers):
    model = trained(replace(SMALL, position=position, registers=registers, pool="cls"), torch.float64).eval()
    x = images(dtype=torch.float64)
    before = model(x)
    assert_within(model.fold()(x), before, LAW_FLOAT64)
    assert_within(model.unfold()(x), before, LAW_FLOAT64)


def test_fold_changes_weights_where_there_is_a_basis(config):
    model = trained(config)
    before = copy.deepcopy(model.state_dict())
    model.fold()
    changed = any(not torch.equal(x, before[name]) for name, x in model.state_dict().items() if "q_proj" in name)
    assert changed == (config.position not in ("none", "learned", "rope", "rope-mixed"))


def test_layers_learn_their_own_positions():
    for position in ENCODINGS[1:]:
        first, second = (block.attention.position for block in ViT(replace(SMALL, position=position)).blocks)
        assert first is not second and list(first.parameters())
    first, second = (block.attention.position for block in ViT(replace(SMALL, position="rope")).blocks)
    assert first is second and not list(first.parameters())


def test_one_seed_gives_one_set_of_weights(config):
    models = []
    for c in (replace(config, position="none", kernel="softmax", kernel_options={}), config):
        torch.manual_seed(5)
        models.append(ViT(c).state_dict())
    assert all(torch.equal(models[1][name], x) for name, x in models[0].items())


def test_layers_draw_their_own_positions():
    model = ViT(replace(SMALL, position="sparse-cayley", position_options={"mode": "mixed"}))
    first, second = (block.attention.position for block in model.blocks)
    assert not torch.equal(first.freqs, second.freqs) and not torch.equal(first.pairs, second.pairs)


@pytest.mark.parametrize(
    "position, options, attribute",
    [
        ("cayley", {"mode": "mixed", "base": 10.0}, "base"),
        ("circulant", {"block": 8}, "block"),
        ("reflection", {"block": 4, "layers": 3}, "layers"),
        ("sparse-cayley", {"f": 0.5, "seed": 7}, "seed"),
        ("rope", {"base": 50.0}, "base"),
    ],
)
def test_position_options_go_to_the_encoding(position, options, attribute):
    config = replace(SMALL, position=position, position_options=options)
    assert getattr(ViT(config).blocks[0].attention.position, attribute) == options[attribute]
    assert hash(config) == hash(replace(SMALL, position=position)) and config != replace(SMALL, position=position)
    assert ViTConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_kernel_options_go_to_the_feature_map():
    options = {"num_features": 24, "redraw_every": 3, "seed": 7}
    config = replace(SMALL, kernel="performer-favor", kernel_options=options)
    features = ViT(config).blocks[0].attention.kernel.feature_map
    assert isinstance(features, PositiveFeatures) and features.omega.shape == (24, 16)
    assert all(getattr(features, name) == value for name, value in options.items())
    assert hash(config) == hash(replace(config, kernel_options={})) and config != replace(config, kernel_options={})
    assert ViTConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("form", ["projection", "polynomial", "mlp"])
def test_learned_features_are_each_layer_s_and_a_function_of_the_seed(form):
    options = {"form": form, "num_features": 24, "num_heads": 2}
    config = replace(SMALL, kernel="performer-ftheta", kernel_options=options)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        model = ViT(config)
        states.append(model.state_dict())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    first, second = (attention.kernel.feature_map for attention in model.attentions)
    assert isinstance(first, LearnableFeatures) and first.omega.shape == (2, 24, 16)
    assert not torch.equal(first.omega, second.omega)


def test_features_are_drawn_anew_layer_by_layer():
    torch.manual_seed(0)
    model = ViT(replace(SMALL, kernel="performer-favor", kernel_options={"redraw_every": 2}))
    first, second = (attention.kernel.feature_map for attention in model.attentions)
    before = first.omega.clone()
    step(model)
    assert torch.equal(first.omega, before)
    step(model)
    assert not torch.equal(first.omega, before) and not torch.equal(first.omega, second.omega)


def test_a_performer_has_no_weights_to_drop():
    config = replace(SMALL, dropout=0.5)
    softmax, performer = (ViT(replace(config, kernel=k)).attentions[0] for k in ("softmax", "performer-relu"))
    assert softmax.dropout == 0.5 and performer.dropout == 0


def test_positions_may_be_given(config):
    model = trained(config, torch.float64).eval()
    x = images(dtype=torch.float64)
    assert torch.equal(model(x, model.grid), model(x))
    # What is relative does not see a common shift, and all but no position see a stretch.
    with nullcontext() if config.kernel == "softmax" else pytest.raises(AssertionError):  # features: in the mean
        assert_within(model(x, model.grid + 3), model(x), LAW_FLOAT64)
    stretched = model(x, 2 * model.grid)
    assert torch.equal(stretched, model(x)) == (config.position in ("none", "learned"))


def test_compiles_into_one_graph(config, compiler):
    model = trained(config).eval()
    x = images(32)
    compiled = compiler(model, fullgraph=True, backend="aot_eager")
    assert_accurate(compiled(x), model(x), copy.deepcopy(model).double()(x.double()))


def test_inductor_trains_it(compiler):
    model = trained(replace(SMALL, position="cayley", depth=1))
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    gradients = []
    for m, x in ((compiler(model, fullgraph=True), images()), (eager, images()), (exact, images().double())):
        m(x).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
    assert_accurate(*gradients)


def test_parameter_groups(config):
    model = copy.deepcopy(ViT(replace(config, pool="cls", registers=1)))
    decayed, rest = model.parameter_groups(0.1)
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert len({*decayed["params"], *rest["params"]}) == len(list(model.parameters()))
    ids = {id(p) for p in decayed["params"]}
    for name, p in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        assert (id(p) in ids) == matrix, name


def test_state_dict_and_deepcopy(config):
    model = trained(config).eval()
    other = ViT(config).eval()
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model)):
        assert torch.equal(twin(images()), model(images()))


def test_autocast_keeps_the_shape_and_dtype(config):
    with torch.autocast("cpu", torch.bfloat16):
        assert ViT(config)(images()).dtype == torch.bfloat16


def test_drop_path_drops_whole_images():
    model = ViT(replace(SMALL, drop_path=0.5)).train()
    block = model.blocks[-1]
    kept = block._branch(torch.ones(64, 3, 5)).flatten(1)
    assert set(kept.unique().tolist()) == {0.0, 2.0} and torch.equal(kept.amin(1), kept.amax(1))
    assert torch.equal(block.eval()._branch(torch.ones(4, 3, 5)), torch.ones(4, 3, 5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position": "alibi"}, "ViTConfig: position must be one of 'none', 'learned', .* got 'alibi'"),
        (
            {"position": "learned", "position_options": {"base": 10.0}},
            "ViTConfig: position_options must be empty for position 'learned', got {'base': 10.0}",
        ),
        ({"kernel": "linear"}, "ViTConfig: kernel must be one of 'softmax', 'performer-relu', .*, got 'linear'"),
        (
            {"kernel_options": {"num_features": 8}},
            "ViTConfig: kernel_options must be empty for kernel 'softmax', got {'num_features': 8}",
        ),
        ({"pool": "max"}, "ViTConfig: pool must be one of 'mean', 'cls', got 'max'"),
        ({"depth": 0}, "ViTConfig: depth must be at least 1, got 0"),
        ({"registers": -1}, "ViTConfig: registers must be at least 0, got -1"),
        ({"drop_path": 1.0}, "ViTConfig: drop_path must be at least 0 and less than 1, got 1.0"),
        ({"heads": 0}, "ViTConfig: heads must be at least 1, got 0"),
        ({"heads": 3}, "ViTConfig: dim must be a multiple of heads=3, got 32"),
        ({"patch_size": 5}, "ViTConfig: image_size must be a multiple of patch_size=5, got 16"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 1, 16, 16), r"ViT: images must have shape \(B, channels, height, width\) with channels=3"),
        ((3, 16, 16), r"ViT: images must have shape \(B, channels, height, width\)"),
        ((2, 3, 16, 18), r"ViT: images must have sides that are multiples of 4, got \(16, 18\)"),
    ],
)
def test_image_errors(shape, message):
    with pytest.raises(ValueError, match=message):
        ViT(SMALL)(torch.zeros(shape))


def test_it_is_made_of_fastrpe_attention():
    assert not any(isinstance(m, nn.MultiheadAttention) for m in ViT(SMALL).modules())
