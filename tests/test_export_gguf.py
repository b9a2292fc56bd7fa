"""The GGUF export: the file holds the artifact, as gguf's own reader gives it back."""

import copy
import functools
import inspect
import subprocess
import sys
from dataclasses import replace

import builders
import gguf
import pytest
import torch
from torch import nn

from askewq import artifact, checkpoint
from askewq.checkpoint import Artifact
from askewq.export_gguf import TARGET
from askewq.grid import make_grid, scale_shape
from askewq.hf_models import load_tokenizer
from askewq.layers import snap_
from askewq.manifest import PackedWeight
from askewq.pack import pack
from askewq.preprocessing import TextPreprocessing
from askewq.spec import LoadedModel, ModelSpec
from askewq.target import ExportSource, Options
from askewq.wrap import quantize

SIZES = {
    "vocab_size": 14,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": ("Llama", {"rope_theta": 5e5, "hidden_act": "swish"}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide": ("Llama", {"head_dim": 128}),
    "llama3": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@functools.cache
def plain(kind: str) -> nn.Module:
    """Return a random network; not to be changed."""
    import transformers

    family, changes = MODELS[kind]
    torch.manual_seed(4)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            nn.init.normal_(parameter.data)
    return model


def source(
    kind="llama", bits=4, grid="integer", group="channel", model=None, fp16=True
) -> ExportSource:
    """Return a source with the matrices of the blocks on a grid; its scales fit fp16 or do not."""
    model = copy.deepcopy(model or plain(kind))
    weights, made = {}, make_grid(bits, grid)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and ".layers." in name:
            shape = scale_shape(weight.shape, group)
            rows = weight.detach().reshape(shape[0] * shape[1], -1)
            scale = (rows.abs().amax(1) / -made.first).reshape(shape)
            scale = scale.half().float() if fp16 else scale
            codes = pack(made.codes(weight.detach(), scale), bits)
            weights[name] = PackedWeight(made, tuple(weight.shape), codes, scale)
            weight.data.copy_(weights[name].dense())
    shared = {"lm_head.weight": "model.embed_tokens.weight"}
    tied = model.config.tie_word_embeddings
    spec = ModelSpec("transformers", "tiny", "causal-lm", (), {})
    preprocessing = load_tokenizer(str(builders.llama()), False, 16)
    stored = Artifact(weights, {}, shared if tied else {})
    return ExportSource(None, LoadedModel(model, spec, preprocessing), stored)


def inputs() -> dict[str, torch.Tensor]:
    """Return three texts, one padded."""
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(4, 14, (3, 9)), "attention_mask": mask}


def difference(made: ExportSource, folder, given=None) -> float:
    """Return the largest difference of a logit, relative to the largest logit."""
    given = given or inputs()
    with torch.no_grad():
        expected = made.loaded.model(**given).logits
    got = TARGET.read_back(str(folder), given)
    return float((got - expected).abs().max() / expected.abs().max())


def fields(folder) -> dict[str, object]:
    """Return the metadata of a file."""
    reader = gguf.GGUFReader(str(folder / "model.gguf"))
    return {name: field.contents() for name, field in reader.fields.items()}


def stored_types(folder) -> dict[str, str]:
    """Return the type of every tensor of a file."""
    reader = gguf.GGUFReader(str(folder / "model.gguf"))
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


