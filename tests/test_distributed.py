"""Several processes, real ones over gloo, by DDP and FSDP2: against one and each other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import builders
import pyarrow
import pytest
import torch
from builders import ROOT, finetune
from pyarrow import parquet
from safetensors.torch import load_file
from test_train import digest
from together import FSDP2, command, together

from askewq import batches, config, launch, layers, loop, processes, sharding, snapshots, train
from askewq.errors import DataError, RecipeError, StoppedError

UNEVEN = """
from torch import nn

def network():  # neither 2 nor 4 divides its channels; some parts are empty
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10), nn.ReLU(),
        nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3),
    )


def norm():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
    )


class Idle(nn.Module):  # has a layer that no output depends on
    def __init__(self):
        super().__init__()
        self.layers, self.idle = network(), nn.Linear(3, 3)

    def forward(self, x):
        return self.layers(x)


def idle():
    return Idle()


class Patched(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = network()
        self.forward = self.special

    def special(self, x):
        return self.layers(x)


def patched():
    return Patched()
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
    name = changes.pop("factory", "network")
    short = {"model": f"{data / 'uneven.py'}:{name}", "dataset": str(data), "lr": 0.05}
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
    "idle": {"factory": "idle", "max_steps": 6},
    "patched": {"factory": "patched", "full_precision_steps": 2, "max_steps": 6},
    "norm": {"factory": "norm", "max_steps": 6, "eval_every": 2},
    "polished": {"max_steps": 6, "polish_steps": 4, "polish_lr": 0.01},
}
# What FSDP2 cannot do.
WHOLE = ("polished",)
# transformers' layout [in, out], cut across channels and groups; tied to an embedding.
GPT2 = {"max_steps": 6, "group_size": 8, "closing": "staggered", "batch_size": 4}
# Their gradients are rounded, gathered or normalised in each process: not those of one process.
OWN_NOISE = ("luq", "bf16", "norm")


@pytest.fixture(scope="module")
def runs(data: Path) -> dict[str, Path]:
    """All runs, by how and by how many processes they were made: `lazy-ddp2`, `lazy-fsdp4`."""
    made = {}
    for how, count, environment in (("ddp", 2, {}), ("fsdp", 2, FSDP2), ("fsdp", 4, FSDP2)):
        names = RUNS if count == 2 else {n: RUNS[n] for n in ("lazy", "staggered", "group")}
        names = {n: names[n] for n in names if how == "ddp" or n not in WHOLE}

        def body(process: int, how: str = how, count: int = count, names: Any = names) -> None:
            sharded = []
            hollow = sharding.hollow
            sharding.hollow = lambda model: sharded.append(model) or hollow(model)
            snap, strengths = layers.snap_, {}

            def snap_(model: torch.nn.Module) -> None:
                strengths[name] = [w.strength for w in layers.quantized_modules(model)]
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    snap(model)

            layers.snap_ = snap_
            for done, (name, changes) in enumerate(names.items()):
                given = uneven(data, **changes)
                given["batch_size"] = given["batch_size"] * 2 // count
                finetune("own", ROOT / f"{name}-{how}{count}", **given)
                assert (len(sharded) > done) == (how == "fsdp")
            (ROOT / f"strengths-{how}{count}.json").write_text(json.dumps(strengths))
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
    @pytest.mark.parametrize("name", [*(n for n in RUNS if n not in WHOLE), "gpt2"])
    def test_fsdp2_gives_the_bytes_of_ddp(self, runs, name):
        """Two processes make of weights cut to pieces the artifact that they make of whole ones.

        Every granularity of the scale, closing and kind of method; uneven and empty pieces.
        """
        assert digest(runs[f"{name}-fsdp2"]) == digest(runs[f"{name}-ddp2"])

    def test_fsdp2_ends_at_the_radius_of_ddp(self, runs):
        """The network before the snap, which is evaluated, sees the intervals of the last step."""
        ddp, *others = (
            json.loads((ROOT / f"strengths-{how}.json").read_text())
            for how in ("ddp2", "fsdp2", "fsdp4")
        )
        assert ddp["lazy"][0] < 0.5
        for fsdp in others:
            assert fsdp == {name: ddp[name] for name in fsdp}

    @pytest.mark.parametrize("name", [n for n in RUNS if n not in OWN_NOISE])
    def test_as_one_process(self, runs, data, tmp_path, name):
        """One process with twice the batch: the same scales and codes, weights but for sums."""
        given = uneven(data, **RUNS[name])
        finetune("own", tmp_path / "one", **{**given, "batch_size": 2 * given["batch_size"]})
        one = packed(tmp_path / "one")
        counts = [n for n in ("ddp2", "fsdp2", "fsdp4") if f"{name}-{n}" in runs]
        for other in (runs[f"{name}-{count}"] for count in counts):
            assert one.keys() == packed(other).keys()
            for key, tensor in one.items():
                if key.endswith(".scale") and name in ("lsq", "polished"):  # trained
                    torch.testing.assert_close(packed(other)[key], tensor, rtol=1e-3, atol=0.0)
                else:
                    assert torch.equal(tensor, packed(other)[key])
            for key, tensor in trained(tmp_path / "one").items():
                torch.testing.assert_close(trained(other)[key], tensor, rtol=1e-4, atol=2e-6)
            assert metrics(other)["snapped"] == metrics(tmp_path / "one")["snapped"]


