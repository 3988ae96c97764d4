"""Linear classifiers on frozen features: a grid of them trained at once, chosen without the test set."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.results import EvalResult, Figure, Samples
from convscope.eval.common import (
    EvalSettings,
    FrozenFeatures,
    Labelled,
    accuracies,
    extract_both,
    frozen_result,
    hits_of,
    labelled,
    open_both,
    percent,
    print_table,
    rank_of_truth,
    require_at_least,
    same_samples,
    save_frozen,
)
from convscope.eval.features import Features

TASK = "linear-probe"
PROTOCOL = "holdout/1"
HOLDOUT = 10  # one train image in ten chooses the head
MOMENTUM = 0.9
CHUNK = 4096  # rows scored at a time
NEGLIGIBLE = 1e-20  # probabilities below count as 0: denormal numbers make a matrix product six times slower

Setting = tuple[float, float]  # learning rate, weight decay


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(EvalSettings):
    """How the heads are trained; every pair of a learning rate and a weight decay is one head."""

    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Learning rates of SGD with momentum 0.9, each with a cosine to 0."""
    weight_decays: tuple[float, ...] = (0.0, 1e-4, 1e-2)
    """Weight decays; biases have none."""
    epochs: int = 50
    """Passes over the train images."""
    min_steps: int = 1000
    """Fewest steps, where the data set is small."""
    sgd_batch_size: int = 1024
    """Features a step."""
    refit: bool = True
    """Train the chosen setting again on all train images, the held-out ones too."""

    def __post_init__(self) -> None:
        EvalSettings.__post_init__(self)
        require_at_least(self, 1, "epochs", "min_steps", "sgd_batch_size")
        if not self.lrs or not self.weight_decays or min(self.lrs) <= 0 or min(self.weight_decays) < 0:
            raise UserError("--lrs must be above 0 and --weight-decays at least 0, one of each or more")

    @property
    def grid(self) -> list[Setting]:
        """Every setting."""
        return [(lr, decay) for lr in self.lrs for decay in self.weight_decays]


@dataclass(frozen=True, kw_only=True)
class LinearProbeCommand(FrozenFeatures, LinearProbeConfig):
    """Linear classifiers on frozen features; held-out train images choose learning rate, weight decay and layer."""

    def __post_init__(self) -> None:
        FrozenFeatures.__post_init__(self)
        LinearProbeConfig.__post_init__(self)


@dataclass(frozen=True)
class LinearProbe:
    """One layer's probe: test accuracy, and how the head was chosen."""

    figures: Mapping[str, Figure]
    holdout: tuple[float, float]  # accuracy, minus cross-entropy: the larger pair is the better head
    details: Mapping[str, Any]
    samples: Samples = dataclasses.field(compare=False, repr=False)  # of the figures


@dataclass(frozen=True)
class Heads:
    """G linear classifiers on standardised features."""

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


def run(config: LinearProbeCommand) -> None:
    """Load, evaluate, print a table and write the result."""
    backbone, train, test = open_both(config)
    result = evaluate(backbone, train, test, config)
    rows = [
        [
            f"{layer} *" if layer == result.details["layer"] else layer,
            str(row["dimensions"]),
            f"{row['lr']:g}{' (edge)' if row['lr_at_edge'] else ''}",
            f"{row['weight_decay']:g}{' (edge)' if row['weight_decay_at_edge'] else ''}",
            f"{row['holdout_top1']:.2%}",
            *(percent(Figure(**row["test"][name])) for name in row["test"]),
        ]
        for layer, row in result.details["layers"].items()
    ]
    names = [f"test {name}" for name in result.figures]
    print_table(f"{TASK} {config.model}", ["layer", "width", "lr", "wd", "held-out top1", *names], rows)
    save_frozen(result, config)


def evaluate(backbone: Backbone, train: ShardSet, test: ShardSet, config: LinearProbeCommand) -> EvalResult:
    """Probe every layer; the figures are those of the layer that was best on the held-out train images.

    Raises:
        UserError: what reading, extracting or probing refuses; train and test are the same shards.
    """
    if same_samples(train, test):
        raise UserError(f"{train.source}: splits {train.split} and {test.split} are the same shards")
    both = extract_both(backbone, train, test, config, config.device)
    probes = {layer: linear_probe(*parts, config) for layer, parts in both.items()}
    best = max(probes, key=lambda layer: probes[layer].holdout)
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(LinearProbeConfig)}
    details = {
        "layer": best,
        "layers": {layer: probe.details for layer, probe in probes.items()},
        "standardised": "by mean and standard deviation of each dimension over the images trained on",
        "settings": {name: value for name, value in settings.items() if name not in ("device", "seed")},
    }
    figures = probes[best].figures
    return frozen_result(
        backbone,
        train,
        test,
        config,
        task=TASK,
        protocol=PROTOCOL,
        figures=figures,
        details=details,
        seed=config.seed,
        samples=probes[best].samples,
    )


