"""A weight [in, out] is trained as its transpose is: everything that is done by output channel."""

import pytest
import torch
from conftest import GRIDS, grid_name, random_tensor
from torch import nn
from transformers.pytorch_utils import Conv1D

from askewq.anneal import Closing
from askewq.grid import channels_back, channels_first, fit_scale, make_grid
from askewq.layers import quantize_layer_, snap_
from askewq.methods import RIVALS
from askewq.optim import AskewAdamW, AskewSGD
from askewq.rivals import Follower

IN, OUT, STEPS = 6, 4, 12
every_group = pytest.mark.parametrize("group_size", ["channel", "tensor", 3])


def pair(grid, group_size):
    """Return a Linear and the Conv1D with the transposed weight, on the same grid."""
    linear, conv = nn.Linear(IN, OUT), Conv1D(OUT, IN)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
    for layer in (linear, conv):
        scale = fit_scale(linear.weight, grid, group_size)
        quantize_layer_(layer, grid, scale)
    return linear, conv


def give_gradients(linear, conv, seed):
    """Put the same gradients on both weights."""
    gradient = random_tensor(seed, OUT, IN, dtype=torch.float32)
    linear.latent.grad, conv.latent.grad = gradient, gradient.t().contiguous()


def assert_transposed(linear, conv):
    """Compare parameters, what the forward pass sees, scales and codes."""
    assert torch.equal(conv.latent, linear.latent.t())
    assert torch.equal(conv.weight, linear.weight.t())
    assert conv.weight.is_contiguous()
    assert torch.equal(conv.weight_scale, linear.weight_scale)
    assert torch.equal(conv.codes(), linear.codes())


@every_group
@pytest.mark.parametrize("kind", ["lazy", "staggered", "single"])
@pytest.mark.parametrize(
    "grid", [GRIDS[0], GRIDS[1], make_grid(2, "integer"), make_grid(4)], ids=grid_name
)
@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw", "levels"])
def test_askewsgd(grid, kind, base, group_size):
    """Weights, scales and the optimizer's state stay each other's transpose, to the bit."""
    layers = pair(grid, group_size)
    make = {
        "sgd": lambda m: AskewSGD(m, lr=0.05, closing=Closing(kind)),
        "momentum": lambda m: AskewSGD(m, lr=0.05, momentum=0.9, closing=Closing(kind)),
        "adamw": lambda m: AskewAdamW(m, lr=0.05, closing=Closing(kind)),
        "levels": lambda m: AskewAdamW(m, level_lr=0.05, closing=Closing(kind)),
    }
    optimizers = [make[base](nn.Sequential(layer)) for layer in layers]
    for step in range(STEPS):
        give_gradients(*layers, seed=step)
        for optimizer in optimizers:
            optimizer.anneal((step + 1) / STEPS)
            optimizer.step()
        assert_transposed(*layers)
    first, second = (
        optimizer.state[layer.latent] for optimizer, layer in zip(optimizers, layers, strict=True)
    )
    for name, value in first.items():
        assert torch.equal(second[name], value.t() if value.dim() == 2 else value), name
    shares = {optimizer.feasible_share() for optimizer in optimizers}
    assert len(shares) == 1
    for layer in layers:
        snap_(layer)
    assert_transposed(*layers)


@every_group
@pytest.mark.parametrize("method", RIVALS)
def test_other_methods(method, group_size):
    """Every rule sees output channels, learned and re-estimated scales included."""
    layers = pair(make_grid(1), group_size)
    optimizers, followers = [], []
    for layer in layers:
        followers.append(Follower(nn.Sequential(layer), method))
        optimizers.append(torch.optim.SGD(layer.parameters(), lr=0.05))
        followers[-1].attach(optimizers[-1])
    for step in range(STEPS):
        x = random_tensor(step, 3, IN, dtype=torch.float32)
        for layer, optimizer, follower in zip(layers, optimizers, followers, strict=True):
            optimizer.zero_grad()
            # The same product on either side of the transpose, so that gradients are equal.
            seen = channels_first(layer.weight, layer.channel_dim).contiguous()
            nn.functional.linear(x, seen).square().sum().backward()
            follower.anneal((step + 1) / STEPS)
            optimizer.step()
        assert_transposed(*layers)
    assert followers[0].feasible_share() == followers[1].feasible_share()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_there_and_back(dim):
    """Channels first is a view, and back again is the weight."""
    weight = torch.randn(2, 3, 4)
    first = channels_first(weight, dim)
    assert first.data_ptr() == weight.data_ptr()
    assert first.shape[0] == weight.shape[dim]
    assert torch.equal(channels_back(first, dim), weight)
    assert channels_back(first, dim).is_contiguous()
