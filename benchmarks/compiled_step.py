"""What `--compile` brings: training steps of ResNet-20 with and without it, interleaved.

Batch 128, bf16 autocast (or float32), the network compiled as `askewq finetune --compile` does it,
on weights that are made beforehand. Printed: medians of whole steps, the ratio, and the seconds
that the first two steps take, compiling included.

    python benchmarks/compiled_step.py [--threads 1] [--rounds 15] [--bits 1] [--act-bits 4]
        [--mixed-precision no]
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from resnet20 import resnet20
from torch import nn

import askewq
from askewq.layers import prepared


class Contestant:
    """A network with its optimizer, compiled or not."""

    def __init__(self, bits: int, act_bits: int | None, bf16: bool, compiled: bool) -> None:
        torch.manual_seed(0)
        self.model = resnet20().train()
        askewq.quantize(self.model, bits)
        if act_bits is not None:
            askewq.round_inputs(self.model, act_bits, lambda: self.model(torch.randn(8, 3, 32, 32)))
            askewq.follow_inputs_(self.model, True)
        self.optimizer = askewq.AskewAdamW(self.model, 3e-3, level_lr=0.01)
        self.bf16, self.compiled = bf16, compiled
        self.network = torch.compile(self.model) if compiled else self.model
        self.seconds: list[float] = []

    def step(self, images: torch.Tensor, labels: torch.Tensor, progress: float) -> None:
        """Make one training step and note how long it took."""
        began = time.perf_counter()
        self.optimizer.anneal(progress)
        weights = prepared(self.model) if self.compiled else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16), weights:
            logits = self.network(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)


def main() -> None:
    """Run both in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bits", type=int, default=1)
    parser.add_argument("--act-bits", type=int)
    parser.add_argument("--mixed-precision", choices=("bf16", "no"), default="bf16")
    arguments = parser.parse_args()
    bf16 = arguments.mixed_precision == "bf16"
    torch.set_num_threads(arguments.threads)
    eager, compiled = (
        Contestant(arguments.bits, arguments.act_bits, bf16, compiled) for compiled in (False, True)
    )
    generator = torch.Generator().manual_seed(0)
    warm_up = 2
    for i in range(warm_up + arguments.rounds):
        images = torch.randn(128, 3, 32, 32, generator=generator)
        labels = torch.randint(0, 10, (128,), generator=generator)
        for entrant in (eager, compiled) if i % 2 else (compiled, eager):
            entrant.step(images, labels, 0.8 * i / (warm_up + arguments.rounds))
    medians = [statistics.median(entrant.seconds[warm_up:]) for entrant in (eager, compiled)]
    print(f"eager {medians[0]:.3f} s a step, compiled {medians[1]:.3f}: ratio", end=" ")
    print(f"{medians[1] / medians[0]:.3f}; first two compiled steps", end=" ")
    print(f"{sum(compiled.seconds[:warm_up]):.1f} s")


if __name__ == "__main__":
    main()
