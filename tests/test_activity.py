"""What a terminal shows: bars that fit, and signs of life where nothing else happens."""

import io
import time

import pytest
import tqdm

from caat_jax import activity


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_bars_show_what_matters_first(columns):
    line = tqdm.tqdm.format_meter(
        34, 200, 30, columns, bar_format=activity.BAR_FORMAT, postfix="loss 2.412, 14,251 tok/s"
    )
    assert line.startswith("34/200, loss 2.412, 14,251 tok/s, 02:26 left |") and line[-1] == "|"
    assert len(line) == columns


def test_seconds_are_written_while_something_runs_and_taken_away(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with activity.shown("compiling", every=0.01):
        while "compiling, 0 s" not in terminal.getvalue():
            time.sleep(0.001)
    written = terminal.getvalue()
    assert written.endswith("\r\x1b[K") and "\n" not in written
    time.sleep(0.03)
    assert terminal.getvalue() == written


def test_nothing_is_written_where_there_is_no_terminal(capsys):
    with activity.shown("compiling", every=0.001):
        time.sleep(0.01)
    assert capsys.readouterr().err == ""
