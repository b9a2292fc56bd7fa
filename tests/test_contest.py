"""The contest's own rules, benchmarks/contest.py: which rate is tried, and which runs are made."""

import json
import re
import shutil
import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import builders
import pytest
from torch import nn

from askewq import choices, recipe_files, train
from askewq.methods import RIVALS


@pytest.fixture(scope="module")
def contest():
    """The script as a module."""
    with builders.benchmark("contest") as module:
        yield module


@pytest.mark.parametrize(
    ("accuracies", "rate"),
    [
        ([84.0, 83.6, 77.7], 0.005),  # best at the lowest: half of it
        ([73.1, 83.1, 83.5], 0.1),  # best at the highest: twice as much
        ([83.0, 85.0, 84.0], 0.032),  # in the middle: toward the better neighbour
        ([84.0, 85.0, 83.0], 0.014),
        ([85.0, 85.0, 83.0], 0.014),  # two are level: between them
        ([83.0, 85.0, 85.0], 0.032),
        ([85.0, 84.0, 85.0], 0.005),  # both edges: beyond the lower one
    ],
)
def test_the_fourth_rate(contest, accuracies, rate):
    """It lies beyond the best of three at an edge, and else between the best neighbours."""
    assert contest.fourth((0.01, 0.02, 0.05), accuracies) == rate


def test_a_fourth_trial_follows_three_and_counts(contest, tmp_path):
    """Three trials, then the fourth; the best of all that are finished gives the judged rate."""
    arguments = contest.argparse.Namespace(trial_steps=None, lr=None, seeds=2)
    entry = contest.Run("resnet20", "2", 600, "lsq", 0.0, 0, True, 0.0)
    results = contest.Results(tmp_path / "results.jsonl")
    assert [run.lr for run in contest.trials(entry, results, arguments)] == [0.01, 0.02, 0.05]
    for run, accuracy in zip(contest.trials(entry, results, arguments), (90, 89, 88), strict=True):
        assert contest.judged(entry, results, arguments) == []
        results.add(run, {"accuracy": accuracy})
    *_, last = contest.trials(entry, results, arguments)
    assert last.lr == 0.005
    assert [run.lr for run in contest.judged(entry, results, arguments)] == [0.01, 0.01]
    results.add(last, {"accuracy": 91})
    runs = contest.judged(entry, contest.Results(tmp_path / "results.jsonl"), arguments)
    assert [(run.lr, run.seed, run.trial) for run in runs] == [(0.005, 0, False), (0.005, 1, False)]


def test_the_lead_is_paired_over_seeds(contest, tmp_path, monkeypatch, capsys):
    """Each seed is compared with its own, where both methods have it; the mean is theirs."""
    path = tmp_path / "results.jsonl"
    results = contest.Results(path)
    measured = dict.fromkeys(contest.MEASURED, 0.0)
    accuracies = {"askewsgd": (83.0, 82.0, 81.0), "lsq": (82.5, 82.4), "luq": ()}
    for method, values in accuracies.items():
        entry = contest.Run("resnet20", "1", 600, method, 0.0, 0, True, 0.0)
        for lr in contest.LEVEL_LRS if entry.in_levels else contest.TASKS["resnet20"].lrs:
            results.add(contest.replace(entry, lr=lr), {**measured, "accuracy": 1 / lr})
        for seed, accuracy in enumerate(values):
            run = contest.replace(entry, lr=0.005 if entry.in_levels else 0.01)
            run = contest.replace(run, seed=seed, trial=False)
            results.add(run, {**measured, "accuracy": accuracy})
    flags = f"--tasks resnet20 --bits 1 --results {path} --table-only"
    monkeypatch.setattr(sys, "argv", ["contest.py", *flags.split()])
    contest.main()
    head, _, *rows = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    column = head.index("askewsgd ahead by")
    assert {row[3]: row[column] for row in rows} == {"askewsgd": "", "lsq": "+0.05 (+0.50, -0.40)"}


