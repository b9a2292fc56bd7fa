"""Data sets from the Hub or local files, as loaders of batches ready for the model.

`open_data` reads splits, columns and labels before any model is built; `loaders` then prepares
samples as the model wants them. Images are decoded once and kept where they fit in memory, and
augmentation works on whole batches (`augment`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from askewq.config import Recipe
from askewq.errors import DataError, near
from askewq.preprocessing import ImagePreprocessing, Preprocessing, TextPreprocessing
from askewq.vocabulary import Task

# Decoded images are kept in memory up to this many bytes (CIFAR-10 takes 150 MB).
CACHE_BYTES = 2**30

_FILE_BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
}
_LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "target", "class")


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a task reads; `label` is None for causal-lm."""

    inputs: tuple[str, ...]
    label: str | None


@dataclass(slots=True)
class OpenData:
    """Two splits of a data set with the columns and labels that the task needs."""

    train: Any
    eval: Any
    columns: Columns
    labels: tuple[str, ...]


def open_data(recipe: Recipe, task: Task) -> OpenData:
    """Open the data set of a recipe.

    Raises:
        DataError: a data set that cannot be read; a missing split or column (naming those there
            are); labels that evaluation has and training lacks.
    """
    splits = _call_datasets(recipe, split=None)
    train = _split(recipe, splits, recipe.train_split, "--train-split")
    evaluation = _eval_split(recipe, splits)
    columns = _columns(recipe, task, train.features)
    labels = _labels(train, columns.label) if columns.label else ()
    train = _sample(train, recipe.max_train_samples, recipe.seed)
    return OpenData(train, evaluation, columns, labels)


def open_eval(recipe: Recipe, task: Task, labels: tuple[str, ...]) -> OpenData:
    """Open only the evaluation split, for an artifact that knows its labels.

    Raises:
        DataError: as `open_data`.
    """
    evaluation = _eval_split(recipe, _call_datasets(recipe, split=None))
    columns = _columns(recipe, task, evaluation.features)
    return OpenData(None, evaluation, columns, labels)


def _call_datasets(recipe: Recipe, split: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    path = Path(recipe.dataset).expanduser()
    arguments: dict[str, Any] = {"name": recipe.dataset_config, "split": split}
    looks_local = recipe.dataset.startswith((".", "/", "~")) or path.suffix in _FILE_BUILDERS
    if looks_local and not path.exists():
        raise DataError(f"--dataset {recipe.dataset!r}: there is no such file or folder.")
    try:
        if path.is_file():
            if path.suffix not in _FILE_BUILDERS:
                raise DataError(
                    f"--dataset {recipe.dataset!r}: files of type {path.suffix!r} are not read; "
                    f"use one of {', '.join(_FILE_BUILDERS)}, or a folder."
                )
            arguments["data_files"] = str(path)
            if path.suffix == ".tsv":
                arguments["sep"] = "\t"
            return datasets.load_dataset(_FILE_BUILDERS[path.suffix], **arguments)
        return datasets.load_dataset(str(path) if path.exists() else recipe.dataset, **arguments)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise DataError(
            f"the data set {recipe.dataset!r} cannot be read: {reason}\nPass a Hub id (the Hub "
            "must be in reach), or a local folder or file of parquet, csv, json, text or images."
        ) from error


def _split(recipe: Recipe, splits: Any, name: str, flag: str) -> Any:
    base = name.split("[")[0]
    if base not in splits:
        raise DataError(
            f"{flag} {name!r}: {recipe.dataset!r} has no split {base!r}{near(base, splits)}; it "
            f"has {', '.join(splits)}."
        )
    chosen = splits[name] if name in splits else _call_datasets(recipe, split=name)
    if len(chosen) == 0:
        raise DataError(f"{flag} {name!r} of {recipe.dataset!r} is empty.")
    return chosen


def _eval_split(recipe: Recipe, splits: Any) -> Any:
    name = recipe.eval_split or next((s for s in ("validation", "test") if s in splits), None)
    if name is None:
        raise DataError(
            f"{recipe.dataset!r} has neither a validation nor a test split; it has "
            f"{', '.join(splits)}. Pass --eval-split, for instance --train-split 'train[:90%]' "
            "--eval-split 'train[90%:]'."
        )
    split = _split(recipe, splits, name, "--eval-split")
    return _sample(split, recipe.max_eval_samples, 0)


def _sample(split: Any, count: int | None, seed: int) -> Any:
    """Return `count` random samples: the first ones of an image folder are all of one class."""
    if count is None or count >= len(split):
        return split
    return split.shuffle(seed=seed).select(range(count))


def _columns(recipe: Recipe, task: Task, features: Any) -> Columns:
    import datasets

    images = [name for name, f in features.items() if isinstance(f, datasets.Image)]
    texts = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    ]
    if task == "image-classification":
        inputs = [recipe.image_column] if recipe.image_column else images[:1]
        _check(inputs, features, "--image-column", "an image")
        if not isinstance(features[inputs[0]], datasets.Image):
            raise DataError(
                f"--image-column {inputs[0]!r} holds {features[inputs[0]]}, not images; image "
                f"columns: {', '.join(images) or 'none'}."
            )
        return Columns(tuple(inputs), _label_column(recipe, features))
    if task == "causal-lm":
        inputs = list(recipe.text_columns) or [n for n in ("text", *texts) if n in texts][:1]
        _check_texts(inputs, texts, features, at_most=1)
        return Columns(tuple(inputs), None)
    label = _label_column(recipe, features)
    inputs = list(recipe.text_columns) or [name for name in texts if name != label][:2]
    _check_texts(inputs, texts, features, at_most=2)
    return Columns(tuple(inputs), label)


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
    classes = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel)]
    named = [name for name in _LABEL_NAMES if name in features]
    guesses = [*classes, *named]
    _check(guesses[:1], features, "--label-column", "a label")
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


