"""Let atheris look for bytes that the reader of packed files fails on otherwise than by refusing.

Coverage-guided: atheris keeps the inputs that reach new lines of the reader, and changes those
further, starting from three good files. The digest is checked last, so all of the reader is within
reach. What is read at all must be one of them.

    pip install atheris
    python benchmarks/fuzz_coverage.py [-max_total_time=60] [any flag of libFuzzer]
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import torch

# Not the digest: shown its comparison, libFuzzer writes the digest that was computed into the file,
# as an attacker could. What is read then is a file like any other (docs/security.md).
with atheris.instrument_imports(
    include=["askewq", "json"], exclude=["askewq.digest"], enable_loader_override=False
):
    from askewq import artifact, checkpoint
    from askewq.errors import FormatError

from fuzz_artifact import write_artifacts

FOLDER = Path(tempfile.mkdtemp(prefix="askewq-fuzz-"))
# libFuzzer writes every input here, and a file that it may change is never one of the good ones.
TRIED = FOLDER / "tried.safetensors"


def state_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return what a packed file gives: names, types and bytes."""
    state = checkpoint.read(path).dense_state()
    return {
        name: (
            f"{t.dtype}{list(t.shape)}",
            t.reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, t in state.items()
    }


def main() -> None:
    """Run libFuzzer; it ends with a crash report at the first input that is wrongly read."""
    warnings.simplefilter("error")  # a file of version 1 has no digest, and says so
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    good = []
    for folder, _ in write_artifacts(FOLDER, larger=40):
        path = folder / artifact.ARTIFACT
        good.append(state_of(path))
        (corpus / folder.name).write_bytes(path.read_bytes())

    def one_input(content: bytes) -> None:
        TRIED.write_bytes(content)
        try:
            state = state_of(TRIED)
        except FormatError:
            return
        if state not in good:
            raise RuntimeError("a file that nobody wrote was read")

    atheris.Setup([*sys.argv, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