@pytest.mark.parametrize("trial", [True, False])
@pytest.mark.parametrize("task", ["resnet20", "minilm"])
def test_a_run_has_the_data_of_its_kind(contest, tmp_path, monkeypatch, task, trial):
    """Its splits, its seed, and a start that saw no more than it does itself."""
    starts = []
    monkeypatch.setattr("contest_runs.minilm_folder", lambda: "minilm")
    monkeypatch.setattr("contest_runs.assembled", lambda folder: starts.append(folder) or folder)
    run = contest.Run(task, "1", 600, "lsq", 0.01, 2, trial, 0.0)
    command = run.command(tmp_path, tmp_path, None)
    flags = contest.TASKS[task].tried if trial else contest.TASKS[task].judged
    for name in ("--train-split", "--eval-split"):
        assert command[command.index(name) + 1] == flags[flags.index(name) + 1]
    assert command[command.index("--seed") + 1] == "2"
    if task == "minilm":
        assert run.start().trial == trial
        assert starts == [run.start().folder(tmp_path)]


def test_trials_of_a_short_budget(contest, tmp_path):
    """Rates come from trials of --trial-steps; what is judged, and its teacher, has all steps."""
    arguments = contest.argparse.Namespace(trial_steps=600, lr=None, seeds=2, distill=0.5)
    results = contest.Results(tmp_path / "results.jsonl")
    for method, bits in (("lsq", "1"), (contest.FULL, "")):
        entry = contest.Run("resnet20", bits, 3900, method, 0.0, 0, True, 0.0)
        for _ in range(2):  # three trials, then the fourth
            for run in contest.trials(entry, results, arguments):
                assert run.steps == 600
                results.add(run, {"accuracy": 1 / run.lr})
        assert {run.steps for run in contest.judged(entry, results, arguments)} == {3900}
    taught = contest.Run("resnet20", "1", 3900, "lsq", 0.01, 0, False, 0.5)
    assert contest.teacher_of(taught, results, arguments).steps == 3900


def test_which_forms_run_where(contest, tmp_path):
    """Every method at the widths that it has; forms beside steps in levels where these are."""
    arguments = contest.argparse.Namespace(
        tasks=list(contest.TASKS), steps=[600], bits=contest.WIDTHS, methods=contest.METHODS,
        distill=0.0, trial_steps=None,
    )  # fmt: skip
    found = {(e.task, e.bits, e.method) for e in contest.entries(arguments)}
    for form in contest.BESIDE_LEVELS:
        assert ("resnet20", "2", form) in found
        assert ("minilm", "2", form) not in found
    for method, rule in RIVALS.items():
        able = {b for b in contest.WIDTHS if (b if b == "ternary" else int(b)) in rule.bits}
        assert {b for task, b, m in found if (task, m) == ("resnet20", method)} == able
    results = contest.Results(tmp_path / "results.jsonl")
    for method, lrs in (
        ("binaryrelax, adamw", contest.ADAMW_LRS),
        ("askewsgd, closed at once", contest.LEVEL_LRS),
        ("askewsgd, sgd", contest.TASKS["resnet20"].lrs),
    ):
        entry = contest.Run("resnet20", "1", 600, method, 0.0, 0, True, 0.0)
        assert tuple(run.lr for run in contest.trials(entry, results, arguments)) == lrs


@pytest.mark.parametrize(
    ("method", "closing", "optimizer"),
    [
        ("lsq", None, None),
        ("binaryconnect, adamw", None, "adamw"),
        ("binaryrelax, adamw", None, "adamw"),
        ("askewsgd, sgd", None, "sgd"),
        ("askewsgd, staggered", "staggered", None),
        ("askewsgd-paper", None, None),
    ],
)
def test_the_command_of_a_form_is_its_recipe(
    contest, tmp_path, monkeypatch, method, closing, optimizer
):
    """Method, closing, optimizer, rate, seed, steps and width arrive at `finetune`."""
    built = []
    monkeypatch.setattr(train, "finetune", built.append)
    run = contest.Run("resnet20", "1", 600, method, 0.03, 1, False, 0.0)
    assert builders.command(*run.command(tmp_path, tmp_path, None)[3:]).code == 0
    (recipe,) = built
    assert recipe.method == method.split(",")[0]
    assert (recipe.seed, recipe.max_steps, recipe.bits) == (1, 600, 1)
    assert closing is None or recipe.closing == closing
    assert optimizer is None or recipe.optimizer == optimizer
    assert 0.03 in (recipe.lr, recipe.level_lr)


