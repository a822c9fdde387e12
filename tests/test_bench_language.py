"""bench/language.py and turns.py: both trainers take the same steps, turn by turn."""

import argparse
import json
import os
import random
import re
from pathlib import Path

import bench_package  # noqa: F401
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench import language, turns
from bench.language import CASES, Trainer, peer_row, settings_of, summarise, take_turns
from bench.turns import Collator, Turns
from minift import Example

WORDS = "the king of all my lords will speak no more to night and love is lost in this".split()
TASKS = ("lm", "instruct")


def text(n: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(n))


def arguments(data: Path | None, **others) -> argparse.Namespace:
    known = {"data": data, "turns": 2, "turn_steps": 2, "seeds": [0], "threads": 1, "out": None}
    return argparse.Namespace(**known | others)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, float]]:
    """Of each task: its folders of a tiny model by the dropout, and the reference loss."""
    made = tmp_path_factory.mktemp("language")
    for case in CASES.values():
        (made / case.file).parent.mkdir()
    (made / CASES["lm"].file).write_text(text(6000, 0))
    lines = [f'"{text(2 + i % 9, i)}","{text(2 + i % 7, -i)}"' for i in range(300)]
    (made / CASES["instruct"].file).write_text("\n".join(["mr,ref", *lines]) + "\n")
    sizes = {"layers": 2, "width": 32, "heads": 2, "vocab": 300, "positions": 32}
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "SIZES", sizes)
        for task, case in CASES.items():
            (made / task).mkdir()
            settings = settings_of(case, arguments(made))
            found[task] = made / task, language.write_case(case, settings, made / task)
    return found


def train(who: str, folder: Path, *more, orders=("1", "3")) -> list[dict]:
    """The reports of a trainer in this process."""
    reports: list[dict] = []
    run = {"minift": turns.train_minift, "transformers": turns.train_peer}[who]
    run(folder, *more, Turns(orders, reports.append))
    return reports


@pytest.mark.parametrize("task", TASKS)
def test_both_trainers_take_the_same_steps(folders, task):
    """Without dropout, in fp32: the same rows in each, the same losses all along, but for the last
    target of a block, which the Trainer's model leaves out."""
    pytest.importorskip("accelerate")
    folder, reference = folders[task]
    mine = train("minift", folder / "0.0", "fp32")
    theirs = train("transformers", folder / "0.0", "fp32", "random")
    assert [len(turn["losses"]) for turn in mine] == [1, 3]
    assert [turn["tokens"] for turn in mine] == [turn["tokens"] for turn in theirs]
    assert theirs[0]["begin_loss"] == pytest.approx(reference, rel=1e-5)
    assert theirs[0]["losses"][0] == pytest.approx(reference, rel=1e-5)
    assert "begin_loss" not in theirs[1]
    curves = [[loss for turn in reports for loss in turn["losses"]] for reports in (mine, theirs)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5 if task == "instruct" else 3e-3)
    assert min(curves[0]) < reference - 0.02
    for turn in mine + theirs:
        assert all(seconds > 0 for seconds in turn["seconds"])
        assert turn["peak_rss_mib"] > 100


def test_rows_of_the_best_trainer_are_the_same_by_their_length(folders):
    """Over all steps as many tokens as in minift's order; with dropout the losses differ, and bf16
    is near to fp32."""
    pytest.importorskip("accelerate")
    folder, reference = folders["instruct"]
    steps = json.loads((folder / "0.1" / "run.json").read_text())["config"]["max_steps"]
    (mine,) = train("minift", folder / "0.1", "bf16", orders=[steps])
    (best,) = train("transformers", folder / "0.1", "bf16", "grouped", orders=[steps])
    assert sum(mine["tokens"]) == sum(best["tokens"])
    assert mine["tokens"] != best["tokens"]
    assert mine["losses"][0] != pytest.approx(reference, rel=1e-4)
    assert mine["losses"][0] == pytest.approx(reference, rel=2e-2)
    assert best["losses"][0] == pytest.approx(reference, rel=2e-2)


