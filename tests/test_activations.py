"""Rounded inputs: the quantizer against a slow reference, calibration, training, artifact."""

import copy
import math
import pickle
import re
from contextlib import nullcontext

import builders
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from builders import command, finetune
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_train import digest
from torch import nn

import askewq
from askewq import activations, checkpoint, manifest, models, train
from askewq import digest as digests
from askewq import packed as packed_layers
from askewq.activations import RoundedInput, moments, round_to, rounded_layers, scale_of
from askewq.config import build
from askewq.errors import FormatError, ModelError, PlanError, RecipeError
from askewq.grid import fit_scale, input_grid, make_grid
from askewq.kernels import can_compile
from askewq.layers import QuantizedLayer
from askewq.methods import SAWB

WEIGHTS = "model.safetensors"
GRIDS = {
    f"{bits}{'s' if signed else 'u'}": input_grid(bits, signed=signed)
    for bits in range(1, 9)
    for signed in (True, False)
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
with_edges = {name: grid for name, grid in GRIDS.items() if grid.step == 1}  # signs have none
every_grid_with_edges = pytest.mark.parametrize("grid", with_edges.values(), ids=with_edges)
numbers = st.floats(-100, 100, width=32)


def reference(x: float, scale: float, grid) -> tuple[float, float]:
    """Return the nearest level and the derivative, by looking at every level in turn."""
    levels = [(grid.first + grid.step * code) for code in range(grid.size)]
    if grid.first == -1 and grid.size == 2:
        return math.copysign(1, x) * scale if x else scale, 1 - math.tanh(x / scale) ** 2
    units = x / scale
    # Of two levels that are equally near, the even one.
    nearest = min(levels, key=lambda level: (abs(units - level), level % 2))
    return nearest * scale, float(levels[0] - 0.5 <= units <= levels[-1] + 0.5)


class TestRounding:
    @every_grid
    @given(values=st.lists(numbers, min_size=1, max_size=20), scale=st.floats(2**-6, 8))
    def test_the_reference(self, grid, values, scale):
        """Values and gradients are those of the levels tried one by one, in float64."""
        x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        y = round_to(x, torch.tensor(scale, dtype=torch.float64), grid)
        y.sum().backward()
        levels, slopes = zip(*(reference(v, scale, grid) for v in values), strict=True)
        assert y.tolist() == list(levels)
        assert x.grad.tolist() == pytest.approx(list(slopes), abs=1e-12)

    @every_grid_with_edges
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_gradient_ends_at_the_edge(self, grid, dtype):
        """Half a level beyond the outermost one it is 1, and the next number is cut off: 0."""
        lowest, highest = grid.first - 0.5, grid.first + grid.last + 0.5
        edges = torch.tensor([lowest, highest], dtype=dtype)
        beyond = edges.nextafter(torch.tensor([-math.inf, math.inf], dtype=dtype))
        x = torch.cat([edges, beyond, beyond.sign() * math.inf]).requires_grad_()
        round_to(x, torch.ones((), dtype=dtype), grid).sum().backward()
        assert x.grad.tolist() == [1, 1, 0, 0, 0, 0]

    @every_grid_with_edges
    def test_half_way_goes_to_the_even_level(self, grid):
        """As ONNX's QuantizeLinear and compressed-tensors do, so that no export differs."""
        half = torch.arange(grid.first - 1, grid.last + grid.first + 1) + 0.5
        expected = half.round().clamp(grid.first, grid.first + grid.last)
        assert torch.equal(round_to(half, torch.tensor(1.0), grid), expected)
        assert (round_to(half, torch.tensor(1.0), grid)[1:-1] % 2 == 0).all()

    @every_grid
    @given(values=st.lists(numbers, min_size=1, max_size=20), scale=st.floats(2**-6, 8, width=32))
    def test_rounding_twice_changes_nothing(self, grid, values, scale):
        """What was rounded is on a level, in float32; there are no more than 2^b of them."""
        once = round_to(torch.tensor(values), torch.tensor(scale), grid)
        assert torch.equal(round_to(once, torch.tensor(scale), grid), once)

    def test_levels_are_as_many_as_the_bits_allow(self):
        """Signed and unsigned: 2^b levels."""
        for bits in range(1, 9):
            for signed in (True, False):
                grid = input_grid(bits, signed=signed)
                y = round_to(torch.linspace(-400, 400, 100_001), torch.tensor(1.0), grid)
                assert len(y.unique()) == 2**bits

    def test_types(self):
        """bfloat16 is rounded in float32 and given back as bfloat16; float64 stays."""
        grid = input_grid(4, signed=True)
        x = torch.randn(100)
        y = round_to(x.bfloat16(), torch.tensor(0.3), grid)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, round_to(x.bfloat16().float(), torch.tensor(0.3), grid).bfloat16())
        assert round_to(x.double(), torch.tensor(0.3), grid).dtype == torch.float64

    @every_grid
    def test_nan_is_not_hidden(self, grid):
        """A value that is not a number stays one, so that divergence is found."""
        assert round_to(
            torch.tensor([math.nan, 1.0]), torch.tensor(1.0), grid
        ).isnan().tolist() == [
            True,
            False,
        ]

    @pytest.mark.parametrize("bits", [0, 9, 16, True, 2.0, "none", None])
    def test_bits_that_do_not_exist(self, bits):
        """Only the whole numbers 1 to 8."""
        with pytest.raises(RecipeError, match=re.escape(f"act_bits = {bits!r}") + ".*1 to 8"):
            input_grid(bits, signed=True)