def test_what_three_seeds_can_tell(contest, tmp_path, monkeypatch, capsys):
    """Two standard errors of a paired difference of means, from all pairs of entries."""
    path = tmp_path / "results.jsonl"
    results = contest.Results(path)
    accuracies = {
        "lsq": (80.0, 81.0, 82.0),  # a variance of 1
        "luq": (70.0, 72.0, 74.0, 76.0),  # 20/3; its first three are 10, 9, 8 less than lsq's
        "binaryrelax": (0.0, 0.0, 0.0),  # diverged; 80, 81, 82, and 70, 72, 74, and 60, 50, 70 less
        "proxquant": (60.0, 50.0, 70.0),  # 100; 20, 31, 12 less than lsq's, 10, 22, 4 than luq's
        "adaste": (1.0, 99.0),  # too few
        "askewsgd-paper": (1.0, 50.0, 99.0),
    }
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            run = contest.Run("resnet20", "1", 600, method, 0.01, seed, False, 0.0)
            results.add(run, {**dict.fromkeys(contest.MEASURED, 0.0), "accuracy": accuracy})
    flags = f"--tasks resnet20 --bits 1 --seeds 4 --lr 0.01 --results {path} --table-only"
    monkeypatch.setattr(sys, "argv", ["contest.py", *flags.split()])
    contest.main()
    between = (1 + 91 + 84 + 1 + 4 + 100) / 6  # the variances of those differences
    within = (1 + 20 / 3 + 100 + 0) / 4
    *_, last = capsys.readouterr().out.splitlines()
    assert last == (
        "resnet20, 1, 600 steps: a lead of three seeds is more than chance from "
        f"{2 * (between / 3) ** 0.5:.2f} on; runs of the same seed correlate by "
        f"{1 - between / 2 / within:+.2f}"
    )


