"""Retrieval against a loop that follows the definitions, and scikit-learn's average precision."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from convscope.core.errors import UserError
from convscope.core.results import load_result
from convscope.eval.features import Features
from convscope.eval.retrieval import (
    RetrievalCommand,
    RetrievalConfig,
    candidate_ranking,
    per_query,
    retrieval,
    run,
    share_label,
)


def features(count: int, seed: int, classes: int = 4) -> Features:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99))
    x = centres[y] + 1.5 * torch.randn(count, 8, generator=generator)
    return Features([f"{seed}-{i}" for i in range(count)], x, y)


def slow(gallery: Features, queries: Features, k: int, *, skip_self: bool) -> tuple[float, float]:
    """Recall at k and mean average precision, query by query."""
    hits, precisions = [], []
    for q, (x, y) in enumerate(zip(queries.x, queries.y)):
        similarity = torch.nn.functional.cosine_similarity(x[None], gallery.x)
        order = [i for i in similarity.argsort(descending=True).tolist() if not (skip_self and i == q)]
        relevant = [int(gallery.y[i]) == int(y) for i in order]
        hits.append(any(relevant[:k]))
        precisions.append(average_precision_score(relevant, similarity[order]))
    return sum(hits) / len(hits), sum(precisions) / len(precisions)


@pytest.mark.parametrize("skip_self", [False, True])
def test_against_a_loop(skip_self: bool) -> None:
    gallery = features(60, 0)
    queries = gallery if skip_self else features(25, 1)
    found = retrieval(gallery, queries, RetrievalConfig(recall_at=(1, 3), skip_self=skip_self, device="cpu"))
    for k in (1, 3):
        recall, mean_precision = slow(gallery, queries, k, skip_self=skip_self)
        assert found[f"recall@{k}"].value == pytest.approx(recall)
        assert found["map"].value == pytest.approx(mean_precision, rel=1e-6)
    assert 0.3 < found["recall@1"].value < 1  # neither trivial nor perfect, so an error would show
    assert found["map"].low < found["map"].value < found["map"].high


def test_any_common_label_is_enough() -> None:
    """Several labels an image, one of them unknown; against a loop over pairs."""
    gallery = torch.randint(-1, 2, (9, 3), generator=torch.Generator().manual_seed(0)).float()
    queries = torch.randint(-1, 2, (5, 3), generator=torch.Generator().manual_seed(1)).float()
    expected = [[any(a == b == 1 for a, b in zip(q, g)) for g in gallery.tolist()] for q in queries.tolist()]
    assert share_label(queries, gallery).tolist() == expected
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    found = retrieval(
        Features([], x, gallery), Features([], x[:5] + 0.1, queries), RetrievalConfig(recall_at=(9,), device="cpu")
    )
    answered = sum(map(any, expected))
    assert found["map"].n == answered
    assert found["recall@9"].value == 1


def test_an_index_that_searches_everything_gives_the_exact_figures() -> None:
    """With all cells probed and all images asked for, ivf is an exhaustive search."""
    gallery, queries = features(80, 0), features(25, 1)
    exact = retrieval(gallery, queries, RetrievalConfig(recall_at=(1, 3), device="cpu"))
    config = RetrievalConfig(recall_at=(1, 3), device="cpu", index="ivf", nlist=4, nprobe=4)
    approximate = retrieval(gallery, queries, config)
    assert approximate["index recall@1"].value == approximate["index recall@3"].value == 1
    same = {"recall@1": "recall@1", "recall@3": "recall@3", "map": "map@80"}
    for name, other in same.items():
        assert approximate[other].value == pytest.approx(exact[name].value)
    fewer = retrieval(gallery, queries, replace(config, candidates=10))
    assert fewer["map@10"].value < exact["map"].value


def test_what_an_index_misses_counts_as_never_found() -> None:
    """By hand, ranked b a, of a gallery a b c d with labels 0 1 0 0; then without the query itself."""
    labels = torch.tensor([0, 1, 0, 0])
    found = torch.tensor([[1, 0, -1], [1, 0, -1]])
    ranking = candidate_ranking(found, 4, lambda asked: share_label(torch.tensor([0, 0])[asked], labels))
    assert ranking.average_precision.tolist() == pytest.approx([1 / 2 / 3] * 2)
    assert (ranking.first.tolist(), ranking.relevant.tolist()) == ([1, 1], [3, 3])
    both = torch.tensor([[1, 2, 0], [1, 0, -1]])
    alone = candidate_ranking(both, 4, lambda asked: share_label(torch.tensor([0, 1])[asked], labels), skip_self=True)
    assert alone.average_precision.tolist() == pytest.approx([1 / 2 / 2, 0])
    assert (alone.first.tolist(), alone.relevant.tolist()) == ([1, 4], [2, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_features_that_are_not_finite(value: float, index: str) -> None:
    queries = features(20, 1)
    queries.x[7, 3] = value
    with pytest.raises(UserError, match=f"test features of {queries.keys[7]} hold NaN"):
        retrieval(features(20, 0), queries, RetrievalConfig(device="cpu", index=index))


def test_an_empty_side() -> None:
    whole, none = features(20, 0), features(0, 1)
    for gallery, queries in ((whole, none), (none, whole)):
        with pytest.raises(UserError, match="do not fit"):
            retrieval(gallery, queries, RetrievalConfig(device="cpu"))


def test_queries_without_an_answer() -> None:
    alone = Features(["a", "b"], torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="no query"):
        retrieval(alone, alone, RetrievalConfig(skip_self=True, device="cpu"))
    x = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1]])
    mixed = Features(["a", "b", "c"], x, torch.tensor([0, 1, 0]))
    config = RetrievalConfig(skip_self=True, recall_at=(1,), device="cpu")
    found = per_query(mixed, mixed, config)
    np.testing.assert_array_equal(found["recall@1"], [1, np.nan, 1])
    np.testing.assert_array_equal(found["map"], [1, np.nan, 1])
    assert retrieval(mixed, mixed, config)["map"].n == 2


def test_command(small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "retrieval.json"
    config = {"model": "timm:resnet10t@random", "data": small_shards, "device": "cpu", "workers": 0, "output": output}
    run(RetrievalCommand(**config, layers=("layer1", "pooled"), recall_at=(1, 2)))
    result = load_result(output)
    names = {f"{layer} {name}" for layer in ("layer1", "pooled") for name in ("recall@1", "recall@2", "map")}
    assert set(result.figures) == names
    assert all(figure.n == 12 for figure in result.figures.values())
    assert result.data["test"]["count"] == 12
    assert not result.details["skip_self"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    run(RetrievalCommand(**config, test_split="train"))
    assert load_result(output).details["skip_self"]
    run(RetrievalCommand(**config, index="ivf", nlist=2, recall_at=(1,)))
    approximate = load_result(output)
    assert approximate.protocol == "image-image-ivf/2"  # never taken for the exact one
    assert set(approximate.figures) == {"recall@1", "map@32", "index recall@1"}
    assert approximate.details["index"]["nlist"] == 2
