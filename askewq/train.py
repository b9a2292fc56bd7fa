"""`finetune(recipe)`: from a pretrained model to a packed, verified artifact, on Accelerate.

One way down: load, evaluate, plan, train with the skewed step, snap once, polish, evaluate, pack,
reload and compare to the bit. Killed at any moment, a run goes on from its newest checkpoint to
the same bytes; a signal is obeyed at the next safe point.
"""

import copy
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from askewq import (
    activations,
    artifact,
    card,
    checkpoint,
    choices,
    contradictions,
    described,
    digest,
    disk,
    distill,
    layers,
    models,
    output,
    polish,
    processes,
    refine,
    report,
    signals,
    snapshots,
    terminal,
    training_state,
    wrap,
)
from askewq.batches import loaders, prepare_batch
from askewq.config import Recipe
from askewq.data import OpenData, open_data
from askewq.errors import DivergenceError, RecipeError, StoppedError
from askewq.evaluate import Evaluation
from askewq.kernels import can_compile
from askewq.loop import Loop
from askewq.preprocessing import TextPreprocessing
from askewq.rivals import check_gradients
from askewq.spec import LoadedModel
from askewq.streams import StreamLoader
from askewq.tasks import calling, check_causal, check_length, check_logits, logits_of
from askewq.training_state import FULL_PRECISION, LOW_BIT, POLISH
from askewq.vocabulary import IMAGE_TASKS, ActBits

# Progress at which the scales of rounded inputs stay, unless the intervals are closed before.
INPUTS_FOLLOW_UNTIL = 0.9

_SIZES = (
    "--image-size sets the size of images, and the number of values of --mean and --std the "
    "channels (1 or 3)."
)


