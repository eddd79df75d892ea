"""Progress: a line now and then, never one a record."""

import pytest

from omniprep.run import progress


def test_a_pipe_gets_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.show_progress("prepare", num_partitions=100) as shown:
        for _ in range(100):
            now[0] += 1.0
            shown.advance(num_rows=10, num_rejected=1, num_bytes=1_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("prepare: 5/100 partitions, 50 records, ")
    assert lines[-1].startswith("prepare: 100/100 partitions, 1,000 records, ")
    assert lines[-1].endswith("100 rejected, 100.0 MB")
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with progress.show_progress("prepare", num_partitions=2) as shown:
        shown.advance(num_rows=10, num_rejected=1, num_bytes=5)
        shown.advance(num_rows=10, num_rejected=1, num_bytes=5)
    shown_text = capsys.readouterr().err
    assert "2/2" in shown_text
    assert "20 records" in shown_text
    assert "2 rejected" in shown_text