class TestScale:
    def test_the_published_pair(self):
        """At the paper's grid of 4 bits the coefficients are its 12.1 and 12.2, times the range."""
        c1, c2 = SAWB[4, -7.5]
        assert (7.5 * c1, 7.5 * c2) == pytest.approx((12.1, 12.2), abs=0.06)

    def test_unsigned_one_bit_is_half_of_ternary(self):
        """By symmetry {0, 1} on positive values asks for the scale of {-1, 0, 1}."""
        assert SAWB[1, 0.0] == pytest.approx(SAWB["ternary", -1.0], abs=0.01)

    @every_grid
    def test_nearly_the_best_scale_of_normal_values(self, grid):
        """SAWB's scale has nearly the error of the best one."""
        x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
        x = x.abs() if grid.first == 0 else x
        best = fit_scale(x.view(1, -1), grid).squeeze()
        found = scale_of(moments(x), grid)
        errors = [(x - round_to(x, scale, grid)).square().mean() for scale in (found, best)]
        assert errors[0] < 1.3 * errors[1]

    @every_grid
    @given(values=st.lists(numbers, max_size=20))
    def test_positive_and_finite_for_any_values(self, grid, values):
        """Also where all values are zero, or there is none."""
        scale = scale_of(moments(torch.tensor(values)), grid)
        assert 0 < float(scale) < math.inf

    def test_zeros_do_not_count(self):
        """Zeros are on a level at every scale: however many there are, the scale is the same."""
        x = torch.rand(100)
        for bits in range(1, 9):
            grid = input_grid(bits, signed=False)
            with_zeros = scale_of(moments(torch.cat([x, torch.zeros(1000)])), grid)
            assert with_zeros == pytest.approx(float(scale_of(moments(x), grid)), rel=1e-5)

    def test_what_is_cut_off_does_not_count(self):
        """Where the levels have no sign a negative value, which becomes 0, is a 0."""
        x, grid = torch.rand(100), input_grid(4, signed=False)
        torch.testing.assert_close(moments(torch.cat([x, -5 * x]), grid)[:3], moments(x)[:3])

    def test_zeros_count_among_signs(self):
        """-1 and 1 have no 0: the scale of least squared error is the mean of all sizes."""
        x, grid = torch.cat([torch.randn(100), torch.zeros(100)]), input_grid(1, signed=True)
        scale = scale_of(moments(x), grid)
        assert float(scale) == pytest.approx(float(x.abs().mean()), rel=1e-5)


