"""The command line: exit codes, one clear message, and nothing written for bad input."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import builders
import pytest
import torch
import yaml
from builders import Outcome, command, copy_of, files, finished
from safetensors.torch import load_file, save_file

from askewq import checkpoint, cli, config, recipe_files


def refused(outcome: Outcome, *words: str) -> None:
    """Check that a command failed as a user may expect it to."""
    assert outcome.code == 2
    assert outcome.out == ""
    # transformers draws a bar of its own while it loads weights
    lines = [line for line in outcome.err.splitlines() if "Loading weights" not in line]
    message = "\n".join(filter(None, lines))
    assert message.startswith("askewq: ")
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in message


def finetune(output: Path, *flags: object, kind: str = "own") -> Outcome:
    """Run `askewq finetune` with the settings of a short run and further flags."""
    words = []
    for key, value in {"max_steps": 1, "batch_size": 8, **builders.SETTINGS[kind]()}.items():
        flag = f"--{key.replace('_', '-')}"
        words += [flag, value] if flag not in flags else []
    return command("finetune", *words, "--output", output, *flags)


# Flags that are wrong in themselves, with words of the message.
IN_LEVELS = {"optimizer": "adamw", "lr": 1e-2, "level_lr": 0.01}
WRONG_FLAGS = {
    "bits 0": (["--bits", 0], ["--bits", "ternary"]),
    "bits 9": (["--bits", 9], ["--bits", "ternary"]),
    "bits x": (["--bits", "x"], ["--bits", "ternary"]),
    "bits -2": (["--bits", -2], ["--bits"]),
    "bits 2.9": (["--bits", 2.9], ["--bits", '"2.9" must be one of 1, 2,', "ternary"]),
    "act bits 3.6": (["--act-bits", 3.6], ["--act-bits", '"3.6" must be one of 1, 2,', "none"]),
    "near bits": (["--bits", "tenary"], ["--bits", "did you mean ternary?"]),
    "group size 2.5": (["--group-size", 2.5], ['"2.5" must be a whole number or one of channel']),
    "unknown flag": (["--bitz", 2], ["--bitz", "--bits"]),
    "unknown word": (["nonsense"], ["nonsense"]),
    "lr not a number": (["--lr", "fast"], ["--lr", "fast"]),
    "lr negative": (["--lr", -1], ["lr", "greater than 0"]),
    "steps not whole": (["--max-steps", 1.5], ["--max-steps", '"1.5" must be a whole number.']),
    "batch size 0": (["--batch-size", 0], ["batch_size"]),
    "flag without value": (["--label-column"], ["--label-column"]),
    "unknown choice": (["--optimizer", "lion"], ["--optimizer", "adamw"]),
    "unknown recipe": (["--recipe", "nope"], ["no recipe 'nope'", "minilm-sst2-2bit"]),
    "near recipe": (["--recipe", "minilm-sst2-3bit"], ["did you mean minilm-sst2-2bit"]),
    "half-integers at 1 bit": (["--bits", 1, "--grid", "half-integer"], ["half-integer", "{-1"]),
    "group size 0": (["--group-size", 0], ["group_size = 0"]),
    "alpha 2": (["--alpha", 2], ["alpha", "coupled"]),
    "closing that ends before it starts": (["--close-start", 0.95], ["close_start", "close_end"]),
    "resume and overwrite": (["--resume", "--overwrite"], ["--resume"]),
    "resume of nothing": (["--resume"], ["--resume", "holds no run"]),
    "setting of another optimizer": (["--optimizer", "adamw", "--momentum", 0.5], ["momentum"]),
    "setting of another task": (["--max-length", 64], ["max_length", "text-classification"]),
    "random weights of an own module": (["--no-pretrained"], ["--no-pretrained"]),
    "empty plan": (["--exclude", "*"], ["can be quantized", "excluded by '*'"]),
    "pattern without a match": (["--include", "layer.*"], ["'layer.*' matches no layer"]),
    "mean without std": (["--mean", 0.5], ["mean", "std"]),
    "std 0": (["--std", 0, 0, 0], ["std", "above 0"]),
    "missing training split": (["--train-split", "trian"], ["did you mean train?", "train, test"]),
    "missing evaluation split": (["--eval-split", "val"], ["--eval-split", "train, test"]),
    "missing label column": (["--label-column", "lable"], ["did you mean label?", "image, label"]),
    "missing image column": (["--image-column", "img"], ["--image-column", "image, label"]),
    "image column as label": (["--label-column", "image"], ["--label-column", "image"]),
    "data set not there": (["--dataset", "./nowhere"], ["./nowhere", "no such file or folder"]),
    "data set on the Hub": (["--dataset", "org/name"], ["org/name", "local folder"]),
    "data set of another type": (["--dataset", __file__], [".parquet"]),
    "weights not there": (["--weights", "w.safetensors"], ["w.safetensors", "cannot be read"]),
    "task of another kind": (["--task", "causal-lm"], ["text"]),
}

WRONG_MODELS = {
    "near name": ("resnt50", ["did you mean resnet50"]),
    "Hub out of reach": ("resnet50", ["--no-pretrained", "folder works offline"]),
    "unknown id": ("org/no-such-model", ["org/no-such-model", "folder works offline"]),
    "folder not there": ("./nowhere", ["no config.json"]),
    "file not there": ("nowhere.py:make", ["there is no file 'nowhere.py'", "file.py:factory"]),
    "factory not there": ("smal", ["did you mean small?"]),
    "factory that fails": ("fails", ["OSError: no such luck"]),
    "factory of no module": ("text", ["returned a str"]),
    "one layer only": ("only_one_layer", ["can be quantized", "last layer"]),
    "another number of classes": ("ten_classes", ["10 outputs", "3 labels", "red, green, blue"]),
    "another number of channels": ("grey", ["[8, 3, 16, 16]"]),
}


class TestFinetuneRefuses:
    @pytest.mark.parametrize("name", WRONG_FLAGS)
    def test_wrong_flags(self, tmp_path, name):
        """A wrong flag ends with exit code 2, one message, and nothing written."""
        flags, words = WRONG_FLAGS[name]
        refused(finetune(tmp_path / "out", *flags), *words)
        assert files(tmp_path) == set()
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", WRONG_MODELS)
    def test_wrong_models(self, tmp_path, name):
        """A model that cannot be had, or does not fit, ends likewise."""
        model, words = WRONG_MODELS[name]
        if f"def {model}(" in builders.OWN_MODULE or model == "smal":
            model = builders.own(model)
        refused(finetune(tmp_path / "out", "--model", model), *words)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["other keys", "other shapes", "pickle", "truncated", "text"])
    def test_wrong_weights(self, tmp_path, name):
        """Weights that do not fit, run code or are damaged end likewise; no code is run."""
        state = load_file(builders.own_module() / "small.safetensors")
        path = tmp_path / "w.safetensors"
        words = [str(path)]
        if name == "other keys":
            save_file({f"module.{key}": tensor for key, tensor in state.items()}, path)
            words += ["8 keys are missing", "module.0.weight"]
        elif name == "other shapes":
            save_file({**state, "8.weight": torch.zeros(10, 16)}, path)
            words += ["'8.weight' is [10, 16] there and [3, 16] in the model"]
        elif name == "pickle":
            path = tmp_path / "w.pt"
            path.write_bytes(pickle.dumps({"a": Malicious(tmp_path / "ran")}, 2))
            words = [str(path), "convert them to safetensors"]
        else:
            save_file(state, path)
            path.write_bytes(path.read_bytes()[:-9] if name == "truncated" else b"weights")
        refused(finetune(tmp_path / "out", "--weights", path), *words)
        assert files(tmp_path) == {path.name}

    def test_an_output_that_is_not_empty(self, tmp_path):
        """Another run's folder is left alone."""
        folder = copy_of("own", tmp_path)
        before = files(folder)
        refused(finetune(folder), "--resume", "--overwrite")
        assert files(folder) == before

    def test_a_damaged_recipe_on_resume(self, tmp_path):
        """The file is named, not the command line."""
        folder = copy_of("own", tmp_path)
        with (folder / "recipe.yaml").open("a") as file:
            file.write("nonsense: 1\n")
        outcome = command("finetune", "--resume", "--output", folder)
        refused(outcome, f"{folder / 'recipe.yaml'} cannot be used", "nonsense: no such key")

    @pytest.mark.parametrize(
        ("settings", "flags", "other"),
        [
            ({"method": "proxquant", "strength": 0.01}, ("--strength", 0.01), "strength"),
            ({"polish_steps": 2, "polish_lr": 0.01}, ("--polish-lr", 0.01), "polish_lr"),
            ({"lr": 0.01, "method": "lsq"}, ("--method", "lsq", "--lr", 0.01), "lr"),
            ({"lr": 0.01}, ("--optimizer", "sgd", "--lr", 0.01), "lr"),
        ],
    )
    def test_settings_of_the_run_on_resume(self, settings, flags, other, tmp_path):
        """A flag that repeats what the run has is judged beside what else the run has."""
        builders.finetune("own", tmp_path / "out", **settings)
        resumed = ("finetune", "--resume", "--output", tmp_path / "out")
        outcome = command(*resumed, *flags)
        assert outcome.code == 0, outcome.err
        outcome = command(*resumed, *flags[:-1], 0.02)
        refused(outcome, f"{other} = 0.02 (the run has 0.01)")

    def test_epochs_of_a_run_of_steps_on_resume(self, tmp_path):
        """They would have to replace its steps, and are refused."""
        folder = copy_of("own", tmp_path)
        outcome = command("finetune", "--resume", "--epochs", 5, "--output", folder)
        refused(outcome, "of max_steps = ", "--epochs would replace that; leave it out")

    @pytest.mark.parametrize(
        ("flags", "told"),
        [
            (("--method", "lsq"), "method = 'lsq' (the run has 'askewsgd')"),
            (("--optimizer", "adamw"), "optimizer = 'adamw' (the run has 'sgd')"),
            (("--full-precision-steps", 0), "full_precision_steps = 0 (the run has 1)"),
        ],
    )
    def test_another_choice_on_resume(self, flags, told, tmp_path):
        """It is named itself, and not what would have to leave with it."""
        builders.finetune("own", tmp_path / "out", full_precision_steps=1, full_precision_lr=0.1)
        refused(command("finetune", "--resume", "--output", tmp_path / "out", *flags), told)

    def test_a_home_that_the_shell_left(self, tmp_path, monkeypatch):
        """A ~ behind an equals sign is the user's home, whatever reads it."""
        folder = copy_of("own", tmp_path / "run")
        shutil.copy(builders.own_module() / "nets.py", tmp_path / "nets.py")
        monkeypatch.setenv("HOME", str(tmp_path))
        name = folder.relative_to(tmp_path)
        outcome = command("finetune", "--resume", f"--output=~/{name}")
        assert outcome.code == 0, outcome.err
        words = ("export", folder, "--to", "dense", "--model=~/nets.py:small")
        outcome = command(*words, "--output=~/dense")
        assert outcome.code == 0, outcome.err
        assert "model.safetensors" in files(tmp_path / "dense")
        outcome = command("recipes", "show", f"~/{name}/recipe.yaml")
        assert outcome.code == 0, outcome.err
        refused(command("finetune", "--resume", "--output=~nobody-x/run"), "home that is not known")

    def test_other_settings_on_resume(self, tmp_path):
        """--resume with another setting names it and what the run has."""
        folder = copy_of("own", tmp_path)
        refused(finetune(folder, "--resume", "--bits", 3), "bits = 3 (the run has 2)")

    def test_images_of_different_sizes(self, tmp_path):
        """A user's own module on pictures of different sizes asks for --image-size."""
        content = [(p.resize((16 + i, 16)), y) for i, (p, y) in enumerate(builders.pictures(6))]
        builders.write_images(tmp_path / "train.parquet", content)
        flags = ["--dataset", tmp_path, "--eval-split", "train"]
        refused(finetune(tmp_path / "out", *flags), "--image-size")
        assert not (tmp_path / "out").exists()
        assert finetune(tmp_path / "out", *flags, "--image-size", 16).code == 0

    def test_a_tokenizer_that_cannot_pad(self, tmp_path):
        """What to do about a tokenizer without a padding token is told."""
        import shutil

        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        path = folder / "tokenizer_config.json"
        content = json.loads(path.read_text())
        del content["pad_token"]
        path.write_text(json.dumps(content))
        refused(finetune(tmp_path / "out", "--model", folder, kind="bert"), "tokenizer.pad_token =")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("train", "test", "words"),
        [
            ("good film,pos\nbad film,neg", "bad film,meh", ["--eval-split", "meh; it knows 2"]),
            ("good film,pos\nbad film,", "bad film,neg", ["label"]),
            ("good film,0\nbad film,1", "bad film,-1", ["--eval-split", "-1"]),
        ],
        ids=["unknown", "missing", "minus one"],
    )
    def test_labels_that_cannot_be_used(self, tmp_path, train, test, words):
        """Labels that training lacks, and rows without one, are refused."""
        (tmp_path / "train.csv").write_text(f"text,label\n{train}\n")
        (tmp_path / "test.csv").write_text(f"text,label\n{test}\n")
        refused(finetune(tmp_path / "out", "--dataset", tmp_path, kind="bert"), *words)
        assert not (tmp_path / "out").exists()

    def test_an_unlabelled_split(self, tmp_path):
        """A split whose classes are all -1 is called unlabelled."""
        content = builders.pictures(6)
        builders.write_images(tmp_path / "train.parquet", content)
        builders.write_images(tmp_path / "test.parquet", [(image, -1) for image, _ in content])
        outcome = finetune(tmp_path / "out", "--dataset", tmp_path)
        refused(outcome, "--eval-split", "no labels (they are -1)")
        assert not (tmp_path / "out").exists()

    def test_several_errors_at_once(self):
        """Everything that is wrong is listed in one message."""
        outcome = command("finetune", "--lr", -1, "--batch-size", 0)
        refused(outcome, "lr:", "batch_size:", "model: missing", "dataset: missing", "--output")

    def test_a_recipe_with_wrong_keys(self, tmp_path):
        """A recipe file's mistakes are named with the file."""
        path = tmp_path / "mine.yaml"
        path.write_text("modle: resnet18\nbits: 11\n")
        outcome = command("finetune", "--recipe", path, "--output", tmp_path / "out")
        refused(outcome, str(path), "did you mean model?", "bits:", "11", "dataset: missing")

    def test_divergence(self, tmp_path):
        """A loss that is NaN ends with exit code 2 and the step; progress may be printed."""
        outcome = finetune(tmp_path / "out", "--lr", 1e30, "--max-steps", 6)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        assert "\naskewq: the loss is nan at step 1" in outcome.err
        assert not (tmp_path / "out" / "model.safetensors").exists()


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


