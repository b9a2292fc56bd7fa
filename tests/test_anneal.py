"""The schedules: their ends, their order, and what they refuse."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from askewq.anneal import Closing, lr_factor
from askewq.constraint import eps_of
from askewq.errors import RecipeError

progresses = st.floats(0, 1)


@st.composite
def closings(draw: st.DrawFn, kind: str) -> Closing:
    """Closings over some part of the training."""
    start = draw(st.floats(0, 0.9))
    end = draw(st.floats(start + 0.05, 1))
    return Closing(
        kind,
        start=start,
        end=end,
        power=draw(st.floats(0.2, 6)),
        final_radius=draw(st.floats(1e-3, 0.5)) if kind == "single" else None,
    )


@pytest.mark.parametrize(
    ("progress", "hold", "factor"),
    [
        (0.0, 0.5, 1.0),
        (0.5, 0.5, 1.0),
        (0.75, 0.5, 0.5),
        (1.0, 0.5, 0.0),
        (0.0, 0.0, 1.0),
        (0.5, 0.0, 0.5),
        (1.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        (1.001, 1.0, 1.0),
        (1.5, 0.5, 0.0),
    ],
)
def test_lr_is_held_and_then_falls_as_a_cosine(progress, hold, factor):
    """The factor is 1 until `hold`, one half midway through the rest, and 0 at the end."""
    assert lr_factor(progress, hold) == pytest.approx(factor, abs=1e-12)


@given(a=progresses, b=progresses, hold=st.floats(0, 1))
def test_lr_never_rises(a, b, hold):
    """Later in training the factor is never larger, and it stays within 0 and 1."""
    early, late = lr_factor(min(a, b), hold), lr_factor(max(a, b), hold)
    assert 1 >= early >= late >= 0


@given(closing=st.one_of(map(closings, ("lazy", "staggered", "single"))), at=progresses)
def test_a_closing_is_said_as_the_call_that_makes_it(closing, at):
    """What the text says makes the same intervals, and the same text."""
    again = eval(str(closing), {"Closing": Closing})  # our own text
    assert str(again) == str(closing)
    assert (again.eps(at), again.closed_share(at), again.period) == (
        closing.eps(at),
        closing.closed_share(at),
        closing.period,
    )


@given(
    closing=st.one_of(map(closings, ("lazy", "staggered", "single"))), a=progresses, b=progresses
)
def test_closing_never_opens_again(closing, a, b):
    """Later in training the closed share is never smaller and the interval never wider."""
    early, late = min(a, b), max(a, b)
    assert 0 <= closing.closure(early) <= closing.closure(late) <= 1
    assert closing.closed_share(early) <= closing.closed_share(late)
    assert 1 >= closing.eps(early) >= closing.eps(late) >= 0
    assert 0.5 >= closing.radius(early) >= closing.radius(late) >= 0


@given(closing=closings("staggered"))
def test_staggered_closes_between_its_ends(closing):
    """Nothing is closed up to `start`, everything from `end` on; open weights stay free."""
    assert closing.closed_share(0.0) == closing.closed_share(closing.start) == 0
    assert closing.closed_share(closing.end) == closing.closed_share(1.0) == 1
    assert closing.eps(0.0) == closing.eps(1.0) == 1


@given(closing=closings("lazy"), progress=progresses)
def test_lazy_closes_one_interval_wholly(closing, progress):
    """The radius falls from a half to nothing as ((1 - t)^power) / 2, and eps is its eps."""
    assert closing.radius(0.0) == closing.radius(closing.start) == 0.5
    assert closing.radius(closing.end) == closing.radius(1.0) == closing.eps(1.0) == 0
    t = min(max((progress - closing.start) / (closing.end - closing.start), 0), 1)
    assert closing.radius(progress) == pytest.approx((1 - t) ** closing.power / 2, abs=1e-12)
    assert closing.eps(progress) == eps_of(closing.radius(progress))
    assert closing.closed_share(progress) == 0


@given(closing=closings("single"))
def test_single_shrinks_one_interval_between_its_ends(closing):
    """The interval is free up to `start` and has the final radius from `end` on."""
    assert closing.eps(0.0) == closing.eps(closing.start) == 1
    assert closing.eps(closing.end) == closing.eps(1.0) == eps_of(closing.final_radius)
    assert closing.radius(1.0) == pytest.approx(closing.final_radius, abs=1e-7)
    assert closing.closed_share(1.0) == 0


def test_single_with_power_one_is_the_papers_geometric_annealing():
    """With power 1 equal steps of progress multiply eps by the same factor, like K^t."""
    closing = Closing("single", start=0.5, end=1.0, final_radius=0.01)
    eps = [closing.eps(0.5 + 0.01 * epoch) for epoch in range(51)]
    factors = [after / before for before, after in itertools.pairwise(eps)]
    assert factors == pytest.approx([eps_of(0.01) ** (1 / 50)] * 50)


@pytest.mark.parametrize(
    ("power", "progress", "share"), [(1.0, 0.25, 0.25), (2.0, 0.5, 0.75), (3.0, 0.5, 0.875)]
)
def test_staggered_follows_its_power(power, progress, share):
    """The closed share is 1 - (1 - t)^power."""
    closing = Closing("staggered", start=0.0, end=1.0, power=power)
    assert closing.closed_share(progress) == pytest.approx(share)


@pytest.mark.parametrize("kind", ["lazy", "staggered", "single"])
def test_progress_beyond_the_training_is_its_end(kind):
    """Rounding progress a little beyond 0 or 1 changes nothing."""
    closing = Closing(kind, start=0.0, end=1.0)
    assert closing.eps(1.001) == closing.eps(1.0)
    assert closing.closed_share(-0.001) == closing.closed_share(0.0)


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"kind": "double"}, "closing = 'double' is unknown; use one of lazy, staggered, single"),
        ({"start": -0.1}, "the closing runs from -0.1 to 0.9 of the training steps"),
        ({"end": 1.1}, "from 0.0 to 1.1 of the training steps; it must start at 0 or later, end"),
        ({"start": 0.5, "end": 0.5}, "and start before it ends"),
        ({"start": 0.6, "end": 0.4}, "from 0.6 to 0.4"),
        ({"start": math.nan}, "from nan to 0.9"),
        ({"power": 0.0}, "closing power = 0.0, every = 3, final radius = 0.01: power must be"),
        ({"power": -1.0}, "power must be above 0, every 1 or more, and the radius in (0, 0.5]"),
        ({"power": math.nan}, "closing power = nan"),
        ({"kind": "staggered", "every": 0}, "every = 0"),
        ({"kind": "single", "final_radius": 0.0}, "final radius = 0.0"),
        ({"kind": "single", "final_radius": 0.51}, "final radius = 0.51"),
        ({"kind": "single", "final_radius": math.nan}, "final radius = nan"),
        ({"every": 3}, "every = 3 goes with staggered closing; lazy closing has no use for it"),
        ({"kind": "single", "every": 1}, "goes with staggered closing; single closing has no"),
        ({"final_radius": 0.1}, "final_radius = 0.1 goes with single closing; lazy closing"),
        ({"kind": "staggered", "final_radius": 0.1}, "final_radius = 0.1 goes with single"),
    ],
)
def test_closings_that_do_not_exist(settings, fragment):
    """The error says what was given and what is allowed."""
    with pytest.raises(RecipeError) as error:
        Closing(**settings)
    assert fragment in str(error.value)
