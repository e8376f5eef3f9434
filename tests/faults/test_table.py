from tests.faults.table import FAULTS, FILE, HEAD, name_of


def test_no_row_is_left_over_or_missing():
    rows = FILE.read_text().split(HEAD)[1].split('\n\n')[0].splitlines()
    assert [name_of(row) for row in rows] == sorted(FAULTS)
