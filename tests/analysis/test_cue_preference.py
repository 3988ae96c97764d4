"""The procedural set: what features of shape, of texture, or of neither lead to."""

import numpy as np
import torch
from torch.nn import functional as F

from convscope.analysis.cue_preference import CuePreferenceConfig, drawings, measure, preference, random_pairings
from convscope.core.backbone import create_backbone

CONFIG = CuePreferenceConfig(pairings=3, per_pair=4)
DRAWN = drawings(CONFIG, seed=0)
PAIRINGS = random_pairings(3, seed=0)
SHAPES, TEXTURES = (F.one_hot(torch.from_numpy(one), 8).float() for one in (DRAWN.shape, DRAWN.texture))


def test_features_of_shape_and_of_texture() -> None:
    for features, expected in ((SHAPES, 1.0), (TEXTURES, 0.0)):
        cues, details = preference(features, DRAWN, PAIRINGS, c=1.0, seed=0)
        assert cues.bias is not None
        assert (cues.bias.value, cues.coverage.value, details["consistent_accuracy"]) == (expected, 1.0, 1.0)
        assert cues.by_category.tolist() == [expected] * 8


def test_the_stronger_cue_wins() -> None:
    """Standardised features count alike; shape is told twice here."""
    cues, details = preference(torch.cat([SHAPES, SHAPES, TEXTURES], 1), DRAWN, PAIRINGS, c=1.0, seed=0)
    assert cues.bias is not None
    assert cues.bias.value == 1.0
    assert [one["cue_preference"] for one in details["pairings"]] == [1.0] * 3


def test_noise_has_no_preference() -> None:
    noise = torch.randn(len(DRAWN.shape), 6, generator=torch.Generator().manual_seed(0))
    cues, _ = preference(noise, DRAWN, PAIRINGS, c=1.0, seed=0)
    assert cues.bias is None
    assert abs(cues.coverage.value - 2 / 8) < 0.06


def test_consistent_pairs_are_never_counted() -> None:
    cues, _ = preference(SHAPES, DRAWN, PAIRINGS, c=1.0, seed=0)
    always = np.ones(64 * 4, dtype=bool)
    for pairing in PAIRINGS:
        always &= pairing[DRAWN.texture] == DRAWN.shape
    assert cues.stimuli == 256 - always.sum()


def test_of_a_network() -> None:
    backbone = create_backbone("test_resnet", seed=0)
    before = backbone.preprocessing
    few = drawings(CuePreferenceConfig(per_pair=4, drawing_size=32), seed=1)
    cues, details = measure(backbone, few, PAIRINGS[:1], c=1.0, batch_size=64, device="cpu", seed=0)
    assert backbone.preprocessing == before
    assert len(details["pairings"]) == 1
    assert 0 < cues.coverage.value <= 1
