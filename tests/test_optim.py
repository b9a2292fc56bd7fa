"""The skewed optimizers: beside the scalar reference, beside torch's, and on their own promises."""

import copy
import functools
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
from conftest import GRIDS, grid_name, grids, pulls, random_tensor, seeds
from hypothesis import given
from hypothesis import strategies as st
from reference import SGD, AdamW, Reference
from torch import nn

from askewq import kernels, optim
from askewq.anneal import Closing
from askewq.constraint import nearest, radius_of, slack
from askewq.errors import DivergenceError, ModelError, RecipeError
from askewq.grid import GroupSize, fit_scale, make_grid, scale_shape
from askewq.kernels import DISTANCE_BINS, Interval, constrain
from askewq.layers import quantize_layer_, quantized_layers, snap_, snapped
from askewq.optim import AskewAdamW, AskewSGD
from askewq.wrap import quantize

FREE = Closing("single", start=0.0, end=1.0, final_radius=0.5)  # eps = 1 all along
SINGLE = Closing("single", start=0.0, end=1.0, power=1.0, final_radius=0.01)
STAGGERED = Closing("staggered", start=0.0, end=0.9, power=3.0, every=3)
LAZY = Closing("lazy", start=0.0, end=0.9, power=3.0)

OPTIMIZERS = {
    "SGD": lambda model, **options: AskewSGD(model, lr=0.05, **options),
    "momentum": lambda model, **options: AskewSGD(
        model, lr=0.02, momentum=0.9, weight_decay=0.01, **options
    ),
    "nesterov": lambda model, **options: AskewSGD(
        model, lr=0.02, momentum=0.9, weight_decay=0.01, nesterov=True, **options
    ),
    "AdamW": lambda model, **options: AskewAdamW(model, lr=0.02, weight_decay=0.1, **options),
}
IN_LEVELS = {"in levels": lambda model, **options: AskewAdamW(model, level_lr=0.01, **options)}
TORCHS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda params: torch.optim.SGD(
        params, lr=0.02, momentum=0.9, weight_decay=0.01, nesterov=True
    ),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.1),
}
REFERENCES = {
    "SGD": (0.05, SGD),
    "momentum": (0.02, lambda: SGD(momentum=0.9, weight_decay=0.01)),
    "nesterov": (0.02, lambda: SGD(momentum=0.9, weight_decay=0.01, nesterov=True)),
    "AdamW": (0.02, lambda: AdamW(weight_decay=0.1)),
}
every_optimizer = pytest.mark.parametrize("base", OPTIMIZERS)
every_closing = pytest.mark.parametrize("closing", [SINGLE, STAGGERED], ids=lambda c: c.kind)
PARITY_GRIDS = [
    grid for grid in GRIDS if grid_name(grid) in
    ("1-integer", "ternary-integer", "2-integer", "2-half-integer", "3-integer", "4-integer",
     "8-integer")
]  # fmt: skip


def spread(
    layer: nn.Module, bits_grid, group_size: GroupSize = "channel", *, seed: int = 0, margin=0.45
) -> nn.Module:
    """Quantize a layer and spread its weights over the grid and `margin` spacings beyond it."""
    generator = torch.Generator().manual_seed(seed)
    weight = layer.weight
    shape = scale_shape(weight.shape, group_size)
    scale = 0.5 + torch.rand(shape, generator=generator, dtype=weight.dtype)
    x = torch.rand(weight.shape, generator=generator, dtype=weight.dtype)
    x = x * (bits_grid.last + 2 * margin) - margin
    rows = (bits_grid.first + bits_grid.step * x).reshape(scale.numel(), -1)
    with torch.no_grad():
        weight.copy_((rows * scale.reshape(-1, 1)).reshape(weight.shape))
    quantize_layer_(layer, bits_grid, scale)
    return layer


def network(
    *, dtype: torch.dtype = torch.float64, bits: int = 2, scale: float | None = None
) -> tuple[nn.Module, nn.Module]:
    """Return a plain model, and its twin with quantized layers; a scale is fitted by default."""
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 4)
    ).to(dtype)
    twin = copy.deepcopy(plain)
    for layer in (twin[2], twin[4]):
        grid = make_grid(bits)
        fitted = fit_scale(layer.weight, grid)
        quantize_layer_(layer, grid, fitted if scale is None else torch.full_like(fitted, scale))
    return plain, twin


