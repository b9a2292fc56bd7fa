"""Derive the SAWB coefficients of askewq.methods: scale = c1 * sqrt(E w^2) - c2 * E |w|.

As Choi et al. (2018, arXiv 1807.06964) did for their grids: the best scales of six standard
distributions are fitted by least squares, here for every grid of askewq. For inputs without a
sign the distributions are their positive halves. At 4 half-integer bits, the grid of the paper,
7.5 times the coefficients are its 12.1 and 12.2.

Above 16 levels two numbers do not fit all six scales any more, and a scale that is too small costs
far more than one that is too large: there the mean logarithm of the squared error is minimised.

    python benchmarks/sawb.py
"""

import numpy as np
import torch
from scipy import optimize, stats

from askewq.grid import BITS, Grid, best_scale, input_grid, make_grid

DISTRIBUTIONS = {
    "normal": stats.norm(),
    "uniform": stats.uniform(-1, 2),
    "laplace": stats.laplace(),
    "logistic": stats.logistic(),
    "triangle": stats.triang(0.5, -1, 2),
    "von Mises": stats.vonmises(1.0),
}
SAMPLES = 8192  # quantiles of each distribution


def coefficients(grid: Grid) -> tuple[float, float, float]:
    """Return c1, c2 and the largest growth of the squared error over that of the best scale."""
    quantiles = (torch.arange(SAMPLES) + 0.5) / SAMPLES
    if grid.first == 0:  # all six are symmetric about 0
        quantiles = (1 + quantiles) / 2
    rows = torch.stack([torch.tensor(d.ppf(quantiles.numpy())) for d in DISTRIBUTIONS.values()])
    best = best_scale(rows, grid).double().view(-1, 1)
    root, mean = rows.square().mean(1, keepdim=True).sqrt(), rows.abs().mean(1, keepdim=True)
    moments = torch.cat([root, -mean], dim=1)
    least = squared_error(rows, best, grid)

    def growth(pair: np.ndarray) -> torch.Tensor:
        scale = (moments @ torch.tensor(pair).reshape(2, 1)).clamp_min(1e-3 * mean)
        return squared_error(rows, scale, grid) / least

    pair = torch.linalg.lstsq(moments / mean, best / mean).solution.flatten().numpy()
    if grid.size > 16:
        found = optimize.minimize(
            lambda pair: growth(pair).log().mean().item(), pair, method="Nelder-Mead"
        )
        pair = found.x
    return *pair.tolist(), growth(pair).max().item()


def squared_error(rows: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the squared rounding error of every row, [rows, 1]."""
    codes = ((rows / scale - grid.first) / grid.step).round().clamp(0, grid.last)
    return (rows - (grid.first + grid.step * codes) * scale).square().mean(1, keepdim=True)


def main() -> None:
    """Print one line for every grid."""
    grids = [make_grid(bits, "integer") for bits in BITS]
    grids += [make_grid(bits, "half-integer") for bits in BITS[2:5]]
    grids += [input_grid(bits, signed=False) for bits in range(1, 9)]
    for grid in grids:
        c1, c2, growth = coefficients(grid)
        print(f"    ({grid.bits!r}, {grid.first!r}): ({c1:.3f}, {c2:.3f}),  # error x{growth:.2f}")


if __name__ == "__main__":
    main()
