"""The protocol of revisited Oxford and Paris (Radenović et al., CVPR 2018, arXiv:1803.11285, section 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.files import read_json
from convscope.core.plain_pickle import read_plain_pickle

Level = Literal["easy", "medium", "hard"]

# Which lists of a query count as positive and which leave its ranking, for each level of difficulty.
LEVELS: Mapping[Level, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@dataclass(frozen=True)
class LandmarkQuery:
    """A query image, the box of its landmark, and which images of the gallery show it how well."""

    name: str
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    lists: Mapping[str, Sequence[int]]  # easy, hard, junk: positions in the gallery


@dataclass(frozen=True)
class GroundTruth:
    """Names of the gallery's images, without suffix, and the queries."""

    gallery: Sequence[str]
    queries: Sequence[LandmarkQuery]


def read_ground_truth(path: Path) -> GroundTruth:
    """`gnd_roxford5k.pkl` and its like, read as data alone, or a JSON file with the same keys.

    {"imlist": [name, ...], "qimlist": [name, ...], "gnd": [{"bbx": [left, top, right, bottom], "easy": [position,
    ...], "hard": [...], "junk": [...]}, ...]}

    Raises:
        UserError: it cannot be read, holds something that could run code, or lacks what the protocol needs.
    """
    content = read_json(path) if path.suffix == ".json" else read_plain_pickle(path)
    try:
        gallery, names = [_name(n) for n in content["imlist"]], [_name(n) for n in content["qimlist"]]
        if len(names) != len(content["gnd"]) or not names or not gallery:
            raise ValueError(
                f"{len(gallery)} images, {len(names)} queries and {len(content['gnd'])} answers do not fit"
            )
        return GroundTruth(gallery, [_query(n, gnd, len(gallery)) for n, gnd in zip(names, content["gnd"])])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        cause = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no ground truth of revisited Oxford or Paris: {cause}") from error


def without_junk(ranks: Tensor, junk: Tensor) -> Tensor:
    """Places (P,) in the ranking from which the images at the places `junk` (J,) are taken; both ascending."""
    return ranks - torch.searchsorted(junk, ranks)


def trapezoid_precision(ranks: Tensor, positives: int) -> float:
    """Area under precision over recall by trapezoids, as the official evaluation of landmarks and of copies does.

    AP = sum_j (j / r_j + (j + 1) / (r_j + 1)) / 2n, where the first fraction is 1 at r_j = 0. It is not the mean of
    precisions that other retrieval reports.

    Args:
        ranks: places r_j from 0, ascending, of the positives that are found.
        positives: their number n, found or not.
    """
    rank, j = ranks.double(), torch.arange(len(ranks), dtype=torch.float64, device=ranks.device)
    before = torch.where(rank == 0, 1.0, j / rank.clamp_min(1))
    return float((before + (j + 1) / (rank + 1)).sum() / (2 * positives))


def precision_at(ranks: Tensor, k: int) -> float:
    """Share of positives in the first min(k, place of the last positive) images.

    Args:
        ranks: places (P,) from 0, of every positive.
        k: how many images are looked at.
    """
    depth = min(k, int(ranks.max()) + 1)
    return float((ranks < depth).sum()) / depth


def evaluate_level(
    similarity: Tensor, queries: Sequence[LandmarkQuery], level: Level, ks: Sequence[int]
) -> dict[str, Tensor]:
    """Average precision "map" and precisions "mp@K" of each query that has positives, (Q',) float64.

    Equally similar images keep the gallery's order.

    Args:
        similarity: (Q, N).
        queries: Q of them.
        level: of difficulty.
        ks: of the precisions.

    Raises:
        UserError: no query has a positive.
    """
    positive, junk = LEVELS[level]
    rows: list[list[float]] = []
    for row, query in zip(similarity, queries):
        wanted, ignored = _members(query, positive), _members(query, junk)
        if not len(wanted):
            continue
        place = torch.empty(len(row), dtype=torch.int64)
        place[row.sort(descending=True, stable=True).indices.cpu()] = torch.arange(len(row))
        ranks = without_junk(place[wanted].sort().values, place[ignored].sort().values)
        rows.append([trapezoid_precision(ranks, len(wanted)), *(precision_at(ranks, k) for k in ks)])
    if not rows:
        raise UserError(f"no query has a positive image at level {level}")
    return dict(zip(["map", *(f"mp@{k}" for k in ks)], torch.tensor(rows, dtype=torch.float64).T))


def _members(query: LandmarkQuery, names: Sequence[str]) -> Tensor:
    return torch.tensor(sorted({i for name in names for i in query.lists[name]}), dtype=torch.int64)


def _query(name: str, gnd: Mapping[str, Any], count: int) -> LandmarkQuery:
    lists = {key: [_position(i, count) for i in gnd.get(key, [])] for key in ("easy", "hard", "junk")}
    left, top, right, bottom = (float(side) for side in gnd["bbx"])
    if not (-1e6 < left < right < 1e6 and -1e6 < top < bottom < 1e6):
        raise ValueError(f"query {name} has the box {gnd['bbx']}")
    return LandmarkQuery(name, (left, top, right, bottom), lists)


def _position(value: Any, count: int) -> int:
    if int(value) != value or not 0 <= value < count:
        raise ValueError(f"position {value} is none of the {count} images")
    return int(value)


def _name(value: Any) -> str:
    """An image's name: a path below the folder of images, no other."""
    if not isinstance(value, str) or not value or Path(value).is_absolute() or ".." in Path(value).parts:
        raise ValueError(f"{value!r} is no name of an image")
    return value
