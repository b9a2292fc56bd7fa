"""Artifacts in transformers: packed, exact, saved again as they were, complete or refused."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import builders
import pytest
import torch
import transformers
from builders import copy_of, finished
from conftest import GRIDS
from safetensors.torch import save_file

import askewq
from askewq import artifact, checkpoint, models
from askewq.errors import FormatError, ModelError
from askewq.kinds import channel_dim
from askewq.layers import quantize_layer_, snap_
from askewq.packed import PackedLayer
from askewq.preprocessing import TextPreprocessing
from askewq.spec import LoadedModel, ModelSpec

AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}
WEIGHTS = "model.safetensors"
TOKENS = torch.tensor([[2, 4, 5, 3]])
every_kind = pytest.mark.parametrize("kind", AUTO)


def load(kind, folder=None, **arguments):
    """Load an artifact by its Auto class."""
    auto = getattr(transformers, AUTO[kind])
    return auto.from_pretrained(folder or finished(kind)[0], **arguments)


@torch.no_grad()
def logits(model, kind):
    """Return the logits for fixed inputs."""
    if kind == "vit":
        pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
        return model(pixel_values=pixels.to(model.dtype)).logits
    return model(input_ids=TOKENS).logits


def packed_layers(model):
    """Return the names of the packed layers."""
    return {name for name, m in model.named_modules() if isinstance(m, PackedLayer)}


def same_content(one, two):
    """Tell whether two packed files hold the same tensors under the same manifest."""
    (a, manifest), (b, other) = (checkpoint.serialize(checkpoint.read(p)) for p in (one, two))
    return manifest == other and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestLoad:
    @every_kind
    def test_logits_are_those_of_the_dense_load(self, kind):
        """Weights stay packed, and the logits are those that were evaluated, to the bit."""
        folder, _ = finished(kind)
        model, dense = load(kind), askewq.load(folder)
        stored = checkpoint.read(folder / "model.safetensors")
        shared = {name for name, source in stored.shared.items() if source in stored.weights}
        names = {*stored.weights, *shared}
        assert packed_layers(model) == {name.removesuffix(".weight") for name in names}
        assert type(model) is type(dense)
        assert torch.equal(logits(model, kind), logits(dense, kind))

    @every_kind
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_other_types(self, kind, dtype):
        """With a dtype each weight is rounded once, from float32."""
        dense = askewq.load(finished(kind)[0], dtype=dtype)
        assert torch.equal(logits(load(kind, dtype=dtype), kind), logits(dense, kind))

    def test_rotary_frequencies_are_not_rounded(self):
        """Buffers that no file holds stay float32, so that far positions keep their angles."""
        folder = finished("llama")[0]
        for model in (
            askewq.load(folder, dtype=torch.bfloat16),
            askewq.load(folder, dtype=torch.bfloat16, packed=True),
            askewq.load(folder, model=askewq.load(folder), dtype=torch.bfloat16),
            load("llama", dtype=torch.bfloat16),
        ):
            assert model.model.rotary_emb.inv_freq.dtype == torch.float32
            assert model.model.norm.weight.dtype == torch.bfloat16

    @pytest.mark.parametrize("include", ["*", "*embed_tokens"])
    def test_a_packed_layer_with_a_buffer_of_its_own(self, tmp_path, include):
        """Gemma's embedding has a factor that no file holds; transformers makes it."""
        size = builders.write_tokenizer(tmp_path)
        config = transformers.Gemma3TextConfig(
            vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, intermediate_size=32, max_position_embeddings=40,
            pad_token_id=0, bos_token_id=2, eos_token_id=3, layer_types=["full_attention"],
        )  # fmt: skip
        transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path)
        loaded = models.load(str(tmp_path), "causal-lm")
        folder = builders.packed(
            loaded, tmp_path / "out", lambda m: askewq.quantize(m, 3, include=[include])
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert "model.embed_tokens" in packed_layers(model)
        assert model.model.embed_tokens.embed_scale == 4
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, askewq.load(folder)(TOKENS).logits)

    def test_the_base_model(self):
        """AutoModel drops the prefix and the head."""
        folder, _ = finished("bert")
        model = transformers.AutoModel.from_pretrained(folder)
        assert type(model).__name__ == "BertModel"
        assert packed_layers(model)
        with torch.no_grad():
            expected = askewq.load(folder).bert(TOKENS).pooler_output
            assert torch.equal(model(TOKENS).pooler_output, expected)

    def test_nothing_is_missing_or_left_over(self):
        """The loader's own report is clean."""
        for kind in AUTO:
            _, info = load(kind, output_loading_info=True)
            assert not any(info.values()), kind

    def test_generation_pipelines_and_tokenizers(self):
        """What users build on a model works on a packed one."""
        dense = askewq.load(finished("llama")[0])
        texts = [m.generate(TOKENS, max_new_tokens=4) for m in (load("llama"), dense)]
        assert torch.equal(*texts)
        pipeline = transformers.pipeline("text-classification", model=str(finished("bert")[0]))
        assert pipeline("good film")[0]["label"] in ("pos", "neg")
        tokenizer = transformers.AutoTokenizer.from_pretrained(finished("bert")[0])
        assert tokenizer("good film")["input_ids"] == [2, 4, 6, 3]

    def test_the_config_is_the_network_s(self):
        """AutoConfig gives the network's own config, labels included, under its own name."""
        config = transformers.AutoConfig.from_pretrained(finished("bert")[0])
        assert isinstance(config, transformers.BertConfig)
        assert config.model_type == "bert"
        assert config.id2label == {0: "neg", 1: "pos"}


