"""Encoders of images without labels: timm, transformers and modules of one's own, to every reader.

What texts and images share is in test_embeddings.py, and test_train.py runs both.
"""

import json
import shutil

import builders
import pytest
import timm
import torch
from builders import command, finetune, finished, unlabelled_images
from safetensors.torch import load_file, save_file

import askewq
from askewq import data, models, own_models
from askewq.columns import Columns
from askewq.errors import ModelError, RecipeError
from askewq.tasks import logits_of, metric_of

TASK = "image-feature-extraction"
KINDS = ["timm-encoder", "vit-encoder"]


def images(kind):
    """Return the artifact's input for two pictures."""
    loaded = askewq.artifact.load_artifact(finished(kind)[0])
    made = loaded.preprocessing
    pictures = [made.image(image) for image, _ in builders.pictures(2)]
    return made.batch(torch.stack(pictures))


def test_timm_gives_what_its_head_was_given():
    """The embedding is the input of the classifier, with the weights of the whole network."""
    weights = builders.resnet_weights() / "resnet.safetensors"
    whole = timm.create_model("test_resnet").eval()
    whole.load_state_dict(load_file(weights))
    given = []
    whole.fc.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    pixels = torch.randn(2, 3, 32, 32)
    loaded = models.load("test_resnet", TASK, weights=weights)
    loaded.model.eval()
    with torch.no_grad():
        whole(pixels)
        found = logits_of(loaded.model, loaded.spec, {"pixel_values": pixels})
    assert torch.equal(found, given[0])
    assert metric_of(TASK) == "similarity"


def test_transformers_give_their_pooler_output():
    """The embedding is the encoder's own, also where it has two more dimensions of size 1."""
    import transformers

    loaded = models.load(str(builders.vit_encoder()), TASK)
    pixels = torch.randn(2, 3, 16, 16)
    loaded.model.eval()
    with torch.no_grad():
        wanted = loaded.model(pixels).pooler_output
        assert torch.equal(logits_of(loaded.model, loaded.spec, {"pixel_values": pixels}), wanted)
    small = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}
    convolutions = transformers.ResNetModel(transformers.ResNetConfig(**small)).eval()
    with torch.no_grad():
        assert convolutions(pixels).pooler_output.shape == (2, 8, 1, 1)
        assert logits_of(convolutions, loaded.spec, {"pixel_values": pixels}).shape == (2, 8)


def test_the_data_need_no_label():
    """A folder of images alone is enough, and labels are not read."""
    found = data.open_data(builders.recipe("timm-encoder", "out"), TASK)
    assert found.columns == Columns(("image",), None)
    labelled = builders.recipe("timm-encoder", "out", dataset=str(builders.image_parquet()))
    assert data.open_data(labelled, TASK).columns == Columns(("image",), None)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model": "test_vit", "pretrained": False, "image_size": 32}],
    ids=["transformers", "timm"],
)
def test_a_run_makes_a_similar_encoder(tmp_path, changes):
    """Training brings the embeddings back to those of full precision."""
    made = finetune("vit-encoder", tmp_path / "out", max_steps=30, lr=0.003, **changes)
    assert made["full_precision"] == 100
    assert made["rounded"] + 0.5 < made["snapped"] < 99.99
    assert made["reloaded"] == made["snapped"]


@pytest.mark.parametrize("kind", KINDS)
def test_eval_gives_the_metric_of_the_run(kind):
    """A Hugging Face original is found by its name; timm's is told by its weights."""
    folder, metrics = finished(kind)
    more = ("--teacher-weights", builders.SETTINGS[kind]()["weights"]) if "timm" in kind else ()
    found = command("eval", folder, "--dataset", unlabelled_images(), *more, "--batch-size", 8)
    assert found.code == 0, found.err
    assert json.loads(found.out.splitlines()[-1])["similarity"] == metrics["reloaded"]


