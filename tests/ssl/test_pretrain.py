"""Rotation and contrastive runs from the command line: what they leave, how they resume, what they refuse."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from convscope.cli import main
from convscope.core.data.shapes import cached
from convscope.core.models import load_backbone
from convscope.core.pairs.model import load_image_text
from convscope.core.results import load_result
from convscope.ssl.pretrain import presets
from tests.core.data.tars import write_tar
from tests.core.layouts import RESNET, dino_full, network
from tests.core.pairs.small_bert import save_bert
from tests.core.training.test_resume import run_until_step

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 50, 210), "yellow": (220, 210, 40)}
NETWORK = ("--backbone", "resnet18_cifar", "--backbone-args", "channels=4,8,8,16", "--size", "16", "--device", "cpu")
CLIP = ("--embed-dim", "8", "--text-width", "16", "--text-heads", "2", "--text-layers", "1", "--vocab-size", "270")
RUN = ("--batch-size", "16", "--workers", "0", "--log-every", "5", "--checkpoint-every", "5", "--context-length", "12")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noisy images of four colours whose captions name it; train and test."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 16)):
        members = []
        for i in range(count):
            name = list(COLOURS)[i % 4]
            pixels = np.clip(rng.normal(COLOURS[name], 30, (20, 20, 3)), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            members.append((f"{i:03d}.png", file.getvalue()))
            members.append((f"{i:03d}.txt", f"{'a photo of a ' if i % 3 else ''}{name}.".encode()))
            members.append((f"{i:03d}.cls", str(i % 4).encode()))
        write_tar(folder / split / f"{split}-000000.tar", members)
    (folder / "classes.json").write_text(json.dumps(list(COLOURS)))
    return str(folder)


def command(objective: str, data: str, output: Path, *flags: str) -> list[str]:
    words = ["pretrain", objective, "--data", data, "--output-dir", str(output), *NETWORK]
    return [sys.executable, "-m", "convscope", *words, *flags]


def clip(data: str, output: Path, *flags: str) -> list[str]:
    return command("clip", data, output, *CLIP, *RUN, *flags)


def finish(words: list[str], code: int = 0) -> str:
    """Run a command line in this process; what it says."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main(words[words.index("pretrain") :])
        found = 0
    except SystemExit as exit_:
        found = exit_.code
    assert found == code, said.getvalue()
    return said.getvalue()


def metrics(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "attempt")} for line in lines]


