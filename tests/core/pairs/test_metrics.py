"""Ranks with ties against the average over every order of equals."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convscope.core.pairs.metrics import rank, rank_pairs


def over_all_orders(scores: list[int], right: list[bool], k: int) -> tuple[float, float]:
    """Expected rank of the first right answer and chance of one among the first k."""
    ranks = []
    for order in itertools.permutations(range(len(scores))):
        found = sorted(order, key=lambda i: -scores[i])  # stable: equals stay as the permutation has them
        ranks.append(1 + next(place for place, i in enumerate(found) if right[i]))
    return sum(ranks) / len(ranks), sum(place <= k for place in ranks) / len(ranks)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6).filter(
        lambda rows: any(right for _, right in rows)
    ),
    k=st.integers(1, 6),
)
def test_ties_count_as_random_orders_do(rows: list[tuple[int, bool]], k: int) -> None:
    scores, right = [score for score, _ in rows], [right for _, right in rows]
    found = rank(torch.tensor([scores]).float(), torch.tensor([right]))
    expected_rank, chance = over_all_orders(scores, right, k)
    assert float(found.expected()[0]) == pytest.approx(expected_rank)
    assert float(found.hits(k)[0]) == pytest.approx(chance)


def test_a_model_that_says_the_same_of_everything_gets_what_guessing_gets() -> None:
    found = rank(torch.zeros(3, 20), torch.eye(20)[:3].bool())
    assert found.hits(5).tolist() == pytest.approx([0.25] * 3)
    assert found.expected().tolist() == [10.5] * 3


def test_pairs_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(30, 4, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(torch.randn(25, 4, generator=generator), dim=1)
    text = torch.cat([torch.randint(0, 25, (70,), generator=generator), torch.tensor([0, 0])])
    image = torch.cat([torch.arange(70) % 30, torch.tensor([3, 4])])  # the same words of two images
    to_text, to_image = rank_pairs(images, texts, text, image)
    for i in range(30):
        similarity = [float(images[i] @ texts[t]) for t in text]
        best = max(s for s, owner in zip(similarity, image) if owner == i)
        assert int(to_text.ahead[i]) == sum(s > best + 1e-6 for s in similarity)
    for m in range(72):
        similarity = [float(texts[text[m]] @ images[i]) for i in range(30)]
        assert int(to_image.ahead[m]) == sum(s > similarity[int(image[m])] + 1e-6 for s in similarity)
    assert int(to_text.tied.sum()) > 0  # captions of other images in the same words
