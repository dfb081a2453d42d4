from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest

from gatework.bench import formats, report
from gatework.bench.comparison import Comparison
from gatework.core.errors import GateworkError

COLUMNS = (
    "test_mean", "test_sd", "training_saved", "difference", "interval_low", "interval_high", "joint_interval_low",
    "p", "adjusted_p",
)  # fmt: skip


@pytest.fixture(scope="module")
def comparison(synthetic):
    return Comparison(*synthetic.build())


@pytest.fixture(scope="module")
def page(comparison):
    return report.html(comparison)


def strict_json(text):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


class Reader(HTMLParser):
    """The page's elements and the text a reader sees, tables by the id of their section."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.rows, self.section, self.inside, self.cell = [], [], {}, None, [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self.inside.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th") and self.section in self.rows:
            self.rows[self.section][-1].append("")

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)
            if self.rows.get(self.section) and self.rows[self.section][-1]:
                self.rows[self.section][-1][-1] += f" {data.strip()}"


def words(text):
    return " ".join(text.replace("−", "-").split())


# CSV and JSON


def test_write(comparison, tmp_path):
    path = comparison.report(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.csv", "report.html", "report.json", "report.md"]
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    comparison.report(path.parent)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_write_refuses_a_file_in_the_way(comparison, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GateworkError, match="cannot be written"):
        comparison.report(tmp_path / "file")


def test_csv_and_json_hold_the_same_full_numbers(comparison, tmp_path):
    folder = comparison.report(tmp_path).parent
    rows = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    content = strict_json((folder / "report.json").read_text())
    assert [r["variant"] for r in rows] == [v["variant"] for v in content["variants"]] == comparison.names
    for flat, variant, row in zip(rows, content["variants"], comparison.rows, strict=True):
        assert list(flat) == list(variant)
        for key, value in variant.items():
            assert flat[key] == ("" if value is None else str(value))
        v = row.verdict
        tested = [None] * 6 if v is None else [v.difference, *v.interval, v.joint[0], v.p, v.adjusted_p]
        assert [variant[c] for c in COLUMNS] == [row.score, row.sd, row.saved, *tested]  # Not rounded.
        assert variant["verdict"] == (v.word if v else "baseline")
        assert variant["parameters"] == row.cost["parameters"]
    assert content["headline"] == comparison.headline()
    assert content["smallest_visible_difference"] == comparison.smallest
    assert content["axes"]["params"]["held"] is True
    assert Comparison(content["study"], content["records"]).verdicts == comparison.verdicts


def test_numbers_that_json_does_not_have(synthetic, tmp_path):
    study, records = synthetic.small({"base": [1.0, 1.1], "a": [1.5, 1.6], "b": [None, None]})
    records[0]["metrics"] = {"x": math.nan, "y": [1.0, math.inf]}
    records[-1] |= {"score": math.nan, "validation": {"loss": -math.inf}}
    path = Comparison(study, records).report(tmp_path)
    content = strict_json((tmp_path / "report.json").read_text())
    assert content["records"][-1]["score"] is None
    assert next(r for r in content["records"] if r["variant"] == "base")["metrics"] == {"x": None, "y": [1.0, None]}
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', path.read_text(), re.S).group(1)
    assert strict_json(figures)
    assert "nan" not in (tmp_path / "report.csv").read_text()


# Markdown


def md_cells(line):
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def md_tables(text):
    return [[md_cells(line) for line in block.splitlines()] for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]


def test_markdown_carries_the_numbers(comparison):
    text = report.markdown(comparison)
    assert text.startswith(f"# {comparison.title()}\n\n**{comparison.headline()}**")
    verdicts, cost, _, broken = md_tables(text)
    assert [cells[0] for cells in verdicts[2:]] == comparison.names
    for cells, row in zip(verdicts[2:], comparison.rows, strict=True):
        line = dict(zip(verdicts[0], cells, strict=True))
        assert line["test score"] == f"{row.score:.3f} ± {row.sd:.3f}"
        assert line["verdict"] == (row.verdict.word if row.verdict else "baseline")
        assert line["seeds"] == f"{len(row.scores)}/4"
        if row.verdict:
            low, high = row.verdict.interval
            assert line["difference, 95% (Holm)"] == f"{row.verdict.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    assert len(cost) == 2 + len(comparison.rows)
    assert [cells[0] for cells in broken[2:]] == ["final/moe/seed2", "final/skip/seed3", "tune/wide/trial3"]
    for line in (comparison.smallest_line(), comparison.axes_line(), *comparison.notes(), *report.rules(comparison)):
        assert line in text
    assert "torch" in text


def test_scores_at_several_lengths_have_a_table_and_a_section(comparison, page):
    head, _, *body = next(table for table in md_tables(report.markdown(comparison)) if "loss at 256" in table[0])
    assert head == ["variant", "loss at 128", "loss at 256", "loss at 512"]
    assert [cells[0] for cells in body] == comparison.names
    for cells, row in zip(body, comparison.rows, strict=True):
        assert cells[2] == f"{row.score * 256**0.02:.3f} ± {row.sd * 256**0.02:.3f}"
    read = Reader(page)
    assert [words(" ".join(cells)) for cells in read.rows["lengths"][1:]] == [
        words(f"{report.GLYPHS[i]} {' '.join(cells)}") for i, cells in enumerate(body)
    ]
    assert "#lengths" in {attrs["href"] for tag, attrs in read.tags if tag == "a"}


def test_a_variant_without_a_finished_run_keeps_its_row_of_lengths(synthetic):
    study, records = synthetic.build()
    comparison = Comparison(study, [r for r in records if not (r["variant"] == "gla" and r["phase"] == "final")])
    _, rows = report.length_table(comparison)
    assert {row[0]: row[1:] for row in rows}["gla"] == [formats.NOTHING] * 3


def test_a_study_at_one_length_has_neither(synthetic):
    comparison = Comparison(*synthetic.small({"base": [1.0], "a": [0.1]}))
    assert report.length_table(comparison) == (["variant"], [])
    assert "Longer sequences" not in report.html(comparison) + report.markdown(comparison)


def test_markdown_escapes(hostile):
    _, *study = hostile
    text = report.markdown(Comparison(*study))
    tables = md_tables(text)
    for table in tables:
        assert {len(cells) for cells in table} == {len(table[0])}  # A bar in a name makes no new column.
    # Outside of code, HTML is text.
    assert not re.search(r"<(script|img|b)\b", re.sub(r"`[^`\n]*`", "", text))


# The page


def test_the_page_carries_the_numbers(comparison, page):
    read = Reader(page)
    seen = words(" ".join(read.text))
    assert words(comparison.headline()) in seen
    for line in (comparison.smallest_line(), comparison.axes_line(), comparison.tuning_line(), *comparison.notes()):
        assert words(line) in seen
    body = read.rows["verdict"][1:]
    for cells, row in zip(body, comparison.rows, strict=True):
        line = words(" ".join(cells))
        assert row.name in line
        assert f"{row.score:.3f} ± {row.sd:.3f}" in line
        assert f"{len(row.scores)} of 4" in line
        if row.verdict:
            low, high = row.verdict.interval
            assert f"{row.verdict.difference:+.3f} [{low:+.3f}, {high:+.3f}]" in line
            assert row.verdict.word in line
    assert "1 diverged" in " ".join(body[3])
    assert "1 failed" in " ".join(body[5])
    # A row of the table has as many cells as the head.
    for rows in read.rows.values():
        assert len({len(cells) for cells in rows if cells}) <= 3
    assert {len(cells) for cells in read.rows["verdict"]} == {len(read.rows["verdict"][0])}


def test_the_verdict_comes_first(page):
    order = [attrs["id"] for tag, attrs in Reader(page).tags if tag == "section"]
    shown = [
        "verdict", "quality", "cost", "curves", "lengths", "tuning", "routing", "inside", "rules", "runs", "configurations",
        "machines",
    ]  # fmt: skip
    assert order == shown


def test_every_link_has_its_section(page):
    tags = Reader(page).tags
    ids = {attrs.get("id") for _, attrs in tags}
    assert {attrs["href"][1:] for tag, attrs in tags if tag == "a"} <= ids


def test_the_page_is_self_contained(page):
    for tag, attrs in Reader(page).tags:
        assert tag not in ("iframe", "object", "embed", "base")
        assert not attrs.get("src"), attrs
        assert attrs.get("href", "#").startswith(("#", "data:"))
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.S))
    assert "url(" not in styles
    assert "@import" not in styles
    assert "default-src 'none'" in page
    # Plotly's button that uploads a chart is not there.
    assert "showSendToCloud: false" in page


def test_the_page_escapes(hostile):
    name, *study = hostile
    page = report.html(Comparison(*study))
    read = Reader(page)
    assert name in "".join(read.text)
    assert "<img src=x onerror=alert(1)>" in "".join(read.text)
    assert "img" not in {tag for tag, _ in read.tags}
    assert sum(tag == "script" for tag, _ in read.tags) == 3
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S).group(1)
    assert "<" not in data
    names = {trace.get("meta") for spec in strict_json(data) for trace in spec["data"]}
    assert html.escape(name, quote=False) in names  # Plotly's labels read HTML, so it is escaped once more for them.


def test_an_unfinished_study_has_a_page(synthetic):
    study, records = synthetic.build()
    for some in ([], records[:3], [r for r in records if r["phase"] == "tune"], [r for r in records if r["status"] != "ok"]):
        comparison = Comparison(study, some)
        assert words(comparison.headline()) in words(" ".join(Reader(report.html(comparison)).text))
        assert report.markdown(comparison)
        assert report.table_csv(comparison)


def test_one_seed_has_a_page_that_says_so(synthetic):
    comparison = Comparison(*synthetic.small({"base": [1.0], "a": [0.1]}))
    read = Reader(report.html(comparison))
    assert "unknown (one seed shows no spread)" in words(" ".join(read.text))
    assert "not told apart" in " ".join(read.rows["verdict"][2])


# The rules, as kept


def test_rules(comparison):
    rules = report.rules(comparison)
    assert len(rules) == 5
    assert "all runs read the data 8a932f423f29f3f6" in rules[0]
    assert "a budget of 2M tokens per final run" in rules[0]
    assert "4 tuning trials of 800k tokens at quasi-random learning rates in [0.002, 0.02]" in rules[1]
    assert "(checked)" in rules[1]
    assert "95% t interval, Holm-corrected over 5 variants" in rules[2]
    assert rules[3].startswith("Selected on validation, reported on test.")


def test_broken_rules_are_named(synthetic):
    study, records = synthetic.build()
    records[0]["data_hash"] = "other"
    records[1]["seed"] = 2  # A tuning trial on a seed of the final runs.
    rules = report.rules(Comparison(study, records))
    assert "NOT one data set: 8a932f423f29f3f6, other" in rules[0]
    assert "(NOT kept: 2)" in rules[1]
    assert report.rules(Comparison(*synthetic.small({"base": [1.0], "a": [1.0]})))[1].startswith("Nothing was tuned")


# What stands beside


def test_forest(synthetic):
    scores = {
        "base": [1.0, 1.1, 1.2, 1.1], "a": [0.9, 1.01, 1.09, 1.0], "b": [1.1, 1.2, 1.31, 1.2],
        "wild": [0.0, 9.0, 2.0, -3.0], "none": [None] * 4,
    }  # fmt: skip
    comparison = Comparison(*synthetic.small(scores))
    places = report.forest(comparison)
    assert list(places) == ["a", "b", "wild"]
    for name, place in places.items():
        assert -1 <= place["low"] <= place["mean"] <= place["high"] <= 1
        v = comparison.verdicts[name]
        assert math.copysign(1, place["mean"]) == math.copysign(1, v.difference)
    assert places["wild"]["cut_low"]
    assert places["wild"]["cut_high"]
    assert not any(places[n][end] for n in "ab" for end in ("cut_low", "cut_high"))
    # One scale for all.
    scale = {round(comparison.verdicts[n].difference / places[n]["mean"], 9) for n in places}
    assert len(scale) == 1


def test_changes_name_what_differs(comparison):
    assert report.changes(comparison, "gla") == [("variant.model.mixer", "attention", "gla")]
    assert report.changes(comparison, "moe") == [("variant.model.feedforward", "glu", "moe(experts=8, gate=topk(k=2))")]
    assert report.changes(comparison, "baseline") == []


def test_cost_table(comparison):
    head, body = report.cost_table(comparison)
    assert head[:2] == ["variant", "parameters"]
    moe = dict(zip(head, body[3], strict=True))
    assert (moe["training FLOPs per token"], moe["decoding state"]) == ("715k (0.55x)", "192 KiB (1.00x)")
    assert dict(zip(head, body[0], strict=True))["training FLOPs"] == "2.60T"
    assert all(len(row) == len(head) for row in body)


def test_environments_are_counted(synthetic):
    study, records = synthetic.build()
    for r in records[:5]:
        r["hardware"] = {**r["hardware"], "cpu": "Other CPU"}
    (first, about), (second, other) = report.environments(Comparison(study, records))
    assert (first, second) == (43, 5)
    assert (about["cpu"], other["cpu"], about["torch"]) == ("Example CPU", "Other CPU", "2.13.0")
