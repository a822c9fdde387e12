"""minift/tagged.py: columns, JSON lines, spans of characters, and what is wrong with them."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.data import Columns
from minift.errors import InputError
from minift.tagged import Reading, of_text, read_tagged

SHARED = Path(__file__).parents[2] / "shared" / "data"
NONE = Columns()


def read(path, columns=NONE, names=(), labelled=True):
    """The sentences as (word, tag) pairs, what was dropped, and how many spans were trimmed."""
    dropped = []
    how = Reading(lambda where, why: dropped.append((where, why)), labelled, names)
    rows = list(read_tagged(str(path), columns, how))
    if labelled:
        rows = [list(zip(row.words, row.tags, strict=True)) for row in rows]
    return rows, dropped, len(how.trimmed)


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def objects(folder, *lines):
    return written(folder, "x.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.conll", "a\tO\nb c\tB-x\n\nd\tO\n"),
        ("x.tsv", "a\tO\r\nb c\tB-x\r\n\t\r\nd\tO"),
        ("x.annotated", "\ufeffa\tNN\tO\nb c\tNN\tB-x\n\n\n\nd\tNN\tO\n"),
        ("x.conll.gz", gzip.compress(b"a\tO\nb c\tB-x\n\nd\tO\n", mtime=0)),
        ("x.csv", 'a,NN,O\n"b c",NN,B-x\n\nd,NN,O\n'),
    ],
)
def test_columns_of_any_kind(tmp_path, name, content):
    """Tabs or commas, blank lines that hold a tab, CRLF, a mark at the begin, gzip; first and last
    column."""
    rows, dropped, _ = read(written(tmp_path, name, content))
    assert rows == [[("a", "O"), ("b c", "B-x")], [("d", "O")]]
    assert not dropped


def test_columns_with_spaces(tmp_path):
    """Of CoNLL 2003: any number of them, chosen columns, lines that separate documents."""
    content = "-DOCSTART- -X- O O\n\nEU NNP  I-NP B-org\nrejects VBZ I-VP O\n"
    path = written(tmp_path, "x.txt", content)
    assert read(path)[0] == [[("EU", "B-org"), ("rejects", "O")]]
    assert read(path, Columns("1", None, "2"))[0] == [[("EU", "NNP"), ("rejects", "VBZ")]]


def test_a_hash_may_be_a_word(tmp_path):
    """A line that begins with it is a comment where it has no columns."""
    tabs = "# text = # 1\n#\tSYM\n#1\tNUM\n\n# another\nx\tX\n"
    assert read(written(tmp_path, "a.tsv", tabs))[0] == [
        [("#", "SYM"), ("#1", "NUM")],
        [("x", "X")],
    ]
    spaces = "# a comment line\n# O\n#x B-y\n"
    assert read(written(tmp_path, "b.conll", spaces))[0] == [[("#", "O"), ("#x", "B-y")]]


def test_conllu(tmp_path):
    """Form and UPOS are found; numbers of several words, or of none, are no words."""
    lines = ["# sent_id = 1", "1-2\tdon't\t_\t_", "1\tdo\tdo\tAUX", "2\tn't\tnot\tPART"]
    content = "\n".join([*lines, "2.1\tx\tx\tX", ""])
    assert read(written(tmp_path, "x.conllu", content))[0] == [[("do", "AUX"), ("n't", "PART")]]


def test_only_line_feeds_end_lines(tmp_path):
    """Others stand in words."""
    content = "a\u2028b\tO\n\x85\tO\n\u00a0\tB-x\n"
    rows, dropped, _ = read(written(tmp_path, "x.conll", content))
    assert rows == [[("a\u2028b", "O"), ("\x85", "O"), ("\u00a0", "B-x")]]
    assert not dropped


def test_sentences_that_cannot_be_used_are_dropped(tmp_path):
    """Each with the line of the mistake; the others stay."""
    content = "a\tO\nb\n\n\tO\n\nc\t \n\nd\tO\tO\n\ne\tO\n"
    rows, dropped, _ = read(path := written(tmp_path, "x.conll", content))
    assert rows == [[("e", "O")]]
    columns, empty = (
        "have a line with more or fewer columns than others",
        "have an empty word or tag",
    )
    want = [(2, columns), (4, empty), (6, empty), (8, columns)]
    assert dropped == [(f"{path}:{line}", why) for line, why in want]


@pytest.mark.parametrize(
    ("content", "columns", "part"),
    [
        ("word\n", Columns(), "x.conll:1: expected a word and its tag, got 1 column"),
        ("a\tO\n", Columns("3"), "x.conll:1: expected a column's number from 1 to 2, got '3'"),
        ("\n\na\tO\n", Columns("1", None, "tag"), "x.conll:3: expected a column's number"),
    ],
)
def test_columns_that_are_not_there(tmp_path, content, columns, part):
    with pytest.raises(InputError) as caught:
        read(written(tmp_path, "x.conll", content), columns)
    assert part in str(caught.value)


def test_json_of_words(tmp_path):
    """Under usual names or given ones; numbers are tags where they have names."""
    path = objects(
        tmp_path,
        {"id": 1, "tokens": ["a", "b"], "tags": ["O", " B-x "]},
        {"words": ["c"], "ner_tags": [1]},
    )
    assert read(path, names=("O", "B-x"))[0] == [[("a", "O"), ("b", "B-x")], [("c", "B-x")]]
    path = objects(tmp_path, {"w": {"x": ["a"]}, "y": ["O"], "tags": ["no"]})
    assert read(path, Columns("w.x", None, "y"))[0] == [[("a", "O")]]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ({"tokens": ["a"], "tags": [7]}, "got 7: name tags that are numbers with --labels"),
        ({"tokens": ["a"], "tags": [True]}, "got True"),
        ({"tokens": ["a"]}, "expected a list \"tags\", got keys ['tokens']"),
        ({"tokens": [1], "tags": ["O"]}, 'expected a list "tokens" of words'),
        ({"x": 1}, "got keys ['x']"),
        ({"text": "a b", "spans": {}}, 'expected a list "spans"'),
        ({"text": "a b", "spans": [[0, 1]]}, "got [0, 1]"),
        ({"text": "a b", "spans": [{"start": 0, "end": "1", "label": "x"}]}, "got [0, '1', 'x']"),
    ],
)
def test_json_that_says_something_else(tmp_path, line, part):
    """One line with the file's line stops the reading."""
    with pytest.raises(InputError) as caught:
        read(objects(tmp_path, line), names=("O", "B-x"))
    assert "x.jsonl:1: " in str(caught.value)
    assert part in str(caught.value)


