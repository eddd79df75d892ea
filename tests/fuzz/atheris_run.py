"""Coverage-guided fuzzing with atheris, each target in a child process.

    python -m tests.fuzz.atheris_run SECONDS [TARGET...]

An input that crashes, hangs or fails a target is kept in `build/fuzz/TARGET/`; run it again with
`python -m tests.fuzz.atheris_run --child TARGET FILE`.
"""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = ("records", "media_probe", "containers", "shard_reader")
ONE_INPUT_S = 20
MEMORY_MB = 4000


def fuzz(target: str) -> None:
    """Run libFuzzer on a target with the rest of the command line's arguments, in this process."""
    import atheris

    with atheris.instrument_imports(include=["omniprep"]):  # its own branches; those of the libraries below would drown them
        module = import_module(f"tests.fuzz.fuzz_{target}")
    module.seeds()  # what it makes once is not part of the first input's time
    atheris.Setup([sys.argv[0], *sys.argv[3:]], module.one)
    atheris.Fuzz()


def run(target: str, seconds: int, folder: Path) -> tuple[int, str]:
    """Fuzz one target in a child; return (number of executions, what went wrong or "")."""
    corpus, found = folder / target / "corpus", folder / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(import_module(f"tests.fuzz.fuzz_{target}").seeds()):
        (corpus / f"seed-{number:03d}").write_bytes(data)
    limits = [f"-max_total_time={seconds}", f"-timeout={ONE_INPUT_S}", f"-rss_limit_mb={MEMORY_MB}", "-max_len=65536"]
    arguments = [*limits, f"-artifact_prefix={found}/", "-print_final_stats=1", str(corpus)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.atheris_run", "--child", target, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=seconds + 120,
    )
    said = done.stdout + done.stderr
    executed = re.findall(r"number_of_executed_units:\s*(\d+)|Done (\d+) runs", said)
    count = max((int(number) for pair in executed for number in pair if number), default=0)
    return count, "" if done.returncode == 0 else said[-3000:]


def main() -> None:
    """Fuzz the targets one after another; exit with 1 if one failed."""
    if sys.argv[1:2] == ["--child"]:
        fuzz(sys.argv[2])
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    failed = False
    for target in sys.argv[2:] or TARGETS:
        count, trouble = run(target, seconds, ROOT / "build" / "fuzz")
        print(f"{target:14} {count:9,} executions in {seconds} s: {'FAILED' if trouble else 'ok'}", flush=True)
        if trouble:
            failed = True
            print(trouble, flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