def test_labels_are_of_the_tokens_themselves(monkeypatch):
    """A record ends with its last target; a block that is full has no room for it."""
    monkeypatch.setattr(language, "SIZES", {"positions": 4})
    record = Example(np.array([5, 6, 7]), (), [-100, 7, 2])
    assert peer_row(record) == {
        "input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2], "tokens": 3,
    }  # fmt: skip
    block = Example(np.array([1, 2, 3, 4]), (), np.array([2, 3, 4, 5]))
    assert peer_row(block) == {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "tokens": 4}


def test_padding_is_no_target_and_is_not_counted():
    collate = Collator(pad=9)
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "tokens": 2},
            {"input_ids": [4, 5], "labels": [-100, 5], "tokens": 1}]  # fmt: skip
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert "attention_mask" not in collate(rows[:1])
    assert collate.counts == [3, 2]


def test_data_that_is_not_there_is_told(tmp_path):
    for data in (None, tmp_path):
        with pytest.raises(SystemExit, match=r"expected --data DIR with e2e_nlg/devset\.csv"):
            settings_of(CASES["instruct"], arguments(data))


def test_a_process_takes_turns_and_says_why_it_failed(folders):
    """minift's, two turns, and a third that is no number: the end of its log is shown."""
    folder, reference = folders["instruct"]
    trainer = Trainer("minift", folder / "0.0", CASES["instruct"], threads=1)
    try:
        first, second = trainer.turn(1), trainer.turn(2)
        with pytest.raises(SystemExit, match=r"minift failed:[\s\S]*ValueError.*'many"):
            trainer.turn("many")
    finally:
        trainer.end()
    assert first["losses"][0] == pytest.approx(reference, rel=2e-3)
    assert [len(turn["seconds"]) for turn in (first, second)] == [1, 2]


class Fake:
    """Steps of 100 tokens a `rate`."""

    order = "random"

    def __init__(self, name: str, dtype: str, rate: float, begin: float, log: list):
        self.name, self.dtype, self.rate, self.begin, self.log = name, dtype, rate, begin, log

    def turn(self, steps: int) -> dict:
        self.log.append((self.name, steps))
        facts = {"tokens": [100] * steps, "seconds": [100 / self.rate] * steps}
        facts |= {"losses": [self.begin] * steps, "cpu_seconds": 0.0, "peak_rss_mib": 500.0}
        peer = {"trainer": "transformers 5.23.0", "begin_loss": self.begin}
        return facts if self.name == "minift" else facts | peer


def documented() -> set[str]:
    """The keys that the head of bench/language.py explains."""
    lines = re.findall(r"^    ([a-z_]+(?:, [a-z_]+)*)(?:  .*)?$", language.__doc__, re.MULTILINE)
    return {word for line in lines for word in line.split(", ")}


def test_rows_are_of_turns_that_are_taken_in_turn(tmp_path, capsys):
    """The first warms up; a trainer that begins elsewhere is told; rows hold what is documented."""
    log: list = []
    trainers = [Fake("minift", "bf16", 300.0, 6.001, log), Fake("best", "bf16", 200.0, 6.0, log)]
    trainers.append(Fake("default", "fp32", 100.0, 6.01, log))
    out = tmp_path / "rows.jsonl"
    rows = take_turns(trainers, CASES["lm"], 0.0, 6.0, arguments(tmp_path, out=out))
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    names = ["minift", "best", "default"]
    assert log == [(n, language.WARM_UP) for n in names] + [(n, 2) for n in names * 2]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([300, 200, 100] * 2)
    assert [row["begin"]["passed"] for row in rows] == [True, True, False] * 2
    assert {key for row in rows for key in row} == documented()
    summary = summarise(rows)
    assert summary["begin_alike"] is False
    assert summary["dropout 0.0"]["minift bf16"] == pytest.approx(300)
    assert summary["dropout 0.0"]["ratio_to_transformers_bf16"] == pytest.approx(1.5)
    assert summary["dropout 0.0"]["ratio_to_transformers_fp32"] == pytest.approx(3)


def test_with_dropout_minift_has_no_loss_to_compare(tmp_path, capsys):
    trainers = [Fake("minift", "bf16", 300.0, 7.0, [])]
    rows = take_turns(trainers, CASES["lm"], 0.1, 6.0, arguments(tmp_path, out=tmp_path / "rows"))
    assert rows[0]["begin"] == {"loss": None, "reference": 6.0, "passed": None}
    assert summarise(rows)["begin_alike"] is True
