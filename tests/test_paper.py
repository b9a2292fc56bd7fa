"""The paper's own experiments, benchmarks/paper_*.py, at a few seeds: what must hold in each."""

import argparse
import json
from pathlib import Path

import builders
import pytest
import torch

FORMS = ("askewsgd", "askewsgd, staggered", "askewsgd-paper")


@pytest.fixture(scope="module")
def logistic():
    """The script of figures 2 and 6 as a module."""
    with builders.benchmark("paper_logistic") as module:
        yield module


@pytest.fixture(scope="module")
def moons():
    """The script of table 4 as a module."""
    with builders.benchmark("paper_two_moons") as module:
        yield module


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_logistic_regression_ends_at_the_best_binary_weights(logistic, seed, method):
    """Every form of AskewSGD finds, of 1,024 binary weights, those with the smallest loss."""
    x, y = logistic.problem(seed)
    model, losses, _ = logistic.train(method, seed, x, y)
    assert model.weight.abs().tolist() == [[1.0] * 10]
    assert len(losses) == 25 * 6
    with torch.no_grad():
        assert logistic.loss(model, x, y).item() == pytest.approx(logistic.best(x, y), abs=1e-6)


def test_the_best_binary_weights_are_those_of_a_loop(logistic):
    """The vectorised search finds what a loop over the networks finds."""
    x, y = (part[:40] for part in logistic.problem(2))
    model = torch.nn.Linear(10, 1, bias=False)
    found = []
    for number in range(1024):
        signs = [1.0 if number >> bit & 1 else -1.0 for bit in range(10)]
        with torch.no_grad():
            model.weight.copy_(torch.tensor([signs]))
            found.append(logistic.loss(model, x, y).item())
    assert logistic.best(x, y) == pytest.approx(min(found), rel=1e-6)


def test_a_row_of_the_vgg_is_of_its_own_rate(tmp_path, monkeypatch):
    """Runs that are there are read again with the same rate and steps alone."""
    with builders.benchmark("paper_vgg") as vgg:
        made = []

        def train(command, **_):
            made.append(command[command.index("--lr") + 1])
            folder = Path(command[command.index("--output") + 1])
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({"snapped": 10.0 * len(made)}))

        monkeypatch.setattr(vgg.subprocess, "run", train)
        found = []
        for lr in (0.001, 0.1, 0.001):
            arguments = argparse.Namespace(
                output=tmp_path, data=tmp_path, steps=3, lr=lr, threads=1
            )
            found.append(vgg.accuracy("askewsgd", 0, arguments))
    assert made == ["0.001", "0.1"]
    assert found == [10.0, 20.0, 10.0]


@pytest.mark.parametrize("method", [*FORMS, "binaryconnect", "adaste"])
def test_no_network_of_two_moons_is_better_than_the_best_of_all(moons, method):
    """Trained weights are binary, and so one of the 512 networks that are enumerated."""
    points, test = moons.moons()
    model = moons.train(method, 0, points)
    assert {abs(w) for layer in (model[0], model[3]) for w in layer.weight.flatten().tolist()} == {
        1.0
    }
    best = moons.best_of_all(points, test)
    assert best * (1 - 1e-4) <= moons.judge(model, points, test) < 2 * best
