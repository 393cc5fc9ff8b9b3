"""The rules of the layout: who may import whom, and what a command may load before it works."""

import ast
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kto_core", "precompute", "train")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = ("kto-precompute", "kto-train", "kto-cache", "kto-sweep", "kto-report")

# Files that may import a library, where not all may.
ONLY_IN = {
    "click": {"precompute/cli.py", "train/cli.py"},
    "peft": {"train/lora.py"},
    "optuna": {"train/study.py"},
    "plotly": {"train/figures.py", "train/sweep_figures.py"},
}
# At most this many files may.
AT_MOST = {"vllm": 1, "peft": 1}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports_of(path):
    """Every module a file imports, those inside functions, `importlib` and `__import__` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative imports hide who imports whom"
            found.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def libraries_of(path):
    return {module.split(".")[0] for module in imports_of(path)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_in_one_direction(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = {
        "kto_core": {"precompute", "train", "transformers", "vllm", "accelerate", "datasets", "peft", "click"},
        "precompute": {"train"},
        "train": {"precompute"},
    }
    assert libraries_of(path) & forbidden[package] == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_stay_in_their_files(path):
    for library, allowed in ONLY_IN.items():
        assert library not in libraries_of(path) or name_of(path) in allowed, library


@pytest.mark.parametrize("library", AT_MOST)
def test_optional_libraries_are_known_to_one_file(library):
    assert len([path for path in FILES if library in libraries_of(path)]) <= AT_MOST[library]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_pickled(path):
    """A pickle runs whatever code its author put in."""
    assert libraries_of(path) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"} == set()
    calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert {"torch.load", "torch.save", "np.save", "eval", "exec"} & set(calls) == set()
    assert "allow_pickle=True" not in path.read_text()


def test_there_are_no_drawers_for_everything():
    stems = {path.stem for path in FILES}
    assert stems & {"utils", "util", "common", "helpers", "misc", "base", "registry"} == set()


def test_the_rules_see_imports_inside_functions(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("def f():\n    import vllm.engine\n    import_module('peft')\n    from a.b import c\n")
    assert libraries_of(path) == {"vllm", "peft", "a"}


HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "vllm", "pyarrow", "numpy", "pandas")


@pytest.mark.parametrize("module", ["precompute.cli", "train.cli"])
def test_a_command_line_loads_nothing_heavy(module):
    program = f"import sys, {module}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_before_anything_heavy_is_loaded(script):
    """What makes it fast on any machine; seconds would be a test of the machine."""
    path = Path(sysconfig.get_path("scripts")) / script
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", path, "--help"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("Usage: ")
    loaded = {line.rsplit("|", 1)[1].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in loaded
    assert loaded & set(HEAVY) == set()


def test_importing_has_no_effect():
    """No output, no environment, no random draw, no thread: modules define things, commands do them."""
    modules = [name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in FILES]
    program = (
        "import importlib, os, random, sys, threading\n"
        "import torch, transformers, datasets, accelerate, pyarrow.parquet, tqdm\n"
        "def state():\n"
        "    return dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), threading.active_count()\n"
        "before = state()\n"
        f"for name in {[name for name in modules if 'vllm' not in name]!r}:\n"
        "    importlib.import_module(name)\n"
        "assert state() == before\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
