"""Command-line options that every study has."""

import argparse
from pathlib import Path

from accelerate import Accelerator

from .train import COMPILE


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--data-root", help="local copy of the data set; without it torchvision downloads into data/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--small", action="store_true", help="a short run: under two minutes on a CPU")
    parser.add_argument("--resume", action="store_true", help="skip finished runs and continue an interrupted one")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU if there is one")
    parser.add_argument(
        "--precision", choices=("no", "bf16", "fp16"), help="of autocast; by default bf16 on a GPU, no on a CPU"
    )
    parser.add_argument(
        "--compile", choices=COMPILE, nargs="?", const="model", default="no", help="train under torch.compile"
    )
    parser.add_argument(
        "--capture", action=argparse.BooleanOptionalAction, default=False, help="train each step as one CUDA graph"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder of results and plots, by default {out}")


def make_accelerator(options: argparse.Namespace) -> Accelerator:
    import torch

    gpu = torch.cuda.is_available()
    if options.device == "cuda" and not gpu:
        raise SystemExit("--device must be cpu on a machine without a GPU, got 'cuda'")
    cpu = options.device == "cpu" or not gpu
    precision = options.precision or ("no" if cpu else "bf16")
    return Accelerator(cpu=cpu, mixed_precision=precision)
