"""Models from timm, Hugging Face and the user's own file, and what is refused."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import builders
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from askewq import artifact, described, distill, models
from askewq.errors import ModelError
from askewq.own_models import read_state
from askewq.preprocessing import ImagePreprocessing, ProcessorPreprocessing, TextPreprocessing
from askewq.spec import ModelSpec

LABELS = ("red", "green", "blue")
IMAGES = "image-classification"


def own(factory="small", **arguments):
    """Load one of the user's own networks."""
    return models.load(builders.own(factory), IMAGES, LABELS, **arguments)


class TestFindSource:
    @pytest.mark.parametrize(
        ("name", "source"),
        [
            ("resnet50", "timm"),
            ("resnet50.a1_in1k", "timm"),
            ("hf-hub:org/name", "timm"),
            ("local-dir:/some/where", "timm"),
            ("timm/resnet50.a1_in1k", "timm"),
            ("timm/somebodys", "timm"),
            ("org/name", "transformers"),
            ("bert-base-uncased", "transformers"),
            ("resnt50", "transformers"),
        ],
    )
    def test_names(self, name, source):
        """A name that timm knows is timm's, every other bare name is a Hugging Face id."""
        assert models.find_source(name) == source

    def test_folders_and_files(self):
        """A folder with a config is a Hugging Face model, file.py:factory is the user's own."""
        assert models.find_source(str(builders.bert())) == "transformers"
        assert models.find_source(builders.own("small")) == "module"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nowhere/net.py:make", r"there is no file 'nowhere/net\.py'"),
            ("./nowhere", r"no config\.json"),
            ("/nowhere/at/all", r"no config\.json"),
        ],
    )
    def test_what_is_not_there(self, name, message):
        """A missing file or folder is named."""
        with pytest.raises(ModelError, match=message):
            models.find_source(name)

    def test_a_folder_without_a_config(self, tmp_path):
        """A folder that holds no model is not taken for a Hub id."""
        with pytest.raises(ModelError, match=r"no config\.json"):
            models.find_source(str(tmp_path))

    def test_a_file_without_a_factory(self):
        """A python file without `:factory` is refused, saying how a module is given."""
        with pytest.raises(ModelError, match=r"file\.py:factory"):
            models.load(str(builders.own_module() / "nets.py"), IMAGES, LABELS)


