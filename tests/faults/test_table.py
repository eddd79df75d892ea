"""The table in docs/faults.md and the tests name the same faults."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "faults.md"


def marked() -> list[str]:
    """Return what is said in `@pytest.mark.fault(...)` of the tests here."""
    return [
        decorator.args[0].value
        for path in HERE.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault"
    ]


def test_every_fault_of_the_table_is_tried_and_every_one_tried_is_in_it() -> None:
    listed = re.findall(r"^\| (?!fault \|)([^|]+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(listed) > 25
    assert sorted(listed) == sorted(marked())
