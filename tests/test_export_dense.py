"""The dense export: timm, transformers and load_state_dict give the artifact's very model."""

import copy
import json
import os
import re

import builders
import pytest
import torch
from builders import files, packed, untrained
from conftest import GRIDS, grid_name
from safetensors import safe_open
from safetensors.torch import load_file

import askewq
from askewq import checkpoint, models
from askewq.export import _open, export
from askewq.export_dense import BOUNDS, DTYPES, TARGET
from askewq.preprocessing import ImagePreprocessing
from askewq.samples import expected_of
from askewq.spec import LoadedModel, ModelSpec
from askewq.target import Options
from askewq.tasks import logits_of

BITS = (1, "ternary", 2, 3, 4, 8)
KINDS = ["own", "tied", "timm", "timm-vit", "bert", "llama", "gpt2", "vit"]
LOADED_BY_TIMM = ("timm", "timm-vit")
FACTORIES = {"own": lambda: builders.own("small"), "tied": lambda: builders.own("tied")}


def quantize(kind, bits, grid="integer"):
    """Return what quantizes a model of a kind: GPT-2 with its embeddings and tied head."""
    include = ("*",) if kind == "gpt2" else ()
    return lambda model: askewq.quantize(model, bits, grid=grid, include=include)


def source_of(kind, folder, quantization):
    """Return an opened artifact of a tiny model."""
    artifact = packed(untrained(kind), folder / "artifact", quantization)
    return _open(artifact, FACTORIES[kind]() if kind in FACTORIES else None)


def write(source, folder, **options):
    """Write the dense export without the fresh process; return its folder."""
    options = Options(**options)
    assert TARGET.refusals(source, options) == []
    folder.mkdir()
    TARGET.write(source, options, folder)
    return folder


def read_back(folder, kind, inputs, monkeypatch):
    """Return the logits by the target's own loader, in this process."""
    monkeypatch.setenv("ASKEWQ_FACTORY", FACTORIES.get(kind, str)())
    with torch.no_grad():
        return TARGET.read_back(str(folder), inputs)


def state_of(source, folder):
    """Return the state dict in a folder, as transformers reads its own; by name otherwise."""
    if source.loaded.spec.source == "transformers":
        return type(source.loaded.model).from_pretrained(folder, dtype="auto").state_dict()
    return load_file(folder / "model.safetensors")


class TestFp32:
    @pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits in BITS], ids=grid_name)
    @pytest.mark.parametrize("kind", ["timm", "timm-vit", "bert", "llama"])
    def test_logits_are_equal_to_the_bit(self, tmp_path, monkeypatch, kind, grid):
        """Every grid goes over exactly, through timm's loader and through transformers'."""
        name = "half-integer" if grid.first % 1 else "integer"
        source = source_of(kind, tmp_path, quantize(kind, grid.bits, name))
        inputs, expected = expected_of(source.loaded)
        folder = write(source, tmp_path / "out")
        assert torch.equal(read_back(folder, kind, inputs, monkeypatch), expected)
        assert TARGET.bound(Options()) == 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_tensors_are_equal_to_the_bit(self, tmp_path, monkeypatch, kind):
        """Every tensor that is loaded, tied ones included, is the artifact's."""
        source = source_of(kind, tmp_path, quantize(kind, 2))
        folder = write(source, tmp_path / "out")
        stored, dense = state_of(source, folder), source.artifact.dense_state()
        assert stored.keys() == dense.keys()
        assert all(torch.equal(tensor, dense[name]) for name, tensor in stored.items())
        assert all(tensor.dtype == dense[name].dtype for name, tensor in stored.items())
        inputs, expected = expected_of(source.loaded)
        assert torch.equal(read_back(folder, kind, inputs, monkeypatch), expected)

    @pytest.mark.parametrize("kind", ["timm-vit", "vit"])
    def test_a_fresh_process_agrees(self, tmp_path, kind):
        """The whole command: timm and transformers load it where askewq cannot be imported."""
        folder = packed(untrained(kind), tmp_path / "artifact", quantize(kind, 2))
        result = export(folder, "dense", tmp_path / "out")
        assert result["max_difference"] == 0
        assert "config.json" in result["files"]


