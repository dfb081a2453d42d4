"""A study that nobody trained: records with the shape of real ones, for the tests of the table and the report.

Six variants, four seeds. ``wide`` is better than the baseline by far more than the noise, ``gla`` worse, ``gated`` and
``moe`` differ by less than the noise.
One seed of ``moe`` diverged, one of ``skip`` failed; ``moe`` reports expert loads, ``skip`` what it kept. All were tested at three
lengths.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

SETTINGS = {
    "baseline": "mixer=attention, feedforward=glu",
    "gated": "mixer=gated_attention",
    "wide": "feedforward=versatile_ffn",
    "moe": "feedforward=moe(experts=8, gate=topk(k=2))",
    "gla": "mixer=gla",
    "skip": "depth=gateskip",
}
#: Effect on the loss, FLOPs per token, seconds, each relative to the baseline.
EFFECTS = {
    "baseline": (0.0, 1.0, 1.0),
    "gated": (-0.002, 1.06, 1.11),
    "wide": (-0.060, 1.42, 1.63),
    "moe": (-0.012, 0.55, 1.35),
    "gla": (0.075, 0.93, 1.50),
    "skip": (0.015, 0.74, 0.86),
}
SEEDS, TRIALS, TOKENS, STEPS = 4, 4, 2_000_000, 976
RATES = (0.002, 0.0043, 0.0093, 0.02)


def build() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of ``study.json``, and the records."""
    study = {
        "name": "shakespeare",
        "task": {"name": "text"},
        "baseline": "baseline",
        "variants": SETTINGS,
        "match": "params",
        "tokens": TOKENS,
        "tune_tokens": 800_000,
        "seeds": SEEDS,
        "tune": TRIALS,
        "learning_rates": [RATES[0], RATES[-1]],
        "batch_size": 16,
        "model": {"d_model": 64, "layers": 3, "heads": 4},
        "score": {"name": "loss", "unit": "nats per byte", "lower_is_better": True},
        "unit": "token",
        "matched": {name: _fitted(name) for name in SETTINGS},
        "config_hash": "b7a7425ad131172d",
    }
    phases = (("tune", TRIALS), ("final", SEEDS))
    return study, [_record(name, phase, i) for phase, n in phases for name in SETTINGS for i in range(n)]


def _fitted(name: str) -> dict[str, Any]:
    _, flops, seconds = EFFECTS[name]
    parameters = 167_360 + 64 * list(SETTINGS).index(name)
    return {
        "d_ff": None, "parameters": parameters, "active_parameters": round(parameters * min(flops, 1)), "tokens": TOKENS,
        "flops_per_token": 1.3e6 * flops, "seconds_per_token": 2.8e-5 * seconds,
    }  # fmt: skip


