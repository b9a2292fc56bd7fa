"""The compressed-tensors export: its own loader unpacks the artifact's weights, bit for bit."""

import json
import re

import builders
import pytest
import torch
from builders import packed, put_on_grid, untrained
from compressed_tensors.compressors.pack_quantized import helpers
from conftest import GRIDS, grid_name, random_tensor
from safetensors.torch import load_file

import askewq
from askewq import export_compressed_tensors as exporter
from askewq.activations import attach_
from askewq.errors import ExportError
from askewq.export import _open, export
from askewq.export_compressed_tensors import TARGET, coding, packed_tensors
from askewq.grid import fit_scale, make_grid
from askewq.manifest import PackedWeight
from askewq.pack import pack
from askewq.samples import expected_of
from askewq.target import Options

NINE_BITS = make_grid(8, "half-integer")
HELD = [grid for grid in GRIDS if grid != NINE_BITS]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def kind_of(grid):
    """Return what make_grid calls the kind of a grid."""
    return "half-integer" if grid.first % 1 else "integer"


def source_of(kind, folder, quantization):
    """Return an opened artifact of a tiny model."""
    return _open(packed(untrained(kind), folder / "artifact", quantization), None)


def write(source, folder, **options):
    """Write the export without the fresh process; return its folder."""
    options = Options(**options)
    assert TARGET.refusals(source, options) == []
    folder.mkdir()
    TARGET.write(source, options, folder)
    return folder


def assert_same_logits(source, folder):
    """Check transformers' logits, through compressed-tensors, against the artifact's."""
    inputs, expected = expected_of(source.loaded)
    with torch.no_grad():
        assert torch.equal(TARGET.read_back(str(folder), inputs), expected)


