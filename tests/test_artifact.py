"""The output folder as an artifact: loading it, and refusing what is damaged or strange."""

import json
import shutil

import builders
import pytest
import torch
from builders import copy_of, edit_config, finished
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import askewq
from askewq import artifact, checkpoint
from askewq.errors import DivergenceError, FormatError, ModelError, OutputError
from askewq.export import export
from askewq.polish import Polisher
from askewq.samples import expected_of

LOADABLE = ["timm", "timm-vit", "bert", "bert-pairs", "llama", "vit"]


class TestLoad:
    @pytest.mark.parametrize("kind", LOADABLE)
    def test_gives_the_plain_model_with_snapped_weights(self, kind):
        """The model is in eval mode, its classes are the library's, its weights the file's."""
        folder, _ = finished(kind)
        model = askewq.load(folder)
        state, stored = model.state_dict(), checkpoint.read(folder / "model.safetensors")
        assert not model.training
        assert state.keys() == stored.dense_state().keys()
        assert all(torch.equal(state[k], tensor) for k, tensor in stored.dense_state().items())
        assert not any(type(m).__module__.startswith("askewq") for m in model.modules())
        assert stored.weights

    @pytest.mark.parametrize("kind", ["own", *LOADABLE])
    def test_dtype_casts_floating_point_only(self, kind):
        """With a dtype every float tensor is cast from the exact value; integers stay."""
        folder, _ = finished(kind)
        own = (
            [{"model": builders.own_network("small")} for _ in "ab"] if kind == "own" else [{}, {}]
        )
        model = askewq.load(folder, dtype=torch.bfloat16, **own[0])
        assert not model.training
        exact = askewq.load(folder, **own[1]).state_dict()
        for key, tensor in model.state_dict().items():
            floating = exact[key].is_floating_point()
            assert tensor.dtype == (torch.bfloat16 if floating else exact[key].dtype)
            assert torch.equal(tensor, exact[key].to(tensor.dtype))

    def test_a_path_may_be_text(self):
        """The folder is given as a string or as a Path."""
        folder, _ = finished("timm")
        first, second = askewq.load(str(folder)), askewq.load(folder)
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(first(x), second(x))

    def test_own_modules_are_passed_in(self):
        """A network of the user's own is filled in place and returned in eval mode."""
        folder, _ = finished("own")
        network = builders.own_network("small").train()
        loaded = askewq.load(folder, model=network)
        assert loaded is network
        assert not loaded.training
        dense = checkpoint.read(folder / "model.safetensors").dense_state()
        assert all(torch.equal(loaded.state_dict()[k], tensor) for k, tensor in dense.items())

    def test_own_modules_without_the_module(self):
        """Without it the error says that no code is run and what to pass."""
        folder, _ = finished("own")
        with pytest.raises(ModelError, match=r"askewq\.load\(folder, model=\.\.\.\)") as caught:
            askewq.load(folder)
        assert "runs no code" in str(caught.value)

    def test_another_network_is_refused(self):
        """A network with other keys or shapes is refused and named."""
        folder, _ = finished("own")
        with pytest.raises(FormatError, match=r"8\.\w+"):
            askewq.load(folder, model=builders.own_network("ten_classes"))
        with pytest.raises(FormatError, match="does not fit the model"):
            askewq.load(folder, model=builders.own_network("tied"))

    def test_loading_needs_no_checkpoint_and_no_figures(self, tmp_path):
        """Only the packed file and config.json are needed for a timm model."""
        folder, _ = finished("timm")
        for name in ("model.safetensors", "config.json"):
            shutil.copy(folder / name, tmp_path)
        assert askewq.load(tmp_path).state_dict().keys() == askewq.load(folder).state_dict().keys()

    def test_the_preprocessing_comes_back(self):
        """An artifact knows how its inputs are prepared and what its labels are called."""
        images = artifact.load_artifact(finished("timm")[0])
        assert images.preprocessing.size == (32, 32)
        assert images.spec.labels == ("blue", "green", "red")
        texts = artifact.load_artifact(finished("bert")[0])
        assert texts.preprocessing.tokenizer("good film")["input_ids"] == [2, 4, 6, 3]
        assert texts.spec.labels == ("neg", "pos")
        processed = artifact.load_artifact(finished("vit")[0])
        image, _ = builders.pictures(1)[0]
        assert processed.preprocessing.image(image).shape == (3, 16, 16)

    def test_logits_are_those_of_a_rebuilt_network(self):
        """Loading twice gives the same logits, bit for bit."""
        folder, _ = finished("llama")
        tokens = torch.tensor([[2, 4, 5, 6]])
        with torch.no_grad():
            logits = [askewq.load(folder)(input_ids=tokens).logits for _ in range(2)]
        assert torch.equal(*logits)


