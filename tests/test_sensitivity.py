"""What rounding costs each layer, against brute force; the best assignment, against all."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import askewq
from askewq import planning, sensitivity, wrap
from askewq.errors import ModelError, PlanError
from askewq.pack import packed_size
from askewq.sensitivity import Sensitivity, assign, estimated, measured

WIDTHS = (1, "ternary", 2, 4, 8)


def network():
    """Return a network with a weight of every order of dimensions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 5),
        nn.Linear(5, 3),
    ).double()


def planned(model, **settings):
    return wrap.plan(model, 8, include=["*"], **settings)


def data(count=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def loss_of(model):
    x, y = data()
    return lambda: nn.functional.cross_entropy(model(x), y).item()


def rounded_alone(model, name, bits, kind, group_size):
    """Return a copy of a model with one layer rounded, by the way that training takes."""
    other = copy.deepcopy(model)
    kind = "integer" if bits in (1, "ternary") else kind
    askewq.quantize(other, bits, grid=kind, group_size=group_size, include=[name])
    askewq.snap_(other)
    return other


@pytest.mark.parametrize("kind", ["integer", "half-integer"])
@pytest.mark.parametrize("group_size", ["channel", "tensor", 2])
def test_measured_is_the_loss_of_a_model_with_one_layer_rounded(kind, group_size):
    """Every entry, to the bit; the model is unchanged afterwards."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    plan = planned(model, group_size=group_size)
    found = measured(model, plan, WIDTHS, kind, loss_of(model))
    base = loss_of(model)()
    for layer, row in zip(found.layers, found.increase.tolist(), strict=True):
        for bits, increase in zip(WIDTHS, row, strict=True):
            other = rounded_alone(model, layer.names[0], bits, kind, layer.group_size)
            assert increase == loss_of(other)() - base
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_interruption_leaves_the_model_as_it_was():
    """The rounded weight does not stay where the loss fails."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    calls = iter([1.0, 2.0])

    def loss():
        return next(calls)

    with pytest.raises(StopIteration):
        measured(model, planned(model), WIDTHS, "integer", loss)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_loss_that_is_not_finite():
    """Nothing is estimated from it, nor measured."""
    model = network()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    x, y = data()
    losses = [(nn.functional.cross_entropy(model(x), y), len(y))]
    with pytest.raises(ModelError, match="is nan before anything is rounded"):
        estimated(model, planned(model), WIDTHS, "integer", losses)
    with pytest.raises(ModelError, match="is nan before anything is rounded"):
        measured(model, planned(model), WIDTHS, "integer", loss_of(model))


@pytest.mark.parametrize("batch", [1, 2])
def test_estimated_against_sums_over_single_gradients(batch):
    """Half of sum F d^2; with batches of one sample, F is the mean square of their gradients."""
    model, (x, y) = network(), data()
    plan = planned(model)
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    losses = ((nn.functional.cross_entropy(model(a), b), len(b)) for a, b in batches)
    found = estimated(model, plan, WIDTHS, "integer", losses)
    for i, layer in enumerate(plan.quantized):
        weight = model.get_submodule(layer.names[0]).weight
        squares = torch.zeros_like(weight)
        for a, b in batches:
            loss = nn.functional.cross_entropy(model(a), b, reduction="sum")
            squares += torch.autograd.grad(loss, weight)[0] ** 2
        for j, bits in enumerate(WIDTHS):
            other = rounded_alone(model, layer.names[0], bits, "integer", "channel")
            change = other.get_submodule(layer.names[0]).weight.detach() - weight.detach()
            expected = float((squares / len(x) * change**2).sum()) / 2
            assert found.increase[i, j] == pytest.approx(expected, rel=1e-9)


def test_estimated_is_near_the_truth_for_a_gaussian_model():
    """There the Fisher information is the Hessian, so half of d F d is what rounding adds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    x = torch.randn(4000, 3, dtype=torch.float64)
    y = model(x).detach() + torch.randn(4000, 1, dtype=torch.float64)
    pairs = zip(x.split(1), y.split(1), strict=True)
    losses = ((0.5 * (model(a) - b).square().mean(), 1) for a, b in pairs)
    found = estimated(model, planned(model), (1, 2), "integer", losses)
    for bits, increase in zip((1, 2), found.increase[0].tolist(), strict=True):
        other = rounded_alone(model, "0", bits, "integer", "channel")
        change = other[0].weight.detach() - model[0].weight.detach()
        assert increase == pytest.approx(float(change.square().sum()) / 2, rel=0.1)


@st.composite
def tables(draw):
    layers, widths = draw(st.integers(1, 4)), draw(st.integers(2, 3))
    numbers = st.floats(-1, 10, allow_nan=False)
    rows = st.lists(numbers, min_size=widths, max_size=widths)
    increase = draw(st.lists(rows, min_size=layers, max_size=layers))
    sizes = st.lists(st.integers(1, 50), min_size=widths, max_size=widths)
    code_bytes = draw(st.lists(sizes, min_size=layers, max_size=layers))
    return Sensitivity(
        (None,) * layers,
        WIDTHS[:widths],
        torch.tensor(increase, dtype=torch.float64),
        torch.tensor(code_bytes),
    )


class TestAssign:
    @settings(deadline=None, max_examples=60)
    @given(tables(), st.integers(0, 200))
    def test_no_assignment_within_the_budget_is_better(self, table, more):
        """Against every combination of widths."""
        layers, widths = table.increase.shape
        budget = int(table.code_bytes.min(1).values.sum()) + more
        found = [table.widths.index(bits) for bits in assign(table, budget)]
        cost, size = table.increase.clamp(min=0).tolist(), table.code_bytes.tolist()

        def total(values, choice):
            return sum(values[i][j] for i, j in enumerate(choice))

        every = itertools.product(range(widths), repeat=layers)
        best = min(total(cost, choice) for choice in every if total(size, choice) <= budget)
        assert total(size, found) <= budget
        assert total(cost, found) == pytest.approx(best, abs=1e-7)

    def test_a_byte_too_many_is_too_many(self):
        """The solver takes a sum of millions that is one byte too large for none."""
        increase = [
            [2.82992, 0.01687, 0.01379, 0.01067, 0.00003, 0],
            [0.57795, 0.37355, 0.02024, 0.00100, 0.00013, 0.00001],
            [0.06024, 0.03512, 0.01202, 0.00194, 0.00004, 0],
            [2.59595, 0.42357, 0.10041, 0.00037, 0.00030, 0.00001],
        ]
        code_bytes = [
            [2298293, 3677268, 4596585, 6894878, 9193170, 18386339],
            [1414826, 2263722, 2829652, 4244478, 5659303, 11318606],
            [2954670, 4727471, 5909339, 8864009, 11818678, 23637355],
            [1497835, 2396536, 2995670, 4493505, 5991340, 11982680],
        ]
        table = Sensitivity(
            (None,) * 4,
            planning.CANDIDATES,
            torch.tensor(increase, dtype=torch.float64),
            torch.tensor(code_bytes),
        )
        found = [planning.CANDIDATES.index(bits) for bits in assign(table, 18324589)]
        assert sum(code_bytes[i][j] for i, j in enumerate(found)) == 18324589 - 495508

    @pytest.mark.parametrize("largest", [1e-9, 1e-6, 1e-3, 1.0, 1e6])
    def test_how_large_the_increases_are_does_not_matter(self, largest):
        """The solver's tolerances are absolute; the best of all combinations is still found."""
        random = torch.Generator().manual_seed(0)
        for _ in range(20):
            increase = torch.rand(3, 4, generator=random, dtype=torch.float64) * largest
            size = torch.tensor([[100, 160, 200, 400]] * 3)
            table = Sensitivity((None,) * 3, (1, "ternary", 2, 4), increase, size)
            found = [table.widths.index(bits) for bits in assign(table, 700)]
            fitting = (
                choice
                for choice in itertools.product(range(4), repeat=3)
                if sum(size[i, j] for i, j in enumerate(choice)) <= 700
            )
            costs = [sum(float(increase[i, j]) for i, j in enumerate(c)) for c in fitting]
            cost = sum(float(increase[i, j]) for i, j in enumerate(found))
            assert cost == pytest.approx(min(costs), rel=1e-9)

    def test_rows_that_are_not_finite(self):
        """A width that breaks the network is the last to be chosen."""
        table = Sensitivity(
            (None, None),
            (1, 2),
            torch.tensor([[float("nan"), 1.0], [0.5, 0.1]], dtype=torch.float64),
            torch.tensor([[1, 2], [1, 2]]),
        )
        assert assign(table, 3) == (2, 1)
        assert assign(table, 2) == (1, 1)

    def test_a_budget_that_is_too_small(self):
        """The error says what the codes take at least."""
        table = Sensitivity((None,), (1, 2), torch.zeros(1, 2), torch.tensor([[10, 20]]))
        with pytest.raises(PlanError, match=r"9 bytes of codes.*1, 2.*10 bytes"):
            assign(table, 9)


def test_code_bytes_are_those_of_packed_codes():
    """Also where codes do not fill the last byte."""
    model = network()
    found = measured(model, planned(model), WIDTHS, "integer", lambda: 0.0)
    for layer, sizes in zip(found.layers, found.code_bytes.tolist(), strict=True):
        assert sizes == [packed_size(layer.weights, bits) for bits in WIDTHS]


def test_a_shared_weight_is_rounded_for_both_of_its_layers():
    """One row for the weight."""
    one = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(one, nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = one.weight
    found = sensitivity.measured(
        model, planned(model), (1, 8), "integer", lambda: model(torch.ones(1, 4)).sum().item()
    )
    assert [layer.names for layer in found.layers] == [("0", "2")]


class WithSpare(nn.Module):
    """A network beside a layer that it does not use."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.spare = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.body(x)


def test_layers_that_are_frozen_or_not_used():
    """A frozen weight has a sensitivity as any other; one that the loss does not see has none."""

    def losses(model):
        x, y = data()
        yield nn.functional.cross_entropy(model(x), y), len(x)

    tables = []
    for frozen in (False, True):
        model = WithSpare()
        model.body[1].weight.requires_grad_(not frozen)
        tables.append(estimated(model, planned(model), WIDTHS, "integer", losses(model)))
    assert torch.equal(tables[0].increase, tables[1].increase)
    assert tables[0].increase[-1].tolist() == [0.0] * len(WIDTHS)
    assert (tables[0].increase[:-1] > 0).all()
