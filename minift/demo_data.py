"""Labelled text that every Python carries: what the standard library says about itself.

Each row is the first paragraph of a docstring, labelled with the area its module belongs to. The
table below is all the labelling there is: no person read the rows, so some labels are debatable.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .data import Row
from .errors import InputError

# Modules and packages by area. A longer name wins over its package: asyncio.streams is networking.
# Those that this Python does not have are skipped: no version has them all.
AREAS = {
    "networking": """
        asynchat asyncio.proactor_events asyncio.protocols asyncio.selector_events asyncio.sslproto
        asyncio.streams asyncio.transports asyncio.trsock asyncore cgi ftplib http ipaddress netrc
        nntplib nturl2path selectors socket socketserver ssl telnetlib urllib webbrowser wsgiref
        xmlrpc""",
    "e-mail": "email imaplib mailbox mailcap mimetypes poplib quopri smtpd smtplib uu",
    "text": """
        _markupbase codecs difflib encodings fnmatch gettext html locale pprint re reprlib shlex
        sre_compile sre_constants sre_parse string stringprep textwrap""",
    "concurrency": """
        _threading_local asyncio concurrent contextvars multiprocessing queue sched signal
        subprocess threading""",
    "files": """
        _compression _pyio bz2 compression filecmp fileinput genericpath glob gzip io lzma ntpath
        os pathlib posixpath shutil stat tarfile tempfile zipapp zipfile""",
    "numbers and time": """
        _pydatetime _pydecimal _strptime calendar colorsys datetime decimal fractions numbers
        random secrets statistics zoneinfo""",
    "testing": """
        bdb cProfile doctest pdb profile profiling pstats test.libregrtest test.support
        test.test_doctest test.test_unittest timeit trace traceback tracemalloc unittest""",
    "language tools": """
        __future__ _py_abc abc annotationlib ast code codeop compileall contextlib ctypes
        dataclasses dis enum functools imp importlib inspect keyword lib2to3 linecache modulefinder
        opcode pkgutil py_compile pyclbr pydoc rlcompleter runpy symtable sysconfig tabnanny token
        tokenize types typing warnings zipimport""",
    "graphical interfaces": "curses idlelib tkinter turtle turtledemo",
    "data": """
        _collections_abc array base64 bisect collections configparser copy copyreg csv dbm graphlib
        hashlib heapq hmac json pickle pickletools plistlib shelve sqlite3 struct tomllib uuid
        weakref xdrlib xml""",
}
# What is written in C has no source to read. These are imported, which only loads them.
COMPILED = {
    "networking": "_socket _ssl select",
    "text": "_codecs _locale _sre builtins.bytes builtins.str unicodedata",
    "concurrency": "_contextvars _multiprocessing _queue _signal _thread",
    "files": "_bz2 _io _lzma fcntl mmap posix zlib",
    "numbers and time": """
        _datetime _decimal _random builtins.complex builtins.float builtins.int cmath math time""",
    "testing": "_lsprof _tracemalloc faulthandler",
    "language tools": "_abc _ctypes _functools _imp _symtable _warnings gc",
    "graphical interfaces": "_curses _curses_panel",
    "data": """
        _bisect _collections _csv _hashlib _heapq _json _pickle _sqlite3 _struct
        _weakref array binascii builtins.dict builtins.frozenset builtins.list builtins.set
        builtins.tuple itertools marshal pyexpat""",
}
# Not in the data: to be typed at a model that was trained on it.
DEMO_SENTENCES = (
    "open a TCP connection and read bytes",
    "parse the headers of a message and its attachments",
    "split a sentence into words and wrap long lines",
    "run a function in a pool of worker threads",
    "delete a directory and every file in it",
    "round a decimal to two places",
    "check that a function raises an exception",
    "draw a button in a window",
)

_MIN_WORDS, _MAX_WORDS = 4, 60
_LARGEST_AREA = 1000  # paragraphs; a larger area is thinned, so that none crowds out the others
_VALIDATION = 0.15  # of every area
# A line that C docstrings begin with: "f(a[, b]) -> int", its "-> int" on a line of its own, "--".
_SIGNATURE = re.compile(r"[\w.]+\((?:[^()]|\([^()]*\))*\)\s*(->.*|=.*)?|->.*|--")


@dataclass(frozen=True)
class DemoData:
    """Rows whose label is the area of the standard library that the text comes from."""

    train: list[Row]
    validation: list[Row]  # from modules of which nothing is in train
    found: int  # paragraphs before near-duplicates went and large areas were thinned


@dataclass(frozen=True, order=True)
class _Paragraph:
    module: str  # dotted name of one file, or of one built-in type
    line: int
    area: str
    text: str


def stdlib_docstrings(seed: int = 0) -> DemoData:
    """First paragraphs of the standard library's docstrings, split by module.

    The same Python, operating system and seed give the same rows in the same order.

    Args:
        seed: chooses the modules that go to validation. Train and validation share none.

    Returns:
        About 7,000 rows on a full CPython, in ten areas (the labels), and 15 % of every area
        in validation. A row's line counts from 1 in its part.

    Raises:
        InputError: this Python comes without sources, so that an area lacks text.
    """
    found = _collect()
    kept = _thin(_without_near_duplicates(found))
    held_out = _held_out_modules(kept, seed)
    parts = [
        [paragraph for paragraph in kept if (paragraph.module in held_out) is validation]
        for validation in (False, True)
    ]
    for area in AREAS:
        if not all(any(paragraph.area == area for paragraph in part) for part in parts):
            raise InputError(
                f"expected docstrings about {area!r} in at least two modules under "
                f"{sysconfig.get_path('stdlib')}, found fewer: use a Python with its sources"
            )
    train, validation = (
        [Row(p.text, None, p.area, line) for line, p in enumerate(part, start=1)] for part in parts
    )
    return DemoData(train, validation, len(found))


def _collect() -> list[_Paragraph]:
    """Every usable paragraph, in order of module and line."""
    paragraphs = []
    with warnings.catch_warnings():  # old escape sequences in sources, modules that will go
        warnings.simplefilter("ignore")
        for path, (module, area) in _source_files().items():
            for line, docstring in _docstrings(path):
                paragraphs.append(_Paragraph(module, line, area, _first_paragraph(docstring)))
        for area, names in COMPILED.items():
            for module in names.split():
                for line, docstring in enumerate(_compiled_docstrings(module), start=1):
                    paragraphs.append(_Paragraph(module, line, area, _first_paragraph(docstring)))
    return sorted(paragraph for paragraph in paragraphs if paragraph.text)


def _source_files() -> dict[Path, tuple[str, str]]:
    """Path -> (module, area) of every file that AREAS names and this Python has."""
    root = Path(sysconfig.get_path("stdlib"))
    named = [(name, area) for area, names in AREAS.items() for name in names.split()]
    files = {}
    for name, area in sorted(named, key=lambda pair: pair[0].count(".")):  # longer names win
        base = root.joinpath(*name.split("."))
        for path in (base.with_suffix(".py"), *base.rglob("*.py")):
            inside = path.relative_to(base.parent).parts
            if path.is_file() and {"test", "tests", "idle_test"}.isdisjoint(inside):
                module = ".".join(path.relative_to(root).with_suffix("").parts)
                files[path] = (module.removesuffix(".__init__"), area)
    return files


def _docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, docstring) of a file's module, classes and functions, without importing it."""
    try:
        todo: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (SyntaxError, ValueError):
        return
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "lineno", 0), ast.get_docstring(node) or ""
        for field in ("body", "orelse", "handlers", "finalbody"):  # of if and try as well
            todo += getattr(node, field, ())


