"""The paper's CIFAR-10 row: VGG-small from random weights at 1 bit, published figures beside.

Every layer is binary, one scale a tensor, batch norm without affine after it, AdamW without decay,
batch 128, crops and flips; the network is benchmarks/vgg_small.py. The paper trains 100 epochs
(39,000 steps); --steps says how many are made here, and the table repeats it.

    python benchmarks/paper_vgg.py --data FOLDER --steps 390      # one epoch
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

MODEL = str(Path(__file__).parent / "vgg_small.py") + ":vgg_small"
FULL = "full precision"
PUBLISHED = {
    FULL: 89.46,
    "askewsgd-paper": 88.98,
    "askewsgd": None,
    "binaryconnect": 88.33,
    "proxquant": 88.22,
    "mirror-descent": 88.13,
    "projected-gradient": 71.34,
}


def accuracy(method: str, seed: int, arguments: argparse.Namespace) -> float:
    """Train once, or read what an earlier call of this command left; test accuracy in percent."""
    budget = f"{arguments.steps}-steps-lr-{arguments.lr:g}"
    folder: Path = arguments.output / budget / f"{method}-{seed}"
    if not (folder / "metrics.json").is_file():
        flags = ["--model", MODEL, "--dataset", str(arguments.data / "cifar10")]
        flags += ["--bits", "1", "--group-size", "tensor", "--include", "*", "--seed", str(seed)]
        flags += ["--augment", "crop-flip", "--batch-size", "128", "--mixed-precision", "bf16"]
        flags += ["--optimizer", "adamw", "--compile", "--output", str(folder), "--overwrite"]
        if method == FULL:  # its figure is that of the first phase
            flags += ["--full-precision-steps", str(arguments.steps), "--max-steps", "1"]
            flags += ["--full-precision-lr", str(arguments.lr)]
        else:
            flags += ["--method", method, "--max-steps", str(arguments.steps)]
            flags += ["--lr", str(arguments.lr)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        command = [sys.executable, "-m", "askewq", "finetune", *flags]
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    metrics = json.loads((folder / "metrics.json").read_text())
    return float(metrics["full_precision" if method == FULL else "snapped"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("out/paper-vgg"))
    parser.add_argument("--steps", type=int, default=39_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--methods", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    arguments = parser.parse_args()
    print(f"| method | accuracy after {arguments.steps} steps | published, 39,000 steps |")
    print("|---|---|---|")
    for method in arguments.methods:
        figures = [accuracy(method, seed, arguments) for seed in range(arguments.seeds)]
        spread = f" ± {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
        published = PUBLISHED[method] or ""
        print(f"| {method} | {statistics.mean(figures):.2f}{spread} | {published} |", flush=True)


if __name__ == "__main__":
    main()