def _labels(train: Any, column: str) -> tuple[str, ...]:
    """Return the class names of a split: the feature's own, or the values that occur, sorted.

    Raises:
        DataError: a row without a label.
    """
    import datasets

    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = set(train[column])
    if None in values:
        raise DataError(f"the label column {column!r} has rows without a label; remove them.")
    return tuple(str(value) for value in sorted(values))


def label_ids(split: Any, column: str, labels: tuple[str, ...], flag: str) -> list[int]:
    """Return every sample's label as an index into `labels`.

    Raises:
        DataError: a label that training does not know, or a split without labels.
    """
    import datasets

    feature = split.features[column]
    values = list(split[column])
    if isinstance(feature, datasets.ClassLabel):
        if -1 in values:
            raise DataError(f"the split for {flag} has no labels (they are -1); choose another.")
        values = [feature.names[value] for value in values]
    known = {label: i for i, label in enumerate(labels)}
    unknown = sorted({str(value) for value in values} - known.keys())
    if unknown:
        raise DataError(
            f"the split for {flag} has labels that the model was not made for: "
            f"{', '.join(unknown[:8])}; it knows {len(labels)}: {', '.join(labels[:8])}"
            f"{', ...' if len(labels) > 8 else ''}."
        )
    return [known[str(value)] for value in values]


class Images(Dataset[dict[str, Any]]):
    """Prepared images with their labels, kept in memory as they are decoded if they fit."""

    def __init__(self, split: Any, column: str, labels: list[int], preprocessing: Any) -> None:
        self._split = split.select_columns([column])
        self._column = column
        self._labels = labels
        self._preprocessing = preprocessing
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = self._decode(index)
            self._cached_bytes += pixels.nbytes
            if self._cached_bytes <= CACHE_BYTES:
                self._cache[index] = pixels
        return {"pixel_values": pixels, "labels": self._labels[index]}

    def _decode(self, index: int) -> Tensor:
        try:
            return self._preprocessing.image(self._split[index][self._column])  # type: ignore[no-any-return]
        except (OSError, ValueError) as error:
            raise DataError(f"image {index} of the data set cannot be decoded: {error}") from error


class Texts(Dataset[dict[str, Any]]):
    """Tokenized texts, or pairs of texts, with their labels."""

    def __init__(
        self, split: Any, columns: Columns, labels: list[int], tokenizer: Any, length: int
    ) -> None:
        self._texts = [list(split[name]) for name in columns.inputs]
        self._labels = labels
        self._tokenizer = tokenizer
        self._length = length

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        texts = [column[index] or "" for column in self._texts]
        encoded = self._tokenizer(*texts, truncation=True, max_length=self._length)
        return {**encoded, "labels": self._labels[index]}


