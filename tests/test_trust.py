"""Hostile files: nothing of a stranger's runs, leads out of its folder, or takes memory unasked."""

import json
import pickle
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
import transformers
from builders import command, copy_of, edit_config
from safetensors.torch import load_file, save_file
from test_snapshots import Bomb

import askewq
from askewq import artifact, checkpoint, models, trust
from askewq.errors import AskewError, FormatError, ModelError
from askewq.spec import ModelSpec


def peak(*, anew: bool = False) -> int:
    """Return the peak memory of this process in bytes; `anew`: from now on (Linux)."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class TestPickles:
    """A pickle can run any program; docs/security.md says which reader meets which."""

    def bomb(self, tmp_path):
        return Bomb(tmp_path / "executed")

    @pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.pth", "w.safetensors"])
    def test_weights_of_the_user(self, tmp_path, name):
        """--weights reads tensors alone."""
        (tmp_path / name).write_bytes(pickle.dumps({"a": self.bomb(tmp_path)}))
        with pytest.raises(ModelError):
            models.load(
                builders.own("small"), "image-classification", ("a",), weights=tmp_path / name
            )
        assert not (tmp_path / "executed").exists()

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_hugging_face_folder(self, tmp_path, packed):
        """A folder whose weights are a pickle of more than tensors is refused."""
        folder = tmp_path / "bert"
        shutil.copytree(builders.bert(), folder)
        (folder / "model.safetensors").unlink()
        content = {"a": self.bomb(tmp_path)}
        if packed:
            torch.save(content, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
        with pytest.raises(ModelError):
            models.load(str(folder), "text-classification", ("neg", "pos"))
        assert not (tmp_path / "executed").exists()

    def test_a_timm_folder(self, tmp_path):
        """A local timm model whose weights are a pickle is refused."""
        config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save({"a": self.bomb(tmp_path)}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ModelError):
            models.load(f"local-dir:{tmp_path}", "image-classification", ("a", "b", "c"))
        assert not (tmp_path / "executed").exists()

    def test_an_artifact(self, tmp_path):
        """A pickle in the place of the packed file, or beside it, is not read."""
        folder = copy_of("bert", tmp_path)
        for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
            (folder / name).write_bytes(pickle.dumps(self.bomb(tmp_path)))
        askewq.load(folder)
        artifact.load_artifact(folder)
        (folder / "model.safetensors").write_bytes(pickle.dumps(self.bomb(tmp_path)))
        with pytest.raises(FormatError):
            askewq.load(folder)
        assert not (tmp_path / "executed").exists()


CODE = """
import pathlib
pathlib.Path({path!r}).write_text("x")
from transformers import BertConfig, BertForSequenceClassification
class Config(BertConfig):
    model_type = "stranger"
class Model(BertForSequenceClassification):
    config_class = Config
