"""One drill per placement for the whole session: the reference twin, through the command line, with everything kept."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from drill_command import COMMAND


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.drill)


@dataclass(frozen=True)
class Kept:
    directory: Path
    results: dict
    output: str

    def of(self, placement: str) -> dict:
        return next(drill for drill in self.results["drills"] if drill["placement"] == placement)


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Kept:
    """Debian 6.1, pseries POWER9 radix, 2 GiB, crashkernel=512M, both placements."""
    if shutil.which("qemu-system-ppc64") is None:
        pytest.skip("qemu-system-ppc64 is not installed")
    directory = tmp_path_factory.mktemp("reference")
    results = directory / "results.json"
    done = subprocess.run(
        [*COMMAND, "drill", "--keep", str(directory), "--json", str(results)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Kept(directory, json.loads(results.read_text()), done.stdout)
