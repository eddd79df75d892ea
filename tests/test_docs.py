"""What the docs say is run: every `console` and `python` block, in a small project made of the quickstart's own files.

A block with a title is written to that file. A console block's lines that start with `$ ` must exit with 0.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from omniprep.errors import Reason

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [*DOCS.rglob("*.md"), ROOT / "README.md"])
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return (language, title, text) of a page's fenced blocks."""
    return [(match[1], match[2] or "", match[3]) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def run(command: list[str] | str, folder: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        command, shell=isinstance(command, str), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, ffmpeg: str) -> Path:
    """Return a folder with the quickstart's files, its media and its dataset."""
    folder = tmp_path_factory.mktemp("project")
    data = folder / "data"
    data.mkdir()
    ramp = np.linspace(0, 255, 320).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp, (240, 320))).save(data / "photo.jpg")
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(24_000) / 16_000)
    soundfile.write(data / "tone.wav", tone, 16_000, subtype="PCM_16")
    sources = ["-f", "lavfi", "-i", "testsrc=size=320x240:rate=25:duration=3", "-f", "lavfi", "-i", "sine=duration=3"]
    coding = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac", "clip.mp4"]
    run([ffmpeg, "-v", "error", *sources, *coding], data)
    for _, title, text in blocks(DOCS / "quickstart.md"):
        if title:
            (folder / title).write_text(text, encoding="utf-8")
    run("omniprep prepare recipe.yaml", folder)
    return folder


@pytest.mark.reference
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(kind in ("console", "python") for kind, *_ in blocks(page))],
    ids=lambda page: page.stem,
)
def test_blocks_run(page: Path, project: Path) -> None:
    python: list[str] = []
    for kind, title, text in blocks(page):
        if title:
            (project / title).write_text(text, encoding="utf-8")
        if kind == "console":
            for line in text.splitlines():
                if line.startswith("$ "):
                    run(line.removeprefix("$ "), project)
        elif kind == "python":
            python.append(text)
    if python:
        run([sys.executable, "-c", "\n".join(python)], project)


def test_quickstart_shows_what_it_says(project: Path) -> None:
    out = run("omniprep prepare recipe.yaml", project)
    assert "4 records in 1 shards" in out and "rejected: 1 (media_missing 1)" in out


def test_preparing_needs_no_torch(project: Path) -> None:
    """The README says so; importing torch is made to fail."""
    block = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "torchaudio", "transformers"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
"""
    start = "from omniprep.cli import main; sys.argv = ['omniprep', *sys.argv[1:]]; main()"
    run([sys.executable, "-c", block + start, "prepare", "recipe.yaml", "--out", "build/plain"], project)
    assert (project / "build/plain/train-chat-00000.tar").read_bytes() == (
        project / "build/sft/train-chat-00000.tar"
    ).read_bytes()


def test_every_reason_is_explained() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (DOCS / "reference" / "reasons.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(Reason)


def test_every_recipe_key_is_explained() -> None:
    from omniprep.encode.thinker import EncodeConfig
    from omniprep.recipe import Recipe, RunConfig, ShardConfig

    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    fields = {*Recipe.model_fields, *EncodeConfig.model_fields, *RunConfig.model_fields, *ShardConfig.model_fields} - {"folder"}
    for nested in ("template", "audio", "image", "video", "tokenizer"):
        fields |= set(type(getattr(EncodeConfig(), nested)).model_fields)
    missing = sorted(field for field in fields if f"`{field}`" not in page)
    assert not missing


def test_every_part_key_is_explained() -> None:
    from omniprep.records import AudioPart, ImagePart, TextPart, VideoPart

    page = (DOCS / "inputs.md").read_text(encoding="utf-8")
    for part in (TextPart, ImagePart, AudioPart, VideoPart):
        for field in part.model_fields:
            assert f"`{field}`" in page or field == "type", f"{part.__name__}.{field}"


@pytest.mark.parametrize("name", ["rope_figure", "plan_figure", "training_figure"])
def test_figures_are_drawn_by_todays_code(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.OUT.read_text(encoding="utf-8") == module.figure(), f"run `python docs/{name}.py`"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8") + (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        name = page.name if page.name[0].isdecimal() else str(page.relative_to(DOCS))
        assert name in listed, page
