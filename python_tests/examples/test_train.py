import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from examples.common import train
from examples.common.data import Augment, load
from examples.common.train import History, Recipe, evaluate, fit, inference_ms
from fastrpe.models import ViT, ViTConfig
from fastrpe.testing.asserts import PEER_ERROR, assert_within

CONFIG = ViTConfig(patch_size=14, dim=16, depth=2, heads=2, position="cayley", dropout=0.2, drop_path=0.2)
RECIPE = Recipe(epochs=4, batch_size=20)


@pytest.fixture(scope="module")
def images():
    return replace(load("mnist-small").head(100, 50), augment=Augment(2))


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_resumes_bit_for_bit(images, accelerator, tmp_path, monkeypatch):
    set_seed(0)
    whole = ViT(CONFIG)
    start = {name: x.clone() for name, x in whole.state_dict().items()}
    history = fit(whole, images, RECIPE, accelerator, seed=3)

    set_seed(0)
    broken = ViT(CONFIG)
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:  # in the middle of the third epoch's bookkeeping, after its steps
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, images, RECIPE, accelerator, seed=3, checkpoint=tmp_path / "run")
    monkeypatch.undo()
    accelerator.free_memory()

    set_seed(9)  # a new process is elsewhere in its random streams
    resumed = ViT(CONFIG)
    again = fit(resumed, images, RECIPE, accelerator, seed=3, checkpoint=tmp_path / "run", resume=True)
    for name, x in whole.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name
    assert any(not torch.equal(x, start[name]) for name, x in whole.state_dict().items())
    for part in ("train_loss", "test_loss", "accuracy"):
        assert getattr(history, part) == getattr(again, part)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["0003"]


def test_an_incomplete_checkpoint_is_not_taken(images, accelerator, tmp_path):
    recipe = replace(RECIPE, epochs=1)
    fit(ViT(CONFIG), images, recipe, accelerator, checkpoint=tmp_path)
    (tmp_path / "0007").mkdir()  # an interrupted write has no run.json
    history = fit(ViT(CONFIG), images, recipe, accelerator, checkpoint=tmp_path, resume=True)
    assert history == History(**json.loads((tmp_path / "0000" / "run.json").read_text())["history"])


def test_another_recipe_does_not_resume(images, accelerator, tmp_path):
    fit(ViT(CONFIG), images, replace(RECIPE, epochs=1), accelerator, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="fit: recipe and seed must be those of the checkpoint, .*'epochs': 1.* got"):
        fit(ViT(CONFIG), images, RECIPE, accelerator, checkpoint=tmp_path, resume=True)


def test_schedule_rises_and_falls():
    recipe = Recipe(lr=1.0, warm_up=0.1)
    rates = [recipe.lr_at(step, 100) for step in range(100)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.001


def test_evaluate_counts(images, accelerator):
    class Right(torch.nn.Module):
        def forward(self, x):
            return 20 * torch.nn.functional.one_hot(images.test_labels[: len(x)], 10).float()

    images = images.head(0, 20)
    accuracy, loss = evaluate(Right(), images, accelerator)
    assert accuracy == 1.0 and 0 <= loss < 1e-6
    assert evaluate(Right(), replace(images, test_labels=(images.test_labels + 1) % 10), accelerator)[0] == 0.0


def test_timings_are_positive_and_leave_warm_up_out(images, accelerator, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(train, "_now", lambda device: float(next(ticks)))
    history = fit(ViT(CONFIG), images, RECIPE, accelerator)
    # One tick from the fourth of five steps to the end of the first epoch: scaled up to five steps.
    assert history.seconds == [5 / 2, 1.0, 1.0, 1.0] and history.seconds_per_epoch == 1.0
    assert inference_ms(ViT(CONFIG), images, accelerator) == 1e6 / 50


@pytest.fixture
def graphs(monkeypatch):
    """Those that are compiled, each whole."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph

    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_in_place(self, backend=backend, fullgraph=True)
    )
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("compiled", ["model", "blocks"])
def test_compiled_training_is_one_graph(images, precision, compiled, graphs):
    AcceleratorState._reset_state()
    recipe = replace(RECIPE, epochs=2, compile=compiled)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    for seed in range(2 if compiled == "blocks" else 1):
        # Neither the other blocks and models nor evaluation ask for another.
        history = fit(ViT(CONFIG), images, recipe, accelerator, seed)
        assert len(history.accuracy) == 2 and len(graphs) == 1
    AcceleratorState._reset_state()


def test_blocks_of_different_drop_rates_share_their_code(images, graphs):
    recipe = replace(RECIPE, epochs=1, compile="blocks")
    fit(ViT(replace(CONFIG, depth=3, drop_path=0.5)), images, recipe, Accelerator(cpu=True))
    assert len(graphs) == 1


def test_evaluation_comes_as_often_as_asked(images, accelerator):
    history = fit(ViT(CONFIG), images, replace(RECIPE, eval_every=3), accelerator)
    assert history.evaluated == [3, 4] and len(history.accuracy) == len(history.test_loss) == 2
    assert len(history.train_loss) == len(history.seconds) == 4


def test_the_turn_is_held_from_the_first_timed_step(images, accelerator):
    events = []

    class Turn:
        def __enter__(self):
            events.append("enter")

        def __exit__(self, *_):
            events.append("exit")

    class Watched(ViT):
        def forward(self, x):
            events.append("train" if self.training else "test")
            return super().forward(x)

    fit(Watched(CONFIG), images, replace(RECIPE, epochs=1), accelerator, turn=Turn())
    assert events == ["train"] * 3 + ["enter"] + ["train"] * 2 + ["test", "exit"]


def test_capture_means_nothing_without_a_gpu(images, accelerator):
    losses = []
    for capture in (False, True):
        set_seed(0)
        losses.append(fit(ViT(CONFIG), images, replace(RECIPE, capture=capture), accelerator).train_loss)
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["no", "blocks"])
def test_a_captured_step_trains_as_an_eager_one(images, compiled):
    AcceleratorState._reset_state()
    model = replace(CONFIG, dropout=0.0, drop_path=0.0)
    losses = []
    for capture in (False, True):
        set_seed(0)
        recipe = replace(RECIPE, capture=capture, compile=compiled)
        losses.append(torch.tensor(fit(ViT(model), images, recipe, Accelerator()).train_loss))
    AcceleratorState._reset_state()
    # Far less than what a batch or rate that stays the same from replay to replay would change.
    assert_within(losses[1], losses[0], PEER_ERROR)


@pytest.mark.gpu
def test_a_scaled_loss_is_not_captured(images):
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests want a CPU
    with pytest.raises(ValueError, match="fit: capture must be False unless there is one process and no scaled loss"):
        fit(ViT(CONFIG), images, replace(RECIPE, capture=True), Accelerator(mixed_precision="fp16"))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_batch_of_more_than_all_images_is_said(images, accelerator):
    with pytest.raises(ValueError, match="fit: batch_size must be at most 100, the training images, got 101"):
        fit(ViT(CONFIG), images, replace(RECIPE, batch_size=101), accelerator)


def test_an_unknown_way_to_compile_is_said():
    with pytest.raises(ValueError, match="Recipe: compile must be one of 'no', 'blocks', 'model', got 'all'"):
        Recipe(compile="all")
