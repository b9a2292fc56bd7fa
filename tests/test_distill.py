"""Distillation: its loss against the formula, teachers of all kinds, those that do not fit."""

import json
import math
import shutil
from pathlib import Path

import builders
import pytest
import timm
import torch
import transformers
from builders import finetune
from safetensors.torch import load_file, save_file

from askewq import distill, models, output
from askewq.errors import ModelError, OutputError, RecipeError


def test_the_distance_is_the_tempered_divergence():
    """T^2 KL(teacher || student) by a scalar loop; rows labelled -100 do not count."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    labels = torch.tensor([[0, -100, 1], [2, 3, -100]])
    temperature, total = 3.0, 0.0
    counted = [(i, j) for i in range(2) for j in range(3) if labels[i, j] != -100]
    for i, j in counted:
        p = torch.softmax(teacher[i, j].double() / temperature, 0).tolist()
        q = torch.softmax(student[i, j].double() / temperature, 0).tolist()
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = distill.distance(student, teacher, labels, temperature)
    assert found.item() == pytest.approx(temperature**2 * total / len(counted), rel=1e-5)
    assert distill.distance(student, student, labels, temperature).item() == pytest.approx(0)


def test_distillation_alone_pulls_the_student_to_its_teacher(tmp_path):
    """With distill = 1 the labels do not count, and a teacher of random weights is followed."""
    state = load_file(builders.own_module() / "small.safetensors")
    weights = str(builders.own_module() / "small.safetensors")
    save_file({k: v.roll(1, 0).contiguous() for k, v in state.items()}, tmp_path / "t.safetensors")
    common = {"weights": weights, "max_steps": 8, "distill": 1.0}
    finetune("own", tmp_path / "self", **common)
    finetune("own", tmp_path / "same", **common, teacher_weights=weights)
    finetune("own", tmp_path / "other", **common, teacher_weights=str(tmp_path / "t.safetensors"))
    finetune("own", tmp_path / "none", **{**common, "distill": 0.0})
    packed = {
        name: (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("self", "same", "other", "none")
    }
    assert packed["self"] == packed["same"]  # the default teacher is the network's own start
    assert len(set(packed.values())) == 3


@pytest.mark.parametrize("kind", ["bert", "llama", "vit", "timm"])
def test_every_task_can_be_taught(tmp_path, kind):
    """The network before it is quantized teaches, for each source and task: the result differs."""
    packed = []
    for share in (0.0, 0.5):
        finetune(kind, tmp_path / str(share), distill=share, max_steps=4, lr=0.05)
        packed.append((tmp_path / str(share) / "model.safetensors").read_bytes())
    assert packed[0] != packed[1]
    assert (tmp_path / "0.5" / "checkpoints" / "teacher.safetensors").is_file()


def test_a_teacher_of_another_source_is_called_in_its_own_way(tmp_path):
    """A timm student learns from a user's own network with the classes of the data."""
    own = builders.SETTINGS["own"]()
    settings = {"dataset": own["dataset"], "image_size": 32, "max_steps": 2}
    finetune("timm", tmp_path, **settings, distill=0.5, teacher=own["model"])
    assert not (tmp_path / "checkpoints" / "teacher.safetensors").exists()


def test_a_trained_timm_teacher_has_a_head_for_the_data(tmp_path):
    """Weights of a timm network that was fine-tuned to the data set teach."""
    settings = builders.SETTINGS["timm"]()
    teacher = timm.create_model(settings["model"], num_classes=len(builders.COLOURS))
    save_file(teacher.state_dict(), tmp_path / "t.safetensors")
    arguments = {"teacher": settings["model"], "teacher_weights": str(tmp_path / "t.safetensors")}
    finetune("timm", tmp_path / "out", distill=0.5, max_steps=2, **arguments)