def network() -> nn.Module:
    """Return a network with an input of either sign, one after ReLU, and one that is looked up."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(8, 6),
        nn.Linear(6, 12),
        nn.ReLU(),
        nn.Linear(12, 6),
        nn.GELU(),
        nn.Linear(6, 2),
    )


def rounded(act_bits=4, include=("*",)) -> nn.Module:
    """Return it with all weights quantized and inputs rounded."""
    model = network()
    askewq.quantize(model, 2, include=include)
    askewq.round_inputs(model, act_bits, lambda: model(torch.arange(8)))
    return model


class TestCalibration:
    def test_signs(self):
        """Unsigned after ReLU, signed elsewhere, nothing where indices are looked up."""
        model = network()
        askewq.quantize(model, 2, include=["*"])
        signed = askewq.round_inputs(model, 4, lambda: model(torch.arange(8)))
        assert signed == {"1": True, "3": False, "5": True}
        assert {n: layer.input_grid.first for n, layer in rounded_layers(model).items()} == {
            "1": -8,
            "3": 0,
            "5": -8,
        }

    @pytest.mark.parametrize("error", [False, True])
    def test_samples_change_nothing_else(self, error):
        """Neither batch norm's statistics nor the mode of any module, and nothing is dropped."""
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(1.0), nn.Linear(6, 6), nn.Linear(6, 2))
        askewq.quantize(model, 2, include=["2"])
        model[1].eval()
        x = torch.randn(8, 6) if not error else torch.full((8, 6), torch.nan)
        before = {name: value.clone() for name, value in model[0].state_dict().items()}
        with pytest.raises(ModelError) if error else nullcontext():
            askewq.round_inputs(model, 4, lambda: model(x))
        assert all(torch.equal(before[name], v) for name, v in model[0].state_dict().items())
        assert [module.training for module in model] == [True, False, True, True]
        assert error or isinstance(model[2], RoundedInput)

    def test_the_scale_is_that_of_all_samples(self):
        """Several calls count as one; processes add their sums up."""
        x = torch.randn(6, 6)
        scales = []
        for parts, times in ((1, 1), (3, 1), (1, 2)):
            model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
            askewq.quantize(model, 2, include=["0"])
            askewq.round_inputs(
                model,
                4,
                lambda m=model, n=parts: [m(part) for part in x.chunk(n)],
                reduce=lambda sums, n=times: sums * n,
            )
            scales.append(float(model[0].input_scale))
        assert scales[0] == float(scale_of(moments(x), input_grid(4, signed=True)))
        assert scales[1:] == pytest.approx(scales[:1] * 2)

    def test_the_order_of_the_calls_does_not_matter(self):
        """Processes that call other layers, or in another order, add up the sums of the same."""

        def calibrated(order: list[int], other: list[int]) -> dict[str, float]:
            model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
            askewq.quantize(model, 2, include=["*"])
            sent: list[torch.Tensor] = []
            twin = copy.deepcopy(model)

            def run(model: nn.Module, calls: list[int]) -> None:
                for i in calls:
                    model[i](inputs[i])

            askewq.round_inputs(
                twin, 4, lambda: run(twin, other), reduce=lambda sums: sent.append(sums) or sums
            )
            askewq.round_inputs(
                model, 4, lambda: run(model, order), reduce=lambda sums: sums + sent.pop()
            )
            return {n: float(layer.input_scale) for n, layer in rounded_layers(model).items()}

        inputs = [torch.randn(5, 6) * 4**i for i in range(3)]
        alike = calibrated([0, 1, 2], [0, 1, 2])
        assert calibrated([0, 1, 2], [2, 1, 0]) == alike
        assert calibrated([0, 1], [2, 0, 1]) == pytest.approx(alike)

    @pytest.mark.parametrize(("bits", "negative"), [(2, True), (4, False)])
    def test_a_state_dict_says_the_levels_of_inputs(self, bits, negative):
        """Other bits, or another sign, are another network with the same tensors."""
        models = []
        for width, low in ((4, True), (bits, negative)):
            model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
            askewq.quantize(model, 2, include=["1"])
            x = torch.randn(5, 6)
            askewq.round_inputs(model, width, lambda m=model, x=x, n=low: m[1](x if n else x.abs()))
            models.append(model)
        models[0].load_state_dict(copy.deepcopy(models[0]).state_dict())
        with pytest.raises(RuntimeError, match=r"'1' was trained on the levels .*'input': \[4, -8"):
            models[1].load_state_dict(models[0].state_dict())

    def test_only_quantized_layers(self):
        """First and last layer keep float weights and float inputs."""
        assert list(rounded_layers(rounded(include=["3"]))) == ["3"]

    def test_a_layer_that_is_never_called(self):
        """It stays as it is; where none is called that is an error."""
        model = network()
        askewq.quantize(model, 2, include=["*"])
        signed = askewq.round_inputs(model, 4, lambda: model[3](torch.ones(1, 12)))
        assert signed == {"3": False}
        model = network()
        askewq.quantize(model, 2, include=["*"])
        with pytest.raises(ModelError, match="no input to round"):
            askewq.round_inputs(model, 4, lambda: None)
        assert not rounded_layers(model)

    @pytest.mark.parametrize("x", [torch.zeros(3, 12), torch.zeros(0, 12)])
    def test_a_layer_that_is_given_nothing(self, x):
        """Zeros alone, or no rows, have no scale and no sign: it stays as it is, too."""
        model = network()
        askewq.quantize(model, 2, include=["*"])
        signed = askewq.round_inputs(model, 4, lambda: (model(torch.arange(8)), model[3](x)))
        assert signed["3"] is False
        model = network()
        askewq.quantize(model, 2, include=["*"])
        signed = askewq.round_inputs(model, 4, lambda: (model[3](x), model[5](torch.ones(1, 6))))
        assert signed == {"5": False}
        model = network()
        askewq.quantize(model, 2, include=["*"])
        with pytest.raises(ModelError, match="no quantized layer was called with numbers but 0"):
            askewq.round_inputs(model, 4, lambda: model[3](x))

    def test_in_inference_mode(self):
        """The scales can be trained on afterwards."""
        model = network()
        askewq.quantize(model, 2, include=["*"])
        with torch.inference_mode():
            askewq.round_inputs(model, 4, lambda: model(torch.arange(8)))
        askewq.follow_inputs_(model, True)
        before = model[3].input_scale.clone()
        model.train()(torch.arange(8)).sum().backward()
        assert not torch.equal(model[3].input_scale, before)

    def test_twice(self):
        """A model whose inputs are rounded is refused."""
        model = rounded()
        with pytest.raises(ModelError, match="already"):
            askewq.round_inputs(model, 4, lambda: model(torch.arange(8)))

    def test_the_plan(self):
        """It says which inputs are rounded, and why one is not."""
        plan = askewq.plan(network(), 2, include=["*"], act_bits=4)
        assert [layer.act_bits for layer in plan.layers] == ["none", 4, 4, 4]
        assert "indices" in plan.layers[0].note
        with pytest.raises(
            PlanError, match="act_bits = 4, but none of the 1 quantized layers is given"
        ):
            askewq.plan(network(), 2, include=["0"], act_bits=4)
        with pytest.raises(RecipeError, match="act_bits = 16"):
            askewq.plan(network(), 2, act_bits=16)

    def test_attention_and_what_is_in_it(self):
        """Its own inputs stay float: they are several."""
        attention = nn.MultiheadAttention(8, 2)
        plan = askewq.plan(nn.Sequential(attention), 2, include=["*"], act_bits=4)
        found = {layer.label: (layer.act_bits, layer.note) for layer in plan.quantized}
        assert found["0.in_proj_weight"][0] == "none"
        assert "its inputs are several, which are not rounded" in found["0.in_proj_weight"][1]