ODD = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.up(torch.relu(self.stem(x)))).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1))
"""


def test_fsdp2_cuts_across_channels_and_several_weights(data: Path) -> None:
    """A grouped transposed convolution and attention: the codes and scales of DDP, byte for byte.

    Everything else is equal but for the order of float32 sums.
    """
    (ROOT / "odd.py").write_text(ODD)
    for how, environment in (("ddp", {}), ("fsdp", FSDP2)):

        def body(_: int, how: str = how) -> None:
            given = uneven(data, closing="staggered", include=["up", "attention*", "head"])
            given["model"] = f"{ROOT / 'odd.py'}:Odd"
            finetune("own", ROOT / f"odd-{how}", **given)

        for outcome in together(2, body, data, **environment):
            assert outcome.code == 0, outcome.err[-3000:]
    one, other = packed(ROOT / "odd-ddp"), packed(ROOT / "odd-fsdp")
    assert {"up.weight.codes", "attention.in_proj_weight.codes"} <= one.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    weights = trained(ROOT / "odd-fsdp")
    for name, tensor in trained(ROOT / "odd-ddp").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=2e-6)


def metrics(folder: Path) -> dict[str, Any]:
    """Return a run's metrics."""
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


class TestCounting:
    @pytest.mark.parametrize("count", [2, 4])
    def test_no_sample_counts_twice(self, data, tmp_path, count):
        """An epoch takes each sample at most once, and an evaluation all, each once.

        Neither number of samples is divided by the batches, and once there are fewer than places
        in a batch. Beside that: progress is global, and the first process alone writes.
        """
        given = uneven(data, max_steps=None, epochs=1.0, lr=1e-3)
        few = {**given, "max_eval_samples": 3, "max_steps": None, "epochs": 5.0}
        finetune("own", tmp_path / "one", **{**given, "batch_size": 4 * count})
        finetune("own", tmp_path / "one-few", **few)

        def body(process: int) -> None:
            strengths: list[float] = []
            written: list[str] = []

            def audit(event: str, args: tuple[Any, ...]) -> None:
                name = str(args[0]) if args else ""
                writes = event in ("os.rename", "os.remove", "os.mkdir")
                if event == "open" and isinstance(args[2], int):
                    writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR))
                if writes and name.startswith(str(tmp_path / "several")):
                    written.append(name)

            sys.addaudithook(audit)
            step = loop.Loop._step

            def watched(self: Any, *args: Any) -> float:
                strengths.append(next(iter(loop.layers.quantized_modules(self.model))).strength)
                return step(self, *args)

            loop.Loop._step = watched  # type: ignore[method-assign]
            run = train._Run(builders.recipe("own", tmp_path / "several", **given))
            before = run.loop.evaluate()
            index = list(run.loop.train_loader.batch_sampler)
            run.execute()
            finetune("own", tmp_path / "several-few", **few)
            found = {"samples": before.samples, "steps": strengths, "written": written}
            found["index"] = [i for one in index for i in one]
            (tmp_path / f"{process}.json").write_text(json.dumps(found))

        for outcome in together(count, body, tmp_path):
            assert outcome.code == 0, outcome.err[-3000:]
        found = [json.loads((tmp_path / f"{p}.json").read_text()) for p in range(count)]
        drawn = [i for one in found for i in one["index"]]
        assert len(drawn) == len(set(drawn)) == 45 // (4 * count) * 4 * count
        assert all(one["samples"] == 23 for one in found)
        assert found[0]["written"]
        assert not any(one["written"] for one in found[1:])
        for name in ("", "-few"):
            one, several = (metrics(tmp_path / f"{n}{name}") for n in ("one", "several"))
            assert several["full_precision"] == one["full_precision"]
        assert metrics(tmp_path / "several")["steps"] == metrics(tmp_path / "one")["steps"]
        steps = metrics(tmp_path / "one")["steps"]
        closing = train.choices.Closing("lazy", start=0.0, end=0.9, power=3.0)
        expected = [closing.radius((i + 1) / steps) for i in range(steps)]
        assert all(one["steps"][:steps] == expected for one in found)

    def test_layers_that_are_chosen_batch_by_batch(self, data, tmp_path):
        """DDP waits for no gradient that never comes, whatever the first batch used."""

        def body(process: int) -> None:
            given = uneven(data, model=builders.own("routed"), max_steps=6, lr=1e-3)
            finetune("own", tmp_path / "out", **given)

        for outcome in together(2, body, tmp_path):
            assert outcome.code == 0, outcome.err[-3000:]
        assert metrics(tmp_path / "out")["steps"] == 6

    def test_fewer_samples_than_processes(self, data, tmp_path, monkeypatch):
        """A process without a sample is refused, before anything is written."""
        monkeypatch.setattr(train, "loaders", lambda r, d, p, n: batches.loaders(r, d, p, 46))
        with pytest.raises(DataError, match="has 45 samples for 46 processes"):
            finetune("own", tmp_path / "out", **uneven(data))
        assert not (tmp_path / "out").exists()


