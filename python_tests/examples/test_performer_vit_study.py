import argparse
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from examples.common import results
from examples.common import study as common
from examples.performer_vit import __main__ as study
from examples.performer_vit import report, timing
from examples.performer_vit.variants import (
    FEW,
    FTHETA,
    MAIN,
    OF_LENGTH,
    STUDIES,
    VARIANTS,
    build,
    configure,
    seeds_of,
    tokens,
)
from fastrpe.feature_maps import FeatureMap

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"
TINY = ["--small", "--images", "100", "--epochs", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def fresh():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def run(out, *more):
    study.main([*TINY, "--out", str(out), *more])
    return {result["variant"]: result for result in results.read(out, "*-seed0.json")}


def test_small_ends_with_results_tables_and_plots(tmp_path, capsys):
    found = run(tmp_path, "--variants", *MAIN)
    out = capsys.readouterr().out
    assert set(found) == set(MAIN)
    for name, result in found.items():
        assert result["accuracy"] == result["accuracy_by_epoch"][-1] and f"| {name} " in out
        assert {"device", "torch", "commit", "recipe", "model", "seed", "precision", "wall_seconds"} <= result.keys()
        assert result["inference_ms_per_1000"] > 0
        assert (result["parameters_of_features"] > 0) == (name in FTHETA)
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(PNG) and "](tradeoff.png)" in out


def test_resume_skips_what_is_finished_and_is_the_same(tmp_path, monkeypatch):
    variants = ["--variants", "favor", "softmax"]
    first = run(tmp_path, *variants)
    (tmp_path / "mnist-small-softmax-seed0.json").unlink()
    begun = []
    whole = common.run
    monkeypatch.setattr(common, "run", lambda *args: begun.append(args[4]) or whole(*args))
    assert run(tmp_path, *variants, "--resume")["softmax"]["accuracy"] == first["softmax"]["accuracy"]
    assert begun == ["softmax"]
    run(tmp_path, *variants, "--resume", "--redraw-every", "1")  # another model is another run
    assert begun == ["softmax", "favor"]


def test_projections_are_drawn_anew_while_training(tmp_path, monkeypatch):
    models = []
    monkeypatch.setattr(study, "build", lambda *args: models.append(build(*args)) or models[-1])
    run(tmp_path, "--variants", "favor", "--redraw-every", "1")  # two steps of 50 images
    assert [m.draws for m in models[0].modules() if isinstance(m, FeatureMap)] == [3, 3]


def test_no_run_starts_late(tmp_path):
    assert run(tmp_path, "--variants", "relu", "--minutes", "0") == {}
    assert run(tmp_path, "--variants", "relu", "--minutes", "0", "--jobs", "2") == {}


def test_processes_side_by_side_and_one_that_fails(tmp_path, capfd):
    # --small wins over --studies in each process, so the data set that is missing is asked for without it.
    arguments = [*TINY[1:], "--studies", "mnist-small", "mnist", "--data-root", str(tmp_path / "nowhere")]
    arguments += ["--variants", "relu", "--seeds", "0", "1", "--jobs", "2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="failed: mnist relu"):
        study.main(arguments)
    assert [result["seed"] for result in results.read(tmp_path)] == [0, 1]
    assert "data: root must hold mnist" in capfd.readouterr().err


def test_studies_are_those_of_the_text():
    assert [tokens(name) for name in OF_LENGTH] == [16, 64, 256, 1024]
    assert set(FEW) <= set(MAIN) == set(VARIANTS) == set(report.LOOKS)
    assert study.parse([]).studies == ["mnist", "cifar10", *OF_LENGTH]
    assert study.parse(["--studies", "lengths"]).studies == OF_LENGTH
    assert [len(seeds_of(name)) for name in OF_LENGTH] == [3, 3, 3, 1]
    assert STUDIES["imagenet"][1].classes == 1000 and STUDIES["places365"][1].classes == 365


def test_folders_need_a_root(capsys):
    with pytest.raises(SystemExit):
        study.parse(["--studies", "cifar10", "imagenet"])
    assert "--data-root must be given for imagenet, which is not downloaded" in capsys.readouterr().err


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_start_alike(variant):
    config = STUDIES["mnist-small"][1]
    weights = build(configure(config, variant), 3).state_dict()
    for name, value in build(configure(config, "softmax"), 3).state_dict().items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize(
    ("ours", "theirs"), [("ftheta-square", "exp"), ("ftheta-polynomial", "relu"), ("ftheta-mlp", "relu")]
)
def test_f_theta_starts_as_a_performer_without_it(ours, theirs):
    config = STUDIES["mnist-small"][1]
    a, b = (build(configure(config, name), 3).double().eval() for name in (ours, theirs))
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(a(x), b(x))


def folders(root, sides):
    """Two classes of two images in each part, as torchvision's ImageFolder reads them."""
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for label, colour in (("cat", (200, 0, 0)), ("dog", (0, 0, 200))):
            (root / part / label).mkdir(parents=True)
            for i, size in enumerate(sides):
                image.new("RGB", size, colour).save(root / part / label / f"{i}.jpg")


@pytest.mark.parametrize("name", ["imagenet", "places365"])
def test_a_folder_is_trained_on(name, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    folders(tmp_path / "data", [(40, 30), (30, 50)])
    config = STUDIES["mnist-small"][1]
    small = {"image_size": 14, "channels": 3, "classes": 2}
    data_set, _, recipe = STUDIES[name]
    tiny = data_set, type(config)(**{**vars(config), **small}), type(recipe)(epochs=2, batch_size=2)
    monkeypatch.setitem(STUDIES, name, tiny)
    arguments = ["--studies", name, "--variants", "relu", "--seeds", "0", "--device", "cpu", "--compile", "no"]
    study.main([*arguments, "--data-root", str(tmp_path / "data"), "--out", str(tmp_path)])
    (result,) = results.read(tmp_path)
    assert result["study"] == name and len(result["train_loss_by_epoch"]) == 2


def test_timing_writes_ratios_to_softmax(tmp_path, capsys):
    arguments = ["--small", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path)]
    timing.main([*arguments, "--variants", "relu", "favor"])
    timing.main([*arguments, "--variants", "ftheta-mlp", "--resume"])
    rows = json.loads((tmp_path / "timing-mnist-small.json").read_text())["rows"]
    assert set(rows) == {"softmax", "relu", "favor", "ftheta-mlp"}
    assert rows["softmax"]["step_ratio"] == [1, 1, 1] and rows["relu"]["inference_ms_per_10000"] > 0
    assert "| favor " in capsys.readouterr().out


def written(out, seeds=2):
    """Results as a run writes them, without a run."""
    for name in ("mnist", "cifar10", *OF_LENGTH):
        for i, variant in enumerate(FEW if name in OF_LENGTH else MAIN):
            for seed in range(seeds):
                result = {
                    "variant": variant, "seed": seed, "study": name, "images": None, "device": "cpu",
                    "accuracy": 0.5 + 0.01 * i + 0.002 * seed, "parameters_of_features": i,
                    "train_seconds_per_epoch": 1.0, "inference_ms_per_1000": 7.0, "recipe": {"epochs": 60},
                }  # fmt: skip
                results.write(out / f"{name}-{variant}-seed{seed}.json", result)
    row = {
        "step_ratio": [0.5, 0.6, 0.7],
        "inference_ratio": [0.5, 0.6, 0.7],
        "step_ms": 4.0,
        "inference_ms_per_10000": 20,
    }
    slow = row | {"step_ratio": [0.7, 0.8, 0.9]}
    for name in ("cifar10", *OF_LENGTH):
        rows = {variant: slow if variant == "favor" else row for variant in FEW}
        common = {"study": name, "recipe": {"batch_size": 500}, "inference_batch": 500, "rounds": 3}
        results.write(out / f"timing-{name}.json", {**common, "precision": "bf16", "device": "cpu", "rows": rows})


def test_report_goes_between_the_marks(tmp_path, capsys):
    written(tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "".join(report.MARKS) + "after\n")
    for _ in range(2):  # a second time replaces it
        report.main(["--out", str(tmp_path / "results"), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("**CIFAR-10** (tokens") == 1
    for name in ("tradeoff", "length"):
        assert f"](results/{name}.png)" in text
        assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(PNG)
    assert "| ftheta            | 54.10 ± 0.14 |" in text and "0.400" in text  # 100 steps of 4 ms
    assert "CIFAR-10: ftheta - relu | +3.00 ± 0.00 points, seeds: 2 | yes" in text
    assert "CIFAR-10, 1024 tokens: an epoch of favor | 0.800 x softmax's, at most 0.67 | no" in text
    assert "CIFAR-10, 1024 tokens: an epoch of relu | 0.600 x softmax's, at most 0.67 | yes" in text
    assert "CIFAR-10, 256 tokens: an epoch of favor | 0.800 x softmax's, at most 1.00 | yes" in text


@pytest.mark.parametrize("part", report.PARTS)
def test_each_part_by_itself_also_without_results(part, tmp_path, capsys):
    report.main([part, "--out", str(tmp_path)])
    assert capsys.readouterr().out == "\n"
    written(tmp_path, seeds=1)
    report.main([part, "--out", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 1 or not part.endswith("plot")
    assert len(list(tmp_path.glob("*.png"))) == part.endswith("plot")


def test_an_unknown_part_is_said(capsys):
    with pytest.raises(SystemExit):
        report.main(["figures"])
    assert "PART must be among checks, accuracy, " in capsys.readouterr().err


def test_the_readme_has_the_marks():
    text = (ROOT / "examples" / "performer_vit" / "README.md").read_text()
    assert [text.count(mark) for mark in report.MARKS] == [1, 1]


def test_committed_results_are_of_the_study():
    for result in results.read(ROOT / "examples" / "performer_vit" / "results", "*-seed*.json"):
        options = argparse.Namespace(images=result["images"], epochs=None, lr=None, batch_size=None, redraw_every=0)
        options.compile, options.capture = result["recipe"]["compile"], result["recipe"]["capture"]
        same = study.STUDY.describe(options, result["study"], result["variant"])
        assert {key: result[key] for key in same} == same
