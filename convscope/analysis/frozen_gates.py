"""A network as an affine function of its input: every nonlinearity becomes a gate that keeps its value.

Rectifiers, max pooling and BatchNorm in evaluation mode are left alone: between kinks they are affine already.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

Function = Callable[..., Any]

# act(x) = x * gate, for functions that are 0 at 0.
GATED: tuple[Function, ...] = (
    *(F.gelu, F.silu, F.mish, F.hardswish, F.relu6, F.hardtanh, F.elu, F.selu, F.celu, F.tanh),
    *(torch.tanh, Tensor.tanh, torch._C._nn.gelu, torch._C._nn.silu, torch._C._nn.hardswish),
)
# Shares and scales: SE's and attention's weights, and the lengths that normalisations divide by.
CONSTANT: tuple[Function, ...] = (
    *(F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.hardsigmoid, torch._C._nn.hardsigmoid),
    *(F.softmax, torch.softmax, Tensor.softmax),
    *(torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm),
    *(torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt),
)
IN_PLACE: dict[Function, Function] = {
    Tensor.sigmoid_: Tensor.sigmoid,
    Tensor.tanh_: Tensor.tanh,
    torch.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh,
}
PRODUCTS: tuple[Function, ...] = (
    *(torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum, torch.div, Tensor.div),
    Tensor.__truediv__,
)
CURVED: tuple[Function, ...] = (
    *(torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, Tensor.__pow__, torch.square, Tensor.square),
    *(F.softplus, F.logsigmoid, torch.sin, torch.cos, Tensor.sin, Tensor.cos, F.normalize),
)


class FrozenGates(TorchFunctionMode):
    """Computes what the network computes, with gates that no derivative passes through.

    `frozen` collects the names of the functions that were met, `unfrozen` those that are no gate: products of two
    things that both depend on the input, and curves. It is filled where inputs require gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen: set[str] = set()
        self.unfrozen: set[str] = set()

    def __torch_function__(
        self, func: Function, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in the place of every function."""
        kwargs = dict(kwargs or {})
        rule = RULES.get(func)
        if rule is not None:
            self.frozen.add(func.__name__.strip("_"))
            return rule(*args, **kwargs)
        func = IN_PLACE.get(func, func)  # the result is used in the place of the changed input
        if func in GATED:
            self.frozen.add(func.__name__.strip("_"))
            return _gated(func, *args, **kwargs)
        if func in CONSTANT:
            self.frozen.add(func.__name__.strip("_"))
            return func(*(_detached(one) for one in args), **kwargs).detach()
        if (func in PRODUCTS and sum(_depends(one) for one in _flat(args)) > 1) or (
            func in CURVED and _depends(args[0])
        ):
            self.unfrozen.add(resolve_name(func) or func.__name__)
        return func(*args, **kwargs)


def _gated(func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("inplace", None)
    fixed = x.detach()
    value = func(fixed, *args, **kwargs)
    # At 0 any gate gives 0.
    gate = torch.where(fixed == 0, 0.0, value / torch.where(fixed == 0, 1.0, fixed))
    return x * gate


def _layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    axes = tuple(range(-len(tuple(normalized_shape)), 0))
    return _scaled(x, axes, eps, weight, bias)


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    grouped = _scaled(torch.unflatten(x, 1, (num_groups, -1)), tuple(range(2, x.ndim + 1)), eps).flatten(1, 2)
    return _affine(grouped, weight, bias)


def _batch_norm(
    x: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Written out, because the library's has no derivative with respect to the mean.

    While "training", what is normalised is a standardised convolution's weight.
    """
    if training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    shape = (1, -1, *[1] * (x.ndim - 2))
    value = (x - running_mean.view(shape)) * (running_var + eps).rsqrt().detach().view(shape)
    return _affine(value, weight, bias)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    assert not is_causal
    scores = query.detach() @ key.detach().transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        mask = attn_mask.detach()
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def _scaled(
    x: Tensor, axes: tuple[int, ...], eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Centred, over a length that stays as it is."""
    centred = x - x.mean(axes, keepdim=True)
    length = x.detach().var(axes, unbiased=False, keepdim=True).add(eps).rsqrt()
    value = centred * length
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


RULES: dict[Function, Function] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _batch_norm,
    F.scaled_dot_product_attention: _attention,
}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _flat(values: Iterable[Any]) -> list[Any]:
    return [part for one in values for part in (one if isinstance(one, list | tuple) else [one])]


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
