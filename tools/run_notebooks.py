"""Execute chapters of the book from top to bottom and store their outputs in the notebooks.

    python tools/run_notebooks.py            # every chapter
    python tools/run_notebooks.py 02 06      # the chapters whose number starts so

A cell flagged `#| gpu` or `#| slow` keeps the outputs it has unless --gpu or --slow is given.
The exit status is 1 if a chapter raised; that chapter's file is left as it was. A run of every
chapter measures the machine card of chapter 01 anew, and all chapters use it. Afterwards the
page of measurements is written again.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent


def flagged(cell, flags):
    "Whether `cell` carries one of nbdev's test flags, such as `#| gpu`."
    return any(re.search(rf"^#\|\s*{flag}\b", cell.source, re.M) for flag in flags)


def without_skipped(nb, flags):
    "A copy of `nb` with only the cells that run; the cells themselves are shared."
    skip = [*flags, "eval: false"]
    cells = [c for c in nb.cells if c.cell_type == "code" and not flagged(c, skip)]
    return nbformat.NotebookNode(nb | {"cells": cells})


def run(path, flags):
    "Execute one notebook in its own kernel, write its outputs back, return the seconds."
    nb = nbformat.read(path, as_version=4)
    os.environ["NANOLLM_BOOK"] = "1"  # claims about time must hold in the book: see `claim`
    start = time.perf_counter()
    client = NotebookClient(
        without_skipped(nb, flags), timeout=600, kernel_name="python3", coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}}, store_widget_state=False,
        extra_arguments=["--log-level=ERROR"])
    client.execute()
    nbformat.write(nb, path)
    subprocess.run(["nbdev_clean", "--fname", str(path)], check=True, cwd=ROOT)
    return time.perf_counter() - start


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("chapters", nargs="*", help="as in 02 or B; default: all")
    parser.add_argument("--gpu", action="store_true", help="run the cells flagged gpu, too")
    parser.add_argument("--slow", action="store_true", help="run the cells flagged slow, too")
    args = parser.parse_args()
    flags = [flag for flag in ("gpu", "slow") if not getattr(args, flag)]
    paths = [p for p in sorted((ROOT / "nbs").glob("[0-9A-Z]*.ipynb"))
             if not args.chapters or p.name.startswith(tuple(args.chapters))]
    if not paths:
        sys.exit(f"no chapter in nbs/ starts with {' or '.join(args.chapters) or 'a number'}")
    if not args.chapters:
        from nanollm.measure import cache_dir
        (cache_dir() / "machine.json").unlink(missing_ok=True)
    failed = False
    for path in paths:
        try:
            print(f"{path.name}: {run(path, flags):.0f} s", flush=True)
        except CellExecutionError as error:
            failed = True
            print(f"{path.name}: failed\n{error}", file=sys.stderr)
    subprocess.run([sys.executable, str(ROOT / "tools/measurements.py")], check=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
