"""What analyses of one or several models share."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convscope.core.backbone import Backbone
from convscope.core.errors import UserError
from convscope.core.files import write_bytes
from convscope.core.models import load_backbone, untrained_twin


def load_models(
    sources: Sequence[str],
    *,
    arch: str | None = None,
    allow_partial: float = 1.0,
    untrained_seed: int | None = None,
) -> dict[str, Backbone]:
    """Load each MODEL once, by its label.

    Args:
        sources: what the user named.
        arch: architecture of weights that do not name their own.
        allow_partial: accepted share of a backbone's weights that a checkpoint provides.
        untrained_seed: also give each model's randomly initialised twin, of this seed, as "MODEL (untrained)".

    Raises:
        UserError: no model, or one that cannot be loaded.
    """
    if not sources:
        raise UserError("name at least one MODEL")
    found: dict[str, Backbone] = {}
    for source in dict.fromkeys(sources):
        found[source] = load_backbone(source, arch=arch, allow_partial=allow_partial)
        if untrained_seed is not None:
            found[f"{source} (untrained)"] = untrained_twin(found[source], seed=untrained_seed)
    return found


def one_or_all(values: Mapping[str, dict[str, Any]], shared: dict[str, Any]) -> dict[str, Any]:
    """The one value where all models have the same, else every model's under its label."""
    distinct = list(values.values())
    return distinct[0] if all(value == distinct[0] for value in distinct) else {**shared, "models": dict(values)}


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, whole or not at all; None is an empty cell."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    write_bytes(path, text.getvalue().encode())
