"""Pairs on disk: convscope's own file, checkpoints of a run, and open_clip's format."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from convscope.core.backbone import create_backbone
from convscope.core.data.transforms import Normalize, eval_transform
from convscope.core.errors import UserError
from convscope.core.models import load_backbone
from convscope.core.pairs.model import (
    EXPORT,
    ImageText,
    SharedSpace,
    load_image_text,
    save_image_text,
    write_description,
)
from convscope.core.pairs.open_clip_format import OpenClipPair, export_open_clip, load_open_clip
from convscope.core.pairs.pair import load_pair
from convscope.core.pairs.text_tower import Pooling, TextConfig, TextTower
from convscope.core.pairs.tokenizers import ClipTokenizer, Tokenizer, train_tokenizer

TEXTS = ["a red circle", "something in blue, and so long that it does not fit into the context of this small tower"]


def pair(
    arch: str = "test_resnet", pooling: Pooling = "eos", tokenizer: Tokenizer | None = None, **space: object
) -> ImageText:
    tokenizer = tokenizer or train_tokenizer(["a red circle", "a blue square"], 280, 12)
    backbone = create_backbone(arch, {"drop_path_rate": 0.1} if arch == "test_resnet" else {}, seed=1)
    torch.manual_seed(2)
    text = TextConfig(
        vocab_size=tokenizer.vocab_size,
        context_length=tokenizer.context_length,
        pad=tokenizer.pad,
        eos=tokenizer.eos,
        width=16,
        heads=2,
        layers=2,
        latents=4,
        pooling=pooling,
    )
    return ImageText(backbone, TextTower(text), tokenizer, SharedSpace(embed_dim=8, logit_scale=2.0, **space)).eval()


def vectors(model: ImageText | OpenClipPair) -> torch.Tensor:
    images = torch.randn(2, 3, *model.preprocessing.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.cat([model.encode_image(images), model.encode_text(model.tokenizer(TEXTS))])


@pytest.mark.parametrize(
    ("pooling", "space"), [("eos", {}), ("latent", {"projection": "mlp"}), ("max", {"logit_bias": -10.0})]
)
def test_round_trip(tmp_path: Path, pooling: Pooling, space: dict[str, object]) -> None:
    original = pair(pooling=pooling, **space)
    save_image_text(tmp_path / EXPORT, original)
    for source in (tmp_path / EXPORT, tmp_path):
        loaded, record = load_pair(str(source))
        assert torch.equal(vectors(loaded), vectors(original))
        assert loaded.logit_scale == original.logit_scale
        assert record["weights_hash"] == original.weights_hash()
    assert vectors(original).norm(dim=1).tolist() == pytest.approx([1.0] * 4)


def test_weights_that_two_layers_share(tmp_path: Path) -> None:
    original = pair(pooling="max")
    first, second = original.text.encoder.transformer.resblocks
    second.mlp = first.mlp
    save_image_text(tmp_path / EXPORT, original)
    assert torch.equal(vectors(load_image_text(str(tmp_path))), vectors(original))


def test_checkpoints_of_a_run_that_has_not_ended(tmp_path: Path) -> None:
    original = pair()
    write_description(tmp_path, original)
    (tmp_path / "checkpoints").mkdir()
    torch.save(
        {"model": pair("test_resnet").state_dict(), "ema": original.state_dict()}, tmp_path / "checkpoints/step-1.pt"
    )
    (tmp_path / "checkpoints" / "latest").write_text("step-1.pt\n")
    assert torch.equal(vectors(load_image_text(str(tmp_path))), vectors(original))


def test_files_that_are_no_pair(tmp_path: Path) -> None:
    original = pair()
    save_image_text(tmp_path / "pair.safetensors", original)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no model nowhere"):
        load_image_text("nowhere")
    with pytest.raises(UserError, match="is no run of pretrain clip"):
        load_image_text(str(tmp_path / "empty"))
    weights = load_file(tmp_path / "pair.safetensors")
    save_file(weights, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="has no text tower"):
        load_image_text(str(tmp_path / "bare.safetensors"))
    described = {"image_text": json.dumps(original.describe())}
    broken = {**weights, "logit_scale": torch.tensor(float("nan"))}
    save_file(broken, tmp_path / "nan.safetensors", described)
    with pytest.raises(UserError, match="NaN"):
        load_image_text(str(tmp_path / "nan.safetensors"))
    save_file({k: v for k, v in weights.items() if k != "image_head.weight"}, tmp_path / "less.safetensors", described)
    with pytest.raises(UserError, match="does not fit its own description"):
        load_image_text(str(tmp_path / "less.safetensors"))
    save_file(weights, tmp_path / "odd.safetensors", {"image_text": json.dumps({"image": 3})})
    with pytest.raises(UserError, match="not understood"):
        load_image_text(str(tmp_path / "odd.safetensors"))


@pytest.mark.parametrize("arch", ["test_resnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("kind", ["own", "clip"])
def test_open_clip_loads_the_export(tmp_path: Path, arch: str, kind: str) -> None:
    pytest.importorskip("transformers")
    original = pair(arch, tokenizer=ClipTokenizer(16) if kind == "clip" else None)
    export_open_clip(original, tmp_path / "exported")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'exported'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'exported'}")
    tokens = tokenizer(TEXTS)
    assert torch.equal(tokens, original.tokenizer(TEXTS))
    if kind == "own":
        assert torch.equal(tokenizer(["<eos> red"]), original.tokenizer(["<eos> red"]))
    image = Image.effect_noise((70, 90), 80).convert("RGB")
    theirs = transform(image)[None]
    shown = eval_transform(original.preprocessing)(image)[None]
    if original.preprocessing.crop_pct == 1:
        ours = Normalize(original.preprocessing.mean, original.preprocessing.std)(shown)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(model.eval().encode_image(theirs)), original.encode_image(theirs))
        torch.testing.assert_close(F.normalize(model.encode_text(tokens)), original.encode_text(tokens))
    assert model.logit_scale.item() == 2.0
    torch.testing.assert_close(vectors(load_open_clip(str(tmp_path / "exported"))), vectors(original))


def test_a_sigmoid_pair_keeps_its_bias(tmp_path: Path) -> None:
    export_open_clip(pair(logit_bias=-9.0, tokenizer=ClipTokenizer(16)), tmp_path / "exported")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'exported'}")
    assert model.logit_bias.item() == -9.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling": "mean"}, "eos pooling only, not mean"),
        ({"projection": "mlp"}, "linear projections only"),
        ({"arch": "resnet18_cifar"}, "convscope's own"),
    ],
)
def test_what_the_export_cannot_write(tmp_path: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        export_open_clip(pair(**settings), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        export_open_clip(pair(), tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("ViT-Q-99/openai", "no model 'ViT-Q-99'"), ("RN50", "name weights after a slash"), ("RN50/nowhere.pt", "one of")],
)
def test_models_that_open_clip_has_not(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_pair(f"open_clip:{name}")


def test_the_image_tower_is_a_backbone(tmp_path: Path) -> None:
    original = pair()
    torch.save({"model": original.state_dict()}, tmp_path / "step.pt")
    loaded = load_backbone(str(tmp_path / "step.pt"), arch="test_resnet")
    assert loaded.weights_hash() != create_backbone("test_resnet", seed=5).weights_hash()
    assert torch.equal(
        loaded.model.state_dict()["conv1.0.weight"], original.backbone.model.state_dict()["conv1.0.weight"]
    )
