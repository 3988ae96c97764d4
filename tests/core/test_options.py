"""Settings that many commands have."""

from dataclasses import dataclass

import pytest

from convscope.core.errors import UserError
from convscope.core.options import require_at_least


@dataclass(frozen=True)
class Settings:
    """Some numbers."""

    batch_size: int = 1
    processes: int | None = None


@pytest.mark.parametrize(("task", "where"), [("", ""), ("erf", "erf: ")])
def test_a_setting_below_the_least_is_named_as_its_flag(task: str, where: str) -> None:
    require_at_least(Settings(), 1, "batch_size", "processes", task=task)  # None is a default
    with pytest.raises(UserError) as error:
        require_at_least(Settings(batch_size=0), 1, "processes", "batch_size", task=task)
    assert str(error.value) == f"{where}--batch-size must be at least 1, got 0"