class TestLoading:
    @pytest.mark.parametrize("kind", KINDS)
    def test_as_the_readme_says(self, tmp_path, monkeypatch, kind):
        """The code in README.md, run as it stands, gives the artifact's logits."""
        source = source_of(kind, tmp_path, quantize(kind, 3))
        folder = write(source, tmp_path / "out")
        text = (folder / "README.md").read_text()
        code = re.search("```python\n(.*?)```", text, re.DOTALL).group(1)
        names = {}
        if kind in FACTORIES:
            network = builders.own_network("small" if kind == "own" else kind)
            names, code = {"given": network}, code.replace("...  #", "given  #")
        monkeypatch.chdir(folder)
        exec(code.replace("FOLDER", os.curdir), names)
        model = names["model"].eval()
        inputs, expected = expected_of(source.loaded)
        with torch.no_grad():
            assert torch.equal(logits_of(model, source.loaded.spec, inputs), expected)
        assert all(label in text for label in source.loaded.spec.labels)
        assert str(builders.ROOT) not in text

    @pytest.mark.parametrize("kind", LOADED_BY_TIMM)
    def test_timm_knows_the_network_from_its_folder(self, tmp_path, kind):
        """The library rebuilds network, classes and preprocessing from the folder alone."""
        import timm

        source = source_of(kind, tmp_path, quantize(kind, 2))
        folder = write(source, tmp_path / "out")
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        inputs, expected = expected_of(source.loaded)
        with torch.no_grad():
            assert torch.equal(model(inputs["pixel_values"]), expected)
        data = timm.data.resolve_model_data_config(model)
        assert tuple(data["input_size"]) == (3, 32, 32)
        assert data["crop_pct"] == source.loaded.preprocessing.crop_pct
        assert tuple(data["mean"]) == source.loaded.preprocessing.mean

    def test_other_channels_and_classes(self, tmp_path, monkeypatch):
        """A network of one channel and five classes is rebuilt as such."""
        arguments = {"model_name": "test_resnet", "in_chans": 1, "num_classes": 5}
        labels = tuple("abcde")
        spec = ModelSpec("timm", "test_resnet", "image-classification", labels, arguments)
        grey = ImagePreprocessing(size=(32, 32), mean=(0.5,), std=(0.5,))
        loaded = LoadedModel(models.build(spec), spec, grey)
        source = _open(packed(loaded, tmp_path / "artifact", quantize("timm", 2)), None)
        folder = write(source, tmp_path / "out")
        inputs, expected = expected_of(source.loaded)
        assert inputs["pixel_values"].shape == (4, 1, 32, 32)
        assert expected.shape == (4, 5)
        assert torch.equal(read_back(folder, "timm", inputs, monkeypatch), expected)
        assert "in_chans=1, num_classes=5" in (folder / "README.md").read_text()

    def test_the_class_is_the_fine_tuned_models(self, tmp_path):
        """config.json names the class with the head, not the one that training started from."""
        loaded = untrained("bert")
        loaded.spec.arguments["architectures"] = ["BertForMaskedLM"]
        source = _open(packed(loaded, tmp_path / "artifact", quantize("bert", 2)), None)
        config = json.loads((write(source, tmp_path / "out") / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]

    def test_transformers_finds_all_its_files(self, tmp_path):
        """The Auto classes load model, tokenizer and image processor from the folder."""
        import transformers

        source = source_of("bert", tmp_path, quantize("bert", 2))
        folder = write(source, tmp_path / "out")
        auto = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert type(auto) is transformers.BertForSequenceClassification
        assert auto.config.id2label == {0: "neg", 1: "pos"}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("good film")["input_ids"] == [2, 4, 6, 3]
        (tmp_path / "images").mkdir()
        source = source_of("vit", tmp_path / "images", quantize("vit", 2))
        folder = write(source, tmp_path / "images" / "out")
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        image, _ = builders.pictures(1)[0]
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, source.loaded.preprocessing.image(image))

    def test_a_tied_weight_is_stored_for_every_name(self, tmp_path):
        """load_state_dict asks for every name: it is stored for each, and that is said."""
        source = source_of("tied", tmp_path, quantize("tied", 2))
        assert source.artifact.shared == {"two.weight": "one.weight"}
        [note] = TARGET.notes(source, Options())
        assert "two.weight is stored again" in note
        folder = write(source, tmp_path / "out")
        network = builders.own_network("tied")
        network.load_state_dict(load_file(folder / "model.safetensors"))
        assert torch.equal(network.two.weight, source.loaded.model.one.weight)


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_value_is_rounded_once(self, tmp_path, monkeypatch, kind, dtype):
        """Floating-point tensors are the artifact's, rounded; logits stay within the bound."""
        source = source_of(kind, tmp_path, quantize(kind, 4))
        before = copy.deepcopy(source.loaded.model.state_dict())
        folder = write(source, tmp_path / "out", dtype=dtype)
        stored, dense = state_of(source, folder), source.artifact.dense_state()
        assert stored.keys() == dense.keys()
        for name, tensor in stored.items():
            exact = dense[name]
            assert torch.equal(
                tensor, exact.to(DTYPES[dtype]) if exact.is_floating_point() else exact
            )
        assert all(
            torch.equal(tensor, before[name])
            for name, tensor in source.loaded.model.state_dict().items()
        )
        inputs, expected = expected_of(source.loaded)
        logits = read_back(folder, kind, inputs, monkeypatch)
        relative = (logits - expected).abs().max() / expected.abs().max()
        assert 0 < relative < BOUNDS[dtype] / 4, "the bound leaves room for deeper networks"
        assert f"rounded to {dtype}" in TARGET.notes(source, Options(dtype=dtype))[0]

    def test_transformers_loads_the_type_of_the_file(self, tmp_path):
        """config.json says the type, so that the model comes back in it."""
        import transformers

        source = source_of("llama", tmp_path, quantize("llama", 4))
        folder = write(source, tmp_path / "out", dtype="bf16")
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert model.dtype == torch.bfloat16
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_values_beyond_the_range(self, tmp_path):
        """What fp16 cannot hold is refused by name; bf16 and fp32 hold it."""

        def quantization(model):
            askewq.quantize(model, 2)
            model[8].bias.data[0] = 1e5

        source = source_of("own", tmp_path, quantization)
        [reason] = TARGET.refusals(source, Options(dtype="fp16"))
        assert reason.startswith("8.bias holds values up to 1e+05, beyond the range of fp16 (6.55e")
        assert TARGET.refusals(source, Options(dtype="bf16")) == []
        assert TARGET.refusals(source, Options(dtype="fp32")) == []


def test_a_finished_run_can_be_exported(tmp_path):
    """What askewq finetune leaves behind, checkpoints and all, exports by one command."""
    run, _ = builders.finished("own")
    words = ["--output", tmp_path / "out", "--model", builders.own("small")]
    outcome = builders.command("export", run, "--to", "dense", *words)
    assert outcome.code == 0, outcome.err
    assert files(tmp_path / "out") == {"README.md", "export.json", "model.safetensors"}
    dense = checkpoint.read(run / "model.safetensors").dense_state()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in dense.items())
