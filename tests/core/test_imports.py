"""What importing costs and promises: nothing heavy, public names that exist, missing extras named in one sentence."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import gatework
from gatework import core

HEAVY = ["optuna", "scipy", "rich", "tyro", "plotly", "jinja2", "transformers", "sklearn", "pandas", "sqlalchemy", "matplotlib"]
FAMILIES = [
    "activations", "depth", "experts", "feedforward", "gates", "learners", "mixers", "models", "optim", "weights",
]


def python(code: str, *, without: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter, in which the package ``without`` cannot be imported."""
    hide = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {without!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", hide * bool(without) + code], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_importing_the_library_imports_nothing_heavy():
    code = f"""
import sys
import gatework
assert "torch" not in sys.modules, "import gatework alone costs no torch"
from gatework import core, {", ".join(FAMILIES)}
from gatework.core import cost
core.build("moe(experts=4, gate=topk(k=2))", "feedforward", d_model=8)
models.Decoder(11, d_model=8, layers=1, heads=2)
import gatework.bench
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert python(code).stdout == "[]\n"


@pytest.mark.parametrize("name", ["gatework", "gatework.core", "gatework.bench", *(f"gatework.{family}" for family in FAMILIES)])
def test_every_public_name_exists(name):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None
    assert module.__all__


def test_core_lists_all_that_its_contracts_export():
    from gatework.core import contracts

    assert set(contracts.__all__) <= set(core.__all__)


def test_the_lazy_names_are_those_of_their_modules():
    from gatework.core import cost, errors, registry

    assert gatework.build is registry.build is core.build
    assert gatework.register is registry.register is core.register
    assert gatework.profile is cost.profile
    assert gatework.PartError is errors.PartError is core.PartError
    assert issubclass(gatework.PartError, gatework.GateworkError)
    assert issubclass(gatework.GateworkError, ValueError)
    for module in ("gatework", "gatework.bench"):
        with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
            importlib.import_module(module).nothing  # noqa: B018
    python("from gatework import *; build, profile, register, GateworkError, PartError")


def test_the_package_is_typed_and_carries_its_data():
    files = resources.files("gatework")
    assert files.joinpath("py.typed").is_file()
    assert files.joinpath("papers.toml").is_file()
    assert files.joinpath("data/shakespeare.txt.xz").is_file()
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == gatework.__version__


@pytest.mark.parametrize("package", ["optuna", "scipy", "rich", "plotly", "jinja2"])
def test_the_bench_names_a_missing_extra_before_it_trains(package):
    done = python("from gatework.bench import compare", without=package, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f'ModuleNotFoundError: gatework.bench needs {package}: pip install "gatework[bench]"'


def test_the_command_line_names_its_missing_extra_in_one_sentence():
    for package, arguments in (("tyro", []), ("rich", ["parts"]), ("optuna", ["compare", "--tokens", "1e5"])):
        code = f"sys.argv = ['gatework', *{arguments}]\nfrom gatework.cli import main\nsys.exit(main())"
        done = python(code, without=package, check=False)
        assert done.returncode != 0
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1, done.stderr
        assert 'pip install "gatework[bench]"' in done.stderr


def test_parts_need_no_extra():
    code = "from gatework.feedforward import GLU\nimport gatework\ngatework.build('gla', 'mixer', d_model=8)\nprint(GLU(8))"
    for package in ("optuna", "rich"):
        assert python(code, without=package).stdout.startswith("GLU(")
