"""Numbers as people read them: the same words in the terminal, in Markdown and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable

#: Counts are whole numbers, measurements are not.
Number = int | float

#: What stands where there is nothing to say.
NOTHING = "–"


def si(value: Number | None, digits: int = 3) -> str:
    """1234567 as ``1.23M``: three significant digits and a prefix of the SI."""
    if value is None:
        return NOTHING
    if abs(value) < 1000:
        return significant(value, digits)
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * (1 - 0.5 * 10**-digits):
            return significant(value / factor, digits) + letter
    return significant(value, digits)


def significant(value: Number | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent between 1e-4 and 1e6; whole numbers stay whole."""
    if value is None:
        return NOTHING
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if float(value).is_integer() and abs(value) < 10**digits:
        return str(int(value))
    value = float(f"{value:.{digits - 1}e}")  # Rounded first: 0.9996 has the digits of 1.00.
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if not -6 < places <= digits + 3:
        return f"{value:.{digits - 1}e}"
    return f"{round(value, places):.{max(places, 0)}f}"


def size(value: Number | None) -> str:
    """Bytes, in powers of 1024."""
    if value is None:
        return NOTHING
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{significant(value / factor)} {unit}"
    return f"{value:.0f} B"


def seconds(value: Number | None) -> str:
    """``8.3s``, ``2m05s``, ``1h02m``, ``4d06h``."""
    if value is None:
        return NOTHING
    if value < 99.5:
        return f"{significant(value, 2 if value >= 10 else 3)}s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(value / 60)
    if minutes < 6000:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(value / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def fixed(value: Number | None, decimals: int | None, sign: bool = False) -> str:
    """A score or a difference, with so many decimals (None: with an exponent); a negative zero has no sign."""
    if value is None:
        return NOTHING
    plus = "+" if sign else ""
    if decimals is None:
        mantissa, _, exponent = f"{value + 0.0:{plus}.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{round(value, decimals) + 0.0:{plus}.{decimals}f}"


def percent(value: Number | None, sign: bool = True) -> str:
    """A fraction as per cent, without decimals from 10% on."""
    if value is None:
        return NOTHING
    places = 0 if abs(value) >= 0.0995 else 1
    return f"{100 * value:{'+' if sign else ''}.{places}f}%"


def ratio(value: Number | None) -> str:
    """A multiple of the baseline."""
    return NOTHING if value is None else f"{value:.2f}x" if abs(value) < 10 else f"{significant(value)}x"


def p_value(value: Number | None) -> str:
    """A p-value with two digits; very small ones as a bound."""
    if value is None:
        return NOTHING
    return "<0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def decimals_for(scores: Iterable[float], spreads: Iterable[float]) -> int | None:
    """Decimals with which to print the scores of a study: four digits of a score, or two of a typical spread, at most five.

    None where that would be a row of zeros or of digits: below a hundredth and from a million on."""
    largest = max((abs(score) for score in scores if score), default=1.0)
    if not 0.01 <= largest < 1e6:
        return None
    least = 3 - math.floor(math.log10(largest))
    typical = sorted(spread for spread in spreads if spread > 0)
    wanted = 1 - math.floor(math.log10(typical[len(typical) // 2])) if typical else least
    return min(max(least, min(wanted, least + 1), 0), 5)


def listed(items: Iterable[object]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def counted(number: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