class TestFinetune:
    def test_the_readme_command(self, tmp_path):
        """Model, bits, data set and output are enough; the table and the folder are printed."""
        words = ["--model", "test_resnet", "--no-pretrained", "--bits", 2, "--epochs", 1]
        outcome = command(
            "finetune", *words, "--dataset", builders.image_folder(), "--output", tmp_path / "out"
        )
        assert outcome.code == 0
        for line in ("full precision", "no training", "before the snap", "reloaded"):
            assert line in outcome.out
        assert str(tmp_path / "out") in outcome.out
        assert "first layer, kept in full precision" in outcome.out
        assert "last layer, kept in full precision" in outcome.out
        assert {"model.safetensors", "metrics.json"} <= files(tmp_path / "out")

    def test_the_progress_bar_is_on_standard_error(self, tmp_path):
        """Loss, lr, radius and the share inside are shown beside the time left."""
        outcome = finetune(tmp_path / "out", "--max-steps", 4)
        assert all(word in outcome.err for word in ("loss=", "lr=", "radius=", "inside="))
        assert "loss=" not in outcome.out

    def test_resume_needs_the_output_only(self, tmp_path):
        """--resume --output DIR finds model and data set in the run's own recipe."""
        folder = copy_of("own", tmp_path)
        before = (folder / "model.safetensors").read_bytes()
        assert command("finetune", "--resume", "--output", folder).code == 0
        assert (folder / "model.safetensors").read_bytes() == before

    def test_a_recipe_and_flags(self, tmp_path):
        """A recipe file gives the settings, flags change some, and the result is written."""
        values = builders.settings("own", tmp_path / "out")
        del values["output"]
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
        flags = ["--output", tmp_path / "out", "--bits", 3]
        assert command("finetune", "--recipe", tmp_path / "mine.yaml", *flags).code == 0
        written = config.build(recipe_files.read_yaml(tmp_path / "out" / "recipe.yaml"))
        assert (written.bits, written.max_steps, written.lr) == (3, 6, 0.05)

    @pytest.mark.parametrize("name", recipe_files.shipped_recipes())
    @pytest.mark.parametrize("method", ["binaryconnect", "askewsgd-paper"])
    def test_a_flag_overrules_what_a_recipe_says_of_its_method(self, name, method, tmp_path):
        """--method goes with every recipe; what the recipe says of another one is passed over."""
        given = {"method": method, "output": tmp_path, "full_precision_steps": 0}
        values = cli._with_recipe(name, given)
        assert config.build(values).method == method
        assert not values.keys() & {"closing", "level_lr", "full_precision_lr"}
        stored = recipe_files.read_yaml(recipe_files.find_recipe(name))
        for key in ("optimizer", "lr"):  # chosen together with level_lr, where there is one
            assert values.get(key) == (None if "level_lr" in stored else stored[key])

    @pytest.mark.parametrize(
        ("stored", "flags", "stay"),
        [
            ({"max_steps": 5}, {"epochs": 2}, []),
            ({"bits": 2, "grid": "half-integer"}, {"bits": "ternary"}, []),
            ({"bits": 2, "grid": "half-integer"}, {"bits": 1}, []),
            ({"bits": 2, "grid": "half-integer"}, {"bits": 4}, ["grid"]),
            ({"epochs": 2}, {"max_steps": 5}, []),
            ({"distill": 0.5, "teacher": "t", "teacher_weights": "w"}, {"distill": 0.0}, []),
            (
                {"distill": 0.5, "distill_hidden": 1.0, "teacher": "t"},
                {"distill": 0.0},
                ["distill_hidden", "teacher"],
            ),
            (
                {"distill": 0.5, "teacher": "t", "teacher_weights": "w"},
                {"teacher": "self"},
                ["distill"],
            ),
            ({"distill": 0.5, "teacher_weights": "w"}, {"teacher": "t"}, ["distill"]),
            (
                {"distill": 0.5, "teacher": None, "teacher_weights": "w"},
                {"teacher": "t"},
                ["distill"],
            ),
            (
                {"distill": 0.5, "teacher": "t", "teacher_weights": "w"},
                {"teacher": "t"},
                ["distill", "teacher_weights"],
            ),
            (
                {"task": "feature-extraction", "teacher": "t"},
                {"distill_hidden": 0.0},
                ["task", "teacher"],
            ),
            ({"closing": "lazy", "close_power": 3, "close_end": 0.9}, {"closing": "single"}, []),
            ({"close_end": 0.8}, {"closing": "lazy"}, ["close_end"]),
            (IN_LEVELS, {"closing": "single"}, []),
            (IN_LEVELS, {"optimizer": "sgd"}, []),
            (IN_LEVELS, {"optimizer": "adamw"}, ["lr", "level_lr"]),
            (IN_LEVELS, {"bits": 1}, ["optimizer", "lr", "level_lr"]),
            ({"optimizer": "sgd", "lr": 0.05}, {"method": "lsq"}, ["optimizer", "lr"]),
            ({"optimizer": "sgd", "lr": 0.05}, {"optimizer": "adamw"}, []),
            ({"lr": 0.05}, {"optimizer": "sgd"}, ["lr"]),
            ({"method": "proxquant", "strength": 0.003}, {"method": "binaryrelax"}, []),
            ({"streaming": True, "shuffle_buffer": 5}, {"streaming": False}, []),
            ({"closing": "single", "pull": None, "alpha": 0.5}, {"pull": "coupled"}, ["closing"]),
            ({"pull": "decoupled", "clip": 0.1}, {"pull": "decoupled"}, ["pull", "clip"]),
            (
                {"method": "askewsgd-paper", "alpha": 5.0},
                {"pull": "coupled"},
                ["method", "alpha"],
            ),
            (
                {"full_precision_steps": 9, "full_precision_lr": 1e-4, "distill": 0.5}
                | {"temperature": 2.0},
                {"task": "feature-extraction"},
                [],
            ),
            ({"epochs": 2, "max_train_samples": 9}, {"streaming": True}, []),
            (
                {"epochs": 2, "max_train_samples": 9},
                {"streaming": False},
                ["epochs", "max_train_samples"],
            ),
        ],
    )
    def test_what_goes_with_another_choice_is_passed_over(self, stored, flags, stay, tmp_path):
        """A stored setting that belongs to what a flag replaces leaves with it; others stay."""
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(stored))
        kept = {key: stored[key] for key in stay}
        assert cli._with_recipe(str(path), flags) == {**kept, **flags}

    def test_what_flags_say_themselves_is_not_passed_over(self, tmp_path):
        """A flag without use is an error, whatever the recipe says."""
        words = ["--recipe", "resnet20-cifar10-1bit", "--method", "lsq", "--level-lr", "0.01"]
        outcome = command("finetune", *words, "--output", tmp_path / "out")
        refused(outcome, "level_lr goes with method")


