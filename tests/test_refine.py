"""The average of the float parameters and batch norm's new statistics, against loops."""

import builders
import pytest
import torch
from builders import finetune
from torch import nn

import askewq
from askewq import checkpoint, choices, refine
from askewq.errors import RecipeError


def artifact(folder):
    return (folder / "model.safetensors").read_bytes()


class TestAverage:
    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, askewq.AskewSGD])
    def test_against_a_loop(self, make):
        """Float parameters get the average of what they were after every step; others stay."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
        model[0].bias.requires_grad_(False)
        askewq.quantize(model, 2)
        optimizer = make(model if make is askewq.AskewSGD else model.parameters(), lr=0.1)
        average = refine.FloatAverage(model, optimizer, 0.7)
        expected = {}
        for step in range(5):
            loss = model(torch.randn(3, 4)).square().sum()
            if step == 0:  # a parameter may have no gradient at first
                loss = model[2](model[1](torch.randn(3, 6))).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, value in model.named_parameters():
                if name == "0.weight" and step == 0:
                    continue
                before = expected.get(name)
                now = value.detach().double()
                expected[name] = now if before is None else 0.7 * before + 0.3 * now
        last = {name: value.detach().clone() for name, value in model.named_parameters()}
        average.use_()
        for name, value in model.named_parameters():
            if name in ("1.weight", "0.bias"):
                assert torch.equal(value, last[name])
            else:
                assert torch.allclose(value.double(), expected[name], atol=1e-6)
                assert not torch.equal(value, last[name])

    def test_an_interrupted_run_goes_on_with_it(self, tmp_path, monkeypatch):
        """To the bytes of the uncut run, which are not those of a run without an average."""
        settings = {"average": 0.8, "save_every": 2}
        finetune("own", tmp_path / "uncut", **settings)
        with builders.power_cut(monkeypatch, 5), pytest.raises(builders.PowerCutError):
            finetune("own", tmp_path / "cut", **settings)
        finetune("own", tmp_path / "cut", **settings, resume=True)
        assert artifact(tmp_path / "cut") == artifact(tmp_path / "uncut")
        assert artifact(tmp_path / "cut") != artifact(builders.finished("own")[0])
        codes = [
            {
                n: w.codes.tolist()
                for n, w in checkpoint.read(f / "model.safetensors").weights.items()
            }
            for f in (tmp_path / "cut", builders.finished("own")[0])
        ]
        assert codes[0] == codes[1]


class TestRecalibration:
    @pytest.mark.parametrize("training", [True, False])
    def test_against_means_over_batches(self, training):
        """Mean and unbiased variance of every batch, averaged; nothing else changes."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        model[1].running_mean.fill_(7.0)
        model.train(training)
        before = {name: p.clone() for name, p in model.named_parameters()}
        batches = [{"x": torch.randn(5, 3)} for _ in range(4)]
        accelerator = type("One", (), {"num_processes": 1})
        refine.recalibrate_(model, batches, lambda batch: model(batch["x"]), accelerator)
        inputs = [model[0](batch["x"]).double() for batch in batches]
        mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
        variance = torch.stack([x.var(0) for x in inputs]).mean(0)
        assert torch.allclose(model[1].running_mean.double(), mean, atol=1e-6)
        assert torch.allclose(model[1].running_var.double(), variance, atol=1e-6)
        assert model[1].momentum == 0.1
        assert [m.training for m in model.modules()] == [training] * 5
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())

    def test_a_batch_that_fails(self):
        """Nothing but the statistics is left changed."""
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
        accelerator = type("One", (), {"num_processes": 1})
        with pytest.raises(KeyError):
            refine.recalibrate_(model, [{}], lambda batch: model(batch["x"]), accelerator)
        assert model[0].momentum == 0.1
        assert all(module.training for module in model.modules())

    def test_a_run(self, tmp_path, monkeypatch):
        """Only statistics differ from a run without; a resumed run ends with the same bytes."""
        settings = {"recalibrate_bn": 3, "save_every": 2}
        plain, again = builders.finished("timm")[0], tmp_path / "again"
        metrics = finetune("timm", tmp_path / "uncut", **settings)
        assert metrics["snapped"] == metrics["reloaded"]
        with builders.power_cut(monkeypatch, 5), pytest.raises(builders.PowerCutError):
            finetune("timm", again, **settings)
        finetune("timm", again, **settings, resume=True)
        assert artifact(again) == artifact(tmp_path / "uncut")
        one, other = (checkpoint.read(f / "model.safetensors") for f in (plain, again))
        assert all(torch.equal(w.codes, other.weights[n].codes) for n, w in one.weights.items())
        changed = {n for n, t in one.tensors.items() if not torch.equal(t, other.tensors[n])}
        assert changed
        kinds = ("running_mean", "running_var", "num_batches_tracked")
        assert {name.rpartition(".")[2] for name in changed} <= set(kinds)

    def test_a_network_without_batch_norm(self, tmp_path):
        """There the setting would decide nothing."""
        recipe = builders.recipe("own", tmp_path / "out", recalibrate_bn=2)
        with pytest.raises(RecipeError, match="no batch norm"):
            choices.resolve(recipe, "image-classification", builders.own_network("small"), 6)
