"""The distillation recipe: its objective, what it trains, its errors."""

from __future__ import annotations

import copy

import pytest
import torch

from gatework import core, surgery
from gatework.core.errors import GateworkError

pytestmark = pytest.mark.oldest


def objective(student, teacher, ids, kl):
    """Per position, from the definitions."""
    p, q = (model(ids).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    total = 0.0
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            total += (1 - kl) * -q[row, t, ids[row, t + 1]].item()
            total += kl * (p[row, t].exp() * (p[row, t] - q[row, t])).sum().item()
    return total / (ids.shape[0] * (ids.shape[1] - 1))


@pytest.mark.parametrize("kl", [0.0, 0.3, 1.0])
def test_the_objective_is_cross_entropy_and_divergence_and_the_parts_losses(kl, tiny, tokens):
    teacher, student = tiny("llama"), tiny("llama", rms_norm_eps=0.5)
    conversion = surgery.gateskip(student, lam_s=0.25, lam_e=0.0)
    ids = tokens()
    # All gates are sigmoid(5) at the start.
    expected = objective(student, teacher, ids, kl) + 0.25 * torch.tensor(5.0).sigmoid().item() ** 2
    found = surgery.distill(student, teacher, [ids], steps=1, kl=kl)
    assert found == [pytest.approx(expected, rel=1e-6)]
    assert conversion.part.progress == 1  # The schedules have moved.
    assert not student.training
    assert not core.losses(student)


def test_it_brings_a_ternary_student_towards_its_teacher(tiny, tokens):
    teacher = tiny("llama", dtype=torch.float32)
    student = copy.deepcopy(teacher)
    surgery.ternary(student)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    batches = [tokens(4, 16, seed=seed) for seed in range(3)]
    seen = []
    found = surgery.distill(student, teacher, iter(batches), steps=60, lr=3e-3, kl=1.0, report=lambda step, _: seen.append(step))
    assert seen == list(range(1, 61))  # Batches are taken again.
    assert sum(found[-5:]) < 0.5 * sum(found[:5])
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert all(p.grad is None for p in student.parameters())


def test_new_trains_what_the_conversion_added_and_nothing_else(tiny, tokens):
    student = tiny("llama", dtype=torch.float32)
    surgery.gateskip(student)
    student.train()
    before = {name: p.clone() for name, p in student.named_parameters()}
    surgery.distill(student, None, [tokens()], steps=2, parameters="new")
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".policy.gates." in name for name in moved)
    assert all(p.requires_grad for p in student.parameters())
    assert student.training


def test_wrong_settings_are_met_with_one_sentence(tiny, tokens):
    model = tiny("llama")
    for settings in ({"steps": 0}, {"steps": 1, "kl": 1.5}, {"steps": 1, "lr": 0.0}, {"steps": 1, "warmup": -0.1}):
        with pytest.raises(GateworkError, match="distill needs"):
            surgery.distill(model, None, [tokens()], **settings)
    with pytest.raises(GateworkError, match="got no batches"):
        surgery.distill(model, None, [], steps=1)
    with pytest.raises(GateworkError, match=r"token ids \(B, T\) with T >= 2, not of the shape \(2, 1\)"):
        surgery.distill(model, None, [tokens()[:, :1]], steps=1)
    with pytest.raises(GateworkError, match="no conversion of this model has added parameters"):
        surgery.distill(model, None, [tokens()], steps=1, parameters="new")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(GateworkError, match="loss of step 1 is not finite"):
        surgery.distill(model, None, [tokens()], steps=1)
