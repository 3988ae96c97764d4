"""Means of the loss and metrics between two logged lines."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Window:
    """Means since the last logged line, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.note = ""
        self.skipped = 0
        self.clear()

    def clear(self) -> None:
        """Start a new window; the count of skipped samples goes on."""
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Take in one batch."""
        self._count += 1
        for name, value in {"loss": loss, **metrics}.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self) -> dict[str, Tensor]:
        """Mean of each value since the window began."""
        means = {name: total / self._count for name, total in self._sums.items()}
        if "loss" in means:
            self.note = f"loss {float(means['loss']):.4f}"
        return means

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run logs the same means."""
        return {"sums": {k: float(v) for k, v in self._sums.items()}, "count": self._count, "skipped": self.skipped}

    def load(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """Restore what `state` returned in each process; with another number of them, rank 0 takes over the count."""
        if len(states) != world:
            states = [{"sums": {}, "count": 0, "skipped": sum(one["skipped"] for one in states)}]
            states += [{"sums": {}, "count": 0, "skipped": 0}] * (world - 1)
        state = states[rank]
        self._sums = {k: torch.tensor(v, dtype=torch.float64, device=self.device) for k, v in state["sums"].items()}
        self._count, self.skipped = state["count"], state["skipped"]
