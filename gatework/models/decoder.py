"""``Decoder``: a pre-norm language model made of any mixer, feed-forward and depth policy."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State
from gatework.core.errors import PartError
from gatework.models.trunk import trunk
from gatework.weights import apply


class Decoder(nn.Module):
    """A causal language model: token embedding, blocks run by a depth policy, RMS norm, (tied) head.

    Each of ``mixer``, ``feedforward`` and ``depth`` is a part expression, a class, or for the first two a
    comma-separated pattern that repeats along the layers: ``mixer="gla, gla, attention"``. The model's widths are
    offered to every part; what an expression gives wins, except ``d_model``.

    Args:
        vocab_size: number of token ids.
        d_model: width of the residual stream.
        layers: number of blocks.
        heads: heads of the mixers that have heads.
        d_ff: hidden width of the feed-forwards (of one expert in a mixture); None leaves each part its default.
        mixer: sequence mixer(s), all causal.
        feedforward: feed-forward(s).
        depth: depth policy.
        weight: where the blocks' matrices come from, all of them (``ternary``); None are plain parameters.
        tie_embeddings: the head shares the embedding's weight.

    Initialisation: the embedding is normal with standard deviation ``d_model**-0.5`` (so that a narrow model's first
        branches do not drown it), an untied head likewise; every part starts as its paper says.

    Raises:
        PartError: unknown parts, sizes that do not fit, a mixer that is not causal.

    Example:
        >>> model = Decoder(vocab_size=256, d_model=64, layers=2, mixer="gla", feedforward="moe(experts=4)")
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 256])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("vocab_size",)

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 128,
        layers: int = 4,
        heads: int = 4,
        d_ff: int | None = None,
        mixer: Any = "attention",
        feedforward: Any = "glu",
        depth: Any = "stack",
        tie_embeddings: bool = True,
        weight: Any = None,
    ) -> None:
        super().__init__()
        for name, value in {"vocab_size": vocab_size, "d_model": d_model, "layers": layers, "heads": heads}.items():
            if value < 1:
                raise PartError(f"{name} must be at least 1, got {value}")
        self.vocab_size, self.d_model = vocab_size, d_model
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.depth: Any = trunk(
            mixer, feedforward, depth, d_model=d_model, layers=layers, heads=heads, d_ff=d_ff, purpose="a language model",
            needs=("causal",),
        )
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        else:
            nn.init.normal_(self.head.weight, std=d_model**-0.5)
        if weight is not None:
            apply(self.blocks, "*", weight)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last."""
        blocks: nn.ModuleList = self.depth.blocks
        return blocks

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position.

        ``state`` (from :meth:`init_state`) makes this a decoding step that continues after everything fed before;
        ``mask`` marks real tokens (padding on either side); ``segments`` keeps packed documents apart.
        """
        x = self.embedding(tokens)
        x = self.depth(x, state=state, mask=mask, segments=segments)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        """An empty decoding state; dtype and device default to the parameters'."""
        state: State = self.depth.init_state(batch_size, dtype=dtype, device=device)
        return state

    def state_bytes(self, length: int) -> int:
        """Bytes that decoding keeps per sequence after ``length`` tokens."""
        return int(self.depth.state_bytes(length))

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "B T"],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos: int | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B T2"]:
        """Continue prompts token by token with a decoding state.

        Args:
            tokens: prompts (B, T), T >= 1; shorter prompts are padded on the left and ``mask`` marks the real tokens.
            max_new_tokens: how many tokens to add.
            temperature: 0 takes the most likely token.
            top_k: sample among the k most likely only.
            eos: stop a sequence after this id; it is then filled up with it, and generation ends when all have stopped.
            generator: source of randomness.

        Returns:
            The prompts with the new tokens behind them.
        """
        if tokens.shape[1] < 1:
            raise PartError("generate needs a prompt of at least one token")
        was_training = self.training
        self.eval()
        try:
            state = self.init_state(tokens.shape[0])
            logits = self(tokens, state=state, mask=mask)[:, -1]
            out, done = [tokens], torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
            for made in range(max_new_tokens):
                new = self._choose(logits, temperature, top_k, generator)
                if eos is not None:
                    new = torch.where(done, eos, new)
                    done = done | (new == eos)
                out.append(new[:, None])
                if made + 1 == max_new_tokens or (eos is not None and bool(done.all())):
                    break
                logits = self(new[:, None], state=state)[:, -1]
        finally:
            self.train(was_training)
        return torch.cat(out, dim=1)

    @staticmethod
    def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / temperature
        if top_k is not None:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
