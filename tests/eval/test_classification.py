"""The losses of fine-tuning and what is done to labels and images, against their definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from convscope.core.backbone import Preprocessing, create_backbone
from convscope.core.errors import UserError
from convscope.eval.classification import Classification, ClassificationConfig
from convscope.eval.fine_tune import FineTuneCommand, preset, presets

LABELS = torch.tensor([0, 4, 1, 1])


def build(**settings: Any) -> Classification:
    objective = Classification(create_backbone("resnet10t", {}, seed=0), 5, ClassificationConfig(**settings)).double()
    with torch.no_grad():
        weight = objective.head.weight
        weight.copy_(torch.linspace(-1, 1, weight.numel(), dtype=torch.float64).view_as(weight))
    return objective


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def smoothed(target: Tensor, smoothing: float) -> Tensor:
    return target * (1 - smoothing) + smoothing / 5


def one_hot(labels: Tensor) -> Tensor:
    return torch.eye(5)[labels]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_over_all_classes(smoothing: float) -> None:
    objective = build(loss="bce", label_smoothing=smoothing).eval()
    logits = objective.logits(images())
    target = smoothed(one_hot(LABELS), smoothing)
    expected = -(target * logits.sigmoid().log() + (1 - target) * (-logits).sigmoid().log()).mean()
    torch.testing.assert_close(objective({"image": images(), "label": LABELS}).loss, expected.float())


@pytest.mark.parametrize(("name", "kind"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_pairs_are_mixed_with_their_labels(name: str, kind: Any) -> None:
    objective = build(**{name: 0.8})
    torch.manual_seed(5)
    loss = objective({"image": images(), "label": LABELS}).loss
    torch.manual_seed(5)
    mixed, target = v2.RandomChoice([kind(alpha=0.8, num_classes=5)])(images(), LABELS)
    assert not torch.equal(mixed, images())
    logits = objective.logits(mixed).float()
    torch.testing.assert_close(loss, -(smoothed(target, 0.1) * logits.log_softmax(1)).sum(1).mean())


def test_mixing_and_erasing_are_for_training_only_and_leave_the_batch_alone() -> None:
    objective, batch = build(mixup=0.8, cutmix=1.0, erase=1.0), {"image": images(), "label": LABELS}
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(objective(batch).loss.item())
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(batch["image"], images())
    plain, still = (build(**settings).eval()(batch).loss for settings in ({}, {"mixup": 0.8, "erase": 1.0}))
    assert torch.equal(still, plain)


def test_rectangles_of_noise_come_as_often_as_asked() -> None:
    objective = build(erase=0.25)
    many = torch.zeros(400, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(0)
    changed, _ = objective._changed(many, torch.zeros(400, dtype=torch.int64), torch.zeros(400, 5))
    share = float((changed != 0).flatten(1).any(1).float().mean())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.parametrize("policy", ["trivial", "rand-m9-mstd0.5-inc1", "augmix-m3-w3", "3a"])
def test_augmentations_of_both_libraries(policy: str) -> None:
    change = ClassificationConfig(auto_augment=policy).augmentation(Preprocessing(size=(24, 32)))
    pixels = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = [change(pixels) for _ in range(8)]
    assert all(each.shape == pixels.shape and each.dtype == torch.uint8 for each in changed)
    assert any(not torch.equal(each, pixels) for each in changed)


def test_nonsense_is_refused() -> None:
    with pytest.raises(UserError, match="auto-augment none-such"):
        ClassificationConfig(auto_augment="none-such").augmentation(Preprocessing(size=(24, 32)))
    with pytest.raises(UserError, match="--mixup"):
        ClassificationConfig(mixup=-1.0)
    with pytest.raises(UserError, match="--erase"):
        ClassificationConfig(erase=2.0)


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_builds(name: str) -> None:
    """Through the command line's own parser, as `--preset NAME` does."""
    from convscope.cli import _parse, _preset_flags
    from convscope.eval import fine_tune

    flags = _preset_flags(fine_tune, FineTuneCommand, name, [])
    config = _parse(FineTuneCommand, [*flags, "model", "--data", "d", "--output-dir", "o"], "convscope", None)
    assert config.optimization.layer_decay == preset(FineTuneCommand, name, [])["layer_decay"]
    assert config.classification.augmentation(Preprocessing(size=(24, 32))) is not None
    assert config.train.total_steps(1_281_167) > 10_000


def test_unknown_presets_name_the_known_ones() -> None:
    with pytest.raises(UserError, match="spark-resnet50"):
        preset(FineTuneCommand, "nothing", [])
