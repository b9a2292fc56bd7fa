"""The contest: every method with the same start, layers, grid, data order, budget and tuning.

For each task, width and budget every method gets the same learning rates to try, with seed 0 on
nine tenths of the training set, judged on the last tenth; the best one is then run with every seed
on the whole training set, judged on the test split. Each run is a folder of its own under --output,
and one that is finished is not run again: stop and start this command as you like.

    python benchmarks/contest.py --data ../shared/data --output out/contest          # everything
    python benchmarks/contest.py --tasks resnet20 --bits 1 --methods askewsgd binaryconnect
    python benchmarks/contest.py --table-only

With --distill, a full-precision network trained for the budget's steps teaches every method alike.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from run_recipe import RESNET20, minilm_folder

from askewq.methods import RIVALS

FULL = "full precision"
PARQ = "parq"  # torchao's, through its own package: pip install torchao
METHODS = [FULL, "askewsgd", "askewsgd-paper", *RIVALS, PARQ]


PARQ_SCRIPT = str(Path(__file__).parent / "parq.py")


@dataclass(frozen=True)
class Task:
    """What all runs of a task share; `lrs` are the trials of the methods and of full precision."""

    folder: str
    test: str
    flags: tuple[str, ...]
    lrs: tuple[float, ...]
    full_lrs: tuple[float, ...]
    start_steps: int


TASKS = {
    "resnet20": Task(
        "cifar10",
        "test",
        ("--augment", "crop-flip", "--batch-size", "128", "--optimizer", "sgd"),
        (0.01, 0.02, 0.05),
        (0.005, 0.01, 0.02),
        0,
    ),
    "minilm": Task(
        "sst2",
        "validation",
        ("--batch-size", "32", "--max-length", "64", "--optimizer", "adamw"),
        (5e-5, 1e-4, 3e-4),
        (5e-5, 1e-4, 3e-4),
        300,
    ),
}


@dataclass(frozen=True)
class Run:
    """One run of the contest: a trial (on held-out training data) or a judged one (on the test)."""

    task: str
    bits: str
    steps: int
    method: str
    lr: float
    seed: int
    trial: bool
    distill: float

    def folder(self, output: Path) -> Path:
        """Return the folder of the run."""
        kind = "trial" if self.trial else f"seed-{self.seed}"
        width = "any" if self.method == FULL else f"{self.bits}-bit"
        taught = f"-distill-{self.distill:g}" if self.distill and self.method != FULL else ""
        place = output / self.task / f"{width}-{self.steps}{taught}" / self.method.replace(" ", "-")
        return place / f"{kind}-lr-{self.lr:g}"

    def command(self, data: Path, output: Path) -> list[str]:
        """Return the command of the run."""
        task = TASKS[self.task]
        flags = ["--dataset", str(data / task.folder), *task.flags, "--seed", str(self.seed)]
        if self.task == "resnet20":
            weights = data / "resnet20-cifar10" / "model.safetensors"
            flags += ["--model", RESNET20, "--weights", str(weights)]
        else:
            flags += ["--model", minilm_folder(), "--task", "text-classification"]
        splits = ("train[:90%]", "train[90%:]") if self.trial else ("train", task.test)
        flags += ["--train-split", splits[0], "--eval-split", splits[1]]
        flags += ["--mixed-precision", "bf16", "--output", str(self.folder(output))]
        flags += ["--save-every", "1000000"]
        if (
            self.method == FULL
        ):  # its figure, and the teacher that it leaves, are of the first phase
            flags += ["--full-precision-steps", str(self.steps + task.start_steps)]
            flags += ["--full-precision-lr", str(self.lr), "--max-steps", "1", "--distill", "0.5"]
        else:
            flags += ["--lr", str(self.lr), "--bits", self.bits, "--max-steps", str(self.steps)]
            flags += [] if self.method == PARQ else ["--method", self.method]
            flags += ["--grid", "half-integer"] if self.bits in ("2", "4") else []
            if task.start_steps:
                flags += ["--full-precision-steps", str(task.start_steps)]
                flags += ["--full-precision-lr", "1e-4"]
        if self.distill and self.method != FULL:
            teacher = self.teacher(output)
            flags += ["--distill", str(self.distill), "--teacher-weights", str(teacher)]
        askewq = [PARQ_SCRIPT] if self.method == PARQ else ["-m", "askewq"]
        return [sys.executable, *askewq, "finetune", *flags]

    def teacher(self, output: Path) -> Path:
        """Return the weights of the best full-precision network for this budget, trained alike."""
        full = [Run(self.task, "", self.steps, FULL, lr, 0, True, 0.0) for lr in
                TASKS[self.task].full_lrs]  # fmt: skip
        best = max(full, key=lambda run: run.result(output)["accuracy"])
        if not self.trial:
            best = Run(self.task, "", self.steps, FULL, best.lr, 0, False, 0.0)
        return best.folder(output) / "checkpoints" / "teacher.safetensors"

    def result(self, output: Path) -> dict[str, float]:
        """Return accuracy, relaxed accuracy and cost of a run; a failed one is the worst."""
        if not self.finished(output):
            return {"accuracy": -math.inf}
        metrics = json.loads((self.folder(output) / "metrics.json").read_text())
        own = {FULL: "full_precision", PARQ: "relaxed"}.get(self.method)
        return {
            "accuracy": metrics[own or "snapped"],
            "relaxed": metrics[own or "relaxed"],
            "step_seconds": metrics["step_seconds"],
            "peak_memory_bytes": metrics["peak_memory_bytes"],
        }

    def finished(self, output: Path) -> bool:
        """Tell whether the run was made already."""
        return (self.folder(output) / "metrics.json").is_file()


def entries(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, str]]:
    """Yield (task, bits, steps, method) for everything that competes."""
    for task in arguments.tasks:
        for steps in arguments.steps:
            if FULL in arguments.methods or arguments.distill:
                yield task, "", steps, FULL
            for bits in arguments.bits:
                for method in (m for m in arguments.methods if m != FULL):
                    allowed = RIVALS[method].bits if method in RIVALS else None
                    if allowed is None or (bits if bits == "ternary" else int(bits)) in allowed:
                        yield task, bits, steps, method


def trials(entry: tuple[str, str, int, str], distill: float) -> list[Run]:
    """Return the runs among which an entry's learning rate is chosen."""
    task, _, _, method = entry
    lrs = TASKS[task].full_lrs if method == FULL else TASKS[task].lrs
    return [Run(*entry, lr, 0, True, distill) for lr in lrs]


