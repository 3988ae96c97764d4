"""The order is a permutation in every epoch, needs no state, and looks random."""

import itertools

import numpy as np
import pytest

from convscope.core.data.order import Order
from convscope.core.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 1024, 1025, 4096, 4097, 70001])
def test_every_epoch_is_a_permutation(size):
    order = Order(size, seed=3)
    for epoch in (0, 1, 1000):
        found = order(np.arange(size) + epoch * size)
        assert np.array_equal(np.sort(found), np.arange(size))
        assert found.dtype == np.int64


def test_a_position_says_it_all():
    """Any set of positions, in any grouping, over epochs, from any instance."""
    whole = Order(100, seed=5)(np.arange(1000))
    chosen = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(Order(100, seed=5)(chosen), whole[chosen])
    assert [int(Order(100, seed=5)(np.array([p]))[0]) for p in (0, 99, 100, 555)] == whole[[0, 99, 100, 555]].tolist()
    assert len(Order(100, seed=5)(np.array([], dtype=np.int64))) == 0


def test_epochs_and_seeds_differ():
    orders = [Order(1000, seed)(np.arange(3000)).reshape(3, 1000) for seed in (0, 1)]
    rows = np.concatenate([*orders, np.arange(1000)[None]])
    for a, b in itertools.combinations(rows, 2):
        assert np.count_nonzero(a == b) < 10  # two random permutations share one place on average


def test_huge_sets_need_no_memory():
    size = 10**12
    found = Order(size, seed=0)(np.arange(1000, dtype=np.int64) + 5 * size)
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0
    assert found.max() < size
    assert abs(found.mean() / size - 0.5) < 0.05


def test_all_orders_of_three_are_equally_likely():
    epochs = 6000
    found = Order(3, seed=0)(np.arange(3 * epochs)).reshape(epochs, 3)
    counts = np.array([np.count_nonzero((found == p).all(1)) for p in itertools.permutations(range(3))])
    assert counts.sum() == epochs
    expected = epochs / 6
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("size", [10, 100, 1100])
def test_places_are_uniform_over_epochs(size):
    """Where a sample stands is uniform, and so is the sample that follows it."""
    epochs = 6000
    order = Order(size, seed=1)
    found = np.array([order(np.array([0, 1]) + epoch * size) for epoch in range(epochs)])
    steps = (found[:, 1] - found[:, 0]) % size
    for counts in (np.bincount(found[:, 0], minlength=size), np.bincount(steps, minlength=size)[1:]):
        expected = epochs / len(counts)
        statistic = ((counts - expected) ** 2 / expected).sum()
        free = len(counts) - 1
        assert abs(statistic - free) < 4.5 * np.sqrt(2 * free)


def test_batches_of_a_sorted_set_mix_its_classes():
    """1000 shards of one class each: as many classes in a batch of 256 as independent draws give (226.1 +- 4.5)."""
    found = Order(1000 * 50, seed=0)(np.arange(256 * 40)).reshape(40, 256) // 50
    distinct = [len(set(batch)) for batch in found.tolist()]
    assert abs(np.mean(distinct) - 226.1) < 3


def test_neighbours_are_unrelated():
    found = Order(20000, seed=2)(np.arange(20000)).astype(float)
    for lag in (1, 2, 64, 128, 256):
        assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 0.03


def test_bad_settings_are_told():
    with pytest.raises(UserError, match="no samples"):
        Order(0, seed=0)
    with pytest.raises(UserError, match="seed"):
        Order(5, seed=-1)
