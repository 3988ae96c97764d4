"""What timm's registry asks of each architecture: its settings, how it is built, the authors' names of its weights."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import timm.models
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from convscope.backbones.staged import StagedNetwork

Network = TypeVar("Network", bound=nn.Module)
Entrypoint = TypeVar("Entrypoint", bound=Callable[..., nn.Module])
Names = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]  # (pattern of the authors' name, ours) in turn

register_model: Callable[[Entrypoint], Entrypoint] = timm.models.register_model  # which has no types


def config(**fields: Any) -> dict[str, Any]:
    """The `pretrained_cfg` of an architecture for ImageNet at 224 pixels and stride 32, but for `fields`."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        **fields,
    }


def create(
    network: type[Network],
    variant: str,
    pretrained: bool,
    convert: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]],
    out_indices: int | Sequence[int],
    /,
    **kwargs: Any,
) -> Network:
    """Build a network as timm does.

    Args:
        network: its class.
        variant: its registered name.
        pretrained: load the weights of its `pretrained_cfg`.
        convert: the authors' checkpoint and the network -> a state dict of the network.
        out_indices: the maps that `features_only=True` returns unless asked for others.
        kwargs: of timm or of the class.
    """
    pooling = kwargs.pop("global_pool", None) if issubclass(network, StagedNetwork) else None
    model = timm.models.build_model_with_cfg(
        network,
        variant,
        pretrained,
        pretrained_filter_fn=convert,
        feature_cfg={"feature_cls": "getter", "out_indices": out_indices},
        **kwargs,
    )
    if pooling is not None and isinstance(model, StagedNetwork):
        model.set_pooling(pooling)
    return model  # type: ignore[no-any-return]


def refuse(network: type[nn.Module], arguments: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise a TypeError for arguments of timm's class that the network's own layers have no use for."""
    if given := [name for name in names if arguments.get(name)]:
        raise TypeError(f"{network.__name__} has no {', '.join(given)}")


def renamed(name: str, names: Names) -> str:
    """What we call the parameter, or with a dot at its end the module, that the authors call `name`."""
    for theirs, ours in names:
        name = re.sub(theirs, ours, name)
    return name
