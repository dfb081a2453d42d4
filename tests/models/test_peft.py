"""``peft`` on gatework models: LoRA on linear layers and on the stacked weights of experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from gatework.core import PartError
from gatework.models import AdvanceSchedules, GateworkConfig, GateworkForCausalLM

pytestmark = [
    pytest.mark.oldest,
    # peft asks for the old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

RANK, ALPHA = 2, 6
STACKED = ["feedforward.w_in", "feedforward.w_out"]
MODELS = {
    "attention and gla": {"mixer": "attention(kv_heads=1), gla"},
    "experts that share": {"feedforward": "moe(experts=3, shared=1)", "mixer": "gated_attention, attention"},
    "gateskip": {"feedforward": "moe(experts=3)", "depth": "gateskip(budget=0.5, warmup=0)"},
}


def base(**settings) -> GateworkForCausalLM:
    torch.manual_seed(0)
    return GateworkForCausalLM(GateworkConfig(**({"vocab_size": 23, "d_model": 16, "layers": 2, "heads": 2} | settings))).double()


def adapted(model: GateworkForCausalLM, stacked: list[str] | None = None, modules: str | list[str] = "all-linear") -> PeftModel:
    """With factors B that are not 0, as if trained."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=modules, target_parameters=stacked, exclude_modules=["head"]
    )
    made = get_peft_model(model, config).double()
    torch.manual_seed(1)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return made.eval()


def experts(settings: dict) -> list[str] | None:
    if "moe" not in settings.get("feedforward", ""):
        return None
    return [*STACKED, "feedforward.shared_in", "feedforward.shared_out"] if "shared" in settings["feedforward"] else STACKED


def tokens(batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 23, (batch, length), generator=torch.Generator().manual_seed(2))


def linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not name.endswith("head")}


def test_the_update_of_each_linear_and_each_expert_is_its_own_low_rank_product():
    """Against a model whose weights are W + alpha / r B A, written down by hand for every layer and every expert."""
    settings = {"feedforward": "moe(experts=3)"}
    plain = base(**settings)
    model = adapted(copy.deepcopy(plain), STACKED, ["q_proj"])
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(factors) == 2 * 2 * 3
    with torch.no_grad():
        for i, block in enumerate(plain.model.blocks):
            root = f"base_model.model.model.depth.blocks.{i}"
            b, a = (factors[f"{root}.mixer.q_proj.lora_{side}.default.weight"] for side in "BA")
            block.mixer.q_proj.weight += ALPHA / RANK * b @ a
            # The wrapper of w_out is outside or inside of that of w_in: its factors' sizes tell.
            stacked = [{s: factors[f"{root}.feedforward{at}.lora_{s}.default.weight"] for s in "BA"} for at in (".base_layer", "")]
            for weight in (block.feedforward.w_in, block.feedforward.w_out):
                (f,) = [f for f in stacked if f["A"].shape[1] == weight.shape[2] and f["B"].shape[0] == weight.shape[1]]
                for e in range(3):
                    weight[e] += ALPHA / RANK * f["B"][:, e::3] @ f["A"][e * RANK : (e + 1) * RANK]
    x = tokens()
    torch.testing.assert_close(model(x).logits, plain.eval()(x).logits, rtol=0, atol=1e-10)
    with model.disable_adapter():
        torch.testing.assert_close(model(x).logits, base(**settings).eval()(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_merged_equals_adapted_and_every_factor_learns(settings, tmp_path):
    plain = base(**settings)
    stacked = experts(settings)
    model = adapted(copy.deepcopy(plain), stacked)
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_parameters()]
    wrapped = {name.split(".lora_A")[0] for name in names if "lora_A" in name}
    assert wrapped >= linears(plain)
    x = tokens()
    out = model(x).logits
    assert (out - plain.eval()(x).logits).abs().max() > 0.01

    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored
    assert all("lora_" in name for name in stored)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).double().eval()
    assert torch.equal(loaded(x).logits, out)

    model.train()
    model(input_ids=x, labels=x).loss.backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name), name
        assert ("lora_" in name) == (p.grad is not None and bool(p.grad.any())), name
    model.eval()
    out = model(x).logits  # The pass above moved the thresholds of gateskip.
    generated = model.generate(input_ids=x, max_new_tokens=4, do_sample=False, pad_token_id=0)
    merged = model.merge_and_unload()
    assert type(merged) is GateworkForCausalLM
    assert set(merged.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(merged(x).logits, out, rtol=0, atol=1e-10)
    assert torch.equal(merged.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0), generated)


def test_layers_that_are_used_in_slices_refuse_adapters():
    settings = {"feedforward": "versatile_ffn(experts=3)"}
    with pytest.raises(PartError, match="peft cannot adapt versatile_ffn"):
        adapted(base(**settings))(tokens())
    assert adapted(base(**settings), modules=r".*mixer\..*_proj")(tokens()).logits.isfinite().all()


def test_trainer_trains_the_adapters_alone(tmp_path):
    plain = base(feedforward="moe(experts=3, gate=topk(k=2, balance=[switch, z_loss, loss_free(0.01)]))").float()
    model = adapted(copy.deepcopy(plain), STACKED).float()
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=15, per_device_train_batch_size=8, learning_rate=3e-2, logging_steps=1, save_strategy="no",
        use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[AdvanceSchedules()])
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert curve[-1] < 0.7 * curve[0]
    before = plain.state_dict()
    after = model.unload().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.depth.blocks.{i}.feedforward.gate.balance.loss_free.bias" for i in range(2)}
