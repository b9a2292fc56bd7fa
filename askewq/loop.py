"""The training loop of a phase: batches, steps, evaluation and checkpoints on the way.

Every step is a function of (seed, step): data order, augmentation and dropout are drawn anew from
them, so an interrupted run goes on exactly as it would have. After the last step of a phase a
checkpoint is written, so that between the phases nothing that was trained can be lost.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from askewq import (
    anneal,
    distill,
    divergence,
    layers,
    processes,
    refine,
    report,
    sharding,
    signals,
    snapshots,
    terminal,
    training_state,
)
from askewq.batches import prepare_batch
from askewq.config import Recipe
from askewq.errors import DivergenceError, ModelError, RecipeError
from askewq.evaluate import Evaluation, evaluate
from askewq.spec import LoadedModel
from askewq.streams import StreamLoader
from askewq.tasks import aligned, calling, logits_of, outputs_of, score
from askewq.training_state import Progress

# By which the signs and the first scales of rounded inputs are decided, in every process.
CALIBRATION_SAMPLES = 512

_SMALLER = (
    "Where memory is short, a smaller --batch-size with --grad-accumulation helps; batch norm may "
    "need a larger one than 1."
)


class Loop:
    """What the phases of a run share.

    Attributes:
        progress: how far the run has come; a checkpoint holds it.
        step_seconds: what each step of this process took.
        taught_by: the teacher of the steps to come, if there is one.
        hollow: the model as it was before its weights were spread over the processes, if they are.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Any,
        loaded: LoadedModel,
        train_loader: Any,
        eval_loader: Any,
    ) -> None:
        self.recipe = recipe
        self.out = recipe.output
        self.accelerator = accelerator
        self.loaded = loaded
        self.train_loader = train_loader
        self.eval_loader = eval_loader
        self.progress = Progress()
        self.step_seconds: list[float] = []
        self.taught_by: distill.Teacher | None = None
        self.hollow: nn.Module | None = None
        self._own_forward: Any = None

    @property
    def model(self) -> nn.Module:
        """The network; another object after a phase whose weights were sharded."""
        return self.loaded.model

    def run(
        self,
        phase: str,
        optimizer: torch.optim.Optimizer,
        first: int,
        end: int,
        folder: Path | None,
        before_step: Callable[[float], dict[str, float]],
    ) -> None:
        """Train from step `first` (or the checkpoint in `folder`) to step `end`.

        Raises:
            DivergenceError: a loss, a gradient or weights that are not finite, beyond what the
                recipe tolerates.
            signals.Stop: a signal came; a checkpoint holds every step made.
        """
        recipe, progress, steps = self.recipe, self.progress, end - first
        full_lrs = [group["lr"] for group in optimizer.param_groups]
        if folder is not None:
            training_state.load_weights(folder, self.model)
        model, prepared = self._prepare(optimizer)
        if folder is not None:
            self._restore(folder, optimizer)
            before_step((progress.step - first) / steps)
        saved = progress.step if folder is not None else None
        progress.phase = phase
        save_every = recipe.save_every or max(1, steps // 10)
        batches = self._batches(progress.step * recipe.grad_accumulation)
        process, main = self.accelerator.process_index, self.accelerator.is_main_process
        try:
            with report.progress_bar(phase, progress.step - first, steps, main) as bar:
                while progress.step < end:
                    began = time.perf_counter()
                    factor = anneal.lr_factor((progress.step - first) / steps, recipe.lr_hold)
                    for group, full_lr in zip(optimizer.param_groups, full_lrs, strict=True):
                        group["lr"] = full_lr * factor
                    # The interval at the end of this step, so that the last one closes everything.
                    shown = before_step((progress.step + 1 - first) / steps)
                    micro = [next(batches) for _ in range(recipe.grad_accumulation)]
                    # After the batches are drawn: a loader that starts anew draws numbers itself.
                    torch.manual_seed(_mix(recipe.seed, progress.step, process))
                    loss = self._step(model, prepared, micro, progress.step)
                    progress.step += 1
                    elapsed = time.perf_counter() - began
                    progress.seconds += elapsed
                    self.step_seconds.append(elapsed)
                    shown = {"loss": loss, "lr": optimizer.param_groups[-1]["lr"], **shown}
                    report.advance(bar, shown)
                    if recipe.report_to != "none":
                        self.accelerator.log(shown, step=progress.step)
                    self._evaluate_on_the_way(phase, end)
                    if progress.step % save_every == 0 or progress.step == end:
                        self._save(optimizer)
                        saved = progress.step
                    processes.check_signals(self.accelerator)
        except ModelError as error:
            # What signals a whole job ends torch's compilers, too. The step was begun: the newest
            # checkpoint is to go on from, and one is made at the end of every phase.
            number = signals.received()
            if number and self.accelerator.num_processes == 1:
                raise signals.Stop(number) from error
            raise
        except signals.Stop:
            if saved != progress.step:
                self._save(optimizer)
            raise
        self._release()

    def _prepare(self, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Return model and optimizer as Accelerate distributes them."""
        if processes.is_sharded(self.accelerator):
            self.hollow = sharding.hollow(self.model)
        self._own_forward = self.model.__dict__.get("forward")
        try:
            model, prepared = self.accelerator.prepare(self.model, optimizer)
        except (ValueError, TypeError) as error:
            if self.hollow is None:
                raise
            raise RecipeError(
                f"FSDP2 cannot wrap this network as the launcher's config says: {error}\nName the "
                "class of its repeated block, with fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP "
                "and fsdp_transformer_layer_cls_to_wrap, or use fsdp_auto_wrap_policy: NO_WRAP."
            ) from error
        return model, prepared

    def _restore(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Take up what a checkpoint holds beside the weights: the optimizer, a stream's place."""
        process = self.accelerator.process_index
        training_state.load_optimizer(folder, optimizer, process)
        if isinstance(self.train_loader, StreamLoader):
            with training_state.fitting(folder):
                place = (folder / training_state.STREAM.format(process)).read_bytes()
                self.train_loader.load(place)

    def _release(self) -> None:
        """Take off what `_prepare` put on the model, so that the next phase can prepare it."""
        if self.hollow is not None:
            sharded = layers.quantized_modules(self.model)
            self.loaded.model = sharding.fill(self.hollow, self.model, self.accelerator.device)
            for weight, annealed in zip(layers.quantized_modules(self.model), sharded, strict=True):
                weight.strength = annealed.strength
            self.hollow = None
        else:
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                self.model.__dict__.pop(name, None)
            if self._own_forward is not None:  # a module's own, set on it and not on its class
                self.model.__dict__["forward"] = self._own_forward
        self.accelerator.free_memory()

    def _step(
        self, model: nn.Module, optimizer: Any, micro: list[dict[str, Tensor]], step: int
    ) -> float:
        """Make one optimizer step out of some batches, or pass it over; return their mean loss."""
        losses: list[float] = []
        suspect: dict[str, Tensor] = {}
        tolerant = divergence.tolerated(self.recipe.nan_policy) > 0
        # A forward pass that goes wrong has already changed BatchNorm's statistics.
        before = {n: b.clone() for n, b in self.model.named_buffers()} if tolerant else {}
        model.train()
        for raw in micro:
            with self.accelerator.accumulate(model):
                batch = prepare_batch(raw, self.loaded.preprocessing, self.recipe.augment)
                with calling(batch, "the model fails in training", _SMALLER):
                    loss = self._loss(model, batch)
                    self.accelerator.backward(loss)
                losses.append(float(loss.detach()))
                if not suspect or not math.isfinite(losses[-1]):
                    suspect = batch
        total = sum(losses) / len(losses)
        fine = math.isfinite(total) and divergence.gradients_finite(self.model)
        if processes.anyone(self.accelerator, int(not fine)):
            self._tolerate(total, suspect, step)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])
        else:
            optimizer.step()
        optimizer.zero_grad()
        return total

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        spec = self.loaded.spec
        hidden = self.taught_by is not None and self.recipe.distill_hidden > 0
        prepared = layers.prepared(self.model) if self.recipe.compile else nullcontext()
        taught = None
        if self.taught_by is not None:
            with self.accelerator.autocast():
                taught = distill.taught(self.taught_by, batch, hidden_states=hidden)
            batch = distill.labelled(batch, spec, taught)
        with self.accelerator.autocast(), prepared:
            made = outputs_of(model, spec, batch, hidden_states=hidden)
        scores = score(*aligned(made.logits, spec, batch))
        loss = scores.loss.sum() / scores.count.sum()
        if taught is None:
            return loss
        return distill.total(loss, made, taught, spec, batch, self.recipe)

    def _tolerate(self, loss: float, batch: dict[str, Tensor], step: int) -> None:
        """Count a step whose update is passed over.

        Raises:
            DivergenceError: one more than the recipe tolerates, or weights that are broken already.
        """
        where = divergence.trace(
            self.model, batch, lambda: self._loss(self.model, batch), self._told
        )
        self._reshard()
        what = self._told("" if math.isfinite(loss) else f"the loss is {loss} at step {step}")
        what = what or f"a gradient is NaN or infinite at step {step} (the loss is {loss:g})"
        most = divergence.tolerated(self.recipe.nan_policy)
        broken = self._weights_broken()
        if broken or self.progress.skipped >= most:
            self._diverged(f"{what}: {where}", broken)
        self.progress.skipped += 1
        if self.accelerator.is_main_process:
            terminal.note(f"{what}: {where}; skipped, {self.progress.skipped} of {most}")

    def smaller_rates(self) -> str:
        """Return what to try in the place of the present phase's learning rates, in words."""
        told = [
            f"--{key.replace('_', '-')} than {rate:g}"
            for key in training_state.RATES[self.progress.phase]
            if (rate := getattr(self.recipe, key)) is not None
        ]
        return f"a smaller {' or '.join(told)}"

    def _diverged(self, what: str, broken: bool) -> None:
        """Say what can be done: with another lr another run, in this one to pass over the step."""
        others = " or --mixed-precision no" if self.recipe.mixed_precision != "no" else ""
        last, used = snapshots.newest(self.out), self.progress.skipped
        if not broken:
            others += "; --nan-policy skip:N passes over N such steps"
            others += f", --resume goes on from {last} with it" if last else ""
        raise DivergenceError(
            f"{what}{f'; {used} steps were skipped before' if used else ''}. Start again with "
            f"{self.smaller_rates()}{others}."
        )

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        if self._weights_broken():
            where = divergence.trace(self.model, {}, lambda: None, self._told)
            step = self.progress.step
            self._diverged(f"the weights are not finite after step {step}: {where}", True)
        model, main = self.model, self.accelerator.is_main_process
        if self.hollow is not None:
            model = sharding.fill(self.hollow, model, "cpu", keep=main)
        if self.step_seconds:
            self.progress.step_seconds = statistics.median(self.step_seconds)
        own = {}
        if isinstance(self.train_loader, StreamLoader):
            name = training_state.STREAM.format(self.accelerator.process_index)
            own[name] = self.train_loader.state()
        keep = self.recipe.keep
        snapshots.save(self.accelerator, self.out, model, optimizer, self.progress, keep, own)

    def _weights_broken(self) -> bool:
        broken = not divergence.weights_finite(self.model)
        return processes.anyone(self.accelerator, int(broken)) > 0

    def _told(self, text: str) -> str:
        return processes.first_text(self.accelerator, text)

    def _reshard(self) -> None:
        """After forward passes without a backward pass, before weights are touched."""
        if self.hollow is not None:
            sharding.reshard_(self.model)

    def _batches(self, consumed: int) -> Iterator[dict[str, Tensor]]:
        """Yield training batches without end, from the place after `consumed` ones."""
        from accelerate.utils import send_to_device

        if isinstance(self.train_loader, StreamLoader):
            for batch in self.train_loader.batches():
                yield send_to_device(batch, self.accelerator.device)
        epoch, skip = divmod(consumed, len(self.train_loader))
        while True:
            self.train_loader.set_epoch(epoch)
            loader = self.train_loader
            yield from self.accelerator.skip_first_batches(loader, skip) if skip else loader
            epoch, skip = epoch + 1, 0

    def _evaluate_on_the_way(self, phase: str, end: int) -> None:
        step, every = self.progress.step, self.recipe.eval_every
        if not every or step % every or step == end:
            return
        with layers.snapped(self.model):
            result = self.evaluate()
        if self.accelerator.is_main_process:
            report.print_evaluation(phase, step, result)
        if self.recipe.report_to != "none":
            self.accelerator.log({result.metric: result.value}, step=step)

    def calibrate(self) -> None:
        """Show the network training samples, the first of the first epoch, without augmentation."""
        loader = self.train_loader
        place = loader.state() if isinstance(loader, StreamLoader) else None
        count = -(-CALIBRATION_SAMPLES // self.recipe.batch_size)
        if place is None:
            count = min(count, len(loader))
        with torch.no_grad(), self.accelerator.autocast():
            for raw in itertools.islice(self._batches(0), count):
                batch = prepare_batch(raw, self.loaded.preprocessing)
                with calling(batch, "the model fails in calibration"):
                    logits_of(self.model, self.loaded.spec, batch)
        if place is not None:
            loader.load(place)

    def recalibrate(self, count: int) -> None:
        """Give batch norm new statistics, of the batches that would come next."""
        progress, accumulation = self.progress, self.recipe.grad_accumulation
        raw = self._batches(progress.step * accumulation)

        def batches() -> Iterator[dict[str, Tensor]]:
            for i in range(count):
                batch = next(raw)
                process = self.accelerator.process_index
                torch.manual_seed(_mix(self.recipe.seed, progress.step + i, process))
                yield prepare_batch(batch, self.loaded.preprocessing, self.recipe.augment)

        def forward(batch: dict[str, Tensor]) -> None:
            with calling(batch, "the model fails in training mode"), self.accelerator.autocast():
                logits_of(self.model, self.loaded.spec, batch)

        refine.recalibrate_(self.model, batches(), forward, self.accelerator)

    def evaluate(self, *also: nn.Module) -> Evaluation:
        """Evaluate the model; `also` names models that must equal it to the bit."""
        processes.share_buffers(self.accelerator, self.model)
        try:
            return evaluate(
                [self.model, *also],
                self.loaded.spec,
                self.loaded.preprocessing,
                self.eval_loader,
                self.accelerator,
                self.taught_by,
            )
        finally:
            self._reshard()


def _mix(*numbers: int) -> int:
    """Return one seed for a tuple of numbers, without the overlaps of their sum."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed
