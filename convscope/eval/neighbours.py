"""What k-NN and retrieval have in common."""

from dataclasses import dataclass

from convscope.eval.common import EvalSettings


@dataclass(frozen=True, kw_only=True)
class NeighbourSettings(EvalSettings):
    """How an evaluation that compares images with one another runs."""

    skip_self: bool = False
    """Leave one out: test images are the train images. Always so where both splits are the same shards."""