def test_of_finished_runs_only_teachers_are_made_anew(contest, tmp_path, monkeypatch, capsys):
    """A teacher without weights is trained again where a run needs it; nothing else finished is."""
    results = contest.Results(tmp_path / "results.jsonl")
    measured = dict.fromkeys(contest.MEASURED, 90.0)
    for lr in (*contest.TASKS["resnet20"].full_lrs, 0.014):  # all level: the first one is chosen
        results.add(contest.Run("resnet20", "", 600, contest.FULL, lr, 0, True, 0.0), measured)
    for seed in range(2):
        results.add(
            contest.Run("resnet20", "", 600, contest.FULL, 0.005, seed, False, 0.0), measured
        )
    made = []

    def train(command, **_):
        folder = Path(command[command.index("--output") + 1])
        made.append(str(folder.relative_to(tmp_path / "out" / "resnet20")))
        if "--teacher-weights" in command:
            assert Path(command[command.index("--teacher-weights") + 1]).is_file()
        (folder / contest.WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
        (folder / contest.WEIGHTS).touch()
        metrics = {"snapped": 80.0, "full_precision": 90.4, **measured}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return contest.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(contest.subprocess, "run", train)
    flags = "--tasks resnet20 --bits 1 --methods askewsgd --distill 0.5 --seeds 2 --jobs 1"
    paths = ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results.jsonl")]
    paths += ["--data", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["contest.py", *flags.split(), *paths])
    contest.main()
    trials = [f"trial-lr-{lr}" for lr in ("0.005", "0.01", "0.02", "0.014")]
    assert made == [
        "any-600/full-precision/trial-lr-0.005",
        *(f"1-bit-600-distill-0.5/askewsgd/{run}" for run in trials),
        "any-600/full-precision/seed-0-lr-0.005",
        *(f"1-bit-600-distill-0.5/askewsgd/seed-{seed}-lr-0.005" for seed in range(2)),
    ]
    row = capsys.readouterr().out.splitlines()[-1]
    assert "| 0.005, 80.00; 0.01, 80.00; 0.014, 80.00; 0.02, 80.00 | 0.005 | 80.00, 80.00 |" in row
    assert "| 80.00 ± 0.00 |  | -10.00 |" in row
    made.clear()
    shutil.rmtree(tmp_path / "out")
    contest.main()
    assert made == []
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    runs = [json.dumps(json.loads(line)["run"]) for line in lines]
    assert len(runs) == len(set(runs))  # what a teacher measured first is what counts
    monkeypatch.setattr(sys, "argv", ["contest.py", *flags.split(), *paths, "--lr", "0.03"])
    contest.main()  # another rate for the methods is none for the teacher
    assert made == [
        "any-600/full-precision/seed-0-lr-0.005",
        *(f"1-bit-600-distill-0.5/askewsgd/seed-{seed}-lr-0.03" for seed in range(2)),
    ]


def test_a_row_in_float32_says_so(contest, tmp_path, monkeypatch, capsys):
    """Beside rows in bf16, whose runs are not made again."""
    made = []

    def train(command, **_):
        made.append(command[command.index("--mixed-precision") + 1])
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True)
        metrics = dict.fromkeys(contest.MEASURED, 80.0) | {"snapped": 80.0}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return contest.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(contest.subprocess, "run", train)
    words = ["contest.py", "--tasks", "resnet20", "--bits", "1", "--jobs", "1"]
    words += ["--data", str(tmp_path), "--results", str(tmp_path / "results.jsonl")]
    words += ["--output", str(tmp_path / "out"), "--methods"]
    for flags in (["lsq"], ["lsq", "luq", "--mixed-precision", "no"]):
        monkeypatch.setattr(sys, "argv", [*words, *flags])
        contest.main()
    assert made == ["bf16"] * 7 + ["no"] * 7
    *_, lsq, luq = capsys.readouterr().out.splitlines()
    assert "| lsq |" in lsq
    assert "| 80.000 |" in lsq
    assert "| luq |" in luq
    assert "| 80.000 (float32) |" in luq


@pytest.mark.parametrize(
    ("ended", "counts"),
    [
        ("the loss is nan at step 3", True),
        ("the weights are not finite after step 3: 0.weight", True),
        ("No space left on device", False),
    ],
)
def test_a_run_that_diverges_counts(contest, tmp_path, monkeypatch, ended, counts):
    """As the worst of all; one that fails otherwise is made again."""

    def train(command, stdout, **_):
        stdout.write(ended)
        stdout.flush()
        return contest.subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(contest.subprocess, "run", train)
    results = contest.Results(tmp_path / "results.jsonl")
    run = contest.Run("resnet20", "1", 600, "lsq", 0.05, 0, True, 0.0)
    arguments = contest.argparse.Namespace(
        output=tmp_path, data=tmp_path, threads=1, mixed_precision="bf16"
    )
    contest.make(run, results, arguments)
    worst = dict.fromkeys(contest.MEASURED, 0.0) | {"bf16": True}
    assert results.of(run) == (worst if counts else None)


def test_parq_counts_where_its_weights_are_on_levels(contest, tmp_path):
    """Its accuracy is that of the network before askewq's own snap, so its levels must be real."""
    run = contest.Run("resnet20", "2", 600, "parq", 0.01, 0, False, 0.0)
    metrics = dict.fromkeys(contest.MEASURED, 80.0) | {"snapped": 10.0, "inside_interval": 1.0}
    run.folder(tmp_path).mkdir(parents=True)
    path = run.folder(tmp_path) / "metrics.json"
    path.write_text(json.dumps(metrics))
    assert run.measured(tmp_path)["accuracy"] == 80.0
    path.write_text(json.dumps({**metrics, "inside_interval": 0.999}))
    with pytest.raises(SystemExit, match="not all weights are on a level"):
        run.measured(tmp_path)


