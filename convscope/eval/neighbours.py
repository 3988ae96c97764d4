"""Exact search for the most similar images, which k-NN and retrieval share."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.eval.common import EvalSettings

SIMILARITIES = 2**27  # held at a time


@dataclass(frozen=True, kw_only=True)
class NeighbourSettings(EvalSettings):
    """How an evaluation that compares images with one another runs."""

    skip_self: bool = False
    """Leave one out: test images are the train images. Always so where both splits are the same shards."""


def neighbours(
    train_x: Tensor, test_x: Tensor, k: int, *, device: torch.device, skip_self: bool = False
) -> tuple[Tensor, Tensor]:
    """The k most similar train rows of each test row by cosine, exactly: similarity and index (Q, k), best first.

    Args:
        train_x: (N, D).
        test_x: (Q, D).
        k: at most N, and at most N - 1 with `skip_self`.
        device: faiss searches on the CPU, torch elsewhere.
        skip_self: test row i is train row i and does not count among its own neighbours.
    """
    train_x, test_x = F.normalize(train_x.float(), dim=1), F.normalize(test_x.float(), dim=1)
    if device.type == "cpu" and (searched := search_faiss(train_x, test_x, k + skip_self)) is not None:
        similarity, index = searched
    else:
        similarity, index = search_torch(train_x, test_x, k + skip_self, device)
    if not skip_self:
        return similarity, index
    drop = index == torch.arange(len(index))[:, None]
    drop[~drop.any(1), -1] = True  # among more than k copies of an image it may be missing itself
    return similarity[~drop].view(-1, k), index[~drop].view(-1, k)


def search_faiss(train_x: Tensor, test_x: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Largest inner products by exhaustive search, (Q, k) each; `None` where faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    index = faiss.IndexFlatIP(train_x.shape[1])
    index.add(train_x.numpy())
    similarity, found = index.search(test_x.numpy(), k)
    return torch.from_numpy(similarity), torch.from_numpy(found)


def search_torch(train_x: Tensor, test_x: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Largest inner products, (Q, k) each, some rows at a time on `device`."""
    train_x = train_x.to(device).T
    rows = max(1, SIMILARITIES // train_x.shape[1])
    best = [(part.to(device) @ train_x).topk(k, dim=1) for part in torch.split(test_x, rows)]
    return torch.cat([found.values.cpu() for found in best]), torch.cat([found.indices.cpu() for found in best])
