"""A built wheel, in an environment without nbdev or jupyter, imports and generates."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

USE_IT = """
import sys
import nanollm
from nanollm.generate import generate
from nanollm.kv_cache import generate_cached
from nanollm.model import load_model
assert nanollm.__file__.startswith(sys.argv[1]), nanollm.__file__
where = dict(load_format="dummy", device="cpu", dtype="float32")
model = load_model("tiny-llama", **where, progress=False)
naive, cached = list(generate(model, [1, 2, 3], 8)), list(generate_cached(model, [1, 2, 3], 8))
assert naive == cached and len(naive) == 8, (naive, cached)
assert not {"nbdev", "IPython", "jupyter_core", "execnb", "pytest"} & set(sys.modules)
for name in ("nbdev", "execnb", "IPython", "jupyter_client"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported: this environment proves nothing")
print("ok", nanollm.__version__)
"""


def runtime_closure(name):
    "The installed distributions that `name` needs without extras, theirs included."
    found, todo = {}, [Requirement(text) for text in distribution(name).requires or []]
    while todo:
        requirement = todo.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        key = canonicalize_name(requirement.name)
        if key not in found:
            found[key] = distribution(requirement.name)
            todo += [
                Requirement(text)
                for text in found[key].requires or []
                if "extra ==" not in text
            ]
    return found.values()


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new virtual environment with the wheel and what it declares to need, and nothing else.

    Dependencies are linked from this environment: to download them would be a gigabyte a run.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    for needed in runtime_closure("nanollmserve"):
        for top in {
            file.parts[0] for file in needed.files if file.parts[0] not in ("..", "__pycache__")
        }:
            if not (site / top).exists():
                (site / top).symlink_to(needed.locate_file(top))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(home / "bin/python"),
        "install",
        "--quiet",
        "--no-deps",
    ]
    subprocess.run([*pip, str(wheel)], check=True)
    return home / "bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(
        ROOT / "nanollm", copy / "nanollm", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    [path] = out.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [name for name in names if name.endswith("METADATA")]
        text = archive.read(metadata).decode()
        [entry] = [name for name in names if name.endswith("entry_points.txt")]
        scripts = archive.read(entry).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"nanollm"}
    assert {f"nanollm/{path.name}" for path in (ROOT / "nanollm").glob("*.py")} <= set(names)
    assert "Name: nanollmserve" in text
    assert "nanollm-generate" in scripts
    runtime = [
        line
        for line in text.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert not any(
        tool in line for line in runtime for tool in ("nbdev", "jupyter", "pytest", "ruff")
    )


def test_public_names_are_there_and_imported_late():
    import nanollm

    assert all(getattr(nanollm, name) is not None for name in nanollm.__all__)
    assert set(nanollm.__all__) <= set(dir(nanollm))
    with pytest.raises(AttributeError, match="nonsense"):
        nanollm.nonsense  # noqa: B018
    code = "import sys, nanollm; assert 'torch' not in sys.modules; nanollm.SamplingParams(n=2)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wheel_generates_in_an_empty_environment(environment, tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    python = str(environment / "python")
    done = subprocess.run(
        [python, "-c", USE_IT, str(environment.parent)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok ")
    script = str(environment / "nanollm-generate")
    done = subprocess.run(
        [
            script,
            "--model",
            "tiny-llama",
            "--load-format",
            "dummy",
            "--prompt",
            "Hello",
            "--max-new-tokens",
            "4",
        ],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
