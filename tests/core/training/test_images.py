"""What an objective gets to see: changed and normalised images, the same whoever computes them."""

from pathlib import Path

import pytest
import torch

from convscope.core.backbone import create_backbone
from convscope.core.checkpoint import RunDirectory
from convscope.core.data.photometric import PhotometricConfig, augment
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.stream import train_batches
from convscope.core.data.transforms import Normalize, crop_flip
from convscope.core.training.config import TrainConfig, TrainData
from convscope.core.training.loop import train
from convscope.core.training.objective import Batch, Objective, StepOutput
from convscope.core.training.optimization import OptimizerConfig
from tests.core.data.tars import write_split

NORMALIZE = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Collector(Objective):
    """Keeps the images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_backbone("resnet18", {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)}, seed=0)
        self.seen: list[torch.Tensor] = []

    def forward(self, batch: Batch) -> StepOutput:
        self.seen.append(batch["image"].clone())
        return StepOutput(next(self.backbone.parameters()).square().mean())


def seen(shards: ShardSet, output: Path, views: int, photometric: PhotometricConfig, **settings: int) -> torch.Tensor:
    """All images of two steps of eight."""
    objective = Collector()
    transform = crop_flip(16, views=views)
    data = TrainData(shards=shards, transform=transform, normalize=NORMALIZE, photometric=photometric)
    config = TrainConfig(steps=2, batch_size=8, workers=0, device="cpu", seed=5, **settings)
    with RunDirectory(output, main=True) as run:
        train(objective, data, config, OptimizerConfig(), run)
    return torch.cat(objective.seen)


@pytest.mark.parametrize("colours", ["fast", "exact"])
@pytest.mark.parametrize("views", [1, 2])
def test_images_and_views(tmp_path: Path, views: int, colours: str) -> None:
    shards = open_shards(str(write_split(tmp_path / "train", [12])), "train")
    config = PhotometricConfig(solarize=0.2, colours=colours)
    whole = seen(shards, tmp_path / "whole", views, config)
    assert whole.shape == ((16, 3, 16, 16) if views == 1 else (16, 2, 3, 16, 16))
    assert torch.equal(seen(shards, tmp_path / "parts", views, config, accumulate=2), whole)

    batch = next(
        train_batches(shards, crop_flip(16, views=views), batch_size=16, seed=5, stop=16, exact=False, workers=1)
    )
    expected = augment(batch["image"].flatten(0, -4), config, 5, torch.arange(16))
    torch.testing.assert_close(whole.flatten(0, -4), NORMALIZE(expected), atol=1e-5, rtol=0)
