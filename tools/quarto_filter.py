"""Quarto's view of a chapter: a notebook comes in on stdin, the same without nbdev's directives goes out.

Quarto runs this for every notebook (see `ipynb-filters` in _quarto.yml). nbdev's directives, such as
`#| export`, are not the `key: value` options that Quarto expects, and would end up on the page. An exported
cell gets the option `filename` instead, which tells the reader that this cell is the library.
"""

import json
import re
import sys

DIRECTIVE = re.compile(r"^#\|\s*(default_exp|exporti?|hide|gpu|slow|eval)\b(?!.*:\s*\S).*$|^#\|\s*eval:.*$")
EXPORTS = re.compile(r"^#\|\s*exporti?\s*$")


def filter_cell(cell, module):
    "Return `cell` without directives, or None if the reader should not see it."
    lines = "".join(cell["source"]).split("\n")
    found = [line for line in lines if DIRECTIVE.match(line)]
    if any(re.match(r"#\|\s*(hide|default_exp)\b", line) for line in found):
        return None
    lines = [line for line in lines if not DIRECTIVE.match(line)]
    if any(EXPORTS.match(line) for line in found):
        lines.insert(0, f'#| filename: "nanollm/{module}.py"')
    # Quarto does not put newlines back between lines: without keepends, a cell is published on one line
    return {**cell, "source": "\n".join(lines).strip("\n").splitlines(keepends=True)}


def filter_notebook(nb):
    "Return the notebook `nb` (a dict) as Quarto should see it."
    code = "\n".join("".join(cell["source"]) for cell in nb["cells"] if cell["cell_type"] == "code")
    named = re.search(r"^#\|\s*default_exp\s+([\w.]+)", code, re.M)
    module = named.group(1).replace(".", "/") if named else None
    cells = [filter_cell(cell, module) if cell["cell_type"] == "code" else cell for cell in nb["cells"]]
    return {**nb, "cells": [cell for cell in cells if cell is not None]}


if __name__ == "__main__":
    json.dump(filter_notebook(json.load(sys.stdin)), sys.stdout)
