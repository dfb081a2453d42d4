"""Sphinx: MyST pages by hand, pages of parts and of the reference from the library (``_ext``). Builds offline."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import gatework

project = "gatework"
author = "The gatework developers"
copyright = "the gatework developers, Apache-2.0"
version = release = gatework.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "pages", "public_names"]
exclude_patterns = ["_build", "_ext"]
default_role = "code"
nitpicky = True  # A reference into gatework that leads nowhere is a mistake; those to other libraries would need the network.
nitpick_ignore_regex = [(r"py:.*", r"(?!gatework\.).*")]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False

#: What the reference describes and the check of public names covers.
public_modules = [
    "gatework.core", "gatework.core.cost", "gatework.core.papers", "gatework.models", "gatework.bench", "gatework.bench.tasks",
    "gatework.surgery", "gatework.activations", "gatework.gates", "gatework.experts", "gatework.feedforward", "gatework.mixers",
    "gatework.depth", "gatework.weights", "gatework.optim", "gatework.learners", "gatework.activations.base", "gatework.gates.base",
    "gatework.feedforward.base", "gatework.mixers.base", "gatework.depth.base", "gatework.optim.base", "gatework.learners.base",
    "gatework.learners.federated", "gatework.experts.expert_buffer", "gatework.experts.expert_parallel",
    "gatework.experts.expert_placement", "gatework.experts.expert_trace", "gatework.ops.*", "gatework",
]  # fmt: skip

html_theme = "furo"
html_title = "gatework"
html_static_path = ["_static"]
html_css_files = ["gatework.css"]
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = html_show_sphinx = False