class TestLayer:
    def test_a_call_rounds(self):
        """The output is that of the plain layer on rounded inputs."""
        model = rounded()
        layer, x = model[3], torch.rand(5, 12)
        expected = nn.functional.linear(
            round_to(x, layer.input_scale, layer.input_grid), layer.weight, layer.bias
        )
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(input=x), expected)
        assert isinstance(layer, QuantizedLayer)

    def test_a_forward_that_was_replaced(self, tmp_path):
        """As by a hook of Accelerate's: the input would be rounded after loading only."""
        model = network()
        askewq.quantize(model, 2, include=["*"])
        add_hook_to_module(model[3], ModelHook())
        x = torch.arange(8)
        with pytest.raises(ModelError, match="replaced the forward of 3, so that its input"):
            askewq.round_inputs(model, 4, lambda: model(x))
        remove_hook_from_module(model[3])
        assert askewq.round_inputs(model, 4, lambda: model(x))["3"] is False
        with torch.no_grad():
            assert torch.equal(model(x), rounded()(x))
        saved(tmp_path)
        hooked = network()
        add_hook_to_module(hooked[3], ModelHook())
        with pytest.raises(ModelError, match="replaced the forward of 3"):
            checkpoint.load_into(hooked, checkpoint.read(tmp_path / WEIGHTS))

    def test_the_scale_is_float32(self):
        """Whatever torch's default is."""
        model = network()
        askewq.quantize(model, 2)
        torch.set_default_dtype(torch.float64)
        try:
            askewq.round_inputs(model, 4, lambda: model(torch.arange(8)))
        finally:
            torch.set_default_dtype(torch.float32)
        assert {layer.input_scale.dtype for layer in rounded_layers(model).values()} == {
            torch.float32
        }

    def test_follows_batches_until_it_is_frozen(self):
        """In training, once told to; evaluation, and a frozen scale, change nothing."""
        model = rounded()
        layer, x = model[3], 3 * torch.rand(5, 12)
        first = layer.input_scale.clone()
        layer.train()(x)
        assert torch.equal(layer.input_scale, first)
        askewq.follow_inputs_(model, True)
        layer.eval()(x)
        assert torch.equal(layer.input_scale, first)
        layer.train()(x)
        batch = scale_of(moments(x), layer.input_grid)
        assert float(layer.input_scale) == pytest.approx(float(0.9 * first + 0.1 * batch))
        moved = layer.input_scale.clone()
        askewq.follow_inputs_(model, False)
        layer(x)
        assert torch.equal(layer.input_scale, moved)

    @pytest.mark.parametrize(
        "x",
        [torch.zeros(5, 12), torch.zeros(0, 12), torch.full((5, 12), math.inf),
         torch.full((5, 12), math.nan)],
        ids=["zeros", "nothing", "inf", "nan"],
    )  # fmt: skip
    def test_what_says_nothing_moves_no_scale(self, x):
        """An expert that no token reached keeps its scale; a batch that is skipped leaves it."""
        model = rounded()
        layer = model[3].train()
        first = layer.input_scale.clone()
        askewq.follow_inputs_(model, True)
        layer(x)
        assert torch.equal(layer.input_scale, first)

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_a_calibration_that_has_no_scale(self, value):
        """Nothing could repair it later."""
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        askewq.quantize(model, bits=2)
        x = torch.ones(2, 4)
        x[0, 0] = value
        with pytest.raises(ModelError, match="input of 1 holds NaN, infinite or huge values"):
            askewq.round_inputs(model, 4, lambda: model(x))

    def test_an_input_by_another_name(self):
        """A layer that calls its input something else is rounded like any other."""

        class Hidden(nn.Linear):
            def forward(self, hidden_states, scale=1.0):
                return super().forward(hidden_states) * scale

        model = network()
        model[3] = Hidden(12, 6)
        askewq.quantize(model, 2, include=["*"])
        askewq.round_inputs(model, 4, lambda: model(torch.arange(8)))
        layer, x = model[3], torch.rand(5, 12)
        assert torch.equal(layer(hidden_states=x, scale=2.0), layer(x, 2.0))
        assert torch.equal(layer(scale=2.0, hidden_states=x), layer(x, 2.0))

    def test_copies_and_casts(self):
        """Deep copies and pickles round as well; a cast leaves the scale as it is."""
        model, x = rounded(), torch.arange(8)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), model(x))
        scale = model[1].input_scale.clone()
        model.to(torch.bfloat16)
        assert model[1].input_scale.dtype == torch.float32
        assert torch.equal(model[1].input_scale, scale)

    def test_autocast(self):
        """Under bf16 autocast the layer takes and gives bfloat16."""
        model = rounded()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.arange(8))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert model[1].latent.grad.isfinite().all()


