"""Polishing: the codes stay, and what trains is what AdamW does to scales, biases and norms."""

import copy
import pickle

import builders
import pytest
import torch
from builders import finetune
from torch import nn

import askewq
from askewq import checkpoint, layers
from askewq.errors import ModelError, RecipeError
from askewq.grid import SCALE_DIGITS
from askewq.polish import POLISH, Polisher

NETWORKS = {
    "linear": lambda: nn.Linear(8, 6),
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
}
INPUTS = {
    "linear": (5, 8),
    "convolution": (5, 2, 6, 6),
    "transposed": (5, 4, 5, 5),
    "attention": (5, 4, 8),
}


def run(kind, network, x):
    return network(x, x, x)[0] if kind == "attention" else network(x)


def snapped(kind, bits=2, group_size="channel"):
    torch.manual_seed(0)
    network = NETWORKS[kind]()
    askewq.quantize(network, bits, include=["*"], group_size=group_size)
    layers.snap_(network)
    return network


def codes(network):
    return {name: w.codes() for name, w in layers.quantized_layers(network).items()}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("bits", [1, "ternary", 2, 8])
class TestPolisher:
    def test_codes_stay_and_weights_follow_the_scales(self, kind, bits):
        """Every weight is level times scale, to the bit, at every step and at the end."""
        network = snapped(kind, bits)
        before = codes(network)
        scales = {n: w.weight_scale.clone() for n, w in layers.quantized_layers(network).items()}
        polisher = Polisher(network, lr=0.03)
        for _ in range(4):
            run(kind, network, torch.randn(INPUTS[kind])).square().sum().backward()
            polisher.optimizer.step()
            polisher.optimizer.zero_grad()
            for name, weight in layers.quantized_layers(network).items():
                level = weight.grid.levels()[before[name].long()]
                shape = (level.shape[0], weight.weight_scale.shape[1], -1)
                value = level.reshape(shape) * weight.weight_scale.detach()[..., None]
                first = weight.latent.detach().movedim(weight.channel_dim, 0)
                assert torch.equal(first, value.reshape(first.shape))
                assert torch.equal(weight.weight, weight.latent)
        polisher.finish_()
        for name, weight in layers.quantized_layers(network).items():
            assert torch.equal(weight.codes(), before[name])
            assert weight.rule is None
            assert not isinstance(weight.weight_scale, nn.Parameter)
            assert not torch.equal(weight.weight_scale, scales[name])
            fraction, _ = torch.frexp(weight.weight_scale)
            assert torch.equal(fraction * 2**SCALE_DIGITS, (fraction * 2**SCALE_DIGITS).round())
        assert all(parameter.requires_grad for parameter in network.parameters())