def test_a_contrastive_run_learns_resumes_and_loads(data: str, tmp_path: Path) -> None:
    flags = ("--steps", "40", "--lr", "0.05", "--eval-every", "20")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(clip(data, whole, *flags))
    looks = [line for line in metrics(whole) if "eval/zero_shot_top1" in line]
    assert [line["step"] for line in looks] == [20, 40]
    assert looks[-1]["eval/zero_shot_top1"] > 0.7  # four classes
    assert looks[-1]["eval/text_to_image_recall@5"] > 0.8  # four images of a colour
    assert {"accuracy", "logit_scale", "loss"} <= metrics(whole)[0].keys()

    assert run_until_step(clip(data, killed, *flags), killed, 12, signal.SIGKILL) == -signal.SIGKILL
    before = json.loads((killed / "image_text.json").read_text())
    load_image_text(str(killed))  # in the middle of the run
    assert "continuing at step" in finish(clip(data, killed, *flags))
    assert json.loads((killed / "image_text.json").read_text()) == before
    assert metrics(killed) == metrics(whole)
    ends = [load_file(run / "image_text.safetensors") for run in (whole, killed)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

    pair, backbone = load_image_text(str(whole)), load_backbone(str(whole))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(pair.backbone(images), backbone.eval()(images))
    assert backbone.preprocessing.crop_pct == 1.0


def test_parts_of_a_step_are_the_whole_step(data: str, tmp_path: Path) -> None:
    """Normalisation over single images, so that parts see what the whole sees."""
    convnext = ("--backbone", "convnext_atto", "--backbone-args", "depths=1,1,1,1", "dims=4,8,8,16", "--size", "32")
    found = []
    for parts in ("1", "4"):
        output = tmp_path / parts
        finish(
            clip(
                data,
                output,
                "--steps",
                "5",
                "--accumulate",
                parts,
                "--eval-every",
                "0",
                "--optimizer",
                "sgd",
                *convnext,
            )
        )
        found.append((metrics(output), load_file(output / "image_text.safetensors")))
    (lines, weights), (lines_of_parts, weights_of_parts) = found
    assert lines_of_parts[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    for key, value in weights.items():
        torch.testing.assert_close(weights_of_parts[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_rotation_run(data: str, tmp_path: Path) -> None:
    flags = ("--batch-size", "8", "--steps", "6", "--workers", "0", "--log-every", "2", "--checkpoint-every", "3")
    colour = ("--jitter", "0.8", "--grey", "0.2", "--blur", "0.5", "--crop-scale", "0.5", "1", "--milestones", "0.25")
    colour += ("--accumulate", "2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(command("rotation", data, whole, *flags, *colour))
    assert run_until_step(command("rotation", data, killed, *flags, *colour), killed, 4, signal.SIGKILL) < 0
    finish(command("rotation", data, killed, *flags, *colour))
    assert metrics(killed) == metrics(whole)
    rates = [line["lr"] for line in metrics(whole)]
    assert rates[-1] == pytest.approx(0.1 * rates[0])
    assert 0 <= metrics(whole)[-1]["accuracy"] <= 1
    plain = tmp_path / "plain"
    finish(command("rotation", data, plain, *flags))
    assert metrics(plain)[0]["loss"] != metrics(whole)[0]["loss"]  # colours did change


def test_starting_from_other_weights(data: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ("--batch-size", "8", "--steps", "2", "--workers", "0")
    finish(command("rotation", data, first, *flags))
    words = [sys.executable, "-m", "convscope", "pretrain", "clip", "--data", data, "--output-dir", str(second)]
    words += [*CLIP, *RUN, "--size", "16", "--steps", "2", "--init", str(first), "--lock-image", "--eval-every", "0"]
    finish(words)
    assert load_backbone(str(second)).weights_hash() == load_backbone(str(first)).weights_hash()
    config = (second / "config.yaml").read_text()
    assert "backbone: resnet18_cifar" in config
    finish(words)  # the same command, with the architecture that it found
    said = finish([*words, "--backbone", "resnet50"], code=2)
    assert "holds a resnet18_cifar, not a resnet50" in said


def test_starting_from_a_checkpoint_of_others(data: str, tmp_path: Path) -> None:
    source = network("resnet50", **RESNET)
    torch.save(dino_full(dict(source.state_dict())), tmp_path / "dino.pth")
    output = tmp_path / "run"
    words = ["pretrain", "rotation", "--data", data, "--output-dir", str(output), "--init", str(tmp_path / "dino.pth")]
    words += ["--backbone", "resnet50", "--backbone-args", "layers=1,1,1,1", "channels=4,8,16,32", "--size", "16"]
    finish([*words, "--batch-size", "8", "--steps", "1", "--workers", "0", "--lr", "1e-9", "--device", "cpu"])
    weights = {key: value for key, value in source.state_dict().items() if key.endswith("weight")}
    finished, checkpoint = load_backbone(str(output)), load_backbone(str(output / "checkpoints" / "step-00000001.pt"))
    for backbone in (finished, checkpoint):
        found = backbone.model.state_dict()
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value)
        assert (backbone.preprocessing.crop_pct, backbone.preprocessing.size) == (0.875, (16, 16))  # DINO's


def test_captions_of_class_names(data: str, tmp_path: Path) -> None:
    finish(clip(data, tmp_path / "run", "--steps", "5", "--class-captions"))
    last = metrics(tmp_path / "run")[-1]
    assert "eval/zero_shot_top1" in last
    assert "eval/image_to_text_recall@1" not in last


def test_samples_without_a_caption_are_counted(data: str, tmp_path: Path) -> None:
    shard = Path(data) / "test" / "test-000000.tar"
    finish(clip(str(shard), tmp_path / "run", "--steps", "2", "--eval-every", "0"))
    said = finish(clip(str(shard), tmp_path / "other", "--steps", "2", "--caption-field", "nothing"), code=2)
    assert "has no captions: no member or json field nothing" in said


def test_without_held_out_pairs_it_says_so(data: str, tmp_path: Path) -> None:
    said = finish(clip(f"{data}/train", tmp_path / "run", "--steps", "1"))
    assert "note: no held-out pairs to look at" in said


def few(data: str, folder: Path, keep: Callable[[str], bool]) -> str:
    """The same data, whose test split has only some of its members."""
    shutil.copytree(data, folder)
    tar = folder / "test" / "test-000000.tar"
    with tarfile.open(tar) as whole:
        members = [(one.name, whole.extractfile(one).read()) for one in whole if keep(one.name)]
    tar.with_name(f"{tar.name}.idx").unlink(missing_ok=True)
    write_tar(tar, members)
    return str(folder)


def test_held_out_pairs_without_captions(data: str, tmp_path: Path) -> None:
    bare = few(data, tmp_path / "data", lambda name: not name.endswith(".txt"))
    said = finish(clip(bare, tmp_path / "run", "--steps", "2"))
    assert f"note: no retrieval while training: split test of {bare} has no captions" in said
    last = metrics(tmp_path / "run")[-1]
    assert "eval/zero_shot_top1" in last
    assert "eval/image_to_text_recall@1" not in last


def test_held_out_pairs_that_cannot_be_read_are_left_out(data: str, tmp_path: Path) -> None:
    """One without an image, one without a caption; more steps between two looks is no other run."""
    broken = few(data, tmp_path / "data", lambda name: name not in ("003.png", "005.txt"))
    said = finish(clip(broken, tmp_path / "run", "--steps", "4", "--eval-every", "4"))
    assert "note: 2 of 16 held-out pairs are left out" in said
    assert "eval/image_to_text_recall@1" in metrics(tmp_path / "run")[-1]
    finish(clip(broken, tmp_path / "run", "--steps", "4", "--eval-every", "2", "--eval-pairs", "8"))
    nothing = few(data, tmp_path / "nothing", lambda name: name.endswith(".png"))
    said = finish(clip(nothing, tmp_path / "other", "--steps", "1"))
    assert "note: no held-out pairs to look at while training (split test of" in said


def test_a_transformer_at_another_size(data: str, tmp_path: Path) -> None:
    vit = ("--backbone", "vit_tiny_patch16_224", "--backbone-args", "depth=1", "embed_dim=16", "num_heads=2")
    flags = (*vit, "--batch-size", "8", "--workers", "0", "--device", "cpu", "--steps", "2")
    words = ["pretrain", "rotation", "--data", data, *flags]
    said = finish([*words, "--size", "32", "--output-dir", str(tmp_path / "run")])
    assert "evaluate with --layers all" in said
    for source in (tmp_path / "run", *(tmp_path / "run" / "checkpoints").glob("*.pt")):
        loaded = load_backbone(str(source))
        assert loaded.preprocessing.size == (32, 32)
        assert loaded(torch.zeros(1, 3, 32, 32)).shape == (1, loaded.num_features)
    larger = [*words, "--size", "48", "--output-dir", str(tmp_path / "larger")]
    finish([*larger, "--init", str(tmp_path / "run"), "--lr", "1e-9"])
    finish([*larger, "--init", str(tmp_path / "run"), "--lr", "1e-9"])  # the same command, at its end
    before, after = (load_backbone(str(tmp_path / name)).model.state_dict() for name in ("run", "larger"))
    assert (before["pos_embed"].shape[1], after["pos_embed"].shape[1]) == (1 + 2 * 2, 1 + 3 * 3)
    torch.testing.assert_close(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])
    said = finish([*words, "--size", "8", "--output-dir", str(tmp_path / "odd")], code=2)
    assert "vit_tiny_patch16_224 does not take images of 8 x 8 px" in said


TINY = {
    "openclip": ("--text-width", "16", "--text-heads", "2", "--text-layers", "1", "--warmup-steps", "0"),
    "convirt": ("--freeze-text-layers", "1"),
}


@pytest.mark.parametrize(
    ("objective", "name"), [(kind, name) for kind in ("rotation", "clip") for name in presets()[kind]]
)
def test_a_step_of_every_preset(data: str, tmp_path: Path, objective: str, name: str) -> None:
    """With a network of a few thousand weights in place of the published one."""
    small = [*TINY.get(name, ()), "--batch-size", "8", "--steps", "1", "--workers", "0"]
    if name == "convirt":
        said = finish(command(objective, data, tmp_path / "run", "--preset", name, "--steps", "1"), code=2)
        assert "--text-encoder" in said
        small += ["--text-encoder", str(save_bert(tmp_path / "bert"))]
    finish(command(objective, data, tmp_path / "run", "--preset", name, *small))
    assert metrics(tmp_path / "run")[0]["loss"] > 0


def test_an_image_tower_locked_at_random_is_refused(data: str, tmp_path: Path) -> None:
    said = finish(clip(data, tmp_path / "run", "--steps", "1", "--lock-image"), code=2)
    assert "name weights with --init" in said


def test_two_processes_with_the_sigmoid_loss(data: str, tmp_path: Path) -> None:
    """A run of two processes, each step in parts, is the run of one; no BatchNorm, so parts see what the whole sees."""
    convnext = ("--backbone", "convnext_atto", "--backbone-args", "depths=1,1,1,1", "dims=4,8,8,16", "--size", "32")
    flags = ("--loss", "siglip", "--steps", "3", "--log-every", "1", "--eval-every", "0", *convnext)
    one, two = tmp_path / "one", tmp_path / "two"
    finish(clip(data, one, *flags))
    python, *words = clip(data, two, *flags, "--accumulate", "2")
    group = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    done = subprocess.run(group, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for ours, expected in zip(metrics(two), metrics(one), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["logit_bias"] == pytest.approx(expected["logit_bias"], rel=1e-5)
    weights, expected = (load_file(run / "image_text.safetensors") for run in (two, one))
    torch.testing.assert_close(weights["image_head.weight"], expected["image_head.weight"], rtol=1e-3, atol=1e-5)


def test_the_exported_pair_gives_the_same_figure(data: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run, folder, figures = tmp_path / "run", tmp_path / "exported", []
    network = ("--backbone", "test_resnet", "--size", "32", "--device", "cpu", "--steps", "8", "--eval-every", "0")
    finish(["pretrain", "clip", "--data", data, "--output-dir", str(run), *network, *CLIP, *RUN])
    main(["export", "open-clip", str(run), "--output", str(folder)])
    for i, model in enumerate((str(run), f"open_clip:{folder}")):
        output = tmp_path / f"{i}.json"
        main(["eval", "zero-shot", model, "--data", data, "--workers", "0", "--output", str(output)])
        figures.append(load_result(output).figures)
    assert figures[0] == figures[1]


def test_shapes_find_their_captions_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small `builtin:shapes`; held-out pairs find one another far above chance."""
    monkeypatch.setenv("CONVSCOPE_CACHE", str(tmp_path / "cache"))
    shapes = str(cached(n_train=512, n_test=128, size=32))
    network = ("--backbone", "resnet18_cifar", "--backbone-args", "layers=1,1,1,1", "channels=16,32,32,32")
    text = ("--embed-dim", "32", "--text-width", "32", "--text-heads", "2", "--text-layers", "1", "--vocab-size", "300")
    flags = ("--size", "16", "--context-length", "16", "--batch-size", "16", "--lr", "0.04", "--warmup-epochs", "0.5")
    budget = ("--epochs", "6", "--eval-every", "1000", "--workers", "0", "--device", "cpu")
    words = ["pretrain", "clip", "--data", shapes, "--output-dir", str(tmp_path / "run")]
    finish([*words, *network, *text, *flags, *budget])
    last = metrics(tmp_path / "run")[-1]
    for direction in ("image_to_text", "text_to_image"):
        assert last[f"eval/{direction}_recall@10"] > 2.5 * 10 / 128