def config_of(folder):
    """Return the quantization_config of a written folder."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def packed_weight(grid, shape, group_size="channel"):
    """Return a random weight on a grid."""
    weight = random_tensor(3, *shape, dtype=torch.float32)
    scale = fit_scale(weight, grid, group_size)
    return PackedWeight(grid, shape, pack(grid.codes(weight, scale), grid.bits), scale)


class TestCoding:
    @pytest.mark.parametrize(
        ("bits", "kind", "expected"),
        [
            (1, "integer", (2, 1)),
            ("ternary", "integer", (2, 1)),
            (2, "integer", (2, 1)),
            (2, "half-integer", (3, 2)),
            (3, "integer", (3, 1)),
            (3, "half-integer", (4, 2)),
            (7, "half-integer", (8, 2)),
            (8, "integer", (8, 1)),
            (8, "half-integer", (9, 2)),
        ],
    )
    def test_is_the_narrowest_that_holds_the_levels(self, bits, kind, expected):
        """One bit less, and an outermost level would not fit."""
        code = coding(make_grid(bits, kind))
        assert (code.bits, code.factor) == expected
        levels = make_grid(bits, kind).levels() * code.factor
        assert torch.equal(levels, levels.round())
        assert -(2 ** (code.bits - 1)) <= levels.min() <= levels.max() < 2 ** (code.bits - 1)
        assert levels.min() < -(2 ** (code.bits - 2)) or levels.max() >= 2 ** (code.bits - 2)

    @pytest.mark.parametrize("shape", [(3, 64), (5, 33), (2, 1), (4, 40)])
    @pytest.mark.parametrize("grid", HELD, ids=grid_name)
    def test_the_library_unpacks_what_was_packed(self, grid, shape):
        """Its unpacking gives the weight to the bit, its packing gives the same words."""
        weight, code = packed_weight(grid, shape), coding(grid)
        tensors = packed_tensors(weight)
        words = tensors["weight_packed"]
        assert words.dtype == torch.int32
        assert words.shape == (shape[0], -(-shape[1] * code.bits // 32))
        unpacked = helpers.unpack_from_int32(words, code.bits, torch.Size(shape))
        assert torch.equal(unpacked * tensors["weight_scale"], weight.dense())
        assert tensors["weight_shape"].tolist() == list(shape)
        if shape[1] * code.bits % 32 == 0:  # what fills up the last word is anyone's choice
            assert torch.equal(helpers.pack_to_int32(unpacked, code.bits), words)

    @pytest.mark.parametrize(("group_size", "groups"), [("tensor", 1), ("channel", 1), (8, 4)])
    def test_scales_are_per_channel_or_per_group(self, group_size, groups):
        """One scale for all is repeated, groups stay groups; half-integers halve it."""
        weight = packed_weight(make_grid(3, "half-integer"), (6, 32), group_size)
        scale = packed_tensors(weight)["weight_scale"]
        assert scale.shape == (6, groups)
        assert scale.is_contiguous()
        assert torch.equal(scale, (weight.scale / 2).expand(6, groups))


class TestExact:
    @pytest.mark.parametrize("grid", HELD, ids=grid_name)
    @pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
    def test_logits_are_equal_to_the_bit(self, tmp_path, kind, grid):
        """Every grid goes over exactly; a width other than the artifact's is said."""
        quantize = {"grid": kind_of(grid)}
        source = source_of(kind, tmp_path, lambda m: askewq.quantize(m, grid.bits, **quantize))
        assert_same_logits(source, write(source, tmp_path / "out"))
        notes = " ".join(TARGET.notes(source, Options()))
        wider = grid.bits != coding(grid).bits
        assert (f"written in {coding(grid).bits} bits" in notes) == wider

    @pytest.mark.parametrize("group_size", ["tensor", "channel", 8])
    def test_every_granularity(self, tmp_path, group_size):
        """One scale for all, one a channel, one a group."""
        quantize = {"group_size": group_size}
        source = source_of("llama", tmp_path, lambda m: askewq.quantize(m, 2, **quantize))
        folder = write(source, tmp_path / "out")
        assert_same_logits(source, folder)
        [group] = config_of(folder)["config_groups"].values()
        assert group["weights"]["group_size"] == (8 if group_size == 8 else None)
        repeated = [n for n in TARGET.notes(source, Options()) if "repeated per channel" in n]
        assert bool(repeated) == (group_size == "tensor")

    def test_mixed_bits(self, tmp_path):
        """Each kind of weight is a group of its own; the rest is in the list of the ignored."""

        def mixed(model):
            put_on_grid(model, Q_PROJ, 1)
            put_on_grid(model, "model.layers.0.self_attn.k_proj", "ternary", 8)
            put_on_grid(model, "model.layers.0.mlp.up_proj", 3, "tensor")
            put_on_grid(model, "model.layers.1.mlp.down_proj", 7, 4, "half-integer")
            put_on_grid(model, "model.layers.1.self_attn.o_proj", 5)
            put_on_grid(model, "model.layers.1.self_attn.v_proj", 2, kind="half-integer")

        source = source_of("llama", tmp_path, mixed)
        folder = write(source, tmp_path / "out")
        assert_same_logits(source, folder)
        groups = config_of(folder)["config_groups"].values()
        weights = [group["weights"] for group in groups]
        kinds = {(w["num_bits"], w["strategy"], w["group_size"]) for w in weights}
        assert kinds == {
            (2, "channel", None),
            (2, "group", 8),
            (3, "channel", None),
            (5, "channel", None),
            (8, "group", 4),
        }
        assert len(weights) == len(kinds)
        targets = [target for group in groups for target in group["targets"]]
        ignored = config_of(folder)["ignore"]
        assert len(targets) == 6
        assert "lm_head" in ignored
        patterns = [p.removeprefix("re:") for p in (*targets, *ignored) if p.startswith("re:")]
        assert all(re.match(r"\^\(model\\\.\)\?\w", pattern) for pattern in patterns)
        notes = TARGET.notes(source, Options())
        assert len(notes) == 5
        assert any(
            note.startswith("7 bits, half-integer (1 layer): written in 8") for note in notes
        )

    def test_a_fresh_process_agrees(self, tmp_path):
        """The whole command: transformers loads it where askewq cannot be imported."""
        quantized = packed(untrained("bert"), tmp_path / "a", lambda m: askewq.quantize(m, 3))
        result = export(quantized, "compressed-tensors", tmp_path / "out")
        assert result["max_difference"] == result["bound"] == 0
        assert {"transformers", "compressed_tensors"} <= result["libraries"].keys()
        assert {"config.json", "tokenizer.json", "README.md"} <= result["files"].keys()


