"""The packed file: its exact bytes, its round trip, and the strictness of its reader."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from builders import files, manifest
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from askewq import checkpoint, digest, packed, wrap
from askewq.checkpoint import Artifact
from askewq.errors import DivergenceError, FormatError, UnverifiedWarning
from askewq.grid import BITS, Grid, fit_scale, make_grid
from askewq.layers import quantize_layer_, quantized_layers, snap_
from askewq.manifest import PackedWeight

SHAPE = (3, 7)
GRIDS = [(bits, "integer") for bits in BITS] + [(b, "half-integer") for b in range(2, 9)]


class Golden(nn.Module):
    """One quantized Linear [3, 7] that walks through all codes, a float layer and a counter."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)
        self.norm = nn.BatchNorm1d(3)
        scale = torch.tensor([[0.5], [1.0], [2.0]])
        codes = (torch.arange(21) % grid.size).to(torch.uint8).reshape(SHAPE)
        with torch.no_grad():
            self.layer.weight.copy_(grid.values(codes, scale))
            self.layer.bias.copy_(torch.tensor([1.0, -2.0, 0.25]))
        quantize_layer_(self.layer, grid, scale)


class Net(nn.Module):
    """Convolution, shared Linears, a shared buffer and a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(6)
        self.free = nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.randn(3).to(torch.bfloat16))
        self.register_buffer("hidden", torch.randn(2), persistent=False)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.norm(self.two(self.one(x).relu()))


def snapped_net(bits="ternary", kind="integer", group_size="channel") -> Net:
    """Return a network with every Linear and Conv on its grid."""
    net = Net()
    wrap.quantize(net, bits, grid=kind, group_size=group_size, include=["conv", "one"])
    snap_(net)
    return net


def rewrite(path: Path, change) -> None:
    """Apply `change(manifest, tensors)` to a packed file; a returned manifest replaces the old."""
    tensors, entries = load_file(path), manifest(path)
    entries = change(entries, tensors) or entries
    if isinstance(entries, dict):  # a digest of what it holds now, right or wrong
        claimed = entries.get("digest")
        text = json.dumps(entries)
        if isinstance(claimed, str):
            zeros = text.replace(claimed, digest.UNSEALED)
            text = zeros.replace(digest.UNSEALED, digest.of_weights(zeros, tensors))
    else:
        text = entries if isinstance(entries, str) else json.dumps(entries)
    save_file(tensors, path, {"askewq": text})


# SHA-256 of the files of `Golden`, by bits and grid: in version 1 and in version 2.
GOLDEN = {
    (1, "integer"): (
        "66169f26612e2267433969e0ef5fd78e064f2caf0bca812032a693b20665083c",
        "ac4ce410aa28614bea3a8995903bdd1e50f2fc5c0c64e4c7fe33bc2ac125059a",
    ),
    ("ternary", "integer"): (
        "3fa12f69a7046734acd2d33b8665fcbeb43c4e457816c8623156cbd4541583bc",
        "ce06c315d2f722b73b11ada1149361d86b2edbc1bf74c4d1ad12f2f24e972a4b",
    ),
    (2, "integer"): (
        "2c9cdbb14cc23e986c1217f03f602c3087ca4181dde4cef4a70c4bfe6bbc9bb6",
        "17f9ffa19392176d3fca1e9ab8666cbadbfdf9abdc7593375172eaac29a5743b",
    ),
    (2, "half-integer"): (
        "3ec5b7c60a4f4c824c5293d6a035701ce4a71ba4aff7789ec7ea95a5bf95274e",
        "074cef3ef6fc73db794aca6f99399d8f15d79714fc63a2ae5bc65e79a244f880",
    ),
    (3, "integer"): (
        "317459f8d9af2a8ced95b1b4e2e49f07ec706e968d40e96cd9dc387703220c14",
        "06af39c34bec5cfcb655ca4629ba15059b000676711626518b6cbe597161c32f",
    ),
}


def as_version_1(manifest, tensors):
    """Change a manifest to what version 1 had in its place, in compact JSON."""
    del manifest["digest"]
    for entry in manifest["weights"].values():
        assert entry.pop("channel_dim") == 0
    return json.dumps({**manifest, "version": 1}, sort_keys=True, separators=(",", ":"))


class TestBytes:
    @pytest.mark.parametrize(
        ("bits", "hex_codes"),
        [
            # 21 codes 0, 1, 0, 1 ... and three filling bits
            (1, "aaaa0a"),
            # 0 1 2 0 1 -> 0 + 3 + 18 + 0 + 81 = 0x66; four whole bytes, then one code alone
            ("ternary", "6641c46602"),
            # 0 1 2 3 -> 0b11_10_01_00
            (2, "e4e4e4e4e400"),
            # 0 .. 7 in 24 bits, lowest first; then 0 1 2 3 4
            (3, "88c6fa88c6fa8846"),
            (4, "1032547698badcfe103204"),
        ],
    )
    def test_golden_codes(self, tmp_path, bits, hex_codes):
        """Codes that count upwards have exactly these bytes, lowest bits first."""
        path = tmp_path / "m.safetensors"
        checkpoint.save(Golden(make_grid(bits)), path)
        assert bytes(load_file(path)["layer.weight.codes"].tolist()).hex() == hex_codes

    @pytest.mark.parametrize(("bits", "kind"), [*GOLDEN])
    def test_golden_files(self, tmp_path, bits, kind):
        """The whole file is the same to the byte as when version 2 of the format was fixed."""
        path = tmp_path / "m.safetensors"
        checkpoint.save(Golden(make_grid(bits, kind)), path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN[bits, kind][1]

    @pytest.mark.parametrize(("bits", "kind"), [*GOLDEN])
    def test_files_of_version_1(self, tmp_path, bits, kind):
        """A file as version 1 was written, to the byte, is read, and is said to be unverified."""
        path = tmp_path / "m.safetensors"
        checkpoint.save(Golden(make_grid(bits, kind)), path)
        new = checkpoint.read(path)
        rewrite(path, as_version_1)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN[bits, kind][0]
        with pytest.warns(UnverifiedWarning, match="version 1"):
            old = checkpoint.read(path)
        assert (old.digest, len(new.digest)) == (None, 64)
        assert old.dense_state().keys() == new.dense_state().keys()
        for name, tensor in new.dense_state().items():
            assert bytes_of(old.dense_state()[name]) == bytes_of(tensor)

    def test_golden_manifest(self, tmp_path):
        """The header's manifest lists version, weights and shared names, as compact JSON."""
        path = tmp_path / "m.safetensors"
        checkpoint.save(Golden(make_grid(2, "integer")), path)
        assert manifest(path) == {
            "version": 2,
            "digest": "f0c176d4ad5c9581fd62429976f22b9cb8d5d3468397cbfba3f9d8216038f600",
            "weights": {
                "layer.weight": {
                    "bits": 2,
                    "grid": {"first": -2.0, "step": 1.0, "size": 4},
                    "shape": [3, 7],
                    "channel_dim": 0,
                }
            },
            "shared": {},
        }
        assert load_file(path).keys() == {
            "layer.weight.codes",
            "layer.weight.scale",
            "layer.bias",
            "norm.weight",
            "norm.bias",
            "norm.running_mean",
            "norm.running_var",
            "norm.num_batches_tracked",
        }

    def test_golden_channels_last(self, tmp_path):
        """Codes of a weight [in, out] are written output by output, in a file of version 2."""
        layer = Conv1D(3, 2)
        quantize_layer_(layer, make_grid(2, "integer"), torch.ones(3, 1))
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[-2.0, -1.0, 0.0], [1.0, 0.0, -1.0]]))
        path = tmp_path / "m.safetensors"
        checkpoint.save(layer, path)
        found = manifest(path)
        assert len(found.pop("digest")) == 64
        assert found == {
            "version": 2,
            "weights": {
                "weight": {
                    "bits": 2,
                    "grid": {"first": -2.0, "step": 1.0, "size": 4},
                    "shape": [2, 3],
                    "channel_dim": 1,
                }
            },
            "shared": {},
        }
        # 0 3, 1 2, 2 1, the first in the lowest bits
        assert load_file(path)["weight.codes"].tolist() == [0b10_01_11_00, 0b01_10]
        assert load_file(path)["weight.scale"].shape == (3, 1)

    def test_saving_twice_gives_the_same_bytes(self, tmp_path):
        """A file depends on the model alone."""
        net = snapped_net()
        for name in ("a", "b"):
            checkpoint.save(net, tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


class TestRoundTrip:
    @pytest.mark.parametrize(("bits", "kind"), GRIDS)
    @pytest.mark.parametrize("group_size", ["channel", "tensor", 3])
    def test_every_grid_bit_for_bit(self, tmp_path, bits, kind, group_size):
        """What is read and loaded into a fresh model has the very bits of what was saved."""
        net = snapped_net(bits, kind, group_size)
        path = tmp_path / "m.safetensors"
        checkpoint.save(net, path)
        fresh = Net()
        checkpoint.load_into(fresh, checkpoint.read(path))
        saved = {k: v for k, v in net.state_dict().items() if not k.endswith("weight_scale")}
        loaded = fresh.state_dict()
        assert loaded.keys() == saved.keys()
        for key, tensor in saved.items():
            assert loaded[key].dtype == tensor.dtype
            assert bytes_of(loaded[key]) == bytes_of(tensor), key

    @pytest.mark.parametrize(("bits", "kind"), GRIDS)
    def test_relaxed_weights_are_stored_as_their_nearest_levels(self, tmp_path, bits, kind):
        """A model that is not snapped yet is stored as if it were."""
        net = snapped_net(bits, kind)
        before = net.conv.weight.detach().clone()
        jitter = 0.2 * net.conv.weight_scale.reshape(-1, 1, 1, 1) * net.conv.grid.step
        with torch.no_grad():
            net.conv.weight.add_(jitter * (2 * torch.rand_like(net.conv.weight) - 1))
        checkpoint.save(net, tmp_path / "m")
        assert torch.equal(checkpoint.read(tmp_path / "m").dense_state()["conv.weight"], before)

    def test_codes_use_all_levels(self, tmp_path):
        """The stored codes are those of the grid: they reach from the first to the last level."""
        net = snapped_net(2, group_size="tensor")
        checkpoint.save(net, tmp_path / "m")
        weight = checkpoint.read(tmp_path / "m").weights["conv.weight"]
        values = set((weight.dense() / weight.scale.item()).flatten().tolist())
        assert values == {-2.0, -1.0, 0.0, 1.0}

    def test_size_is_codes_and_scales(self, tmp_path):
        """A packed weight takes its bits and four bytes a scale, nothing more."""
        net = snapped_net(3)
        checkpoint.save(net, tmp_path / "m")
        weight = checkpoint.read(tmp_path / "m").weights["conv.weight"]
        assert weight.codes.numel() == math.ceil(6 * 2 * 3 * 3 * 3 / 8)
        assert weight.scale.shape == (6, 1)

    def test_tied_weights_are_stored_once_and_restored_for_both(self, tmp_path):
        """A weight of two layers has one entry; both layers get it back, tied or not."""
        net = snapped_net()
        checkpoint.save(net, tmp_path / "m")
        assert manifest(tmp_path / "m")["shared"] == {"two.weight": "one.weight"}
        assert not any(name.startswith("two.") for name in load_file(tmp_path / "m"))
        tied, untied = Net(), Net()
        untied.two.weight = nn.Parameter(torch.zeros(6, 6))
        for fresh in (tied, untied):
            checkpoint.load_into(fresh, checkpoint.read(tmp_path / "m"))
            assert torch.equal(fresh.one.weight, net.one.weight)
            assert torch.equal(fresh.two.weight, net.one.weight)
        assert tied.two.weight is tied.one.weight

    @pytest.mark.parametrize("names", [("one", "two"), ("free", "other")], ids=["packed", "float"])
    def test_two_tensors_for_one_of_the_model(self, tmp_path, names):
        """A tie that was lost in training is not made again by loading: which would it be."""
        net = Net()
        net.other = nn.Parameter(torch.randn(4))
        net.two.weight = nn.Parameter(torch.randn(6, 6))
        wrap.quantize(net, 2, include=["one", "two"])
        snap_(net)
        checkpoint.save(net, tmp_path / "m")
        fresh = Net()
        fresh.other = fresh.free if "other" in names else nn.Parameter(torch.randn(4))
        if "two" not in names:
            fresh.two.weight = nn.Parameter(torch.randn(6, 6))
        for load in (checkpoint.load_into, packed.load_packed_into):
            with pytest.raises(FormatError, match=rf"'{names[0]}.*' and '{names[1]}.*' are one"):
                load(fresh, checkpoint.read(tmp_path / "m"))

    def test_tied_float_tensors_are_stored_once(self, tmp_path):
        """Sharing is kept for tensors that are not on a grid, too."""
        net = snapped_net()
        net.again = net.norm
        checkpoint.save(net, tmp_path / "m")
        artifact = checkpoint.read(tmp_path / "m")
        assert artifact.shared["again.running_mean"] == "norm.running_mean"
        assert "again.weight" not in artifact.tensors
        assert torch.equal(artifact.dense_state()["again.weight"], net.norm.weight)

    def test_a_model_that_is_one_layer(self, tmp_path):
        """A network that is itself a Linear is packed like any other."""
        net = nn.Linear(8, 4)
        wrap.quantize(net, 2, include=["*"])
        snap_(net)
        checkpoint.save(net, tmp_path / "m")
        assert checkpoint.read(tmp_path / "m").weights.keys() == {"weight"}
        fresh = nn.Linear(8, 4)
        checkpoint.load_into(fresh, checkpoint.read(tmp_path / "m"))
        assert torch.equal(fresh.weight, net.weight)

    def test_saving_leaves_the_model_as_it_was(self, tmp_path):
        """Packing reads the model only."""
        net = snapped_net()
        with torch.no_grad():
            net.one.weight.add_(0.01)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        checkpoint.save(net, tmp_path / "m")
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert quantized_layers(net).keys() == {"conv", "one"}


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the memory of a tensor, so that -0.0 and 0.0 differ."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def drop(key):
    """Return a change that removes a tensor."""

    def change(manifest, tensors):
        del tensors[key]

    return change


def put(key, make):
    """Return a change that replaces a tensor, or adds one."""

    def change(manifest, tensors):
        tensors[key] = make(tensors.get(key)).contiguous()

    return change


def say(*path_and_value):
    """Return a change that sets an entry of the manifest."""
    *path, last, value = path_and_value

    def change(manifest, tensors):
        place = manifest
        for key in path:
            place = place[key]
        place[last] = value

    return change


def unsay(*path):
    """Return a change that removes an entry of the manifest."""

    def change(manifest, tensors):
        place = manifest
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def with_element(value):
    """Return a change of a tensor's first element."""

    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def with_last(value):
    """Return a change of a tensor's last element."""

    def change(tensor):
        tensor = tensor.clone()
        tensor[-1] = value
        return tensor

    return change


W, CODES, SCALE = "conv.weight", "conv.weight.codes", "conv.weight.scale"
ENTRY = ("weights", W)
MUTATIONS = {
    "newer version": (say("version", 4), "format version 4"),
    "version 3 without inputs": (say("version", 3), "version 3 must have exactly the keys"),
    "no channel_dim": (unsay(*ENTRY, "channel_dim"), "channel_dim"),
    "older version": (say("version", 0), "version 0"),
    "no version": (unsay("version"), "version"),
    "version as text": (say("version", "1"), "version"),
    "version as truth": (say("version", True), "version"),
    "version as float": (say("version", 1.0), "version"),
    "manifest is a list": (lambda m, t: "[]", "version"),
    "manifest is not JSON": (lambda m, t: '{"version":', "not JSON"),
    "manifest nested without end": (lambda m, t: "[" * 100_000, "manifest"),
    "manifest without weights": (unsay("weights"), "weights"),
    "manifest without shared": (unsay("shared"), "shared"),
    "manifest with another key": (say("extra", 1), "extra"),
    "weights as a list": (say("weights", []), "weights"),
    "shared as a list": (say("shared", []), "shared"),
    "shared with a number": (say("shared", "two.weight", 3), "shared"),
    "shared with nothing": (say("shared", "two.weight", "nowhere.weight"), "nowhere.weight"),
    "shared with itself": (say("shared", "other", "other"), "other"),
    "shared and packed": (say("shared", W, "one.weight"), W),
    "shared and dense": (say("shared", "free", "one.weight"), "free"),
    "entry is a number": (say(*ENTRY, 7), W),
    "entry without bits": (unsay(*ENTRY, "bits"), W),
    "entry without grid": (unsay(*ENTRY, "grid"), W),
    "entry without shape": (unsay(*ENTRY, "shape"), W),
    "entry with another key": (say(*ENTRY, "zero", 0), W),
    "bits 0": (say(*ENTRY, "bits", 0), W),
    "bits 9": (say(*ENTRY, "bits", 9), W),
    "bits as text": (say(*ENTRY, "bits", "2"), W),
    "bits as a float": (say(*ENTRY, "bits", 3.0), W),
    "bits as a list": (say(*ENTRY, "bits", [2]), W),
    "bits of another grid": (say(*ENTRY, "bits", 2), W),
    "grid that starts elsewhere": (say(*ENTRY, "grid", "first", -1.0), W),
    "grid of another step": (say(*ENTRY, "grid", "step", 0.5), W),
    "grid of another size": (say(*ENTRY, "grid", "size", 5), W),
    "grid without size": (unsay(*ENTRY, "grid", "size"), W),
    "grid as text": (say(*ENTRY, "grid", "integer"), W),
    "shape of more weights": (say(*ENTRY, "shape", [6, 2, 3, 4]), CODES),
    "shape of fewer weights": (say(*ENTRY, "shape", [6, 2, 3, 2]), CODES),
    "shape negative": (say(*ENTRY, "shape", [-6, 2, -3, 3]), W),
    "shape zero": (say(*ENTRY, "shape", [0]), W),
    "shape empty": (say(*ENTRY, "shape", []), W),
    "shape of floats": (say(*ENTRY, "shape", [6.0, 2, 3, 3]), W),
    "shape of truths": (say(*ENTRY, "shape", [True, 108]), W),
    "shape as text": (say(*ENTRY, "shape", "6233"), W),
    "shape too large to count": (say(*ENTRY, "shape", [2**40, 2**40]), CODES),
    "codes missing": (drop(CODES), CODES),
    "scale missing": (drop(SCALE), SCALE),
    "codes too long": (put(CODES, lambda t: torch.cat([t, t[:1] * 0])), CODES),
    "codes too short": (put(CODES, lambda t: t[:-1]), CODES),
    "codes in two dimensions": (put(CODES, lambda t: t.view(1, -1)), CODES),
    "codes of another dtype": (put(CODES, lambda t: t.to(torch.int8)), CODES),
    "scale of another dtype": (put(SCALE, lambda t: t.half()), SCALE),
    "scale in one dimension": (put(SCALE, lambda t: t.view(-1)), SCALE),
    "scale of too many rows": (put(SCALE, lambda t: torch.cat([t, t])), SCALE),
    "scale of groups that do not divide": (put(SCALE, lambda t: t.repeat(1, 4)), SCALE),
    "scale of no groups": (put(SCALE, lambda t: t[:, :0]), SCALE),
    "scale NaN": (put(SCALE, with_element(math.nan)), SCALE),
    "scale infinite": (put(SCALE, with_element(math.inf)), SCALE),
    "scale negative": (put(SCALE, with_element(-1.0)), SCALE),
    "scale zero": (put(SCALE, with_element(0.0)), SCALE),
    "packed and dense": (put(W, lambda t: torch.zeros(6, 2, 3, 3)), W),
    "filling bits": (put(CODES, with_last(255)), W),
}


def conv1d_file(folder: Path) -> Path:
    """Write a file of version 2: a weight [in, out] with two groups an output."""
    layer = Conv1D(5, 4)
    quantize_layer_(layer, make_grid(3), torch.rand(5, 2) + 0.1)
    checkpoint.save(layer, folder / "m.safetensors")
    return folder / "m.safetensors"


class TestChannelsLast:
    @pytest.mark.parametrize(("bits", "kind"), GRIDS)
    @pytest.mark.parametrize("group_size", ["channel", "tensor", 3])
    def test_round_trip(self, tmp_path, bits, kind, group_size):
        """What is read has the bits of what was saved, in the layer's own orientation."""
        layer, grid = Conv1D(5, 6), make_grid(bits, kind)
        quantize_layer_(layer, grid, fit_scale(layer.weight.t(), grid, group_size))
        layer.snap_()
        checkpoint.save(layer, tmp_path / "m")
        fresh = Conv1D(5, 6)
        checkpoint.load_into(fresh, checkpoint.read(tmp_path / "m"))
        assert fresh.weight.is_contiguous()
        assert bytes_of(fresh.weight) == bytes_of(layer.latent)
        assert bytes_of(checkpoint.read(tmp_path / "m").weights["weight"].dense()) == bytes_of(
            layer.latent
        )

    @pytest.mark.parametrize("dim", [2, -1, True, 1.0, "1", None])
    def test_a_dimension_that_is_none(self, tmp_path, dim):
        """A channel_dim is a dimension of the weight."""
        path = conv1d_file(tmp_path)
        rewrite(path, say("weights", "weight", "channel_dim", dim))
        with pytest.raises(FormatError, match="no dimension"):
            checkpoint.read(path)

    def test_the_scale_belongs_to_that_dimension(self, tmp_path):
        """With another channel_dim the scale does not fit, and the file is refused."""
        path = conv1d_file(tmp_path)
        rewrite(path, say("weights", "weight", "channel_dim", 0))
        with pytest.raises(FormatError, match=r"'weight\.scale' must be float32 \[4, groups\]"):
            checkpoint.read(path)

    def test_an_old_entry_in_a_new_version(self, tmp_path):
        """Version 1 knows no channel_dim: the keys of a version are exact."""
        path = conv1d_file(tmp_path)
        rewrite(path, say("version", 1))
        with pytest.raises(FormatError, match="must have exactly the keys"):
            checkpoint.read(path)


class TestStrictReader:
    @pytest.fixture
    def path(self, tmp_path):
        """A good file of 3-bit weights (108 of them: 40.5 bytes, so filling bits exist)."""
        path = tmp_path / "m.safetensors"
        checkpoint.save(snapped_net(3), path)
        return path

    def test_the_file_before_the_mutations_is_good(self, path):
        """What the table below changes would be read without complaint."""
        rewrite(path, lambda manifest, tensors: None)
        checkpoint.load_into(Net(), checkpoint.read(path))

    @pytest.mark.parametrize("name", MUTATIONS)
    def test_each_mutation_is_refused_by_name(self, path, name):
        """One thing wrong in the file is a FormatError that names the key."""
        change, named = MUTATIONS[name]
        rewrite(path, change)
        with pytest.raises(FormatError) as caught:
            checkpoint.read(path)
        assert named in str(caught.value)

    @pytest.mark.parametrize("value", [243, 255])
    def test_bytes_that_are_no_ternary_codes(self, tmp_path, value):
        """Five ternary codes make a byte of at most 242; more is refused, naming the weight."""
        path = tmp_path / "m"
        checkpoint.save(snapped_net("ternary"), path)
        rewrite(path, put(CODES, with_element(value)))
        with pytest.raises(FormatError, match=str(value)) as caught:
            checkpoint.read(path)
        assert W in str(caught.value)

    def test_filling_digits_of_ternary_codes_are_zero(self, tmp_path):
        """The digits after the last ternary code are 0, as the filling bits are."""
        path = tmp_path / "m"
        checkpoint.save(snapped_net("ternary"), path)  # 108 codes: the last byte holds three
        rewrite(path, put(CODES, with_last(27)))
        with pytest.raises(FormatError, match=r"conv\.weight"):
            checkpoint.read(path)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (put("surplus", lambda t: torch.ones(1)), "surplus"),
            (put("surplus.codes", lambda t: torch.ones(1)), "surplus.codes"),
            (drop("free"), "free"),
            (unsay("shared", "two.weight"), "two.weight"),
            (say("shared", "three.weight", "one.weight"), "three.weight"),
            (put("free", lambda t: t[:3]), "free"),
            (put("free", lambda t: t.double()), "free"),
            (put("table", lambda t: t.float()), "table"),
            (put("norm.num_batches_tracked", lambda t: t.int()), "norm.num_batches_tracked"),
            (say(*ENTRY, "shape", [6, 18]), W),
        ],
        ids=[
            "extra tensor",
            "extra codes",
            "missing tensor",
            "missing shared name",
            "extra shared name",
            "shape",
            "dtype",
            "wider dtype",
            "integer dtype",
            "shape of a packed weight",
        ],
    )
    def test_what_does_not_fit_the_model_is_refused(self, path, change, named):
        """Loading names a key that is missing, left over, or of another shape or dtype."""
        rewrite(path, change)
        net = Net()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(FormatError) as caught:
            checkpoint.load_into(net, checkpoint.read(path))
        assert repr(named) in str(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    def test_a_near_name_is_offered(self, path):
        """A renamed layer is recognised in the message."""
        net = Net()
        net.freed = net.free
        del net.free
        with pytest.raises(FormatError, match="did you mean freed"):
            checkpoint.load_into(net, checkpoint.read(path))

    def test_ordinary_safetensors_files_are_told_apart(self, tmp_path):
        """A file without a manifest is called an ordinary safetensors file."""
        for metadata in (None, {"format": "pt"}):
            save_file(Net().state_dict() | {"two.weight": torch.zeros(1)}, tmp_path / "m", metadata)
            with pytest.raises(FormatError, match="ordinary safetensors file"):
                checkpoint.read(tmp_path / "m")

    @pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -100])
    def test_truncated_files(self, path, keep):
        """A file cut short anywhere is refused with its path."""
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(FormatError) as caught:
            checkpoint.read(path)
        assert str(path) in str(caught.value)

    def test_bytes_after_the_end(self, path):
        """A file that goes on after its last tensor is refused."""
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(FormatError, match="safetensors"):
            checkpoint.read(path)

    def test_files_that_are_none(self, tmp_path):
        """A folder, a missing file, text and a pickle are refused with their path."""
        (tmp_path / "text").write_text("weights")
        torch.save({"a": torch.ones(1)}, tmp_path / "pickle")
        (tmp_path / "folder").mkdir()
        for name in ("text", "pickle", "folder", "missing"):
            with pytest.raises(FormatError) as caught:
                checkpoint.read(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value)


