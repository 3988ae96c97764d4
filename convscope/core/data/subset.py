"""Labels of a whole split, and balanced subsets of it."""

import numpy as np
from numpy.typing import NDArray

from convscope.core.data.shard_set import ShardSet, label_of
from convscope.core.errors import UserError
from convscope.core.log import progress


def read_labels(shards: ShardSet, field: str = "cls") -> NDArray[np.int64]:
    """Label (N,) of every sample; images are not read.

    Raises:
        UserError: a sample without that label.
    """
    labels = np.empty(len(shards), dtype=np.int64)
    with progress("reading labels", len(shards)) as ticker:
        for index in range(len(shards)):
            labels[index] = label_of(shards.without_image(index), field)
            ticker.advance()
    return labels


def per_class_subset(labels: NDArray[np.int64], n_per_class: int, seed: int) -> NDArray[np.int64]:
    """Indices, ascending, of `n_per_class` random samples of every class in `labels` (N,).

    With one seed, a smaller subset is part of a larger one.

    Raises:
        UserError: a class has fewer samples.
    """
    if n_per_class < 1:
        raise UserError(f"a subset needs at least one sample per class, got {n_per_class}")
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < n_per_class:
            raise UserError(f"class {label} has {len(members)} samples, fewer than {n_per_class} per class")
        chosen.append(rng.permutation(members)[:n_per_class])
    return np.sort(np.concatenate(chosen)).astype(np.int64)
