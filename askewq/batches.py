"""Batches ready for the model, from an open data set.

Images are decoded once and kept where they fit in memory, and augmentation works on whole batches.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from PIL.Image import DecompressionBombError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from askewq import signals
from askewq.columns import Columns
from askewq.config import Recipe
from askewq.data import OpenData
from askewq.errors import DataError
from askewq.preprocessing import ImagePreprocessing, Preprocessing, TextPreprocessing
from askewq.sources import reading

# Decoded images of a loader are kept in memory up to this many bytes (CIFAR-10 takes 150 MB).
CACHE_BYTES = 2**30
# What reading a sample raises that is damaged, or larger than Pillow decodes.
UNREADABLE = (OSError, ValueError, DecompressionBombError)
_PADDING = """The tokenizer has no padding token, which texts of different lengths need. Give it \
one, and pass its folder as --tokenizer:
  tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
  tokenizer.pad_token = tokenizer.eos_token
  tokenizer.save_pretrained(FOLDER)"""


def label_ids(split: Any, column: str, labels: tuple[str, ...], flag: str) -> list[int]:
    """Return every sample's label as an index into `labels`.

    Raises:
        DataError: a label that training does not know, or a split without labels.
    """
    import datasets

    feature = split.features[column]
    values = list(split[column][:])  # at once: datasets gives a column row by row else
    if None in values:
        raise DataError(f"the split for {flag} has rows without a label; remove them.")
    if isinstance(feature, datasets.ClassLabel):
        missing = [value for value in values if not 0 <= value < len(feature.names)]
        if missing:
            raise DataError(
                f"the split for {flag} has no labels (they are {missing[0]}); choose another."
                if len(missing) == len(values)
                else f"the split for {flag} has {len(missing)} of {len(values)} rows without a "
                f"label (it is {missing[0]}); remove them."
            )
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


def prepared_image(image: Any, preprocessing: Any) -> Tensor:
    """Return an image of a data set as the preprocessing makes it, [channels, height, width].

    Raises:
        DataError: a row without an image.
    """
    if image is None:
        raise DataError("the data set has a row without an image; remove it.")
    return cast(Tensor, preprocessing.image(image))


def prepared_text(texts: Sequence[str | None], tokenizer: Any, length: int) -> dict[str, Any]:
    """Return a text, or a pair, as the tokenizer makes it, cut to `length` tokens.

    Raises:
        DataError: a text of which no token is made.
    """
    given = [text or "" for text in texts]
    encoded = dict(tokenizer(*given, truncation=True, max_length=length))
    if not encoded["input_ids"]:
        raise DataError(
            f"the data set has the text {' / '.join(map(repr, given))}, of which the tokenizer "
            "makes no token; remove the row."
        )
    return encoded


class Images(Dataset[dict[str, Any]]):
    """Prepared images, with their labels if they have any, kept in memory as long as they fit."""

    def __init__(
        self, split: Any, column: str, labels: list[int] | None, preprocessing: Any
    ) -> None:
        self._split = split.select_columns([column])
        self._column = column
        self._labels = labels
        self._preprocessing = preprocessing
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = self._decode(index)
            self._cached_bytes += pixels.nbytes
            worker = get_worker_info()  # each has a cache of its own
            if self._cached_bytes <= CACHE_BYTES // (worker.num_workers if worker else 1):
                self._cache[index] = pixels
        made = {"pixel_values": pixels}
        return made if self._labels is None else {**made, "labels": self._labels[index]}

    def _decode(self, index: int) -> Tensor:
        try:
            image = self._split[index][self._column]
            return prepared_image(image, self._preprocessing)
        except UNREADABLE as error:
            raise DataError(f"{self._called(index)} cannot be decoded: {error}") from error

    def _called(self, index: int) -> str:
        """Return by what name a person finds an image: its file, or where it lies among all."""
        import datasets

        raw = self._split.cast_column(self._column, datasets.Image(decode=False))
        path = raw[index][self._column]["path"]
        return f"the image {path}" if path else f"image {index} of the {len(self)} of its split"


class Texts(Dataset[dict[str, Any]]):
    """Tokenized texts, or pairs of texts, with their labels, if they have any."""

    def __init__(
        self, split: Any, columns: Columns, labels: list[int] | None, tokenizer: Any, length: int
    ) -> None:
        self._texts = [split[name][:] for name in columns.inputs]
        self._labels = labels
        self._tokenizer = tokenizer
        self._length = length

    def __len__(self) -> int:
        return len(self._texts[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        texts = [column[index] for column in self._texts]
        encoded = prepared_text(texts, self._tokenizer, self._length)
        return encoded if self._labels is None else {**encoded, "labels": self._labels[index]}


class Blocks(Dataset[dict[str, Any]]):
    """A corpus as consecutive blocks of tokens; what does not fill the last one is left out.

    Args:
        part: how many of the blocks there are, chosen at random by a seed; None: all.
    """

    def __init__(
        self, split: Any, column: str, tokenizer: Any, length: int, part: int | None, seed: int
    ) -> None:
        def tokenize(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
            lines = [(text or "") + "\n" for text in batch[column]]
            return {"input_ids": tokenizer(lines)["input_ids"]}

        tokens = split.map(tokenize, batched=True, remove_columns=split.column_names)
        flat = torch.tensor([token for row in tokens["input_ids"] for token in row])
        count = len(flat) // length
        if count == 0:
            raise DataError(
                f"the corpus has {len(flat)} tokens, less than one block of {length}; give more "
                "text, or a smaller --max-length."
            )
        self._blocks = flat[: count * length].view(count, length)
        if part is not None and part < count:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            self._blocks = self._blocks[order[:part]]

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        block = self._blocks[index]
        return {"input_ids": block, "labels": block}


def loaders(
    recipe: Recipe, data: OpenData, preprocessing: Preprocessing, processes: int = 1
) -> tuple[DataLoader[Any] | None, DataLoader[Any]]:
    """Return the shuffled training loader (None without a split, or of a stream) and the other.

    Raises:
        DataError: fewer samples to train on than processes.
    """
    train = None
    if data.train is not None and not recipe.streaming:
        samples = _dataset(recipe, data, data.train, preprocessing, "--train-split")
        if len(samples) < processes:
            raise DataError(
                f"the split for --train-split has {len(samples)} samples for {processes} "
                "processes, and each needs its own; use more data, or fewer processes."
            )
        # A last batch of another size would change the gradient's noise, and one sample alone
        # breaks BatchNorm; the shuffle sees to it that no sample is left out for good.
        train = DataLoader(
            samples,
            batch_size=min(recipe.batch_size, len(samples) // processes),
            shuffle=True,
            drop_last=True,
            **_loader_arguments(recipe, preprocessing),
        )
    return train, in_order(recipe, data, data.eval, preprocessing, "--eval-split")


def in_order(
    recipe: Recipe, data: OpenData, split: Any, preprocessing: Preprocessing, flag: str
) -> DataLoader[Any]:
    """Return the loader of a whole split, the last samples in a batch of their own.

    Args:
        flag: which the split is, --train-split or --eval-split.

    Raises:
        DataError: texts that are cut to nothing, and what the samples are refused for.
    """
    _check_room(recipe, data, preprocessing)
    samples = _dataset(recipe, data, split, preprocessing, flag)
    arguments = _loader_arguments(recipe, preprocessing)
    return DataLoader(samples, batch_size=recipe.batch_size, **arguments)


def _check_room(recipe: Recipe, data: OpenData, preprocessing: Preprocessing) -> None:
    """Check that something of a text is left beside the tokens that begin and end every one."""
    if not isinstance(preprocessing, TextPreprocessing) or data.columns.corpus:
        return
    length = recipe.max_length or preprocessing.max_length
    count = len(data.columns.inputs)
    special = preprocessing.tokenizer.num_special_tokens_to_add(pair=count == 2)
    if length < special + count:
        raise DataError(
            f"--max-length {length}: {special} tokens begin and end every sample, so that no word "
            "would be left; pass a larger one."
        )


class Collator:
    """What makes a batch of samples."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        from transformers import DataCollatorWithPadding, default_data_collator

        self._collate: Any = default_data_collator
        self._advice = "Images of different sizes need --image-size."
        if isinstance(preprocessing, TextPreprocessing):
            self._advice = _PADDING
            if preprocessing.tokenizer.pad_token:
                self._collate = DataCollatorWithPadding(preprocessing.tokenizer)
                self._advice = "The tokenizer cannot pad them."

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch.

        Raises:
            DataError: samples of several sizes.
        """
        try:
            return cast(dict[str, Tensor], self._collate(samples))
        except (RuntimeError, ValueError) as error:
            raise DataError(f"the samples do not make a batch: {error}\n{self._advice}") from error


def _loader_arguments(recipe: Recipe, preprocessing: Preprocessing) -> dict[str, Any]:
    workers = recipe.num_workers
    return {
        "collate_fn": Collator(preprocessing),
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "worker_init_fn": signals.leave_to_main,
    }


def _dataset(
    recipe: Recipe, data: OpenData, split: Any, preprocessing: Preprocessing, flag: str
) -> Any:
    columns, labels = data.columns, None
    if columns.label is not None:
        labels = label_ids(split, columns.label, data.labels, flag)
    if isinstance(preprocessing, TextPreprocessing):
        length = recipe.max_length or preprocessing.max_length
        if columns.corpus:
            trains = flag == "--train-split"
            part = recipe.max_train_samples if trains else recipe.max_eval_samples
            seed = recipe.seed if trains else 0
            tokenizer = preprocessing.tokenizer
            with reading(recipe.dataset):
                return Blocks(split, columns.inputs[0], tokenizer, length, part, seed)
        return Texts(split, columns, labels, preprocessing.tokenizer, length)
    return Images(split, columns.inputs[0], labels, preprocessing)


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
    if kind == "none":
        return pixels
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
    samples = torch.arange(batch, device=device).view(-1, 1, 1)
    return pixels.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def _shifted(positions: Tensor, size: int) -> Tensor:
    reach = size // 8
    shift = torch.randint(-reach, reach + 1, (len(positions), 1), device=positions.device)
    return (positions + shift).clamp(0, size - 1)
