import argparse
import fcntl
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from examples.common import jobs, results
from examples.common import study as common
from examples.string_vit import __main__ as study
from examples.string_vit import report, timing
from examples.string_vit.variants import FRACTIONS, STUDIES, VARIANTS, build, configure
from fastrpe.ops.rotary.string import circulant_params
from fastrpe.positions import grid_positions

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
    variants = ["none", "learned", "rope-mixed", "cayley", "circulant", "reflection-s8-k2", "sparse-0.1", "sparse-1"]
    found = run(tmp_path, "--variants", *variants)
    out = capsys.readouterr().out
    assert list(found) == sorted(variants)
    for name, result in found.items():
        assert result["accuracy"] == result["accuracy_by_epoch"][-1] and f"| {name} " in out
        assert [row["side"] for row in result["larger"]] == [5, 6, 8]
        assert {"device", "torch", "commit", "recipe", "model", "seed", "precision", "wall_seconds"} <= result.keys()
    assert found["none"]["parameters_of_position"] == 0 < found["sparse-0.1"]["parameters_of_position"]
    assert found["sparse-1"]["parameters_of_position"] == found["cayley"]["parameters_of_position"]
    for name in ("accuracy", "sparse", "resolution"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG) and f"]({name}.png)" in out


def test_resume_skips_what_is_finished_and_is_the_same(tmp_path, monkeypatch):
    variants = ["--variants", "rope", "none"]
    first = run(tmp_path, *variants)
    (tmp_path / "mnist-small-none-seed0.json").unlink()
    begun = []
    whole = common.run
    monkeypatch.setattr(common, "run", lambda *args: begun.append(args[4]) or whole(*args))
    assert run(tmp_path, *variants, "--resume")["none"]["accuracy"] == first["none"]["accuracy"]
    assert begun == ["none"]
    run(tmp_path, *variants, "--resume", "--lr", "1e-4")  # another recipe is another run
    assert begun == ["none", "rope", "none"]


def test_no_run_starts_late(tmp_path):
    assert run(tmp_path, "--variants", "rope", "--minutes", "0") == {}
    assert run(tmp_path, "--variants", "rope", "--minutes", "0", "--jobs", "2") == {}


def test_processes_side_by_side_and_one_that_fails(tmp_path, capfd):
    # --small wins over --datasets in each process, so the data set that is missing is asked for without it.
    arguments = [*TINY[1:], "--datasets", "mnist-small", "mnist", "--data-root", str(tmp_path / "nowhere")]
    arguments += ["--variants", "rope", "--seeds", "0", "1", "--jobs", "2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="failed: mnist rope"):
        study.main(arguments)
    assert [result["seed"] for result in results.read(tmp_path)] == [0, 1]
    assert "data: root must hold mnist" in capfd.readouterr().err


def test_a_turn_is_one_process_s_at_a_time(tmp_path):
    path = tmp_path / "turn"
    with jobs.locked(path), path.open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_variants_are_those_of_the_study():
    assert len(VARIANTS) == 20 and len({json.dumps(value) for value in VARIANTS.values()}) == 20
    assert [VARIANTS[f"sparse-{f:.3g}"][1]["f"] for f in FRACTIONS] == list(FRACTIONS)


def positions(variant, start="mixed"):
    config = configure(replace(STUDIES["cifar10"][0], depth=2, mlp_ratio=1.0), variant, start)
    model = build(config, 3, start)
    return model, [block.attention.position for block in model.blocks]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "none"])
def test_variants_start_alike(variant):
    first, _ = positions("none")
    model, encodings = positions(variant)
    weights = model.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(weights[name], value), name
    _, mixed = positions("rope-mixed")
    for ours, theirs in zip(encodings, mixed):
        if variant.startswith("circulant"):
            assert torch.equal(ours.c, circulant_params(theirs.freqs, 64, ours.block))
        elif variant not in ("learned", "rope"):
            assert torch.equal(ours.freqs, theirs.freqs)


def test_seeds_start_differently():
    config = configure(STUDIES["mnist-small"][0], "rope-mixed")
    a, b = (build(config, seed).blocks[0].attention for seed in range(2))
    assert not torch.equal(a.q_proj.weight, b.q_proj.weight) and not torch.equal(a.position.freqs, b.position.freqs)


@pytest.mark.parametrize("variant", ["rope-mixed", "cayley", "sparse-0.5"])
def test_the_axial_start_is_rope_s(variant):
    _, (axial, _) = positions("rope", "axial")
    _, (ours, _) = positions(variant, "axial")
    assert torch.equal(ours.freqs[0], axial.freqs)


