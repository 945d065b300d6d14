"""Fail if notebooks and package disagree, if a notebook is not clean, or if the linter objects.

Works on a copy, so that nothing in the working tree changes. The exit status is 1 if anything
drifted.
"""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ["settings.ini", "pyproject.toml", "nbs", "nanollm", "tools"]


def sources(folder):
    "The names, relative to `folder`, of the modules and notebooks below it."
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    hidden = [path for path in paths if path.parent.name.startswith(".")]
    kept = [path for path in paths if path.suffix in (".py", ".ipynb")]
    return {str(path) for path in kept if path not in hidden}


def drifted(command, folder, advice):
    "Run `command` on a copy of the project and print the files in `folder` that it changed."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / ROOT.name
        copy.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
                shutil.copytree(source, copy / name, ignore=ignore)
            else:
                shutil.copy(source, copy / name)
        subprocess.run(command, cwd=copy, check=True)
        names = sources(ROOT / folder) | sources(copy / folder)
        compared = filecmp.cmpfiles(ROOT / folder, copy / folder, names, shallow=False)
        changed = compared[1] + compared[2]  # different, or only on one side
    for name in sorted(changed):
        print(f"{folder}/{name}: {advice}")
    return bool(changed)


def main():
    failed = [
        drifted(["nbdev_export"], "nanollm", "differs from its notebook; run nbdev_export"),
        drifted(["nbdev_clean"], "nbs", "is not clean; run nbdev_clean"),
        subprocess.run(["ruff", "check", "."], cwd=ROOT).returncode != 0,
    ]
    sys.exit(any(failed))


if __name__ == "__main__":
    main()
