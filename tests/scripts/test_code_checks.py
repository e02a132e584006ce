"""The scripts that look at the source: scripts/measure_code and scripts/mutate."""

import ast
import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measure_code() -> ModuleType:
    return load("measure_code")


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    return load("mutate")


def test_words_are_found_in_docstrings_comments_and_messages_and_not_in_names(
    measure_code, tmp_path, monkeypatch
):
    monkeypatch.setattr(measure_code, "ROOT", tmp_path)
    file = tmp_path / "one.py"
    file.write_text(
        '"""What does not hold."""\n\nstrangers = 1  # begun anew\nprint(f"a {strangers} that goes'
        " on for ever\")\nstranger = beside = anew = 'twin'\nthere = 'there is none, and there is"
        " no such word'\n"
    )
    assert measure_code.odd_words(file) == [
        "one.py:1: 'does not hold'; write: is invalid",
        "one.py:4: 'for ever'; write: forever",
        "one.py:3: 'anew'; write: again",
    ]


def test_words_in_any_file_fail_the_check(measure_code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_code, "ROOT", tmp_path)
    monkeypatch.setattr(measure_code, "readable", lambda: sorted(tmp_path.glob("*.md")))
    (tmp_path / "clean.md").write_text("again\n")
    assert measure_code.main(["--words"]) == 0
    (tmp_path / "odd.md").write_text("anew\n")
    assert measure_code.main(["--words"]) == 1
    assert capsys.readouterr().err == "odd.md:1: 'anew'; write: again\n"


def test_figures_of_a_small_source(measure_code, tmp_path):
    tree = ast.parse(
        "def _once(x):\n    '''Whether so.'''\n    return x\n\ndef _long(x):\n    if x and x > 1 or"
        " x < 0:\n        for y in x:\n            x = y\n    return [z for z in"
        " x]\n\n_once(_long(1)), _long(2)\n"
    )
    assert measure_code.one_caller_share({tmp_path: tree}) == (1, 2)
    assert [measure_code.complexity(f) for f in measure_code.functions(tree)] == [1, 6]


def test_circles_of_imports_are_found(measure_code):
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a", "f"}, "f": {"e"}}
    assert sorted(measure_code.circles(edges)) == [["a", "b", "c"], ["e", "f"]]


def test_every_mistake_has_one_place_and_another_text(mutate, tmp_path):
    assert len(mutate.MISTAKES) >= 20
    assert len({one.name for one in mutate.MISTAKES}) == len(mutate.MISTAKES)
    for one in mutate.MISTAKES:
        assert (ROOT / one.file).read_text().count(one.old) == 1, one.name
        assert one.old != one.new
        assert all((ROOT / test).is_file() for test in one.tests if test.endswith(".py")), one.name


def test_mistake_that_no_test_notices_survives(mutate, tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(
        "from it import double\n\ndef test_it():\n    assert double(2) == 4\n"
    )
    (tmp_path / "it.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "it.py", "test_it.py"], cwd=tmp_path, check=True)

    def judge(new: str, old: str = "2 * x") -> str:
        return mutate.judge(mutate.Mistake("one", "it.py", old, new, ("test_it.py",)))

    assert judge("3 * x") == "caught"
    assert judge("x * x") == "survived"
    assert judge("4", old="3 * x") == "it.py: '3 * x' occurs 0 times; expected once"


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name", ["decay-of-vectors", "rounding-of-a-product", "clip-too-high", "group-twice"]
)
def test_planted_mistakes_are_caught(name):
    done = subprocess.run(
        [sys.executable, "scripts/mutate", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_of_the_worker_do_not_import_each_other_in_a_circle(measure_code):
    files = measure_code.tracked("worker/*.py")
    assert len(files) > 100
    trees = {file: ast.parse(file.read_text()) for file in files}
    assert measure_code.circles(measure_code.imports(trees)) == []