def test_larger_images_have_positions_continued_or_rescaled():
    model = build(STUDIES["mnist-small"][0], 0)  # 4 x 4 patches
    same = study.Resized(model, 4, rescaled=True).positions
    assert torch.equal(same, model.grid)
    assert torch.equal(study.Resized(model, 8, rescaled=False).positions, grid_positions(8, 8))
    rescaled = study.Resized(model, 8, rescaled=True).positions
    assert rescaled.amin() == -0.25 and rescaled.amax() == 3.25
    assert torch.equal(rescaled.mean(0), model.grid.mean(0))


def test_timing_writes_ratios_to_rope(tmp_path, capsys):
    arguments = ["--small", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path)]
    timing.main([*arguments, "--variants", "cayley", "none"])
    timing.main([*arguments, "--variants", "circulant", "--resume"])
    rows = json.loads((tmp_path / "timing-mnist-small.json").read_text())["rows"]
    assert set(rows) == {"rope", "cayley", "none", "circulant"}
    assert rows["rope"]["step_ratio"] == [1, 1, 1] and rows["cayley"]["folded_ms_per_10000"] > 0
    assert "| cayley " in capsys.readouterr().out


def written(out, dataset="cifar10", seeds=2):
    """Results as a run writes them, without a run."""
    for i, name in enumerate(VARIANTS):
        for seed in range(seeds):
            accuracy = 0.5 + 0.01 * i + 0.002 * seed
            result = {
                "variant": name, "seed": seed, "dataset": dataset, "images": None, "device": "cpu",
                "accuracy": accuracy, "accuracy_folded": accuracy, "parameters_of_position": i,
                "train_seconds_per_epoch": 1.0, "model": {"image_size": 32, "patch_size": 4},
                "larger": [{"side": side, "continued": 0.4, "rescaled": 0.5} for side in (10, 12, 16)],
                "recipe": {"epochs": 60, "batch_size": 512},
            }  # fmt: skip
            results.write(out / f"{dataset}-{name}-seed{seed}.json", result)
    row = {f"{key}_ratio": [1.0, 1.01, 1.03] for key in ("step", "inference", "folded")}
    row |= {"step_ms": 4.0, "inference_ms_per_10000": 20.0, "folded_ms_per_10000": 19.0}
    slow = row | {"step_ratio": [1.1, 1.2, 1.3]}
    common = {"dataset": dataset, "recipe": {"batch_size": 512}, "inference_batch": 1000, "rounds": 3}
    rows = {name: slow if name == "sparse-0.5" else row for name in VARIANTS}
    results.write(out / f"timing-{dataset}.json", {**common, "precision": "bf16", "device": "cpu", "rows": rows})


def test_report_goes_between_the_marks(tmp_path, capsys):
    written(tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "".join(report.MARKS) + "after\n")
    for _ in range(2):  # a second time replaces it
        report.main(["--out", str(tmp_path / "results"), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("**CIFAR-10**") == 1
    for name in ("accuracy", "cost", "sparse", "resolution"):
        assert f"](results/{name}.png)" in text
        assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(PNG)
    assert "| sparse-1         | 69.10 ± 0.14 |" in text and "0.388" in text  # 97 steps of 4 ms
    assert "sparse-1 - rope-mixed | +16.00 ± 0.00 points, seeds: 2 | yes" in text
    assert "slowest, sparse-0.5 | 1.200 x RoPE, at most 1.10 | no" in text


def test_one_seed_decides_nothing(tmp_path):
    written(tmp_path, seeds=1)
    assert "sparse-1 - rope-mixed | +16.00 points, seeds: 1 | open" in report.checks(tmp_path)
    written(tmp_path, seeds=2)
    (tmp_path / "cifar10-rope-seed1.json").unlink()
    assert "seeds: 1 to 2" in report.accuracy(tmp_path)


@pytest.mark.parametrize("part", report.PARTS)
def test_each_part_by_itself_also_without_results(part, tmp_path, capsys):
    report.main([part, "--out", str(tmp_path)])
    assert capsys.readouterr().out == "\n"
    written(tmp_path, "mnist", seeds=1)
    report.main([part, "--out", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 1 or not part.endswith("plot")
    assert len(list(tmp_path.glob("*.png"))) == part.endswith("plot")


def test_an_unknown_part_is_said(capsys):
    with pytest.raises(SystemExit):
        report.main(["figures"])
    assert "PART must be among checks, accuracy, " in capsys.readouterr().err


def test_the_readme_has_the_marks():
    text = (ROOT / "examples" / "string_vit" / "README.md").read_text()
    assert [text.count(mark) for mark in report.MARKS] == [1, 1]


def test_committed_results_are_of_the_study():
    for result in results.read(ROOT / "examples" / "string_vit" / "results", "*-seed*.json"):
        options = argparse.Namespace(images=result["images"], start=result["start"], epochs=None, lr=None)
        options.compile, options.capture = result["recipe"]["compile"], result["recipe"]["capture"]
        assert jobs.is_of(result, study.STUDY.describe(options, result["dataset"], result["variant"]))
