"""The command line: what a user sees when all is well, and one clear line when it is not."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crashkernel import cli, loader, quarantine
from crashkernel.cli import main, planning, rescue
from crashkernel.errors import CrashkernelError, LoadRefused
from crashkernel.formats.fdt import DeviceTree
from crashkernel.machine import Pages
from crashkernel.memory import Range, RangeSet
from crashkernel.placement.plan import DAMAGE_POLICIES, LoadPlan
from support.machines import MIB, memory_node, small_plan, tree, vmlinux


@pytest.fixture
def files(tmp_path):
    """A captured tree, a kernel and an initrd, as arguments for `plan`."""
    root = tree(memory=[memory_node(0, 256 * MIB)], region=Range(64 * MIB, 192 * MIB))
    (tmp_path / "host.dtb").write_bytes(DeviceTree(root).to_bytes())
    (tmp_path / "vmlinux").write_bytes(vmlinux())
    (tmp_path / "initrd").write_bytes(b"initrd" * 1000)
    return tmp_path


def plan_arguments(files, *more):
    machine = ["--machine", str(files / "host.dtb")]
    return ["plan", *machine, "--kernel", str(files / "vmlinux"), "--initrd", str(files / "initrd"), *more]


@pytest.fixture
def host(files, monkeypatch):
    """The captured tree's machine is the one this runs on."""
    found = planning._machine(cli._parser(["plan"]).parse_args(plan_arguments(files)))[0]
    monkeypatch.setattr(rescue, "read_machine", lambda: replace_head(found))


def complaint(capsys):
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("crashkernel: ")
    return lines[0]


@pytest.mark.parametrize(
    "command",
    [[], ["plan"], ["load"], ["status"], ["unload"], ["drill"], ["bench"], ["big-endian"], ["campaign"], ["report"], ["size"]],
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: crashkernel" in text
    if command and command[0] not in ("status", "unload"):
        assert "example" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("placement", ["zero", "reserved"])
def test_plan_draws_maps(files, capsys, placement):
    assert main(plan_arguments(files, "--placement", placement, "--append", "console=hvc0")) == 0
    text = capsys.readouterr().out
    assert f"placement {placement}" in text
    assert "low memory" in text
    assert "hazards: " in text
    assert "console=hvc0 elfcorehdr=" in text


def test_plan_as_json_is_a_plan_that_can_be_drawn_again(files, capsys):
    out = files / "plan.json"
    assert main(plan_arguments(files, "--json", "--plan-out", str(out))) == 0
    printed = capsys.readouterr().out
    plan = LoadPlan.from_json(printed)
    assert LoadPlan.from_json(out.read_text()) == plan
    assert main(["plan", "--from", str(out)]) == 0
    assert plan.kernel in capsys.readouterr().out
    assert sorted(path.name for path in files.iterdir()) == ["host.dtb", "initrd", "plan.json", "vmlinux"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "console=hvc0 maxcpus=1 numa=off irqpoll reset_devices"),
        (["--reuse-cmdline"], "root=/dev/sda1 console=hvc0 quiet maxcpus=1 numa=off irqpoll reset_devices"),
        (["--append", "only this"], "only this"),
    ],
)
def test_k2s_command_line(files, capsys, options, expected):
    root = tree(
        memory=[memory_node(0, 256 * MIB)],
        region=Range(64 * MIB, 192 * MIB),
        bootargs="BOOT_IMAGE=/vmlinux root=/dev/sda1 console=hvc0 quiet crashkernel=128M elfcorehdr=1K",
    )
    (files / "host.dtb").write_bytes(DeviceTree(root).to_bytes())
    assert main(plan_arguments(files, "--json", *options)) == 0
    cmdline = json.loads(capsys.readouterr().out)["cmdline"]
    assert cmdline.partition(" elfcorehdr=")[0] == expected


def test_options_that_are_no_text(files, capsys):
    option = os.fsdecode(b"name=caf\xe9")
    assert main(plan_arguments(files, "--append", option)) == 0
    assert "name=caf\\udce9 elfcorehdr=" in capsys.readouterr().out
    assert main(plan_arguments(files, "--append", option, "--json")) == 0
    assert LoadPlan.from_json(capsys.readouterr().out).cmdline.startswith(option + " ")


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ([], "reboot"),
        (["--on-damage", "halt"], "halt"),
        (["--on-damage", "reboot"], "reboot"),
        (["--on-damage", "continue"], "continue"),
    ],
)
def test_what_to_do_about_damage(files, capsys, options, policy):
    assert main(plan_arguments(files, "--json", *options)) == 0
    assert LoadPlan.from_json(capsys.readouterr().out).on_damage == policy


