"""Where a result goes when nobody says."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convscope.core.errors import UserError
from convscope.core.results import load_result


def default_output(model: str, arch: str, task: str, data: Mapping[str, Any] | None = None) -> Path:
    """RUN/results/TASK.json for a run directory; else results/ARCH-TASK.json, where timm's @random stays visible.

    Where that file holds a result on other data than `data` (other images, other labels), the name of the data follows
    the task; where that is taken as well, a hash of the data follows.
    """
    name = model.removeprefix("timm:") if model.startswith("timm:") else arch
    path = Path(model) / "results" / task if Path(model).is_dir() else Path("results") / f"{name}-{task}"
    if data is None:
        return path.with_name(f"{path.name}.json")
    digest = hashlib.sha256(json.dumps(_identity(data)).encode()).hexdigest()[:8]
    endings = ["", f"-{_data_name(str(data.get('source', '')))}"]
    names = [path.with_name(f"{path.name}{ending}.json") for ending in (*endings, f"{endings[1]}-{digest}")]
    return next((each for each in names if _is_free(each, data)), names[-1])


def _is_free(path: Path, data: Mapping[str, Any]) -> bool:
    """Whether nothing is there, nothing that is a result, or a result on the same data."""
    try:
        return _identity(load_result(path).data) == _identity(data)
    except UserError:
        return True


def _identity(data: Mapping[str, Any]) -> list[object]:
    """What makes data the same wherever they lie."""
    parts = [part if isinstance(part := data.get(name), Mapping) else {} for name in ("train", "test")]
    return [*((part.get("fingerprint"), part.get("count")) for part in parts), data.get("label")]


def _data_name(source: str) -> str:
    """The last word of where data come from: shards for /data/shards/, shapes for builtin:shapes or shapes/*.tar."""
    path = Path(source.rpartition(":")[2])
    name = path.parent.name if path.suffix == ".tar" else path.name
    return re.sub(r"[^\w.]+", "-", name).strip("-.")[:40] or "data"
