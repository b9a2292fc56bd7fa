"""Encoders without labels: pooling and similarity against loops, runs from data to every reader."""

import json
import math
from typing import get_args

import builders
import pytest
import torch
from builders import command, copy_of, finetune, finished, unlabelled_csv
from safetensors.torch import load_file, save_file

import askewq
from askewq import config, data, embeddings, models, text
from askewq.columns import Columns
from askewq.errors import ModelError, RecipeError
from askewq.tasks import logits_of, metric_of, score
from askewq.vocabulary import Pooling


def slow_pool(states, mask, pooling):
    """Return the mean of each text's states, its first or its last one, a number at a time."""
    pooled = []
    for rows, kept in zip(states.tolist(), mask.tolist(), strict=True):
        counted = [row for row, keep in zip(rows, kept, strict=True) if keep]
        mean = [sum(column) / len(counted) for column in zip(*counted, strict=True)]
        pooled.append({"mean": mean, "cls": counted[0], "lasttoken": counted[-1]}[pooling])
    return torch.tensor(pooled)


def slow_cosine(a, b):
    """Return the cosine of two vectors by sums over their numbers."""
    a, b = a.tolist(), b.tolist()
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_an_embedding_is_the_slow_one(pooling):
    """Padded tokens do not count, whatever stands there, and on whichever side."""
    states = torch.randn(5, 5, 4)
    mask = [[1] * 5, [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    mask = torch.tensor(mask)
    found = embeddings.pool(states, mask, pooling)
    torch.testing.assert_close(found, slow_pool(states, mask, pooling))
    states[mask == 0] = 1e6
    assert torch.equal(embeddings.pool(states, mask, pooling), found)


def test_scores_are_the_slow_cosines():
    """The loss of a sample is 1 - cosine, its share of the metric the cosine, its count 1."""
    ours, theirs = torch.randn(4, 6), torch.randn(4, 6)
    wanted = torch.tensor([slow_cosine(a, b) for a, b in zip(ours, theirs, strict=True)])
    found = score(ours, theirs)
    torch.testing.assert_close(found.correct, wanted)
    torch.testing.assert_close(found.loss, 1 - wanted)
    assert found.count.tolist() == [1.0] * 4
    assert score(ours, 3 * ours).correct.tolist() == [1.0] * 4
    assert score(ours.bfloat16(), theirs).loss.dtype == torch.float32
    assert metric_of("feature-extraction") == "similarity"


def test_length_of_the_padding_changes_nothing():
    """The same text beside a longer one has the same embedding."""
    loaded = models.load(str(builders.encoder()), "feature-extraction")
    text = loaded.preprocessing.tokenizer("good film", return_tensors="pt")
    longer = loaded.preprocessing.tokenizer(
        ["good film", "bad plot not very good song"], return_tensors="pt", padding=True
    )
    loaded.model.eval()
    with torch.no_grad():
        alone = logits_of(loaded.model, loaded.spec, dict(text))
        beside = logits_of(loaded.model, loaded.spec, dict(longer))
    assert longer["attention_mask"][0].min() == 0
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-5, atol=1e-6)


def test_the_data_need_no_label(tmp_path):
    """The first column of texts is guessed; one is read at most."""
    recipe = builders.recipe("encoder", tmp_path / "out")
    found = data.open_data(recipe, "feature-extraction")
    assert found.columns == Columns(("sentence",), None)
    assert found.labels == ()
    outcome = command(
        *("finetune", "--model", builders.encoder(), "--task", "feature-extraction"),
        *("--dataset", builders.text_pairs_json(), "--text-columns", "premise", "hypothesis"),
        *("--output", tmp_path / "out"),
    )
    assert outcome.code == 2
    assert "reads at most 1" in outcome.err


def test_a_run_from_texts_to_a_similar_encoder(tmp_path):
    """Training brings the embeddings back to those of full precision, and labels are not read."""
    made = finetune("encoder", tmp_path / "out", lr=0.01, max_steps=20)
    assert made["metric"] == "similarity"
    assert made["full_precision"] == 100
    assert made["rounded"] + 20 < made["snapped"] < 99.99
    assert made["reloaded"] == made["snapped"]
    labelled = {"dataset": str(builders.text_csv()), "text_columns": ["sentence"]}
    finetune("encoder", tmp_path / "labels", **labelled)


def test_eval_gives_the_metric_of_the_run():
    """The artifact names the model that it is compared with."""
    folder, metrics = finished("encoder")
    found = command("eval", folder, "--dataset", unlabelled_csv(), "--batch-size", 8)
    assert found.code == 0, found.err
    assert json.loads(found.out.splitlines()[-1])["similarity"] == metrics["reloaded"]


def test_transformers_loads_it_packed():
    """AutoModel gives the embeddings of the dense network, to the bit."""
    from transformers import AutoModel, AutoTokenizer

    folder, _ = finished("encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for text, _ in builders.sentences(6)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    dense, packed = askewq.load(folder), AutoModel.from_pretrained(folder)
    assert type(packed).__mro__[0].__name__ == "BertModel"
    with torch.no_grad():
        wanted = dense(**batch).last_hidden_state
        assert torch.equal(packed(**batch).last_hidden_state, wanted)
        assert torch.equal(askewq.load(folder, packed=True)(**batch).last_hidden_state, wanted)


def test_inspect_and_the_card():
    """The task is named; the card says how an embedding is made."""
    folder, _ = finished("encoder")
    assert "feature-extraction" in command("inspect", folder).out
    assert command("inspect", "--verify", folder).code == 0
    shown = command("inspect", builders.encoder(), "--task", "feature-extraction")
    assert "pooler.dense" in shown.out
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "- sentence-similarity" in card
    assert "AutoModel.from_pretrained" in card
    assert "mean of `last_hidden_state`" in card


@pytest.mark.parametrize("to", ["dense", "onnx", "compressed-tensors"])
def test_exports(to, tmp_path):
    """Each format's own loader gives the embeddings, within the format's bound."""
    found = command("export", finished("encoder")[0], "--to", to, "--output", tmp_path / to)
    assert found.code == 0, found.err
    if to == "onnx":
        import onnx

        graph = onnx.load(tmp_path / to / "model.onnx").graph
        assert [value.name for value in graph.output] == ["sentence_embedding"]


def test_gguf_is_refused(tmp_path):
    """It is written for language models."""
    found = command("export", finished("encoder")[0], "--to", "gguf", "--output", tmp_path / "g")
    assert found.code == 2
    assert "is a model for feature-extraction" in found.err


@pytest.mark.parametrize(
    ("kind", "more"),
    [("encoder", {}), ("encoder", {"distill_hidden": 1.0}), ("timm-encoder", {})],
    ids=["texts", "hidden states", "images"],
)
def test_a_run_resumed_gives_the_same_bytes(tmp_path, monkeypatch, kind, more):
    """The teacher of a resumed run is the full-precision network of its start."""
    more |= {"save_every": 2, "lr": 0.01}
    whole = finetune(kind, tmp_path / "whole", **more)
    with builders.power_cut(monkeypatch, 3), pytest.raises(builders.PowerCutError):
        finetune(kind, tmp_path / "cut", **more)
    resumed = finetune(kind, tmp_path / "cut", **more, resume=True)
    packed = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert packed[0] == packed[1]
    assert [whole[k] for k in ("rounded", "reloaded")] == [
        resumed[k] for k in ("rounded", "reloaded")
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"distill_hidden": 1.0},
        {"streaming": True},
        {"act_bits": 4},
        {"mixed_precision": "bf16"},
        {"eval_every": 2},
        {"compile": True},
        {"method": "lsq"},
    ],
    ids=str,
)
def test_it_goes_with(tmp_path, more):
    """Other settings of a run reach this task, too."""
    made = finetune("encoder", tmp_path / "out", lr=0.01, **more)
    assert made["reloaded"] == made["snapped"]
    assert made["full_precision"] == pytest.approx(100, abs=0.01)


