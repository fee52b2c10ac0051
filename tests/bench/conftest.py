"""One QEMU for each CPU model and all tests of a session; a case that does not come back costs a new one."""

import contextlib
import shutil

import pytest

from crashkernel.bench.cpus import CPUS, QEMU
from crashkernel.bench.machine import Machine


@pytest.fixture(scope="session")
def machine_of():
    """`machine_of(cpu, count)`: the machine. Only the last one that was asked for runs: CPUs that wait cost the host's."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    machines = {}
    with contextlib.ExitStack() as stack:

        def get(name, count=1):
            if (name, count) not in machines:
                machines[name, count] = stack.enter_context(Machine(CPUS[name], count))
            for other in machines.values():
                if other is not machines[name, count]:
                    other.stop()
            return machines[name, count]

        yield get
