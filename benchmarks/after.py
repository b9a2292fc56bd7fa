"""What the steps around the end bring: polishing, batch norm's statistics anew, an average.

ResNet-20 on CIFAR-10, several seeds. Polishing and the new statistics start from the same
checkpoint after the last low-bit step; the average needs a run of its own, whose weights take the
same way. So their differences are those of the end alone. Steps that polish could have been low-bit
steps: there is a run with so many more, too. Prints a table, the last column paired over the seeds.

    python benchmarks/after.py --data FOLDER --output out/after  # a new folder
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from run_recipe import RESNET20

WAYS: dict[str, dict[str, Any]] = {
    "polished, 50 steps": {"polish_steps": 50},
    "polished, 150 steps": {"polish_steps": 150},
    "batch norm's statistics anew, 50 batches": {"recalibrate_bn": 50},
}
EXTRA = 50


def main() -> None:
    """Train, end in every way, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("out/after"))
    parser.add_argument("--bits", default="2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", action="store_true", help="judge on training samples")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        flags = ["--model", RESNET20, "--dataset", str(arguments.data / "cifar10")]
        flags += ["--weights", str(arguments.data / "resnet20-cifar10" / "model.safetensors")]
        if arguments.held_out:
            flags += ["--train-split", "train[:90%]", "--eval-split", "train[90%:]"]
        flags += ["--augment", "crop-flip", "--batch-size", "128", "--compile", "--seed", str(seed)]
        flags += ["--mixed-precision", "bf16", "--bits", arguments.bits]
        if arguments.bits not in ("1", "ternary"):
            flags += ["--grid", "half-integer", "--optimizer", "sgd", "--lr", "0.02"]
        steps = ["--max-steps", str(arguments.steps), "--save-every", str(arguments.steps)]
        plain = arguments.output / f"plain-{seed}"
        found.setdefault("as it is", []).append(_finetune([*flags, *steps, "--output", str(plain)]))
        for number, (way, changes) in enumerate(WAYS.items()):
            folder = arguments.output / f"{number}-{seed}"
            _before_the_end(plain, folder, changes)
            end = ["--model", RESNET20, "--dataset", str(arguments.data / "cifar10"), "--resume"]
            found.setdefault(way, []).append(_finetune([*end, "--output", str(folder)]))
        others = {
            f"{EXTRA} more low-bit steps": ["--max-steps", str(arguments.steps + EXTRA)],
            "averaged, 0.99": [*steps, "--average", "0.99"],
        }
        for number, (way, own) in enumerate(others.items()):
            folder = arguments.output / f"other-{number}-{seed}"
            found.setdefault(way, []).append(_finetune([*flags, *own, "--output", str(folder)]))
    print("| the end | accuracy | of each seed | against none, paired |\n|---|---|---|---|")
    for way, accuracies in found.items():
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        gains = [one - other for one, other in zip(accuracies, found["as it is"], strict=True)]
        mean = statistics.mean(accuracies)
        print(f"| {way} | {mean:.2f} | {each} | {statistics.mean(gains):+.2f} |")


def _before_the_end(run: Path, folder: Path, changes: dict[str, Any]) -> None:
    """Make a run that has all steps of another one behind it, and a recipe that goes on."""
    folder.mkdir(parents=True)
    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))


def _finetune(flags: list[str]) -> float:
    """Return the accuracy of the packed file."""
    folder = Path(flags[flags.index("--output") + 1])
    subprocess.run(
        [sys.executable, "-m", "askewq", "finetune", *flags], check=True, stdout=subprocess.DEVNULL
    )
    return float(json.loads((folder / "metrics.json").read_text())["reloaded"])


if __name__ == "__main__":
    main()
