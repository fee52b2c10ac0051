"""Makes the builders importable as `support.*`, settles how properties run, and lets CI take no skip for an answer."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# A shell starts what it runs in the background with ^C ignored, and every child would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that also runs twins is slow at times; an example has no deadline of its own, the test has pytest's.
settings.register_profile("crashkernel", deadline=None)
settings.load_profile("crashkernel")


@pytest.fixture
def short_path():
    """A directory whose path leaves room for the name of a socket (sun_path); pytest's own are too long for that."""
    with tempfile.TemporaryDirectory(prefix="ck-") as name:
        yield Path(name)


def pytest_collection_modifyitems(items):
    """Several processes share the tests (pytest-xdist): what shares a fixture that takes long stays in one of them."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("reference" if "reference" in item.fixturenames else item.path.name))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI everything is there: a skip means that an installation step is missing."""
    outcome = yield
    report = outcome.get_result()
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