def test_the_integer_grid_beside_the_half_integer_one(contest, tmp_path):
    """It is a form of its own at 2 and 4 bits, and no form where there is one grid."""
    run = contest.Run("resnet20", "2", 600, contest.INTEGER, 0.005, 0, False, 0.0)
    grids = {}
    for method in (contest.INTEGER, "askewsgd"):
        command = contest.replace(run, method=method).command(tmp_path, tmp_path, None)
        (at,) = (i for i, word in enumerate(command) if word == "--grid")
        grids[method] = command[at + 1]
        assert command[command.index("--level-lr") + 1] == "0.005"
    assert grids == {contest.INTEGER: "integer", "askewsgd": "half-integer"}
    arguments = contest.argparse.Namespace(
        tasks=["resnet20"], steps=[600], bits=contest.WIDTHS, methods=[contest.INTEGER], distill=0.0
    )
    assert [entry.bits for entry in contest.entries(arguments)] == ["2", "4"]


def test_a_start_is_assembled_once(contest, tmp_path, monkeypatch):
    """Also where several runs ask for it at the same time."""
    source = tmp_path / "minilm"
    source.mkdir()
    (source / "config.json").write_text("{}")
    monkeypatch.setattr("contest_runs.minilm_folder", lambda: source)
    weights = tmp_path / "start" / contest.WEIGHTS
    weights.parent.mkdir(parents=True)
    weights.write_bytes(bytes(10**6))
    with ThreadPoolExecutor(8) as pool:
        places = {*pool.map(sys.modules["contest_runs"].assembled, [tmp_path / "start"] * 8)}
    assert places == {tmp_path / "start" / "huggingface"}
    (place,) = places
    assert (place / "model.safetensors").stat().st_size == 10**6
    assert json.loads((place / "config.json").read_text())["id2label"]["1"] == "positive"


def test_no_run_begins_after_an_interruption(contest, tmp_path, monkeypatch):
    """Ctrl-C ends the runs that there are, and the command with them."""
    begun = []
    monkeypatch.setattr(contest, "STOPPED", threading.Event())
    monkeypatch.setattr(contest.subprocess, "run", lambda command, **_: begun.append(command))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(contest, "compete", interrupted)
    paths = ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results.jsonl")]
    words = ["contest.py", "--tasks", "resnet20", "--bits", "1", "--data", str(tmp_path), *paths]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        contest.main()
    results = contest.Results(tmp_path / "results.jsonl")
    arguments = SimpleNamespace(
        output=tmp_path, data=tmp_path, threads=1, distill=0.0, mixed_precision="bf16"
    )
    run = contest.Run("resnet20", "1", 600, "askewsgd", 0.01, 0, True, 0.0)
    contest.make(run, results, arguments)
    assert begun == []


def test_full_precision_has_the_optimizer_of_its_trials(contest, tmp_path):
    """It is the task's, whatever the default of the method behind it is."""
    run = contest.Run("resnet20", "", 600, contest.FULL, 0.005, 0, False, 0.0)
    command = run.command(tmp_path, tmp_path, None)
    assert command[command.index("--optimizer") + 1] == "sgd"


@pytest.mark.parametrize(("task", "optimizer"), [("resnet20", "sgd"), ("minilm", "adamw")])
def test_parq_has_the_optimizer_of_its_task(contest, tmp_path, monkeypatch, task, optimizer):
    """As the other rivals, and not the steps in level spacings of AskewSGD's default."""
    monkeypatch.setattr("contest_runs.minilm_folder", lambda: "minilm")
    monkeypatch.setattr("contest_runs.assembled", lambda folder: folder)
    run = contest.Run(task, "2", 600, "parq", 0.01, 0, False, 0.0)
    command = run.command(tmp_path, tmp_path, None)
    assert "--level-lr" not in command
    assert command[command.index("--lr") + 1] == "0.01"
    assert command[command.index("--optimizer") + 1] == optimizer


