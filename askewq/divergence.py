"""Losses, gradients and weights that are not finite: found at once, and traced to a layer.

What is checked at every step is two numbers, the loss and the sum of all gradients. Only when one
of them is NaN or infinite is the network searched for where it began.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from askewq.sharding import local

SKIP = "skip:"


def tolerated(policy: str) -> int:
    """Return how many steps a run may pass over: 0 for `stop`, N for `skip:N`."""
    return int(policy.removeprefix(SKIP)) if policy.startswith(SKIP) else 0


def gradients_finite(model: nn.Module) -> bool:
    """Tell whether every gradient of this process is; one pass over memory and one number."""
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    if not grads:
        return True
    # A sum is the fastest thing that NaN and infinity pass through; it may overflow by itself.
    sums = torch.stack([grad.sum().to(grads[0].device, torch.float32) for grad in grads])
    return math.isfinite(float(sums.sum())) or all(bool(torch.isfinite(g).all()) for g in grads)


def weights_finite(model: nn.Module) -> bool:
    """Tell whether every parameter of this process is; a buffer may hold the -inf of a mask."""
    return next(_broken(model.named_parameters()), None) is None


def trace(
    model: nn.Module,
    batch: dict[str, Tensor],
    run: Callable[[], object],
    told: Callable[[str], str] = str,
) -> str:
    """Return, as a sentence, where a network stopped being finite.

    Args:
        batch: the input of the step, as the network gets it.
        run: makes the forward pass on it again.
        told: returns the first text that is not empty of all processes, so that all find the same.
    """
    broken = list(_broken(model.named_parameters()))
    count = len(broken)
    more = f" and {count - 1} other{'s' * (count > 2)} after it" if count > 1 else ""
    if names := told(f"{broken[0]}{more}" if broken else ""):
        return f"the last update left NaN or infinite values in {names}"
    if name := told(next(_broken(batch.items()), "")):
        return f"the weights are finite, but the batch itself is not ({name}): look at the data"
    if name := told(_first_output(model, run)):
        return f"the weights are finite, but what comes out of {name} is not"
    grads = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    # Backward goes from the last layer to the first: the last one in order went first.
    if name := told(next(_broken(reversed(grads)), "")):
        return f"weights and outputs are finite; the gradient of {name} was the first that is not"
    return "weights, outputs and gradients are finite"


def _broken(named: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Yield the names of floating-point tensors that hold NaN or infinite values."""
    for name, tensor in named:
        if tensor.is_floating_point() and not bool(torch.isfinite(local(tensor)).all()):
            yield name


def _first_output(model: nn.Module, run: Callable[[], object]) -> str:
    """Return the first module of a forward pass whose output is not finite, or an empty text."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor) and not found:
                found.extend(_broken([(name, output)]))

        return hook

    hooks = [
        module.register_forward_hook(watch(f"{name} ({type(module).__name__})"))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""