class TestSave:
    @every_kind
    def test_saves_again_identically(self, kind, tmp_path):
        """save_pretrained writes the same packed content and the same config.json."""
        folder, _ = finished(kind)
        load(kind).save_pretrained(tmp_path)
        assert same_content(folder / "model.safetensors", tmp_path / "model.safetensors")
        one, two = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
        assert one == two
        assert torch.equal(logits(load(kind, tmp_path), kind), logits(load(kind), kind))

    def test_what_is_saved_is_an_artifact(self, tmp_path):
        """The folder is one that askewq reads, given its tokenizer: what transformers saved."""
        load("bert").save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(finished("bert")[0]).save_pretrained(tmp_path)
        loaded = askewq.load(tmp_path)
        assert torch.equal(logits(loaded, "bert"), logits(load("bert"), "bert"))

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_save_too(self, twin, tmp_path):
        """A copied or pickled model still writes an artifact."""
        twin(load("bert")).save_pretrained(tmp_path)
        assert same_content(
            finished("bert")[0] / "model.safetensors", tmp_path / "model.safetensors"
        )
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "askewq"

    def test_a_cast_model_is_not_saved(self, tmp_path):
        """Its float tensors are others than those that were evaluated, and nothing reads them."""
        kind = transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(finished("bert")[0], dtype=torch.bfloat16)
        with pytest.raises(ModelError, match=r"bfloat16.*load it without dtype= to save it"):
            model.save_pretrained(tmp_path)

    def test_a_part_of_the_network_is_not_saved(self, tmp_path):
        """config.json would still describe the whole of it."""
        part = transformers.AutoModel.from_pretrained(finished("bert")[0])
        with pytest.raises(ModelError, match="BertModel is a part of the artifact's network"):
            part.save_pretrained(tmp_path)

    def test_other_names_of_labels(self, tmp_path):
        """Those given in from_pretrained are the artifact's, in both places."""
        kind = transformers.AutoModelForSequenceClassification
        names = {"id2label": {1: "b", 0: "a"}, "label2id": {"a": 0, "b": 1}}
        kind.from_pretrained(finished("bert")[0], **names).save_pretrained(tmp_path)
        assert artifact.read_spec(tmp_path)[0].labels == ("a", "b")

    def test_a_dequantized_model_is_an_ordinary_one(self, tmp_path):
        """Saved, it is read without askewq's kind of model."""
        model = load("bert")
        before = logits(model, "bert")
        model.dequantize()
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
        again = load("bert", tmp_path)
        assert not packed_layers(again)
        state = model.state_dict()
        assert all(torch.equal(tensor, state[n]) for n, tensor in again.state_dict().items())
        for parameter in again.parameters():  # where a mapped file begins decides how sums are made
            parameter.data = parameter.data.clone()
        assert torch.equal(logits(again, "bert"), before)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    def test_dequantized_to_a_type(self, dtype):
        """It is the one asked for, else the one loaded; rotary frequencies stay float32."""
        model = load("llama").dequantize(dtype=dtype)
        expected = askewq.load(finished("llama")[0], dtype=dtype)
        assert all(
            torch.equal(p, q)
            for p, q in zip(model.parameters(), expected.parameters(), strict=True)
        )
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(logits(model, "llama"), logits(expected, "llama"))

    @pytest.mark.parametrize("way", ["relative", "absolute"])
    def test_a_path_with_two_dots(self, tmp_path, monkeypatch, way):
        """Which folder it is, is the user's to say."""
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        copy_of("bert", tmp_path)
        above = Path("..") if way == "relative" else tmp_path / "below" / ".."
        (name,) = [path.name for path in tmp_path.iterdir() if path.name != "below"]
        assert torch.equal(logits(load("bert", above / name), "bert"), logits(load("bert"), "bert"))

    def test_a_network_without_its_tokenizer(self, tmp_path):
        """`askewq.load` returns a network, which needs none."""
        load("bert").save_pretrained(tmp_path)
        assert torch.equal(logits(askewq.load(tmp_path), "bert"), logits(load("bert"), "bert"))

    def test_how_it_generates(self, tmp_path):
        """End tokens and sampling come from the model's own file, and stay."""
        source = shutil.copytree(builders.llama(), tmp_path / "llama")
        wanted = {"eos_token_id": [3, 5, 7], "do_sample": True, "temperature": 0.6}
        (source / "generation_config.json").write_text(json.dumps(wanted))
        builders.finetune("llama", tmp_path / "out", model=str(source))
        again = load("llama", tmp_path / "out")
        again.save_pretrained(tmp_path / "saved")
        for model in (again, load("llama", tmp_path / "saved"), askewq.load(tmp_path / "out")):
            assert {k: getattr(model.generation_config, k) for k in wanted} == wanted
        assert not (finished("llama")[0] / "generation_config.json").exists()

    def test_sampling_that_is_off(self, tmp_path):
        """Transformers warns of such a file, and saves it."""
        source = shutil.copytree(builders.llama(), tmp_path / "llama")
        given = {"eos_token_id": 3, "temperature": 0.9, "top_p": 0.6}
        (source / "generation_config.json").write_text(json.dumps(given))
        builders.finetune("llama", tmp_path / "out", model=str(source))
        outcome = builders.command(
            "export", tmp_path / "out", "--to", "dense", "--output", tmp_path / "dense"
        )
        assert outcome.code == 0, outcome.err
        assert (
            json.loads((tmp_path / "dense" / "generation_config.json").read_text())["top_p"] == 0.6
        )

    @pytest.mark.parametrize("content", ["[]", '{"cache_implementation": "magic"}'])
    def test_a_damaged_file_of_how_it_generates(self, tmp_path, content):
        """It has no digest, so that it may hold anything."""
        folder = copy_of("llama", tmp_path)
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(FormatError, match="generation_config"):
            askewq.load(folder)

    def test_the_config_alone(self, tmp_path):
        """A config that is saved alone does not pass for a float network's either."""
        transformers.AutoConfig.from_pretrained(finished("vit")[0]).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "askewq"

    @pytest.mark.parametrize("kind", ["bert", "gpt2"])
    def test_shards(self, tmp_path, kind):
        """Saved in several files, an artifact is the same to transformers and to askewq."""
        model = load(kind)
        model.save_pretrained(tmp_path, max_shard_size="3KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert same_content(finished(kind)[0] / WEIGHTS, tmp_path / WEIGHTS)
        again = load(kind, tmp_path)
        assert packed_layers(again) == packed_layers(model)
        assert torch.equal(logits(again, kind), logits(model, kind))

    def test_dequantize(self):
        """`dequantize` gives plain layers with the same logits."""
        model = load("vit")
        before = logits(model, "vit")
        model.dequantize()
        assert not packed_layers(model)
        assert torch.equal(logits(model, "vit"), before)
        assert all(type(m).__module__.split(".")[0] != "askewq" for m in model.modules())


def by_hand(folder, network, names, grid):
    """Write an artifact of a language model with the named layers on a grid; return it dense."""
    for name in names:
        layer = network.get_submodule(name)
        scale = torch.rand(layer.weight.shape[channel_dim(layer)], 1) + 0.1
        quantize_layer_(layer, grid, scale)
    snap_(network)
    checkpoint.save(network, folder / "model.safetensors")
    spec = ModelSpec("transformers", "by hand", "causal-lm", (), network.config.to_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(builders.llama())
    artifact.save_config(LoadedModel(network, spec, TextPreprocessing(tokenizer, 8)), folder)
    return askewq.load(folder)


class TestOtherLayers:
    @pytest.mark.parametrize("grid", [GRIDS[1], GRIDS[2], GRIDS[4], GRIDS[-1]], ids=str)
    def test_conv1d_and_tied_embedding(self, tmp_path, grid):
        """GPT-2's Conv1D and an embedding that is the output matrix, too, are packed once."""
        config = transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=14, n_positions=16
        )
        network = transformers.GPT2LMHeadModel(config)
        scale = torch.rand(14, 1) + 0.1
        for layer in (network.transformer.wte, network.lm_head):
            quantize_layer_(layer, grid, scale)
        names = ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "transformer.wpe"]
        dense = by_hand(tmp_path, network, names, grid)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not any(info.values())
        assert packed_layers(model) == {*names, "transformer.wte", "lm_head"}
        assert model.lm_head.packed is model.transformer.wte.packed
        assert torch.equal(logits(model, "gpt2"), logits(dense, "gpt2"))
        (tmp_path / "again").mkdir()
        model.save_pretrained(tmp_path / "again")
        assert same_content(
            tmp_path / "model.safetensors", tmp_path / "again" / "model.safetensors"
        )
        model.dequantize()
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(logits(model, "gpt2"), logits(dense, "gpt2"))

    @pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
    def test_stacked_experts(self, tmp_path, kind):
        """The weights of experts, which no layer calls `weight`, stay packed under their names."""
        sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
        config = getattr(transformers, f"{kind}Config")(
            **sizes, vocab_size=14, num_attention_heads=2, num_key_value_heads=2,
            num_local_experts=4, max_position_embeddings=16, pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )  # fmt: skip
        network = getattr(transformers, f"{kind}ForCausalLM")(config)
        askewq.quantize(network, 2)
        dense = by_hand(tmp_path, network, [], GRIDS[2])
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not any(info.values())
        experts = "model.layers.0.mlp.experts"
        assert experts in packed_layers(model)
        for leaf in ("gate_up_proj", "down_proj"):
            expected = dense.get_parameter(f"{experts}.{leaf}")
            assert torch.equal(getattr(model.get_submodule(experts), leaf), expected)
        assert torch.equal(logits(model, "gpt2"), logits(dense, "gpt2"))
        (tmp_path / "again").mkdir()
        model.save_pretrained(tmp_path / "again")
        assert same_content(
            tmp_path / "model.safetensors", tmp_path / "again" / "model.safetensors"
        )
        model.dequantize()
        assert torch.equal(logits(model, "gpt2"), logits(dense, "gpt2"))


