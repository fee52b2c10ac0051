"""On which CPUs K2 may run."""

import pytest

from crashkernel.drill.request import DrillRequest
from crashkernel.drill.scenario import require_cpus
from crashkernel.drill.stages import GuestSaidNo


@pytest.mark.parametrize(("online", "crashed"), [("0", 0), ("3", 3), ("0,3", 3), ("0-1", 1)])
def test_the_one_that_crashed_and_cpu_0_beside_it(online, crashed):
    require_cpus(online, DrillRequest(smp=4), crashed)


@pytest.mark.parametrize(
    ("online", "crashed"), [("0", 1), ("1", 0), ("0-1", 0), ("0,3", 1), ("1,3", 3), ("0-2", 2), ("0-3", 3)]
)
def test_no_others(online, crashed):
    with pytest.raises(GuestSaidNo, match=f"K2 runs on CPUs {online}, not on the one that crashed, {crashed}"):
        require_cpus(online, DrillRequest(smp=4), crashed)


@pytest.mark.parametrize("crashed", [0, 2])
def test_all_of_them(crashed):
    request = DrillRequest(smp=4, all_cpus=True)
    require_cpus("0-3", request, crashed)
    for fewer in ("0", "0,2", "0-2"):
        with pytest.raises(GuestSaidNo, match="not on all 4"):
            require_cpus(fewer, request, crashed)
