"""The rows of the two tasks of this folder for the EleutherAI evaluation harness, from the files beside this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def _rows(name: str) -> dict[str, datasets.Dataset]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def next_line(**_: Any) -> dict[str, datasets.Dataset]:
    """speech, choices, answer."""
    return _rows("next_line.jsonl")


def speeches(**_: Any) -> dict[str, datasets.Dataset]:
    """speech."""
    return _rows("speeches.jsonl")
