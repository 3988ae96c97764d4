"""Rotation prediction against Pillow's rotations and a loop over images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convscope.core import distributed
from convscope.core.backbone import create_backbone
from convscope.core.errors import UserError
from convscope.ssl.objectives.rotation import Rotation, RotationConfig, rotations
from tests.processes import run_on_two


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
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-12)
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


def processes(rank: int, world: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of this process's share of eight images, with synchronised BatchNorm as in training."""
    torch.manual_seed(0)
    objective = RotationConfig(size=16).build(backbone()).double()
    distributed.sync_batchnorm(objective, torch.device("cpu"))
    share = 8 // world
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wrapped = distributed.wrap(objective, torch.device("cpu"))  # it averages gradients as long as it lives
    out = wrapped({"image": images[rank * share : (rank + 1) * share]})
    out.loss.backward()
    gradients = {name: one.grad for name, one in objective.named_parameters()}
    return distributed.mean_over_ranks({"loss": out.loss})["loss"], gradients


def test_two_processes_equal_one_with_the_joined_batch(tmp_path: Path) -> None:
    loss, gradients = processes(0, 1)
    for found_loss, found in run_on_two(processes, tmp_path, 2):
        assert found_loss == pytest.approx(loss, rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-14, msg=name)
