"""The registry: look-up, validation against signatures, building, registration."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import gatework
from gatework.core import Activation, FeedForward, Part, PartError, Spec, build, build_pattern, check, entries, lookup, register
from gatework.core import registry as module
from gatework.core.registry import export, parameters, slot_of, slots, suggest
from gatework.feedforward import GLU, MLP
from gatework.mixers import Attention, GatedLinearAttention


@pytest.fixture
def own_registry(monkeypatch):
    """A copy of the registry that registrations of the test go into."""
    entries()  # All of the library's parts are in.
    monkeypatch.setattr(module, "_entries", dict(module._entries))


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(PartError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


ENTRIES = entries()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_complete(entry):
    assert entry.name == entry.cls.part_name
    assert entry.slot in slots()
    assert 4 < len(entry.summary) < 90
    assert not entry.summary.endswith(".")
    assert lookup(entry.name) == lookup(entry.name, entry.slot) == entry
    package = entry.cls.__module__.rpartition(".")[0]
    assert getattr(__import__(package, fromlist=["_"]), entry.cls.__name__) is entry.cls
    assert inspect.isclass(entry.cls)
    assert not inspect.isabstract(entry.cls)
    # Alone it is a valid expression, and canonical.
    assert str(check(entry.name, entry.slot)) == entry.name
    for name, parameter in parameters(entry.cls).items():
        if (slot := slot_of(entry.cls, name)) and isinstance(parameter.default, str):
            assert lookup(check(parameter.default, slot).name, slot)


def test_entries_are_sorted_by_family_and_name_and_chosen_by_slot():
    assert [(e.family, e.name) for e in ENTRIES] == sorted((e.family, e.name) for e in ENTRIES)
    assert {e.name for e in entries("mixer")} >= {"attention", "gated_attention", "gla"}
    assert all(e.slot == "mixer" for e in entries("mixer"))
    assert lookup("moe").slot == "feedforward"
    assert lookup("moe").family == "experts"


def test_a_family_exports_its_parts_by_class_name():
    exported = export("gatework.feedforward")
    assert exported["GLU"] is GLU
    assert set(exported) == {e.cls.__name__ for e in ENTRIES if e.family == "feedforward"}


@pytest.mark.parametrize(
    ("expression", "slot", "message"),
    [
        ("versatil_ffn", "feedforward", "no feedforward 'versatil_ffn'; did you mean 'versatile_ffn'?"),
        ("golou", None, "no part 'golou'; did you mean 'golu'?"),
        ("zzz", "mixer", "no mixer 'zzz'; there are attention, "),
        ("gla", "feedforward", "'gla' is a mixer, not a feedforward; there are "),
        ("glu", "activation", "'glu' is a feedforward, not an activation; there are "),
        ("silu", "mixer", "'silu' is an activation, not a mixer; there are "),
        ("moe(expert=8)", None, "moe has no argument 'expert'; did you mean 'experts'?"),
        ("relu(x=8)", None, "relu has no argument 'x'; there are none"),
        ("moe(experts=2.5)", None, "moe: experts must be a whole number or a list of feedforward parts, got 2.5"),
        ("moe(experts=true)", None, "moe: experts must be a whole number or a list of feedforward parts, got True"),
        ("moe(experts=None)", None, "moe: experts must be a whole number or a list of feedforward parts, got None"),
        ("moe(experts='8')", None, "moe: experts must be a whole number or a list of feedforward parts, got '8'"),
        ("moe(experts=topk)", None, "moe: experts must be a whole number or a list of feedforward parts, got topk"),
        ("moe(experts=topk(k=2))", None, "moe: experts must be a whole number or a list of feedforward parts, got topk(k=2)"),
        ("moe(experts=[glu, topk])", None, "'topk' is a gate, not a feedforward; there are "),
        ("moe(capacity='x')", None, "moe: capacity must be a number or None, got 'x'"),
        ("moe(glu=1)", None, "moe: glu must be true or false, got 1"),
        ("moe(priority=best)", None, "moe: priority must be one of 'slot', 'weight', got 'best'"),
        ("glu(order=True)", None, "glu: order must be one of 1, 2, got True"),
        ("adamw(betas=(0.9, x))", None, "adamw: betas must be (a number, a number), got (0.9, x)"),
        ("adamw(betas=(0.9,))", None, "adamw: betas must be (a number, a number), got (0.9,)"),
        ("moe(gate=3)", None, "moe: gate is a gate part such as gate=activation_dts, not 3"),
        ("glu(activation=3)", None, "glu: activation is an activation part such as activation=gelu, not 3"),
        ("moe(gate=gla)", None, "'gla' is a mixer, not a gate; there are "),
        ("versatile_ffn(balance=switch)", None, "versatile_ffn: balance must be a number, got 'switch'"),
        ("moe(gate=topk(k=two))", None, "topk: k must be a whole number, got 'two'"),
        ("moe(gate=topk(kk=2))", None, "topk has no argument 'kk'; did you mean 'k'?"),
        ("relu(1)", None, "relu takes at most 0 arguments, got 1: relu(1)"),
        ("moe(8, d_ff=8)", None, "argument 'd_ff' of moe is given twice: moe(8, d_ff=8)"),
    ],
)
def test_what_does_not_fit_the_signature_is_refused(expression, slot, message):
    said = refusal(check, expression, slot)
    assert said.startswith(message) if message.endswith(" ") else said == message
    assert refusal(build, expression, slot, d_model=8) == said


@pytest.mark.parametrize(
    ("expression", "canonical"),
    [
        ("moe(gate=topk(k=1), experts=4)", "moe(experts=4, gate=topk(k=1))"),
        ("moe(32, 4, 'topk')", "moe(d_ff=32, experts=4, gate=topk)"),
        ("moe(capacity=2, experts=4)", "moe(experts=4, capacity=2.0)"),
        ("moe(experts=[mlp, glu(d_ff=8)])", "moe(experts=[mlp, glu(d_ff=8)])"),
        ("moe(priority=weight)", "moe(priority='weight')"),
        ("glu(activation='xsilu', order=1)", "glu(activation=xsilu, order=1)"),
        ("adamw(betas=[0.9, 0.99])", "adamw(betas=[0.9, 0.99])"),
    ],
)
def test_the_canonical_form_is_a_fixed_point(expression, canonical):
    spec = check(expression)
    assert str(spec) == canonical
    assert str(check(canonical)) == canonical
    assert check(spec) == spec


@pytest.mark.parametrize("value", [3, 2.5, None, True, ["gla"], {"name": "gla"}, b"gla"])
def test_what_is_no_expression_at_all_is_refused(value):
    assert refusal(build, value, "mixer", d_model=8).endswith("is not a mixer; write name or name(argument=value, ...)")


@pytest.mark.parametrize(
    ("expression", "slot", "context", "message"),
    [
        ("attention", "mixer", {}, "attention needs d_model; write attention(d_model=...)"),
        ("topk", "gate", {}, "topk needs d_model, n_experts; write topk(d_model=..., n_experts=...)"),
        ("attention", "mixer", {"d_model": 130, "heads": 4}, "attention: d_model 130 is not divisible by heads 4"),
        ("versatile_ffn(d_ff=130)", "feedforward", {"d_model": 16}, "versatile_ffn: d_ff 130 is not divisible by experts 8"),
        ("moe(gate=topk(k=9))", "feedforward", {"d_model": 16}, "topk: k must be between 1 and the number of experts 8, got 9"),
        ("glu(d_ff=-3)", "feedforward", {"d_model": 16}, "glu: d_ff must be at least 1, got -3"),
        ("gla(expand_k=-1)", "mixer", {"d_model": 16}, "gla: expand_k -1.0 and expand_v 1.0 leave the keys or the values no width"),
        ("gla(expand_k=1e308)", "mixer", {"d_model": 16}, "gla cannot be built with these sizes: "),
        ("mlp(d_ff=10000000000000)", "feedforward", {"d_model": 9}, "mlp cannot be built with these sizes: there is not "),
        ("mlp(d_ff=9000000000000000000)", "feedforward", {"d_model": 16}, "mlp cannot be built with these sizes: "),
        ("moe(gate=None)", "feedforward", {"d_model": 16}, "None is not a gate; write name or name(argument=value, ...)"),
        ("glu(d_model=3)", "feedforward", {"d_model": 16}, "glu: d_model is 16 in the model around it, the expression says 3"),
        ("topk(n_experts=3)", "gate", {"d_model": 16, "n_experts": 4}, "topk: n_experts is 4 in the model around it, "),
    ],
)
def test_sizes_that_do_not_fit_are_refused_when_built(expression, slot, context, message):
    said = refusal(build, expression, slot, **context)
    assert said.startswith(message) if message.endswith(" ") else said == message


def test_context_is_offered_and_the_expression_wins():
    mixer = build("attention(heads=2)", "mixer", d_model=16, heads=4, d_ff=99, n_layers=3)
    assert (mixer.d_model, mixer.heads) == (16, 2)
    assert build("attention", "mixer", d_model=16, heads=8).heads == 8
    assert build("glu(d_model=16)", "feedforward", d_model=16).up.weight.shape[1] == 16  # Repeating a tied size is fine.
    assert build("glu", "feedforward", d_model=16, d_ff=24).up.weight.shape == (24, 16)
    moe = build("moe(experts=3, gate=topk(k=1))", "feedforward", d_model=16)
    assert (moe.gate.d_model, moe.gate.n_experts, moe.gate.k) == (16, 3, 1)


def test_builds_from_a_text_a_spec_and_a_class_and_passes_an_instance_through():
    for part in ("attention(heads=2)", Spec("attention", {"heads": 2})):
        built = build(part, "mixer", d_model=16)
        assert type(built) is Attention
        assert built.heads == 2
    built = build(GatedLinearAttention, "mixer", d_model=16, heads=2, n_layers=7)
    assert type(built) is GatedLinearAttention
    assert built.heads == 2
    assert build(built, "mixer", d_model=99) is built
    own = nn.Softplus()
    assert build(own, "activation") is own
    assert type(build(nn.Softplus, "activation", d_model=3)) is nn.Softplus
    assert type(MLP(8, activation=nn.Softplus).activation) is nn.Softplus
    assert refusal(build, Attention, "mixer") == "Attention needs d_model; write Attention(d_model=...)"


def test_a_class_or_an_instance_for_another_slot_is_refused():
    assert refusal(build, GLU, "mixer", d_model=8) == "GLU is a feedforward, not a mixer"
    assert refusal(build, GLU(8), "activation") == "GLU is a feedforward, not an activation"


def test_the_same_seed_builds_the_same_part():
    torch.manual_seed(3)
    first = build("moe(experts=2)", "feedforward", d_model=8).state_dict()
    torch.manual_seed(3)
    again = build("moe(experts=2)", "feedforward", d_model=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_patterns_repeat_along_the_layers():
    parts = build_pattern("gla, attention(heads=2)", "mixer", 5, d_model=16)
    assert [type(part) for part in parts] == [GatedLinearAttention, Attention] * 2 + [GatedLinearAttention]
    assert len({id(part) for part in parts}) == 5
    assert [type(part) for part in build_pattern(["gla", Attention, Spec("gla")], "mixer", 3, d_model=16)] == [
        GatedLinearAttention, Attention, GatedLinearAttention,
    ]
    assert len(build_pattern(Attention, "mixer", 2, d_model=16)) == 2
    assert refusal(build_pattern, "gla, gla, gla", "mixer", 2, d_model=16) == "a mixer pattern of 3 does not fit 2 layers"
    assert refusal(build_pattern, [], "mixer", 2, d_model=16) == "a mixer pattern of 0 does not fit 2 layers"
    shared = Attention(16)
    expected = "give the mixer as an expression or a class: an instance would be shared by all layers"
    assert refusal(build_pattern, [shared], "mixer", 2, d_model=16) == expected


def test_a_registered_class_is_found_checked_and_built_at_once(own_registry):
    @gatework.register("cubic")
    class Cubic(Activation):
        """The cube of every element."""

        def __init__(self, scale: float = 1.0, degree: int | None = None) -> None:
            super().__init__()
            self.scale, self.degree = scale, degree

        def forward(self, x):
            return self.scale * x**3

    entry = lookup("cubic", "activation")
    assert (entry.cls, entry.paper, entry.slot, entry.family) == (Cubic, None, "activation", "activation")
    assert entry.summary == "The cube of every element"
    part = gatework.build("mlp(activation=cubic(scale=2))", "feedforward", d_model=4)
    assert torch.equal(part.activation(torch.tensor([3.0])), torch.tensor([54.0]))
    assert refusal(check, "cubic(scale=x)") == "cubic: scale must be a number, got 'x'"
    assert refusal(check, "cubic(degree=0.5)") == "cubic: degree must be a whole number or None, got 0.5"
    register("cubic")(Cubic)  # The same class again, as when its module is loaded anew.


def test_registration_refuses_taken_names_and_what_is_no_part(own_registry):
    class Mine(FeedForward):
        """Mine."""

        def forward(self, x, mask=None):
            return x

    assert refusal(register("glu"), Mine) == "the name 'glu' is taken by gatework.feedforward.glu.GLU"
    for name in ("Glu", "my part", "3d", ""):
        assert refusal(register(name), Mine) == f"a part's name is a lower-case identifier, not {name!r}"
    assert refusal(register("mine"), nn.Linear) == "Linear derives from no contract; see gatework.core.contracts"
    assert refusal(register("mine"), Part) == "Part derives from no contract; see gatework.core.contracts"
    Mine.capabilities = {"flies": True}
    assert refusal(register("mine"), Mine).startswith("Mine declares unknown capabilities ['flies']; there are ")
    assert "mine" not in {entry.name for entry in entries()}


def test_suggestions():
    assert suggest("glaa", ["gla", "attention"]) == "did you mean 'gla'?"
    assert suggest("zzz", ["gla", "attention"]) == "there are attention, gla"
