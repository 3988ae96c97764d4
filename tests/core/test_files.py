import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from convscope.core.errors import UserError
from convscope.core.files import atomic_write, cache_dir, read_json, sha256_file, write_bytes, write_json, write_with


@pytest.fixture
def small_disk(mount: Callable[[str], Path]) -> Path:
    """A file system of 64 KiB."""
    return mount("64k")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _begin_and_interrupt(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert _names(path.parent) == ["b.bin"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        _begin_and_interrupt(path)
    assert path.read_bytes() == b"old"
    assert _names(tmp_path) == ["x"]


def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk: Path) -> None:
    path = small_disk / "x"
    write_bytes(path, b"old")
    with pytest.raises(UserError, match=f"^cannot write {path}: No space left on device$"):
        write_bytes(path, bytes(1_000_000))
    with pytest.raises(UserError, match=f"^cannot write {path}: No space left on device$"):
        write_with(path, lambda temporary: temporary.write_bytes(bytes(1_000_000)))
    assert path.read_bytes() == b"old"
    assert _names(small_disk) == ["x"]


def test_a_path_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x"
    with pytest.raises(UserError, match=f"^cannot write {path}: "):
        write_bytes(path, b"")
    with pytest.raises(UserError, match=f"^cannot write {path}: "):
        write_with(path, Path.touch)


def test_write_with_keeps_the_suffix_and_leaves_nothing_on_failure(tmp_path: Path) -> None:
    def writer(path: Path) -> None:
        seen.append(path)
        path.write_text("half")
        if len(seen) == 2:
            raise ValueError("broken writer")

    seen: list[Path] = []
    write_with(tmp_path / "plot.svg", writer)
    assert (tmp_path / "plot.svg").read_text() == "half"
    with pytest.raises(ValueError, match="broken writer"):
        write_with(tmp_path / "other.svg", writer)
    assert [path.suffix for path in seen] == [".svg", ".svg"]
    assert _names(tmp_path) == ["plot.svg"]


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "ä"], "a": {"x": True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


def test_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert _names(tmp_path) == []
    with pytest.raises(UserError, match=f"^cannot read {path}: No such file"):
        read_json(path)
    for broken in (b'{"a": ', b"\xff\xfe\x00"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=f"^{path} is not valid JSON: "):
            read_json(path)


def test_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    (tmp_path / "empty").touch()
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_cache_dir_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("CONVSCOPE_CACHE", "/own")
    assert cache_dir() == Path("/own")
    monkeypatch.delenv("CONVSCOPE_CACHE")
    assert cache_dir() == Path("/xdg/convscope")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path("/someone/.cache/convscope")
