"""The demo, step by step: `make demo`. Every step is a command that a user can type; it is shown before it runs.

Real conversations with real media become three datasets; they are checked, one also against the installed transformers;
then a tiny Thinker is trained, its loss falls and it answers. Run from the repository's root, after `make samples`.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from omniprep.shards.manifest import Manifest, read_manifest
from omniprep.train.progress_log import LOG_NAME, read_log

SFT, ALIGN, DPO = Path("build/demo/sft"), Path("build/demo/align"), Path("build/demo/dpo")
LOG = Path("build/train/demo/words") / LOG_NAME
PYTHON = Path(sys.executable).parent

STEPS: tuple[tuple[str, str], ...] = (
    (
        "Captions, transcripts and dialogues of the samples as JSON lines",
        "python scripts/make_demo_data.py build/samples build/demo/data",
    ),
    ("Conversations of every kind -> WebDataset shards", "omniprep prepare pipelines/demo.yaml"),
    ("Media with captions and transcripts, to align a model's encoders", "omniprep prepare pipelines/demo_align.yaml"),
    ("Preference pairs -> a dataset of their own", "omniprep prepare pipelines/demo_dpo.yaml"),
    ("Digests, schema and invariants of every record", f"omniprep verify {SFT}"),
    ("The same for the pairs", f"omniprep verify {DPO}"),
    ("Every record once more, with the installed transformers", f"omniprep verify {SFT} --against transformers"),
    ("A tiny Qwen2.5-Omni Thinker learns its first words", "omniprep train thinker pipelines/train_demo.yaml --overwrite"),
)


def run_step(console: Console, number: int, title: str, command: str) -> int:
    """Show and run one command; return its exit code."""
    console.print(f"\n[bold]{number}/{len(STEPS)}  {title}[/]\n[cyan]$ {command}[/]", highlight=False, soft_wrap=True)
    start = time.perf_counter()
    program, *arguments = shlex.split(command)
    # The programs of the virtual environment, whether or not it was activated.
    code = subprocess.run([PYTHON / program, *arguments], env={**os.environ, "PYTHONUNBUFFERED": "1"}, check=False).returncode
    if code:
        console.print(f"[red]step {number} failed with exit code {code}[/]: {command}", highlight=False, soft_wrap=True)
    else:
        console.print(f"[dim]{time.perf_counter() - start:.1f} s[/]", highlight=False)
    return code


def summary(folder: Path, manifest: Manifest) -> str:
    """Return what a dataset holds in one line."""
    totals = manifest.totals
    kinds = ", ".join(f"{count.num_records} {name.replace('_', ' ')}" for name, count in manifest.by_modality.items())
    media = f", {totals.audio_s:.0f} s of sound, {totals.video_s:.0f} s of video" if totals.audio_s or totals.video_s else ""
    return (
        f"{folder}: {totals.num_records} records ({kinds}), {totals.num_tokens:,} tokens{media}, in {len(manifest.shards)} shards"
    )


def losses_of(log: Path) -> list[float]:
    """Return the logged losses of a training run, in order."""
    return [line["loss"] for line in read_log(log, kind="step")]


def show_training(console: Console, log: Path) -> None:
    """Show how the loss fell and what the model answers now."""
    losses = losses_of(log)
    console.print("\n[bold]Learnt[/]", highlight=False)
    console.print(f"  loss {losses[0]:.2f} -> {losses[-1]:.2f}: {bars(losses)}", highlight=False)
    for answer in read_log(log, kind="sample"):
        question = answer["question"].rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0]
        for what, text in (("asked", question), ("answered", answer["answer"])):
            console.print(f"  {what:<9}", Text(" ".join(text.split())), highlight=False, soft_wrap=True)
    console.print("  Words, no sense yet: 20 M random parameters have seen 60,000 tokens.", highlight=False)


def bars(losses: Sequence[float]) -> str:
    """Return a small picture of numbers that begin high.

    >>> bars([4.0, 2.0, 0.5])
    '█▄▁'
    """
    return "".join("▁▂▃▄▅▆▇█"[max(0, round(8 * loss / max(losses)) - 1)] for loss in losses)


def closing(console: Console) -> None:
    """Say what was made, where, and what to type next."""
    manifests = {folder: read_manifest(folder) for folder in (SFT, ALIGN, DPO)}
    console.print("\n[bold]Made[/]", highlight=False)
    for folder, manifest in manifests.items():
        console.print(f"  {summary(folder, manifest)}", highlight=False, soft_wrap=True)
    for folder, manifest in manifests.items():
        for reason, count in manifest.rejects.items():
            console.print(f"  {folder}/quarantine: {count} x {reason}, whole, with the reason", highlight=False, soft_wrap=True)
    show_training(console, LOG)
    console.print("\n[bold]Next[/]", highlight=False)
    for command, why in (
        (". .venv/bin/activate", "so that `omniprep` is on your PATH"),
        (f"omniprep inspect {SFT}", "the dataset at a glance"),
        (f"omniprep inspect {SFT} film-00000000", "one clip: tokens, loss mask in colour, positions, true times"),
        ("omniprep plan pipelines/demo.yaml", "what a recipe will make, from headers alone"),
        (
            "omniprep train thinker pipelines/train_sft.yaml",
            "train on all of it, some minutes; docs/training.md says how a real model is",
        ),
        ("omniprep prepare pipelines/demo.yaml", "again: everything is there, nothing is done twice"),
        ("less pipelines/demo.yaml docs/quickstart.md", "your own data from here"),
    ):
        console.print(f"  [cyan]{command}[/]\n      {why}", highlight=False, soft_wrap=True)


def main() -> int:
    """Run all steps; stop at the first that fails."""
    console = Console()
    for number, (title, command) in enumerate(STEPS, start=1):
        code = run_step(console, number, title, command)
        if code:
            return code
    closing(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
