"""Cost of the constrained training step beside plain fine-tuning, interleaved on the same batches.

For timm resnet50 with SGD and a ViT with AdamW at batch 16: seconds of a training step (forward,
backward, update) and of the update alone, with torch's own optimizer (default and fused), with
askewq's, and with another method beside torch's ("torch fake_quantize" is torch's own operator of
quantization-aware training in the forward pass, 2 bits per channel). Each round does one step of
every contestant in turn. Forward and backward count by their median, the update by its mean, for
some do more at every third or tenth step. Memory: bytes of optimizer state, the most that one
update of ten in a row allocates on top, and the peak of a process of its own that makes four steps
(the compiler is loaded in all of them).

    python benchmarks/step_overhead.py [--rounds 15] [--threads 2] [--models resnet50 ...]
        [--methods binaryconnect lsq parq ...]
"""

import argparse
import copy
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from parq import parq_optimizer
from timm.data.config import resolve_data_config
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import askewq
from askewq.layers import quantized_layers
from askewq.methods import RIVALS
from askewq.rivals import Follower

STAGGERED, SINGLE = askewq.Closing("staggered"), askewq.Closing("single", power=1.0)

# torchao's, through its own package (pip install torchao), annealing over this many steps.
PARQ, PARQ_STEPS = "parq", 100
FAKE = "torch fake_quantize"

Make = Callable[[nn.Module], torch.optim.Optimizer]


