"""Which inputs a convolution reads for each output, and which outputs read an input."""

import math
from dataclasses import dataclass

from torch import nn

from convscope.backbones.large_depthwise import LargeDepthwise
from convscope.ssl.sparse.units import Reads


@dataclass(frozen=True)
class Axis:
    """A convolution along one axis: output o reads the inputs o * stride - padding + t * dilation, t < kernel."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def reach(self) -> int:
        """Distance from an output's first input to its last."""
        return (self.kernel - 1) * self.dilation

    @property
    def aligned(self) -> bool:
        """Whether every output reads exactly the inputs of its own place."""
        return self.kernel == self.stride and self.padding == 0 and self.dilation == 1

    @property
    def keeps_grid(self) -> bool:
        """Whether n * stride inputs give n outputs, whatever n."""
        return 0 <= self.reach - 2 * self.padding < self.stride

    def halo(self, side: int) -> tuple[int, int]:
        """How many inputs before and after a unit of side `side` its outputs read."""
        return self.padding, max((side // self.stride - 1) * self.stride + self.reach - self.padding - (side - 1), 0)

    def output_halo(self, side: int) -> tuple[int, int]:
        """How many outputs before and after a unit's own read its inputs."""
        return (self.reach - self.padding) // self.stride, (
            side - 1 + self.padding
        ) // self.stride - side // self.stride + 1

    def reads(self, side: int) -> Reads:
        """For each output of a unit, the inputs it reads."""
        outputs = range(side // self.stride)
        return tuple(
            tuple(o * self.stride - self.padding + t * self.dilation for t in range(self.kernel)) for o in outputs
        )

    def readers(self, side: int) -> list[tuple[slice, Reads]]:
        """For each phase p the taps that reach a unit's inputs p, p + stride, ..., and the outputs these belong to."""
        step = self.stride // math.gcd(self.stride, self.dilation)
        found: list[tuple[slice, Reads]] = []
        for phase in range(self.stride):
            taps = [t for t in range(self.kernel) if (phase + self.padding - t * self.dilation) % self.stride == 0]
            first = [(phase + self.padding - t * self.dilation) // self.stride for t in taps]
            chosen = slice(taps[0], taps[-1] + 1, step) if taps else slice(0)
            found.append((chosen, tuple(tuple(o + f for f in first) for o in range(side // self.stride))))
        return found


def border(halo: tuple[int, int], side: int) -> Reads:
    """A unit with its halo, place by place."""
    return tuple((place,) for place in range(-halo[0], side + halo[1]))


@dataclass(frozen=True)
class Geometry:
    """What a convolution reads, along both axes."""

    y: Axis
    x: Axis
    groups: int
    depthwise: bool  # a filter of its own for each channel

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Geometry | None":
        """The geometry of a layer, None where it is not plain enough for anything but the dense form."""
        known = type(conv) in (nn.Conv2d, LargeDepthwise)
        if not known or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        y, x = (Axis(*values) for values in zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation))
        plain = y.keeps_grid and x.keeps_grid and y.stride == x.stride
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        return cls(y, x, conv.groups, depthwise) if plain else None

    @property
    def stride(self) -> int:
        """Of both axes."""
        return self.y.stride

    @property
    def padding(self) -> tuple[int, int]:
        """Of both axes."""
        return self.y.padding, self.x.padding

    @property
    def dilation(self) -> tuple[int, int]:
        """Of both axes."""
        return self.y.dilation, self.x.dilation

    def halo(self, side: int) -> tuple[Reads, Reads]:
        """A unit with the inputs around it that its outputs read, place by place."""
        return border(self.y.halo(side), side), border(self.x.halo(side), side)

    def wide(self, side: int) -> tuple[int, int]:
        """Height and width of that."""
        return side + sum(self.y.halo(side)), side + sum(self.x.halo(side))

    def output_halo(self, side: int) -> tuple[Reads, Reads]:
        """The outputs of a unit with those around them that read its inputs, place by place."""
        small = side // self.stride
        return border(self.y.output_halo(side), small), border(self.x.output_halo(side), small)

    @property
    def patch(self) -> bool:
        """Whether inputs fall into blocks, one for each output."""
        return self.y.aligned and self.x.aligned

    @property
    def taps(self) -> int:
        """Places from a filter's first corner to its last."""
        return (self.y.reach + 1) * (self.x.reach + 1)

    @property
    def same(self) -> bool:
        """Whether inputs and outputs lie one upon the other, with as many before as behind."""
        return all(axis.stride == 1 == axis.dilation and axis.reach == 2 * axis.padding for axis in (self.y, self.x))
