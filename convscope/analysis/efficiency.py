"""What a forward pass computes and moves, layer by layer, and how fast a machine could run it at best.

Efficiency gap and waterline after Lavin, "On the Efficiency of Convolutional Neural Networks" (2024), sections 3 and 4.
A layer is a module less the modules inside it: a residual block has its addition, an attention its two products.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = "(network)"  # what no submodule computes


@dataclass
class LayerCost:
    """What one layer does in one forward pass."""

    kind: str  # the module's class
    macs: int = 0  # multiply-accumulates of convolutions and matrix products
    bytes: int = 0  # read and written by every operation: inputs, weights and outputs


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The two ceilings of a device."""

    peak: float  # multiply-accumulates per second
    bandwidth: float  # bytes per second, read and written

    def ideal(self, macs: int) -> float:
        """Seconds at peak arithmetic, n / R."""
        return macs / self.peak

    def transfer(self, moved: int) -> float:
        """Seconds at full bandwidth, b / B."""
        return moved / self.bandwidth

    def waterline(self, cost: LayerCost) -> float:
        """Seconds below which no layer with these costs can run: max(n / R, b / B)."""
        return max(self.ideal(cost.macs), self.transfer(cost.bytes))


def layer_costs(network: nn.Module, images: Tensor) -> dict[str, LayerCost]:
    """Costs of the layers that a forward pass runs, by name, in the order of their first operation.

    Each operation counts as if it read its inputs from memory and wrote its outputs there; views move nothing. Tensors
    may be on the meta device, where nothing is computed.

    Args:
        network: in eval mode.
        images: (B, 3, H, W).
    """
    kinds = {name or ROOT: type(module).__name__ for name, module in network.named_modules()}
    stack = [ROOT]
    costs: dict[str, LayerCost] = {}

    def count(macs: int, moved: int) -> None:
        cost = costs.setdefault(stack[-1], LayerCost(kinds[stack[-1]]))
        cost.macs += macs
        cost.bytes += moved

    with watched(network, stack.append, lambda _: stack.pop()), torch.no_grad(), _Counter(count):
        network(images)
    return {name: cost for name, cost in costs.items() if cost.macs or cost.bytes}


@contextmanager
def watched(network: nn.Module, enter: Callable[[str], Any], leave: Callable[[str], Any]) -> Iterator[None]:
    """Call `enter` and `leave` with a submodule's name around each of its forward passes."""

    def before(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            enter(name)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            leave(name)

        return hook

    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(before(name or ROOT)))
        handles.append(module.register_forward_hook(after(name or ROOT)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells what every operation computes and moves."""

    def __init__(self, count: Callable[[int, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        macs = formula(*args, **kwargs, out_val=result) // 2 if formula else 0
        given = list(_tensors([*args, *kwargs.values()]))
        # Without inputs it is an allocation or a constant, which is made once.
        moves = given and not func.is_view and func.overloadpacket is not torch.ops.aten._unsafe_view
        self._count(macs, sum(map(_size, [*given, *_tensors([result])])) if moves else 0)
        return result


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _size(tensor: Tensor) -> int:
    """Bytes; what is expanded is in memory once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def seconds_by_layer(marks: Sequence[tuple[float, str]]) -> Mapping[str, float]:
    """Time of each layer, less that of the layers inside it; the sum is the time between the first and the last mark.

    Args:
        marks: when control passed to a layer, in seconds, and its name; that of the last is not used.
    """
    found: dict[str, float] = {}
    for (start, owner), (end, _) in pairwise(marks):
        found[owner] = found.get(owner, 0.0) + end - start
    return found
