from __future__ import annotations

import json

import pytest

from gatework.bench.settings import read_toml
from gatework.bench.study import define, restore
from gatework.core.errors import GateworkError

TASK = {"name": "text", "length": 16, "eval_tokens": 256}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_bytes(bytes(range(256)) * 12)
    return path


def small(path, **settings):
    return define({"task": TASK, "data": str(path), "variants": {"wide": "feedforward=mlp"}} | settings)


def test_the_default_study():
    study = define({})
    assert list(study.variants) == ["gated_attention", "versatile_ffn", "moe", "gla", "gateskip"]
    assert (study.match, study.seeds, study.tune) == ("params", 3, 3)
    assert study.task == {"name": "text"}
    assert study.resolved["baseline"].model["mixer"] == "attention"
    assert study.resolved["baseline"].model["feedforward"] == "glu"
    assert {v.optim for v in study.resolved.values()} == {"adamw"}


def test_a_variant_changes_the_baseline_and_nothing_else(data):
    study = small(
        data,
        baseline="mixer=attention(window=8), feedforward=glu",
        variants={
            "a": "feedforward=mlp(activation=relu)",
            "b": "mixer=attention, optim=adamw(weight_decay=0.0), learning_rates=1e-4, 1e-3",
        },
        model={"d_model": 32, "layers": 2},
    )
    base, a, b = (study.resolved[name] for name in ("baseline", "a", "b"))
    assert base.model == {"d_model": 32, "layers": 2, "heads": 4, "mixer": "attention(window=8)", "feedforward": "glu"}
    assert a.model == base.model | {"feedforward": "mlp(activation=relu)"}
    assert b.model == base.model | {"mixer": "attention"}
    assert (a.optim, b.optim) == ("adamw", "adamw(weight_decay=0.0)")
    assert (a.learning_rates, b.learning_rates) == (base.learning_rates, (1e-4, 1e-3))


def test_a_multiplier_has_a_range_of_its_own():
    variants = {"d": "optim=dadapt_adam", "one": "optim=dadapt_adam, learning_rates=1, 1", "wide": "layers=4"}
    study = define({"task": "digits", "learning_rates": [1e-3, 1e-2], "variants": variants})
    rates = {name: variant.learning_rates for name, variant in study.resolved.items()}
    assert rates == {"baseline": (1e-3, 1e-2), "d": (0.5, 2.0), "one": (1.0, 1.0), "wide": (1e-3, 1e-2)}
    # A range that the baseline gives goes to the variants whose optimizer has rates of the same kind.
    baseline = "optim=dadapt_adam, learning_rates=0.9, 1.1"
    study = define({"task": "digits", "baseline": baseline, "variants": {"a": "optim=adamw", "wide": "layers=4"}})
    rates = {name: variant.learning_rates for name, variant in study.resolved.items()}
    assert rates == {"baseline": (0.9, 1.1), "a": (5e-4, 2e-2), "wide": (0.9, 1.1)}
    study = define({"task": "digits", "baseline": "learning_rates=1e-3, 2e-3", "variants": {"d": "optim=dadapt_adam"}})
    assert study.resolved["d"].learning_rates == (0.5, 2.0)


def test_patterns_and_numbers(data):
    study = small(data, variants={"a": "mixer=attention(window=8), attention, layers=4, tie_embeddings=false, d_ff=64"})
    model = study.resolved["a"].model
    assert model["mixer"] == "attention(window=8), attention"
    assert (model["layers"], model["tie_embeddings"], model["d_ff"]) == (4, False, 64)


