"""The command line: every command is there, a mistake is one line and exit code 2, and nothing half-written stays."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from convscope.cli import COMMANDS, main
from convscope.core.config import load_yaml
from convscope.ssl.pretrain import presets
from tests.core.training.small_run import FLAGS, make_images, metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 20 images, in train and in test."""
    folder = tmp_path_factory.mktemp("cli")
    images = make_images(folder / "images")
    shutil.copytree(images / "train", images / "test")
    main(["shards", "build", str(images), str(folder / "shards"), "--samples-per-shard", "12"])
    return folder / "shards"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with exit code 2; returns its one line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        *before, line = capsys.readouterr().err.splitlines()
        assert line.startswith("convscope: error: ")
        assert not any("error" in earlier for earlier in before)
        return line

    return run


def spark(data: Path, output: Path, *flags: str) -> list[str]:
    """A tiny run's command line."""
    words = ["pretrain", "spark", "--data", str(data), "--output-dir", str(output), *FLAGS]
    return [*words, "--workers", "0", "--steps", "2", *flags]


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("runs") / "spark"
    main(spark(data, output, "--picture-every", "1"))
    return output


def test_help_lists_every_command_without_torch() -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "convscope", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    for words, command in COMMANDS.items():
        assert f"convscope {' '.join(words)}" in shown.stdout
        assert command.summary in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "timm", "numpy", "tyro", "rich"})


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert not ended.value.code
    assert "--" in capsys.readouterr().out


def test_help_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval"])
    shown = capsys.readouterr().out
    assert "convscope eval linear-probe" in shown
    assert "pretrain" not in shown.split("\n", 1)[1]


def test_unknown_words(fails: Callable[..., str]) -> None:
    assert "no command 'pretrian'; commands: analyze, eval" in fails("pretrian", "spark")
    assert "no command 'eval kn'; eval has: linear-probe, knn" in fails("eval", "kn", "timm:resnet18")


