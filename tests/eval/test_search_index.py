"""faiss's indices against the exact search; faiss itself is real throughout."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from convscope.core import neighbours as module
from convscope.core.errors import UserError
from convscope.core.neighbours import neighbours
from convscope.eval import search_index
from convscope.eval.search_index import IndexSettings, build_index, recall_against_exact

CPU = torch.device("cpu")


def clustered(count: int, seed: int, width: int = 16) -> torch.Tensor:
    """Vectors around twenty centres, of any length."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, width, generator=torch.Generator().manual_seed(99))
    x = centres[torch.randint(0, 20, (count,), generator=generator)] + torch.randn(count, width, generator=generator)
    return x * torch.rand(count, 1, generator=generator).add(0.1)


GALLERY, QUERIES = clustered(600, 0), clustered(40, 1)


@pytest.fixture(autouse=True)
def short_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of four bits a part: 16 centres are learned quickly, 256 are not."""
    monkeypatch.setattr(search_index, "PQ_BITS", 4)


@pytest.mark.parametrize(
    "settings",
    [
        IndexSettings(index="ivf", nlist=10, nprobe=10),
        IndexSettings(index="hnsw", ef=600),
    ],
)
def test_a_thorough_search_finds_what_the_exact_one_does(settings: IndexSettings) -> None:
    index = build_index(GALLERY, settings, device=CPU)
    similar = F.normalize(QUERIES, dim=1) @ F.normalize(GALLERY, dim=1).T
    assert index.search(QUERIES, 5).tolist() == similar.topk(5, dim=1).indices.tolist()


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "pq", "ivf-pq"])
def test_recall_against_exact_is_the_overlap(kind: str) -> None:
    """Without copies in the gallery, it is the share of the exact k nearest that are found."""
    settings = IndexSettings(index=kind, nlist=None if kind in ("pq", "hnsw") else 30, nprobe=1, m=2, ef=1)
    index = build_index(GALLERY, settings, device=CPU)
    found = recall_against_exact(index, GALLERY, QUERIES, (1, 5), CPU)
    exact = (F.normalize(QUERIES, dim=1) @ F.normalize(GALLERY, dim=1).T).topk(5, dim=1).indices.tolist()
    for k in (1, 5):
        near = index.search(QUERIES, 5)[:, :k].tolist()
        assert found[k].tolist() == pytest.approx([len(set(a[:k]) & set(b)) / k for a, b in zip(exact, near)])
    assert 0 < float(found[5].mean()) < 1


def test_copies_stand_for_one_another() -> None:
    gallery = torch.cat([GALLERY[:50]] * 6)
    index = build_index(gallery, IndexSettings(index="ivf", nlist=1), device=CPU)
    assert recall_against_exact(index, gallery, QUERIES, (3,), CPU)[3].tolist() == [1] * 40


def test_adding_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = IndexSettings(index="ivf-pq", nlist=8, nprobe=4, m=4)
    whole = build_index(GALLERY, settings, device=CPU).search(QUERIES, 9)
    monkeypatch.setattr(search_index, "ROWS", 70)
    assert torch.equal(build_index(GALLERY, settings, device=CPU).search(QUERIES, 9), whole)


@pytest.mark.parametrize("skip_self", [False, True])
def test_exact_neighbours_in_blocks(monkeypatch: pytest.MonkeyPatch, skip_self: bool) -> None:
    queries = GALLERY if skip_self else QUERIES
    whole = neighbours(GALLERY, queries, 7, device=CPU, skip_self=skip_self)
    monkeypatch.setattr(module, "NUMBERS", 16 * 90)
    parts = neighbours(GALLERY, queries, 7, device=CPU, skip_self=skip_self)
    assert torch.equal(parts[1], whole[1])
    torch.testing.assert_close(parts[0], whole[0])


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="--nprobe must be at least 1"):
        IndexSettings(nprobe=0)
    pq = IndexSettings(index="pq")
    with pytest.raises(UserError, match="16 images"):
        build_index(GALLERY[:10], pq, device=CPU)
    with pytest.raises(UserError, match="--m 3 does not divide the 16"):
        build_index(GALLERY, replace(pq, m=3), device=CPU)
    with pytest.raises(UserError, match="--nlist 601"):
        build_index(GALLERY, IndexSettings(index="ivf", nlist=601), device=CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["ivf", "ivf-pq"])
def test_on_gpus(kind: str) -> None:
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("needs faiss's GPU build")
    index = build_index(GALLERY, IndexSettings(index=kind, nlist=10, nprobe=10, m=16), device=torch.device("cuda"))
    assert index.on_gpus == torch.cuda.device_count()
    assert float(recall_against_exact(index, GALLERY, QUERIES, (5,), CPU)[5].mean()) > 0.5