def other_encoder(folder, **changes):
    """Write an encoder of other weights, perhaps of another size; return its folder."""
    import transformers

    made = transformers.AutoConfig.from_pretrained(builders.encoder())
    for key, value in changes.items():
        setattr(made, key, value)
    transformers.BertModel(made).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(builders.encoder()).save_pretrained(folder)
    return folder


def test_another_teacher(tmp_path):
    """Full precision is then not 100; eval is told the teacher, by name or by its weights."""
    torch.manual_seed(1)
    teacher = other_encoder(tmp_path / "t", num_hidden_layers=3)
    made = finetune("encoder", tmp_path / "out", teacher=str(teacher))
    assert made["full_precision"] < 99
    words = ("eval", tmp_path / "out", "--dataset", unlabelled_csv(), "--batch-size", 8)
    told = json.loads(command(*words, "--teacher", teacher).out.splitlines()[-1])
    assert told["similarity"] == made["reloaded"]
    untold = command(*words)
    assert untold.code == 2
    assert f"another network taught the run; pass --teacher {teacher}" in untold.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"the embeddings of the teacher {text.markdown(teacher.name)}" in card


def test_weights_of_a_teacher(tmp_path):
    """A state dict for the same network teaches, and is what eval compares with."""
    state = load_file(builders.encoder() / "model.safetensors")
    weights = tmp_path / "t.safetensors"
    save_file({k: v.roll(1, 0).contiguous() for k, v in state.items()}, weights)
    made = finetune("encoder", tmp_path / "out", teacher_weights=str(weights))
    words = ("eval", tmp_path / "out", "--dataset", unlabelled_csv(), "--batch-size", 8)
    told = json.loads(command(*words, "--teacher-weights", weights).out.splitlines()[-1])
    assert told["similarity"] == made["reloaded"] < 99
    assert "the embeddings of its teacher" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("told", [False, True])
