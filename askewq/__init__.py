"""askewq: fine-tune pretrained models to 1- to 8-bit weights with AskewSGD, and pack them.

The public names below are imported on first use, so that `import askewq` and `askewq --help` do
not wait for torch, and the optimizer needs neither timm nor transformers. The import also lets
transformers know artifacts, now or when it is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

from askewq import registration

if TYPE_CHECKING:
    from askewq.activations import follow_inputs_ as follow_inputs_
    from askewq.activations import round_inputs as round_inputs
    from askewq.anneal import Closing as Closing
    from askewq.artifact import load as load
    from askewq.artifact import save as save
    from askewq.config import Recipe as Recipe
    from askewq.errors import AskewError as AskewError
    from askewq.grid import Grid as Grid
    from askewq.grid import make_grid as make_grid
    from askewq.layers import snap_ as snap_
    from askewq.layers import snapped as snapped
    from askewq.optim import AskewAdamW as AskewAdamW
    from askewq.optim import AskewSGD as AskewSGD
    from askewq.plan_table import Plan as Plan
    from askewq.polish import Polisher as Polisher
    from askewq.train import finetune as finetune
    from askewq.wrap import apply as apply
    from askewq.wrap import plan as plan
    from askewq.wrap import quantize as quantize

__version__ = "0.1.0"

_HOMES = {
    "follow_inputs_": "activations.follow_inputs_",
    "round_inputs": "activations.round_inputs",
    "Closing": "anneal.Closing",
    "AskewError": "errors.AskewError",
    "Grid": "grid.Grid",
    "make_grid": "grid.make_grid",
    "snap_": "layers.snap_",
    "snapped": "layers.snapped",
    "AskewAdamW": "optim.AskewAdamW",
    "AskewSGD": "optim.AskewSGD",
    "Plan": "plan_table.Plan",
    "Polisher": "polish.Polisher",
    "plan": "wrap.plan",
    "apply": "wrap.apply",
    "quantize": "wrap.quantize",
    "Recipe": "config.Recipe",
    "load": "artifact.load",
    "save": "artifact.save",
    "finetune": "train.finetune",
}

__all__ = ["__version__", *sorted(_HOMES)]

registration.register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'askewq' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(".")
    return getattr(importlib.import_module(f"askewq.{module}"), attribute)
