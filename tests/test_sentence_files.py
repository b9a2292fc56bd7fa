"""What sentence-transformers' files ask for: read, trained, carried on, and read by it again."""

import json
import shutil

import builders
import pytest
import torch
from builders import command, edit_config, unlabelled_csv

import askewq
from askewq import artifact, card, distill, models, sentence_files
from askewq.errors import FormatError
from askewq.tasks import logits_of

TRANSFORMER = {
    "idx": 0,
    "name": "0",
    "path": "",
    "type": "sentence_transformers.models.Transformer",
}
POOLING = {
    **{"idx": 1, "name": "1", "path": "1_Pooling"},
    "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
}
NORMALIZE = {
    **{"idx": 2, "name": "2", "path": "2_Normalize"},
    "type": "sentence_transformers.models.Normalize",
}
DENSE = {**NORMALIZE, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
MODULES = [TRANSFORMER, POOLING, NORMALIZE]


def encoder(folder, pooling, modules=MODULES, **more):
    """Write the tiny encoder with the files of sentence-transformers; return its folder."""
    shutil.copytree(builders.encoder(), folder)
    files = {"modules.json": modules, "1_Pooling/config.json": pooling, **more}
    for name, content in files.items():
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content))
    return folder


def with_pooling(folder, pooling):
    """Write the encoder with all four files, one text of which is longer than it allows."""
    return encoder(
        folder,
        {"word_embedding_dimension": 16, "pooling_mode": pooling},
        **{
            "sentence_bert_config.json": {"max_seq_length": 6, "do_lower_case": False},
            "config_sentence_transformers.json": {"prompts": {"query": "good film "}},
        },
    )


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({}, "mean"),
        (None, "mean"),
    ],
)
def test_a_pooling_that_is_known(pooling, wanted, tmp_path):
    """It is the encoder's, without a doubt, and the teacher's of that name."""
    folder = encoder(tmp_path / "e", pooling)
    loaded = models.load(str(folder), "feature-extraction")
    assert (loaded.spec.pooling, loaded.doubts) == (wanted, ())
    assert loaded.beside["modules.json"] == MODULES
    assert "SentenceTransformer(" in card._how_to_load(loaded)
    recipe = builders.recipe("encoder", tmp_path / "out", teacher=str(folder))
    teacher = distill.load_teacher(recipe, builders.untrained("encoder"))
    assert (teacher.spec.pooling, teacher.doubts) == (wanted, ())


@pytest.mark.parametrize(
    ("pooling", "modules", "wanted", "named"),
    [
        ({"pooling_mode": "max"}, MODULES, "mean", "(max)"),
        ({"pooling_mode": ["cls", "mean"]}, MODULES, "cls", "(cls, mean)"),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
            *(MODULES, "cls", "(cls_token, max_tokens)"),
        ),
        ({"pooling_mode": "cls"}, [TRANSFORMER, POOLING, DENSE], "cls", "(Dense)"),
        ({"pooling_mode": 7}, MODULES, "mean", "(7)"),
        ({}, [TRANSFORMER, NORMALIZE], "mean", "(Transformer, Normalize)"),
        ({}, [{**TRANSFORMER, "path": "0_T"}, POOLING], "mean", "(Transformer in '0_T')"),
        ({}, [{**TRANSFORMER, "type": "evil.Transformer"}, POOLING], "mean", "(evil.Transformer)"),
        ({}, ["no module"], "mean", "(no module)"),
    ],
)
def test_an_embedding_that_is_not_made(pooling, modules, wanted, named, tmp_path):
    """What is trained instead is said, and the artifact does not promise the other."""
    folder = encoder(tmp_path / "e", pooling, modules)
    loaded = models.load(str(folder), "feature-extraction")
    (doubt,) = loaded.doubts
    assert named in doubt
    assert {"mean": "the mean over its tokens", "cls": "its first token"}[wanted] in doubt
    assert (loaded.spec.pooling, loaded.beside) == (wanted, {})
    takes_the_mean = wanted == "mean"  # as sentence-transformers does without its files
    assert ("SentenceTransformer(" in card._how_to_load(loaded)) == takes_the_mean
    recipe = builders.recipe("encoder", tmp_path / "out", teacher=str(folder))
    assert distill.load_teacher(recipe, builders.untrained("encoder")).doubts == loaded.doubts


@pytest.mark.parametrize("modules", [None, {"not": "a list"}, []], ids=str)
def test_files_that_say_nothing(modules, tmp_path):
    """Without its modules sentence-transformers takes the mean, whatever else is there."""
    folder = encoder(tmp_path / "e", {"pooling_mode": "cls"}, modules)
    assert sentence_files.read(str(folder)) == sentence_files.SentenceFiles()


@pytest.mark.parametrize("text", ["[" * 100_000, "no JSON", "\xff"], ids=["deep", "text", "bytes"])
def test_files_that_cannot_be_read(text, tmp_path):
    """They are passed over."""
    folder = encoder(tmp_path / "e", {})
    (folder / "modules.json").write_bytes(text.encode("latin-1"))
    assert sentence_files.read(str(folder)) == sentence_files.SentenceFiles()


