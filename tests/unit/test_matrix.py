"""The matrix's table, and the document it goes to."""

import pytest

from crashkernel.drill.matrix import BEHIND_K1, CASES, markdown_row, markdown_table, update_document
from crashkernel.errors import UsageError


def test_every_case_can_be_told_to_qemu():
    for case in CASES:
        twin = case.resolved(0x287C918)
        assert twin.title
        assert twin.crashkernel != BEHIND_K1


def test_the_region_behind_k1_follows_the_kernel():
    (case,) = (case for case in CASES if case.twin.crashkernel == BEHIND_K1)
    assert case.resolved(0x287C918).crashkernel == "512M@41M"
    assert case.resolved(0x2900000).crashkernel == "512M@41M"
    assert case.resolved(0x2900001).crashkernel == "512M@42M"


def test_a_row_has_a_cell_for_each_column():
    row = markdown_row(CASES[0].twin, "6.1", ["PASS 1 MiB", "FAIL: a | b"])
    table = markdown_table([row]).splitlines()
    assert len({line.count("|") for line in table}) == 1


def test_a_row_says_how_many_cpus_k2_ran_on():
    four = next(case.twin for case in CASES if case.twin.smp == 4)
    assert "| 4, 1 |" in markdown_row(four, "6.1", ["PASS", "PASS"])
    assert "| 4, 4 |" in markdown_row(four, "6.1", ["PASS", "PASS"], all_cpus=True)


def test_the_table_replaces_the_one_before(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("above\n<!-- matrix: begin, written by `make matrix` -->\nold\n<!-- matrix: end -->\nbelow\n")
    update_document(document, "new")
    update_document(document, "newer")
    text = document.read_text()
    assert text.startswith("above\n<!-- matrix: begin")
    assert text.endswith("-->\nbelow\n")
    assert "\nnewer\n" in text
    assert "old" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_document_without_a_place_for_it(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("nothing here\n")
    with pytest.raises(UsageError, match="has no lines"):
        update_document(document, "table")
    assert document.read_text() == "nothing here\n"