class Blocks(Dataset[dict[str, Any]]):
    """A corpus as consecutive blocks of tokens; what does not fill the last one is left out."""

    def __init__(self, split: Any, column: str, tokenizer: Any, length: int) -> None:
        def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"input_ids": tokenizer([text + "\n" for text in batch[column]])["input_ids"]}

        tokens = split.map(tokenize, batched=True, remove_columns=split.column_names)
        flat = torch.tensor([token for row in tokens["input_ids"] for token in row])
        count = len(flat) // length
        if count == 0:
            raise DataError(
                f"the corpus has {len(flat)} tokens, less than one block of {length}; give more "
                "text, or a smaller --max-length."
            )
        self._blocks = flat[: count * length].view(count, length)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        block = self._blocks[index]
        return {"input_ids": block, "labels": block}


def loaders(
    recipe: Recipe, data: OpenData, preprocessing: Preprocessing
) -> tuple[DataLoader[Any] | None, DataLoader[Any]]:
    """Return the shuffled training loader (None without a training split) and the other one."""
    train = None
    if data.train is not None:
        samples = _dataset(recipe, data, data.train, preprocessing, "--train-split")
        # A last batch of another size would change the gradient's noise, and one sample alone
        # breaks BatchNorm; the shuffle sees to it that no sample is left out for good.
        train = DataLoader(
            samples,
            batch_size=min(recipe.batch_size, len(samples)),
            shuffle=True,
            drop_last=True,
            **_loader_arguments(recipe, preprocessing),
        )
    samples = _dataset(recipe, data, data.eval, preprocessing, "--eval-split")
    arguments = _loader_arguments(recipe, preprocessing)
    return train, DataLoader(samples, batch_size=recipe.batch_size, **arguments)


def _loader_arguments(recipe: Recipe, preprocessing: Preprocessing) -> dict[str, Any]:
    from transformers import DataCollatorWithPadding, default_data_collator

    collate: Any = default_data_collator
    if isinstance(preprocessing, TextPreprocessing) and preprocessing.tokenizer.pad_token:
        collate = DataCollatorWithPadding(preprocessing.tokenizer)
    workers = recipe.num_workers
    return {"collate_fn": collate, "num_workers": workers, "persistent_workers": workers > 0}


def _dataset(
    recipe: Recipe, data: OpenData, split: Any, preprocessing: Preprocessing, flag: str
) -> Any:
    if data.columns.label is None:
        assert isinstance(preprocessing, TextPreprocessing)  # noqa: S101  # models.load saw to it
        length = recipe.max_length or preprocessing.max_length
        return Blocks(split, data.columns.inputs[0], preprocessing.tokenizer, length)
    labels = label_ids(split, data.columns.label, data.labels, flag)
    if isinstance(preprocessing, TextPreprocessing):
        length = recipe.max_length or preprocessing.max_length
        return Texts(split, data.columns, labels, preprocessing.tokenizer, length)
    return Images(split, data.columns.inputs[0], labels, preprocessing)


def prepare_batch(
    batch: dict[str, Tensor], preprocessing: Preprocessing, augmentation: str = "none"
) -> dict[str, Tensor]:
    """Return a loader's batch as the model's input, augmented for training if asked to."""
    if "pixel_values" not in batch:
        return batch
    pixels = augment(batch["pixel_values"], augmentation)
    if isinstance(preprocessing, ImagePreprocessing):
        pixels = preprocessing.batch(pixels)
    return {**batch, "pixel_values": pixels}


def augment(pixels: Tensor, kind: str) -> Tensor:
    """Shift each image by up to an eighth of its size (edges repeated) and flip half of them.

    Draws from torch's global generator, which the training loop seeds at every step.

    Args:
        pixels: [batch, channels, height, width].
        kind: none, crop, flip or crop-flip.
    """
    batch, _, height, width = pixels.shape
    device = pixels.device
    rows = torch.arange(height, device=device).expand(batch, height)
    columns = torch.arange(width, device=device).expand(batch, width)
    if "flip" in kind:
        flipped = torch.rand(batch, 1, device=device) < 0.5
        columns = torch.where(flipped, width - 1 - columns, columns)
    if "crop" in kind:
        rows = _shifted(rows, height)
        columns = _shifted(columns, width)
    if kind == "none":
        return pixels
    samples = torch.arange(batch, device=device).view(-1, 1, 1)
    return pixels.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def _shifted(positions: Tensor, size: int) -> Tensor:
    reach = size // 8
    shift = torch.randint(-reach, reach + 1, (len(positions), 1), device=positions.device)
    return (positions + shift).clamp(0, size - 1)
