"""Fine-tuning: the loss, what is tested, what is recorded, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convscope.core.backbone import create_backbone
from convscope.core.data.shard_set import open_shards
from convscope.core.data.transforms import Normalize
from convscope.core.errors import UserError
from convscope.core.models import load_backbone, untrained_twin
from convscope.core.results import load_result, load_samples
from convscope.core.training.config import TrainConfig
from convscope.eval.classification import Classification
from convscope.eval.fine_tune import FineTuneCommand, default_optimization, fine_tune, predict, run
from tests.core.data.tars import write_tar

ARGUMENTS = {"model": "timm:resnet18_cifar@random", "model_args": ("channels=8,8,16,16",), "size": 32}


def command(data: str, output: Path, *, steps: int = 30, **changes: Any) -> FineTuneCommand:
    """A small run."""
    training = TrainConfig(steps=steps, batch_size=16, workers=0, device="cpu")
    optimization = replace(default_optimization(), lr=0.04, warmup_epochs=1.0)
    values = {**ARGUMENTS, "train": training, "optimization": optimization, **changes}
    return FineTuneCommand(data=data, output_dir=output, **values)


def test_loss_is_smoothed_cross_entropy_of_the_pooled_features() -> None:
    objective = Classification(create_backbone("resnet10t", {}, seed=0), 5).eval()
    torch.nn.init.normal_(objective.head.weight)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 4, 1, 1])
    output = objective({"image": images, "label": labels})
    logits = objective.backbone(images) @ objective.head.weight.T + objective.head.bias
    target = torch.full((4, 5), 0.1 / 5)
    target[torch.arange(4), labels] += 0.9
    torch.testing.assert_close(output.loss, -(target * logits.log_softmax(1)).sum(1).mean())
    assert output.metrics["accuracy"] == (logits.argmax(1) == labels).double().mean()
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_it_learns_what_colour_tells(small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(command(small_shards, tmp_path / "run", steps=60))
    result = load_result(tmp_path / "run" / "results" / "fine-tune.json")
    assert result.figures["top1"].value == 1.0
    assert result.figures["top1"].n == 12
    assert load_samples(tmp_path / "run" / "results" / "fine-tune.json", result)["top1"].tolist() == [True] * 12
    assert result.figures["train_images"].value == 32
    assert "top5" not in result.figures  # of four classes
    assert capsys.readouterr().out == "top-1 100.00 % [100.00, 100.00]\n"
    tuned = load_backbone(str(tmp_path / "run"))
    start = create_backbone("resnet18_cifar", {"channels": (8, 8, 16, 16)}, seed=0)
    assert tuned.weights_hash() != start.weights_hash()
    assert result.model["weights_hash"] == start.weights_hash()  # names what was fine-tuned, not what came of it
    assert tuned.preprocessing.size == (32, 32)


def test_few_labels_of_each_class(small_shards: str, tmp_path: Path) -> None:
    result = fine_tune(command(small_shards, tmp_path / "run", steps=2, per_class=3))
    assert result.figures["train_images"].value == 12
    assert result.details["settings"]["per_class"] == 3
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "per_class: 3" in config
    with pytest.raises(UserError, match="fewer than 9 per class"):
        fine_tune(command(small_shards, tmp_path / "other", per_class=9))


def test_from_scratch_is_the_untrained_twin(small_shards: str, tmp_path: Path) -> None:
    first = fine_tune(command(small_shards, tmp_path / "first", steps=2))
    again = fine_tune(
        command(
            small_shards, tmp_path / "twin", steps=2, model=str(tmp_path / "first"), model_args=(), from_scratch=True
        )
    )
    assert again.model["from_scratch"] is True
    assert again.model["weights_hash"] == first.model["weights_hash"]  # both are random weights of seed 0
    assert again.figures == first.figures
    tuned = load_backbone(str(tmp_path / "first"))
    assert untrained_twin(tuned, 0).weights_hash() == first.model["weights_hash"] != tuned.weights_hash()


def test_another_label_of_the_same_images(small_shards: str, tmp_path: Path) -> None:
    result = fine_tune(command(small_shards, tmp_path / "run", steps=2, label="parity"))
    assert result.data["label"] == "parity"
    with pytest.raises(UserError, match="no label 'colour'"):
        fine_tune(command(small_shards, tmp_path / "other", label="colour"))


def test_predictions_are_ranked_class_by_class(small_shards: str) -> None:
    objective = Classification(create_backbone("resnet10t", {}, seed=0), 7)
    torch.nn.init.normal_(objective.head.weight)
    objective.backbone.preprocessing = replace(objective.backbone.preprocessing, size=(32, 32), crop_pct=1.0)
    shards = open_shards(small_shards, "test")
    hits = predict(objective, shards, Normalize((0.5,) * 3, (0.5,) * 3), "cls")
    assert objective.training  # left as it was
    assert hits.shape == (12, 2)
    assert (hits[:, 0] <= hits[:, 1]).all()

    from convscope.core.data.stream import eval_batches
    from convscope.core.data.transforms import eval_transform

    objective.eval()
    batch = next(eval_batches(shards, eval_transform(objective.backbone.preprocessing), batch_size=12))
    logits = objective.logits(batch["image"].float() / 255 / 0.5 - 1).detach().numpy()
    for scores, label, (top1, top5) in zip(logits, batch["label"].tolist(), hits):
        order = np.argsort(-scores).tolist()
        assert top1 == (order[0] == label)
        assert top5 == (label in order[:5])


def test_more_test_classes_than_the_head_has(small_shards: str) -> None:
    objective = Classification(create_backbone("resnet10t", {}, seed=0), 2)
    objective.backbone.preprocessing = replace(objective.backbone.preprocessing, size=(32, 32))
    with pytest.raises(UserError, match="split test has label 3; training had 2 classes"):
        predict(objective, open_shards(small_shards, "test"), Normalize((0.5,) * 3, (0.5,) * 3), "cls")


def test_testing_on_the_training_images_is_refused(small_shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="same shards"):
        fine_tune(command(small_shards, tmp_path / "run", test_split="train"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((1, 3), (1, 2), "1 test labels, such as 2, are not among the 2 train classes"),
        ((2, 2), (2,), "every train label is 2"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused_before_training(
    train: tuple[int, ...], test: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    for split, labels in (("train", train), ("test", test)):
        members = [(f"{i}.{kind}", b"%d" % label) for i, label in enumerate(labels) for kind in ("cls", "png")]
        write_tar(tmp_path / "data" / split / f"{split}.tar", members)
    with pytest.raises(UserError, match=message):
        fine_tune(command(str(tmp_path / "data"), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("size", 0), ("crop_scale", (0.9, 0.1)), ("crop_pct", 0.0), ("drop_path", 1.0)]
)
def test_settings_are_checked(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name.replace("_", "-")):
        command("data", tmp_path, **{name: value})


def test_the_run_directory_is_kept_and_continued(small_shards: str, tmp_path: Path) -> None:
    first = fine_tune(command(small_shards, tmp_path / "run", steps=4))
    again = fine_tune(command(small_shards, tmp_path / "run", steps=4))  # nothing is left to do but to test
    assert again.figures == first.figures
    assert again.model == first.model
    attempts = sorted((tmp_path / "run" / "attempts").glob("*.json"))
    assert [json.loads(file.read_text())["step"] for file in attempts] == [0, 4]
