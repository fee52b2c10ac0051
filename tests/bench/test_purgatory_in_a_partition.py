"""The purgatory above a hypervisor: QEMU's pseries takes hypercalls and counts dispatches in the VPAs, as PowerVM does.

K1's stubs register a virtual processor area, an SLB shadow buffer and a dispatch trace log for each CPU in K1's low memory,
as a kernel does, and leave them registered, as a kernel that dies does.
"""

import contextlib

import pytest

from crashkernel.bench.cpus import MIB
from crashkernel.bench.stubs import K2_BOX, K2_WORDS, MONITOR, START_BOX, STUB_SIZE, Code, k2_code
from crashkernel.machine import HEAD_SIZE, Services
from crashkernel.placement.moves import Exchange, Put
from support.bench import QUIET, case

pytestmark = pytest.mark.bench

H_REGISTER_VPA, H_RTAS = 0xDC, 0xF000
VPA, DTL, SLB_SHADOW = 1, 2, 3  # functions of H_REGISTER_VPA (PAPR 14.11.3.2); 4 more take the area back
H_SUCCESS, H_RESOURCE = 0, (-16) & 0xFFFFFFFFFFFFFFFF
START_CPU = 0x2006  # QEMU's token of start-cpu
AREAS = 0x40000  # K1's, a page for each kind and CPU
RTAS_ARGUMENTS = QUIET + 0x50000
EYE_CATCHER = b"\xd3\x97\xd7\x81"
MOVES = (Put(0, 0, HEAD_SIZE), Exchange(0, 6 * MIB, 2 * MIB))
RESULTS = START_BOX + 0x40


def area(cpu: int, function: int) -> int:
    return AREAS + 0x4000 * cpu + 0x1000 * function


def area_bytes(function: int) -> bytes:
    """An area as its owner prepares it: its size at 4, and the eye catcher that Linux gives its VPAs."""
    if function == VPA:
        return EYE_CATCHER + (0x280).to_bytes(2, "big") + bytes(0x280 - 6)
    return bytes(4) + (0x1000).to_bytes(4, "big") + bytes(0x1000 - 8)


def register(code: Code, cpu: int, function: int, result: int) -> Code:
    code.load(4, function).sldi(4, 4, 45)
    code.load(3, H_REGISTER_VPA).load(5, cpu).load(6, area(cpu, function)).hypercall()
    return code.load(20, result).std(3, 0, 20)


def k1(start_others: bool):
    def before(code: Code, cpu: int) -> None:
        for function in (VPA, SLB_SHADOW, DTL):
            register(code, cpu, function, RESULTS + 0x40 * cpu + 8 * function)
        if cpu == 0 and start_others:
            code.load(3, H_RTAS).load(4, RTAS_ARGUMENTS).hypercall()
            code.load(20, RESULTS).std(3, 0, 20)

    return before


def k2(cpus: int):
    """K2 asks whether the areas are still there: a log can only be registered beside a VPA."""

    def after(code: Code) -> None:
        for cpu in range(cpus):
            register(code, cpu, DTL, RESULTS + 0x200 + 8 * cpu)

    return after


@contextlib.contextmanager
def crash(machine_of, cpus, *, little=False, firmware="papr", registered=True):
    """All CPUs on their way. The hypervisor is a new one each time: it remembers areas, and CPUs that were started."""
    words = (START_CPU, 3, 1, 1, MONITOR + STUB_SIZE, 1, 0xFFFFFFFF)
    places = [(RTAS_ARGUMENTS, b"".join(word.to_bytes(4, "big") for word in words))]
    places += [(area(cpu, f), area_bytes(f)) for cpu in range(cpus) for f in (VPA, DTL, SLB_SHADOW)]
    dead = case(
        MOVES,
        entry=0,
        k2_at=6 * MIB,
        k2=k2_code(more=k2(cpus)),
        little=little,
        ids=tuple(range(cpus)),
        slaves=cpus - 1,
        slave_timeout=1 << 40,
        services=Services(firmware),
        places=tuple(places) if registered else (),
        **({"before": k1(cpus > 1)} if registered else {}),
    )
    machine = machine_of("partition", 2)
    with machine.case(dead) as run:
        for number in range(cpus):
            run.release(number)
        yield run
    machine.stop()


