"""What GPUs do as the CPU does; skipped where there are none."""

import os
import subprocess
import sys

import builders
import pytest
import torch
from builders import finetune, finished
from safetensors.torch import load_file
from test_packed import INPUTS, logits
from together import FSDP2

import askewq

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")


@pytest.mark.parametrize("kind", ["timm", "bert", "gpt2"])
def test_packed_layers(kind):
    """Weights unpacked there are those of the CPU, and logits those of the dense load, exactly."""
    folder = finished(kind)[0]
    dense, packed = askewq.load(folder), askewq.load(folder, packed=True).cuda()
    for name, module in packed.named_modules():
        if hasattr(module, "packed"):
            assert torch.equal(module.weight.cpu(), dense.get_submodule(name).weight)
    inputs = {name: tensor.cuda() for name, tensor in INPUTS[kind]().items()}
    assert torch.equal(logits(packed, inputs), logits(dense.cuda(), inputs))


def test_a_run(tmp_path, monkeypatch):
    """What is evaluated is what is reloaded; cut and resumed it ends with the same bytes."""
    metrics = finetune("own", tmp_path / "uncut", save_every=2)
    assert metrics["snapped"] == metrics["reloaded"]
    with builders.power_cut(monkeypatch, 5), pytest.raises(builders.PowerCutError):
        finetune("own", tmp_path / "cut", save_every=2)
    finetune("own", tmp_path / "cut", save_every=2, resume=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("uncut", "cut")]
    assert files[0] == files[1]


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes(tmp_path, environment):
    """Over NCCL: the codes and scales of one process with twice the batch."""
    made = []
    for count, batch in ((1, 8), (2, 4)):
        given = builders.settings("own", tmp_path / str(count), batch_size=batch)
        words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        command = [sys.executable, "-m", "askewq", "finetune", f"--num-processes={count}", *words]
        more = environment if count == 2 else {}
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        content = load_file(tmp_path / str(count) / "model.safetensors")
        made.append({k: v for k, v in content.items() if k.endswith((".codes", ".scale"))})
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