class TestEval:
    @pytest.mark.parametrize("kind", ["timm", "bert", "llama", "vit"])
    def test_the_last_line_is_one_json_object(self, kind):
        """The last line of standard output holds the metric and the loss."""
        folder, metrics = finished(kind)
        settings = builders.SETTINGS[kind]()
        length = ["--max-length", settings["max_length"]] if "max_length" in settings else []
        outcome = command("eval", folder, "--dataset", settings["dataset"], *length)
        assert outcome.code == 0
        result = json.loads(outcome.out.splitlines()[-1])
        assert result[metrics["metric"]] == pytest.approx(metrics["reloaded"], rel=1e-6)
        assert result.keys() == {metrics["metric"], "loss", "samples"}
        assert result["loss"] > 0
        assert len(outcome.out.splitlines()) == 2

    def test_what_is_out_of_the_ordinary_is_said(self, tmp_path):
        """As by finetune, but where one line is asked for."""
        (tmp_path / "test.csv").write_text("text,label\nNA,neg\ngood film,pos\n")
        words = ("eval", finished("bert")[0], "--dataset", tmp_path)
        outcome = command(*words)
        assert outcome.code == 0, outcome.err
        assert outcome.out.startswith("note: 1 of 2 rows of --eval-split have no text")
        assert len(command(*words, "--json").out.splitlines()) == 1

    def test_json_alone(self):
        """With --json nothing else is printed."""
        folder, metrics = finished("timm")
        outcome = command("eval", folder, "--dataset", builders.image_folder(), "--json")
        (line,) = outcome.out.splitlines()
        assert json.loads(line)["accuracy"] == pytest.approx(metrics["reloaded"])

    def test_a_terminal_shows_no_warnings(self):
        """A new process says nothing but its result, of a language model's artifact too."""
        folder, _ = finished("bert")
        done = python("-m", "askewq", "eval", str(folder), "--dataset", str(builders.text_csv()))
        assert done.returncode == 0
        # torch's own log, such as of an installed torchao that does not fit it, is not ours
        ours = [line for line in done.stderr.splitlines() if not re.match(r"[IWE]\d{4} ", line)]
        assert ours == []

    def test_an_own_module_is_passed_in(self):
        """--model names the user's code."""
        folder, metrics = finished("own")
        words = ["--dataset", builders.image_parquet(), "--model", builders.own("small")]
        outcome = command("eval", folder, *words, "--json")
        assert json.loads(outcome.out)["accuracy"] == metrics["reloaded"]
        refused(command("eval", folder, *words[:2]), "--model path/to/file.py:factory")
        words[-1] = builders.own("ten_classes")
        refused(command("eval", folder, *words), "'8.")

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ([], ["dataset: missing", "--dataset"]),
            (["--dataset", "./nowhere"], ["no such file or folder"]),
            (["--dataset", "IMAGES", "--eval-split", "val"], ["train, validation"]),
            (["--dataset", "IMAGES", "--label-column", "class"], ["image, label"]),
            (["--dataset", "TEXTS"], ["no column looks like an image", "sentence, label"]),
            (["--dataset", "IMAGES", "--bits", 2], ["--bits"]),
        ],
        ids=str,
    )
    def test_wrong_data(self, flags, words):
        """Missing data sets, splits and columns name what there is."""
        known = {"IMAGES": builders.image_folder(), "TEXTS": builders.text_csv()}
        flags = [known.get(flag, flag) for flag in flags]
        refused(command("eval", finished("timm")[0], *flags), *words)

    @pytest.mark.parametrize("kind", ["unknown", "unlabelled"])
    def test_wrong_labels(self, tmp_path, kind):
        """Labels that the model was not made for, or none at all, are refused."""
        images = [(image, -1 if kind == "unlabelled" else y) for image, y in builders.pictures(6)]
        builders.write_images(tmp_path / "test.parquet", images, ["red", "green", "mauve"])
        outcome = command("eval", finished("timm")[0], "--dataset", tmp_path)
        refused(outcome, "mauve; it knows 3" if kind == "unknown" else "no labels (they are -1)")


