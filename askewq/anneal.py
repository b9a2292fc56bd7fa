"""Schedules as pure functions of progress, the share of the training steps already taken (0 to 1).

Nothing here has a state, so a resumed run, or one on another number of processes, sees the same
values at the same progress.
"""

import math
from dataclasses import dataclass
from typing import get_args

from askewq import constraint
from askewq.errors import RecipeError
from askewq.vocabulary import Closing as ClosingKind


def lr_factor(progress: float, hold: float) -> float:
    """Return the factor on the base lr: 1 until `hold`, then a cosine down to 0 at the end."""
    if progress <= hold or hold >= 1:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (min(progress, 1.0) - hold) / (1 - hold)))


def check_progress(progress: float) -> None:
    """Check what an optimizer or a method is annealed with.

    Raises:
        RecipeError: it is no share, such as a number of steps.
    """
    if not 0 <= progress <= 1 + 1e-6:
        raise RecipeError(
            f"progress = {progress} is no share of the training steps, 0 to 1; after the step "
            "numbered i from 0, out of n, it is (i + 1) / n."
        )


# The shape of the closing where it is left open.
POWER: dict[ClosingKind, float] = {"lazy": 3.0, "staggered": 3.0, "single": 1.0}
EVERY = 3  # steps
FINAL_RADIUS = 0.01  # level spacings


@dataclass(frozen=True, slots=True)
class Closing:
    """How the intervals around the levels close.

    Let c(p) = 1 - (1 - t)^power, t running from 0 to 1 between progress `start` and `end`.

    ``lazy``: one radius for all weights, (1 - c(p)) / 2 level spacings. The forward pass sees the
    point of the intervals nearest to each weight, while the weight itself moves freely within the
    range of the grid, so that the barrier between two levels does not stop it.

    ``staggered``: every weight has an eps of its own. The share c(p) of a layer's weights, those
    nearest to a level first, is closed (eps = 0: exactly on the level, for good); the others are
    free (eps = 1) and make up for the closed ones. Assigned anew every `every` steps.

    ``single``: the paper's form, one eps for all weights, eps = eps_final^c(p): with power 1 its
    geometric annealing. `final_radius` is the interval's radius at `end`, in level spacings.

    What is None has its default: `POWER`, `EVERY`, `FINAL_RADIUS`.

    Raises:
        RecipeError: a value out of its range, or one that this kind of closing has no use for.
    """

    kind: ClosingKind = "lazy"
    start: float = 0.0
    end: float = 0.9
    power: float | None = None
    every: int | None = None
    final_radius: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ClosingKind):
            known = ", ".join(get_args(ClosingKind))
            raise RecipeError(f"closing = {self.kind!r} is unknown; use one of {known}.")
        if not 0 <= self.start < self.end <= 1:
            raise RecipeError(
                f"the closing runs from {self.start} to {self.end} of the training steps; it must "
                "start at 0 or later, end at 1 or earlier, and start before it ends."
            )
        for name, value, kind in (
            ("every", self.every, "staggered"),
            ("final_radius", self.final_radius, "single"),
        ):
            if value is not None and kind != self.kind:
                raise RecipeError(
                    f"{name} = {value} goes with {kind} closing; {self.kind} closing has no use "
                    "for it: leave it out."
                )
        if not self._power > 0 or self.period < 1 or not 0 < self._last_radius <= 0.5:
            raise RecipeError(
                f"closing power = {self._power}, every = {self.period}, final radius = "
                f"{self._last_radius}: power must be above 0, every 1 or more, and the radius in "
                "(0, 0.5]."
            )

    def __str__(self) -> str:
        """Return the call that makes it, with every value that decides something."""
        values = {"start": self.start, "end": self.end, "power": self._power}
        if self.kind == "single":
            values["final_radius"] = self._last_radius
        said = {name: float(value) for name, value in values.items()}
        if self.kind == "staggered":
            said["every"] = self.period
        return f"Closing({self.kind!r}, {', '.join(f'{k}={v}' for k, v in said.items())})"

    @property
    def _power(self) -> float:
        return POWER[self.kind] if self.power is None else self.power

    @property
    def _last_radius(self) -> float:
        return FINAL_RADIUS if self.final_radius is None else self.final_radius

    @property
    def period(self) -> int:
        """The number of steps between two closings of weights."""
        return EVERY if self.every is None else self.every

    def closure(self, progress: float) -> float:
        """Return c(progress), 0 (all free) to 1 (closed)."""
        t = min(max((progress - self.start) / (self.end - self.start), 0.0), 1.0)
        return float(1 - (1 - t) ** self._power)

    def eps(self, progress: float) -> float:
        """Return the relative eps of the weights that are not closed."""
        if self.kind == "staggered":
            return 1.0
        if self.kind == "lazy":
            return constraint.eps_of((1 - self.closure(progress)) / 2)
        return float(constraint.eps_of(self._last_radius) ** self.closure(progress))

    def closed_share(self, progress: float) -> float:
        """Return the share of each layer's weights that must sit on a level."""
        return self.closure(progress) if self.kind == "staggered" else 0.0

    def radius(self, progress: float) -> float:
        """Return the radius of the intervals that are not closed, in level spacings."""
        if self.kind == "lazy":
            return (1 - self.closure(progress)) / 2
        return constraint.radius_of(self.eps(progress))