def wide(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Return a plain model and its twin on a grid that no test's updates lead out of."""
    return network(dtype=dtype, bits=8, scale=0.1)


def copies(model: nn.Module, count: int) -> list[nn.Module]:
    """Return independent copies of a model."""
    return [copy.deepcopy(model) for _ in range(count)]


def give_gradients(models: list[nn.Module], seed: int) -> None:
    """Put the same random gradients on the parameters of all models."""
    for i, parameters in enumerate(zip(*(model.parameters() for model in models), strict=True)):
        gradient = random_tensor(1000 * seed + i, *parameters[0].shape, dtype=parameters[0].dtype)
        for parameter in parameters:
            parameter.grad = gradient.clone()


def on_level(model: nn.Module) -> list[torch.Tensor]:
    """Return which weights of each quantized layer are exactly on a level."""
    return [
        layer.weight.detach() == layer.grid.snap(layer.weight.detach(), layer.weight_scale)
        for layer in quantized_layers(model).values()
    ]


# --- beside the scalar reference ---------------------------------------------------------------


class Twin:
    """One layer and its scalar reference, pulled to the same minimum by the same noisy slope."""

    def __init__(self, grid, group_size: GroupSize, seed: int, **settings):
        layer = nn.Linear(6, 2, bias=False, dtype=torch.float64)
        self.layer = spread(layer, grid, group_size, seed=seed)
        units = layer.weight_scale.flatten().repeat_interleave(12 // layer.weight_scale.numel())
        self.spacing = (grid.step * units).reshape(2, 6)
        self.target = layer.weight.detach() + 1.5 * self.spacing * random_tensor(seed, 2, 6)
        self.noise = self.spacing * random_tensor(seed + 1, 100, 2, 6)
        self.targets, self.noises = self.target.flatten().tolist(), self.noise.flatten(1).tolist()
        self.reference = Reference(
            weights=layer.weight.flatten().tolist(),
            levels=[[k * unit for k in grid.levels().tolist()] for unit in units.tolist()],
            **settings,
        )

    def give_gradient(self, t: int) -> list[float]:
        """Give the layer its gradient at step t, and return the reference's."""
        self.layer.weight.grad = self.layer.weight.detach() - self.target + self.noise[t]
        triples = zip(self.reference.weights, self.targets, self.noises[t], strict=True)
        return [weight - target + noise for weight, target, noise in triples]

    def gap(self) -> float:
        """Return the largest difference between the two, in level spacings."""
        expected = torch.tensor(self.reference.weights, dtype=torch.float64).reshape(2, 6)
        return ((self.layer.weight.detach() - expected) / self.spacing).abs().max().item()


@pytest.mark.parametrize("pull", ["decoupled", "coupled"])
@every_closing
@pytest.mark.parametrize("base", ["momentum", "nesterov", "AdamW"])
@pytest.mark.parametrize("grid", PARITY_GRIDS, ids=grid_name)
def test_a_hundred_steps_beside_the_reference(grid, base, closing, pull):
    """For 100 steps every weight stays within 1e-10 of Algorithm 1, for each kind of scale."""
    lr, rule = REFERENCES[base]
    alpha, clip = (0.2, 0.1) if pull == "decoupled" else (0.2 / lr, 0.1 / lr)
    settings = {"alpha": alpha, "clip": clip}
    twins = [
        Twin(
            grid, group_size, seed, base=rule(), coupled=pull == "coupled", every=closing.every,
            **settings,
        )
        for seed, group_size in enumerate(["tensor", "channel", 3])
    ]  # fmt: skip
    model = nn.ModuleList(twin.layer for twin in twins)
    optimizer = OPTIMIZERS[base](model, closing=closing, pull=pull, **settings)
    for t in range(100):
        optimizer.param_groups[0]["lr"] = now = lr * (1 - t / 200)
        if closing is SINGLE:
            eps_rel, share = (4 * 0.01 * 0.99) ** (2 * t / 100), 0.0
        else:
            eps_rel, share = 1.0, 1 - (1 - min(t / 100 / 0.9, 1)) ** 3
        for twin in twins:
            twin.reference.step(twin.give_gradient(t), now, eps_rel, share)
        optimizer.anneal(t / 100)
        optimizer.step()
        gap = max(twin.gap() for twin in twins)
        assert gap < 1e-10 * grid.size, f"step {t}: {gap:.1e} level spacings apart"
    if closing is STAGGERED:
        assert all(len(twin.reference.held) == 12 for twin in twins)
    else:  # both branches of the algorithm were taken
        assert all(50 < twin.reference.bound < 1150 for twin in twins)


# --- the constrained landing, on tensors -------------------------------------------------------


def interval(grid, *, eps: float, pull: float, clip: float, within: float = -1.0) -> Interval:
    """Return an interval as the optimizer makes it, in float64."""
    numbers = (grid.first, grid.step, float(grid.last), eps, pull, clip, within)
    return Interval(*(torch.tensor(number, dtype=torch.float64) for number in numbers))


@given(
    grid=grids,
    seed=seeds,
    eps=st.floats(0, 1),
    pull=pulls,
    closing=st.sampled_from(["staggered", "single"]),
)
def test_feasible_weights_land_on_the_plain_update(grid, seed, eps, pull, closing):
    """Weights with slack follow the base update bit for bit, and so do those that gain slack."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(3, 1, generator=generator, dtype=torch.float64)
    x = torch.rand(3, 40, generator=generator, dtype=torch.float64) * (grid.last + 1) - 0.5
    weight = (grid.first + grid.step * x) * scale
    plain = weight + 0.1 * torch.randn(3, 40, generator=generator, dtype=torch.float64)
    landed = constrain(
        weight,
        plain,
        scale,
        interval(grid, eps=eps, pull=pull, clip=0.1),
        closing,
    )
    x = grid.coordinate(weight, scale)
    psi, slope = slack(x, grid.last, eps)
    growth = (plain - weight) / (scale * grid.step) * slope
    free = (psi > 1e-9) | (growth > -pull * psi + 1e-9)
    bound = (psi < -1e-9) & (growth < -pull * psi - 1e-9)
    assert torch.equal(landed[free], plain[free])
    assert (landed[bound] != plain[bound]).all()
    back = (landed - weight) * slope
    assert (back[bound & (slope != 0)] > 0).all(), "a bound weight must drift toward its interval"


@given(grid=grids, seed=seeds, pull=pulls, clip=st.floats(1e-4, 0.5))
def test_the_drift_is_clipped_in_level_spacings(grid, seed, pull, clip):
    """No weight moves further than its update, or than `clip` spacings where it is bound."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (torch.rand(4, 1, generator=generator, dtype=torch.float64) * 8 - 4)
    x = torch.rand(4, 30, generator=generator, dtype=torch.float64) * (grid.last + 6) - 3
    weight = (grid.first + grid.step * x) * scale
    bounds = interval(grid, eps=1e-3, pull=pull, clip=clip)
    landed = constrain(weight, weight.clone(), scale, bounds, closing="single")
    moved = ((landed - weight) / (scale * grid.step)).abs()
    assert moved.max() <= clip * (1 + 1e-9)
    assert (moved > 0).any()


@given(grid=grids, seed=seeds, within=st.floats(0, 0.5))
def test_closed_weights_land_on_their_level(grid, seed, within):
    """Staggered, weights within the threshold land on the very bits that Grid.snap gives."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(3, 1, generator=generator, dtype=torch.float64)
    x = torch.rand(3, 40, generator=generator, dtype=torch.float64) * (grid.last + 0.8) - 0.4
    weight = (grid.first + grid.step * x) * scale
    weight[0, :5] = grid.snap(weight[0, :5].reshape(1, -1), scale[:1])
    bounds = interval(grid, eps=1.0, pull=0.5, clip=0.1, within=within)
    landed = constrain(weight, weight + 0.01, scale, bounds, closing="staggered")
    snapped = grid.snap(weight, scale)
    distance = ((weight - snapped) / (scale * grid.step)).abs()
    closed = distance < within - 1e-9
    closed[0, :5] = True
    assert torch.equal(landed[closed], snapped[closed])
    open_ = (distance > within + 1e-9) & (weight != snapped)
    assert (landed[open_] != snapped[open_]).all()


# --- beside torch's optimizers -----------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize(
    "closing", [FREE, Closing("staggered", start=0.5)], ids=["eps 1", "not yet closing"]
)
def test_without_a_constraint_it_is_torchs_optimizer_in_float64(base, closing):
    """With eps = 1 inside the grid 20 steps agree with torch's to 1e-12."""
    plain, twin = wide()
    torchs, askew = TORCHS[base](plain.parameters()), OPTIMIZERS[base](twin, closing=closing)
    for t in range(20):
        give_gradients([plain, twin], t)
        torchs.step()
        askew.anneal(t / 100)
        askew.step()
    for expected, parameter in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(plain[2].weight, wide()[0][2].weight)


@every_optimizer
def test_without_a_constraint_it_is_torchs_optimizer_in_float32(base):
    """In float32 a step is within a few units in the last place of torch's."""
    plain, twin = wide(torch.float32)
    torchs, askew = TORCHS[base](plain.parameters()), OPTIMIZERS[base](twin, closing=FREE)
    for t in range(10):
        before = [parameter.detach().clone() for parameter in plain.parameters()]
        give_gradients([plain, twin], t)
        torchs.step()
        askew.anneal(t / 10)
        askew.step()
        for old, expected, parameter in zip(
            before, plain.parameters(), twin.parameters(), strict=True
        ):
            largest = torch.maximum(old.abs(), expected.detach().abs())
            ulps = (parameter - expected).abs() / (largest * torch.finfo(torch.float32).eps)
            assert ulps.max() <= 8, f"step {t}: {ulps.max():.1f} units in the last place"
            parameter.data.copy_(expected)  # so that every step starts from the same weights
        for expected, state in zip(
            (torchs.state[p] for p in plain.parameters()),
            (askew.state[p] for p in twin.parameters()),
            strict=True,
        ):
            for name, value in expected.items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


@every_optimizer
@every_closing
def test_other_parameters_are_torchs_bit_for_bit(base, closing):
    """Parameters without a grid are updated by torch's own step, to the bit."""
    plain, twin = network(dtype=torch.float32)
    torchs, askew = TORCHS[base](plain.parameters()), OPTIMIZERS[base](twin, closing=closing)
    for t in range(10):
        give_gradients([plain, twin], t)
        torchs.step()
        askew.anneal(t / 10)
        askew.step()
    for (name, expected), parameter in zip(
        plain.named_parameters(), twin.parameters(), strict=True
    ):
        if name not in ("2.weight", "4.weight"):
            assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_cross_the_middle_freely_at_eps_one(dtype):
    """With eps = 1 small updates carry a weight over half-way as torch's do, without sticking."""
    layer = nn.Linear(400, 2, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.498, 0.502, 400).expand(2, 400))
    quantize_layer_(layer, make_grid(2, "integer"), torch.ones(1, 1, dtype=dtype))
    plain = nn.Parameter(layer.weight.detach().clone())
    torchs, askew = torch.optim.SGD([plain], lr=1.0), AskewSGD(layer, lr=1.0, closing=FREE)
    gradient = torch.tensor([[1e-5], [-1e-5]], dtype=dtype).expand(2, 400)
    for _ in range(200):
        plain.grad, layer.weight.grad = gradient.clone(), gradient.clone()
        torchs.step()
        askew.step()
    torch.testing.assert_close(layer.weight.detach(), plain.detach(), rtol=1e-6, atol=1e-6)


@every_optimizer
@every_closing
def test_state_is_exactly_torchs(base, closing):
    """The state holds the tensors that torch's optimizer holds and no copy of the weights."""
    plain, twin = network(dtype=torch.float32)
    torchs, askew = TORCHS[base](plain.parameters()), OPTIMIZERS[base](twin, closing=closing)
    for t in range(3):
        give_gradients([plain, twin], t)
        torchs.step()
        askew.anneal(t / 3)
        askew.step()

    def layout(optimizer: torch.optim.Optimizer) -> dict:
        return {
            key: {
                name: (tuple(value.shape), value.dtype) if torch.is_tensor(value) else value
                for name, value in state.items()
            }
            for key, state in optimizer.state_dict()["state"].items()
        }

    assert layout(askew) == layout(torchs)
    own = [value for name, value in vars(askew).items() if name not in ("state", "param_groups")]
    assert not any(torch.is_tensor(value) for value in own)


@every_optimizer
def test_groups_hold_numbers_strings_and_tensors_only(base):
    """What Accelerate has to reload from the state dict is plain."""
    _, twin = network()
    optimizer = OPTIMIZERS[base](twin)
    for group in optimizer.state_dict()["param_groups"]:
        for name, value in group.items():
            plain = value if isinstance(value, list | tuple) else [value]
            assert all(isinstance(v, int | float | str | bool | None) for v in plain), name


def test_a_reloaded_optimizer_shows_what_the_saved_one_did():
    """Under lazy closing the interval is as it was left, before `anneal` is called."""
    _, model = network(dtype=torch.float32)
    optimizer = AskewSGD(model, lr=0.1, closing=LAZY)
    optimizer.anneal(0.6)
    _, other = network(dtype=torch.float32)
    other.load_state_dict(model.state_dict())
    AskewSGD(other, lr=0.1, closing=LAZY).load_state_dict(optimizer.state_dict())
    assert torch.equal(other[2].weight, model[2].weight)
    assert not torch.equal(other[2].weight, other[2].latent)


@every_optimizer
@every_closing
def test_a_reloaded_optimizer_continues_identically(base, closing):
    """Saved and loaded with weights_only, the optimizer makes the same bits as without a break."""
    _, model = network(dtype=torch.float32)
    optimizer = OPTIMIZERS[base](model, closing=closing)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for t in steps:
            give_gradients([model], t)
            optimizer.anneal(t / 20)
            optimizer.step()

    train(model, optimizer, range(8))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    _, resumed = network(dtype=torch.float32)
    resumed.load_state_dict(saved["model"])
    reloaded = OPTIMIZERS[base](resumed, closing=closing)
    reloaded.load_state_dict(saved["optimizer"])
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(resumed.eval()(images), model.eval()(images))  # before `anneal` is called
    for a, b in ((model, optimizer), (resumed, reloaded)):
        train(a, b, range(8, 16))
    for (name, expected), parameter in zip(
        model.named_parameters(), resumed.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name
    assert any(closed.any() for closed in on_level(model)) == (closing is STAGGERED)


def test_many_settings_in_one_process(monkeypatch):
    """Shapes, precisions and group sizes are variants of a few kernels, and no variant too many."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    kernels._compile.cache_clear()
    x, y = torch.randn(8, 8), torch.randint(0, 3, (8,))
    for size, bf16 in itertools.product(("channel", "tensor"), (False, True)):
        layers = itertools.starmap(nn.Linear, itertools.pairwise((8, 64, 64, 128, 1, 32, 3)))
        model = nn.Sequential(*layers)
        quantize(model, 2, include=["*"], group_size=size)
        optimizer = AskewSGD(model, 0.01, momentum=0.9, compile=True)
        for t in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.anneal(t / 2)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.feasible_share()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(x)
    kernels._compile.cache_clear()


def test_parameter_groups_have_their_own_settings():
    """Weights in a group with its own lr and weight decay are updated with them."""
    plain, twin = wide()

    def groups(model: nn.Module) -> list[dict]:
        norms = list(model[1].parameters())
        others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
        return [
            {"params": norms, "weight_decay": 0.0},
            {"params": others, "weight_decay": 0.2, "lr": 0.03},
        ]

    torchs = torch.optim.SGD(groups(plain), lr=0.01, momentum=0.5)
    askew = AskewSGD(twin, lr=0.01, momentum=0.5, params=groups(twin), closing=FREE)
    for t in range(5):
        give_gradients([plain, twin], t)
        torchs.step()
        askew.anneal(0.1)
        askew.step()
    for expected, parameter in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)


def test_a_group_added_later_is_trained():
    """add_param_group works as with torch's optimizers, for gradual unfreezing."""
    _, twin = network()
    late = twin[4]
    early = [p for p in twin.parameters() if p is not late.weight]
    optimizer = AskewSGD(twin, lr=0.1, params=early, closing=SINGLE)
    optimizer.add_param_group({"params": [late.weight], "lr": 0.2})
    before = late.weight.detach().clone()
    give_gradients([twin], 0)
    optimizer.anneal(0.5)
    optimizer.step()
    assert not torch.equal(late.weight, before)


def test_only_the_given_parameters_are_trained():
    """Parameters that are not in `params` stay as they are."""
    _, twin = network()
    params = [twin[2].weight, twin[4].bias]
    optimizer = AskewSGD(twin, lr=0.1, params=params)
    before = [p.detach().clone() for p in twin.parameters()]
    give_gradients([twin], 0)
    optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(twin.parameters(), before, strict=True)]
    names = [name for name, _ in twin.named_parameters()]
    assert [n for n, c in zip(names, changed, strict=True) if c] == ["2.weight", "4.bias"]


@pytest.mark.parametrize("closing", [STAGGERED, SINGLE], ids=["staggered", "single"])
def test_frozen_weights_are_on_their_levels(closing):
    """No step closes them, so they do not wait for the snap, which would change the outputs."""
    _, twin = network()
    twin[2].weight.requires_grad_(False)
    expected = twin[2].grid.values(twin[2].codes(), twin[2].weight_scale)
    AskewSGD(twin, lr=0.1, closing=closing)
    assert torch.equal(twin[2].weight, expected)
    assert not torch.equal(
        twin[4].weight, twin[4].grid.values(twin[4].codes(), twin[4].weight_scale)
    )


@pytest.mark.parametrize("how", ["frozen later", "not among the params", "not used"])
@every_closing
def test_weights_that_no_update_reaches_are_on_their_levels_at_the_end(closing, how):
    """As those that are trained: from the end of the closing on the forward pass sees levels."""
    _, twin = network()
    late = twin[2].weight
    others = [p for p in twin.parameters() if p is not late]
    optimizer = AskewSGD(twin, 0.1, closing=closing, params=others if how[:3] == "not" else None)
    if how == "not used":
        optimizer.add_param_group({"params": [late]})
    before, expected = (
        late.detach().clone(),
        twin[2].grid.values(twin[2].codes(), twin[2].weight_scale),
    )
    late.requires_grad_(how != "frozen later")
    for progress in (0.5, 0.8, closing.end):
        assert torch.equal(late, before)
        give_gradients([twin], 0)
        late.grad = None
        optimizer.anneal(progress)
        optimizer.step()
    assert torch.equal(late, expected)


@pytest.mark.parametrize("closing", [LAZY, STAGGERED, SINGLE], ids=lambda c: c.kind)
def test_a_layer_that_was_frozen_at_first(closing):
    """Staggered closing has put it on its levels for good, and says so; the others train it."""
    _, twin = network()
    twin[2].requires_grad_(False)
    optimizer = AskewSGD(twin, lr=0.1, closing=closing)
    twin[2].requires_grad_(True)
    before = twin[2].latent.detach().clone()
    give_gradients([twin], 0)
    optimizer.anneal(0.5)
    if closing is STAGGERED:
        with pytest.raises(ModelError, match="was frozen when the optimizer was made"):
            optimizer.step()
    else:
        optimizer.step()
        assert not torch.equal(twin[2].latent, before)


@pytest.mark.parametrize("option", ["maximize", "dampening", "amsgrad"])
def test_what_only_torchs_step_would_do_is_refused(option):
    """An option that held for the rest of the network, and not for its quantized weights."""
    _, twin = network()
    groups = [{"params": list(twin.parameters()), option: True}]
    with pytest.raises(RecipeError, match=f"{option} = True"):
        AskewSGD(twin, 0.1, params=groups)
    optimizer = AskewAdamW(twin, params=list(twin[2].parameters()))
    with pytest.raises(RecipeError, match=f"{option} = True"):
        optimizer.add_param_group({"params": list(twin[4].parameters()), option: True})


@pytest.mark.parametrize("level_lr", [None, 0.01])
def test_a_layer_that_is_unfrozen_later_trains(level_lr):
    """As with torch's optimizers, which have every parameter from the start."""
    _, twin = network()
    twin[2].requires_grad_(False)
    frozen = [parameter for parameter in twin.parameters() if not parameter.requires_grad]
    assert twin[2].latent in {*frozen}
    optimizer = AskewAdamW(twin, lr=0.1, level_lr=level_lr)
    before = [parameter.clone() for parameter in frozen]
    for unfrozen in (False, True):
        give_gradients([twin], 0)
        twin[2].requires_grad_(unfrozen)
        for parameter in frozen:
            parameter.grad = parameter.grad if unfrozen else None
        optimizer.anneal(0.5)
        optimizer.step()
        moved = [not torch.equal(now, then) for now, then in zip(frozen, before, strict=True)]
        assert moved == [unfrozen] * len(frozen)


def test_the_state_of_an_older_torch_is_taken():
    """Before 2.7 AdamW's groups had no decoupled_weight_decay; torch's own loading fills it in."""
    _, twin = network()
    optimizer = AskewAdamW(twin, lr=0.1)
    optimizer.anneal(0.25)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("decoupled_weight_decay", None)
    _, other = network()
    again = AskewAdamW(other, lr=0.3)
    again.load_state_dict(state)
    assert (again.param_groups[0]["lr"], again.param_groups[0]["progress"]) == (0.1, 0.25)
    give_gradients([other], 0)
    again.step()


def test_the_state_of_another_optimizer_is_refused():
    """Torch's has no progress, by which the intervals would be set."""
    _, twin = network()
    state = torch.optim.SGD(twin.parameters(), 0.1).state_dict()
    with pytest.raises(RecipeError, match="not that of AskewSGD"):
        AskewSGD(twin, 0.1).load_state_dict(state)


@every_optimizer
@pytest.mark.parametrize(
    ("saved", "loading", "named"),
    [
        ({"closing": STAGGERED}, {"closing": LAZY}, r"closing = Closing\('staggered'.*build it"),
        ({"closing": Closing("lazy", end=0.8)}, {}, r"end=0\.8.* and this one has .*end=0\.9"),
        ({"closing": Closing("staggered", every=5)}, {"closing": STAGGERED}, r"every=5\)"),
        ({"closing": SINGLE, "pull": "coupled"}, {"closing": SINGLE}, "pull = coupled"),
        ({"closing": SINGLE, "alpha": 0.25}, {"closing": SINGLE}, r"alpha = 0\.25"),
    ],
)
def test_a_state_from_other_intervals_is_refused(base, saved, loading, named):
    """Without a word the run would go on with other intervals than it began with."""
    _, twin = network()
    state = OPTIMIZERS[base](twin, **saved).state_dict()
    _, other = network()
    optimizer = OPTIMIZERS[base](other, **loading)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RecipeError, match=named):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