def damage(folder: Path, how: str) -> None:
    """Damage an artifact."""
    path, config_file = folder / "model.safetensors", folder / "config.json"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "ordinary":
        save_file(load_file(path), path)
    elif how == "other tensors":
        metadata = {"askewq": json.dumps({"version": 1, "weights": {}, "shared": {}})}
        save_file({"a": torch.ones(1)}, path, metadata)
    elif how == "codes":
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith(".codes"))
        del tensors[name]
        manifest = json.dumps(builders.manifest(path))
        save_file(tensors, path, {"askewq": manifest})
    elif how == "newer config":
        content = json.loads(config_file.read_text())
        config_file.write_text(json.dumps({**content, "askewq_version": 4}))
    else:
        config_file.write_text(config_file.read_text()[:200])


DAMAGES = [
    *("truncated", "empty", "missing", "ordinary", "other tensors", "codes"),
    *("newer config", "truncated config"),
]


class TestDamagedArtifacts:
    @pytest.mark.parametrize("how", DAMAGES)
    def test_eval_refuses(self, tmp_path, how):
        """A damaged artifact is not evaluated."""
        folder = copy_of("timm", tmp_path)
        damage(folder, how)
        refused(command("eval", folder, "--dataset", builders.image_folder()))

    @pytest.mark.parametrize("how", [how for how in DAMAGES if how != "other tensors"])
    def test_inspect_refuses(self, tmp_path, how):
        """A damaged artifact is not described."""
        folder = copy_of("timm", tmp_path)
        damage(folder, how)
        refused(command("inspect", folder))

    @pytest.mark.parametrize("name", ["nowhere", "."])
    def test_folders_that_are_no_artifact(self, tmp_path, name):
        """Another folder is refused, saying what to pass."""
        outcome = command("eval", tmp_path / name, "--dataset", builders.image_folder())
        refused(outcome, "not an askewq artifact", "askewq finetune --output")