class TestExact:
    @pytest.mark.parametrize("kind", MODELS)
    @pytest.mark.parametrize("bits", ["ternary", 4, 8])
    def test_logits(self, kind, bits, tmp_path):
        """With scales that fp16 holds, nothing is lost: the logits are equal to the bit."""
        made = source(kind, bits)
        assert TARGET.refusals(made, Options()) == []
        TARGET.write(made, Options(), tmp_path)
        found = difference(made, tmp_path)
        assert found <= TARGET.bound(Options())
        assert found == 0 or kind == "llama3"  # its frequencies are rounded once more

    @pytest.mark.parametrize(
        ("bits", "grid", "group", "name"),
        [
            (1, "integer", "tensor", "TQ1_0"),
            ("ternary", "integer", 256, "TQ1_0"),
            (2, "integer", "channel", "Q2_K"),
            (2, "half-integer", "channel", "Q2_K"),
            (3, "integer", "channel", "Q3_K"),
            (4, "integer", 32, "Q4_0"),
            (4, "half-integer", "channel", "Q4_K"),
            (8, "integer", 64, "Q8_0"),
        ],
    )
    def test_other_grids_and_scales(self, bits, grid, group, name, tmp_path):
        """Every grid has a type, whatever shares a scale."""
        made = source("llama", bits, grid, group)
        assert TARGET.refusals(made, Options()) == []
        assert f"14 weights as {name}, equal to the bit" in TARGET.notes(made, Options())
        TARGET.write(made, Options(), tmp_path)
        assert difference(made, tmp_path) == 0
        types = stored_types(tmp_path)
        assert {types[key] for key in types if ".attn_q." in key or ".ffn_" in key} >= {name}
        assert types["token_embd.weight"] == types["blk.0.attn_norm.weight"] == "F32"

    def test_in_a_new_process(self, tmp_path):
        """read_back needs none of askewq, and gives the same logits."""
        folder, _ = builders.finished("llama")
        full = artifact.load_artifact(folder)
        made = ExportSource(folder, full, checkpoint.read(folder / "model.safetensors"))
        TARGET.write(made, Options(dense_rest=True), tmp_path)
        given = inputs()
        torch.save(given, tmp_path / "inputs.pt")
        program = f"""
import sys
sys.modules["askewq"] = None
{inspect.getsource(TARGET.read_back)}
import torch
torch.save(read_back({str(tmp_path)!r}, torch.load({str(tmp_path / "inputs.pt")!r})),
           {str(tmp_path / "logits.pt")!r})
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / "logits.pt"), full.model(**given).logits)

    def test_llama_rows_are_reordered(self, tmp_path):
        """Queries and keys lie as llama.cpp rotates them: the halves of each head interleaved."""
        made = source("llama")
        TARGET.write(made, Options(), tmp_path)
        reader = gguf.GGUFReader(str(tmp_path / "model.gguf"))
        tensor = next(t for t in reader.tensors if t.name == "blk.0.attn_k.weight")
        read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        weight = made.artifact.weights["model.layers.0.self_attn.k_proj.weight"].dense()
        for head in (0, 64):  # of 64 rows; row i turns with row i + 32
            assert torch.equal(read[head : head + 64 : 2], weight[head : head + 32])
            assert torch.equal(read[head + 1 : head + 64 : 2], weight[head + 32 : head + 64])


class TestFitted:
    @pytest.mark.parametrize(
        ("kind", "grid"),
        [("llama", make_grid(2, "integer")), ("tied", make_grid(1)), ("tied", make_grid("ternary")),
         ("tied", make_grid(2, "half-integer")), ("tied", make_grid(8))],
    )  # fmt: skip
    def test_scales_that_askewq_fits_are_exact(self, kind, grid, tmp_path):
        """Embeddings and head included, nothing is lost and no flag is needed."""
        half = "half-integer" if grid.first % 1 else "integer"
        model = copy.deepcopy(plain(kind))
        quantize(model, grid.bits, grid=half, include=["*"])
        snap_(model)
        content = checkpoint.artifact_of(model)
        fresh = copy.deepcopy(plain(kind))
        checkpoint.load_into(fresh, content)
        made = replace(source(kind), artifact=content)
        made.loaded.model = fresh
        assert TARGET.refusals(made, Options()) == []
        (note,) = (n for n in TARGET.notes(made, Options()) if " weights as " in n)
        assert note.endswith("equal to the bit")
        TARGET.write(made, Options(), tmp_path)
        assert difference(made, tmp_path) == 0
        assert stored_types(tmp_path)["token_embd.weight"] != "F32"


class TestLossy:
    def test_refused_by_name(self):
        """Scales that fp16 does not hold are refused: the weights, the error and the ways out."""
        made = source(fp16=False)
        (refusal,) = TARGET.refusals(made, Options())
        assert "model.layers.0.self_attn.q_proj.weight, " in refusal
        assert "and 6 more" in refusal
        assert "would be off by up to" in refusal
        assert "--allow-lossy" in refusal
        assert "--dense-rest" in refusal

    def test_allowed(self, tmp_path):
        """With --allow-lossy only the scales are rounded, and the error is printed."""
        made, options = source(fp16=False), Options(allow_lossy=True)
        assert TARGET.refusals(made, options) == []
        assert "14 weights as Q4_0, largest error of a weight" in TARGET.notes(made, options)[0]
        TARGET.write(made, options, tmp_path)
        assert 0 < difference(made, tmp_path) < TARGET.bound(options)
        largest = max(
            float((w.dense() - made_of(tmp_path, made, name)).abs().max())
            for name, w in made.artifact.weights.items()
            if "q_proj" not in name and "k_proj" not in name
        )
        scale = max(float(w.scale.max()) for w in made.artifact.weights.values())
        assert 0 < largest <= 8 * scale * 2**-11

    def test_dense_instead(self, tmp_path):
        """With --dense-rest such weights are float32, and exact."""
        made, options = source(fp16=False), Options(dense_rest=True)
        assert TARGET.refusals(made, options) == []
        assert "14 weights as F32, equal to the bit" in TARGET.notes(made, options)
        TARGET.write(made, options, tmp_path)
        assert difference(made, tmp_path) == 0
        assert set(stored_types(tmp_path).values()) == {"F32"}

    def test_no_type_at_all(self):
        """Groups of 16 and 8 half-integer bits fit no type, whatever is allowed but float32."""
        for made, what in (
            (source(group=16), "bits = 4 in 2-D with a scale for 16 in a row"),
            (source(bits=8, grid="half-integer"), "bits = 8, half-integer in 2-D"),
        ):
            refusals = TARGET.refusals(made, Options(allow_lossy=True))
            assert any(f"no GGUF type holds {what}" in refusal for refusal in refusals)
            assert "pass --dense-rest" in refusals[0]
            assert TARGET.refusals(made, Options(dense_rest=True)) == []


def made_of(folder, made: ExportSource, name: str) -> torch.Tensor:
    """Return a weight as the file holds it."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    wanted = names.get_name(name, try_suffixes=(".weight",))
    reader = gguf.GGUFReader(str(folder / "model.gguf"))
    tensor = next(t for t in reader.tensors if t.name == wanted)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