class TestRefusals:
    def test_another_task(self):
        """A head that the artifact does not have is refused, not made up."""
        with pytest.raises(FormatError, match="makes no weights up"):
            transformers.AutoModelForSequenceClassification.from_pretrained(finished("llama")[0])

    def test_a_head_of_another_task(self):
        """One with the same names, that would leave a part of the artifact out."""
        with pytest.raises(FormatError, match=r"bert\.pooler.* has no place for"):
            transformers.AutoModelForTokenClassification.from_pretrained(finished("bert")[0])

    def test_a_head_of_another_size(self):
        """It is refused, also where transformers would draw a new one."""
        auto = transformers.AutoModelForSequenceClassification
        with pytest.raises(
            FormatError, match=r"classifier\.\w+ is \[.*in the model that was asked"
        ):
            auto.from_pretrained(finished("bert")[0], num_labels=5, ignore_mismatched_sizes=True)

    def test_a_lost_weight(self, tmp_path):
        """A file that lacks a weight of the network is refused by name."""
        folder = copy_of("bert", tmp_path)
        stored = checkpoint.read(folder / "model.safetensors")
        name = "classifier.bias"
        del stored.tensors[name]
        tensors, metadata = checkpoint.serialize(stored)
        save_file(tensors, folder / "model.safetensors", metadata)
        with pytest.raises(FormatError, match=name):
            load("bert", folder)

    def test_ordinary_weights(self, tmp_path):
        """Dense weights beside an artifact's config.json are no artifact."""
        folder = copy_of("bert", tmp_path)
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        with pytest.raises(FormatError, match="ordinary safetensors"):
            load("bert", folder)

    def test_no_weights(self, tmp_path):
        """A config without weights gives no network."""
        (tmp_path / "config.json").write_bytes((finished("bert")[0] / "config.json").read_bytes())
        with pytest.raises(OSError, match="no file named"):
            load("bert", tmp_path)

    @pytest.mark.parametrize("kind", ["timm", "own"])
    def test_other_sources(self, kind):
        """An artifact of a timm network or of the user's own says how to load it."""
        with pytest.raises(ModelError, match=r"askewq\.load\(folder\)"):
            transformers.AutoModel.from_pretrained(finished(kind)[0])

    @pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertModel"])
    def test_a_class_of_one_architecture(self, name):
        """Beside the Auto classes there is an error, not random weights."""
        with pytest.raises(ValueError, match="quant_method"):
            getattr(transformers, name).from_pretrained(finished("bert")[0])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"askewq_version": 4}, "version"),
            ({"arguments": {"model_type": "x"}}, "Unrecognized model"),
        ],
    )
    def test_damaged_configs(self, tmp_path, changes, words):
        """A newer version or an unknown network is refused as askewq itself refuses it."""
        folder = copy_of("bert", tmp_path)
        builders.edit_config(folder, **changes)
        with pytest.raises(FormatError, match=words):
            load("bert", folder)
