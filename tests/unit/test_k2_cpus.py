"""On how many CPUs K2 may run."""

import pytest

from crashkernel.drill.request import DrillRequest
from crashkernel.drill.scenario import require_cpus
from crashkernel.drill.stages import GuestSaidNo


@pytest.mark.parametrize("online", ["0", "3", "0,3", "0-1"])
def test_the_one_that_crashed_and_cpu_0_beside_it(online):
    require_cpus(online, DrillRequest(smp=4))


@pytest.mark.parametrize("online", ["1,3", "0-2", "0-3"])
def test_no_others(online):
    with pytest.raises(GuestSaidNo, match="not on the one that crashed"):
        require_cpus(online, DrillRequest(smp=4))


def test_all_of_them():
    require_cpus("0-3", DrillRequest(smp=4, all_cpus=True))
    for fewer in ("0", "0-2"):
        with pytest.raises(GuestSaidNo, match="not on 4"):
            require_cpus(fewer, DrillRequest(smp=4, all_cpus=True))
