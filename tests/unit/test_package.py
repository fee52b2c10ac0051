"""The wheel: pure Python, complete, and at home on a POWER host."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # in a copy: setuptools leaves its build directory beside the source, and takes from it the next time
    out, tree = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_it_is_pure_python_and_complete(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        shipped = archive.read("crashkernel/purgatory/purgatory.bin")
    assert shipped == (ROOT / "src/crashkernel/purgatory/purgatory.bin").read_bytes()
    source = ROOT / "src"
    wanted = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    wanted |= {"crashkernel/py.typed", "crashkernel/purgatory/purgatory.S", "crashkernel/drill/crash-init.sh"}
    wanted |= {str(path.relative_to(source)) for path in source.glob("crashkernel/drill/bigendian/*") if path.is_file()}
    assert wanted <= names


def test_it_installs_for_ppc64le_and_needs_nothing_else(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--only-binary=:all:"]
    command += [
        "--platform",
        "manylinux2014_ppc64le",
        "--python-version",
        "3.11",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    # -S: no site-packages, so nothing of the drill's; the rescue path must come up all the same
    run = subprocess.run(
        [sys.executable, "-S", "-m", "crashkernel", "plan", "--from", "/nonexistent"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert run.returncode == 2
    assert run.stderr.startswith("crashkernel: cannot read /nonexistent")
