import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from convscope.core.errors import UserError
from convscope.core.tracking import open_trackers

absent = {name: importlib.util.find_spec(name) is None for name in ("tensorboard", "wandb")}


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    assert open_trackers([], tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_with_its_remedy(name: str, tmp_path: Path) -> None:
    if not absent[name]:
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=rf"^{name} is not installed; pip install 'convscope\[tracking\]'$"):
        open_trackers([name], tmp_path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(absent["tensorboard"], reason="tensorboard is not installed")
def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(["tensorboard"], tmp_path, {"mask_ratio": 0.6})
    tracker.log(3, {"loss": 0.5})
    tracker.log(4, {"loss": 0.25})
    tracker.image(4, "reconstruction", _png())
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5), (4, 0.25)]
    assert [(event.step, event.height, event.width) for event in events.Images("reconstruction")] == [(4, 3, 4)]


@pytest.mark.skipif(absent["wandb"], reason="wandb is not installed")
def test_wandb_offline_continues_the_same_run(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from convscope.core.tracking import open_trackers\n"
        "(tracker,) = open_trackers(['wandb'], Path(sys.argv[1]), {'mask_ratio': 0.6})\n"
        "tracker.log(1, {'loss': 0.5}); tracker.close()"
    )
    for _ in range(2):
        environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True, timeout=120)
    identity = (tmp_path / "wandb" / "run-id").read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))) >= 1