def test_json_rows_that_do_not_fit(tmp_path):
    """Other counts of words and tags, empty words, no words."""
    path = objects(
        tmp_path,
        {"tokens": ["a", "b"], "tags": ["O"]},
        {"tokens": ["a", " "], "tags": ["O", "O"]},
        {"tokens": [], "tags": []},
        {"text": " ", "spans": []},
    )
    rows, dropped, _ = read(path)
    assert not rows
    empty = "have no words, or an empty one"
    whys = ["have more or fewer tags than words", empty, empty, empty]
    assert dropped == [(f"{path}:{n}", why) for n, why in enumerate(whys, 1)]


def test_spans_become_tags(tmp_path):
    """Of any form and order; those with blanks at their ends are trimmed and counted."""
    path = objects(
        tmp_path,
        {"text": "Ada L. saw Rome.", "spans": [[11, 15, "place"], [0, 6, "person"]]},
        {"text": "in Rome ", "entities": [{"start": 2, "end": 8, "label": "place"}]},
        {"text": "我在北京。", "label": [[2, 4, "place"]]},
    )
    rows, dropped, trimmed = read(path)
    assert [[tag for _, tag in row] for row in rows] == [
        ["B-person", "I-person", "I-person", "O", "B-place", "O"],
        ["O", "B-place"],
        ["O", "O", "B-place", "I-place", "O"],
    ]
    assert (dropped, trimmed) == ([], 1)


