"""Places of relevant images against a sort of the whole gallery."""

import pytest
import torch
from torch.nn import functional as F

from convscope.eval import ranking
from convscope.eval.ranking import average_precision, exact_ranking, places

CPU = torch.device("cpu")


def slow_places(similarity: list[float], relevant: list[bool]) -> list[int]:
    """Sort by falling similarity, irrelevant first among equals."""
    order = sorted(range(len(similarity)), key=lambda i: (-similarity[i], relevant[i]))
    return [place for place, i in enumerate(order) if relevant[i]]


@pytest.mark.parametrize("levels", [3, 10, 10_000])  # few levels: nearly all are ties
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_places(levels: int, share: float) -> None:
    generator = torch.Generator().manual_seed(levels)
    for _ in range(5):
        similarity = torch.randint(0, levels, (60,), generator=generator) / levels
        relevant = torch.rand(60, generator=generator) < share
        assert places(similarity, relevant).tolist() == slow_places(similarity.tolist(), relevant.tolist())


def test_features_that_tell_nothing_apart_score_the_floor() -> None:
    gallery, labels = torch.ones(10, 4), torch.arange(10) % 5
    found = exact_ranking(gallery, torch.ones(5, 4), lambda asked: labels[asked, None] == labels, device=CPU)
    assert found.first.tolist() == [8] * 5
    assert found.average_precision.tolist() == pytest.approx([(1 / 9 + 2 / 10) / 2] * 5)


def test_average_precision_by_hand() -> None:
    assert average_precision(torch.tensor([0, 2]), 2) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(torch.tensor([2]), 1) == pytest.approx(1 / 3)
    assert average_precision(torch.tensor([0, 2]), 4) == pytest.approx((1 + 2 / 3) / 4)  # two are never found


@pytest.mark.parametrize("skip_self", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_against_one_whole_ranking(monkeypatch: pytest.MonkeyPatch, skip_self: bool, dtype: torch.dtype) -> None:
    """Three queries and seven gallery rows at a time; rows of very different length, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    gallery = (torch.randn(40, 6, generator=generator) * torch.logspace(-2, 2, 40)[:, None]).to(dtype)
    gallery[11] = 0
    queries = gallery if skip_self else torch.randn(10, 6, generator=generator).to(dtype)
    labels = torch.randint(0, 4, (40,), generator=generator)
    monkeypatch.setattr(ranking, "SIMILARITIES", 120)
    monkeypatch.setattr(ranking, "ROWS", 7)
    found = exact_ranking(
        gallery, queries, lambda asked: labels[asked, None] == labels, device=CPU, skip_self=skip_self
    )
    similarity = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    for q, row in enumerate(similarity.tolist()):
        kept = [i for i in range(40) if not (skip_self and i == q)]
        ranks = slow_places([row[i] for i in kept], [bool(labels[i] == labels[q]) for i in kept])
        if q == 11 and skip_self:
            continue  # the zero vector is equally near to all: covered above
        assert int(found.first[q]) == ranks[0]
        assert int(found.relevant[q]) == len(ranks)
        assert float(found.average_precision[q]) == pytest.approx(average_precision(torch.tensor(ranks), len(ranks)))
