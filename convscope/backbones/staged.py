"""What timm expects of a convolutional network, for networks whose stages run one after another."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn


class StagedNetwork(nn.Module):
    """Stages that each hand one map to the next, a last norm, global pooling and a linear classifier.

    `pooling` names what `pool` does, and `pool_modules` its modules; `global_pool` is `pooling`, or "" for maps that
    stay maps.

    Args:
        stages: the network's body.
        channels: of each stage's map.
        strides: of each stage's map, in pixels; from 4 on doubling with each stage unless given.
        num_classes: 0 for no classifier.
        drop_rate: dropout before the classifier.
        norm: of the last map.
    """

    pooling = "avg"
    pool_modules: tuple[str, ...] = ()

    def __init__(
        self,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        strides: Sequence[int] | None = None,
        *,
        num_classes: int,
        drop_rate: float = 0.0,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = channels[-1]
        self.global_pool = self.pooling
        self.stages = nn.Sequential(*stages)
        self.norm = norm or nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.grad_checkpointing = False
        if strides is None:
            strides = [4 * 2**i for i in range(len(stages))]
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"stages.{i}"}
            for i, (width, stride) in enumerate(zip(channels, strides))
        ]

    def pool(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C): the mean over positions."""
        return x.mean((2, 3))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> the last map (B, C, h, w), normalised."""
        for stage in self.stages:
            x = self._run(stage, x)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits (B, num_classes), or pooled features with `pre_logits`."""
        x = self.head_drop(self.pool(x) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or pooled features without a classifier."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of the stages `indices` (the last n for a number, all for None), as timm's networks return them.

        Args:
            x: images (B, in_chans, H, W).
            indices: which stages.
            norm: apply the last norm to the last stage's map.
            stop_early: run no stage beyond the last one wanted; the final features are then its map.
            output_fmt: only NCHW.
            intermediates_only: return the maps alone and not (final features, maps).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"{type(self).__name__} returns maps as NCHW, not {output_fmt}")
        taken, last = feature_take_indices(len(self.stages), indices)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = self._run(stage, x)
            if i in taken:
                maps.append(self.norm(x) if norm and i == len(self.stages) - 1 else x)
        whole = not stop_early or last == len(self.stages) - 1
        return maps if intermediates_only else (self.norm(x) if whole else x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of the stages `indices` do not need; returns those indices counted from 0."""
        taken, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last < len(self.stages) - 1:  # the norm is of the last stage's width
            self.norm = nn.Identity()
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0)
            for name in self.pool_modules:
                setattr(self, name, nn.Identity())
        return list(taken)

    def get_classifier(self) -> nn.Module:
        """The last linear layer, an identity where there is no classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` classes, none for 0, and another pooling where one is named."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.set_pooling(self.global_pool if global_pool is None else global_pool)

    def set_pooling(self, global_pool: str) -> None:
        """Pool as the network does, or not at all for "".

        Raises:
            ValueError: another kind of pooling, or none before a classifier.
        """
        if global_pool not in ("", self.pooling):
            raise ValueError(f"{type(self).__name__} pools by {self.pooling!r}, or not with ''; got {global_pool!r}")
        if not global_pool and self.num_classes:
            raise ValueError(f"{type(self).__name__}: a classifier needs pooled features; num_classes=0 leaves it out")
        self.global_pool = global_pool

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(stage, x)  # type: ignore[no-any-return]
        return stage(x)  # type: ignore[no-any-return]


class PoolNormNetwork(StagedNetwork):
    """A staged network that ends as ConvNeXt does, with a LayerNorm behind the pooling, and starts from its weights."""

    pool_modules = ("pool_norm",)

    def __init__(
        self, stages: Sequence[nn.Module], channels: Sequence[int], *, num_classes: int, drop_rate: float
    ) -> None:
        super().__init__(stages, channels, num_classes=num_classes, drop_rate=drop_rate)
        self.pool_norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.apply(_initialise)

    def pool(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C): the mean over positions, normalised."""
        return self.pool_norm(super().pool(x))  # type: ignore[no-any-return]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def make_stage(downsample: nn.Module, blocks: Sequence[nn.Module]) -> nn.Sequential:
    """A stage with its parts `downsample` and `blocks`."""
    return nn.Sequential(OrderedDict(downsample=downsample, blocks=nn.Sequential(*blocks)))


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of each stage's blocks, from 0 in the first block linearly to `rate` in the last."""
    total, before, rates = sum(depths), 0, []
    for depth in depths:
        rates.append([rate * (before + i) / max(total - 1, 1) for i in range(depth)])
        before += depth
    return rates