class TestInspect:
    def test_a_timm_model(self):
        """Every layer is listed with its grid or the reason it stays float, and the size."""
        outcome = command("inspect", "test_resnet", "--bits", 3)
        assert outcome.code == 0
        rows = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
        assert "first layer" in rows["conv1.0"]
        assert "last layer" in rows["fc"]
        assert "3 bits -4..3" in rows["layer1.0.conv1"]
        assert "no weight matrix" in rows["bn1"]
        assert "14 layers" in rows["plan:"]
        assert "packed about" in rows["plan:"]

    def test_needs_no_network_and_no_weights(self):
        """The plan of a pretrained model is shown though its weights are out of reach."""
        assert command("inspect", "resnet50").code == 0

    @pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
    def test_a_hugging_face_folder(self, kind):
        """A local folder is inspected without its weights."""
        outcome = command("inspect", getattr(builders, kind)())
        assert outcome.code == 0
        assert "2 bits -1.5..1.5" in outcome.out

    def test_an_own_module(self):
        """The user's own network is inspected, with patterns applied."""
        outcome = command("inspect", builders.own("small"), "--exclude", "2", "--group-size", 4)
        rows = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
        assert "excluded by '2'" in rows["2"]
        assert "2 bits -1.5..1.5 per group 4" in rows["6"]

    def test_other_bits(self):
        """Overrides may be repeated, and the table shows what comes of them."""
        flags = ["--bits-override", "layer1.*=8", "--bits-override", "layer2.*=ternary"]
        outcome = command("inspect", "test_resnet", *flags)
        rows = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
        assert "8 bits -128..127" in rows["layer1.0.conv1"]
        assert "ternary -1..1" in rows["layer2.0.conv1"]
        assert "2 bits -1.5..1.5" in rows["layer3.0.conv1"]

    def test_what_will_not_work(self):
        """Before any training: the layers that stay float with their reason, and the share."""
        outcome = command("inspect", "test_nfnet")
        assert outcome.code == 0
        reason = "ScaledStdConv2d transforms its weight before use"
        assert f"float: stem.conv1 (ScaledStdConv2d): {reason}" in outcome.out
        rows = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
        assert reason in rows["stages.0.0.conv3"]  # its gain is zero at first

    def test_a_model_that_will_not_work_at_all(self):
        """A network of nothing but such layers is refused, and its layers say why."""
        outcome = command("inspect", builders.own("standardised"))
        refused(outcome, "none of the model's 3 layers", "StdConv2d transforms its weight")

    def test_names_are_whole_when_piped(self):
        """Without a terminal no layer's name and no reason is folded into the next line."""
        outcome = command("inspect", builders.bert())
        name = "bert.encoder.layer.1.attention.output.dense"
        (line,) = [line for line in outcome.out.splitlines() if line.startswith(name + " ")]
        assert "2 bits -1.5..1.5 per channel" in line

    @pytest.mark.parametrize("kind", ["own", "timm", "llama"])
    def test_an_artifact(self, kind):
        """An artifact's packed weights are listed with bits, scales and bytes."""
        folder, metrics = finished(kind)
        outcome = command("inspect", folder)
        assert outcome.code == 0
        packed = checkpoint.read(folder / "model.safetensors")
        assert all(name in outcome.out for name in packed.weights)
        assert f"{metrics['parameters']['quantized']:,} parameters" in outcome.out
        assert f"{metrics['bits_per_weight']:.2f} bits a weight" in outcome.out

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["resnt50"], "did you mean resnet50"),
            (["./nowhere"], "no config.json"),
            (["nowhere.py:f"], "there is no file"),
            (["test_resnet", "--include", "layer9.*"], "matches no layer"),
            (["test_resnet", "--exclude", "*"], "can be quantized"),
            (["test_resnet", "--bits", "9"], "--bits"),
            (["test_resnet", "--bits-override", "fc=9"], "'fc=9' must be PATTERN=B"),
            (["test_resnet", "--bits-override", "layer9.*=4"], "matches no layer"),
            (["test_resnet", "--bits-override", "fc=8"], "the override fc=8 changes nothing"),
            (
                ["test_resnet", "--bits-override", "layer1.*=8", "--bits-override", "*.conv1=4"],
                "contradict each other on layer1.0.conv1",
            ),
            (["test_resnet", "--bits", "1", "--grid", "half-integer"], "half-integer"),
            ([], "requires an argument"),
        ],
        ids=str,
    )
    def test_refuses(self, words, expected):
        """Unknown models, patterns and widths end with exit code 2."""
        refused(command("inspect", *words), expected)


