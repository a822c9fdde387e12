"""Templates take fields by name, and say what is wrong with one."""

import pytest

from minift.errors import InputError
from minift.records import Record
from minift.templates import Template

RECORD = Record(
    {"en": "hello", "zh": "你好", "n": 3, "none": None, "deep": {"x": ["y"]}}, 7, "a.csv"
)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("English: {en}\nChinese: ", "English: hello\nChinese: "),
        ("{en}{zh}", "hello你好"),
        ("{{{n}}} {none}.", "{3} ."),
        ("{deep.x.0}", "y"),
        ("no field", "no field"),
        (r"{en}\n\t{zh}", "hello\n\t你好"),
        ("", ""),
    ],
)
def test_fields_stand_where_they_are_named(text, filled):
    """Names, doubled braces, numbers, null and paths."""
    assert Template(text, "prompt_template").fill(RECORD) == filled


def test_names_are_known_before_any_record_is_read():
    """They say whether a table has a header."""
    assert Template("{2} of {1}", "prompt_template").names == ["2", "1"]


@pytest.mark.parametrize("text", ["{en", "en}", "{}", "{en!r}", "{en:>5}"])
def test_what_is_no_template(text):
    """The flag and the text are in the message."""
    with pytest.raises(InputError, match="prompt_template") as caught:
        Template(text, "prompt_template")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{eng}", ("a.csv:7", "'eng'", "did you mean 'en'?", "en, zh")),
        ("{deep}", ("'deep'", "dict")),
    ],
)
def test_what_a_record_does_not_have(text, parts):
    """File, line, the missing name and the nearest one."""
    with pytest.raises(InputError) as caught:
        Template(text, "response_template").fill(RECORD)
    for part in parts:
        assert part in str(caught.value)
