"""The contest's own rules, benchmarks/contest.py: which rate is tried after three."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def contest():
    """The script as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("contest", BENCHMARKS / "contest.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["contest"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    del sys.modules["contest"]


@pytest.mark.parametrize(
    ("accuracies", "rate"),
    [
        ([84.0, 83.6, 77.7], 0.005),  # best at the lowest: half of it
        ([73.1, 83.1, 83.5], 0.1),  # best at the highest: twice as much
        ([83.0, 85.0, 84.0], 0.032),  # in the middle: toward the better neighbour
        ([84.0, 85.0, 83.0], 0.014),
        ([85.0, 85.0, 83.0], 0.014),  # two are level: between them
        ([83.0, 85.0, 85.0], 0.032),
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