def test_wrong_flags(fails: Callable[..., str], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    said = fails(*spark(data, output, "--mask-ration", "0.5"))
    assert said.startswith("convscope: error: Unrecognized options: --mask-ration, 0.5 ")
    assert said.endswith(" (see convscope pretrain spark --help)")
    assert "--steps" in fails(*spark(data, output, "--steps", "many"))
    assert "--precision" in fails(*spark(data, output, "--precision", "fp8"))
    assert "--output-dir" in fails("pretrain", "spark", "--data", str(data), "--steps", "1")
    assert "exactly one of --epochs, --steps, --samples" in fails(*spark(data, output, "--epochs", "1"))
    assert "--batch-size must be positive" in fails(*spark(data, output, "--batch-size", "0"))
    assert not output.exists()


def test_missing_data(fails: Callable[..., str], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert f"{tmp_path / 'absent'} does not exist" in fails(*spark(tmp_path / "absent", output))
    assert "has no split 'val'; it has test, train" in fails(*spark(data, output, "--split", "val"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "see convscope shards build" in fails(*spark(empty, output))
    assert "absent" in fails("shards", "build", str(tmp_path / "absent"), str(tmp_path / "dest"))
    assert "absent" in fails("shards", "check", str(tmp_path / "absent"))
    assert not output.exists()
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize("with_index", [True, False])
def test_a_truncated_shard(fails: Callable[..., str], data: Path, tmp_path: Path, with_index: bool) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(data, copy)
    shard = copy / "train" / "train-000000.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    if not with_index:  # shards made elsewhere
        for listing in (copy / "train" / "shards.json", shard.with_suffix(".tar.idx"), copy / "train" / ".build.json"):
            listing.unlink()
    said = fails(*spark(copy, tmp_path / "run"))
    assert str(shard) in said
    assert "truncated" in said
    assert str(shard) in fails("eval", "knn", "timm:resnet10t@random", "--data", str(copy), "--no-cache")


def test_a_corrupt_image_is_skipped_counted_and_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(data, copy)
    shard = copy / "train" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[600:700] = bytes(100)  # inside the first image
    shard.write_bytes(content)
    main(spark(copy, tmp_path / "run", "--steps", "3", "--picture-every", "2"))  # the picture wants the first image too
    assert "warning: skipped sample 00000000" in capsys.readouterr().err
    assert '"skipped": 1' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"key": "00000000"' in (tmp_path / "run" / "skipped.jsonl").read_text()


def test_a_checkpoint_of_another_model(fails: Callable[..., str], data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save({f"layer{i}.weight": torch.zeros(2, 2) for i in range(3)}, weights)
    evaluate = ("--data", str(data), "--no-cache")
    assert "--arch" in fails("eval", "knn", str(weights), *evaluate)
    said = fails("eval", "linear-probe", str(weights), "--arch", "resnet18", *evaluate)
    assert str(weights) in said
    assert "conv1.weight" in said
    weights.write_bytes(b"not a checkpoint")
    assert str(weights) in fails("eval", "knn", str(weights), "--arch", "resnet18", *evaluate)
    assert "resnet19" in fails("eval", "knn", "timm:resnet19@random", *evaluate)
    assert "absent" in fails("analyze", "erf", str(tmp_path / "absent"), "--output-dir", str(tmp_path / "erf"))
    assert not (tmp_path / "erf").exists()


def test_a_damaged_checkpoint_of_a_run(fails: Callable[..., str], data: Path, run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "spark"
    shutil.copytree(run_dir, copy)
    checkpoint = next((copy / "checkpoints").glob("step-*.pt"))
    os.truncate(checkpoint, 5000)
    said = fails(*spark(data, copy, "--picture-every", "1"))
    assert str(checkpoint) in said
    (copy / "backbone.safetensors").unlink()  # a run that has not ended has none
    assert str(checkpoint) in fails("eval", "knn", str(copy), "--data", str(data), "--no-cache")


def test_a_start_that_failed_does_not_block_its_folder(fails: Callable[..., str], data: Path, tmp_path: Path) -> None:
    assert "divisible" in fails(*spark(data, tmp_path / "run", "--accumulate", "3"))
    main(spark(data, tmp_path / "run", "--accumulate", "2"))


def test_a_budget_takes_the_place_of_a_saved_one(data: Path, run_dir: Path, tmp_path: Path) -> None:
    words = ["--config", str(run_dir / "config.yaml"), "--output-dir", str(tmp_path / "run"), "--samples", "24"]
    main(["pretrain", "spark", *words])
    train = load_yaml(tmp_path / "run" / "config.yaml")["train"]
    assert (train["samples"], train["steps"], train["epochs"]) == (24, None, None)


def test_a_warm_up_that_does_not_fit_is_shortened(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(spark(data, tmp_path / "run", "--warmup-epochs", "40", "--steps", "20", "--log-every", "1"))
    assert "note: a warm-up of 40 epochs does not fit: shortened to 2 steps" in capsys.readouterr().err
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    assert rates.index(max(rates)) == 2
    assert rates[-1] == pytest.approx(0.001 * max(rates))


def test_a_network_that_cannot_be_masked(fails: Callable[..., str], data: Path, tmp_path: Path) -> None:
    said = fails(*spark(data, tmp_path / "run", "--backbone", "hrnet_w18_small", "--backbone-args", "drop_rate=0"))
    assert "hrnet_w18_small" in said
    assert "resnet51" in fails(*spark(data, tmp_path / "run", "--backbone", "resnet51"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    fails: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    wild = ("--lr", "1e30", "--clip", "None", "--steps", "20", "--checkpoint-every", "1", "--keep-checkpoints", "20")
    said = fails(*spark(data, tmp_path / "run", *wild))
    assert "the loss is" in said or "a weight is" in said
    assert "try a lower --lr" in said
    kept = list((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert kept  # of the warm-up
    for file in kept:
        assert all(weight.isfinite().all() for weight in torch.load(file, weights_only=True)["model"].values())
    assert not (tmp_path / "run" / "backbone.safetensors").exists()


@pytest.mark.parametrize("size", ["48k", "400k"])  # too small for the first lines, and for a checkpoint
def test_a_full_disk(fails: Callable[..., str], data: Path, mount: Callable[[str], Path], size: str) -> None:
    disk = mount(size)
    (disk / "filler").write_bytes(bytes(40_000))
    said = fails(*spark(data, disk / "run"))
    assert str(disk / "run") in said
    assert "No space left on device" in said or "disk full" in said
    assert not list(disk.rglob("*.tmp"))
    assert not list(disk.rglob("*.pt"))


def test_shards_on_a_full_disk(fails: Callable[..., str], data: Path, mount: Callable[[str], Path]) -> None:
    disk = mount("64k")
    said = fails("shards", "build", str(data.parent / "images"), str(disk / "shards"), "--split", "train")
    assert "No space left on device" in said
    assert not list(disk.rglob("*.tar"))
    assert not list(disk.rglob("*.tmp"))


def test_the_saved_config_starts_the_same_run(data: Path, run_dir: Path, tmp_path: Path) -> None:
    config = run_dir / "config.yaml"
    main(["pretrain", "spark", "--config", str(config), "--output-dir", str(tmp_path / "again"), "--seed", "1"])
    before, after = load_yaml(config), load_yaml(tmp_path / "again" / "config.yaml")
    assert after["train"].pop("seed") == 1
    assert before["train"].pop("seed") == 0
    assert after.pop("output_dir") != before.pop("output_dir")
    assert after == before


def test_a_config_with_an_unknown_key(fails: Callable[..., str], run_dir: Path, tmp_path: Path) -> None:
    values = load_yaml(run_dir / "config.yaml")
    values["objective"]["mask_ration"] = 0.5
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    said = fails("pretrain", "spark", "--config", str(tmp_path / "config.yaml"))
    assert "unknown key mask_ration" in said
    assert "absent.yaml" in fails("pretrain", "spark", "--config", str(tmp_path / "absent.yaml"))
    assert "--config needs a value" in fails("pretrain", "spark", "--config")


def test_a_run_leaves_the_files_of_the_contract(run_dir: Path) -> None:
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert names == {
        ".lock",
        "attempts/0001.json",
        "backbone.safetensors",
        "checkpoints/latest",
        "checkpoints/step-00000002.pt",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "pictures/step-00000001.png",
        "pictures/step-00000002.png",
    }


# Tian et al. 2023, table of pretraining settings, and the published code's defaults.
OFFICIAL = {
    "objective": {"mask_ratio": 0.6, "decoder": "unet", "decoder_width": 768, "size": 224, "crop_scale": [0.67, 1.0]},
    "optimization": {
        "optimizer": "lamb",
        "lr": 2e-4,
        "betas": [0.9, 0.95],
        "eps": 1e-6,
        "weight_decay": 0.04,
        "weight_decay_end": 0.2,
        "clip": 5.0,
        "warmup_epochs": 40.0,
        "warmup_start": 0.005,
        "lr_end": 0.001,
    },
    "train": {"epochs": 1600.0, "batch_size": 4096},
}
DROP_PATH = {
    "resnet50": 0.05,
    "resnet101": 0.08,
    "resnet152": 0.1,
    "resnet200": 0.15,
    "convnext_small": 0.2,
    "convnext_base": 0.3,
    "convnext_large": 0.4,
}


def resolved(monkeypatch: pytest.MonkeyPatch, *flags: str, objective: str = "spark") -> Mapping[str, Any]:
    """The settings that a command line comes to."""
    from convscope.core.config import to_dict

    taken = []
    module = "clip_command" if objective == "clip" else "commands"
    monkeypatch.setattr(f"convscope.ssl.{module}.run", taken.append)
    main(["pretrain", objective, "--data", "d", "--output-dir", "o", *flags])
    return to_dict(taken[0])


@pytest.mark.parametrize("backbone", DROP_PATH)
def test_official_preset_is_the_published_recipe(monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    values = resolved(monkeypatch, "--preset", "official", "--backbone", backbone)
    expected = {**OFFICIAL["optimization"], "betas": [0.9, 0.999 if "convnext" in backbone else 0.95]}
    assert values["drop_path"] == DROP_PATH[backbone]
    for group, wanted in {**OFFICIAL, "optimization": expected}.items():
        assert {key: values[group][key] for key in wanted} == wanted


def test_own_flags_win_over_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    values = resolved(monkeypatch, "--preset=official", "--lr", "0.5", "--backbone=resnet101", "--mask-ratio", "0.3")
    assert (values["optimization"]["lr"], values["objective"]["mask_ratio"]) == (0.5, 0.3)
    assert values["drop_path"] == DROP_PATH["resnet101"]


@pytest.mark.parametrize(("objective", "name"), [(kind, name) for kind, named in presets().items() for name in named])
def test_every_preset_is_valid(monkeypatch: pytest.MonkeyPatch, objective: str, name: str) -> None:
    flags = presets()[objective][name]["flags"]
    budget = [] if "epochs" in flags else ["--epochs", "1"]
    budget += ["--text-encoder", "folder"] if name == "convirt" else []
    values = resolved(monkeypatch, "--preset", name, *budget, objective=objective)
    flat = {**values, **values["objective"], **values["optimization"], **values["train"]}
    flat |= values["objective"].get("photometric", {})
    for key, value in flags.items():
        assert flat[key] == (None if value == "None" else value)


def test_presets_that_do_not_fit(fails: Callable[..., str], data: Path, tmp_path: Path) -> None:
    assert "no preset 'offical'; presets of spark: official" in fails(*spark(data, tmp_path, "--preset", "offical"))
    said = fails(*spark(data, tmp_path, "--preset", "official"))
    assert "published for resnet50" in said
    assert "not for resnet18_cifar" in said
    assert "no presets" in fails("eval", "retrieval", "timm:resnet18", "--data", str(data), "--preset", "x")


def test_the_shell_line_of_the_readme(data: Path, run_dir: Path, tmp_path: Path) -> None:
    """`eval` is a word of the shell; the alias makes `eval linear-probe CKPT` work as typed."""
    scripts = Path(sys.executable).parent
    if not (scripts / "linear-probe").exists():
        pytest.skip("the console scripts are not installed beside this Python")
    line = f"eval linear-probe {run_dir} --data {data} --epochs 2 --min-steps 2 --workers 0 --no-cache"
    line += f" --output {tmp_path / 'probe.json'}"
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout
    assert (tmp_path / "probe.json").exists()


def test_a_closed_pipe_is_no_error() -> None:
    scripts = [sys.executable, "-m", "convscope", "--help"]
    shown = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", *scripts], capture_output=True, text=True
    )
    assert shown.stderr == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from convscope.core.errors import UserError

    with pytest.raises(UserError, match="absent"):
        main(["shards", "check", str(tmp_path / "absent"), "--debug"])


def test_interrupt_is_one_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("convscope.cli._dispatch", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["quickstart"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
