"""One table of all export formats: file size, loads or refused and why, largest logit difference.

Tiny models with random weights, and all-MiniLM-L6-v2 fine-tuned for a few steps on SST-2 (with
--data), at every width; each is exported as a user would, so that each figure is from the format's
own loader in a fresh process.

    python benchmarks/exports.py --data FOLDER
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from run_recipe import minilm_folder

import askewq
from askewq import artifact, checkpoint, export, models
from askewq.errors import AskewError, ExportError
from askewq.target import Options
from askewq.wording import size_text

BITS = ["1", "ternary", "2", "3", "4", "8"]
# What a user may add where a format refuses, by format.
SECOND_TRY = {
    "compressed-tensors": Options(dense_rest=True),
    "gguf": Options(allow_lossy=True),
}


def tokenizer(folder: Path) -> int:
    """Write a small byte-pair tokenizer; return its size."""
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([__doc__ or ""], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return made.get_vocab_size()


def llama(folder: Path) -> None:
    """Write a two-layer Llama with random weights, rows of 256 weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=tokenizer(folder),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def gpt2(folder: Path) -> None:
    """Write a two-layer GPT-2 with random weights."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=tokenizer(folder), n_embd=64, n_layer=2, n_head=4, n_positions=128
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def random_artifact(name: str, bits: str, folder: Path) -> None:
    """Write the artifact of a model with random weights, rounded to a grid."""
    torch.manual_seed(0)
    classes = tuple(f"class {i}" for i in range(10))
    if name in ("llama", "gpt2"):
        source = folder.parent / name
        {"llama": llama, "gpt2": gpt2}[name](source)
        loaded = models.load(str(source), "causal-lm", ())
    else:
        loaded = models.load(name, "image-classification", classes, pretrained=False, image_size=32)
    width = bits if bits == "ternary" else int(bits)
    include = ["*"] if name == "gpt2" else []  # its embeddings, too, of which one is the head
    askewq.quantize(loaded.model, width, include=include)  # type: ignore[arg-type]  # a width
    askewq.snap_(loaded.model)
    folder.mkdir(parents=True)
    checkpoint.save(loaded.model, folder / artifact.ARTIFACT)
    artifact.save_config(loaded, folder)


def tuned_artifact(bits: str, folder: Path, data: Path) -> None:
    """Write the artifact of all-MiniLM-L6-v2 after a few steps on SST-2."""
    command = ["-m", "askewq", "finetune", "--model", minilm_folder(), "--bits", bits]
    command += ["--task", "text-classification", "--dataset", str(data / "sst2")]
    command += ["--max-steps", "10"]
    command += ["--max-length", "64", "--max-eval-samples", "64", "--output", str(folder)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run(
        [sys.executable, *command], check=True, env=environment, capture_output=True, text=True
    )


def tried(folder: Path, to: str, output: Path) -> str:
    """Return the table's cell for one artifact and one format."""
    attempts = [Options()] + ([SECOND_TRY[to]] if to in SECOND_TRY else [])
    refusal = ""
    for options in attempts:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = export.export(folder, to, output, options)
        except ExportError as error:
            lines = str(error).split("\n- ")
            more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
            refusal = refusal or f"refused: {lines[min(1, len(lines) - 1)]}{more}"
            continue
        weights = (".safetensors", ".onnx", ".gguf", ".data")
        size = sum(n for name, n in result["files"].items() if name.endswith(weights))
        flags = "" if options == Options() else " with " + " ".join(
            f"--{key.replace('_', '-')}" for key in ("dense_rest", "allow_lossy")
            if getattr(options, key)
        )  # fmt: skip
        return f"{size_text(size)}, {result['relative_difference']:.1e}{flags}"
    return refusal


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=None, help="folder with sst2/, for MiniLM")
    names = ["test_resnet", "test_vit", "llama", "gpt2", "minilm"]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--bits", nargs="+", choices=BITS, default=BITS)
    arguments = parser.parse_args()
    formats = list(export.TARGETS)
    print(f"| model | bits | artifact | {' | '.join(formats)} |")
    print(f"|---|---|---|{'---|' * len(formats)}")
    for name in arguments.models:
        if name == "minilm" and arguments.data is None:
            print("minilm is left out: give --data", file=sys.stderr)
            continue
        for bits in arguments.bits:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) / "artifact"
                try:
                    if name == "minilm":
                        tuned_artifact(bits, folder, arguments.data)
                    else:
                        random_artifact(name, bits, folder)
                except AskewError as error:
                    reason = str(error).split(" (")[0]
                    print(f"| {name} | {bits} | {reason} |{' |' * len(formats)}", flush=True)
                    continue
                cells = [tried(folder, to, Path(place) / to) for to in formats]
                size = size_text((folder / artifact.ARTIFACT).stat().st_size)
                print(f"| {name} | {bits} | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
