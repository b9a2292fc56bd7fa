"""Settings that contradict each other, or that would decide nothing: what a recipe may not be.

The functions take a `config.Recipe`, which asks them about itself.
"""

from typing import Any, get_args

from askewq.vocabulary import EMBEDDING_TASKS, IMAGE_TASKS, Task

_ASKEW = ("method", ("askewsgd", "askewsgd-paper"))
_IMAGES = ("task", IMAGE_TASKS)
_TEXTS = ("task", tuple(task for task in get_args(Task) if task not in IMAGE_TASKS))
# Without labels a teacher gives the whole loss.
_LABELLED = ("task", tuple(task for task in get_args(Task) if task not in EMBEDDING_TASKS))
# A key that decides something only where another one has one of these values.
_NEEDS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("momentum", "optimizer", ("sgd",)),
    ("strength", "method", ("proxquant", "binaryrelax", "mirror-descent")),
    ("gradient_bits", "method", ("luq",)),
    ("closing", *_ASKEW),
    ("close_start", *_ASKEW),
    ("close_end", *_ASKEW),
    ("close_power", *_ASKEW),
    ("pull", *_ASKEW),
    ("alpha", *_ASKEW),
    ("clip", *_ASKEW),
    ("close_every", "closing", ("staggered",)),
    ("final_radius", "closing", ("single",)),
    ("pull", "closing", ("staggered", "single")),
    ("alpha", "closing", ("staggered", "single")),
    ("clip", "closing", ("staggered", "single")),
    ("level_lr", "optimizer", ("adamw",)),
    ("level_lr", *_ASKEW),
    ("label_column", "task", ("image-classification", "text-classification")),
    ("distill", *_LABELLED),
    ("full_precision_steps", *_LABELLED),
    ("tokenizer", *_TEXTS),
    ("max_length", *_TEXTS),
    ("text_columns", *_TEXTS),
    ("image_column", *_IMAGES),
    ("image_size", *_IMAGES),
    ("mean", *_IMAGES),
    ("std", *_IMAGES),
    ("augment", *_IMAGES),
    ("close_every", *_ASKEW),
    ("final_radius", *_ASKEW),
    ("shuffle_buffer", "streaming", (True,)),
]
# A key that decides something only where another one is not 0.
_NEEDS_SOME = {
    "temperature": "distill",
    "full_precision_lr": "full_precision_steps",
    "polish_lr": "polish_steps",
}
_INTERVALS = (
    *("close_start", "close_end", "close_power", "close_every", "final_radius"),
    *("pull", "alpha", "clip", "level_lr"),
)
# What belongs to a choice, by its default: with another one it is chosen anew.
_BELONGS = {
    "method": ("askewsgd", ("strength", "gradient_bits", "closing", *_INTERVALS)),
    "closing": ("lazy", _INTERVALS),
    "pull": ("decoupled", ("alpha", "clip")),
    "optimizer": (None, ("momentum", "lr", "level_lr")),
    "teacher": ("self", ("teacher_weights",)),
}
# Two ways to say how long a run is: one that is given replaces the other.
INSTEAD = {"epochs": "max_steps", "max_steps": "epochs"}
# What does not work on shards, and why.
_UNSHARDABLE = {
    "compile": "a compiled network takes weights made before its forward pass, not shards",
    "average": "it does not follow shards",
    "polish_steps": "it does not rescale shards",
    "distill_hidden": "with GPT-2 it gave other weights than DDP",
    "act_bits": "the scales of inputs are not kept alike in all processes",
}


