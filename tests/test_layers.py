"""Quantization-aware layers: the same layer to everything but the optimizer and the snap."""

import copy
import io
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from conftest import GRIDS, grid_name
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

import askewq
from askewq.errors import DivergenceError, ModelError
from askewq.grid import channels_first, fit_scale, make_grid
from askewq.kinds import channel_dim
from askewq.layers import (
    QuantizedLayer,
    follow_,
    prepared,
    quantize_layer_,
    quantized_layers,
    snap_,
    snapped,
)
from askewq.methods import RIVALS


class DoublingLinear(nn.Linear):
    """A model's own subclass with a forward and an attribute of its own."""

    factor = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


LAYERS = {
    "Linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "grouped Conv2d": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), (2, 4, 9, 9)),
    "reflecting Conv2d": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
        (1, 3, 6, 6),
    ),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "timm's Conv2dSame": (lambda: Conv2dSame(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "own subclass": (lambda: DoublingLinear(6, 4), (3, 6)),
    "Conv1D": (lambda: Conv1D(4, 6), (3, 6)),
}
every_layer = pytest.mark.parametrize(("build", "inputs"), LAYERS.values(), ids=LAYERS.keys())


def quantized(layer: nn.Module, bits: int | str = 2) -> nn.Module:
    """Return the layer made quantization-aware, with a fitted scale."""
    grid = make_grid(bits)
    weight = channels_first(layer.weight, channel_dim(layer))
    quantize_layer_(layer, grid, fit_scale(weight, grid))
    return layer


@every_layer
def test_forward_and_gradients_stay_the_same_bits(build, inputs):
    """Outputs and gradients before and after the change of class are bit-identical."""
    layer, x = build(), torch.randn(inputs)
    layer(x).square().sum().backward()
    expected, gradient = layer(x).detach(), layer.weight.grad.clone()
    layer.zero_grad()
    layer = quantized(layer)
    layer(x).square().sum().backward()
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight.grad, gradient)


@every_layer
def test_the_layer_stays_what_it_was(build, inputs):
    """Same object, same class lineage, same Parameter; hooks still run and repr is still shown."""
    layer = build()
    kind, weight, settings = type(layer), layer.weight, layer.extra_repr()
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(True))
    assert quantized(layer) is layer
    assert isinstance(layer, kind)
    assert isinstance(layer, QuantizedLayer)
    assert type(layer).__name__ == f"Quantized{kind.__name__}"
    assert layer.weight is weight
    assert layer.extra_repr() == settings
    layer(torch.randn(inputs))
    assert seen == [True]


@every_layer
def test_state_dict_keeps_its_keys(build, inputs):
    """The state dict has the keys and values of before, and weight_scale."""
    layer = build()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    after = quantized(layer).state_dict()
    assert list(after) == [*before, "weight_scale"]
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ({"bits": 3}, r"\[3, -4\.0, 1\.0\]"),
        ({"bits": 2, "grid": "integer"}, r"\[2, -2\.0, 1\.0\]"),
        ({"bits": "ternary"}, r"\['ternary', -1\.0, 1\.0\]"),
    ],
)
def test_a_state_of_other_levels_is_refused(settings, levels):
    """The scale has the same shape for any: the weights would be on no level, without a word."""

    def network(**given):
        model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16))
        askewq.quantize(model, include=["*"], **given)
        return model

    file = io.BytesIO()
    torch.save(network(bits=2).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    network(bits=2).load_state_dict(state)
    with pytest.raises(RuntimeError, match=rf"'0' was trained.*\[2, -1\.5, 1\.0\].*{levels}"):
        network(**settings).load_state_dict(state, strict=False)
    plain = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16))
    network(**settings).load_state_dict(plain.state_dict(), strict=False)  # says nothing of levels
    plain.load_state_dict(state, strict=False)


@pytest.mark.parametrize("change", [prune.random_unstructured, parametrizations.weight_norm])
def test_what_takes_the_weight_away_is_told(change):
    """The ways of torch to make a weight out of others go before quantizing."""
    model = nn.Sequential(nn.Linear(4, 4))
    askewq.quantize(model, 2, include=["0"])
    amount = {"amount": 0.5} if change is prune.random_unstructured else {}
    with pytest.raises(ModelError, match=r"prune and parametrize before askewq\.quantize"):
        change(model[0], "weight", **amount)


def test_a_layer_of_no_kind_is_refused():
    """What has no known output channels cannot be quantized by hand either."""
    with pytest.raises(ModelError, match=r"Bilinear is no layer .* Linear, Conv1d, .* Conv1D"):
        quantize_layer_(nn.Bilinear(2, 2, 2), make_grid(2), torch.ones(2, 1))


