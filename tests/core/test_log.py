import os
import pty
import subprocess
import sys

import pytest

from convscope.core import log

JOB = """
from convscope.core.log import info, progress
with progress("reading", 3) as ticker:
    for i in range(3):
        ticker.advance(note=f"loss {i}")
info("done")
print("result")
"""


def test_info_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PLAIN_INTERVAL", 0.0)
    with log.progress("reading", 4) as ticker:
        ticker.advance()
        ticker.advance(3, note="loss 0.5")
    assert ticker.done == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reading 1/4 eta ")
    assert lines[1] == "reading 4/4 loss 0.5 eta 0 s"


def test_short_or_disabled_jobs_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with log.progress("reading", 4) as ticker:  # ends within the interval
        ticker.advance(4)
    monkeypatch.setattr(log, "PLAIN_INTERVAL", 0.0)
    with log.progress("reading", 4, enabled=False) as ticker:
        ticker.advance(4)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_and_results_stay_on_standard_output() -> None:
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    shown = subprocess.run([sys.executable, "-c", JOB], stdout=subprocess.PIPE, stderr=follower, env=environment)
    os.close(follower)
    terminal = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert shown.stdout == b"result\n"
    assert "3/3" in terminal
    assert "━" in terminal
    assert "loss 2" in terminal
    assert terminal.endswith("done\r\n")
