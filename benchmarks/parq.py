"""`askewq finetune` with torchao's PARQ in the place of AskewSGD, for the contest.

    python benchmarks/parq.py finetune --model ... --max-steps 600 ...      (pip install torchao)

Everything else is askewq's: data, start, layers, loop, learning rate. PARQ (Jin et al. 2025, arXiv
2503.15748) has its own symmetric levels and scales, per channel and from the weights as they are,
and anneals until nine tenths of the steps, after which its weights are on its levels; so what
counts is the accuracy `relaxed` of metrics.json. The artifact that is written at the end, on
askewq's grid, is not PARQ's model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from askewq import choices, cli
from askewq.config import Recipe
from askewq.layers import quantized_layers
from askewq.vocabulary import Bits


def parq_optimizer(
    model: nn.Module, bits: Bits, steps: int, base: Callable[[Any], torch.optim.Optimizer]
) -> Any:
    """Return PARQ over the quantized layers of a model; `base` makes the optimizer beneath it."""
    from torchao.prototype.parq import LSBQuantizer, ProxPARQ, QuantOptimizer, UnifQuantizer

    weights = [layer.latent for layer in quantized_layers(model).values()]
    if not all(weight.is_contiguous() for weight in weights):
        raise SystemExit("PARQ leaves channels_last weights unquantized without a word")
    chosen = {id(weight) for weight in weights}
    ternary = bits == "ternary"
    groups = [
        {"params": weights, "quant_bits": 0 if ternary else int(bits)},
        {"params": [p for p in model.parameters() if id(p) not in chosen]},
    ]
    return QuantOptimizer(
        base(groups),
        LSBQuantizer(optimal=True) if ternary else UnifQuantizer(),
        ProxPARQ(anneal_start=0, anneal_end=int(0.9 * steps), steepness=20),
        quant_per_channel=True,
        quant_period=10,
    )


class Parq:
    """PARQ's optimizer with the pacer's interface."""

    def __init__(self, recipe: Recipe, model: nn.Module, steps: int) -> None:
        def base(groups: Any) -> torch.optim.Optimizer:
            lr, decay = recipe.lr or 0.0, recipe.weight_decay
            if recipe.optimizer == "sgd":
                return torch.optim.SGD(groups, lr, recipe.momentum, weight_decay=decay)
            return torch.optim.AdamW(groups, lr, weight_decay=decay)

        self.optimizer = parq_optimizer(model, recipe.bits, steps, base)
        self._weights = [layer.latent for layer in quantized_layers(model).values()]

    def anneal(self, progress: float) -> None:
        """Do nothing: PARQ counts its steps itself."""

    def shown(self, progress: float) -> dict[str, float]:
        """Return nothing to show."""
        return {}

    def feasible_share(self) -> float:
        """Return the share of the weights that are on one of PARQ's levels."""
        on = total = 0
        for weight in self._weights:
            total += weight.numel()
            levels = self.optimizer.state.get(weight, {}).get("quants")
            if levels is not None:
                rows = weight.detach().flatten(1)
                on += int(sum((rows == level[:, None]).sum() for level in levels.unbind(1)))
        return on / total


def low_bit_optimizer(
    recipe: Recipe, model: nn.Module, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Return PARQ's optimizer and its pacer."""
    parq = Parq(recipe, model, steps)
    return parq.optimizer, parq


if __name__ == "__main__":
    choices.low_bit_optimizer = low_bit_optimizer
    cli.main()
