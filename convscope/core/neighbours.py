"""Exact search for the most similar images, which every evaluation by neighbours shares."""

import torch
from torch import Tensor
from torch.nn import functional as F

SIMILARITIES = 2**27  # held at a time
NUMBERS = 2**26  # of features that are normalised at a time, 256 MB


def neighbours(
    train_x: Tensor, test_x: Tensor, k: int, *, device: torch.device, skip_self: bool = False
) -> tuple[Tensor, Tensor]:
    """The k most similar train rows of each test row by cosine, exactly: similarity and index (Q, k), best first.

    Both may be memory maps or of lower precision: some rows at a time are made unit vectors of float32.

    Args:
        train_x: (N, D).
        test_x: (Q, D).
        k: at most N, and at most N - 1 with `skip_self`.
        device: faiss searches on the CPU, which is fastest there (benchmarks/knn.md), torch elsewhere.
        skip_self: test row i is train row i and does not count among its own neighbours.
    """
    rows = max(1, NUMBERS // train_x.shape[1])
    found = [_nearest(train_x, part, k + skip_self, rows, device) for part in torch.split(test_x, rows)]
    similarity, index = (torch.cat(parts) for parts in zip(*found))
    if not skip_self:
        return similarity, index
    drop = index == torch.arange(len(index))[:, None]
    drop[~drop.any(1), -1] = True  # among more than k copies of an image it may be missing itself
    return similarity[~drop].view(-1, k), index[~drop].view(-1, k)


def _nearest(train_x: Tensor, test_x: Tensor, k: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`neighbours` of a block of test rows: those in each block of train rows, and of these the best."""
    test_x = F.normalize(test_x.float(), dim=1)
    similarity = torch.empty(len(test_x), 0)
    index = torch.empty(len(test_x), 0, dtype=torch.int64)
    for start in range(0, len(train_x), rows):
        part = F.normalize(train_x[start : start + rows].float(), dim=1)
        near = search_faiss(part, test_x, min(k, len(part))) if device.type == "cpu" else None
        near = near or search_torch(part, test_x, min(k, len(part)), device)
        similarity, index = torch.cat([similarity, near[0]], 1), torch.cat([index, near[1] + start], 1)
        if start:  # of one block alone they are in order
            similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
            index = index.gather(1, best)
    return similarity, index


def search_faiss(train_x: Tensor, test_x: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Largest inner products by exhaustive search, (Q, k) each; `None` where faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    similarity, found = faiss.knn(test_x.numpy(), train_x.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(similarity), torch.from_numpy(found)


def search_torch(train_x: Tensor, test_x: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Largest inner products, (Q, k) each, some rows at a time on `device`."""
    train_x = train_x.to(device).T
    rows = max(1, SIMILARITIES // train_x.shape[1])
    best = [(part.to(device) @ train_x).topk(k, dim=1) for part in torch.split(test_x, rows)]
    return torch.cat([found.values.cpu() for found in best]), torch.cat([found.indices.cpu() for found in best])
