"""Approximate search: faiss's indices over unit vectors, on all GPUs where faiss is built for them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.core.errors import UserError
from convscope.core.neighbours import neighbours
from convscope.core.options import require_at_least
from convscope.eval.ranking import ROWS

IndexKind = Literal["flat", "ivf", "pq", "ivf-pq", "hnsw"]

PQ_BITS, PQ_PARTS = 8, 64  # a code is a byte for each of at most 64 parts
HNSW_LINKS, HNSW_BUILD_EF = 32, 200  # build: as in the paper's experiments; faiss's own 40 loses recall
TRAIN_PER_CELL, TRAIN_LEAST = 64, 2**15  # rows that a clustering is learned from
CELL_LEAST = 39  # images in a cell, in the mean, below which faiss warns
ON_GPU = ("ivf", "ivf-pq")  # kinds of which faiss has a GPU version
SAMPLE = 1000  # queries that are compared with the exact search
TOLERANCE = 1e-5  # of a similarity in float32


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """How the gallery is searched."""

    index: IndexKind = "flat"
    """flat: exactly. ivf: in the cells nearest to the query. pq: by codes of m bytes an image. ivf-pq: both. hnsw: in a
    graph of neighbours."""
    candidates: int = 1000
    """Images that an approximate index returns for a query; what it misses counts as never found."""
    nlist: int | None = None
    """Cells of ivf; default 4 times the root of the gallery's size, less for a small one."""
    nprobe: int = 16
    """Cells that are searched."""
    m: int | None = None
    """pq: parts that a vector is cut into, default at most 64; hnsw: links of an image, default 32."""
    ef: int = 128
    """hnsw: breadth of the search."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "candidates", "nlist", "nprobe", "m", "ef")


@dataclass(frozen=True)
class SearchIndex:
    """An index that is ready to be asked."""

    index: Any  # of faiss
    settings: dict[str, int]  # as they were used
    on_gpus: int

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Positions in the gallery (Q, k), best first, of what looks most similar; -1 where nothing more was found.

        Args:
            queries: (Q, D), any length of vector.
            k: at most the size of the gallery.
        """
        parts = [self.index.search(_unit(part).numpy(), k)[1] for part in torch.split(queries, ROWS)]
        return torch.cat([torch.from_numpy(found) for found in parts])


def build_index(gallery: Tensor, settings: IndexSettings, *, device: torch.device, seed: int = 0) -> SearchIndex:
    """Index unit vectors of the gallery (N, D) for the inner product, which is then the cosine.

    The gallery, which may be a memory map, is added some rows at a time. ivf and hnsw hold all of it in memory, as
    float32; pq and ivf-pq hold codes alone.

    Raises:
        UserError: faiss is not installed, or the gallery is too small or cannot be cut as asked.
    """
    faiss = _faiss()
    recipe, used = _recipe(settings, *gallery.shape)
    index = faiss.index_factory(gallery.shape[1], recipe, faiss.METRIC_INNER_PRODUCT)
    if "nprobe" in used:
        index.nprobe = used["nprobe"]
    if settings.index == "hnsw":
        index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD_EF, used["ef"]
    gpus = _gpus(faiss, settings.index, device)
    if gpus:
        index = faiss.index_cpu_to_all_gpus(index)
    if not index.is_trained:
        index.train(_unit(_sample(gallery, max(TRAIN_LEAST, TRAIN_PER_CELL * used.get("nlist", 0)), seed)).numpy())
    for part in torch.split(gallery, ROWS):
        index.add(_unit(part).numpy())
    return SearchIndex(index, used, gpus)


def recall_against_exact(
    index: SearchIndex, gallery: Tensor, queries: Tensor, ks: tuple[int, ...], device: torch.device
) -> dict[int, Tensor]:
    """Share of the k places that the index fills as well as the exact search does, (Q',) for each k.

    A place is filled as well if its image is as similar as the exact k-th, so copies may stand for one another. Of many
    queries SAMPLE are compared, evenly spread.

    Args:
        index: of the gallery.
        gallery: (N, D).
        queries: (Q, D).
        ks: clamped to N.
        device: of the exact search.
    """
    queries = queries[torch.linspace(0, len(queries) - 1, min(SAMPLE, len(queries))).round().long()]
    most = min(max(ks), len(gallery))
    exact, _ = neighbours(gallery, queries, most, device=device)
    found = index.search(queries, most)
    unit = _unit(queries)
    reached = torch.stack([(_unit(gallery[row.clamp_min(0)]) @ query) for row, query in zip(found, unit)])
    reached[found < 0] = -torch.inf
    clamped = {k: min(k, most) for k in ks}
    return {k: (reached[:, :n] >= exact[:, n - 1 : n] - TOLERANCE).double().mean(1) for k, n in clamped.items()}


def _recipe(settings: IndexSettings, count: int, width: int) -> tuple[str, dict[str, int]]:
    """faiss's name of the index over `count` vectors of `width`, and the settings that count for it."""
    used: dict[str, int] = {}
    if settings.index == "hnsw":
        used |= {"m": settings.m or HNSW_LINKS, "ef": settings.ef}
        return f"HNSW{used['m']},Flat", used
    parts = []
    if settings.index.startswith("ivf"):
        nlist = settings.nlist or max(1, min(round(4 * count**0.5), count // CELL_LEAST))
        if nlist > count:
            raise UserError(f"--nlist {nlist} is more than the {count} images of the gallery")
        used |= {"nlist": nlist, "nprobe": min(settings.nprobe, nlist)}
        parts.append(f"IVF{nlist}")
    if settings.index.endswith("pq"):
        used["m"] = settings.m or max(m for m in range(1, PQ_PARTS + 1) if width % m == 0)
        if width % used["m"]:
            raise UserError(f"--m {used['m']} does not divide the {width} numbers of a vector")
        if count < 2**PQ_BITS:
            raise UserError(f"--index {settings.index} needs a gallery of {2**PQ_BITS} images at least, got {count}")
        parts.append(f"PQ{used['m']}x{PQ_BITS}")
    return ",".join(parts if settings.index.endswith("pq") else [*parts, "Flat"]), used


def _sample(gallery: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` random rows, in order: a memory map is read from front to back."""
    if count >= len(gallery):
        return gallery
    chosen = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(seed))[:count]
    return gallery[chosen.sort().values]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1).contiguous()


def _gpus(faiss: Any, kind: IndexKind, device: torch.device) -> int:
    """GPUs that take the index; 0 without faiss's GPU build, and for kinds that it has on the CPU only."""
    if device.type != "cuda" or kind not in ON_GPU or not hasattr(faiss, "index_cpu_to_all_gpus"):
        return 0
    return int(faiss.get_num_gpus())


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError("an approximate index needs faiss: pip install faiss-cpu; --index flat does without") from error
    return faiss
