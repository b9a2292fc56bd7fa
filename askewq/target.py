"""What an export format is: what it refuses, what it writes, and how its own loader reads it back.

`export.py` goes one way for every format: refuse before anything is written, write, read back in a
fresh process with the format's own loader, compare with the artifact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from askewq.checkpoint import Artifact
from askewq.spec import LoadedModel
from askewq.vocabulary import DenseType
from askewq.wording import bits_name


@dataclass(frozen=True, slots=True)
class ExportSource:
    """An artifact to export: its folder, its plain network (snapped, float32, eval), its codes."""

    folder: Path
    loaded: LoadedModel
    artifact: Artifact

    @property
    def title(self) -> str:
        """The model's name, without the folders of this machine."""
        name = self.loaded.spec.name
        return Path(name).name if Path(name).is_absolute() else name


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose.

    Attributes:
        dtype: dense: of the floating-point tensors.
        dense_rest: write layers that the format cannot hold packed as ordinary weights.
        allow_lossy: write what the format holds only approximately.
    """

    dtype: DenseType = "fp32"
    dense_rest: bool = False
    allow_lossy: bool = False


def rounded_inputs(source: ExportSource, to: str) -> list[str]:
    """Return, as a refusal, that a format holds weights alone; nothing if no input is rounded."""
    inputs = source.artifact.inputs
    if not inputs:
        return []
    first = next(iter(inputs))
    return [
        f"the artifact rounds the inputs of {len(inputs)} layers ({first!r} to "
        f"{bits_name(inputs[first].grid.bits)}), and --to {to} holds weights alone, so that it "
        "would be another model: use --to onnx, or fine-tune with --act-bits none."
    ]


@dataclass(frozen=True, slots=True)
class Target:
    """One export format.

    Attributes:
        name: what --to calls it.
        needs: modules that must be importable to write it and to read it back.
        extra: the optional dependency group that brings them.
        bound: largest difference of a logit from the artifact's that is accepted, relative to the
            largest logit in size; 0 where the logits must be equal to the bit.
        refusals: what cannot be written and why, one sentence each; empty: it can be exported.
        notes: what is written otherwise than the artifact has it (wider codes, float layers).
        write: writes all files into an existing, empty folder.
        read_back: a self-contained function (its imports inside, none of askewq) of the folder and
            of named input tensors that returns the logits, by the format's own loader. Its source
            is run in a fresh process. For a module of the user's own the environment variable
            ASKEWQ_FACTORY names it there, path/to/file.py:factory.
        bound_of_inputs: that bound where layers round their inputs, if it is wider.
    """

    name: str
    needs: tuple[str, ...]
    extra: str
    bound: Callable[[Options], float]
    refusals: Callable[[ExportSource, Options], list[str]]
    notes: Callable[[ExportSource, Options], list[str]]
    write: Callable[[ExportSource, Options, Path], None]
    read_back: Callable[[str, dict[str, Tensor]], Tensor]
    bound_of_inputs: float = 0.0