def complaints(recipe: Any) -> list[str]:
    """Return what is wrong with the settings taken together.

    A choice that is still open (None, made later from the model) is not held against them.
    """
    wrong = []
    start, end = recipe.close_start, recipe.close_end
    if start is not None and end is not None and start >= end:
        wrong.append(
            f"close_start = {start} must lie before close_end = {end}; begin earlier, or "
            "give a later close_end"
        )
    coupled = recipe.pull == "coupled" or (recipe.pull is None and recipe.method != "askewsgd")
    if recipe.alpha is not None and recipe.alpha > 1 and not coupled:
        wrong.append(
            f"alpha = {recipe.alpha} with pull = 'decoupled' is a share of a Newton step, at most "
            "1; the paper's alpha goes with pull = 'coupled'"
        )
    if recipe.method == "askewsgd-paper" and recipe.closing not in (None, "single"):
        wrong.append(
            f"closing = {recipe.closing} goes with method = askewsgd, and method is "
            "askewsgd-paper, which has a single radius; leave closing out"
        )
    if recipe.resume and recipe.overwrite:
        wrong.append("resume and overwrite contradict each other; give one of them")
    for key, other, values in _NEEDS:
        chosen = getattr(recipe, other)
        if _changed(recipe, key) and chosen is not None and chosen not in values:
            wrong.append(
                f"{key} goes with {other} = {' or '.join(map(str, values))}, and {other} is "
                f"{chosen}; leave {key} out"
            )
    for key, other in _NEEDS_SOME.items():
        if getattr(recipe, other) == 0 and _changed(recipe, key):
            wrong.append(f"{key} goes with {other}, which is 0; leave {key} out")
    for key in ("teacher", "teacher_weights"):
        if not recipe.taught and _changed(recipe, key):
            wrong.append(f"{key} goes with distill or distill_hidden, which are 0; leave {key} out")
    if recipe.teacher == "self" and recipe.teacher_weights is not None:
        wrong.append("teacher = self has weights already; leave teacher or teacher_weights out")
    if recipe.streaming:
        wrong += _unstreamable(recipe)
    elif recipe.max_steps is not None and _changed(recipe, "epochs"):
        wrong.append("epochs does not go with max_steps, which decides; leave one of them out")
    if recipe.polish_steps and recipe.gradient_bits is not None:
        wrong.append("gradient_bits does not go with polish_steps; leave one of them out")
    return wrong


def overruled(stored: dict[str, Any], given: dict[str, Any]) -> set[str]:
    """Return the keys of a stored recipe that decide nothing beside what is given on top of it.

    Neither do those that belong to a choice for which another one is given.
    """
    needs = {(key, other) for key, other, values in _NEEDS if given.get(other) not in values}
    needs |= {(key, other) for key, other in _NEEDS_SOME.items() if given.get(other) == 0}
    useless = {key for key, other in needs if other in given}
    for choice, (default, keys) in _BELONGS.items():
        before = default if stored.get(choice) is None else stored[choice]
        if choice == "pull" and stored.get("method") == "askewsgd-paper":
            before = "coupled"
        if before is not None and given.get(choice, before) != before:
            useless |= {*keys}
    if "level_lr" in useless and stored.get("level_lr") is not None:  # the three are one choice
        useless |= {"optimizer", "lr"}
    useless |= {other for key, other in INSTEAD.items() if key in given}
    if given.get("bits") in (1, "ternary"):  # with one grid each
        useless.add("grid")
    if given.get("streaming"):
        useless |= {"epochs", "max_train_samples"}
    both, shares = stored | given, ("distill", "distill_hidden")
    untaught = given.keys() & shares and not any(both.get(share) for share in shares)
    if untaught and both.get("task") not in EMBEDDING_TASKS:
        useless |= {"teacher", "teacher_weights"}
    useless |= {key for key, other in _NEEDS_SOME.items() if other in useless}
    return useless & (stored.keys() - given.keys())


def _unstreamable(recipe: Any) -> list[str]:
    """Return what a stream, whose length nobody knows, cannot do."""
    wrong = []
    if recipe.max_steps is None:
        wrong.append(
            "streaming needs max_steps: how many samples a stream holds is not known before it ends"
        )
    if _changed(recipe, "epochs"):
        wrong.append("epochs does not go with streaming, which has no length; give max_steps")
    if recipe.max_train_samples is not None:
        wrong.append(
            "max_train_samples does not go with streaming: a random part needs all samples; leave "
            "it out, max_steps decides how many are read"
        )
    for key in ("train_split", "eval_split"):
        if {*"[+"} & {*(getattr(recipe, key) or "")}:
            wrong.append(
                f"{key} = {getattr(recipe, key)!r} does not go with streaming: a stream has no "
                "slices and no sums; name a whole split"
            )
    return wrong


def unshardable(recipe: Any) -> list[str]:
    """Return which settings do not work where FSDP2 spreads the weights over processes, and why."""
    return [
        f"{key} = {getattr(recipe, key)} does not go with FSDP2: {why}"
        for key, why in _UNSHARDABLE.items()
        if _changed(recipe, key)
    ]


def _changed(recipe: Any, key: str) -> bool:
    return bool(getattr(recipe, key) != type(recipe).model_fields[key].default)