def _compiled_docstrings(name: str) -> Iterator[str]:
    """Docstrings of a module or type written in C, of what is in it and in its classes."""
    module, _, member = name.partition(".")
    try:
        holder = importlib.import_module(module)
    except ImportError:  # of another operating system, or left out when Python was built
        return
    holder = getattr(holder, member) if member else holder
    home = (module, module.lstrip("_"))  # a class of _socket may say that it is socket's
    classes = [v for v in vars(holder).values() if inspect.isclass(v) and v.__module__ in home]
    for owner in (holder, *classes):
        named = [value for key, value in sorted(vars(owner).items()) if not key.startswith("__")]
        for value in (owner, *named):
            documents_itself = inspect.isroutine(value) or inspect.isdatadescriptor(value)
            if (value is owner or documents_itself) and isinstance(value.__doc__, str):
                yield inspect.cleandoc(value.__doc__)


def _first_paragraph(docstring: str) -> str:
    """The first paragraph on one line, cut to _MAX_WORDS; "" where it says too little."""
    for block in re.split(r"\n\s*\n", docstring.strip()):
        lines = [line for line in block.split("\n") if not _SIGNATURE.fullmatch(line.strip())]
        if lines:
            words = " ".join(lines).partition(">>>")[0].split()[:_MAX_WORDS]
            spelt = [word for word in words if re.search("[A-Za-z]", word)]
            return " ".join(words) if len(spelt) >= _MIN_WORDS else ""
    return ""


