import io
import sys

import pytest

from secateur.utils import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Makes stderr a terminal, within a test (pytest puts its own back between a fixture and the test)."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("SECATEUR_PROGRESS", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr  # type: ignore[return-value]


def test_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_shown_on_stderr_of_a_terminal_also_nested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = terminal(monkeypatch)
    pairs = [
        (a, b) for a in progress.track([1, 2], "outer") for b in progress.track(iter("xy"), "inner", total=2)
    ]
    assert pairs == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert "outer" in screen.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("how", ["enable", "environment"])
def test_silent_when_switched_off(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    if how == "enable":
        monkeypatch.setattr(progress, "_enabled", True)  # put back after the test
        progress.enable(False)
    else:
        monkeypatch.setenv("SECATEUR_PROGRESS", "0")
    assert sum(progress.track([1, 2], "adding")) == 3
    assert screen.getvalue() == ""


def test_an_error_inside_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with pytest.raises(RuntimeError), progress.bar("failing", 2):
        raise RuntimeError
    assert list(progress.track([1], "again")) == [1]
    assert "again" in screen.getvalue()