TOO_LONG = "a" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", TOO_LONG),
        ("eval", TOO_LONG, "--dataset", "x"),
        ("recipes", "show", TOO_LONG),
        ("finetune", "--model", TOO_LONG, "--bits", 2, "--dataset", "x", "--output", "out"),
        ("finetune", "--recipe", TOO_LONG),
    ],
    ids=lambda words: " ".join(map(str, words[:2])).replace(TOO_LONG, "it"),
)
def test_a_name_that_no_file_can_have(words, tmp_path, monkeypatch):
    """It is said to be too long, whatever it should have named."""
    monkeypatch.chdir(tmp_path)
    refused(command(*words), TOO_LONG, "cannot be opened: File name too long.")
    assert not files(tmp_path)


class TestRecipes:
    def test_ls(self):
        """Each recipe has a line with what it is for."""
        outcome = command("recipes", "ls")
        lines = outcome.out.splitlines()
        assert [line.split()[0] for line in lines] == list(recipe_files.shipped_recipes())
        assert all(len(line.split()) > 3 for line in lines)

    def test_show(self):
        """A recipe is printed as it is in its file."""
        name, path = next(iter(recipe_files.shipped_recipes().items()))
        assert command("recipes", "show", name).out == path.read_text(encoding="utf-8")

    def test_show_what_is_no_text(self, tmp_path):
        """It is said to be none."""
        (tmp_path / "weights").write_bytes(b"\xff\xfe\x00")
        refused(command("recipes", "show", tmp_path / "weights"), "cannot be read")

    @pytest.mark.parametrize("as_folder", [True, False])
    def test_cp(self, tmp_path, as_folder):
        """A copy goes to a file or into a folder, and its path is printed."""
        name, path = next(iter(recipe_files.shipped_recipes().items()))
        target = tmp_path / (path.name if as_folder else "mine.yaml")
        outcome = command("recipes", "cp", name, tmp_path if as_folder else target)
        assert outcome.code == 0
        assert outcome.out.strip() == str(target)
        assert target.read_bytes() == path.read_bytes()

    def test_cp_keeps_what_is_there(self, tmp_path):
        """An existing file is not overwritten, and a missing folder is not made."""
        name, path = next(iter(recipe_files.shipped_recipes().items()))
        (tmp_path / path.name).write_text("mine")
        for target in (tmp_path, tmp_path / path.name):
            refused(command("recipes", "cp", name, target), str(tmp_path / path.name), "exists")
        refused(command("recipes", "cp", name, tmp_path / "a" / "b.yaml"), "does not exist")
        assert files(tmp_path) == {path.name}
        assert (tmp_path / path.name).read_text() == "mine"

    @pytest.mark.parametrize("words", [["show", "nope"], ["cp", "nope", "x.yaml"]])
    def test_unknown_names(self, words):
        """An unknown recipe lists those there are."""
        refused(command("recipes", *words), "no recipe 'nope'", *recipe_files.shipped_recipes())


