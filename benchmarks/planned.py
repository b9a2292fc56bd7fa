"""Bits by layer against the same bits for all, at equal size: ResNet-20 on CIFAR-10.

`askewq plan` chooses the bits of every layer for an average of 2, once by measured and once by
estimated sensitivities; `askewq finetune` then trains either plan, and 2 bits for all, with the
same steps and seeds. Prints the table of recipes/README.md.

    python benchmarks/planned.py --data FOLDER --output out/planned  # a new folder
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from run_recipe import RESNET20


def main() -> None:
    """Plan, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("out/planned"))
    parser.add_argument("--average-bits", type=int, default=2, help="a width: the uniform one")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    bits = str(arguments.average_bits)
    network = ["--model", RESNET20, "--dataset", str(arguments.data / "cifar10")]
    network += ["--weights", str(arguments.data / "resnet20-cifar10" / "model.safetensors")]
    ways = {"uniform": [*network, "--bits", bits, "--grid", "half-integer"]}
    for sensitivity in ("measured", "estimated"):
        folder = arguments.output / f"plan-{sensitivity}"
        plan = ["plan", *network, "--grid", "half-integer", "--average-bits", bits]
        _askewq([*plan, "--sensitivity", sensitivity, "--output", str(folder)])
        ways[sensitivity] = ["--recipe", str(folder / "recipe.yaml")]
    training = ["--augment", "crop-flip", "--optimizer", "sgd", "--lr", "0.02", "--compile"]
    training += ["--batch-size", "128", "--mixed-precision", "bf16"]
    training += ["--max-steps", str(arguments.steps)]
    rows = []
    for way, flags in ways.items():
        accuracies, size = [], 0
        for seed in range(arguments.seeds):
            out = arguments.output / f"{way}-{seed}"
            _askewq(["finetune", *flags, *training, "--seed", str(seed), "--output", str(out)])
            metrics = json.loads((out / "metrics.json").read_text())
            accuracies.append(metrics["reloaded"])
            size = metrics["bytes"]["packed"]
        rows.append((way, accuracies, size))
    print("| bits by layer | accuracy | of each seed | bytes |\n|---|---|---|---|")
    for way, accuracies, size in rows:
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        mean = statistics.mean(accuracies)
        print(f"| {way} | {mean:.2f} ± {spread:.2f} | {each} | {size:,} |")


def _askewq(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "askewq", *arguments], check=True)


if __name__ == "__main__":
    main()
