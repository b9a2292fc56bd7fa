"""Layers that keep their codes: the very weights of the dense load, in less memory."""

import copy
import io
import itertools
import pickle
import subprocess
import sys

import builders
import pytest
import torch
from builders import finished
from conftest import GRIDS, grid_name
from torch import nn

import askewq
from askewq import checkpoint
from askewq.errors import FormatError, PlanError
from askewq.grid import fit_scale
from askewq.kinds import channel_dim
from askewq.layers import quantize_layer_, snap_
from askewq.manifest import PackedWeight
from askewq.pack import pack
from askewq.packed import (
    PackedLayer,
    PackedTensor,
    Slot,
    artifact_of,
    attach_,
    load_packed_into,
    seal_,
)

INPUTS = {
    "timm": lambda: {"x": torch.randn(2, 3, 32, 32)},
    "timm-vit": lambda: {"x": torch.randn(2, 3, 32, 32)},
    "bert": lambda: {"input_ids": torch.tensor([[2, 4, 5, 3], [2, 7, 6, 3]])},
    "llama": lambda: {"input_ids": torch.tensor([[2, 4, 5, 6]])},
    "gpt2": lambda: {"input_ids": torch.tensor([[2, 4, 5, 6]])},
    "vit": lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
}
CASTS = (None, torch.bfloat16, torch.float16, torch.float64)


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a model's logits, the inputs cast to the type of its parameters."""
    dtype = next(p for p in model.parameters() if p.is_floating_point()).dtype
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    with torch.no_grad():
        result = model(*inputs.values()) if "x" in inputs else model(**inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


def packed_weights(model: nn.Module) -> list[PackedTensor]:
    """Return the packed weights of a model, each once."""
    return [module for module in model.modules() if isinstance(module, PackedTensor)]


class EveryLayer(nn.Module):
    """One layer of every kind that can be packed, two of which share a weight."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embedding = nn.Embedding(9, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 3, 3)
        self.conv3 = nn.Conv3d(1, 2, 1)
        self.gpt = Conv1D(6, 18)
        self.linear = nn.Linear(6, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.conv1(self.embedding(tokens).transpose(1, 2)).unsqueeze(1)
        x = self.conv3(self.conv2(x).unsqueeze(1)).mean((1, 2, 4))
        x = nn.functional.adaptive_avg_pool1d(x.unsqueeze(1), 18).squeeze(1)
        return self.head(self.linear(self.gpt(x)))


def saved_network(path, grid):
    """Write a network of every kind of layer on a grid; return it, snapped, in plain layers."""
    network = EveryLayer()
    for name, layer in network.named_children():
        if name != "head":
            out = layer.weight.shape[channel_dim(layer)]
            quantize_layer_(layer, grid, torch.rand(out, 1) + 0.1)
    quantize_layer_(network.head, grid, network.embedding.weight_scale)
    snap_(network)
    checkpoint.save(network, path)
    dense = EveryLayer()
    checkpoint.load_into(dense, checkpoint.read(path))
    return dense


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_every_kind_of_layer_on_every_grid(tmp_path, grid):
    """Linear, Conv, Embedding and Conv1D give the dense network's logits to the bit."""
    dense = saved_network(tmp_path / "file", grid)
    model = EveryLayer()
    load_packed_into(model, checkpoint.read(tmp_path / "file"))
    tokens = torch.randint(0, 9, (2, 5))
    assert torch.equal(model(tokens), dense(tokens))
    assert all(isinstance(layer, PackedLayer) for layer in model.children())
    assert model.head.packed is model.embedding.packed
    for name, layer in model.named_children():
        assert torch.equal(layer.weight, dense.get_submodule(name).weight)
        assert not layer.weight.requires_grad


class TestEmbeddings:
    @pytest.mark.parametrize("dim", [0, 1])
    def test_channels_of_either_dimension(self, dim):
        """Rows are unpacked one by one where each has its scale, else with all others."""
        table = nn.Embedding(6, 6)
        first = table.weight.detach().movedim(dim, 0).contiguous()
        grid = GRIDS[0]
        scale = fit_scale(first, grid, "channel")
        codes = pack(grid.codes(first, scale).reshape(-1), grid.bits)
        weight = PackedWeight(grid, (6, 6), codes, scale, dim)
        attach_(Slot(table, "weight"), PackedTensor(weight))
        seal_(table)
        indices = torch.tensor([[0, 3], [5, 1]])
        expected = nn.functional.embedding(indices, weight.dense())
        assert torch.equal(table(indices), expected)
        assert torch.equal(table(input=indices), expected)

    @pytest.mark.parametrize("columns", [1, 5, 7, 8, 40])
    @pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
    def test_rows_are_the_dense_ones(self, grid, columns):
        """Rows that begin anywhere in a byte, in any shape and order, have the dense bits."""
        groups = ("channel", "tensor", *([4] if columns % 4 == 0 else []))
        for group_size, dtype in itertools.product(groups, CASTS):
            table = nn.Embedding(11, columns)
            quantize_layer_(table, grid, fit_scale(table.weight, grid, group_size))
            content = checkpoint.artifact_of(table)
            dense, model = nn.Embedding(11, columns), nn.Embedding(11, columns)
            checkpoint.load_into(dense, content)
            load_packed_into(model, content)
            dense.to(dtype), model.to(dtype)
            for ids in (torch.randint(0, 11, (2, 7)), torch.arange(11), torch.tensor(10)):
                assert torch.equal(model(ids), dense(ids))
                assert torch.equal(model(ids.int()), dense(ids))
            assert model(torch.zeros(0, dtype=torch.int64)).shape == (0, columns)

    def test_the_whole_table_is_never_unpacked(self, monkeypatch):
        """A look-up takes memory for its rows alone; a subclass with its own forward takes all."""

        class Scaled(nn.Embedding):
            def forward(self, ids):
                return 2 * super().forward(ids)

        unpacked, whole = [], PackedTensor.forward

        def seen(weight):
            unpacked.append(weight)
            return whole(weight)

        for kind in (nn.Embedding, Scaled):
            table = kind(11, 8)
            quantize_layer_(table, GRIDS[2], torch.ones(11, 1))
            content = checkpoint.artifact_of(table)
            dense, model = kind(11, 8), kind(11, 8)
            checkpoint.load_into(dense, content)
            load_packed_into(model, content)
            with monkeypatch.context() as patch:
                patch.setattr(PackedTensor, "forward", seen)
                assert torch.equal(model(torch.tensor([3])), dense(torch.tensor([3])))
        assert len(unpacked) == 1

    @pytest.mark.parametrize("index", [-1, 11])
    def test_an_index_that_is_no_row(self, index):
        """It raises as the dense embedding does."""
        table = nn.Embedding(11, 8)
        quantize_layer_(table, GRIDS[2], torch.ones(1, 1))
        model = nn.Embedding(11, 8)
        load_packed_into(model, checkpoint.artifact_of(table))
        with pytest.raises(IndexError):
            model(torch.tensor([index]))


@pytest.mark.parametrize("dtype", CASTS, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_logits_equal_the_dense_load(kind, dtype):
    """Every kind of artifact gives the same logits packed and dense, in every type."""
    folder, inputs = finished(kind)[0], INPUTS[kind]()
    dense, model = (askewq.load(folder, packed=p, dtype=dtype) for p in (False, True))
    assert packed_weights(model)
    assert not model.training
    assert torch.equal(logits(model, inputs), logits(dense, inputs))


def test_own_modules_are_filled_in_place():
    """A network of the user's own keeps its identity; tied layers hold one weight."""
    network = builders.own_network("small")
    assert askewq.load(finished("own")[0], model=network, packed=True) is network
    assert packed_weights(network)


@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("when", ["before", "after", "and back"])
def test_channels_last(tmp_path, when, size):
    """A weight that is unpacked has the memory format of the dense one: so have its sums."""

    def net():
        return nn.Sequential(*(nn.Conv2d(16, 16, size) for _ in range(3)), nn.AdaptiveAvgPool2d(1))

    network = net()
    askewq.quantize(network, 2)
    snap_(network)
    askewq.save(network, tmp_path)
    x = torch.randn(2, 16, 16, 16)
    found = []
    for packed in (False, True):
        fresh = net()
        if when == "before":
            fresh = fresh.to(memory_format=torch.channels_last)
        model = askewq.load(tmp_path, model=fresh, packed=packed)
        if when != "before":
            model = model.to(memory_format=torch.channels_last)
        if when == "and back":
            model = model.to(memory_format=torch.contiguous_format)
        with torch.no_grad():
            found.append((model[1].weight.stride(), model(x)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


class TestCasts:
    def test_a_cast_never_touches_the_scale(self):
        """Through bfloat16 and back the weight is what it was; the scale stays float32."""
        model = askewq.load(finished("timm")[0], packed=True)
        before = [w() for w in packed_weights(model)]
        model.to(torch.bfloat16)
        for weight, dense in zip(packed_weights(model), before, strict=True):
            assert weight.scale.dtype == torch.float32
            assert weight.codes.dtype == torch.uint8
            assert torch.equal(weight(), dense.to(torch.bfloat16))
        model.to("cpu").float()
        assert all(torch.equal(w(), b) for w, b in zip(packed_weights(model), before, strict=True))

    def test_moves_keep_the_type(self):
        """A move without a type leaves the type; a shared weight is still one."""
        model = EveryLayer()
        grid = GRIDS[2]
        for layer in (model.embedding, model.head):
            quantize_layer_(layer, grid, torch.ones(9, 1))
        contents = checkpoint.artifact_of(model)
        model = EveryLayer()
        load_packed_into(model, contents)
        model.half().to("meta")
        assert model.head.weight.device.type == "meta"
        assert model.head.weight.dtype == torch.float16
        assert model.head.packed is model.embedding.packed


def pickled(model):
    """Return what pickle makes of a model, by its own protocol."""
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model):
    """Return what torch makes of one, by an older protocol."""
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


class TestState:
    def test_state_dict_holds_the_file_s_names(self):
        """The state dict is what the file stores, and loads strictly into another packed model."""
        folder, _ = finished("timm")
        first, second = (askewq.load(folder, packed=True) for _ in "ab")
        stored, _ = checkpoint.serialize(checkpoint.read(folder / "model.safetensors"))
        state = first.state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
        second.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()})
        second.load_state_dict(state)
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(logits(first, {"x": x}), logits(second, {"x": x}))

    @pytest.mark.parametrize("twin", [copy.deepcopy, pickled, saved_and_loaded])
    def test_copies(self, twin):
        """A deep copy and a pickled model are packed and equal; their tensors are their own."""
        model = askewq.load(finished("llama")[0], packed=True)
        other, inputs = twin(model), INPUTS["llama"]()
        assert torch.equal(logits(model, inputs), logits(other, inputs))
        for one, two in zip(packed_weights(model), packed_weights(other), strict=True):
            assert one.codes.data_ptr() != two.codes.data_ptr()

    @pytest.mark.parametrize("kind", ["timm", "bert", "llama", "gpt2", "vit"])
    def test_the_content_is_the_file_s(self, kind):
        """What a packed model is written as again is the file that it came from."""
        folder, _ = finished(kind)
        stored = checkpoint.read(folder / "model.safetensors")
        tensors, header = checkpoint.serialize(stored)
        again, same_header = checkpoint.serialize(artifact_of(askewq.load(folder, packed=True)))
        assert header == same_header
        assert tensors.keys() == again.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())

    def test_shared_weights_are_written_once(self, tmp_path):
        """A packed weight of two layers is in the content once, under its first name."""
        saved_network(tmp_path / "file", GRIDS[2])
        model = EveryLayer()
        load_packed_into(model, checkpoint.read(tmp_path / "file"))
        content = artifact_of(model)
        assert content.shared == {"head.weight": "embedding.weight"}
        assert "head.weight" not in content.weights


