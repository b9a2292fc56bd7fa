"""Fine-tuning from end to end on tiny models: the files, the figures, and going on after a cut."""

import copy
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import accelerate
import builders
import pytest
import torch
from builders import files, finetune, finished
from PIL import Image
from safetensors.torch import load_file, save_file

import askewq
from askewq import (
    checkpoint,
    config,
    disk,
    loop,
    output,
    processes,
    recipe_files,
    train,
    training_state,
    wrap,
)
from askewq.errors import (
    DivergenceError,
    ExactnessError,
    ModelError,
    OutputError,
    RecipeError,
)
from askewq.evaluate import evaluate_artifact
from askewq.grid import channels_first
from askewq.kernels import can_compile

KINDS = sorted(builders.SETTINGS)
ALWAYS = {"model.safetensors", "config.json", "recipe.yaml", "metrics.json", "README.md"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
EXTRA_FILES = {
    "bert": TOKENIZER,
    "bert-pairs": TOKENIZER,
    "encoder": TOKENIZER,
    "llama": TOKENIZER,
    "gpt2": TOKENIZER,
    "vit": {"preprocessor_config.json"},
    "vit-encoder": {"preprocessor_config.json"},
}


@pytest.fixture(autouse=True)
def _fresh():
    """Leave no precision behind for other tests."""
    builders.new_process()
    yield
    builders.new_process()


def digest(folder: Path) -> str:
    """Return the SHA-256 of a run's packed file."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def packed(folder: Path) -> checkpoint.Artifact:
    """Read a run's packed file."""
    return checkpoint.read(folder / "model.safetensors")


def on_levels(folder: Path) -> bool:
    """Tell whether every packed weight is a level of its grid times its scale."""
    for weight in packed(folder).weights.values():
        first = channels_first(weight.dense(), weight.channel_dim)
        rows = first.reshape(weight.scale.numel(), -1) / weight.scale.reshape(-1, 1)
        levels = weight.grid.levels()
        if not (rows[..., None] - levels).abs().amin(-1).lt(1e-4).all():
            return False
    return bool(packed(folder).weights)


class TestEveryModelAndTask:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_reloaded_model_is_the_evaluated_one(self, kind):
        """The figure of the reloaded file is the figure of the snapped model, exactly."""
        _, metrics = finished(kind)
        assert metrics["reloaded"] == metrics["snapped"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_folder_is_complete(self, kind):
        """A run leaves the artifact, its description and its checkpoints, and nothing partial."""
        folder, _ = finished(kind)
        found = files(folder)
        assert {f for f in found if "/" not in f} == ALWAYS | EXTRA_FILES.get(kind, set())
        taught = {"checkpoints/teacher.safetensors"} if "encoder" in kind else set()
        found = {f for f in found if "/" in f}
        assert taught == {f for f in found if not f.startswith("checkpoints/step-0")}
        assert not any("partial" in f for f in found)

    @pytest.mark.parametrize("kind", KINDS)
    def test_metrics_have_the_documented_keys(self, kind):
        """metrics.json holds exactly what is documented, and is what finetune returns."""
        folder, metrics = finished(kind)
        assert json.loads((folder / "metrics.json").read_text()) == metrics
        assert metrics.keys() == {
            *("model", "task", "bits", "method", "metric", "full_precision", "rounded", "relaxed"),
            *("snapped", "reloaded", "parameters", "bytes", "bits_per_weight", "steps", "seconds"),
            *("skipped_steps", "act_bits", "bits_override"),
            *("step_seconds", "peak_memory_bytes", "inside_interval", "polish_steps"),
        }
        assert metrics["parameters"].keys() == {"total", "quantized", "share"}
        assert metrics["bytes"].keys() == {"full_precision", "packed"}

    @pytest.mark.parametrize("kind", KINDS)
    def test_metrics_are_plausible(self, kind):
        """Figures have their units: percent, bytes, seconds."""
        _, metrics = finished(kind)
        figures = [metrics[k] for k in ("full_precision", "rounded", "relaxed", "snapped")]
        if metrics["metric"] != "perplexity":
            assert all(0 <= figure <= 100 for figure in figures)
            assert (metrics["metric"] == "similarity") == ("encoder" in kind)
            assert metrics["task"] != "causal-lm"
        else:
            assert all(1 < figure < 100 for figure in figures)  # a vocabulary of 14 words
            assert metrics["task"] == "causal-lm"
        assert (metrics["bits"], metrics["method"], metrics["steps"]) == (2, "askewsgd", 6)
        assert 0 < metrics["step_seconds"] <= metrics["seconds"] < 600
        assert 10**7 < metrics["peak_memory_bytes"] < 10**11
        assert 0 <= metrics["inside_interval"] <= 1

    @pytest.mark.parametrize("kind", KINDS)
    def test_sizes_are_those_of_the_file_and_the_network(self, kind):
        """Parameter counts and bytes are counted again, from the file and the plain network."""
        folder, metrics = finished(kind)
        artifact = packed(folder)
        network = plain_network(kind)
        quantized = sum(math.prod(w.shape) for w in artifact.weights.values())
        codes_and_scales = sum(w.codes.nbytes + w.scale.nbytes for w in artifact.weights.values())
        assert metrics["bits_per_weight"] == pytest.approx(8 * codes_and_scales / quantized)
        total = sum(p.numel() for p in network.parameters())
        assert metrics["parameters"]["total"] == total
        assert metrics["parameters"]["quantized"] == quantized
        assert metrics["parameters"]["share"] == pytest.approx(quantized / total)
        assert metrics["bytes"]["packed"] == (folder / "model.safetensors").stat().st_size
        unique = {t.data_ptr(): t.nbytes for t in network.state_dict().values()}
        assert metrics["bytes"]["full_precision"] == sum(unique.values())

    def test_full_precision_has_no_scales_of_inputs(self, tmp_path):
        """Its size is the same whether inputs are rounded or not."""
        plain, rounded = (
            finetune("own", tmp_path / str(bits), act_bits=bits)["bytes"] for bits in ("none", 4)
        )
        assert plain["full_precision"] == rounded["full_precision"]
        assert plain["packed"] < rounded["packed"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_packed_weights_sit_on_their_levels(self, kind):
        """Every packed weight is one of four levels times its scale."""
        folder, _ = finished(kind)
        assert on_levels(folder)
        assert {w.grid.bits for w in packed(folder).weights.values()} == {2}

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_recipe_is_written_with_every_choice_made(self, kind):
        """recipe.yaml reads back as a recipe, says what was guessed, and gives the same run."""
        folder, metrics = finished(kind)
        recipe = config.build(recipe_files.read_yaml(folder / "recipe.yaml"))
        given = builders.recipe(kind, folder)
        assert all(getattr(recipe, key) == getattr(given, key) for key in given.model_fields_set)
        assert recipe.task == metrics["task"]
        assert recipe.optimizer == ("sgd" if kind == "own" else "adamw")
        assert recipe.level_lr == (0.005 if kind in ("timm", "timm-encoder") else None)
        assert None not in (recipe.lr, recipe.close_power)
        assert recipe.full_precision_lr is None  # the run has no such steps

    @pytest.mark.parametrize("kind", ["own", "llama"])
    def test_the_written_recipe_repeats_the_run(self, tmp_path, kind):
        """The recipe of a run, with another output, gives the very same file."""
        folder, _ = finished(kind)
        values = recipe_files.read_yaml(folder / "recipe.yaml")
        train.finetune(config.build({**values, "output": str(tmp_path / "again")}))
        assert digest(tmp_path / "again") == digest(folder)

    def test_tied_weights_of_a_language_model(self):
        """The output matrix that is the embedding is stored once, in full precision."""
        folder, _ = finished("llama")
        artifact = packed(folder)
        assert artifact.shared == {"lm_head.weight": "model.embed_tokens.weight"}
        model = askewq.load(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_tied_weights_on_a_grid(self, tmp_path):
        """Two Linears that share a weight are trained, packed and restored as one."""
        metrics = finetune("own", tmp_path, model=builders.own("tied"))
        assert packed(tmp_path).shared == {"two.weight": "one.weight"}
        assert packed(tmp_path).weights.keys() == {"one.weight"}
        assert metrics["parameters"]["quantized"] == 144


def plain_network(kind: str) -> torch.nn.Module:
    """Return the plain network of a finished run."""
    folder, _ = finished(kind)
    if kind == "own":
        return askewq.load(folder, model=builders.own_network("small"))
    return askewq.load(folder)


class TestFigures:
    def test_first_figures_are_those_of_the_given_weights(self, tmp_path):
        """full_precision and rounded are the pretrained model and its nearest rounding."""
        weights = builders.own_module() / "small.safetensors"
        metrics = finetune("own", tmp_path, weights=str(weights), bits=3, max_steps=2)
        network = builders.own_network("small")
        network.load_state_dict(load_file(weights))
        by_hand = []
        for rounded in (False, True):
            if rounded:
                wrap.quantize(network, 3)
                askewq.snap_(network)
            by_hand.append(accuracy_by_hand(network))
        assert [metrics["full_precision"], metrics["rounded"]] == pytest.approx(by_hand)

    @pytest.mark.parametrize("closing", ["lazy", "staggered"])
    def test_all_weights_are_closed_at_the_end(self, tmp_path, closing):
        """Once the closing has ended, the snap changes nothing."""
        metrics = finetune("own", tmp_path, max_steps=20, closing=closing)
        assert metrics["inside_interval"] == 1.0
        assert metrics["relaxed"] == metrics["snapped"]

    def test_the_network_learns(self, tmp_path):
        """Two bits suffice for three colours, where rounding alone fails."""
        metrics = finetune("own", tmp_path, max_steps=150, full_precision_steps=100, batch_size=16)
        assert metrics["full_precision"] > 90
        assert metrics["snapped"] > 90
        assert metrics["steps"] == 250

    def test_full_precision_steps_come_first(self, tmp_path):
        """The full-precision figure is that of the network after its ordinary fine-tuning."""
        metrics = finetune("own", tmp_path, full_precision_steps=100, full_precision_lr=0.1)
        _, without = finished("own")
        assert metrics["full_precision"] > without["full_precision"]
        assert metrics["steps"] == 106

    @pytest.mark.parametrize(("epochs", "steps"), [(1.5, 5), (1.1, 4), (0.7, 3), (0.1, 1)])
    def test_epochs_count_passes(self, tmp_path, epochs, steps):
        """Without --max-steps the steps are the epochs times the batches, per accumulation."""
        settings = {"max_steps": None, "epochs": epochs, "grad_accumulation": 2}
        assert finetune("own", tmp_path, **settings)["steps"] == steps

    def test_epochs_are_counted_in_decimals(self, tmp_path):
        """In binary 0.28 times 25 batches is more than 7."""
        assert math.ceil(0.28 * 25) == 8
        builders.write_images(tmp_path / "train.parquet", builders.pictures(50))
        builders.write_images(tmp_path / "test.parquet", builders.pictures(6))
        settings = {"max_steps": None, "epochs": 0.28, "batch_size": 2, "dataset": str(tmp_path)}
        assert finetune("own", tmp_path / "out", **settings)["steps"] == 7

    def test_the_figures_come_from_the_evaluation_split(self, tmp_path):
        """Evaluating the artifact on another split gives that split's figure."""
        finetune("own", tmp_path, max_steps=30, max_eval_samples=7, eval_split="test")
        recipe = builders.recipe("own", tmp_path, eval_split="train")
        assert evaluate_artifact(tmp_path, recipe, factory=builders.own("small")).samples == 48


def accuracy_by_hand(network: torch.nn.Module) -> float:
    """Return the accuracy of one of the user's own networks on the test images."""
    from askewq.preprocessing import ImagePreprocessing

    prepared = ImagePreprocessing()
    hits = []
    network.eval()
    for image, label in builders.pictures(24, seed=1):
        with torch.no_grad():
            hits.append(int(network(prepared.batch(prepared.image(image)[None])).argmax()) == label)
    return 100 * sum(hits) / len(hits)


class TestSettings:
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    @pytest.mark.parametrize("pull", ["coupled", "decoupled"])
    @pytest.mark.parametrize("closing", ["staggered", "single"])
    def test_every_way_of_closing(self, tmp_path, closing, pull, optimizer):
        """Closings that pull, and both pulls, work with both optimizers, and end on the grid."""
        settings = {"closing": closing, "pull": pull, "optimizer": optimizer, "lr": 0.02}
        if pull == "coupled":
            settings["alpha"] = 20.0
        metrics = finetune("own", tmp_path, **settings, weight_decay=0.01)
        assert metrics["reloaded"] == metrics["snapped"]
        assert on_levels(tmp_path)
        state = optimizer_state(tmp_path)
        assert ("momentum_buffer" in state) == (optimizer == "sgd")
        assert ("exp_avg" in state) == (optimizer == "adamw")

    @pytest.mark.parametrize(
        "change",
        [
            {"closing": "single"},
            {"pull": "coupled"},
            {"alpha": 0.1},
            {"clip": 0.01},
            {"close_power": 1.0},
            {"close_end": 0.5},
            {"close_start": 0.4},
            {"close_every": 1},
            {"optimizer": "adamw"},
            {"momentum": 0.0},
            {"weight_decay": 0.1},
            {"lr": 0.01},
            {"lr_hold": 0.0},
            {"seed": 1},
            {"batch_size": 16},
            {"grad_accumulation": 2},
            {"augment": "crop-flip"},
            {"mixed_precision": "bf16"},
            {"full_precision_steps": 2},
            {"grid": "integer"},
            {"max_train_samples": 20},
            {"image_size": 12},
            {"mean": [0.5] * 3, "std": [0.5] * 3},
            {"distill": 0.5},
            {"temperature": 4.0},
            {"strength": 0.3},
            {"gradient_bits": 4},
        ],
        ids=str,
    )
    def test_every_setting_makes_a_difference(self, tmp_path, change):
        """A run that differs in one setting ends with other weights, and the same run does not."""
        base = {"seed": 0, "max_steps": 8, "closing": "staggered"}
        if change.keys() & {"clip", "alpha", "pull"}:  # what these do shows off the grid alone
            base |= {"closing": "single", "final_radius": 0.3}
        if "temperature" in change:
            base |= {"distill": 0.5}
        if other := {"strength": "proxquant", "gradient_bits": "luq"}.get(next(iter(change))):
            base = {"seed": 0, "max_steps": 8, "method": other}
        reference = reference_run(tuple(base.items()))
        finetune("own", tmp_path, **{**base, **change})
        assert digest(tmp_path) != digest(reference)

    def test_the_rate_of_every_step(self, tmp_path, monkeypatch):
        """Held until `lr_hold`, then a cosine; the first step has all of it, the last one some."""
        seen, original = [], loop.Loop._step

        def step(self, model, optimizer, batches, number):
            seen.append(optimizer.param_groups[-1]["lr"])
            return original(self, model, optimizer, batches, number)

        monkeypatch.setattr(loop.Loop, "_step", step)
        finetune("own", tmp_path, max_steps=8, lr=0.05, lr_hold=0.5)
        late = [0.025 * (1 + math.cos(math.pi * (i / 8 - 0.5) / 0.5)) for i in range(4, 8)]
        assert seen == pytest.approx([0.05] * 4 + late)

    def test_the_seed_decides_the_order_of_the_data(self, tmp_path):
        """Runs from the same weights differ by their seed alone."""
        weights = str(builders.own_module() / "small.safetensors")
        for seed in (0, 1):
            finetune("own", tmp_path / str(seed), weights=weights, seed=seed)
        assert digest(tmp_path / "0") != digest(tmp_path / "1")

    def test_two_seeds_have_no_order_in_common(self, tmp_path, monkeypatch):
        """An epoch of one is no epoch of the other."""
        seen, original = {0: [], 1: []}, loop.Loop._step

        def step(self, model, optimizer, micro, number):
            seen[self.recipe.seed].append(micro[0]["pixel_values"].numpy().tobytes())
            return original(self, model, optimizer, micro, number)

        monkeypatch.setattr(loop.Loop, "_step", step)
        for seed in (0, 1):
            finetune("own", tmp_path / str(seed), seed=seed, epochs=3, max_steps=None)
        steps = len(seen[0]) // 3
        epochs = [seen[seed][i * steps : (i + 1) * steps] for seed in (0, 1) for i in range(3)]
        assert steps > 1
        assert len({tuple(epoch) for epoch in epochs}) == 6

    def test_the_same_run_twice_gives_the_same_bytes(self, tmp_path):
        """Nothing but the recipe decides the result."""
        torch.manual_seed(123)
        finetune("own", tmp_path)
        assert digest(tmp_path) == digest(finished("own")[0])

    @pytest.mark.parametrize(
        ("bits", "grid"),
        [
            (1, "integer"),
            ("ternary", "integer"),
            (2, "half-integer"),
            (3, "integer"),
            (4, "half-integer"),
            (8, "integer"),
        ],
    )
    def test_bit_widths(self, tmp_path, bits, grid):
        """Every width trains, packs at its size and reloads exactly."""
        metrics = finetune("own", tmp_path, bits=bits, grid=grid)
        assert on_levels(tmp_path)
        assert metrics["reloaded"] == metrics["snapped"]
        for weight in packed(tmp_path).weights.values():
            assert weight.grid == askewq.make_grid(bits, grid)
            per_code = 1.6 if bits == "ternary" else bits
            assert weight.codes.numel() == math.ceil(math.prod(weight.shape) * per_code / 8)

    @pytest.mark.parametrize(
        ("group_size", "scales"),
        [
            ("channel", {"2.weight": [8, 1], "6.weight": [16, 1]}),
            ("tensor", {"2.weight": [1, 1], "6.weight": [1, 1]}),
            (8, {"2.weight": [8, 9], "6.weight": [16, 4]}),
            (32, {"2.weight": [8, 1], "6.weight": [16, 1]}),  # 32 does not divide 72
        ],
    )
    def test_group_sizes(self, tmp_path, group_size, scales):
        """The file has the scales that the group size asks for."""
        finetune("own", tmp_path, group_size=group_size, max_steps=2)
        weights = packed(tmp_path).weights
        assert {name: list(w.scale.shape) for name, w in weights.items()} == scales

    @pytest.mark.parametrize(
        ("selection", "names"),
        [
            ({}, ["2", "6"]),
            ({"exclude": ["2"]}, ["6"]),
            ({"include": ["*"]}, ["0", "2", "6", "8"]),
            ({"include": ["0", "8"], "exclude": ["8"]}, ["0"]),
        ],
        ids=str,
    )
    def test_selections(self, tmp_path, selection, names):
        """Patterns decide which layers are packed; all others keep their float weights."""
        finetune("own", tmp_path, **selection, max_steps=2)
        artifact = packed(tmp_path)
        assert artifact.weights.keys() == {f"{name}.weight" for name in names}
        assert artifact.tensors["0.bias"].dtype == torch.float32

    def test_overrides(self, tmp_path):
        """The file has the bits that the overrides ask for, and the recipe says so."""
        finetune("own", tmp_path, include=["*"], bits_override=["8=8", "[02]=ternary"], max_steps=2)
        bits = {name: weight.grid.bits for name, weight in packed(tmp_path).weights.items()}
        assert bits == {
            "0.weight": "ternary", "2.weight": "ternary", "6.weight": 2, "8.weight": 8
        }  # fmt: skip
        stored = recipe_files.read_yaml(tmp_path / "recipe.yaml")
        assert stored["bits_override"] == ["8=8", "[02]=ternary"]

    def test_a_method_is_told_of_every_width(self, tmp_path):
        """A method that cannot do the bits of an override refuses before anything is written."""
        wrong = {"bits": 1, "method": "adaste", "bits_override": ["2=4"]}
        with pytest.raises(RecipeError, match="adaste trains 1 bit, not the override 2=4"):
            finetune("own", tmp_path / "out", **wrong)
        assert not (tmp_path / "out").exists()

    def test_accumulated_micro_steps_are_one_step(self, tmp_path):
        """Two micro-steps of eight make the step of one batch of sixteen, up to rounding."""
        common = {"closing": "single", "final_radius": 0.4, "max_steps": 5, "bits": 4}
        finetune("own", tmp_path / "two", batch_size=8, grad_accumulation=2, **common)
        finetune("own", tmp_path / "one", batch_size=16, **common)
        finetune("own", tmp_path / "other", batch_size=8, **common)
        two, one, other = (packed(tmp_path / name) for name in ("two", "one", "other"))
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-4, atol=1e-5)
        assert any(
            not torch.allclose(other.tensors[name], tensor, rtol=1e-4, atol=1e-5)
            for name, tensor in one.tensors.items()
        )
        for name, weight in one.weights.items():
            same = (two.weights[name].dense() == weight.dense()).float().mean()
            assert same > 0.99

    @pytest.mark.parametrize("phase", ["full precision", "low-bit"])
    def test_bf16_is_on_in_both_phases(self, tmp_path, monkeypatch, phase):
        """Mixed precision reaches the layers before and after they get their grid."""
        seen = []
        original = loop.Loop._step

        def step(self, model, optimizer, batches, number):
            hook = self.model[2].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
            loss = original(self, model, optimizer, batches, number)
            hook.remove()
            return loss

        monkeypatch.setattr(loop.Loop, "_step", step)
        settings = {"full_precision_steps": 2, "max_steps": 2, "mixed_precision": "bf16"}
        finetune("own", tmp_path, **settings)
        assert len(seen) == 4
        assert set(seen[:2] if phase == "full precision" else seen[2:]) == {torch.bfloat16}

    @pytest.mark.parametrize("kind", ["own", "timm-vit", "bert-pairs", "llama", "vit"])
    def test_bf16(self, tmp_path, kind):
        """Under autocast master weights stay float32 and the reload is exact all the same."""
        metrics = finetune(kind, tmp_path, mixed_precision="bf16", full_precision_steps=2)
        assert metrics["reloaded"] == metrics["snapped"]
        dense = packed(tmp_path).dense_state()
        assert {t.dtype for t in dense.values() if t.is_floating_point()} == {torch.float32}

    @pytest.mark.parametrize("method", ["askewsgd", "lsq", "proxquant"])
    def test_a_compiled_network_is_compiled_once(self, tmp_path, method):
        """No step compiles again, whatever coefficient changes; the weights are the eager ones."""
        settings = {"method": method, "max_steps": 6, "bits": 4}
        assert can_compile("cpu"), "without a compiler this test compares nothing"
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        finetune("own", tmp_path / "compiled", **settings, compile=True)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        finetune("own", tmp_path / "eager", **settings)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        compiled, eager = (packed(tmp_path / name) for name in ("compiled", "eager"))
        for name, tensor in eager.tensors.items():
            torch.testing.assert_close(compiled.tensors[name], tensor, rtol=1e-3, atol=1e-4)

    def test_compiling_without_a_compiler(self, tmp_path, monkeypatch):
        """Where torch.compile fails, --compile is an error before anything is written."""
        monkeypatch.setattr(train, "can_compile", lambda device: False)
        with pytest.raises(RecipeError, match=r"torch\.compile does not work here"):
            finetune("own", tmp_path / "out", compile=True)
        assert not (tmp_path / "out").exists()

    def test_a_process_can_run_more_than_one_precision(self, tmp_path):
        """A notebook may fine-tune with bf16 after a run without, and back."""
        for i, precision in enumerate(("no", "bf16", "no")):
            finetune("own", tmp_path / str(i), mixed_precision=precision, max_steps=1)

    def test_weights_of_a_timm_model(self, tmp_path):
        """A timm model starts from a state dict of the user's."""
        source = askewq.load(finished("timm")[0])
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        settings = {"pretrained": True, "weights": str(tmp_path / "w.safetensors")}
        metrics = finetune("timm", tmp_path / "out", **settings, max_steps=1)
        assert metrics["full_precision"] == finished("timm")[1]["reloaded"]

    def test_a_head_with_its_labels_in_another_order(self, tmp_path):
        """A model that knows the labels keeps what it knows, from full data and from a stream."""
        import transformers

        torch.manual_seed(0)
        knowing = transformers.ViTForImageClassification.from_pretrained(
            builders.vit(), num_labels=3, ignore_mismatched_sizes=True
        )
        order = (2, 0, 1)
        names = [list(builders.COLOURS)[i] for i in order]
        knowing.config.id2label = dict(enumerate(names))
        knowing.config.label2id = {name: i for i, name in enumerate(names)}
        shutil.copytree(builders.vit(), tmp_path / "knowing")
        knowing.save_pretrained(tmp_path / "knowing")
        back = torch.tensor([names.index(name) for name in builders.COLOURS])
        plain = copy.deepcopy(knowing)
        with torch.no_grad():
            plain.classifier.weight.copy_(knowing.classifier.weight[back])
            plain.classifier.bias.copy_(knowing.classifier.bias[back])
        plain.config.id2label = dict(enumerate(builders.COLOURS))
        plain.config.label2id = {name: i for i, name in enumerate(builders.COLOURS)}
        shutil.copytree(builders.vit(), tmp_path / "plain")
        plain.save_pretrained(tmp_path / "plain")
        pixels = torch.randn(4, 3, 16, 16)
        for streaming in (False, True):
            logits = {}
            for name in ("knowing", "plain"):
                out = tmp_path / f"{name}-{streaming}"
                finetune("vit", out, model=str(tmp_path / name), streaming=streaming)
                logits[name] = askewq.load(out)(pixels).logits
            torch.testing.assert_close(logits["knowing"][:, back], logits["plain"])

    def test_texts_longer_than_the_model_knows(self, tmp_path):
        """--max-length beyond the table of positions is refused before anything is written."""
        with pytest.raises(ModelError, match=r"text of 40 tokens .*smaller --max-length"):
            finetune("bert", tmp_path / "out", max_length=40)
        assert not (tmp_path / "out").exists()

    def test_a_tracker_that_is_not_installed(self, tmp_path, monkeypatch):
        """Is named with what to install; the run does not go on without it."""
        import accelerate.utils

        monkeypatch.setattr(accelerate.utils, "is_wandb_available", lambda: False)
        with pytest.raises(RecipeError, match=r"pip install 'askewq\[wandb\]'"):
            finetune("own", tmp_path / "out", report_to="wandb")
        assert not (tmp_path / "out").exists()

    def test_tensorboard(self, tmp_path):
        """--report-to tensorboard writes an events file below the output."""
        finetune("own", tmp_path, report_to="tensorboard", eval_every=3)
        events = [f for f in files(tmp_path) if "events.out.tfevents" in f]
        assert events
        assert all(f.startswith("logs/") for f in events)


def reference_run(base: tuple) -> Path:
    """Return the folder of a run that others are compared with, made once."""
    name = hashlib.sha256(repr(base).encode()).hexdigest()[:8]
    folder = builders.ROOT / f"reference-{name}"
    if not folder.exists():
        finetune("own", folder, **dict(base))
    return folder


def optimizer_state(folder: Path) -> set[str]:
    """Return the names of the optimizer's state in the newest checkpoint."""
    newest = max((folder / "checkpoints").iterdir())
    return {key.partition(".")[2] for key in load_file(newest / "optimizer.safetensors")}


RESUMED = {
    "sgd": ("own", {}),
    "sgd, dropout, augmentation": (
        "own",
        {"model": builders.own("with_dropout"), "augment": "crop-flip", "max_train_samples": 40},
    ),
    "adamw, one radius": ("own", {"optimizer": "adamw", "lr": 0.01, "closing": "single"}),
    "random numbers of Python and numpy": ("own", {"model": builders.own("noisy")}),
    "distillation": ("own", {"distill": 0.5}),
    "accumulation": ("own", {"grad_accumulation": 3, "momentum": 0.0}),
    "bf16": ("own", {"mixed_precision": "bf16"}),
    "tied language model": ("llama", {}),
    "batch norm": ("timm", {}),
    "text": ("bert", {}),
    "compiled": ("own", {"compile": True}),
}
PHASES = {"full_precision_steps": 4, "max_steps": 6, "save_every": 2}


@functools.cache
def uncut(case: str) -> tuple[Path, dict]:
    """Return the folder and the metrics of a case's run that nothing interrupted."""
    kind, settings = RESUMED[case]
    folder = builders.ROOT / f"uncut {case}"
    return folder, finetune(kind, folder, **PHASES, **settings)


class TestResume:
    @pytest.mark.parametrize("cut", [3, 4, 7, 9])
    def test_a_cut_anywhere_leaves_no_trace(self, tmp_path, monkeypatch, cut):
        """A run that was cut in either phase and resumed ends with the same bytes and figures."""
        self.check(tmp_path, monkeypatch, "sgd, dropout, augmentation", cut)

    @pytest.mark.parametrize("case", sorted(RESUMED.keys() - {"sgd", "sgd, dropout, augmentation"}))
    def test_every_kind_of_state_is_restored(self, tmp_path, monkeypatch, case):
        """Optimizers, schedules, data order and buffers go on where they were."""
        self.check(tmp_path, monkeypatch, case, 7)

    def check(self, tmp_path, monkeypatch, case, cut):
        """Cut a run before a step, resume it, and compare with one that was not cut."""
        kind, changes = RESUMED[case]
        settings = {**PHASES, **changes}
        folder, whole = uncut(case)
        with builders.power_cut(monkeypatch, cut), pytest.raises(builders.PowerCutError):
            finetune(kind, tmp_path / "cut", **settings)
        assert not (tmp_path / "cut" / "model.safetensors").exists()
        resumed = finetune(kind, tmp_path / "cut", **settings, resume=True)
        assert digest(tmp_path / "cut") == digest(folder)
        timings = {"seconds", "step_seconds", "peak_memory_bytes"}
        assert all(resumed[key] == value for key, value in whole.items() if key not in timings)
        assert not any("partial" in f for f in files(tmp_path / "cut"))

    def test_a_layer_that_begins_at_zero(self, tmp_path, monkeypatch):
        """Full precision trained it, so that a resumed run must not look at how it began."""
        network = builders.own_network("small")
        torch.nn.init.zeros_(network[2].weight)
        save_file(network.state_dict(), tmp_path / "zero.safetensors")
        settings = {**PHASES, "weights": str(tmp_path / "zero.safetensors")}
        finetune("own", tmp_path / "whole", **settings)
        with builders.power_cut(monkeypatch, 7), pytest.raises(builders.PowerCutError):
            finetune("own", tmp_path / "cut", **settings)
        finetune("own", tmp_path / "cut", **settings, resume=True)
        assert digest(tmp_path / "cut") == digest(tmp_path / "whole")

    def test_two_cuts(self, tmp_path, monkeypatch):
        """A run may be cut again after it was resumed."""
        for cut in (3, 6, 9):
            with builders.power_cut(monkeypatch, cut), pytest.raises(builders.PowerCutError):
                finetune("own", tmp_path / "cut", **PHASES, resume=cut > 3)
        finetune("own", tmp_path / "cut", resume=True)
        assert digest(tmp_path / "cut") == digest(uncut("sgd")[0])

    def test_a_run_that_replaced_another_can_be_resumed(self, tmp_path, monkeypatch):
        """--resume after a run with --overwrite goes on with it instead of deleting it."""
        finetune("own", tmp_path / "cut", max_steps=1)
        with builders.power_cut(monkeypatch, 7), pytest.raises(builders.PowerCutError):
            finetune("own", tmp_path / "cut", **PHASES, overwrite=True)
        finetune("own", tmp_path / "cut", resume=True)
        assert digest(tmp_path / "cut") == digest(uncut("sgd")[0])

    def test_a_finished_run_resumes_to_itself(self, tmp_path):
        """Resuming after the end repeats the end."""
        folder = builders.copy_of("own", tmp_path)
        metrics = finetune("own", folder, resume=True)
        assert digest(folder) == digest(finished("own")[0])
        assert metrics["step_seconds"] == finished("own")[1]["step_seconds"]

    @pytest.mark.parametrize("length", [{"max_steps": 8}, {"max_steps": None, "epochs": 2.0}])
    def test_other_data_are_refused(self, tmp_path, monkeypatch, length):
        """What was read cannot have changed since; what differs is named, and nothing is lost."""
        data = shutil.copytree(builders.image_parquet(), tmp_path / "data")
        given = {"dataset": str(data), "save_every": 1, **length}
        with builders.power_cut(monkeypatch, 4), pytest.raises(builders.PowerCutError):
            finetune("own", tmp_path / "cut", **given)
        before = files(tmp_path / "cut")
        stored = (data / "train.parquet").read_bytes()
        builders.write_images(data / "train.parquet", builders.pictures(16))
        with pytest.raises(
            OutputError, match=r"training samples 48, now 16.*--overwrite"
        ) as caught:
            finetune("own", tmp_path / "cut", **given, resume=True)
        assert ("steps 12, now 4" in str(caught.value)) == (length["max_steps"] is None)
        assert files(tmp_path / "cut") == before
        (data / "train.parquet").write_bytes(stored)
        finetune("own", tmp_path / "cut", **given, resume=True)
        finetune("own", tmp_path / "uncut", **given)
        assert digest(tmp_path / "cut") == digest(tmp_path / "uncut")

    @pytest.mark.parametrize("resume", [False, True])
    def test_beside_another_run(self, tmp_path, monkeypatch, resume):
        """A folder in which a run is at work is not written to, nor gone on with."""
        monkeypatch.setattr(disk, "_ORPHANS", 0.0)
        if resume:
            finetune("own", tmp_path)
        before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
        with disk.alone_in(tmp_path), pytest.raises(OutputError, match="another run is writing"):
            finetune("own", tmp_path, resume=resume)
        assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before

    def test_a_folder_that_was_filled_meanwhile(self, tmp_path, monkeypatch):
        """Between the first look and the start of the run."""
        original = train._Run._try_one_batch

        def slowly(self: train._Run) -> None:
            original(self)
            (tmp_path / "mine").write_text("x")

        monkeypatch.setattr(train._Run, "_try_one_batch", slowly)
        with pytest.raises(OutputError, match="is not empty"):
            finetune("own", tmp_path)
        assert files(tmp_path) == {"mine"}

    def test_another_teacher_is_refused(self, tmp_path, monkeypatch):
        """A file that teaches is known by its digest."""
        teacher = tmp_path / "teacher.safetensors"
        save_file(builders.own_network("small").state_dict(), teacher)
        given = {"distill": 0.5, "teacher_weights": str(teacher), "save_every": 1}
        with builders.power_cut(monkeypatch, 4), pytest.raises(builders.PowerCutError):
            finetune("own", tmp_path / "cut", **given)
        other = {name: t + 1 for name, t in load_file(teacher).items()}
        save_file(other, teacher)
        with pytest.raises(OutputError, match=r"SHA-256 of the teacher [0-9a-f]{64}, now"):
            finetune("own", tmp_path / "cut", resume=True)

    def test_another_teacher_in_a_folder_is_refused(self, tmp_path, monkeypatch):
        """As one from a file."""
        shutil.copytree(builders.bert(), tmp_path / "teacher")
        given = {"distill": 0.5, "teacher": str(tmp_path / "teacher"), "save_every": 1}
        with builders.power_cut(monkeypatch, 4), pytest.raises(builders.PowerCutError):
            finetune("bert", tmp_path / "cut", **given)
        weights = tmp_path / "teacher" / "model.safetensors"
        state = {name: t + 1 for name, t in load_file(weights).items()}
        save_file(state, weights, {"format": "pt"})
        with pytest.raises(OutputError, match=r"SHA-256 of the teacher [0-9a-f]{64}, now"):
            finetune("bert", tmp_path / "cut", resume=True)

    def test_a_cut_while_a_checkpoint_is_written(self, tmp_path, monkeypatch):
        """A checkpoint that is not complete is not resumed from."""
        original = training_state.save

        def save(folder, *args):
            original(folder, *args)
            if "00000006" in folder.name:
                (folder / "model.safetensors").write_bytes(b"half")
                raise builders.PowerCutError

        with monkeypatch.context() as patch:
            patch.setattr(training_state, "save", save)
            with pytest.raises(builders.PowerCutError):
                finetune("own", tmp_path / "cut", **PHASES)
        finetune("own", tmp_path / "cut", resume=True)
        assert digest(tmp_path / "cut") == digest(uncut("sgd")[0])
        assert not any("partial" in f for f in files(tmp_path / "cut"))

    @pytest.mark.parametrize(
        ("keep", "steps"), [({}, [10, 12]), ({"keep": 1}, [12]), ({"keep": 4}, [6, 8, 10, 12])]
    )
    def test_the_newest_checkpoints_are_kept(self, tmp_path, keep, steps):
        """Older checkpoints make room; two are kept unless --keep says otherwise."""
        finetune("own", tmp_path, max_steps=12, save_every=2, **keep)
        names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert names == [f"step-{step:08d}" for step in steps]

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"lr": 0.5}, "lr = 0.5 (the run has 0.05)"),
            ({"bits": 3}, "bits = 3 (the run has 2)"),
            ({"seed": 9, "batch_size": 16}, "batch_size = 16 (the run has 8)"),
            ({"include": ["*"]}, "include"),
        ],
        ids=str,
    )
    def test_other_settings_are_refused(self, tmp_path, change, named):
        """A resumed run cannot change its settings; those that differ are named."""
        folder = builders.copy_of("own", tmp_path)
        before = files(folder)
        with pytest.raises(RecipeError) as caught:
            finetune("own", folder, resume=True, **change)
        assert all(key in str(caught.value) for key in change)
        assert named in str(caught.value)
        assert files(folder) == before

    def test_unset_settings_do_not_differ(self, tmp_path):
        """A key that a recipe leaves to askewq does not differ from what was chosen for it."""
        folder = builders.copy_of("own", tmp_path)
        finetune("own", folder, resume=True, full_precision_lr=None, close_power=None, task=None)
        assert digest(folder) == digest(finished("own")[0])

    def test_a_folder_by_another_name(self, tmp_path, monkeypatch):
        """The data are the same, however their path is spelled."""
        folder = builders.copy_of("own", tmp_path)
        data = Path(builders.recipe("own", tmp_path).dataset)
        (tmp_path / "link").symlink_to(data)
        monkeypatch.chdir(data.parent)
        for name in (f"./{data.name}", f"{data}/", tmp_path / "link"):
            finetune("own", folder, resume=True, dataset=str(name))
        assert digest(folder) == digest(finished("own")[0])
        with pytest.raises(RecipeError, match="these settings differ: dataset"):
            finetune("own", folder, resume=True, dataset=str(tmp_path))

    def test_a_recipe_that_nobody_ran(self, tmp_path):
        """As `askewq plan` writes one."""
        (tmp_path / "recipe.yaml").write_text("model: resnet18\ndataset: d\n")
        outcome = builders.command("finetune", "--resume", "--output", tmp_path)
        assert outcome.code == 2
        assert f"holds a recipe and no run; begin one with --recipe {tmp_path}" in outcome.err

    def test_nothing_to_resume(self, tmp_path, monkeypatch):
        """Without a run --resume is refused; a run without a checkpoint starts anew."""
        with pytest.raises(OutputError, match="holds no run"):
            finetune("own", tmp_path / "new", resume=True)
        assert not (tmp_path / "new").exists()
        with builders.power_cut(monkeypatch, 1), pytest.raises(builders.PowerCutError):
            finetune("own", tmp_path / "cut", **PHASES)
        finetune("own", tmp_path / "cut", resume=True)
        assert digest(tmp_path / "cut") == digest(uncut("sgd")[0])

    @pytest.mark.parametrize("kind", ["own", "timm", "llama"])
    def test_evaluations_on_the_way_change_nothing(self, tmp_path, kind):
        """--eval-every and --save-every do not change what is trained."""
        finetune(kind, tmp_path, eval_every=2, save_every=1)
        assert digest(tmp_path) == digest(finished(kind)[0])