class TestSave:
    """`askewq.save`: the weights of somebody's own training loop."""

    @staticmethod
    def trained():
        """A network of one's own after a step of AskewSGD, between the levels."""
        network = builders.own_network("small")
        askewq.quantize(network, bits=2)
        optimizer = askewq.AskewSGD(network, lr=0.1)
        network(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.anneal(0.5)
        optimizer.step()
        return network

    @pytest.mark.parametrize("packed", [False, True])
    def test_comes_back_to_the_bit(self, packed, tmp_path):
        """A fresh network of the same kind, filled from the folder, has the logits of the saved."""
        network = self.trained()
        askewq.snap_(network)
        askewq.save(network, tmp_path / "new" / "own")
        askewq.save(network, str(tmp_path / "new" / "own"))  # an earlier one is replaced
        fresh = builders.own_network("small")
        again = askewq.load(tmp_path / "new" / "own", model=fresh, packed=packed)
        assert [file.name for file in (tmp_path / "new" / "own").iterdir()] == ["model.safetensors"]
        images = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(again(images), network.eval()(images))
        with pytest.raises(FormatError, match=r"pass model=\.\.\."):
            askewq.load(tmp_path / "new" / "own")

    def test_what_is_not_on_the_levels_is_refused(self, tmp_path):
        """Before the snap, whatever is seen in between; and a network that was never quantized."""
        network = self.trained()
        with pytest.raises(ModelError, match=r"2 layers, '2' the first.*askewq\.snap_"):
            askewq.save(network, tmp_path / "own")
        askewq.snap_(network)
        polisher = Polisher(network, lr=1e-3)
        with pytest.raises(ModelError, match=r"levels for good: .* finish_\(\) of a Polisher"):
            askewq.save(network, tmp_path / "own")
        polisher.finish_()
        askewq.save(network, tmp_path / "polished")
        with pytest.raises(FormatError, match=r"the model is quantized \(2\); .* a plain network"):
            askewq.load(tmp_path / "polished", model=network)
        with pytest.raises(FormatError, match="in the model; fill a model of that type"):
            askewq.load(tmp_path / "polished", model=builders.own_network("small").bfloat16())
        shutil.rmtree(tmp_path / "polished")
        with pytest.raises(ModelError, match="no quantized layer"):
            askewq.save(builders.own_network("small"), tmp_path / "own")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("stored", ["pytorch_model.bin", "nothing"])
    def test_a_folder_of_transformers_is_refused(self, tmp_path, stored):
        """It would load the packed weights as its own, of which it knows none."""
        network = self.trained()
        askewq.snap_(network)
        folder = tmp_path / "bert"
        shutil.copytree(builders.bert(), folder)
        (folder / "model.safetensors").unlink()
        if stored != "nothing":
            (folder / stored).write_bytes(b"weights")
        before = builders.files(folder)
        with pytest.raises(FormatError, match="describes a model of transformers"):
            askewq.save(network, folder)
        assert builders.files(folder) == before

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_a_cast_network_is_refused(self, tmp_path, dtype):
        """Packed weights are float32: no network would have the types of the file."""
        network = self.trained()
        askewq.snap_(network)
        network.to(dtype)
        askewq.snap_(network)
        with pytest.raises(ModelError, match=f"2 is {dtype}, and packed weights are float32"):
            askewq.save(network, tmp_path / "own")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("bits", [1, "ternary", 2, 8])
    def test_a_float64_network_goes_by_float32(self, tmp_path, bits):
        """Levels times a fitted scale are the same numbers there."""
        network = builders.own_network("small").double()
        askewq.quantize(network, bits)
        askewq.snap_(network)
        levels = network[2].weight.clone()
        askewq.save(network.float(), tmp_path)
        again = askewq.load(tmp_path, model=builders.own_network("small"))
        assert torch.equal(again[2].weight.double(), levels)

    def test_from_distributed_data_parallel(self, tmp_path):
        """The names in the file are the network's own, whatever wraps it."""
        network = builders.own_network("small")
        askewq.quantize(network, 2)
        askewq.snap_(network)
        askewq.save(network, tmp_path / "plain")
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
        try:
            wrapped = torch.nn.parallel.DistributedDataParallel(network)
            askewq.save(torch.compile(wrapped), tmp_path / "wrapped")
        finally:
            torch.distributed.destroy_process_group()
        plain, other = (tmp_path / name / "model.safetensors" for name in ("plain", "wrapped"))
        assert plain.read_bytes() == other.read_bytes()

    @pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
    def test_a_wrapper_about_a_part(self, wrap, tmp_path):
        """Its weights have names, or keep none, that no plain network knows."""
        network = self.trained()
        askewq.snap_(network)
        network[2] = wrap(network[2])
        with pytest.raises(ModelError, match=r"part of the model is wrapped, so that '2\._"):
            askewq.save(network, tmp_path / "own")
        assert not (tmp_path / "own" / "model.safetensors").exists()

    def test_an_average(self, tmp_path):
        """What torch's AveragedModel holds is saved, under the plain names."""
        network = self.trained()
        average = torch.optim.swa_utils.AveragedModel(network)
        askewq.snap_(average)
        askewq.save(average, tmp_path / "own")
        again = askewq.load(tmp_path / "own", model=builders.own_network("small"))
        images = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(again(images), average.eval()(images))

    def test_what_cannot_be_saved(self, tmp_path):
        """NaN is not between the levels, and a file is no folder."""
        network = self.trained()
        askewq.snap_(network)
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OutputError, match="file is no folder; name another one"):
            askewq.save(network, tmp_path / "file")
        with torch.no_grad():
            network[2].weight[0] = float("nan")
        with pytest.raises(DivergenceError, match="NaN"):
            askewq.save(network, tmp_path / "own")

    def test_a_buffer_that_one_layer_does_not_store(self, tmp_path):
        """Its name in the file is the one under which it is stored."""

        def network():
            made = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
            mask = torch.ones(4)
            made[0].register_buffer("mask", mask, persistent=False)
            made[1].register_buffer("mask", mask)
            return made

        first = network()
        askewq.quantize(first, bits=2)
        first[1].mask.fill_(3)
        askewq.snap_(first)
        askewq.save(first, tmp_path)
        again = askewq.load(tmp_path, model=network())
        assert torch.equal(again[1].mask, torch.full((4,), 3.0))

    def test_a_model_without_memory(self, tmp_path):
        """A network on the meta device cannot be filled."""
        network = self.trained()
        askewq.snap_(network)
        askewq.save(network, tmp_path)
        with torch.device("meta"):
            fresh = builders.own_network("small")
        with pytest.raises(FormatError, match="meta device"):
            askewq.load(tmp_path, model=fresh)

    @pytest.mark.parametrize(
        ("call", "reason"),
        [
            (lambda network, path: askewq.save(network.state_dict(), path), "is no network; pass"),
            (lambda _, path: askewq.quantize([], 2), "is no network; pass"),
            (lambda _, path: askewq.snap_("net"), "is no network; pass"),
            (lambda network, path: askewq.load(path, model=type(network)), "is no network; pass"),
            (
                lambda network, path: askewq.load(path, model=network, dtype="bfloat16"),
                r"must be a torch\.dtype",
            ),
            (
                lambda network, path: askewq.load(path, model=network, dtype=torch.int8),
                r"torch\.int8 must be a torch\.dtype, one of torch\.float32",
            ),
        ],
    )
    def test_what_is_no_network_or_no_type(self, tmp_path, call, reason):
        """A class, a state dict or a name in its place is told."""
        network = self.trained()
        askewq.snap_(network)
        askewq.save(network, tmp_path)
        with pytest.raises(ModelError, match=reason):
            call(builders.own_network("small"), tmp_path)

    def test_a_long_config_is_not_read(self, tmp_path):
        """A file that is no config of an artifact's is not searched for being one."""
        (tmp_path / "config.json").write_text('{"askewq_version": 2}' + 2**24 * " ")
        assert not artifact.is_artifact(tmp_path)

    def test_ordinary_weights_stay(self, tmp_path):
        """A file of that name that holds somebody's float weights is not replaced."""
        network = self.trained()
        askewq.snap_(network)
        save_file(builders.own_network("small").state_dict(), tmp_path / "model.safetensors")
        before = (tmp_path / "model.safetensors").read_bytes()
        with pytest.raises(FormatError, match="ordinary weights, which would be lost"):
            askewq.save(network, tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == before

    def test_the_weights_of_a_run_stay(self, tmp_path):
        """An artifact's config.json belongs to its own weights."""
        folder = copy_of("timm", tmp_path)
        before = (folder / "model.safetensors").read_bytes()
        network = self.trained()
        askewq.snap_(network)
        with pytest.raises(FormatError, match="save to another folder"):
            askewq.save(network, folder)
        assert (folder / "model.safetensors").read_bytes() == before


class TestSaveArtifact:
    """`save_artifact`: a whole artifact from somebody's own training loop."""

    @staticmethod
    def trained(kind):
        """What `models.load` gave, its network after a step and the snap."""
        loaded = builders.untrained(kind)
        askewq.quantize(loaded.model, bits=2)
        optimizer = askewq.AskewAdamW(loaded.model, lr=0.01, weight_decay=0.0)
        sum(w.square().sum() for w in loaded.model.parameters()).backward()
        optimizer.anneal(0.5)
        optimizer.step()
        askewq.snap_(loaded.model)
        return loaded

    @pytest.mark.parametrize("kind", sorted(builders.PLAIN))
    def test_comes_back_to_the_bit(self, kind, tmp_path):
        """With its labels and preprocessing; it can be verified and exported like any other."""
        loaded = self.trained(kind)
        folder = tmp_path / "new" / "artifact"
        artifact.save_artifact(loaded, folder)
        factory = loaded.spec.name if loaded.spec.source == "module" else None
        again = artifact.load_artifact(folder, factory=factory)
        assert again.spec == loaded.spec
        loaded.model.eval()
        (_, logits), (_, others) = map(expected_of, (again, loaded))
        assert torch.equal(logits, others)
        assert artifact.verify(folder)
        result = export(folder, "dense", tmp_path / "dense", factory=factory)
        assert result["max_difference"] == 0

    def test_a_network_that_its_config_does_not_describe(self, tmp_path):
        """A head was put in the place of another: nobody could load it; nothing is written."""
        loaded = builders.untrained("timm")
        loaded.model.fc = nn.Linear(loaded.model.fc.in_features, 7)
        askewq.quantize(loaded.model, bits=2)
        askewq.snap_(loaded.model)
        with pytest.raises(ModelError, match=r"'test_resnet' could not be loaded again.*fc\.bias"):
            artifact.save_artifact(loaded, tmp_path / "new" / "artifact")
        assert not list(tmp_path.iterdir())

    def test_what_cannot_be_saved(self, tmp_path):
        """Nothing is replaced; and what is between the levels belongs into no file."""
        loaded = self.trained("own")
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(OutputError, match="is not empty; save to another folder"):
            artifact.save_artifact(loaded, tmp_path)
        with pytest.raises(OutputError, match="mine is no folder"):
            artifact.save_artifact(loaded, tmp_path / "mine")
        Polisher(loaded.model, lr=1e-3)
        with pytest.raises(ModelError, match="are not on their levels for good"):
            artifact.save_artifact(loaded, tmp_path / "new")
        assert builders.files(tmp_path) == {"mine"}


class TestConfig:
    def test_holds_what_the_format_lists(self):
        """config.json has exactly the keys of docs/format.md."""
        for kind in ("own", "timm", "bert", "llama", "vit"):
            content = json.loads((finished(kind)[0] / "config.json").read_text())
            assert content.keys() == {
                *("model_type", "askewq_version", "source", "name", "task", "labels"),
                *("arguments", "preprocessing", "quantization_config", "digest"),
            }
            assert "quant_method" not in content["quantization_config"]
            assert content["model_type"] == "askewq"
            assert content["askewq_version"] == 2

    @pytest.mark.parametrize("version", [0, 4, "1", None, [1], True])
    def test_other_versions_are_refused(self, tmp_path, version):
        """A version that this askewq does not know is named."""
        folder = copy_of("timm", tmp_path)
        edit_config(folder, askewq_version=version)
        with pytest.raises(FormatError, match="askewq_version") as caught:
            askewq.load(folder)
        assert repr(version) in str(caught.value)

    @pytest.mark.parametrize(
        "key", ["source", "name", "task", "labels", "arguments", "preprocessing"]
    )
    def test_missing_keys_are_named(self, tmp_path, key):
        """Each key is needed."""
        folder = copy_of("timm", tmp_path)
        edit_config(folder, **{key: None})
        with pytest.raises(FormatError, match=f"lacks {key}"):
            askewq.load(folder)

    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            ("timm", {"source": "keras"}),
            ("timm", {"source": ["timm"]}),
            ("timm", {"task": "segmentation"}),
            ("timm", {"task": {}}),
            ("timm", {"labels": 3}),
            ("timm", {"labels": [1, 2, 3]}),
            ("timm", {"name": 3}),
            ("timm", {"arguments": []}),
            ("timm", {"arguments": {}}),
            ("timm", {"arguments": {"model_name": "resnet_of_mine", "num_classes": 3}}),
            ("timm", {"arguments": {"model_name": "test_resnet", "nonsense": 1}}),
            ("timm", {"arguments": {"model_name": "test_resnet", "pretrained": True}}),
            ("timm", {"arguments": {"model_name": "hf-hub:org/name"}}),
            ("timm", {"arguments": {"model_name": 3}}),
            ("timm", {"preprocessing": 3}),
            ("timm", {"preprocessing": {}}),
            ("bert", {"arguments": {}}),
            ("bert", {"arguments": {"model_type": "no-such-model"}}),
            ("bert", {"arguments": {"model_type": "bert", "hidden_size": "wide"}}),
            ("bert", {"arguments": "bert"}),
            ("bert", {"source": "timm"}),
            ("bert", {"task": "causal-lm"}),
            ("bert", {"task": "image-classification"}),
        ],
        ids=str,
    )
    def test_damaged_values_are_refused(self, tmp_path, kind, changes):
        """A value of another kind, or a network that cannot be built, is a FormatError."""
        folder = copy_of(kind, tmp_path)
        edit_config(folder, **changes)
        with pytest.raises(FormatError):
            askewq.load(folder)

    def test_arguments_cannot_load_a_file(self, tmp_path):
        """Arguments that make timm read another file are refused by name."""
        folder = copy_of("timm", tmp_path)
        stored = json.loads((folder / "config.json").read_text())["arguments"]
        torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
        edit_config(folder, arguments={**stored, "checkpoint_path": str(tmp_path / "other.pt")})
        with pytest.raises(FormatError, match="checkpoint_path"):
            askewq.load(folder)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", '"askewq_version"', "\x00"])
    def test_files_that_are_no_config(self, tmp_path, text):
        """A config.json that is not a JSON object of ours is refused with its path."""
        folder = copy_of("timm", tmp_path)
        (folder / "config.json").write_text(text)
        with pytest.raises(FormatError) as caught:
            askewq.load(folder)
        assert str(folder / "config.json") in str(caught.value)

    def test_bytes_that_are_no_text(self, tmp_path):
        """A binary config.json is refused with its path."""
        folder = copy_of("timm", tmp_path)
        (folder / "config.json").write_bytes(b"\xff\xfe\xff")
        with pytest.raises(FormatError, match=r"config\.json"):
            askewq.load(folder)

    def test_folders_without_a_config(self, tmp_path):
        """A folder that is no artifact says what to pass."""
        for folder in (tmp_path, tmp_path / "nowhere", builders.own_module() / "nets.py"):
            with pytest.raises(FormatError, match="not an askewq artifact"):
                askewq.load(folder)

    def test_a_hugging_face_folder_is_no_artifact(self):
        """A folder of another tool's is refused, not guessed at."""
        with pytest.raises(FormatError, match="askewq_version"):
            askewq.load(builders.bert())
        assert not artifact.is_artifact(builders.bert())

    def test_is_artifact(self, tmp_path):
        """A folder counts as an artifact as long as it says so, even when damaged."""
        folder = copy_of("timm", tmp_path)
        assert artifact.is_artifact(folder)
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text[:60])
        assert artifact.is_artifact(folder)
        assert not artifact.is_artifact(tmp_path / "nowhere")


