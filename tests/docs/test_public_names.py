"""A build fails for a public name that has no docstring or stands on no page, and for nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXTENSIONS = Path(__file__).parents[2] / "docs" / "_ext"
CONF = f"""
import sys
sys.path[:0] = [{str(EXTENSIONS)!r}, "."]
extensions = ["sphinx.ext.autodoc", "public_names"]
public_modules = ["toy"]
"""
TOY = '''
"""A toy."""

from dataclasses import dataclass

__all__ = ["SPEED", "Car", "Wheel", "drive"]

#: How fast.
SPEED = 3


@dataclass
class Car:
    """Drives."""

    seats: int = 4


@dataclass
class Wheel:
    """Turns."""

    spokes: int = 0


def drive():
    """Go."""


def _private():
    pass


def unlisted():
    pass
'''
PAGE = """
Toy
===

.. py:data:: toy.SPEED
.. autoclass:: toy.Car
.. autoclass:: toy.Wheel
.. autofunction:: toy.drive
"""


def build(folder: Path, toy: str = TOY, page: str = PAGE) -> tuple[int, str]:
    for name, text in {"conf.py": CONF, "toy.py": toy, "index.rst": page}.items():
        (folder / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "dummy", ".", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def without(text: str, piece: str) -> str:
    assert piece in text
    return text.replace(piece, "")


def test_a_documented_module_builds(tmp_path):
    assert build(tmp_path) == (0, "")


def test_a_function_without_a_docstring_fails_the_build(tmp_path):
    code, said = build(tmp_path, TOY.replace('"""Go."""', "pass"))
    assert code != 0
    assert "toy.drive has no docstring" in said
    assert "toy.Car" not in said


def test_the_docstring_that_dataclass_makes_up_is_none(tmp_path):
    code, said = build(tmp_path, without(TOY, '    """Turns."""\n'))
    assert code != 0
    assert "toy.Wheel has no docstring" in said


def test_a_constant_needs_a_comment(tmp_path):
    code, said = build(tmp_path, without(TOY, "#: How fast.\n"))
    assert code != 0
    assert "toy.SPEED has no docstring" in said


def test_a_name_on_no_page_fails_the_build(tmp_path):
    code, said = build(tmp_path, page=without(PAGE, ".. autoclass:: toy.Car\n"))
    assert code != 0
    assert "toy.Car is on no page" in said
    assert "toy.drive" not in said


def test_without_a_list_the_names_without_an_underscore_are_public(tmp_path):
    code, said = build(tmp_path, without(TOY, '__all__ = ["SPEED", "Car", "Wheel", "drive"]\n'))
    assert code != 0
    assert "toy.unlisted has no docstring" in said
    assert "_private" not in said
    assert "dataclass" not in said  # It is imported, not defined.
