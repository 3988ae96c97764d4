"""A run that writes down which samples each step saw: python -m tests.core.training.recorder OUTPUT WORKERS DATA...

Of two data sets, the first has three times the weight of the other.
"""

import json
import sys
from pathlib import Path

import torch

from convscope.core import distributed
from convscope.core.backbone import Backbone, create_backbone
from convscope.core.checkpoint import RunDirectory, latest_checkpoint, load_checkpoint
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.transforms import Normalize, crop_flip
from convscope.core.training.config import TrainConfig, TrainData
from convscope.core.training.loop import train
from convscope.core.training.objective import Batch, Objective, StepOutput
from convscope.core.training.optimization import OptimizerConfig


class Recorder(Objective):
    """Lets the mean feature grow small."""

    def __init__(self, backbone: Backbone, file: Path, step: int) -> None:
        super().__init__()
        self.backbone, self.file = backbone, file
        self.step = self.begin = step

    def forward(self, batch: Batch) -> StepOutput:
        self.step += 1
        place = {"step": self.step, "rank": distributed.rank(), "begin": self.begin}
        with open(self.file, "a") as file:
            file.write(json.dumps({**place, "index": batch["index"].tolist()}) + "\n")
        features = self.backbone.feature_maps(batch["image"], [self.backbone.stages[-1].name])
        return StepOutput(torch.stack([one.square().mean() for one in features.values()]).sum())


WEIGHTS = (3.0, 1.0)


def main(output: Path, workers: int, sources: list[str]) -> None:
    """One run, or the rest of one."""
    torch.set_num_threads(1)
    newest = latest_checkpoint(output)
    step = load_checkpoint(newest)["step"] if newest else 0
    backbone = create_backbone("resnet18", {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)}, seed=0)
    config = TrainConfig(steps=60, batch_size=8, workers=workers, checkpoint_every=4, log_every=1, device="cpu")
    with distributed.process_group(torch.device("cpu")):
        objective = Recorder(backbone, output.with_suffix(".seen"), step)
        normalize = Normalize((0.5,) * 3, (0.5,) * 3)
        shards = ShardSet.joined([open_shards(source, "train") for source in sources])
        weights = WEIGHTS if len(sources) > 1 else None
        samples = TrainData(shards=shards, transform=crop_flip(32), normalize=normalize, weights=weights)
        with RunDirectory(output, main=distributed.is_main()) as run:
            train(objective, samples, config, OptimizerConfig(), run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