class TestLoading:
    def test_auto_classes_and_the_base_model(self, tmp_path):
        """AutoModelForCausalLM loads it, and AutoModel loads what is under its head."""
        import transformers

        source = source_of("llama", tmp_path, lambda m: askewq.quantize(m, 2))
        folder = write(source, tmp_path / "out")
        inputs, expected = expected_of(source.loaded)
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert hasattr(whole.get_submodule(Q_PROJ), "weight_packed")  # until it is used
        base, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        with torch.no_grad():
            assert torch.equal(whole(**inputs).logits, expected)
            hidden = base(**inputs).last_hidden_state
            assert torch.equal(hidden @ whole.lm_head.weight.T, expected)
        assert not hasattr(whole.get_submodule(Q_PROJ), "weight_packed")
        weight = source.loaded.model.get_submodule(Q_PROJ).weight
        assert torch.equal(whole.get_submodule(Q_PROJ).weight, weight)
        assert torch.equal(base.get_submodule(Q_PROJ.removeprefix("model.")).weight, weight)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("good film")["input_ids"] == [2, 4, 6, 3]

    def test_the_class_is_the_fine_tuned_models(self, tmp_path):
        """config.json names the class with the head, not the one that training started from."""
        loaded = untrained("bert")
        loaded.spec.arguments["architectures"] = ["BertForMaskedLM"]
        source = _open(packed(loaded, tmp_path / "a", lambda m: askewq.quantize(m, 2)), None)
        folder = write(source, tmp_path / "out")
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert config["dtype"] == "float32"
        assert_same_logits(source, folder)

    def test_the_file_holds_packed_weights(self, tmp_path):
        """Words of 32 bits for the packed layers, tied weights once, everything else as it was."""
        source = source_of("llama", tmp_path, lambda m: askewq.quantize(m, 2, grid="integer"))
        stored = load_file(write(source, tmp_path / "out") / "model.safetensors")
        assert stored[f"{Q_PROJ}.weight_packed"].shape == (16, 1)
        assert f"{Q_PROJ}.weight" not in stored
        assert "lm_head.weight" not in stored
        for name, tensor in source.artifact.tensors.items():
            assert torch.equal(stored[name], tensor)


