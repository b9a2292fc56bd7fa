"""The demo: its data, and the whole way with fewer steps."""

import json

import builders
import numpy as np
import pytest
from builders import command, files
from sklearn.datasets import load_digits

from askewq import demo
from askewq.data import open_data
from askewq.errors import DataError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits as the demo writes them."""
    folder = tmp_path_factory.mktemp("digits")
    demo.write_digits(folder)
    return folder


def read(folder):
    """Open the digits as the demo's run does."""
    recipe = builders.config.build({"model": "m", "dataset": str(folder), "output": "o"})
    return open_data(recipe, "image-classification")


def test_every_digit_is_in_one_split(digits):
    """All 1,797 pictures are there, a quarter of them held out, none twice."""
    found = read(digits)
    assert files(digits) == {"train.parquet", "test.parquet"}
    assert (len(found.train), len(found.eval)) == (1347, 450)
    assert found.labels == tuple("0123456789")
    wanted = (load_digits().images * (255 / 16)).astype(np.uint8)
    held_out = np.arange(1797) % 4 == 0
    for split, chosen in ((found.train, ~held_out), (found.eval, held_out)):
        pixels = np.stack([np.array(image) for image in split["image"]])
        assert np.array_equal(pixels, wanted[chosen])
        assert list(split["label"]) == load_digits().target[chosen].tolist()


def test_every_class_is_held_out(digits):
    """The held-out quarter has each digit about as often as the others."""
    counts = np.bincount(list(read(digits).eval["label"]))
    assert counts.min() > 25


def test_without_scikit_learn(tmp_path, monkeypatch):
    """Without the package that carries the digits the extra is named, and nothing is written."""
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"askewq\[demo\]"):
        demo.run(tmp_path / "demo")
    assert files(tmp_path) == set()


def test_an_output_that_cannot_be(tmp_path):
    """A file in its place is an error in words, before the digits are written."""
    (tmp_path / "file").write_text("")
    outcome = command("demo", "--output", tmp_path / "file")
    assert outcome.code == 2
    assert "is no folder; name another one" in outcome.err
    (tmp_path / "demo" / "model").mkdir(parents=True)
    (tmp_path / "demo" / "model" / "thesis.tex").write_text("")
    outcome = command("demo", "--output", tmp_path / "demo")
    assert outcome.code == 2
    assert files(tmp_path / "demo") == {"model/thesis.tex"}
    (tmp_path / "mine" / "digits").mkdir(parents=True)
    (tmp_path / "mine" / "digits" / "train.parquet").write_text("mine")
    outcome = command("demo", "--output", tmp_path / "mine")
    assert outcome.code == 2
    assert "digits is not of an earlier demo" in outcome.err
    assert (tmp_path / "mine" / "digits" / "train.parquet").read_text() == "mine"


def test_the_whole_way(tmp_path, monkeypatch):
    """`askewq demo` trains, packs, reloads and prints one table; it may be run again."""
    original = demo.build

    for steps in (1, 25):

        def short(values, source, steps=steps):
            fewer = {"full_precision_steps": steps, "max_steps": steps, "max_eval_samples": 100}
            return original({**values, **fewer}, source)

        monkeypatch.setattr(demo, "build", short)
        outcome = command("demo", "--output", tmp_path / "demo")
        assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "demo" / "model" / "metrics.json").read_text())
    assert metrics["full_precision"] > 20  # chance: ten
    assert metrics["reloaded"] == metrics["snapped"]
    assert metrics["bytes"]["packed"] < metrics["bytes"]["full_precision"] / 8
    for line in ("full precision", "no training", "snapped", "reloaded"):
        assert line in outcome.out
    assert str(tmp_path / "demo" / "model") in outcome.out