def test_a_teacher_that_is_another_run_is_refused(contest, tmp_path, monkeypatch):
    """Made again, it must come near what its line says; its weights do not stay to teach."""
    results = contest.Results(tmp_path / "results.jsonl")
    run = contest.Run("resnet20", "", 600, contest.FULL, 0.005, 0, False, 0.0)
    measured = dict.fromkeys(contest.MEASURED, 90.0)
    results.add(run, measured)
    weights = run.folder(tmp_path) / contest.WEIGHTS

    def train(command, **_):
        weights.parent.mkdir(parents=True)
        weights.touch()
        metrics = json.dumps({**measured, "full_precision": 89.4})
        (run.folder(tmp_path) / "metrics.json").write_text(metrics)
        return contest.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(contest.subprocess, "run", train)
    arguments = contest.argparse.Namespace(
        output=tmp_path, data=tmp_path, threads=1, mixed_precision="bf16"
    )
    with pytest.raises(SystemExit, match=r"89\.40, its line 90\.00"):
        contest.make(run, results, arguments, keep_weights=True)
    assert not weights.exists()
    assert results.of(run) == measured


def test_what_is_judged_was_not_trained_on_nor_tried(contest):
    """Runs train and are judged on disjoint samples; no trial is judged on those that count."""

    def samples(flags, name):
        """The samples of a split by set and per cent of it."""
        split = flags[flags.index(name) + 1]
        part = re.fullmatch(r"(\w+)(?:\[(\d*)%?:(\d*)%?\])?", split)
        start, stop = int(part[2] or 0), int(part[3] or 100)
        return {(part[1], per_cent) for per_cent in range(start, stop)}

    for task in contest.TASKS.values():
        for flags in (task.tried, task.judged):
            assert samples(flags, "--eval-split")
            assert not samples(flags, "--eval-split") & samples(flags, "--train-split")
        assert not samples(task.tried, "--eval-split") & samples(task.judged, "--eval-split")


