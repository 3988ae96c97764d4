"""Poolings against loops, padding that changes nothing, encoders of Hugging Face."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convscope.core.errors import UserError
from convscope.core.pairs.text_tower import (
    LatentAttention,
    Pooling,
    TextConfig,
    TextTower,
    hugging_face_weights,
    pool_tokens,
)
from convscope.core.pairs.tokenizers import folder_tokenizer
from tests.core.pairs.small_bert import WORDS, save_bert, save_tokenizer

BOS, EOS, PAD = 1, 2, 0


def tower(pooling: Pooling, **settings: object) -> TextTower:
    sizes = {"vocab_size": 20, "context_length": 10, "width": 8, "heads": 2, "layers": 2, "latents": 3, **settings}
    torch.manual_seed(0)
    return TextTower(TextConfig(pad=PAD, eos=EOS, pooling=pooling, **sizes)).double().eval()


def tokens(*lengths: int) -> Tensor:
    rows = torch.zeros(len(lengths), 10, dtype=torch.long)
    for row, length in zip(rows, lengths):
        row[0], row[1 : length - 1], row[length - 1] = BOS, torch.arange(5, 3 + length), EOS
    return rows


def test_poolings_against_a_loop() -> None:
    states = torch.randn(3, 6, 4, dtype=torch.float64)
    lengths = (2, 6, 4)
    inside = torch.arange(6) < torch.tensor(lengths)[:, None]
    for i, length in enumerate(lengths):
        own = states[i, :length]
        columns = own.T.tolist()
        expected = {
            "eos": own[-1].tolist(),
            "cls": own[0].tolist(),
            "mean": [sum(column) / length for column in columns],
            "max": [max(column) for column in columns],
        }
        for pooling, vector in expected.items():
            assert pool_tokens(states, inside, pooling)[i].tolist() == pytest.approx(vector)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "latent"])
def test_padding_changes_nothing(pooling: Pooling) -> None:
    module, rows = tower(pooling), tokens(4, 6)
    torch.testing.assert_close(module(rows), module(rows[:, :6]), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(module(rows)[0], module(rows)[1])


def test_what_follows_the_end_changes_nothing() -> None:
    module, rows = tower("eos"), tokens(4)
    other = rows.clone()
    other[0, 4:] = torch.tensor([7, EOS, 3, 9, 8, 11])
    torch.testing.assert_close(module(rows), module(other), rtol=1e-12, atol=1e-12)


def test_order_of_words_matters_and_every_word_counts() -> None:
    rows = tokens(6)
    swapped, changed = rows.clone(), rows.clone()
    swapped[0, [1, 2]] = rows[0, [2, 1]]
    changed[0, 1] = 15
    for pooling in ("eos", "cls", "mean", "max", "latent"):
        module = tower(pooling)
        assert not torch.allclose(module(rows), module(swapped), atol=1e-6), pooling
        assert not torch.allclose(module(rows), module(changed), atol=1e-6), pooling


def test_latent_attention_by_its_equation() -> None:
    """NV-Embed, eq. 1: softmax(Q K^T) V with latents as keys and values, then an MLP; one head, projections of one."""
    torch.manual_seed(0)
    layer = LatentAttention(6, 4, heads=1).double()
    identity = torch.eye(6, dtype=torch.float64)
    with torch.no_grad():
        layer.attention.in_proj_weight.copy_(torch.cat([identity * 6**0.5, identity, identity]))
        layer.attention.in_proj_bias.zero_()
        layer.attention.out_proj.weight.copy_(identity)
        layer.attention.out_proj.bias.zero_()
    states = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = layer.mlp((states @ layer.latents.T).softmax(-1) @ layer.latents)
    torch.testing.assert_close(layer(states), expected, rtol=1e-10, atol=1e-12)


def test_more_layers_than_there_are() -> None:
    with pytest.raises(UserError, match="has 2 layers: 5 cannot be frozen"):
        tower("eos").freeze(5)


@pytest.mark.parametrize("layers", [1, 2])
def test_freezing_from_the_input_on(layers: int) -> None:
    module = tower("eos")
    module.freeze(layers)
    free = {name for name, one in module.encoder.named_parameters() if one.requires_grad}
    assert {name.split(".")[0] for name in free} == ({"transformer", "ln_final"} if layers == 1 else {"ln_final"})
    assert all(name.startswith(("transformer.resblocks.1.", "ln_final")) for name in free)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder of Hugging Face."""
    return save_bert(tmp_path_factory.mktemp("bert"))