def fails(at: int, error: BaseException, on: int, process: int) -> None:
    """Let a process fail when it is about to make a step."""
    original = loop.Loop._step

    def step(self: Any, model: Any, optimizer: Any, micro: Any, number: int) -> float:
        if number == at and process == on:
            raise error
        return original(self, model, optimizer, micro, number)

    loop.Loop._step = step  # type: ignore[method-assign]


def words(data: Path, output: Path, *more: str) -> list[str]:
    """Return the command line of a run."""
    given = {**uneven(data), "output": str(output), "save_every": 5}
    return ["finetune", *launch.words_of(given), *more]


class TestFailure:
    @pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
    @pytest.mark.parametrize("on", [0, 1])
    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [
            (DataError("image 7 of the data set cannot be decoded"), 2, "askewq: image 7 of the"),
            (ZeroDivisionError("by zero"), 1, "askewq: ZeroDivisionError: by zero"),
        ],
        ids=["an-error", "a-bug"],
    )
    def test_the_others_end_with_it(self, data, tmp_path, environment, on, error, code, said):
        """One process fails, and all end in seconds, with its message, said once, and its code."""

        def body(process: int) -> None:
            fails(7, error, on, process)
            command(*words(data, tmp_path / "out"))

        began = time.monotonic()
        done = together(2, body, tmp_path, **environment)
        assert time.monotonic() - began < 30
        assert [outcome.code for outcome in done] == [code, code], done
        assert [outcome.err.count(said) for outcome in done] == [int(p == on) for p in (0, 1)]
        assert snapshots.newest(tmp_path / "out").name == "step-00000005"

    def test_killed(self, data, tmp_path):
        """A process is gone without a word, as for want of memory: the other one ends, too."""

        def body(process: int) -> None:
            original = loop.Loop._step

            def step(self: Any, *args: Any) -> float:
                if args[-1] == 7 and process == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(self, *args)

            loop.Loop._step = step  # type: ignore[method-assign]
            command(*words(data, tmp_path / "out"))

        began = time.monotonic()
        done = together(2, body, tmp_path)
        assert time.monotonic() - began < 30
        assert [outcome.code for outcome in done] == [-signal.SIGKILL, 1]
        assert "askewq: another process ended without saying why." in done[1].err

    def test_nan_in_one_process(self, data, tmp_path):
        """All stop, or pass over the step, together; the batch is named by the one that has it."""

        def body(process: int) -> None:
            prepare = loop.prepare_batch
            count = iter(range(1000))

            def poisoned(*args: Any) -> Any:
                batch = prepare(*args)
                if process == 1 and next(count) == 3:
                    batch["pixel_values"] = batch["pixel_values"] * float("nan")
                return batch

            loop.prepare_batch = poisoned
            finetune("own", tmp_path / "skipped", **uneven(data, nan_policy="skip:1"))
            count = iter(range(1000))
            command(*words(data, tmp_path / "stopped"))

        for environment in ({}, FSDP2):
            done = together(2, body, tmp_path, **environment)
            assert [outcome.code for outcome in done] == [2, 2], done
            assert metrics(tmp_path / "skipped")["skipped_steps"] == 1
            said = [line for one in done for line in one.err.split("\n") if "askewq: " in line]
            assert len(said) == 1
            assert "loss is nan at step 3: the weights are finite, but the batch itself" in said[0]
            assert "pixel_values" in said[0]
            for folder in ("skipped", "stopped"):
                builders.shutil.rmtree(tmp_path / folder)


