"""`convscope pretrain clip`: both towers, their tokenizer, and what is looked at on the way."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import tyro

from convscope.core import distributed
from convscope.core.backbone import Backbone
from convscope.core.checkpoint import latest_checkpoint
from convscope.core.data.photometric import PhotometricConfig
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.stream import Fields
from convscope.core.errors import UserError
from convscope.core.files import read_json
from convscope.core.log import info
from convscope.core.pairs.captions import CaptionSource, CaptionTokens, sample_captions
from convscope.core.pairs.model import DESCRIPTION, EXPORT, ImageText, save_image_text, write_description
from convscope.core.pairs.tokenizers import (
    ClipTokenizer,
    Tokenizer,
    folder_tokenizer,
    restore_tokenizer,
    train_tokenizer,
)
from convscope.core.training.config import Hook, TrainData
from convscope.core.training.objective import Objective
from convscope.core.training.optimization import OptimizerConfig
from convscope.ssl.objectives.clip import Clip, ClipConfig
from convscope.ssl.pair_evaluation import PairEvaluation
from convscope.ssl.pretrain import PretrainCommand, preset, run

__all__ = ["ClipCommand", "preset", "run"]


def clip_optimization() -> OptimizerConfig:
    """AdamW as open_clip sets it, with a cosine to zero."""
    return OptimizerConfig(
        optimizer="adamw",
        lr=5e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.2,
        weight_decay_end=None,
        clip=None,
        warmup_epochs=1.0,
        warmup_start=0.0,
        lr_end=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class ClipCommand(PretrainCommand):
    """Contrastive image-text training: CLIP, SigLIP, ConVIRT. --accumulate N is exact: every image meets every text."""

    name: ClassVar[str] = "clip"

    eval_every: int | None = None
    """Steps between two looks at retrieval and zero-shot accuracy on held-out pairs; default: a tenth of the run; 0:
    none."""
    eval_data: str | None = None
    """Where held-out pairs come from; default: the first of --data."""
    eval_split: str = "test"
    """Which split they are; without such a split in --data there is nothing to look at."""
    eval_pairs: int = 1000
    """How many of them, spread evenly over the split."""
    objective: tyro.conf.OmitArgPrefixes[ClipConfig] = field(default_factory=ClipConfig)
    optimization: tyro.conf.OmitArgPrefixes[OptimizerConfig] = field(default_factory=clip_optimization)

    def __post_init__(self) -> None:
        if self.eval_pairs < 2:
            raise UserError(f"--eval-pairs must be at least 2, got {self.eval_pairs}")
        if self.eval_every is not None and self.eval_every < 0:
            raise UserError(f"--eval-every must be at least 0, got {self.eval_every}")
        if self.objective.lock_image and self.init is None:
            raise UserError(
                "--lock-image keeps the image tower as it starts, which is random: name weights with --init"
            )

    def objective_config(self) -> ClipConfig:
        """The settings of the contrastive objective."""
        return self.objective

    def build(self, backbone: Backbone, shards: ShardSet) -> Clip:
        """Both towers; the tokenizer is that of the run, if it has begun."""
        return self.objective.build(backbone, self._tokenizer(shards))

    def photometric(self) -> PhotometricConfig:
        """Changes of colour and sharpness."""
        return self.objective.photometric

    def fields(self, objective: Objective, shards: ShardSet) -> Fields:
        """One caption of each sample."""
        assert isinstance(objective, ImageText)
        return CaptionTokens(objective.tokenizer, self._captions(shards), self.objective.captions)

    def prepare(self, objective: Objective) -> None:
        """Write what makes checkpoints readable, the tokenizer above all."""
        assert isinstance(objective, ImageText)
        write_description(self.output_dir, objective)

    def hooks(self, objective: Objective, data: TrainData) -> list[Hook]:
        """Retrieval and zero-shot accuracy on held-out pairs."""
        if self.eval_every == 0:
            return []
        every = self.eval_every or max(self.train.total_steps(len(data)) // 10, 1)
        try:
            shards = open_shards(self.eval_data or self.data[0], self.eval_split)
            if shards.fingerprint == data.shards.fingerprint:
                raise UserError("--eval-split is what it trains on")
            return [PairEvaluation(shards, every, self.eval_pairs, self._captions(data.shards))]
        except UserError as error:
            if self.eval_data is not None:
                raise
            info(f"note: no held-out pairs to look at while training ({error})")
            return []

    def export(self, trained: Objective) -> None:
        """Write the image tower as a backbone, and both towers as one file."""
        assert isinstance(trained, ImageText)
        super().export(trained)
        save_image_text(self.output_dir / EXPORT, trained)

    def _tokenizer(self, shards: ShardSet) -> Tokenizer:
        made = self._make_tokenizer(shards) if distributed.is_main() else None
        return restore_tokenizer(distributed.broadcast(made.describe() if made else {}))

    def _make_tokenizer(self, shards: ShardSet) -> Tokenizer:
        settings, begun = self.objective, Path(self.output_dir) / DESCRIPTION
        if begun.is_file() and latest_checkpoint(self.output_dir) is not None:
            return restore_tokenizer(read_json(begun)["tokenizer"])
        if settings.text_encoder is not None:
            return folder_tokenizer(settings.text_encoder, settings.context_length)
        if settings.tokenizer == "clip":
            return ClipTokenizer(settings.context_length)
        captions = sample_captions(shards, self._captions(shards), self.train.seed)
        return train_tokenizer(captions, settings.vocab_size, settings.context_length)

    def _captions(self, shards: ShardSet) -> CaptionSource:
        settings = self.objective
        if settings.class_captions and not shards.classes:
            raise UserError(f"{shards.source} names no classes (classes.json beside the shards) to make captions of")
        classes = tuple(shards.classes or ()) if settings.class_captions else ()
        return CaptionSource(field=settings.caption_field, lines=settings.caption_lines, classes=classes)
