"""Losses against loops over all pairs and open_clip's; several processes against one; parts against the whole."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.core import distributed
from convscope.core.errors import UserError
from convscope.ssl.contrastive import sigmoid_loss, softmax_loss
from convscope.ssl.objectives.clip import Clip
from tests.processes import run_on
from tests.ssl.small_pairs import batch, objective

CPU = torch.device("cpu")
SCALE, BIAS = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
LOSSES: dict[str, dict[str, Any]] = {
    "clip": {"loss": "clip"},
    "siglip": {"loss": "siglip"},
    "convirt": {"loss": "convirt", "projection": "mlp", "text_pooling": "max", "learn_temperature": True},
}


def vectors(seed: int, count: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 5, dtype=torch.float64, generator=generator), dim=1)


def slow_softmax(image: list[list[float]], text: list[list[float]], scale: float, weight: float) -> float:
    def direction(queries: list[list[float]], targets: list[list[float]]) -> float:
        total = 0.0
        for i, query in enumerate(queries):
            logits = [scale * sum(a * b for a, b in zip(query, target)) for target in targets]
            total += math.log(sum(math.exp(logit) for logit in logits)) - logits[i]
        return total / len(queries)

    return weight * direction(image, text) + (1 - weight) * direction(text, image)


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.75, 1.0])
def test_softmax_loss_against_a_loop(weight: float) -> None:
    image, text = vectors(0), vectors(1)
    found, _ = softmax_loss(image, text, SCALE, weight)
    assert float(found) == pytest.approx(slow_softmax(image.tolist(), text.tolist(), float(SCALE), weight), rel=1e-12)


def test_equal_weights_are_open_clips_loss() -> None:
    image, text = vectors(0), vectors(1)
    found, accuracy = softmax_loss(image, text, SCALE)
    torch.testing.assert_close(found, open_clip.ClipLoss()(image, text, SCALE), rtol=1e-12, atol=0)
    nearest = [max(range(9), key=lambda j, i=i: float(image[i] @ text[j])) for i in range(9)]
    assert float(accuracy) == pytest.approx(sum(i == j for i, j in enumerate(nearest)) / 9)


def test_sigmoid_loss_against_a_loop() -> None:
    image, text = vectors(0), vectors(1)
    total = 0.0
    for i in range(9):
        for j in range(9):
            logit = float(SCALE * (image[i] @ text[j]) + BIAS)
            total += math.log1p(math.exp(-logit if i == j else logit))
    found = sigmoid_loss(image, text, SCALE, BIAS)
    assert float(found) == pytest.approx(total / 9, rel=1e-12)
    torch.testing.assert_close(found, open_clip.loss.SigLipLoss()(image, text, SCALE, BIAS), rtol=1e-12, atol=0)


def gradients(module: Clip) -> dict[str, Tensor]:
    return {name: one.grad for name, one in module.named_parameters() if one.grad is not None}


PARTS = (1, 2)


def steps(rank: int, world: int, count: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Loss and gradients of each objective on this process's share of a batch, whole and in parts."""
    found = {}
    share = count // world
    for name, parts in product(LOSSES, PARTS):
        module = objective(**LOSSES[name])
        module.takes_whole_batch(parts)
        mine = {key: value[rank * share : (rank + 1) * share] for key, value in batch(count).items()}
        wrapped = distributed.wrap(module, CPU)
        out = wrapped(mine)
        out.loss.backward()
        means = distributed.mean_over_ranks({"loss": out.loss})
        found[name, parts] = {"loss": means["loss"], "gradients": gradients(module)}
    return found


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_equal_one_with_the_joined_batch(tmp_path: Path, world: int) -> None:
    results = run_on(world, steps, tmp_path, world, 8)
    for name, settings in LOSSES.items():
        module = objective(**settings)
        loss = module(batch(8)).loss
        loss.backward()
        expected = gradients(module)
        assert {"logit_scale", "backbone.model.stem.0.weight", "text.encoder.token_embedding.weight"} <= expected.keys()
        assert ("logit_bias" in expected) == (name == "siglip")
        assert all(float(gradient.abs().max()) > 0 for gradient in expected.values())
        for found, parts in product(results, PARTS):
            assert found[name, parts]["loss"] == pytest.approx(loss.item(), rel=1e-12)
            assert found[name, parts]["gradients"].keys() == expected.keys()
            for key, gradient in expected.items():
                torch.testing.assert_close(
                    found[name, parts]["gradients"][key],
                    gradient,
                    rtol=1e-9,
                    atol=1e-14,
                    msg=lambda said, where=(name, parts, key): f"{where}: {said}",
                )


def uneven(rank: int) -> list[str]:
    said, module = [], objective()
    for lengths in ([3, 4], [4, 4], [2, 2], [4, 2]):
        try:
            module(batch(lengths[rank]))
        except UserError as error:
            said.append(str(error))
    return said


