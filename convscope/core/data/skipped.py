"""Samples that training has to do without, and how many are too many."""

from collections.abc import Sequence
from typing import NamedTuple

from convscope.core.errors import UserError

TOLERANCE = 5.0  # standard deviations by which the count of skipped samples may exceed its share: they come at random


class Skipped(NamedTuple):
    """A sample that gave way to the next position's, why, and in which shard it is."""

    key: str
    cause: str
    shard: str


class TooManySkippedError(UserError):
    """Data that rot; `skipped` are those of the batch that was one too many, which nobody gets to see."""

    def __init__(self, message: str, skipped: Sequence[Skipped]) -> None:
        super().__init__(message)
        self.skipped = list(skipped)


def check_skipped(skipped: int, seen: int, limit: float, source: str, last: Sequence[Skipped] = ()) -> None:
    """Stop where data rot.

    Args:
        skipped: samples that could not be decoded.
        seen: among how many.
        limit: the share allowed; the count may exceed it by five standard deviations, for they come at random.
        source: where they come from.
        last: those not told before, of which the last is named.

    Raises:
        TooManySkippedError: too many.
    """
    allowed = limit * seen
    if skipped > allowed + TOLERANCE * max(allowed, float(limit > 0)) ** 0.5:
        name = f"; the last was {last[-1].key} ({last[-1].cause}) in {last[-1].shard}" if last else ""
        raise TooManySkippedError(
            f"{skipped} of {seen} samples of {source} could not be decoded, more than the allowed share "
            f"{limit:g}{name}; see shards check, or raise --max-skipped",
            last,
        )
