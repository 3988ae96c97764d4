"""Linear classifiers on features: a grid of them trained at once by SGD."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.options import require_at_least
from convscope.eval.average_precision import average_precision
from convscope.eval.common import EvalSettings

HOLDOUT = 10  # one train image in ten chooses the head
MOMENTUM = 0.9
CHUNK = 4096  # rows scored at a time
NEGLIGIBLE = 1e-20  # probabilities below count as 0: denormal numbers make a matrix product six times slower
LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
EPOCHS = 50
SGD_BATCH_SIZE = 1024

Setting = tuple[float, float]  # learning rate, weight decay
Score = tuple[float, float]  # accuracy (or another share), then minus the loss: the larger pair is the better head


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(EvalSettings):
    """How the heads are trained; every pair of a learning rate and a weight decay is one head."""

    lrs: tuple[float, ...] | None = None
    """Of SGD with momentum 0.9 and a cosine to 0; default: ten up to 10, or the protocol's own, for 256 images."""
    weight_decays: tuple[float, ...] = (0.0, 1e-4, 1e-2)
    """Weight decays; biases have none."""
    penalties: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
    """Weights of |W|^2 against the mean squared error, for regression: in place of the learning rates and decays."""
    epochs: int | None = None
    """Passes over the train images; default: 50 on features, 90 with mae and lightly."""
    min_steps: int = 1000
    """Fewest steps on features, where the data set is small."""
    sgd_batch_size: int | None = None
    """Features or images a step, over all processes; default: 1024, but of linear heads 16384 (mae), 256 (lightly)."""
    refit: bool = True
    """Train the chosen setting again on all train images, the held-out ones too."""

    def __post_init__(self) -> None:
        EvalSettings.__post_init__(self)
        require_at_least(self, 1, "min_steps", "epochs", "sgd_batch_size")
        lrs = LRS if self.lrs is None else self.lrs
        if not lrs or not self.weight_decays or min(lrs) <= 0 or min(self.weight_decays) < 0:
            raise UserError("--lrs must be above 0 and --weight-decays at least 0, one of each or more")
        if not self.penalties or min(self.penalties) <= 0:
            raise UserError("--penalties must be above 0, one or more")

    @property
    def grid(self) -> list[Setting]:
        """Every setting."""
        return [(lr, decay) for lr in self.lrs or LRS for decay in self.weight_decays]


