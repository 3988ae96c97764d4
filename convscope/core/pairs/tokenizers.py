"""Text to token numbers: a BPE trained on one's own captions, that of a Hugging Face encoder, or CLIP's."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from convscope.core.errors import UserError

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


class Tokenizer:
    """Maps texts to token numbers, (N, context_length) int64, padded at the end and cut where they are longer.

    Attributes:
        context_length: tokens of a text.
        vocab_size: how many different ones there are.
        pad: number of the padding.
        eos: number of the token that ends every text.
    """

    context_length: int
    vocab_size: int
    pad: int
    eos: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token numbers of each text."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What `restore_tokenizer` makes the same tokenizer of; plain values."""
        raise NotImplementedError


class CaptionTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library; its post-processing adds the token that ends a text."""

    def __init__(self, encoder: Encoder, context_length: int, *, pad: int, eos: int) -> None:
        self.context_length, self.pad, self.eos = context_length, pad, eos
        self.encoder = encoder
        self.vocab_size = encoder.get_vocab_size()
        self._clean = get_clean_fn("whitespace")  # as open_clip does for such tokenizers
        encoder.encode_special_tokens = True  # "<eos>" in a caption is its letters, and ends nothing
        encoder.enable_truncation(context_length)
        encoder.enable_padding(length=context_length, pad_id=pad, pad_token=encoder.id_to_token(pad))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token numbers of each text."""
        # one by one: a batch is encoded by threads, which do not survive the fork of a data loader
        ids = [self.encoder.encode(self._clean(text)).ids for text in texts]
        return torch.tensor(ids, dtype=torch.int64).view(len(texts), self.context_length)

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        place = {"context_length": self.context_length, "pad": self.pad, "eos": self.eos}
        return {"kind": "tokenizers", "json": self.encoder.to_str(), **place}


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair encoding of 49 408 tokens, which comes with open_clip."""

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length
        self.encoder = SimpleTokenizer(context_length=context_length)
        self.vocab_size, self.pad, self.eos = self.encoder.vocab_size, 0, self.encoder.eot_token_id

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token numbers of each text."""
        tokens: Tensor = self.encoder(list(texts))
        return tokens

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": "clip", "context_length": self.context_length}


def train_tokenizer(captions: Iterable[str], vocab_size: int, context_length: int) -> CaptionTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, lower case; nothing is out of its vocabulary.

    Raises:
        UserError: a vocabulary too small for the bytes themselves.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 3:
        raise UserError(f"--vocab-size must be at least {len(alphabet) + 3}, the number of bytes; got {vocab_size}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads would make every later fork complain
    clean = get_clean_fn("whitespace")
    encoder = Encoder(models.BPE())
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[PAD, BOS, EOS], show_progress=False
    )
    encoder.train_from_iterator(map(clean, captions), trainer)
    pad, bos, eos = range(3)  # special tokens come first
    encoder.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, bos), (EOS, eos)]
    )
    return CaptionTokenizer(encoder, context_length, pad=pad, eos=eos)


def folder_tokenizer(folder: Path, context_length: int) -> CaptionTokenizer:
    """The tokenizer that lies beside a Hugging Face encoder.

    Raises:
        UserError: none there, or one that ends texts with no token of its own.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = Encoder.from_str(found.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} has no tokenizer: {str(error).splitlines()[0]}") from error
    eos = found.sep_token_id if found.sep_token_id is not None else found.eos_token_id
    if eos is None or found.pad_token_id is None:
        raise UserError(f"the tokenizer of {folder} has no token for the end of a text, or none for padding")
    if encoder.encode("a").ids[-1] != eos:
        raise UserError(f"the tokenizer of {folder} does not end a text with a token of its own")
    return CaptionTokenizer(encoder, context_length, pad=found.pad_token_id, eos=eos)


def restore_tokenizer(described: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.describe` described."""
    if described["kind"] == "clip":
        return ClipTokenizer(described["context_length"])
    encoder = Encoder.from_str(described["json"])
    return CaptionTokenizer(encoder, described["context_length"], pad=described["pad"], eos=described["eos"])
