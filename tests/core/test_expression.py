"""Part expressions: what parses prints back the same; whatever does not is refused in one sentence; nothing is evaluated."""

from __future__ import annotations

import builtins
import keyword
import os
import warnings

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gatework.core import GateworkError, PartError, Spec, check, parse, parse_pattern, parse_settings
from gatework.core.expression import MAX_DEPTH, MAX_LENGTH, parse_value

# Slowness of a shared machine is not what these tests are about.
thorough = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def refusal(read, text) -> str:
    """The one sentence with which ``read`` refuses ``text``."""
    with pytest.raises(GateworkError) as caught:
        read(text)
    message = str(caught.value)
    assert message == message.strip() != ""
    assert "\n" not in message
    return message


def read_or_refuse(read, text):
    """What ``read`` makes of ``text``, or None if it refuses it in one line; any other exception or warning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return read(text)
        except GateworkError as error:
            message = str(error)
    assert message.strip()
    assert "\n" not in message
    return None


def exact(value):
    """A value in a form in which 1, 1.0, True and '1' differ."""
    if isinstance(value, Spec):
        return "spec", value.name, [(name, exact(item)) for name, item in value.args.items()], exact(value.positional)
    if isinstance(value, list | tuple):
        return type(value).__name__, [exact(item) for item in value]
    return type(value).__name__, repr(value)


@pytest.mark.parametrize(
    ("text", "name", "args", "positional", "printed"),
    [
        ("gla", "gla", {}, (), "gla"),
        ("gla()", "gla", {}, (), "gla"),
        ("  moe ( experts = 8 )\n", "moe", {"experts": 8}, (), "moe(experts=8)"),
        ("moe(8)", "moe", {}, (8,), "moe(8)"),
        ("moe(experts=8, gate=topk(k=2))", "moe", {"experts": 8, "gate": Spec("topk", {"k": 2})}, (), None),
        ("f(a=g(b=h(c=1)), d=h)", "f", {"a": Spec("g", {"b": Spec("h", {"c": 1})}), "d": Spec("h")}, (), None),
        ("f(a=-1, b=+2, c=- -3, d=-0.5)", "f", {"a": -1, "b": 2, "c": 3, "d": -0.5}, (), "f(a=-1, b=2, c=3, d=-0.5)"),
        ("f(a=1e-3, b=2e30, c=0x10)", "f", {"a": 1e-3, "b": 2e30, "c": 16}, (), "f(a=0.001, b=2e+30, c=16)"),
        ("f(a=true, b=False, c=None)", "f", {"a": True, "b": False, "c": None}, (), "f(a=True, b=False, c=None)"),
        ("f(a='x', b=\"it's\")", "f", {"a": "x", "b": "it's"}, (), "f(a='x', b=\"it's\")"),
        ("f(a=(0.9, 1), b=(1,), c=(), d=[1, g])", "f", {"a": (0.9, 1), "b": (1,), "c": (), "d": [1, Spec("g")]}, (), None),
    ],
)
def test_reads_and_prints_canonically(text, name, args, positional, printed):
    spec = parse(text)
    assert exact(spec) == exact(Spec(name, args, positional))
    assert str(spec) == (text if printed is None else printed)
    assert exact(parse(str(spec))) == exact(spec)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-3", 1e-3), ("true", True), ("'a'", "a"), ("None", None), ("(1, 2)", (1, 2)), ("gla", Spec("gla"))],
)
def test_values(text, value):
    assert exact(parse_value(text)) == exact(value)


def test_patterns_split_at_the_outer_commas_only():
    assert parse_pattern("gla") == [Spec("gla")]
    assert list(map(str, parse_pattern(" gla,gla , moe(experts=4, d_ff=8)"))) == ["gla", "gla", "moe(experts=4, d_ff=8)"]
    assert list(map(str, parse_pattern("f(a=(1, 2), b=[3, 4]), g(a='x, (', b=\"\\\"y, \"), h"))) == [
        "f(a=(1, 2), b=[3, 4])", "g(a='x, (', b='\"y, ')", "h",
    ]
    for text in ("", ",", "gla,", "gla,,gla"):
        assert refusal(parse_pattern, text) == f"an empty place between commas in {text!r}"


def test_settings_are_texts_by_name_and_a_pattern_goes_on_without_a_name():
    text = "mixer=gla,gla, attention, feedforward=moe(experts=8, gate=topk(k=1)), d_ff = 64"
    assert parse_settings(text) == {"mixer": "gla, gla, attention", "feedforward": "moe(experts=8, gate=topk(k=1))", "d_ff": "64"}
    assert refusal(parse_settings, "mixer=gla, mixer=gla") == "'mixer' is given twice in 'mixer=gla, mixer=gla'"
    assert refusal(parse_settings, "mixer=") == "'mixer' has no value in 'mixer='; write mixer=VALUE"
    assert refusal(parse_settings, "gla") == "'gla' is not a list of settings; write name=value, as in mixer=gla"


def test_equal_specs_have_equal_hashes():
    one, other = parse("f(a=1, b=g)"), parse("f(b=g, a=1)")
    assert one == other
    assert hash(one) == hash(other)
    assert hash(Spec("f", {"a": 1})) == hash(Spec("f", {"a": 1.0}))
    assert {one: "found"}[other] == "found"
    hash(Spec("f", {"a": [1, 2]}))


@pytest.mark.parametrize(
    "text",
    [
        "a.b", "a()()", "a[1]", "a<b", "a+b", "3", "'x'", "None", "true", "false()", "lambda: 1", "await x", "(yield)", "(a := b)",
        "f'{a}'",
        "[a for a in b]", "{a}", "a if b else c", "a and b", "__import__('os').system('x')", "().__class__",
    ],
)
def test_what_is_no_part_is_named(text):
    assert refusal(parse, text).endswith("is not a part; write name or name(argument=value, ...)")


@pytest.mark.parametrize(
    "value",
    [
        "a.b", "a()()", "lambda: 1", "(c := 1)", "f'{a}'", "[x for x in y]", "{1}", "{1: 2}", "1j", "b'x'", "...", "-True", "-g",
        "~1", "not 1",
        "1 + 1", "1 if 2 else 3", "1is 1", "a[0]", "*a", "__import__('os').system('x')",
    ],
)
def test_what_is_no_value_is_named(value):
    message = refusal(parse, f"f(a={value})" if value != "*a" else "f(*a)")
    assert message.endswith(("; nothing is evaluated", "is not a part; write name or name(argument=value, ...)"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a part expression: invalid syntax; write name(argument=value, ...)"),
        ("f(a=1", "'f(a=1' is not a part expression: '(' was never closed at character 2; write name(argument=value, ...)"),
        ("a b", "'a b' is not a part expression: invalid syntax at character 3; write name(argument=value, ...)"),
        ("f(**a)", "'**' in 'f(**a)' is not understood; write each argument as name=value"),
        ("f(a=1, a=2)", "argument 'a' is given twice in 'f(a=1, a=2)'"),
        ("f(a=1e999)", "the number '1e999' in 'f(a=1e999)' is too large"),
        ("f(a=-1e999)", "the number '1e999' in 'f(a=-1e999)' is too large"),
        (f"f(a={2**63})", f"the number '{2**63}' in 'f(a={2**63})' is too large"),
        ("(" * 5000, f"a part expression has at most {MAX_LENGTH} characters, this one has 5000"),
        ("a(b=" * 500, f"a part expression nests at most {MAX_DEPTH} deep, this one 500"),
    ],
)
def test_refusals_say_what_and_where(text, message):
    assert refusal(parse, text) == message


@pytest.mark.parametrize(
    "text",
    [
        "a(b=" * 20 + "1" + ")" * 19, "a(b=" * 21 + "1" + ")" * 21, "-" * 3900 + "1", f"a(b={'-' * 3900}1)", "a" + ".b" * 1900,
        "1" + "+1" * 1900,
        f"a(b={'not ' * 900}1)", "a if b else " * 300 + "c", "a(b=0x" + "f" * 3900 + ")", "a(b=" + "9" * 3990 + ")", "\x00",
        "a(b='\x00')",
        "a(b='\ud800')", "\ufeffa", "a\\", 'a(b="\\N{no such name}")', "a(b='" + "\x01" * 1500 + "')", "lambda:" * 500, "`", "$",
        "[{(" * 6,
    ],
)
def test_no_hostile_text_gets_through_or_crashes(text):
    for read in (parse, parse_value, parse_pattern):
        assert len(refusal(read, text)) < 700


def test_the_deepest_and_the_longest_expression_are_read():
    deep = "a(b=" * MAX_DEPTH + "1" + ")" * MAX_DEPTH
    assert str(parse(deep)) == deep
    long = "a(b='" + "x" * (MAX_LENGTH - 7) + "')"
    assert str(parse(long)) == long
    assert "at most 4000 characters" in refusal(parse, long + " ")
    assert str(parse("a(b='" + "(" * 100 + "')")) == "a(b='" + "(" * 100 + "')"  # Brackets inside quotes nest nothing.


def test_nothing_is_evaluated(monkeypatch):
    called = []
    monkeypatch.setattr(os, "system", lambda command: called.append(command))
    monkeypatch.setattr(builtins, "sentinel", lambda *args: called.append(args), raising=False)
    for text in (
        "__import__('os').system('x')", "sentinel()", "sentinel(1)", "f(a=sentinel())", "f(a=sentinel(1))", "f(a=f'{sentinel()}')",
        "f(a=[sentinel() for _ in (1,)])", "f(a=(lambda: sentinel())())", "f(a=(b := sentinel()))", "f(*sentinel())",
        "f(a=eval('sentinel()'))",
    ):
        for read in (parse, parse_value, parse_pattern, check):
            read_or_refuse(read, text)
    assert called == []


# What follows is about any text at all.

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda name: name not in {*keyword.kwlist, "true", "false"})
literals = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.text(alphabet="'\"\\,()[]{}#= \n\t", max_size=8)
)


def _specs(values):
    return st.builds(
        Spec, names, st.dictionaries(names, values, max_size=3), st.lists(values, max_size=2).map(tuple)
    )


values = st.recursive(
    literals, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | _specs(inner), max_leaves=8
)
specs = _specs(values)


@thorough
@given(specs)
def test_what_is_printed_reads_back_the_same(spec):
    again = parse(str(spec))
    assert exact(again) == exact(spec)
    assert again == spec
    assert hash(again) == hash(spec)
    assert str(again) == str(spec)


@thorough
@given(st.lists(specs, min_size=1, max_size=4))
def test_patterns_read_back_the_same(pattern):
    assert [exact(spec) for spec in parse_pattern(", ".join(map(str, pattern)))] == [exact(spec) for spec in pattern]


def assert_harmless(text):
    for read in (parse, parse_value):
        value = read_or_refuse(read, text)
        if isinstance(value, Spec):
            assert exact(parse(str(value))) == exact(value)
    read_or_refuse(parse_pattern, text)
    read_or_refuse(parse_settings, text)
    read_or_refuse(check, text)


@thorough
@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=60))  # Lone surrogates and null bytes too.
@example("\x00")
@example("\ud800")
def test_any_text_parses_or_is_refused(text):
    assert_harmless(text)


PIECES = [
    "moe", "topk", "gla", "f", "experts", "k", "=", "=", "(", "(", ")", ")", ",", ",", " ", "[", "]", "{", "}", "8", "-", "0.5",
    "1e999", "1e-3", "1j",
    "'", '"', "'''", "\\", "\n", "\r", "\x0c", "\x00", "#", "True", "true()", "None", "*", "**", ":=", "lambda", "lambda x:", ".",
    "...", "f'{", "}'", "b'",
    "for x in", "if", "else", "await", "yield", "not", "is", "@", "->", ";", "0x", "01", "_", "é", "ﬁ", "\u2028", "\ud800",
    "__import__('os')",
]


@thorough
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_nearly_valid_text_parses_or_is_refused(text):
    assert_harmless(text)


@thorough
@given(specs.map(str), st.data())
def test_a_damaged_expression_parses_or_is_refused(text, data):
    place = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 3))
    assert_harmless(text[:place] + data.draw(st.sampled_from(["", *PIECES])) + text[place + length :])


def test_refusals_of_the_registry_are_part_errors():
    with pytest.raises(PartError, match="no part 'golou'; did you mean 'golu'"):
        check("golou")
    with pytest.raises(PartError, match="moe has no argument 'expert'; did you mean 'experts'"):
        check("moe(expert=8)")
    with pytest.raises(PartError, match="topk has no argument 'q'; there are"):
        check("moe(gate=topk(q=2))")
