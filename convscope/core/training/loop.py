"""The training loop: the only one. An objective maps a batch to a loss; everything else happens here.

Every draw of an objective is seeded by (seed, step, rank) and every draw that changes an image by (seed, position), so
a checkpoint's step fixes the rest of the run: resuming repeats what an uninterrupted run would have done.
"""

import contextlib
import math
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from convscope.core import distributed
from convscope.core.backbone import Backbone
from convscope.core.checkpoint import RunDirectory, load_checkpoint
from convscope.core.data.order import Mixed
from convscope.core.data.photometric import augment
from convscope.core.data.skipped import Skipped, TooManySkippedError, check_skipped
from convscope.core.data.stream import order_of, train_batches
from convscope.core.errors import UserError
from convscope.core.log import info, progress
from convscope.core.memory import keep_freed_memory
from convscope.core.results import environment
from convscope.core.training.config import PRECISIONS, Hook, LoopState, TrainConfig, TrainData
from convscope.core.training.objective import Objective
from convscope.core.training.optimization import (
    LR_REFERENCE_BATCH,
    OptimizerConfig,
    Schedule,
    build_optimizer,
    count_parameters,
    peak_lr,
)
from convscope.core.training.stop import Agreement, leave, stop_signal
from convscope.core.training.window import Window


def train(
    objective: Objective,
    data: TrainData,
    config: TrainConfig,
    optimization: OptimizerConfig,
    run: RunDirectory,
    hooks: Sequence[Hook] = (),
) -> Objective:
    """Train `objective` to the end of its budget, continuing from the run's newest checkpoint if it has one.

    Returns:
        The trained objective, or its moving average where one is kept.

    Raises:
        UserError: the loss is not finite, the data rots, the checkpoint is of another run, the disk is full.
        SystemExit: a signal asked to stop; everything is saved.
    """
    device = distributed.pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    with distributed.process_group(device):
        return _Trainer(objective, data, config, optimization, run, hooks, device).run_to_end()


