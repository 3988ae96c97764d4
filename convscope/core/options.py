"""Settings that many commands have, with the words of their --help, and how small a number may be."""

from typing import Annotated

import tyro

from convscope.core.errors import UserError

Arch = Annotated[str | None, tyro.conf.arg(help="Architecture of weights that do not name their own.")]
ModelArguments = Annotated[tuple[str, ...], tyro.conf.arg(help="Its arguments, such as depths=2,2,6,2.")]
AllowPartial = Annotated[
    float, tyro.conf.arg(help="Accepted share of the backbone's weights that a checkpoint provides.")
]
Device = Annotated[str, tyro.conf.arg(help="cuda, cpu, or auto.")]


def require_at_least(config: object, least: int, *names: str, task: str = "") -> None:
    """Raise a UserError where one of the named settings is below `least`; None, for a default, is not.

    Args:
        config: has the settings.
        least: accepted.
        names: of the settings.
        task: named first in the error, such as "erf".
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            where = f"{task}: " if task else ""
            raise UserError(f"{where}--{name.replace('_', '-')} must be at least {least}, got {value}")
