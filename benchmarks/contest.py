"""The contest: every method with the same start, layers, grid, data order, budget and trials.

For each task, width and budget every method gets four learning rates to try, with seed 0 on nine
tenths of the training set, judged on the last tenth: the task's three, then one beyond the best of
them if that is the lowest or the highest, else one between the best two neighbours. The best of
the four is then run with every seed: images on the whole training set, judged on the test split;
text, whose validation split is too small to tell methods apart, on eight tenths of the training
set, judged on the ninth. A finished run is a line of --results and is not made again: stop and
start this command as you like.

    python benchmarks/contest.py --data FOLDER      # everything that is missing
    python benchmarks/contest.py --data FOLDER --tasks resnet20 --bits 1 --methods askewsgd parq
    python benchmarks/contest.py --table-only

With --lr a rate is judged that the trials did not choose, to see what the choice cost.
With --trial-steps 600 the learning rates of a long budget are those of the trials of a short one;
--table-only needs the same flag to find them.
With --mixed-precision no, runs are in float32, for processors without bf16, which torch emulates at
a tenth of the speed. What is finished in either counts; a row with runs in float32 says so.
With --distill, a full-precision network trained for the budget's steps teaches every method alike.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

from contest_runs import (
    ADAMW_LRS,
    BESIDE_LEVELS,
    FULL,
    HALF_INTEGER,
    INTEGER,
    LEVEL_LRS,
    MEASURED,
    METHODS,
    TASKS,
    WEIGHTS,
    WIDTHS,
    Run,
)

from askewq.methods import RIVALS

AGAIN = 0.5  # how far, in points, a run with the same seed may end from another machine's
DIVERGED = ("the loss is", "the weights are not finite")  # what such a run ends with
TEACHING = threading.Lock()
STOPPED = threading.Event()  # no run begins after it


class Results:
    """The finished runs with what they measured, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        lines = path.read_text().splitlines() if path.is_file() else []
        entries = [json.loads(line) for line in lines]
        self._of = {Run(**entry["run"]): entry["measured"] for entry in entries}

    def add(self, run: Run, measured: dict[str, float]) -> None:
        """Keep what a run measured."""
        with self._lock:
            self._of[run] = measured
            line = json.dumps({"run": asdict(run), "measured": measured})
            with self._path.open("a") as file:
                file.write(line + "\n")

    def of(self, run: Run) -> dict[str, float] | None:
        """Return what a run measured; None: it is not finished."""
        return self._of.get(run)

    def best(self, runs: list[Run]) -> Run:
        """Return the most accurate of some finished runs."""
        return max(runs, key=lambda run: self._of[run]["accuracy"])


