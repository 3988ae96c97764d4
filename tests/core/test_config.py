from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from convscope.core.config import from_dict, load_yaml, save_yaml, to_dict
from convscope.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: tuple[int, int] = (224, 224)
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int
    lr: float = 1e-3
    name: str = ""
    flip: bool = True
    data: Path = Path("data")
    resume: Path | None = None
    until: int | str | None = None
    layers: tuple[str, ...] = ()
    noted: Annotated[int, "a note for the command line"] = 0
    inner: Inner = Inner()
    pair: tuple[Inner, Inner] = (Inner(), Inner(kind="b"))
    derived: int = field(default=7, init=False)


CONFIGS = st.builds(
    Config,
    steps=st.integers(),
    lr=st.floats(allow_nan=False),
    name=st.text(),
    flip=st.booleans(),
    data=st.sampled_from([Path("a/b"), Path("/x"), Path("1")]),
    resume=st.none() | st.just(Path("runs/x")),
    until=st.none() | st.integers() | st.text(),
    layers=st.lists(st.text(), max_size=3).map(tuple),
    inner=st.builds(Inner, size=st.tuples(st.integers(), st.integers()), kind=st.sampled_from(["a", "b"])),
)


def _plain(config: Config) -> dict[str, Any]:
    values = to_dict(config)
    del values["derived"]
    return values


@given(CONFIGS)
def test_yaml_round_trip(config: Config) -> None:
    text = yaml.safe_dump(_plain(config))
    assert from_dict(Config, yaml.safe_load(text)) == config


def test_file_round_trip(tmp_path: Path) -> None:
    inner = Inner(size=(32, 48), kind="b")
    save_yaml(tmp_path / "new" / "config.yaml", inner)
    assert from_dict(Inner, load_yaml(tmp_path / "new" / "config.yaml")) == inner
    assert (tmp_path / "new" / "config.yaml").read_text() == "size:\n- 32\n- 48\nkind: b\n"


def test_absent_keys_keep_their_defaults_and_yaml_exponents_are_numbers() -> None:
    config = from_dict(Config, yaml.safe_load("steps: 5\nlr: 1e-4"))
    assert config == Config(steps=5, lr=1e-4)
    assert isinstance(config.lr, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1, "stepz": 2}, "config: unknown key stepz; known keys: data, flip, "),
        ({"steps": 1, 3: 2, "z": 1}, "config: unknown key 3, z; known keys: "),
        ({"steps": 1, "derived": 2}, "config: unknown key derived; known keys: "),
        ({"inner": {}}, "config: missing key steps"),
        ({"steps": "ten"}, "config.steps: expected int, got 'ten'"),
        ({"steps": True}, "config.steps: expected int, got True"),
        ({"steps": 1.0}, "config.steps: expected int, got 1.0"),
        ({"steps": 1, "lr": "fast"}, "config.lr: expected a number, got 'fast'"),
        ({"steps": 1, "lr": None}, "config.lr: expected float, got None"),
        ({"steps": 1, "lr": True}, "config.lr: expected float, got True"),
        ({"steps": 1, "name": 3}, "config.name: expected str, got 3"),
        ({"steps": 1, "flip": 1}, "config.flip: expected bool, got 1"),
        ({"steps": 1, "data": 3}, "config.data: expected Path, got 3"),
        ({"steps": 1, "resume": ["x"]}, "config.resume: expected Path, got ['x']"),
        ({"steps": 1, "until": 1.5}, "config.until: expected int, got 1.5"),
        ({"steps": 1, "layers": "all"}, "config.layers: expected a list, got 'all'"),
        ({"steps": 1, "layers": ["a", 2]}, "config.layers[1]: expected str, got 2"),
        ({"steps": 1, "noted": "x"}, "config.noted: expected int, got 'x'"),
        ({"steps": 1, "inner": 3}, "config.inner: expected a mapping, got 3"),
        ({"steps": 1, "inner": {"size": [1]}}, "config.inner.size: expected a list of 2 values, got [1]"),
        ({"steps": 1, "inner": {"kind": "c"}}, "config.inner.kind: 'c' is none of a, b"),
        ({"steps": 1, "inner": {"kind": ["a"]}}, "config.inner.kind: ['a'] is none of a, b"),
        ({"steps": 1, "pair": [{}, {"sise": 1}]}, "config.pair[1]: unknown key sise; known keys: kind, size"),
    ],
)
def test_mistakes_are_told_in_one_line(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(Config, values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"a: \xff\xfe", "is not valid YAML"),
        (b"a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        (b"- 1\n- 2", "holds no mapping"),
        (b"", "holds no mapping"),
        (None, "No such file"),
    ],
)
def test_bad_files_are_told_in_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
