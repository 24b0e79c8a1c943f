"""One training loop for every study, under Hugging Face Accelerate: one process, or many with `accelerate launch`."""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from fastrpe.checks import fail

from .data import Images

WARM_UP_STEPS = 2  # left out of the timing: they compile, allocate and fill caches


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine down to zero; the same for every variant of a study."""

    epochs: int = 20
    batch_size: int = 100  # over all processes
    lr: float = 2e-3
    warm_up: float = 0.1  # of all steps
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip: float = 1.0
    compile: bool = False

    def lr_at(self, step: int, steps: int) -> float:
        rise = max(1, round(self.warm_up * steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass
class History:
    """What one training gave, epoch by epoch."""

    train_loss: list[float]
    test_loss: list[float]
    accuracy: list[float]
    seconds: list[float]  # training alone, without evaluation and warm-up steps

    @property
    def seconds_per_epoch(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]


def fit(
    model: Any,
    images: Images,
    recipe: Recipe,
    accelerator: Accelerator,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    label: str = "",
) -> History:
    """Train ``model``, which gives ``parameter_groups(weight_decay)``, in place and evaluate it after each epoch.

    With ``checkpoint`` the state is saved after each epoch; ``resume`` continues from there to the same bits as a
    run that was never interrupted.
    """
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    images = images.to(device)
    per_epoch = len(images.train_images) // recipe.batch_size
    if recipe.compile:
        torch.compiler.reset()  # graphs of the models before this one count against the limit on recompilations
        model.compile()
    groups = model.to(device).parameter_groups(recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
    # The learning rate is a function of the step, as the order of the data is, so neither needs a state of its own.
    prepared, optimizer = accelerator.prepare(model, optimizer)
    history = History([], [], [], [])
    run = {"recipe": asdict(recipe), "seed": seed}
    if resume and checkpoint is not None and (saved := _latest(checkpoint)):
        before = json.loads((saved / "run.json").read_text())
        if before["run"] != run:
            raise fail("fit", "recipe and seed", f"be those of the checkpoint, {before['run']}", run)
        accelerator.load_state(str(saved))
        history = History(**before["history"])
    first = len(history.accuracy)
    bar = tqdm(
        total=recipe.epochs * per_epoch,
        initial=first * per_epoch,
        desc=label,
        unit="step",
        disable=None if accelerator.is_main_process else True,  # None: no bar unless the output is a terminal
    )
    for epoch in range(first, recipe.epochs):
        prepared.train()
        total = torch.zeros((), device=device)
        warm_up = min(WARM_UP_STEPS, per_epoch - 1) if epoch == first else 0
        for i, (x, y) in enumerate(images.train_batches(recipe.batch_size, epoch, seed, rank, world)):
            if i == warm_up:
                start = _now(device)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(epoch * per_epoch + i, recipe.epochs * per_epoch)
            with accelerator.autocast():
                loss = F.cross_entropy(prepared(x), y, label_smoothing=recipe.label_smoothing)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            bar.update()
        history.seconds.append((_now(device) - start) * per_epoch / (per_epoch - warm_up))
        history.train_loss.append(accelerator.reduce(total, "mean").item() / per_epoch)
        accuracy, test_loss = evaluate(prepared, images, accelerator)
        history.accuracy.append(accuracy)
        history.test_loss.append(test_loss)
        bar.set_postfix(loss=f"{history.train_loss[-1]:.3f}", accuracy=f"{100 * accuracy:.2f}%")
        if checkpoint is not None:
            _save(accelerator, checkpoint, epoch, {"run": run, "history": vars(history)})
    bar.close()
    accelerator.free_memory()
    return history


@torch.inference_mode()
def evaluate(model: nn.Module, images: Images, accelerator: Accelerator, batch_size: int = 1000) -> tuple[float, float]:
    """Accuracy and cross entropy on the test images."""
    model.eval()
    sums = torch.zeros(2, device=accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    for x, y in images.test_batches(batch_size, rank, world):
        with accelerator.autocast():
            logits = model(x).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack(((logits.argmax(-1) == y).sum().float(), loss))
    correct, loss = accelerator.reduce(sums).tolist()
    return correct / len(images.test_images), loss / len(images.test_images)


@torch.inference_mode()
def inference_ms(
    model: nn.Module, images: Images, accelerator: Accelerator, batch_size: int = 250, repeats: int = 9
) -> float:
    """Milliseconds for the forward pass of 1,000 test images: the median of ``repeats`` passes after a warm-up."""
    model.eval()
    device = accelerator.device
    count = min(1000, len(images.test_images))
    batches = [x for x, _ in images.to(device).head(0, count).test_batches(batch_size)]

    def one_pass() -> float:
        start = _now(device)
        for x in batches:
            with accelerator.autocast():
                model(x)
        return _now(device) - start

    one_pass()
    return 1e6 / count * sorted(one_pass() for _ in range(repeats))[repeats // 2]


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _save(accelerator: Accelerator, checkpoint: Path, epoch: int, content: dict[str, Any]) -> None:
    """Write ``checkpoint/<epoch>``, complete once run.json is there, then remove older ones."""
    folder = checkpoint / f"{epoch:04d}"
    accelerator.save_state(str(folder), safe_serialization=False)
    if accelerator.is_main_process:
        (folder / "run.json.new").write_text(json.dumps(content))
        (folder / "run.json.new").rename(folder / "run.json")
        for other in checkpoint.iterdir():
            if other != folder:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def _latest(checkpoint: Path) -> Path | None:
    complete = sorted(checkpoint.glob("*/run.json"))
    return complete[-1].parent if complete else None