def test_batches_of_different_lengths_are_refused(tmp_path: Path) -> None:
    for said in run_on(2, uneven, tmp_path):
        assert said == [
            "a contrastive batch needs as many pairs on every process, got [3, 4]",
            "a contrastive batch needs as many pairs on every process, got [4, 2]",
        ]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_give_the_gradients_of_the_whole(name: str, parts: int) -> None:
    whole, cached = objective(**LOSSES[name]), objective(**LOSSES[name])
    assert cached.takes_whole_batch(parts)
    losses = [one(batch(8)).loss for one in (whole, cached)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    expected = gradients(whole)
    assert gradients(cached).keys() == expected.keys()
    for key, gradient in gradients(cached).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-14, msg=key)


def test_the_second_pass_repeats_draws_and_leaves_statistics_alone() -> None:
    """BatchNorm and stochastic depth: as if every part had gone through once, with its activations kept."""
    found = []
    for cached in (True, False):
        module = objective("resnet18", drop_path=0.5)
        module.takes_whole_batch(2)
        torch.manual_seed(5)
        if cached:
            loss = module(batch(8)).loss
        else:
            image, text = (
                torch.cat([encode(part) for part in inputs.chunk(2)])
                for encode, inputs in zip((module.encode_image, module.encode_text), batch(8).values())
            )
            loss, _ = softmax_loss(image, text, module.logit_scale.exp())
        loss.backward()
        found.append((gradients(module), dict(module.named_buffers())))
    for ours, reference in zip(*found):
        assert ours.keys() == reference.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, reference[key], rtol=1e-10, atol=1e-14, msg=key)
    assert int(found[0][1]["backbone.model.bn1.num_batches_tracked"]) == 2


def test_only_vectors_outlive_a_part() -> None:
    """What is saved for backward shrinks with the parts."""
    saved, pairs = [], batch(8)
    for parts in (1, 8):
        module = objective()
        module.takes_whole_batch(parts)
        alive: dict[int, int] = {}
        inputs = {one.untyped_storage().data_ptr() for one in (*module.parameters(), *pairs.values())}

        def keep(tensor: Tensor, alive: dict[int, int] = alive, inputs: set[int] = inputs) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs:
                alive[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(pairs)
        saved.append(sum(alive.values()))
    assert saved[1] < saved[0] / 10


def test_a_locked_tower_stays_as_it_is() -> None:
    module = objective("resnet18", lock_image=True).train()
    before = {key: value.clone() for key, value in module.backbone.state_dict().items()}
    module(batch(8)).loss.backward()
    assert not [name for name in gradients(module) if name.startswith("backbone.")]
    assert "image_head.weight" in gradients(module)
    assert all(torch.equal(value, before[key]) for key, value in module.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "temperature", "learned"), [("clip", 0.07, True), ("siglip", 0.1, True), ("convirt", 0.1, False)]
)
def test_published_temperatures(loss: str, temperature: float, learned: bool) -> None:
    module = objective(loss=loss)
    assert float(module.logit_scale.exp()) == pytest.approx(1 / temperature)
    assert module.logit_scale.requires_grad == learned
    assert (float(module.logit_bias) if module.logit_bias is not None else None) == (
        -10.0 if loss == "siglip" else None
    )
    assert module.image_weight == (0.75 if loss == "convirt" else 0.5)


def test_a_fixed_temperature_may_be_any() -> None:
    assert float(objective(temperature=0.005, learn_temperature=False).logit_scale.detach().exp()) == pytest.approx(200)


def test_the_temperature_stays_in_its_range() -> None:
    module = objective()
    for value, kept in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        with torch.no_grad():
            module.logit_scale.fill_(value)
        module.after_update()
        assert float(module.logit_scale) == pytest.approx(kept)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": 0.005}, "learned --temperature stays between 0.01 and 1, got 0.005"),
        ({"loss": "convirt", "learn_temperature": True, "temperature": 2.0}, "--temperature"),
        ({"loss": "siglip", "image_weight": 0.75}, "no meaning for siglip"),
        ({"image_weight": 1.5}, "--image-weight"),
        ({"embed_dim": 0}, "--embed-dim"),
        ({"text_width": 10, "text_heads": 4}, "not divisible"),
        ({"freeze_text_layers": 3}, "has 2 layers: 3 cannot be frozen; .*--text-encoder"),
        ({"text_encoder": Path("nowhere")}, "nowhere holds no Hugging Face encoder"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        objective(**settings)


def test_frozen_text_layers() -> None:
    for layers, prefixes in ((0, ()), (1, ("token", "positional", "transformer.resblocks.0."))):
        module = objective(freeze_text_layers=layers)
        for name, parameter in module.text.encoder.named_parameters():
            assert parameter.requires_grad != name.startswith(prefixes) if prefixes else parameter.requires_grad, name
