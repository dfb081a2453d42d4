"""What the dense feed-forwards share: default widths and their checks."""

from __future__ import annotations


def hidden_width(d_model: int, d_ff: int | None, factor: int | float, multiple: int) -> int:
    """``d_ff`` if it is given, else ``factor * d_model`` rounded up to a multiple of ``multiple``.

    Raises:
        ValueError: if a width is below 1.
    """
    if d_model < 1:
        raise ValueError(f"d_model must be at least 1, got {d_model}")
    if d_ff is None:
        # Rounded before the ceiling, so that 8/3 * 96 is 256 and not 256.00000000000006.
        d_ff = -int(-round(factor * d_model, 6) // multiple) * multiple
    if d_ff < 1:
        raise ValueError(f"d_ff must be at least 1, got {d_ff}")
    return d_ff
