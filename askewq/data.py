"""Data sets from the Hub or local files: their splits, with the columns and labels of a task.

All of it is read before any model is built; `batches` then prepares samples as the model wants
them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from askewq.columns import Columns, as_trained, columns_of, labels_of, named_labels
from askewq.config import Recipe
from askewq.errors import DataError, near
from askewq.sources import files_of, reading, reason, source_of
from askewq.vocabulary import Task


@dataclass(slots=True)
class OpenData:
    """Two splits of a data set with the columns and labels that the task needs.

    `train` is a datasets.IterableDataset where the recipe says streaming.
    """

    train: Any
    eval: Any
    columns: Columns
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()


def open_data(recipe: Recipe, task: Task) -> OpenData:
    """Open the data set of a recipe.

    Raises:
        DataError: a data set that cannot be read; a missing split or column (naming those there
            are); labels that evaluation has and training lacks.
    """
    splits = _call_datasets(recipe, split=None)
    train = _split(recipe, splits, recipe.train_split, "--train-split")
    evaluation = _eval_split(recipe, splits)
    notes = _shared_rows(recipe, splits)
    if recipe.streaming:
        features = train.features or evaluation.features  # a stream of json has none
        columns = columns_of(recipe, task, features)
        labels = named_labels(features, columns.label) if columns.label else ()
    else:
        columns = columns_of(recipe, task, train.features)
        labels = labels_of(train, columns.label) if columns.label else ()
        notes += _untrained(train, evaluation, columns.label)
        notes += _doubtful(train, columns.label, labels)
        if labels[:4] == ("-1", "0", "1", "2"):
            notes += (f"the label -1 of {columns.label} is learnt as a class; it may mean none",)
        if columns.label:
            _check_order(recipe, splits, train, evaluation, columns.label)
        notes += _empty_texts(train, columns, "--train-split")
        train = _sample(train, columns, recipe.max_train_samples, recipe.seed)
    _check_class_names(recipe, columns.label)
    if columns.label and len(labels) < 2:
        raise DataError(
            f"the label column {columns.label!r} has the label {', '.join(labels)} only, and a "
            "classifier needs two; choose another --label-column, or another --train-split."
        )
    notes += _empty_texts(evaluation, columns, "--eval-split")
    evaluation = _sample(evaluation, columns, recipe.max_eval_samples, 0)
    return OpenData(train, evaluation, columns, labels, notes)


def _empty_texts(split: Any, columns: Columns, flag: str) -> tuple[str, ...]:
    """Return a warning where rows have no text: such as say NA in a csv file have none."""
    import datasets

    texts = [n for n in columns.inputs if isinstance(split.features[n], datasets.Value)]
    counts = {name: split.data.column(name).null_count for name in texts}
    return tuple(
        f"{count} of {len(split)} rows of {flag} have no {name} and are read as empty (in a csv "
        "file also those that say None, NA or null)"
        for name, count in counts.items()
        if count
    )


def _shared_rows(recipe: Recipe, splits: Any) -> tuple[str, ...]:
    """Return a warning where samples are judged that are trained on."""
    from datasets import ReadInstruction

    train, evaluation = recipe.train_split, _eval_name(recipe, splits)
    if train == evaluation:
        shared = 1
    elif recipe.streaming or not {train, evaluation} - {*splits}:
        shared = 0  # two whole splits
    else:
        sizes = {name: len(split) for name, split in splits.items()}
        trained, judged = (
            ReadInstruction.from_spec(name).to_absolute(sizes) for name in (train, evaluation)
        )
        shared = sum(
            max(0, min(a.to, b.to) - max(a.from_, b.from_))
            for a in trained
            for b in judged
            if a.splitname == b.splitname
        )
    if not shared:
        return ()
    return (
        f"--eval-split {evaluation} has rows of --train-split {train}: the figures are of samples "
        "that were trained on",
    )


def _untrained(train: Any, evaluation: Any, column: str | None) -> tuple[str, ...]:
    """Return a warning where a split is judged on named classes that training has no sample of."""
    import datasets

    feature = train.features[column] if column else None
    if not isinstance(feature, datasets.ClassLabel):
        return ()  # values that are new are refused, when they become numbers
    judged = Counter(evaluation[column][:])
    new = sorted({*range(len(feature.names))} & judged.keys() - {*train[column][:]})
    if not new:
        return ()
    names = ", ".join(feature.names[label] for label in new[:8])
    return (
        f"{sum(judged[label] for label in new)} of {len(evaluation)} rows of --eval-split are of "
        f"classes that --train-split has no row of: {names}",
    )


def _doubtful(train: Any, column: str | None, labels: Sequence[str]) -> tuple[str, ...]:
    """Return a warning where labels look like mistakes, or like no classes."""
    import datasets

    notes: tuple[str, ...] = ()
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(label.strip().casefold(), []).append(label)
    if some := next((names for names in alike.values() if len(names) > 1), None):
        names = " and ".join(map(repr, some))
        notes += (f"the labels {names} of {column} differ by blanks or case, and are classes each",)
    named = column is not None and isinstance(train.features[column], datasets.ClassLabel)
    if not named and len(labels) > 20 and 2 * len(labels) > len(train):
        notes += (
            f"{column} has {len(labels)} different values in {len(train)} rows, and each is learnt "
            "as a class; where they are none, choose another --label-column",
        )
    return notes


def _check_class_names(recipe: Recipe, column: str | None) -> None:
    """Check that the parquet files of a folder number the classes alike.

    datasets takes the names of the first file, and the numbers of all.

    Raises:
        DataError: two files that do not.
    """
    import datasets
    from pyarrow import parquet

    path = Path(recipe.dataset)
    if column is None or not path.is_dir() or not any(path.rglob("*.parquet")):
        return
    splits = files_of(path, recipe.dataset_config)
    files = [file for split in splits.values() for file in split]
    first: tuple[str, list[str]] | None = None
    for file in files:
        if not file.endswith(".parquet"):
            continue
        features = datasets.Features.from_arrow_schema(parquet.read_schema(file))
        feature = features.get(column)
        if not isinstance(feature, datasets.ClassLabel):
            continue
        first = first or (file, feature.names)
        if feature.names != first[1]:
            raise DataError(
                f"the classes of the column {column!r} have other numbers in {file} "
                f"({', '.join(feature.names[:8])}) than in {first[0]} "
                f"({', '.join(first[1][:8])}), and datasets reads both as the first; write both "
                "with the same ClassLabel."
            )


def _check_order(recipe: Recipe, splits: Any, train: Any, evaluation: Any, column: str) -> None:
    """Refuse slices of rows that are sorted by class.

    Raises:
        DataError: one that lacks classes of its split, and has the others one after the other; one
            for evaluation that has one class of several, or mostly such as training has not.
    """
    names = recipe.train_split, _eval_name(recipe, splits)
    if not any("[" in name for name in names):
        return
    labels = [split[column][:] for split in (train, evaluation)]
    trained, judged = {*labels[0]}, Counter(labels[1])
    new = sum(count for label, count in judged.items() if label not in trained)
    found = (len(judged) == 1 < len(trained) and judged.total() > 9) or 2 * new > judged.total()
    for name, values in zip(names, labels, strict=True):
        whole = {label for base in _bases(name) for label in splits[base][column][:]}
        runs = Counter(label for label, _ in groupby(values))
        once = max(runs.values()) == 1 and min(Counter(values).values()) > 1
        found = found or ("[" in name and len(values) > 9 and once and len(runs) < len(whole))
    if found:
        raise DataError(
            f"--train-split {names[0]!r} has {len(trained)} classes and the evaluation split "
            f"{names[1]!r} {len(judged)}: the rows are sorted by class. Shuffle them, or "
            "put images into the folders train/CLASS and test/CLASS."
        )


def open_eval(
    recipe: Recipe, task: Task, labels: tuple[str, ...], trained: Mapping[str, Any] | None = None
) -> OpenData:
    """Open only the evaluation split, for an artifact that knows its labels.

    Args:
        trained: the settings of its run, whose columns are read if `recipe` names none.

    Raises:
        DataError: as `open_data`.
    """
    evaluation = _eval_split(recipe, _call_datasets(recipe, split=None))
    recipe = as_trained(recipe, trained or {}, evaluation.column_names)
    columns = columns_of(recipe, task, evaluation.features)
    _check_class_names(recipe, columns.label)
    notes = _empty_texts(evaluation, columns, "--eval-split")
    evaluation = _sample(evaluation, columns, recipe.max_eval_samples, 0)
    return OpenData(None, evaluation, columns, labels, notes)


def _call_datasets(recipe: Recipe, split: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    with reading(recipe.dataset):
        name, arguments = source_of(recipe)
        return datasets.load_dataset(name, split=split, streaming=recipe.streaming, **arguments)


def _split(recipe: Recipe, splits: Any, name: str, flag: str) -> Any:
    from datasets import ReadInstruction

    for base in _bases(name):
        if base not in splits:
            raise DataError(
                f"{flag} {name!r}: {recipe.dataset!r} has no split {base!r}{near(base, splits)}; "
                f"it has {', '.join(splits)}."
            )
    if name not in splits and not recipe.streaming:
        try:
            sizes = {key: len(split) for key, split in splits.items()}
            ReadInstruction.from_spec(name).to_absolute(sizes)
        except (ValueError, AssertionError) as error:
            raise DataError(
                f"{flag} {name!r} is no part of {recipe.dataset!r} ({reason(error)}); a slice "
                "is written as in 'train[:90%]' or 'train[100:200]'."
            ) from error
    chosen = splits[name] if name in splits else _call_datasets(recipe, split=name)
    if not recipe.streaming and len(chosen) == 0:
        raise DataError(f"{flag} {name!r} of {recipe.dataset!r} is empty.")
    return chosen


def _bases(name: str) -> list[str]:
    """Return the splits that a name such as ``train[:90%]+test`` takes its rows from."""
    return [part.split("[")[0] for part in name.split("+")]


def _eval_name(recipe: Recipe, splits: Any) -> str:
    name = recipe.eval_split or next((s for s in ("validation", "test") if s in splits), None)
    if name is None:
        raise DataError(
            f"{recipe.dataset!r} has neither a validation nor a test split; it has "
            f"{', '.join(splits)}. Pass --eval-split, for instance --train-split 'train[:90%]' "
            "--eval-split 'train[90%:]', where the rows are not sorted by class; else shuffle "
            "them, or put images into the folders train/CLASS and test/CLASS."
        )
    return name


def _eval_split(recipe: Recipe, splits: Any) -> Any:
    name = _eval_name(recipe, splits)
    split = _split(recipe, splits, name, "--eval-split")
    if recipe.streaming:
        with reading(recipe.dataset):
            split = _on_disk(recipe, name, split)
        if len(split) == 0:
            raise DataError(f"--eval-split {name!r} of {recipe.dataset!r} is empty.")
    return split


def _on_disk(recipe: Recipe, name: str, stream: Any) -> Any:
    """Return all samples of a stream as a split in datasets' cache: it is read again and again.

    The next run, and every other process, finds the copy there while the data set's files are the
    same.
    """
    import datasets
    from datasets.fingerprint import Hasher

    source, arguments = source_of(recipe)
    builder = datasets.load_dataset_builder(source, **arguments)
    read = [str(file) for files in builder.config.data_files.values() for file in files]
    # The Hub's addresses name the commit.
    states = [Path(file).stat() for file in read if Path(file).exists()]
    versions = [(state.st_size, state.st_mtime_ns) for state in states]
    known_by = [builder.name, builder.config_id, read, versions, name]
    features = stream.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    for name in images:  # copied as they are, not decoded and encoded again
        stream = stream.cast_column(name, datasets.Image(decode=False))
    split = datasets.Dataset.from_generator(
        _rows,
        gen_kwargs={"stream": stream},
        features=stream.features,
        fingerprint=Hasher.hash(known_by),
    )
    for name in images:
        split = split.cast_column(name, datasets.Image())
    return split


def _rows(stream: Any) -> Iterator[Any]:
    yield from stream


def _sample(split: Any, columns: Columns, count: int | None, seed: int) -> Any:
    """Return `count` random samples: the first ones of an image folder are all of one class.

    A corpus stays whole, in its order: its samples are blocks, of which `batches` takes some.
    """
    if columns.corpus or count is None or count >= len(split):
        return split
    return split.shuffle(seed=seed).select(range(count))
