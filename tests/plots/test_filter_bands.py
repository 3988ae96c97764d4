"""Very many layers are drawn as medians and bands."""

import numpy as np

from convscope.plots.filters import BANDS, MANY, LayerSeries, _banded, draw_layers


def test_bands_are_percentiles_of_the_parts_of_the_depth() -> None:
    rng = np.random.default_rng(0)
    depth, values = rng.random(500), rng.random(500)
    depth[depth > 0.9], values[:20] = 0.05, np.nan
    middles, found = _banded(depth, values, [5, 50])
    expected = []
    for i in range(BANDS):
        part = [v for d, v in zip(depth, values) if i / BANDS <= d < (i + 1) / BANDS and v == v]
        if part:
            expected.append([(i + 0.5) / BANDS, np.percentile(part, 5), np.percentile(part, 50)])
    assert len(expected) == 18
    np.testing.assert_allclose(np.column_stack([middles, *found]), expected)
    assert _banded(np.ones(1), np.ones(1), [50])[0].tolist() == [1 - 0.5 / BANDS]


def test_points_only_of_few_layers() -> None:
    def drawn(count: int) -> int:
        depth = np.linspace(0, 1, count)
        figure = draw_layers([LayerSeries("a", *[depth] * 5, depth > 2)], "3x3")._figure
        return max(len(line.get_xdata()) for axis in figure.axes for line in axis.lines)

    assert drawn(MANY - 1) == MANY - 1
    assert drawn(MANY) == BANDS
