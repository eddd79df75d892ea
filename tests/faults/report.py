"""The table of faults survived, printed at the end of a session. Rows travel with the tests' reports, so xdist keeps them."""

from typing import Any

PROPERTY = "records accounted for"


def row(fault: str, num_rows: int, num_stored: int, num_rejected: int) -> str:
    return f"{fault}: records in {num_rows} = in shards {num_stored} + in quarantine {num_rejected}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what every fault left of the records that came in."""
    reports = [report for status in ("passed", "failed") for report in terminalreporter.stats.get(status, ())]
    rows = [text for report in reports if report.when == "call" for name, text in report.user_properties if name == PROPERTY]
    if rows:
        terminalreporter.section("faults survived")
        for text in sorted(rows):
            terminalreporter.write_line(text)
