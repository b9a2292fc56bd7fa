"""Table 4 of the AskewSGD paper: a 2-3-1 network of nine binary weights on two moons.

2,000 training and 200 test points (noise 0.1, seed 0, standardised), ReLU, no biases, batch norm
without affine after each layer, weights in {-1, +1} (LSQ and LUQ: times a scale), batch 100, 50
epochs, Adam with lr 0.1, 50 seeds. The paper's figures are the mean logistic loss divided by the
200 test points, so is this table. All 512 binary networks are tried too, with the batch-norm
statistics of the training set. Here the constraint really closes: every method's weights are on
their levels when they are judged.

    python benchmarks/paper_two_moons.py [--seeds 50]
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator

import torch
from paper_logistic import FORMS, PAPER
from sklearn.datasets import make_moons
from torch import Tensor, nn

import askewq
from askewq.methods import RIVALS, strength_for
from askewq.rivals import Follower

LR, EPOCHS, BATCH = 0.1, 50, 100
PUBLISHED = {"full precision": 2.045, "askewsgd-paper": 2.11, "binaryconnect": 2.32, "adaste": 2.24}
METHODS = ["full precision", *FORMS, *RIVALS]

Points = tuple[Tensor, Tensor]


def moons() -> tuple[Points, Points]:
    """Return training and test points with their labels, standardised by the training points."""
    x, y = make_moons(2200, noise=0.1, random_state=0)
    inputs, labels = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    inputs = (inputs - inputs[:2000].mean(0)) / inputs[:2000].std(0)
    return (inputs[:2000], labels[:2000]), (inputs[2000:], labels[2000:])


def network() -> nn.Sequential:
    """Return the 2-3-1 network."""
    return nn.Sequential(
        nn.Linear(2, 3, bias=False),
        nn.BatchNorm1d(3, affine=False),
        nn.ReLU(),
        nn.Linear(3, 1, bias=False),
        nn.BatchNorm1d(1, affine=False),
    )


def loss(model: nn.Module, points: Points) -> Tensor:
    """Return the mean logistic loss."""
    inputs, labels = points
    return nn.functional.binary_cross_entropy_with_logits(model(inputs).squeeze(1), labels)


@torch.no_grad()
def judge(model: nn.Module, train: Points, test: Points) -> float:
    """Return the paper's figure: test loss with the training set's statistics, over 200."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
            module.momentum = None  # the plain average, here of one batch: the training set
    model.train()
    model(train[0])
    model.eval()
    return loss(model, test).item() / len(test[0])


def batches(points: Points, seed: int) -> Iterator[Points]:
    """Yield the training batches of all epochs."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(points[0]), generator=generator).split(BATCH):
            yield points[0][chosen], points[1][chosen]


def train(method: str, seed: int, points: Points) -> nn.Module:
    """Train a network with a method from a seed; quantized weights end at -1 or +1."""
    torch.manual_seed(seed)
    model = network()
    steps = EPOCHS * len(points[0]) // BATCH
    optimizer: torch.optim.Optimizer
    pacer = None
    if method == "full precision":
        optimizer = torch.optim.Adam(model.parameters(), LR)
    else:
        askewq.quantize(model, 1, group_size="tensor", include=["0", "3"])
        for layer in (model[0], model[3]):
            layer.weight_scale.fill_(1)  # the paper has no scale
        if closing := FORMS.get(method):
            pull = {"pull": "coupled", "alpha": 4.0, "clip": 5.0} if closing is PAPER else {}
            optimizer = askewq.AskewAdamW(model, LR, weight_decay=0.0, closing=closing, **pull)
            pacer = optimizer
        else:
            pacer = Follower(model, method, strength_for(method, steps))
            optimizer = torch.optim.Adam(model.parameters(), LR)
            pacer.attach(optimizer)
    for step, batch in enumerate(batches(points, seed)):
        if pacer is not None:
            pacer.anneal((step + 1) / steps)
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    if method != "full precision":
        askewq.snap_(model)
    return model


def best_of_all(train_points: Points, test: Points) -> float:
    """Return the best figure of all binary networks."""
    model = network()
    figures = []
    for signs in itertools.product((-1.0, 1.0), repeat=9):
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor(signs[:6]).view(3, 2))
            model[3].weight.copy_(torch.tensor(signs[6:]).view(1, 3))
        figures.append(judge(model, train_points, test))
    return min(figures)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    points, test = moons()
    print("| method | test loss x 1e-3, mean ± std | published |")
    print("|---|---|---|")
    for method in arguments.methods:
        figures = [
            1e3 * judge(train(method, seed, points), points, test)
            for seed in range(arguments.seeds)
        ]
        spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
        published = PUBLISHED.get(method, "")
        print(
            f"| {method} | {statistics.mean(figures):.3f} ± {spread:.3f} | {published} |",
            flush=True,
        )
    print(f"| best of all 512 networks | {1e3 * best_of_all(points, test):.3f} | 2.1 |")


if __name__ == "__main__":
    main()