def test_a_default_that_is_spelled_out_is_the_same_closing():
    """The state says values, not how they were given."""
    _, twin = network()
    spelled = Closing("staggered", start=0, end=0.9, power=3, every=3)
    state = AskewSGD(twin, 0.1, closing=spelled, alpha=0.5).state_dict()
    _, other = network()
    AskewSGD(other, 0.1, closing=Closing("staggered")).load_state_dict(state)


@every_optimizer
@pytest.mark.parametrize("closing", [LAZY, STAGGERED, SINGLE], ids=lambda c: c.kind)
def test_a_copy_goes_on_as_the_original(base, closing):
    """Copied or pickled together, model and optimizer make the same steps, each its own."""
    _, twin = network()
    optimizer = OPTIMIZERS[base](twin, closing=closing)
    give_gradients([twin], 0)
    optimizer.step()
    pairs = [(twin, optimizer), copy.deepcopy((twin, optimizer))]
    pairs.append(pickle.loads(pickle.dumps(pairs[0])))  # our own bytes
    give_gradients([model for model, _ in pairs], 1)
    for _, each in pairs:
        each.anneal(0.5)
        each.step()
    weights = [[*model.parameters()] for model, _ in pairs]
    for one, two, three in zip(*weights, strict=True):
        assert one is not two
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@every_optimizer
def test_weights_without_a_gradient_are_left_alone(base):
    """A step moves neither a quantized weight without gradient nor its state."""
    _, twin = network()
    optimizer = OPTIMIZERS[base](twin, closing=SINGLE)
    give_gradients([twin], 0)
    optimizer.step()
    weight, state = twin[2].weight.detach().clone(), copy.deepcopy(optimizer.state[twin[2].weight])
    give_gradients([twin], 1)
    twin[2].weight.grad = None
    optimizer.anneal(0.5)
    optimizer.step()
    assert torch.equal(twin[2].weight, weight)
    assert all(
        value is state[name] or torch.equal(value, state[name])
        for name, value in optimizer.state[twin[2].weight].items()
    )