class TestGuessTask:
    @pytest.mark.parametrize(
        ("name", "task"),
        [
            ("bert", "text-classification"),
            ("llama", "causal-lm"),
            ("vit", "image-classification"),
        ],
    )
    def test_from_the_architecture(self, name, task):
        """A Hugging Face model with a head says its task."""
        assert models.guess_task(str(getattr(builders, name)()), "transformers") == task

    def test_timm_and_own_modules_classify_images(self):
        """Networks that take images alone have one task."""
        assert models.guess_task("resnet50", "timm") == IMAGES
        assert models.guess_task("f.py:g", "module") == IMAGES

    @pytest.mark.parametrize("architectures", [["BertModel"], ["BertForMaskedLM"], None])
    def test_other_heads_are_not_guessed(self, tmp_path, architectures):
        """A bare encoder or another head needs --task, and the message lists the tasks."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        edit_json(folder / "config.json", architectures=architectures)
        with pytest.raises(ModelError, match="--task") as caught:
            models.guess_task(str(folder), "transformers")
        assert "text-classification" in str(caught.value)


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestTimm:
    def test_head_and_preprocessing(self):
        """The head fits the labels; size, mean, std and crop are the model's own."""
        loaded = models.load("test_resnet", IMAGES, LABELS, pretrained=False)
        assert loaded.model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
        own = loaded.model.default_cfg
        prepared = loaded.preprocessing
        assert prepared.size == own["input_size"][1:]
        assert (prepared.mean, prepared.std) == (tuple(own["mean"]), tuple(own["std"]))
        assert prepared.crop_pct == own["crop_pct"]

    def test_image_size_reaches_the_network(self):
        """A Vision Transformer is built for the size that was asked for."""
        loaded = models.load("test_vit", IMAGES, LABELS, pretrained=False, image_size=32)
        assert loaded.preprocessing.size == (32, 32)
        assert loaded.model(torch.randn(1, 3, 32, 32)).shape == (1, 3)

    def test_a_crop_beyond_the_picture(self, tmp_path):
        """VOLO's share is 1.15: an artifact holds it; one that none can hold is refused at once."""
        loaded = models.load("test_resnet", IMAGES, LABELS, pretrained=False)
        loaded.preprocessing = replace(loaded.preprocessing, crop_pct=1.15)
        described.check(loaded)
        artifact.save_config(loaded, tmp_path)
        spec, values = artifact.read_spec(tmp_path)
        assert artifact.restore(spec, values, tmp_path) == loaded.preprocessing
        image = loaded.preprocessing.image(Image.new("RGB", (300, 200), "white"))
        assert image.shape == (3, *loaded.preprocessing.size)
        assert image.min() == 0
        assert image.max() == 255
        loaded.preprocessing = replace(loaded.preprocessing, crop_pct=3.0)
        with pytest.raises(ModelError, match=r"no artifact can hold .*crop_pct must be"):
            described.check(loaded)

    def test_overrides(self):
        """Mean and std given by the user replace the model's."""
        loaded = models.load(
            "test_resnet", IMAGES, LABELS, pretrained=False, mean=(0.0,) * 3, std=(1.0,) * 3
        )
        assert (loaded.preprocessing.mean, loaded.preprocessing.std) == ((0.0,) * 3, (1.0,) * 3)

    def test_weights_from_a_file(self, tmp_path):
        """A state dict takes the place of the pretrained weights, and nothing is downloaded."""
        torch.manual_seed(5)
        source = models.load("test_resnet", IMAGES, LABELS, pretrained=False).model
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        loaded = models.load("test_resnet", IMAGES, LABELS, weights=tmp_path / "w.safetensors")
        for key, tensor in loaded.model.state_dict().items():
            assert torch.equal(tensor, source.state_dict()[key])

    def test_weights_of_another_head(self, tmp_path):
        """Weights for another number of classes are refused by name."""
        source = models.load("test_resnet", IMAGES, ("a", "b"), pretrained=False).model
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(ModelError, match=r"fc\.\w+.* is \[2"):
            models.load("test_resnet", IMAGES, LABELS, weights=tmp_path / "w.safetensors")

    def test_codes_without_a_scale(self, tmp_path):
        """Whole numbers in the place of weights are refused, not copied."""
        state = models.load("test_resnet", IMAGES, LABELS, pretrained=False).model.state_dict()
        key = next(key for key in state if key.endswith("conv1.weight"))
        save_file(state | {key: state[key].to(torch.int8)}, tmp_path / "w.safetensors")
        with pytest.raises(ModelError, match=f"'{key}' is torch.int8 there and torch.float32"):
            models.load("test_resnet", IMAGES, LABELS, weights=tmp_path / "w.safetensors")

    def test_a_local_folder(self, tmp_path):
        """A local-dir: name of timm's loads config and weights from a folder."""
        import timm

        torch.manual_seed(6)
        source = timm.create_model("test_resnet", num_classes=3)
        timm.models.save_for_hf(source, tmp_path)
        loaded = models.load(f"local-dir:{tmp_path}", IMAGES, LABELS)
        assert torch.equal(loaded.model.state_dict()["fc.weight"], source.fc.weight)
        assert loaded.spec.arguments["model_name"] == "test_resnet"
        assert models.build(loaded.spec).state_dict().keys() == source.state_dict().keys()

    @pytest.mark.parametrize(
        ("names", "labels", "order", "words"),
        [
            (["c", "a", "b"], ("a", "b", "c"), ("c", "a", "b"), None),
            (["C", "a", "b"], ("a", "b", "c"), ("c", "a", "b"), None),
            (["x", "y", "z"], ("a", "b", "c"), ("a", "b", "c"), "was trained for the classes x, y"),
            (None, ("a", "b", "c"), ("a", "b", "c"), "does not name the 3 classes of its head"),
            (None, ("n00000001", "n00000002", "n00000003"), None, None),
            (["c", "a", "b"], ("a", "b"), ("a", "b"), None),
        ],
    )
    def test_a_head_for_the_labels_keeps_their_order(self, tmp_path, names, labels, order, words):
        """Where the model's config names them; what is assumed otherwise is told."""
        import timm

        source = timm.create_model("test_resnet", num_classes=3)
        timm.models.save_for_hf(source, tmp_path, {"label_names": names} if names else None)
        loaded = models.load(f"local-dir:{tmp_path}", IMAGES, labels)
        assert loaded.spec.labels == (order or labels)
        assert [words in doubt for doubt in loaded.doubts] == [True] * bool(words)
        assert len(loaded.notes) == (len(labels) != 3)

    @pytest.mark.parametrize("name", ["hf-hub:org/name", "local-dir:/nowhere", "resnet18"])
    def test_out_of_reach(self, name):
        """Without the Hub, pretrained weights are an error that says what works offline."""
        with pytest.raises(ModelError, match="--no-pretrained") as caught:
            models.load(name, IMAGES, LABELS)
        assert repr(name) in str(caught.value)

    def test_a_known_name_is_not_called_unknown(self):
        """The message for a timm name whose weights are out of reach does not doubt the name."""
        with pytest.raises(ModelError) as caught:
            models.load("resnet18", IMAGES, LABELS)
        assert "no timm name" not in str(caught.value)

    def test_other_tasks_are_refused(self):
        """A timm model takes no text."""
        with pytest.raises(ModelError, match="causal-lm"):
            models.load("test_resnet", "causal-lm", pretrained=False)