class TestFailingSave:
    def test_the_old_file_stays(self, tmp_path, monkeypatch):
        """When writing fails half-way the file of before is untouched and nothing else is left."""
        path = tmp_path / "m.safetensors"
        checkpoint.save(snapped_net(2), path)
        before = path.read_bytes()

        def full_disk(tensors, target, metadata):
            Path(target).write_bytes(b"half a fi")
            raise OSError("no space left on device")

        monkeypatch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(snapped_net(3), path)
        assert path.read_bytes() == before
        assert files(tmp_path) == {"m.safetensors"}

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_weights_that_are_not_finite_are_not_saved(self, tmp_path, value):
        """A weight without a nearest level raises before anything is written."""
        net = snapped_net()
        with torch.no_grad():
            net.conv.weight[0, 0, 0, 0] = value
        with pytest.raises(DivergenceError, match="NaN or infinite"):
            checkpoint.save(net, tmp_path / "m")
        assert files(tmp_path) == set()


def test_dense_state_gives_independent_names():
    """An artifact's dense state lists every key of a state dict, shared names included."""
    codes = torch.zeros(1, dtype=torch.uint8)
    weight = PackedWeight(make_grid(1), (2, 4), codes, torch.tensor([[1.0], [2.0]]))
    state = Artifact({"a": weight}, {"b": torch.ones(1)}, {"c": "a", "d": "b"}).dense_state()
    assert state["c"].tolist() == [[-1.0] * 4, [-2.0] * 4]
    assert state["d"].tolist() == [1.0]
    assert state.keys() == {"a", "b", "c", "d"}


