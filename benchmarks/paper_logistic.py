"""Figures 2 and 6 of the AskewSGD paper: logistic regression on the vertices of a hypercube.

6,000 points uniform in [-1, 1]^10, labels Bernoulli(sigmoid(x . w*)), w* on the hypercube, SGD with
lr 1, batches of 1,000, 25 epochs. The published notebook never closes the intervals; here they
close, and the weights are -1 or +1 at the end (of lsq and luq times a scale that follows them).
Printed for every method, over the seeds: the loss
of the binary weights at the end, how far it is above the best binary weights' (all 1,024 are
tried), how often a weight of the forward pass changed its sign in the second half of the steps,
and how much the training loss moved from step to step in that half.

    python benchmarks/paper_logistic.py [--seeds 50]
"""

import argparse
import itertools
import statistics

import torch
from torch import Tensor, nn

import askewq
from askewq.methods import RIVALS, strength_for
from askewq.rivals import Follower

LR, EPOCHS, BATCH, SIZE, DIMENSION = 1.0, 25, 1000, 6000, 10
PAPER = askewq.Closing("single", start=0.5, end=1.0, power=1.0)
FORMS = {
    "askewsgd": askewq.Closing(),
    "askewsgd, staggered": askewq.Closing("staggered"),
    "askewsgd-paper": PAPER,
}
METHODS = ["full precision", *FORMS, *RIVALS]


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """Return points [SIZE, DIMENSION] and labels of one draw."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(SIZE, DIMENSION, generator=generator) - 1
    hidden = 2.0 * torch.randint(0, 2, (DIMENSION,), generator=generator) - 1
    return x, (torch.rand(SIZE, generator=generator) < torch.sigmoid(x @ hidden)).float()


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean logistic loss."""
    return nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(1), y)


def best(x: Tensor, y: Tensor) -> float:
    """Return the smallest loss of all binary weights."""
    vertices = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=DIMENSION)))
    margins = (2 * y - 1)[:, None] * (x @ vertices.T)
    return nn.functional.softplus(-margins).mean(0).min().item()


def train(method: str, seed: int, x: Tensor, y: Tensor) -> tuple[nn.Module, list[float], int]:
    """Return the trained model, the loss after every step, and the late changes of sign."""
    torch.manual_seed(seed)
    model = nn.Linear(DIMENSION, 1, bias=False)
    pacer = None
    optimizer: torch.optim.Optimizer
    if method == "full precision":
        optimizer = torch.optim.SGD(model.parameters(), LR)
    else:
        askewq.quantize(model, 1, group_size="tensor", include=["*"])
        model.weight_scale.fill_(1)  # the paper has no scale
        if closing := FORMS.get(method):
            pull = {"pull": "coupled", "alpha": 0.5, "clip": 5.0} if closing is PAPER else {}
            pacer = optimizer = askewq.AskewSGD(model, LR, closing=closing, **pull)
        else:
            pacer = Follower(model, method, strength_for(method, EPOCHS * SIZE // BATCH))
            optimizer = torch.optim.SGD(model.parameters(), LR)
            pacer.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    order = [
        i for _ in range(EPOCHS) for i in torch.randperm(SIZE, generator=generator).split(BATCH)
    ]
    losses, flips, signs = [], 0, model.weight.detach().sign().clone()
    for step, chosen in enumerate(order):
        if pacer is not None:
            pacer.anneal((step + 1) / len(order))
        optimizer.zero_grad()
        loss(model, x[chosen], y[chosen]).backward()
        optimizer.step()
        seen = model.weight.detach().sign().clone()
        if 2 * step >= len(order):
            flips += int((seen != signs).sum())
        signs = seen
        with torch.no_grad():
            losses.append(loss(model, x, y).item())
    if method != "full precision":
        askewq.snap_(model)
    return model, losses, flips


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems = [problem(seed) for seed in range(arguments.seeds)]
    lowest = [best(*points) for points in problems]
    print("| method | final loss | above the best binary | late sign changes | late movement |")
    print("|---|---|---|---|---|")
    for method in arguments.methods:
        finals, gaps, flips, moves = [], [], [], []
        for seed, (x, y) in enumerate(problems):
            model, losses, changes = train(method, seed, x, y)
            with torch.no_grad():
                finals.append(loss(model, x, y).item())
            gaps.append(finals[-1] - lowest[seed])
            flips.append(changes)
            late = losses[len(losses) // 2 :]
            moves.append(statistics.mean(abs(a - b) for a, b in itertools.pairwise(late)))
        row = [finals, gaps, flips, moves]
        shown = [f"{statistics.mean(values):.4f}" for values in row]
        print(f"| {method} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
