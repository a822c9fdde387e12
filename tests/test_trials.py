"""Runs of several seeds: each as by itself, their means, what is kept when some fail or stop."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import assert_one_line, call, contents, settings_kept, tiny_model, words, write_rows

from minift import InputError, RunConfig, Step, TrainConfig, fine_tune, fine_tune_seeds, trials
from minift.bert import BertClassifier
from minift.train import Diverged
from minift.trials import Begun, Ended, align, best_of, summary_of

SHORT = ("--max_steps", 2, "--eval_steps", 1, "--seed", 5)


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.csv", 40)
    write_rows(folder / "validation.jsonl", 10)
    return folder


@pytest.fixture
def given(model, data, tmp_path):
    """Two seeds of four steps, from Python."""
    files = (str(data / "train.csv"), str(data / "validation.jsonl"))
    run = RunConfig(str(model), *files, output_dir=str(tmp_path / "set"), threads=1, seeds=2)
    run = replace(run, eval_steps=2)
    return run, TrainConfig(max_steps=4, seed=5, learning_rate=5e-3, per_device_train_batch_size=8)


def weights(folder):
    """The bits of the models below a folder, those in checkpoints too."""
    return {n: b for n, b in contents(folder).items() if n.endswith(".safetensors")}


def test_a_seed_of_a_set_is_the_seed_alone(capsys, model, data, tmp_path):
    """The same weights and moments, bit for bit; and the numbers of the set are those of its runs,
    by numpy."""
    result = call(capsys, *words(model, data, tmp_path / "set", *SHORT, "--seeds", 3))
    assert result.status == 0, result.err
    single = words(model, data, tmp_path / "one", *SHORT[:-1], 6, "--quiet")
    assert call(capsys, *single).status == 0
    assert weights(tmp_path / "set" / "seed-6") == weights(tmp_path / "one")
    assert weights(tmp_path / "set" / "seed-7") != weights(tmp_path / "one")
    runs = [summary_of(tmp_path / "set" / f"seed-{s}") for s in (5, 6, 7)]
    for name in ("eval_loss", "eval_accuracy", "eval_f1/pos"):
        values = [run[name] for run in runs]
        assert result.summary[f"{name}_mean"] == pytest.approx(np.mean(values), rel=1e-12)
        std = np.std(values, ddof=1)
        assert result.summary[f"{name}_std"] == pytest.approx(std, rel=1e-9, abs=1e-15)
    assert result.summary["seeds"] == [5, 6, 7]
    best = max((5, 6, 7), key=lambda s: runs[s - 5]["eval_accuracy"])
    assert result.summary["best_seed"] == best
    assert result.summary["output_dirs"] == [str(tmp_path / f"set/seed-{s}") for s in (5, 6, 7)]
    saved = json.loads((tmp_path / "set" / "seeds.json").read_text())
    assert saved["summary"] == result.summary
    assert [run["name"] for run in saved["runs"]] == ["seed-5", "seed-6", "seed-7"]
    *_, head, a, b, c, mean, std = result.err.splitlines()
    assert head.split()[:2] == ["seed", "accuracy"]
    assert [line.split()[0] for line in (a, b, c, mean, std)] == ["5", "6", "7", "mean", "std"]


def test_an_interrupted_set_goes_on(given, tmp_path):
    """Stopped in the second seed: the first is not run again, the second goes on after its
    checkpoint, and all has the bits of a set that was not stopped."""
    run, config = given
    list(fine_tune_seeds(run, config))
    whole = shutil.move(tmp_path / "set", tmp_path / "whole")
    stopped = fine_tune_seeds(run, config)
    steps = 0
    for event in stopped:
        steps += isinstance(event, Step)
        if steps == 4 + 3:
            break
    stopped.close()
    *events, done = fine_tune_seeds(replace(run, resume_from_checkpoint="auto"), config)
    assert [e.index for e in events if isinstance(e, Step)] == [3, 4]
    assert weights(tmp_path / "set") == weights(whole)
    assert done.summary["finished"] == 2


def test_other_settings_are_refused(given):
    """As a single run does, for seeds that have finished too; nothing is deleted."""
    run, config = given
    list(fine_tune_seeds(run, config))
    with pytest.raises(InputError, match="is there already and not empty"):
        list(fine_tune_seeds(run, config))
    again = replace(run, resume_from_checkpoint="auto")
    with pytest.raises(InputError, match=r"seed-5: is of another run: learning_rate was 0.005"):
        list(fine_tune_seeds(again, replace(config, learning_rate=1e-3)))
    more = list(fine_tune_seeds(replace(again, seeds=3), config))  # a larger set is the same set
    assert sum(isinstance(e, Step) for e in more) == 4
    with pytest.raises(InputError, match="expected seeds 1 of one run, got 2"):
        list(fine_tune(run, config))


def test_a_seed_that_fails_is_counted(given, monkeypatch):
    """Diverged, or without memory: the others go on; one that has diverged is not tried again."""
    run, config = given
    tried = []

    def failing(run, config):
        tried.append(config.seed)
        for event in fine_tune(run, config):
            yield event
            if isinstance(event, Step) and config.seed == 6:
                raise Diverged("step 1: loss nan")
            if isinstance(event, Step) and config.seed == 7:
                raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(trials, "fine_tune", failing)
    *events, done = fine_tune_seeds(replace(run, seeds=4), config)
    ended = {e.name: (e.status, e.why) for e in events if isinstance(e, Ended)}
    assert ended["seed-6"] == ("diverged", "step 1: loss nan")
    assert ended["seed-7"] == ("out of memory", "no memory")
    assert (done.summary["finished"], done.summary["failed"]) == (2, [6, 7])
    assert "diverged" in done.table
    assert tried == [5, 6, 7, 8]
    tried.clear()
    *_, again = fine_tune_seeds(replace(run, seeds=4, resume_from_checkpoint="auto"), config)
    assert tried == [7]
    assert again.summary["eval_loss_mean"] == done.summary["eval_loss_mean"]


def test_models_of_earlier_seeds_are_freed(given):
    """While a seed trains there is one model in memory."""

    def models():
        return sum(type(thing) is BertClassifier for thing in gc.get_objects())

    gc.collect()
    before, seen = models(), []
    for event in fine_tune_seeds(*given):
        if isinstance(event, Begun):
            seen.append(models() - before)
    assert seen == [0, 0]


def test_one_line_errors(capsys, model, data, tmp_path):
    """What is wrong for all seeds is said once, and nothing is written."""
    output = tmp_path / "set"
    for more, parts in (
        (("--train", "no.csv"), ("no.csv: expected a file",)),
        (("--resume_from_checkpoint", "x"), ("auto with --seeds, got 'x'",)),
        (("--seed", 2**63 - 1), ("expected seed between",)),
    ):
        result = call(capsys, *words(model, data, output, "--seeds", 2, "--quiet", *more))
        assert_one_line(result, *parts)
        assert not output.exists()


def test_own_validation_rows_are_warned_of(given):
    run, config = given
    events = fine_tune_seeds(replace(run, validation_file=""), config)
    assert next(events).text.startswith("every seed draws its own validation rows")


def test_the_best_and_the_table():
    """Direction, missing values, ties; columns to the right."""
    assert best_of({"a": 1.0, "b": None, "c": 2.0, "d": 2.0}, "accuracy") == "c"
    assert best_of({"a": 1.0, "b": None, "c": 2.0}, "loss") == "a"
    assert best_of({"b": None}, "loss") is None
    assert align([["a", "bbb"], ["cc", "1"]]) == "a   bbb\ncc    1"


def test_a_torn_last_line_is_no_summary(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "output_dir": "x"}')
    assert summary_of(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "output_dir": "x"}\n')
    assert summary_of(tmp_path) == {"output_dir": "x"}


def test_a_set_of_fewer_seeds_overwrites_all_of_a_larger_one(given):
    """Else a later set that goes on would take the seed that was left for its own; a folder that
    is no run's stays."""
    run, _ = given
    output = Path(run.output_dir)
    for folder in ("seed-9", "seed-mine"):
        (output / folder).mkdir(parents=True)
    (output / "seed-9" / "run.json").write_text("{}")
    trials.check_output(replace(run, resume_from_checkpoint="auto"))
    assert (output / "seed-9").is_dir()
    with pytest.raises(InputError, match="is there already"):
        trials.check_output(run)
    trials.check_output(replace(run, overwrite_output_dir=True))
    assert [path.name for path in output.iterdir()] == ["seed-mine"]