def test_gradients_are_still_there_after_the_step():
    """The step leaves every gradient, the quantized weights' too, for the caller to use."""
    _, twin = network()
    optimizer = AskewSGD(twin, lr=0.1, momentum=0.9)
    give_gradients([twin], 0)
    before = [p.grad.clone() for p in twin.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(twin.parameters(), before, strict=True))


def test_a_closure_is_called_once_with_gradients_enabled():
    """`step(closure)` evaluates the closure before the update and returns its loss."""
    layer = spread(nn.Linear(6, 4), make_grid(2, "integer"))
    optimizer = AskewSGD(layer, lr=0.1, closing=FREE)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        loss = layer(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    before = layer.weight.detach().clone()
    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() > 0
    assert not torch.equal(layer.weight, before)


def test_step_hooks_run_once():
    """Hooks run once a step, also after a torch optimizer of the same kind was built."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    _, twin = network()
    optimizer = AskewSGD(twin, lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    give_gradients([twin], 0)
    optimizer.step()
    assert calls == ["pre", "post"]


def test_a_torch_scheduler_drives_the_lr():
    """The schedulers of torch find the optimizer and its learning rate where they expect them."""
    layer = spread(nn.Linear(6, 4), make_grid(2, "integer"))
    optimizer = AskewSGD(layer, lr=0.4, closing=FREE)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for expected in (0.4, 0.2, 0.1):
        assert optimizer.param_groups[0]["lr"] == expected
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("base", ["momentum", "AdamW"])
@every_closing
def test_channels_last_weights_are_updated_as_contiguous_ones(base, closing):
    """The memory format changes neither the weights nor the way they are stored."""
    models = copies(
        nn.Sequential(spread(nn.Conv2d(4, 6, 3), make_grid(2, "integer"), 9), nn.Conv2d(6, 2, 1)), 2
    )
    models[1].to(memory_format=torch.channels_last)
    optimizers = [OPTIMIZERS[base](model, closing=closing) for model in models]
    for t in range(6):
        give_gradients(models, t)
        models[1][0].weight.grad = models[1][0].weight.grad.to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.anneal(t / 6)
            optimizer.step()
    assert models[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not models[1][0].weight.is_contiguous()
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert torch.equal(models[0][1].weight, models[1][1].weight)


# --- the theorem -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("pull", ["coupled", "decoupled"])
@pytest.mark.parametrize("grid", [make_grid(1), make_grid(3, "half-integer")], ids=grid_name)
def test_it_converges_to_a_kkt_point(grid, pull, noise):
    """Theorem 1: with eps fixed and decreasing steps the limit is feasible and a KKT point."""
    radius = 0.15
    closing = Closing("single", start=0.0, end=1.0, power=1.0, final_radius=radius)
    layer = spread(nn.Linear(12, 3, bias=False, dtype=torch.float64), grid, "tensor", margin=0.6)
    unit = layer.weight_scale.item() * grid.step
    mixing = 0.3 * random_tensor(5, 36, 36) / 36
    hessian = torch.eye(36, dtype=torch.float64) + mixing @ mixing.T
    goal = torch.rand(36, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    near = nearest(grid.coordinate(layer.weight.detach(), layer.weight_scale), grid.last).flatten()
    goal[::2] = near[::2] + 0.1 * (goal[::2] - 0.5)  # every other minimum lies in an interval
    goal[1::2] = goal[1::2] * (grid.last + 2) - 1
    target = layer.weight_scale.item() * (grid.first + grid.step * goal)

    def gradient() -> torch.Tensor:
        return hessian @ (layer.weight.detach().flatten() - target)

    optimizer = AskewSGD(layer, lr=0.3, closing=closing, alpha=0.5, clip=1.0, pull=pull)
    optimizer.anneal(1.0)
    disturbance = noise * unit * random_tensor(9, 2500, 36)
    for k in range(2500):
        optimizer.param_groups[0]["lr"] = 0.3 / (1 + k / 20) ** 0.9
        layer.weight.grad = (gradient() + disturbance[k]).reshape(3, 12)
        optimizer.step()

    x = grid.coordinate(layer.weight.detach(), layer.weight_scale).flatten()
    psi, slope = slack(x, grid.last, closing.eps(1.0))
    tolerance = 0.01 if noise == 0 else 0.03
    to_border = psi / slope.abs().clamp_min(1e-3)  # first order, in level spacings
    grad = gradient() / unit
    assert (to_border > -tolerance).all(), "every weight is in its interval"
    inside = to_border > tolerance
    border = ~inside
    assert inside.any(), "the problem must have weights of both kinds"
    assert border.any()
    assert (grad[inside].abs() < tolerance).all(), "the gradient vanishes inside"
    assert (grad[border] * slope[border].sign() > -tolerance).all(), "and points inward on it"
    assert (grad[border].abs() > 0.1).any()


# --- staggered closing -------------------------------------------------------------------------


def distances(layer: nn.Module) -> torch.Tensor:
    """Return every weight's distance to its nearest level, in spacings."""
    x = layer.grid.coordinate(layer.weight.detach(), layer.weight_scale)
    levels = torch.arange(layer.grid.size, dtype=x.dtype)
    return (x.unsqueeze(-1) - levels).abs().amin(-1)


@pytest.mark.parametrize("base", ["momentum", "AdamW"])
@pytest.mark.parametrize("group_size", ["tensor", "channel", 5])
@pytest.mark.parametrize(
    "grid", [make_grid(1), make_grid(2, "integer"), make_grid(4, "half-integer")]
)
def test_the_nearest_weights_are_closed_and_stay(grid, group_size, base):
    """The target share closes, the nearest first, at most a bin more; closed weights never move."""
    layer = spread(nn.Linear(40, 25, bias=False, dtype=torch.float64), grid, group_size)
    closing = Closing("staggered", start=0.1, end=0.9, power=2.0, every=2)
    optimizer = OPTIMIZERS[base](layer, closing=closing)
    count = layer.weight.numel()
    held = torch.zeros(25, 40, dtype=torch.bool)
    seen = set()
    for t in range(40):
        layer.weight.grad = random_tensor(t, 25, 40)
        before, distance = layer.weight.detach().clone(), distances(layer)
        optimizer.anneal(t / 40)
        optimizer.step()
        (closed,) = on_level(layer)
        assert torch.equal(layer.weight[held], before[held]), "a closed weight moved"
        assert (closed | ~held).all()
        target = int(closing.closed_share(t / 40) * count)
        if closing.closed_share(t / 40) == 0 or (t % 2 and target < count):
            assert torch.equal(closed, held), "weights closed out of turn"
        else:
            assert closed.sum() >= target
            edge = distance[closed].max()
            assert (distance[~closed] >= edge).all(), "an open weight was nearer"
            one_bin_less = (distance <= edge - 1 / (2 * DISTANCE_BINS)).sum()
            assert one_bin_less < max(target, 1), "more than a bin too many"
        held = closed
        seen.add(int(closed.sum()))
    assert held.all()
    assert optimizer.feasible_share() == 1
    assert len(seen) > 10


@every_optimizer
@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_everything_is_closed_at_the_end(grid, base):
    """At share 1 every weight is exactly on a level, however far away, and whatever the turn."""
    layer = spread(nn.Linear(30, 5), grid, margin=3.0)
    optimizer = OPTIMIZERS[base](layer, closing=Closing("staggered", end=0.9, every=3))
    for t, progress in enumerate((0.0, 0.9, 1.0)):  # the second step is not a turn to close
        layer.weight.grad = random_tensor(t, 5, 30, dtype=torch.float32)
        expected = grid.snap(layer.weight.detach(), layer.weight_scale)
        optimizer.anneal(progress)
        optimizer.step()
        assert torch.equal(layer.weight, expected) == (progress > 0)


@pytest.mark.parametrize("outside", [0.3, 0.6, 3.0])
def test_weights_far_outside_the_grid_are_closed_in_their_turn(outside):
    """The closed share reaches its target also where many weights lie beyond the last level."""
    layer = spread(
        nn.Linear(50, 4, bias=False, dtype=torch.float64), make_grid(2, "integer"), "tensor"
    )
    with torch.no_grad():
        beyond = 1 + outside + 0.1 * torch.rand(4, 40, dtype=torch.float64)
        layer.weight[:, 10:] = layer.weight_scale * beyond
    optimizer = AskewSGD(layer, lr=0.0, closing=Closing("staggered", start=0.0, end=1.0, power=1.0))
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.anneal(0.6)
    optimizer.step()
    assert on_level(layer)[0].double().mean() >= 0.6


def test_groups_of_zeros_are_not_counted():
    """They have no distances, and close nothing of the others before its turn."""
    layer = nn.Linear(64, 32, bias=False)
    layer.weight.data[:16] = 0
    quantize(layer, 2, include=["*"], group_size=16)
    optimizer = AskewSGD(
        layer, lr=1e-3, closing=Closing("staggered", start=0.0, end=1.0, power=1.0)
    )
    for _ in range(2):
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.anneal(0.4)
        optimizer.step()
    live = slice(16, None)
    closed = layer.weight[live] == layer.grid.snap(
        layer.weight[live].reshape(-1, 16), layer.weight_scale[live].reshape(-1, 1)
    ).view(16, 64)
    assert closed.double().mean().item() == pytest.approx(0.4, abs=0.02)
    optimizer.anneal(1.0)
    optimizer.step()
    assert layer.weight[:16].abs().max() < 1e-25


def test_layers_are_closed_separately():
    """Every layer closes its own share, whatever the distances in the others are."""
    model = nn.Sequential(
        spread(nn.Linear(50, 8, dtype=torch.float64), make_grid(2, "integer")),
        spread(nn.Linear(8, 30, dtype=torch.float64), make_grid(2, "integer"), seed=1),
    )
    with torch.no_grad():  # the second layer's weights are all nearer to their levels
        layer = model[1]
        snapped = layer.grid.snap(layer.weight, layer.weight_scale)
        layer.weight.copy_(snapped + 0.01 * (layer.weight - snapped))
    optimizer = AskewSGD(model, lr=0.0, closing=Closing("staggered", start=0.0, end=1.0, power=1.0))
    give_gradients([model], 0)
    optimizer.anneal(0.5)
    optimizer.step()
    first, second = (closed.double().mean().item() for closed in on_level(model))
    assert first == pytest.approx(0.5, abs=0.02)
    assert 0.5 <= second < 0.6


def test_single_closing_holds_no_weight():
    """In the paper's form even a weight exactly on a level follows its update."""
    layer = spread(nn.Linear(6, 4, dtype=torch.float64), make_grid(2, "integer"))
    with torch.no_grad():
        layer.weight.copy_(layer.grid.snap(layer.weight, layer.weight_scale))
    before = layer.weight.detach().clone()
    optimizer = AskewSGD(layer, lr=1e-3, closing=SINGLE)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.anneal(1.0)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 1e-3, rtol=0, atol=1e-12)


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.3, 0.5])
def test_feasible_share_counts_the_weights_in_their_intervals(radius):
    """For the paper's closing it is the share within the radius, or a quarter root outside."""
    closing = Closing("single", start=0.0, end=1.0, final_radius=radius)
    layer = spread(nn.Linear(40, 20, dtype=torch.float64), make_grid(2, "integer"), margin=0.9)
    optimizer = AskewSGD(layer, lr=0.1, closing=closing)
    optimizer.anneal(1.0)
    x = layer.grid.coordinate(layer.weight.detach(), layer.weight_scale)
    eps = closing.eps(1.0)
    outside = (x < 0) | (x > layer.grid.last)
    reach = torch.where(outside, math.sqrt(eps) / 4, radius_of(eps))
    expected = (distances(layer) <= reach).double().mean().item()
    assert optimizer.feasible_share() == pytest.approx(expected)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AskewSGD, AskewAdamW])
