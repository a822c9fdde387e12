"""What all tasks share: rows that are left out are counted, named and limited."""

import pytest

from minift.config import RunConfig
from minift.errors import InputError
from minift.tasks.task import File


def file_of(limit: float) -> File:
    return File(RunConfig(max_dropped=limit), "train", "t.csv")


def test_what_is_left_out_is_told_by_reason_with_places():
    """The commonest reason first, three places of each; nothing is told twice."""
    file = file_of(0.5)
    for line in (2, 3, 5, 8):
        file.drop(f"t.csv:{line}", "have no label")
    file.drop("t.csv:4", "have no text")
    (notice,) = file.tell(95)
    assert notice.loud
    assert notice.text == (
        "train: 5 of 100 rows cannot be used: 4 have no label (t.csv:2, t.csv:3, t.csv:5, ...); "
        "1 have no text (t.csv:4); they are left out"
    )
    assert list(file.tell(95)) == []


def test_more_than_the_limit_stops_the_run():
    """All that were left out of a file count together, however often it was told of them."""
    file = file_of(0.1)
    file.drop("t.csv:2", "have no label")
    assert len(list(file.tell(9))) == 1
    file.drop("t.csv:3", "have a tag too many")
    with pytest.raises(InputError, match=r"^t.csv: 1 of 10 rows .* more than --max_dropped 0.1$"):
        list(file.tell(8))


def test_no_row_left_stops_the_run_whatever_the_limit():
    file = file_of(0.99)
    file.drop("t.csv:1", "have no text")
    with pytest.raises(InputError, match=r"none is left$"):
        list(file.tell(0))
