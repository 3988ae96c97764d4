"""Where relevant images stand when a gallery is ranked exactly: a block of queries at a time, no ranking is kept."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convscope.core.errors import UserError

SIMILARITIES = 2**25  # held at a time, 128 MB; at least those of one query
ROWS = 2**14  # of the gallery that are converted and multiplied at a time
TINY = 1e-12  # shortest length that a vector is divided by

Relevance = Callable[[slice], Tensor]  # some queries -> which gallery images are relevant to them, bool (q, N)


@dataclass(frozen=True)
class Ranking:
    """What became of each query."""

    average_precision: Tensor  # (Q,) float64; 0 where nothing is relevant
    first: Tensor  # (Q,) int64: images before the first relevant one; the size of the gallery where none is found
    relevant: Tensor  # (Q,) int64: how many images are relevant

    def hits(self, k: int) -> Tensor:
        """Whether one of the first k is relevant, (Q,)."""
        return self.first < k


def exact_ranking(
    gallery: Tensor, queries: Tensor, relevance: Relevance, *, device: torch.device, skip_self: bool = False
) -> Ranking:
    """Rank the whole gallery for each query; arguments and errors are those of `relevant_places`."""
    precision, first, count = [], [], []
    for ranks in relevant_places(gallery, queries, relevance, device=device, skip_self=skip_self):
        precision.append(average_precision(ranks, len(ranks)) if len(ranks) else 0.0)
        first.append(int(ranks[0]) if len(ranks) else len(gallery))
        count.append(len(ranks))
    return Ranking(torch.tensor(precision, dtype=torch.float64), torch.tensor(first), torch.tensor(count))


def relevant_places(
    gallery: Tensor, queries: Tensor, relevance: Relevance, *, device: torch.device, skip_self: bool = False
) -> Iterator[Tensor]:
    """Places from 0, ascending, of the images relevant to each query, by cosine similarity.

    Of equally similar images the relevant ones come last, so that features which tell nothing apart score nothing.
    Beside the features themselves this holds SIMILARITIES numbers, whatever the sizes.

    Args:
        gallery: (N, D), any floating type, a memory map too; never copied as a whole.
        queries: (Q, D).
        relevance: asked for consecutive queries.
        device: where it is computed.
        skip_self: query i is gallery image i, which does not count.

    Raises:
        UserError: features are NaN or infinite.
    """
    scale, query_scale = inverse_lengths(gallery, device), inverse_lengths(queries, device)
    rows = max(1, SIMILARITIES // len(gallery))
    for start in range(0, len(queries), rows):
        asked = slice(start, min(start + rows, len(queries)))
        part = queries[asked].to(device, torch.float32) * query_scale[asked, None]
        similar = similarities(gallery, scale, part)
        relevant = relevance(asked).to(device)
        if skip_self:
            itself = torch.arange(asked.start, asked.stop, device=device)[:, None]
            similar.scatter_(1, itself, -torch.inf)
            relevant = relevant.scatter(1, itself, False)
        yield from map(places, similar, relevant)
        del similar, relevant  # before the next block is made


def inverse_lengths(x: Tensor, device: torch.device) -> Tensor:
    """1 / |x| of each row (N,), float32, some rows at a time.

    Raises:
        UserError: a row holds NaN or infinity.
    """
    lengths = torch.cat([part.to(device, torch.float32).norm(dim=1) for part in torch.split(x, ROWS)])
    if not bool(lengths.isfinite().all()):
        row = int(lengths.isfinite().logical_not().nonzero()[0])
        raise UserError(f"the features of image {row} hold NaN or infinity; is the model trained well?")
    return lengths.clamp_min(TINY).reciprocal()


def similarities(gallery: Tensor, scale: Tensor, queries: Tensor) -> Tensor:
    """Cosine similarities (Q, N) of unit queries (Q, D) to gallery rows (N, D) whose 1 / length is `scale` (N,)."""
    found = queries.new_empty(len(queries), len(gallery))
    for start in range(0, len(gallery), ROWS):
        part = gallery[start : start + ROWS].to(queries.device, torch.float32)
        found[:, start : start + ROWS] = queries @ part.T
    return found.mul_(scale)


def places(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Places (R,) from 0, ascending, of the relevant images; they come last among equally similar ones.

    An image's place is the number of relevant images before it plus that of irrelevant ones at least as similar. These
    are counted without sorting the gallery.

    Args:
        similarity: (N,).
        relevant: bool (N,), R of them true.
    """
    wanted = similarity[relevant].sort().values  # ascending
    count = len(wanted)

    def reach(values: Tensor) -> Tensor:
        """How many of the values are as similar as just the first n wanted ones, (R + 1,) for each n from 0."""
        return torch.bincount(torch.searchsorted(wanted, values, right=True, out_int32=True), minlength=count + 1)

    others = reach(similarity) - reach(wanted)
    before = others[1:].flip(0).cumsum(0)  # irrelevant ones that are at least as similar; best wanted one first
    return before + torch.arange(count, device=before.device)


def average_precision(ranks: Tensor, relevant: int) -> float:
    """Mean over all relevant images of the precision up to each; one that is never found counts 0.

    Args:
        ranks: places (R,) from 0, ascending, of those that are found.
        relevant: how many there are, at least R.
    """
    found = torch.arange(1, len(ranks) + 1, dtype=torch.float64, device=ranks.device)
    return float((found / (ranks + 1)).sum() / relevant)
