"""Resident weights of packed networks beside float32, and what unpacking on use costs.

timm's resnet50, and a Llama-shaped network of about 100 M parameters, at 2 bits. A run of askewq
leaves embeddings, the first and the last layer in float; with include="*" it quantizes every
Linear, Conv and Embedding, so that what stays float are biases and norms. Bytes are those of all
parameters and buffers, shared ones once. The slowdown is of a forward pass, medians of interleaved
rounds, batch 1 and 8 images, 1 and 128 tokens.

    python benchmarks/memory.py [--rounds 5] [--threads 2] [--models resnet50 llama]
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import timm
import torch
import transformers
from torch import nn

from askewq import checkpoint, wrap
from askewq.layers import snap_
from askewq.packed import PackedTensor, load_packed_into


def llama() -> nn.Module:
    """Return a Llama of 100 M parameters with an output matrix of its own."""
    config = transformers.LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=11,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=512,
    )
    return transformers.LlamaForCausalLM(config).eval()


def resnet() -> nn.Module:
    """Return timm's resnet50 with 1000 classes."""
    return timm.create_model("resnet50", pretrained=False).eval()


def held(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()] if t.numel()}
    return sum(tensors.values())


def in_turn(tasks: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median seconds of each task; every round runs all of them."""
    seconds: list[list[float]] = [[] for _ in tasks]
    for i in range(rounds + 1):
        for times, task in zip(seconds, tasks, strict=True):
            began = time.perf_counter()
            task()
            if i:
                times.append(time.perf_counter() - began)
    return [statistics.median(times) for times in seconds]


@torch.no_grad()
def compare(
    name: str, make: Callable[[], nn.Module], inputs: dict[str, torch.Tensor], rounds: int
) -> None:
    for include in ([], ["*"]):
        model = make()
        wrap.quantize(model, 2, include=include)
        snap_(model)
        content = checkpoint.artifact_of(model)
        dense, packed = make(), make()
        checkpoint.load_into(dense, content)
        load_packed_into(packed, content)
        weights = [m for m in packed.modules() if isinstance(m, PackedTensor)]
        low = sum(w.codes.nbytes + w.scale.nbytes for w in weights)
        float32 = 4 * sum(torch.Size(w.shape).numel() for w in weights)
        parameters = sum(p.numel() for p in dense.parameters())
        what = "include *" if include else "as a run leaves it"
        print(f"\n{name}, {what}: {parameters / 1e6:.1f} M parameters")
        total, before = held(packed), held(dense)
        print(f"  quantized {float32 / 1e6:7.1f} MB -> {low / 1e6:6.1f} MB, 1/{float32 / low:.1f}")
        print(
            f"  in all    {before / 1e6:7.1f} MB -> {total / 1e6:6.1f} MB, 1/{before / total:.1f}"
        )
        for label, x in inputs.items():
            a, b = dense(x), packed(x)
            a, b = (y if isinstance(y, torch.Tensor) else y.logits for y in (a, b))
            tasks = [functools.partial(network, x) for network in (dense, packed)]
            plain, slow = in_turn(tasks, rounds)
            print(
                f"  {label:12} dense {1e3 * plain:7.1f} ms, packed {1e3 * slow:7.1f} ms, "
                f"{slow / plain:.2f} times; logits equal: {torch.equal(a, b)}"
            )


def main() -> None:
    """Parse the flags and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=["resnet50", "llama"])
    arguments = parser.parse_args()
    models = arguments.models or ["resnet50", "llama"]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images = {f"{n} images": torch.randn(n, 3, 224, 224) for n in (1, 8)}
    tokens = {f"{n} tokens": torch.randint(0, 16000, (1, n)) for n in (1, 128)}
    if "resnet50" in models:
        compare("resnet50", resnet, images, arguments.rounds)
    if "llama" in models:
        compare("Llama-shaped", llama, tokens, arguments.rounds)


if __name__ == "__main__":
    main()