class TestSignals:
    @pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
    def test_stopped_and_resumed(self, runs, data, tmp_path, environment):
        """SIGTERM to one process stops all at one step, saved; resumed, they give the same bytes.

        A run of either kind can be resumed by the other: a checkpoint holds whole tensors.
        """
        name = "tensor"  # with both phases

        def body(process: int) -> None:
            def stop(at: int) -> None:
                original = loop.Loop._step

                def step(self: Any, model: Any, optimizer: Any, micro: Any, number: int) -> float:
                    if number == at and process == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return original(self, model, optimizer, micro, number)

                loop.Loop._step = step  # type: ignore[method-assign]

            given = {**uneven(data, **RUNS[name]), "output": str(tmp_path / "out")}
            for number, at in enumerate((1, 9)):
                stop(at)
                more = {} if number == 0 else {"resume": True}
                with pytest.raises(train.StoppedError) as stopped:
                    train.finetune(config.build({**given, **more}))
                assert stopped.value.exit_code == 143
                assert f"after step {at + 1}, saved in" in str(stopped.value)
            if process == 0:
                assert snapshots.newest(tmp_path / "out").name == "step-00000010"

        for outcome in together(2, body, tmp_path, **environment):
            assert outcome.code == 0, outcome.err[-3000:]
        other = {} if environment else FSDP2

        def resume(process: int) -> None:
            command("finetune", "--resume", "--output", tmp_path / "out")

        for outcome in together(2, resume, tmp_path, **other):
            assert outcome.code == 0, outcome.err[-3000:]
        assert digest(tmp_path / "out") == digest(runs[f"{name}-ddp2"])