@pytest.mark.parametrize("command", ["plan", "load"])
def test_a_way_to_deal_with_damage_that_there_is_not(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--on-damage", "ignore"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "argument --on-damage: invalid choice: 'ignore'" in said
    assert all(policy in said for policy in DAMAGE_POLICIES)


def test_the_help_names_what_happens_without_the_option(capsys):
    with pytest.raises(SystemExit):
        main(["load", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "with --kernel: none" in text
    assert "halt, reboot, or enter K2 all the same (default: reboot)" in text
    assert "without crashkernel=, elfcorehdr=, fadump=, BOOT_IMAGE=, and 'maxcpus=1 numa=off " in text


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("vmlinux", b"", "not an ELF file"),
            ("vmlinux", b"\x7fELF", "cut off"),
            ("vmlinux", b"\x1f\x8b" + bytes(100), "compressed"),
            ("vmlinux", vmlinux()[:-100], "lacks"),
            ("vmlinux", vmlinux(machine_number=62), "not ppc64"),
            ("host.dtb", b"", "host.dtb"),
            ("host.dtb", bytes(100), "host.dtb"),
            ("host.dtb", DeviceTree(tree(platform="chrp")).to_bytes(), "not a PowerNV or PAPR machine"),
            ("host.dtb", DeviceTree(tree(region=None)).to_bytes(), "no memory is reserved"),
            ("host.dtb", DeviceTree(tree(region=Range(64 * MIB, 65 * MIB))).to_bytes(), "does not fit"),
            ("host.dtb", DeviceTree(tree(region=Range(0, 512 * MIB))).to_bytes(), "leaves K1 no page at 0"),
            ("host.dtb", DeviceTree(tree(region=Range(0x800, 512 * MIB))).to_bytes(), "leaves K1 no page at 0"),
        ],
    )
    def test_a_bad_file(self, files, capsys, name, content, says):
        (files / name).write_bytes(content)
        assert main(plan_arguments(files)) in (2, 3)
        assert says in complaint(capsys)

    @pytest.mark.parametrize("option", ["--kernel", "--initrd", "--machine", "--from"])
    def test_a_file_that_is_not_there(self, files, capsys, option):
        arguments = plan_arguments(files) if option != "--from" else ["plan"]
        assert main([*arguments, option, str(files / "nowhere")]) == 2
        assert f"cannot read {files}/nowhere: No such file or directory" in complaint(capsys)

    def test_a_plan_with_overlapping_segments(self, files, capsys):
        main(plan_arguments(files, "--json"))
        raw = json.loads(capsys.readouterr().out)
        raw["segments"][1]["range"] = raw["segments"][0]["range"]
        (files / "plan.json").write_text(json.dumps(raw))
        assert main(["plan", "--from", str(files / "plan.json")]) == 2
        assert "segments overlap" in complaint(capsys)

    def test_a_plan_that_cannot_be_written(self, files, capsys):
        assert main(plan_arguments(files, "--plan-out", str(files / "nowhere/plan.json"))) == 2
        assert "cannot write" in complaint(capsys)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_damage_never_shows_a_traceback(self, files, data):
        for name, good in (("vmlinux", vmlinux()), ("host.dtb", (files / "host.dtb").read_bytes())):
            content = bytearray(good[: data.draw(st.integers(0, len(good)))])
            for _ in range(data.draw(st.integers(0, 3))):
                if content:
                    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            (files / f"bad-{name}").write_bytes(content)
        status = main(
            ["plan", "--machine", str(files / "bad-host.dtb"), "--kernel", str(files / "bad-vmlinux"), "--initrd", ""]
        )
        assert status in (0, 2, 3)

    def test_contradictory_options(self, files, capsys):
        with pytest.raises(SystemExit) as stop:
            main(plan_arguments(files, "--append", "x", "--reuse-cmdline"))
        assert stop.value.code == 2
        assert "not allowed with" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_quarantine(monkeypatch):
    """No test of a command line takes pages out of this machine's kernel's hands."""
    monkeypatch.setattr(quarantine, "take", lambda *_, **__: pytest.fail("took pages"))
    monkeypatch.setattr(quarantine, "release", lambda *_: quarantine.Released(RangeSet(), RangeSet()))
    monkeypatch.setattr(quarantine, "status", lambda *_: None)
    monkeypatch.setattr(loader, "status", lambda *_: loader.Status(False, 0, None))


class TestPlanning:
    """plan and compare on a machine that was captured from a running kernel."""

    CAPTURED = Path(__file__).parents[1] / "data/pseries-power9.json"

    def arguments(self, files, command, *more):
        return [command, "--machine", str(self.CAPTURED), "--kernel", str(files / "vmlinux"), *more]

    def test_a_described_machine(self, files, capsys):
        assert main(self.arguments(files, "plan", "--placement", "zero")) == 0
        text = capsys.readouterr().out
        assert "reserved 0x20000000-0x40000000 (512 MiB)" in text
        assert "safe          the hash page table" in text
        assert "source: " not in text

    def test_explained(self, files, capsys):
        assert main(self.arguments(files, "plan", "--explain")) == 0
        text = capsys.readouterr().out
        assert text.count("source: ") == 17
        assert max(map(len, text.splitlines())) <= 80

    def test_a_saved_plan_is_drawn_as_it_is(self, files, capsys):
        assert main(plan_arguments(files, "--plan-out", str(files / "plan.json"))) == 0
        capsys.readouterr()
        assert main(["plan", "--from", str(files / "plan.json"), "--placement", "zero", "--crashkernel", "1G"]) == 2
        assert "it takes no --placement and no --crashkernel" in complaint(capsys)

    def test_pictures(self, files, capsys):
        paths = [files / "plan.svg", files / "plan.html"]
        assert main(self.arguments(files, "plan", "--svg", str(paths[0]), "--html", str(paths[1]))) == 0
        assert paths[0].read_text().startswith("<svg")
        assert "<html" in paths[1].read_text()
        before = sorted(path.name for path in files.iterdir())
        assert main(self.arguments(files, "plan", "--svg", str(files / "nowhere/plan.svg"))) == 2
        assert "choose another --svg" in capsys.readouterr().err
        assert sorted(path.name for path in files.iterdir()) == before

    def test_as_if_booted_with_another_reservation(self, files, capsys):
        assert main(self.arguments(files, "plan", "--crashkernel", "256M@128M")) == 0
        text = capsys.readouterr().out
        assert text.startswith("crashkernel=256M@128M: 0x8000000-0x18000000 (256 MiB)")
        assert "reserved 0x8000000-0x18000000 (256 MiB)" in text
        assert "unknown       elfcorehdr, notes and VMCOREINFO" in text

    @pytest.mark.parametrize(
        ("spec", "says"),
        [
            ("512M@1M", "would reserve nothing"),
            ("3G", "would reserve nothing"),
            ("512M,high", "would reserve nothing"),
            ("4G-:1G", "would reserve nothing"),
            ("plenty", "would reserve nothing"),
            ("983M@41M", "K1 would not boot"),
        ],
    )
    @pytest.mark.parametrize("command", ["plan", "compare"])
    def test_a_reservation_that_cannot_be(self, files, capsys, command, spec, says):
        assert main(self.arguments(files, command, "--crashkernel", spec)) == 3
        assert says in complaint(capsys)

    def test_compare(self, files, capsys):
        assert main(self.arguments(files, "compare")) == 0
        text = capsys.readouterr().out
        assert "recommended: reserved" in text
        assert main(self.arguments(files, "compare", "--json")) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["recommended"] == "reserved"
        assert [variant["name"] for variant in found["variants"]][:2] == ["reserved", "zero"]
        assert found["variants"][0]["cost"]["reserved"] == 512 * MIB

    def test_compare_with_what_drills_showed(self, files, capsys):
        drills = [{"placement": "zero", "verdict": "PASS"}, {"placement": "zero", "verdict": "FAIL"}]
        (files / "drills.json").write_text(json.dumps({"drills": drills}))
        assert main(self.arguments(files, "compare", "--drills", str(files / "drills.json"))) == 0
        assert "1 of 2 pass" in capsys.readouterr().out

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"drills": [1]}', '{"drills": 7}', "[" * 100_000])
    def test_results_that_are_none(self, files, capsys, text):
        (files / "drills.json").write_text(text)
        assert main(self.arguments(files, "compare", "--drills", str(files / "drills.json"))) == 2
        assert "not the results of drills" in complaint(capsys)

    @pytest.mark.parametrize("data", [b"", b"{}", b"\x89PNG", b"[" * 100_000, b"\xd0\x0d\xfe\xed"])
    def test_a_machine_that_is_none(self, files, capsys, data):
        (files / "machine").write_bytes(data)
        assert main(["plan", "--machine", str(files / "machine"), "--kernel", str(files / "vmlinux")]) == 2
        assert str(files / "machine") in complaint(capsys)


