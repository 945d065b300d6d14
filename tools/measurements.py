"""Write the page of all measurements from the outputs that the chapters have stored.

    python tools/measurements.py            # write book/measurements.qmd
    python tools/measurements.py --check    # exit with 1 if that would change it

A chapter prints a result with `measured` (see nbs/01_measure.ipynb); every such line of a
stored output is a row of the page. The text above the tables stays as it is in the file.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book/measurements.qmd"
BEGIN = "<!-- written by tools/measurements.py: do not edit below -->\n"
LINE = re.compile(r"^measured: (.+)\n    (.+); (.+)$", re.M)


def printed(cell):
    "What a code cell has printed."
    streams = [out["text"] for out in cell.get("outputs", []) if out["output_type"] == "stream"]
    return "".join("".join(text) for text in streams)


def results(path):
    "The results of a chapter, in order: what, value, machine."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [row for cell in cells for row in LINE.findall(printed(cell))]


def section(path):
    "A chapter's title, and a table of its results; nothing if it has none."
    rows = results(path)
    if not rows:
        return ""
    title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    name, slug = re.match(r"# (.+?) \{#sec-([\w-]+)\}", title).groups()
    lines = [
        f"\n## {name} {{#sec-measurements-{slug} .unnumbered}}\n\nFrom @sec-{slug}.\n",
        "| what | result | where |", "|-----------|-----------|------|",
    ]
    for row in rows:
        lines.append("| " + " | ".join(part.replace("|", "\\|") for part in row) + " |")
    return "\n".join(lines) + "\n"


def main():
    old = PAGE.read_text(encoding="utf-8")
    new = old.split(BEGIN)[0] + BEGIN
    new += "".join(section(path) for path in sorted((ROOT / "nbs").glob("*.ipynb")))
    if "--check" in sys.argv:
        sys.exit(new != old and f"{PAGE.relative_to(ROOT)} is out of date: run {sys.argv[0]}")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
