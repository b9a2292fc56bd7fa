"""AskewSGD as Algorithm 1 of the paper states it: one weight at a time, Python floats, no torch.

Everything is in weight units, with the levels as a list and the absolute interval size

    eps = eps_rel * h^4 / 16        h = b - a, the spacing of the levels
    phi(w) = (w - a)^2 (w - b)^2    between two levels
           = h^2 (w - c)^2          beyond the outermost level c: its distance in spacings
    psi(w) = eps - phi(w)

and it shares no code with askewq, so that an error would have to be made twice to go unseen.
Besides the factor h^2 outside (the paper's grid has h = 1), one thing is ours: a weight whose own
eps is 0 is put on its nearest level and held there.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

BINS = 4096  # the threshold of the closing is sought among this many distances up to half-way


def bracket(w: float, levels: Sequence[float]) -> tuple[float, float]:
    """Return the two levels around w; beyond the outermost level, that level twice."""
    above = bisect.bisect_right(levels, w)
    return levels[max(above - 1, 0)], levels[min(above, len(levels) - 1)]


def psi(w: float, levels: Sequence[float], eps_rel: float) -> float:
    """Return the slack of the constraint at w."""
    h = levels[1] - levels[0]
    a, b = bracket(w, levels)
    phi = h**2 * (w - a) ** 2 if a == b else (w - a) ** 2 * (w - b) ** 2
    return eps_rel * h**4 / 16 - phi


def psi_slope(w: float, levels: Sequence[float]) -> float:
    """Return the derivative of psi at w."""
    h = levels[1] - levels[0]
    a, b = bracket(w, levels)
    if a == b:
        return -2 * h**2 * (w - a)
    return -2 * (w - a) * (w - b) * (2 * w - a - b)


def velocity(
    w: float, update: float, levels: Sequence[float], eps_rel: float, pull: float, clip: float
) -> float:
    """Return the displacement in V closest to `update`; `clip` is in weight units."""
    slack, slope = psi(w, levels, eps_rel), psi_slope(w, levels)
    if slack > 0 or update * slope >= -pull * slack >= 0:
        return update
    if slope == 0:
        return clip
    return max(-clip, min(clip, -pull * slack / slope))


@dataclass
class SGD:
    """Stochastic gradient descent with momentum, weight decay and Nesterov's look-ahead."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    buffers: dict[int, float] = field(default_factory=dict)

    def propose(self, i: int, w: float, gradient: float, lr: float) -> float:
        """Return where weight i would go without a constraint."""
        gradient += self.weight_decay * w
        if self.momentum:
            self.buffers[i] = self.momentum * self.buffers.get(i, 0.0) + gradient
            direction = self.buffers[i]
            if self.nesterov:
                direction = gradient + self.momentum * self.buffers[i]
        else:
            direction = gradient
        return w - lr * direction


@dataclass
class AdamW:
    """Adam with decoupled weight decay, as Loshchilov and Hutter write it."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-2
    moments: dict[int, tuple[int, float, float]] = field(default_factory=dict)

    def propose(self, i: int, w: float, gradient: float, lr: float) -> float:
        """Return where weight i would go without a constraint."""
        t, m, v = self.moments.get(i, (0, 0.0, 0.0))
        t += 1
        m = self.beta1 * m + (1 - self.beta1) * gradient
        v = self.beta2 * v + (1 - self.beta2) * gradient**2
        self.moments[i] = t, m, v
        m_hat, v_hat = m / (1 - self.beta1**t), v / (1 - self.beta2**t)
        return w - lr * self.weight_decay * w - lr * m_hat / (math.sqrt(v_hat) + self.epsilon)


@dataclass
class Reference:
    """The weights of one layer, each with its own list of levels, stepped one by one."""

    weights: list[float]
    levels: list[list[float]]
    base: SGD | AdamW
    alpha: float
    clip: float
    coupled: bool
    every: int = 1
    steps: int = 0
    held: dict[int, float] = field(default_factory=dict)
    bound: int = 0  # how often an update was replaced by the drift

    def step(self, gradients: Sequence[float], lr: float, eps_rel: float, share: float) -> None:
        """Make one update; the nearest `share` of the weights is closed before it."""
        self.close(share)
        rate = lr if self.coupled else 1.0
        for i, gradient in enumerate(gradients):
            w, levels = self.weights[i], self.levels[i]
            update = self.base.propose(i, w, gradient, lr) - w
            clip = rate * self.clip * (levels[1] - levels[0])
            if i in self.held:
                self.weights[i] = self.held[i]
            else:
                moved = velocity(w, update, levels, eps_rel, rate * self.alpha, clip)
                self.weights[i] = w + moved
                self.bound += moved != update
        self.steps += 1

    def close(self, share: float) -> None:
        """Hold every weight that is as near to a level as the nearest `share` of all."""
        if share <= 0 or (share < 1 and self.steps % self.every):
            return
        distances = [self.distance(i) for i in range(len(self.weights))]
        within = math.inf if share >= 1 else self.threshold(distances, share)
        for i, distance in enumerate(distances):
            if distance <= within:
                a, b = bracket(self.weights[i], self.levels[i])
                self.held[i] = a if self.weights[i] - a < b - self.weights[i] else b

    def distance(self, i: int) -> float:
        """Return the distance of weight i to its nearest level, in spacings."""
        w, h = self.weights[i], self.levels[i][1] - self.levels[i][0]
        return min(abs(w - level) for level in bracket(w, self.levels[i])) / h

    def threshold(self, distances: Sequence[float], share: float) -> float:
        """Return the upper end of the bin that holds the last weight to be closed."""
        wanted = int(share * len(distances))
        bins = sorted(min(int(distance * 2 * BINS), BINS - 1) for distance in distances)
        last = bins[wanted - 1] if wanted else 0
        return math.inf if last == BINS - 1 else (last + 1) / (2 * BINS)
