"""Rotation prediction against Pillow's rotations and a loop over images."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from convscope.core.backbone import create_backbone
from convscope.core.errors import UserError
from convscope.ssl.objectives.rotation import Rotation, RotationConfig, rotations


def backbone(**arguments: object) -> object:
    return create_backbone("resnet18_cifar", {"channels": (4, 4, 8, 8), **arguments}, seed=0)


def test_turned_back_they_are_the_same_to_the_bit() -> None:
    images = torch.randn(3, 3, 8, 8)
    for quarter, turned in enumerate(rotations(images).split(3)):
        assert torch.equal(turned.rot90(-quarter, (2, 3)), images)


def test_they_are_pillows_which_turns_counter_clockwise() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    turned = rotations(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
    for quarter in range(4):
        expected = np.asarray(Image.fromarray(pixels).rotate(90 * quarter, expand=True))
        assert np.array_equal(turned[quarter].permute(1, 2, 0).numpy(), expected)


def test_loss_and_accuracy_against_a_loop() -> None:
    objective = RotationConfig(size=16).build(backbone()).double().eval()
    torch.nn.init.normal_(objective.head.weight)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    out = objective({"image": images})
    losses, hits = [], []
    for quarter in range(4):
        for image in images:
            turned = torch.rot90(image, quarter, (1, 2))
            logits = objective.head(objective.backbone(turned[None]))[0].tolist()
            losses.append(math.log(sum(map(math.exp, logits))) - logits[quarter])
            hits.append(max(range(4), key=logits.__getitem__) == quarter)
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(out.metrics["accuracy"]) == pytest.approx(np.mean(hits))
    assert 0 < np.mean(hits) < 1


def test_it_learns_which_way_is_up() -> None:
    """Bright above, dark below: a few steps are enough."""
    torch.manual_seed(0)
    objective = RotationConfig(size=16).build(backbone())
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9)
    shade = torch.linspace(1, -1, 16)[None, None, :, None].expand(8, 3, 16, 16)
    accuracy = []
    for _ in range(40):
        out = objective({"image": shade + 0.3 * torch.randn(8, 3, 16, 16)})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        accuracy.append(float(out.metrics["accuracy"]))
    assert accuracy[-1] > 0.9


def test_images_that_are_not_square_are_refused() -> None:
    network = backbone()
    network.preprocessing = type(network.preprocessing)(size=(16, 24))
    with pytest.raises(UserError, match="square"):
        RotationConfig().build(network)
    assert isinstance(RotationConfig(size=16).build(network), Rotation)


def test_a_crop_scale_that_means_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="--crop-scale"):
        RotationConfig(crop_scale=(0.5, 0.2))
