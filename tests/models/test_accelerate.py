"""``accelerate launch`` with two gloo processes, DDP and FSDP2: the losses and weights of a single process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from gatework import core
from gatework.models import GateworkForCausalLM

SCRIPT = Path(__file__).with_name("launched.py")
#: What is a mean over tokens or a count is the same over two halves of a batch and over the whole. The Switch loss is a product
#: of two means, which each process takes over its own tokens, as all trainers do: it is off. So are quantiles, of which each
#: process keeps those of its own tokens.
BALANCE = "[z_loss(0.01), loss_free(0.01)]"
MODELS = {
    "hybrid": {"mixer": "gla, gla, attention"},
    "moe": {"mixer": "gla, attention", "feedforward": f"moe(experts=4, d_ff=8, gate=topk(balance={BALANCE}))"},
    "gateskip": {"depth": "gateskip(budget=1.0)"},
}
FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        # What is sharded as a unit stands in the model's `_no_split_modules`.
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": False, "fsdp_state_dict_type": "FULL_STATE_DICT",
    },
}


def launch(folder: Path, **settings) -> None:
    common = {
        "compute_environment": "LOCAL_MACHINE", "use_cpu": True, "num_machines": 1, "num_processes": 2, "main_process_port": 0,
        "mixed_precision": "no",
    }
    (folder / "accelerate.json").write_text(json.dumps(common | settings))
    command = ["-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.json"), str(SCRIPT)]
    done = subprocess.run(
        [sys.executable, *command, json.dumps(MODELS), str(folder)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert done.returncode == 0, done.stderr


def alone(settings: dict) -> tuple[list[float], GateworkForCausalLM]:
    """The same training in this process, without any library around it."""
    spec = importlib.util.spec_from_file_location("launched", SCRIPT)
    launched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launched)
    model, optimizer = launched.made(settings)
    losses = []
    for step, tokens in enumerate(launched.batches(launched.ROWS), start=1):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        core.advance(model, step, launched.STEPS)
        losses.append(float(loss.detach()))
    return losses, model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DistributedDataParallel", {"distributed_type": "MULTI_GPU"}),
        ("FSDPGateworkForCausalLM", FSDP2),
    ],
    ids=["ddp", "fsdp2"],
)
def test_two_processes_train_as_one(kind, settings, tmp_path):
    launch(tmp_path, **settings)
    for name, model_settings in MODELS.items():
        losses, model = alone(model_settings)
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert (report["processes"], report["backend"], report["kind"]) == (2, "gloo", kind)
        held = report["held"] / sum(p.numel() for p in model.parameters())
        assert held == 1 if settings is not FSDP2 else 0.5 <= held < 0.52
        assert losses[-1] < losses[0]
        # transformers takes the cross-entropy in float32, whatever the model's dtype.
        torch.testing.assert_close(report["losses"], losses, rtol=0, atol=2e-6)
        trained = GateworkForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64).state_dict()
        for weight, expected in model.state_dict().items():
            if weight.endswith("quantiles"):
                continue
            torch.testing.assert_close(trained[weight], expected, rtol=0, atol=1e-5, msg=f"{name}: {weight} differs")
