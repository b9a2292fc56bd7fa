"""Parameter groups for steps in level spacings: what an update's length is measured in.

A quantized weight moves in level spacings, a float matrix by a share of its size at the start,
everything else as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from askewq.layers import quantized_layers


def level_groups(model: nn.Module, level_lr: float) -> list[dict[str, Any]]:
    """Return the quantized weights, updated in level spacings, and the other parameters.

    Of these, every one with two dimensions and more is a group of its own, updated in its `unit`.
    """
    latents = {id(layer.latent) for layer in quantized_layers(model).values()}
    weights = [p for p in model.parameters() if id(p) in latents]
    others = [p for p in model.parameters() if id(p) not in latents]
    matrices = [{"params": [p], "unit": _unit(p)} for p in others if p.dim() > 1]
    vectors = [p for p in others if p.dim() <= 1]
    return [{"params": weights, "lr": level_lr, "in_levels": True}, *matrices, {"params": vectors}]


def _unit(matrix: Tensor) -> float:
    """Return a matrix' root mean square; of zeros, 1 / sqrt(its columns), as if freshly drawn."""
    rms = matrix.detach().double().square().mean().sqrt().item()
    return rms or float(matrix[0].numel() ** -0.5)


@contextmanager
def in_units(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Within the block, a group with a unit has the lr and the decay of its weights over it."""
    before = [(group, group["lr"], group["weight_decay"]) for group in groups if "unit" in group]
    for group, lr, decay in before:
        group.update(lr=lr * group["unit"], weight_decay=decay / group["unit"])
    try:
        yield
    finally:
        for group, lr, decay in before:
            group.update(lr=lr, weight_decay=decay)
