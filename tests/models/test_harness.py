"""The EleutherAI evaluation harness scores a gatework model on tasks that lie beside this test, offline."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gatework.models import GateworkConfig, GateworkForCausalLM, byte_tokenizer

TASKS = Path(__file__).with_name("harness")


def model() -> GateworkForCausalLM:
    torch.manual_seed(0)
    config = GateworkConfig(d_model=32, layers=2, heads=2, d_ff=32, mixer="gla, attention", feedforward="moe(experts=4)")
    made = GateworkForCausalLM(config)
    for p in made.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)  # Far from uniform, so that the choices differ.
    return made.eval()


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / name).read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def log_likelihood(scored: GateworkForCausalLM, context: str, continuation: str) -> float:
    """Of one continuation, alone and unpadded, byte by byte; byte 0 stands before the text."""
    before = list(context.encode()) or [0]
    after = list(continuation.encode())
    logits = scored.model(torch.tensor([before + after]))[0].double().log_softmax(-1)
    return sum(float(logits[len(before) - 1 + i, byte]) for i, byte in enumerate(after))


def test_the_harness_finds_the_models_own_likelihoods():
    scored = model()
    harness = HFLM(pretrained=scored, tokenizer=byte_tokenizer(), batch_size=8)
    found = lm_eval.simple_evaluate(
        model=harness, tasks=["shakespeare_next_line", "shakespeare_speeches"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
    )["results"]

    right, right_by_length = [], []
    for row in rows("next_line.jsonl"):
        scores = [log_likelihood(scored, row["speech"], "\n" + choice) for choice in row["choices"]]
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right.append(scores.index(max(scores)) == row["answer"])
        right_by_length.append(by_length.index(max(by_length)) == row["answer"])
    assert len(right) == 40
    assert found["shakespeare_next_line"]["acc,none"] == pytest.approx(sum(right) / 40)
    assert found["shakespeare_next_line"]["acc_norm,none"] == pytest.approx(sum(right_by_length) / 40)

    texts = [row["speech"] for row in rows("speeches.jsonl")]
    total = sum(log_likelihood(scored, "", text) for text in texts)
    n_bytes, n_words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    speeches = found["shakespeare_speeches"]
    assert speeches["bits_per_byte,none"] == pytest.approx(-total / n_bytes / math.log(2), rel=1e-5)
    assert speeches["byte_perplexity,none"] == pytest.approx(math.exp(-total / n_bytes), rel=1e-4)
    assert speeches["word_perplexity,none"] == pytest.approx(math.exp(-total / n_words), rel=1e-3)
    assert speeches["bits_per_byte,none"] > 8.1  # Worse than knowing nothing: these weights mean something.


def test_bytes_are_the_tokens(tmp_path):
    tokenizer = byte_tokenizer()
    for text in ("", "To be,\tor  not \n to be . ?", "Ā ā ñ 日本 \U0001f600", "<0x41> <s> \0 <unk>"):
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (256, 0, 0, 0)
    assert tokenizer.decode([66, 255, 195, 65]) == "B\ufffd\ufffdA"
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded("né").input_ids == [110, 195, 169]
