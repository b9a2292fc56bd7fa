"""Checkpoints: complete, without pickle, checked by their sums, and what happens when they fail."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from builders import command, copy_of, files, finetune, finished
from safetensors.torch import load_file, save_file
from test_train import PHASES, digest, uncut

from askewq import checkpoint, loop, output, processes, signals, snapshots, train, training_state
from askewq.errors import DiskFullError, OutputError, StoppedError


def steps_in(folder: Path) -> list[str]:
    """Return the names of a run's checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def newest(folder: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return folder / "checkpoints" / steps_in(folder)[-1]


def seal(folder: Path) -> None:
    """Give a checkpoint the sums of what it holds now, as who changes it on purpose would."""
    (folder / snapshots.SUMS).unlink(missing_ok=True)
    snapshots._write_sums(folder)


def save_random(folder: Path, process: int) -> None:
    """Write the random numbers of this process where a checkpoint has them."""
    path = folder / training_state.RANDOM.format(process)
    path.write_bytes(training_state.random_numbers())


def at_step(monkeypatch, number, action):
    """Let `action` happen before step `number` is made."""
    original = loop.Loop._step

    def step(self, model, optimizer, micro, at):
        if at == number:
            action()
        return original(self, model, optimizer, micro, at)

    monkeypatch.setattr(loop.Loop, "_step", step)


class TestContent:
    def test_files(self):
        """A checkpoint is safetensors, JSON and sums: nothing in it can be a program."""
        found = {p.name for p in newest(finished("own")[0]).iterdir()}
        assert found == {
            *("SHA256SUMS", "state.json", "model.safetensors", "optimizer.safetensors"),
            "random-00000.safetensors",
        }

    def test_the_sums_are_those_of_the_tool(self):
        """`sha256sum -c SHA256SUMS` checks a checkpoint."""
        folder = newest(finished("own")[0])
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True)
        assert done.returncode == 0
        assert done.stdout.count(b"OK") == 4

    def test_resuming_reads_no_pickle(self, tmp_path, monkeypatch):
        """No pickle of the checkpoint is loaded, weights_only or not, even if there are some."""
        folder = copy_of("own", tmp_path)
        bomb = Bomb(tmp_path / "executed")
        for name in ("optimizer.bin", "random_states_0.pkl", "pytorch_model.bin"):
            (newest(folder) / name).write_bytes(pickle.dumps(bomb))
        seal(newest(folder))

        def refuse(*args, **kwargs):
            raise AssertionError("a pickle was loaded")

        monkeypatch.setattr(torch, "load", refuse)
        finetune("own", folder, resume=True)
        assert digest(folder) == digest(finished("own")[0])
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_an_optimizer_comes_back_as_it_was(self, tmp_path, optimizer):
        """Tensors, numbers, tuples and None of an optimizer's state survive the way to the file."""
        made = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = torch.nn.Linear(3, 2)
            kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
            how = {"momentum": 0.9} if optimizer == "sgd" else {}
            made.append((model, kind(model.parameters(), lr=0.1 + seed, **how)))
        (model, first), (other, second) = made
        model(torch.ones(1, 3)).sum().backward()
        first.step()
        training_state.save(tmp_path, model, first, training_state.Progress(), 1)
        save_random(tmp_path, 0)
        training_state.load_weights(tmp_path, other)
        training_state.load_optimizer(tmp_path, second, 0)
        before, after = first.state_dict(), second.state_dict()
        assert before["state"].keys() == after["state"].keys()
        for index, values in before["state"].items():
            assert values.keys() == after["state"][index].keys()
            assert all(
                torch.equal(after["state"][index][k], v) for k, v in values.items() if v is not None
            )
        assert before["param_groups"] == after["param_groups"]
        assert all(torch.equal(other.state_dict()[k], v) for k, v in model.state_dict().items())

    def test_random_numbers_go_on(self, tmp_path):
        """Python, numpy and torch draw after a reload what they would have drawn."""

        def draw():
            normal = float(np.random.standard_normal())  # keeps its second number for later
            return random.gauss(0, 1), random.random(), normal, float(torch.randn(()))

        draw()
        save_random(tmp_path, 3)
        expected = [draw() for _ in range(3)]
        training_state._load_random(tmp_path / "random-00003.safetensors")
        assert [draw() for _ in range(3)] == expected


