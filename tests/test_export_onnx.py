"""The ONNX export: onnxruntime computes the artifact's logits from packed weights, to the bit."""

import copy
import functools
import inspect
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import builders
import onnx
import onnxruntime
import pytest
import torch
from conftest import GRIDS, grid_name
from onnx import TensorProto
from torch import nn

import askewq
from askewq import artifact, checkpoint, export_onnx
from askewq.checkpoint import Artifact
from askewq.errors import ExportError
from askewq.export_onnx import PREFIX, TARGET, example, fill, graph
from askewq.grid import channels_first, make_grid, scale_shape
from askewq.hf_models import load_processor, load_tokenizer
from askewq.kinds import channel_dim
from askewq.manifest import PackedWeight
from askewq.onnx_weights import Storage, dequantize, storage
from askewq.pack import pack, packed_size
from askewq.preprocessing import ImagePreprocessing
from askewq.spec import LoadedModel, ModelSpec
from askewq.target import ExportSource, Options
from askewq.wrap import plan

KINDS = ["efficientnet", "vit", "bert", "llama", "gpt2"]
TESTED = [grid for grid in GRIDS if grid.bits in (1, "ternary", 2, 3, 4, 8)]
TYPES = {TensorProto.INT2: 2, TensorProto.INT4: 4, TensorProto.INT8: 8}


