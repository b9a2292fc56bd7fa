"""Tiny models and data sets, made offline once a session, and short runs on them.

Import this before any Hugging Face library: it takes the Hub out of reach and moves every cache
into a folder that disappears with the session.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import resource
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(tempfile.mkdtemp(prefix="askewq-tests-"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)

if "huggingface_hub" in sys.modules or "datasets" in sys.modules:
    raise RuntimeError("builders.py must be imported before the Hugging Face libraries.")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(ROOT / "hf"),
    "HF_DATASETS_CACHE": str(ROOT / "hf" / "datasets"),
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}

import numpy as np  # noqa: E402  # after the environment
import torch  # noqa: E402
from torch import nn  # noqa: E402

from askewq import config  # noqa: E402

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
WORDS = ["good", "bad", "film", "plot", "actor", "song", "day", "night", "very", "not"]

OWN_MODULE = '''
"""Networks as users write them."""

import random

import numpy as np
import torch
from torch import nn


def _layers(channels, classes):
    return [
        nn.Conv2d(channels, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, classes),
    ]


def small():
    return nn.Sequential(*_layers(3, 3))


def grey():
    return nn.Sequential(*_layers(1, 3))


def ten_classes():
    return nn.Sequential(*_layers(3, 10))


def only_one_layer():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


def with_dropout():
    layers = _layers(3, 3)
    return nn.Sequential(*layers[:-1], nn.Dropout(0.2), layers[-1])


class Noise(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


def features():
    return nn.Sequential(*_layers(3, 3)[:-2])


def feature_maps():
    return nn.Sequential(*_layers(3, 3)[:4])


def noisy():
    layers = _layers(3, 3)
    return nn.Sequential(*layers[:-1], Noise(), layers[-1])


class Trap(nn.Module):  # gives NaN for a batch with an all-white image in it

    def forward(self, x):
        white = (x.flatten(1) > 2).all(1).any()
        return torch.where(white, float("nan"), 1.0) * x


def trapped():
    layers = _layers(3, 3)
    return nn.Sequential(Trap(), layers[0], nn.BatchNorm2d(8), *layers[1:])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3 * 8 * 8, 12)
        self.one = nn.Linear(12, 12)
        self.two = nn.Linear(12, 12)
        self.two.weight = self.one.weight
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
        return self.head(self.two(self.one(self.stem(x).relu()).relu()).relu())


def tied():
    return Tied()


def standardised():
    from timm.layers import StdConv2d

    return nn.Sequential(StdConv2d(3, 4, 3), StdConv2d(4, 4, 3), StdConv2d(4, 3, 3))


def fails():
    raise OSError("no such luck")


def exits():
    raise SystemExit(2)


class Routed(nn.Module):  # one of two layers, chosen batch by batch
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3 * 8 * 8, 12)
        self.paths = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
        path = self.paths[int(x.mean() > 0) if self.training else 0]
        return self.head(path(self.stem(x).relu()).relu())


def routed():
    return Routed()


def expanded():
    layers = nn.Sequential(*_layers(3, 3))
    layers[2].register_buffer("gains", torch.ones(8).expand(4, 8))
    return layers


def viewed():
    layers = nn.Sequential(*_layers(3, 3))
    layers.register_buffer("all", torch.arange(10.0))
    layers.register_buffer("some", layers.all[:4])
    return layers


class Encoder(nn.Module):  # torch's own layer, with a fast path of its own in evaluation
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x).flatten(2).mT).mean(1))


def encoder():
    return Encoder()


def text():
    return "not a module"
'''


def _once(make: Callable[[Path], None]) -> Callable[[], Path]:
    """Turn a writer of a folder into a function that writes it once a session and returns it."""

    @functools.cache
    def made() -> Path:
        folder = ROOT / make.__name__
        folder.mkdir()
        make(folder)
        return folder

    return made


def pictures(count: int, seed: int = 0, size: int = 16) -> list[tuple[Any, int]]:
    """Return noisy one-coloured PIL images with their classes, 0 to 2 in turn."""
    from PIL import Image

    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        colour = np.array(list(COLOURS.values())[i % 3])
        pixels = random.normal(colour, 60, (size, size, 3)).clip(0, 255).astype(np.uint8)
        made.append((Image.fromarray(pixels), i % 3))
    return made


def write_images(
    path: Path, content: list[tuple[Any, int]], names: list[str] | None = None
) -> None:
    """Write images and labels to a parquet file with an Image and a ClassLabel column."""
    import datasets

    datasets.disable_progress_bars()
    label = datasets.ClassLabel(names=names or list(COLOURS))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    columns = {"image": [image for image, _ in content], "label": [y for _, y in content]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@_once
def image_parquet(folder: Path) -> None:
    """48 images to train on and 24 to test, as parquet."""
    write_images(folder / "train.parquet", pictures(48))
    write_images(folder / "test.parquet", pictures(24, seed=1))


@_once
def image_folder(folder: Path) -> None:
    """24 images to train on and 12 to validate, as one folder a class."""
    for split, count in (("train", 24), ("validation", 12)):
        for i, (image, label) in enumerate(pictures(count, seed=count)):
            path = folder / split / list(COLOURS)[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


@_once
def unlabelled_images(folder: Path) -> None:
    """24 images to train on and 12 to validate, of no class."""
    for split, count in (("train", 24), ("validation", 12)):
        (folder / split).mkdir(parents=True)
        for i, (image, _) in enumerate(pictures(count, seed=count)):
            image.save(folder / split / f"{i}.png")


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return sentences with their labels, pos or neg, in turn."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        label = ("pos", "neg")[i % 2]
        rest = random.choice(WORDS[2:], size=int(random.integers(2, 6)))
        made.append((" ".join(["good" if label == "pos" else "bad", *rest]), label))
    return made


@_once
def text_csv(folder: Path) -> None:
    """Sentences with labels that are words, as csv."""
    for split, count in (("train", 32), ("validation", 16)):
        rows = [f"{text},{label}" for text, label in sentences(count, seed=count)]
        (folder / f"{split}.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")


@_once
def unlabelled_csv(folder: Path) -> None:
    """Sentences without labels, beside a column of numbers, as csv."""
    for split, count in (("train", 32), ("validation", 16)):
        rows = [f"{i},{text}" for i, (text, _) in enumerate(sentences(count, seed=count))]
        (folder / f"{split}.csv").write_text("\n".join(["idx,sentence", *rows]) + "\n")


@_once
def text_pairs_json(folder: Path) -> None:
    """Pairs of sentences with labels that are numbers, as lines of json."""
    for split, count in (("train", 32), ("test", 16)):
        texts = [text for text, _ in sentences(2 * count, seed=count)]
        rows = [
            {"idx": i, "premise": texts[i], "hypothesis": texts[-1 - i], "label": i % 3}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@_once
def corpus(folder: Path) -> None:
    """Lines of text for a language model."""
    for split, count in (("train", 120), ("validation", 40)):
        lines = [text for text, _ in sentences(count, seed=count)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


@_once
def own_module(folder: Path) -> None:
    """The user's own networks, and a state dict for one of them."""
    from safetensors.torch import save_file

    (folder / "nets.py").write_text(OWN_MODULE)
    torch.manual_seed(7)
    names: dict[str, Any] = {}
    exec(OWN_MODULE, names)
    save_file(names["small"]().state_dict(), folder / "small.safetensors")


