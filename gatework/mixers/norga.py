"""``NoRGa``: attention with learned prefixes whose scores pass a non-linear residual gate.

Le et al., Mixture of Experts Meets Prompt-Based Continual Learning, 2024, arXiv 2405.14124, section 4. To the keys and values of
:mod:`gatework.mixers.attention` come P learned pairs (K'_p, V'_p) per key-value head, the prompt of a task. With the query q of a
token (K wide) and scores s_t = rope(q) . rope(k_t) / sqrt(K) for the tokens that it sees,

    s'_p = q . K'_p / sqrt(K)                g_p = s'_p + tau act(alpha s'_p)
    o = (sum_p exp(g_p) V'_p + sum_t exp(s_t) v_t) / (sum_p exp(g_p) + sum_t exp(s_t))

Read as a mixture of experts, a row of attention weighs one linear expert per token by a quadratic score; prefix tuning adds P new
experts whose scores are linear in q, and the gate makes those non-linear, for which the paper shows that fewer samples tell the
experts apart. A prompt has no position and no causal mask: every token sees it, whatever the window.

The two sums are computed apart and merged by their log-sum-exp, so that the tokens keep the fused attention kernel: o = w o_tokens
+ sum_p exp(g_p - m) V'_p with w = exp(m_tokens - m) and m the log-sum-exp of all. Backward, the kernel is given o and m in place of
its own output and log-sum-exp, which makes its gradients those of the joint softmax. Devices other than a CPU call
``scaled_dot_product_attention`` once, with the gates as the mask of P keys that are 0.

The official code has no rotary positions; here the prompt meets the query before its rotation. Its prompt pool reshapes (layers,
2, B, ...) to (layers, B, 2, ...), which mixes keys with values where B > 1: not done here. Choosing a task's prompt at test time
is left to the caller (the paper: a head of its own that tells tasks apart).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gatework.core.registry import build, register
from gatework.mixers.attention import Attention
from gatework.mixers.base import rotate

aten = torch.ops.aten


@register("norga", paper="norga")
class NoRGa(Attention):
    """Softmax attention with a learned prefix per task, gated residually.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``. For continual learning freeze the model (``model.requires_grad_(False)``),
    call :meth:`learn` on every such layer at the start of each task (it frees that task's prompt, and keeps or makes all else of
    the layer frozen), and :meth:`select` to predict. Built afresh, all is trained but the prompts of later tasks.

    Args:
        d_model: width of the stream.
        heads, kv_heads, window, qk_norm, rope, rope_base, causal: as in :class:`~gatework.mixers.attention.Attention`.
        prefix: P, the prompt's length.
        activation: act of the gate.
        tasks: number of prompts.

    Parameters beside attention's: ``prompts``, per task (2, kv_heads, P, d_model / heads), keys and values; ``alpha`` and ``tau``,
    one pair for all heads and tasks, learned with the first task only.

    Initialisation: prompts uniform in [-1, 1], alpha and tau 1; the rest as attention.

    Decoding keeps what attention keeps: the prompt is the same for all sequences, and its keys and values are parameters.

    Raises:
        ValueError: as plain attention does; ``prefix`` or ``tasks`` below 1.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        kv_heads: int | None = None,
        window: int | None = None,
        qk_norm: bool = False,
        rope: bool = True,
        rope_base: float = 10000.0,
        causal: bool = True,
        prefix: int = 20,
        activation: Any = "tanh",
        tasks: int = 1,
    ) -> None:
        super().__init__(d_model, heads, kv_heads, window, qk_norm, rope, rope_base, causal)
        if prefix < 1 or tasks < 1:
            raise ValueError(f"prefix and tasks must be at least 1, got {prefix} and {tasks}")
        self.prefix, self.tasks = prefix, tasks
        shape = (2, self.kv_heads, prefix, self.head_width)
        self.prompts = nn.ParameterList(nn.Parameter(torch.empty(shape).uniform_(-1, 1)) for _ in range(tasks))
        self.alpha, self.tau = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.activation = build(activation, "activation")
        for prompt in self.prompts[1:]:
            prompt.requires_grad_(False)
        self.task: int | None
        self.select(0)

    def extra_repr(self) -> str:
        """The settings."""
        return super().extra_repr() + f", prefix={self.prefix}, tasks={self.tasks}"

    def select(self, task: int | None) -> None:
        """Use the prompt of this task from now on; None uses none, which is plain attention. Freezes and frees nothing.

        Raises:
            ValueError: no such task.
        """
        if task is not None and not 0 <= task < self.tasks:
            raise ValueError(f"task {task} is not one of the {self.tasks} that norga was built for, counted from 0")
        self.task = task

    def learn(self, task: int) -> None:
        """Select a task and freeze all of the layer but its prompt, and but alpha and tau if it is the first.

        Raises:
            ValueError: no such task.
        """
        self.select(task)
        self.requires_grad_(False)
        self.prompts[task].requires_grad_(True)
        for scale in (self.alpha, self.tau):
            scale.requires_grad_(task == 0)

    def _queries(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Queries (..., H, K); with a prompt (..., H, 2 K): rotated for the tokens, as they are for the prompt."""
        queries = self._place(self.query(x), self.q_norm, None, None)
        turned = queries if cos is None or sin is None else rotate(queries, cos, sin)
        return turned if self.task is None else torch.cat([turned, queries], dim=-1)

    def _sdpa(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
        if self.task is None:
            return super()._sdpa(queries, keys, values, allowed, causal)
        queries, plain = queries.split(self.head_width, dim=-1)
        prompt = self.prompts[self.task].to(queries.dtype)
        shared = self.heads // self.kv_heads
        prompt_keys, prompt_values = prompt.repeat_interleave(shared, dim=1)
        scores = torch.matmul(plain, prompt_keys.transpose(-1, -2)).to(torch.promote_types(queries.dtype, torch.float32))
        scores = scores * self.head_width**-0.5
        gated = scores + self.tau * self.activation(self.alpha * scores)
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        if shared > 1:
            keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)
        bias = None
        if allowed is not None:
            bias = queries.new_zeros(()).where(allowed, float("-inf"))[:, None]
        if queries.device.type == "cpu" and queries.numel() and keys.numel():
            merged: Tensor = _Merged.apply(gated, prompt_values, queries, keys, values, bias, causal)
            return merged
        return _biased(gated, prompt_values, queries, keys, values, bias, causal)


def _biased(
    gated: Float[Tensor, "B H T P"], prompt_values: Float[Tensor, "H P K"], queries: Float[Tensor, "B H T K"],
    keys: Float[Tensor, "B H S K"], values: Float[Tensor, "B H S K"], bias: Tensor | None, causal: bool,
) -> Float[Tensor, "B H T K"]:
    """The joint softmax by one attention over P more keys, which are 0 and whose mask is the gated scores."""
    batch, new, entries = len(queries), queries.shape[2], keys.shape[2]
    if bias is None:
        bias = queries.new_zeros(new, entries)
        if causal:
            bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), float("-inf"))
    bias = torch.cat([gated.to(queries.dtype), bias.expand(*gated.shape[:3], entries)], dim=-1)
    keys = torch.cat([keys.new_zeros(batch, keys.shape[1], gated.shape[3], keys.shape[3]), keys], dim=2)
    values = torch.cat([prompt_values.expand(batch, -1, -1, -1), values], dim=2)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)


class _Merged(torch.autograd.Function):
    """The joint softmax of :func:`_biased`: the prompt's part beside the fused CPU kernel, merged by log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, gated: Tensor, prompt_values: Tensor, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None,
        causal: bool,
    ) -> Tensor:
        own, lse = aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, 0.0, causal, attn_mask=bias)
        joint = torch.logaddexp(lse, gated.logsumexp(-1))
        weights = (gated - joint[..., None]).exp()
        out = own * (lse - joint).exp()[..., None].to(own.dtype) + weights.to(own.dtype) @ prompt_values
        ctx.causal = causal
        ctx.save_for_backward(weights, prompt_values, queries, keys, values, bias, out, joint)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        weights, prompt_values, queries, keys, values, bias, out, joint = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_queries, d_keys, d_values = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, queries, keys, values, out, joint, 0.0, ctx.causal, attn_mask=bias
        )
        d_weights = d_out @ prompt_values.transpose(-1, -2) - (d_out * out).sum(-1, keepdim=True)
        d_prompt_values = (weights.to(d_out.dtype).transpose(-1, -2) @ d_out).sum(0)
        return weights * d_weights, d_prompt_values, d_queries, d_keys, d_values, None, None
