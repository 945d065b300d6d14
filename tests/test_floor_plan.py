"""Chapters are floors: a module imports only modules of earlier chapters, and each chapter is one module."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 385  # 250 is the aim
# two ideas each, for which there is one chapter: the door and the step; both sides of the border, and those who
# watch it; the gate and the endpoints
LONGER = {"engine": 400, "async_engine": 440, "server": 600}


def floors():
    "Module name to chapter number, read from the notebooks."
    found = {}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        names = re.findall(r"#\| default_exp ([\w.]+)", path.read_text())
        assert len(names) == 1, f"{path.name} must export exactly one module, names {names}"
        assert names[0] not in found
        found[names[0]] = int(path.name[:2])
    return found


FLOORS = floors()


def path_of(module):
    return ROOT / "nanollm" / f"{module.replace('.', '/')}.py"


def imported(path):
    "The nanollm modules that a file imports, wherever in it."
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])  # nanollm or nanollm.serve
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            where = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*where, *([node.module] if node.module else [])])
            if module == "nanollm":
                yield from (alias.name for alias in node.names if alias.name != "__version__")
            elif module.startswith("nanollm."):
                yield module.removeprefix("nanollm.")
            assert all(alias.name != "*" for alias in node.names), f"{path.name} imports *"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("nanollm."):
                    yield alias.name.removeprefix("nanollm.")


def test_package_and_notebooks_agree():
    paths = [path.relative_to(ROOT / "nanollm").with_suffix("") for path in (ROOT / "nanollm").rglob("*.py")]
    modules = {".".join(path.parts) for path in paths if path.name not in ("__init__", "_modidx")}
    assert modules == set(FLOORS)


@pytest.mark.parametrize("module", sorted(FLOORS, key=FLOORS.get))
def test_imports_come_from_earlier_chapters(module):
    for other in imported(path_of(module)):
        assert FLOORS[other] < FLOORS[module], f"{module} (chapter {FLOORS[module]}) imports {other}"


@pytest.mark.parametrize("module", sorted(FLOORS, key=FLOORS.get))
def test_module_is_one_idea(module):
    text = (path_of(module)).read_text()
    assert len(text.splitlines()) <= LONGER.get(module, MAX_LINES)
    assert ast.get_docstring(ast.parse(text)), "the module docstring is the chapter's sentence"


def test_weights_are_never_pickles_and_code_is_never_remote():
    for path in (ROOT / "nanollm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute | ast.Name):
                name = node.attr if isinstance(node, ast.Attribute) else node.id
                assert name != "pickle", f"{path.name} uses pickle"
                assert not (isinstance(node, ast.Attribute) and name == "load" and
                            getattr(node.value, "id", "") == "torch"), f"{path.name} calls torch.load"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert getattr(node.value, "value", None) is False, f"{path.name} trusts remote code"