def linear_probe(train: Features, test: Features, config: LinearProbeConfig) -> LinearProbe:
    """Train the grid on nine tenths of `train`, choose on the tenth, report on `test` with that one head.

    Raises:
        UserError: labels are missing or do not fit, too few train images, every head diverged.
    """
    device = pick_device(config.device)
    part = labelled(train, test)
    x, y = part.train_x.to(device).float(), part.train_y.to(device)
    fitted, held = (index.to(device) for index in holdout_split(part.train_y, config.seed))
    heads = fit_heads(x[fitted], y[fitted], part.classes, config.grid, config)
    scores = score_heads(heads, x[held], y[held])
    best = max(range(len(scores)), key=lambda index: scores[index])
    if not math.isfinite(scores[best][1]):
        raise UserError("every head of the linear probe diverged; pass smaller --lrs")
    chosen = heads.only(best)
    if config.refit:
        chosen = fit_heads(x, y, part.classes, config.grid[best : best + 1], config)
    rank = _test(chosen, part)
    figures = accuracies(rank, part.classes, config.seed)
    lr, weight_decay = config.grid[best]
    details = {
        "test": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
        "holdout_top1": scores[best][0],
        "holdout_count": len(held),
        "lr": lr,
        "lr_at_edge": lr in (min(config.lrs), max(config.lrs)),
        "weight_decay": weight_decay,
        "weight_decay_at_edge": weight_decay > 0
        and weight_decay in (min(config.weight_decays), max(config.weight_decays)),
        "dimensions": x.shape[1],
        "classes": part.classes,
    }
    return LinearProbe(figures, scores[best], details, hits_of(rank, part.classes))


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


def fit_heads(x: Tensor, y: Tensor, classes: int, grid: Sequence[Setting], config: LinearProbeConfig) -> Heads:
    """Train one head for each setting, all on the same batches: softmax regression by SGD as torch.optim.SGD does it.

    Heads share their input, so all of them are one matrix product; the gradient is written out. Weights start at 0.
    Heads are the last dimension, because a softmax along a short last dimension is slow.

    Args:
        x: features (N, D).
        y: classes (N,).
        classes: their number C.
        grid: G settings.
        config: everything that the heads have in common.
    """
    std, mean = torch.std_mean(x, 0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs(), std, 1.0)  # a constant dimension stays at 0
    lrs, decays = (x.new_tensor(values) for values in zip(*grid))  # (G,)
    weight, bias = x.new_zeros(x.shape[1], classes, len(grid)), x.new_zeros(classes, len(grid))
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    for index, factor in schedule(len(x), config):
        index = index.to(x.device)
        z = (x[index] - mean) / scale
        error = torch.softmax(_logits(z, weight, bias), 1)  # (B, C, G)
        torch.threshold_(error, NEGLIGIBLE, 0.0)
        error[torch.arange(len(index), device=x.device), y[index]] -= 1
        error /= len(index)
        gradient = (z.T @ error.flatten(1)).view_as(weight)
        weight_velocity.mul_(MOMENTUM).add_(gradient).addcmul_(weight, decays)
        bias_velocity.mul_(MOMENTUM).add_(error.sum(0))
        weight.addcmul_(weight_velocity, -factor * lrs)
        bias.addcmul_(bias_velocity, -factor * lrs)
    return Heads(weight, bias, mean, scale)


def score_heads(heads: Heads, x: Tensor, y: Tensor) -> list[tuple[float, float]]:
    """Accuracy and minus the mean cross-entropy of each head; a head that diverged gets minus infinity."""
    rows = []
    for part, truth in zip(torch.split(x, CHUNK), torch.split(y, CHUNK)):
        log_shares = heads.logits(part).log_softmax(1)  # (N, C, G)
        hits = log_shares.argmax(1) == truth[:, None]
        rows.append(torch.stack([hits.to(x.dtype), log_shares[torch.arange(len(truth)), truth]]))
    measured = torch.cat(rows, 1).double().mean(1).T.tolist()  # (G, 2)
    return [(accuracy, loss) if math.isfinite(loss) else (-math.inf, -math.inf) for accuracy, loss in measured]


def schedule(count: int, config: LinearProbeConfig) -> Iterator[tuple[Tensor, float]]:
    """Batches of indices and the factor of the learning rate; a fresh order each epoch, whose short end is left out."""
    size = min(config.sgd_batch_size, count)
    steps = max(config.epochs * (count // size), config.min_steps)
    generator = torch.Generator().manual_seed(config.seed)
    batches: list[Tensor] = []
    for step in range(steps):
        if not batches:
            order = torch.randperm(count, generator=generator)
            batches = list(torch.split(order[: count // size * size], size))
        yield batches.pop(), 0.5 * (1 + math.cos(math.pi * step / steps))


def _logits(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (z @ weight.flatten(1)).view(len(z), *bias.shape) + bias


def _test(head: Heads, part: Labelled) -> Tensor:
    """How many classes precede the true one, (N,)."""
    device = head.weight.device
    chunks = zip(torch.split(part.test_x, CHUNK), torch.split(part.test_y, CHUNK))
    ranks = [rank_of_truth(head.logits(x.to(device).float())[..., 0], y.to(device)).cpu() for x, y in chunks]
    return torch.cat(ranks)
