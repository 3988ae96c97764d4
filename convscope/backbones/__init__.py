"""Architectures that timm lacks, registered into its registry when this package is imported."""

from convscope.backbones import dhvt, glnet, gmm_vit, hornet, replknet, simplenet, tvconv, unireplknet, van
from convscope.backbones.convnext_small_image import convnext_mini_s8
from convscope.backbones.resnet_small_image import resnet18_cifar, resnet50_cifar

__all__ = [
    "convnext_mini_s8",
    "dhvt",
    "glnet",
    "gmm_vit",
    "hornet",
    "replknet",
    "resnet18_cifar",
    "resnet50_cifar",
    "simplenet",
    "tvconv",
    "unireplknet",
    "van",
]
