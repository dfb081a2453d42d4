"""A hybrid of linear and softmax attention, trained by transformers' Trainer on the bundled Shakespeare in a minute."""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from gatework.bench.tasks import Text
from gatework.models import AdvanceSchedules, GateworkConfig, GateworkForCausalLM, byte_tokenizer


def main(steps: int = 200) -> None:
    torch.manual_seed(0)
    length = 128
    windows = Text(length=length).splits["train"].unfold(0, length, length).long()
    data = [{"input_ids": window, "labels": window} for window in windows]
    config = GateworkConfig(vocab_size=256, d_model=128, layers=3, heads=4, mixer="gla, gla, attention")
    model = GateworkForCausalLM(config)
    tokenizer = byte_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3, lr_scheduler_type="cosine",
            warmup_steps=10, logging_steps=max(1, steps // 10), save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        # The callback moves the schedules inside the parts; this model has none, a `gateskip` or a `moe` has.
        Trainer(model, arguments, train_dataset=data, callbacks=[AdvanceSchedules()]).train()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # The import of gatework.models.GateworkForCausalLM above made "gatework" known to the Auto classes.
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("KING HENRY.\n", return_tensors="pt").to(model.device)
    text = model.generate(**prompt, max_new_tokens=200, do_sample=True, temperature=0.8, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(text[0]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