def test_transformers_loads_it_packed():
    """AutoModel gives the embeddings of the dense network, to the bit."""
    from transformers import AutoModel

    folder, _ = finished("vit-encoder")
    pixels = images("vit-encoder")
    with torch.no_grad():
        wanted = askewq.load(folder)(pixels).pooler_output
        assert torch.equal(AutoModel.from_pretrained(folder)(pixels).pooler_output, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_is_one_like_the_others(kind):
    """There is no head: float is the first layer alone, in the plan as in the artifact."""
    words = [builders.SETTINGS[kind]()["model"], "--task", TASK]
    shown = command("inspect", *words, "--no-trial").out
    packed = askewq.checkpoint.read(finished(kind)[0] / "model.safetensors").weights
    last = {"timm-encoder": "layer4.0.downsample.1", "vit-encoder": "pooler.dense"}[kind]
    assert f"{last}.weight" in packed
    assert "first layer, kept" in shown
    assert "last layer, kept" not in shown


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_says_what_an_embedding_is(kind):
    """And the Hub reads the task."""
    card = (finished(kind)[0] / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card
    assert "sentence-similarity" not in card
    assert ("`pooler_output`" in card) == (kind == "vit-encoder")
    assert "is its embedding" in card or kind == "vit-encoder"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["dense", "onnx", "compressed-tensors"])
def test_exports(kind, to, tmp_path):
    """Each format's own loader gives the embeddings, within the format's bound."""
    found = command("export", finished(kind)[0], "--to", to, "--output", tmp_path / to)
    if (kind, to) == ("timm-encoder", "compressed-tensors"):
        assert found.code == 2  # of transformers alone
        return
    assert found.code == 0, found.err
    if to == "onnx":
        import onnx

        graph = onnx.load(tmp_path / to / "model.onnx").graph
        assert [value.name for value in graph.output] == ["embedding"]
        assert graph.output[0].type.tensor_type.shape.dim[1].dim_value > 3
    if (kind, to) == ("timm-encoder", "dense"):
        again = timm.create_model(f"local-dir:{tmp_path / to}", pretrained=True).eval()
        with torch.no_grad():
            wanted = askewq.load(finished(kind)[0])(images(kind))
            assert torch.equal(again(images(kind)), wanted)


def test_inspect_tries_it():
    """The verdict is of the network without its head."""
    shown = command("inspect", "test_resnet", "--task", TASK, "--image-size", 32)
    assert "works: " in shown.out
    assert "fc" not in shown.out.split()
    assert "works: " in command("inspect", builders.vit_encoder(), "--task", TASK).out


@pytest.mark.parametrize(
    "more",
    [
        {"streaming": True, "augment": "crop-flip"},
        {"act_bits": 4},
        {"compile": True},
        {"method": "binaryconnect", "optimizer": "sgd"},
        {"polish_steps": 2},
    ],
    ids=str,
)
def test_it_goes_with(tmp_path, more):
    """Other settings of a run reach this task, too."""
    made = finetune("timm-encoder", tmp_path / "out", **more)
    assert made["reloaded"] == made["snapped"]
    assert made["full_precision"] == pytest.approx(100, abs=0.01)


def test_hidden_states_teach_too(tmp_path):
    """Where transformers tells them."""
    made = finetune("vit-encoder", tmp_path / "out", distill_hidden=1.0)
    assert made["reloaded"] == made["snapped"]


def test_another_teacher(tmp_path):
    """One that is named teaches like the network itself, if that is what it is."""
    weights = builders.SETTINGS["timm-encoder"]()["weights"]
    named = {"teacher": "test_resnet", "teacher_weights": weights}
    made = finetune("timm-encoder", tmp_path / "out", **named)
    assert made["full_precision"] == 100
    assert made["reloaded"] == finished("timm-encoder")[1]["reloaded"]


def test_a_teacher_takes_images_of_the_size(tmp_path):
    """Weights for another size than the teacher's own are no weights for it."""
    torch.manual_seed(6)
    network = timm.create_model("test_vit", num_classes=0, img_size=32)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    own = {"model": "test_vit", "weights": str(tmp_path / "w.safetensors")}
    named = {"teacher": "test_vit", "teacher_weights": own["weights"]}
    made = finetune("timm-encoder", tmp_path / "out", **own, **named)
    assert made["full_precision"] == 100


def test_a_teacher_of_another_width(tmp_path):
    """Both widths are said, before anything is written."""
    with pytest.raises(ModelError, match="embeddings have 3 numbers and the model's 16"):
        finetune("vit-encoder", tmp_path / "out", teacher=builders.own("small"))
    assert not (tmp_path / "out").exists()


class TestOwnModules:
    @staticmethod
    def run(output, factory="features", **more):
        """Fine-tune a module of one's own that returns embeddings."""
        given = {"weights": None, "image_size": 16, "model": builders.own(factory), **more}
        return finetune("timm-encoder", output, **given)

    def test_eval_runs_no_code_that_nobody_named(self, tmp_path):
        """The original is told by its weights; by itself the artifact's is not called."""
        torch.manual_seed(0)
        weights = tmp_path / "w.safetensors"
        save_file(builders.own_network("features").state_dict(), weights)
        made = self.run(tmp_path / "out", weights=str(weights))
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        builders.edit_config(tmp_path / "out", name=f"{tmp_path / 'evil.py'}:factory")
        (tmp_path / "out" / "recipe.yaml").unlink()
        words = ("eval", tmp_path / "out", "--dataset", unlabelled_images())
        words = (*words, "--model", builders.own("features"), "--batch-size", 8)
        refused = command(*words)
        assert refused.code == 2
        assert "path/to/file.py:factory), or --teacher-weights" in refused.err
        found = command(*words, "--teacher-weights", weights)
        assert found.code == 0, found.err
        assert json.loads(found.out.splitlines()[-1])["similarity"] == made["reloaded"]
        assert not (tmp_path / "ran").exists()

    def test_feature_maps_are_refused(self, tmp_path):
        """An embedding is a row of numbers; the shape that came is said."""
        with pytest.raises(ModelError, match=r"return embeddings \[batch, width\].*\[8, 8, 8, 8\]"):
            self.run(tmp_path / "out", factory="feature_maps", include=["*"])
        assert not (tmp_path / "out").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"distill": 0.5}, "distill goes with task"),
            ({"full_precision_steps": 2}, "full_precision_steps goes with task"),
            ({"label_column": "label"}, "label_column goes with task"),
            ({"tokenizer": "t"}, "tokenizer goes with task"),
            ({"max_length": 8}, "max_length goes with task"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_settings_that_decide_nothing(self, changes, words):
        """What belongs to labels or texts is named."""
        with pytest.raises(RecipeError, match=f"{words}.*leave"):
            builders.recipe("timm-encoder", "out", **changes)

    def test_a_text_encoder(self):
        """It takes no images."""
        with pytest.raises(ModelError, match=r"take pixel_values, and .* takes input_ids"):
            models.load(str(builders.encoder()), TASK)

    def test_a_pooler_without_weights(self):
        """Embeddings would be random numbers, others at every loading."""
        with pytest.raises(ModelError, match=r"no weights for pooler.dense.bias, pooler.dense.we"):
            models.load(str(builders.vit()), TASK)
        models.load(str(builders.vit()), TASK, pretrained=False)

    def test_a_layer_without_weights(self, tmp_path):
        """What is random in the middle makes random embeddings, too."""
        folder = tmp_path / "v"
        shutil.copytree(builders.vit_encoder(), folder)
        state = load_file(folder / "model.safetensors")
        kept = {k: v for k, v in state.items() if "layernorm.weight" not in k}
        assert len(kept) < len(state)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=r"no weights for layernorm\.weight"):
            models.load(str(folder), TASK)

    def test_an_encoder_that_pools_nothing(self, tmp_path):
        """Which transformers' Segformer does not."""
        import transformers

        small = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
        network = transformers.SegformerModel(transformers.SegformerConfig(**small))
        network.save_pretrained(tmp_path / "s")
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(
            tmp_path / "s"
        )
        with pytest.raises(ModelError, match="returns no pooler_output"):
            finetune("vit-encoder", tmp_path / "out", model=str(tmp_path / "s"))
        assert not (tmp_path / "out").exists()

    def test_a_teacher_for_images_of_another_size(self, tmp_path):
        """Its size is fixed, and nothing is written before it is tried."""
        (tmp_path / "fixed.py").write_text(
            "from torch import nn\n\n"
            "class Fixed(nn.Flatten):\n"
            "    def forward(self, x):\n"
            "        assert x.shape[-1] == 64, 'takes 64 x 64'\n"
            "        return super().forward(x)\n"
        )
        teacher = f"{tmp_path / 'fixed.py'}:Fixed"
        with pytest.raises(ModelError, match=r"teacher fails on a batch of .* takes 64 x 64"):
            finetune("timm-encoder", tmp_path / "out", teacher=teacher)
        assert not (tmp_path / "out").exists()
        words = ("eval", finished("timm-encoder")[0], "--dataset", unlabelled_images())
        found = command(*words, "--teacher", teacher)
        assert found.code == 2
        assert "teacher fails on a batch of" in found.err

    def test_the_weights_of_a_head_are_no_error_elsewhere(self, tmp_path):
        """Only what timm calls the head may be left over."""
        state = load_file(builders.resnet_weights() / "resnet.safetensors")
        save_file({**state, "extra.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
        with pytest.raises(ModelError, match="1 are unknown"):
            models.load("test_resnet", TASK, weights=tmp_path / "w.safetensors")

    def test_a_plan(self, tmp_path):
        """Without labels there is no loss to measure."""
        outcome = command(
            *("plan", "--model", "test_resnet", "--no-pretrained", "--task", TASK),
            *("--dataset", unlabelled_images(), "--average-bits", 3, "--output", tmp_path / "p"),
        )
        assert outcome.code == 2
        assert f"task = {TASK} has none" in outcome.err

    def test_eval_runs_no_code_that_an_artifact_names(self, tmp_path):
        """A file in the place of the original is refused unread."""
        folder = builders.copy_of("timm-encoder", tmp_path)
        (folder / "recipe.yaml").unlink()
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        builders.edit_config(folder, name=f"{tmp_path / 'evil.py'}:factory")
        found = command("eval", folder, "--dataset", unlabelled_images())
        assert found.code == 2
        assert "runs only where you name it" in found.err
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["hf-hub:stranger/x", "local-dir:{}", "test_resnet.x/y"])
    def test_eval_reads_no_repository_that_an_artifact_names(self, tmp_path, name):
        """Nobody vouches for what a timm name with a source of its own leads to."""
        folder = builders.copy_of("timm-encoder", tmp_path)
        (folder / "recipe.yaml").unlink()
        builders.edit_config(folder, name=name.format(tmp_path))
        found = command("eval", folder, "--dataset", unlabelled_images())
        assert found.code == 2
        assert "none of timm's own names, and is read only where you name it" in found.err

    @pytest.mark.parametrize("key", ["weights", "no-pretrained"])
    def test_eval_of_a_run_from_other_weights(self, tmp_path, key):
        """Similarity to the weights that timm publishes would mean nothing."""
        folder = builders.copy_of("timm-encoder", tmp_path)
        if key == "no-pretrained":
            text = (folder / "recipe.yaml").read_text()
            keys = ("weights:", "pretrained:")
            kept = [line for line in text.splitlines() if not line.startswith(keys)]
            (folder / "recipe.yaml").write_text("\n".join([*kept, "pretrained: false"]))
        found = command("eval", folder, "--dataset", unlabelled_images())
        assert found.code == 2
        assert "did not start from the weights that are published as 'test_resnet'" in found.err
        assert "--teacher-weights" in found.err


def test_a_timm_folder_that_does_more_than_describe(tmp_path):
    """Its config may not have timm read another file."""
    content = {"architecture": "test_resnet", "model_args": {"checkpoint_path": "x.pth"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="do not only describe a timm network"):
        models.load(f"local-dir:{tmp_path}", TASK)


@pytest.mark.parametrize("name", ["test_resnet.x/y", "resnet18.no_such_tag"])
def test_a_timm_name_that_is_none(name):
    """One message, as for every other name."""
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load(name, TASK)


@pytest.mark.parametrize("name", ["efficientvit_m0", "levit_128s", "caformer_s18"])
def test_a_head_of_several_layers(name, tmp_path):
    """The whole network's weights fit the network without its head, whatever the head held."""
    weights = tmp_path / "w.safetensors"
    with torch.device("meta"):
        whole, encoder = timm.create_model(name), timm.create_model(name, num_classes=0)
    state = {k: torch.zeros(t.shape, dtype=t.dtype) for k, t in whole.state_dict().items()}
    save_file(state, weights)
    own_models.load_weights(encoder.to_empty(device="cpu"), weights)
    save_file({**state, "extra.weight": torch.zeros(1)}, weights)
    with pytest.raises(ModelError, match="1 are unknown"):
        own_models.load_weights(encoder, weights)