class TestDamage:
    @pytest.mark.parametrize("kind", ["timm", "bert"])
    def test_missing_weights(self, tmp_path, kind):
        """Without model.safetensors the path is named."""
        folder = copy_of(kind, tmp_path)
        (folder / "model.safetensors").unlink()
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            askewq.load(folder)

    def test_truncated_weights(self, tmp_path):
        """A file cut short is refused, and no model is returned."""
        folder = copy_of("timm", tmp_path)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            askewq.load(folder)

    def test_weights_of_another_run(self, tmp_path):
        """A packed file of another network does not fit, and the keys are named."""
        folder = copy_of("timm", tmp_path)
        shutil.copy(finished("timm-vit")[0] / "model.safetensors", folder)
        with pytest.raises(FormatError, match=r"does not fit the model.*conv1"):
            askewq.load(folder)

    @pytest.mark.parametrize(
        ("kind", "name", "word"),
        [
            ("bert", "tokenizer.json", "tokenizer"),
            ("vit", "preprocessor_config.json", "processor"),
        ],
    )
    def test_missing_preprocessing(self, tmp_path, kind, name, word):
        """An artifact without its tokenizer or processor is refused for evaluation by name."""
        folder = copy_of(kind, tmp_path)
        (folder / name).unlink()
        with pytest.raises(askewq.AskewError, match=word):
            artifact.load_artifact(folder)