def _record(name: str, phase: str, index: int) -> dict[str, Any]:
    effect, flops, seconds = EFFECTS[name]
    noise = random.Random(f"{phase}/{name}/{index}")
    shared = random.Random(f"{phase}/{index}").gauss(0, 0.02)  # The seed moves all variants alike: this is what pairing takes out.
    final = phase == "final"
    rate = 0.0093 if final else RATES[index]
    tokens = TOKENS if final else 800_000
    end = 1.45 + effect + shared + noise.gauss(0, 0.006) + (0 if final else 0.25 + 0.12 * abs(RATES.index(rate) - 2))
    status, error = "ok", None
    if name == "moe" and final and index == 2:
        status, error = "diverged", "the training loss was nan at step 410"
    if name == "skip" and final and index == 3:
        status, error = "failed", "RuntimeError: <b>out of memory</b> | while allocating 12 GiB"
    if name == "wide" and not final and index == 3:
        status, error = "diverged", "the training loss was inf at step 12"
    last = {"ok": 1.0, "diverged": 0.42, "failed": 0.0}[status]
    curve = []
    for i in range(1, 61):
        share = i / 60
        if share > last:
            break
        loss = end + 1.9 * (share**-0.35 - 1) + (0 if final else 0.1)
        validated = i % 5 == 0 if final else i == 60
        curve.append(
            {
                "step": round(STEPS * share), "tokens": round(tokens * share), "seconds": 56 * seconds * share * tokens / TOKENS,
                "train_loss": loss + noise.gauss(0, 0.03) - 0.05, "validation_loss": loss if validated else None,
            }
        )  # fmt: skip
        if i % 3 == 0 and name in ("moe", "skip"):
            curve[-1]["metrics"] = _metrics(name, random.Random(f"{index}/{i}"))
    ok = status == "ok"
    config = {
        "task": {"name": "text"},
        "variant": {"name": name, "model": {"d_model": 64, "layers": 3, **_settings(name)}, "optim": "adamw"},
        "d_ff": None, "tokens": tokens, "batch_size": 16, "learning_rate": rate,
        "seed": index if final else 10_000 + index, "phase": phase,
    }  # fmt: skip
    cost = {
        "parameters": _fitted(name)["parameters"], "active_parameters": _fitted(name)["active_parameters"],
        "train_flops_per_token": 1.3e6 * flops, "forward_flops_per_token": 4.3e5 * flops, "train_flops": 1.3e6 * flops * tokens,
        "seconds": 56 * seconds * tokens / TOKENS * (1 + noise.gauss(0, 0.02)), "tokens": tokens,
        "tokens_per_second": 36_000 / seconds, "peak_bytes": round(4.1e7 * seconds),
        "decode_state_bytes": 24_576 if name == "gla" else 196_608,
    }  # fmt: skip
    return {
        "study": "shakespeare", "key": f"{phase}/{name}/{'seed' if final else 'trial'}{index}", "variant": name, "phase": phase,
        "index": index, "seed": config["seed"], "status": status, "error": error, "config": config,
        "config_hash": f"{zlib.crc32((name + phase + str(index)).encode()):016x}",
        "versions": {"gatework": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "optuna": "5.0.0"},
        "hardware": {"cpu": "Example CPU", "cores": 2, "threads": 1, "device": "cpu", "platform": "Linux"},
        "data_hash": "8a932f423f29f3f6", "task": "text", "learning_rate": rate,
        "validation": {"loss": end - 0.01} if ok else {},
        "test": {"loss": end} | {f"loss_at_{n}": end * n**0.02 for n in (128, 256, 512)} if ok and final else None,
        "score": (end if final else end - 0.01) if ok else None, "curve": curve, "cost": cost if ok else {},
        "metrics": _metrics(name, noise) if ok else {},
    }  # fmt: skip


def _settings(name: str) -> dict[str, str]:
    key, _, value = SETTINGS[name].partition("=")
    return {"mixer": "attention", "feedforward": "glu"} | ({key: value} if name != "baseline" else {})


def _metrics(name: str, noise: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layer in range(3):
        if name == "moe":
            raw = [1 + 0.8 * noise.random() for _ in range(8)]
            found[f"blocks.{layer}.feedforward.gate.load"] = [x / sum(raw) for x in raw]
            found[f"blocks.{layer}.feedforward.gate.entropy"] = 1.4 + 0.1 * noise.random()
        if name == "skip":
            found[f"blocks.{layer}.kept"] = 0.9 - 0.15 * layer + 0.02 * noise.random()
    if name == "wide":
        found["blocks.0.feedforward.loops"] = 2.4
    return found


def small(scores: dict[str, list[float | None]], **study: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A study of these test scores by seed, one curve point per run; None: that run diverged. The first variant is the baseline.

    ``study`` overrides what stands in ``study.json``; there are no tuning trials."""
    names = list(scores)
    about = {
        "name": "small", "task": {"name": "text"}, "baseline": names[0], "variants": dict.fromkeys(names, "feedforward=mlp"),
        "match": "params", "tokens": 1000, "tune_tokens": 0, "seeds": max(map(len, scores.values())), "tune": 0,
        "learning_rates": [0.001, 0.01], "score": {"name": "loss", "unit": "nats", "lower_is_better": True}, "unit": "token",
    }  # fmt: skip
    records = []
    for name, values in scores.items():
        for seed, value in enumerate(values):
            cost = {"parameters": 1000, "train_flops_per_token": 6000.0, "train_flops": 6e6, "seconds": 2.0, "tokens": 1000}
            records.append(
                {
                    "key": f"final/{name}/seed{seed}", "variant": name, "phase": "final", "index": seed, "seed": seed,
                    "error": None, "status": "ok" if value is not None else "diverged", "score": value,
                    "config": {"variant": {"name": name}},
                    "config_hash": "0", "data_hash": "0", "learning_rate": 0.003, "validation": {"loss": value}, "metrics": {},
                    "cost": dict(cost) if value is not None else {},
                    "curve": [{"step": 10, "tokens": 1000, "seconds": 2.0, "train_loss": 1.0, "validation_loss": value}],
                }
            )  # fmt: skip
    return about | study, records