class Bomb:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "one bit": lambda path: path.write_bytes(
        path.read_bytes()[:-3] + bytes([path.read_bytes()[-3] ^ 4]) + path.read_bytes()[-2:]
    ),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}
NAMES = ["SHA256SUMS", "state.json", "model.safetensors", "optimizer.safetensors"]


class TestDamage:
    @pytest.mark.parametrize("how", DAMAGES)
    @pytest.mark.parametrize("name", [*NAMES, "random-00000.safetensors"])
    def test_the_one_before_is_used_and_it_is_said(self, tmp_path, capsys, name, how):
        """A newest checkpoint with any file damaged is set aside; the run ends the same."""
        folder = copy_of("own", tmp_path)
        damaged = newest(folder)
        DAMAGES[how](damaged / name)
        finetune("own", folder, resume=True)
        said = capsys.readouterr().out
        assert f"the checkpoint {damaged} is damaged" in said
        assert f"going on from {folder / 'checkpoints' / 'step-00000005'}" in said
        assert digest(folder) == digest(finished("own")[0])
        assert steps_in(folder) == ["step-00000005", "step-00000006"]
        assert snapshots.damage(newest(folder)) == ""

    def test_a_file_too_many(self, tmp_path):
        """What does not belong to a checkpoint is damage, too."""
        folder = newest(copy_of("own", tmp_path))
        (folder / "more").write_text("x")
        assert "holds" in snapshots.damage(folder)

    def test_all_damaged(self, tmp_path, capsys):
        """Without any good checkpoint the run starts anew, and says so."""
        folder = copy_of("own", tmp_path)
        for path in (folder / "checkpoints").iterdir():
            (path / "state.json").write_text("{")
        finetune("own", folder, resume=True)
        said = capsys.readouterr().out
        assert said.count("is damaged") == 2
        assert "the run starts anew" in said
        assert digest(folder) == digest(finished("own")[0])

    def test_keep_1_never_deletes_the_only_good_one(self, tmp_path, monkeypatch):
        """A damaged newer checkpoint does not count among those that are kept."""
        finetune("own", tmp_path / "out", save_every=2, keep=2)
        out = tmp_path / "out"
        (newest(out) / "state.json").write_text("{")
        with builders.power_cut(monkeypatch, 5), pytest.raises(builders.PowerCutError):
            finetune("own", out, resume=True, keep=1)
        assert steps_in(out) == ["step-00000004", "step-00000006.damaged"]
        finetune("own", out, resume=True)
        assert steps_in(out) == ["step-00000006"]
        assert digest(out) == digest(finished("own")[0])

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"version": 2}, "another askewq wrote it"),
            ({"progress": {"step": 6, "mood": "good"}}, "another askewq wrote it"),
            ({"optimizer": None}, "does not fit this run"),
            ({"processes": 2}, "Start as many as before"),
        ],
    )
    def test_whole_but_not_for_this_run(self, tmp_path, change, words):
        """A checkpoint of another version, or of more processes, is refused, not passed over."""
        folder = copy_of("own", tmp_path)
        path = newest(folder) / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        seal(newest(folder))
        with pytest.raises(OutputError, match=words):
            finetune("own", folder, resume=True)

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
    def test_of_another_network(self, tmp_path, name):
        """Tensors of other names or shapes are refused by name, whatever the sums say."""
        folder = copy_of("own", tmp_path)
        path = newest(folder) / name
        tensors = load_file(path)
        first = sorted(tensors)[0]
        save_file({**tensors, first: tensors[first][:1].contiguous()}, path)
        seal(newest(folder))
        with pytest.raises(OutputError, match="does not fit this run"):
            finetune("own", folder, resume=True)

    def test_a_damaged_teacher(self, tmp_path, monkeypatch):
        """A teacher that is not the one that was written does not teach."""
        out = tmp_path / "out"
        with builders.power_cut(monkeypatch, 4), pytest.raises(builders.PowerCutError):
            finetune("own", out, distill=0.5)
        path = out / "checkpoints" / "teacher.safetensors"
        tensors = load_file(path)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
        with pytest.raises(OutputError, match=r"teacher\.safetensors is missing or damaged"):
            finetune("own", out, resume=True)


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "code", "at"),
        [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 7)],
    )
    def test_saves_and_says_how_to_go_on(self, tmp_path, monkeypatch, number, code, at):
        """The step is finished and saved, code and command are as promised, no byte is lost."""
        settings = {**PHASES, "save_every": 100}
        with monkeypatch.context() as patch:
            at_step(patch, at, lambda: os.kill(os.getpid(), number))
            with pytest.raises(StoppedError) as caught:
                finetune("own", tmp_path / "out", **settings)
        assert caught.value.exit_code == code
        assert f"stopped by {number.name} after step {at + 1}" in str(caught.value)
        assert newest(tmp_path / "out").name == f"step-{at + 1:08d}"
        line = str(caught.value).splitlines()[-1]
        assert line == f"askewq finetune --resume --output {tmp_path / 'out'}"
        outcome = command(*line.split()[1:])
        assert outcome.code == 0, outcome.err
        assert digest(tmp_path / "out") == digest(uncut("sgd")[0])

    # More workers than this machine may have cores.
    @pytest.mark.filterwarnings("ignore:This DataLoader will create")
    @pytest.mark.parametrize("changes", [{}, {"streaming": True, "shuffle_buffer": 6}])
    def test_a_signal_to_all_processes(self, tmp_path, monkeypatch, changes):
        """A scheduler's SIGTERM also goes to the loader's workers, which work on until the end."""
        settings = {"max_steps": 6, "batch_size": 8, "num_workers": 1, **changes}

        def end() -> None:
            workers = multiprocessing.active_children()
            assert workers
            pids = [str(process.pid) for process in (*workers, multiprocessing.current_process())]
            subprocess.run(["kill", "-TERM", *pids], check=True)
            time.sleep(0.5)

        with monkeypatch.context() as patch:
            at_step(patch, 2, end)
            with pytest.raises(StoppedError, match="stopped by SIGTERM after step 3"):
                finetune("own", tmp_path / "out", **settings)
        assert newest(tmp_path / "out").name == "step-00000003"
        finetune("own", tmp_path / "out", resume=True)
        finetune("own", tmp_path / "uncut", **settings)
        assert digest(tmp_path / "out") == digest(tmp_path / "uncut")

    def test_a_signal_that_ends_a_compiler(self, tmp_path, monkeypatch):
        """The step that needed it fails; the run is stopped, no failure, and no byte is lost."""
        original = loop.Loop._loss
        steps = iter(range(100))

        def signalled(*args):
            if next(steps) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("the compiler was ended by a signal")
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "_loss", signalled)
            with pytest.raises(StoppedError, match="stopped by SIGTERM") as caught:
                finetune("own", tmp_path / "out", **{**PHASES, "save_every": 1})
        assert caught.value.exit_code == 143
        finetune("own", tmp_path / "out", resume=True)
        assert digest(tmp_path / "out") == digest(uncut("sgd")[0])

    def test_the_command_line(self, tmp_path, monkeypatch):
        """The command ends with the exit code of the signal and the message on standard error."""
        at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        words = []
        for key, value in builders.settings("own", tmp_path / "out").items():
            words += [f"--{key.replace('_', '-')}", value]
        outcome = command("finetune", *words)
        assert outcome.code == 143
        assert f"askewq finetune --resume --output {tmp_path / 'out'}" in outcome.err
        assert "Traceback" not in outcome.err

    def test_within_an_evaluation(self, tmp_path, monkeypatch):
        """A long evaluation is broken off; the relaxed weights are those that are saved."""
        original = loop.evaluate
        seen = []

        def evaluate(*args):
            seen.append(1)
            if len(seen) == 3:  # full precision, rounded, the first on the way
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "evaluate", evaluate)
            with pytest.raises(StoppedError, match="after step 7"):
                finetune("own", tmp_path / "out", **{**PHASES, "eval_every": 7})
        finetune("own", tmp_path / "out", resume=True)
        assert digest(tmp_path / "out") == digest(uncut("sgd")[0])

    @pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
    def test_between_the_phases(self, tmp_path, monkeypatch, at):
        """Nothing that was trained is lost where no step is made."""
        original = loop.evaluate
        seen = []

        def evaluate(*args):
            seen.append(1)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "evaluate", evaluate)
            with pytest.raises(StoppedError) as caught:
                finetune("own", tmp_path / "out", **PHASES)
        step = 4 if at < 3 else 10
        assert f"after step {step}, saved in" in str(caught.value)
        made = []
        original_step = loop.Loop._step

        def step_made(self, model, optimizer, micro, number):
            made.append(number)
            return original_step(self, model, optimizer, micro, number)

        monkeypatch.setattr(loop.Loop, "_step", step_made)
        finetune("own", tmp_path / "out", resume=True)
        assert made == list(range(step, 10))
        assert digest(tmp_path / "out") == digest(uncut("sgd")[0])

    def test_before_the_first_step(self, tmp_path, monkeypatch):
        """A signal that comes before anything was trained says so."""
        original = signals.listening

        def listening():
            block = original()
            block.__enter__()
            os.kill(os.getpid(), signal.SIGTERM)
            return block_of(block)

        class block_of:  # noqa: N801  # a context that was entered already
            def __init__(self, block):
                self.block = block

            def __enter__(self):
                return None

            def __exit__(self, *error):
                return self.block.__exit__(*error)

        with monkeypatch.context() as patch:
            patch.setattr(signals, "listening", listening)
            with pytest.raises(StoppedError, match="nothing was trained yet"):
                finetune("own", tmp_path / "out")
        finetune("own", tmp_path / "out", resume=True)
        assert digest(tmp_path / "out") == digest(finished("own")[0])

    def test_ctrl_c_before_training(self, tmp_path, monkeypatch):
        """Where there is nothing to save, Ctrl-C ends with 130 and one line."""

        def interrupt(recipe):
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "finetune", interrupt)
        words = ["--model", "resnet18", "--dataset", "d", "--output", tmp_path / "out"]
        outcome = command("finetune", *words)
        assert (outcome.code, outcome.err) == (130, "askewq: interrupted.\n")