def test_an_encoder_without_a_tokenizer(tmp_path, told):
    """It was trained with one that was named, which the artifact has, and is compared with it."""
    folder = other_encoder(tmp_path / "t")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for path in folder.glob("*token*"):
        path.rename(tokenizer / path.name)
    settings = {"model": str(folder), "tokenizer": str(tokenizer)}
    made = finetune("encoder", tmp_path / "out", **settings)
    words = ("eval", tmp_path / "out", "--dataset", unlabelled_csv(), "--batch-size", 8)
    outcome = command(*words, *(("--teacher", folder) if told else ()))
    assert json.loads(outcome.out.splitlines()[-1])["similarity"] == made["reloaded"]


def test_a_teacher_of_another_width(tmp_path):
    """Both widths are said, before anything is written."""
    teacher = other_encoder(tmp_path / "t", hidden_size=32)
    with pytest.raises(ModelError, match="embeddings have 32 numbers and the model's 16"):
        finetune("encoder", tmp_path / "out", teacher=str(teacher))
    assert not (tmp_path / "out").exists()


def test_an_encoder_without_a_pooler(tmp_path):
    """The pooler that transformers makes up is no part of the embedding: it may teach."""
    folder = other_encoder(tmp_path / "t")
    state = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in state.items() if not k.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert models.load(str(folder), "feature-extraction").notes == ()
    finetune("encoder", tmp_path / "out", teacher=str(folder))


def without_mask(folder):
    """Write the encoder with a tokenizer that gives no attention_mask; return its folder."""
    other_encoder(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "model_input_names": ["input_ids"]}))
    return folder


