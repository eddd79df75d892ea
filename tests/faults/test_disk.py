"""The disk is full, becomes read-only or loses files: one line says so, nothing half written is left, and a rerun goes on."""

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omniprep.verify import verify
from tests.faults.builds import finished, line_of_error, on_each_executor, prepare, rerun, watching
from tests.prepare_builders import last_write, tree

pytestmark = pytest.mark.media
GATE = "0022.wav"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a disk of so many bytes in memory; skip where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(num_bytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("a file system can only be mounted by root")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(place)], check=True)


@pytest.mark.fault("full disk while shards are written")
@on_each_executor
def test_a_full_disk(undisturbed, begin, survived, small_disk, how) -> None:
    disk = small_disk(900_000)
    command = prepare(undisturbed.corpus.recipe, disk / "out", *how)
    with watching(disk / "out") as watch:
        run = begin(command)
        assert run.wait() == 1, run.told()
        told = line_of_error(run.told())
        assert "No space left on device; free some space and run the same command again: what is finished is kept" in told
        assert list(disk.rglob("*.partial")) == []
        assert 0 < finished(disk / "out") < 12
        remount(disk, "size=20m")
        run = begin(prepare(undisturbed.corpus.recipe, disk / "out"))
        assert run.wait() == 0
    assert "of 12 partitions are finished already" in run.told()
    watch.check(undisturbed.files)
    survived(disk / "out", num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


@pytest.mark.fault("full disk in the middle of the manifest")
def test_a_full_disk_at_the_manifest(undisturbed, begin, survived, small_disk) -> None:
    disk = small_disk(20 << 20)
    out = disk / "out"
    shutil.copytree(undisturbed.out, out)
    num_bytes = (out / "manifest.json").stat().st_size
    (out / "manifest.json").unlink()
    assert num_bytes > 16_000
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 12_288))
    with watching(out) as watch:
        run = begin(prepare(undisturbed.corpus.recipe, out))
        assert run.wait() == 1, run.told()
        assert line_of_error(run.told()).startswith(f"error: {out}/manifest.json: No space left on device; free some space")
        assert not (out / "manifest.json").exists()
        assert list(disk.rglob("*.partial")) == []
        (disk / "ballast").unlink()
        run = begin(prepare(undisturbed.corpus.recipe, out))
        assert run.wait() == 0
    assert "12 of 12 partitions are finished already" in run.told()
    watch.check(undisturbed.files)
    survived(out, num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


@pytest.mark.fault("files may not grow (ulimit -f)")
def test_a_limit_on_the_size_of_files(undisturbed, survived, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in undisturbed.out.glob("*.tar"))
    done = subprocess.run(
        prepare(undisturbed.corpus.recipe, tmp_path / "out"),
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1)),
    )
    assert done.returncode == 1
    assert "File too large; raise the limit on file sizes (ulimit -f)" in line_of_error(done.stderr)
    assert list(tmp_path.rglob("*.partial")) == []
    rerun(undisturbed.corpus.recipe, tmp_path / "out")
    survived(tmp_path / "out", num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


@pytest.mark.fault("the output becomes read-only")
def test_a_read_only_disk(undisturbed, decoders, begin, survived, small_disk) -> None:
    """Root may write where permissions say no, but not where the mount does."""
    disk = small_disk(20 << 20)
    out = disk / "out"
    decoders.fail({GATE: "gate"})
    run = begin(prepare(undisturbed.corpus.recipe, out), decoders.environment)
    decoders.wait_at(GATE)
    run.end()
    remount(disk, "ro")
    refused = begin(prepare(undisturbed.corpus.recipe, out))
    assert refused.wait() == 2
    assert line_of_error(refused.told()).startswith(f"error: output {out}: cannot be made or written: ")
    assert "Read-only file system" in refused.told()
    remount(disk, "rw")
    rerun(undisturbed.corpus.recipe, out)
    survived(out, num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


@pytest.mark.fault("the output becomes read-only while it is written")
def test_a_folder_that_takes_no_files_any_more(undisturbed, decoders, begin, survived, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decoders.fail({GATE: "gate"})
    run = begin(prepare(undisturbed.corpus.recipe, out), decoders.environment)
    decoders.wait_at(GATE)
    command = ["chattr", "+i", str(out)]
    if shutil.which("chattr") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a folder can be made immutable only by root, on some file systems")
    try:
        decoders.open_gate()
        assert run.wait() == 1, run.told()
        assert "run the same command again: what is finished is kept" in line_of_error(run.told())
    finally:
        subprocess.run(["chattr", "-i", str(out)], check=True)
    assert 0 < finished(out) < 12
    rerun(undisturbed.corpus.recipe, out)
    survived(out, num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


def _delete(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.fault("files of a finished dataset are lost or cut")
@pytest.mark.parametrize(
    ("name", "harm", "num_redone"),
    [
        ("train-chat-00003.tar", _delete, 1),
        ("train-chat-00003.tar", _truncate, 1),
        ("train-chat-00003.parquet", _delete, 1),
        ("receipts/chat-00003.json", _damage, 1),
        ("receipts/chat-00003.json", _delete, 1),
        ("receipts/chat-00003.inputs.parquet", _damage, 1),
        ("quarantine/chat-00004.parquet", _delete, 1),
        ("manifest.json", _damage, 0),
        ("receipts/recipe.json", _damage, 0),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else str(value),
)
def test_damage_between_runs(undisturbed, survived, tmp_path: Path, name: str, harm, num_redone: int) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed.out, out)
    before = {path: last_write(path) for path in out.glob("receipts/*-0*.json")}
    harm(out / name)
    rerun(undisturbed.corpus.recipe, out)
    redone = [path.name for path in before if last_write(path) != before[path]]
    assert len(redone) == num_redone
    survived(out, num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


@pytest.mark.fault("bytes of a finished shard change, its size does not")
def test_a_flipped_bit(undisturbed, survived, tmp_path: Path) -> None:
    """A rerun does not read what is finished; `verify` does. The shard is then deleted, and a rerun makes it again."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed.out, out)
    victim = out / "train-chat-00003.tar"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    rerun(undisturbed.corpus.recipe, out)
    assert any("its bytes changed" in finding.message and finding.shard == victim.name for finding in verify(out))
    victim.unlink()
    rerun(undisturbed.corpus.recipe, out)
    survived(out, num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


@pytest.mark.fault("two builds at once in one folder")
def test_two_builds_at_once(undisturbed, decoders, begin, survived, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decoders.fail({GATE: "gate"})
    with watching(out) as watch:
        first = begin(prepare(undisturbed.corpus.recipe, out), decoders.environment)
        decoders.wait_at(GATE)
        before = tree(out)
        second = begin(prepare(undisturbed.corpus.recipe, out))
        assert second.wait() == 2
        assert line_of_error(second.told()) == f"error: output {out}: another `omniprep` is writing there; wait for it"
        assert tree(out) == before
        decoders.open_gate()
        assert first.wait() == 0
    watch.check(undisturbed.files)
    survived(out, num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)
