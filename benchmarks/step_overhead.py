"""Cost of the constrained training step beside plain fine-tuning, interleaved on the same batches.

For timm resnet50 with SGD and a ViT with AdamW at batch 16: median seconds of a whole training
step (forward, backward, optimizer) and of the optimizer alone, with torch's own optimizer (fused
and default) and with askewq's, and the bytes of optimizer state per parameter. Each pass does one
step of every contestant in turn.

    python benchmarks/step_overhead.py [--rounds 15] [--threads 2] [--models resnet50 ...]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

import askewq

Make = Callable[[nn.Module], torch.optim.Optimizer]


def contestants(base: str) -> dict[str, Make]:
    """Return what builds each optimizer over a model."""
    if base == "sgd":
        return {
            "torch SGD": lambda m: torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9),
            "torch SGD fused": lambda m: torch.optim.SGD(
                m.parameters(), 1e-3, momentum=0.9, fused=True
            ),
            "AskewSGD": lambda m: askewq.AskewSGD(m, 1e-3, momentum=0.9),
        }
    return {
        "torch AdamW": lambda m: torch.optim.AdamW(m.parameters(), 1e-4),
        "torch AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), 1e-4, fused=True),
        "AskewAdamW": lambda m: askewq.AskewAdamW(m, 1e-4),
    }


class Contestant:
    """A model of its own with its optimizer, stepped on shared batches."""

    def __init__(self, name: str, model_name: str, make: Make) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model = timm.create_model(model_name, pretrained=False).train()
        if name.startswith("Askew"):
            askewq.quantize(self.model, 2)
        self.optimizer = make(self.model)
        self.step_seconds: list[float] = []
        self.update_seconds: list[float] = []

    def step(self, images: torch.Tensor, labels: torch.Tensor, progress: float) -> None:
        """Make one training step and note how long it and its update took."""
        if isinstance(self.optimizer, askewq.AskewSGD | askewq.AskewAdamW):
            self.optimizer.anneal(progress)
        began = time.perf_counter()
        nn.functional.cross_entropy(self.model(images), labels).backward()
        middle = time.perf_counter()
        self.optimizer.step()
        ended = time.perf_counter()
        self.optimizer.zero_grad()
        self.step_seconds.append(ended - began)
        self.update_seconds.append(ended - middle)

    def state_bytes(self) -> int:
        """Return the bytes of all tensors that the optimizer keeps, and of scales."""
        tensors = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        scales = [b for name, b in self.model.named_buffers() if name.endswith("weight_scale")]
        return sum(tensor.nbytes for tensor in [*tensors, *scales])


def compare(model_name: str, base: str, batch: int, rounds: int) -> None:
    """Run the contestants in turn and print medians and ratios to the first."""
    entrants = [Contestant(n, model_name, make) for n, make in contestants(base).items()]
    size = timm.data.resolve_data_config({}, model=entrants[0].model)["input_size"]
    generator = torch.Generator().manual_seed(0)
    warm_up = 4  # compilation, and the closing's own kernel at every third step
    for i in range(rounds + warm_up):
        images = torch.randn(batch, *size, generator=generator)
        labels = torch.randint(0, 1000, (batch,), generator=generator)
        # The order rotates, so that no contestant always runs after the same one.
        for entrant in entrants[i % 3 :] + entrants[: i % 3]:
            entrant.step(images, labels, progress=0.05 + 0.8 * i / (rounds + warm_up))
    parameters = sum(p.numel() for p in entrants[0].model.parameters())
    print(f"\n{model_name}, {parameters / 1e6:.1f} M parameters, batch {batch}, {rounds} rounds")
    print(f"{'':20} {'step s':>8} {'ratio':>6} {'update ms':>10} {'state bytes/parameter':>22}")
    reference = statistics.median(entrants[0].step_seconds[warm_up:])
    for entrant in entrants:
        step = statistics.median(entrant.step_seconds[warm_up:])
        # The mean, since the closing's extra pass comes at every third step only.
        update = statistics.mean(entrant.update_seconds[warm_up:])
        print(
            f"{entrant.name:20} {step:8.3f} {step / reference:6.3f} {1e3 * update:10.1f} "
            f"{entrant.state_bytes() / parameters:22.3f}"
        )


def main() -> None:
    """Parse the flags and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.models:
        base = "adamw" if "vit" in name else "sgd"
        compare(name, base, arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
