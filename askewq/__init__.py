"""askewq: fine-tune pretrained models to 1- to 8-bit weights with AskewSGD, and pack them.

The public names below are imported on first use, so that `import askewq` and `askewq --help` do
not wait for torch, and the optimizer needs neither timm nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from askewq.anneal import Closing as Closing
    from askewq.errors import AskewError as AskewError
    from askewq.grid import Grid as Grid
    from askewq.grid import make_grid as make_grid
    from askewq.layers import snap_ as snap_
    from askewq.layers import snapped as snapped
    from askewq.optim import AskewAdamW as AskewAdamW
    from askewq.optim import AskewSGD as AskewSGD
    from askewq.wrap import Plan as Plan
    from askewq.wrap import apply as apply
    from askewq.wrap import plan as plan
    from askewq.wrap import quantize as quantize

__version__ = "0.1.0"

_HOMES = {
    "anneal": ("Closing",),
    "errors": ("AskewError",),
    "grid": ("Grid", "make_grid"),
    "layers": ("snap_", "snapped"),
    "optim": ("AskewAdamW", "AskewSGD"),
    "wrap": ("Plan", "apply", "plan", "quantize"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'askewq' has no attribute {name!r}")
    return getattr(importlib.import_module(f"askewq.{_HOME_OF[name]}"), name)
