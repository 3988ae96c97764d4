"""Where captions come from, which one a step reads, and what becomes of it as tokens."""

import json
import random
from pathlib import Path

import pytest
import torch

from convscope.core.data.decode import DecodeError
from convscope.core.data.shard_set import open_shards
from convscope.core.errors import UserError
from convscope.core.pairs import captions as captions_module
from convscope.core.pairs.captions import CaptionSource, CaptionTokens, sample_captions, sentences
from convscope.core.pairs.tokenizers import (
    ClipTokenizer,
    Tokenizer,
    folder_tokenizer,
    restore_tokenizer,
    train_tokenizer,
)
from tests.core.data.tars import png, write_tar
from tests.core.pairs.small_bert import save_tokenizer


def sample(**members: object) -> dict[str, bytes | str]:
    encoded = {key: value if isinstance(value, bytes) else json.dumps(value).encode() for key, value in members.items()}
    return {"__key__": "1", **encoded}


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"txt": b" a cat \n"}, ["a cat"]),
        ({"txt": b"one\ntwo"}, ["one\ntwo"]),
        ({"json": {"caption": "a dog"}}, ["a dog"]),
        ({"json": {"captions": ["a dog", "", "it barks"]}}, ["a dog", "it barks"]),
        ({"txt": b"member first", "json": {"caption": "then json"}}, ["member first"]),
        ({"txt": b"  ", "json": {"caption": "not empty"}}, ["not empty"]),
        ({"txt": b"", "caption": b"beside an empty one"}, ["beside an empty one"]),
        ({"json": {"text": None, "caption": "a dog"}}, ["a dog"]),
        ({"txt": b"\xff broken"}, ["\ufffd broken"]),
    ],
)
def test_usual_places(members: dict[str, object], captions: list[str]) -> None:
    assert CaptionSource()(sample(**members)) == captions


def test_other_places() -> None:
    one = sample(txt=b"first line\n\nsecond line", json={"report": "Clear lungs."})
    assert CaptionSource(lines=True)(one) == ["first line", "second line"]
    assert CaptionSource(field="report")(one) == ["Clear lungs."]
    about = CaptionSource(classes=("cat", "dog"))({**one, "cls": b"1"})
    assert len(about) == 7
    assert all("dog" in caption for caption in about)


@pytest.mark.parametrize(
    ("source", "members", "words"),
    [
        (CaptionSource(), {"cls": b"1"}, "no caption"),
        (CaptionSource(field="note"), {"txt": b"a cat"}, "note"),
        (CaptionSource(), {"json": b"{"}, "not valid JSON"),
        (CaptionSource(), {"json": {"caption": 3}}, "no caption"),
    ],
)
def test_without_one_the_sample_is_skipped(source: CaptionSource, members: dict[str, object], words: str) -> None:
    with pytest.raises(DecodeError, match=words):
        source(sample(**members))


def test_labels_beyond_the_names() -> None:
    with pytest.raises(UserError, match="label 5 has no name among 2"):
        CaptionSource(classes=("a", "b"))(sample(cls=b"5"))


def test_sentences() -> None:
    assert sentences("Heart is normal. No effusion!\nFollow up?") == ["Heart is normal.", "No effusion!", "Follow up?"]
    assert sentences("3.5 cm mass") == ["3.5 cm mass"]


def tokenizer() -> Tokenizer:
    return train_tokenizer(["a small red circle", "a large blue square"], 280, 8)


def test_sampling() -> None:
    one = sample(json={"captions": ["a red circle. a blue square", "a large circle"]})
    tokens = tokenizer()
    expected = {
        "first": {"a red circle. a blue square"},
        "random": {"a red circle. a blue square", "a large circle"},
        "sentence": {"a red circle.", "a blue square", "a large circle"},
    }
    for sampling, texts in expected.items():
        read = CaptionTokens(tokens, CaptionSource(), sampling)
        random.seed(0)
        drawn = {tuple(read(one)["text"].tolist()) for _ in range(60)}
        assert drawn == {tuple(tokens([text])[0].tolist()) for text in texts}


