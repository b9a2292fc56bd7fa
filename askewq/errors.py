"""Every error a user can cause, in one tree.

AskewError                what the command line turns into its exit code, 2
├── RecipeError           a key, a value or a combination of settings
├── ModelError            a model, its weights file or its task
│   └── PlanError         no layer to quantize, a pattern without a match
├── DataError             a data set, its splits or its columns
├── OutputError           the output folder, a checkpoint to resume from
│   └── DiskFullError     no room for what is to be written
├── FormatError           an artifact that is damaged or of another version
├── ExportError           a format that cannot hold the artifact, or whose library is missing
│   └── VerificationError an export that its own loader does not give back; exit code 1
├── HubError              a repository that cannot be written, a Hub out of reach
├── DivergenceError       a loss, a gradient or weights that are not finite
├── StoppedError          SIGTERM or Ctrl-C, after saving; exit code 143 or 130
└── ExactnessError        a reloaded artifact that is not the evaluated model (a bug in askewq)

A message says what was wrong, what was given, what is allowed and what to do.
"""

import difflib
from collections.abc import Iterable


class AskewError(Exception):
    """Base of all errors raised on purpose by askewq."""

    exit_code = 2


class RecipeError(AskewError):
    """A setting that is unknown, out of range or contradicts another."""


class ModelError(AskewError):
    """A model that cannot be found, built or filled with the given weights."""


class PlanError(ModelError):
    """A selection of layers that selects nothing, or not what was named."""


class DataError(AskewError):
    """A data set that cannot be read, or lacks what the task needs.

    A loader's worker hands its error over as a text with its traceback, from which torch makes the
    error anew; the message is what comes last in it.
    """

    def __init__(self, message: str) -> None:
        own = f"\n{__name__}.DataError: "
        relayed = message.startswith("Caught DataError in DataLoader worker")
        super().__init__(message.rpartition(own)[2].rstrip() if relayed else message)


class OutputError(AskewError):
    """An output folder that holds something else than expected."""


class DiskFullError(OutputError):
    """A disk without room for a checkpoint or an artifact; what was there before is left."""


class FormatError(AskewError):
    """A packed artifact that does not follow docs/format.md."""


class ExportError(AskewError):
    """An artifact that a format cannot hold, or that could not be written."""


class VerificationError(ExportError):
    """An export that its own loader cannot read, or from which it makes another model."""

    exit_code = 1


class HubError(AskewError):
    """A push that the Hugging Face Hub did not take."""


class DivergenceError(AskewError):
    """Training produced a loss, a gradient or weights that are NaN or infinite."""


class StoppedError(AskewError):
    """A run that a signal ended at a safe point; the message says how to go on."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class ExactnessError(AskewError):
    """The reloaded model does not give the very logits of the evaluated one."""


class UnverifiedWarning(UserWarning):
    """An artifact without a digest: whether it is damaged cannot be told."""


# What a network raises that is called with something it cannot take.
CALLING = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError)


def near(word: str, known: Iterable[str]) -> str:
    """Return ``' (did you mean a, b?)'`` with the known names closest to `word`, or ``''``."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {', '.join(close)}?)" if close else ""