METHODS = [
    {"closing": "lazy"},
    {"closing": "staggered"},
    {"closing": "single"},
    {"method": "askewsgd-paper"},
    {"method": "lsq"},
    {"method": "luq", "gradient_bits": 4},
    {"method": "proxquant"},
    {"method": "mirror-descent", "bits": 1},
]
RUNS = {
    "own": {"act_bits": 4},
    "timm": {"act_bits": 4, "bits": 4},
    "bert": {"act_bits": 3},
    "llama": {"act_bits": 8},
    "gpt2": {"act_bits": 2},
    "vit": {"act_bits": 1, "bits": 1},
}


class TestTraining:
    @pytest.mark.parametrize("kind", RUNS)
    def test_every_source(self, kind, tmp_path):
        """A run packs and reloads, dense and packed, with the logits that were evaluated."""
        found = finetune(kind, tmp_path / "out", **RUNS[kind])
        assert found["snapped"] == found["reloaded"]
        assert found["act_bits"] == RUNS[kind]["act_bits"]
        stored = checkpoint.read(tmp_path / "out" / WEIGHTS)
        assert stored.inputs
        assert {i.grid.bits for i in stored.inputs.values()} == {RUNS[kind]["act_bits"]}
        network = builders.own_network("small") if kind == "own" else None
        packed = askewq.load(tmp_path / "out", model=network, packed=True)
        network = builders.own_network("small") if kind == "own" else None
        dense = askewq.load(tmp_path / "out", model=network)
        assert rounded_layers(packed).keys() == rounded_layers(dense).keys() == stored.inputs.keys()
        given = [[], []]
        for seen, model in zip(given, (dense, packed), strict=True):
            layer = next(iter(rounded_layers(model).values()))
            torch.manual_seed(0)
            x = torch.randn(2, *input_shape(layer))
            with torch.no_grad():
                seen.append(layer(x))
        assert torch.equal(given[0][0], given[1][0])

    @pytest.mark.parametrize("changes", METHODS, ids=lambda c: "-".join(map(str, c.values())))
    def test_every_method(self, changes, tmp_path):
        """The methods are those of the weights; inputs are rounded beside each of them."""
        found = finetune("own", tmp_path / "out", **{"act_bits": 4, **changes})
        assert found["snapped"] == found["reloaded"]

    @pytest.mark.parametrize(
        "changes",
        [{"distill": 0.5}, {"mixed_precision": "bf16"}, {"full_precision_steps": 3}],
        ids=lambda c: next(iter(c)),
    )
    def test_beside_other_settings(self, changes, tmp_path):
        """With a teacher, which keeps float inputs, in bf16, and after full-precision steps."""
        found = finetune("timm", tmp_path / "out", act_bits=4, **changes)
        assert found["snapped"] == found["reloaded"]

    def test_compiled(self, tmp_path):
        """The compiled network rounds, its scales follow and stop, and it is compiled once."""
        assert can_compile("cpu"), "without a compiler this test compares nothing"
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found = finetune("own", tmp_path / "compiled", act_bits=4, compile=True)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert found["snapped"] == found["reloaded"]
        finetune("own", tmp_path / "eager", act_bits=4)
        one, two = (checkpoint.read(tmp_path / n / WEIGHTS) for n in ("compiled", "eager"))
        for name, rounded in two.inputs.items():
            torch.testing.assert_close(one.inputs[name].scale, rounded.scale, rtol=1e-2, atol=0)

    @pytest.mark.parametrize("at", [1, 5, 8])
    def test_resumed(self, tmp_path, monkeypatch, at):
        """Cut in either phase and resumed, a run ends with the same bytes."""
        settings = {"act_bits": 4, "full_precision_steps": 3, "save_every": 1}
        finetune("own", tmp_path / "whole", **settings)
        with builders.power_cut(monkeypatch, at), pytest.raises(builders.PowerCutError):
            finetune("own", tmp_path / "cut", **settings)
        calls = []
        monkeypatch.setattr(train.Loop, "calibrate", counted(train.Loop.calibrate, calls))
        finetune("own", tmp_path / "cut", resume=True)
        assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
        # What a checkpoint of the low-bit phase holds is not decided again.
        assert len(calls) == int(at < 4)

    def test_the_scale_moves_and_is_frozen(self, tmp_path, monkeypatch):
        """It follows the batches up to the end of the closing, and not after it."""
        seen = []
        original = activations.follow_inputs_

        def watch(model, on):
            layer = next(iter(rounded_layers(model).values()))
            seen.append((on, float(layer.input_scale)))
            original(model, on)

        monkeypatch.setattr(activations, "follow_inputs_", watch)
        finetune("own", tmp_path / "out", act_bits=4, max_steps=10)
        assert [on for on, _ in seen] == [True] * 8 + [False] * 2
        scales = [scale for _, scale in seen]
        assert len(set(scales[:9])) == 9
        assert scales[8] == scales[9]
        stored = checkpoint.read(tmp_path / "out" / WEIGHTS)
        assert float(next(iter(stored.inputs.values())).scale) == scales[9]


