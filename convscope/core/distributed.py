"""Several processes as one: the only file that touches torch.distributed.

A process belongs to a group when RANK and WORLD_SIZE are set, as torchrun does; otherwise everything here is a no-op.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from convscope.core.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints and writes files."""
    return rank() == 0


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is this process's own CUDA device if there is one, else the CPU.

    Raises:
        UserError: a CUDA device was named and there is none.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda" and torch.cuda.is_available():
        name = "auto"  # under a launcher each process has its own
    if name == "auto":
        name = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no usable CUDA device")
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that the launcher's environment describes, for the length of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: T) -> T:
    """The main process's `value` (any picklable object), on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Average scalars over the processes, as Python floats."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().double().cpu() for value in values.values()])
    if dist.is_initialized():
        stacked = _all_reduce(stacked) / world()
    return dict(zip(values, stacked.tolist()))


def sum_over_ranks(value: int) -> int:
    """Sum of a count over the processes."""
    return int(_all_reduce(torch.tensor(float(value), dtype=torch.float64)).item()) if dist.is_initialized() else value


def gather(value: T) -> list[T]:
    """Every process's `value`, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def _all_reduce(value: Tensor) -> Tensor:
    moved = value.cuda() if dist.get_backend() == "nccl" else value
    dist.all_reduce(moved)
    return moved.to(value.device)


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel when there is a group, else the module itself."""
    if not dist.is_initialized():
        return module
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=devices)


def sync_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm use the statistics of the whole group's batch in training.

    On CUDA these are torch's own layers; gloo has none, so there they are computed with differentiable sums. Where all
    statistics are frozen there is nothing to do.
    """
    frozen = not any(child.training for child in module.modules() if isinstance(child, nn.BatchNorm2d))
    if frozen or not dist.is_initialized():
        return module
    if device.type == "cuda":
        converted: nn.Module = convert_sync_batchnorm(module)
        return converted
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            stock = type(child)
            child.__class__ = type(stock.__name__, (_GlooSyncBatchNorm, stock), {"__module__": stock.__module__})
    return module


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Rows (b, D) of every process, one after the other (world * b, D).

    In backward each process receives the sum of what all of them found for its rows. Every process must bring the
    same number of rows.
    """
    if not dist.is_initialized():
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def from_next(rows: Tensor) -> Tensor:
    """Rows (b, D) of the next process, the last one's of the first; gradients travel back the same way."""
    if not dist.is_initialized():
        return rows
    passed: Tensor = _Ring.apply(rows)
    return passed


class _Gather(torch.autograd.Function):
    """Concatenation over the processes; its adjoint sums each one's part."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world())[rank()]


class _Ring(torch.autograd.Function):
    """A step around the ring of processes; its adjoint is the step back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _exchange(rows, to=rank() - 1, source=rank() + 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _exchange(gradient, to=rank() + 1, source=rank() - 1)


def _exchange(value: Tensor, *, to: int, source: int) -> Tensor:
    received = torch.empty_like(value, memory_format=torch.contiguous_format)
    operations = [
        dist.P2POp(dist.isend, value.contiguous(), to % world()),
        dist.P2POp(dist.irecv, received, source % world()),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return received


class _Sum(torch.autograd.Function):
    """Sum over the processes; the adjoint of a sum is a sum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class _GlooSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the joined batch of all processes, in two exact passes: mean, then variance."""

    def forward(self, x: Tensor) -> Any:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = _Sum.apply(values.new_tensor(values.numel() / values.shape[1]))
        mean = _Sum.apply(values.sum(dim=(0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dim=(0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        out = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        out = out.to(x.dtype)
        if isinstance(self, BatchNormAct2d):
            out = self.act(self.drop(out))
        return out

    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