def python(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run python in a process of its own, with this environment and some more variables."""
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=variables, check=False
    )


class TestProcess:
    @pytest.mark.parametrize("words", [["--help"], ["finetune", "--help"], ["recipes", "ls"]])
    def test_help_imports_no_heavy_library(self, words):
        """Help and the list of recipes wait for no torch."""
        heavy = ["torch", "timm", "transformers", "datasets", "accelerate", "numpy"]
        code = (
            "import sys\n"
            f"sys.argv = ['askewq', *{words!r}]\n"
            "from askewq.cli import main\n"
            "try:\n    main()\n"
            "except SystemExit as end:\n    assert not end.code, end.code\n"
            f"print([name for name in {heavy!r} if name in sys.modules])\n"
        )
        done = python("-c", code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
        assert len(done.stdout.splitlines()) > 2

    @pytest.mark.parametrize(
        "words", [["--help"], ["recipes", "ls"], ["recipes", "show", "minilm-sst2-2bit"]]
    )
    @pytest.mark.parametrize("buffered", ["", "1"])
    def test_a_pipe_that_nobody_reads(self, words, buffered):
        """`askewq ... | head` ends without a traceback, wherever the pipe is found closed."""
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as pipe:
            done = subprocess.run(
                [sys.executable, "-m", "askewq", *words],
                stdout=pipe,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": buffered},
                check=False,
            )
        assert (done.returncode, done.stderr) == (1, "")

    def test_python_m_askewq(self):
        """`python -m askewq` is the same command, exit code and message included."""
        done = python("-m", "askewq", "recipes", "show", "nope")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("askewq: there is no recipe 'nope'")

    def test_one_of_several_ends_whatever_its_threads_do(self):
        """A thread in torch's C++ when the interpreter shuts down aborts the process otherwise."""
        code = (
            "import sys, threading, torch\n"
            "def busy():\n    while True: torch.ones(300, 300) @ torch.ones(300, 300)\n"
            "threading.Thread(target=busy, daemon=True).start()\n"
            "from askewq.cli import main\n"
            "sys.argv = ['askewq', 'recipes', 'ls']\n"
            "main()\n"
        )
        done = python("-c", code, WORLD_SIZE="2")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == command("recipes", "ls").out

    def test_the_launchers_file(self):
        """cli.py, which `accelerate launch` points at, is the same command."""
        path = Path(__file__).parent.parent / "cli.py"
        assert python(str(path), "recipes", "ls").stdout == command("recipes", "ls").out

    def test_version(self):
        """--version prints the package's version."""
        import askewq

        assert command("--version").out.strip() == askewq.__version__


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("inspect", "m", "--bits", 3.7), "--bits"),
        (("plan", "--candidates", 2.9, 4), '--candidates: "2.9"'),
        (("plan", "--samples", 2.9), "--samples"),
        (("export", "m", "--to", "onnx", "--output", "o", "--image-size", 32.9), "--image-size"),
        (("finetune", "--num-processes", 2.5), "--num-processes"),
    ],
)
def test_numbers_that_are_not_whole(words, told):
    """No command rounds them."""
    refused(command(*words), told, "must be")


def test_a_recipe_that_cannot_be_copied(monkeypatch, tmp_path):
    """The message names the place, and nothing is left there."""

    def copyfile(source, target):
        Path(target).write_text("half")
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(cli.shutil, "copyfile", copyfile)
    outcome = command("recipes", "cp", "minilm-sst2-2bit", tmp_path / "x.yaml")
    refused(outcome, f"{tmp_path / 'x.yaml'} cannot be written", "Permission denied")
    assert files(tmp_path) == set()
