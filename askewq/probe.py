"""Why a layer cannot be quantized, found out by looking at it and by running its forward."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from askewq.errors import CALLING
from askewq.kinds import Kind, kind_of, ramp


def unsupported(module: nn.Module, leaf: str) -> str:
    """Return why a parameter of this module cannot be quantized, or an empty string."""
    own = dict(module.named_parameters(recurse=False))
    name, kind = type(module).__name__, kind_of(module)
    if isinstance(module, ParametrizationList) or (kind and leaf not in kind.leaves):
        return "a weight computed from other parameters"
    if kind is None:
        if any(parameter.dim() > 1 for parameter in own.values()):
            return f"{name} is no layer that askewq knows (docs/methods.md)"
        return "no weight matrix"
    if not own[leaf].numel():
        return "it has no weights"
    if not own[leaf].is_floating_point():
        return f"its weight is {own[leaf].dtype}"
    if obstacle := kind.obstacle(module):
        return obstacle
    if _has_stock_forward(module, kind):
        return ""
    linear = kind.sample and _uses_weight_linearly(module, kind.sample(module))
    if linear is None:
        return f"{name} has a forward of its own, whose use of the weight cannot be seen by a call"
    return "" if linear else f"{name} transforms its weight before use"


def _has_stock_forward(module: nn.Module, kind: Kind) -> bool:
    """Tell whether a module calls torch's own; hooks of Accelerate's replace the object's."""
    methods = ("forward", "_conv_forward")
    own = type(module)
    stock = all(getattr(own, m, None) is getattr(kind.stock, m, None) for m in methods)
    return stock and not {*methods} & {*vars(module)}


def _uses_weight_linearly(module: nn.Module, x: Tensor) -> bool | None:
    """Tell whether doubling the weight doubles the output of a forward that is not torch's.

    Weight standardisation, for one, fails: snapped weights would not be what is multiplied. A
    power of two scales floating-point results exactly, so the comparison is for equality.

    Returns:
        None where that cannot be seen: the forward takes other inputs, or gives no one tensor.
    """
    own = dict(module.named_parameters(recurse=False))
    weight = ramp(own["weight"].shape, own["weight"])
    state = {"module.bias": torch.zeros_like(own["bias"])} if "bias" in own else {}
    others = {f"module.{name}": p for name, p in own.items() if name not in ("weight", "bias")}
    modes = [(child, child.training) for child in module.modules()]
    for child, _ in modes:  # not eval(): a layer may do more there, such as merge an adapter
        child.training = False

    def call(weight: Tensor) -> Tensor:
        state["module.weight"] = weight
        return cast(Tensor, torch.func.functional_call(_Bare(module), state, x))

    try:
        with torch.no_grad():
            once = call(weight)
            if not once.any():  # by a gain that begins at zero, which hides what the weight does
                state |= {name: torch.ones_like(p) for name, p in others.items()}
                once = call(weight)
            return torch.equal(2 * once, call(2 * weight)) if once.any() else None
    except (*CALLING, LookupError):
        return None
    finally:
        for child, training in modes:
            child.training = training


class _Bare(nn.Module):
    """Calls a module's forward without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.module.forward(x))
