import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from examples.common import plot, results
from examples.common.data import Images
from examples.vit import __main__ as study

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The command on a few images and one or two steps an epoch."""
    whole = Images.head
    monkeypatch.setattr(Images, "head", lambda self, train, test: whole(self, min(train, 100), min(test, 60)))
    load = study.load
    monkeypatch.setattr(study, "load", lambda *args: load(*args).head(100, 60))
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_demo_ends_with_results_table_and_plot(tmp_path, capsys):
    study.main(["--demo", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    for position in study.DEMO:
        result = json.loads((tmp_path / f"mnist-small-{position}-seed0.json").read_text())
        assert result["variant"] == position and f"| {position} " in out
        assert len(result["accuracy_by_epoch"]) == len(result["train_loss_by_epoch"]) == 2
        assert result["accuracy"] == result["accuracy_by_epoch"][-1]
        for key in ("parameters", "train_seconds_per_epoch", "inference_ms_per_1000", "inference_ms_per_1000_folded"):
            assert result[key] > 0
        assert {"device", "torch", "commit", "recipe", "model", "seed", "precision"} <= result.keys()
    assert (tmp_path / "mnist-small.png").read_bytes().startswith(PNG)


def test_resume_skips_finished_runs(tmp_path, monkeypatch, capsys):
    arguments = ["--small", "--epochs", "1", "--positions", "rope", "--device", "cpu", "--out", str(tmp_path)]
    first = study.main(arguments)
    monkeypatch.setattr(study, "run", None)
    assert study.main([*arguments, "--resume"]) == first
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".png"]
    with pytest.raises(TypeError):  # another recipe is another run
        study.main([*arguments, "--resume", "--epochs", "2"])


def test_several_seeds_give_mean_and_spread(tmp_path, capsys):
    arguments = ["--positions", "none", "--seeds", "0", "1", "--epochs", "1", "--device", "cpu"]
    found = study.main([*arguments, "--out", str(tmp_path)])
    middle, deviation = results.spread([100 * run["accuracy"] for run in found])
    assert f"{middle:.2f} +- {deviation:.2f}" in capsys.readouterr().out


def test_options():
    options = study.parse(["--dataset", "cifar10", "--data-root", "x", "--seeds", "1", "2", "--compile"])
    assert (options.dataset, options.data_root, options.seeds) == ("cifar10", "x", [1, 2])
    assert (options.compile, options.capture) == ("model", False)
    assert study.parse(["--compile", "blocks", "--capture"]).compile == "blocks"
    assert study.parse(["--demo", "--dataset", "cifar10"]).dataset == "mnist-small"
    with pytest.raises(SystemExit):
        study.parse(["--positions", "alibi"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said():
    with pytest.raises(SystemExit, match="--device must be cpu on a machine without a GPU, got 'cuda'"):
        study.main(["--device", "cuda"])


def test_help_runs_as_a_module():
    command = [sys.executable, "-m", "examples.vit", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    for option in ("--demo", "--dataset", "--data-root", "--positions", "--seeds", "--epochs", "--small", "--resume",
                   "--device", "--precision", "--compile", "--out"):  # fmt: skip
        assert option in done.stdout


def result(variant, accuracy, seed=0):
    return {"variant": variant, "accuracy": accuracy, "seed": seed}


def test_check_fails_under_the_bar_and_under_no_position(tmp_path):
    assert (
        study.misses([result("none", 0.9), result("learned", 0.1), result("rope", 0.95), result("cayley", 0.92)]) == []
    )
    [low] = study.misses([result("rope", 0.91)])
    assert low == "rope, seed 0: accuracy must be at least 0.92 and above 0.0, got 0.91"
    found = [result("none", 0.97, 1), result("circulant", 0.96, 1), result("circulant", 0.96, 2)]
    assert study.misses(found) == ["circulant, seed 1: accuracy must be at least 0.92 and above 0.97, got 0.96"]
    arguments = ["--positions", "rope", "--epochs", "1", "--device", "cpu", "--check", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="rope, seed 0: accuracy must be at least 0.92"):
        study.main(arguments)


def test_committed_results_pass_the_check():
    found = results.read(ROOT / "examples" / "vit" / "results", "mnist-small-*.json")
    runs = {(run["variant"], run["seed"]) for run in found}
    assert runs == {(variant, seed) for variant in study.DEMO for seed in range(3)}
    assert study.misses(found) == []


def test_table_and_plot_of_results(tmp_path):
    found = [
        {"variant": name, "accuracy_by_epoch": [0.1, 0.5 + 0.1 * seed], "train_seconds_per_epoch": 1.0}
        for name in ("a", "bb")
        for seed in range(2)
    ]
    text = results.table(found, {"runs": lambda runs: str(len(runs))})
    assert text == "| variant | runs |\n| ------- | ---: |\n| a       |    2 |\n| bb      |    2 |"
    plot.accuracy_figure(found, tmp_path / "deep" / "plot.png", "title")
    assert (tmp_path / "deep" / "plot.png").read_bytes().startswith(PNG)


def test_spread_of_one_value_is_zero():
    assert results.spread([3.0]) == (3.0, 0.0) and results.spread([1.0, 3.0]) == (2.0, 2**0.5)


def test_commit_outside_git(monkeypatch):
    monkeypatch.setattr(results, "__file__", "/")
    monkeypatch.delenv("FASTRPE_COMMIT", raising=False)
    assert results.commit() is None
    monkeypatch.setenv("FASTRPE_COMMIT", "abc")
    assert results.commit() == "abc"