def test_a_network_in_channels_last(tmp_path):
    """A network whose weights lie otherwise in memory is filled with the same values."""
    checkpoint.save(snapped_net(), tmp_path / "file")
    stored = checkpoint.read(tmp_path / "file")
    first, second = Net(), Net().to(memory_format=torch.channels_last)
    for network in (first, second):
        checkpoint.load_into(network, stored)
    assert not second.conv.weight.is_contiguous()
    assert torch.equal(first.conv.weight, second.conv.weight)


class TestShards:
    @pytest.fixture
    def path(self, tmp_path):
        """An artifact in two files and an index, as transformers writes large models."""
        checkpoint.save(snapped_net(3), tmp_path / "whole")
        tensors, metadata = load_file(tmp_path / "whole"), {"askewq": self.text(tmp_path / "whole")}
        names = sorted(tensors)
        parts = {"m-1.safetensors": names[::2], "m-2.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, tmp_path / file, metadata)
        places = {name: file for file, part in parts.items() for name in part}
        index = tmp_path / "m.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return tmp_path / "m.safetensors"

    @staticmethod
    def text(path: Path) -> str:
        return json.dumps(manifest(path), sort_keys=True, separators=(",", ":"))

    def test_they_are_one_artifact(self, path):
        """What is read from the shards is what one file would hold."""
        one = checkpoint.serialize(checkpoint.read(path.with_name("whole")))
        two = checkpoint.serialize(checkpoint.read(path))
        assert one[1] == two[1]
        assert one[0].keys() == two[0].keys()
        assert all(torch.equal(one[0][name], tensor) for name, tensor in two[0].items())

    def test_a_single_file_comes_first(self, path):
        """Where there is one file it is read, as transformers does."""
        checkpoint.save(snapped_net(2), path)
        assert checkpoint.files_of(path) == [path]

    def test_shards_of_two_artifacts(self, path):
        """Another manifest in a shard is refused, naming the file."""
        second = path.with_name("m-2.safetensors")
        rewrite(second, say("shared", {}))
        with pytest.raises(FormatError, match=r"m-2\.safetensors does not go with"):
            checkpoint.read(path)

    def test_a_tensor_twice(self, path):
        """A tensor that two shards hold is refused."""
        first, second = (load_file(path.with_name(f"m-{i}.safetensors")) for i in (1, 2))
        tensors, name = {**second, next(iter(first)): next(iter(first.values()))}, "m-2.safetensors"
        metadata = {"askewq": self.text(path.with_name(name))}
        save_file(tensors, path.with_name(name), metadata)
        with pytest.raises(FormatError, match="no tensor twice"):
            checkpoint.read(path)

    def test_a_missing_shard(self, path):
        """A shard that is not there is named."""
        path.with_name("m-2.safetensors").unlink()
        with pytest.raises(FormatError, match=r"m-2\.safetensors is not a readable"):
            checkpoint.read(path)

    @pytest.mark.parametrize(
        "content",
        [
            *("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'),
            *('{"weight_map": {"a": "../m-1"}}', '{"weight_map": {"a": ".."}}'),
            *('{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["m-1"]}}'),
        ],
    )
    def test_a_damaged_index(self, path, content):
        """An index names files beside it, or is refused."""
        path.with_name("m.safetensors.index.json").write_text(content)
        with pytest.raises(FormatError, match=r"index\.json"):
            checkpoint.read(path)


def test_buffers_that_share_memory_are_stored_one_by_one(tmp_path):
    """A view of another buffer, of a part or of all of it, has its numbers in the file."""
    net = snapped_net()
    net.register_buffer("part", net.norm.running_var[:4])
    net.register_buffer("all", net.norm.running_var.view(2, 3))
    checkpoint.save(net, tmp_path / "m")
    stored = load_file(tmp_path / "m")
    assert torch.equal(stored["part"], net.part)
    assert torch.equal(stored["all"], net.all)
