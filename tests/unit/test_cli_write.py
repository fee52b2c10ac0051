"""Files that options name: whole or not at all, and what is no file is written to."""

import os
from pathlib import Path

import pytest

from crashkernel.cli.command import write
from crashkernel.errors import UsageError


def test_a_file_is_replaced_as_a_whole_and_its_link_stays(tmp_path):
    target, link = tmp_path / "file", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    write(link, "after", "--out")
    assert target.read_text() == "after"
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_pipe_without_a_name_of_its_own():
    reading, writing = os.pipe()
    write(Path(f"/proc/self/fd/{writing}"), "text", "--out")
    os.close(writing)
    with os.fdopen(reading) as file:
        assert file.read() == "text"


def test_what_cannot_be_written_is_told_with_its_option(tmp_path):
    with pytest.raises(UsageError, match="No such file or directory") as caught:
        write(tmp_path / "nowhere" / "file", "text", "--out")
    assert "--out" in caught.value.hint
    assert not list(tmp_path.iterdir())
