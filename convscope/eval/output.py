"""Where a result goes when nobody says."""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from convscope.core.config import to_dict
from convscope.core.errors import UserError
from convscope.core.results import EvalResult, load_result, save_result

LONGEST = 60  # letters that may follow the task in a file's name
# Details that say how something was measured, beside all that `settings` holds; the rest says what came of it.
SETTINGS = (
    *("pool", "precision", "store", "recall_at", "skip_self", "index"),
    *("templates", "classes", "depth", "scale_power", "whitening"),
)


def save_by_name(result: EvalResult, model: str, stem: str | None = None) -> Path:
    """Write a result to RUN/results/TASK.json for a run directory, else to results/ARCH-TASK.json.

    What is there is replaced where it was measured in the same way: same protocol, data, layers, settings and seed,
    and outside of a run the same weights. Otherwise it stays, and what tells the new one from it follows the task, as
    in few-shot-logreg.json or knn-shapes-layer4.json; where that is taken as well, a hash follows.

    Args:
        result: what to write.
        model: as the user named it.
        stem: in place of the task.

    Raises:
        UserError: as `save_result`.
    """
    task, arch = stem or result.task, result.model.get("arch")
    name = model.removeprefix("timm:") if model.startswith("timm:") else arch  # timm's @random stays visible
    in_run = Path(model).is_dir()
    path = Path(model) / "results" / task if in_run else Path("results") / f"{name}-{task}"
    with _one_at_a_time(path.parent):
        free = _free_path(path, result, in_run)
        save_result(free, result)
    return free


def _free_path(path: Path, result: EvalResult, in_run: bool) -> Path:
    """The first of `path`.json, `path`-WORDS.json and `path`-WORDS-HASH.json that nothing else has."""
    ours = _identity(result, in_run)
    first = path.with_name(f"{path.name}.json")
    there = _result_at(first)
    if there is None or _same(ours, _identity(there, in_run)):
        return first
    named = path.with_name("-".join([path.name, *_words(result, there, in_run)]))
    second = named.with_name(f"{named.name}.json")
    there = _result_at(second)
    if second != first and (there is None or _same(ours, _identity(there, in_run))):
        return second
    digest = hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()[:8]
    return named.with_name(f"{named.name}-{digest}.json")


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep another command from choosing the same name meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; --output names another file") from error
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _result_at(path: Path) -> EvalResult | None:
    """None where nothing is, or nothing that is a result."""
    try:
        return load_result(path)
    except UserError:
        return None


def _identity(result: EvalResult, in_run: bool) -> dict[str, Any]:
    """All that says how a result was measured, wherever the data lie."""
    details = result.details
    parts = [part if isinstance(part := result.data.get(name), Mapping) else {} for name in ("train", "test")]
    identity = {
        "protocol": result.protocol,
        "images": [[part.get("fingerprint"), part.get("count")] for part in parts],
        **{name: result.data[name] for name in ("label", "targets") if name in result.data},
        "layers": list(details.get("layers", ())),  # a list, or what came of each
        **{name: details[name] for name in SETTINGS if name in details},
        **result.preprocessing,
        **details.get("settings", {}),
        "seed": result.seed,
    }
    if not in_run:  # a run's results are those of its newest weights
        identity["weights"] = result.model.get("weights_hash")
    plain: dict[str, Any] = json.loads(json.dumps(to_dict(identity)))
    return plain


def _same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether nothing that both name differs; what one of them does not name is of another version's making."""
    return not _differing(ours, theirs)


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [name for name in ours if name in theirs and ours[name] != theirs[name]]


def _words(ours: EvalResult, theirs: EvalResult, in_run: bool) -> list[str]:
    """What tells a result from another one, in words for a file's name; none where these would be too many."""
    identity = _identity(ours, in_run)
    words = []
    for name in _differing(identity, _identity(theirs, in_run)):
        if name == "protocol":
            known = re.findall(r"\w+", theirs.protocol)
            words.append("-".join(word for word in re.findall(r"\w+", ours.protocol) if word not in known))
        elif name == "images":
            words.append(_data_name(str(ours.data.get("source", ""))))
        elif name == "weights":
            source = str(ours.model.get("source", ""))
            words.append(Path(source).stem if source != theirs.model.get("source") else identity[name][:8])
        else:
            words.append(_said(name, identity[name]))
    found = [slug for word in dict.fromkeys(words) if (slug := re.sub(r"[^\w.@]+", "-", word).strip("-."))]
    return found if len("-".join(found)) <= LONGEST else []


def _said(name: str, value: object) -> str:
    """A setting in words: its value where that is a word or several, else its name too; nested ones are not told."""
    if isinstance(value, Mapping):
        return ""
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    values = value if isinstance(value, list) else [value]
    said = "-".join(map(str, values))
    return said if all(isinstance(one, str) for one in values) else f"{name}-{said}"


def _data_name(source: str) -> str:
    """The last word of where data come from: shards for /data/shards/, shapes for builtin:shapes or shapes/*.tar."""
    path = Path(source.rpartition(":")[2])
    name = path.parent.name if path.suffix == ".tar" else path.name
    return re.sub(r"[^\w.]+", "-", name).strip("-.")[:40] or "data"
