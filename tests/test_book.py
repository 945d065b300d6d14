"""Stands in for Quarto, which tests cannot count on: the book's files, links, figures and cell options are sound."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))
PAGES = [ROOT / "index.qmd", *sorted((ROOT / "book").glob("*.qmd"))]
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text())
KNOWN_OPTIONS = {"filename", "label", "fig-cap", "fig-alt", "code-fold", "code-summary", "echo", "output", "warning"}
MAX_BYTES = 400_000

sys.path.insert(0, str(ROOT / "tools"))
from quarto_filter import filter_notebook  # noqa: E402

by_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(nb):
    return [cell for cell in nb["cells"] if cell["cell_type"] == "code"]


def markdown(path):
    "All prose of a page, code blocks removed."
    if path.suffix == ".ipynb":
        text = "\n".join(source(cell) for cell in load(path)["cells"] if cell["cell_type"] == "markdown")
    else:
        text = path.read_text().replace("{{< include README.md >}}", (ROOT / "README.md").read_text())
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def options(cell):
    "The YAML options of a code cell, as Quarto reads them."
    lines = []
    for line in source(cell).split("\n"):
        if not line.startswith("#|"):
            break
        lines.append(line[2:].removeprefix(" "))
    return yaml.safe_load("\n".join(lines)) or {} if lines else {}


def output_text(cell):
    "Everything an output would put on the page as text."
    parts = []
    for output in cell["outputs"]:
        parts += output.get("text", [])
        for mime, data in output.get("data", {}).items():
            if mime.startswith("text/"):
                parts += data
    return "".join(parts)


def labels():
    "Every label of the book with the pages that define it."
    found = {}
    for path in [*CHAPTERS, *PAGES]:
        names = re.findall(r"^#+ .*\{#([\w-]+)[^}]*\}\s*$", markdown(path), re.M)
        if path.suffix == ".ipynb":
            names += [options(c)["label"] for c in code_cells(filter_notebook(load(path))) if "label" in options(c)]
        for name in names:
            found.setdefault(name, []).append(path.name)
    return found


def listed(chapters):
    "The files of a chapter list, parts flattened."
    files = []
    for entry in chapters:
        files += listed(entry["chapters"]) if isinstance(entry, dict) else [entry]
    return files


def test_quarto_lists_exactly_the_files_there_are():
    files = listed(CONFIG["book"]["chapters"])
    assert files[0] == "index.qmd"
    assert files[1:] == [f"nbs/{path.name}" for path in CHAPTERS]
    assert sorted(CONFIG["book"]["appendices"]) == [f"book/{path.name}" for path in PAGES[1:]]


def test_quarto_settings_hold_the_decisions():
    assert CONFIG["project"]["type"] == "book"
    assert CONFIG["execute"] == {"enabled": False}
    for name in CONFIG["ipynb-filters"]:
        assert (ROOT / name).is_file()
    for theme in (CONFIG["format"]["html"]["theme"]).values():
        assert all((ROOT / name).is_file() for name in theme if "/" in name)
    nested = [p for p in ROOT.rglob("_quarto.yml") if p.parent != ROOT and ".venv" not in p.parts]
    assert not nested, "a nested project breaks the root book"


def test_labels_are_unique():
    assert not {name: pages for name, pages in labels().items() if len(pages) > 1}


def test_cross_references_resolve():
    known = labels()
    for path in [*CHAPTERS, *PAGES]:
        used = set(re.findall(r"(?<![\w`])@((?:sec|fig|tbl)-[\w-]+)", markdown(path)))
        assert used <= set(known), f"{path.name} refers to {sorted(used - set(known))}"


def test_links_to_files_resolve():
    for path in [*CHAPTERS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES[1:]]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", markdown(path)):
            if not re.match(r"(https?|mailto):", target):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_filter_speaks_json_on_stdin_and_stdout():
    command = [sys.executable, str(ROOT / "tools/quarto_filter.py")]
    done = subprocess.run(command, input=CHAPTERS[0].read_text(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == filter_notebook(load(CHAPTERS[0]))


@by_chapter
def test_opening(path):
    "A title with an id, one sentence, the module; then every section has an id."
    cells = load(path)["cells"]
    slug = path.stem.split("_", 1)[1].replace("_", "-")
    lines = source(cells[0]).split("\n")
    assert re.fullmatch(rf"# .+ \{{#sec-{slug}\}}", lines[0]), lines[0]
    assert sum(line.startswith("> ") for line in lines) == 1
    assert re.fullmatch(r"#\| default_exp [\w.]+", source(cells[1]))
    headings = re.findall(r"^#{1,3} .*$", markdown(path), re.M)
    for heading in headings:
        assert re.search(rf"\{{#sec-{slug}[\w-]*\}}$", heading), heading
    assert sum(heading.startswith("# ") for heading in headings) == 1


@by_chapter
def test_sections(path):
    text = markdown(path)
    for section in ("The problem", "The idea", "Check", "Summary", "Exercises", "Further reading"):
        assert re.search(rf"^## {section} \{{#", text, re.M), f"no section {section!r}"
    assert "In production systems" in text


@by_chapter
def test_cells(path):
    cells = load(path)["cells"]
    code = code_cells({"cells": cells})
    sizes = sorted(len(source(cell).splitlines()) for cell in code)
    assert sizes[-1] <= 120 and sizes[len(sizes) // 2] <= 13
    words = sum(len(source(cell).split()) for cell in cells if cell["cell_type"] == "markdown")
    assert words >= 2.5 * sum(sizes), f"{words} words for {sum(sizes)} lines of code"
    exported = [bool(re.match(r"#\|\s*exporti?\b", source(cell))) for cell in cells]
    imports = [cell["cell_type"] == "code" and only_imports(source(cell)) for cell in cells]
    for (left, right), importing in zip(zip(exported, exported[1:]), imports):
        assert importing or not (left and right), "two exported cells without prose between them"


def only_imports(code):
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(code).body)


@by_chapter
def test_options_after_the_filter(path):
    nb = filter_notebook(load(path))
    for cell in code_cells(nb):
        found = options(cell)
        assert set(found) <= KNOWN_OPTIONS, found
        rest = [line for line in source(cell).split("\n")[len(found):] if line.startswith("#|")]
        assert not rest, f"an option below the top of its cell: {rest}"
    for cell in code_cells(load(path)):
        assert not re.search(r"^#\|\s*exporti?:", source(cell), re.M), "nbdev wants `#| export` without a colon"
    exported = [options(c).get("filename") for c in code_cells(nb)]
    module = re.search(r"default_exp ([\w.]+)", source(load(path)["cells"][1])).group(1).replace(".", "/")
    assert f"nanollm/{module}.py" in exported


@by_chapter
def test_figures(path):
    figures = 0
    for cell in code_cells(filter_notebook(load(path))):
        images = [o for o in cell["outputs"] if "image/png" in o.get("data", {})]
        found = options(cell)
        if not images:
            assert not str(found.get("label", "")).startswith("fig-"), f"{found['label']} has no stored image"
            continue
        figures += len(images)
        assert len(images) == 1
        assert str(found.get("label", "")).startswith("fig-"), source(cell)[:80]
        assert len(found.get("fig-cap", "")) > 30 and len(found.get("fig-alt", "")) > 30
        assert found.get("code-fold") is True
        assert source(cell).rstrip().endswith(";"), "a plot cell ends in ';' so that no object is printed"
    assert figures, "a chapter without a picture"


@by_chapter
def test_outputs(path):
    cells = code_cells(load(path))
    assert path.stat().st_size <= MAX_BYTES
    here = re.compile(r"(/home/|/root/|/tmp/|/work/|/Users/|site-packages| at 0x[0-9a-f]{8})")
    for cell in cells:
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
        assert not any(output.get("name") == "stderr" for output in cell["outputs"]), "noise on stderr"
        shown = here.search(output_text(cell))
        assert not shown, f"an output shows a machine's own {shown and shown.group(0)}"
        prints = re.search(r"^print\(", source(cell), re.M) and not re.search(r"^#\| *(gpu|slow)\b", source(cell), re.M)
        assert cell["outputs"] or not prints, f"no stored output: run tools/run_notebooks.py\n{source(cell)[:200]}"


@by_chapter
def test_readme_and_glossary_know_the_chapter(path):
    slug = path.stem.split("_", 1)[1].replace("_", "-")
    assert f"nbs/{path.name}" in (ROOT / "README.md").read_text()
    assert f"@sec-{slug})" in (ROOT / "book/glossary.qmd").read_text()


def test_glossary_is_sorted_and_links_to_chapters():
    text = (ROOT / "book/glossary.qmd").read_text()
    terms = re.findall(r"^\*\*(.+?)\*\*", text, re.M)
    assert len(terms) > 20 and terms == sorted(terms, key=str.lower)
    assert "@sec-measure" in text
