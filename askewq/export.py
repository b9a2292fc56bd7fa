"""`askewq export`: an artifact in another format, read back by that format's own loader.

Every format goes one way: refuse before anything is written, write beside the place, read back in
a fresh process that cannot import askewq, compare with the artifact, and only then rename.
"""

import importlib
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from askewq import __version__, checkpoint, disk, embeddings, report
from askewq.artifact import ARTIFACT, load_artifact
from askewq.errors import AskewError, ExportError, VerificationError, near
from askewq.preprocessing import ImagePreprocessing, ProcessorPreprocessing
from askewq.samples import SAMPLES, expected_of, sample_inputs, takes_any_size
from askewq.spec import LoadedModel, first_line
from askewq.target import ExportSource, Options, Target

# The file of every format, and the options that decide something in it.
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("askewq.export_dense", ("dtype",)),
    "compressed-tensors": ("askewq.export_compressed_tensors", ("dense_rest",)),
    "onnx": ("askewq.export_onnx", ()),
    "gguf": ("askewq.export_gguf", ("dense_rest", "allow_lossy")),
}
REPORT = "export.json"

_READER_START = """
from __future__ import annotations

import os
import sys

if not os.environ["ASKEWQ_FACTORY"]:  # a file of the user's own may import it
    sys.modules["askewq"] = None  # whoever reads the export must do without it

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

folder, inputs, output, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # as in the process that it is compared with
"""
_READER_END = """
with torch.no_grad():
    logits = {name}(folder, load_file(inputs))
save_file({{"logits": logits.detach().cpu().float().contiguous()}}, output)
"""


_BLIND = (
    "the random inputs all have the same logits, so that comparing them says nothing of the layers "
    "before the last ones; compare on data of yours"
)


