"""Which columns of a data set a task reads, and what labels one of them has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from askewq.config import Recipe
from askewq.errors import DataError, near
from askewq.vocabulary import EMBEDDING_TASKS, IMAGE_TASKS, Task

# What texts are called, in the order of preference; two that belong together come first.
_TEXT_PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("question", "sentence"), ("question", "passage"), ("query", "passage")),
    *(("text1", "text2"), ("text_a", "text_b")),
)
_TEXT_NAMES = ("text", "sentence", "content", "review", "comment", "body", "document")
_LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "target", "class")


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a task reads.

    Attributes:
        label: None for causal-lm and for embeddings.
        corpus: whether the texts are one, cut into blocks of tokens (causal-lm).
    """

    inputs: tuple[str, ...]
    label: str | None
    corpus: bool = False


def columns_of(recipe: Recipe, task: Task, features: Any) -> Columns:
    """Return the columns that a task reads, as the recipe names them or as they look.

    Raises:
        DataError: a column that is not there or holds something else, or none that looks like it;
            the message names those there are.
    """
    import datasets

    images = [name for name, f in features.items() if isinstance(f, datasets.Image)]
    texts = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    ]
    if task in IMAGE_TASKS:
        inputs = [recipe.image_column] if recipe.image_column else images[:1]
        if not images and texts and not recipe.image_column:
            raise DataError(
                f"no column looks like an image; there are: {', '.join(features)}. Names of files "
                "are read from a metadata.csv beside the images, whose column file_name has them; "
                "pass that folder as --dataset."
            )
        _check(inputs, features, "--image-column", "an image")
        if not isinstance(features[inputs[0]], datasets.Image):
            raise DataError(
                f"--image-column {inputs[0]!r} holds {features[inputs[0]]}, not images; image "
                f"columns: {', '.join(images) or 'none'}."
            )
        labelled = task not in EMBEDDING_TASKS
        return Columns(tuple(inputs), _label_column(recipe, features) if labelled else None)
    if task in ("causal-lm", "feature-extraction"):
        inputs = list(recipe.text_columns) or _guessed_texts(texts, pairs=())
        _check_texts(inputs, texts, features, at_most=1)
        return Columns(tuple(inputs), None, corpus=task == "causal-lm")
    label = _label_column(recipe, features)
    others = [name for name in texts if name != label]
    inputs = list(recipe.text_columns) or _guessed_texts(others, _TEXT_PAIRS)
    _check_texts(inputs, texts, features, at_most=2)
    return Columns(tuple(inputs), label)


def as_trained(recipe: Recipe, trained: Mapping[str, Any], names: Sequence[str]) -> Recipe:
    """Return the recipe with the columns that a run's settings name, where it names none itself.

    Args:
        names: the columns that there are; one that is not among them is not taken over.
    """
    found: dict[str, Any] = {}
    for key in ("image_column", "label_column", "text_columns"):
        named = trained.get(key)
        listed = tuple(named) if isinstance(named, list) else (named,)
        if named and not getattr(recipe, key) and {*listed} <= {*names}:
            found[key] = listed if key == "text_columns" else named
    return recipe.model_copy(update=found)


def _guessed_texts(texts: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return the columns with the texts, by their names where there are several.

    Raises:
        DataError: several, and no name that says which.
    """
    known = [list(pair) for pair in pairs if {*pair} <= {*texts}]
    known += [[name] for name in _TEXT_NAMES if name in texts]
    if len(texts) < 2 or known:
        return known[0] if known else [*texts]
    raise DataError(
        f"the columns {', '.join(texts)} all hold text; say which to read, --text-columns with one "
        "of them, or with two that belong together."
    )


def _check_texts(
    names: Sequence[str], texts: Sequence[str], features: Any, *, at_most: int
) -> None:
    _check(names, features, "--text-columns", "a text")
    for name in names:
        if name not in texts:
            raise DataError(
                f"--text-columns {name!r} holds {features[name]}, not text; text columns: "
                f"{', '.join(texts) or 'none'}."
            )
    if len(names) > at_most:
        raise DataError(
            f"--text-columns {' '.join(names)}: the task reads at most {at_most} of them."
        )


def _label_column(recipe: Recipe, features: Any) -> str:
    import datasets

    if recipe.label_column:
        _check([recipe.label_column], features, "--label-column", "a label")
        feature = features[recipe.label_column]
        if not isinstance(feature, datasets.ClassLabel | datasets.Value):
            raise DataError(
                f"--label-column {recipe.label_column!r} holds {feature}, not labels; columns: "
                f"{', '.join(features)}."
            )
        return recipe.label_column
    if all(isinstance(feature, datasets.Image) for feature in features.values()):
        raise DataError(
            "the images have no labels: put them into the folders train/CLASS and test/CLASS, "
            "themselves and not in folders below, or name them in a metadata.csv."
        )
    classes = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel)]
    named = [name for name in _LABEL_NAMES if isinstance(features.get(name), datasets.Value)]
    known = [name for name in _LABEL_NAMES if name in classes]
    guesses = known[:1] or (named[:1] if not classes else [*classes, *named])
    if len(guesses) > 1:
        raise DataError(
            f"the columns {', '.join(guesses)} may all hold the labels; say which does, "
            "--label-column."
        )
    _check(guesses, features, "--label-column", "a label")
    return guesses[0]


def _check(names: Sequence[str], features: Any, flag: str, what: str) -> None:
    present = ", ".join(features)
    if not names:
        raise DataError(f"no column looks like {what}; pass {flag} with one of: {present}.")
    for name in names:
        if name not in features:
            raise DataError(
                f"{flag} {name!r}: no such column{near(name, features)}; there are: {present}."
            )


def named_labels(features: Any, column: str) -> tuple[str, ...]:
    """Return the class names of a data set whose training split is not read beforehand.

    Raises:
        DataError: a column that does not name them.
    """
    import datasets

    feature = features[column]
    if not isinstance(feature, datasets.ClassLabel):
        raise DataError(
            f"--streaming: the label column {column!r} holds {feature}, and which labels there are "
            "would be known at the end of the stream only; use a data set whose labels are a "
            "ClassLabel (parquet or a folder of images), or leave out --streaming."
        )
    return tuple(feature.names)


def labels_of(train: Any, column: str) -> tuple[str, ...]:
    """Return the class names of a split: the feature's own, or the values that occur, sorted.

    Raises:
        DataError: a row without a label.
    """
    import datasets

    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = set(train[column][:])
    if any(value is None or value != value for value in values):  # NaN
        raise DataError(
            f"the label column {column!r} has rows without a label (in a csv file also those that "
            "say None or NA); remove or rename them."
        )
    if any(isinstance(value, float) and value % 1 for value in values):
        raise DataError(
            f"the label column {column!r} holds numbers with fractions, such as "
            f"{next(v for v in sorted(values) if v % 1):g}, and classes are what can be learnt; "
            "choose another --label-column, or round them to classes."
        )
    return tuple(str(value) for value in sorted(values))