class TestSteps:
    def test_against_float64(self):
        """Scale, bias and norm take AdamW's steps on level times scale, those of a scale as shares.

        AdamW divides a gradient by its own size, so that the gradient of a scale and that of its
        logarithm lead to the same step.
        """
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))
        askewq.quantize(network, 3, include=["0"])
        layers.snap_(network)
        weight = layers.quantized_layers(network)["0"]
        level = weight.grid.levels()[weight.codes().long()].double()
        logarithm = weight.weight_scale.double().log().requires_grad_()
        bias = network[0].bias.detach().double().requires_grad_()
        gain = network[1].weight.detach().double().requires_grad_()
        shift = network[1].bias.detach().double().requires_grad_()
        head = network[2].weight.detach().double().clone()
        last = network[2].bias.detach().double().requires_grad_()
        reference = torch.optim.AdamW(
            [logarithm, bias, gain, shift, last], 1e-4, weight_decay=0.0, eps=0.0
        )
        polisher = Polisher(network, lr=1e-4)
        for _ in range(6):
            x = torch.randn(7, 8)
            network(x).square().sum().backward()
            polisher.optimizer.step()
            polisher.optimizer.zero_grad()
            hidden = x.double() @ (level * logarithm.exp()).T + bias
            normed = nn.functional.layer_norm(hidden, (6,), gain, shift)
            (normed @ head.T + last).square().sum().backward()
            reference.step()
            reference.zero_grad()
        assert torch.equal(network[2].weight.double(), head)
        assert torch.allclose(weight.weight_scale.double(), logarithm.exp(), rtol=1e-5)
        for ours, theirs in ((network[0].bias, bias), (network[1].weight, gain)):
            assert torch.allclose(ours.double(), theirs, atol=1e-6)

    def test_a_scale_moves_by_a_half_to_twice_at_most_and_nothing_decays(self):
        """A step is a share of the scale, -1/2 .. 1, and none of the other parameters."""
        torch.manual_seed(0)
        network = nn.Linear(4, 4)
        askewq.quantize(network, 2, include=["*"])
        layers.snap_(network)
        polisher = Polisher(network, lr=0.9)
        grad, bias = torch.tensor([[1.0], [-1.0], [0.0], [1e-3]]), network.bias.detach().clone()
        for lr, ratios in ((0.9, [0.5, 1.9, 1.0, 0.5]), (30.0, [0.5, 2.0, None, 0.5])):
            polisher.optimizer.param_groups[0]["lr"] = lr
            before = network.weight_scale.detach().clone()
            network.weight_scale.grad, network.bias.grad = grad.clone(), torch.zeros(4)
            polisher.optimizer.step()
            found = (network.weight_scale / before).flatten().tolist()
            for ratio, expected in zip(found, ratios, strict=True):
                assert expected is None or ratio == pytest.approx(expected, rel=1e-4)
                assert 0.4999 < ratio < 2.0001
        assert torch.equal(network.bias, bias)

    @pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
    def test_a_step_is_the_same_share_of_any_scale(self, size):
        """Also of one in whose digits the step itself would be lost."""
        torch.manual_seed(0)
        network = nn.Linear(4, 4)
        network.weight.data *= size
        askewq.quantize(network, 2, include=["*"])
        layers.snap_(network)
        polisher = Polisher(network, lr=1e-4)
        before = network.weight_scale.detach().clone()
        for _ in range(10):
            network.weight_scale.grad = torch.ones_like(before)
            polisher.optimizer.step()
        assert torch.allclose(network.weight_scale / before, torch.tensor(0.999), rtol=1e-5)

    def test_the_gradient_of_a_scale(self):
        """The sum over its weights of gradient times level."""
        weight = torch.tensor([[1.0, -2.0, 0.0], [3.0, 3.0, -3.0]])
        scale = torch.tensor([[1.0], [3.0]], requires_grad=True)
        grad = torch.randn(2, 3)
        seen = POLISH.view(weight, scale, None, 0.0)
        assert torch.equal(seen, weight)
        seen.backward(grad)
        expected = (grad * weight / scale.detach()).sum(1, keepdim=True)
        assert torch.allclose(scale.grad, expected)

    def test_a_step_cannot_take_a_scale_below_zero(self):
        """Not even with the longest steps."""
        network = snapped("linear")
        polisher = Polisher(network, lr=0.9)
        for _ in range(30):
            run("linear", network, torch.ones(2, 8)).square().sum().backward()
            polisher.optimizer.step()
            polisher.optimizer.zero_grad()
        polisher.finish_()
        assert (network.weight_scale > 0).all()

    def test_frozen_parameters_stay_frozen(self):
        """What a user does not train is not trained, and not thawed at the end."""
        network = snapped("linear")
        network.bias.requires_grad_(False)
        before = network.bias.clone()
        polisher = Polisher(network, lr=0.1)
        run("linear", network, torch.randn(2, 8)).square().sum().backward()
        polisher.optimizer.step()
        polisher.finish_()
        assert torch.equal(network.bias, before)
        assert not network.bias.requires_grad

    def test_a_frozen_weight_keeps_its_scale(self):
        """It is not trained by way of its scale, either."""
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        askewq.quantize(network, 2, include=["*"])
        layers.snap_(network)
        network[0].requires_grad_(False)
        before = [layer.latent.clone() for layer in network]
        polisher = Polisher(network, lr=0.1)
        network(torch.randn(2, 4)).square().sum().backward()
        polisher.optimizer.step()
        assert torch.equal(network[0].weight, before[0])
        assert not torch.equal(network[1].weight, before[1])
        polisher.finish_()
        assert not network[0].latent.requires_grad

    def test_what_it_polishes(self, tmp_path):
        """A snapped model, before it is distributed."""
        with pytest.raises(ModelError, match="no quantized layer, and so nothing to polish"):
            Polisher(nn.Linear(4, 4), lr=0.1)
        network = snapped("linear")
        with torch.no_grad():
            network.latent[0, 0] += 0.01
        with pytest.raises(ModelError, match=r"between the levels.*askewq\.snap_\(model\) first"):
            Polisher(network, lr=0.1)
        assert network.latent.requires_grad
        layers.snap_(network)
        network.requires_grad_(False)
        with pytest.raises(ModelError, match="nothing of the model requires a gradient"):
            Polisher(network, lr=0.1)
        network.requires_grad_(True)
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
        try:
            with pytest.raises(ModelError, match=r"polish model\.module, and wrap it afterwards"):
                Polisher(nn.parallel.DistributedDataParallel(network), lr=0.1)
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_sees_the_scales(keyword):
    """The step is the one that is made without a closure."""
    plain = snapped("linear")
    x = torch.randn(INPUTS["linear"])
    weights = []
    for closes in (False, True):
        network = copy.deepcopy(plain)
        polisher, losses = Polisher(network, lr=0.03), []

        def closure(network=network, losses=losses):
            loss = network(x).square().sum()
            loss.backward()
            losses.append(loss)
            return loss

        if closes and keyword:
            given = polisher.optimizer.step(closure=closure)
        elif closes:
            given = polisher.optimizer.step(closure)
        else:
            given = closure()
            polisher.optimizer.step()
        assert losses == [given]
        weights.append(network.weight.detach().clone())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], plain.weight)


