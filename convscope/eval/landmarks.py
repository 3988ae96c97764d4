"""Landmark retrieval on revisited Oxford and Paris, from their images and ground truth."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from convscope.core.backbone import Backbone
from convscope.core.errors import UserError
from convscope.core.models import model_record
from convscope.core.results import EvalResult, Figure, bootstrap
from convscope.eval.descriptors import DescriptorCommand, describe, report, settings_record, whitening_of
from convscope.eval.pictures import PictureFiles, files_hash, find_pictures, named_pictures
from convscope.eval.revisited import LEVELS, GroundTruth, evaluate_level, read_ground_truth

TASK = "landmarks"
PROTOCOL = "revisited/1"


@dataclass(frozen=True, kw_only=True)
class LandmarksCommand(DescriptorCommand):
    """Landmark retrieval on revisited Oxford and Paris: easy, medium and hard, as the official evaluation counts."""

    images: Path
    """Folder of the benchmark's images, queries too."""
    ground_truth: Path
    """gnd_roxford5k.pkl, gnd_rparis6k.pkl (read as data, nothing in it is run), or a JSON file with the same keys."""
    distractors: Path | None = None
    """Folder of images that are added to the gallery."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of the image's sides; published figures of several scales use 1 0.7071 0.5."""
    scale_power: float = 1.0
    """Exponent of the mean over scales; published figures of GeM without whitening use that of GeM."""
    precision_at: tuple[int, ...] = (1, 5, 10)
    """k of the mean precisions mP@k."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales or not all(0 < scale <= 4 for scale in self.scales) or not self.scale_power > 0:
            raise UserError(f"--scales must lie between 0 and 4, --scale-power above 0, got {self.scales}")
        if not self.precision_at or min(self.precision_at) < 1:
            raise UserError(f"--precision-at must name numbers of at least 1, got {self.precision_at}")


def run(config: LandmarksCommand) -> None:
    """Load, describe, rank, print a table and write the result."""
    result = evaluate(config.load(), read_ground_truth(config.ground_truth), config)
    report(result, config, result.figures)


def evaluate(backbone: Backbone, truth: GroundTruth, config: LandmarksCommand) -> EvalResult:
    """Describe the gallery and the queries, cut to their boxes, and rank.

    Raises:
        UserError: an image is missing or cannot be read, or the network does not take its shape.
    """
    gallery = named_pictures(config.images, truth.gallery)
    more = [] if config.distractors is None else find_pictures(config.distractors)
    files = named_pictures(config.images, [query.name for query in truth.queries])
    pictures = PictureFiles([*gallery, *more])
    queries = PictureFiles(files, [query.box for query in truth.queries])
    x, asked = _vectors(backbone, pictures, queries, config)
    return EvalResult(
        task=TASK,
        protocol=PROTOCOL,
        model=model_record(backbone),
        data={
            "source": config.ground_truth.stem,
            "train": {"split": "gallery", "fingerprint": files_hash(pictures.files), "count": len(x)},
            "test": {"split": "queries", "fingerprint": _hash(config.ground_truth, files), "count": len(asked)},
            "distractors": len(more),
        },
        preprocessing=settings_record(backbone, config, fit="longest", scales=config.scales),
        figures=landmarks(asked, x, truth, config),
        details={
            "scale_power": config.scale_power,
            "whitening": None if config.whiten_images is None else str(config.whiten_images),
            "dimensions": x.shape[1],
            "ties": "in the gallery's order",
        },
        seed=config.seed,
    )


def landmarks(queries: Tensor, gallery: Tensor, truth: GroundTruth, config: LandmarksCommand) -> dict[str, Figure]:
    """`easy map`, `easy mp@1` and so on, with intervals over the queries that have positives.

    Args:
        queries: unit vectors (Q, D), in the order of `truth`.
        gallery: unit vectors (N, D): those of `truth`, then distractors.
        truth: the ground truth.
        config: which precisions.
    """
    similarity = queries @ gallery.T
    return {
        f"{level} {name}": bootstrap(values.numpy(), seed=config.seed)
        for level in LEVELS
        for name, values in evaluate_level(similarity, truth.queries, level, config.precision_at).items()
    }


def _vectors(
    backbone: Backbone, gallery: PictureFiles, queries: PictureFiles, config: LandmarksCommand
) -> tuple[Tensor, Tensor]:
    def described(pictures: PictureFiles, label: str) -> Tensor:
        x = describe(
            backbone,
            pictures,
            config,
            fit="longest",
            scales=config.scales,
            scale_power=config.scale_power,
            label=label,
        )
        return F.normalize(x, dim=1)

    whitening = whitening_of(config, lambda pictures: described(pictures, "images for whitening"))
    found = described(gallery, "gallery"), described(queries, "queries")
    return found if whitening is None else (whitening(found[0]), whitening(found[1]))


def _hash(ground_truth: Path, files: list[Path]) -> str:
    return hashlib.sha256(ground_truth.read_bytes() + files_hash(files).encode()).hexdigest()