def counted(function, calls):
    """Return a function that notes its calls."""

    def call(*arguments):
        calls.append(1)
        return function(*arguments)

    return call


def input_shape(layer) -> tuple[int, ...]:
    """Return the shape of one sample that a layer takes."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, 8, 8
    return (getattr(layer, "in_features", 0) or layer.nx,)


def saved(folder, act_bits=4) -> nn.Module:
    """Write a rounded network as a packed file and return it."""
    model = rounded(act_bits)
    askewq.snap_(model)
    checkpoint.save(model, folder / WEIGHTS)
    return model.eval()


def rewrite(path, change) -> None:
    """Change manifest and tensors of a packed file, and seal it anew."""
    content, tensors = builders.manifest(path), load_file(path)
    change(content, tensors)
    del content["digest"]
    save_file(tensors, path, {"askewq": digests.seal(content, tensors)})


class TestArtifact:
    @pytest.mark.parametrize("act_bits", range(1, 9))
    def test_round_trip(self, tmp_path, act_bits):
        """Dense and packed, loaded networks give the very logits, and save the very file."""
        model, x = saved(tmp_path, act_bits), torch.arange(8)
        for packed in (False, True):
            plain = network()
            fill = packed_layers.load_packed_into if packed else checkpoint.load_into
            fill(plain, checkpoint.read(tmp_path / WEIGHTS))
            assert torch.equal(plain.eval()(x), model(x))
        tensors, header = checkpoint.serialize(packed_layers.artifact_of(plain))
        stored, expected = checkpoint.serialize(checkpoint.read(tmp_path / WEIGHTS))
        assert header == expected
        assert all(torch.equal(tensors[name], tensor) for name, tensor in stored.items())

    def test_manifest(self, tmp_path):
        """Version 3 says bits and sign of every input by its layer; the scale is a tensor."""
        model = saved(tmp_path)
        content = builders.manifest(tmp_path / WEIGHTS)
        assert content["version"] == 3
        assert content["inputs"] == {
            "1": {"bits": 4, "signed": True},
            "3": {"bits": 4, "signed": False},
            "5": {"bits": 4, "signed": True},
        }
        scale = load_file(tmp_path / WEIGHTS)["3.input_scale"]
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        assert torch.equal(scale, model[3].input_scale)

    def test_files_without_rounded_inputs_are_of_version_2(self, tmp_path):
        """They say nothing of inputs; test_checkpoint.Golden holds their bytes."""
        model = network()
        askewq.quantize(model, 2)
        askewq.snap_(model)
        checkpoint.save(model, tmp_path / WEIGHTS)
        content = builders.manifest(tmp_path / WEIGHTS)
        assert content.keys() == {"version", "weights", "shared", "digest"}
        assert content["version"] == 2

    def test_a_reader_of_version_2_refuses(self, tmp_path, monkeypatch):
        """Who does not know inputs must not return a network that leaves them as they are."""
        saved(tmp_path)
        monkeypatch.setattr(manifest, "WITH_INPUTS", 2)  # what the reader of version 2 knew
        with pytest.raises(FormatError, match=r"format version 3.*upgrade"):
            checkpoint.read(tmp_path / WEIGHTS)

    def test_layers_that_share_a_weight_have_inputs_of_their_own(self, tmp_path):
        """The weight is stored once, the scales of the inputs are two."""
        model = builders.own_network("tied")
        askewq.quantize(model, 2, include=["one"])
        images = torch.rand(4, 3, 16, 16)
        askewq.round_inputs(model, 4, lambda: model(images))
        askewq.snap_(model)
        checkpoint.save(model, tmp_path / WEIGHTS)
        stored = checkpoint.read(tmp_path / WEIGHTS)
        assert stored.weights.keys() == {"one.weight"}
        assert stored.inputs.keys() == {"one", "two"}
        again = builders.own_network("tied")
        checkpoint.load_into(again, stored)
        assert torch.equal(again(images), model(images))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda m, t: m.update(inputs={}), "without any 'inputs'"),
            (lambda m, t: m.update(inputs=[]), "'inputs' in the manifest must be a mapping"),
            (lambda m, t: m.pop("inputs"), "version 3 must have exactly the keys"),
            (lambda m, t: m.update(version=2), "version 2 must have exactly the keys"),
            (lambda m, t: m["inputs"]["3"].pop("bits"), "input of '3' must have exactly"),
            (lambda m, t: m["inputs"]["3"].update(first=1), "input of '3' must have exactly"),
            (lambda m, t: m["inputs"]["3"].update(bits=9), "has 9 bits"),
            (lambda m, t: m["inputs"]["3"].update(bits=True), "has True bits"),
            (lambda m, t: m["inputs"]["3"].update(signed=1), "signed or not, and not 1"),
            (lambda m, t: m["inputs"].update({"2": m["inputs"]["3"]}), "lacks 2.input_scale"),
            (lambda m, t: t.pop("3.input_scale"), "lacks 3.input_scale"),
            (lambda m, t: t.update({"3.input_scale": torch.ones(1)}), "without dimensions"),
            (lambda m, t: t.update({"3.input_scale": torch.ones(()).half()}), "must be float32"),
            (lambda m, t: t.update({"3.input_scale": torch.zeros(())}), "not positive and finite"),
            (
                lambda m, t: t.update({"3.input_scale": torch.tensor(math.nan)}),
                "not positive and finite",
            ),
            (
                lambda m, t: (
                    m["inputs"].update({"2": m["inputs"]["3"]}),
                    t.update({"2.input_scale": torch.ones(())}),
                ),
                "has no packed weight",
            ),
        ],
    )
    def test_refused(self, tmp_path, change, words):
        """Whatever the specification forbids, by name."""
        saved(tmp_path)
        rewrite(tmp_path / WEIGHTS, change)
        with pytest.raises(FormatError, match=words):
            checkpoint.read(tmp_path / WEIGHTS)

    def test_an_input_of_an_embedding(self, tmp_path):
        """Indices cannot be rounded: a file that says so does not fit the network."""
        saved(tmp_path)

        def change(content, tensors):
            content["inputs"]["0"] = content["inputs"]["3"]
            tensors["0.input_scale"] = torch.ones(())

        rewrite(tmp_path / WEIGHTS, change)
        with pytest.raises(FormatError, match="'0' is Embedding in the model, whose input"):
            checkpoint.load_into(network(), checkpoint.read(tmp_path / WEIGHTS))


class TestTransformers:
    @pytest.mark.parametrize("kind", ["bert", "gpt2"])
    def test_from_pretrained(self, kind, tmp_path):
        """Packed, dequantized and in bf16 it rounds as askewq.load does, and saves it all again."""
        folder, plain = untrained_artifact(kind, tmp_path)
        auto = {"bert": "SequenceClassification", "gpt2": "CausalLM"}[kind]
        load = getattr(transformers, f"AutoModelFor{auto}").from_pretrained
        with torch.no_grad():
            expected = plain(**TOKENS).logits
            assert torch.equal(load(folder).eval()(**TOKENS).logits, expected)
            assert torch.equal(load(folder).dequantize().eval()(**TOKENS).logits, expected)
        half = load(folder, dtype=torch.bfloat16)
        for name, layer in rounded_layers(half).items():
            assert layer.input_scale.dtype == torch.float32
            assert torch.equal(layer.input_scale, plain.get_submodule(name).input_scale)
        load(folder).save_pretrained(tmp_path / "again")
        (a, one), (b, two) = (
            checkpoint.serialize(checkpoint.read(path / WEIGHTS))
            for path in (folder, tmp_path / "again")
        )
        assert one == two
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)

    def test_a_base_model(self, tmp_path):
        """AutoModel gives the network without its head, its inputs rounded."""
        folder, _ = untrained_artifact("bert", tmp_path)
        assert len(rounded_layers(transformers.AutoModel.from_pretrained(folder))) == 13


TOKENS = {"input_ids": torch.tensor([[2, 4, 5, 3]])}


def untrained_artifact(kind, folder):
    """Return an artifact of a tiny network that rounds its inputs, and that network, filled."""

    def quantize(model):
        askewq.quantize(model, 2, include=["*"] if kind == "gpt2" else [])
        askewq.round_inputs(model, 4, lambda: model(**TOKENS))

    loaded = builders.untrained(kind)
    made = builders.packed(loaded, folder / "artifact", quantize)
    plain = models.build(loaded.spec)
    checkpoint.load_into(plain, checkpoint.read(made / WEIGHTS))
    return made, plain.eval()


class TestSettings:
    @pytest.mark.parametrize("value", [0, 9, 16, -1, 2.5, "all", None])
    def test_values_that_are_refused(self, value):
        """The message says which are possible."""
        with pytest.raises(RecipeError, match=r"act_bits: .*'none'"):
            build({"model": "m", "dataset": "d", "output": "o", "act_bits": value})

    @pytest.mark.parametrize("value", ["0", "9", "16", "all"])
    def test_flags_that_are_refused(self, value):
        """So does the command line's."""
        done = command("inspect", "resnet18", "--act-bits", value)
        assert done.code == 2
        assert "act-bits" in done.err
        assert "none" in done.err

    def test_inspect(self, tmp_path):
        """The plan shows the bits of inputs; the artifact shows their sign, too."""
        done = command("inspect", "test_resnet", "--act-bits", 4, "--no-trust-remote-code")
        assert done.code == 0, done.err
        assert " 4 bits " in done.out
        finetune("own", tmp_path / "out", act_bits=4)
        done = command("inspect", tmp_path / "out")
        assert "4 bits unsigned" in done.out

    def test_the_plan_is_unchanged_without(self):
        """No column for inputs where none is rounded."""
        assert "input" not in command("inspect", "test_resnet").out.split("\n")[0]

    def test_eval(self, tmp_path):
        """The eval command gives the run's own figure."""
        found = finetune("timm", tmp_path / "out", act_bits=2)
        data = builders.SETTINGS["timm"]()["dataset"]
        done = command("eval", tmp_path / "out", "--dataset", data, "--json")
        assert f'"accuracy": {found["reloaded"]}' in done.out
        text = (tmp_path / "out" / "README.md").read_text()
        assert "2 bits, inputs 2 bits" in text


