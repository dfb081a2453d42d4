"""The errors a user can cause; each says in one sentence what was wrong and what would be right."""

from __future__ import annotations


class GateworkError(ValueError):
    """A wrong input, met at the boundary. The command line prints it without a traceback and exits with code 2."""


class PartError(GateworkError):
    """A part that does not exist, an argument it does not take, or sizes that do not fit."""
