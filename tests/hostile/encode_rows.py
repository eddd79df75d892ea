"""The child of `harness.py`: encodes the rows of a JSONL one by one and prints what became of each.

    python encode_rows.py ROWS FIRST MEMORY_MB

A line `start N` before each row and a JSON line after it; a parent that sees no second line knows which row killed it.
"""

import json
import re
import resource
import sys
import time
from functools import partial
from pathlib import Path


def reset_peak() -> None:
    """Begin a new high-water mark of this process's memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> int:
    """Return the largest resident size since `reset_peak`."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) >> 10


def main(rows: Path, first: int, memory_mb: int) -> None:
    from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
    from omniprep.errors import RejectSample
    from omniprep.sources.formats import to_record
    from omniprep.sources.jsonl import parse_json
    from omniprep.sources.media_store import MediaConfig, MediaStore

    encoder = ThinkerEncoder(EncodeConfig())
    resolve = partial(MediaStore(MediaConfig()).resolve, base=str(rows.parent))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    for number, line in enumerate(rows.read_bytes().splitlines()):
        if number < first:
            continue
        print(f"start {number}", flush=True)
        reset_peak()
        started_s = time.perf_counter()
        outcome, detail = "encoded", ""
        try:
            value, error = parse_json(line)
            record = to_record(value) if error is None else None
            if record is None:
                outcome, detail = str(error.reason), error.detail
            else:
                encoder.encode(record, key="k", resolve=resolve)
        except RejectSample as reject:
            outcome, detail = str(reject.reason), reject.detail
        except Exception as error:
            import traceback

            outcome = f"bug: {type(error).__name__}"
            detail = f"{error} at {traceback.extract_tb(error.__traceback__)[-3:]}"
        seconds = time.perf_counter() - started_s
        values = {"number": number, "outcome": outcome, "detail": detail, "seconds": seconds, "peak_mb": peak_mb()}
        print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
