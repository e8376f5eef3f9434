from tests.situations import FILE, KINDS, as_page, find_situations


def test_page_lists_the_marked_tests():
    situations = find_situations()
    assert FILE.read_text(encoding='utf-8') == as_page(situations)
    assert len({row.situation for row in situations}) == len(situations)


def test_every_kind_has_tests():
    assert {row.kind for row in find_situations()} == set(KINDS)
