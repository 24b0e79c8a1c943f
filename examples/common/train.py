"""One training loop for every study, under Hugging Face Accelerate: one process, or many with `accelerate launch`."""

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from fastrpe import feature_maps
from fastrpe.checks import check_choice, fail

from .data import Images

WARM_UP_STEPS = 3  # left out of the timing: they compile, allocate, fill caches and capture
COMPILE = ("no", "blocks", "model")


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine down to zero; the same for every variant of a study.

    ``compile`` takes the model as a whole, or ``model.blocks`` one by one: as they are alike, they compile once, in a
    fraction of the time. ``capture`` makes each step of a single process one CUDA graph, so that the host, which would
    launch its hundreds of kernels, is never waited for; without a GPU it means nothing.
    """

    epochs: int = 20
    batch_size: int = 100  # over all processes
    lr: float = 2e-3
    warm_up: float = 0.1  # of all steps
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip: float = 1.0
    compile: str = "no"
    capture: bool = False
    eval_every: int = 1  # epochs; the last is always evaluated

    def __post_init__(self) -> None:
        check_choice("Recipe", "compile", self.compile, COMPILE)

    def lr_at(self, step: int, steps: int) -> float:
        rise = max(1, round(self.warm_up * steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass
class History:
    """What one training gave: loss and time of each epoch, and what was evaluated after which."""

    train_loss: list[float]
    seconds: list[float]  # training alone, without evaluation and warm-up steps
    evaluated: list[int]  # epochs, counted from 1
    test_loss: list[float]
    accuracy: list[float]

    @property
    def seconds_per_epoch(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]


class Captured:
    """Calls ``run``, which reads and writes the same memory every time; after a warm-up as one CUDA graph."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream()
        self.calls = 0

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.run()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.calls += 1
        if self.calls == WARM_UP_STEPS:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.run()


class Step:
    """One step of training on tensors that stay in place: the batch's part of the epoch's plan, and the rate.

    ``loss`` adds up; ``model`` and ``optimizer`` are what Accelerate prepared.
    """

    def __init__(self, model: Any, images: Images, recipe: Recipe, accelerator: Accelerator) -> None:
        device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
        self.images, self.recipe, self.accelerator = images, recipe, accelerator
        capture = recipe.capture and device.type == "cuda"
        if capture and (world > 1 or accelerator.mixed_precision == "fp16"):
            came = f"{world} processes and {accelerator.mixed_precision}"
            raise fail("fit", "capture", "be False unless there is one process and no scaled loss (fp16)", came)
        compile_parts(model, recipe.compile)
        self.batch = images.train_batch if recipe.compile == "no" else torch.compile(images.train_batch)
        groups = model.to(device).parameter_groups(recipe.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=True, capturable=capture)
        # The learning rate is a function of the step, as the order of the data is, so neither needs a state of its own.
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.lr, self.loss = torch.zeros((), device=device), torch.zeros((), device=device)
        self.plan = torch.zeros((4, len(range(rank, recipe.batch_size, world))), dtype=torch.int64, device=device)
        self.call = Captured(self.run) if capture else self.run

    def __call__(
        self,
        plan: Tensor,  # (4, B), of this process, as `Images.plan` gives them
        lr: float,
    ) -> None:
        self.plan.copy_(plan)
        self.lr.fill_(lr)
        self.call()

    def run(self) -> None:
        x, y = self.batch(self.plan)
        with self.accelerator.autocast():
            loss = F.cross_entropy(self.model(x), y, label_smoothing=self.recipe.label_smoothing)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr  # here, since loading a state puts a copy in its place
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss += loss.detach()


def compile_parts(model: Any, mode: str) -> None:
    """Compile ``model``, or each of its blocks, in place."""
    for part in {"no": (), "blocks": getattr(model, "blocks", ()), "model": (model,)}[mode]:
        part.compile()


def fit(
    model: Any,
    images: Images,
    recipe: Recipe,
    accelerator: Accelerator,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    label: str = "",
    turn: AbstractContextManager[Any] | None = None,
) -> History:
    """Train ``model``, which gives ``parameter_groups(weight_decay)``, in place and evaluate it now and then.

    With ``checkpoint`` the state is saved after each epoch; ``resume`` continues from there to the same bits as a
    run that was never interrupted. ``turn`` is entered when all is compiled and held to the end: a lock, where several
    trainings share a device.
    """
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    images = images.to(device)
    per_epoch = len(images.train_images) // recipe.batch_size
    if per_epoch == 0:
        raise fail(
            "fit", "batch_size", f"be at most {len(images.train_images)}, the training images", recipe.batch_size
        )
    step = Step(model, images, recipe, accelerator)
    history = History([], [], [], [], [])
    run = {"recipe": asdict(recipe), "seed": seed}
    if resume and checkpoint is not None and (saved := _latest(checkpoint)):
        before = json.loads((saved / "run.json").read_text())
        if before["run"] != run:
            raise fail("fit", "recipe and seed", f"be those of the checkpoint, {before['run']}", run)
        accelerator.load_state(str(saved))
        history = History(**before["history"])
    first = len(history.seconds)
    bar = tqdm(
        total=recipe.epochs * per_epoch,
        initial=first * per_epoch,
        desc=label,
        unit="step",
        disable=None if accelerator.is_main_process else True,  # None: no bar unless the output is a terminal
    )
    with ExitStack() as stack:
        for epoch in range(first, recipe.epochs):
            step.model.train()
            step.loss.zero_()
            plan = images.plan(epoch, seed)
            warm_up = min(WARM_UP_STEPS, per_epoch - 1) if epoch == first else 0
            for i in range(per_epoch):
                if i == warm_up:
                    if epoch == first:
                        stack.enter_context(turn or nullcontext())
                    start = _now(device)
                batch = plan[:, i * recipe.batch_size + rank : (i + 1) * recipe.batch_size : world]
                step(batch, recipe.lr_at(epoch * per_epoch + i, recipe.epochs * per_epoch))
                feature_maps.step(step.model)  # outside the graph, which reads projections where they are
                bar.update()
            history.seconds.append((_now(device) - start) * per_epoch / (per_epoch - warm_up))
            history.train_loss.append(accelerator.reduce(step.loss, "mean").item() / per_epoch)
            if (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs:
                accuracy, test_loss = evaluate(step.model, images, accelerator)
                history.evaluated.append(epoch + 1)
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
    """Accuracy and cross entropy on the test images, without compiling, which would take longer than it saves."""
    model.eval()
    sums = torch.zeros(2, device=accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    with torch.compiler.set_stance("force_eager"):
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