class TestHost:
    """What the other commands say on a machine that is no POWER host."""

    @pytest.mark.skipif(Path("/proc/device-tree").is_dir(), reason="this machine has a device tree")
    def test_load_needs_a_power_machine(self, capsys):
        assert main(["load"]) == 3
        assert "not a POWER machine" in complaint(capsys)

    @pytest.mark.parametrize(
        ("now", "code", "says"),
        [
            (loader.Status(False, 0, None), 3, "not loaded; nothing is reserved: boot with crashkernel="),
            (loader.Status(False, 512 * MIB, None), 3, "not loaded; 512 MiB is reserved"),
            (loader.Status(True, 512 * MIB, None), 0, "loaded, perhaps by another tool"),
        ],
    )
    def test_status(self, monkeypatch, capsys, now, code, says):
        monkeypatch.setattr(loader, "status", lambda: now)
        assert main(["status"]) == code
        assert says in capsys.readouterr().out
        assert main(["status", "--json"]) == code
        assert json.loads(capsys.readouterr().out)["loaded"] == now.loaded

    def test_status_says_whose_record_it_is(self, monkeypatch, capsys):
        """The kernel does not tell what is loaded: another tool may have replaced our load since."""
        plan = replace(small_plan(), cmdline=os.fsdecode(b"caf\xe9 elfcorehdr=1K"))
        monkeypatch.setattr(loader, "status", lambda: loader.Status(True, 128 * MIB, plan))
        assert main(["status"]) == 1
        text = capsys.readouterr().out
        assert "the last load by crashkernel was 6.1.0-test, placement reserved" in text
        assert "caf\\udce9" in text
        assert "whether the machine has changed since cannot be told" in text
        assert main(["status", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["outdated"] is None

    def test_a_plan_that_cannot_be_written_loads_nothing(self, files, host, monkeypatch, capsys):
        monkeypatch.setattr(loader, "load", lambda *_: pytest.fail("loaded"))
        assert main(["load", "--kernel", str(files / "vmlinux"), "--plan-out", str(files / "nowhere/plan.json")]) == 2
        assert "cannot write" in complaint(capsys)

    def test_a_load_that_was_not_remembered_is_warned_of(self, files, host, monkeypatch, capsys):
        monkeypatch.setattr(loader, "load", lambda *_: loader.Loaded(False, None))
        assert main(["load", "--kernel", str(files / "vmlinux")]) == 0
        said = capsys.readouterr()
        assert said.out.startswith("loaded 6.1.0-49-powerpc64le")
        assert said.err.startswith("crashkernel: warning: cannot write /run/crashkernel/plan.json")

    def test_a_load_that_was_remembered_is_not(self, files, host, monkeypatch, capsys):
        monkeypatch.setattr(loader, "load", lambda *_: loader.Loaded(True, None))
        assert main(["load", "--kernel", str(files / "vmlinux")]) == 0
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(("rtas", "start"), [(None, None), (Range(82 * MIB, 84 * MIB), 84 * MIB)], ids=["half", "wholly"])
    def test_an_initrd_above_the_rma_is_warned_of(self, files, monkeypatch, capsys, rtas, start):
        """`start`: of the initrd, which else begins below the RMA's end at 84 MiB and goes beyond it."""
        nodes = [memory_node(0, 84 * MIB, 172 * MIB)]
        root = tree(memory=nodes, region=Range(64 * MIB, 192 * MIB), rtas=rtas)
        (files / "host.dtb").write_bytes(DeviceTree(root).to_bytes())
        (files / "initrd").write_bytes(bytes(16 * MIB))
        machine = planning._machine(cli._parser(["plan"]).parse_args(plan_arguments(files)))[0]
        monkeypatch.setattr(rescue, "read_machine", lambda: replace_head(machine))
        seen = []
        monkeypatch.setattr(loader, "load", lambda plan, *_: seen.append(plan) or loader.Loaded(True, None))
        assert main(["load", "--kernel", str(files / "vmlinux"), "--initrd", str(files / "initrd")]) == 0
        (plan,) = seen
        initrd = plan.segment("initrd").range
        assert (initrd.start < 84 * MIB) is (start is None)
        beyond = Range(max(initrd.start, 84 * MIB), initrd.end)
        assert f"warning: reach with translation off: {beyond} of the initramfs lies above the RMA" in complaint(capsys)

    def test_at_zero_pages_are_taken_before_the_load_and_given_back_when_it_fails(self, files, host, monkeypatch, capsys):
        taken, events = Range(2 * MIB, 3 * MIB), []

        def take(wanted, page_size, progress):
            events.append("take")
            return quarantine.Quarantine(RangeSet([taken]), (Pages(Range(3 * MIB, 4 * MIB), "slab"),))

        def refuse(*_):
            events.append("load")
            raise LoadRefused("busy")

        monkeypatch.setattr(rescue, "quarantinable", lambda *_: RangeSet([Range(2 * MIB, 4 * MIB)]))
        monkeypatch.setattr(quarantine, "take", take)
        monkeypatch.setattr(
            quarantine, "release", lambda *_: events.append("release") or quarantine.Released(RangeSet(), RangeSet())
        )
        monkeypatch.setattr(loader, "load", refuse)
        monkeypatch.setattr(loader, "status", lambda: loader.Status(False, 0, None))
        arguments = ["load", "--placement", "zero", "--kernel", str(files / "vmlinux")]
        assert main(arguments) == 3
        assert events == ["take", "load", "release"]
        out = capsys.readouterr().out
        assert "1 MiB of the 2 MiB of K2's memory that K1 could hand out are out of its hands" in out
        assert "not to be had: slab 1 MiB" in out
        events.clear()
        assert main([*arguments, "--no-quarantine"]) == 3
        assert events == ["load", "release"]

    @pytest.mark.parametrize("quarantined", [False, True])
    def test_a_load_that_fails_says_whether_anything_is_still_loaded(self, files, host, monkeypatch, capsys, quarantined):
        """The kernel frees the old capture kernel before it refuses the new one."""
        states = [loader.Status(True, 0, None), loader.Status(False, 0, None)]

        def refuse(*_):
            raise LoadRefused("no memory")

        released = []
        monkeypatch.setattr(loader, "status", lambda: states.pop(0) if len(states) > 1 else states[0])
        monkeypatch.setattr(loader, "load", refuse)
        monkeypatch.setattr(quarantine, "status", lambda: quarantine.Quarantine(RangeSet(), ()) if quarantined else None)
        monkeypatch.setattr(quarantine, "release", lambda: released.append(1) or quarantine.Released(RangeSet(), RangeSet()))
        assert main(["load", "--kernel", str(files / "vmlinux")]) == 3
        assert "this machine is not protected now" in capsys.readouterr().err
        assert released

    def test_a_load_that_fails_while_another_stands_leaves_that_one_s_quarantine(self, files, host, monkeypatch, capsys):
        monkeypatch.setattr(loader, "status", lambda: loader.Status(True, 0, None))
        monkeypatch.setattr(loader, "load", lambda *_: 1 / 0)
        monkeypatch.setattr(quarantine, "status", lambda: quarantine.Quarantine(RangeSet(), ()))
        monkeypatch.setattr(quarantine, "release", lambda: pytest.fail("released"))
        assert main(["load", "--kernel", str(files / "vmlinux")]) == 70
        assert "not protected" not in capsys.readouterr().err

    def test_asking_again_for_pages(self, monkeypatch, capsys):
        monkeypatch.setattr(quarantine, "again", lambda **_: None)
        assert main(["quarantine"]) == 3
        assert "there is no quarantine" in complaint(capsys)
        held = (Pages(Range(3 * MIB, 4 * MIB), "pagetable"),)
        for found, status in (((), 0), (held, 1)):
            result = quarantine.Quarantine(RangeSet([Range(2 * MIB, 3 * MIB)]), found)
            monkeypatch.setattr(quarantine, "again", lambda result=result, **_: result)
            assert main(["quarantine"]) == status
            assert "1 MiB of the " in capsys.readouterr().out

    @pytest.mark.parametrize(
        "options",
        [
            ["--append", "quiet"],
            ["--placement", "zero"],
            ["--on-damage", "halt"],
            ["--no-quarantine"],
            ["--kernel", "x"],
            ["--initrd", ""],
        ],
    )
    def test_a_refresh_takes_no_other_options(self, host, capsys, options):
        assert main(["load", "--refresh", *options]) == 2
        line = complaint(capsys)
        assert "--refresh loads what was loaded last" in line
        assert options[0] in line

    def test_a_refresh_loads_what_was_asked_for_if_the_machine_has_changed(self, files, host, monkeypatch, capsys):
        request = loader.Request("reserved", "halt", str(files / "vmlinux"), "", "console=hvc0", True)
        monkeypatch.setattr(loader, "requested", lambda: request)
        older = small_plan(memory=[memory_node(0, 224 * MIB)])
        seen = []
        monkeypatch.setattr(loader, "load", lambda plan, _, again: seen.append((plan, again)) or loader.Loaded(True, 0.025))
        monkeypatch.setattr(loader, "status", lambda: loader.Status(True, 128 * MIB, older))
        assert main(["load", "--refresh"]) == 0
        ((plan, again),) = seen
        assert (plan.placement, plan.on_damage, again) == ("reserved", "halt", request)
        assert "it had none for at most 25 ms" in capsys.readouterr().out
        monkeypatch.setattr(loader, "status", lambda: loader.Status(True, 128 * MIB, plan))
        assert main(["load", "--refresh"]) == 0
        assert "nothing has changed since the load" in capsys.readouterr().out
        assert len(seen) == 1

    def test_a_dry_run_loads_nothing(self, files, monkeypatch, capsys):
        machine = planning._machine(cli._parser(["plan"]).parse_args(plan_arguments(files)))[0]
        monkeypatch.setattr(rescue, "read_machine", lambda: replace_head(machine))
        monkeypatch.setattr(loader, "load", lambda *_: pytest.fail("loaded"))
        arguments = ["load", "--dry-run", "--kernel", str(files / "vmlinux"), "--plan-out", str(files / "plan.json")]
        assert main(arguments) == 0
        assert "would load 6.1.0-49-powerpc64le" in capsys.readouterr().out
        assert LoadPlan.from_json((files / "plan.json").read_text()).placement == "reserved"

    def test_loading_without_k1s_head_is_refused(self, files, monkeypatch, capsys):
        machine = planning._machine(cli._parser(["plan"]).parse_args(plan_arguments(files)))[0]
        monkeypatch.setattr(rescue, "read_machine", lambda: machine)
        monkeypatch.setattr(loader, "load", lambda *_: pytest.fail("loaded"))
        assert main(["load", "--kernel", str(files / "vmlinux")]) != 0
        assert "/proc/kcore" in complaint(capsys)


def replace_head(machine):
    return replace(machine, head=bytes(0x100))


class TestDrill:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--cpu", "POWER8", "--mmu", "radix"], "POWER8 has no radix MMU"),
            (["--memory", "plenty"], "plenty"),
            (["--machine", "powernv9", "--cpu", "POWER10"], "powernv9 is a POWER9 machine"),
            (["--judge", "/nonexistent"], "holds no kept drill"),
            (["--json", "/nonexistent/results.json"], "cannot write"),
            (["--smp", "0"], "smp = 0: must be a whole number from 1 to 2048"),
            (["--capture", "32"], "capture = 32: must be a whole number from 0 to 31"),
            (["--capture-codec", "lzo"], "add --capture LEVEL"),
            (["--capture-to", "network"], "add --capture LEVEL"),
            (["--capture", "31", "--fault", "flip:kernel"], "there is no dump to capture"),
        ],
    )
    def test_a_request_that_makes_no_sense(self, capsys, arguments, says):
        assert main(["drill", *arguments]) == 2
        assert says in complaint(capsys)

    def test_without_qemu_it_says_what_to_install(self, monkeypatch, capsys):
        monkeypatch.setenv("PATH", "")
        assert main(["drill"]) == 3
        assert "apt-get install qemu-system-ppc" in complaint(capsys)


def test_a_bug_of_ours_is_named_as_one(monkeypatch, capsys):
    monkeypatch.setattr(loader, "status", lambda: 1 / 0)
    assert main(["status"]) == 70
    assert "a bug of ours: ZeroDivisionError" in complaint(capsys)
    monkeypatch.setenv("CRASHKERNEL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["status"])


def test_every_error_has_an_exit_status_of_its_kind():
    codes = {0, 1, 2, 3, 70}

    def walk(kind):
        assert kind.exit_code in codes
        for child in kind.__subclasses__():
            walk(child)

    walk(CrashkernelError)


@pytest.mark.parametrize(
    ("unbuffered", "status"),
    [
        ("1", 141),  # as a shell tells SIGPIPE: it meets it while it prints, and no verdict is no good verdict
        ("", 0),  # its verdict was reached when it meets it
    ],
)
def test_a_reader_that_leaves_early_gets_no_complaint(files, unbuffered, status):
    command = [sys.executable, "-m", "crashkernel", *plan_arguments(files)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == status