@dataclass(frozen=True)
class Heads:
    """G linear maps of standardised features."""

    weight: Tensor  # (D, C, G)
    bias: Tensor  # (C, G)
    mean: Tensor  # (D,)
    scale: Tensor  # (D,)

    def logits(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, C, G)."""
        return _logits((x - self.mean) / self.scale, self.weight, self.bias)

    def only(self, index: int) -> "Heads":
        """The one head at `index`."""
        return dataclasses.replace(
            self, weight=self.weight[..., index : index + 1], bias=self.bias[..., index : index + 1]
        )


def holdout_split(y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out, a tenth, spread evenly over the classes.

    Every tenth of the images ordered by class, at random inside a class: it works for classes of a few images too.

    Raises:
        UserError: fewer than ten images.
    """
    if len(y) < HOLDOUT:
        raise UserError(
            f"a linear probe holds out a tenth of the train images and needs {HOLDOUT} or more, got {len(y)}"
        )
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(y[shuffled], stable=True)]
    held = torch.zeros(len(y), dtype=torch.bool)
    held[by_class[HOLDOUT // 2 :: HOLDOUT]] = True
    return torch.nonzero(~held)[:, 0], torch.nonzero(held)[:, 0]


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale (D,) of each dimension of x (N, D); a constant dimension stays at 0."""
    std, mean = torch.std_mean(x, 0, correction=0)
    return mean, torch.where(std > 1e-6 * mean.abs(), std, 1.0)


def fit_heads(x: Tensor, y: Tensor, classes: int, grid: Sequence[Setting], config: LinearProbeConfig) -> Heads:
    """Train one head for each setting, all on the same batches, by SGD as torch.optim.SGD does it.

    Softmax regression on classes; on multi-label targets one logistic regression for each class, whose losses add up
    and leave out what is unknown. Heads share their input, so all of them are one matrix product; the gradient is
    written out. Weights start at 0. Heads are the last dimension, because a softmax along a short last dimension is
    slow.

    Args:
        x: features (N, D).
        y: classes (N,), or targets (N, C): 1 present, 0 absent, -1 ignored.
        classes: their number C.
        grid: G settings.
        config: everything that the heads have in common.
    """
    mean, scale = standardisation(x)
    lrs, decays = (x.new_tensor(values) for values in zip(*grid))  # (G,)
    weight, bias = x.new_zeros(x.shape[1], classes, len(grid)), x.new_zeros(classes, len(grid))
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    for index, factor in schedule(len(x), config):
        index = index.to(x.device)
        z = (x[index] - mean) / scale
        error = _error(_logits(z, weight, bias), y[index])  # (B, C, G)
        error /= len(index)
        gradient = (z.T @ error.flatten(1)).view_as(weight)
        weight_velocity.mul_(MOMENTUM).add_(gradient).addcmul_(weight, decays)
        bias_velocity.mul_(MOMENTUM).add_(error.sum(0))
        weight.addcmul_(weight_velocity, -factor * lrs)
        bias.addcmul_(bias_velocity, -factor * lrs)
    return Heads(weight, bias, mean, scale)


def score_heads(heads: Heads, x: Tensor, y: Tensor) -> list[Score]:
    """Accuracy and minus the mean cross-entropy of each head; a head that diverged gets minus infinity."""
    rows = []
    for part, truth in zip(torch.split(x, CHUNK), torch.split(y, CHUNK)):
        log_shares = heads.logits(part).log_softmax(1)  # (N, C, G)
        hits = log_shares.argmax(1) == truth[:, None]
        rows.append(torch.stack([hits.to(x.dtype), log_shares[torch.arange(len(truth)), truth]]))
    return _finite_scores(torch.cat(rows, 1).double().mean(1).T)


def score_multi_label_heads(heads: Heads, x: Tensor, y: Tensor) -> list[Score]:
    """Mean average precision and minus the mean binary cross-entropy of each head, over what is known of y (N, C)."""
    rows = []
    for index in range(heads.bias.shape[1]):  # one at a time: images x classes x heads may be many
        head = heads.only(index)
        logits = torch.cat([head.logits(part)[..., 0] for part in torch.split(x, CHUNK)])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.clamp_min(0), reduction="none")
        rows.append(torch.stack([average_precision(logits, y).nanmean(), -loss[y >= 0].double().mean()]))
    return _finite_scores(torch.stack(rows))


def schedule(count: int, config: LinearProbeConfig) -> Iterator[tuple[Tensor, float]]:
    """Batches of indices and the factor of the learning rate; a fresh order each epoch, whose short end is left out."""
    size = min(config.sgd_batch_size or SGD_BATCH_SIZE, count)
    steps = max((config.epochs or EPOCHS) * (count // size), config.min_steps)
    generator = torch.Generator().manual_seed(config.seed)
    batches: list[Tensor] = []
    for step in range(steps):
        if not batches:
            order = torch.randperm(count, generator=generator)
            batches = list(torch.split(order[: count // size * size], size))
        yield batches.pop(), 0.5 * (1 + math.cos(math.pi * step / steps))


def _logits(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (z @ weight.flatten(1)).view(len(z), *bias.shape) + bias


def _error(logits: Tensor, y: Tensor) -> Tensor:
    """Gradient of the loss of each sample with respect to its logits (B, C, G)."""
    if y.ndim == 2:
        error = torch.sigmoid(logits)
        torch.threshold_(error, NEGLIGIBLE, 0.0)
        return error.sub_(y[..., None]).mul_(y[..., None] >= 0)
    error = torch.softmax(logits, 1)
    torch.threshold_(error, NEGLIGIBLE, 0.0)
    error[torch.arange(len(y), device=y.device), y] -= 1
    return error


def _finite_scores(measured: Tensor) -> list[Score]:
    return [
        (share, loss) if math.isfinite(share) and math.isfinite(loss) else (-math.inf, -math.inf)
        for share, loss in measured.tolist()
    ]
