"""Searches: which trials there are, what is left when one is killed, and which is the best."""

import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given as examples
from hypothesis import settings as budget
from hypothesis import strategies as st
from test_trials import data, model, weights  # noqa: F401, the fixtures
from tiny import assert_one_line, call, settings_kept

from minift import InputError, RunConfig, SearchConfig, Step, TrainConfig, search
from minift.search import draw
from minift.trials import Ended

TOML = """
model = "{model}"
train = "{data}/train.csv"
validation = "{data}/validation.jsonl"
threads = 1
batch_size = 8
max_steps = 2
"""
RATES = [1e-4, 1e-2]


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


@pytest.fixture
def run(model, data, tmp_path):  # noqa: F811
    """What trials share, from Python."""
    files = (str(data / "train.csv"), str(data / "validation.jsonl"))
    return RunConfig(str(model), *files, output_dir=str(tmp_path / "out"), threads=1, eval_steps=1)


@pytest.fixture
def minift_search(capsys, model, data, tmp_path):  # noqa: F811
    """Runs `minift search` with a table [search], into tmp_path/out."""

    def minift_search(table, *more):
        text = TOML.format(model=model, data=data) + table
        (tmp_path / "s.toml").write_text(text, encoding="utf-8")
        words = ("--config", tmp_path / "s.toml", "--output", tmp_path / "out", *more)
        return call(capsys, "search", *words)

    return minift_search


CONFIG = TrainConfig(max_steps=2, per_device_train_batch_size=8)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_a_grid_is_all_combinations_in_order():
    """The last name changes fastest: a value appended to the first keeps the trials before it."""
    space = {"lr": [1e-3, 1], "warmup-steps": [0, 5], "method": ["full", "bitfit"]}
    settings = SearchConfig(space).settings()
    assert settings[0] == {"learning_rate": 1e-3, "warmup_steps": 0.0, "method": "full"}
    assert [tuple(s.values()) for s in settings[:3]] == [
        (1e-3, 0, "full"), (1e-3, 0, "bitfit"), (1e-3, 5, "full"),
    ]  # fmt: skip
    assert len(settings) == 8
    more = SearchConfig(space | {"lr": [1e-3, 1, 2]}).settings()
    assert more[:8] == settings


@budget(max_examples=30)
@examples(
    st.floats(1e-8, 1e2), st.floats(1.5, 1e6), st.integers(1, 50), st.integers(1, 9), st.integers()
)
def test_draws_are_inside_their_ranges(low, factor, whole, more, key):
    """Ends of whole numbers included; the same key draws the same."""
    for log in (False, True):
        real = {"low": low, "high": low * factor, "log": log}
        assert low <= draw(real, key) <= low * factor
        value = draw({"low": whole, "high": whole + more, "log": log}, key)
        assert type(value) is int
        assert whole <= value <= whole + more
        assert draw(real, key) == draw(real, key)


def test_draws_are_spread_as_they_should_be():
    """Uniform in the value, or in its logarithm: the Kolmogorov distance of 2,000 draws from the
    straight line is below 0.04 (1 in 300 by chance, and the draws are always the same); whole
    numbers by their counts."""
    n = 2000
    for low, high, log in ((1.0, 3.0, False), (1e-6, 1e-2, True)):
        scale = math.log if log else float
        ends = scale(low), scale(high)
        drawn = [draw({"low": low, "high": high, "log": log}, f"0 {i} x") for i in range(n)]
        shares = sorted((scale(v) - ends[0]) / (ends[1] - ends[0]) for v in drawn)
        assert max(abs(s - (i + 0.5) / n) for i, s in enumerate(shares)) < 0.04
    for log in (False, True):
        drawn = [draw({"low": 1, "high": 3, "log": log}, f"0 {i} x") for i in range(n)]
        for k in (1, 2, 3):
            share = math.log((k + 1) / k) / math.log(4) if log else 1 / 3
            assert drawn.count(k) / n == pytest.approx(share, abs=0.04)
    drawn = [draw(["a", "b"], f"0 {i} x") for i in range(n)]
    assert drawn.count("a") / n == pytest.approx(0.5, abs=0.04)


def test_a_larger_search_keeps_its_trials():
    """A draw is a function of the seed, the trial and the name."""
    space = {"lr": {"low": 1e-6, "high": 1e-3, "log": True}, "seed": {"low": 0, "high": 99}}
    few = SearchConfig(space, "random", 5).settings()
    assert SearchConfig(space, "random", 9).settings()[:5] == few
    assert SearchConfig(space, "random", 5, seed=1).settings() != few
    assert len({s["learning_rate"] for s in few}) == 5
    alone = SearchConfig({"seed": space["seed"]}, "random", 5).settings()
    assert [s["seed"] for s in alone] == [s["seed"] for s in few]


def test_a_search_from_the_command_line(capsys, minift_search, tmp_path):
    """The best stands first, only its model is kept, and its command repeats it, to the same
    bits; --show says the same."""
    result = minift_search("[search]\nlr = [1e-4, 1e-2]\n", "--metric_for_best_model", "loss")
    assert result.status == 0, result.err
    lines = lines_of(tmp_path / "out")
    assert [line["settings"]["learning_rate"] for line in lines] == [1e-4, 1e-2]
    values = {line["trial"]: line["metrics"]["eval_loss"] for line in lines}
    best = min(values, key=values.get)
    assert (result.summary["best_trial"], result.summary["best_value"]) == (best, values[best])
    shown = re.findall(r"^trial-\d+", result.err, re.MULTILINE)
    assert shown == sorted(values, key=values.get)
    left = {name.split("/")[0] for name in weights(tmp_path / "out")}
    assert left == {best}
    assert all((tmp_path / "out" / name / "metrics.jsonl").is_file() for name in values)
    again = minift_search("[search]\nlr = [1e-4, 1e-2]\n", "--metric_for_best_model", "loss",
                          "--show")  # fmt: skip
    assert (again.status, again.summary) == (0, result.summary)
    repeat = shlex.split(result.summary["best_command"])
    assert repeat[:2] == ["minift", "train"]
    assert call(capsys, *repeat[1:], "--quiet").status == 0
    assert weights(tmp_path / "out" / "best") == weights(tmp_path / "out" / best)