class TestHuggingFace:
    def test_weights_and_tokenizer(self):
        """Weights come from the folder, in float32, with the tokenizer beside them."""
        loaded = models.load(str(builders.bert()), "text-classification", ("pos", "neg"))
        stored = load_file(builders.bert() / "model.safetensors")
        state = loaded.model.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in stored.items())
        assert isinstance(loaded.preprocessing, TextPreprocessing)
        assert loaded.notes == ()

    def test_half_precision_weights_become_float32(self, tmp_path):
        """Master weights are float32 whatever the checkpoint stores."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        stored = load_file(folder / "model.safetensors")
        save_file(
            {key: tensor.bfloat16() for key, tensor in stored.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        edit_json(folder / "config.json", dtype="bfloat16")
        loaded = models.load(str(folder), "text-classification", ("pos", "neg"))
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
        assert {p.dtype for p in models.build(loaded.spec).parameters()} == {torch.float32}

    def test_a_new_head_is_said_so(self):
        """Another number of labels makes a new head, and a note names it."""
        loaded = models.load(str(builders.bert()), "text-classification", ("a", "b", "c", "d"))
        assert loaded.model.classifier.out_features == 4
        assert loaded.model.config.id2label == dict(enumerate("abcd"))
        assert any("classifier.weight" in note for note in loaded.notes)

    @pytest.mark.parametrize("own", [("pos", "neg"), ("POS", "NEG")])
    def test_a_head_for_the_labels_keeps_their_order(self, tmp_path, own):
        """The trained rows mean what the model's config says, in whatever case, in data's words."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        edit_json(folder / "config.json", id2label=dict(enumerate(own)))
        loaded = models.load(str(folder), "text-classification", ("neg", "pos"))
        assert loaded.spec.labels == ("pos", "neg")
        assert loaded.model.config.id2label == {0: "pos", 1: "neg"}
        assert loaded.notes == ()

    @pytest.mark.parametrize(
        ("own", "told"),
        [(("POSITIVE", "NEGATIVE"), True), (("LABEL_0", "LABEL_1"), False), (("a", "neg"), True)],
    )
    def test_a_head_for_classes_of_other_names(self, tmp_path, own, told):
        """Which is taken for which is for the user to judge, of a teacher as well."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        edit_json(folder / "config.json", id2label=dict(enumerate(own)))
        loaded = models.load(str(folder), "text-classification", ("neg", "pos"))
        assert loaded.spec.labels == ("neg", "pos")
        words = f"trained for the classes {', '.join(own)}, and is taken to mean neg, pos"
        assert [words in doubt for doubt in loaded.doubts] == [True] * told
        student = models.load(str(builders.bert()), "text-classification", ("neg", "pos"))
        recipe = builders.recipe("bert", tmp_path / "out", teacher=str(folder), distill=0.5)
        teacher = distill.load_teacher(recipe, student)
        assert [words in doubt for doubt in teacher.doubts] == [True] * told

    def test_a_decoder_knows_its_tokenizers_padding(self, tmp_path):
        """It judges a text's last token, whatever stands in the batch beside it."""
        import transformers

        folder = shutil.copytree(builders.llama(), tmp_path / "llama")
        config = transformers.LlamaConfig.from_pretrained(folder, num_labels=2)
        torch.manual_seed(0)
        transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
        for padding in (None, 5):
            edit_json(folder / "config.json", pad_token_id=padding)
            loaded = models.load(str(folder), "text-classification", ("neg", "pos"))
            texts = loaded.preprocessing.tokenizer(["good", "good film"], padding=True)
            batch = {key: torch.tensor(value) for key, value in texts.items()}
            batch.pop("token_type_ids", None)
            last = int(batch["attention_mask"][0].sum())
            rebuilt = models.build(loaded.spec)
            rebuilt.load_state_dict(loaded.model.state_dict())
            for model in (loaded.model.eval(), rebuilt.eval()):
                with torch.no_grad():
                    alone = model(input_ids=batch["input_ids"][:1, :last]).logits
                    torch.testing.assert_close(model(**batch).logits[:1], alone)
        encoder = shutil.copytree(builders.bert(), tmp_path / "bert")
        edit_json(encoder / "config.json", pad_token_id=5)
        loaded = models.load(str(encoder), "text-classification", ("neg", "pos"))
        assert loaded.model.config.pad_token_id == 5

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            *(
                ({"quantization_config": {"quant_method": m}}, f"quantized already, by {m}")
                for m in ("gptq", "awq", "bitsandbytes")
            ),
            ({"_attn_implementation": "flash_attention_2"}, "cannot be loaded: .*[Ff]lash"),
            ({"attn_implementation": "flash_attention_2"}, "cannot be loaded: .*[Ff]lash"),
            ({"hidden_act": "gelu_foo"}, "cannot be loaded: .*gelu_foo"),
        ],
        ids=str,
    )
    def test_what_transformers_cannot_build(self, tmp_path, change, words):
        """A message, whatever transformers raises; without weights, too."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        edit_json(folder / "config.json", **change)
        for load in (
            lambda: models.load(str(folder), "text-classification", ("neg", "pos")),
            lambda: models.load_bare(str(folder), "transformers", "text-classification"),
        ):
            with pytest.raises(ModelError, match=words):
                load()

    @pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
    def test_a_head_for_another_problem(self, tmp_path, kind):
        """It is trained for one label of several, and who loads it is told so."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        edit_json(folder / "config.json", problem_type=kind)
        loaded = models.load(str(folder), "text-classification", ("neg", "pos"))
        assert loaded.spec.arguments["problem_type"] == "single_label_classification"
        assert loaded.model.config.problem_type == "single_label_classification"

    def test_labels_that_differ_in_case_alone(self, tmp_path):
        """They are two labels, not one."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        loaded = models.load(str(folder), "text-classification", ("Neg", "neg"))
        assert loaded.spec.labels == ("Neg", "neg")

    def test_positions_limit_texts(self, tmp_path):
        """A tokenizer that names no limit gets the model's."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        edit_json(folder / "tokenizer_config.json", model_max_length=10**30)
        loaded = models.load(str(folder), "text-classification", ("pos", "neg"))
        assert loaded.preprocessing.max_length == 32

    def test_an_artifact_is_no_pretrained_model(self):
        """It is called by its name, for training, a plan of it and its task."""
        name = str(builders.finished("bert")[0])
        for call in (
            lambda: models.load(name, "text-classification"),
            lambda: models.load_bare(name, "transformers", "text-classification"),
            lambda: models.guess_task(name, "transformers"),
        ):
            with pytest.raises(ModelError, match=r"is an artifact of askewq.*--to dense"):
                call()

    def test_a_network_of_another_kind(self):
        """A text model has no form for images, and it is not said that it was not found."""
        name = str(builders.bert())
        for call in (
            lambda: models.load(name, IMAGES, LABELS),
            lambda: models.load_bare(name, "transformers", IMAGES),
        ):
            with pytest.raises(ModelError, match=r"no network of .* for this --task"):
                call()
        with pytest.raises(ModelError, match="goes with models from transformers"):
            models.load_bare("test_resnet", "timm", "text-classification")

    def test_an_image_processor(self):
        """An image model brings its processor."""
        loaded = models.load(str(builders.vit()), IMAGES, LABELS)
        assert isinstance(loaded.preprocessing, ProcessorPreprocessing)

    def test_random_weights_when_asked(self):
        """--no-pretrained leaves the folder's weights alone."""
        loaded = models.load(
            str(builders.bert()), "text-classification", ("a", "b"), pretrained=False
        )
        stored = load_file(builders.bert() / "model.safetensors")
        key = "bert.encoder.layer.0.output.dense.weight"
        assert not torch.equal(loaded.model.state_dict()[key], stored[key])

    def test_unknown_ids_get_near_timm_names(self):
        """A name that is none of all gets the timm names that it resembles."""
        with pytest.raises(ModelError, match="did you mean resnet50"):
            models.load("resnt50", IMAGES, LABELS)

    def test_weights_flag_is_refused(self, tmp_path):
        """A state dict for a Hugging Face model goes into its folder, and the message says so."""
        with pytest.raises(ModelError, match="--weights goes with timm"):
            models.load(str(builders.bert()), "text-classification", ("a", "b"), weights=tmp_path)

    def test_a_folder_without_a_processor(self, tmp_path):
        """An image model without preprocessor_config.json is refused, naming what is missing."""
        folder = shutil.copytree(builders.vit(), tmp_path / "vit")
        (folder / "preprocessor_config.json").unlink()
        with pytest.raises(ModelError, match="processor"):
            models.load(str(folder), IMAGES, LABELS)

    def test_a_folder_without_a_tokenizer(self, tmp_path):
        """A text model without a vocabulary is refused, naming --tokenizer."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ModelError, match="--tokenizer"):
            models.load(str(folder), "text-classification", ("a", "b"))

    def test_a_tokenizer_from_elsewhere(self, tmp_path):
        """--tokenizer takes the place of the one that is missing."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        for path in folder.glob("tokenizer*"):
            path.unlink()
        loaded = models.load(
            str(folder), "text-classification", ("a", "b"), tokenizer=str(builders.llama())
        )
        assert loaded.preprocessing.tokenizer("good film")["input_ids"] == [2, 4, 6, 3]

    @pytest.mark.parametrize("damage", ["no weights", "truncated", "config"])
    def test_damaged_folders(self, tmp_path, damage):
        """A folder whose weights or config are missing or cut short is refused by name."""
        folder = shutil.copytree(builders.bert(), tmp_path / "bert")
        weights = folder / "model.safetensors"
        if damage == "no weights":
            weights.unlink()
        elif damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-50])
        else:
            (folder / "config.json").write_text('{"model_type":')
        with pytest.raises(ModelError) as caught:
            models.load(str(folder), "text-classification", ("a", "b"))
        assert str(folder) in str(caught.value)

    def test_a_timm_folder_is_loaded_by_timm(self, tmp_path):
        """Wrapped by transformers it would be trained, and not be built again."""
        timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=3), tmp_path)
        with pytest.raises(ModelError, match=f"pass local-dir:{tmp_path}"):
            models.load(str(tmp_path), "image-classification", ("a", "b", "c"))
        loaded = models.load(f"local-dir:{tmp_path}", "image-classification", ("a", "b", "c"))
        assert loaded.spec.source == "timm"

    def test_what_its_config_does_not_describe_is_not_trained(self, tmp_path):
        """A head of its own where the config ties it to the embedding: loaded, not built again."""
        folder = shutil.copytree(builders.llama(), tmp_path / "llama")
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=r"another network than its config.*one with model\."):
            builders.finetune("llama", tmp_path / "out", model=str(folder))
        assert not (tmp_path / "out").exists()

    def test_code_of_a_model_does_not_run(self, tmp_path):
        """A folder that brings its own classes is refused unless trust_remote_code is given."""
        marker = tmp_path / "ran"
        folder = shutil.copytree(builders.bert(), tmp_path / "evil")
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
        edit_json(
            folder / "config.json",
            model_type="evil",
            auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
        )
        with pytest.raises(ModelError):
            models.load(str(folder), "text-classification", ("a", "b"))
        assert not marker.exists()

    def test_pickled_weights_with_code_do_not_run(self, tmp_path):
        """A Hugging Face folder with a malicious pytorch_model.bin is refused."""
        marker = tmp_path / "ran"
        folder = shutil.copytree(builders.bert(), tmp_path / "evil")
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(marker), 2))
        with pytest.raises(ModelError):
            models.load(str(folder), "text-classification", ("a", "b"))
        assert not marker.exists()


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