@functools.cache
def plain(kind: str) -> LoadedModel:
    """Return a tiny random network as it is loaded; not to be changed."""
    import timm
    import transformers

    torch.manual_seed(5)
    if kind in ("efficientnet", "vit"):
        size = {"img_size": 32} if kind == "vit" else {}
        model = timm.create_model(f"test_{kind}", num_classes=3, **size)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return loaded(model, "timm", "image-classification", ImagePreprocessing(size=(32, 32)))
    if kind == "bert":
        model = transformers.BertForSequenceClassification.from_pretrained(builders.bert())
        tokenizer = load_tokenizer(str(builders.bert()), False, 32)
        return loaded(model, "transformers", "text-classification", tokenizer)
    tokenizer = load_tokenizer(str(builders.llama()), False, 32)
    if kind == "llama":
        model = transformers.LlamaForCausalLM.from_pretrained(builders.llama())
    else:
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        config = transformers.GPT2Config(vocab_size=14, bos_token_id=2, eos_token_id=3, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    return loaded(model, "transformers", "causal-lm", tokenizer)


def loaded(model, source, task, preprocessing) -> LoadedModel:
    """Return a network with what goes with it."""
    labels = () if task == "causal-lm" else ("a", "b", "c")
    return LoadedModel(model.eval(), ModelSpec(source, "tiny", task, labels, {}), preprocessing)


def source(full: LoadedModel, bits, kind="integer", group="channel", names=()) -> ExportSource:
    """Return a source with weights of a network on a grid, at scales that reach the largest."""
    model, weights, grid = copy.deepcopy(full.model), {}, make_grid(bits, kind)
    for name in names or quantizable(model):
        weight = model.get_parameter(name)
        dim = channel_dim(model.get_submodule(name.removesuffix(".weight")))
        first = channels_first(weight.detach(), dim)
        fitting = not isinstance(group, int) or first[0].numel() % group == 0
        shape = scale_shape(first.shape, group if fitting else "channel")
        rows = first.reshape(shape[0] * shape[1], -1)
        scale = (rows.abs().amax(1) / -grid.first).reshape(shape)
        codes = pack(grid.codes(first, scale), bits)
        weights[name] = PackedWeight(grid, tuple(weight.shape), codes, scale, dim)
        weight.data.copy_(weights[name].dense())
    return ExportSource(
        None, LoadedModel(model, full.spec, full.preprocessing), Artifact(weights, {}, {})
    )


def quantizable(model) -> list[str]:
    """Return the weights that askewq would quantize."""
    return [f"{layer.names[0]}.weight" for layer in plan(model, 2).quantized]


@functools.cache
def skeleton(kind: str):
    """Return the graph of a network without its quantized weights, and what it was made of."""
    made = source(plain(kind), 2)
    return graph(made.loaded, made.artifact, 25), made


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    """Return three samples, texts padded on either side; other sizes than the graph was made of."""
    if kind in ("efficientnet", "vit", "own"):
        return {"pixel_values": torch.randn(3, 3, 32, 32)}
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    mask[2, :2] = 0
    tensors = {"input_ids": torch.randint(4, 14, (3, 9)), "attention_mask": mask}
    if kind == "bert":
        tensors["token_type_ids"] = torch.randint(0, 2, (3, 9))
    return tensors


def logits(made: ExportSource, inputs) -> torch.Tensor:
    """Return the artifact's own logits."""
    with torch.no_grad():
        if made.loaded.spec.source != "transformers":
            return made.loaded.model(*inputs.values())
        return made.loaded.model(**inputs).logits


def difference(got, expected, inputs) -> float:
    """Return the largest difference at tokens that count, relative to the largest logit."""
    if expected.dim() == 3:
        real = inputs["attention_mask"].bool()
        got, expected = got[real], expected[real]
    return float((got - expected).abs().max() / expected.abs().max())


def computed_weights(model, names) -> dict[str, torch.Tensor]:
    """Return the weights that onnxruntime computes from a file; a matrix may be transposed."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    used = {name for node in model.graph.node for name in node.input}
    outputs = [PREFIX + name for name in names if PREFIX + name in used]
    del shown.graph.output[:]
    values = [onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    shown.graph.output.extend(values)
    del shown.graph.input[:]
    needed = set(outputs)
    nodes = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= set(node.input)
    del shown.graph.node[:]
    shown.graph.node.extend(nodes)
    session = onnxruntime.InferenceSession(shown.SerializeToString())
    found = zip(outputs, session.run(None, {}), strict=True)
    return {name.removeprefix(PREFIX): torch.from_numpy(value) for name, value in found}


class TestLogits:
    @pytest.mark.parametrize("grid", TESTED, ids=grid_name)
    @pytest.mark.parametrize("kind", KINDS)
    def test_are_the_artifacts(self, kind, grid, tmp_path):
        """Onnxruntime computes every weight to the bit, and the logits, at every granularity."""
        half = "half-integer" if grid.first % 1 else "integer"
        for group in ("channel", "tensor", 16 if kind == "vit" else 8):
            made = source(plain(kind), grid.bits, half, group)
            model = fill(skeleton(kind)[0], made.artifact)
            onnx.checker.check_model(model)
            weights = computed_weights(model, made.artifact.weights)
            assert weights.keys() == made.artifact.weights.keys()
            for name, weight in weights.items():
                dense = made.artifact.weights[name].dense()
                assert torch.equal(weight, dense) or torch.equal(weight, dense.T), name
            onnx.save_model(model, str(tmp_path / "model.onnx"))
            inputs = inputs_of(kind)
            got = TARGET.read_back(str(tmp_path), inputs)
            expected = logits(made, inputs)
            assert got.shape == expected.shape
            assert difference(got, expected, inputs) < 1e-5  # ten times below the bound

    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_are_packed(self, kind):
        """A weight takes the bits of its type, and nothing of it is stored a second time."""
        for bits, width in (("ternary", 2), (3, 4), (6, 8)):
            made = source(plain(kind), bits)
            model = fill(skeleton(kind)[0], made.artifact)
            held = {t.name: t for t in model.graph.initializer}
            for name, weight in made.artifact.weights.items():
                codes = held[f"{PREFIX}{name}.codes"]
                assert TYPES[codes.data_type] == width
                assert len(codes.raw_data) == packed_size(math.prod(weight.shape), width)
                assert len(held[f"{PREFIX}{name}.scale"].raw_data) == 4 * weight.scale.numel()
            stored = sum(len(t.raw_data) for t in held.values() if ".codes" not in t.name)
            rest = sum(t.numel() * t.element_size() for t in made.loaded.model.parameters())
            rest -= sum(4 * math.prod(w.shape) for w in made.artifact.weights.values())
            scales = sum(4 * w.scale.numel() for w in made.artifact.weights.values())
            buffers = sum(4 * b.numel() for b in made.loaded.model.buffers())
            assert stored <= rest + scales + buffers + 2**12

    @pytest.mark.parametrize("kind", KINDS)
    def test_runtimes_find_the_pattern(self, kind):
        """Every layer with a quantized integer weight has DequantizeLinear right in front of it."""
        made = source(plain(kind), 4)
        model = fill(skeleton(kind)[0], made.artifact)
        producers = {node.output[0]: node.op_type for node in model.graph.node}
        users = [
            (node.op_type, producers[name])
            for node in model.graph.node
            for name in node.input
            if name.removeprefix(PREFIX) in made.artifact.weights
        ]
        assert len(users) == len(made.artifact.weights)
        assert {user for user, _ in users} <= {"Conv", "Gemm", "MatMul"}
        assert {producer for _, producer in users} == {"DequantizeLinear"}


class TestEmbeddings:
    @pytest.mark.parametrize(
        ("kind", "grid"),
        [("gpt2", grid) for grid in TESTED] + [("llama", grid) for grid in TESTED if grid.size < 4],
        ids=lambda one: one if isinstance(one, str) else grid_name(one),
    )
    def test_a_tied_head_uses_the_same_codes(self, kind, grid, tmp_path):
        """Embeddings named by the user are packed, the one that is the head, too, once."""
        full = builders.untrained(kind)
        half = "half-integer" if grid.first % 1 else "integer"
        askewq.quantize(full.model, grid.bits, grid=half, include=["*"])
        askewq.snap_(full.model)
        content = checkpoint.artifact_of(full.model)
        tied = full.model.get_input_embeddings()
        assert len(content.shared) == 1
        made = ExportSource(None, loaded_again(full, content), content)
        model = fill(graph(made.loaded, content, 25), content)
        onnx.checker.check_model(model)
        large = [t for t in model.graph.initializer if math.prod(t.dims) == tied.weight.numel()]
        assert len(large) == 1
        onnx.save_model(model, str(tmp_path / "model.onnx"))
        inputs = inputs_of(kind)
        got = TARGET.read_back(str(tmp_path), inputs)
        assert difference(got, logits(made, inputs), inputs) < 1e-5


def loaded_again(full: LoadedModel, content: Artifact) -> LoadedModel:
    """Return the plain network that an artifact is loaded into."""
    plain_one = builders.untrained(Path(full.spec.name).name)
    checkpoint.load_into(plain_one.model, content)
    return LoadedModel(plain_one.model.eval(), plain_one.spec, plain_one.preprocessing)


class TestStorage:
    @pytest.mark.parametrize(
        ("bits", "kind", "width", "form"),
        [
            (1, "integer", 2, "levels"),
            ("ternary", "integer", 2, "levels"),
            (2, "integer", 2, "levels"),
            (3, "integer", 4, "levels"),
            (4, "integer", 4, "levels"),
            (5, "integer", 8, "levels"),
            (8, "integer", 8, "levels"),
            (2, "half-integer", 2, "units"),
            (3, "half-integer", 4, "doubled"),
            (4, "half-integer", 4, "units"),
            (5, "half-integer", 8, "doubled"),
            (7, "half-integer", 8, "doubled"),
            (8, "half-integer", 8, "units"),
        ],
    )
    def test_is_the_smallest_that_is_exact(self, bits, kind, width, form):
        """Each grid goes into the narrowest type; one node where that is enough."""
        grid = make_grid(bits, kind)
        weight = PackedWeight(grid, (1, 1), pack(torch.zeros(1, 1), bits), torch.ones(1, 1))
        assert storage(weight) == Storage(width, form)

    def test_a_scale_that_cannot_be_halved(self):
        """Half of the smallest odd numbers is no float32: such a weight is scaled at the end."""
        scale = torch.full((1, 1), torch.finfo(torch.float32).tiny * (1 + 2**-23))
        weight = PackedWeight(make_grid(3, "half-integer"), (1, 1), torch.zeros(1), scale)
        assert storage(weight) == Storage(4, "units")


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((4, 5, 3, 6), 0), ((4, 5, 3, 6), 1), ((6, 5, 4), 2), ((6, 4), 1)]
)
@pytest.mark.parametrize(("bits", "kind"), [(1, "integer"), (3, "integer"), (2, "half-integer")])
def test_weights_of_any_shape(shape, channel_dim, groups, bits, kind):
    """Whichever dimension counts output channels, the nodes give the weight, to the bit."""
    grid, out = make_grid(bits, kind), shape[channel_dim]
    codes = pack(torch.randint(0, grid.size, (math.prod(shape),), dtype=torch.uint8), bits)
    weight = PackedWeight(grid, shape, codes, torch.rand(out, groups).half().float(), channel_dim)
    nodes, tensors = dequantize("w", weight, storage(weight), transposed=False)
    result = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, shape)
    made = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [], [result], tensors),
        opset_imports=[onnx.helper.make_opsetid("", 25)],
        ir_version=13,
    )
    session = onnxruntime.InferenceSession(made.SerializeToString())
    assert torch.equal(torch.from_numpy(session.run(["w"], {})[0]), weight.dense())


def own(factory: str, bits=2, kind="integer", names=()) -> ExportSource:
    """Return a source of one of the user's own networks."""
    preprocessing = ImagePreprocessing(size=(32, 32))
    full = loaded(builders.own_network(factory), "module", "image-classification", preprocessing)
    return source(full, bits, kind, names=names)


def in_a_new_process(folder, inputs) -> torch.Tensor:
    """Return what read_back's source gives where askewq cannot be imported."""
    torch.save(inputs, folder / "inputs.pt")
    program = f"""
import sys
sys.modules["askewq"] = None
{inspect.getsource(TARGET.read_back)}
import torch
torch.save(read_back({str(folder)!r}, torch.load({str(folder / "inputs.pt")!r})),
           {str(folder / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt")


class Tokens(nn.Module):
    """A layer on tokens, whose weight onnxruntime multiplies by in one operation with its codes."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(16, features)

    def forward(self, pixel_values):
        return self.layer(pixel_values.flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.parametrize("bits", [1, "ternary", 2])
@pytest.mark.parametrize("features", [2, 3, 12, 30, 33])
def test_any_number_of_output_features(bits, features, tmp_path):
    """Onnxruntime is wrong with 2-bit integers where they are no multiple of four."""
    torch.manual_seed(0)
    preprocessing = ImagePreprocessing(size=(4, 4), mean=(0.0,) * 16, std=(1.0,) * 16)
    made = source(
        loaded(Tokens(features), "module", "image-classification", preprocessing),
        bits,
        names=["layer.weight"],
    )
    TARGET.write(made, Options(), tmp_path)
    given = {"pixel_values": torch.randn(3, 16, 4, 4)}
    with torch.no_grad():
        expected = made.loaded.model(**given)
    torch.testing.assert_close(TARGET.read_back(str(tmp_path), given), expected)
    kept = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert TensorProto.INT2 in {tensor.data_type for tensor in kept}


class TestWrite:
    def test_a_folder_that_serves(self, tmp_path):
        """A finished run becomes a network with labels; a new process computes its logits."""
        folder, _ = builders.finished("own")
        full = artifact.load_artifact(folder, factory=builders.own("small"))
        unsized = ExportSource(folder, full, Artifact({}, {}, {}))
        assert "say which with --image-size" in TARGET.refusals(unsized, Options())[0]
        full.preprocessing = replace(full.preprocessing, size=(32, 28))
        made = ExportSource(folder, full, checkpoint.read(folder / "model.safetensors"))
        out = tmp_path / "out"
        out.mkdir()
        assert TARGET.refusals(made, Options()) == []
        TARGET.write(made, Options(), out)
        assert builders.files(out) == {"model.onnx", "preprocessing.json"}
        model = onnx.load(out / "model.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert (model.ir_version, model.opset_import[0].version) == (13, 25)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(properties["labels"]) == ["red", "green", "blue"]
        description = json.loads((out / "preprocessing.json").read_text())
        assert description["labels"] == ["red", "green", "blue"]
        assert description["mean"] == list(ImagePreprocessing().mean)
        assert str(builders.ROOT) not in str(model)  # no stack traces
        axes = model.graph.input[0].type.tensor_type.shape.dim
        assert [axis.dim_param or axis.dim_value for axis in axes] == ["batch", 3, 32, 28]
        inputs = {"pixel_values": torch.randn(3, 3, 32, 28)}
        expected = logits(made, inputs)
        assert difference(in_a_new_process(out, inputs), expected, inputs) < TARGET.bound(Options())

    def test_texts(self, tmp_path):
        """A text model takes any batch and length, and comes with its tokenizer; opset 21."""
        made = source(plain("bert"), 4)
        out = tmp_path / "out"
        out.mkdir()
        TARGET.write(made, Options(), out)
        assert {"model.onnx", "preprocessing.json", "tokenizer.json"} <= builders.files(out)
        model = onnx.load(out / "model.onnx")
        assert (model.ir_version, model.opset_import[0].version) == (10, 21)
        axes = {
            value.name: [axis.dim_param for axis in value.type.tensor_type.shape.dim]
            for value in model.graph.input
        }
        names = ("input_ids", "attention_mask", "token_type_ids")
        assert axes == {name: ["batch", "sequence"] for name in names}
        for shape in ((1, 1), (5, 32)):
            inputs = {name: torch.ones(shape, dtype=torch.int64) for name in names}
            expected = logits(made, inputs)
            assert difference(TARGET.read_back(str(out), inputs), expected, inputs) < 1e-5

    def test_tied_weights_are_stored_once(self, tmp_path):
        """Layers that share a weight share its codes."""
        made = own("tied", names=("one.weight",))
        made.artifact.shared["two.weight"] = "one.weight"
        model = fill(graph(made.loaded, made.artifact, 25), made.artifact)
        codes = [t.name for t in model.graph.initializer if t.name.endswith(".codes")]
        assert codes == [f"{PREFIX}one.weight.codes"]
        onnx.save_model(model, str(tmp_path / "model.onnx"))
        inputs = inputs_of("own")
        got = TARGET.read_back(str(tmp_path), inputs)
        assert difference(got, logits(made, inputs), inputs) < 1e-5

    def test_two_files_where_one_is_too_large(self, tmp_path, monkeypatch):
        """Beyond what protobuf holds the weights lie in a second file, and are found there."""
        made = own("tied", 8, names=("stem.weight",))
        monkeypatch.setattr(export_onnx, "ONE_FILE", 100)
        TARGET.write(made, Options(), tmp_path)
        assert (tmp_path / "model.onnx.data").stat().st_size > 1000
        inputs = inputs_of("own")
        got = TARGET.read_back(str(tmp_path), inputs)
        assert difference(got, logits(made, inputs), inputs) < 1e-5

    @pytest.mark.filterwarnings("ignore")  # torch warns of what it cannot trace
    def test_a_network_that_cannot_be_traced(self, tmp_path):
        """A forward that depends on values is refused with the exporter's reason."""

        class Moody(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x):
                x = x.mean((2, 3))
                return self.layer(x) if x.sum().item() > 0 else x

        preprocessing = ImagePreprocessing(size=(8, 8))
        full = loaded(Moody(), "module", "image-classification", preprocessing)
        made = source(full, 2, names=("layer.weight",))
        with pytest.raises(ExportError, match=r"torch\.onnx\.export cannot export 'tiny'"):
            TARGET.write(made, Options(), tmp_path)

    def test_a_weight_that_the_graph_does_not_use(self, tmp_path):
        """All quantized weights that are not in the graph are named, none is written densely."""
        made = own("small")
        weights = {
            name: PackedWeight(weight.grid, weight.shape, weight.codes, 2 * weight.scale)
            for name, weight in made.artifact.weights.items()
        }
        other = ExportSource(tmp_path, made.loaded, Artifact(weights, {}, {}))
        assert len(weights) > 1
        with pytest.raises(ExportError, match=f"does not hold {', '.join(weights)} as in"):
            TARGET.write(other, Options(), tmp_path)

    def test_the_model_is_left_as_it_was(self):
        """Exporting changes neither the weights nor the settings of the network."""
        made = skeleton("llama")[1]
        before, after = plain("llama").model.state_dict(), made.loaded.model.state_dict()
        for name, weight in made.artifact.weights.items():
            before[name] = weight.dense()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert made.loaded.model.config.use_cache
        assert not made.loaded.model.training


def test_example_of_an_image_processor():
    """The example of a Hugging Face image model has the size that its processor makes."""
    preprocessing = load_processor(str(builders.vit()), False)
    full = loaded(nn.Identity(), "transformers", "image-classification", preprocessing)
    assert {k: v.shape for k, v in example(full).items()} == {"pixel_values": (2, 3, 16, 16)}


class TestNotes:
    @pytest.mark.parametrize(
        ("bits", "kind", "expected"),
        [
            (1, "integer", "1 bit: 2 weights in INT2"),
            ("ternary", "integer", "ternary: 2 weights in INT2"),
            (3, "half-integer", "in INT4 as twice the levels at half the scale"),
            (4, "half-integer", "in INT4 less one half, followed by Add and Mul with the scale"),
        ],
    )
    def test_say_what_is_written(self, bits, kind, expected):
        """The types are named, and what onnxruntime must be told."""
        notes = TARGET.notes(own("small", bits, kind), Options())
        assert expected in notes[0]
        assert "session.qdq_matmulnbits_accuracy_level" in notes[-1]