def _without_near_duplicates(paragraphs: list[_Paragraph]) -> list[_Paragraph]:
    """The first of those that say the same, and none of those said in two areas."""
    areas = defaultdict(set)
    for paragraph in paragraphs:
        for key in _likeness(paragraph.text):
            areas[key].add(paragraph.area)
    kept, seen = [], set()
    for paragraph in paragraphs:
        keys = _likeness(paragraph.text)
        if seen.isdisjoint(keys) and all(len(areas[key]) == 1 for key in keys):
            kept.append(paragraph)
        seen.update(keys)
    return kept


def _likeness(text: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """Two texts that share either are near-duplicates: first words alike, or the same words."""
    words = re.findall("[a-z]+", text.lower())
    return tuple(words[:8]), frozenset(words)


def _thin(paragraphs: list[_Paragraph]) -> list[_Paragraph]:
    """At most _LARGEST_AREA of every area, spread over its modules by hash."""
    by_hash = sorted(paragraphs, key=lambda paragraph: _hash(paragraph.text))
    taken = Counter()
    kept = []
    for paragraph in by_hash:
        taken[paragraph.area] += 1
        if taken[paragraph.area] <= _LARGEST_AREA:
            kept.append(paragraph)
    return sorted(kept)


def _held_out_modules(paragraphs: list[_Paragraph], seed: int) -> set[str]:
    """Modules for validation: about _VALIDATION of every area's paragraphs.

    Neighbouring modules share their phrases, so a package goes whole to one side. One that is
    more than the whole validation part (tkinter, email, asyncio) is split between its modules.
    Which go is read from a hash of seed and name: not from the order that files are found in,
    and a module more or less in another Python leaves most of the others where they were.
    """
    held_out = set()
    for area in AREAS:
        sizes = Counter(p.module for p in paragraphs if p.area == area)
        room = _VALIDATION * sizes.total()
        packages = defaultdict(list)
        for module in sizes:
            packages[module.split(".")[0].lstrip("_")].append(module)  # socket with _socket
        units = []
        for modules in packages.values():
            whole = sum(sizes[module] for module in modules) <= room
            units += [modules] if whole else [[module] for module in modules]
        for unit in sorted(units, key=lambda modules: _hash(f"{seed} {modules[0]}")):
            size = sum(sizes[module] for module in unit)
            if size <= room:
                held_out.update(unit)
                room -= size
    return held_out


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Starts that the small GPT goes on from.
DEMO_STARTS = (
    "def __len__(self):\n    return ",
    "class Stack:\n    def __init__(self):\n        self.",
    "def main():\n    parser = argparse.ArgumentParser(",
    "    try:\n        import ",
)
# Data as code, and code of tests, which is much alike.
NOT_PROSE = {"test", "tests", "encodings", "pydoc_data", "idlelib", "lib2to3", "site-packages",
             "turtledemo", "ensurepip", "__pycache__", "dist-packages"}  # fmt: skip
CHARACTERS = 200, 150_000  # of a module, at least and at most


def stdlib_sources(seed: int = 0) -> DemoData:
    """The source text of the standard library's modules, one row each; a thirtieth to validate.

    Args:
        seed: which modules validate.

    Raises:
        InputError: there is hardly any.
    """
    root, rows = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if NOT_PROSE.isdisjoint(name.parts):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if CHARACTERS[0] <= len(text) <= CHARACTERS[1]:
                rows.append(Row(text, None, None, 1, name.as_posix()))
    if len(rows) < 100:
        raise InputError(f"{root}: expected the sources of the standard library, found {len(rows)}")
    order = sorted(rows, key=lambda row: _hash(f"{seed} {row.file}"))
    held_out = {row.file for row in order[: len(rows) // 30]}
    train = [row for row in rows if row.file not in held_out]
    return DemoData(train, [row for row in rows if row.file in held_out], len(rows))