def test_a_copy_polishes_as_the_original():
    """Made together with its model; torch copies no hooks."""
    network = snapped("linear")
    polisher = Polisher(network, lr=0.03)
    pairs = [(network, polisher), copy.deepcopy((network, polisher))]
    pairs.append(pickle.loads(pickle.dumps(pairs[0])))
    x = torch.randn(INPUTS["linear"])
    for model, its in pairs:
        for _ in range(3):
            its.optimizer.zero_grad()
            model(x).square().sum().backward()
            its.optimizer.step()
        its.finish_()
        assert model.is_snapped()
        assert torch.equal(model.weight, network.weight)


def artifact(folder):
    return (folder / "model.safetensors").read_bytes()


class TestRuns:
    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            ("timm", {}),
            ("own", {"method": "lsq"}),
            ("own", {"distill": 0.5, "act_bits": 4}),
            ("bert", {"group_size": 8}),
        ],
    )
    def test_interrupted_in_any_phase(self, kind, changes, tmp_path, monkeypatch):
        """A run ends with the uncut one's bytes; its codes are those of a run without polish."""
        settings = {"polish_steps": 4, "polish_lr": 0.01, "save_every": 2, **changes}
        metrics = finetune(kind, tmp_path / "uncut", **settings)
        steps = metrics["steps"] - 4
        assert metrics["polish_steps"] == 4
        assert metrics["snapped"] == metrics["reloaded"]
        for at in (steps - 1, steps + 1, steps + 3):
            cut = tmp_path / f"cut-{at}"
            with builders.power_cut(monkeypatch, at), pytest.raises(builders.PowerCutError):
                finetune(kind, cut, **settings)
            again = finetune(kind, cut, **settings, resume=True)
            assert artifact(cut) == artifact(tmp_path / "uncut")
            same = ("full_precision", "rounded", "relaxed", "snapped", "inside_interval", "steps")
            assert [again[key] for key in same] == [metrics[key] for key in same]
        plain = tmp_path / "plain"
        finetune(kind, plain, **{**settings, "polish_steps": 0, "polish_lr": 1e-3})
        one, other = (
            checkpoint.read(f / "model.safetensors").weights for f in (plain, tmp_path / "uncut")
        )
        assert all(torch.equal(one[name].codes, other[name].codes) for name in one)
        assert any(not torch.equal(one[name].scale, other[name].scale) for name in one)

    def test_settings_that_decide_nothing(self, tmp_path):
        """A rate without steps; and gradients that luq would round."""
        with pytest.raises(RecipeError, match="polish_lr goes with polish_steps"):
            builders.recipe("own", tmp_path, polish_lr=0.01)
        with pytest.raises(RecipeError, match="gradient_bits does not go with polish_steps"):
            builders.recipe("own", tmp_path, method="luq", gradient_bits=4, polish_steps=3)
