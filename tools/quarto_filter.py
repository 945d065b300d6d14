"""Quarto's view of a chapter: a notebook comes in on stdin, what a reader sees goes out.

Quarto runs this for every notebook (see `ipynb-filters` in _quarto.yml). It needs nothing but
the standard library. What changes:

- nbdev's directives, such as `#| export`, go: Quarto expects options, `key: value`;
- an exported cell gets the option `filename`, which shows that this cell is the library;
- a cell of imports is folded, and every folded cell says what it holds;
- links to the notebook, its module and its tests follow the title;
- a quotation that begins with `*Aside.*` goes into the margin, and the paragraph that says
  today's gain into a frame.
"""

import ast
import configparser
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(
    r"^#\|\s*(default_exp|export[is]?|hide|gpu|slow|eval)\b(?!.*:\s*\S).*$|^#\|\s*eval:.*$")
DEFAULT = re.compile(r"^#\|\s*default_exp\s+([\w.]+)", re.M)
EXPORT = re.compile(r"^#\|\s*export[is]?\s*$", re.M)
SLUG = re.compile(r"\A# .*\{#sec-([\w-]+)\}")
ASIDE = re.compile(r"^> \*Aside\.\* (.+(?:\n> .+)*)$", re.M)
GAIN = re.compile(r"^\*\*Today's gain:\*\* .+$", re.M)


def file_of(module):
    "The file that nbdev writes for a module: nanollm/serve/server.py for serve.server."
    return f"nanollm/{module.replace('.', '/')}.py"


def only_imports(code):
    "Whether `code` is Python that imports and does nothing else."
    try:
        statements = ast.parse(code).body
    except SyntaxError:  # a magic
        return False
    imports = [isinstance(statement, ast.Import | ast.ImportFrom) for statement in statements]
    return bool(imports) and all(imports)


def filter_cell(cell, module):
    "Return the code cell without directives, or None if the reader should not see it."
    lines = "".join(cell["source"]).split("\n")
    directives = [line for line in lines if DIRECTIVE.match(line)]
    if any(re.match(r"#\|\s*(hide|default_exp)\b", line) for line in directives):
        return None
    lines = [line for line in lines if not DIRECTIVE.match(line)]
    code = "\n".join(lines).strip("\n")
    options = []
    for line in directives:
        if EXPORT.match(line):
            options.append(f'#| filename: "{file_of(module)}"')
    if only_imports(code) and "#| code-fold" not in code:
        options += ["#| code-fold: true", '#| code-summary: "Imports"']
    elif "#| code-fold: true" in code and "#| code-summary" not in code:
        options.append('#| code-summary: "Code of this figure"')
    # Quarto does not put newlines back between lines: without keepends, a cell is one line
    source = "\n".join([*options, code]).strip("\n").splitlines(keepends=True)
    return {**cell, "source": source}


def module_of(code):
    "The module that a notebook with this code exports, or an empty name."
    found = DEFAULT.search(code)
    return found.group(1) if found else ""


def tests_of(module):
    "The file of a module's tests, or else at most two that import the module."
    own = f"tests/test_{module.split('.')[-1]}.py"
    if (ROOT / own).exists():
        return [own]
    user = re.compile(rf"^from nanollm\.{re.escape(module)} import ", re.M)
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    found = [f"tests/{path.name}" for path in paths if user.search(path.read_text("utf-8"))]
    return found[:2]


def links(slug, module):
    "A markdown cell with links to a chapter's notebook, its module and the tests."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    base = f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}"
    notebooks = sorted((ROOT / "nbs").glob(f"*_{slug.replace('-', '_')}.ipynb"))
    stem = slug.replace("-", "_")
    notebooks = [path for path in notebooks if path.stem.split("_", 1)[1] == stem]
    found = [("Notebook", f"nbs/{path.name}") for path in notebooks]
    files = [file_of(module), *tests_of(module)] if module else []
    found += [(f"`{file}`", file) for file in files if (ROOT / file).exists()]
    text = " · ".join(f"[{name}]({base}/{path})" for name, path in found)
    lines = ["::: {.chapter-links}\n", f"{text}\n", ":::"]
    return {"cell_type": "markdown", "id": "chapter-links", "metadata": {}, "source": lines}


def filter_text(cell):
    "Return the markdown cell with its asides in the margin and its gain in a frame."
    text = "".join(cell["source"])
    text = ASIDE.sub(
        lambda m: "::: {.column-margin}\n" + m[1].replace("\n> ", "\n") + "\n:::", text)
    text = GAIN.sub(lambda m: "::: {.gain}\n" + m[0] + "\n:::", text)
    return {**cell, "source": text.splitlines(keepends=True)}


def filter_notebook(nb):
    "Return the notebook `nb` (a dict) as Quarto should see it."
    code = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code")
    module = module_of(code)
    cells = []
    for cell in nb["cells"]:
        if cell["cell_type"] != "code":
            cells.append(filter_text(cell))
        elif seen := filter_cell(cell, module):
            cells.append(seen)
    title = SLUG.match("".join(cells[0]["source"])) if cells else None
    if title:
        cells.insert(1, links(title.group(1), module))
    return {**nb, "cells": cells}


if __name__ == "__main__":
    json.dump(filter_notebook(json.load(sys.stdin)), sys.stdout)
