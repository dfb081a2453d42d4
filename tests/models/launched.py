"""Started by ``test_accelerate.py`` through ``accelerate launch``: trains a model in float64, writes its losses and weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

from gatework import core
from gatework.models import GateworkConfig, GateworkForCausalLM

STEPS, ROWS = 5, 8


def made(settings: dict) -> tuple[GateworkForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    config = GateworkConfig(**({"vocab_size": 23, "d_model": 16, "layers": 3, "heads": 2} | settings))
    model = GateworkForCausalLM(config).double()
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def batches(rows: int) -> DataLoader:
    """The same rows in the same order, however many of them a batch has."""
    return DataLoader(torch.randint(23, (STEPS * ROWS, 12), generator=torch.Generator().manual_seed(1)), rows)


def train(accelerator: Accelerator, settings: dict, folder: Path) -> None:
    model, optimizer, data = accelerator.prepare(*made(settings), batches(ROWS // accelerator.num_processes))
    losses = []
    for step, tokens in enumerate(data, start=1):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        core.advance(model, step, STEPS)
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    weights = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process, state_dict=weights)
    if accelerator.is_main_process:
        report = {
            "losses": losses, "processes": accelerator.num_processes, "backend": torch.distributed.get_backend(),
            "kind": type(model).__name__, "held": sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters()),
        }
        (folder / "report.json").write_text(json.dumps(report))
    accelerator.free_memory()


def main(models: dict[str, dict], folder: Path) -> None:
    state = PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate takes its plugin up where the processes have accelerators, and else trains with DDP without a word.
        state.distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(cpu=True)
    for name, settings in models.items():
        if accelerator.is_fsdp2:
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None  # The plugin would keep the first model's.
        (folder / name).mkdir(exist_ok=True)
        train(accelerator, settings, folder / name)
    accelerator.end_training()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