class TestRefusals:
    def test_a_layer_of_two_names(self, tmp_path):
        """A module that the network holds twice is packed once, under both names."""

        def build():
            shared = nn.Linear(4, 4)
            return nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})

        network = build()
        quantize_layer_(network["first"], GRIDS[2], torch.rand(4, 1) + 0.1)
        snap_(network)
        checkpoint.save(network, tmp_path / "file")
        model = build()
        load_packed_into(model, checkpoint.read(tmp_path / "file"))
        assert model["first"] is model["second"][0]
        assert torch.equal(model["first"].weight, network["first"].weight)

    def test_assigning_a_weight(self):
        """A packed weight cannot be replaced unnoticed."""
        model = askewq.load(finished("timm")[0], packed=True)
        layer = next(m for m in model.modules() if isinstance(m, PackedLayer))
        before = layer.weight
        for value in (nn.Parameter(torch.zeros_like(before)), torch.zeros_like(before)):
            with pytest.raises(AttributeError, match="cannot be assigned"):
                layer.weight = value
        assert torch.equal(layer.weight, before)

    def test_another_network(self):
        """A network of other shapes is refused before it is touched."""
        network = builders.own_network("ten_classes")
        before = copy.deepcopy(network.state_dict())
        with pytest.raises(FormatError, match="'8"):
            askewq.load(finished("own")[0], model=network, packed=True)
        assert all(torch.equal(network.state_dict()[k], v) for k, v in before.items())

    def test_a_packed_parameter_of_another_name(self):
        """A manifest may name a parameter that no layer calls weight; that stays a refusal."""

        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(torch.zeros(2, 2))

        grid = GRIDS[2]
        codes = checkpoint.pack(torch.zeros(2, 2, dtype=torch.uint8), grid.bits)
        weight = PackedWeight(grid, (2, 2), codes, torch.ones(2, 1))
        with pytest.raises(FormatError, match="'table' of Odd cannot stay packed"):
            load_packed_into(Odd(), checkpoint.Artifact({"table": weight}, {}, {}))

    def test_quantizing_again(self):
        """A packed model has nothing to train, and the plan says so."""
        with pytest.raises(PlanError, match=r"weights packed.*model.dequantize\(\) first"):
            askewq.quantize(askewq.load(finished("bert")[0], packed=True), 2)