def own(factory: str) -> str:
    """Return the name of one of the user's own networks as --model takes it."""
    return f"{own_module() / 'nets.py'}:{factory}"


def own_network(factory: str) -> nn.Module:
    """Return one of the user's own networks with fresh weights."""
    names: dict[str, Any] = {}
    exec(OWN_MODULE, names)
    network: nn.Module = names[factory]()
    return network


def write_tokenizer(folder: Path, *inputs: str) -> int:
    """Write a tokenizer of whole words that gives `inputs`, too; return its vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", *inputs, "attention_mask"],
    ).save_pretrained(folder)
    return len(vocabulary)


@_once
def bert(folder: Path) -> None:
    """A random two-layer BERT with a head for two labels."""
    import transformers

    torch.manual_seed(1)
    made = transformers.BertConfig(
        vocab_size=write_tokenizer(folder, "token_type_ids"),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
        num_labels=2,
    )
    transformers.BertForSequenceClassification(made).save_pretrained(folder)


@_once
def encoder(folder: Path) -> None:
    """A random two-layer BERT without a head."""
    import transformers

    torch.manual_seed(5)
    made = transformers.BertConfig(
        vocab_size=write_tokenizer(folder, "token_type_ids"),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.5,  # so that rounding shows
    )
    transformers.BertModel(made).save_pretrained(folder)


@_once
def llama(folder: Path) -> None:
    """A random two-layer Llama whose output matrix is its embedding."""
    import transformers

    torch.manual_seed(2)
    made = transformers.LlamaConfig(
        vocab_size=write_tokenizer(folder),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    transformers.LlamaForCausalLM(made).save_pretrained(folder)


@_once
def gpt2(folder: Path) -> None:
    """A random two-layer GPT-2, all of whose matrices are transformers' Conv1D or tied."""
    import transformers

    torch.manual_seed(4)
    made = transformers.GPT2Config(
        vocab_size=write_tokenizer(folder),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    transformers.GPT2LMHeadModel(made).save_pretrained(folder)


@_once
def vit(folder: Path) -> None:
    """A random two-layer Vision Transformer with its image processor."""
    import transformers

    torch.manual_seed(3)
    made = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    transformers.ViTForImageClassification(made).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)