def hypervisor_s(cpus: int) -> list[tuple[int, int]]:
    """What the hypervisor wrote in K1's areas before they were taken from it, where these are after the moves."""
    vpas = [6 * MIB + area(cpu, VPA) for cpu in range(cpus)]
    return [(RTAS_ARGUMENTS + 24, 4), *((vpa + 9, 1) for vpa in vpas), *((vpa + 0x100, 4) for vpa in vpas)]


@pytest.mark.parametrize("little", [False, True], ids=["BE", "LE"])
@pytest.mark.parametrize("cpus", [1, 2])
class TestAreas:
    def test_they_are_taken_back_before_anything_moves(self, machine_of, cpus, little):
        with crash(machine_of, cpus, little=little) as run:
            run.finish()
            for cpu in range(cpus):
                for function in (VPA, SLB_SHADOW, DTL):
                    result = run.machine.u64(RESULTS + 0x40 * cpu + 8 * function)
                    assert result == H_SUCCESS, "K1's stub could not register them"
                # refused because the VPA is gone: the hypervisor knows no area of this CPU any more
                assert run.machine.u64(RESULTS + 0x200 + 8 * cpu) == H_RESOURCE
            assert run.arrived == cpus - 1
            if cpus > 1:
                assert run.slave(1)["r3"] == 1
            assert list(run.wrong_memory(except_at=hypervisor_s(cpus))) == []

    def test_without_hypercalls_they_would_stay(self, machine_of, cpus, little):
        """The test above can see the difference: a purgatory that knows of no hypervisor leaves the areas where they are."""
        with crash(machine_of, cpus, little=little, firmware="none") as run:
            run.finish()
            results = [run.machine.u64(RESULTS + 0x200 + 8 * cpu) for cpu in range(cpus)]
            assert results == [H_SUCCESS] * cpus


def test_areas_that_were_never_registered_are_no_obstacle(machine_of):
    with crash(machine_of, 1, registered=False) as run:
        assert run.finish()["r4"] == 0
        assert run.machine.u64(RESULTS + 0x200) == H_RESOURCE
        assert list(run.wrong_memory()) == []


RTAS = QUIET + 0x60000
NMI_REGISTER = 5  # a token of ours


def rtas() -> bytes:
    """An RTAS as they are: its 32-bit code gives registers back through words. It keeps its arguments, for us to see.

    stw and lwz drop the upper half of r26-r31; r3 = arguments, r4 = base (PAPR 7.2.6).
    """
    words = [36 << 26 | register << 21 | 4 << 16 | 4 * register for register in range(26, 32)]  # stw rN,4N(r4)
    for number in range(5):
        words += [32 << 26 | 12 << 21 | 3 << 16 | 4 * number, 36 << 26 | 12 << 21 | 4 << 16 | 0x100 + 4 * number]
    words += [31 << 26 | 12 << 21 | 83 << 1, 36 << 26 | 12 << 21 | 4 << 16 | 0x120]  # mfmsr r12; stw r12,0x120(r4)
    words += [32 << 26 | register << 21 | 4 << 16 | 4 * register for register in range(26, 32)]  # lwz rN,4N(r4)
    return b"".join(word.to_bytes(4, "big") for word in (*words, 0x4E800020))


@pytest.mark.parametrize("little", [False, True], ids=["BE", "LE"])
def test_resets_are_redirected_by_an_rtas_that_forgets_upper_halves(machine_of, little):
    """And K2 is entered in 64-bit mode all the same; what the bench compares with every run, MSR.SF included."""
    base = RTAS + 0x1000
    services = Services("papr", rtas=(base, RTAS), rtas_nmi=NMI_REGISTER)
    dead = case(MOVES, entry=0, k2_at=6 * MIB, little=little, services=services, places=((RTAS, rtas()), (base, bytes(0x200))))
    machine = machine_of("partition", 1)
    with machine.case(dead) as run:
        run.release(0)
        saved = (base + 4 * 26, 4 * 6)
        arguments = (base + 0x100, 0x24)
        run.finish()
        told = [run.machine.u32(base + 0x100 + 4 * number) for number in range(5)]
        assert told == [NMI_REGISTER, 2, 1, 0x100, 0x200], "token, nargs, nret; system reset, machine check"
        assert not run.machine.u32(base + 0x120) & 0x8031, "no interrupts, no translation, big-endian"
        assert run.left["msr"] >> 63 == 1
        assert run.machine.u64(K2_BOX + 8 * K2_WORDS.index("msr")) >> 63 == 1
        assert list(run.wrong_memory(except_at=(saved, arguments))) == []
    machine.stop()