def test_tokens_are_framed_cut_and_padded() -> None:
    tokens = tokenizer()
    short, long = tokens(["red", "a large blue square " * 5])
    assert (short[0], short[-1]) == (1, tokens.pad)
    assert 1 < short.tolist().index(tokens.eos) < 7
    assert (long[0], long[-1]) == (1, tokens.eos)
    assert tokens(["RED", "red"]).unique(dim=0).shape[0] == 1
    assert tokens([]).shape == (0, 8)


def test_the_name_of_a_special_token_is_plain_text(tmp_path: Path) -> None:
    tokens = train_tokenizer(["a"], 300, 40)
    for restored in (tokens, restore_tokenizer(tokens.describe())):
        row = restored(["a <eos> b <pad>"])[0].tolist()
        assert row.index(tokens.eos) == len("a <eos> b <pad>") + 1  # every byte a token, after the first of all
        assert row.count(tokens.eos) == 1
    save_tokenizer(tmp_path)
    clinical = folder_tokenizer(tmp_path, 12)
    assert clinical(["clear [SEP] lungs"])[0].tolist().count(clinical.eos) == 1


def test_any_text_can_be_written_in_bytes() -> None:
    tokens = train_tokenizer(["a"], 300, 40)
    text = "naïve 漢字 🙂"
    ids = [i for i in tokens([text])[0].tolist() if i > 2]
    assert tokens.encoder.decode(ids) == text
    assert tokens.vocab_size <= 300


@pytest.mark.parametrize("original", [tokenizer(), ClipTokenizer(16)], ids=["own", "clip"])
def test_described_and_restored(original: Tokenizer) -> None:
    restored = restore_tokenizer(json.loads(json.dumps(original.describe())))
    texts = ["a small red circle", "Something ELSE, entirely; and longer than what fits in"]
    assert torch.equal(restored(texts), original(texts))
    assert (restored.eos, restored.pad, restored.vocab_size) == (original.eos, original.pad, original.vocab_size)


def test_clips_own_tokens() -> None:
    tokens = ClipTokenizer()(["a photo of a cat"])
    assert tokens.shape == (1, 77)
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]  # as published with CLIP


def test_training_twice_gives_the_same() -> None:
    texts = [f"picture {i} of a {'red' if i % 2 else 'blue'} thing" for i in range(50)]
    assert train_tokenizer(texts, 300, 8).describe() == train_tokenizer(texts, 300, 8).describe()


def test_a_vocabulary_smaller_than_the_bytes() -> None:
    with pytest.raises(UserError, match="--vocab-size must be at least 259"):
        train_tokenizer(["a"], 200, 8)


def test_captions_for_the_tokenizer(tmp_path: Path) -> None:
    members = [(f"{i}.{suffix}", data) for i in range(4) for suffix, data in (("png", png(i)), ("txt", b"text %d" % i))]
    shards = open_shards(str(write_tar(tmp_path / "x.tar", members)), "train")
    assert sample_captions(shards, CaptionSource(), 0) == [f"text {i}" for i in range(4)]
    with pytest.raises(UserError, match="has no captions: no member or json field note"):
        sample_captions(shards, CaptionSource(field="note"), 0)


def test_remote_shards_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few shards give all captions, so that the others need not be fetched for them."""
    for shard in range(6):
        texts = [(f"{shard}{i}.{suffix}", b"%d" % shard) for i in range(4) for suffix in ("png", "txt")]
        write_tar(tmp_path / f"x-{shard}.tar", texts)
    monkeypatch.setenv("CONVSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(captions_module, "TOKENIZER_SAMPLES", 7)
    remote = open_shards(f"pipe:cat {tmp_path}/x-{{0..5}}.tar", "train")
    drawn = [sample_captions(remote, CaptionSource(), seed) for seed in range(5)]
    for found in drawn:
        assert len(found) == 7
        assert sorted(map(found.count, set(found))) == [3, 4]
    assert len(set(map(tuple, drawn))) > 1
    local = open_shards(f"{tmp_path}/x-{{0..5}}.tar", "train")
    assert len(sample_captions(local, CaptionSource(), 0)) == 7