class TestFullDisk:
    def words(self, out):
        """Return the flags of a run with a checkpoint after every step."""
        settings = {**builders.settings("own", out), "save_every": 1}
        return [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", v)]

    def test_a_checkpoint_does_not_fit(self, tmp_path, monkeypatch):
        """The last good checkpoint is left and named, what is needed is said, and room helps."""
        out = tmp_path / "out"
        with monkeypatch.context() as patch, builders.file_limit() as limit:
            at_step(patch, 3, lambda: limit(3_000))
            outcome = command("finetune", *self.words(out))
        assert outcome.code == 2
        good = out / "checkpoints" / "step-00000003"
        assert "the disk is full" in outcome.err
        assert f"The last good checkpoint, {good}, is left" in outcome.err
        assert f"--resume --output {out}" in outcome.err
        assert "bytes are needed" in outcome.err
        assert snapshots.damage(good) == ""
        assert not [f for f in files(out) if "partial" in f]
        assert command("finetune", "--resume", "--output", out).code == 0
        assert digest(out) == digest(finished("own")[0])

    def test_what_is_needed_is_about_what_is_written(self, tmp_path):
        """The figure in the message is the size of a checkpoint, 64 kB at most above it."""
        model = torch.nn.Linear(300, 300)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(1, 300)).sum().backward()
        optimizer.step()
        training_state.save(tmp_path, model, optimizer, training_state.Progress(), 1)
        save_random(tmp_path, 0)
        written = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert 0 <= training_state.size(model, optimizer) - written <= 2**16

    def test_the_artifact_does_not_fit(self, tmp_path, monkeypatch):
        """Training is saved before packing: with room, the run ends without a step."""
        out = tmp_path / "out"
        original = checkpoint.save

        with monkeypatch.context() as patch, builders.file_limit() as limit:

            def save(model, path):
                limit(1_000)
                original(model, path)

            patch.setattr(checkpoint, "save", save)
            outcome = command("finetune", *self.words(out))
        assert outcome.code == 2
        assert "Training is done and saved" in outcome.err
        assert not (out / "model.safetensors").exists()
        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "_step", None)  # would fail
            assert command("finetune", "--resume", "--output", out).code == 0
        assert digest(out) == digest(finished("own")[0])

    def test_the_teacher_does_not_fit(self, tmp_path, monkeypatch):
        """The network that is to teach is written before the first step; room helps here, too."""
        out = tmp_path / "out"
        original = training_state.save_network

        with monkeypatch.context() as patch, builders.file_limit() as limit:

            def save_network(model, path):
                limit(1_000)
                original(model, path)

            patch.setattr(training_state, "save_network", save_network)
            outcome = command("finetune", *self.words(out), "--distill", 0.5)
        assert outcome.code == 2
        assert "the disk is full" in outcome.err
        assert command("finetune", "--resume", "--output", out).code == 0

    def test_no_room_at_all(self, tmp_path):
        """A run that cannot even write its recipe says so, and can be started again."""
        out = tmp_path / "out"
        recipe = builders.recipe("own", out)
        with builders.file_limit() as limit, output.held(recipe):
            limit(10)
            with pytest.raises(DiskFullError, match="Nothing was trained yet"):
                output.prepare(recipe)
        output.check(recipe)


