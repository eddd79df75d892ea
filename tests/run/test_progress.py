"""Progress: a line now and then, never one a record."""

import pytest

from omniprep.run import metrics, progress
from omniprep.run.metrics import Totals


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def totals(num_rows: int, num_rejected: int = 0, num_bytes: int = 0) -> Totals:
    with metrics.collecting() as counted:
        metrics.count(metrics.ROWS, num_rows - num_rejected, source="chat", outcome="stored")
        metrics.count(metrics.ROWS, num_rejected, source="chat", outcome="rejected")
        metrics.count(metrics.BYTES_WRITTEN, num_bytes, source="chat")
    return counted


def test_a_pipe_gets_plain_lines(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress.show_progress("prepare", num_partitions=100) as shown:
        for _ in range(100):
            clock[0] += 1.0
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
    with progress.show_progress("prepare", num_partitions=2, num_rows=30) as shown:
        shown.advance(num_rows=10, num_rejected=1, num_bytes=5)
        shown.working(totals(3, 1))
        shown.advance(num_rows=20, num_rejected=1, num_bytes=5)
    shown_text = capsys.readouterr().err
    assert "2/2" in shown_text
    assert "30 of 30 records" in shown_text
    assert "2 rejected" in shown_text


def test_rows_of_unfinished_partitions_move_it_along(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress.show_progress("prepare", num_partitions=2, num_rows=4000) as shown:
        clock[0] = 10.0
        shown.working(totals(500, 20, 1_000))
        clock[0] = 20.0
        shown.working(totals(1000, 30, 2_000))
    assert capsys.readouterr().err.splitlines() == [
        "prepare: 0/2 partitions, 500 of 4,000 records, 50/s, 20 rejected, 1.0 kB, 1 min 10 s left",
        "prepare: 0/2 partitions, 1,000 of 4,000 records, 50/s, 30 rejected, 2.0 kB, 1 min 0 s left",
    ]


def test_a_partition_that_finishes_or_starts_again_is_counted_once(clock: list[float]) -> None:
    counts = progress.Counts(planned_rows=4000)
    counts.working(totals(1500))  # 900 of one and 600 of another
    counts.advance(num_rows=1000, num_rejected=0, num_bytes=0)
    assert counts.num_rows == 1500, "the first is finished; until the next report, what was seen of it is not counted twice"
    counts.working(totals(600))
    assert counts.num_rows == 1600
    counts.working(totals(0))  # its worker died
    assert counts.num_rows == 1000


def test_the_end_says_where_the_time_went(capsys: pytest.CaptureFixture[str]) -> None:
    metrics.count(metrics.STAGE_SECONDS, 100, stage="read")  # of an earlier run
    with progress.show_progress("prepare", num_partitions=1):
        metrics.count(metrics.STAGE_SECONDS, 3, stage="encode")
        metrics.count(metrics.STAGE_SECONDS, 1, stage="write")
    assert capsys.readouterr().err.splitlines() == ["prepare: time of the workers: encode 75%, write 25%"]


def test_a_long_scan_says_what_it_has_found(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress.show_scan("scanning sources") as scan:
        for _ in range(12):
            clock[0] += 1.0
            scan.add(num_files=1, num_rows=1000)
    assert capsys.readouterr().err.splitlines() == [
        "scanning sources… 5 files, 5,000 rows",
        "scanning sources… 10 files, 10,000 rows",
        "scanning sources: 12 files, 12,000 rows",
    ]


def test_a_short_scan_leaves_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.show_scan("scanning sources") as scan:
        scan.add(num_files=3, num_rows=10)
    assert capsys.readouterr().err == ""


def test_a_scan_in_a_terminal_is_a_status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.show_scan("scanning sources") as scan:
        scan.add(num_files=3, num_rows=1234)
    assert "scanning sources" in capsys.readouterr().err
