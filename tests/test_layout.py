"""The shape of the project: nothing shadows the standard library, nothing happens at import, nothing is left unsaid."""

import ast
import importlib.machinery
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import convscope

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "convscope"
MODULES = sorted(PACKAGE.rglob("*.py"))


def _tracked() -> list[Path]:
    """Files of the project, as git sees them."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def _python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


def test_root_packages_are_convscope_and_tests() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {"convscope", "tests"}
    assert list(ROOT.glob("*.py")) == []


def test_no_root_name_shadows_the_standard_library() -> None:
    names = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert names & sys.stdlib_module_names == set()


def test_folders_named_like_standard_modules_do_not_shadow_them() -> None:
    """`convscope/ssl` and `tests/ssl` exist; `import ssl` must still find Python's own."""
    names = {path.stem for path in (*PACKAGE.rglob("*"), *(ROOT / "tests").rglob("*"))} & sys.stdlib_module_names
    assert "ssl" in names
    for name in names:
        spec = importlib.machinery.PathFinder.find_spec(name, [str(ROOT), *sys.path])
        assert spec is None or not Path(spec.origin or "").is_relative_to(ROOT), f"{name} is found at {spec}"


def test_every_folder_of_modules_is_a_package() -> None:
    """In tests/, pytest would put the folder itself on sys.path; in convscope/, it would be a namespace package."""
    folders = {path.parent for path in (*MODULES, *(ROOT / "tests").rglob("*.py"))}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_console_scripts_exist_and_hide_no_shell_word() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"convscope", "linear-probe"} <= scripts.keys()
    assert {"eval", "ssl", "test"}.isdisjoint(scripts)
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_version_on_the_command_line() -> None:
    shown = subprocess.run([sys.executable, "-m", "convscope", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert convscope.__version__ in shown.stdout


def test_the_command_line_starts_without_torch() -> None:
    shown = _python("import sys, convscope.cli; print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))")
    assert shown.stdout == "[]\n", shown.stderr


def test_nothing_happens_at_import(tmp_path: Path) -> None:
    """Import every module in an empty folder: no output, file, connection, process, device or random number."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    code = f"""
import importlib, logging, os, random, sys
sys.path.insert(0, {str(ROOT)!r})
import matplotlib.font_manager, numpy, open_clip, pandas, rich.progress, sklearn.svm, timm, torch.distributed  # theirs
import h5py
state = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
threads, handlers, environment = torch.get_num_threads(), list(logging.root.handlers), dict(os.environ)
seen = []
def watch(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.posix_spawn", "os.mkdir")):
        origin = sys._getframe(1)
        while origin is not None:
            if {str(PACKAGE)!r} in origin.f_code.co_filename:
                seen.append((event, arguments[:2], origin.f_code.co_filename))
                break
            origin = origin.f_back
sys.addaudithook(watch)
for name in {names!r}:
    importlib.import_module(name)
assert not seen, seen
assert torch.equal(state[0], torch.get_rng_state()), "torch's random state"
assert state[1:] == (numpy.random.get_state()[1].tolist(), random.getstate()), "random state"
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert threads == torch.get_num_threads()
assert handlers == logging.root.handlers, "logging"
assert environment == dict(os.environ), "environment"
"""
    shown = _python(code, tmp_path)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_typing_marker_is_installed() -> None:
    """In the wheel's file list, or, for an editable install, in the folder that it points at."""
    installed = importlib.metadata.distribution("convscope")
    source = json.loads(installed.read_text("direct_url.json") or "{}")
    if source.get("dir_info", {}).get("editable"):
        assert (PACKAGE / "py.typed").is_file()
    else:
        files = {str(file) for file in installed.files or ()}
        assert "convscope/py.typed" in files
        assert {file.split("/")[0] for file in files if file.endswith(".py")} == {"convscope"}


# Written so that none of them matches its own line.
FORBIDDEN = re.compile(
    r"\bpy[a-z]{2}\.org|python[a-z]{6}\.org|\bdeb\.[a-z]{6}\.org|registry\.npm"  # package registries
    r"|/wor[k]/[a-z.]|/far[m]/|/opt/(?:pypi|wheels)|/(?:hom[e]|User[s])/[a-z]+/|/roo[t]/"  # paths of one machine
)


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    found = []
    for path in _tracked():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in FORBIDDEN.finditer(text)]
    assert found == []


@pytest.mark.parametrize("text", ["/wor" + "k/main/x", "/roo" + "t/x", "https://py" + "pi.org/simple", "/far" + "m/x"])
def test_the_patterns_find_what_they_are_for(text: str) -> None:
    assert FORBIDDEN.search(text)