def test_embeddings_keep_their_forward_and_gradients():
    """An embedding on a grid reads the rows of its Parameter, to the bit, and gives them theirs."""
    plain = nn.Embedding(7, 4, padding_idx=0)
    layer, ids = copy.deepcopy(plain), torch.tensor([[0, 3, 3], [6, 1, 0]])
    quantized(layer)
    for table in (plain, layer):
        table(ids).square().sum().backward()
    assert torch.equal(layer(ids), plain(ids))
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    layer.snap_()
    assert torch.equal(layer(ids), layer.grid.snap(plain.weight, layer.weight_scale)[ids])


def test_layers_of_one_class_share_one_class():
    """Two quantized Linear layers are of the same class, and another class is not touched."""
    assert type(quantized(nn.Linear(2, 2))) is type(quantized(nn.Linear(3, 3)))
    assert type(nn.Linear(2, 2)) is nn.Linear


def test_deepcopy_is_independent():
    """A deep copy has its own weights, the same grid, and can be snapped alone."""
    model = nn.Sequential(quantized(nn.Linear(6, 4)), nn.ReLU(), quantized(nn.Linear(4, 3)))
    weight = model[0].weight.detach().clone()
    twin = copy.deepcopy(model)
    assert list(quantized_layers(twin)) == ["0", "2"]
    assert twin[0].grid == model[0].grid
    snap_(twin)
    assert torch.equal(model[0].weight, weight)
    assert not torch.equal(twin[0].weight, weight)
    assert torch.equal(twin[0].weight, model[0].grid.snap(weight, model[0].weight_scale))


class Locked(nn.Linear):
    """Holds what cannot be copied, and leaves it out of its state."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in super().__getstate__().items() if key != "lock"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_layer_says_what_its_state_is(copied):
    """As it does before it is quantized; torch's own leaves out what compile() made."""
    model = nn.Sequential(*(kind(4, 4) for kind in (nn.Linear, Locked, nn.Linear, nn.Linear)))
    askewq.quantize(model, 2)
    x = torch.randn(2, 4)
    expected = model(x)
    model[2].compile(backend="eager")
    assert torch.equal(copied(model)(x), expected)


def test_a_quantized_model_can_be_pickled():
    """torch.save of the whole module, and so a process started by spawn, works."""
    model = quantized(nn.Linear(6, 4))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(model)
    assert loaded.grid == model.grid
    assert torch.equal(loaded.codes(), model.codes())


def test_scale_moves_with_the_layer():
    """The scale is a buffer: it follows the layer to another type, and the codes stay."""
    layer = quantized(nn.Linear(6, 4))
    codes = layer.codes()
    layer.double()
    assert layer.weight_scale.dtype == torch.float64
    assert torch.equal(layer.codes(), codes)


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_snap_puts_every_weight_on_a_level(grid):
    """After the snap a layer holds at most as many values per scale as its grid has levels."""
    layer = nn.Linear(64, 3)
    quantize_layer_(layer, grid, fit_scale(layer.weight, grid))
    codes = layer.codes()
    snap_(layer)
    assert torch.equal(layer.weight, grid.values(codes, layer.weight_scale))
    assert torch.equal(layer.codes(), codes)
    for row, scale in zip(layer.weight.detach(), layer.weight_scale, strict=True):
        assert set(row.tolist()) <= set((grid.levels() * scale).tolist())


def test_snap_keeps_the_parameter_and_its_memory_format():
    """The snap writes in place: same Parameter, same memory, still channels_last."""
    layer = quantized(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    weight, pointer = layer.weight, layer.weight.data_ptr()
    expected = layer.grid.snap(weight.detach(), layer.weight_scale)
    snap_(layer)
    assert layer.weight is weight
    assert weight.data_ptr() == pointer
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, expected)


def test_snapped_restores_bit_for_bit():
    """Inside the block weights are on their levels; after it they are the bits of before."""
    model = nn.Sequential(quantized(nn.Linear(6, 4)), quantized(nn.Conv2d(3, 3, 3), "ternary"))
    before = [layer.weight.detach().clone() for layer in model]
    with snapped(model):
        for layer, weight in zip(model, before, strict=True):
            assert torch.equal(layer.weight, layer.grid.snap(weight, layer.weight_scale))
            assert not torch.equal(layer.weight, weight)
    assert all(torch.equal(m.weight, w) for m, w in zip(model, before, strict=True))


def test_prepared_weights_are_made_once_and_get_the_same_gradients():
    """Weights that are made beforehand serve every call; outputs and gradients are the same."""
    results = []
    for beforehand in (False, True):
        torch.manual_seed(0)
        layer = quantized(nn.Linear(6, 6))
        follow_(layer, RIVALS["lsq"])
        x = torch.randn(3, 6)
        with prepared(layer) if beforehand else nullcontext():
            assert (layer.weight is layer.weight) == beforehand
            y = layer(layer(x))
        y.square().sum().backward()
        results.append((y.detach(), layer.latent.grad, layer.weight_scale.grad))
        assert layer.weight is not layer.weight
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert one.abs().sum() > 0