# More workers than this machine may have cores.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
class TestStreaming:
    @pytest.fixture(scope="class")
    @staticmethod
    def shards() -> Path:
        """40 images in four files, whose first pixel says which they are, and 8 to test."""
        from PIL import Image

        folder = ROOT / "shards"
        folder.mkdir()
        builders.SETTINGS["own"]()
        (folder / "uneven.py").write_text(UNEVEN)
        for i in range(4):
            images = [(Image.new("RGB", (16, 16), (10 * i + j,) * 3), j % 3) for j in range(10)]
            builders.write_images(folder / f"train-{i}.parquet", images)
        builders.write_images(folder / "test-0.parquet", builders.pictures(8))
        return folder

    def reader(self, shards: Path, process: int, processes: int, **changes: Any) -> Any:
        """Return the loader of a process."""
        from askewq import models, streams
        from askewq.data import open_data

        given = {"streaming": True, "max_steps": 1, "batch_size": 3, "shuffle_buffer": 4}
        recipe = builders.recipe("own", Path("out"), dataset=str(shards), **{**given, **changes})
        data = open_data(recipe, "image-classification")
        preprocessing = models.load(
            recipe.model, "image-classification", data.labels, image_size=16
        ).preprocessing
        return streams.StreamLoader(recipe, data, preprocessing, process, processes)

    def draw(self, reader: Any, count: int) -> list[int]:
        """Return which images the next batches hold."""
        found = []
        batches_ = reader.batches()
        for _ in range(count):
            found += [round(float(p)) for p in next(batches_)["pixel_values"][:, 0, 0, 0]]
        return found

    @pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (2, 2), (3, 0), (4, 1)])
    def test_every_sample_once_an_epoch(self, shards, processes, workers):
        """Processes and workers share the files, or the samples of the files; orders differ."""
        parts = []
        for process in range(processes):
            reader = self.reader(shards, process, processes, num_workers=workers, batch_size=1)
            size = sum(i % processes == process for i in range(40))
            if workers == 2:  # each makes its own epochs, in turn
                size = 20
            parts.append((self.draw(reader, size), self.draw(reader, size)))
        for epoch in (0, 1):
            drawn = [image for part in parts for image in part[epoch]]
            assert sorted(drawn) == list(range(40))
        assert parts[0][0] != parts[0][1]
        assert parts[0][0] != sorted(parts[0][0])

    def test_files_are_in_another_order_in_every_epoch(self, shards):
        """Where each has one class, a buffer would else see them in one order for good."""
        reader = self.reader(shards, 0, 1, batch_size=1, shuffle_buffer=1)
        epochs = [self.draw(reader, 40) for _ in range(4)]
        orders = {tuple(dict.fromkeys(image // 10 for image in epoch)) for epoch in epochs}
        assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
        assert len(orders) > 1

    def test_a_file_of_another_type(self, shards, tmp_path):
        """The stream breaks off there, in words."""
        shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
        table = pyarrow.table({"image": ["no", "image"], "label": [0, 1]})
        parquet.write_table(table, tmp_path / "train-3.parquet")
        reader = self.reader(tmp_path, 0, 1)
        with pytest.raises(DataError, match="the stream of training data broke off"):
            self.draw(reader, 14)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_it_goes_on_at_any_sample(self, shards, workers):
        """After any number of batches a new reader goes on as the old one would have."""
        whole = self.draw(self.reader(shards, 1, 2, num_workers=workers), 16)
        for taken in (1, 2, 5, 7, 12):
            first = self.reader(shards, 1, 2, num_workers=workers)
            begun = self.draw(first, taken)
            second = self.reader(shards, 1, 2, num_workers=workers)
            second.load(first.state())
            assert begun + self.draw(second, 16 - taken) == whole

    def test_more_workers_than_files(self, shards):
        """A worker without a file is refused."""
        with pytest.raises(DataError, match="there are 2 for this process; pass at most that"):
            self.reader(shards, 0, 2, num_workers=3)

    @pytest.mark.parametrize("kind", ["own", "bert", "llama"])
    def test_a_run_that_is_cut(self, shards, tmp_path, monkeypatch, kind):
        """Killed in either phase, it ends with the bytes of the one that was not."""
        given = {"streaming": True, "max_steps": 8, "full_precision_steps": 5, "shuffle_buffer": 6}
        given |= {"save_every": 1, "batch_size": 4}
        if kind == "bert":
            given["dataset"] = str(_reviews())
        finetune(kind, tmp_path / "uncut", **given)
        for at in (3, 9):
            again = {**given, "resume": at == 9}
            with pytest.raises(builders.PowerCutError), builders.power_cut(monkeypatch, at):
                finetune(kind, tmp_path / "cut", **again)
        finetune(kind, tmp_path / "cut", **given, resume=True)
        assert digest(tmp_path / "cut") == digest(tmp_path / "uncut")

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("size", [3, 40])
    def test_it_goes_on_after_an_epoch(self, shards, workers, size):
        """A place whose buffer is used up is followed by the next buffer, or the next epoch."""
        given = {"num_workers": workers, "shuffle_buffer": 1000, "batch_size": size}
        reader = self.reader(shards, 0, 1, **given)
        taken = 40 // size + 1  # into the second epoch; and one at its very end
        whole = self.draw(self.reader(shards, 0, 1, **given), 2 * taken)
        begun = []
        for _ in range(2 * taken):
            place = reader.state()
            reader = self.reader(shards, 0, 1, **given)
            reader.load(place)
            begun += self.draw(reader, 1)
        assert begun == whole
        assert sorted(whole[:40]) == list(range(40))

    def test_two_processes(self, shards, tmp_path, monkeypatch):
        """Two that share a stream, cut and resumed, end with the same bytes."""

        def body(process: int) -> None:
            given = uneven(shards, streaming=True, max_steps=8, save_every=1, shuffle_buffer=4)
            finetune("own", tmp_path / "uncut", **given)
            with pytest.raises(builders.PowerCutError), builders.power_cut(monkeypatch, 5):
                finetune("own", tmp_path / "cut", **given)
            finetune("own", tmp_path / "cut", **given, resume=True)

        for outcome in together(2, body, tmp_path):
            assert outcome.code == 0, outcome.err[-3000:]
        assert digest(tmp_path / "cut") == digest(tmp_path / "uncut")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"max_steps": None}, "streaming needs max_steps"),
            ({"epochs": 2.0}, "epochs does not go with streaming"),
            ({"max_train_samples": 5}, "max_train_samples does not go with streaming"),
            ({"train_split": "train[:9]"}, r"train_split = 'train\[:9\]' does not go"),
            ({"eval_split": "test[:9]"}, r"eval_split = 'test\[:9\]' does not go"),
            ({"streaming": False, "shuffle_buffer": 5}, "shuffle_buffer goes with streaming"),
        ],
    )
    def test_what_cannot_stream(self, tmp_path, changes, said):
        """What needs to know all samples beforehand is refused by name."""
        with pytest.raises(RecipeError, match=said):
            builders.recipe("own", tmp_path, **{"streaming": True, **changes})

    def test_labels_that_nobody_named(self, tmp_path):
        """Which labels a csv holds would be known at its end only."""
        with pytest.raises(DataError, match="which labels there are would be known at the end"):
            finetune("bert", tmp_path / "out", streaming=True)