BACKWARD = """
import torch
from torch import nn

class Inplace(nn.Module):
    def forward(self, x):
        y = torch.sigmoid(x)
        return y.mul_(2) if torch.is_grad_enabled() else 2 * y

def make():
    size = (nn.Flatten(), nn.Linear(768, 8), Inplace(), nn.Linear(8, 8), nn.Linear(8, 3))
    return nn.Sequential(*size)
"""

OWN_FORWARD = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = ((768, 8), (8, 8), (8, 3))
        self.layers = nn.Sequential(nn.Flatten(), *(nn.Linear(*size) for size in sizes))
        self.forward = self.special

    def special(self, x):
        return self.layers(x)

def make():
    return Net()
"""


class TestStart:
    def test_batches_smaller_than_asked_for(self, tmp_path, capsys):
        """A training split of fewer samples than a batch: the batches that there are, in words."""
        finetune("own", tmp_path, max_steps=2, max_train_samples=5)
        out = capsys.readouterr().out
        assert "note: the training split makes batches of 5, not of 8" in out
        assert "training: 2 steps of 5 samples a process" in out

    def test_a_batch_that_fails_in_training_alone(self, tmp_path):
        """Batch norm takes one sample in evaluation; the error names the batch."""
        with pytest.raises(ModelError, match=r"fails in training on a batch of .*\[1, 3, 32, 32\]"):
            finetune("timm", tmp_path, batch_size=1, max_steps=1)

    def test_a_backward_pass_that_fails(self, tmp_path):
        """It is an error in words, too, with the advice about memory."""
        (tmp_path / "net.py").write_text(BACKWARD)
        model = f"{tmp_path / 'net.py'}:make"
        with pytest.raises(ModelError, match=r"fails in training on .*inplace[^$]*--batch-size"):
            finetune("own", tmp_path / "out", model=model, max_steps=1)

    def test_a_forward_of_the_module_itself(self, tmp_path):
        """One that is set on the module, and not on its class, stays through all phases."""
        (tmp_path / "net.py").write_text(OWN_FORWARD)
        model = f"{tmp_path / 'net.py'}:make"
        metrics = finetune("own", tmp_path / "out", model=model, **PHASES)
        assert metrics["snapped"] == metrics["reloaded"]

    def test_judged_on_what_is_trained_on(self, tmp_path, capsys):
        """The note about rows that are in both splits is printed."""
        finetune("own", tmp_path, max_steps=1, train_split="test", eval_split="test[:12]")
        out = capsys.readouterr().out
        assert "note: --eval-split test[:12] has rows of --train-split test" in out


class TestOutput:
    def test_a_file_in_the_way_is_refused(self, tmp_path):
        """Before anything is read."""
        (tmp_path / "x").write_text("mine")
        with pytest.raises(OutputError, match=r"x is no folder"):
            finetune("own", tmp_path / "x" / "a" / "b", dataset="not read")
        assert (tmp_path / "x").read_text() == "mine"

    def test_a_name_that_is_too_long(self, tmp_path):
        """As the system says, before anything is read."""
        with pytest.raises(OutputError, match=r"too long; name another folder"):
            finetune("own", tmp_path / ("x" * 300), dataset="not read")

    def test_a_folder_that_cannot_be_made(self, tmp_path, monkeypatch):
        """Whatever the system says is passed on."""
        held = output.held(builders.recipe("own", tmp_path / "x"))

        def refuse(*_args, **_keys):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(OutputError, match=r"cannot be made: .*Read-only"), held:
            pass

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_may_not_be_written_to(self, tmp_path):
        """Before anything is read."""
        tmp_path.chmod(0o500)
        with pytest.raises(OutputError, match="may not be written to"):
            finetune("own", tmp_path / "x", dataset="not read")

    def test_a_folder_with_something_in_it_is_refused(self, tmp_path):
        """A file that is there stays, and the message names the ways out."""
        (tmp_path / "thesis.txt").write_text("five years")
        with pytest.raises(OutputError, match=r"--resume.*--overwrite"):
            finetune("own", tmp_path)
        assert files(tmp_path) == {"thesis.txt"}

    def test_an_empty_folder_is_fine(self, tmp_path):
        """A folder that exists and is empty is used."""
        finetune("own", tmp_path, max_steps=1)
        assert files(tmp_path) >= ALWAYS

    def test_a_file_is_refused(self, tmp_path):
        """An output that is a file is refused, even with --overwrite."""
        (tmp_path / "out").write_text("x")
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="is no folder"):
                finetune("own", tmp_path / "out", overwrite=overwrite)
        assert (tmp_path / "out").read_text() == "x"

    def test_overwrite_replaces_the_earlier_run(self, tmp_path):
        """Nothing of the earlier run is left."""
        finetune("bert", tmp_path, max_steps=3)
        finetune("own", tmp_path, overwrite=True)
        assert {f for f in files(tmp_path) if "/" not in f} == ALWAYS
        assert digest(tmp_path) == digest(finished("own")[0])

    def test_overwrite_deletes_nothing_but_runs(self, tmp_path):
        """A folder that is no run of ours is left alone, whatever --overwrite says."""
        (tmp_path / "thesis.txt").write_text("five years")
        with pytest.raises(OutputError, match=r"no recipe|recipe\.yaml"):
            finetune("own", tmp_path, overwrite=True)
        assert files(tmp_path) == {"thesis.txt"}

    @pytest.mark.parametrize("name", ["src/train.py", "thesis.tex", "checkpoints/last.ckpt"])
    def test_overwrite_deletes_nothing_beside_a_run(self, tmp_path, name):
        """What runs do not write is a user's, whatever else is in the folder."""
        folder = builders.copy_of("own", tmp_path)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("five years")
        before = files(folder)
        with pytest.raises(OutputError, match=f"would delete what no run writes: {name[:3]}"):
            finetune("own", folder, overwrite=True)
        assert files(folder) == before

    def test_overwrite_does_not_delete_what_the_run_reads(self, tmp_path):
        """An earlier run that holds the new run's weights is not replaced by it."""
        folder = builders.copy_of("own", tmp_path)
        weights = folder / "w.safetensors"
        weights.write_bytes(b"")
        with pytest.raises(OutputError, match=r"would delete .*w\.safetensors"):
            finetune("own", folder, overwrite=True, weights=str(weights))
        assert weights.exists()

    def test_overwrite_keeps_the_earlier_run_when_the_new_one_is_wrong(self, tmp_path):
        """Bad input is found before the earlier run is deleted."""
        folder = builders.copy_of("own", tmp_path)
        before = files(folder)
        for change in ({"include": ["nope"]}, {"model": builders.own("ten_classes")}):
            with pytest.raises(askewq.AskewError):
                finetune("own", folder, overwrite=True, **change)
            assert files(folder) == before


