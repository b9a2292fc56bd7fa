"""Several processes: real ones over gloo, by DDP and by FSDP2, against one process and each other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import ROOT, finetune
from safetensors.torch import load_file
from test_train import digest
from together import FSDP2, command, together

from askewq import batches, config, launch, loop, processes, snapshots, train
from askewq.errors import DataError, RecipeError

UNEVEN = """
from torch import nn

def network():  # neither 2 nor 4 divides its channels; some parts are empty
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10), nn.ReLU(),
        nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3),
    )
"""
TRANSFORMER = {**FSDP2, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


@pytest.fixture(scope="module")
def data() -> Path:
    """45 images to train on and 23 to test, which no number of processes divides; a network."""
    folder = ROOT / "distributed"
    folder.mkdir()
    for kind in ("own", "gpt2"):  # written before any process is forked
        builders.SETTINGS[kind]()
    builders.write_images(folder / "train.parquet", builders.pictures(45))
    builders.write_images(folder / "test.parquet", builders.pictures(23, seed=1))
    (folder / "uneven.py").write_text(UNEVEN)
    return folder


def uneven(data: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run on those data with that network."""
    short = {"model": f"{data / 'uneven.py'}:network", "dataset": str(data), "lr": 0.05}
    return {**short, "max_steps": 20, "batch_size": 4, "optimizer": "sgd", **changes}


# What differs from run to run, by name; the model is `uneven` unless a kind is given.
RUNS: dict[str, dict[str, Any]] = {
    "lazy": {},
    "group": {"group_size": 5, "include": ("2", "4"), "optimizer": "adamw", "lr": 0.01},
    "tensor": {"group_size": "tensor", "bits": "ternary", "full_precision_steps": 2},
    "staggered": {"closing": "staggered", "include": ("*",), "group_size": "tensor"},
    "single": {"closing": "single", "optimizer": "adamw", "level_lr": 0.01, "lr": 0.01},
    "lsq": {"method": "lsq"},
    "luq": {"method": "luq", "gradient_bits": 4, "group_size": "tensor"},
    "proxquant": {"method": "proxquant"},
    "accumulated": {"grad_accumulation": 2, "batch_size": 2, "eval_every": 7},
    "bf16": {"mixed_precision": "bf16"},
    "distilled": {"distill": 0.5, "max_steps": 6},
}
# transformers' layout [in, out], cut across channels and groups; tied to an embedding.
GPT2 = {"max_steps": 6, "group_size": 8, "closing": "staggered", "batch_size": 4}
# Their gradients are rounded, or gathered, sample by sample: not those of one process.
OWN_NOISE = ("luq", "bf16")


@pytest.fixture(scope="module")
def runs(data: Path) -> dict[str, Path]:
    """All runs, by how and by how many processes they were made: `lazy-ddp2`, `lazy-fsdp4`."""
    made = {}
    for how, count, environment in (("ddp", 2, {}), ("fsdp", 2, FSDP2), ("fsdp", 4, FSDP2)):
        names = RUNS if count == 2 else {n: RUNS[n] for n in ("lazy", "staggered", "group")}

        def body(process: int, how: str = how, count: int = count, names: Any = names) -> None:
            for name, changes in names.items():
                given = uneven(data, **changes)
                given["batch_size"] = given["batch_size"] * 2 // count
                finetune("own", ROOT / f"{name}-{how}{count}", **given)
            if count == 2:
                os.environ |= TRANSFORMER if how == "fsdp" else {}
                finetune("gpt2", ROOT / f"gpt2-{how}2", **GPT2)

        for outcome in together(count, body, data, **environment):
            assert outcome.code == 0, outcome.err[-3000:]
        made |= {f"{n}-{how}{count}": ROOT / f"{n}-{how}{count}" for n in [*names, "gpt2"]}
    return made


def packed(folder: Path) -> dict[str, torch.Tensor]:
    """Return the codes and scales of an artifact."""
    content = load_file(folder / "model.safetensors")
    return {k: v for k, v in content.items() if k.endswith((".codes", ".scale"))}


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the newest checkpoint."""
    return load_file(snapshots.newest(folder) / "model.safetensors")


class TestEquality:
    @pytest.mark.parametrize("name", [*RUNS, "gpt2"])
    def test_fsdp2_gives_the_bytes_of_ddp(self, runs, name):
        """With weights cut to pieces two processes make the artifact that they make with whole ones.

        Every granularity of the scale, closing and kind of method; uneven and empty pieces.
        """
        assert digest(runs[f"{name}-fsdp2"]) == digest(runs[f"{name}-ddp2"])

    @pytest.mark.parametrize("name", [n for n in RUNS if n not in OWN_NOISE])
    def test_as_one_process(self, runs, data, tmp_path, name):
        """One process with twice the batch: the same plan, scales and codes; weights but for sums."""
        given = uneven(data, **RUNS[name])
        finetune("own", tmp_path / "one", **{**given, "batch_size": 2 * given["batch_size"]})
        one = packed(tmp_path / "one")
        counts = [n for n in ("ddp2", "fsdp2", "fsdp4") if f"{name}-{n}" in runs]
        for other in (runs[f"{name}-{count}"] for count in counts):
            assert one.keys() == packed(other).keys()
            if name != "lsq":  # whose scales are trained
                assert all(torch.equal(tensor, packed(other)[key]) for key, tensor in one.items())
            for key, tensor in trained(tmp_path / "one").items():
                torch.testing.assert_close(trained(other)[key], tensor, rtol=1e-4, atol=2e-6)
            assert metrics(other)["snapped"] == metrics(tmp_path / "one")["snapped"]


def metrics(folder: Path) -> dict[str, Any]:
    """Return a run's metrics."""
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found
