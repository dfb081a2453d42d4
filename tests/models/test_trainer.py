"""``transformers.Trainer`` trains gatework models: the loss falls, schedules move, resuming changes nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from gatework.models import AdvanceSchedules, GateworkConfig, GateworkForCausalLM, byte_tokenizer

pytestmark = pytest.mark.oldest

TEXT = "Full fathom five thy father lies; of his bones are coral made; those are pearls that were his eyes. " * 8

HYBRID = {"mixer": "gla, attention", "feedforward": "moe(experts=4, gate=topk(k=2, balance=[switch, z_loss, loss_free(0.01)]))"}
SKIPPING = {"mixer": "attention", "depth": "gateskip(budget=0.5, warmup=0.5)"}


def model(**settings) -> GateworkForCausalLM:
    torch.manual_seed(0)
    return GateworkForCausalLM(GateworkConfig(**({"d_model": 32, "layers": 2, "heads": 2, "d_ff": 32} | settings)))


def windows(length: int = 32) -> list[dict[str, torch.Tensor]]:
    tokens = byte_tokenizer()(TEXT, return_tensors="pt").input_ids[0]
    return [{"input_ids": tokens[i : i + length], "labels": tokens[i : i + length]} for i in range(0, len(tokens) - length, 7)]


def trainer(trained, folder, callbacks=(AdvanceSchedules,), **settings) -> Trainer:
    arguments = {
        "max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
        "seed": 3,
    }
    arguments = TrainingArguments(
        str(folder), **(arguments | settings), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False
    )
    return Trainer(trained, arguments, train_dataset=windows(), callbacks=[callback() for callback in callbacks])


def losses(done: Trainer) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


@pytest.mark.parametrize("settings", [HYBRID, SKIPPING], ids=["hybrid of moe", "gateskip"])
def test_the_loss_falls_and_the_schedules_move(settings, tmp_path):
    done = trainer(trained := model(**settings), tmp_path)
    done.train()
    curve = losses(done)
    assert len(curve) == 30
    assert curve[0] > 5  # About log(256), and a little of the parts' own losses.
    assert sum(curve[-5:]) / 5 < 2.8
    if settings is HYBRID:
        biases = [block.feedforward.gate.balance.loss_free.bias for block in trained.model.blocks]
        # Each step moved each bias by 0.01 up, down or not at all.
        for bias in biases:
            assert bias.abs().max() >= 0.01
            torch.testing.assert_close(bias / 0.01, (bias / 0.01).round(), rtol=0, atol=1e-4)
    else:
        assert trained.model.depth.progress == 1
        assert bool(trained.model.depth.thresholds().isfinite().all())


def test_the_kept_share_follows_the_trainers_steps(tmp_path):
    class Watch(AdvanceSchedules):
        seen = []

        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            self.seen.append(float(kwargs["model"].model.depth.progress))

    trainer(model(**SKIPPING), tmp_path, [Watch], max_steps=8).train()
    assert Watch.seen == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    without = model(**SKIPPING)
    trainer(without, tmp_path, (), max_steps=8).train()
    assert without.model.depth.progress == 0


@pytest.mark.parametrize("settings", [HYBRID, SKIPPING], ids=["hybrid of moe", "gateskip"])
def test_resuming_gives_the_same_losses_and_weights(settings, tmp_path):
    common = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    whole = trainer(first := model(**settings), tmp_path / "whole", **common)
    whole.train()
    assert len(losses(whole)) == 10
    resumed = trainer(second := model(**settings), tmp_path / "resumed", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert losses(resumed) == losses(whole)
    assert resumed.state.global_step == 10
    for (name, mine), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


def test_accumulated_batches_train_as_one(tmp_path):
    """Two micro-batches of 4 and one batch of 8 have the same gradients, so the same losses."""
    curves = []
    for size, steps in ((8, 1), (4, 2)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        done = trainer(model(mixer="gla, attention"), tmp_path, max_steps=4, **batch)
        done.train()
        curves.append(torch.tensor(losses(done)))
    torch.testing.assert_close(*curves, rtol=0, atol=2e-4)