@pytest.mark.parametrize("kind", ["timm", "gpt2"])
def test_memory_is_that_of_the_file(kind):
    """Parameters and buffers of a packed model take what the file stores, tied weights once."""
    folder, _ = finished(kind)
    model = askewq.load(folder, packed=True)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    stored, _ = checkpoint.serialize(checkpoint.read(folder / "model.safetensors"))
    assert held == sum(tensor.nbytes for tensor in stored.values())


def test_printing_names_the_bits():
    """The printed model shows the packed weights with their shapes and bits."""
    assert "bits=2" in repr(askewq.load(finished("bert")[0], packed=True))


def test_tracing_first_spoils_no_later_load(tmp_path):
    """Nothing that was made while a network is traced, and so has no content, is kept."""
    program = f"""
import sys, torch, askewq
from torch._subclasses.fake_tensor import FakeTensorMode

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(24, 24) for _ in range(3)))

for bits in (1, "ternary", 2, 4, 8):
    first = network()
    askewq.quantize(first, bits)
    askewq.snap_(first)
    askewq.save(first, f"{tmp_path}/{{bits}}")
    packed = askewq.load(f"{tmp_path}/{{bits}}", model=network(), packed=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        packed(torch.ones(2, 24))
    dense = askewq.load(f"{tmp_path}/{{bits}}", model=network())
    x = torch.randn(2, 24)
    with torch.no_grad():
        assert torch.equal(dense[1].weight, first[1].weight)
        assert torch.equal(packed(x), dense(x))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