def test_snapped_restores_when_the_body_raises():
    """An exception inside the block passes through, and the weights come back."""
    model = quantized(nn.Linear(6, 4))
    before = model.weight.detach().clone()
    inside = []

    def body() -> None:
        inside.append(model.weight.detach().clone())
        raise KeyError("from the body")

    with pytest.raises(KeyError, match="from the body"), snapped(model):
        body()
    assert not torch.equal(inside[0], before)
    assert torch.equal(model.weight, before)


def test_snapped_restores_when_the_snap_raises():
    """When a later layer cannot be snapped, the earlier ones come back."""
    model = nn.Sequential(quantized(nn.Linear(6, 4)), quantized(nn.Linear(4, 4)))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    before = model[0].weight.detach().clone()
    with pytest.raises(DivergenceError), snapped(model):
        pytest.fail("the body must not run")
    assert torch.equal(model[0].weight, before)


def test_snapped_leaves_gradients_alone():
    """Gradients computed before the block are still there after it."""
    model = quantized(nn.Linear(6, 4))
    model(torch.randn(2, 6)).sum().backward()
    gradient = model.weight.grad.clone()
    with snapped(model):
        pass
    assert torch.equal(model.weight.grad, gradient)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("action", [lambda layer: layer.codes(), snap_])
def test_weights_that_are_not_finite_have_no_codes(value, action):
    """NaN and infinity are an error that says what to do, not some code."""
    layer = quantized(nn.Linear(6, 4))
    with torch.no_grad():
        layer.weight[1, 2] = value
    with pytest.raises(DivergenceError) as error:
        action(layer)
    assert "a weight of shape (4, 6) holds NaN or infinite values" in str(error.value)
    assert "go back to an earlier checkpoint and train with a smaller lr" in str(error.value)


def test_quantized_layers_by_name():
    """Only quantization-aware layers are listed, in the model's order, under their names."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": quantized(nn.Linear(4, 4))})
    model["c"] = nn.Sequential(quantized(nn.Conv1d(4, 4, 1)))
    layers = quantized_layers(model)
    assert list(layers) == ["b", "c.0"]
    assert layers["b"] is model["b"]


def test_layers_that_share_a_weight_are_listed_once():
    """Of two layers with one Parameter the first is listed, and it is snapped once."""
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    grid = make_grid(2)
    scale = fit_scale(a.weight, grid)
    for layer in (a, b):
        quantize_layer_(layer, grid, scale)
    model = nn.Sequential(a, b)
    assert list(quantized_layers(model)) == ["0"]
    expected = grid.snap(a.weight.detach(), scale)
    snap_(model)
    assert torch.equal(a.weight, expected)
    assert a.weight is b.weight


def test_data_parallel_is_refused():
    """A replica would see the trained weight, not what the forward pass sees."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    askewq.quantize(model, bits=2)
    with pytest.raises(ModelError, match="use DistributedDataParallel"):
        model[1]._replicate_for_data_parallel()
    attention = nn.MultiheadAttention(4, 2)
    askewq.quantize(attention, bits=2, include=["*"])
    with pytest.raises(ModelError, match="use DistributedDataParallel"):
        attention._replicate_for_data_parallel()


def test_scales_that_float16_does_not_hold():
    """They are refused, but for those of rows of zeros."""
    layer = nn.Linear(8, 4)
    layer.weight.data[0] = 0
    layer.weight.data[1] *= 1e-6
    grid = GRIDS[8]
    quantize_layer_(layer, grid, fit_scale(layer.weight, grid))
    askewq.snap_(layer)
    with pytest.raises(ModelError, match="became a float16 below 2"):
        copy.deepcopy(layer).half().codes()
    plain = nn.Linear(8, 4)
    plain.weight.data[0] = 0
    quantize_layer_(plain, grid, fit_scale(plain.weight, grid))
    codes = plain.codes()
    assert torch.equal(plain.half().codes()[1:], codes[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_a_cast_keeps_the_codes(grid, dtype):
    """Half precision tells the levels apart; bfloat16 not those of 7 and 8 bits, which is said."""
    layer = nn.Linear(512, 256)
    quantize_layer_(layer, grid, fit_scale(layer.weight, grid))
    askewq.snap_(layer)
    codes = layer.codes()
    layer.to(dtype)
    if grid.size > 64 and dtype == torch.bfloat16:
        words = f"{grid.size} levels became bfloat16"
        with pytest.raises(ModelError, match=words), askewq.snapped(layer):
            pass
    else:
        with askewq.snapped(layer):
            assert torch.equal(layer.codes(), codes)
