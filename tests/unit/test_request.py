"""A drill by its options: one vocabulary for the command line, campaign files, databases and workers."""

import json
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.cli import main, twin
from crashkernel.drill.request import DrillRequest
from crashkernel.drill.twin import Twin
from crashkernel.errors import UsageError

MACHINES = st.sampled_from(
    [
        {},
        {"cpu": "POWER8"},
        {"cpu": "POWER9", "mmu": "hash"},
        {"cpu": "POWER10"},
        {"machine": "powernv9"},
        {"machine": "powernv10", "mmu": "hash"},
    ]
)
SAVINGS = st.sampled_from(
    [{}, {"capture": 0}, {"capture": 31, "capture-codec": "lzo"}, {"capture": 1, "capture-to": "network"}]
)
OTHERS = st.fixed_dictionaries(
    {},
    optional={
        "kernel": st.sampled_from(["debian:sid", "/boot/vmlinux"]),
        "capture-kernel": st.sampled_from(["", "debian:sid", "./vmlinux"]),
        "smp": st.integers(1, 64),
        "memory": st.sampled_from(["1G", "2G", "4G"]),
        "crashkernel": st.sampled_from(["512M", "256M@128M", "512M@k1-end"]),
        "placement": st.sampled_from(["zero", "reserved"]),
        "all-cpus": st.booleans(),
        "initrd": st.just("/boot/initrd.img"),
        "on-damage": st.sampled_from(["reboot", "halt"]),
        "no-quarantine": st.booleans(),
        "seed": st.integers(0, 1 << 31),
    },
)
REQUESTS = st.builds(lambda one, two, three: DrillRequest.from_options(one | two | three), MACHINES, SAVINGS, OTHERS)


@given(REQUESTS)
def test_options_say_all_of_it(request):
    assert DrillRequest.from_options(json.loads(json.dumps(request.options()))) == request


@given(REQUESTS)
def test_the_command_line_asks_for_the_same_drill(request):
    seen = []
    with patch.object(twin, "_drill", lambda arguments: seen.append(arguments) or 0), patch.object(twin, "require_extra"):
        assert main(request.command()[1:]) == 0
    (arguments,) = seen
    (kernel,) = arguments.kernel
    asked = twin._drill_request(arguments, kernel, arguments.placement)
    assert asked == request


def test_what_follows_from_machine_and_cpu():
    assert DrillRequest.from_options({"machine": "powernv10"}).twin == Twin("powernv10", "POWER10")
    assert DrillRequest.from_options({"cpu": "POWER8"}).mmu == "hash"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"kernle": "debian:sid"}, "'kernle' is no option"),
        ({"kernel": ""}, "kernel = ''"),
        ({"machine": "mac99"}, "one of pseries"),
        ({"smp": "2"}, "a whole number"),
        ({"smp": True}, "a whole number"),
        ({"smp": 0}, "at least one CPU"),
        ({"memory": "lots"}, "lots"),
        ({"all-cpus": 1}, "true or false"),
        ({"fault": "nmi"}, "a list of words"),
        ({"capture": 32}, "0 to 31"),
        ({"capture-codec": "lzo"}, "add capture"),
        ({"cpu": "POWER8", "mmu": "radix"}, "no radix"),
        ({"crashkernel": "512M\n"}, "a text"),
    ],
)
def test_what_cannot_be_drilled_is_refused_in_one_line(options, complaint):
    with pytest.raises(UsageError, match=complaint) as caught:
        DrillRequest.from_options(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("span", "region"), [(0x287C918, "512M@41M"), (0x2900000, "512M@41M"), (0x2900001, "512M@42M")])
def test_the_region_behind_k1_follows_the_kernel(span, region, tmp_path):
    vmlinux = tmp_path / "vmlinux"
    vmlinux.write_bytes(b"")
    request = DrillRequest(crashkernel="512M@k1-end")
    with patch("crashkernel.drill.request.KernelImage.from_bytes", return_value=SimpleNamespace(span=span)):
        assert request.resolved(vmlinux).crashkernel == region


def test_a_region_elsewhere_asks_no_kernel(tmp_path):
    assert DrillRequest().resolved(tmp_path / "none") == Twin()
