"""On which CPUs K2 may run."""

import pytest

from crashkernel.drill.scenario import require_cpus
from crashkernel.drill.stages import GuestSaidNo


@pytest.mark.parametrize(("online", "crashed"), [("0", 0), ("3", 3), ("0,3", 3), ("0-1", 1)])
def test_the_one_that_crashed_and_cpu_0_beside_it(online, crashed):
    require_cpus(online, crashed, None)


@pytest.mark.parametrize(
    ("online", "crashed"), [("0", 1), ("1", 0), ("0-1", 0), ("0,3", 1), ("1,3", 3), ("0-2", 2), ("0-3", 3)]
)
def test_no_others(online, crashed):
    with pytest.raises(GuestSaidNo, match=f"K2 runs on CPUs {online}, not on the one that crashed, {crashed}"):
        require_cpus(online, crashed, None)


@pytest.mark.parametrize("crashed", [0, 2])
def test_all_of_them(crashed):
    require_cpus("0-3", crashed, 4)
    for others in ("0", "0,2", "0-2", "0-4"):
        with pytest.raises(GuestSaidNo, match="not on all 4"):
            require_cpus(others, crashed, 4)