def test_restored_equal(data):
    study = small(
        data, variants=["a=mixer=attention(window=8)", "b = feedforward=mlp"], learning_rates=[1e-3, 1e-2], tokens=2e6, seeds=5
    )
    copy = restore(json.loads(json.dumps(study.describe())))
    assert copy == study
    assert copy.resolved == study.resolved
    assert copy.hash == study.hash


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 10_000},
        {"tune_tokens": 10_000},
        {"seeds": 7},
        {"tune": 7},
        {"match": "none"},
        {"learning_rates": [1e-4, 1e-3]},
        {"batch_size": 3},
        {"model": {"d_model": 48}},
        {"evaluations": 2},
        {"baseline": "mixer=attention(window=4)"},
        {"variants": {"wide": "feedforward=mlp(activation=relu)"}},
        {"variants": {"broad": "feedforward=mlp"}},
        {"task": TASK | {"length": 8}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_decides_a_result_is_hashed(data, change):
    assert small(data, **change).hash != small(data).hash


def test_what_decides_nothing_is_not_hashed(data, tmp_path):
    moved = tmp_path / "elsewhere.txt"
    moved.write_bytes(data.read_bytes())
    assert small(moved).hash == small(data).hash
    assert small(data, name="other").hash == small(data).hash
    assert small(data, variants=["wide=feedforward = mlp( )"]).hash == small(data).hash
    moved.write_bytes(data.read_bytes()[::-1])
    assert small(moved).hash != small(data).hash


def test_toml(tmp_path, data):
    (tmp_path / "book.txt").write_bytes(data.read_bytes())
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        data = "book.txt"
        tokens = 2e5
        seeds = 5
        learning_rates = [1e-3, 1e-2]
        baseline = "mixer=attention"
        [task]
        name = "text"
        length = 16
        eval_tokens = 256
        [model]
        d_model = 32
        [variants]
        wide = "feedforward=mlp"
        [variants.lin]
        mixer = "attention(window=4), attention"
        layers = 2
        learning_rates = [1e-4, 1e-3]
        """
    )
    study = define(read_toml(path))
    assert (study.name, study.tokens, study.seeds) == ("mine", 200_000, 5)
    assert study.task["data"] == str(tmp_path / "book.txt")
    assert study.resolved["lin"].model["mixer"] == "attention(window=4), attention"
    assert study.resolved["lin"].learning_rates == (1e-4, 1e-3)
    assert study.resolved["wide"].model["feedforward"] == "mlp"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens = 1\nseeds = = 2\n", r"not valid TOML: .*line 2"),
        ("tokens = 1\n\nsedes = 3\n", r"line 3: unknown key 'sedes'; did you mean 'seeds'"),
        ("tokens = 1\n[varients]\na = 'mixer=gla'\n", r"line 2: unknown key 'varients'; did you mean 'variants'"),
        ("[wide.things]\na = 1\n", r"line 1: unknown key 'wide'"),
    ],
)
def test_toml_with_mistakes(tmp_path, text, message):
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(GateworkError, match=message):
        read_toml(path)


def test_toml_that_is_not_there(tmp_path):
    with pytest.raises(GateworkError, match="no study file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(GateworkError, match="cannot be read"):
        read_toml(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GateworkError, match="cannot be read"):
        read_toml(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": {"a": "feedforward=verstile"}}, "no feedforward 'verstile'; "),
        ({"variants": {"a": "feedforward=mlp(activaton=relu)"}}, "mlp has no argument 'activaton'; did you mean 'activation'"),
        ({"variants": {"a": "mixr=attention"}}, "variant 'a' has no setting 'mixr'; did you mean 'mixer'"),
        ({"variants": {"a": "mixer=glu"}}, "'glu' is a feedforward, not a mixer"),
        ({"variants": {"a": "layers=x"}}, "layers must be a whole number, not 'x'"),
        ({"variants": {"a": "layers=2.5"}}, "layers must be a whole number"),
        ({"variants": {"a": "tie_embeddings=3"}}, "tie_embeddings must be true or false"),
        ({"variants": {"a": "learning_rates=3"}}, "learning_rates of a is a range"),
        ({"variants": {"a": "optim=adamm"}}, "no optim 'adamm'; did you mean 'adamw'"),
        ({"variants": {"a": "vocab_size=3"}}, "no setting 'vocab_size'"),
        ({"variants": {"a": "mixer=attention, mixer=attention"}}, "'mixer' is given twice"),
        ({"variants": {"a": "mixer=__import__('os')"}}, "no mixer '__import__'"),
        ({"variants": {"baseline": "mixer=attention"}}, "cannot be called 'baseline'"),
        ({"variants": {"a/b": "mixer=attention"}}, "the variant name 'a/b' may hold"),
        ({"variants": ["a"]}, "a variant is written NAME="),
        ({"variants": ["a=mixer=attention", "a=mixer=attention"]}, "'a' is given twice"),
        ({"variants": 3}, "variants is a table"),
        ({"baseline": "mixer"}, "not a list of settings"),
        ({"model": {"d_modell": 3}}, "the model has no setting 'd_modell'; did you mean 'd_model'"),
        ({"tokens": 0}, "tokens must be a whole number of at least 1, not 0"),
        ({"tokens": 1.5}, "tokens must be a whole number"),
        ({"tokens": float("nan")}, "tokens must be a whole number"),
        ({"tokens": "many"}, "tokens must be a whole number"),
        ({"seeds": True}, "seeds must be a whole number"),
        ({"seeds": 0}, "seeds must be"),
        ({"tune": -1}, "tune must be a whole number of at least 0"),
        ({"match": "bytes"}, "match must be one of params, flops, seconds, none, not 'bytes'"),
        ({"learning_rates": [1e-2, 1e-3]}, "learning_rates is a range of two positive numbers"),
        ({"learning_rates": [0, 1]}, "learning_rates is a range"),
        ({"name": "a/../b"}, "the study name"),
        ({"task": "txet", "data": None}, "no task 'txet'; did you mean 'text'"),
        ({"task": "digits"}, "data goes with the task 'text'"),
        ({"task": {"length": 3}}, "the task has no name"),
        ({"task": {"name": "text", "lenght": 3}}, "no option 'lenght'; did you mean 'length'"),
        ({"imports": ["no_such_module_anywhere"]}, "'no_such_module_anywhere' of imports cannot be imported"),
        ({"imports": "os"}, "imports is a list"),
    ],
)
def test_mistakes_are_told_in_one_sentence(data, settings, message):
    with pytest.raises(GateworkError, match=message) as caught:
        small(data, **settings)
    assert "\n" not in str(caught.value)


def test_a_classifier_takes_no_mixer_pattern_it_has_no_place_for():
    study = define({"task": "digits", "variants": {"a": "activation=golu", "v": "backbone=vit"}})
    assert study.resolved["a"].model["activation"] == "golu"
    assert study.resolved["v"].model["backbone"] == "vit"
    with pytest.raises(GateworkError, match="backbone must be one of mlp, convnet, vit, not 'vitt'"):
        define({"task": "digits", "variants": {"a": "backbone=vitt"}})


def test_modules_of_ones_own(data, tmp_path, monkeypatch):
    (tmp_path / "my_gatework_parts.py").write_text(
        "from gatework.core import register\n"
        "from gatework.feedforward.mlp import MLP\n"
        "@register('my_mlp')\n"
        "class MyMLP(MLP):\n"
        "    '''Mine.'''\n"
    )
    monkeypatch.chdir(tmp_path)
    study = small(data, imports=["my_gatework_parts"], variants={"mine": "feedforward=my_mlp"})
    assert study.resolved["mine"].model["feedforward"] == "my_mlp"
    from gatework.core import registry

    registry._entries.pop("my_mlp")
