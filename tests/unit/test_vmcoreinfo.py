import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.errors import FormatError
from crashkernel.formats.vmcoreinfo import VmcoreInfo
from support.hostile import corrupted, survives, truncations

SAMPLE = b"""\
OSRELEASE=6.1.0-37-powerpc64le
BUILD-ID=4f1e0c2d
PAGESIZE=65536
SYMBOL(init_uts_ns)=c000000002713e10
SYMBOL(mem_section)=C0000000028e3ff8
SIZE(page)=64
OFFSET(page.flags)=0
OFFSET(page._refcount)=52
LENGTH(zone.free_area)=9
NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)=-129
NUMBER(PG_lru)=4
NUMBER(kimage_voffset)=0xffff
KERNELOFFSET=0
CRASHTIME=1124377373
"""


def read(text: bytes) -> VmcoreInfo:
    return VmcoreInfo.from_bytes(text, "vmcore")


def test_typed_access():
    info = read(SAMPLE)
    assert info.release == "6.1.0-37-powerpc64le"
    assert info.page_size == 65536
    assert info.symbol("init_uts_ns") == 0xC000000002713E10
    assert info.symbol("mem_section") == 0xC0000000028E3FF8
    assert info.size("page") == 64
    assert info.offset("page.flags") == 0
    assert info.offset("page._refcount") == 52
    assert info.length("zone.free_area") == 9
    assert info.number("PAGE_BUDDY_MAPCOUNT_VALUE") == -129
    assert info.number("PG_lru") == 4
    assert info.number("kimage_voffset") == 0xFFFF


def test_is_a_mapping_of_the_lines():
    info = read(SAMPLE)
    assert info["KERNELOFFSET"] == "0"
    assert info.get("KERNELSOMETHING") is None
    assert "SIZE(page)" in info
    assert len(info) == 14
    assert info == dict(line.split("=") for line in SAMPLE.decode().splitlines())


@pytest.mark.parametrize("padding", [b"", b"\0", b"\0" * 4096, b"\n\n\0"])
def test_padding_is_no_line(padding):
    assert read(SAMPLE + padding) == read(SAMPLE)


def test_nothing_is_an_empty_mapping():
    assert not read(b"")
    assert not read(b"\0\0")


def test_values_may_hold_what_lines_are_made_of():
    assert read(b"CMDLINE=a=b c\n")["CMDLINE"] == "a=b c"


def test_the_first_of_two_lines_counts():
    assert read(b"SIZE(page)=64\nSIZE(page)=56").size("page") == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"PAGESIZE=4096\nSIZE(page)\n", "vmcore: .*without a value: 'SIZE.page.' at offset 0xe"),
        (b"=4096", "without a value"),
        (b"OSRELEASE=\xff\xfe", "not text"),
        (b"OSRELEASE=6\0.1", "not text"),
        (b"OSRELEASE=6.1\x1b[2J", "not text"),
    ],
)
def test_refuses_lines(text, message):
    with pytest.raises(FormatError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("text", "ask", "message"),
    [
        (b"", lambda info: info.release, "has no OSRELEASE"),
        (b"", lambda info: info.symbol("x"), r"has no SYMBOL\(x\)"),
        (b"PAGESIZE=64K", lambda info: info.page_size, "PAGESIZE=64K, not a number"),
        (b"PAGESIZE=0", lambda info: info.page_size, "power of two"),
        (b"PAGESIZE=65535", lambda info: info.page_size, "power of two"),
        (b"PAGESIZE=-4096", lambda info: info.page_size, "not a number"),
        (b"SYMBOL(x)=c000_0000", lambda info: info.symbol("x"), "not a number"),
        (b"OFFSET(x)= 5", lambda info: info.offset("x"), "not a number"),
        (b"SIZE(x)=", lambda info: info.size("x"), "not a number"),
        (b"LENGTH(x)=ff", lambda info: info.length("x"), "not a number"),
        (b"NUMBER(x)=--1", lambda info: info.number("x"), "not a number"),
        (b"NUMBER(x)=" + b"1" * 5000, lambda info: info.number("x"), "not a number"),
    ],
)
def test_refuses_to_answer(text, ask, message):
    with pytest.raises(FormatError, match=message):
        ask(read(text))


@given(st.dictionaries(st.from_regex(r"[A-Z]+\([a-z_.]+\)", fullmatch=True), st.integers(0, 1 << 64)))
def test_what_is_written_reads_back(numbers):
    text = "".join(f"{key}={value}\n" for key, value in numbers.items()).encode()
    assert dict(read(text)) == {key: str(value) for key, value in numbers.items()}


def ask_everything(text: bytes) -> None:
    info = read(text)
    for ask in (
        lambda: (info.release, info.page_size),
        lambda: (info.symbol("init_uts_ns"), info.size("page"), info.offset("page.flags")),
        lambda: (info.length("zone.free_area"), info.number("PG_lru")),
    ):
        survives(lambda _, ask=ask: ask(), b"")


def test_truncations():
    for short in truncations(SAMPLE):
        survives(ask_everything, short)


@given(corrupted(SAMPLE))
def test_damage(text):
    survives(ask_everything, text)


@given(st.binary(max_size=100))
def test_noise(text):
    survives(ask_everything, text)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1795567645", 1795567645), ("0", 0), ("", None), ("-5", None), ("soon", None), ("9" * 13, None), ("\u0663", None)],
)
def test_crash_time_is_one_that_a_calendar_has(value, seconds):
    assert VmcoreInfo({"CRASHTIME": value}).crash_time == seconds
    assert VmcoreInfo({}).crash_time is None
