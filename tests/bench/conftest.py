from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest


def _load(path):
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def synthetic():
    """The module beside this file that makes up studies nobody trained."""
    return _load(Path(__file__).with_name("synthetic.py"))


@pytest.fixture(scope="session")
def screenshot():
    """The script that opens reports in headless Chromium."""
    return _load(Path(__file__).parents[2] / "docs" / "screenshot.py")


@pytest.fixture(scope="session")
def hostile(synthetic):
    """A study whose names mean harm: (the variant's name, the study, its records)."""
    name = "<script>alert('x')</script>|\"&`{{ 7*7 }}`"
    study, records = json.loads(json.dumps(synthetic.build()).replace('"wide"', json.dumps(name)))
    for r in records:
        r["key"] = f"{r['phase']}/{r['variant']}/{r['index']}"
    study["name"] = "<img src=x onerror=alert(1)>"
    study["variants"][name] = "feedforward=<b>|</b>"
    return name, study, records
