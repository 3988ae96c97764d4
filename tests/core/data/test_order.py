"""The order is a permutation in every epoch, needs no state, and looks random."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convscope.core.data.order import Mixed, Shuffled, ShuffledInGroups, uniform_at
from convscope.core.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 1024, 1025, 4096, 4097, 70001])
def test_every_epoch_is_a_permutation(size):
    order = Shuffled(size, seed=3)
    for epoch in (0, 1, 1000):
        found = order(np.arange(size) + epoch * size)
        assert np.array_equal(np.sort(found), np.arange(size))
        assert found.dtype == np.int64


def test_a_position_says_it_all():
    """Any set of positions, in any grouping, over epochs, from any instance."""
    whole = Shuffled(100, seed=5)(np.arange(1000))
    chosen = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(Shuffled(100, seed=5)(chosen), whole[chosen])
    assert [int(Shuffled(100, seed=5)(np.array([p]))[0]) for p in (0, 99, 100, 555)] == whole[
        [0, 99, 100, 555]
    ].tolist()
    assert len(Shuffled(100, seed=5)(np.array([], dtype=np.int64))) == 0


def test_epochs_and_seeds_differ():
    orders = [Shuffled(1000, seed)(np.arange(3000)).reshape(3, 1000) for seed in (0, 1)]
    rows = np.concatenate([*orders, np.arange(1000)[None]])
    for a, b in itertools.combinations(rows, 2):
        assert np.count_nonzero(a == b) < 10  # two random permutations share one place on average


def test_huge_sets_need_no_memory():
    size = 10**12
    found = Shuffled(size, seed=0)(np.arange(1000, dtype=np.int64) + 5 * size)
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0
    assert found.max() < size
    assert abs(found.mean() / size - 0.5) < 0.05


def test_all_orders_of_three_are_equally_likely():
    epochs = 6000
    found = Shuffled(3, seed=0)(np.arange(3 * epochs)).reshape(epochs, 3)
    counts = np.array([np.count_nonzero((found == p).all(1)) for p in itertools.permutations(range(3))])
    assert counts.sum() == epochs
    expected = epochs / 6
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("size", [10, 100, 1100])
def test_places_are_uniform_over_epochs(size):
    """Where a sample stands is uniform, and so is the sample that follows it."""
    epochs = 6000
    order = Shuffled(size, seed=1)
    found = np.array([order(np.array([0, 1]) + epoch * size) for epoch in range(epochs)])
    steps = (found[:, 1] - found[:, 0]) % size
    for counts in (np.bincount(found[:, 0], minlength=size), np.bincount(steps, minlength=size)[1:]):
        expected = epochs / len(counts)
        statistic = ((counts - expected) ** 2 / expected).sum()
        free = len(counts) - 1
        assert abs(statistic - free) < 4.5 * np.sqrt(2 * free)


def test_batches_of_a_sorted_set_mix_its_classes():
    """1000 shards of one class each: as many classes in a batch of 256 as independent draws give (226.1 +- 4.5)."""
    found = Shuffled(1000 * 50, seed=0)(np.arange(256 * 40)).reshape(40, 256) // 50
    distinct = [len(set(batch)) for batch in found.tolist()]
    assert abs(np.mean(distinct) - 226.1) < 3


def test_neighbours_are_unrelated():
    found = Shuffled(20000, seed=2)(np.arange(20000)).astype(float)
    for lag in (1, 2, 64, 128, 256):
        assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 0.03


def test_bad_settings_are_told():
    with pytest.raises(UserError, match="no samples"):
        Shuffled(0, seed=0)
    with pytest.raises(UserError, match="seed"):
        Shuffled(5, seed=-1)


SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)


@given(sizes=SIZES, group=st.integers(1, 10), seed=st.integers(0, 5))
def test_groups_of_shards(sizes, group, seed):
    """Every epoch is a permutation; its groups hold whole shards, each of them in one group."""
    total = sum(sizes)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    order = ShuffledInGroups(sizes, seed, group)
    whole = order(np.arange(3 * total))
    for epoch in whole.reshape(3, total):
        assert np.array_equal(np.sort(epoch), np.arange(total))
        spans = {shard: np.flatnonzero(owner[epoch] == shard) for shard in np.unique(owner)}
        for position in range(total):  # a new group starts only when the one before is through
            assert sum(span.min() <= position < span.max() for span in spans.values()) <= group
    chosen = np.random.default_rng(0).permutation(3 * total)
    assert np.array_equal(ShuffledInGroups(sizes, seed, group)(chosen), whole[chosen])


def test_groups_differ_between_epochs_and_mix_within():
    order = ShuffledInGroups([100] * 64, seed=0, group=16)
    first, second = order(np.arange(2 * 6400)).reshape(2, 6400) // 100
    groups = [{*epoch[:1600].tolist()} for epoch in (first, second)]
    assert all(len(group) == 16 for group in groups)
    assert groups[0] != groups[1]
    assert len({*first[:100].tolist()}) > 12  # of the 16 shards of a group: 16 * (1 - (15/16)**100) = 15.97
    assert order.reach == 1600


def test_batches_of_a_sorted_set_of_distant_shards_mix_few_of_its_classes():
    """1000 shards of one class each: what a shuffle inside groups of 16 must give, no more and no less."""
    rng = np.random.default_rng(0)
    ideal = np.concatenate([start + rng.permutation(800) // 50 for start in range(0, 1600, 16)])
    found = ShuffledInGroups([50] * 1000, seed=0, group=16)(np.arange(50_000)) // 50
    distinct = [np.mean([len(set(stream[i : i + 256])) for i in range(0, 49_920, 256)]) for stream in (found, ideal)]
    assert distinct[0] == pytest.approx(20.2, abs=0.2)
    assert distinct[0] == pytest.approx(distinct[1], abs=0.3)


def test_one_group_of_all_shards_is_a_whole_shuffle():
    order = ShuffledInGroups([40, 0, 60], seed=1, group=5)
    assert order.reach == 100
    assert len({*(order(np.arange(10)) // 40).tolist()}) > 1


@pytest.mark.parametrize("weights", [(3, 1), (0.2, 0.3, 0.5), (1, 1, 1)])
def test_mixture_has_the_shares_it_is_told(weights):
    sizes = (70, 1000, 13)[: len(weights)]
    parts = [Shuffled(size, seed=2) for size in sizes]
    order = Mixed(parts, weights, seed=4)
    assert order.size == sum(sizes)
    first = np.cumsum([0, *sizes])
    found = order(np.arange(50_000))
    source = np.searchsorted(first, found, "right") - 1
    for number, part in enumerate(parts):  # each source's own stream, in its order
        own = found[source == number] - first[number]
        assert np.array_equal(own, part(np.arange(len(own))))
    share = np.array(weights) / sum(weights)
    blocks = np.stack([np.bincount(block, minlength=len(weights)) for block in source.reshape(5, 10_000)])
    assert (np.abs(blocks - 10_000 * share) < 1).all()
    assert (blocks == blocks[0]).all()
    early = np.bincount(source[:1000], minlength=len(weights)) / 1000
    assert np.abs(early - share).max() < 0.06  # 4 standard deviations
    for position in (0, 1, 999, 10_000, 31_234):
        assert order.dealt(position) == np.bincount(source[:position], minlength=len(weights)).tolist()
    chosen = np.random.default_rng(0).permutation(50_000)[:500]
    assert np.array_equal(Mixed(parts, weights, seed=4)(chosen), found[chosen])
    assert not np.array_equal(Mixed(parts, weights, seed=5)(chosen), found[chosen])


def test_mixtures_that_mean_nothing():
    parts = [Shuffled(5, seed=0), Shuffled(6, seed=0)]
    for weights, said in (
        ((1,), "1 weights were given for 2 sources"),
        ((1, 0), "must be positive"),
        ((1, float("nan")), "must be positive"),
        ((1, 1e-6), "below 1 in 10000"),
    ):
        with pytest.raises(UserError, match=said):
            Mixed(parts, weights, seed=0)


def test_numbers_that_belong_to_positions():
    positions = np.arange(20_000) * 3
    numbers = uniform_at(4, positions, 5)
    assert np.array_equal(uniform_at(4, positions[777:779], 5), numbers[777:779])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogramdd(numbers[:, :2].astype(np.float64), bins=10, range=[(0, 1)] * 2)
    assert ((counts - 200) ** 2 / 200).sum() < 149  # 99.9 % of the chi-squared distribution with 99 degrees of freedom
    lagged = np.concatenate([numbers[1:], uniform_at(5, positions[1:], 5)], axis=1)  # the next position, another seed
    assert np.abs(np.corrcoef(numbers[:-1], lagged, rowvar=False) - np.eye(15)).max() < 0.035  # 5 / sqrt(20 000)