class TestDivergence:
    def test_the_step_is_named_and_nothing_is_packed(self, tmp_path):
        """A loss that is NaN stops the run, naming the step, the lr and what to try."""
        with pytest.raises(DivergenceError, match=r"nan at step 1\b") as caught:
            finetune("own", tmp_path, lr=1e30, save_every=100)  # so without a checkpoint
        assert str(caught.value).endswith(
            "smaller --lr than 1e+30; --nan-policy skip:N passes over N such steps."
        )
        assert not {"model.safetensors", "metrics.json"} & files(tmp_path)

    def test_every_rate_of_the_phase_is_named(self, tmp_path):
        """Those of the quantized weights and of the others, where they are two."""
        rates = {"optimizer": "adamw", "lr": 1e30, "level_lr": 0.01}
        with pytest.raises(DivergenceError, match=r"a smaller --lr than 1e\+30 or --level-lr than"):
            finetune("own", tmp_path, **rates)

    @pytest.mark.parametrize("save_every", [1, 3])
    def test_the_last_good_checkpoint_is_kept_and_named(self, tmp_path, save_every):
        """The checkpoint in the message gives a loss that is a number."""
        settings = {"full_precision_steps": 5, "full_precision_lr": 0.01, "save_every": save_every}
        with pytest.raises(DivergenceError, match=r"nan at step 6\b") as caught:
            finetune("own", tmp_path, **settings, lr=1e30)
        (name,) = re.findall(r"--resume goes on from (\S+) with it", str(caught.value))
        assert Path(name).name == "step-00000006"  # the first step of a phase is always kept
        state = load_file(Path(name) / "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in state.values())

    def test_a_bad_batch_can_be_passed_over(self, tmp_path, monkeypatch):
        """The checkpoint before it is there, even if it is the only one, and the run goes on."""
        original = loop.Loop._loss
        bad = {"step": 3}

        def loss(self, model, batch):
            made = original(self, model, batch)
            return made * torch.nan if self.progress.step == bad["step"] else made

        monkeypatch.setattr(loop.Loop, "_loss", loss)
        settings = {"save_every": 1, "keep": 1}
        with pytest.raises(DivergenceError, match=r"step-00000003 with it"):
            finetune("own", tmp_path, **settings)
        metrics = finetune("own", tmp_path, **settings, resume=True, nan_policy="skip:1")
        assert metrics["skipped_steps"] == 1

    def test_without_a_checkpoint_there_is_none_to_go_on_from(self, tmp_path, monkeypatch):
        """A run that diverges before the first one is started again."""
        original = loop.Loop._loss
        monkeypatch.setattr(loop.Loop, "_loss", lambda *given: original(*given) * torch.nan)
        with pytest.raises(DivergenceError, match="nan at step 0") as caught:
            finetune("own", tmp_path)
        assert "Start again with a smaller --lr" in str(caught.value)
        assert "--resume" not in str(caught.value)

    def test_weights_that_overflow_in_the_last_step(self, tmp_path):
        """Weights that are not finite after the last step are a divergence, and not packed."""
        with pytest.raises(DivergenceError):
            finetune("own", tmp_path, lr=3e38, max_steps=1, momentum=0.0)
        assert not {"model.safetensors", "metrics.json"} & files(tmp_path)


@pytest.mark.parametrize("kind", ["own", "bert-pairs"])
def test_a_reload_that_differs_is_an_error(tmp_path, monkeypatch, kind):
    """If the packed file gave other logits by one bit, the run would say so and fail."""
    original = checkpoint.load_into

    def imprecise(model, artifact):
        original(model, artifact)
        with torch.no_grad():
            weight = next(p for p in model.parameters() if p.dim() > 1)
            weight.add_(1e-3)

    monkeypatch.setattr(checkpoint, "load_into", imprecise)
    with pytest.raises(ExactnessError, match="must be equal to the bit"):
        finetune(kind, tmp_path)
    assert "metrics.json" not in files(tmp_path)


def test_a_network_that_fails_on_the_evaluation_split(tmp_path):
    """What is not finite before any training is said before any training."""
    colours = [((40 * i, 90, 200), i % 3) for i in range(6)]
    for split, more in (("train", []), ("test", [((255, 255, 255), 0)])):
        images = [(Image.new("RGB", (16, 16), colour), label) for colour, label in colours + more]
        builders.write_images(tmp_path / "data" / f"{split}.parquet", images)
    with pytest.raises(DivergenceError, match=r"before any low-bit step, the loss .* is nan"):
        finetune(
            "own",
            tmp_path / "out",
            model=builders.own("trapped"),
            dataset=str(tmp_path / "data"),
            batch_size=2,
        )
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def test_buffers_that_share_memory(tmp_path):
    """A network in which one buffer is a part of another one is trained, packed and resumed."""
    finetune("own", tmp_path / "out", model=builders.own("viewed"))
    stored = checkpoint.read(tmp_path / "out" / "model.safetensors")
    assert stored.tensors["some"].tolist() == [0, 1, 2, 3]


def test_apples_gpu_is_not_used(tmp_path, monkeypatch):
    """It has no float64, in which scales are fitted and figures are taken."""
    asked = []

    def accelerator(*, cpu, **_):
        asked.append(cpu)
        raise InterruptedError

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    for apple in (False, True):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=apple: found)
        with pytest.raises(InterruptedError):
            processes.accelerator_of(builders.recipe("own", tmp_path))
    assert asked == [False, True]


