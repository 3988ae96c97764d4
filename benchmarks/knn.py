"""The search of `eval knn` beside its two rivals: faiss's flat index, and torch's mm + topk, some queries at a time.

    python benchmarks/knn.py                                            # 20 000 train images, 2 000 queries, 384 wide
    python benchmarks/knn.py --train 50000 --queries 10000 --width 768

All three start from features of any length and return the same neighbours, in float32. They take turns in one
process; the medians are of the rounds. Seconds are those of the clock, and of the processor, which a busy machine
does not stretch.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import torch
import tyro
from torch import Tensor
from torch.nn.functional import normalize

from convscope.core.neighbours import SIMILARITIES, neighbours, search_faiss


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    train: int = 20_000
    queries: int = 2_000
    width: int = 384
    k: int = 200
    rounds: int = 7
    threads: int = 2
    device: str = "cpu"


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    faiss.omp_set_num_threads(settings.threads)
    generator = torch.Generator().manual_seed(0)
    train, test = (
        torch.randn(count, settings.width, generator=generator) for count in (settings.train, settings.queries)
    )
    device = torch.device(settings.device)

    def flat() -> Tensor:
        found = search_faiss(normalize(train), normalize(test), settings.k)
        if found is None:
            raise SystemExit("this benchmark needs faiss")
        return found[1]

    def mm_topk() -> Tensor:
        gallery = normalize(train.to(device)).T
        parts = torch.split(normalize(test), max(1, SIMILARITIES // settings.train))
        return torch.cat([(part.to(device) @ gallery).topk(settings.k, dim=1).indices.cpu() for part in parts])

    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: neighbours(train, test, settings.k, device=device)[1],
        "faiss": flat,
        "mm_topk": mm_topk,
    }
    same = {name: float((way() == ways["faiss"]()).double().mean()) for name, way in ways.items()}
    clock: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(settings.rounds):
        for name, way in ways.items():
            then = time.perf_counter(), time.process_time()
            way()
            clock[name].append(time.perf_counter() - then[0])
            processor[name].append(time.process_time() - then[1])
    for name in ways:
        print(
            json.dumps(
                {
                    "way": name,
                    "median_s": round(statistics.median(clock[name]), 3),
                    "processor_s": round(statistics.median(processor[name]), 3),
                    "same_neighbours_as_faiss": round(same[name], 6),
                }
            )
        )


if __name__ == "__main__":
    main(tyro.cli(Settings))
