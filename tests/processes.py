"""Runs a function in gloo processes and collects what each returns."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_two(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`run_on` two processes."""
    return run_on(2, function, folder, *arguments)


def run_on(world: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` in spawned processes that form a group; their results in rank order.

    `function` must be importable; results must be what torch.save can hold.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_enter, args=(world, function, port, str(folder), arguments), nprocs=world, join=True)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(
    rank: int, world: int, function: Callable[..., Any], port: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(function(rank, *arguments), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
