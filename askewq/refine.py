"""Around the low-bit steps: an average of the parameters that stay float, and statistics anew.

Both are off unless a recipe asks for them; what they bring is measured in recipes/README.md.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from askewq.layers import quantized_modules

AVERAGE = "average"


class FloatAverage:
    """Exponential moving average of the parameters that stay float.

    It lives in the optimizer's state, beside its moments, so that checkpoints hold it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> None:
        """Follow every step of `optimizer` from now on; `decay` is what an average keeps a step."""
        weights = quantized_modules(model)
        on_grid = {id(tensor) for w in weights for tensor in (w.latent, w.weight_scale)}
        self._optimizer, self._decay = optimizer, decay
        self._parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) not in on_grid
        ]
        optimizer.register_step_post_hook(lambda *_: self._follow())

    @torch.no_grad()
    def _follow(self) -> None:
        for parameter in self._parameters:
            state = self._optimizer.state[parameter]
            if AVERAGE in state:
                state[AVERAGE].lerp_(parameter, 1 - self._decay)
            elif parameter.grad is not None:  # else the optimizer has yet to make its own state
                state[AVERAGE] = parameter.detach().clone()

    @torch.no_grad()
    def use_(self) -> None:
        """Put the averages in the place of the parameters."""
        for parameter in self._parameters:
            average = self._optimizer.state[parameter].get(AVERAGE)
            if average is not None:
                parameter.copy_(average)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the layers that keep statistics of their inputs."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def recalibrate_(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    forward: Callable[[dict[str, Tensor]], object],
    accelerator: Any,
) -> None:
    """Estimate batch norm's statistics anew, in place: the mean of those of some batches.

    Args:
        batches: of this process; the statistics are the mean over all processes.
        forward: runs the model on a batch.
    """
    norms = batch_norms(model)
    before = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: a cumulative mean
        norm.train()
    try:
        for batch in batches:
            forward(batch)
    finally:
        for module, training in before:
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None and accelerator.num_processes > 1:
                statistic.copy_(accelerator.reduce(statistic, reduction="mean"))
