"""Reconstruction pictures while a masked objective trains."""

from contextlib import suppress

import numpy as np
import torch

from convscope.core.data.decode import DecodeError, decode
from convscope.core.data.shard_set import ShardSet
from convscope.core.data.stream import Transform, eval_batches
from convscope.core.errors import UserError
from convscope.core.training.config import Hook, LoopState, TrainData
from convscope.plots.reconstruction import draw_reconstruction
from convscope.ssl.objectives.spark import Spark

IMAGES = 8


class ReconstructionPictures(Hook):
    """Draws the same images under the same masks at intervals, as pictures/step-NNNNNNNN.png.

    Args:
        data: where the images come from; they are drawn evenly over the split.
        every: steps between two pictures.
    """

    def __init__(self, data: TrainData, every: int) -> None:
        self.every = every
        self.shards: ShardSet = data.shards
        self.transform: Transform = data.transform

    def after_step(self, state: LoopState) -> None:
        """Draw when it is time."""
        if state.step % self.every == 0 or state.step == state.total_steps:
            self.draw(state)

    def draw(self, state: LoopState) -> None:
        """Write the picture of this step."""
        objective = state.objective
        if not isinstance(objective, Spark):
            return
        original, masked, painted = reconstruct_samples(objective, self.shards, self.transform, state)
        picture = draw_reconstruction(original, masked, painted)
        picture.save(state.run.path / "pictures" / f"step-{state.step:08d}.png")


def _readable(shards: ShardSet, index: int) -> int:
    """The first sample from `index` on that can be decoded; the run counts and names the others."""
    for candidate in range(index, index + len(shards)):
        with suppress(DecodeError):
            decode(shards[candidate % len(shards)])
            return candidate % len(shards)
    raise UserError(f"no sample of {shards.source} can be decoded")


def reconstruct_samples(
    objective: Spark, shards: ShardSet, transform: Transform, state: LoopState
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Original, masked and painted images, each uint8 (N, H, W, 3), of a fixed choice of images and masks."""
    indices = [_readable(shards, int(index)) for index in np.linspace(0, len(shards) - 1, IMAGES)]
    batch = next(iter(eval_batches(shards, transform, batch_size=IMAGES, label=None, indices=indices)))
    was_training = objective.training
    objective.eval()  # BatchNorm statistics must not see these images
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = state.normalize(batch["image"].to(state.device))
        units = objective.draw_units(images.cpu())
        units = type(units)(units.indices.to(state.device), units.grid)
        painted = objective.reconstruct(images, units)
    objective.train(was_training)
    shown = units.mask.repeat_interleave(objective.mask_unit, 1).repeat_interleave(objective.mask_unit, 2)
    original = batch["image"].permute(0, 2, 3, 1).numpy()
    masked = np.where(shown.cpu().numpy()[..., None], original, 127).astype(np.uint8)
    return original, masked, state.normalize.inverse(painted).cpu().permute(0, 2, 3, 1).numpy()
