"""How well images and texts find one another, with ties counted as what a random order would give on average."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 512  # queries compared with everything at a time


@dataclass(frozen=True)
class Ranks:
    """Where the best answer to each query stands, (Q,) int64 each."""

    ahead: Tensor  # wrong answers that are nearer
    tied: Tensor  # wrong answers that are exactly as near
    tied_right: Tensor  # right answers that are exactly as near as the best one, itself included

    def expected(self) -> Tensor:
        """Rank of the first right answer, from 1 on: the mean over all orders of those that are equally near, (Q,)."""
        return self.ahead + 1 + self.tied / (self.tied_right + 1)

    def hits(self, k: int) -> Tensor:
        """The chance that one of the first `k` is right, over all orders of those that are equally near, (Q,)."""
        taken = (k - self.ahead).clamp(min=0)  # of those that tie, this many are among the first k
        total = self.tied + self.tied_right
        missed = _log_choose(self.tied, taken) - _log_choose(total, torch.minimum(taken, total))
        return torch.where(taken > self.tied, 1.0, 1 - missed.exp())


def rank(similarity: Tensor, right: Tensor) -> Ranks:
    """Ranks of the best right answer.

    Args:
        similarity: (Q, N), larger is nearer.
        right: (Q, N) bool, at least one in each row.
    """
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    equal = similarity == best
    return Ranks((similarity > best).sum(1), (equal & ~right).sum(1), (equal & right).sum(1))


def rank_pairs(images: Tensor, texts: Tensor, text: Tensor, image: Tensor) -> tuple[Ranks, Ranks]:
    """Images that look for their captions (several may be right), and captions that look for their image.

    Args:
        images: unit vectors (N, D).
        texts: unit vectors of different texts (U, D).
        text: (M,) which text each caption is.
        image: (M,) which image each caption belongs to.

    Returns:
        Ranks of N images, and of M captions.
    """
    to_text, to_image = [], []
    everything = torch.arange(len(images))
    for mine in torch.split(everything, BLOCK):
        similarity = (images[mine] @ texts.T)[:, text]
        to_text.append(rank(similarity, image[None] == mine[:, None]))
    for mine in torch.split(torch.arange(len(text)), BLOCK):
        to_image.append(rank(texts[text[mine]] @ images.T, everything[None] == image[mine][:, None]))
    return _join(to_text), _join(to_image)


def _join(parts: Sequence[Ranks]) -> Ranks:
    return Ranks(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ahead", "tied", "tied_right")))


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    n, k = n.double(), k.double()
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)
