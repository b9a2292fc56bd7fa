"""What a recipe leaves open: chosen by model, method, closing and pull; what is given stays."""

import pytest
import torch

from askewq import choices, config
from askewq.errors import RecipeError
from askewq.methods import RIVALS
from askewq.wrap import quantize

ESSENTIALS = {"model": "m", "dataset": "d", "output": "o"}
CONV, LINEAR = torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 3)


def resolve(model=LINEAR, **given):
    """Return a recipe with every choice made, of an image model without batch norm at first."""
    recipe = config.build({**ESSENTIALS, **given})
    return choices.resolve(recipe, "image-classification", model, 300)


def test_steps_in_levels_of_fine_grids_are_noted():
    """As a recipe at few bits has them that is run at more."""
    cpu = torch.device("cpu")
    coarse, fine = (resolve(optimizer="adamw", level_lr=0.005, bits=bits) for bits in (4, 8))
    assert not choices.notes_of(coarse, cpu)
    (note,) = choices.notes_of(fine, cpu)
    assert "hardly moves weights of more than 4 bits" in note


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bits": 1, "bits_override": ("conv=8",)}, True),
        ({"bits": 1, "bits_override": ("conv=4",)}, False),
        ({"bits": 1, "optimizer": "sgd"}, False),
        ({"bits": 8, "bits_override": ("conv=8",)}, False),
        ({"bits": 1, "bits_override": ("conv=8",), "level_lr": 0.01}, None),
        ({"bits": 1, "bits_override": ("conv=8",), "method": "lsq"}, False),
        ({"bits": 1, "bits_override": ("conv=8",), "closing": "staggered"}, False),
    ],
)
def test_a_fine_layer_that_decides_the_optimizer_of_all_is_noted(settings, told):
    """Steps in level spacings are not the default beside it."""
    notes = choices.notes_of(resolve(CONV, **settings), torch.device("cpu"))
    assert [note.startswith("all layers are trained by SGD, because conv=8") for note in notes] == (
        [False] if told is None else [True] * told
    )


