"""What competes in contest.py: its tasks, the forms of AskewSGD, and one run with its command."""

import json
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from run_recipe import RESNET20, minilm_folder

from askewq.methods import RIVALS

FULL = "full precision"
INTEGER = "askewsgd, integer"
START = "start"  # the network, new to its task, from which all methods start
PARQ = "parq"  # torchao's, through its own package: pip install torchao
# Forms of AskewSGD beside its default: the flags that make them.
FORMS = {
    "askewsgd": ("--method", "askewsgd"),
    "askewsgd, staggered": ("--method", "askewsgd", "--closing", "staggered"),
    "askewsgd-paper": ("--method", "askewsgd-paper"),
    # Its pull is lr times alpha, which the loop's cosine takes away as the intervals close.
    "askewsgd-paper, held": ("--method", "askewsgd-paper", "--lr-hold", "0.999"),
    # With the steps of the task's own base optimizer, where its default are those in levels.
    "askewsgd, sgd": ("--method", "askewsgd", "--optimizer", "sgd"),
    # On the integer grid, where the contest has the half-integer one.
    INTEGER: ("--method", "askewsgd", "--grid", "integer"),
    # Intervals that close within a thousandth of the steps: straight-through, with the steps of
    # askewsgd; where these are those of the base optimizer it is binaryconnect.
    "askewsgd, closed at once": ("--method", "askewsgd", "--close-end", "0.001"),
    # The rivals next to it on askewsgd's base optimizer, where the task's own is another.
    "binaryconnect, adamw": ("--method", "binaryconnect", "--optimizer", "adamw"),
    "binaryrelax, adamw": ("--method", "binaryrelax", "--optimizer", "adamw"),
}
# What would be another entry once more where the steps of askewsgd are those of the task.
BESIDE_LEVELS = (
    "askewsgd, sgd",
    "askewsgd, closed at once",
    "binaryconnect, adamw",
    "binaryrelax, adamw",
)
ASSEMBLING = threading.Lock()
WIDTHS = ("1", "ternary", "2", "4")
HALF_INTEGER = ("2", "4")  # where the contest has that grid
METHODS = [FULL, *FORMS, *RIVALS, PARQ]

PARQ_SCRIPT = str(Path(__file__).parent / "parq.py")
LEVEL_LRS = (0.005, 0.01, 0.02)
ADAMW_LRS = (7e-4, 1.4e-3, 2.8e-3)  # LEVEL_LRS in the weights' own units: a spacing is about 0.14
MEASURED = ("accuracy", "relaxed", "step_seconds", "peak_memory_bytes")
WEIGHTS = "checkpoints/teacher.safetensors"  # what a run in full precision leaves
NINE_TENTHS = ("--train-split", "train[:90%]", "--eval-split", "train[90%:]")
EIGHT_TENTHS = ("--train-split", "train[:80%]", "--eval-split", "train[80%:90%]")


@dataclass(frozen=True)
class Task:
    """What all runs of a task share; `lrs` are the trials of the methods and of full precision.

    `tried` and `judged` are the data of a trial and of a run that counts: no trial is judged on
    what a run that counts is judged on. `optimizer` is that of the other methods, and of full
    precision, where askewq chooses. At `level_bits` the trials of AskewSGD's lazy form are
    `LEVEL_LRS`, its default there.
    """

    folder: str
    optimizer: str
    tried: tuple[str, ...]
    judged: tuple[str, ...]
    flags: tuple[str, ...]
    lrs: tuple[float, ...]
    full_lrs: tuple[float, ...]
    start_steps: int
    level_bits: tuple[str, ...]


TASKS = {
    "resnet20": Task(
        "cifar10",
        "sgd",
        NINE_TENTHS,
        ("--train-split", "train", "--eval-split", "test"),
        ("--augment", "crop-flip", "--batch-size", "128", "--compile"),
        (0.01, 0.02, 0.05),
        (0.005, 0.01, 0.02),
        0,
        WIDTHS,
    ),
    "minilm": Task(
        "sst2",
        "adamw",
        (*NINE_TENTHS, "--max-eval-samples", "2000"),
        (*EIGHT_TENTHS, "--max-eval-samples", "4000"),
        ("--batch-size", "16", "--max-length", "64"),
        (5e-5, 1e-4, 3e-4),
        (3e-5, 5e-5, 1e-4),
        300,
        (),
    ),
}


