"""Steps a second with 1 and 2 processes, the memory of each, and what 8 GPUs would take.

A Llama-shaped network is trained at 2 bits by one process, by two with DDP and by two with FSDP2,
over gloo, every process with the same batch and one thread. Beside the steps each process counts
the bytes of its weights, gradients, optimizer state and scales, and those of weights that autograd
keeps from the forward to the backward pass. From these and the hardware constants below follows
the estimate for ResNet-50 on ImageNet and a language model of 7 B parameters; none was run.

    python benchmarks/scaling.py [--steps 20] [--only-estimate]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
RUNS: dict[str, tuple[int, dict[str, str]]] = {
    "1 process": (1, {}),
    "2, DDP": (2, {}),
    "2, FSDP2": (2, FSDP2),
}

# NVIDIA's data sheet of the H100 SXM: dense bf16, and NVLink in one direction.
PEAK, LINK = 989e12, 450e9
# Assumed, not measured: the share of the peak that training reaches (language models report 0.3 to
# 0.5, convolutions on small images far less), and of the link that a collective does.
LM_SHARE, CNN_SHARE, LINK_SHARE = 0.4, 0.08, 0.7
GPUS = 8
TOKENS = 4 * 128  # of a process and step in the runs here


def worker(steps: int, report: Path) -> None:
    """Train in one process among those of a launcher; the first one writes what all measured."""
    import torch
    import transformers

    from askewq import AskewAdamW, config, processes, quantize, sharding
    from askewq.layers import quantized_layers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model: Any = transformers.LlamaForCausalLM(shape)
    recipe = config.build({"model": "m", "dataset": "d", "output": "o"})
    accelerator = processes.accelerator_of(recipe)
    plain = _seconds(accelerator, model, torch.optim.AdamW(model.parameters()), 3, prepare=False)
    quantize(model, bits=2)
    optimizer = AskewAdamW(model, lr=1e-4)
    ours = _seconds(accelerator, model, optimizer, 3, prepare=False)
    optimizer.state.clear()
    optimizer.zero_grad()
    kept = _kept(model)
    model, prepared = accelerator.prepare(model, optimizer)
    seconds = _seconds(accelerator, model, prepared, steps, prepare=True)
    parts = {
        "weights": sum(sharding.local(p).nbytes for p in model.parameters()),
        "gradients": sum(
            sharding.local(p.grad).nbytes for p in model.parameters() if p.grad is not None
        ),
        "optimizer": sum(
            sharding.local(t).nbytes for s in optimizer.state.values() for t in s.values()
        ),
        "scales": sum(layer.weight_scale.nbytes for layer in quantized_layers(model).values()),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    own = {"seconds": statistics.median(seconds), "parts": parts}
    every = processes.gather(accelerator, own)
    count = sum(p.numel() for p in model.parameters())
    low = sum(layer.latent.numel() for layer in quantized_layers(model).values())
    if accelerator.is_main_process:
        overhead = statistics.median(ours) / statistics.median(plain)
        found = {"every": every, "count": count, "low": low, "kept": kept, "overhead": overhead}
        report.write_text(json.dumps(found))


def _seconds(
    accelerator: Any, model: Any, optimizer: Any, steps: int, *, prepare: bool
) -> list[float]:
    """Return the seconds of each step; the first one is left out."""
    import torch

    draw = torch.Generator().manual_seed(accelerator.process_index)
    tokens = torch.randint(0, 2048, (4, 128), generator=draw)
    seconds = []
    for step in range(steps + 1):
        began = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        if step < steps or not prepare:
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _kept(model: Any) -> dict[str, float]:
    """Return the bytes, per low-bit weight, of weights and their copies kept for the backward."""
    import torch

    from askewq.layers import follow_, quantized_layers

    layers = quantized_layers(model)
    shapes = {tuple(layer.latent.shape) for layer in layers.values()}
    shapes |= {shape[::-1] for shape in shapes}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    rule = next(iter(layers.values())).rule
    found = {}
    for closing in ("lazy", "staggered"):
        follow_(model, rule if closing == "lazy" else None)
        for cast in (False, True):
            kept: dict[int, int] = {}

            def keep(tensor: Any, kept: dict[int, int] = kept) -> Any:
                at = tensor.untyped_storage().data_ptr()
                if tuple(tensor.shape) in shapes and at not in own:
                    kept[at] = tensor.nbytes
                return tensor

            tokens = torch.zeros(1, 8, dtype=torch.int64)
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=cast),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                model(input_ids=tokens, labels=tokens)
            low = sum(layer.latent.numel() for layer in layers.values())
            found[f"{closing}, {'bf16' if cast else 'float32'}"] = sum(kept.values()) / low
    follow_(model, rule)
    return found


def measure(steps: int) -> dict[str, dict[str, Any]]:
    """Run all, print them, and return what they measured."""
    made = {}
    parts = "weights, gradients, optimizer, scales, peak"
    print(f"                 steps/s   tokens/s   MB by process: {parts}")
    for name, (count, environment) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(count), __file__, "--steps", str(steps)]
            command += ["--worker", str(report)]
            shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            done = subprocess.run(
                command, env={**os.environ, **shared, **environment}, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            made[name] = json.loads(report.read_text())
        every = made[name]["every"]
        rate = 1 / max(own["seconds"] for own in every)
        sizes = "; ".join(
            ", ".join(f"{value / 1e6:.2f}" for value in own["parts"].values()) for own in every
        )
        print(f"{name:14} {rate:9.2f} {rate * count * TOKENS:10.0f}   {sizes}")
    one = made["1 process"]
    print(f"\n{one['count']:,} parameters, {one['low']:,} of them at 2 bits")
    print(f"a step of ours over plain AdamW's, median of 3: {one['overhead']:.2f}")
    for how, size in one["kept"].items():
        print(f"bytes kept from forward to backward per low-bit weight, {how}: {size:.2f}")
    return made


# What the runs on 2 cores measured, for --only-estimate: see docs/reliability.md.
MEASURED = {"state": 8.0, "extra": 0.13, "kept": 1.5}


def estimate(state: float, extra: float, kept: float) -> None:
    """Print what 8 GPUs would take.

    Args:
        state: bytes of optimizer state per parameter, AdamW.
        extra: what a step of ours takes more than a plain one, as a share of computing `TOKENS`.
            It is a cost by weight, whatever the batch: so many operations for each.
        kept: bytes of weights kept from forward to backward, per parameter, under bf16.
    """
    gb, hour = 1e9, 3600
    by_weight = extra * 6 * TOKENS
    print(f"\nResNet-50 on ImageNet, {GPUS} GPUs, DDP, SGD, bf16, 256 images each:")
    weights, images, epochs = 25.6e6, 1.281e6, 90
    flops = 3 * 2 * 4.1e9 * 256  # 4.1 G multiply-adds an image forward, backward twice that
    compute = (flops + by_weight * weights) / (PEAK * CNN_SHARE)
    sent = 2 * (GPUS - 1) / GPUS * 4 * weights / (LINK * LINK_SHARE)
    step = compute + sent  # the worst case: nothing overlaps
    count = images * epochs / (256 * GPUS)
    print(f"  memory: weights, gradients, momentum {3 * 4 * weights / gb:.2f} GB; activations")
    print("    of 256 images about 22 GB in bf16 (assumed: 86 MB an image)")
    print(f"  communication {4 * weights / 1e6:.0f} MB of gradients, {1e3 * sent:.2f} ms")
    print(f"  a step {1e3 * step:.0f} ms, {256 * GPUS / step:,.0f} images/s if they can be read;")
    print(f"  {epochs} epochs ({count:,.0f} steps) {count * step / hour:.1f} hours")

    print(f"\n7 B language model, {GPUS} GPUs, FSDP2, AdamW, bf16, 2 sequences of 2,048 each:")
    weights, layers, width, tokens = 6.74e9, 32, 4096, 2 * 2048
    block = weights / layers
    shards = {
        "weights": 4 * weights / GPUS,
        "gradients": 4 * weights / GPUS,
        "optimizer": state * weights / GPUS,
        "scales": 4 * weights / width,
        "two gathered blocks and a gradient": 3 * 4 * block,
        "weights kept for the backward pass": kept * weights,
        # 34 bytes by token, channel and layer (Korthikanti et al. 2022), attention recomputed
        "activations": 34 * tokens * width * layers,
    }
    for name, size in shards.items():
        print(f"  {name:36}{size / gb:7.2f} GB")
    end = 2 * 4 * weights
    print(f"  in training {sum(shards.values()) / gb:.1f} GB; at the end network and reloaded copy")
    print(f"    in each process, {end / gb:.1f} GB (float32, and no optimizer)")
    compute = (6 * tokens + by_weight) * weights / (PEAK * LM_SHARE)
    # Gathered for forward and backward, gradients scattered: float32, so that levels are exact.
    sent = 3 * (GPUS - 1) / GPUS * 4 * weights / (LINK * LINK_SHARE)
    step = max(compute, sent)
    rate = tokens * GPUS / step
    print(f"  a step: computing {compute:.2f} s, communication {sent:.2f} s beside it")
    print(f"    ({3 * 4 * weights / gb:.0f} GB); {rate:,.0f} tokens/s;")
    print(f"  1 B tokens {1e9 / rate / hour:.1f} hours")


def main() -> None:
    """Parse the flags and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only-estimate", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.steps, options.worker)
        return
    if options.only_estimate:
        estimate(**MEASURED)
        return
    one = measure(options.steps)["1 process"]
    state = one["every"][0]["parts"]["optimizer"] / one["count"]
    kept = one["kept"]["lazy, bf16"] * one["low"] / one["count"]
    estimate(state, one["overhead"] - 1, kept)


if __name__ == "__main__":
    main()