@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"alpha": 0.0}, "alpha = 0.0 and clip = 0.1 must both be above 0"),
        ({"alpha": -1.0}, "alpha = -1.0 and clip"),
        ({"alpha": math.nan}, "alpha = nan"),
        ({"clip": 0.0}, "alpha = 0.5 and clip = 0.0 must both be above 0"),
        ({"clip": math.nan}, "clip = nan"),
        ({"pull": "strong"}, "pull = 'strong' is unknown; use 'decoupled' or 'coupled'"),
        ({"alpha": 1.5}, "alpha = 1.5 is a share of a Newton step toward the interval, at most 1"),
        ({"alpha": 1.5}, "the paper's alpha, times lr, goes with pull = 'coupled'"),
    ],
)
def test_settings_that_do_not_exist(kind, settings, fragment):
    """The error says what was given, what is allowed and what to do."""
    _, twin = network()
    with pytest.raises(RecipeError) as error:
        kind(twin, lr=0.1, closing=STAGGERED, **settings)
    assert fragment in str(error.value)


@pytest.mark.parametrize("kind", [AskewSGD, AskewAdamW])
def test_coupled_takes_the_papers_alpha(kind):
    """With the pull coupled to the learning rate alpha may be above 1, as in the paper."""
    _, twin = network()
    kind(twin, lr=0.1, closing=STAGGERED, alpha=4.0, pull="coupled")


