"""What all tests share: one thread, fixed seeds, warnings as errors, and Hypothesis strategies."""

import random

import builders  # noqa: F401  # first: it takes the Hub out of reach of timm and transformers
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from askewq.grid import BITS, Grid, make_grid

torch.set_num_threads(1)  # small tensors on shared cores: threads cost more than they bring

hypothesis.settings.register_profile(
    "askewq", deadline=None, derandomize=True, max_examples=60, database=None
)
hypothesis.settings.load_profile("askewq")


def pytest_configure(config: pytest.Config) -> None:
    """Turn warnings into errors, except those that the libraries around us cannot help."""
    config.addinivalue_line("markers", "zoo: every model of tests/zoo, a quarter of an hour")
    config.addinivalue_line("filterwarnings", "error")
    for module in ("timm", "transformers", "huggingface_hub", "datasets", "accelerate", "torch"):
        for category in ("DeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", rf"ignore::{category}:{module}(\..*)?")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that fork: autograd refuses to work in a fork once it has threads.

    It gets some from what other tests do. These tests take longest, too.
    """
    items.sort(key=lambda item: item.path.name != "test_distributed.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start every test from the same random numbers, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


ONE_GRID_ONLY = (1, "ternary")
GRIDS: list[Grid] = [make_grid(bits, "integer") for bits in BITS] + [
    make_grid(bits, "half-integer") for bits in BITS if bits not in ONE_GRID_ONLY
]


def grid_name(grid: Grid) -> str:
    """Return a test id such as ``2-integer``."""
    kind = "half-integer" if grid.first % 1 else "integer"
    return f"{grid.bits}-{kind}"


grids = st.sampled_from(GRIDS)
bit_widths = st.sampled_from(BITS)
seeds = st.integers(0, 2**32 - 1)
scales = st.floats(-12, 12).map(lambda exponent: 10.0**exponent)
shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
relative_eps = st.floats(0, 1)
pulls = st.floats(1e-3, 1)


@st.composite
def coordinates(draw: st.DrawFn, last: int) -> float:
    """Weights in code units: on levels, half-way, anywhere between, and beyond both ends."""
    level = draw(st.integers(0, last))
    offset = draw(
        st.sampled_from([0.0, 0.25, 0.5, 0.75])
        | st.floats(1e-9, 1 - 1e-9)
        | st.floats(0, 20).map(lambda beyond: beyond + last - level)
        | st.floats(-20, 0).map(lambda beyond: beyond - level)
    )
    return level + offset


@st.composite
def weights_and_scales(draw: st.DrawFn, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """A float64 weight [out, in] within and around the grid, and scales [out, groups] for it."""
    out, groups, columns = (draw(st.integers(1, 5)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(seeds))
    scale = draw(scales) * (0.5 + torch.rand(out, groups, generator=generator, dtype=torch.float64))
    x = torch.rand(out * groups, columns, generator=generator, dtype=torch.float64)
    x = x * (grid.last + 1) - 0.5  # half a spacing beyond the first and the last level
    weight = (grid.first + grid.step * x) * scale.reshape(-1, 1)
    return weight.reshape(out, -1), scale


def random_tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return normal random numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