"""


CODE_OF_THE_HUB, ELSEWHERE = "would run code from the Hub", "may be read from elsewhere"


class TestRemoteCode:
    @pytest.fixture
    def stranger(self, tmp_path):
        """A Hugging Face folder that brings its own code, which writes a file when it is run."""
        folder = tmp_path / "stranger"
        shutil.copytree(builders.bert(), folder)
        path = folder / "config.json"
        auto_map = {
            "AutoConfig": "code.Config",
            "AutoModelForSequenceClassification": "code.Model",
        }
        config = {**json.loads(path.read_text()), "model_type": "stranger", "auto_map": auto_map}
        path.write_text(json.dumps(config))
        (folder / "code.py").write_text(CODE.format(path=str(tmp_path / "executed")))
        return folder

    def test_is_not_run(self, tmp_path, stranger, monkeypatch):
        """Without the flag it is refused, and nobody is asked: input would wait for a terminal."""
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        with pytest.raises(ModelError, match="if you trust it, pass --trust-remote-code"):
            models.load(str(stranger), "text-classification", ("neg", "pos"))
        assert not (tmp_path / "executed").exists()

    def test_a_tokenizer_brings_none(self, tmp_path, stranger, monkeypatch):
        """A tokenizer that names code is loaded without it."""
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        shutil.copy(builders.bert() / "config.json", stranger)
        path = stranger / "tokenizer_config.json"
        auto_map = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))
        assert models.load_tokenizer(str(stranger), False).tokenizer("good")["input_ids"]
        assert not (tmp_path / "executed").exists()

    def test_is_run_when_asked_for(self, tmp_path, stranger):
        """With the flag it runs: the test above does not pass for another reason."""
        models.hf_config(str(stranger), True)
        assert (tmp_path / "executed").exists()

    def test_is_not_trained_in_vain(self, tmp_path, stranger):
        """An artifact brings no code, so that nothing could load what such a network becomes."""
        with pytest.raises(
            ModelError, match="cannot be built again from its config by the installed"
        ):
            builders.finetune("bert", tmp_path / "out", model=str(stranger), trust_remote_code=True)
        assert not (tmp_path / "out").exists()

    def test_an_artifact_brings_none(self, tmp_path, monkeypatch):
        """An artifact that names code of a repository is built by the library's own, or refused."""
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        folder = copy_of("bert", tmp_path)
        arguments = artifact.read_spec(folder)[0].arguments
        auto_map = {"AutoModelForSequenceClassification": "owner/name--code.Model"}
        edit_config(folder, arguments={**arguments, "auto_map": auto_map})
        model = askewq.load(folder)
        assert type(model).__module__.startswith("transformers.models.bert")

    @pytest.mark.parametrize(
        ("extra", "reason"),
        [
            ({"attn_implementation": "owner/kernel"}, CODE_OF_THE_HUB),
            ({"_attn_implementation": "owner/kernel:attention"}, CODE_OF_THE_HUB),
            ({"text_config": {"experts_implementation": "owner/kernel@main"}}, CODE_OF_THE_HUB),
            ({"parts": [{"_attn_implementation_internal": "owner/kernel"}]}, CODE_OF_THE_HUB),
            ({"model_type": "timm_wrapper", "architecture": "local-dir:/secret"}, ELSEWHERE),
            ({"part": {"model_type": "timm_wrapper", "architecture": "resnet18"}}, ELSEWHERE),
            ({"part": {"model_type": "timm_backbone", "backbone": "hf_hub:o/evil"}}, ELSEWHERE),
            ({"part": {"model_type": "timm_backbone", "backbone": "owner/evil"}}, ELSEWHERE),
            ({"part": {"model_type": "detr", "backbone": "evil"}}, ELSEWHERE),
            ({"part": {"model_type": "dpt", "backbone": "owner/evil"}}, ELSEWHERE),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("how", ["askewq", "transformers"])
    def test_parts_from_elsewhere(self, tmp_path, extra, reason, how):
        """No attention of the Hub is run, and no file or repository opened that a config names."""
        folder = copy_of("bert", tmp_path)
        arguments = artifact.read_spec(folder)[0].arguments
        edit_config(folder, arguments={**arguments, **extra})
        auto = transformers.AutoModelForSequenceClassification
        load = askewq.load if how == "askewq" else auto.from_pretrained
        with pytest.raises(FormatError, match=reason):
            load(folder)

    def test_names_that_nobody_reads(self, tmp_path):
        """Classes, and what an old config holds beside its own keys, may be called anything."""
        folder = copy_of("bert", tmp_path)
        arguments = artifact.read_spec(folder)[0].arguments
        labels = {"checkpoint_path": 0, "backbone": 1}
        old = {"backbone": "google/vit-base", "use_pretrained_backbone": True, "label2id": labels}
        edit_config(folder, arguments={**arguments, **old})
        askewq.load(folder)


class TestPaths:
    @pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b", "..", "", 3])
    def test_a_shard_index(self, tmp_path, shard):
        """An index whose shards are not files beside it is refused, the file is not read."""
        folder = tmp_path / "bert"
        shutil.copytree(builders.bert(), folder)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match="leads out of its folder"):
            models.load(str(folder), "text-classification", ("neg", "pos"))

    def test_shards_in_the_folder(self, tmp_path):
        """A model in several files loads as before."""
        folder = tmp_path / "bert"
        shutil.copytree(builders.bert(), folder)
        transformers.BertForSequenceClassification.from_pretrained(folder).save_pretrained(
            folder, max_shard_size="10KB"
        )
        (folder / "model.safetensors").unlink(missing_ok=True)
        assert list(folder.glob("*.index.json"))
        loaded = models.load(str(folder), "text-classification", ("neg", "pos"))
        assert loaded.notes == ()

    @pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "[" * 100_000])
    def test_an_index_that_is_none(self, tmp_path, content):
        """A damaged index is an error of ours."""
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(AskewError, match=r"index\.json"):
            trust.check_index(tmp_path)

    @pytest.mark.parametrize("how", ["relative", "absolute"])
    def test_an_artifact_with_an_index(self, tmp_path, how):
        """By transformers, an artifact's weights are the file beside its config.json."""
        folder = copy_of("bert", tmp_path)
        secret = tmp_path / "model.safetensors"
        (folder / "model.safetensors").rename(secret)
        name = "../model.safetensors" if how == "relative" else str(secret)
        index = {"metadata": {}, "weight_map": {"classifier.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FormatError, match=r"are beside its config\.json"):
            transformers.AutoModelForSequenceClassification.from_pretrained(folder)

    @pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file"])
    @pytest.mark.parametrize("path", ["../secret.json", "/etc/passwd"])
    def test_a_tokenizer(self, tmp_path, key, path):
        """A tokenizer's own files are in the artifact."""
        folder = copy_of("bert", tmp_path)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), key: path}))
        with pytest.raises(FormatError, match=f"{key} leads out of the folder"):
            artifact.load_artifact(folder)

    @pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
    @pytest.mark.parametrize("key", ["vocab", "vocab_file", "merges", "source_spm"])
    @pytest.mark.parametrize("place", ["elsewhere", "the folder that one is in"])
    def test_a_vocabulary_from_elsewhere(self, tmp_path, monkeypatch, file, key, place):
        """It would be written into every copy of the tokenizer."""
        secret = tmp_path / "secret.txt"
        secret.write_text("topsecret\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
        folder = copy_of("bert", tmp_path)
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("film\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        given = {"tokenizer_class": "BertTokenizer"} if file[:9] == "tokenizer" else {}
        monkeypatch.chdir(tmp_path)
        path = str(secret) if place == "elsewhere" else secret.name
        (folder / file).write_text(json.dumps({**given, key: path}))
        if path == secret.name and (file, key) == ("tokenizer_config.json", "vocab_file"):
            known = artifact.load_artifact(folder).preprocessing.tokenizer.get_vocab()
            assert "topsecret" not in known
            return
        with pytest.raises(FormatError, match=f"{key} leads out of the folder"):
            artifact.load_artifact(folder)

    def test_a_manifest_has_no_paths(self, tmp_path):
        """Names in a manifest are keys of tensors: one that looks like a path opens nothing."""
        folder = copy_of("own", tmp_path)
        path = folder / "model.safetensors"
        stored = checkpoint.read(path)
        renamed = {f"../../{name}": weight for name, weight in stored.weights.items()}
        hostile = checkpoint.Artifact(renamed, stored.tensors, {"../x": "/etc/passwd"})
        tensors, metadata = checkpoint.serialize(hostile)
        save_file(tensors, path, metadata)
        with pytest.raises(FormatError, match="'/etc/passwd', which is not in the file"):
            askewq.load(folder, model=builders.own_network("small"))


def packed_of(network):
    """Return the content of the file of a network at 2 bits."""
    askewq.quantize(network, bits=2)
    askewq.snap_(network)
    return checkpoint.artifact_of(network)


class TestSizes:
    @pytest.mark.parametrize(
        ("kind", "change"),
        [
            ("bert", {"intermediate_size": 10**9}),
            ("bert", {"vocab_size": 2**40}),
            ("bert", {"num_hidden_layers": 10**7}),
            ("bert", {"max_position_embeddings": 10**10}),
            ("timm", {"num_classes": 10**9}),
            ("llama", {"hidden_size": 2**20}),
            ("vit", {"image_size": 4000, "patch_size": 1}),
        ],
        ids=str,
    )
    def test_a_network_that_is_too_large_is_never_built(self, tmp_path, kind, change):
        """A config.json of a larger network than its weights takes neither memory nor time."""
        folder = copy_of(kind, tmp_path)
        askewq.load(folder)
        arguments = artifact.read_spec(folder)[0].arguments
        edit_config(folder, arguments={**arguments, **change})
        before, began = peak(anew=True), time.perf_counter()
        with pytest.raises(FormatError):
            askewq.load(folder)
        assert peak() - before < 50e6
        assert time.perf_counter() - began < 5

    def test_a_header_that_is_too_long(self, tmp_path):
        """A header is read as a whole: its length is checked first, by the file's own size."""
        path = tmp_path / "m"
        size = checkpoint.HEADER_BYTES + 1
        path.write_bytes(size.to_bytes(8, "little") + b"{" + b" " * size)
        before = peak(anew=True)
        with pytest.raises(FormatError, match="claims a header of 4,194,305 bytes"):
            checkpoint.read(path)
        assert peak() - before < 50e6

    @pytest.mark.parametrize("nested", ["[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900])
    def test_deep_nesting(self, tmp_path, nested):
        """JSON as deep as Python can just read ends in a FormatError as well."""
        text = '{"version":2,"weights":{"w":' + nested + '},"shared":{},"digest":"x"}'
        save_file({"a": torch.zeros(1)}, tmp_path / "m", {"askewq": text})
        with pytest.raises(FormatError):
            checkpoint.read(tmp_path / "m")

    def test_a_config_that_is_too_large(self, tmp_path):
        """A config.json beyond any of its kind is not read."""
        folder = copy_of("timm", tmp_path)
        with (folder / "config.json").open("ab") as file:
            file.truncate(trust.CONFIG_BYTES + 1)
        with pytest.raises(FormatError, match="at most 16,777,216 are read"):
            askewq.load(folder)

    @pytest.mark.parametrize("kind", ["llama", "t5", "bart", "gpt2"])
    def test_tied_weights_count_once(self, tmp_path, kind):
        """A large embedding that encoder, decoder and head share is one weight."""
        sizes: dict[str, Any] = {"vocab_size": 4000, "pad_token_id": 0, "eos_token_id": 1}
        small: dict[str, Any] = {
            "llama": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            | {"num_attention_heads": 2, "tie_word_embeddings": True},
            "t5": {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2},
            "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
            | {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}
            | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
            "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
        }[kind]
        task = "causal-lm" if kind in ("llama", "gpt2") else "text-classification"
        arguments = transformers.AutoConfig.for_model(kind, **sizes, **small).to_dict()
        labels = () if task == "causal-lm" else ("a", "b")
        spec = ModelSpec("transformers", "tied", task, labels, arguments)
        network = models.build(spec)
        content = packed_of(network)
        assert isinstance(artifact.plain_network(spec, tmp_path, content), type(network))

    def test_layers_without_weights_count(self):
        """They take time."""
        with pytest.raises(FormatError), trust.at_most(10):
            [torch.nn.LayerNorm(0) for _ in range(20)]

    def test_the_count_is_taken_back(self):
        """Networks built outside the block are as large as they like."""
        with pytest.raises(FormatError), trust.at_most(10):
            torch.nn.Linear(10, 10)
        torch.nn.Linear(10, 10)


def test_threads_count_apart(tmp_path):
    """Artifacts are loaded, and other networks built, while one is."""
    torch.manual_seed(0)
    folder, failed = builders.finished("timm")[0], []
    end = time.monotonic() + 3

    def repeat(made):
        try:
            while time.monotonic() < end:
                made()
        except FormatError as error:
            failed.append(error)

    makers = [lambda: askewq.load(folder)] * 2 + [lambda: torch.nn.Linear(1000, 1000)]
    threads = [threading.Thread(target=repeat, args=(made,)) for made in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


ESCAPE = "\x1b]0;owned\x07\x1b[2J"


class TestShown:
    """What a stranger named is shown as it is."""

    def test_names_of_layers_and_models(self, tmp_path):
        """`inspect` prints no control character of an artifact."""
        folder = copy_of("own", tmp_path)
        path = folder / "model.safetensors"
        stored = checkpoint.read(path)
        renamed = {name + ESCAPE: weight for name, weight in stored.weights.items()}
        tensors, metadata = checkpoint.serialize(
            checkpoint.Artifact(renamed, stored.tensors, stored.shared)
        )
        save_file(tensors, path, metadata)
        edit_config(folder, name=f"model{ESCAPE}\nline")
        outcome = command("inspect", folder)
        assert outcome.code == 0
        assert r"2.weight\x1b]0;owned\x07\x1b[2J" in outcome.out
        assert r"model\x1b]0;owned\x07\x1b[2J\nline" in outcome.out
        assert not {"\x1b", "\x07"} & set(outcome.out + outcome.err)

    def test_errors(self, tmp_path):
        """An error message that quotes a file is harmless, too."""
        folder = copy_of("timm", tmp_path)
        edit_config(folder, preprocessing={ESCAPE: 1}, labels=[ESCAPE], task=ESCAPE)
        for words in (("inspect", folder), ("inspect", f"nowhere{ESCAPE}"), ("eval", folder)):
            outcome = command(*words)
            assert outcome.code == 2
            assert not {"\x1b", "\x07"} & set(outcome.out + outcome.err)

    def test_a_push(self, tmp_path):
        """The dry run prints file names and a commit message that are harmless."""
        folder = copy_of("own", tmp_path)
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps({**metrics, "model": f"m{ESCAPE}"}))
        (folder / f"a{ESCAPE.replace('/', '')}.txt").write_text("x")
        outcome = command("push", folder, "owner/name", "--dry-run")
        assert outcome.code == 0
        assert r"m\x1b]0;owned" in outcome.out
        assert not {"\x1b", "\x07"} & set(outcome.out)


def test_the_readme_of_an_export(tmp_path):
    """Names and labels on an export's page are shown as they are."""
    from askewq import export, export_compressed_tensors, export_dense
    from askewq.target import Options

    hostile = "<script>x</script>[a](b)"
    folder = copy_of("bert", tmp_path)
    edit_config(folder, name=hostile, labels=[hostile, "b"])
    source = export._open(folder, None)
    for page in (
        export_dense._readme(source, Options()),
        export_compressed_tensors._readme(source),
    ):
        outside = re.sub(r"^```python\n.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
        assert outside.startswith(r"# &lt;script&gt;x&lt;/script&gt;\[a\]\(b\), ")
        assert not {"<", ">"} & set(outside)


def test_fuzzing_finds_nothing(tmp_path):
    """A few hundred of the cases of benchmarks/fuzz_artifact.py, by another seed."""
    with builders.benchmark("fuzz_artifact") as fuzz_artifact:
        tally, wrong = fuzz_artifact.fuzz(400, 1, tmp_path)
    assert wrong == []
    assert sum(tally.values()) == 400
    parts = {name.split(":")[0] for name in tally}
    assert parts == {"length", "header", "manifest", "digest", "codes", "scale", "other", "config"}
