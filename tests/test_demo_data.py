"""minift.demo_data: ten areas, no leak between the parts, the same rows every time."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from minift import demo_data
from minift.demo_data import AREAS, DEMO_SENTENCES, DemoData, stdlib_docstrings
from minift.errors import InputError

ROOT = Path(__file__).parents[1]
IN_ANOTHER_PROCESS = """
import hashlib, sys
from minift import demo_data
before = set(sys.modules)
data = demo_data.stdlib_docstrings()
print(hashlib.sha256(repr(data).encode()).hexdigest())
print(*set(sys.modules) - before)
"""
NEVER_IMPORTED = {"antigravity", "asyncio", "email", "idlelib", "this", "tkinter", "turtle"}


@pytest.fixture(scope="module")
def found():
    return demo_data._collect()


@pytest.fixture(scope="module")
def data(found) -> DemoData:
    with pytest.MonkeyPatch.context() as patch:  # reading the sources once is slow enough
        patch.setattr(demo_data, "_collect", lambda: found)
        return stdlib_docstrings()


def words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def test_every_area_is_in_both_parts(data):
    train, validation = (
        Counter(row.label for row in part) for part in (data.train, data.validation)
    )
    assert set(train) == set(validation) == set(AREAS)
    assert len(data.train) >= 2000
    assert min(validation.values()) >= 20
    assert max(train.values()) < 0.3 * len(data.train)
    for area in AREAS:
        assert 0.1 < validation[area] / (validation[area] + train[area]) < 0.2, area


def test_rows_are_short_plain_text(data):
    for part in (data.train, data.validation):
        assert [row.line for row in part] == list(range(1, len(part) + 1))
        for row in part:
            assert row.pair is None
            assert row.text == " ".join(row.text.split())
            assert 4 <= len(row.text.split()) <= 60
            assert ">>>" not in row.text


def test_no_module_is_in_both_parts(found, data):
    module = {p.text: p.module for p in demo_data._without_near_duplicates(found)}
    train, validation = (
        {module[row.text] for row in part} for part in (data.train, data.validation)
    )
    assert train.isdisjoint(validation)
    whole = [{"socket", "_socket"}, {"json.encoder", "json.decoder"}, {"bz2", "_bz2"}]
    assert all(package <= train or package <= validation for package in whole)


def test_no_near_duplicates(data):
    rows = data.train + data.validation
    assert data.found > len(rows)
    assert len({tuple(words(row.text)[:8]) for row in rows}) == len(rows)
    assert len({frozenset(words(row.text)) for row in rows}) == len(rows)


def test_what_two_areas_say_is_left_out():
    texts = [("a", "text", "Return the value."), ("b", "data", "Return: the VALUE 2.")]
    texts += [("c", "text", "Split a line."), ("d", "text", "A line, a split.")]
    paragraphs = [demo_data._Paragraph(module, 1, area, text) for module, area, text in texts]
    kept = demo_data._without_near_duplicates(paragraphs)
    assert [paragraph.module for paragraph in kept] == ["c"]


def test_seed_chooses_the_modules(found, data, monkeypatch):
    monkeypatch.setattr(demo_data, "_collect", lambda: found)
    assert stdlib_docstrings(seed=0) == data
    other = stdlib_docstrings(seed=1)
    assert other.validation != data.validation
    assert {row.text for row in other.train + other.validation} == {
        row.text for row in data.train + data.validation
    }


@pytest.mark.slow
def test_another_process_agrees_and_imports_no_sources(data):
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": path}
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    output = subprocess.check_output(command, env=environment, cwd=ROOT, text=True)
    theirs, imported = output.splitlines()
    assert theirs == hashlib.sha256(repr(data).encode()).hexdigest()
    assert {name.split(".")[0] for name in imported.split()}.isdisjoint(NEVER_IMPORTED)


@pytest.mark.parametrize(
    ("docstring", "paragraph"),
    [
        ("Read  all\n  of it now.\n\nMore.", "Read all of it now."),
        ("sin(x, /)\n--\n\nReturn the sine of x.", "Return the sine of x."),
        ("f(a) -> int\nf(a, b) -> int\n\nCount a in all b.", "Count a in all b."),
        ("f(a)\n    -> list of int\n\nCount a in all b.", "Count a in all b."),
        ("rewind() puts it\nback (to 0).", "rewind() puts it back (to 0)."),
        ("Move the turtle forward. >>> forward(2)", "Move the turtle forward."),
        ("Too few words", ""),
        ("1 + 2 == 3 or 4", ""),
        ("f(x)", ""),
        ("", ""),
        ("word " * 61, " ".join(["word"] * 60)),
    ],
)
def test_first_paragraph(docstring, paragraph):
    assert demo_data._first_paragraph(docstring) == paragraph


def test_a_python_without_sources_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"expected docstrings about 'e-mail' .*use a Python with"):
        stdlib_docstrings()


def test_demo_sentences_are_not_in_the_data(data):
    texts = {tuple(words(row.text)) for row in data.train + data.validation}
    assert not texts & {tuple(words(sentence)) for sentence in DEMO_SENTENCES}


def test_sources_are_whole_modules_split_by_module():
    """Python as it stands in the library, none of its tests, nothing on both sides; again the
    same."""
    found = demo_data.stdlib_sources(seed=0)
    assert found.found == len(found.train) + len(found.validation) > 200
    assert not {r.text for r in found.train} & {r.text for r in found.validation}
    names = {row.file for row in found.train + found.validation}
    assert {"argparse.py", "dataclasses.py", "json/decoder.py"} <= names
    assert not any("test" in Path(name).parts for name in names)
    assert demo_data.stdlib_sources(seed=0) == found
    other = demo_data.stdlib_sources(seed=1)
    assert {r.file for r in other.validation} != {r.file for r in found.validation}
