"""A small BERT with its tokenizer, as Hugging Face saves them."""

from pathlib import Path

import pytest
import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "clear", "lungs", "no", "effusion", "."]


def save_tokenizer(folder: Path) -> None:
    """Ten words."""
    transformers = pytest.importorskip("transformers")
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)


def save_bert(folder: Path, layers: int = 3) -> Path:
    """Width 8, positions for 512 tokens."""
    transformers = pytest.importorskip("transformers")
    save_tokenizer(folder)
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder
