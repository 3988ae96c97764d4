"""The convolutions of a network in the order of their depth, with the filters they hold.

`depth` is CNN Filter DB's conv_depth: the rank of the longest path from the image to the layer among the lengths of
all convolutions' paths, so that layers side by side have one depth. The paths are those of one forward pass as autograd
records it, which follows any control flow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from convscope.core.backbone import Backbone, eval_mode
from convscope.core.conv_bn_pairs import conv_bn_pairs, small_images

DepthFrom = Literal["graph", "execution order", "definition order"]


class Layer(Protocol):
    """What the statistics of a layer are of."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> str: ...  # noqa: D102
    @property
    def depth(self) -> int: ...  # noqa: D102
    @property
    def depth_norm(self) -> float: ...  # noqa: D102
    @property
    def groups(self) -> int: ...  # noqa: D102
    @property
    def weight(self) -> Tensor: ...  # noqa: D102
    @property
    def filters(self) -> Tensor: ...  # noqa: D102


class Layers(Protocol):
    """Layers of one network, or of several that are looked at together."""

    @property
    def depth_from(self) -> str: ...  # noqa: D102
    @property
    def unreached(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def folded(self) -> tuple[str, ...]: ...  # noqa: D102
    def __iter__(self) -> Iterator[Layer]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class ConvLayer:
    """One 4-D convolution weight."""

    name: str  # in the timm network
    weight: Tensor  # (c_out, c_in / groups, h, w), as stored or with its BatchNorm folded in
    groups: int
    stride: tuple[int, int]
    path: int  # operations before it on the longest path from the image
    depth: int  # rank of `path`: 0 for the first; layers side by side share one
    depth_norm: float  # depth / the largest depth; 0 where there is one depth only
    folded: bool  # whether a BatchNorm is in the weight

    @property
    def size(self) -> str:
        """The kernel's height and width, such as "3x3"."""
        return f"{self.weight.shape[2]}x{self.weight.shape[3]}"

    @property
    def filters(self) -> Tensor:
        """The filters (n, h*w), n = c_out * c_in / groups."""
        return self.weight.reshape(-1, self.weight.shape[2] * self.weight.shape[3])


@dataclass(frozen=True)
class ConvLayers:
    """All that a forward pass runs through, by depth and then in the order of execution."""

    layers: tuple[ConvLayer, ...]
    depth_from: DepthFrom  # other than "graph" where autograd could not follow the network
    path: int  # operations on the longest path from the image to the features
    unreached: tuple[str, ...]  # convolutions that the network holds and does not use; they are left out

    def __iter__(self) -> Iterator[ConvLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def folded(self) -> tuple[str, ...]:
        """Names of the layers that a BatchNorm is folded into."""
        return tuple(layer.name for layer in self.layers if layer.folded)


def conv_layers(backbone: Backbone, *, fold_bn: bool = False) -> ConvLayers:
    """List a backbone's convolutions (nn.Conv2d; transposed ones are none).

    Weights are the stored ones: a layer that standardises its weight, as timm's StdConv2d does, holds other filters
    than it convolves with. With `fold_bn` a weight is scaled by the BatchNorm that directly follows it, as inference
    engines and ONNX exporters do; the filters of layers without one stay.
    """
    convs = {name: part for name, part in backbone.model.named_modules() if isinstance(part, nn.Conv2d)}
    depth_from, lengths, longest = _path_lengths(backbone, convs)
    ranks = {length: rank for rank, length in enumerate(sorted(set(lengths.values())))}
    norms = {id(conv): norm for conv, norm in conv_bn_pairs(backbone)} if fold_bn else {}
    layers = []
    for name in sorted(lengths, key=lambda each: lengths[each]):  # stable: execution order within a depth
        conv, depth = convs[name], ranks[lengths[name]]
        norm = norms.get(id(conv))
        layers.append(
            ConvLayer(
                name=name,
                weight=(conv.weight if norm is None else _folded(conv, norm)).detach(),
                groups=conv.groups,
                stride=(conv.stride[0], conv.stride[1]),
                path=lengths[name],
                depth=depth,
                depth_norm=depth / max(len(ranks) - 1, 1),
                folded=norm is not None,
            )
        )
    return ConvLayers(tuple(layers), depth_from, longest, tuple(name for name in convs if name not in lengths))


def _path_lengths(backbone: Backbone, convs: Mapping[str, nn.Conv2d]) -> tuple[DepthFrom, dict[str, int], int]:
    """Operations before each convolution on its longest path, in the order they first run, and those of the network."""
    names = {id(conv): name for name, conv in convs.items()}
    nodes: dict[str, Any] = {}

    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nodes.setdefault(names[id(module)], output.grad_fn)

    image = small_images(backbone)[:1].requires_grad_()
    hooks = [conv.register_forward_hook(record) for conv in convs.values()]
    try:
        with eval_mode(backbone), torch.enable_grad():
            features = backbone(image.clone())  # a copy, because a network may change its input in place
    except (RuntimeError, AssertionError, ValueError):  # a size that the network does not take
        return "definition order", {name: index for index, name in enumerate(convs)}, len(convs)
    finally:
        for hook in hooks:
            hook.remove()
    ends = [node for node in (*nodes.values(), features.grad_fn) if node is not None]
    lengths = _longest_paths(ends, image)
    found = {name: lengths.get(node) for name, node in nodes.items()}
    before = {name: length - 2 for name, length in found.items() if length is not None}  # itself and the copy
    if len(before) < len(nodes):  # where the network cuts its graph
        return "execution order", {name: index for index, name in enumerate(nodes)}, len(nodes)
    return "graph", before, (lengths.get(features.grad_fn) or 1) - 1


def _longest_paths(nodes: list[Any], leaf: Tensor) -> dict[Any, int | None]:
    """Number of operations on the longest path from `leaf` to each node and those before it; None without a path."""
    lengths: dict[Any, int | None] = {}
    stack = list(nodes)
    while stack:
        node = stack[-1]
        before = [each for each, _ in node.next_functions if each is not None]
        missing = [each for each in before if each not in lengths]
        if missing:
            stack += missing
            continue
        stack.pop()
        known = [length for each in before if (length := lengths[each]) is not None]
        start = 0 if getattr(node, "variable", None) is leaf else None
        lengths[node] = 1 + max(known) if known else start
    return lengths


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, _ = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return weight
