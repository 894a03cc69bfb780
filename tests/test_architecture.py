"""The sources themselves keep the promises of the architecture: sizes, arrows, one door, no stray package name."""

import ast
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "meme_dist").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


@cache
def functions() -> list[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the sources and the file that it stands in."""
    trees = [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES]
    return [(path, node) for path, tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, docstring left out: prose does not make a function long."""
    body = function.body
    first = body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    if documented and len(body) == 1:
        return 0
    return (function.end_lineno or 0) - (body[1] if documented else first).lineno + 1


def named(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"


def test_no_file_has_more_than_400_lines() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_no_function_has_more_than_80_lines() -> None:
    sizes = {named(path, function): (function.end_lineno or 0) - function.lineno + 1 for path, function in functions()}
    assert {name: size for name, size in sizes.items() if size > 80} == {}


def test_half_of_the_functions_have_at_most_12_lines() -> None:
    assert statistics.median(length(function) for _, function in functions()) <= 12


def test_the_folder_kernels_is_no_package() -> None:
    """A top-level import name `kernels` would overwrite another distribution's package of that name on installation."""
    assert (ROOT / "kernels" / "meme_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_import_contracts_hold() -> None:
    pytest.importorskip("importlinter")
    script = "import sys; sys.path[:0] = ['.', 'kernels']; from importlinter.cli import lint_imports as f; sys.exit(f(cache_dir=None))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_and_the_command_line_starts_nothing() -> None:
    """`meme-dist --help` must not pay for Accelerate, scikit-learn or matplotlib."""
    script = (
        "import sys, meme_dist, meme_kernels; print([m for m in ('accelerate', 'sklearn', 'matplotlib', 'triton') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