class TestOwnModules:
    def test_factory_is_called(self):
        """The network is what the user's function returns, with ImageNet's mean and std."""
        loaded = own()
        assert [type(layer).__name__ for layer in loaded.model][:2] == ["Conv2d", "ReLU"]
        assert loaded.preprocessing == ImagePreprocessing()

    def test_imports_beside_the_file_work(self, tmp_path):
        """The file may import its neighbours, and sys.path is as before afterwards."""
        import sys

        (tmp_path / "askewq_neighbour.py").write_text("WIDTH = 5\n")
        (tmp_path / "net.py").write_text(
            "from torch import nn\nfrom askewq_neighbour import WIDTH\n"
            "def make():\n    return nn.Linear(WIDTH, 3)\n"
        )
        before = list(sys.path)
        loaded = models.load(f"{tmp_path / 'net.py'}:make", IMAGES, LABELS)
        assert loaded.model.in_features == 5
        assert sys.path == before

    def test_a_module_is_known_to_python(self, tmp_path):
        """Dataclasses look their module up where annotations are text."""
        source = (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "from torch import nn\n\n\n@dataclass\nclass Sizes:\n    width: int = {}\n\n\n"
            "def make():\n    return nn.Linear(2, Sizes().width)\n"
        )
        for width in (3, 4):
            (tmp_path / str(width)).mkdir()
            (tmp_path / str(width) / "own.py").write_text(source.format(width))
        for width in (3, 4, 3):
            name = f"{tmp_path / str(width) / 'own.py'}:make"
            assert models.load(name, IMAGES, LABELS).model.out_features == width

    def test_weights(self):
        """A safetensors file fills the network."""
        path = builders.own_module() / "small.safetensors"
        state = own(weights=path).model.state_dict()
        assert all(torch.equal(state[k], tensor) for k, tensor in load_file(path).items())

    @pytest.mark.parametrize("nested", [True, False])
    def test_plain_pickles_are_read(self, tmp_path, nested):
        """A pickle of tensors alone, or of them under state_dict, is loaded."""
        state = builders.own_network("small").state_dict()
        torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / "w.pt")
        loaded = own(weights=tmp_path / "w.pt").model.state_dict()
        assert all(torch.equal(loaded[k], tensor) for k, tensor in state.items())

    @pytest.mark.parametrize(
        ("factory", "words"),
        [
            ("smal", ["no function 'smal'", "did you mean small?", "ten_classes"]),
            ("fails", ["OSError", "no such luck"]),
            ("exits", ["ended Python (2)", 'if __name__ == "__main__"']),
            ("text", ["returned a str"]),
            ("expanded", ["'2.gains'", "was expanded", ".clone()"]),
        ],
    )
    def test_factories_that_do_not_work(self, factory, words):
        """A missing, failing or wrong factory is named with the reason."""
        with pytest.raises(ModelError) as caught:
            own(factory)
        assert all(word in str(caught.value) for word in words)

    @pytest.mark.parametrize("kind", ["bert", "gpt2", "timm", "own"])
    def test_every_tensor_has_memory_of_its_own(self, kind):
        """Not a mapped file's, where an odd place makes sums other than a reloaded network's."""
        model = builders.untrained(kind).model
        tensors = [*model.parameters(), *model.buffers()]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
        assert all(t.data_ptr() % 64 == 0 for t in tensors)

    def test_tied_weights_under_one_name(self, tmp_path):
        """As safetensors' save_model writes them; a weight that is really missing is named."""
        network = builders.own_network("tied")
        save_model(network, str(tmp_path / "w.safetensors"))
        state = own("tied", weights=tmp_path / "w.safetensors").model.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in network.state_dict().items())
        less = {
            k: v for k, v in network.state_dict().items() if k not in ("one.weight", "two.weight")
        }
        save_file(less, tmp_path / "less.safetensors")
        with pytest.raises(ModelError, match=r"2 keys are missing \(one\.weight, two\.weight\)"):
            own("tied", weights=tmp_path / "less.safetensors")

    def test_a_file_that_does_not_import(self, tmp_path):
        """A syntax error in the user's file is reported with its kind."""
        (tmp_path / "net.py").write_text("def make(:\n")
        with pytest.raises(ModelError, match="SyntaxError"):
            models.load(f"{tmp_path / 'net.py'}:make", IMAGES, LABELS)


