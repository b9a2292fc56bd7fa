"""NaN and infinity: found at once, traced to a layer, and passed over where that was asked for."""

import math

import builders
import pytest
import torch
from builders import files, finetune
from safetensors.torch import load_file
from torch import nn

from askewq import config, divergence, loop
from askewq.errors import DivergenceError, RecipeError


def network() -> nn.Sequential:
    """Return two layers whose gradients are set."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model(torch.ones(2, 3)).sum().backward()
    return model


BAD = [math.nan, math.inf, -math.inf]


class TestFinding:
    @pytest.mark.parametrize("value", BAD)
    @pytest.mark.parametrize("name", ["0.weight", "2.bias"])
    def test_a_gradient(self, name, value):
        """One bad number in one gradient is found."""
        model = network()
        assert divergence.gradients_finite(model)
        model.get_parameter(name).grad.view(-1)[-1] = value
        assert not divergence.gradients_finite(model)

    def test_large_gradients_are_finite(self):
        """Gradients whose squares overflow are no divergence."""
        model = network()
        for parameter in model.parameters():
            parameter.grad.fill_(1e38)
        assert divergence.gradients_finite(model)

    def test_no_gradients_at_all(self):
        """A model without gradients has none that are bad."""
        assert divergence.gradients_finite(nn.Linear(2, 2))

    @pytest.mark.parametrize("value", BAD)
    def test_a_weight(self, value):
        """One bad number in a weight is found; a mask of -inf in a buffer is none."""
        model = network()
        model.register_buffer("mask", torch.tensor([-math.inf]))
        assert divergence.weights_finite(model)
        with torch.no_grad():
            model[2].bias[0] = value
        assert not divergence.weights_finite(model)


class TestTracing:
    def trace(self, model, batch=None):
        """Trace a network on a batch of ones."""
        batch = {"x": torch.ones(2, 3)} if batch is None else batch
        return divergence.trace(model, batch, lambda: model(batch["x"]))

    def test_weights_come_first(self):
        """The first parameter that is broken is named, and how many are."""
        model = network()
        with torch.no_grad():
            model[0].bias[0] = math.nan
            model[2].weight[0, 0] = math.inf
            model[2].bias[0] = math.inf
        assert "in 0.bias and 2 others after it" in self.trace(model)

    def test_one_weight(self):
        """A single one is named alone."""
        model = network()
        with torch.no_grad():
            model[2].weight[0, 0] = math.inf
        assert self.trace(model).endswith("infinite values in 2.weight")

    def test_the_batch(self):
        """Data that are NaN are told from a network that is."""
        said = self.trace(network(), {"x": torch.full((2, 3), math.nan)})
        assert "the batch itself is not (x): look at the data" in said

    def test_an_output(self):
        """The first module whose output overflows is named with its class."""
        model = network()
        with torch.no_grad():
            model[0].weight.fill_(1e30)
            model[2].weight.fill_(1e30)
        assert "what comes out of 2 (Linear) is not" in self.trace(model)
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_gradient(self):
        """Backward goes from the end: the last bad gradient in order went first."""
        model = network()
        model[0].weight.grad[0, 0] = math.nan
        model[2].weight.grad[0, 0] = math.nan
        assert "the gradient of 2.weight was the first" in self.trace(model)


@pytest.mark.parametrize(("policy", "count"), [("stop", 0), ("skip:1", 1), ("skip:250", 250)])
def test_policies(policy, count):
    """A policy says how many steps may be passed over."""
    assert divergence.tolerated(policy) == count
    assert config.build({"model": "m", "dataset": "d", "output": "o", "nan_policy": policy})


@pytest.mark.parametrize(
    "policy", ["", "skip", "skip:", "skip:0", "skip:-1", "skip:x", "skip: 1", "go", "skip:1\n"]
)
def test_other_policies_are_refused(policy):
    """What is neither of the two names both."""
    with pytest.raises(RecipeError, match="must be stop, or skip:N"):
        config.build({"model": "m", "dataset": "d", "output": "o", "nan_policy": policy})


def poisoned(folder, count=1):
    """Write the usual images with `count` all-white ones, which the network `trapped` chokes on."""
    from PIL import Image

    folder.mkdir()
    pictures = builders.pictures(48)
    for i in range(count):
        pictures[5 + 16 * i] = (Image.new("RGB", (16, 16), "white"), i % 3)
    builders.write_images(folder / "train.parquet", pictures)
    builders.write_images(folder / "test.parquet", builders.pictures(24, seed=1))
    return {"dataset": str(folder), "model": builders.own("trapped"), "max_steps": 12}


class TestRuns:
    def test_stop_is_the_default(self, tmp_path):
        """The step, the layer and the ways out are named; nothing is packed."""
        with pytest.raises(DivergenceError) as caught:
            finetune("own", tmp_path / "out", **poisoned(tmp_path / "data"))
        said = str(caught.value)
        for words in ("the loss is nan at step ", "out of 0 (Trap)", "--lr", "--nan-policy skip:N"):
            assert words in said
        assert "bf16" not in said
        assert not {"model.safetensors", "metrics.json"} & files(tmp_path / "out")

    def test_skip_passes_over_and_ends(self, tmp_path, capsys):
        """One bad batch an epoch is passed over; the figures say how many were."""
        metrics = finetune(
            "own", tmp_path / "out", **poisoned(tmp_path / "data"), nan_policy="skip:2"
        )
        assert metrics["skipped_steps"] == 2
        assert metrics["steps"] == 12
        said = capsys.readouterr().out
        assert "skipped, 1 of 2" in said
        assert "skipped, 2 of 2" in said
        assert metrics["reloaded"] == metrics["snapped"]

    def test_one_more_than_tolerated_stops(self, tmp_path):
        """The limit counts over the whole run, and the message says that it was used up."""
        with pytest.raises(DivergenceError, match="1 steps were skipped before"):
            finetune("own", tmp_path / "out", **poisoned(tmp_path / "data"), nan_policy="skip:1")

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_a_skipped_step_changes_nothing(self, tmp_path, monkeypatch, accumulation):
        """Weights, BatchNorm's statistics and the optimizer's state are as before the step."""
        compared = []
        original = loop.Loop._step

        def state_of(run, optimizer):
            state = optimizer.state_dict()["state"]
            tensors = {f"{i}.{k}": t.clone() for i, s in state.items() for k, t in s.items()}
            return {k: t.clone() for k, t in run.model.state_dict().items()} | tensors

        def step(self, model, optimizer, micro, number):
            before, skipped = state_of(self, optimizer), self.progress.skipped
            loss = original(self, model, optimizer, micro, number)
            after = state_of(self, optimizer)
            same = before.keys() == after.keys() and all(
                torch.equal(after[k], before[k]) for k in after
            )
            compared.append((self.progress.skipped > skipped, same))
            return loss

        monkeypatch.setattr(loop.Loop, "_step", step)
        settings = {**poisoned(tmp_path / "data"), "grad_accumulation": accumulation}
        finetune("own", tmp_path / "out", **settings, nan_policy="skip:9")
        assert {skipped for skipped, _ in compared} == {True, False}
        assert all(skipped == same for skipped, same in compared)

    def test_a_resumed_run_counts_on(self, tmp_path, monkeypatch):
        """What was skipped before an interruption counts after it, and the bytes are the same."""
        settings = {**poisoned(tmp_path / "data"), "nan_policy": "skip:2", "save_every": 1}
        whole = finetune("own", tmp_path / "whole", **settings)
        with builders.power_cut(monkeypatch, 9), pytest.raises(builders.PowerCutError):
            finetune("own", tmp_path / "cut", **settings)
        resumed = finetune("own", tmp_path / "cut", resume=True, **settings)
        assert resumed["skipped_steps"] == whole["skipped_steps"] == 2
        one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()

    def test_a_gradient_alone(self, tmp_path, monkeypatch):
        """A loss that is a number with a gradient that is not stops, too, naming the gradient."""
        original = divergence.gradients_finite

        def infinite(model):
            dict(model.named_parameters())["6.weight"].grad[0, 0] = math.inf
            return original(model)

        monkeypatch.setattr(divergence, "gradients_finite", infinite)
        with pytest.raises(
            DivergenceError, match=r"gradient is NaN or infinite at step 0 .*6\.weight"
        ):
            finetune("own", tmp_path)

    @pytest.mark.parametrize("save_every", [1, 100])
    def test_broken_weights_are_never_skipped_nor_saved(self, tmp_path, monkeypatch, save_every):
        """Once an update has broken the weights no later step can help: the run stops at once."""
        original = loop.Loop._step

        def step(self, model, optimizer, micro, number):
            loss = original(self, model, optimizer, micro, number)
            if number == 2:
                with torch.no_grad():
                    dict(self.model.named_parameters())["6.weight"][0, 0] = math.nan
            return loss

        monkeypatch.setattr(loop.Loop, "_step", step)
        settings = {"nan_policy": "skip:99", "save_every": save_every}
        with pytest.raises(DivergenceError, match=r"infinite values in 6\.weight") as caught:
            finetune("own", tmp_path, **settings)
        assert ("not finite after step 3" in str(caught.value)) == (save_every == 1)
        assert "skip:N" not in str(caught.value)
        saved = list(tmp_path.glob("checkpoints/*/model.safetensors"))
        assert len(saved) == (2 if save_every == 1 else 0)
        for path in saved:
            assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())

    def test_bf16_is_suspected_where_it_is_used(self, tmp_path):
        """The advice names mixed precision only where it is on."""
        settings = {**poisoned(tmp_path / "data"), "mixed_precision": "bf16"}
        with pytest.raises(DivergenceError, match="or --mixed-precision no"):
            finetune("own", tmp_path / "out", **settings)