def export(
    folder: Path,
    to: str,
    output: Path,
    options: Options = Options(),  # noqa: B008  # frozen
    factory: str | None = None,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Write an artifact in another format and verify it; the output appears whole or not at all.

    Args:
        folder: the artifact.
        to: a name in `TARGETS`.
        output: a folder that does not exist or is empty.
        factory: ``path/to/file.py:factory`` for an artifact of a module of the user's own.
        image_size: height and width of its images, where the artifact does not say them.

    Returns:
        The content of export.json.

    Raises:
        ExportError: an unknown format, a missing library, an option that decides nothing, an
            output that holds something, an artifact that the format cannot hold; a full disk.
        OutputError: an output that can be no folder.
        FormatError: an artifact that is damaged or of a newer version.
        VerificationError: the target's loader fails, or gives logits beyond the bound.
    """
    defaults = Options()
    names = [field.name for field in fields(Options)]
    changed = [name for name in names if getattr(options, name) != getattr(defaults, name)]
    check_settings(to, changed)
    target = find_target(to)
    _check_libraries(target)
    _check_output(output)
    source = _open(folder, factory)
    if image_size is not None:
        _set_size(source.loaded, image_size)
    if refusals := target.refusals(source, options):
        reasons = "".join(f"\n- {reason}" for reason in refusals)
        raise ExportError(f"{folder} cannot be exported to {to}:{reasons}")
    notes = target.notes(source, options)
    report.print_export_notes(notes, to)
    inputs, expected = expected_of(source.loaded)
    with _appearing(output.resolve()) as partial:
        target.write(source, options, partial)
        logits = _read_back(target, partial, inputs, factory)
        if source.loaded.spec.task == "feature-extraction" and logits.dim() == 3:  # of each token
            pooling = source.loaded.spec.pooling
            logits = embeddings.pool(logits, inputs["attention_mask"], pooling)
        rounded = target.bound_of_inputs if source.artifact.inputs else 0.0
        comparison = _compare(logits, expected, max(target.bound(options), rounded), to)
        if _alike(expected, comparison["bound"]):
            notes = [*notes, _BLIND]
            report.print_export_notes([_BLIND], to)
        result = {
            "format": to,
            "askewq": __version__,
            **comparison,
            "samples": SAMPLES,
            "libraries": _libraries(target, source.loaded),
            "files": _sizes(partial),
            "notes": notes,
        }
        text = json.dumps(result, indent=2, ensure_ascii=False)
        (partial / REPORT).write_text(text + "\n", encoding="utf-8")
    report.print_export(result, output)
    return result


def check_settings(to: str, given: Collection[str]) -> None:
    """Check that a format is known and that every option given decides something in it.

    Raises:
        ExportError: naming the formats, or the option and where it goes.
    """
    if to not in TARGETS:
        raise ExportError(
            f"--to {to!r} is not a format that askewq can write{near(to, TARGETS)}; use one of "
            f"{', '.join(TARGETS)}."
        )
    for name in given:
        if name not in TARGETS[to][1]:
            users = [other for other, (_, options) in TARGETS.items() if name in options]
            raise ExportError(
                f"--{name.replace('_', '-')} decides nothing for --to {to}; it goes with "
                f"{', '.join(users)}: leave it out."
            )


def find_target(to: str) -> Target:
    """Return the format of a name in `TARGETS`; its file is imported now, not before."""
    return cast(Target, importlib.import_module(TARGETS[to][0]).TARGET)


def _check_libraries(target: Target) -> None:
    missing = [name for name in target.needs if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"--to {target.name} needs {', '.join(target.needs)}, and {', '.join(missing)} cannot "
            f"be imported: pip install 'askewq[{target.extra}]'."
        )


def _check_output(output: Path) -> None:
    disk.check_place(output)
    if output.is_dir() and any(output.iterdir()):
        raise ExportError(
            f"--output {output} is not empty, and an export replaces nothing; name another folder, "
            "or delete this one yourself."
        )


def _open(folder: Path, factory: str | None) -> ExportSource:
    """Return an artifact with its plain network."""
    loaded = load_artifact(folder, factory=factory)
    return ExportSource(folder, loaded, checkpoint.read(folder / ARTIFACT))


def _set_size(loaded: LoadedModel, side: int) -> None:
    """Say how large the images of an artifact are.

    Raises:
        ExportError: one that has none, or says it itself.
    """
    preprocessing = loaded.preprocessing
    if not takes_any_size(loaded):
        raise ExportError(
            "--image-size goes with an artifact of images whose preprocessing says no size; leave "
            "it out."
        )
    if side < 1:
        raise ExportError(f"--image-size {side}: it must be at least 1.")
    if isinstance(preprocessing, ImagePreprocessing):
        loaded.preprocessing = replace(preprocessing, size=(side, side))
        return
    loaded.preprocessing = replace(cast(ProcessorPreprocessing, preprocessing), side=side)
    height, width = sample_inputs(loaded)["pixel_values"].shape[-2:]
    if (height, width) != (side, side):
        raise ExportError(
            f"--image-size {side}: of such pictures the image processor makes {height} x {width}; "
            "pass that size."
        )


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """Within the block, write to the folder it gives; after it, that folder is `output`.

    Raises:
        ExportError: for whatever a library raises; a full disk has another name in each.
    """
    try:
        with disk.appearing_folder(output) as partial:
            yield partial
    except AskewError:
        raise
    except Exception as error:
        raise ExportError(
            f"the export to {output} failed and left nothing behind ({type(error).__name__}: "
            f"{first_line(error)})."
        ) from error


def _read_back(
    target: Target, folder: Path, inputs: dict[str, Tensor], factory: str | None
) -> Tensor:
    """Return the logits that the target's own loader makes of an export, in a fresh process."""
    source = inspect.getsource(target.read_back)
    program = _READER_START + source + _READER_END.format(name=target.read_back.__name__)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ASKEWQ_FACTORY": factory or ""}
    with tempfile.TemporaryDirectory(prefix="askewq-export-") as name:
        script, given, made = (Path(name) / part for part in ("read.py", "inputs", "logits"))
        script.write_text(program, encoding="utf-8")
        save_file({key: tensor.contiguous() for key, tensor in inputs.items()}, given)
        paths = map(str, (script, folder, given, made))
        words = [sys.executable, *paths, str(torch.get_num_threads())]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not made.is_file():
            tail = "\n".join(done.stderr.strip().split("\n")[-12:])
            raise VerificationError(
                f"{target.name} could not be read back by its own loader (exit code "
                f"{done.returncode}); the output was deleted. The loader says:\n{tail}"
            )
        return load_file(made)["logits"]


def _compare(logits: Tensor, expected: Tensor, bound: float, to: str) -> dict[str, float]:
    """Return how far logits are from the artifact's, absolutely and relative to the largest.

    Raises:
        VerificationError: another shape, or a difference over the bound.
    """
    if logits.shape != expected.shape:
        raise VerificationError(
            f"{to} gives logits of shape {list(logits.shape)} where the artifact gives "
            f"{list(expected.shape)}; the output was deleted."
        )
    difference = float((logits - expected.float()).abs().max())
    largest = float(expected.abs().max())
    relative = 0.0 if difference == 0 else difference / largest if largest else math.inf
    if not relative <= bound:  # NaN is over every bound
        raise VerificationError(
            f"{to} does not give the artifact's logits: they differ by up to {difference:g}, "
            f"{relative:g} relative to the largest ({largest:g}), where {bound:g} is allowed; the "
            "output was deleted. Please report the model, its bits, and the versions of the "
            "libraries."
        )
    return {"max_difference": difference, "relative_difference": relative, "bound": bound}


def _alike(logits: Tensor, bound: float) -> bool:
    """Tell whether the logits of all samples are one within the bound."""
    apart = (logits[1:] - logits[:1]).abs()
    return bool(len(logits) > 1 and apart.max() <= bound * logits.abs().max())


def _libraries(target: Target, loaded: LoadedModel) -> dict[str, str]:
    """Return the versions of what wrote and read the export."""
    found = {}
    source = loaded.spec.source
    networks = () if source == "module" else (source,)
    for name in ("torch", "safetensors", *networks, *target.needs):
        top = name.partition(".")[0]
        try:
            found[top] = version(top)
        except PackageNotFoundError:
            found[top] = str(getattr(importlib.import_module(top), "__version__", "unknown"))
    return found


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file, by its path in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}
