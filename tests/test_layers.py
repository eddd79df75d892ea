"""Imports point down: a layer knows nothing of those above it, and heavy libraries stay at their edge."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "omniprep"
LAYERS = {
    **dict.fromkeys(("__init__", "errors", "types", "records", "config", "rng", "profile"), 0),
    **dict.fromkeys(("run", "storage"), 1),
    **dict.fromkeys(("media", "features", "codecs"), 2),
    **dict.fromkeys(("tokens", "sources", "shards"), 3),
    **dict.fromkeys(("encode", "stream"), 4),
    **dict.fromkeys(
        (
            "prepare",
            "prepare_partition",
            "seal",
            "plan",
            "probe",
            "guarded_rows",
            "partition_size",
            "recipe",
            "receipts",
            "schema",
            "verify",
            "verify_sample",
            "verify_reference",
        ),
        5,
    ),
    **dict.fromkeys(("bench_loader", "reference", "encode_files", "inspect", "audit", "train", "diff", "quarantine_report"), 5),
    **dict.fromkeys(("cli", "terminal", "__main__"), 6),
}
ONLY_IN = {
    "ray": {"run/ray", "stream/views"},
    "torch": {"train/", "stream/dataset.py", "bench_loader.py", "features/", "media/", "reference.py", "verify_reference.py"},
}
"""Libraries that only these files or folders may import."""
NEVER_AT_THE_TOP = {
    "torch",
    "torchvision",
    "torchaudio",
    "transformers",
    "av",
    "decord",
    "ray",
    "datasets",
    "librosa",
    "webdataset",
}
"""Libraries that are imported where they are used, so that a run that needs none of them loads none."""

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST):
    """Yield (imported module, whether it is imported when the file is)."""
    lazy = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_top = id(node) not in lazy and id(node) not in typing
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, at_top
            if node.module == "omniprep":
                yield from ((f"omniprep.{alias.name}", at_top) for alias in node.names if not alias.name.startswith("_"))


def layer_of(module: str) -> int:
    parts = module.split(".")
    return LAYERS[parts[1] if len(parts) > 1 else "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    own = LAYERS[Path(name).parts[0].removesuffix(".py")]
    may_be_heavy = name.startswith(("train/", "stream/dataset.py"))  # whoever imports these wants torch
    for module, at_top in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if module.split(".")[0] == "omniprep":
            assert layer_of(module) <= own, f"{name} (layer {own}) imports {module} (layer {layer_of(module)})"
        library = module.split(".")[0]
        if library in ONLY_IN:
            assert any(name.startswith(place) for place in ONLY_IN[library]), f"{name} imports {library}"
        if at_top and not may_be_heavy:
            assert library not in NEVER_AT_THE_TOP, f"{name} imports {library} when it is itself imported"


def test_the_test_sees_a_wrong_import() -> None:
    tree = ast.parse("from omniprep.cli import app\ndef f():\n    import ray\n")
    assert list(imports(tree)) == [("omniprep.cli", True), ("ray", False)]
    assert layer_of("omniprep.cli") > layer_of("omniprep.shards.writer")


def test_importing_the_command_line_loads_no_heavy_library() -> None:
    import subprocess
    import sys

    heavy = sorted(NEVER_AT_THE_TOP | {"pyarrow", "PIL", "tokenizers"})
    code = f"import sys, omniprep.cli; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