class TestThePages:
    """The figures of the pages are those of benchmarks/contest.jsonl."""

    ROOT = Path(__file__).parent.parent

    @pytest.fixture
    def accuracies(self, contest):
        """What the runs of every entry and rate ended with, by seed."""
        found = {}
        for line in (self.ROOT / "benchmarks" / "contest.jsonl").read_text().splitlines():
            entry = json.loads(line)
            run = contest.Run(**entry["run"])
            if not run.trial:
                by_seed = found.setdefault(contest.replace(run, seed=0), {})
                by_seed[run.seed] = entry["measured"]["accuracy"]
        return found

    @staticmethod
    def shown(values):
        """The mean and the spread of some accuracies, as the contest prints them."""
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

    def test_each_row_of_the_log_is_that_of_its_runs(self, contest, accuracies):
        """With the seeds in their order, and their mean and spread."""
        text = (self.ROOT / "recipes" / "README.md").read_text()
        rows = [line for line in text.splitlines() if re.match(r"\| (resnet20|minilm) \|", line)]
        assert rows
        for row in rows:
            task, bits, steps, method, _, lr, seeds, mean, *_ = re.split(r" ?\| ?", row)[1:]
            entry = contest.Run(task, bits, int(steps), method, float(lr), 0, False, 0.0)
            found = [accuracies.get(contest.replace(entry, distill=share)) for share in (0.0, 0.5)]
            of_three = [[run[seed] for seed in range(3)] for run in found if run and len(run) > 2]
            told = [(", ".join(f"{v:.2f}" for v in run), self.shown(run)) for run in of_three]
            assert (seeds, mean) in told, row

    # What prints the rows of the log: its three tables, and the rows of a teacher or another rate.
    LONG = "--tasks resnet20 --steps 3900 --trial-steps 600"
    TABLES = ("--tasks resnet20", LONG, "--tasks minilm")
    FURTHER = (
        f"{LONG} --bits 1 --methods askewsgd --lr 0.005",
        "--tasks resnet20 --bits 1 --distill 0.5",
        "--tasks resnet20 --bits 2 --distill 0.5 --lr 0.02",
        f"{LONG} --bits 1 --distill 0.5",
        f"{LONG} --bits 1 --distill 0.5 --methods askewsgd --lr 0.005",
    )

    def test_the_rows_of_the_log_are_printed(self, contest, monkeypatch, capsys):
        """To the last cell, by the commands that it names, and every row of a table is there."""

        def printed(commands):
            results = ["--results", str(self.ROOT / "benchmarks" / "contest.jsonl")]
            for flags in commands:
                words = ["contest.py", *flags.split(), *results, "--table-only"]
                monkeypatch.setattr(sys, "argv", words)
                contest.main()
            return set(re.findall(r"^\| (?:resnet20|minilm) \|.*", capsys.readouterr().out, re.M))

        text = (self.ROOT / "recipes" / "README.md").read_text()
        told = set(re.findall(r"^\| (?:resnet20|minilm) \|.*", text, re.M))
        tables = printed(self.TABLES)
        assert tables <= told
        assert told - tables <= printed(self.FURTHER)

    def test_rates_are_those_of_the_trials(self):
        """But for the two rows of the default at 1 bit and 3,900 steps, as the log says there."""
        text = (self.ROOT / "recipes" / "README.md").read_text()
        others = []
        for row in re.findall(r"^\| (?:resnet20|minilm) \|.*", text, re.M):
            task, bits, steps, method, trials, lr, *_ = re.split(r" ?\| ?", row)[1:]
            found = {rate: float(of) for rate, of in re.findall(r"([\d.e-]+), ([\d.]+)", trials)}
            if found and found[lr] < max(found.values()):
                others.append((task, bits, steps, method, lr))
        assert others == [("resnet20", "1", "3900", "askewsgd", "0.005")] * 2

    # The rows of README.md's tables by their methods in the log.
    NAMES = {  # noqa: RUF012  # a table
        "full precision, the same steps": "full precision",
        "**askewsgd**": "askewsgd",
        "its steps, intervals closed from the start": "askewsgd, closed at once",
        "BinaryRelax": "binaryrelax",
        "PARQ (torchao)": "parq",
        "mirror descent": "mirror-descent",
        "LUQ's weights (SAWB)": "luq",
        "straight-through (BinaryConnect)": "binaryconnect",
        "LSQ": "lsq",
        "AdaSTE": "adaste",
        "the paper's AskewSGD": "askewsgd-paper",
        "ProxQuant": "proxquant",
        "projected gradient": "projected-gradient",
        "*taught by full precision*: askewsgd": "askewsgd",
        "*taught*: BinaryRelax": "binaryrelax",
        "*taught*: LSQ": "lsq",
        "*taught*: straight-through": "binaryconnect",
    }
    TABLE = re.compile(
        r"^\| (ResNet-20|all-MiniLM)[^|]*, ([\d,]+) steps \| 1 bit.*\n(\|.*\n)+", re.M
    )

    def test_each_cell_of_the_readme_was_measured(self, contest, accuracies):
        """The first three seeds of its method, width, task and budget, at one of the rates."""
        tables = list(self.TABLE.finditer((self.ROOT / "README.md").read_text()))
        assert len(tables) == 3
        for table in tables:
            task = {"ResNet-20": "resnet20", "all-MiniLM": "minilm"}[table[1]]
            steps = int(table[2].replace(",", ""))
            (_, *widths), _, *rows = (
                [cell.strip() for cell in line.strip("|").split("|")]
                for line in table[0].splitlines()
            )
            for label, *cells in rows:
                for width, cell in zip(widths, cells, strict=True):
                    name, taught = self.NAMES[label], 0.5 if "taught" in label else 0.0
                    if "(with SGD)" in cell:
                        name = "askewsgd, sgd"
                    bits = "" if name == "full precision" else width.split()[0]
                    entry = contest.Run(task, bits, steps, name, 0.0, 0, False, taught)
                    of_three = {
                        self.shown([by_seed[seed] for seed in range(3)])
                        for run, by_seed in accuracies.items()
                        if contest.replace(run, lr=0.0) == entry and len(by_seed) > 2
                    }
                    if cell:
                        assert cell.removesuffix(" (with SGD)") in of_three, (label, width)
                    else:
                        assert not of_three, (label, width)

    def test_each_mean_of_the_readmes_words_was_measured(self, accuracies):
        """Of three seeds or of all of an entry."""
        measured = set()
        for by_seed in accuracies.values():
            values = [by_seed[seed] for seed in sorted(by_seed)]
            measured |= {self.shown(some) for some in (values[:3], values) if len(some) > 2}
        text = (self.ROOT / "README.md").read_text()
        said = re.findall(r"\d\d\.\d\d ± \d\.\d\d", text)
        assert said
        assert set(said) <= measured

    def test_what_three_seeds_can_tell_is_that_of_the_runs(self, contest):
        """For each task, budget and width, as the contest prints it below its tables."""
        text = (self.ROOT / "recipes" / "README.md").read_text()
        (table,) = re.findall(r"\| lead beyond chance \|.*\n(?:\|.*\n)+", text)
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        results = contest.Results(self.ROOT / "benchmarks" / "contest.jsonl")
        expected = []
        for task, label, steps in (
            ("resnet20", "ResNet-20", 600),
            ("resnet20", "ResNet-20", 3900),
            ("minilm", "MiniLM", 600),
        ):
            arguments = contest.argparse.Namespace(
                tasks=[task], bits=contest.WIDTHS, steps=[steps], trial_steps=600, lr=None,
                methods=contest.METHODS, seeds=3, distill=0.0,
            )  # fmt: skip
            found = contest.resolution(results, arguments)
            told = [found.get((task, bits, steps)) for bits in contest.WIDTHS]
            cells = [f"{one[0]:.2f} ({one[1]:+.2f})" if one else "" for one in told]
            expected.append([f"{label}, {steps:,} steps", *cells])
        assert rows == [["lead beyond chance", "1 bit", "ternary", "2 bits", "4 bits"], *rows[1:]]
        assert rows[2:] == expected

    # The published ones that are runs of the contest: bits, steps and the rate of the weights.
    RECIPES = {  # noqa: RUF012  # a table
        "resnet20-cifar10-1bit": ("1", 600, 0.01),
        "resnet20-cifar10-ternary": ("ternary", 3900, 0.005),
        "resnet20-cifar10-2bit": ("2", 3900, 0.005),
        "resnet20-cifar10-4bit": ("4", 3900, 0.005),
    }

    @pytest.mark.parametrize("name", RECIPES)
    def test_the_figure_of_each_recipe(self, contest, accuracies, name, tmp_path, monkeypatch):
        """Its settings are those of runs of the log, its first line has what they ended with."""
        bits, steps, lr = self.RECIPES[name]
        run = contest.Run("resnet20", bits, steps, "askewsgd", lr, 0, False, 0.0)
        built = []
        monkeypatch.setattr(train, "finetune", built.append)
        assert builders.command(*run.command(tmp_path, tmp_path, None)[3:]).code == 0
        assert builders.command("finetune", "--recipe", name, "--output", tmp_path).code == 0
        settings = [
            choices.resolve(recipe, "image-classification", nn.BatchNorm2d(3), steps).model_dump()
            for recipe in built
        ]
        differing = {key for key in settings[0] if settings[0][key] != settings[1][key]}
        files = {"model", "weights", "dataset", "output", "train_split", "eval_split"}
        assert differing <= files | {"save_every", "compile"}
        first = recipe_files.shipped_recipes()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.endswith(
            f": {self.shown([accuracies[run][s] for s in range(3)])} (seeds 0, 1, 2)"
        )