def plain(base: str, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Return torch's optimizer over parameters or parameter groups."""
    if base == "sgd":
        return torch.optim.SGD(parameters, 1e-3, momentum=0.9)
    return torch.optim.AdamW(parameters, 1e-4)


def contestants(base: str) -> dict[str, Make]:
    """Return what builds each optimizer over a model; another name is a method beside the first."""
    if base == "sgd":
        return {
            "torch SGD": lambda m: plain(base, m.parameters()),
            "torch SGD fused": lambda m: torch.optim.SGD(
                m.parameters(), 1e-3, momentum=0.9, fused=True
            ),
            "AskewSGD": lambda m: askewq.AskewSGD(m, 1e-3, momentum=0.9),
            "AskewSGD, staggered": lambda m: askewq.AskewSGD(
                m, 1e-3, momentum=0.9, closing=STAGGERED
            ),
            "AskewSGD, single": lambda m: askewq.AskewSGD(m, 1e-3, momentum=0.9, closing=SINGLE),
            "AskewAdamW, level_lr": lambda m: askewq.AskewAdamW(m, 1e-3, level_lr=1e-3),
        }
    return {
        "torch AdamW": lambda m: plain(base, m.parameters()),
        "torch AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), 1e-4, fused=True),
        "AskewAdamW": lambda m: askewq.AskewAdamW(m, 1e-4),
        "AskewAdamW, staggered": lambda m: askewq.AskewAdamW(m, 1e-4, closing=STAGGERED),
    }


class FakeQuantize(nn.Module):
    """Parametrization of a weight by torch's fake quantization, 2 bits per output channel."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", weight.detach().flatten(1).abs().amax(1) / 2)
        self.register_buffer("zero_point", torch.zeros(len(weight), dtype=torch.int32))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight rounded to four levels; gradients pass where it lies among them."""
        return torch.fake_quantize_per_channel_affine(weight, self.scale, self.zero_point, 0, -2, 1)


def fake_quantize_(model: nn.Module) -> None:
    """Let torch fake-quantize the weights that askewq would quantize, in place."""
    twin = copy.deepcopy(model)
    askewq.quantize(twin, 2)
    for name in quantized_layers(twin):
        fake = FakeQuantize(model.get_parameter(f"{name}.weight"))
        register_parametrization(model.get_submodule(name), "weight", fake)


class Contestant:
    """A model of its own with its optimizer, stepped on shared batches."""

    def __init__(self, name: str, model_name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model = timm.create_model(model_name, pretrained=False).train()
        if not name.startswith("torch"):
            binary = name in RIVALS and 2 not in RIVALS[name].bits
            askewq.quantize(self.model, 1 if binary else 2)
        if name == FAKE:
            fake_quantize_(self.model)
        self.follower = Follower(self.model, name) if name in RIVALS else None
        base = base_of(model_name)
        makes = contestants(base)
        makes[PARQ] = lambda m: parq_optimizer(m, 2, PARQ_STEPS, functools.partial(plain, base))
        self.optimizer = makes.get(name, next(iter(makes.values())))(self.model)
        if self.follower is not None:
            self.follower.attach(self.optimizer)
        self.gradient_seconds: list[float] = []
        self.update_seconds: list[float] = []

    def step(self, images: torch.Tensor, labels: torch.Tensor, progress: float) -> None:
        """Make one training step and note how long its gradient and its update took."""
        if isinstance(self.optimizer, askewq.AskewSGD | askewq.AskewAdamW):
            self.optimizer.anneal(progress)
        if self.follower is not None:
            self.follower.anneal(progress)
        began = time.perf_counter()
        nn.functional.cross_entropy(self.model(images), labels).backward()
        middle = time.perf_counter()
        self.optimizer.step()
        ended = time.perf_counter()
        self.optimizer.zero_grad()
        self.gradient_seconds.append(middle - began)
        self.update_seconds.append(ended - middle)

    def seconds(self, warm_up: int) -> tuple[float, float]:
        """Return the median of forward and backward and the mean of the update, after warm-up."""
        gradients, updates = self.gradient_seconds[warm_up:], self.update_seconds[warm_up:]
        return statistics.median(gradients), statistics.mean(updates)

    def state_bytes(self) -> int:
        """Return the bytes of all tensors that the optimizer keeps, and of scales."""
        tensors = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        scales = [t for name, t in self.model.state_dict().items() if name.endswith("weight_scale")]
        return sum(tensor.nbytes for tensor in [*tensors, *scales])

    def transient_bytes(self) -> int:
        """Return the most bytes that one of ten updates holds beyond what was there before it."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        most = 0
        for _ in range(10):  # some do more at every third or tenth
            with torch.profiler.profile(profile_memory=True) as profile:
                self.optimizer.step()
            held = 0
            for event in profile.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    held += event.nbytes()
                    most = max(most, held)
        self.optimizer.zero_grad()
        return most


def process_peak(model_name: str, name: str, batch: int) -> int:
    """Return the peak resident bytes of this process after four steps of a contestant (Linux)."""
    torch.compile(lambda x: x + 1)(torch.ones(8))
    entrant = Contestant(name, model_name)
    size = resolve_data_config({}, model=entrant.model)["input_size"]
    for i in range(4):
        entrant.step(torch.randn(batch, *size), torch.zeros(batch, dtype=torch.long), i / 4)
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def base_of(model_name: str) -> str:
    """Return the optimizer that such a model is fine-tuned with."""
    return "adamw" if "vit" in model_name else "sgd"


def compare(model_name: str, batch: int, rounds: int, threads: int, methods: list[str]) -> None:
    """Run the contestants in turn and print medians and ratios to the first."""
    entrants = [
        Contestant(name, model_name) for name in [*contestants(base_of(model_name)), *methods]
    ]
    size = resolve_data_config({}, model=entrants[0].model)["input_size"]
    generator = torch.Generator().manual_seed(0)
    warm_up = 4  # compilation, and the closing's own kernel at every third step
    for i in range(rounds + warm_up):
        images = torch.randn(batch, *size, generator=generator)
        labels = torch.randint(0, 1000, (batch,), generator=generator)
        # The order rotates, so that no contestant always runs after the same one.
        first = i % len(entrants)
        for entrant in entrants[first:] + entrants[:first]:
            entrant.step(images, labels, progress=0.05 + 0.8 * i / (rounds + warm_up))
    parameters = sum(p.numel() for p in entrants[0].model.parameters())
    print(f"\n{model_name}, {parameters / 1e6:.1f} M parameters, batch {batch}, {rounds} rounds")
    print("                      step s  ratio  update ms  state MB  transient MB  process peak MB")
    reference = sum(entrants[0].seconds(warm_up))
    for entrant in entrants:
        gradient, update = entrant.seconds(warm_up)
        step = gradient + update
        flags = ["--models", model_name, "--batch", str(batch), "--threads", str(threads)]
        command = [sys.executable, __file__, *flags, "--peak-of", entrant.name]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"{entrant.name:20} {step:7.3f} {step / reference:6.3f} {1e3 * update:10.1f} "
            f"{entrant.state_bytes() / 1e6:9.1f} {entrant.transient_bytes() / 1e6:13.2f} "
            f"{peak / 1e6:16.0f}"
        )


def main() -> None:
    """Parse the flags and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", help="only print this contestant's process peak")
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    parser.add_argument(
        "--methods", nargs="*", choices=[*RIVALS, PARQ, FAKE], default=["binaryconnect", FAKE]
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print(process_peak(arguments.models[0], arguments.peak_of, arguments.batch))
        return
    for name in arguments.models:
        compare(name, arguments.batch, arguments.rounds, arguments.threads, arguments.methods)


if __name__ == "__main__":
    main()
