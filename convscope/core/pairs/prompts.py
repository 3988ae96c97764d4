"""Sentences about class names, for zero-shot classification."""

from collections.abc import Sequence
from pathlib import Path

from convscope.core.errors import UserError
from convscope.core.files import read_bytes
from convscope.core.pairs.embed import SIMPLE


def template_list(source: str) -> list[str]:
    """Sentences with {} in place of a class name.

    Raises:
        UserError: a line without {}.
    """
    if source == "simple":
        return list(SIMPLE)
    if source == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    templates = text_lines(source)
    if wrong := [line for line in templates if "{}" not in line]:
        raise UserError(f"{source}: {wrong[0]!r} has no {{}} for the name of a class")
    return templates


def text_lines(path: str) -> list[str]:
    """Lines of a text file that are not blank.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    lines: Sequence[str] = read_bytes(Path(path)).decode(errors="replace").splitlines()
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"{path} is empty")
    return found