def test_every_width_has_coefficients():
    """Signed and unsigned, of all widths."""
    for bits in range(1, 9):
        for grid in (make_grid(bits), input_grid(bits, signed=False)):
            assert (grid.bits, grid.first) in SAWB


def test_the_mixin_is_said_by_name():
    """Printing a model shows which layers round their input."""
    assert isinstance(rounded()[1], RoundedInput)
    assert type(rounded()[1]).__name__ == "RoundedQuantizedLinear"


def test_torchs_own_encoder_rounds_in_every_mode(tmp_path):
    """Its fast path in evaluation goes round the layers, unless something hangs on them."""
    finetune("own", tmp_path, model=builders.own("encoder"), act_bits=2, max_steps=2)
    images = torch.randn(4, 3, 16, 16)
    for packed in (False, True):
        network = askewq.load(tmp_path, model=builders.own_network("encoder"), packed=packed)
        rounding = network(images)
        with torch.no_grad():
            torch.testing.assert_close(network(images), rounding, rtol=1e-5, atol=1e-6)


def test_torchs_own_encoder_with_a_mask(tmp_path):
    """In evaluation it would give its layers nested tensors, which nothing rounds."""
    torch.manual_seed(0)

    def made():
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = made()
    askewq.quantize(model, 2)
    askewq.round_inputs(model, 4, lambda: model(x, src_key_padding_mask=padding))
    askewq.snap_(model)
    askewq.save(model, tmp_path)
    expected = model(x, src_key_padding_mask=padding)  # in training
    for packed in (False, True):
        loaded = askewq.load(tmp_path, model=made(), packed=packed)
        with torch.no_grad():
            found = loaded(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-5, atol=1e-6)