@pytest.fixture(scope="module", params=["mean", "cls", "lasttoken"])
def run(request, tmp_path_factory):
    """A finished run of an encoder with each pooling: the pooling, the folder, the metrics."""
    place = tmp_path_factory.mktemp(request.param)
    model = with_pooling(place / "encoder", request.param)
    made = builders.finetune("encoder", place / "out", model=str(model), lr=0.01)
    return request.param, place / "out", made


def embeddings_of(folder, texts):
    """Return the embeddings of an artifact, texts cut where sentence-transformers cuts them."""
    loaded = artifact.load_artifact(folder)
    inputs = loaded.preprocessing.tokenizer(
        texts, padding=True, truncation=True, max_length=6, return_tensors="pt"
    )
    with torch.no_grad():
        return logits_of(loaded.model, loaded.spec, dict(inputs))


def test_a_run_is_judged_by_its_pooling(run):
    """Full precision has 100, the artifact what was judged, by eval, too."""
    pooling, folder, made = run
    assert made["full_precision"] == pytest.approx(100, abs=0.01)
    assert made["reloaded"] == made["snapped"] < 100
    words = ("eval", folder, "--dataset", unlabelled_csv(), "--batch-size", 8)
    found = json.loads(command(*words).out.splitlines()[-1])
    assert found["similarity"] == made["reloaded"]
    content = json.loads((folder / "config.json").read_text())
    version, said = (2, None) if pooling == "mean" else (3, pooling)
    assert (content["askewq_version"], content.get("pooling")) == (version, said)
    token = {"mean": "over the tokens", "cls": "first token", "lasttoken": "last token"}[pooling]
    assert token in (folder / "README.md").read_text()


def test_sentence_transformers_gives_the_embeddings_that_were_judged(run):
    """To the bit, but for their length of 1, which its last module gives them."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    _, folder, _ = run
    texts = [text for text, _ in builders.sentences(6)] + ["good film " * 8]
    reader = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert reader.prompts["query"] == "good film "
    found = reader.encode(texts, convert_to_tensor=True, batch_size=len(texts))
    wanted = embeddings_of(folder, texts)
    torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True))
    assert not torch.equal(found, wanted)
    del reader[2]
    found = reader.encode(texts, convert_to_tensor=True, batch_size=len(texts))
    assert torch.equal(found, wanted)


def test_the_files_go_wherever_the_artifact_goes(run, tmp_path):
    """Loaded and saved again, by askewq and by transformers, and to the Hub."""
    from transformers import AutoModel

    pooling, folder, _ = run
    names = [name for name in sentence_files.NAMES if (folder / name).is_file()]
    assert names == [*sentence_files.NAMES]
    loaded = artifact.load_artifact(folder)
    assert (loaded.spec.pooling, [*loaded.beside]) == (pooling, names)
    listed = command("push", folder, "someone/encoder", "--dry-run").out
    assert all(name in listed for name in names)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again, _ = artifact.read_spec(tmp_path / "again")
    assert again.pooling == pooling


@pytest.mark.parametrize("to", ["dense", "onnx", "compressed-tensors"])
def test_exports_have_the_pooling(run, to, tmp_path):
    """They are compared by the embedding that was trained; where the encoder is, its files are."""
    pooling, folder, _ = run
    made = command("export", folder, "--to", to, "--output", tmp_path / to)
    assert made.code == 0, made.err
    assert (tmp_path / to / "modules.json").is_file() == (to != "onnx")
    if to == "dense":
        again = models.load(str(tmp_path / to), "feature-extraction")
        assert again.spec.pooling == pooling


def test_an_artifact_of_ones_own_loop_has_them(tmp_path):
    """`save_artifact` writes what the command writes."""
    loaded = models.load(str(with_pooling(tmp_path / "e", "cls")), "feature-extraction")
    askewq.quantize(loaded.model, bits=2)
    askewq.snap_(loaded.model)
    artifact.save_artifact(loaded, tmp_path / "out")
    again = artifact.load_artifact(tmp_path / "out")
    assert (again.spec.pooling, again.beside) == ("cls", loaded.beside)


class TestDamage:
    @pytest.mark.parametrize("pooling", ["max", 1, ["cls"], {}], ids=str)
    def test_an_unknown_pooling(self, tmp_path, pooling):
        """It is refused, whoever gave it a digest."""
        folder = builders.copy_of("encoder", tmp_path)
        edit_config(folder, askewq_version=3, pooling=pooling)
        with pytest.raises(FormatError, match="unknown pooling"):
            askewq.load(folder)

    def test_a_pooling_that_was_changed(self, tmp_path):
        """The digest covers it."""
        folder = builders.copy_of("encoder", tmp_path)
        edit_config(folder, askewq_version=3, pooling="cls")
        askewq.load(folder)
        edit_config(folder, seal=False, pooling="lasttoken")
        with pytest.raises(FormatError, match="does not have the digest"):
            askewq.load(folder)

    def test_version_3_without_one(self, tmp_path):
        """It is missing."""
        folder = builders.copy_of("encoder", tmp_path)
        edit_config(folder, askewq_version=3)
        with pytest.raises(FormatError, match="lacks pooling"):
            askewq.load(folder)
