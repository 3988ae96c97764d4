"""Text encoders, and how the states of a text's tokens become one vector."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from convscope.core.errors import UserError

Pooling = Literal["eos", "cls", "mean", "max", "latent"]
HIDDEN = 4  # width of the latent pooling's MLP over that of the states


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text encoder of the transformer family."""

    vocab_size: int
    context_length: int
    pad: int
    eos: int
    width: int = 512
    heads: int = 8
    layers: int = 12
    pooling: Pooling = "eos"
    """eos: the state of the last token, and causal attention. The others see the whole text: cls: that of the first
    token. mean, max: over tokens. latent: NV-Embed's attention to learned latents, then the mean."""
    latents: int = 512
    """Learned latents of the latent pooling."""
    hugging_face: dict[str, Any] = field(default_factory=dict)
    """Configuration of a Hugging Face encoder, which takes the place of the transformer."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"a text width of {self.width} is not divisible by {self.heads} heads")


class TextTower(nn.Module):
    """Tokens to one vector a text, (B, L) int64 -> (B, width)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _hugging_face(config.hugging_face) if config.hugging_face else _transformer(config)
        self.width = int(self.encoder.config.hidden_size) if config.hugging_face else config.width
        self.latent = LatentAttention(self.width, config.latents) if config.pooling == "latent" else None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) -> (B, width)."""
        end = (tokens == self.config.eos).int().argmax(1)  # of the first one
        inside = torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]
        if self.config.hugging_face:
            states = self.encoder(input_ids=tokens, attention_mask=inside.long()).last_hidden_state
        else:
            states = self.encoder(tokens)
        if self.latent is not None:
            states = self.latent(states)
        return pool_tokens(states, inside, self.config.pooling)

    def freeze(self, layers: int) -> None:
        """Hold the embeddings and the first `layers` layers at what they are; 0 freezes nothing.

        Raises:
            UserError: it has fewer, or its layers share their weights.
        """
        if layers == 0:
            return
        depth = self.encoder.config.num_hidden_layers if self.config.hugging_face else self.config.layers
        if layers > depth:
            raise UserError(f"the text encoder has {depth} layers: {layers} cannot be frozen")
        stacks = [module for module in self.encoder.modules() if isinstance(module, nn.ModuleList)]
        stack = next((stack for stack in stacks if len(stack) == depth), None)
        if stack is None:  # such as ALBERT's
            raise UserError("the text encoder has no layers of their own to freeze: leave --freeze-text-layers out")
        ordered = list(self.encoder.parameters())  # from the input on
        last = list(stack[layers - 1].parameters())[-1]
        frozen = 1 + next(i for i, one in enumerate(ordered) if one is last)
        for parameter in ordered[:frozen]:
            parameter.requires_grad_(False)

    def require_context(self, folder: Path | None) -> None:
        """Raise a UserError where the encoder of `folder` does not take texts of the full length."""
        length = self.config.context_length
        tokens = torch.full((1, length), self.config.eos)
        try:
            with torch.no_grad():
                self.encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state  # noqa: B018
        except (IndexError, RuntimeError) as error:
            most = getattr(self.encoder.config, "max_position_embeddings", "fewer")
            raise UserError(
                f"{folder} does not take {length} tokens (it has positions for {most}); use a smaller --context-length"
            ) from error
        except (AttributeError, TypeError, ValueError) as error:  # such as one with a decoder
            raise UserError(f"{folder} holds no encoder of texts: {str(error).splitlines()[0]}") from error


class LatentAttention(nn.Module):
    """States that attend to learned latents, then an MLP (NV-Embed, Lee et al. 2024, sec. 3.1, eq. 1)."""

    def __init__(self, width: int, latents: int, heads: int = 8) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width) * width**-0.5)
        self.attention = nn.MultiheadAttention(width, heads if width % heads == 0 else 1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, HIDDEN * width), nn.GELU(), nn.Linear(HIDDEN * width, width))

    def forward(self, states: Tensor) -> Tensor:
        """(B, L, width) -> the same."""
        latents = self.latents.expand(len(states), -1, -1)
        attended: Tensor = self.mlp(self.attention(states, latents, latents, need_weights=False)[0])
        return attended


def pool_tokens(states: Tensor, inside: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text, (B, W).

    Args:
        states: (B, L, W).
        inside: (B, L) bool, which tokens are the text's own: from the first one to the one that ends it.
        pooling: see TextConfig; latent is the mean over states that have attended to latents.
    """
    if pooling == "cls":
        return states[:, 0]
    if pooling == "eos":
        return states[torch.arange(len(states), device=states.device), inside.sum(1) - 1]
    if pooling == "max":
        return states.masked_fill(~inside[..., None], -torch.inf).amax(1)
    return (states * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)


def hugging_face_weights(folder: Path) -> tuple[dict[str, Any], nn.Module]:
    """Configuration and trained encoder of a local folder in Hugging Face's layout.

    Raises:
        UserError: it holds no model that loads whole.
    """
    from transformers import AutoModel

    try:
        encoder, report = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{folder} holds no Hugging Face encoder: {str(error).splitlines()[0]}") from error
    if missing := [key for key in report["missing_keys"] if not key.startswith("pooler.")]:
        raise UserError(f"{folder} lacks {len(missing)} weights of its encoder, such as {sorted(missing)[0]}")
    encoder.pooler = None  # of sentence pairs
    return json.loads(encoder.config.to_json_string(use_diff=False)), encoder.float()  # a folder may hold halves


def _hugging_face(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModel

    kind = str(config["model_type"])
    build: Any = AutoModel.from_config
    encoder = build(AutoConfig.for_model(**{**config, "model_type": kind}))
    encoder.pooler = None
    return encoder.float()


def _transformer(config: TextConfig) -> TextTransformer:
    causal = config.pooling == "eos"
    return TextTransformer(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        no_causal_mask=not causal,
        use_pad_mask=not causal,
        pad_id=config.pad,
        pool_type="none",
        proj_type="none",
    )