class TestRefused:
    @pytest.mark.parametrize(
        ("family", "changes", "reason"),
        [
            ("Llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
            ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
            ("Mistral", {"sliding_window": 8}, "a window of 8"),
            ("Qwen3", {"attention_bias": True}, "attention with biases"),
            ("Qwen2", {"rope_scaling": LLAMA3}, "'llama3', which llama.cpp's qwen2 does not have"),
            ("Qwen3", {"rope_scaling": LLAMA3}, "'llama3', which llama.cpp's qwen3 does not have"),
            ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "is a gpt2"),
        ],
    )
    def test_what_llama_cpp_computes_otherwise(self, family, changes, reason):
        """A network that llama.cpp would compute otherwise is refused, with the reason."""
        import transformers

        sizes = {"vocab_size": 14} if family == "GPT2" else {**SIZES, "hidden_size": 64}
        config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
        head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        model = getattr(transformers, f"{family}{head}")(config).eval()
        (refusal,) = TARGET.refusals(source(model=model), Options(allow_lossy=True))
        assert reason in refusal

    def test_other_tasks(self):
        """An image model is refused by its name and task."""
        spec = ModelSpec("timm", "resnet50", "image-classification", ("a",), {})
        full = LoadedModel(nn.Linear(2, 2), spec, None)
        (refusal,) = TARGET.refusals(ExportSource(None, full, Artifact({}, {}, {})), Options())
        assert refusal.startswith("'resnet50' is a model for image-classification; GGUF is written")


