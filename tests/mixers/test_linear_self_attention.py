"""Linear self-attention against its sum, real and complex, with padding, packing and a state."""

from __future__ import annotations

import pytest
import torch

from gatework.core import PartError, build
from gatework.mixers import LinearSelfAttention


def reference(mixer, x):
    """Token by token from the equation, in complex numbers where the mixer's are."""
    cast = (lambda w: torch.view_as_complex(w.contiguous())) if mixer.complex else lambda w: w
    z = cast(x.unflatten(-1, (-1, 2))) if mixer.complex else x
    kq, pv = cast(mixer.kq), cast(mixer.pv)
    rows = []
    for sequence in z:
        out = []
        for t in range(1, len(sequence) + 1):
            s = sum(torch.outer(sequence[i], sequence[i].conj()) for i in range(t))
            out.append(pv @ s @ kq @ sequence[t - 1] / max(t - 1, 1))
        rows.append(torch.stack(out))
    y = torch.stack(rows)
    return torch.view_as_real(y).flatten(-2) if mixer.complex else y


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("length", [1, 2, 9, 21])
def test_outputs_and_gradients_equal_the_equation(complex, length):
    torch.manual_seed(0)
    mixer = LinearSelfAttention(6, complex=complex, chunk=8).double()
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 6, dtype=torch.float64)
    results = []
    for run in (mixer, lambda x: reference(mixer, x)):
        y = run(x)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, mixer.kq, mixer.pv])])
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


@pytest.mark.parametrize("complex", [False, True])
def test_the_count_goes_by_document_and_by_real_tokens(complex):
    torch.manual_seed(1)
    mixer = LinearSelfAttention(4, complex=complex).double()
    a, b = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 5, 4, dtype=torch.float64)
    packed = mixer(torch.cat([a, b], 1), segments=torch.tensor([[7] * 3 + [2] * 5]))
    torch.testing.assert_close(packed, torch.cat([reference(mixer, a), reference(mixer, b)], 1), rtol=0, atol=1e-12)
    mask = torch.tensor([[True, False, True, False, True, True, False, True]])
    padded = torch.full((1, 8, 4), 9.0, dtype=torch.float64)
    padded[mask] = b[0]
    torch.testing.assert_close(mixer(padded, mask=mask)[mask], reference(mixer, b)[0], rtol=0, atol=1e-12)
    state = mixer.init_state(1)
    pieces = [mixer(padded[:, :4], state=state, mask=mask[:, :4]), mixer(padded[:, 4:], state=state, mask=mask[:, 4:])]
    torch.testing.assert_close(torch.cat(pieces, 1)[mask], reference(mixer, b)[0], rtol=0, atol=1e-12)
    assert state.count.tolist() == [5]
    assert state.nbytes == mixer.state_bytes(5)


def test_widths_and_their_errors():
    with pytest.raises(PartError, match="even where its channels are pairs, got 5"):
        build("linear_self_attention(complex=true)", d_model=5)
    with pytest.raises(PartError, match="chunk must be a power of two of at least 4, got 6"):
        build("linear_self_attention(chunk=6)", d_model=4)
