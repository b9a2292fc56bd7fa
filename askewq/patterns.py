"""Glob patterns on the names of layers, and the bits that they override."""

import fnmatch
from collections.abc import Mapping, Sequence

from askewq.errors import PlanError, near
from askewq.grid import Grid


def matches(names: Sequence[str], pattern: str) -> bool:
    """Tell whether one of the names of a layer matches."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def check(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that every pattern matches one of the names.

    Raises:
        PlanError: with the nearest names.
    """
    for pattern in patterns:
        if not matches(names, pattern):
            raise PlanError(
                f"the pattern {pattern!r} matches no layer{near(pattern, names)}; patterns are "
                "globs on module names such as 'layer1.*' (askewq inspect MODEL lists the names)."
            )


def overridden(names: Sequence[str], overrides: Mapping[str, Grid]) -> Grid | None:
    """Return the grid that the overrides matching a layer agree on; None: no match.

    Raises:
        PlanError: they do not agree.
    """
    found = {pattern: grid for pattern, grid in overrides.items() if matches(names, pattern)}
    if len(set(found.values())) > 1:
        given = " and ".join(f"{pattern}={grid.bits}" for pattern, grid in found.items())
        raise PlanError(
            f"the overrides {given} contradict each other on {names[0]}, and none goes before "
            "another; let each layer match overrides of one width only."
        )
    return next(iter(found.values()), None)
