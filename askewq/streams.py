"""Training data that are read as they are needed, `--streaming`: no length, no memory, no copy.

Every process, and every worker of its loader, reads its own part, again and again. Samples are
shuffled a buffer at a time, each buffer by random numbers of its own; so a place in the stream is
where its buffer begins and how many samples of it are gone, and a run goes on exactly there
after reading one buffer again.
"""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from askewq import signals
from askewq.batches import UNREADABLE, Collator, prepared_image, prepared_text
from askewq.config import Recipe
from askewq.data import OpenData
from askewq.errors import DataError
from askewq.preprocessing import Preprocessing, TextPreprocessing

# (example, tokens left over) -> samples, tokens left over
Samples = Callable[[dict[str, Any], list[int]], tuple[list[dict[str, Any]], list[int]]]


class StreamLoader:
    """The training batches of one process, without end.

    Raises:
        DataError: more workers than this process has files to read.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: OpenData,
        preprocessing: Preprocessing,
        process: int,
        processes: int,
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        split = split_dataset_by_node(data.train, process, processes)
        self._workers = max(1, recipe.num_workers)
        if recipe.num_workers > split.num_shards:
            raise DataError(
                f"--num-workers {recipe.num_workers}: with --streaming each worker reads files of "
                f"its own, and there are {split.num_shards} for this process; pass at most that, "
                "or split the data set into more files."
            )
        self._recipe = recipe
        self._batches = _Batches(
            split,
            samples_of(recipe, data, preprocessing),
            Collator(preprocessing),
            recipe,
            process,
        )
        start: dict[str, Any] = {"epoch": 0, "number": 0, "split": None, "rest": [], "done": 0}
        self._places: list[dict[str, Any]] = [start] * self._workers
        self._turn = 0

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches from the present place on."""
        self._batches.places, self._batches.turn = list(self._places), self._turn
        workers = self._recipe.num_workers
        for made in DataLoader(
            self._batches,
            batch_size=None,
            num_workers=workers,
            collate_fn=_untouched,
            worker_init_fn=signals.leave_to_main,
        ):
            if made is None:  # of a worker whose turn it is not yet
                continue
            worker, place, batch = made
            self._places[worker], self._turn = place, (worker + 1) % self._workers
            yield batch

    def state(self) -> bytes:
        """Return the place after the last batch that was yielded, as JSON."""
        return json.dumps({"places": self._places, "turn": self._turn}).encode()

    def load(self, state: bytes) -> None:
        """Go to a place.

        Raises:
            ValueError: of another number of workers.
        """
        content = json.loads(state)
        if len(content["places"]) != self._workers:
            raise ValueError(f"{len(content['places'])} workers read the stream")
        self._places, self._turn = content["places"], content["turn"]


class _Batches(IterableDataset[Any]):
    """Batches with the place after each, as one worker makes them."""

    def __init__(
        self, split: Any, samples: Samples, collate: Any, recipe: Recipe, process: int
    ) -> None:
        self.places: list[dict[str, Any]] = []
        self.turn = 0
        self._split, self._samples, self._collate = split, samples, collate
        self._size, self._buffer = recipe.batch_size, recipe.shuffle_buffer
        self._who = recipe.seed, process

    def __iter__(self) -> Iterator[Any]:
        # The epoch of a data set lies in memory that workers share, and each is at its own.
        self._split = copy.deepcopy(self._split)
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if worker < self.turn:
            yield None
        batch = []
        for sample, place in self._shuffled(worker, self.places[worker]):
            batch.append(sample)
            if len(batch) == self._size:
                yield worker, place, self._collate(batch)
                batch = []

    def _shuffled(self, worker: int, place: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield samples in their random order, each with the place after it."""
        while True:
            found = False
            for buffer, begin in self._buffers(place):
                found = True
                draw = np.random.default_rng([*self._who, worker, begin["epoch"], begin["number"]])
                order = draw.permutation(len(buffer)).tolist()
                for done in range(begin["done"], len(buffer)):
                    yield buffer[order[done]], {**begin, "done": done + 1}
            if not found and place["split"] is None:
                raise DataError(
                    "a worker's part of the stream makes no sample; use fewer --num-workers or "
                    "processes, more data, or a smaller --max-length."
                )
            place = {"epoch": place["epoch"] + 1, "number": 0, "split": None, "rest": [], "done": 0}

    def _buffers(
        self, begin: dict[str, Any]
    ) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
        """Yield the samples of the rest of an epoch, some at a time, and the place before them."""
        # datasets orders the files anew by this number, in all processes alike; not by 0.
        self._split.set_epoch(1 + self._who[0] * 2**20 + begin["epoch"])
        self._split.load_state_dict(begin["split"])
        rest = begin["rest"]
        buffer: list[dict[str, Any]] = []
        for example in self._examples():
            made, rest = self._samples(example, rest)
            buffer += made
            if len(buffer) >= self._buffer:
                yield buffer, begin
                state = self._split.state_dict()
                number = begin["number"] + 1
                begin = {**begin, "number": number, "split": state, "rest": rest, "done": 0}
                buffer = []
        if buffer:
            yield buffer, begin

    def _examples(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._split
        except (*UNREADABLE, TypeError) as error:  # TypeError: another type in a later file
            raise DataError(f"the stream of training data broke off: {error}") from error


def _untouched(made: Any) -> Any:
    return made


def samples_of(recipe: Recipe, data: OpenData, preprocessing: Preprocessing) -> Samples:
    """Return what makes samples of an example, as `batches` makes them of a whole split."""
    columns, tokens = data.columns, None
    length = 0
    if isinstance(preprocessing, TextPreprocessing):
        tokens = preprocessing.tokenizer
        length = recipe.max_length or preprocessing.max_length

    # A stream's labels are those of a ClassLabel; the model may have them in another order.
    features = data.train.features or data.eval.features
    names = features[columns.label].names if columns.label else ()
    ids = [data.labels.index(name) for name in names]

    def label(example: dict[str, Any]) -> int:
        value = example[columns.label or ""]
        if value is None or not 0 <= value < len(ids):
            raise DataError(f"the split for --train-split has a sample with the label {value!r}.")
        return ids[value]

    def image(example: dict[str, Any], _: list[int]) -> tuple[list[dict[str, Any]], list[int]]:
        made = {"pixel_values": prepared_image(example[columns.inputs[0]], preprocessing)}
        return [made if columns.label is None else {**made, "labels": label(example)}], []

    def text(example: dict[str, Any], _: list[int]) -> tuple[list[dict[str, Any]], list[int]]:
        encoded = prepared_text([example[name] for name in columns.inputs], tokens, length)
        return [encoded if columns.label is None else {**encoded, "labels": label(example)}], []

    def blocks(example: dict[str, Any], rest: list[int]) -> tuple[list[dict[str, Any]], list[int]]:
        line = (example[columns.inputs[0]] or "") + "\n"
        flat = rest + tokens([line])["input_ids"][0]  # type: ignore[misc]  # a tokenizer
        count = len(flat) // length
        made = torch.tensor(flat[: count * length]).view(count, length)
        return [{"input_ids": block, "labels": block} for block in made], flat[count * length :]

    if columns.corpus:
        return blocks
    return image if tokens is None else text
