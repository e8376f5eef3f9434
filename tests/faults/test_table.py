from tests.faults.table import FAULTS, FILE, HEAD, name_of


def test_table_has_one_row_per_fault():
    rows = FILE.read_text().split(HEAD)[1].split('\n\n')[0].splitlines()
    assert [name_of(row) for row in rows] == sorted(FAULTS)
