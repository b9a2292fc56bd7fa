"""What a recipe leaves open, chosen by model and method; the plan and optimizers it asks for."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from askewq import config, refine, wrap
from askewq.anneal import POWER, Closing
from askewq.config import Recipe
from askewq.errors import RecipeError
from askewq.methods import RIVALS, check_bits, check_strength, strength_for
from askewq.optim import PULLS, AskewAdamW, AskewSGD
from askewq.plan_table import Plan
from askewq.rivals import Follower
from askewq.tasks import keeps_last
from askewq.vocabulary import Bits, Task

# The paper's closing, over the second half of the run.
_PAPER = Closing("single", start=0.5, end=1.0)
# Of the moments where the quantized weights' steps are measured in level spacings.
LEVEL_BETAS = 0.8, 0.99
# The widest grid for which they are the default; finer ones were not tried.
COARSE = 4


class Pacer(Protocol):
    """What follows the progress of the low-bit steps: AskewSGD itself, or another method."""

    def anneal(self, progress: float) -> None:
        """Get ready for the next step."""

    def feasible_share(self) -> float:
        """Return the share of quantized weights that are where they belong by now."""

    def shown(self, progress: float) -> dict[str, float]:
        """Return what the progress bar shows of the method."""


def level_lr_of(bits: Bits, steps: int) -> float:
    """Return the lr of the quantized weights in level spacings.

    By the contest on ResNet-20 (recipes/README.md): 0.01 at 1 bit after 600 steps, and 0.005 at
    ternary, 2 and 4 bits, are the trials'; 0.005 at 1 bit after 3,900 is by one run judged on test
    images, and the budgets between are split at the geometric mean.
    """
    return 0.01 if bits == 1 and steps <= 1500 else 0.005


def resolve(recipe: Recipe, task: Task, model: nn.Module, steps: int) -> Recipe:
    """Return the recipe with every choice made.

    Args:
        steps: low-bit steps of the run.

    Raises:
        RecipeError: bits or a strength that the method cannot do, a setting that decides nothing.
    """
    check_bits(recipe.method, recipe.bits)
    for pattern, bits in recipe.overrides.items():
        check_bits(recipe.method, bits, f"the override {pattern}={bits}")
    if recipe.method in RIVALS:
        check_strength(recipe.method, recipe.strength)
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if recipe.recalibrate_bn and not refine.batch_norms(model):
        raise RecipeError(
            f"recalibrate_bn = {recipe.recalibrate_bn} decides nothing: the network has no batch "
            "norm with statistics; leave it out."
        )
    # Coarse levels and a normalised network: steps of one length, in levels, for every weight.
    lazy = recipe.method == "askewsgd" and recipe.closing in (None, "lazy")
    ours = _coarse(recipe) and batch_norm and lazy and recipe.optimizer is None
    level_lr = recipe.level_lr or (level_lr_of(recipe.bits, steps) if ours else None)
    adamw = not batch_norm or level_lr is not None
    optimizer = recipe.optimizer or ("adamw" if adamw else "sgd")
    lr = 0.02 if optimizer == "sgd" else 1e-4 if level_lr is None else 1e-2
    made: dict[str, Any] = {"task": task, "optimizer": optimizer, "lr": lr, "level_lr": level_lr}
    if recipe.full_precision_steps:
        made["full_precision_lr"] = 1e-4 if level_lr is not None else recipe.lr or lr
    if recipe.method not in RIVALS:
        paper = recipe.method == "askewsgd-paper"
        closing = _PAPER if paper else Closing(recipe.closing or "lazy")
        made |= {"closing": closing.kind, "close_power": POWER[closing.kind]}
        made |= {"close_start": closing.start, "close_end": closing.end}
        if closing.kind != "lazy":
            pull = recipe.pull or ("coupled" if paper else "decoupled")
            made |= {"pull": pull, **PULLS[pull]}
    opened = {key: value for key, value in made.items() if getattr(recipe, key) is None}
    resolved = recipe.model_copy(update=opened)
    config.check(resolved)
    return resolved


def _coarse(recipe: Recipe) -> bool:
    """Tell whether all grids are among those for which steps in level spacings were tried."""
    return all(map(_is_coarse, (recipe.bits, *recipe.overrides.values())))


def _is_coarse(bits: Bits) -> bool:
    return bits == "ternary" or bits <= COARSE


def notes_of(recipe: Recipe, device: torch.device) -> list[str]:
    """Return what is out of the ordinary in a recipe's choices, to be said before the run."""
    notes = []
    if recipe.level_lr is not None and not _coarse(recipe):
        notes.append(
            f"level_lr = {recipe.level_lr} is the length of a step in level spacings, and hardly "
            f"moves weights of more than {COARSE} bits; leave it out, or, where a recipe has it, "
            "name an --optimizer"
        )
    by_sgd = recipe.method == "askewsgd" and recipe.optimizer == "sgd"
    finer = [f"{name}={bits}" for name, bits in recipe.overrides.items() if not _is_coarse(bits)]
    if by_sgd and recipe.closing == "lazy" and finer and _is_coarse(recipe.bits):
        notes.append(
            f"all layers are trained by SGD, because {finer[0]} has more than {COARSE} bits: steps "
            "in level spacings, which gain most at 1 bit (recipes/README.md), are the default "
            "without such layers"
        )
    if recipe.mixed_precision == "bf16" and _emulates_bf16(device):
        notes.append(
            "this processor has no instructions for bf16, and a step takes many times as long as "
            "in float32; pass --mixed-precision no"
        )
    return notes