@pytest.mark.parametrize("can", [True, False])
def test_bf16_on_a_processor_without_it_is_noted(can, monkeypatch):
    """A step takes many times as long there; a GPU has it."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: can)
    recipe = resolve(mixed_precision="bf16")
    assert bool(choices.notes_of(recipe, torch.device("cpu"))) == (not can)
    assert not choices.notes_of(recipe, torch.device("cuda"))
    assert not choices.notes_of(resolve(), torch.device("cpu"))


def test_resolve_chooses_by_the_model():
    """Batch norm asks for SGD, everything else for AdamW, each with its own lr and closing."""
    recipe = config.build({"model": "m", "dataset": "d", "output": "o", "bits": 8})
    with_norm = choices.resolve(recipe, "image-classification", CONV, 300)
    without = choices.resolve(recipe, "causal-lm", LINEAR, 300)
    assert (with_norm.optimizer, with_norm.lr) == ("sgd", 0.02)
    assert (without.optimizer, without.lr) == ("adamw", 1e-4)
    assert (without.full_precision_lr, without.close_power) == (None, 3.0)
    warmed = recipe.model_copy(update={"full_precision_steps": 2})
    warmed = choices.resolve(warmed, "causal-lm", LINEAR, 300)
    assert warmed.full_precision_lr == 1e-4  # as the low-bit steps, unless it says otherwise
    fast = recipe.model_copy(update={"momentum": 0.5})
    with pytest.raises(RecipeError, match="momentum goes with optimizer = sgd"):
        choices.resolve(fast, "causal-lm", LINEAR, 300)
    single = choices.resolve(
        config.build({**recipe.model_dump(exclude_unset=True), "closing": "single", "lr": 0.1}),
        "causal-lm",
        LINEAR,
        300,
    )
    assert (single.lr, single.close_power) == (0.1, 1.0)


@pytest.mark.parametrize(
    ("given", "closing", "times", "pull"),
    [
        ({}, "lazy", (0.0, 0.9, 3.0), (None, None, None)),
        ({"closing": "staggered"}, "staggered", (0.0, 0.9, 3.0), ("decoupled", 0.5, 0.1)),
        ({"closing": "single"}, "single", (0.0, 0.9, 1.0), ("decoupled", 0.5, 0.1)),
        (
            {"closing": "staggered", "pull": "coupled"},
            "staggered",
            (0.0, 0.9, 3.0),
            ("coupled", 5.0, 5.0),
        ),
        ({"method": "askewsgd-paper"}, "single", (0.5, 1.0, 1.0), ("coupled", 5.0, 5.0)),
        (
            {"method": "askewsgd-paper", "pull": "decoupled", "close_end": 0.8, "clip": 0.2},
            "single",
            (0.5, 0.8, 1.0),
            ("decoupled", 0.5, 0.2),
        ),
    ],
    ids=["default", "staggered", "single", "coupled", "paper", "paper, changed"],
)
def test_the_constraint_is_chosen_by_method_closing_and_pull(given, closing, times, pull):
    """Each form of AskewSGD has its own schedule; what is given is not changed."""
    recipe = resolve(**given)
    assert recipe.closing == closing
    assert (recipe.close_start, recipe.close_end, recipe.close_power) == times
    assert (recipe.pull, recipe.alpha, recipe.clip) == pull


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"optimizer": "sgd"},
        {"optimizer": "adamw"},
        {"method": "lsq"},
        {"method": "lsq", "optimizer": "adamw"},
        {"closing": "staggered"},
    ],
)
def test_the_optimizer_has_the_recipes_settings(given):
    """Rates, decay, momentum and betas, in every group, whatever makes the steps."""
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 3, 1) for _ in range(3)), torch.nn.BatchNorm2d(3)
    )
    recipe = config.build({**ESSENTIALS, "bits": 2, "weight_decay": 0.3, **given})
    recipe = choices.resolve(recipe, "image-classification", model, 100)
    quantize(model, 2)
    optimizer, _ = choices.low_bit_optimizer(recipe, model, 100)
    in_levels = [group.get("in_levels", False) for group in optimizer.param_groups]
    assert any(in_levels) == (recipe.level_lr is not None) == (given == {})
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0.3
        assert group["lr"] == (recipe.level_lr if group.get("in_levels") else recipe.lr)
        if recipe.optimizer == "sgd":
            assert group["momentum"] == 0.9
        else:
            assert group["betas"] == ((0.8, 0.99) if any(in_levels) else (0.9, 0.999))


def test_other_methods_leave_the_constraint_open():
    """A recipe of another method says nothing of intervals, and refuses to be told."""
    for method in RIVALS:
        recipe = resolve(method=method, bits=1)
        assert (recipe.closing, recipe.pull, recipe.alpha) == (None, None, None)
    with pytest.raises(RecipeError, match="alpha goes with method = askewsgd"):
        resolve(method="lsq", alpha=0.2)


@pytest.mark.parametrize(
    ("given", "level_lr"),
    [
        ({"bits": 1}, 0.01),
        ({"bits": "ternary"}, 0.005),
        ({"bits": 2}, 0.005),
        ({"bits": 4}, 0.005),
        ({"bits": 2, "bits_override": ["a=4", "b=ternary"]}, 0.005),
        ({"bits": 5}, None),
        ({"bits": 2, "bits_override": ["a=8"]}, None),
    ],
)
def test_few_levels_and_batch_norm_ask_for_steps_in_levels(given, level_lr):
    """Up to 4 bits the quantized weights of a normalised network get their own lr."""
    recipe = config.build({**ESSENTIALS, **given})
    chosen = choices.resolve(recipe, "image-classification", CONV, 300)
    coarse = level_lr is not None
    assert (chosen.optimizer, chosen.level_lr) == ("adamw" if coarse else "sgd", level_lr)
    assert chosen.lr == (0.01 if coarse else 0.02)
    warmed = recipe.model_copy(update={"full_precision_steps": 2})
    warmed = choices.resolve(warmed, "image-classification", CONV, 300)
    assert warmed.full_precision_lr == (1e-4 if coarse else 0.02)
    rated = config.build({**ESSENTIALS, **given, "lr": 0.1})
    rated = choices.resolve(rated, "image-classification", CONV, 300)
    assert (rated.optimizer, rated.lr, rated.level_lr) == (chosen.optimizer, 0.1, level_lr)
    for told in ({"optimizer": "sgd"}, {"optimizer": "adamw"}, {"method": "lsq"}):
        other = config.build({**ESSENTIALS, **given, **told})
        assert choices.resolve(other, "image-classification", CONV, 300).level_lr is None
    assert choices.resolve(recipe, "image-classification", LINEAR, 300).level_lr is None
    own = config.build({**ESSENTIALS, **given, "level_lr": 0.02})
    own = choices.resolve(own, "image-classification", CONV, 300)
    assert (own.optimizer, own.lr, own.level_lr) == ("adamw", 0.01, 0.02)


@pytest.mark.parametrize("closing", ["staggered", "single"])
def test_other_closings_have_the_steps_of_sgd(closing):
    """Steps in levels were found to help lazy closing, and to cost staggered closing a point."""
    recipe = config.build({**ESSENTIALS, "bits": 1, "closing": closing})
    chosen = choices.resolve(recipe, "image-classification", CONV, 300)
    assert (chosen.optimizer, chosen.lr, chosen.level_lr) == ("sgd", 0.02, None)


def test_a_longer_run_at_one_bit_makes_shorter_steps():
    """The contest found half the step better at 3,900 steps than at 600."""
    recipe = config.build({**ESSENTIALS, "bits": 1})
    for steps, lr in ((1, 0.01), (600, 0.01), (1500, 0.01), (1501, 0.005), (3900, 0.005)):
        assert choices.resolve(recipe, "image-classification", CONV, steps).level_lr == lr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"level_lr": 0.01, "optimizer": "sgd"}, "level_lr goes with optimizer = adamw"),
        ({"level_lr": 0.01, "method": "lsq"}, "level_lr goes with method = askewsgd"),
        ({"alpha": 0.2}, "alpha goes with closing = staggered or single, and closing is lazy"),
        ({"pull": "coupled"}, "pull goes with closing = staggered or single"),
        ({"close_every": 2}, "close_every goes with closing = staggered"),
    ],
)
def test_settings_that_would_decide_nothing_are_refused(given, message):
    """A setting of another closing or optimizer is named once the choices are made."""
    with pytest.raises(RecipeError, match=message):
        resolve(**given)


def test_a_schedule_that_closes_before_it_opens_is_refused():
    """A start after the method's own end is found once that end is chosen."""
    with pytest.raises(RecipeError, match=r"close_start = 0\.95 must lie before close_end = 0\.9"):
        resolve(close_start=0.95)
    assert resolve(close_start=0.95, method="askewsgd-paper").close_end == 1.0


def test_a_resolved_recipe_reads_back_as_itself():
    """What a run writes is a recipe in which no choice is left."""
    for method in ("askewsgd", "askewsgd-paper", "lsq"):
        recipe = resolve(method=method)
        again = config.build(recipe.model_dump(), "the file")
        assert again == recipe
        assert choices.resolve(again, "image-classification", LINEAR, 300) == recipe


def test_the_papers_method_has_the_papers_intervals():
    """Under its name no other closing is trained."""
    with pytest.raises(RecipeError, match=r"closing = lazy goes with method = askewsgd"):
        resolve(method="askewsgd-paper", closing="lazy")
    assert resolve(method="askewsgd-paper", closing="single").close_start == 0.5
