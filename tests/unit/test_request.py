"""A drill by its options: one vocabulary for the command line, campaign files, databases and workers."""

import json
from dataclasses import fields, replace
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
        "smp": st.integers(1, 2048),
        "memory": st.sampled_from(["1G", "2G", "4G"]),
        "crashkernel": st.sampled_from(["512M", "256M@128M", "512M@k1-end"]),
        "placement": st.sampled_from(["zero", "reserved"]),
        "all-cpus": st.booleans(),
        "initrd": st.just("/boot/initrd.img"),
        "on-damage": st.sampled_from(["reboot", "halt"]),
        "no-quarantine": st.booleans(),
        "seed": st.integers(0, (1 << 63) - 1),
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


def test_what_no_machine_has_can_be_sketched_and_has_what_follows_from_its_machine():
    sketch = DrillRequest.sketch({"machine": "powernv10", "smp": 1, "fault": ["stuck-cpu"], "capture-codec": "lzo"})
    assert (sketch.cpu, sketch.mmu, sketch.fault, sketch.capture_codec) == ("POWER10", "radix", ("stuck-cpu",), "lzo")
    assert DrillRequest.sketch({"cpu": "POWER8", "mmu": "radix"}).mmu == "radix"


ANOTHER = {
    "kernel": "debian:sid", "capture_kernel": "debian:sid", "machine": "powernv9", "cpu": "POWER10", "mmu": "hash", "smp": 2,
    "memory": "4G", "crashkernel": "256M", "placement": "reserved", "all_cpus": True, "initrd": "x", "on_damage": "halt",
    "no_quarantine": True, "capture": 1, "capture_codec": "lzo", "capture_to": "network", "fault": ("nmi",),
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(DrillRequest) if field.name != "seed"])
def test_every_option_but_the_seed_shows_in_a_drills_title(name):
    drill = DrillRequest(capture=31)
    assert replace(drill, **{name: ANOTHER[name]}).title != drill.title


@pytest.mark.parametrize(
    "text",
    [
        "512M",
        "1g",
        "0x20000000",
        "512M@0",
        "256M@128M",
        "512M@k1-end",
        "1G-8G:512M,8G-:1G",
        "0-2G:1M@16M",
        "0M-2G:128M,2G-:256M",
        "512M mem=768M",
    ],
)
def test_what_k1_reads_of_crashkernel(text):
    assert DrillRequest.from_options({"crashkernel": text}).crashkernel == text


@pytest.mark.parametrize(
    "text", ["foo", "0", "0M", "M", "512MB", "512M@", "@128M", "512M@k2-end", "1G-:", "1G-8G", "1G-8G:512M,", " 1G"]
)
def test_what_k1_cannot_read_of_crashkernel(text):
    with pytest.raises(UsageError, match="must be what K1 can read"):
        DrillRequest.from_options({"crashkernel": text})


@pytest.mark.parametrize(
    ("machine", "good", "bad"),
    [
        ("pseries", ["256M", "1G", "4352M"], ["1M", "128M", "300M", "1025M", "128T"]),
        ("powernv9", ["1G", "1025M"], ["256M", "1023M", "1048577K", "0xf000000000000000"]),
    ],
)
def test_memory_that_qemus_machine_can_have(machine, good, bad):
    for memory in good:
        assert DrillRequest.from_options({"machine": machine, "memory": memory}).memory == memory
    for memory in bad:
        with pytest.raises(UsageError, match=f"a {machine} cannot have .* of memory \\(give a multiple of"):
            DrillRequest.from_options({"machine": machine, "memory": memory})


@pytest.mark.parametrize("wrong", ["--seed=-1", "--seed=99999999999999999999", f"--smp={10**20}"])
def test_the_command_line_refuses_a_number_that_no_drill_can_have_before_anything_is_fetched(wrong, capsys):
    with patch.object(twin, "require_extra"), patch.object(twin, "_fetch", side_effect=AssertionError):
        assert main(["drill", wrong]) == 2
    name, value = wrong.removeprefix("--").split("=")
    assert f"{name} = {value}: must be a whole number from" in capsys.readouterr().err


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
        ({"smp": 0}, "smp = 0: must be a whole number from 1 to 2048"),
        ({"smp": 2049}, "from 1 to 2048"),
        ({"smp": 1 << 20000}, "smp = …: must be"),
        ({"seed": -1}, "seed = -1: must be a whole number from 0 to 9223372036854775807"),
        ({"seed": 1 << 63}, "seed = 9223372036854775808: must be"),
        ({"memory": "lots"}, "memory = 'lots': must be a size"),
        ({"memory": "0"}, "memory = '0': must be a size"),
        ({"memory": 2}, "memory = 2: must be a size"),
        ({"kernel": "*sid"}, r"kernel = '\*sid': must be one kernel"),
        ({"capture-kernel": "debian:?"}, "must be one kernel"),
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