@_once
def vit_encoder(folder: Path) -> None:
    """The encoder of such a Vision Transformer, with a pooler, and its image processor."""
    import transformers

    torch.manual_seed(4)
    made = transformers.ViTConfig.from_pretrained(vit())
    transformers.ViTModel(made).save_pretrained(folder)
    transformers.ViTImageProcessor.from_pretrained(vit()).save_pretrained(folder)


@_once
def resnet_weights(folder: Path) -> None:
    """A state dict of timm's test_resnet, with a head that an encoder has no use for.

    The statistics of its BatchNorm layers are those of the pictures, as if it had been trained.
    """
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    network = timm.create_model("test_resnet").train()
    shown = [np.asarray(image.resize((32, 32)), dtype=np.float32) for image, _ in pictures(48)]
    with torch.no_grad():
        for _ in range(30):
            network((torch.tensor(np.stack(shown)).permute(0, 3, 1, 2) / 255 - 0.45) / 0.225)
    save_file(network.state_dict(), folder / "resnet.safetensors")


# What a short run needs, by the name of its model; every run below starts from one of these.
SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "own": lambda: {
        "model": own("small"),
        "dataset": str(image_parquet()),
        "optimizer": "sgd",
        "lr": 0.05,
    },
    "timm": lambda: {
        "model": "test_resnet",
        "pretrained": False,
        "dataset": str(image_folder()),
        "image_size": 32,
    },
    "timm-vit": lambda: {
        "model": "test_vit",
        "pretrained": False,
        "dataset": str(image_parquet()),
        "image_size": 32,
    },
    "bert": lambda: {"model": str(bert()), "dataset": str(text_csv())},
    "encoder": lambda: {
        "model": str(encoder()),
        "dataset": str(unlabelled_csv()),
        "task": "feature-extraction",
    },
    "bert-pairs": lambda: {"model": str(bert()), "dataset": str(text_pairs_json())},
    "llama": lambda: {"model": str(llama()), "dataset": str(corpus()), "max_length": 16},
    "gpt2": lambda: {  # with its embeddings, of which one is the head
        "model": str(gpt2()),
        "dataset": str(corpus()),
        "max_length": 16,
        "include": ["*"],
    },
    "vit": lambda: {"model": str(vit()), "dataset": str(image_parquet())},
    "timm-encoder": lambda: {
        "model": "test_resnet",
        "weights": str(resnet_weights() / "resnet.safetensors"),
        "dataset": str(unlabelled_images()),
        "task": "image-feature-extraction",
        "image_size": 32,
    },
    "vit-encoder": lambda: {
        "model": str(vit_encoder()),
        "dataset": str(unlabelled_images()),
        "task": "image-feature-extraction",
    },
}


def settings(kind: str, output: Path, **changes: Any) -> dict[str, Any]:
    """Return recipe keys of a short run: six steps of eight samples."""
    short = {"max_steps": 6, "batch_size": 8, "output": str(output)}
    return {**short, **SETTINGS[kind](), **changes}


def recipe(kind: str, output: Path, **changes: Any) -> config.Recipe:
    """Return the recipe of a short run."""
    return config.build(settings(kind, output, **changes))


def finetune(kind: str, output: Path, **changes: Any) -> dict[str, Any]:
    """Make a short run and return its metrics."""
    from askewq.train import finetune as run

    _freeze()
    return run(recipe(kind, output, **changes))


@functools.cache
def _freeze() -> None:
    """Take the imported libraries out of the garbage collector's sight.

    Accelerate collects garbage after every phase, which takes half a second with all of
    transformers loaded, longer than the whole run.
    """
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import timm  # noqa: F401
    import transformers  # noqa: F401

    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def benchmark(name: str) -> Iterator[ModuleType]:
    """Within the block, a script of benchmarks/ as a module; it finds the others beside it."""
    folder = Path(__file__).parent.parent / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)