class _Trainer:
    def __init__(
        self,
        objective: Objective,
        data: TrainData,
        config: TrainConfig,
        optimization: OptimizerConfig,
        run: RunDirectory,
        hooks: Sequence[Hook],
        device: torch.device,
    ) -> None:
        self.data, self.config, self.run, self.hooks, self.device = data, config, run, hooks, device
        self.total_steps = config.total_steps(len(data))
        self.micro_batch = _micro_batch(config)
        self.rounds = config.accumulate
        if config.accumulate > 1 and objective.takes_whole_batch(config.accumulate):
            self.micro_batch, self.rounds = self.micro_batch * config.accumulate, 1
        if config.grad_checkpointing:
            _checkpoint_activations(objective.backbone)
        objective.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        distributed.sync_batchnorm(objective, device)
        self.objective = objective
        self.normalize = data.normalize.to(device)
        self.ema = ModelEmaV3(objective, decay=config.ema_decay) if config.ema_decay else None
        self.optimizer = build_optimizer(objective, optimization, config.batch_size)
        warmup_steps = _warmup_steps(optimization, config, len(data))
        self.schedule = Schedule(
            self.optimizer,
            optimization,
            steps=self.total_steps,
            warmup_steps=warmup_steps,
            milestones=[round(epoch * len(data) / config.batch_size) for epoch in optimization.milestones],
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.clip = optimization.clip
        self.window = Window(device)
        self.order = order_of(data.shards, config.seed, weights=data.weights, indices=data.indices)
        self.run.start_attempt()  # before anything is read that an earlier attempt, still alive, could change
        self.step = self._resume()
        wrapped = distributed.wrap(objective, device)
        self.model: nn.Module = torch.compile(wrapped) if config.compile else wrapped  # type: ignore[assignment]
        self._announce(optimization)

    def run_to_end(self) -> Objective:
        try:
            trained = self._run()
        except TooManySkippedError as error:
            self._report_skipped(error.skipped)
            raise UserError(f"{error}; {self._skipped_note()}") from error
        if distributed.is_main() and (note := self._skipped_note()):
            info(f"note: {note}")
        return trained

    def _run(self) -> Objective:
        start = self.step * self.config.batch_size
        batches = self._batches(start)
        state = LoopState(self.objective, self.run, self.step, self.total_steps, self.device, self.normalize)
        clock, seen = time.perf_counter(), 0
        main = distributed.is_main()
        hooks = self.hooks if main else ()
        for hook in hooks:
            hook.start(state)
        with stop_signal() as stop, progress("training", self.total_steps - self.step, enabled=main) as ticker:
            agreement = Agreement(stop, self.device, self.step, self.config.log_every)
            while self.step < self.total_steps:
                self.schedule.set(self.step)
                self._seed()
                for micro in range(self.rounds):
                    self._accumulate(next(batches), last=micro == self.rounds - 1)
                self._update()
                self.step, seen = self.step + 1, seen + self.config.batch_size
                done = self.step == self.total_steps
                state.step, state.logged = self.step, {}
                if self.step % self.config.log_every == 0 or done:
                    state.logged = self._log(seen / (time.perf_counter() - clock))
                    clock, seen = time.perf_counter(), 0
                for hook in hooks:
                    hook.after_step(state)
                ticker.advance(note=self.window.note)
                stopping = agreement.reached(self.step)
                if done or stopping or self.step % self._checkpoint_every() == 0:
                    self._save()
                if stopping and not done:
                    leave(stop, self.step, self.run.path)
        for hook in hooks:
            hook.finish(state)
        batches.close()
        return self.objective if self.ema is None else self.ema.module

    def _batches(self, start: int) -> Generator[Mapping[str, Any], None, None]:
        batches: Generator[Mapping[str, Any], None, None] = train_batches(
            self.data.shards,
            self.data.transform,
            batch_size=self.micro_batch,
            seed=self.config.seed,
            start=start,
            stop=self.total_steps * self.config.batch_size,
            workers=self.config.workers,
            rank=distributed.rank(),
            world=distributed.world(),
            label=self.data.label,
            fields=self.data.fields,
            indices=self.data.indices,
            weights=self.data.weights,
            max_skipped=self.config.max_skipped,
            exact=self.config.decoding == "exact",
            pin_memory=self.device.type == "cuda",
        )
        return batches

    def _seed(self) -> None:
        entropy = np.random.SeedSequence((self.config.seed, self.step, distributed.rank()))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def _accumulate(self, batch: Mapping[str, Any], *, last: bool) -> None:
        inputs = {
            key: value.to(self.device, non_blocking=True) for key, value in batch.items() if isinstance(value, Tensor)
        }
        inputs["image"] = self._pixels(inputs["image"], batch["position"])
        self._report_skipped(batch.get("skipped", ()))
        dtype = PRECISIONS[self.config.precision]
        unsynced = contextlib.nullcontext() if last or distributed.world() == 1 else self.model.no_sync()  # type: ignore[operator]
        with unsynced:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                output = self.model(inputs)
            self.scaler.scale(output.loss / self.rounds).backward()
        self.window.add(output.loss, output.metrics)

    def _pixels(self, images: Tensor, positions: Tensor) -> Tensor:
        """Images (B, 3, H, W) as the network takes them; views of an image (B, views, 3, H, W) are images as well."""
        pixels = images.flatten(0, -4)
        if self.data.photometric is not None:
            pixels = augment(pixels, self.data.photometric, self.config.seed, positions)
        pixels = self.normalize(pixels).contiguous(memory_format=torch.channels_last)
        shaped: Tensor = pixels.unflatten(0, images.shape[:-3])
        return shaped

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.objective.after_update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.objective, step=self.step)

    def _log(self, rate: float) -> dict[str, float]:
        means = self._finite_means()
        samples = self.step * self.config.batch_size
        line = {"step": self.step, "samples": samples, "epoch": round(samples / len(self.data), 6)} | means
        line |= self.schedule.values()
        skipped = int(distributed.sum_over_ranks(self.window.skipped))
        line |= {"samples_per_second": round(rate, 2), "skipped": skipped}
        line |= self._dealt(samples)
        self.window.clear()
        if distributed.is_main():
            self.run.append_metrics({**line, "attempt": self.run.attempt})
        check_skipped(
            skipped, samples, self.config.max_skipped, self.data.shards.source
        )  # of all processes and attempts
        return line

    def _dealt(self, samples: int) -> dict[str, int]:
        """How many samples each source of a mixture has given so far."""
        if not isinstance(self.order, Mixed):
            return {}
        return {f"seen/{part.source}": n for part, n in zip(self.data.shards.parts, self.order.dealt(samples))}

    def _finite_means(self) -> dict[str, float]:
        means = distributed.mean_over_ranks(self.window.means())
        if not math.isfinite(means.get("loss", 0.0)):
            raise self._diverged(f"the loss is {means['loss']}")
        return means

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"{what} at step {self.step}; no checkpoint was written since it was finite. "
            f"The newest one is {self.run.latest() or 'none'}: try a lower --lr or --precision fp32"
        )

    def _report_skipped(self, skipped: Sequence[Skipped]) -> None:
        self.window.skipped += len(skipped)
        for one in skipped:
            info(f"warning: skipped sample {one.key} of {one.shard}: {one.cause}")
            self.run.append_skipped({"step": self.step + 1, **one._asdict()})

    def _skipped_note(self) -> str:
        """How many samples were skipped for which cause, in all processes and attempts; "" for none."""
        causes = self.run.skipped_by_cause()
        counts = ", ".join(f"{count} x {cause}" for cause, count in causes.most_common())
        return f"{causes.total()} samples were skipped ({counts}); skipped.jsonl names them" if causes else ""

    def _checkpoint_every(self) -> int:
        epoch = len(self.data) // self.config.batch_size
        return self.config.checkpoint_every or min(max(epoch, 50), 2000)

    def _save(self) -> None:
        self._finite_means()
        if not all(bool(p.isfinite().all()) for p in self.objective.parameters()):  # the loss will be, a step later
            raise self._diverged("a weight is infinite or NaN")
        windows = distributed.gather(self.window.state())
        if distributed.is_main():
            state = {
                "step": self.step,
                "samples": self.step * self.config.batch_size,
                "data": self.data.shards.fingerprint,
                "model": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema is not None else None,
                "windows": windows,  # one for each process
            }
            self.run.save(self.step, state, keep=self.config.keep_checkpoints)
        distributed.barrier()

    def _resume(self) -> int:
        """Restore the newest checkpoint; returns the number of finished steps."""
        path = distributed.broadcast(self.run.latest() if distributed.is_main() else None)
        if path is None:
            self.run.rewind(0)
            return 0
        state = load_checkpoint(path)
        if state.get("data") != self.data.shards.fingerprint:
            raise UserError(
                f"{path} was trained on other data than {self.data.shards.source}; use another --output-dir"
            )
        try:
            self.objective.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.window.load(state["windows"], distributed.rank(), distributed.world())
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{path} does not fit this run: {str(error).splitlines()[0]}") from error
        self.run.rewind(state["step"])
        return int(state["step"])

    def _announce(self, optimization: OptimizerConfig) -> None:
        if not distributed.is_main():
            return
        record = {"step": self.step, "total_steps": self.total_steps, "world": distributed.world()}
        self.run.describe_attempt({**record, **environment()})
        peak = peak_lr(optimization, self.config.batch_size)
        info(
            f"{count_parameters(self.objective) / 1e6:.2f} M parameters on {self.device} x {distributed.world()}; "
            f"{len(self.data)} images, {self.total_steps} steps of {self.config.batch_size}; "
            f"lr {optimization.lr:g} per {LR_REFERENCE_BATCH} samples = {peak:g}"
        )
        if self.step:
            info(f"continuing at step {self.step} of {self.total_steps}")


def _checkpoint_activations(backbone: Backbone) -> None:
    try:
        backbone.model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:  # timm's ways to refuse
        raise UserError(f"{backbone.arch} has no gradient checkpointing; leave --grad-checkpointing out") from error


def _warmup_steps(optimization: OptimizerConfig, config: TrainConfig, images: int) -> int:
    """Steps of the warm-up; one that would take the whole run is cut to a tenth of it, which is said."""
    steps, total = round(optimization.warmup_epochs * images / config.batch_size), config.total_steps(images)
    if optimization.warmup_steps is not None:
        steps = optimization.warmup_steps
    if steps < total or total == 1:
        return steps
    if distributed.is_main():
        asked = f"{steps} steps" if optimization.warmup_steps is not None else f"{optimization.warmup_epochs:g} epochs"
        info(f"note: a warm-up of {asked} does not fit: shortened to {total // 10} steps")
    return total // 10


def _micro_batch(config: TrainConfig) -> int:
    parts = distributed.world() * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size} must be divisible by processes x --accumulate "
            f"({distributed.world()} x {config.accumulate})"
        )
    return config.batch_size // parts