class TestMetadata:
    def test_what_llama_cpp_builds_from(self, tmp_path):
        """The settings of the network are all there."""
        TARGET.write(source("linear", "ternary"), Options(), tmp_path)
        expected = {
            "general.architecture": "llama",
            "general.file_type": int(gguf.LlamaFileType.MOSTLY_TQ1_0),
            "llama.vocab_size": 14,
            "llama.context_length": 64,
            "llama.embedding_length": 256,
            "llama.block_count": 2,
            "llama.feed_forward_length": 512,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
            "llama.attention.key_length": 64,
            "llama.rope.dimension_count": 64,
            "llama.rope.freq_base": 10000.0,
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 3.0,
            "tokenizer.ggml.model": "none",
        }
        found = fields(tmp_path)
        assert {key: found[key] for key in expected} == expected
        assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
        assert builders.files(tmp_path) >= {"model.gguf", "tokenizer.json"}

    def test_tied_embeddings_are_stored_once(self, tmp_path):
        """Without an output matrix llama.cpp uses the embedding."""
        TARGET.write(source("tied"), Options(), tmp_path)
        types = stored_types(tmp_path)
        assert "token_embd.weight" in types
        assert "output.weight" not in types

    def test_chat_templates(self, tmp_path):
        """One, or several by their names."""
        made = source()
        made.loaded.model.config.vocab_size = 300
        tokenizer = byte_level("llama-bpe")
        made.loaded.preprocessing = TextPreprocessing(tokenizer, 16)
        for name, templates in (
            ("one", "{{ a }}"),
            ("two", {"default": "{{ a }}", "tool": "{{ b }}"}),
        ):
            tokenizer.chat_template = templates
            (tmp_path / name).mkdir()
            TARGET.write(made, Options(), tmp_path / name)
            found = fields(tmp_path / name)
            assert found["tokenizer.chat_template"] == "{{ a }}"
            assert found.get("tokenizer.chat_template.tool") == (
                "{{ b }}" if name == "two" else None
            )

    @pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "qwen2", None])
    def test_byte_level_tokenizers(self, split, tmp_path):
        """A byte-level BPE tokenizer that llama.cpp splits alike is carried; another one is not."""
        made = source()
        made.loaded.model.config.vocab_size = 300
        made.loaded.preprocessing = TextPreprocessing(byte_level(split), 16)
        TARGET.write(made, Options(), tmp_path)
        found = fields(tmp_path)
        carried = [note for note in TARGET.notes(made, Options()) if "tokenizer" in note]
        if split is None:
            assert found["tokenizer.ggml.model"] == "none"
            assert "token ids" in carried[0]
            return
        assert carried == []
        assert found["tokenizer.ggml.model"] == "gpt2"
        assert found["tokenizer.ggml.pre"] == split
        tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
        vocabulary = made.loaded.preprocessing.tokenizer.get_vocab()
        assert len(tokens) == len(types) == 300
        assert all(tokens[i] == token for token, i in vocabulary.items())
        assert types[vocabulary["<s>"]] == gguf.TokenType.CONTROL
        assert types[vocabulary["a"]] == gguf.TokenType.NORMAL
        assert types[299] == gguf.TokenType.UNUSED
        assert found["tokenizer.ggml.bos_token_id"] == vocabulary["<s>"]
        assert "g o" in found["tokenizer.ggml.merges"]
        assert found["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "qwen2"])
def test_pieces_that_no_merges_lead_to(split):
    """llama.cpp takes a piece of its vocabulary whole with Llama 3's split, and there alone."""
    from askewq.gguf_tokenizer import vocabulary

    loaded = artifact.load_artifact(builders.finished("llama")[0])
    loaded.model.config.vocab_size = 300
    for whole in (True, False):
        made = byte_level(split)
        made.backend_tokenizer.model.ignore_merges = whole
        loaded.preprocessing = TextPreprocessing(made, 16)
        assert (vocabulary(loaded) is not None) == (whole == (split == "llama-bpe"))


@pytest.mark.parametrize("change", ["lowercase", "NFC", "behavior", "invert"])
def test_a_tokenizer_that_changes_texts_is_not_carried(change):
    """llama.cpp has no normalizer for byte-level BPE, and one way to split."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    from askewq.gguf_tokenizer import SPLITS, vocabulary

    made = byte_level("qwen2")
    backend = made.backend_tokenizer
    pattern = Regex({name: pattern for pattern, name in SPLITS.items()}["qwen2"])
    behavior = "removed" if change == "behavior" else "isolated"
    split = pre_tokenizers.Split(pattern, behavior, invert=change == "invert")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if change in ("lowercase", "NFC"):
        backend.normalizer = normalizers.NFC() if change == "NFC" else normalizers.Lowercase()
    loaded = artifact.load_artifact(builders.finished("llama")[0])
    loaded.model.config.vocab_size = 300
    loaded.preprocessing = TextPreprocessing(made, 16)
    assert (vocabulary(loaded) is not None) == (change == "NFC")


def byte_level(split: str | None):
    """Return a small tokenizer that splits texts as GPT-2, Llama 3 or Qwen 2 do, or else."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from askewq.gguf_tokenizer import SPLITS

    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    patterns = {name: pattern for pattern, name in SPLITS.items()}
    if split == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = Regex(patterns.get(split, r"\w+"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["good good film, not bad at all"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
