"""What every part is: contracts, registry, part expressions, capabilities, side outputs, routing, measured cost."""

from gatework.core.contracts import (
    CAPABILITIES,
    Activation,
    Balance,
    ChannelGate,
    Component,
    DepthPolicy,
    DepthState,
    Experts,
    FeedForward,
    Gate,
    No,
    Part,
    SequenceMixer,
    State,
    Weight,
    advance,
    capability,
    decay_groups,
    in_backward,
    losses,
    metrics,
)
from gatework.core.errors import GateworkError, PartError
from gatework.core.expression import Spec, parse, parse_pattern, parse_settings
from gatework.core.registry import build, build_pattern, check, entries, lookup, register
from gatework.core.routing import Routing

__all__ = [
    "CAPABILITIES", "Activation", "Balance", "ChannelGate", "Component", "DepthPolicy", "DepthState", "Experts", "FeedForward",
    "Gate", "GateworkError", "No", "Part", "PartError", "Routing", "SequenceMixer", "Spec", "State", "Weight", "advance", "build",
    "build_pattern", "capability", "check", "decay_groups", "entries", "in_backward", "lookup", "losses", "metrics", "parse",
    "parse_pattern", "parse_settings", "register",
]
