"""What `askewq inspect` finds out by trying a network: that it works, or why it will not."""

import builders
import pytest
import torch
from builders import command
from torch import nn

from askewq import trial, wrap
from askewq.errors import ModelError


class Own(nn.Module):
    """Three layers, of which the one in the middle is quantized."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.middle = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Restless(Own):
    def forward(self, x):
        return super().forward(x + torch.rand(1))


class Picky(Own):  # looks at the class of its layer
    def forward(self, x):
        return super().forward(x) * (1.0 if type(self.middle) is nn.Linear else 2.0)


class Pair(Own):  # of which only both together change the output
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(6, 6)
        self.last = self._modules.pop("last")

    def forward(self, x):
        others = [type(self.middle) is nn.Linear, type(self.second) is nn.Linear]
        return super().forward(self.second(x)) * (1.0 if any(others) else 2.0)


class Detached(Own):
    def forward(self, x):
        return super().forward(x).detach()


class Secretive(Own):  # a tensor that no state dict has
    def __init__(self):
        super().__init__()
        self.secret = torch.randn(3)

    def forward(self, x):
        return super().forward(x) + self.secret


class Idle(Own):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(6, 6)
        self.last = self._modules.pop("last")  # stays the last one


def attempt(kind):
    torch.manual_seed(0)
    network, x = kind(), torch.randn(2, 6)
    return trial.attempt(network, kind(), wrap.plan(network, 2), lambda model: model(x))


def test_a_network_that_works():
    """Nothing is said of it, whatever mode it was in."""
    assert attempt(Own) == []


def test_layers_without_a_gradient():
    """They are named."""
    assert attempt(Idle) == ["idle"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Restless, "changes from call to call"),
        (Picky, r"its output is another.* in float: --exclude middle$"),
        (Pair, "its output is another.* No layer does that alone"),
        (Detached, "does not depend on its weights"),
        (Secretive, "holds something that its state dict does not"),
    ],
)
def test_networks_that_do_not(kind, said):
    """Each is refused with its reason."""
    with pytest.raises(ModelError, match=said):
        attempt(kind)


WORKS = "works: wrapped, packed and loaded, its output for a random input stayed the same"


class TestCommand:
    @pytest.mark.parametrize("kind", ["bert", "llama", "vit", "gpt2"])
    def test_hugging_face(self, kind):
        """Text and images, by the shapes that their config says."""
        assert WORKS in command("inspect", getattr(builders, kind)()).out

    def test_characters(self, tmp_path):
        """A config without a vocabulary: its tokens are characters."""
        import transformers

        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_hash_buckets": 64, "local_transformer_stride": 4}
        made = transformers.CanineConfig(**size, **heads, downsampling_rate=2)
        transformers.CanineForSequenceClassification(made).save_pretrained(tmp_path)
        outcome = command("inspect", tmp_path)
        assert WORKS in outcome.out

    def test_timm(self):
        """At the size of the weights, or at another."""
        assert WORKS in command("inspect", "test_resnet").out
        assert WORKS in command("inspect", "test_vit", "--image-size", 96).out

    @pytest.mark.parametrize("make", [builders.bert, builders.vit])
    def test_a_size_that_decides_nothing(self, make):
        """A model of transformers says itself how large its images are."""
        outcome = command("inspect", make(), "--image-size", 32)
        assert outcome.code == 2
        assert "--image-size does not go with" in outcome.err

    def test_own_modules(self):
        """Their images have no size unless one is given; a size that does not fit is no verdict."""
        name = builders.own("small")
        assert "not tried: the size of its images is not known" in command("inspect", name).out
        assert WORKS in command("inspect", name, "--image-size", 16).out
        outcome = command("inspect", builders.own("grey"), "--image-size", 16)
        assert outcome.code == 0
        assert "not tried: the plain network fails on a random pixel_values" in outcome.out

    def test_one_that_will_not_work(self, tmp_path):
        """The plan is printed, and then the reason, with the exit status of an error."""
        file = tmp_path / "own.py"
        file.write_text(
            "import torch\nfrom torch import nn\n\n\nclass Picky(nn.Sequential):\n"
            "    def forward(self, x):\n        odd = type(self[2]) is nn.Linear\n"
            "        return super().forward(x) * (1.0 if odd else 2.0)\n\n\n"
            "def picky():\n    layers = [nn.Linear(48, 8), nn.Linear(8, 8), nn.Linear(8, 3)]\n"
            "    return Picky(nn.Flatten(), *layers)\n"
        )
        outcome = command("inspect", f"{file}:picky", "--image-size", 4)
        assert outcome.code == 2
        assert "plan: 1 layers" in outcome.out
        assert "will not work: with quantization-aware layers its output is another" in outcome.err

    def test_large_ones(self, monkeypatch):
        """Are tried on request only; and none is tried that should not be."""
        monkeypatch.setattr(trial, "UP_TO", 1000)
        outcome = command("inspect", "test_resnet")
        assert WORKS not in outcome.out
        assert "--trial wraps, packs and loads it" in outcome.out + outcome.err
        assert WORKS in command("inspect", "test_resnet", "--trial").out
        monkeypatch.undo()
        assert WORKS not in command("inspect", "test_resnet", "--no-trial").out

    @pytest.mark.parametrize(
        "flags", [["--trial"], ["--no-trial"], ["--bits", 4], ["--include", "x*", "--verify"]]
    )
    def test_artifacts(self, flags):
        """An artifact has been tried by the run that made it, and its plan was made there."""
        outcome = command("inspect", builders.finished("timm")[0], *flags)
        assert outcome.code == 2
        assert "for a model, not for an artifact" in outcome.err
        assert flags[0] in outcome.err
