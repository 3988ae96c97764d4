"""Losses over pairs of images and texts; the batch is that of all processes together.

Each process computes the part of its own rows. The mean of the parts over the processes is the loss of the joined
batch, and averaging gradients over the processes, as DistributedDataParallel does, gives that loss's gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.core import distributed


def softmax_loss(image: Tensor, text: Tensor, scale: Tensor, image_weight: float = 0.5) -> tuple[Tensor, Tensor]:
    """InfoNCE in both directions: image_weight * l(image -> text) + (1 - image_weight) * l(text -> image).

    With a weight of 0.5 it is CLIP's loss (Radford et al. 2021, fig. 3); ConVIRT's lambda is the weight (Zhang et al.
    2020, eq. 4).

    Args:
        image: unit vectors (b, D) of this process's images.
        text: those of their texts.
        scale: inverse temperature, scalar.
        image_weight: of the direction from images to texts.

    Returns:
        The loss, and the share of images whose own text is the nearest of the whole batch.
    """
    own = distributed.rank() * len(image) + torch.arange(len(image), device=image.device)
    to_text = scale * image @ distributed.gather_with_gradient(text).T  # (b, world * b)
    alone = distributed.world() == 1
    to_image = to_text.T if alone else scale * text @ distributed.gather_with_gradient(image).T
    loss = image_weight * F.cross_entropy(to_text, own) + (1 - image_weight) * F.cross_entropy(to_image, own)
    return loss, (to_text.detach().argmax(1) == own).float().mean()


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP: every pair of the batch is its own yes-or-no question (Zhai et al. 2023, eq. 1 and sec. 3.3).

    Texts go around the ring of processes, so that no process ever holds more than one chunk of foreign ones.

    Args:
        image: unit vectors (b, D) of this process's images.
        text: those of their texts.
        scale: inverse temperature, scalar.
        bias: added to every similarity, scalar.

    Returns:
        The loss: the sum over all pairs of this process's images, divided by their number.
    """
    match = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    loss = -F.logsigmoid(match * (scale * image @ text.T + bias)).sum()
    for _ in range(distributed.world() - 1):
        text = distributed.from_next(text)
        loss = loss - F.logsigmoid(-(scale * image @ text.T + bias)).sum()
    return loss / len(image)