def _reviews() -> Path:
    """Return sentences with named labels, as parquet."""
    import datasets

    folder = ROOT / "reviews"
    folder.mkdir(exist_ok=True)
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": label})
    for split in ("train", "validation"):
        rows = [{"sentence": text, "label": sign == "pos"} for text, sign in builders.sentences(24)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


class TestLauncher:
    def test_stopped_and_resumed_by_another(self, runs, data, tmp_path):
        """`--num-processes 2` is told to stop: saved, exit code 143, and the command that goes on.

        `accelerate launch` with a config file for FSDP2 then ends with the bytes of DDP.
        """
        environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent.parent)}
        environment |= {"ACCELERATE_USE_CPU": "true"}
        given = {**uneven(data, **RUNS["lazy"]), "save_every": 1, "output": str(tmp_path / "out")}
        given["max_steps"] = 4000
        python = [sys.executable, "-m"]
        line = ["askewq", "finetune", "--num-processes", "2", *launch.words_of(given)]
        started = subprocess.Popen(
            [*python, *line], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        end = time.monotonic() + 200
        while not snapshots.newest(tmp_path / "out") and time.monotonic() < end:
            time.sleep(0.1)
        started.send_signal(signal.SIGTERM)
        _, err = started.communicate(timeout=200)
        assert started.returncode == 143, err.decode()
        assert err.count(b"askewq: stopped by SIGTERM after step") == 1
        assert f"--resume --output {tmp_path / 'out'} --num-processes 2".encode() in err
        given |= {"max_steps": 20, "output": str(tmp_path / "second")}
        content = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "FSDP",
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP",
                "fsdp_min_num_params": 100,
                "fsdp_reshard_after_forward": True,
            },
            "machine_rank": 0,
            "main_process_port": 0,
            "mixed_precision": "no",
            "num_machines": 1,
            "num_processes": 2,
        }
        (tmp_path / "fsdp2.yaml").write_text(json.dumps(content))
        line = ["accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp2.yaml")]
        line += ["-m", "askewq", "finetune", *launch.words_of(given)]
        done = subprocess.run([*python, *line], env=environment, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        assert digest(tmp_path / "second") == digest(runs["lazy-ddp2"])

    @pytest.mark.parametrize("count", ["0", "-1"])
    def test_numbers_that_are_none(self, data, tmp_path, count):
        """What is no number of processes is refused, and nothing is written."""
        done = builders.command(*words(data, tmp_path / "out", "--num-processes", count))
        assert done.code == 2
        assert f"--num-processes {count}: it must be at least 1" in done.err
        assert not (tmp_path / "out").exists()

    def test_within_a_launcher(self, data, tmp_path, monkeypatch):
        """A process that a launcher started starts none itself."""
        for name, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
            monkeypatch.setenv(name, value)
        done = builders.command(*words(data, tmp_path / "out", "--num-processes", "2"))
        assert done.code == 2
        assert "a launcher has started this one already (process 0 of 1)" in done.err

    def test_more_than_gpus(self, monkeypatch):
        """Each process needs a GPU, if there are any; unless the CPU is asked for."""
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(RecipeError, match="there are 2; pass at most 2, or set ACCELERATE_USE"):
            launch.wanted(3)
        assert launch.wanted(2)
        assert not launch.wanted(1)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        assert launch.wanted(3)

    def test_ended_by_a_signal(self):
        """A process that a signal ended could not say so: its launcher does, as a shell would."""
        with pytest.raises(StoppedError, match="ended by SIGKILL, and the others") as stopped:
            launch._code(-signal.SIGKILL)
        assert stopped.value.exit_code == 137
        assert launch._code(143) == 143

    def test_flags_survive(self, data, tmp_path):
        """The processes get the flags that their launcher was given."""
        given = uneven(data, include=("a b", "*"), augment="crop", compile=False, output="o -x")
        from askewq import cli

        _, bound, _ = cli.app.parse_args(["finetune", *launch.words_of(given)])
        assert dict(bound.kwargs["flags"]) == {**given, "output": Path("o -x")}


@pytest.mark.parametrize(
    ("environment", "changes", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "asks for DeepSpeed, with which"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "asks for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "asks for a parallelism_config"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "asks for fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "asks for fsdp_activation_checkpointing"),
        ({"FSDP_IGNORED_MODULES": "head"}, {}, "has fsdp_ignored_modules"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "asks for FSDP version 1"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "pass --mixed-precision bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"mixed_precision": "bf16"}, "says fp16 for"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "pass --grad-accumulation 4"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "pass --compile, which is what decides"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, {}, "started 2 processes, and Accelerate connected 1"),
    ],
)
def test_what_a_launcher_may_not_ask(monkeypatch, tmp_path, environment, changes, said):
    """What the run would not do, or not exactly, is refused by name before anything is written."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "WORLD_SIZE" in environment:
        monkeypatch.setattr(processes, "several", lambda: False)
    with pytest.raises(RecipeError, match=said):
        finetune("own", tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_agreeing_with_the_launcher(monkeypatch):
    """A launcher that says what the recipe says is no contradiction."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    made = builders.recipe("own", Path("out"), mixed_precision="bf16", grad_accumulation=2)
    assert processes.accelerator_of(made).num_processes == 1
    builders.new_process()


def test_an_encoder_without_labels(tmp_path):
    """Its unused pooler stops no process; DDP takes hidden states, FSDP2 gives the bytes of DDP."""
    builders.encoder(), builders.unlabelled_csv()
    short = {"batch_size": 4, "lr": 0.01}

    def ddp(process: int) -> None:
        finetune("encoder", tmp_path / "ddp", **short)
        finetune("encoder", tmp_path / "hidden", **short, distill_hidden=1.0)

    def fsdp(process: int) -> None:
        finetune("encoder", tmp_path / "fsdp", **short)

    wrapped = {**TRANSFORMER, "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}
    for body, environment in ((ddp, {}), (fsdp, wrapped)):
        for outcome in together(2, body, tmp_path, **environment):
            assert outcome.code == 0, outcome.err[-3000:]
    assert digest(tmp_path / "fsdp") == digest(tmp_path / "ddp") != digest(tmp_path / "hidden")


def test_fsdp2_cannot(data, tmp_path):
    """A compiled network, hidden states, and blocks that it cannot wrap are refused by name."""

    def body(process: int) -> None:
        with pytest.raises(RecipeError, match="compile = True does not go with FSDP2"):
            finetune("own", tmp_path / "out", **uneven(data, compile=True))
        with pytest.raises(RecipeError, match="polish_steps = 4 does not go with FSDP2"):
            finetune("own", tmp_path / "out", **uneven(data, polish_steps=4))
        with pytest.raises(RecipeError, match=r"distill_hidden = 1\.0 does not go with FSDP2"):
            finetune("gpt2", tmp_path / "out", **GPT2, distill_hidden=1.0)
        with pytest.raises(RecipeError, match="FSDP2 cannot wrap this network"):
            finetune("gpt2", tmp_path / "out", **GPT2)

    for outcome in together(2, body, tmp_path, **FSDP2):
        assert outcome.code == 0, outcome.err[-3000:]
