"""What the datasets library is called with for a --dataset, and its errors in words of ours.

It guesses the splits and the format of a folder from the names in it; what it would get wrong is
told apart, or refused, here.
"""

import csv
import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from askewq import disk
from askewq.config import Recipe
from askewq.errors import DataError, DiskFullError

_FILE_BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
}
# A quote is a character like any other there.
_TSV = {"sep": "\t", "quoting": csv.QUOTE_NONE}


def source_of(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Return by what name and arguments datasets knows the data set."""
    path = Path(recipe.dataset)
    arguments: dict[str, Any] = {"name": recipe.dataset_config}
    looks_local = recipe.dataset.startswith((".", "/")) or path.suffix in _FILE_BUILDERS
    if looks_local and not path.exists():
        raise DataError(f"--dataset {recipe.dataset!r}: there is no such file or folder.")
    if not path.exists() and "/" not in recipe.dataset:
        # datasets would take what it has cached of any folder that was called so.
        raise DataError(
            f"--dataset {recipe.dataset!r}: there is no such file or folder here, and on the Hub a "
            "data set is called OWNER/NAME, such as stanfordnlp/sst2."
        )
    if path.is_file():
        if path.suffix not in _FILE_BUILDERS:
            raise DataError(
                f"--dataset {recipe.dataset!r}: files of type {path.suffix!r} are not read; use "
                f"one of {', '.join(_FILE_BUILDERS)}, or a folder."
            )
        if recipe.dataset_config is not None:
            raise DataError(
                f"--dataset-config {recipe.dataset_config!r}: the file {recipe.dataset} has no "
                "configurations; leave it out."
            )
        arguments["data_files"] = glob.escape(str(path))
        if path.suffix == ".tsv":
            arguments |= _TSV
        return _FILE_BUILDERS[path.suffix], arguments
    if path.is_dir() and {*"*?[]"} & {*str(path.resolve())}:
        raise DataError(
            f"--dataset {recipe.dataset!r}: datasets takes the characters *?[] of a folder's path "
            "for a pattern; give the folder another name."
        )
    if not path.is_dir():
        return recipe.dataset, arguments
    files = files_of(path, recipe.dataset_config)
    if any(file.endswith(".tsv") for split in files.values() for file in split):
        arguments |= _TSV
    if parts := _parts(path.resolve(), files):
        arguments["data_files"] = parts
    return str(path), arguments


def files_of(folder: Path, config: str | None) -> dict[str, list[str]]:
    """Return the files of each split that datasets would read of a folder, by their whole paths."""
    import datasets

    files = datasets.load_dataset_builder(str(folder), name=config).config.data_files or {}
    return {str(split): [str(file) for file in names] for split, names in files.items()}


def _parts(folder: Path, files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return patterns by which no file is in two splits, where that is so of `files`.

    datasets looks for the names of splits in all of a path, and takes test/train/0.png, an image
    of the class `train`, into both. What is in a folder belongs to the split of its other files.

    Raises:
        DataError: a file in two splits whose folder does not say which.
    """
    counts = Counter(file for names in files.values() for file in names)
    twice = sorted(file for file, count in counts.items() if count > 1)
    if not twice:
        return {}
    splits: dict[str, set[str]] = {}
    for split, names in files.items():
        for file in names:
            top = Path(file).relative_to(folder).parts[0]
            splits.setdefault(top, set()).update([split] if counts[file] == 1 else [])
    if any(len(owners) != 1 for owners in splits.values()):
        both = " and ".join(split for split, names in files.items() if twice[0] in names)
        raise DataError(
            f"--dataset {str(folder)!r}: datasets takes {Path(twice[0]).relative_to(folder)} into "
            f"the splits {both}, whose names are both in its path; put the splits into folders "
            "train and test, and call other folders and files otherwise."
        )
    made: dict[str, list[str]] = {}
    for top, (split,) in splits.items():
        whole = f"{glob.escape(top)}/**" if (folder / top).is_dir() else glob.escape(top)
        made.setdefault(split, []).append(whole)
    return made


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Within the block, what keeps datasets from reading a data set has a message of ours.

    Raises:
        DataError: a data set that cannot be read.
        DiskFullError: no room for datasets' copy of it.
    """
    import datasets

    try:
        yield
    except (
        *(OSError, ValueError, KeyError, datasets.exceptions.DatasetsError),
        StopIteration,  # an empty jsonl file
    ) as error:
        cause = error.__cause__ or error
        if disk.is_full(cause):
            raise DiskFullError(
                f"the disk is full ({cause}) while datasets copied {name!r} into its cache, "
                f"{datasets.config.HF_DATASETS_CACHE}; make room there, or name another folder in "
                "the environment variable HF_DATASETS_CACHE."
            ) from error
        raise DataError(
            f"the data set {name!r} cannot be read: {reason(cause)}\nPass a Hub id (the Hub must "
            "be in reach), or a local folder or file of parquet, csv, json, text or images."
        ) from error


def reason(error: BaseException) -> str:
    """Return what went wrong in datasets, in one line."""
    from datasets.table import CastError

    if isinstance(error, CastError):
        return f"its files do not have the same columns, {error.details().rstrip('.')}"
    if "load_from_disk" in str(error):
        return "save_to_disk wrote it; write each split by to_parquet, and pass that folder."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or "it is empty."