class TestRefusals:
    def test_a_tokenizer_without_a_mask(self, tmp_path):
        """Which tokens count would not be known."""
        with pytest.raises(ModelError, match=r"gives no attention_mask.*--tokenizer"):
            models.load(str(without_mask(tmp_path / "e")), "feature-extraction")

    def test_eval_with_a_teacher_of_another_width(self, tmp_path):
        """Both widths are said there, too."""
        teacher = other_encoder(tmp_path / "t", hidden_size=32)
        words = ("eval", finished("encoder")[0], "--dataset", unlabelled_csv())
        found = command(*words, "--teacher", teacher)
        assert found.code == 2
        assert "embeddings have 32 numbers and the model's 16" in found.err

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"distill": 0.5}, "distill goes with task = image-classification"),
            ({"temperature": 3.0}, "temperature goes with distill"),
            ({"full_precision_steps": 2}, "full_precision_steps goes with task"),
            ({"label_column": "idx"}, "label_column goes with task"),
            ({"augment": "crop"}, "augment goes with task"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_settings_that_decide_nothing(self, changes, words):
        """What belongs to labels or images is named."""
        with pytest.raises(RecipeError, match=f"{words}.*leave"):
            builders.recipe("encoder", "out", **changes)

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("timm", "is from timm"),
            ("own", "is from module"),
            ("vit", "takes pixel_values"),
        ],
    )
    def test_models_that_are_no_text_encoders(self, tmp_path, kind, words):
        """Other sources and images are named, before anything is written."""
        given = {"dataset": str(unlabelled_csv()), "task": "feature-extraction"}
        model = builders.SETTINGS[kind]()["model"]
        with pytest.raises(ModelError, match=words):
            finetune("encoder", tmp_path / "out", **{**given, "model": model})
        assert not (tmp_path / "out").exists()

    def test_the_task_is_not_guessed(self):
        """A model without a head may be meant for anything; the error lists the task."""
        with pytest.raises(ModelError, match=r"pass --task, one of .*feature-extraction"):
            models.guess_task(str(builders.encoder()), "transformers")

    def test_a_plan(self, tmp_path):
        """Without labels there is no loss to measure."""
        outcome = command(
            *("plan", "--model", builders.encoder(), "--task", "feature-extraction"),
            *("--dataset", unlabelled_csv(), "--average-bits", 3, "--output", tmp_path / "p"),
        )
        assert outcome.code == 2
        assert "task = feature-extraction has none" in outcome.err

    def test_eval_without_the_original(self, tmp_path):
        """A model that is gone is named, with the flag that names another."""
        folder = copy_of("encoder", tmp_path)
        builders.edit_config(folder, name=str(tmp_path / "gone"))
        found = command("eval", folder, "--dataset", unlabelled_csv())
        assert found.code == 2
        assert "gone" in found.err
        assert "Pass --teacher MODEL" in found.err
        again = command(
            "eval", folder, "--dataset", unlabelled_csv(), "--teacher", builders.encoder()
        )
        assert again.code == 0, again.err

    def test_eval_runs_no_code_that_an_artifact_names(self, tmp_path):
        """A file in the place of the original is refused unread."""
        folder = copy_of("encoder", tmp_path)
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        builders.edit_config(folder, name=f"{tmp_path / 'evil.py'}:factory")
        found = command("eval", folder, "--dataset", unlabelled_csv())
        assert found.code == 2
        assert "runs only where you name it" in found.err
        assert not (tmp_path / "ran").exists()

    def test_a_teacher_of_other_tasks(self):
        """Eval compares with labels there: the flag would decide nothing."""
        found = command(
            "eval", finished("bert")[0], "--dataset", builders.text_csv(), "--teacher", "self"
        )
        assert found.code == 2
        assert "--teacher and --teacher-weights go with artifacts for feature-extr" in found.err

    def test_self_is_no_teacher_of_eval(self):
        """There is no run whose start could be meant."""
        words = ("eval", finished("encoder")[0], "--dataset", unlabelled_csv(), "--teacher", "self")
        found = command(*words)
        assert found.code == 2
        assert "pass an id or a folder" in found.err


def test_a_recipe_keeps_the_task():
    """It is read back as it was written."""
    made = builders.recipe("encoder", "out", teacher="self")
    assert made.taught
    assert config.build(made.model_dump(mode="json")) == made