@pytest.mark.parametrize(
    ("spans", "part"),
    [
        ([[0, 2, "x"]], "inside a word"),
        ([[1, 3, "x"]], "inside a word"),
        ([[3, 4, "x"]], "or is blank"),
        ([[4, 9, "x"]], "outside of the text"),
        ([[-3, 3, "x"]], "outside of the text"),
        ([[3, 3, "x"]], "or empty"),
        ([[0, 7, "x"], [4, 7, "y"]], "overlap"),
        ([[0, 3, "x"], [0, 3, "x"]], "overlap"),
    ],
)
def test_spans_that_fit_no_words(tmp_path, spans, part):
    """The sentence is dropped: without them its tags would be wrong."""
    path = objects(tmp_path, {"text": "Ada saw", "spans": spans})
    rows, [(where, why)], _ = read(path)
    assert (rows, where) == ([], f"{path}:1")
    assert part in why


TEXT = st.text(st.sampled_from("ab,. \u00a0\u3000\t北京é\u0301\U0001f600_-\x01"), max_size=20)


@settings(max_examples=50)
@given(TEXT)
def test_words_are_where_they_say(text):
    """They lie in the text at their starts, in order, and hold all of it that is not blank; blanks
    before them are known."""
    row = of_text(text, 1)
    at = 0
    for word, begin, spaced in zip(row.words, row.starts, row.spaced(), strict=True):
        assert text[begin : begin + len(word)] == word
        assert not text[at:begin].strip()
        assert spaced == (begin > at)
        at = begin + len(word)
    assert not text[at:].strip()


def test_words_of_a_text():
    """Around punctuation and ideograms, not inside of words."""
    assert of_text("U.S. naïve 北京人, x_y", 1).words == (
        *("U", ".", "S", ".", "naïve", "北", "京", "人", ",", "x", "_", "y"),
    )


def test_what_is_to_be_predicted_needs_no_tags(tmp_path):
    """And nothing is dropped: words of columns, of JSON, texts of JSON, lines of a .txt."""
    columns, _, _ = read(written(tmp_path, "x.conll", "a\nb\n\nc\n"), labelled=False)
    assert [row.words for row in columns] == [("a", "b"), ("c",)]
    lines, _, _ = read(written(tmp_path, "x.txt", "a b\n\nc"), labelled=False)
    assert [row.text for row in lines] == ["a b", "", "c"]
    found, _, _ = read(objects(tmp_path, {"tokens": ["a b"]}, {"text": ""}), labelled=False)
    assert [row.words for row in found] == [("a b",), ()]


def test_a_folder_is_read_in_order(tmp_path):
    """Its JSON, else its columns; not a test beside what is trained on."""
    written(tmp_path, "b.conll", "b\tO\n")
    written(tmp_path, "a.conll", "a\tO\n")
    assert read(tmp_path)[0] == [[("a", "O")], [("b", "O")]]
    written(tmp_path, "test.conll", "b\tO\n")
    written(tmp_path, "train.conll", "b\tO\n")
    with pytest.raises(InputError, match="files of one data set"):
        read(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not beside the repository")
@pytest.mark.parametrize(
    ("name", "sentences", "words"),
    [
        ("wnut17/wnut17train.conll", 3394, 62730),
        ("wnut17/emerging.test.annotated", 1287, 23394),
        ("ud_english_ewt/pos.dev.tsv", 2001, 25147),
    ],
)
def test_real_files(name, sentences, words):
    """As many sentences and words as their sources tell, and nothing is dropped."""
    rows, dropped, _ = read(SHARED / name)
    assert (len(rows), sum(map(len, rows)), dropped) == (sentences, words, [])


def test_sentences_have_the_ids_of_their_objects(tmp_path):
    """By a usual name, or the one that is given; not all need one."""
    path = objects(tmp_path, {"ID": 7, "key": "k", "text": "a"}, {"tokens": ["a"], "tags": ["O"]})
    for columns, ids in ((Columns(), ["7", None]), (Columns(id="key"), ["k", None])):
        how = Reading(lambda where, why: None, labelled=False)
        assert [row.id for row in read_tagged(str(path), columns, how)] == ids