def entries(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield everything that competes, as a trial without a learning rate."""
    for task in arguments.tasks:
        for steps in arguments.steps:
            if FULL in arguments.methods or arguments.distill:
                yield Run(task, "", steps, FULL, 0.0, 0, True, 0.0)
            for bits in arguments.bits:
                width = bits if bits == "ternary" else int(bits)
                for method in (m for m in arguments.methods if m != FULL):
                    entry = Run(task, bits, steps, method, 0.0, 0, True, arguments.distill)
                    if method in RIVALS and width not in RIVALS[method].bits:
                        continue
                    if method == INTEGER and bits not in HALF_INTEGER:
                        continue
                    if method in BESIDE_LEVELS and bits not in TASKS[task].level_bits:
                        continue
                    yield entry


def trials(entry: Run, results: Results, arguments: argparse.Namespace) -> list[Run]:
    """Return the runs among which an entry's learning rate is chosen: three, and then a fourth."""
    task = TASKS[entry.task]
    lrs = task.full_lrs if entry.full else LEVEL_LRS if entry.in_levels else task.lrs
    lrs = ADAMW_LRS if entry.on_adamw else lrs
    runs = [replace(entry, lr=lr, steps=arguments.trial_steps or entry.steps) for lr in lrs]
    finished = [result["accuracy"] for run in runs if (result := results.of(run))]
    if len(finished) < len(runs):
        return runs
    return [*runs, replace(runs[0], lr=fourth(lrs, finished))]


def fourth(lrs: tuple[float, ...], accuracies: list[float]) -> float:
    """Return the rate to try after three: beyond the best at an edge, else between neighbours.

    Between them lies a rate also where the best two neighbours are equally good.
    """
    lowest, middle, highest = accuracies
    if lowest > middle and lowest >= highest:
        return lrs[0] / 2
    if highest > middle:
        return lrs[2] * 2
    neighbour = lrs[0] if lowest > highest else lrs[2]
    return float(f"{math.sqrt(lrs[1] * neighbour):.2g}")


def chosen(entry: Run, results: Results, arguments: argparse.Namespace) -> Run | None:
    """Return the best trial of those that are finished; None: not even three are."""
    finished = [run for run in trials(entry, results, arguments) if results.of(run)]
    return results.best(finished) if len(finished) > 2 else None


def judged(entry: Run, results: Results, arguments: argparse.Namespace) -> list[Run]:
    """Return the runs that count, with the best learning rate of the trials; none before those."""
    best = chosen(entry, results, arguments)
    if arguments.lr is not None and not entry.full:
        best = replace(entry, lr=arguments.lr)
    if best is None:
        return []
    counting = replace(best, steps=entry.steps, trial=False)
    return [replace(counting, seed=seed) for seed in range(arguments.seeds)]


def teacher_of(run: Run, results: Results, arguments: argparse.Namespace) -> Run | None:
    """Return the best run in full precision with this run's budget and data; it teaches."""
    if not run.distill:
        return None
    full = Run(run.task, "", run.steps, FULL, 0.0, 0, True, 0.0)
    best = chosen(full, results, arguments)
    if best is None:
        sys.exit(f"no teacher for {run}: the runs in full precision are not finished")
    return replace(best, steps=run.steps, trial=run.trial)


def make(
    run: Run, results: Results, arguments: argparse.Namespace, keep_weights: bool = False
) -> None:
    """Make a run, unless it is finished; with `keep_weights`, unless its weights are there too.

    A finished run that is made again for its weights keeps what it measured the first time, and
    has to come near it.
    """
    output: Path = arguments.output
    folder, teacher = run.folder(output), teacher_of(run, results, arguments)
    finished = results.of(run)
    if finished and ((folder / WEIGHTS).is_file() or not keep_weights):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = None
    if teacher is not None:
        with TEACHING:  # the first run that needs the teacher trains it, the others wait
            make(teacher, results, arguments, keep_weights=True)
        weights = teacher.folder(output) / WEIGHTS
    command = run.command(arguments.data, output, weights, arguments.mixed_precision)
    command += ["--overwrite"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    log = folder.with_name(f"{folder.name}.log")
    if STOPPED.is_set():
        return
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
    precision = {"bf16": arguments.mixed_precision == "bf16"}
    if done.returncode == 0:
        measured = run.measured(output)
        if not finished:
            results.add(run, measured | precision)
        elif abs(measured["accuracy"] - finished["accuracy"]) > AGAIN:
            (folder / WEIGHTS).unlink()
            sys.exit(
                f"{folder}: made again for its weights it has {measured['accuracy']:.2f}, its line "
                f"{finished['accuracy']:.2f}; it is not the same run, see its log"
            )
    elif not finished and any(words in log.read_text() for words in DIVERGED):
        # A result, the worst one.
        results.add(run, dict.fromkeys(MEASURED, 0.0) | precision)
    else:
        print(f"{folder}: failed, see its log", flush=True)
    print(f"{folder}: {results.of(run)}", flush=True)


def compete(entry: Run, results: Results, arguments: argparse.Namespace) -> None:
    """Make the trials of an entry, then the runs that count."""
    if arguments.lr is None or entry.full:
        for turn in range(4):  # the fourth trial is known once three are finished
            for run in trials(entry, results, arguments)[turn : turn + 1]:
                make(run, results, arguments)
    for run in judged(entry, results, arguments):
        make(run, results, arguments)


def lead(entry: Run, results: Results, arguments: argparse.Namespace) -> str:
    """Return how far AskewSGD is ahead of an entry, the mean and with each seed that both have."""
    if entry.full or entry.method == "askewsgd":
        return ""
    ours = judged(replace(entry, method="askewsgd"), results, arguments)
    pairs = zip(ours, judged(entry, results, arguments), strict=False)
    found = [(results.of(our), results.of(other)) for our, other in pairs]
    ahead = [our["accuracy"] - other["accuracy"] for our, other in found if our and other]
    if not ahead:
        return ""
    return f"{statistics.mean(ahead):+.2f} ({', '.join(f'{points:+.2f}' for points in ahead)})"


def table(results: Results, arguments: argparse.Namespace) -> None:
    """Print every entry that is finished: trials, accuracies, AskewSGD's lead, and what it cost."""
    print(
        "| task | bits | steps | method | trials: rate, accuracy | rate | of each seed | accuracy "
        "| askewsgd ahead by | snapped - relaxed | s a step | peak GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for entry in entries(arguments):
        runs = judged(entry, results, arguments)
        finished = [result for run in runs if (result := results.of(run))]
        if not finished:
            continue
        values = [result["accuracy"] for result in finished]
        gap = statistics.mean(result["accuracy"] - result["relaxed"] for result in finished)
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        step = statistics.median(result["step_seconds"] for result in finished)
        float32 = "" if all(result.get("bf16", True) for result in finished) else " (float32)"
        memory = max(result["peak_memory_bytes"] for result in finished) / 1e9
        tried = sorted(trials(entry, results, arguments), key=lambda run: run.lr)
        shown = [f"{r.lr:g}, {found['accuracy']:.2f}" for r in tried if (found := results.of(r))]
        print(
            f"| {entry.task} | {entry.bits} | {entry.steps} | {entry.method} | "
            f"{'; '.join(shown)} | {runs[0].lr:g} | {', '.join(f'{v:.2f}' for v in values)} | "
            f"{statistics.mean(values):.2f}{spread} | {lead(entry, results, arguments)} | "
            f"{gap:+.2f} | {step:.3f}{float32} | {memory:.2f} |"
        )


def resolution(
    results: Results, arguments: argparse.Namespace
) -> dict[tuple[str, str, int], tuple[float, float]]:
    """Return for each task, width and budget which lead of three seeds is no chance.

    That is two standard errors of the mean of three paired differences, whose variance is the mean
    of those between any two of at least three entries that have three seeds or more; the paper's
    form, which ends anywhere, is left out. With it comes how far the same seed ties two entries:
    their correlation.
    """
    kinds: dict[tuple[str, str, int], list[dict[int, float]]] = {}
    for entry in entries(arguments):
        found = {run.seed: results.of(run) for run in judged(entry, results, arguments)}
        by_seed = {seed: result["accuracy"] for seed, result in found.items() if result}
        if len(by_seed) > 2 and entry.method != "askewsgd-paper":
            kinds.setdefault((entry.task, entry.bits, entry.steps), []).append(by_seed)
    told = {}
    for kind, some in kinds.items():
        within = statistics.mean(statistics.variance(one.values()) for one in some)
        differences = [
            [one[seed] - other[seed] for seed in one.keys() & other.keys()]
            for one, other in combinations(some, 2)
        ]
        paired = [statistics.variance(values) for values in differences if len(values) > 2]
        if len(some) > 2 and paired and within:
            between = statistics.mean(paired)
            told[kind] = 2 * math.sqrt(between / 3), 1 - between / (2 * within)
    return told


def main() -> None:
    """Run what is missing and print the table."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the data, for what is to be trained")
    parser.add_argument("--output", type=Path, default=Path("out/contest"))
    parser.add_argument("--results", type=Path, default=here / "contest.jsonl")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--bits", nargs="+", choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--steps", nargs="+", type=int, default=[600])
    parser.add_argument(
        "--trial-steps", type=int, help="the budget of the trials, if not that of the runs"
    )
    parser.add_argument("--lr", type=float, help="judge this rate: a look beside the contest")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--distill", type=float, default=0.0)
    parser.add_argument("--mixed-precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.table_only or arguments.data):
        parser.error("give --data FOLDER, or --table-only to print what was run")
    results = Results(arguments.results)
    if not arguments.table_only:
        listed = list(entries(arguments))
        full = [entry for entry in listed if entry.full]
        low_bit = [entry for entry in listed if not entry.full]
        starts = {replace(e, trial=trial).start() for e in listed for trial in (True, False)}
        with ThreadPoolExecutor(arguments.jobs) as pool:
            try:
                list(pool.map(lambda run: make(run, results, arguments, True), starts - {None}))
                for some in (full, low_bit):  # what full precision chooses is the teacher's rate
                    list(pool.map(lambda entry: compete(entry, results, arguments), some))
            except KeyboardInterrupt:
                STOPPED.set()
                raise
    table(results, arguments)
    for (task, bits, steps), (points, tied) in resolution(results, arguments).items():
        print(
            f"\n{task}, {bits}, {steps} steps: a lead of three seeds is more than chance from "
            f"{points:.2f} on; runs of the same seed correlate by {tied:+.2f}"
        )


if __name__ == "__main__":
    main()
