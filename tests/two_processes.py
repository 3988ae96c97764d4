"""Runs a function in two gloo processes and collects what each returns."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def run_on_two(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` in two spawned processes that form a group; their results in rank order.

    `function` must be importable; results must be what torch.save can hold.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_enter, args=(function, port, str(folder), arguments), nprocs=WORLD, join=True)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _enter(rank: int, function: Callable[..., Any], port: int, folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(function(rank, *arguments), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
