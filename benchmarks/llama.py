"""A gatework decoder against ``transformers.LlamaForCausalLM`` (sdpa) of the same shape, with the same weights and labels.

Logits, losses and gradients of the embedding are compared before anything is timed.
"""

from __future__ import annotations

from functools import partial

import torch
from _timing import interleaved, row
from transformers import LlamaConfig, LlamaForCausalLM

from gatework.models import GateworkConfig, GateworkForCausalLM

#: Theirs over ours: a cost of at most 1.05.
WANT = 1 / 1.05


def sides(
    vocab: int, d_model: int, layers: int, heads: int, kv_heads: int, d_ff: int
) -> tuple[GateworkForCausalLM, LlamaForCausalLM]:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=d_model, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=d_ff, rms_norm_eps=1e-6, tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
    ))
    ours = GateworkForCausalLM(GateworkConfig(
        vocab_size=vocab, d_model=d_model, layers=layers, heads=heads, d_ff=d_ff, mixer=f"attention(kv_heads={kv_heads})",
        feedforward="glu",
    ))
    decoder = ours.model
    pairs = [(decoder.embedding, theirs.model.embed_tokens), (decoder.norm, theirs.model.norm)]
    for mine, other in zip(decoder.blocks, theirs.model.layers, strict=True):
        pairs += [(mine.mixer_norm, other.input_layernorm), (mine.feedforward_norm, other.post_attention_layernorm)]
        pairs += [(getattr(mine.mixer, name), getattr(other.self_attn, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        pairs += [(getattr(mine.feedforward, name), getattr(other.mlp, f"{name}_proj")) for name in ("gate", "up", "down")]
    with torch.no_grad():
        for mine, other in pairs:
            mine.weight.copy_(other.weight)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    return ours, theirs


def forward(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=tokens, labels=tokens)


def forward_backward(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(input_ids=tokens, labels=tokens).loss.backward()


def check(ours: GateworkForCausalLM, theirs: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    for model in (ours, theirs):
        forward_backward(model, tokens)
    with torch.no_grad():
        mine, other = (model(input_ids=tokens, labels=tokens) for model in (ours, theirs))
    torch.testing.assert_close(mine.logits, other.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(mine.loss, other.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.model.embedding.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=0, atol=1e-4)


def compare(name: str, batch: int, length: int, repeats: int, **shape: int) -> None:
    ours, theirs = sides(**shape)
    tokens = torch.randint(shape["vocab"], (batch, length))
    check(ours, theirs, tokens)
    for what, call, training in (("forward", forward, False), ("fwd+bwd", forward_backward, True)):
        models = [model.train(training) for model in (ours, theirs)]
        mine, other = interleaved(*(partial(call, model, tokens) for model in models), repeats=repeats, warmup=3)
        label = f"llama {name}, {batch} x {length} tokens, {what}"
        row(label, mine, other, "gatework", "llama", f">={WANT:.3f}", other / mine >= WANT)


def main() -> None:
    torch.set_num_threads(2)
    compare("of width 256", 8, 128, 31, vocab=256, d_model=256, layers=4, heads=4, kv_heads=2, d_ff=688)
    compare("SmolLM2-135M, 8 of 30 layers", 1, 512, 15, vocab=49152, d_model=576, layers=8, heads=9, kv_heads=3, d_ff=1536)


if __name__ == "__main__":
    main()
