"""Zero-shot classification against open_clip's own classifier, and image-text retrieval against a loop."""

import json
from pathlib import Path

import open_clip
import pytest
import torch

from convscope.core.data.shard_set import open_shards
from convscope.core.data.stream import eval_batches
from convscope.core.data.subset import read_labels
from convscope.core.data.transforms import Normalize, eval_transform
from convscope.core.errors import UserError
from convscope.core.pairs.embed import embed_classes
from convscope.core.pairs.model import ImageText, save_image_text
from convscope.core.pairs.prompts import template_list
from convscope.core.results import load_result
from convscope.eval.image_text import over_images
from convscope.eval.retrieval import RetrievalCommand
from convscope.eval.retrieval import run as run_retrieval
from convscope.eval.zero_shot import ZeroShotCommand, run
from tests.core.data.tars import png, write_tar
from tests.core.pairs.test_model import pair

NAMES = ["red fox", "green frog", "blue whale"]
CAPTIONS = [["a red fox", "it is red"], ["a green frog"], ["a blue whale", "deep sea"], ["a green frog"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve images with a label, and one or two captions; some captions are the same words."""
    folder = tmp_path_factory.mktemp("pairs")
    members = []
    for i in range(12):
        members += [(f"{i:02d}.png", png(9 * i)), (f"{i:02d}.cls", str(i % 3).encode())]
        members.append((f"{i:02d}.json", json.dumps({"captions": CAPTIONS[i % 4]}).encode()))
    write_tar(folder / "test" / "test-000000.tar", members)
    (folder / "classes.json").write_text(json.dumps(NAMES))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ImageText]:
    original = pair()
    file = tmp_path_factory.mktemp("model") / "pair.safetensors"
    save_image_text(file, original)
    return str(file), original


def images(model: ImageText, data: str) -> torch.Tensor:
    """Vectors, an image at a time."""
    found = []
    normalize = Normalize(model.preprocessing.mean, model.preprocessing.std)
    for batch in eval_batches(open_shards(data, "test"), eval_transform(model.preprocessing), batch_size=1):
        with torch.no_grad():
            found.append(model.encode_image(normalize(batch["image"])))
    return torch.cat(found)


def test_open_clips_classifier(model: tuple[str, ImageText]) -> None:
    class Wrapped(torch.nn.Module):
        def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            return model[1].encode_text(tokens)

    templates = template_list("imagenet")
    assert len(templates) == 80
    theirs = open_clip.build_zero_shot_classifier(
        Wrapped(), model[1].tokenizer, NAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    torch.testing.assert_close(embed_classes(model[1], NAMES, templates), theirs.T, rtol=1e-5, atol=1e-6)


def test_command(model: tuple[str, ImageText], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "zero-shot.json"
    run(ZeroShotCommand(model=model[0], data=data, templates="simple", workers=0, batch_size=5, output=output))
    result = load_result(output)
    classes = embed_classes(model[1], NAMES, ["a photo of a {}."])
    predicted = (images(model[1], data) @ classes.T).argmax(1)
    labels = torch.from_numpy(read_labels(open_shards(data, "test")))
    assert result.figures["top1"].value == pytest.approx(float((predicted == labels).float().mean()))
    assert result.details["classes"] == NAMES
    assert result.figures["top1"].n == 12
    assert "top1" in capsys.readouterr().out


def test_files_of_names_and_templates(model: tuple[str, ImageText], data: str, tmp_path: Path) -> None:
    names, templates, output = tmp_path / "names.txt", tmp_path / "templates.txt", tmp_path / "result.json"
    names.write_text("\n".join(NAMES) + "\n")
    templates.write_text("a {}\n\nthe {}\n")
    command = {"model": model[0], "data": data, "workers": 0, "output": output}
    run(ZeroShotCommand(**command, classes=str(names), templates=str(templates)))
    assert load_result(output).details["templates"] == ["a {}", "the {}"]
    names.write_text("only\ntwo")
    with pytest.raises(UserError, match="labels go from 0 to 2, but 2 classes have names"):
        run(ZeroShotCommand(**command, classes=str(names)))
    templates.write_text("no place for it")
    with pytest.raises(UserError, match=r"has no \{\}"):
        run(ZeroShotCommand(**command, templates=str(templates)))
    names.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        run(ZeroShotCommand(**command, classes=str(names)))


def test_shards_without_names(model: tuple[str, ImageText], tmp_path: Path) -> None:
    write_tar(tmp_path / "test" / "a.tar", [("1.png", png(1)), ("1.cls", b"0")])
    with pytest.raises(UserError, match="names no classes"):
        run(ZeroShotCommand(model=model[0], data=str(tmp_path)))


def test_image_text_retrieval(model: tuple[str, ImageText], data: str, tmp_path: Path) -> None:
    output = tmp_path / "retrieval.json"
    run_retrieval(
        RetrievalCommand(model=model[0], data=data, mode="image-text", recall_at=(1, 3), workers=0, output=output)
    )
    figures = load_result(output).figures
    captions = [caption for i in range(12) for caption in CAPTIONS[i % 4]]
    owner = [i for i in range(12) for _ in CAPTIONS[i % 4]]
    shown = images(model[1], data)
    words = sorted(set(captions))
    with torch.no_grad():
        written = model[1].encode_text(model[1].tokenizer(words))
    similarity = [[float(image @ written[words.index(caption)]) for caption in captions] for image in shown]

    def chance(scores: list[float], right: list[bool], k: int) -> float:
        """Over every order of equals, one right answer among the first k; here all right ones of a query differ."""
        best = max(score for score, good in zip(scores, right) if good)
        ahead = sum(score > best + 1e-7 for score in scores)
        ties = sum(abs(score - best) <= 1e-7 and not good for score, good in zip(scores, right))
        return min(max((k - ahead) / (ties + 1), 0.0), 1.0)

    for k in (1, 3):
        to_text = [chance(similarity[i], [o == i for o in owner], k) for i in range(12)]
        to_image = [
            chance([similarity[i][m] for i in range(12)], [i == owner[m] for i in range(12)], k)
            for m in range(len(owner))
        ]
        assert figures[f"image-to-text recall@{k}"].value == pytest.approx(sum(to_text) / 12, abs=1e-6)
        assert figures[f"text-to-image recall@{k}"].value == pytest.approx(sum(to_image) / len(owner), abs=1e-6)
    assert 0 < figures["image-to-text recall@3"].value < 1
    assert figures["text-to-image mean rank"].n == 12  # images, of which an interval draws


def test_captions_of_one_image_are_drawn_together() -> None:
    """Every caption three times tells no more than once."""
    values = torch.rand(20, generator=torch.Generator().manual_seed(0)).double()
    once, thrice = (over_images(values.repeat_interleave(k), torch.arange(20).repeat_interleave(k), 0) for k in (1, 3))
    assert (thrice.value, thrice.low, thrice.high) == pytest.approx((once.value, once.low, once.high))
    assert thrice.n == 20
    uneven = over_images(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 1, 1]), 0)
    assert uneven.value == pytest.approx(1 / 3)  # the mean over captions, not over images


@pytest.mark.parametrize("setting", [{"layers": ("all",)}, {"skip_self": True}, {"train_split": "val"}])
def test_settings_of_the_other_mode(data: str, setting: dict[str, object]) -> None:
    name = next(iter(setting)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name} has no meaning for --mode image-text"):
        run_retrieval(RetrievalCommand(model="nowhere", data=data, mode="image-text", **setting))


def test_retrieval_without_captions(model: tuple[str, ImageText], tmp_path: Path) -> None:
    write_tar(tmp_path / "test" / "a.tar", [("1.png", png(1)), ("1.cls", b"0")])
    with pytest.raises(UserError, match="sample 1: no caption"):
        run_retrieval(RetrievalCommand(model=model[0], data=str(tmp_path), mode="image-text"))