def test_overwrite_leaves_a_folder_where_a_recipe_is_kept(tmp_path):
    """A file called recipe.yaml makes no run of what else is there."""
    recipe = builders.recipe("own", tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(recipe_files.to_yaml(recipe))
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match="neither checkpoints nor an artifact beside it"):
        finetune("own", tmp_path, overwrite=True)
    assert files(tmp_path) == {"recipe.yaml", "notes.md"}
    folder = builders.copy_of("own", tmp_path)  # a run whose checkpoints are deleted is one
    shutil.rmtree(folder / "checkpoints")
    finetune("own", folder, overwrite=True)


def test_an_encoder_is_no_language_model(tmp_path):
    """BERT loads as one, and would see what it has to predict."""
    import transformers

    shutil.copytree(builders.bert(), tmp_path / "bert")
    made = transformers.BertConfig.from_pretrained(tmp_path / "bert")
    transformers.BertLMHeadModel(made).save_pretrained(tmp_path / "bert")
    changes = {"model": str(tmp_path / "bert"), "task": "causal-lm"}
    with pytest.raises(ModelError, match="sees the tokens that it has to predict"):
        finetune("llama", tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Bart", "T5"])
def test_texts_of_sequence_to_sequence_models_end_once(tmp_path, kind):
    """Their classifiers read a text's last token: in the check of lengths, and in an export."""
    import transformers

    torch.manual_seed(0)
    folder = tmp_path / kind
    words = builders.write_tokenizer(folder)
    tokens = {"vocab_size": words, "pad_token_id": 0, "eos_token_id": 3, "num_labels": 2}
    size = {"d_model": 16, "decoder_start_token_id": 3}
    if kind == "Bart":
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
        more = {**heads, **layers, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    else:
        more = {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**tokens, **size, **more)
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(folder)
    out = tmp_path / "out"
    finetune("bert", out, model=str(folder), task="text-classification")
    outcome = builders.command("export", out, "--to", "dense", "--output", tmp_path / "dense")
    assert outcome.code == 0, outcome.err