def finetune(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe; see the command `askewq finetune`.

    Returns:
        The content of metrics.json.

    Raises:
        AskewError: any bad input, before anything is written; a loss that diverges; a full disk.
        StoppedError: SIGTERM or Ctrl-C; what was trained is in a checkpoint.
    """
    return _Run(recipe).execute()


class _Run:
    """One fine-tuning run: its parts, made once, and the order in which they are used."""

    def __init__(self, recipe: Recipe) -> None:
        from accelerate.utils import set_seed

        recipe = output.resumed(recipe) if recipe.resume else recipe
        output.check(recipe)
        self.out = recipe.output
        self.accelerator = processes.accelerator_of(recipe)
        if processes.is_sharded(self.accelerator) and (wrong := contradictions.unshardable(recipe)):
            raise RecipeError(f"{'; '.join(wrong)}. Leave that out, or use DDP.")
        if recipe.compile and not can_compile(self.accelerator.device.type):
            raise RecipeError(
                "compile: torch.compile does not work here, see the warning; leave it out."
            )
        # Heads that are new to the task and own modules draw their first weights from this seed.
        set_seed(recipe.seed)
        with self.accelerator.main_process_first():  # the others find the data set prepared
            self.loaded, self.data = load(recipe)
        described.check(self.loaded)
        count = self.accelerator.num_processes
        train: Any
        train, evaluation = loaders(recipe, self.data, self.loaded.preprocessing, count)
        self.batch_size = recipe.batch_size if train is None else train.batch_size
        train, self.eval_loader = self.accelerator.prepare(train, evaluation)
        if recipe.streaming:
            train = StreamLoader(
                recipe,
                self.data,
                self.loaded.preprocessing,
                self.accelerator.process_index,
                count,
            )
        self.steps = recipe.max_steps or _steps_of(recipe, len(train))
        self.recipe = choices.resolve(recipe, self.loaded.spec.task, self.loaded.model, self.steps)
        self.loaded.model.to(self.accelerator.device)
        self.teacher = (
            distill.load_teacher(self.recipe, self.loaded, self.data.columns.inputs)
            if self.recipe.taught
            else None
        )
        if self.teacher is not None:
            self.teacher.model.to(self.accelerator.device)
        self.plan = choices.plan_of(recipe, self.model, self.loaded.spec.task)
        if recipe.gradient_bits is not None:
            names = [name for layer in self.plan.quantized for name in layer.names]
            check_gradients(map(self.model.get_submodule, names))
        self.loop = Loop(self.recipe, self.accelerator, self.loaded, train, self.eval_loader)

    @property
    def model(self) -> nn.Module:
        """The network; another object after a phase whose weights were sharded."""
        return self.loaded.model

    def execute(self) -> dict[str, Any]:
        """Run from the start, or from the newest checkpoint, to the report."""
        self._try_one_batch()
        with output.held(self.recipe) if self.accelerator.is_main_process else nullcontext():
            return self._execute()

    def _execute(self) -> dict[str, Any]:
        made_of = self._made_of()
        folder = self._checkpoint(made_of) if self.recipe.resume else None
        self.loop.progress.made_of = made_of
        self._prepare_output()
        if self.accelerator.is_main_process:
            device = self.accelerator.device
            notes = [*self.data.notes, *self.loaded.notes, *self.loaded.doubts]
            notes += self.teacher.doubts if self.teacher else ()
            notes += choices.notes_of(self.recipe, device)
            report.print_start(notes, self.plan, self.recipe, self.steps, self.batch_size)
        phase = self.loop.progress.phase
        at = {FULL_PRECISION: None, LOW_BIT: None, POLISH: None, phase: folder}
        with signals.listening():
            try:
                self._train_full_precision(at[FULL_PRECISION])
                self._find_teacher(resumed=phase in (LOW_BIT, POLISH))
                self._quantize()
                if phase != POLISH:
                    self._train_low_bit(at[LOW_BIT])
                layers.snap_(self.model)
                self._polish(at[POLISH])
                return self._finish()
            except signals.Stop as stop:
                raise self._stopped(stop) from stop

    def _made_of(self) -> dict[str, Any]:
        """Return what the files behind the recipe decide, which it does not say itself."""
        teacher = self.teacher and self.teacher.model.state_dict()
        return {
            "steps": self.steps,
            "training samples": None if self.recipe.streaming else len(self.data.train),
            "evaluation samples": len(self.data.eval),
            "SHA-256 of the teacher": teacher and digest.of_weights("", teacher),
        }

    def _checkpoint(self, made_of: dict[str, Any]) -> Path | None:
        """Return the checkpoint to go on from, None to start anew; damaged ones are set aside.

        Raises:
            OutputError: a checkpoint of another run, or one whose data or teacher have changed.
        """
        folder, damaged = snapshots.newest_whole(self.out)
        if folder is not None:
            self.loop.progress = training_state.read_progress(
                folder, self.accelerator.num_processes, made_of
            )
        self.accelerator.wait_for_everyone()  # all have looked before one renames
        if self.accelerator.is_main_process:
            for broken, reason in damaged:
                snapshots.set_aside(broken)
                terminal.note(f"the checkpoint {broken} is damaged ({reason}) and was set aside")
            terminal.note(
                f"going on from {folder}"
                if folder
                else f"{self.out} holds no checkpoint to go on from: the run starts anew"
            )
        return folder

    def _stopped(self, stop: signals.Stop) -> StoppedError:
        step, last = self.loop.progress.step, snapshots.newest(self.out)
        saved = f"saved in {last}" if last else "nothing was trained yet"
        return StoppedError(
            f"stopped by {stop} after step {step}, {saved}. To go on:\n"
            f"{snapshots.resume_command(self.out)}",
            stop.number,
        )

    def _try_one_batch(self) -> None:
        """Find out what does not fit (labels, shapes, inputs) before anything is written."""
        spec = self.loaded.spec
        batch = prepare_batch(next(iter(self.eval_loader)), self.loaded.preprocessing)
        self.model.eval()
        several = self.accelerator.num_processes > 1
        advice = _SIZES if spec.task in IMAGE_TASKS else ""
        with calling(batch, "the model fails", advice), torch.set_grad_enabled(several):
            logits = logits_of(self.model, spec, batch)
        check_logits(logits, spec)
        check_causal(self.model, spec, batch, logits)
        texts = self.loaded.preprocessing
        length = None
        if isinstance(texts, TextPreprocessing):
            length = self.recipe.max_length or texts.max_length
            check_length(self.model, spec, batch, length)
        if several and logits.requires_grad:
            logits.sum().backward()
            processes.expect(self.accelerator, self.model, always=spec.source == "module")
        distill.check(self.recipe, self.loaded, self.teacher, batch, logits)
        if self.teacher is not None and length is not None:
            check_length(self.teacher.model, self.teacher.spec, batch, length, "teacher")

    def _prepare_output(self) -> None:
        self.accelerator.wait_for_everyone()  # all have looked at the folder before one writes
        if self.accelerator.is_main_process:
            output.prepare(self.recipe)
        self.accelerator.wait_for_everyone()
        if self.recipe.report_to != "none":
            settings = {key: str(value) for key, value in self.recipe.model_dump().items()}
            self.accelerator.init_trackers("askewq", settings)

    def _train_full_precision(self, folder: Path | None) -> None:
        """Fine-tune ordinarily for the first steps, if the recipe asks for it."""
        recipe, count = self.recipe, self.recipe.full_precision_steps
        if count and self.loop.progress.phase not in (LOW_BIT, POLISH):
            lr = recipe.full_precision_lr or 0.0
            optimizer = choices.plain_optimizer(recipe, self.model, lr)
            self.loop.run(FULL_PRECISION, optimizer, 0, count, folder, lambda _: {})

    def _find_teacher(self, *, resumed: bool) -> None:
        """Let the teacher that was given, or the network as it is by now, teach from here on."""
        if self.recipe.taught:
            self.loop.taught_by = self.teacher or self._own_teacher(resumed=resumed)

    def _quantize(self) -> None:
        """Evaluate, wrap the model, and evaluate plain rounding."""
        recipe = self.recipe
        if self.loop.progress.full_precision is None:
            start = self.loop.evaluate()
            if not math.isfinite(start.loss):
                raise DivergenceError(
                    f"in full precision, before any low-bit step, the loss on the evaluation split "
                    f"is {start.loss}; look at the model's weights, and at that split for samples "
                    "of which the network makes no numbers."
                )
            self.loop.progress.full_precision = start.value
        # Of a run that goes on from there, weights and scales are in the checkpoint.
        trained = self.loop.progress.phase in (LOW_BIT, POLISH)
        wrap.apply(self.model, self.plan, fit=not trained)
        if recipe.act_bits != "none":
            self._round_inputs(recipe.act_bits)
        if self.loop.progress.rounded is None:
            with layers.snapped(self.model):
                self.loop.progress.rounded = self.loop.evaluate().value

    def _train_low_bit(self, folder: Path | None) -> None:
        """Fine-tune under the constraint, and evaluate."""
        recipe, start = self.recipe, self.recipe.full_precision_steps
        optimizer, pacer = choices.low_bit_optimizer(recipe, self.model, self.steps)
        average = None
        if recipe.average:
            average = refine.FloatAverage(self.model, optimizer, recipe.average)
        inside = pacer.feasible_share()
        counted_at = 0.0
        follow_until = min(recipe.close_end or INPUTS_FOLLOW_UNTIL, INPUTS_FOLLOW_UNTIL)

        def before_step(progress: float) -> dict[str, float]:
            nonlocal inside, counted_at
            pacer.anneal(progress)
            activations.follow_inputs_(self.model, progress < follow_until)
            if progress - counted_at > 0.02:  # counting reads every weight: fifty times a run
                inside, counted_at = pacer.feasible_share(), progress
            return {**pacer.shown(progress), "inside": inside}

        self.loop.run(LOW_BIT, optimizer, start, start + self.steps, folder, before_step)
        if average is not None:
            average.use_()
        self.loop.progress.inside = pacer.feasible_share()
        relaxed = self.loop.evaluate()
        if not math.isfinite(relaxed.loss):
            raise DivergenceError(
                f"the loss is {relaxed.loss} after the last step; nothing was packed. Try "
                f"{self.loop.smaller_rates()}."
            )
        self.loop.progress.relaxed = relaxed.value

    def _polish(self, folder: Path | None) -> None:
        """Train scales, biases and norms on, if the recipe asks for it."""
        recipe, count = self.recipe, self.recipe.polish_steps
        if not count:
            return
        start = recipe.full_precision_steps + self.steps
        polisher = polish.Polisher(self.model, recipe.polish_lr)
        activations.follow_inputs_(self.model, False)
        self.loop.run(POLISH, polisher.optimizer, start, start + count, folder, lambda _: {})
        polisher.finish_()

    def _round_inputs(self, act_bits: ActBits) -> None:
        """Let the layers round their inputs; what the calibration decided is never asked again."""
        progress = self.loop.progress
        if progress.inputs is not None:  # the scales are in the checkpoint
            activations.attach_(self.model, act_bits, progress.inputs)
            return
        progress.inputs = activations.round_inputs(
            self.model, act_bits, self.loop.calibrate, reduce=self.accelerator.reduce
        )
        if self.accelerator.is_main_process:
            report.print_inputs(self.plan, progress.inputs, act_bits)

    def _own_teacher(self, *, resumed: bool) -> distill.Teacher:
        """Return the network as it is before it is quantized; a resumed run reads it back."""
        path = self.out / snapshots.CHECKPOINTS / snapshots.TEACHER
        if not resumed:
            if self.accelerator.is_main_process:
                size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
                advice = f"Make room, then go on with: {snapshots.resume_command(self.out)}"
                with disk.room_for(size, self.out, advice):
                    training_state.save_network(self.model, path)
            self.accelerator.wait_for_everyone()
            self.loop.progress.teacher = disk.sha256_of(path)
        teacher = copy.deepcopy(self.model)
        training_state.load_network(teacher, path, self.loop.progress.teacher)
        return distill.Teacher(teacher, self.loaded.spec)

    def _finish(self) -> dict[str, Any]:
        """Evaluate, pack, reload, compare, report."""
        if self.recipe.recalibrate_bn:
            self.loop.recalibrate(self.recipe.recalibrate_bn)
        snapped = self.loop.evaluate().value
        path = self.out / artifact.ARTIFACT
        if self.accelerator.is_main_process:
            advice = f"Training is done and saved; {snapshots.resume_command(self.out)} packs it."
            with disk.room_for(self.plan.predicted_bytes, self.out, advice):
                checkpoint.save(self.model, path)
                artifact.save_config(self.loaded, self.out)
        self.accelerator.wait_for_everyone()
        content = checkpoint.read(path)
        reloaded = artifact.plain_network(self.loaded.spec, self.out, content)
        checkpoint.load_into(reloaded, content)
        same = self.loop.evaluate(reloaded.to(self.accelerator.device))
        metrics = self._metrics(snapped, same, reloaded)
        if self.accelerator.is_main_process:
            page = card.model_card(metrics, self.recipe, self.loaded)
            with disk.room_for(len(page) + 4096, self.out, advice):
                disk.write(self.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
                disk.write(self.out / "README.md", page)
            report.print_result(metrics, self.out)
        if self.recipe.report_to != "none":
            self.accelerator.end_training()
        return metrics

    def _metrics(self, snapped: float, same: Evaluation, reloaded: nn.Module) -> dict[str, Any]:
        """Return what metrics.json holds; docs/format.md says what each is."""
        return {
            "model": self.recipe.model,
            "task": self.recipe.task,
            "bits": self.recipe.bits,
            "bits_override": list(self.recipe.bits_override),
            "act_bits": self.recipe.act_bits,
            "method": self.recipe.method,
            "metric": same.metric,
            "full_precision": self.loop.progress.full_precision,
            "rounded": self.loop.progress.rounded,
            "relaxed": self.loop.progress.relaxed,
            "snapped": snapped,
            "reloaded": same.value,
            "parameters": {
                "total": self.plan.total_parameters,
                "quantized": self.plan.quantized_parameters,
                "share": self.plan.quantized_parameters / self.plan.total_parameters,
            },
            "bytes": {
                "full_precision": 4 * self.plan.total_parameters + _buffer_bytes(reloaded),
                "packed": (self.out / artifact.ARTIFACT).stat().st_size,
            },
            "bits_per_weight": self.plan.bits_per_weight,
            "inside_interval": self.loop.progress.inside,
            "steps": self.loop.progress.step,
            "polish_steps": self.recipe.polish_steps,
            "skipped_steps": self.loop.progress.skipped,
            "seconds": self.loop.progress.seconds,
            "step_seconds": self.loop.progress.step_seconds,
            "peak_memory_bytes": report.peak_memory(),
        }


def _steps_of(recipe: Recipe, batches: int) -> int:
    """Return the steps of a recipe's epochs, of so many batches each."""
    passes = recipe.epochs * batches / recipe.grad_accumulation
    return max(1, math.ceil(round(passes, 6)))  # 0.28 * 25 is a little more than 7


def load(recipe: Recipe) -> tuple[LoadedModel, OpenData]:
    """Return the model and the data of a recipe."""
    source = models.find_source(recipe.model)
    trust = recipe.trust_remote_code
    task = recipe.task or models.guess_task(recipe.model, source, trust_remote_code=trust)
    data = open_data(recipe, task)
    loaded = models.load(
        recipe.model,
        task,
        data.labels,
        source=source,
        pretrained=recipe.pretrained,
        weights=recipe.weights,
        tokenizer=recipe.tokenizer,
        trust_remote_code=trust,
        image_size=recipe.image_size,
        mean=recipe.mean,
        std=recipe.std,
        max_length=recipe.max_length,
    )
    return loaded, replace(data, labels=loaded.spec.labels)


def _buffer_bytes(model: nn.Module) -> int:
    others = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    others |= checkpoint.input_scales(model)
    return sum(t.nbytes for name, t in model.state_dict().items() if name not in others)