@functools.cache
def finished(kind: str) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the metrics of a short run, made once a session; not to be changed."""
    output = ROOT / f"run-{kind}"
    return output, finetune(kind, output)


def copy_of(kind: str, folder: Path) -> Path:
    """Return a copy of a finished run that a test may damage."""
    target = folder / f"copy-{kind}"
    shutil.copytree(finished(kind)[0], target)
    return target


def edit_config(folder: Path, *, seal: bool = True, **changes: Any) -> None:
    """Change keys of an artifact's config.json; None removes a key.

    Args:
        seal: give it the digest of what it says now, as who changes it on purpose would.
    """
    from askewq import artifact, digest

    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    sealed = artifact._SEALED_OF[3 if content.get("askewq_version") == 3 else 2]
    if seal and "digest" not in changes and set(sealed) <= content.keys():
        content["digest"] = digest.of_config({key: content[key] for key in sealed})
    path.write_text(json.dumps(content))


def untrained(kind: str) -> Any:
    """Return a tiny LoadedModel of `PLAIN` with its first random weights."""
    from askewq import models

    name, task, labels, others = PLAIN[kind]()
    with contextlib.redirect_stderr(io.StringIO()):  # transformers draws a bar
        return models.load(name, task, labels, **others)


# Model, task, labels and other arguments of models.load; none needs a data set.
PLAIN: dict[str, Callable[[], tuple[str, Any, tuple[str, ...], dict[str, Any]]]] = {
    "own": lambda: (own("small"), "image-classification", tuple(COLOURS), {"image_size": 16}),
    "tied": lambda: (own("tied"), "image-classification", tuple(COLOURS), {}),
    "timm": lambda: (
        *("test_resnet", "image-classification", tuple(COLOURS)),
        {"pretrained": False, "image_size": 32},
    ),
    "timm-vit": lambda: (
        *("test_vit", "image-classification", tuple(COLOURS)),
        {"pretrained": False, "image_size": 32},
    ),
    "bert": lambda: (str(bert()), "text-classification", ("neg", "pos"), {}),
    "encoder": lambda: (str(encoder()), "feature-extraction", (), {}),
    "llama": lambda: (str(llama()), "causal-lm", (), {}),
    "gpt2": lambda: (str(gpt2()), "causal-lm", (), {}),
    "vit": lambda: (str(vit()), "image-classification", tuple(COLOURS), {}),
}


def packed(loaded: Any, folder: Path, quantize: Callable[[nn.Module], object]) -> Path:
    """Write an artifact without training: `quantize` makes layers of the model quantized ones."""
    import askewq
    from askewq import artifact

    quantize(loaded.model)
    askewq.snap_(loaded.model)
    artifact.save_artifact(loaded, folder)
    return folder


def put_on_grid(
    model: nn.Module, name: str, bits: Any, group_size: Any = "channel", kind: Any = "integer"
) -> None:
    """Quantize one layer, beside others on other grids."""
    from askewq.grid import channels_first, fit_scale, make_grid
    from askewq.kinds import channel_dim
    from askewq.layers import quantize_layer_

    layer, grid = model.get_submodule(name), make_grid(bits, kind)
    weight = channels_first(layer.get_parameter("weight"), channel_dim(layer))
    quantize_layer_(layer, grid, fit_scale(weight, grid, group_size))


class PowerCutError(Exception):
    """Stands for a power cut."""


@contextlib.contextmanager
def power_cut(monkeypatch: Any, at_step: int) -> Iterator[None]:
    """Within the block, a run ends with PowerCutError when it is about to make step `at_step`."""
    from askewq import loop

    original = loop.Loop._step

    def step(self: Any, model: Any, optimizer: Any, batches: Any, number: int) -> float:
        if number == at_step:
            raise PowerCutError
        return original(self, model, optimizer, batches, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", step)
        yield


@contextlib.contextmanager
def file_limit() -> Iterator[Callable[..., None]]:
    """Give a function that limits the size of files written from now on, as a quota does.

    Called without a size it takes the limit back, as the end of the block does: pytest's own
    output may be a file, too, and is written to as soon as a test's body is through.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int = soft) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    try:
        yield limit
    finally:
        limit()


def manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a packed file, read byte by byte as docs/format.md says."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    found: dict[str, Any] = json.loads(header["__metadata__"]["askewq"])
    return found


def files(folder: Path) -> set[str]:
    """Return the relative paths of all files below a folder."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def new_process() -> None:
    """Forget the precision of earlier runs, which accelerate keeps for the life of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


@dataclass(frozen=True)
class Outcome:
    """What a command left behind: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def command(*words: object) -> Outcome:
    """Run the command line in this process; an exception that it lets through is raised here."""
    from askewq import cli

    argv, sys.argv = sys.argv, ["askewq", *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    new_process()
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            # cyclopts suspects a forgotten argument where pytest calls it as a program does
            warnings.filterwarnings("ignore", message="Cyclopts application invoked without tokens")
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
        new_process()
    return Outcome(code, out.getvalue(), err.getvalue())