def cut_at_checkpoints(folder, delete=shutil.rmtree, **options):
    """Stand for a power cut as the checkpoints are about to be deleted."""
    if Path(folder).name == "checkpoints":
        raise builders.PowerCutError
    delete(folder, **options)


class TestOutputFolder:
    def test_a_run_that_was_killed_as_it_began_can_be_started_again(self, tmp_path):
        """What is there before the recipe does not count as something to lose."""
        (tmp_path / "recipe.yaml.partial").write_text("half")
        finetune("own", tmp_path)
        assert digest(tmp_path) == digest(finished("own")[0])
        assert not [f for f in files(tmp_path) if "partial" in f]

    @pytest.mark.parametrize("how", ["overwrite", "resume"])
    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_an_overwrite_that_was_killed(self, tmp_path, monkeypatch, how, after):
        """While the old run is deleted the folder is the new one's already: nothing old is used."""
        folder = copy_of("timm", tmp_path)
        original = Path.unlink
        deleted = []

        def cut(path, *args, **kwargs):
            if path.parent == folder and path.exists():
                deleted.append(path)
                if len(deleted) > after:
                    raise builders.PowerCutError
            return original(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", cut)
            if after == 0:  # with the old checkpoints still there
                patch.setattr(output.shutil, "rmtree", cut_at_checkpoints)
            with pytest.raises(builders.PowerCutError):
                finetune("own", folder, overwrite=True)
        finetune("own", folder, **{how: True})
        assert digest(folder) == digest(finished("own")[0])
        names = {f for f in files(folder) if "/" not in f}
        assert names == {f for f in files(finished("own")[0]) if "/" not in f}

    def test_leftovers_of_a_kill_are_cleared(self, tmp_path):
        """Half-written checkpoints are deleted when the run goes on."""
        folder = copy_of("own", tmp_path)
        leftover = folder / "checkpoints" / "step-00000004.partial"
        leftover.mkdir()
        (leftover / "model.safetensors").write_text("half")
        finetune("own", folder, resume=True)
        assert not [f for f in files(folder) if "partial" in f]

    @pytest.mark.parametrize("change", [{"keep": 5}, {"nan_policy": "skip:2"}])
    def test_what_a_resumed_run_may_change(self, tmp_path, change):
        """Settings that decide nothing about the weights may differ, and are written down."""
        folder = copy_of("own", tmp_path)
        finetune("own", folder, resume=True, **change)
        key, value = next(iter(change.items()))
        assert f"{key}: {value}" in (folder / "recipe.yaml").read_text()
        assert digest(folder) == digest(finished("own")[0])


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "askewq"),
        ({"WORLD_SIZE": "2", processes.STARTED: "1"}, "askewq"),
        ({"WORLD_SIZE": "2"}, "accelerate launch --multi_gpu --num_processes 2 -m askewq"),
        (
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
            "accelerate launch --config_file FILE -m askewq",
        ),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "accelerate launch --config_file FILE -m askewq",
        ),
    ],
    ids=["one", "num-processes", "launched", "fsdp", "nodes"],
)
def test_the_command_that_goes_on(monkeypatch, variables, words):
    """It starts as many processes in the same way: a sharded network may not fit into one GPU."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP", processes.STARTED):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = snapshots.resume_command(Path("out"))
    assert told.startswith(f"{words} finetune --resume --output out")
    assert told.endswith("--num-processes 2") == (processes.STARTED in variables)