def judged(entry: tuple[str, str, int, str], output: Path, seeds: int, distill: float) -> list[Run]:
    """Return the runs that count, with the best learning rate of the trials."""
    best = max(trials(entry, distill), key=lambda run: run.result(output)["accuracy"])
    if not best.finished(output):
        return []
    return [Run(*entry, best.lr, seed, False, distill) for seed in range(seeds)]


def make(runs: list[Run], arguments: argparse.Namespace) -> None:
    """Make the runs that are not finished, several at a time."""

    def one(run: Run) -> None:
        folder = run.folder(arguments.output)
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = run.command(arguments.data, arguments.output)
        command += ["--overwrite"] if (folder / "recipe.yaml").is_file() else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        with folder.with_name(f"{folder.name}.log").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
        state = "failed, see its log" if done.returncode else f"{run.result(arguments.output)}"
        print(f"{folder}: {state}", flush=True)

    missing = [run for run in runs if not run.finished(arguments.output)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, missing))


def table(arguments: argparse.Namespace) -> None:
    """Print mean and spread over the seeds of every entry that is finished."""
    print(
        "| task | bits | steps | method | lr | accuracy | snapped - relaxed | s a step | peak GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for entry in entries(arguments):
        runs = judged(entry, arguments.output, arguments.seeds, arguments.distill)
        results = [r.result(arguments.output) for r in runs if r.finished(arguments.output)]
        if not results:
            continue
        values = [result["accuracy"] for result in results]
        gap = statistics.mean(r["accuracy"] - r["relaxed"] for r in results)
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        step = statistics.median(result["step_seconds"] for result in results)
        memory = max(result["peak_memory_bytes"] for result in results) / 1e9
        task, bits, steps, method = entry
        print(
            f"| {task} | {bits} | {steps} | {method} | {runs[0].lr:g} | "
            f"{statistics.mean(values):.2f}{spread} ({len(values)}) | {gap:+.2f} | {step:.3f} | "
            f"{memory:.2f} |"
        )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("out/contest"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--bits", nargs="+", default=["1", "ternary", "2", "4"])
    parser.add_argument("--steps", nargs="+", type=int, default=[600])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--distill", type=float, default=0.0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table_only:
        listed = list(entries(arguments))
        full = [entry for entry in listed if entry[3] == FULL]
        for some in (full, [entry for entry in listed if entry[3] != FULL]):  # teachers first
            make([run for entry in some for run in trials(entry, arguments.distill)], arguments)
            make(
                [
                    run
                    for entry in some
                    for run in judged(entry, arguments.output, arguments.seeds, arguments.distill)
                ],
                arguments,
            )
    table(arguments)


if __name__ == "__main__":
    main()