@pytest.mark.parametrize("kind", [AskewSGD, AskewAdamW])
@pytest.mark.parametrize(
    ("given", "alpha", "clip"),
    [
        ({}, 0.5, 0.1),
        ({"pull": "coupled"}, 5.0, 5.0),
        ({"pull": "coupled", "clip": 2.0}, 5.0, 2.0),
        ({"alpha": 0.3}, 0.3, 0.1),
    ],
)
def test_an_open_strength_is_that_of_its_pull(kind, given, alpha, clip):
    """A coupled pull is multiplied by lr, and so is stronger where nothing is said."""
    _, twin = network()
    (group,) = kind(twin, lr=0.1, closing=STAGGERED, **given).param_groups
    assert (group["alpha"], group["clip"]) == (alpha, clip)


@pytest.mark.parametrize("kind", [AskewSGD, AskewAdamW])
def test_a_model_without_quantized_layers_is_refused(kind):
    """The error says which call is missing."""
    with pytest.raises(ModelError) as error:
        kind(nn.Linear(4, 4), lr=0.1)
    assert "the model has no quantized layer; call askewq.quantize(model, bits=2)" in str(
        error.value
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_below_float32_are_refused(dtype):
    """A model cast down after quantizing is an error at the first step."""
    _, twin = network(dtype=torch.float32)
    optimizer = AskewSGD(twin, lr=0.1)
    twin.to(dtype)
    give_gradients([twin], 0)
    with pytest.raises(ModelError) as error:
        optimizer.step()
    assert f"a quantized weight became {dtype}; keep the model in float32" in str(error.value)


@every_closing
def test_a_weight_that_became_nan_is_named(closing):
    """A diverged weight ends in our own error at the snap; the step goes on."""
    _, twin = network()
    optimizer = AskewSGD(twin, lr=0.1, closing=closing)
    with torch.no_grad():
        twin[2].weight[0, 0, 0, 0] = torch.nan
    give_gradients([twin], 0)
    optimizer.anneal(0.5)
    optimizer.step()
    with pytest.raises(DivergenceError, match="a weight of shape"):
        twin[2].codes()


# --- compiled ----------------------------------------------------------------------------------


def layers_of_many_shapes() -> nn.Module:
    """Return conv, linear, one-row and grouped layers, quantized."""
    return nn.ModuleList(
        [
            spread(nn.Conv2d(6, 10, 3), make_grid(2, "integer"), seed=1),
            spread(nn.Linear(30, 20), make_grid(2, "integer"), seed=2),
            spread(nn.Linear(16, 8), make_grid("ternary"), "tensor", seed=3),
            spread(nn.Conv2d(4, 6, 3), make_grid(4), 9, seed=4).to(
                memory_format=torch.channels_last
            ),
        ]
    )


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize(
    ("base", "closing"),
    [
        *[("nesterov", STAGGERED), ("SGD", SINGLE), ("AdamW", SINGLE), ("AdamW", STAGGERED)],
        *[("nesterov", LAZY), ("in levels", LAZY), ("in levels", STAGGERED)],
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_the_compiled_step_is_the_eager_step(base, closing):
    """Compiled and eager steps give the same weights and state, up to the order of rounding."""
    models = copies(layers_of_many_shapes(), 2)
    optimizers = [
        (OPTIMIZERS | IN_LEVELS)[base](model, closing=closing, compile=compiled)
        for model, compiled in zip(models, (False, True), strict=True)
    ]
    for t in range(5):
        give_gradients(models, t)
        for optimizer in optimizers:
            optimizer.anneal(t / 4)
            optimizer.step()
        for eager, compiled in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(compiled.detach(), eager.detach(), rtol=1e-5, atol=1e-6)
            states = [o.state[p] for o, p in zip(optimizers, (eager, compiled), strict=True)]
            torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-6)
            compiled.data.copy_(eager.data)  # so that no rounding moves a weight over a threshold
    shares = [optimizer.feasible_share() for optimizer in optimizers]
    assert shares[0] == shares[1]
    assert (shares[0] == 1) == (closing is not SINGLE)
    assert kernels.can_compile("cpu"), "this test needs a compiler, or it compares nothing"


def test_without_a_compiler_the_step_runs_eagerly_and_says_so_once(monkeypatch):
    """When torch.compile fails there is one warning, and the weights are the eager ones."""

    def no_compiler(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler")

    kernels.can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(optim, "COMPILE_FROM", 1)
    models = copies(layers_of_many_shapes(), 3)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizers = [
                AskewSGD(models[0], lr=0.1, closing=STAGGERED, compile=False),
                AskewSGD(models[1], lr=0.1, closing=STAGGERED, compile=True),
                AskewSGD(models[2], lr=0.1, closing=STAGGERED),  # many weights: compiled by default
            ]
            for t in range(4):
                give_gradients(models, t)
                for optimizer in optimizers:
                    optimizer.anneal(t / 4)
                    optimizer.step()
    finally:
        kernels.can_compile.cache_clear()
    assert [str(warning.message) for warning in caught] == [
        "torch.compile does not work here (RuntimeError), so the constrained step runs eagerly: "
        "the same but for rounding, several times slower. A C++ compiler (CPU) or Triton (CUDA) "
        "makes it one pass over memory."
    ]
    for eager, *others in zip(*(model.parameters() for model in models), strict=True):
        assert all(torch.equal(eager, other) for other in others)


def test_small_models_are_not_compiled(monkeypatch):
    """Below the threshold compiling costs more than it saves, so it is not tried."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled a small model"))
    model = layers_of_many_shapes()
    optimizer = AskewSGD(model, lr=0.1, closing=STAGGERED)
    give_gradients([model], 0)
    optimizer.anneal(0.5)
    optimizer.step()
    assert sum(layer.weight.numel() for layer in model) < optim.COMPILE_FROM


# --- lazy closing ------------------------------------------------------------------------------

BASES = {
    "sgd": (AskewSGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adamw": (AskewAdamW, torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("base", BASES)
def test_a_lazy_step_is_torchs_within_the_range_of_the_grid(base):
    """Weights move as torch moves them, whatever the radius, and stop at the outermost levels."""
    make, plain, settings = BASES[base]
    grid = make_grid(2, "integer")
    layer = spread(nn.Linear(40, 25, bias=False, dtype=torch.float64), grid)
    optimizer = make(layer, closing=LAZY, **settings)
    scale = layer.weight_scale
    low, high = grid.first * scale, (grid.first + grid.last * grid.step) * scale
    twin = nn.Parameter(layer.latent.detach().clone())
    assert bool(((twin >= low) & (twin <= high)).all()), "the start is within the range, too"
    other = plain([twin], **settings)
    for t in range(12):
        layer.latent.grad = random_tensor(t, 25, 40)
        twin.grad = layer.latent.grad.clone()
        optimizer.anneal(t / 12)
        optimizer.step()
        other.step()
        with torch.no_grad():
            twin.copy_(twin.clamp(low, high))
        torch.testing.assert_close(layer.latent.detach(), twin.detach())
    assert bool((twin == low).any())
    assert bool((twin == high).any())


def test_the_forward_pass_of_a_lazy_layer_sees_its_intervals():
    """What is seen lies in the constraint set of this progress, and on the levels after the end."""
    layer = spread(nn.Linear(40, 25, bias=False, dtype=torch.float64), make_grid(2, "integer"))
    optimizer = AskewSGD(layer, lr=0.1, closing=LAZY)
    latent = layer.latent.detach().clone()
    assert torch.equal(layer.weight, latent), "a radius of a half leaves weights in range free"
    assert optimizer.feasible_share() < 1
    for progress in (0.1, 0.4, 0.8):
        optimizer.anneal(progress)
        x = layer.grid.coordinate(layer.weight.detach(), layer.weight_scale)
        away = (x - x.round()).abs().max().item()
        assert away == pytest.approx(LAZY.radius(progress), rel=1e-6)
    optimizer.anneal(0.9)
    assert torch.equal(layer.weight, layer.grid.snap(latent, layer.weight_scale))
    assert torch.equal(layer.latent, latent)
    assert optimizer.feasible_share() == 1
    layer(torch.ones(1, 40, dtype=torch.float64)).sum().backward()
    assert torch.equal(layer.latent.grad, torch.ones_like(latent)), "straight through"


def test_building_an_optimizer_decides_how_the_weights_are_seen():
    """A later optimizer with another closing takes the lazy view off again."""
    layer = spread(nn.Linear(40, 25, bias=False, dtype=torch.float64), make_grid(2, "integer"))
    AskewSGD(layer, lr=0.1, closing=LAZY).anneal(1.0)
    assert not torch.equal(layer.weight, layer.latent)
    AskewSGD(layer, lr=0.1, closing=STAGGERED)
    assert layer.weight is layer.latent


@pytest.mark.parametrize("grid", [make_grid(1), make_grid("ternary"), make_grid(2, "integer")])
def test_level_lr_is_adamw_on_the_weights_in_level_spacings(grid):
    """With level_lr the weights over their spacing move as torch's AdamW moves them."""
    layer = spread(nn.Linear(40, 25, bias=True, dtype=torch.float64), grid, "channel")
    common = {"betas": (0.9, 0.99), "eps": 1e-30, "weight_decay": 0.1}
    optimizer = AskewAdamW(layer, lr=0.5, level_lr=0.01, closing=LAZY, **common)
    unit = layer.weight_scale * grid.step
    twin = nn.Parameter((layer.latent / unit).detach().clone())
    bias = nn.Parameter(layer.bias.detach().clone())
    groups = [{"params": [twin], "lr": 0.01}, {"params": [bias], "lr": 0.5}]
    other = torch.optim.AdamW(groups, **common)
    low, high = grid.first / grid.step, grid.first / grid.step + grid.last
    for t in range(12):
        layer.latent.grad, layer.bias.grad = random_tensor(t, 25, 40), random_tensor(t, 25)
        twin.grad, bias.grad = layer.latent.grad * unit, layer.bias.grad.clone()
        optimizer.anneal(t / 12)
        optimizer.step()
        other.step()
        with torch.no_grad():
            twin.clamp_(low, high)
        torch.testing.assert_close(layer.latent.detach(), twin.detach() * unit)
        torch.testing.assert_close(layer.bias.detach(), bias.detach())


def test_in_levels_eps_is_added_to_gradients_by_the_weights_themselves():
    """As if the step had been AdamW's, and then made as long as the spacing says."""
    layer = spread(nn.Linear(40, 25, bias=False, dtype=torch.float64), make_grid(2, "integer"))
    options = {"betas": (0.9, 0.99), "eps": 0.3, "weight_decay": 0.0}
    optimizer = AskewAdamW(layer, level_lr=0.01, closing=LAZY, **options)
    before, grad = layer.latent.detach().clone(), random_tensor(3, 25, 40)
    layer.latent.grad = grad.clone()
    optimizer.anneal(0.0)
    optimizer.step()
    moved = before - 0.01 * layer.weight_scale * layer.grid.step * grad / (grad.abs() + 0.3)
    ends = layer.grid.levels()[[0, -1]] * layer.weight_scale
    torch.testing.assert_close(layer.latent.detach(), moved.clamp(ends[:, :1], ends[:, 1:]))


@pytest.mark.parametrize("turn", [0, 1])
def test_a_layer_without_a_gradient_waits_for_its_turn(turn):
    """Weights close at every third step; a layer that has no gradient then stays as it is."""
    layer = spread(nn.Linear(40, 25, bias=False, dtype=torch.float64), make_grid(2, "integer"))
    other = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    closing = Closing("staggered", start=0.0, end=1.0, every=3)
    optimizer = AskewSGD(nn.ModuleList([layer, other]), lr=0.0, closing=closing)
    for t in range(9):
        other.weight.grad = torch.zeros_like(other.weight)
        layer.latent.grad = torch.zeros_like(layer.latent) if t % 3 == turn else None
        optimizer.anneal(0.5)
        optimizer.step()
    closed = (layer.latent == layer.grid.snap(layer.latent.detach(), layer.weight_scale)).double()
    assert (closed.mean() > 0.8) == (turn == 0)  # 1 - (1 - 1/2)^3 of them are due


class Beside(nn.Sequential):
    """A low-bit layer between float ones: a convolution, a batch norm, and a head of zeros."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 9), nn.Linear(9, 5)
        )
        self.double()
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(random_tensor(seed + i, *parameter.shape) * 10.0 ** (i - 3))
            self[4].weight.zero_()
        spread(self[3], make_grid(2, "integer"))

    def rest(self) -> list[nn.Parameter]:
        """Return what is not quantized."""
        return [p for p in self.parameters() if p is not self[3].latent]


def test_beside_level_lr_float_matrices_are_adamw_in_their_root_mean_square():
    """A matrix over its root mean square moves as torch's AdamW moves it, a vector by lr."""
    model = Beside()
    units = [p.square().mean().sqrt().item() if p.dim() > 1 else 1.0 for p in model.rest()]
    assert units[-2] == 0
    units[-2] = 1 / 3  # of the zeros: 1 / sqrt(9 columns)
    twins = [
        nn.Parameter((p / u).detach().clone()) for p, u in zip(model.rest(), units, strict=True)
    ]
    common = {"lr": 0.03, "betas": (0.8, 0.99), "eps": 1e-30, "weight_decay": 0.1}
    optimizer = AskewAdamW(model, level_lr=0.01, closing=LAZY, **common)
    other = torch.optim.AdamW(twins, **common)
    for t in range(6):
        for i, (mine, twin, unit) in enumerate(zip(model.rest(), twins, units, strict=True)):
            mine.grad = random_tensor(100 * t + i, *mine.shape)
            twin.grad = mine.grad * unit
        optimizer.anneal(t / 6)
        for each in (*optimizer.param_groups[1:], *other.param_groups):
            each["lr"] = 0.03 * (1 - t / 6)
        optimizer.step()
        other.step()
        for mine, twin, unit in zip(model.rest(), twins, units, strict=True):
            torch.testing.assert_close(mine.detach(), twin.detach() * unit)
    for group in optimizer.param_groups[1:]:
        assert (group["lr"], group["weight_decay"]) == (0.03 * (1 - 5 / 6), 0.1)


def test_the_units_are_those_of_the_start_after_a_reload():
    """A state carries the units of the weights it started from, whatever they are by now."""
    first, second = (
        AskewAdamW(Beside(seed), lr=0.03, level_lr=0.01, closing=LAZY) for seed in (0, 50)
    )

    def units(optimizer: AskewAdamW) -> list[float | None]:
        return [group.get("unit") for group in optimizer.param_groups]

    assert units(second) != units(first)
    second.load_state_dict(first.state_dict())
    assert units(second) == units(first)
    assert [u is None for u in units(first)] == [True, False, False, True]


def test_a_step_that_fails_leaves_the_rates(monkeypatch):
    """The rates in a parameter group are scaled for torch's step alone."""
    model = Beside()
    optimizer = AskewAdamW(model, lr=0.03, level_lr=0.01, weight_decay=0.1, closing=LAZY)
    model.rest()[0].grad = torch.ones(4, 3, 2, 2, dtype=torch.float64)
    seen = []

    def fails(self: torch.optim.AdamW) -> None:
        seen.extend((group["lr"], group["weight_decay"]) for group in self.param_groups)
        raise ArithmeticError

    monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    unit = model[0].weight.square().mean().sqrt().item()
    assert seen[1] == pytest.approx((0.03 * unit, 0.1 / unit))
    assert {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups[1:]} == {(0.03, 0.1)}


def test_level_lr_goes_without_groups_of_ones_own():
    """It splits the parameters itself, and says so."""
    layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
    with pytest.raises(RecipeError, match="level_lr makes the parameter groups itself"):
        AskewAdamW(layer, level_lr=0.01, params=[layer.bias])


@pytest.mark.parametrize("setting", [{"alpha": 0.2}, {"clip": 0.2}, {"pull": "coupled"}])
@pytest.mark.parametrize("make", [AskewSGD, AskewAdamW])
def test_a_pull_does_not_go_with_lazy_closing(make, setting):
    """Nothing is pulled there, so that a setting of the pull is refused by name."""
    layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
    with pytest.raises(RecipeError, match="decide nothing with closing = 'lazy'"):
        make(layer, lr=0.1, closing=LAZY, **setting)
    make(layer, lr=0.1, closing=STAGGERED, **setting)


def test_the_state_of_the_other_optimizer_is_refused():
    """Before a step ends in a KeyError."""
    _, twin = network()
    state = AskewAdamW(twin, lr=0.1).state_dict()
    _, other = network()
    with pytest.raises(RecipeError, match=r"not that of AskewSGD.*have no dampening, momentum"):
        AskewSGD(other, lr=0.1, momentum=0.9).load_state_dict(state)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_compiled_as_a_whole():
    """The rule of large models becomes a part of the graph, with the same numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    quantize(model, 2)
    AskewSGD(model, lr=0.1, compile=True)
    x = torch.randn(3, 8)
    torch.compiler.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(whole(x), model(x))


@pytest.mark.parametrize("closing", [LAZY, STAGGERED, SINGLE], ids=lambda c: c.kind)
def test_a_snap_of_intervals_that_never_closed_is_no_secret(closing):
    """A loop without `anneal` trains nothing but what rounding then throws away."""
    model = spread(nn.Linear(4, 2), make_grid(2, "integer"))
    optimizer = AskewSGD(model, lr=0.1, closing=closing)
    with snapped(model):  # a look at it says nothing
        pass
    snap_(copy.deepcopy(model))  # a copy that only receives weights, such as their average
    with pytest.warns(UserWarning, match=r"never began to close.*call anneal\(progress\)"):
        snap_(model)
    optimizer = AskewSGD(model, lr=0.1, closing=closing)
    optimizer.anneal(0.1)
    snap_(model)


class TestWhatItIsGiven:
    """What is passed by mistake is named, with what to pass instead."""

    @pytest.mark.parametrize("make", [AskewSGD, AskewAdamW])
    def test_parameters_in_place_of_the_model(self, make):
        """As torch's optimizers are made."""
        layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
        with pytest.raises(ModelError, match="is a generator: pass the quantized model itself"):
            make(layer.parameters(), lr=0.1)

    @pytest.mark.parametrize("make", [AskewSGD, AskewAdamW])
    def test_the_name_of_a_closing(self, make):
        """A Closing has that name, and more."""
        layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
        with pytest.raises(RecipeError, match=r"pass an askewq\.Closing, such as askewq\.Closing"):
            make(layer, lr=0.1, closing="staggered")

    @pytest.mark.parametrize("progress", [2, 55.0, -0.1, math.nan, math.inf])
    @every_closing
    def test_a_progress_that_is_no_share(self, closing, progress):
        """A number of steps would close everything at once; NaN would be all weights."""
        layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
        optimizer = AskewSGD(layer, lr=0.1, closing=closing)
        with pytest.raises(RecipeError, match=r"is no share of the training steps.*\(i \+ 1\) / n"):
            optimizer.anneal(progress)
        optimizer.anneal(1.0)

    @pytest.mark.parametrize("level_lr", [-0.005, math.nan, math.inf])
    def test_a_rate_below_zero(self, level_lr):
        """It would train uphill."""
        layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
        with pytest.raises(RecipeError, match="must be a finite number from 0"):
            AskewAdamW(layer, level_lr=level_lr)

    def test_another_group_beside_those_of_level_lr(self):
        """It would have no unit, and so move the wrong way: by lr, in the weights' own units."""
        model = nn.Sequential(spread(nn.Linear(4, 4), make_grid(2, "integer")), nn.Linear(4, 2))
        model[1].requires_grad_(False)
        optimizer = AskewAdamW(model, level_lr=0.01)
        new = list(nn.Linear(2, 2).parameters())
        with pytest.raises(RecipeError, match="freeze and unfreeze with requires_grad_"):
            optimizer.add_param_group({"params": new})
        AskewAdamW(model, lr=0.01).add_param_group({"params": new})

    def test_a_weight_decay_that_is_not_decoupled(self):
        """Torch's AdamW knows it, the step of the quantized weights does not."""
        layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
        group = {"params": [layer.latent], "decoupled_weight_decay": False}
        with pytest.raises(RecipeError, match="decoupled_weight_decay = False"):
            AskewAdamW(layer, lr=0.1, params=[group])

    def test_a_state_from_beyond_the_end(self):
        """Earlier versions allowed it, and closed means closed."""
        layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
        optimizer = AskewSGD(layer, lr=0.1)
        optimizer.param_groups[0]["progress"] = 1.2
        AskewSGD(layer, lr=0.1).load_state_dict(optimizer.state_dict())

    def test_a_model_that_was_snapped(self):
        """Its intervals are gone, and steps would train rounded weights without them."""
        layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
        optimizer = AskewSGD(layer, lr=0.1)
        optimizer.anneal(0.5)
        snap_(layer)
        with pytest.raises(ModelError, match=r"snapped for good.*askewq\.snapped\(model\)"):
            optimizer.step()

    @pytest.mark.parametrize("closing", [STAGGERED, SINGLE], ids=lambda c: c.kind)
    def test_a_model_that_another_optimizer_has_taken(self, closing):
        """Two sets of intervals would pull at the same weights."""
        layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
        optimizer = AskewSGD(layer, lr=0.1, closing=closing)
        AskewSGD(layer, lr=0.1)
        with pytest.raises(ModelError, match="follows another method by now"):
            optimizer.step()

    @pytest.mark.parametrize("name", ["alpha", "clip", "closing", "pull"])
    def test_a_pull_of_a_group_alone(self, name):
        """The optimizer's checks of the pull are for all weights; lazy closing has none."""
        layer = spread(nn.Linear(4, 2), make_grid(2, "integer"))
        group = {"params": [layer.latent], name: -1.0}
        with pytest.raises(RecipeError, match=f"a parameter group has {name} = -1.0"):
            AskewSGD(layer, lr=0.1, params=[group], closing=SINGLE)
        groups = AskewSGD(layer, lr=0.1, closing=SINGLE).param_groups
        AskewSGD(layer, lr=0.1, params=groups, closing=SINGLE)


@pytest.mark.parametrize("closing", [LAZY, STAGGERED], ids=lambda c: c.kind)
def test_a_snap_inside_autocast(closing):
    """The weights of before it that autocast has kept are not used again."""
    layer = spread(nn.Linear(8, 4), make_grid(2, "integer"))
    AskewSGD(layer, lr=0.1, closing=closing).anneal(0.5)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        free = layer(x)
        snap_(layer)
        snap = layer(x)
    assert not torch.equal(free, snap)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(layer(x), snap)


@pytest.mark.parametrize("closing", [LAZY, STAGGERED], ids=lambda c: c.kind)
def test_a_look_inside_autocast(closing):
    """Autocast keeps the weights that it has cast; those of before and after are not mixed."""
    layer = spread(nn.Linear(8, 4), make_grid(2, "integer"))
    AskewSGD(layer, lr=0.1, closing=closing).anneal(0.5)
    x = torch.randn(3, 8)

    def seen():
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return layer(x)

    free = seen()
    with snapped(layer):
        snap = seen()
    assert not torch.equal(free, snap)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), free)
        with snapped(layer), torch.no_grad():
            assert torch.equal(layer(x), snap)
        assert torch.equal(layer(x), free)