class TestRefuses:
    @pytest.mark.parametrize("kind", ["timm", "timm-vit", "own"])
    def test_other_than_transformers(self, tmp_path, kind):
        """Networks that transformers cannot build are sent to the other formats."""
        artifact = packed(untrained(kind), tmp_path / "a", lambda m: askewq.quantize(m, 2))
        factory = builders.own("small") if kind == "own" else None
        with pytest.raises(ExportError, match=r"only transformers loads this format.*--to onnx"):
            export(artifact, "compressed-tensors", tmp_path / "out", factory=factory)
        assert not (tmp_path / "out").exists()

    def test_conv2d(self, tmp_path):
        """The patch embedding of a ViT is named; with dense_rest it is written dense."""
        patches = "vit.embeddings.patch_embeddings.projection"

        def with_patches(model):
            askewq.quantize(model, 2, grid="integer")
            put_on_grid(model, patches, 4)

        source = source_of("vit", tmp_path, with_patches)
        first, last = TARGET.refusals(source, Options())
        assert first.startswith(f"{patches} is a Conv2d")
        assert "--dense-rest" in last
        folder = write(source, tmp_path / "out", dense_rest=True)
        assert_same_logits(source, folder)
        [note] = TARGET.notes(source, Options(dense_rest=True))
        assert note.startswith(f"{patches} is a Conv2d")
        assert "dense in float32" in note
        stored = load_file(folder / "model.safetensors")
        assert stored[f"{patches}.weight"].dtype == torch.float32

    def test_conv1d(self, tmp_path):
        """Transformers' Conv1D layers are named, all of them."""
        source = source_of("gpt2", tmp_path, lambda m: askewq.quantize(m, 2))
        *layers, last = TARGET.refusals(source, Options())
        assert len(layers) == 8
        assert all(" is a Conv1D, and transformers unpacks Linear only." in r for r in layers)
        assert "nothing is left to be packed" in last
        assert TARGET.refusals(source, Options(dense_rest=True)) == [*layers, last]

    def test_an_embedding_and_its_tied_head(self, tmp_path):
        """A quantized embedding is named; its tied head follows it when it is written dense."""
        source = source_of("llama", tmp_path, lambda m: askewq.quantize(m, 2, include=["*"]))
        assert source.artifact.shared == {"lm_head.weight": "model.embed_tokens.weight"}
        assert TARGET.refusals(source, Options()) == [
            "model.embed_tokens is an Embedding, and transformers unpacks Linear only.",
            "--dense-rest writes these as ordinary weights.",
        ]
        assert_same_logits(source, write(source, tmp_path / "out", dense_rest=True))

    def test_a_tied_head_that_rounds_its_input(self, tmp_path):
        """It is written dense with its embedding, where its input could not be rounded."""

        def quantize(model):
            askewq.quantize(model, 2, include=["*"])
            attach_(model, 8, {"lm_head": True})
            model.lm_head.input_scale.fill_(0.1)

        source = source_of("llama", tmp_path, quantize)
        first, _ = TARGET.refusals(source, Options(dense_rest=True))
        assert first.startswith("the input of lm_head is rounded, but the layer cannot be packed")
        shown = builders.command("inspect", tmp_path / "artifact").out
        (line,) = [line for line in shown.splitlines() if line.startswith("model.embed_tokens")]
        assert "8 bits signed" in line

    def test_shared_linear_weights(self, tmp_path):
        """A packed weight cannot belong to two layers: it is named with the other."""

        def shared(model):
            layers = model.model.layers
            layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
            askewq.quantize(model, 2)

        loaded = untrained("llama")
        artifact = packed(loaded, tmp_path / "artifact", shared)
        source = _open(artifact, None)
        first, _ = TARGET.refusals(source, Options())
        assert first.startswith("model.layers.0.mlp.up_proj is shared with model.layers.1.mlp.up")

    def test_half_integers_of_eight_bits(self, tmp_path):
        """They would need nine."""
        quantize = {"grid": "half-integer"}
        source = source_of("bert", tmp_path, lambda m: askewq.quantize(m, 8, **quantize))
        *reasons, last = TARGET.refusals(source, Options())
        assert all(
            "needs 9 bits for its half-integers, and the format holds 8" in r for r in reasons
        )
        assert "nothing is left" in last

    def test_scales_that_cannot_be_halved(self, tmp_path):
        """A scale near the end of float32's range would lose a bit."""

        def tiny(model):
            put_on_grid(model, Q_PROJ, 2, kind="half-integer")
            put_on_grid(model, "model.layers.0.self_attn.k_proj", 2)
            smallest = torch.tensor(1.5e-38).nextafter(torch.tensor(1.0))
            model.get_submodule(Q_PROJ).weight_scale.fill_(smallest)

        source = source_of("llama", tmp_path, tiny)
        assert f"{Q_PROJ} has scales so small" in TARGET.refusals(source, Options())[0]

    @pytest.mark.parametrize("installed", ["0.16.0", "0.17.1", "0.9", "0.17.0a20260601"])
    def test_an_older_library(self, tmp_path, monkeypatch, installed):
        """A version that packs other bits, or otherwise, is named with what to install."""
        source = source_of("bert", tmp_path, lambda m: askewq.quantize(m, 3))
        monkeypatch.setattr(exporter, "version", lambda name: installed)
        [reason] = TARGET.refusals(source, Options())
        assert f"compressed-tensors {installed} is installed" in reason
        assert "0.18" in reason
        assert "askewq[compressed-tensors]" in reason
        monkeypatch.setattr(exporter, "version", lambda name: "1.0.dev1")
        assert TARGET.refusals(source, Options()) == []
