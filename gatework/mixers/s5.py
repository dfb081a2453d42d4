"""``S5``: one diagonal linear system that reads and writes all channels.

Smith, Warrington and Linderman, Simplified State Space Layers for Sequence Modeling, 2022, arXiv 2208.04933. With P/2 complex modes
that stand for P (each beside its conjugate, hence the factor 2), u the token, a vector:

    h' = diag(lambda) h + b u    o = 2 Re(c h) + skip * u    lambda = -exp(log_decay) + i frequency    step = exp(log_step), per
    mode h_t = e^z h_{t-1} + step (e^z - 1)/z b u_t    z = step lambda
    y = g * sigmoid(W g + bias)    g = gelu(o)

The modes start from HiPPO-LegS without its low-rank part, in ``hippo_blocks`` equal blocks: with V the eigenvectors of all blocks,
b = V* B and c = C V.

Differences from the released code: the recurrence is computed in chunks (:mod:`gatework.ops.state_space`) instead of by an
associative scan; Re lambda is kept negative by its exponential form, where the code trains it directly, with a bound as an
option. B is normal of variance 1 / d_model, one over what enters a mode; the code's axis convention makes it 1 / P. There is no
dropout inside.
"""

from __future__ import annotations

from gatework.core.registry import register
from gatework.mixers.state_space import SharedStateMixer, shared_weights
from gatework.ops.hippo import normal_plus_low_rank


@register("s5", paper="s5")
class S5(SharedStateMixer):
    """One diagonal linear state space for all channels together.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps ``d_state`` real numbers
    whatever the length.

    Args:
        d_model: width of the stream.
        d_state: P, real numbers in the state, even.
        hippo_blocks: into how many equal blocks the state is divided at the start, each with the eigenvalues of a HiPPO-LegS
            matrix of its size.
        dt_min, dt_max: the modes' time steps are drawn log-uniformly between these.

    Initialisation: see the module for the eigenvalues; B real normal of variance 1 / d_model, C complex normal of variance 2 /
    d_state, skip normal, PyTorch's default for the gate.

    Decoding keeps h. Padding leaves it as it is, packed documents start with an empty one.

    ``keep`` skips the output weights and what follows them; the inputs and the recurrence see all tokens.

    Training: the paper's learning rate for ``log_step``, ``log_decay``, ``frequency`` and ``b`` is at most 0.001, without weight
    decay (``no_weight_decay`` names them).

    Raises:
        ValueError: if ``d_state`` is not divisible into ``hippo_blocks`` blocks of an even size, or unless 0 < dt_min <= dt_max.
    """

    copies = 2

    def __init__(
        self, d_model: int, d_state: int = 64, hippo_blocks: int = 1, dt_min: float = 0.001, dt_max: float = 0.1
    ) -> None:
        if hippo_blocks < 1 or d_state % (2 * hippo_blocks):
            raise ValueError(f"d_state {d_state} is not divisible into hippo_blocks {hippo_blocks} of an even size")
        rate, _, _, vectors = normal_plus_low_rank(d_state // hippo_blocks)
        b, c = shared_weights(d_model, hippo_blocks, vectors.mH, vectors)
        super().__init__(d_model, rate.repeat(hippo_blocks), b, c, dt_min, dt_max)
        self.hippo_blocks = hippo_blocks

    def extra_repr(self) -> str:
        """The settings."""
        return f"{super().extra_repr()}, hippo_blocks={self.hippo_blocks}"
