"""How often a network runs each kind of operation, under the names of ONNX operators, as CNN Filter DB counts them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convscope.core.backbone import Backbone
from convscope.core.conv_bn_pairs import features_of, small_images

# The columns of the published table.
PUBLISHED = """
    Conv Add Relu MaxPool Reshape MatMul Transpose BatchNormalization Concat Shape Gather Softmax Slice Unsqueeze
    Mul Exp Sub Div Pad InstanceNormalization Upsample Cast Floor Clip ReduceMean LeakyRelu ConvTranspose Tanh
    GlobalAveragePool Gemm ConstantOfShape Flatten Squeeze Less Loop Split Min Tile Sigmoid NonMaxSuppression TopK
    ReduceMin AveragePool Dropout Where Equal Expand Pow Sqrt Erf Neg Resize LRN LogSoftmax Identity Ceil Round Elu
    Log Range GatherElements ScatterND RandomNormalLike PRelu Sum ReduceSum NonZero Not
"""

# ONNX's operator -> the operations of ATen that it stands for, besides those of the same name.
ATEN = {
    "Reshape": ("view", "_unsafe_view"),
    "Transpose": ("permute",),
    "MatMul": ("mm", "bmm"),
    "Clip": ("hardtanh", "clamp", "clamp_min", "clamp_max"),
    "Resize": ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
    "BatchNormalization": ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"),
    "LayerNormalization": ("native_layer_norm",),
    "GroupNormalization": ("native_group_norm",),
    "Softmax": ("_softmax",),
    "LogSoftmax": ("_log_softmax",),
    "MaxPool": ("max_pool2d_with_indices",),
    "AveragePool": ("avg_pool2d",),
    "GlobalAveragePool": ("_adaptive_avg_pool2d",),
    "Gemm": ("addmm",),
    "ReduceSum": ("sum",),
    "Concat": ("cat",),
    "Gather": ("select",),
    "Pad": ("constant_pad_nd",),
    "LeakyRelu": ("leaky_relu",),
    "PRelu": ("_prelu_kernel",),
    "Gelu": ("gelu",),
    "HardSigmoid": ("hardsigmoid",),
    "HardSwish": ("hardswish",),
    "Attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_attention_math",
    ),
}
OPERATORS = {
    **{name.lower(): (name,) for name in PUBLISHED.split()},
    **{operation: (name,) for name, operations in ATEN.items() for operation in operations},
    "silu": ("Sigmoid", "Mul"),
}


def operator_counts(backbone: Backbone) -> dict[str, int]:
    """Operators in one forward pass up to the pooled features, the published columns first.

    What is computed is counted as it runs, under the operator that ONNX has for it; an operation without a counterpart
    there is left out. An exporter may fuse or split operators, so published counts can differ by a few.
    """
    counter, image = _Counter(), small_images(backbone)[:1]
    with counter:
        features_of(backbone, image)
    return {**dict.fromkeys(PUBLISHED.split(), 0), **counter.counts}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations as they are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts.update(_operators(func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


def _operators(name: str, args: tuple[Any, ...]) -> Sequence[str]:
    if name == "convolution":
        return ("ConvTranspose",) if args[6] else ("Conv",)
    if name == "mean":  # how global pooling is computed
        image = isinstance(args[0], torch.Tensor) and args[0].ndim == 4 and len(args) > 1
        return ("GlobalAveragePool",) if image and sorted(d % 4 for d in args[1]) == [2, 3] else ("ReduceMean",)
    return OPERATORS.get(name, OPERATORS.get(name.removesuffix("_"), ()))