@dataclass(frozen=True)
class Run:
    """One run of the contest: a trial, which helps to choose the rate, or one that counts."""

    task: str
    bits: str
    steps: int
    method: str
    lr: float
    seed: int
    trial: bool
    distill: float

    @property
    def full(self) -> bool:
        """Whether the run is one in full precision, which leaves its weights."""
        return self.method in (FULL, START)

    @property
    def on_adamw(self) -> bool:
        """Whether a rival runs on AdamW that runs on the task's optimizer as well."""
        return self.method.endswith(", adamw")

    @property
    def in_levels(self) -> bool:
        """Whether `lr` is that of the quantized weights in level spacings."""
        lazy = self.method in ("askewsgd", INTEGER, "askewsgd, closed at once")
        return lazy and self.bits in TASKS[self.task].level_bits

    def folder(self, output: Path) -> Path:
        """Return the folder of the run."""
        kind = "trial" if self.trial else f"seed-{self.seed}"
        width = "any" if self.full else f"{self.bits}-bit"
        taught = f"-distill-{self.distill:g}" if self.distill else ""
        place = (
            output
            / self.task
            / f"{width}-{self.steps}{taught}"
            / self.method.replace(", ", "-").replace(" ", "-")
        )
        return place / f"{kind}-lr-{self.lr:g}"

    def start(self) -> "Run | None":
        """Return the run whose network this one starts from, where the task needs one."""
        task = TASKS[self.task]
        if not task.start_steps or self.method == START:
            return None
        return Run(self.task, "", task.start_steps, START, 1e-4, 0, self.trial, 0.0)

    def command(
        self, data: Path, output: Path, teacher: Path | None, mixed_precision: str = "bf16"
    ) -> list[str]:
        """Return the command of the run."""
        task, start = TASKS[self.task], self.start()
        flags = ["--dataset", str(data / task.folder), *task.flags, "--seed", str(self.seed)]
        if self.task == "resnet20":
            weights = data / "resnet20-cifar10" / "model.safetensors"
            flags += ["--model", RESNET20, "--weights", str(weights)]
        else:
            model = minilm_folder() if start is None else str(assembled(start.folder(output)))
            flags += ["--model", model, "--task", "text-classification"]
        flags += task.tried if self.trial else task.judged
        flags += ["--mixed-precision", mixed_precision, "--output", str(self.folder(output))]
        flags += ["--save-every", "1000000"]
        if self.full:  # its figure, and the weights that it leaves, are of the first phase
            flags += ["--full-precision-steps", str(self.steps), "--full-precision-lr"]
            flags += [str(self.lr), "--max-steps", "1", "--distill", "0.5"]
            flags += ["--optimizer", task.optimizer]
        else:
            flags += ["--level-lr" if self.in_levels else "--lr", str(self.lr)]
            flags += ["--bits", self.bits, "--max-steps", str(self.steps)]
            parq = self.method == PARQ
            form = ("--optimizer", task.optimizer) if parq else ("--method", self.method)
            flags += FORMS.get(self.method, form)
            if self.bits in HALF_INTEGER and "--grid" not in flags:
                flags += ["--grid", "half-integer"]
        if teacher is not None:
            flags += ["--distill", str(self.distill), "--teacher-weights", str(teacher)]
        askewq = [PARQ_SCRIPT] if self.method == PARQ else ["-m", "askewq"]
        return [sys.executable, *askewq, "finetune", *flags]

    def measured(self, output: Path) -> dict[str, float]:
        """Return accuracy, relaxed accuracy and cost of the finished run."""
        metrics = json.loads((self.folder(output) / "metrics.json").read_text())
        if self.method == PARQ and metrics["inside_interval"] < 1:
            sys.exit(f"{self.folder(output)}: not all weights are on a level of PARQ's")
        own = "full_precision" if self.full else "relaxed" if self.method == PARQ else None
        metrics["accuracy"] = metrics[own or "snapped"]
        metrics["relaxed"] = metrics[own or "relaxed"]
        return {key: metrics[key] for key in MEASURED}


def assembled(folder: Path) -> Path:
    """Return the start of a text task as a Hugging Face folder, made of a finished run."""
    place = folder / "huggingface"
    with ASSEMBLING:
        if not place.is_dir():
            partial = folder / "partial"
            shutil.copytree(minilm_folder(), partial, dirs_exist_ok=True)
            config = json.loads((partial / "config.json").read_text())
            config |= {"architectures": ["BertForSequenceClassification"]}
            config |= {"id2label": {"0": "negative", "1": "positive"}}
            config |= {"label2id": {"negative": 0, "positive": 1}}
            (partial / "config.json").write_text(json.dumps(config))
            shutil.copy(folder / WEIGHTS, partial / "model.safetensors")
            partial.replace(place)
    return place