def bert_tower(folder: Path, pooling: Pooling) -> TextTower:
    tokenizer = folder_tokenizer(folder, 12)
    settings, encoder = hugging_face_weights(folder)
    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": 12, "pad": tokenizer.pad, "eos": tokenizer.eos}
    module = TextTower(TextConfig(**sizes, pooling=pooling, hugging_face=json.loads(json.dumps(settings))))
    module.encoder.load_state_dict(encoder.state_dict())
    return module.eval()


def test_an_encoder_of_hugging_face(bert: Path) -> None:
    import transformers

    texts = ["clear lungs", "no effusion . clear lungs ."]
    theirs = transformers.AutoModel.from_pretrained(bert).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(bert)(
        texts, padding="max_length", max_length=12, return_tensors="pt"
    )
    rows = folder_tokenizer(bert, 12)(texts)
    assert torch.equal(rows, encoded.input_ids)
    with torch.no_grad():
        states = theirs(**encoded).last_hidden_state
        for i, row in enumerate(encoded.attention_mask.bool()):
            expected = {"cls": states[i, 0], "mean": states[i, row].mean(0), "max": states[i, row].amax(0)}
            expected["eos"] = states[i, int(row.sum()) - 1]
            for pooling, vector in expected.items():
                torch.testing.assert_close(bert_tower(bert, pooling)(rows)[i], vector, rtol=1e-5, atol=1e-6)


def test_freezing_an_encoder_of_hugging_face(bert: Path) -> None:
    module = bert_tower(bert, "mean")
    module.freeze(2)
    free = {name for name, one in module.encoder.named_parameters() if one.requires_grad}
    assert {name[: len("encoder.layer.2.")] for name in free} == {"encoder.layer.2."}


def test_an_encoder_whose_layers_share_their_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tmp_path)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AlbertConfig(**sizes, embedding_size=4, num_hidden_layers=3)
    transformers.AlbertModel(config).save_pretrained(tmp_path)
    module = bert_tower(tmp_path, "mean")
    module.freeze(0)
    assert all(one.requires_grad for one in module.parameters())
    with pytest.raises(UserError, match="no layers of their own to freeze"):
        module.freeze(1)


def test_a_folder_of_half_precision_is_trained_in_full(bert: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.AutoModel.from_pretrained(bert).half().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    module = bert_tower(tmp_path, "mean")
    assert {one.dtype for one in module.parameters()} == {torch.float32}
    rows = folder_tokenizer(tmp_path, 12)(["clear lungs"])
    torch.testing.assert_close(module(rows), bert_tower(bert, "mean")(rows), rtol=1e-2, atol=1e-2)


def test_encoders_that_do_not_take_the_texts(bert: Path) -> None:
    transformers = pytest.importorskip("transformers")
    module = bert_tower(bert, "mean")
    module.require_context(bert)
    config = replace(module.config, context_length=513)
    with pytest.raises(UserError, match=r"does not take 513 tokens \(it has positions for 512\).*--context-length"):
        TextTower(config).require_context(bert)
    seq2seq = transformers.T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    described = json.loads(seq2seq.to_json_string(use_diff=False))
    with pytest.raises(UserError, match="holds no encoder of texts"):
        TextTower(replace(module.config, hugging_face=described)).require_context(bert)


def test_folders_that_hold_no_encoder(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no Hugging Face encoder"):
        hugging_face_weights(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        folder_tokenizer(tmp_path / "nowhere", 8)
    from safetensors.torch import load_file, save_file

    for name in ("config.json",):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    weights = load_file(bert / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layer.1." not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"lacks \d+ weights of its encoder"):
        hugging_face_weights(tmp_path)


def test_a_width_that_heads_do_not_divide() -> None:
    with pytest.raises(UserError, match="not divisible by 3 heads"):
        tower("eos", heads=3)
    assert isinstance(tower("eos"), nn.Module)
