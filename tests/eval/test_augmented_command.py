"""Probes on augmented images: choice of the best head, attentive heads, the command, what is told."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convscope.core.errors import UserError
from convscope.core.results import load_result
from convscope.eval.augmented_probe import augmented_probe
from convscope.eval.linear_probe import run
from convscope.eval.probe_objective import AttentiveHead
from convscope.eval.probe_score import best_head_figures
from tests.eval.probes import command


def test_the_best_head_and_the_choice_on_the_other_half() -> None:
    ranks = torch.randint(0, 3, (60, 5), generator=torch.Generator().manual_seed(0))
    figures, choice = best_head_figures(ranks, 9, seed=3)
    hits = (ranks == 0).double()
    assert figures["top1"].value == hits.mean(0).max() == hits[:, choice.best].mean()
    assert figures["top5"].value == 1.0
    assert "the best of 5 heads" in choice.details["chosen_on"]
    honest = figures["top1_chosen_on_other_half"]
    assert honest.value < figures["top1"].value
    # one head that is right everywhere is chosen by either half; two that are each right on one half are not rewarded
    perfect = torch.ones(20, 2, dtype=torch.int64)
    perfect[:, 1] = 0
    assert best_head_figures(perfect, 9, 0)[0]["top1_chosen_on_other_half"].value == 1.0
    order = np.random.default_rng(0).permutation(20)
    halves = torch.ones(20, 2, dtype=torch.int64)
    halves[order[:10], 0] = 0
    halves[order[10:], 1] = 0
    figures, _ = best_head_figures(halves, 9, 0)
    assert figures["top1"].value == 0.5
    assert figures["top1_chosen_on_other_half"].value == 0.0
    assert "top1_chosen_on_other_half" not in best_head_figures(halves[:, :1], 9, 0)[0]


def test_command(small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(command(small_shards, tmp_path / "run", label="parity"))
    result = load_result(tmp_path / "run" / "results" / "linear-probe-dinov2.json")
    assert (result.task, result.protocol) == ("linear-probe", "dinov2/1")
    assert set(result.figures) == {"top1", "top1_chosen_on_other_half"}
    heads = result.details["heads"]
    assert len(heads) == 52
    best = max(heads, key=lambda head: head["top1"])
    assert (result.details["input"], result.details["lr"]) == (best["input"], best["lr"])
    assert result.figures["top1"].value == best["top1"]
    assert "reported test images" in result.details["chosen_on"]
    printed = capsys.readouterr().out
    assert "blocks=4 avgpool=yes" in printed
    assert "top1_chosen_on_other_half" in printed


def test_attention_equals_its_formula() -> None:
    head = AttentiveHead(6, 4, queries=3)
    positions = torch.randn(2, 5, 6)
    normed = head.norm(positions)
    in_weight, in_bias = head.attention.in_proj_weight, head.attention.in_proj_bias
    found = []
    for image in normed:
        query, key, value = (
            rows @ in_weight[6 * i : 6 * i + 6].T + in_bias[6 * i : 6 * i + 6]
            for i, rows in enumerate((head.queries[0], image, image))
        )
        found.append(head.attention.out_proj(torch.softmax(query @ key.T / math.sqrt(6), 1) @ value).flatten())
    torch.testing.assert_close(head([positions])[:, 0], head.linear(torch.stack(found)))


def test_an_attentive_head_learns_what_colour_tells(small_shards: str, tmp_path: Path) -> None:
    config = command(small_shards, tmp_path, protocol="lightly", epochs=30, head="attentive", lrs=(0.05,), queries=2)
    result = augmented_probe(config)
    assert result is not None
    assert result.protocol == "lightly-attentive/1"
    assert result.figures["top1"].value > 0.9
    attention = 24 * 24 * 4 + 24 * 4
    assert result.details["parameters"] == 2 * 24 + 2 * 24 + attention + (2 * 24 * 4 + 4)
    assert result.details["input"] == "blocks.4"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_dir": None}, "needs --output-dir"),
        ({"targets": "regression"}, "--targets regression needs holdout or cached"),
        ({"protocol": "mae", "lrs": (0.1, 0.2)}, "--protocol mae trains one head"),
        ({"head": "attentive", "lrs": (0.1, 0.2)}, "--head attentive trains one head"),
        ({"protocol": "holdout", "head": "attentive"}, "--head attentive needs --protocol"),
        ({"queries": 0}, "queries"),
        ({"iterations": 0}, "iterations"),
        ({"test_split": "train"}, "are the same shards"),
    ],
)
def test_what_cannot_be_done_is_told(changes: dict[str, Any], said: str, small_shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        run(command(small_shards, tmp_path / "run", **changes))


def test_published_settings(tmp_path: Path) -> None:
    dinov2 = command("data", tmp_path, iterations=12_500, sgd_batch_size=None)
    training, optimization = dinov2.training(1_281_167), dinov2.optimization()
    assert (training.steps, training.batch_size) == (12_501, 1024)
    assert (optimization.optimizer, optimization.lr, optimization.weight_decay) == ("sgd", 0.1, 0.0)
    mae = replace(dinov2, protocol="mae")
    assert (mae.training(1_281_167).steps, mae.training(1_281_167).batch_size) == (7_039, 16_384)
    assert (mae.optimization().optimizer, mae.optimization().warmup_epochs) == ("lars", 10.0)
    lightly = replace(dinov2, protocol="lightly")
    assert (lightly.training(1_281_167).steps, lightly.training(1_281_167).batch_size) == (450_411, 256)
    assert (lightly.optimization().optimizer, lightly.optimization().lr) == ("sgd", 0.1)
