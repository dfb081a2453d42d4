from __future__ import annotations

import pytest

from gatework.core import PartError, entries, papers


def test_every_registered_part_stands_in_its_papers_entry():
    known = papers.papers()
    for entry in entries():
        if entry.paper is not None:
            assert entry.paper in known, f"{entry.name} names the paper {entry.paper!r}, which papers.toml does not have"
            assert entry.name in known[entry.paper].parts, f"papers.toml: [{entry.paper}] does not list {entry.name}"


def test_every_part_of_an_entry_is_registered_with_that_paper():
    registered = {entry.name: entry.paper for entry in entries()}
    for name, paper in papers.papers().items():
        assert paper.parts, f"[{name}] lists no part"
        for part in paper.parts:
            assert registered.get(part) == name, f"[{name}] lists {part}, which is registered with {registered.get(part)!r}"


def test_entries_are_complete_sentences_with_an_address():
    for paper in papers.papers().values():
        assert paper.title.strip() == paper.title != ""
        assert 1950 < paper.year < 2100
        assert paper.source.startswith("https://")
        assert paper.claim.endswith(".")
        assert paper.claim.count(". ") == 0, f"[{paper.name}] claims more than one sentence"


def test_entries_are_sorted_so_that_a_new_one_has_one_place():
    assert list(papers.papers()) == sorted(papers.papers())


def test_lookup_says_what_was_meant():
    assert papers.paper("golu").year == 2025
    with pytest.raises(PartError, match="no paper 'golou'; did you mean 'golu'"):
        papers.paper("golou")


@pytest.mark.parametrize(
    "text",
    [
        '[a]\ntitle="x"\nyear=1\nsource="s"\nparts=[]',
        '[a]\ntitle="x"\nyear=1\nsource="s"\nparts=[]\nclaim="c"\nmore=1',
        "a = 3",
    ],
)
def test_an_entry_with_missing_or_unknown_fields_is_refused(text):
    with pytest.raises(ValueError, match=r"the entry 'a' of papers\.toml needs"):
        papers.read(text)