def _emulates_bf16(device: torch.device) -> bool:
    """Tell whether products in bf16 are computed bit by bit: on a CPU that cannot do them."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def plan_of(recipe: Recipe, model: nn.Module, task: Task) -> Plan:
    """Return what quantizing a model by a recipe would do (`wrap.plan`)."""
    return wrap.plan(
        model,
        recipe.bits,
        grid=recipe.grid,
        group_size=recipe.group_size,
        include=recipe.include,
        exclude=recipe.exclude,
        act_bits=recipe.act_bits,
        bits_override=recipe.overrides,
        keep_last=keeps_last(task),
    )


def plain_optimizer(recipe: Recipe, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return torch's optimizer of a resolved recipe."""
    parameters, decay = model.parameters(), recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, recipe.momentum, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr, weight_decay=decay)


def low_bit_optimizer(
    recipe: Recipe, model: nn.Module, steps: int
) -> tuple[torch.optim.Optimizer, Pacer]:
    """Return the optimizer of a resolved recipe's method, and what paces it.

    Args:
        steps: low-bit steps of the run.
    """
    lr = recipe.lr or 0.0
    if recipe.method in RIVALS:
        strength = recipe.strength or strength_for(recipe.method, steps)
        follower = Follower(model, recipe.method, strength, recipe.gradient_bits)
        optimizer = plain_optimizer(recipe, model, lr)
        follower.attach(optimizer)
        return optimizer, follower
    chosen: dict[str, Any] = {
        "kind": recipe.closing,
        "start": recipe.close_start,
        "end": recipe.close_end,
        "power": recipe.close_power,
    }
    if recipe.closing == "staggered":
        chosen["every"] = recipe.close_every
    if recipe.closing == "single":
        chosen["final_radius"] = recipe.final_radius
    closing = Closing(**chosen)
    own: dict[str, Any] = {"closing": closing, "weight_decay": recipe.weight_decay}
    if closing.kind != "lazy":
        own |= {"pull": recipe.pull, "alpha": recipe.alpha, "clip": recipe.clip}
    make: Callable[..., AskewSGD | AskewAdamW] = AskewAdamW
    if recipe.optimizer == "sgd":
        make, own = AskewSGD, own | {"momentum": recipe.momentum}
    elif recipe.level_lr is not None:
        own |= {"level_lr": recipe.level_lr, "betas": LEVEL_BETAS}
    skewed = make(model, lr, **own)
    return skewed, skewed