def test_a_killed_search_goes_on(run, tmp_path):
    """Stopped in the second trial: the first is not repeated, the second goes on after its
    checkpoint to the bits of a search that was not stopped."""
    space, config = SearchConfig({"learning_rate": RATES}, keep="all"), replace(CONFIG, max_steps=3)
    *_, whole = search(space, run, config)
    expected = Path(shutil.move(tmp_path / "out", tmp_path / "whole"))
    stopped, steps = search(space, run, config), 0
    for event in stopped:
        steps += isinstance(event, Step)
        if steps == 3 + 3:
            break
    stopped.close()
    assert len(lines_of(tmp_path / "out")) == 1
    *events, done = search(space, run, config)
    assert [e.index for e in events if isinstance(e, Step)] == [3]
    assert done.summary == whole.summary
    assert weights(tmp_path / "out") == weights(expected)
    *events, _ = search(space, run, config)
    assert not [e for e in events if isinstance(e, Step)]
    with pytest.raises(InputError, match="trial-001: is of another run: max_steps was 3, is 4"):
        list(search(space, run, replace(config, max_steps=4)))
    with pytest.raises(
        InputError, match=r"trials.jsonl:1: trial-001 was learning_rate 0.0001, is now"
    ):
        list(search(SearchConfig({"learning_rate": [1e-3]}), run, config))


def test_a_trial_that_is_refused_is_a_line(run, tmp_path):
    """What only a model can tell; what no trial can help is said once, as an error."""
    space = SearchConfig({"max_seq_length": [16, 999]})
    *events, done = search(space, run, CONFIG)
    ended = [e for e in events if isinstance(e, Ended)]
    assert [e.status for e in ended] == ["finished", "refused"]
    assert "999 is more than the model's 32 positions" in ended[1].why
    assert lines_of(tmp_path / "out")[1]["status"] == "refused"
    assert done.table.splitlines()[2].split() == ["trial-002", "999", "refused"]
    other = replace(run, train_file="no.csv", output_dir=str(tmp_path / "no"))
    with pytest.raises(InputError, match=r"no.csv: expected a file"):
        list(search(space, other, CONFIG))


def test_seeds_of_a_trial(minift_search, tmp_path):
    """A trial of two seeds is measured by their mean."""
    result = minift_search("[search]\nlr = [1e-2]\nseeds = 2\n", "--quiet")
    assert result.status == 0, result.err
    runs = [
        json.loads((tmp_path / f"out/trial-001/seed-{s}/metrics.jsonl").read_text().split("\n")[-2])
        for s in (0, 1)
    ]
    mean = sum(run["eval_accuracy"] for run in runs) / 2
    assert result.summary["best_value"] == pytest.approx(mean)
    assert "--seeds 2" in result.summary["best_command"]


@pytest.mark.parametrize(
    ("table", "more", "parts"),
    [
        ("", (), ("s.toml: expected a table [search], got none",)),
        ("[search]\n", (), ("expected settings to search in [search], got none",)),
        ("[search]\nlerning_rate = [1.0]\n", (), ("did you mean 'learning_rate'?",)),
        ("[search]\nlr = 1.0\n", (), ("lr: expected a list of values, got 1.0",)),
        ("[search]\nlr = ['x']\n", (), ("[search] expected lr as float, got 'x'",)),
        ("[search]\nlr = []\n", (), ("[search] lr: expected a list of values or {low",)),
        ("[search]\nlr = {low = 1.0, high = 2.0}\n", (), ("a range needs method",)),
        ("[search]\nmethod = 'random'\nlr = {low = 0.0, high = 1.0, log = true}\n", (),
         ("expected numbers low < high, above 0 for log",)),
        ("[search]\nmethod = 'rndom'\nlr = [1.0]\n", (), ("expected method grid or random",)),
        ("[search]\nlr = [1.0]\ntrials = 5\n", (), ("a grid has as many as",)),
        ("[search]\nlr = [1.0]\noutput_dir = ['x']\n", (), ("output_dir: is the same in all",)),
        ("[search]\nlr = [1e-3, -1.0]\n", (), ("trial-002 (learning_rate -1): expected learn",)),
        ("[search]\nmlm_probability = [0.2]\n", (), ("--mlm_probability is not read by --task",)),
        ("[search]\nlr = [1.0]\n", ("--lr", 1), ("learning_rate is searched and given",)),
        ("[search]\nlr = [1.0]\n", ("--overwrite_output_dir",), ("goes on in its folder",)),
        ("[search]\nlr = [1.0]\n", ("--show",), ("expected trials that have ended, found none",)),
    ],
)  # fmt: skip
def test_one_line_errors(minift_search, tmp_path, table, more, parts):
    """Before anything is run or written."""
    assert_one_line(minift_search(table, "--quiet", *more), *parts)
    assert not (tmp_path / "out").exists()


def test_another_folder_is_left_alone(minift_search, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    result = minift_search("[search]\nlr = [1.0]\n")
    assert_one_line(result, "is there already and no search's: choose another folder")