def renamed(state):
    """Return a state dict with one key misspelt."""
    return {key.replace("6.weight", "6.weigth"): tensor for key, tensor in state.items()}


class TestWeightFiles:
    def write(self, path, change=lambda state: state):
        """Write a changed state dict of the small network."""
        save_file(change(dict(builders.own_network("small").state_dict())), path)
        return path

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (renamed, ["1 keys are missing (6.weight)", "6.weigth", "did you mean 6.weight?"]),
            (lambda s: {k: t for k, t in s.items() if k != "8.bias"}, ["missing (8.bias)"]),
            (lambda s: {**s, "more": torch.ones(1)}, ["1 are unknown (more)"]),
            (lambda s: {**s, "8.bias": torch.ones(5)}, ["'8.bias' is [5]", "[3]"]),
            (lambda s: {}, ["8 keys are missing", "0.weight"]),
        ],
        ids=["renamed", "missing", "extra", "shape", "empty"],
    )
    def test_what_does_not_fit(self, tmp_path, change, words):
        """Other keys and other shapes are named, with near names."""
        path = self.write(tmp_path / "w.safetensors", change)
        with pytest.raises(ModelError) as caught:
            own(weights=path)
        assert all(word in str(caught.value) for word in [str(path), *words])

    def test_a_malicious_pickle_does_not_run(self, tmp_path):
        """A pickle with code in it is refused, the code is not run, and safetensors is advised."""
        (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": Malicious(tmp_path / "ran")}, 2))
        with pytest.raises(ModelError, match="convert them to safetensors"):
            own(weights=tmp_path / "w.pt")
        torch.save({"a": Malicious(tmp_path / "ran")}, tmp_path / "zip.pt")
        with pytest.raises(ModelError, match="convert them to safetensors"):
            own(weights=tmp_path / "zip.pt")
        assert not (tmp_path / "ran").exists()

    def test_a_pickle_in_disguise_does_not_run(self, tmp_path):
        """A pickle that is called .safetensors is not unpickled."""
        (tmp_path / "w.safetensors").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
        with pytest.raises(ModelError, match="cannot be read"):
            own(weights=tmp_path / "w.safetensors")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("keep", [0, 5, 100, -10])
    @pytest.mark.parametrize("suffix", ["safetensors", "pt"])
    def test_truncated_files(self, tmp_path, suffix, keep):
        """A file cut short is refused with its path, in either format."""
        path = tmp_path / f"w.{suffix}"
        if suffix == "pt":
            torch.save(builders.own_network("small").state_dict(), path)
        else:
            self.write(path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ModelError) as caught:
            own(weights=path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("name", ["nowhere.safetensors", "nowhere.pt", "folder.safetensors"])
    def test_missing_files(self, tmp_path, name):
        """A path without a file is refused as unreadable."""
        (tmp_path / "folder.safetensors").mkdir()
        with pytest.raises(ModelError, match="cannot be read"):
            own(weights=tmp_path / name)

    def test_pickles_of_other_things(self, tmp_path):
        """A pickle of something that is no mapping of tensors is refused."""
        torch.save([torch.ones(1)], tmp_path / "w.pt")
        with pytest.raises(ModelError, match="not a mapping"):
            own(weights=tmp_path / "w.pt")

    def test_old_checkpoints_without_a_step_counter(self, tmp_path):
        """BatchNorm's counter, which decides nothing, may be missing."""
        loaded = models.load("test_resnet", IMAGES, LABELS, pretrained=False)
        state = loaded.model.state_dict()
        old = {k: t for k, t in state.items() if not k.endswith("num_batches_tracked")}
        assert len(old) < len(state)
        save_file(old, tmp_path / "w.safetensors")
        again = models.load("test_resnet", IMAGES, LABELS, weights=tmp_path / "w.safetensors")
        assert torch.equal(again.model.state_dict()["fc.weight"], state["fc.weight"])


class TestRebuild:
    @pytest.mark.parametrize("kind", ["own", "timm", "timm-vit", "bert", "llama", "vit"])
    def test_a_spec_survives_json(self, kind):
        """A network built from a spec that went through JSON has the same keys and classes."""
        settings = builders.SETTINGS[kind]()
        name = settings["model"]
        source = models.find_source(name)
        task = models.guess_task(name, source)
        loaded = models.load(
            name,
            task,
            () if task == "causal-lm" else LABELS,
            pretrained=settings.get("pretrained", True),
            image_size=settings.get("image_size"),
        )
        spec = loaded.spec
        content = json.loads(json.dumps([spec.source, spec.name, spec.task, [], spec.arguments]))
        built = models.build(ModelSpec(*content[:3], labels=spec.labels, arguments=content[4]))
        assert [type(m) for m in built.modules()] == [type(m) for m in loaded.model.modules()]
        shapes = {key: tensor.shape for key, tensor in built.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in loaded.model.state_dict().items()}

    def test_load_bare_needs_no_weights(self, tmp_path):
        """Looking at a model's layers needs its config alone."""
        folder = tmp_path / "config-only"
        folder.mkdir()
        shutil.copy(builders.bert() / "config.json", folder)
        network = models.load_bare(str(folder), "transformers", "text-classification")
        assert isinstance(network, nn.Module)
        assert models.load_bare("test_resnet", "timm", IMAGES).state_dict()
        assert models.load_bare(builders.own("small"), "module", IMAGES).state_dict()


@pytest.mark.parametrize("content", ["[]", "3", '{"architecture": 3}'])
def test_a_damaged_folder_of_timm(tmp_path, content):
    """Its config.json may hold anything."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="local-dir"):
        models.load(f"local-dir:{tmp_path}", "image-classification", ("a", "b"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_of_a_tokenizer(tmp_path, name):
    """They are JSON, and that is all."""
    folder = tmp_path / "bert"
    shutil.copytree(builders.bert(), folder)
    (folder / name).write_text("[]")
    with pytest.raises(ModelError, match="there is no usable tokenizer"):
        models.load(str(folder), "text-classification", ("neg", "pos"))


def test_a_state_dict_of_numbers(tmp_path):
    """Its keys must be names."""
    torch.save({0: torch.zeros(3)}, tmp_path / "numbers.pt")
    with pytest.raises(ModelError, match="not a mapping of names to tensors"):
        read_state(tmp_path / "numbers.pt")