def test_overwrite_does_not_delete_the_teacher(tmp_path):
    """A teacher inside the folder that is to be replaced is named and kept."""
    finetune("own", tmp_path, distill=0.5, max_steps=2)
    teacher = tmp_path / "checkpoints" / "teacher.safetensors"
    with pytest.raises(OutputError, match=r"would delete .*teacher\.safetensors"):
        finetune("own", tmp_path, distill=0.5, teacher_weights=str(teacher), overwrite=True)
    assert teacher.is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "local-dir:{}/dense"},
        {"teacher": "local-dir:{}/dense", "distill": 0.5},
        {"dataset": "~/run/data"},
    ],
)
def test_overwrite_does_not_delete_what_a_name_leads_to(tmp_path, monkeypatch, changes):
    """The folder behind local-dir: or ~ is kept as well."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "run"
    for name in ("dense", "data", "checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / "recipe.yaml").write_text("")
    named = {key: str(value).format(folder) for key, value in changes.items()}
    with pytest.raises(OutputError, match="would delete"):
        output.check(builders.recipe("timm", folder, overwrite=True, **named))


def test_self_is_the_network_before_it_is_quantized(tmp_path):
    """The word for what is done without one; without distillation it is refused."""
    for name, more in (("default", {}), ("self", {"teacher": "self"})):
        finetune("own", tmp_path / name, distill=0.5, max_steps=2, **more)
    packed = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("default", "self")]
    assert packed[0] == packed[1]
    with pytest.raises(RecipeError, match="teacher goes with distill"):
        builders.recipe("own", tmp_path / "none", teacher="self")


def test_a_run_resumed_has_the_same_teacher(tmp_path, monkeypatch):
    """The teacher of a resumed run is the one of its start: the same bytes at the end."""
    arguments = {"distill": 0.5, "full_precision_steps": 2, "max_steps": 4, "save_every": 2}
    finetune("own", tmp_path / "whole", **arguments)
    with builders.power_cut(monkeypatch, 5), pytest.raises(builders.PowerCutError):
        finetune("own", tmp_path / "cut", **arguments)
    finetune("own", tmp_path / "cut", **arguments, resume=True)
    packed = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert packed[0] == packed[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": builders.own("ten_classes")}, r"outputs are \[8, 10\].*\[8, 3\]"),
        ({"teacher": builders.own("grey")}, "teacher fails on a batch of"),
        ({"teacher": "no-such-model"}, "no-such-model"),
        ({"teacher_weights": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
    ids=["classes", "inputs", "name", "weights"],
)
def test_teachers_that_do_not_fit(tmp_path, settings, words):
    """A teacher with other outputs or inputs, or none at all, is refused before anything starts."""
    with pytest.raises(ModelError, match=f"(?s){words}"):
        finetune("own", tmp_path / "out", distill=0.5, **settings)
    assert not (tmp_path / "out").exists()


def test_a_teacher_without_a_share_is_refused(tmp_path):
    """A teacher that would not be listened to is named."""
    with pytest.raises(RecipeError, match="teacher goes with distill"):
        finetune("own", tmp_path / "out", teacher="resnet18")


def test_a_teacher_with_a_vocabulary_of_its_own(tmp_path):
    """Its own tokenizer is compared, whatever --tokenizer says; without one it takes that."""
    bert = Path(builders.SETTINGS["bert"]()["model"])
    teacher = tmp_path / "teacher"
    shutil.copytree(bert, teacher)
    common = {"distill": 0.5, "max_steps": 2, "teacher": str(teacher), "tokenizer": str(bert)}
    finetune("bert", tmp_path / "same", **common)
    stored = json.loads((teacher / "tokenizer.json").read_text())
    words = stored["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    (teacher / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match="splits texts, in another way"):
        finetune("bert", tmp_path / "other", **common)
    for file in teacher.glob("*token*"):
        file.unlink()
    finetune("bert", tmp_path / "none", **common)


@pytest.mark.parametrize("columns", [["premise"], ["premise", "hypothesis"]], ids=len)
def test_a_teacher_that_is_told_which_text_a_token_is_of(tmp_path, columns):
    """A student without token types cannot tell it; of one text there is nothing to tell."""
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    for folder in (student, teacher):
        folder.mkdir()
    sizes = {"vocab_size": builders.write_tokenizer(student), "num_labels": 3}
    builders.write_tokenizer(teacher, "token_type_ids")
    config = transformers.DistilBertConfig(
        **sizes, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32
    )
    transformers.DistilBertForSequenceClassification(config).save_pretrained(student)
    config = transformers.BertConfig(
        **sizes, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, id2label={i: str(i) for i in range(3)},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(teacher)
    given = {"model": str(student), "teacher": str(teacher), "distill": 0.5, "max_steps": 2}
    given |= {"dataset": str(builders.text_pairs_json()), "text_columns": columns}
    if len(columns) == 1:
        finetune("bert", tmp_path / "out", **given)
    else:
        with pytest.raises(ModelError, match="which of two texts a token is of"):
            finetune("bert", tmp_path / "out", **given)


def test_a_teacher_of_shorter_texts(tmp_path):
    """It is refused before anything is written, whatever the first texts' length."""
    teacher = tmp_path / "teacher"
    shutil.copytree(builders.bert(), teacher)
    config = transformers.BertConfig.from_pretrained(teacher, max_position_embeddings=12)
    transformers.BertForSequenceClassification(config).save_pretrained(teacher)
    given = {"teacher": str(teacher), "distill": 0.5, "max_steps": 2}
    with pytest.raises(ModelError, match=r"the teacher fails on a text of .* --max-length"):
        finetune("bert", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    finetune("bert", tmp_path / "out", **given, max_length=12)


@pytest.mark.parametrize("change", [str, str.upper], ids=["same", "upper"])
def test_the_order_of_many_labels(tmp_path, change):
    """It is that of their numbers, not of their place in a file, and not of their case."""
    labels = tuple(f"label {i}" for i in range(11))
    folder = tmp_path / "vit"
    shutil.copytree(builders.vit(), folder)
    config = transformers.ViTConfig.from_pretrained(folder, num_labels=11)
    config.id2label = dict(enumerate(labels))
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    student = models.load(str(folder), "image-classification", labels)
    recipe = builders.recipe("vit", tmp_path / "out", teacher=str(folder), distill=0.5)
    for order, fits in ((labels, True), (labels[::-1], False)):
        stored = json.loads((folder / "config.json").read_text())
        named = {str(i): change(label) for i, label in enumerate(order)}
        stored["id2label"] = dict(sorted(named.items()))
        (folder / "config.json").write_text(json.dumps(stored))
        if fits:
            assert distill.load_teacher(recipe, student).spec.task == "image-classification"
        else:
            with pytest.raises(ModelError, match="labels in another order"):
                distill.load_teacher(recipe, student)


def test_a_folder_is_the_teachers_weights(tmp_path):
    """A Hugging Face teacher has no file of weights apart; the error names the flags given."""
    vit = str(builders.vit())
    with pytest.raises(ModelError, match=r"--teacher-weights goes with .* as --teacher"):
        finetune("vit", tmp_path / "out", distill=0.5, teacher=vit, teacher_weights="t.safetensors")
