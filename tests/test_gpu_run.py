"""bench/gpu.py: every part runs whatever becomes of the others, in the time that there is."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import bench_package
import pytest
import torch

from bench import gpu
from bench.gpu import Part, Result, parts, report, run_part, run_parts, share_out, tail

ROOT = bench_package.ROOT


def python(code: str, **facts) -> Part:
    return Part([sys.executable, "-c", code], {}, **facts)


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """Each has its log, and its line in gpu.jsonl; the report shows the ends of the bad logs."""
    made = {
        "compile": python("print('one'); print('two'); raise SystemExit(3)"),
        "ceilings": Part([], {}, "no such machine"),
        "smoke": python("import time; print('waiting', flush=True); time.sleep(60)"),
        "kernels": python("print('fine')"),
    }
    monkeypatch.setattr(gpu, "parts", lambda *args: made)
    monkeypatch.setattr(gpu, "SHARES", {"compile": 0.3, "ceilings": 0, "smoke": 0.2, "kernels": 1})
    results = run_parts(list(made), "cpu", tmp_path, 6.0)
    assert [r.status for r in results] == ["failed", "skipped", "timed out", "ok"]
    assert [r.code for r in results] == [3, None, None, 0]
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == list(made)
    assert (tmp_path / "kernels.log").read_text() == "fine\n"
    assert "compile: failed" in capsys.readouterr().out
    text = report(results, tmp_path)
    for words in ("no such machine", "compile failed", "one\ntwo", "smoke timed out", "waiting"):
        assert words in text
    assert "kernels failed" not in text


@pytest.mark.parametrize("waits", [True, False], ids=["timed out", "ok"])
def test_what_a_part_started_ends_with_it(waits, tmp_path):
    """A process in a group of its own, that would write a file a second later."""
    late = tmp_path / "late"
    child = f"import time; time.sleep(1.5); open({str(late)!r}, 'w')"
    code = f"""if True:
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", {child!r}], process_group=0)
        time.sleep(60 * {waits})"""
    result = run_part("smoke", python(code), 0.5 if waits else 60, tmp_path)
    assert result.status == ("timed out" if waits else "ok")
    time.sleep(1.6)
    assert not late.exists()


def test_time_that_a_part_leaves_goes_to_those_after_it():
    everything = share_out(list(gpu.SHARES), 540)
    assert sum(everything.values()) == pytest.approx(540)
    later = share_out(["tests", "kernels"], 500)
    assert later["tests"] > everything["tests"]
    assert later["tests"] + later["kernels"] == pytest.approx(500)
    assert share_out([], 500)["finetune"] == 0.0


def test_interpreted_kernels_are_not_run_by_accident(tmp_path, monkeypatch):
    """Triton's switch of the tests does not reach a part, unless it sets it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    part = python("import os; print(os.environ.get('TRITON_INTERPRET'))")
    assert run_part("smoke", part, 60, tmp_path).last == "None"
    asked = Part(part.command, {"TRITON_INTERPRET": "1"})
    assert run_part("tune", asked, 60, tmp_path).last == "1"


def commands(tmp_path) -> dict[str, Part]:
    return parts("cuda", tmp_path, tmp_path, share_out(list(gpu.SHARES), 540))


def test_tiles_are_tried_in_the_time_that_is_left(tmp_path):
    """Next to nothing is set aside for it; when its turn comes it has all, or is skipped."""
    names = list(gpu.SHARES)
    left = names[names.index("tune") :]
    assert names.index("tune") > names.index("kernels")
    assert share_out(names, 540)["tune"] < 20
    assert share_out(left, 100)["tune"] == 100
    for seconds, reason in ((100, ""), (20, "no time is left")):
        tune = parts("cuda", tmp_path, tmp_path, share_out(left, seconds))["tune"]
        assert tune.skipped == reason
    assert float(tune.command[tune.command.index("--minutes") + 1]) * 60 < 20


def test_operations_are_chosen_for_all_that_is_timed(tmp_path):
    made = parts("cuda", tmp_path, tmp_path, share_out(list(gpu.SHARES), 540), ["attention"])
    for name in ("smoke", "kernels"):
        command = made[name].command
        assert command[command.index("--op") + 1] == "attention"
    assert "--op" not in commands(tmp_path)["kernels"].command


def test_in_the_tests_minift_is_found_and_no_folder_kernels(tmp_path):
    """As their process would see it, from the root of the checkout."""
    (tmp_path / "minift").symlink_to(ROOT / "minift")
    part = commands(tmp_path)["tests"]
    assert part.command[:4] == [sys.executable, "-P", "-m", "pytest"]
    code = "import importlib.util as u; print(u.find_spec('kernels'), u.find_spec('minift').origin)"
    environment = {**os.environ, **part.environment}
    done = subprocess.run(
        [*part.command[:2], "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[0] == "None"
    assert done.stdout.split()[1].startswith(str(tmp_path))


def test_tests_of_kernels_are_chosen_by_name(tmp_path):
    files = [word for word in commands(tmp_path)["tests"].command if word.startswith("tests/")]
    assert {"tests/test_adamw.py", "tests/test_blocks.py", "tests/test_measure.py"} <= set(files)
    assert "tests/test_commands.py" not in files  # needs what such a machine may lack
    assert all((ROOT / file).is_file() for file in files)


def test_commands_are_modules_of_bench(tmp_path):
    """And the long one ends before its limit; a rehearsal has small shapes."""
    made = commands(tmp_path)
    for name, part in made.items():
        assert part.skipped or part.command
        module = part.command[2] if part.command and name != "tests" else "bench.kernels"
        assert part.skipped or importlib.util.find_spec(module), module
    kernels = made["kernels"].command
    assert "--quick" not in kernels
    minutes = float(kernels[kernels.index("--minutes") + 1])
    assert 2 < minutes < 0.45 * 540 / 60
    rehearsal = parts("cpu", tmp_path, tmp_path, share_out(list(gpu.SHARES), 540))
    assert "--quick" in rehearsal["kernels"].command
    assert "--quick" in rehearsal["ceilings"].command


def kernel_row(i: int, contender: str, p50: float, **facts) -> str:
    return json.dumps({"op": "cross_entropy", "pass": "forward+gradient", "shape": f"{i} x " * 30,
                       "contender": contender, "status": "timed", "p50": p50, "of_copy": 0.8,
                       "ratio_to_best_peer": p50, "target_met": None, **facts})  # fmt: skip


def test_the_report_is_short_whatever_happens(tmp_path):
    """65 cases and every part failed with a long log: still under 12,000 characters."""
    rows = [kernel_row(i, name, 1.5) for i in range(65) for name in ("torch.compile", "ours")]
    (tmp_path / "kernels.jsonl").write_text("\n".join(rows) + "\n")
    for name in gpu.SHARES:
        (tmp_path / f"{name}.log").write_text(("x" * 500 + "\n") * 500)
    results = [
        Result(name, "failed", 99.0, 99.0, 1, f"{name}.log", tail(tmp_path / f"{name}.log")[-1])
        for name in gpu.SHARES
    ]
    text = report(results, tmp_path)
    assert len(text) < 12_000
    assert max(map(len, text.split("\n"))) < 160


def test_the_report_has_ours_beside_the_best_peer(tmp_path):
    rows = [
        kernel_row(1, "definition", 9.0),
        kernel_row(1, "liger", 2.0),
        kernel_row(1, "ours", 2.5, ratio_to_best_peer=1.25, target_met=False),
        kernel_row(2, "torch", 3.0),
        kernel_row(2, "ours", None, status="wrong"),
        kernel_row(3, "ours", 1.0, ratio_to_best_peer=None, target_met=True),
        kernel_row(4, "ours", 1.0, tflops=351.2, ratios=[{"met": True}, {"met": None}]),
    ]
    (tmp_path / "kernels.jsonl").write_text("\n".join(rows) + "\n")
    first, second, third, fourth = report([], tmp_path).split("\n")[1:5]
    assert "   2.5000   2.0000   1.25  liger; 80% of copy, target MISSED" in first
    assert second.split()[-4:] == ["wrong", "3.0000", "-", "torch"]
    assert third.endswith("none; 80% of copy, target met")
    assert fourth.endswith("none; 351 TFLOP/s, target met")


def test_the_report_has_every_model_beside_its_best_peer(tmp_path):
    """Those of another bench, those without a time and the peers' own have no line."""
    mine = {"bench": "finetune", "status": "timed", "peer": "minift", "workload": "BERT-base SST-2",
            "tokens_per_second": 345678.9, "best_peer": "torch unpadded", "doubts": [],
            "ratio_to_best_peer": 2.345, "of_target": 0.91}  # fmt: skip
    doubtful = {"workload": "tiny short", "ratio_to_best_peer": None, "best_peer": None,
                "of_target": None, "doubts": ["3 blocks", "clocks differ by 4.0%"]}  # fmt: skip
    others = [{"peer": "transformers"}, {"status": "failed"}, {"bench": "learning"}]
    rows = [mine, *({**mine, **other} for other in others), mine | doubtful]
    (tmp_path / "finetune.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head, first, second, *_ = report([], tmp_path).split("\n")
    assert head.startswith("fine-tuning")
    assert first.split() == "BERT-base SST-2 345,679 2.35 91% torch unpadded".split()
    assert second.split() == "tiny short 345,679 - - none; 3 blocks; clocks differ by 4.0%".split()


def test_finetuning_is_left_out_where_transformers_is_not(tmp_path, monkeypatch):
    assert commands(tmp_path)["finetune"].skipped == ""
    monkeypatch.setattr(gpu, "find_spec", lambda name: name != "transformers")
    assert commands(tmp_path)["finetune"].skipped == "there is no transformers"


def run_main(monkeypatch, *flags) -> int | str:
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    return caught.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    assert run_main(monkeypatch, "--out", str(tmp_path)) == 2
    shown = capsys.readouterr()
    assert shown.err == "expected a GPU, found none: --device cpu rehearses every part\n"
    assert shown.out == ""


def test_exit_status_says_whether_all_went_well(monkeypatch, capsys, tmp_path):
    """And results of an earlier run in the folder are gone."""
    flags = ["--device", "cpu", "--parts", "smoke", "--out", str(tmp_path)]
    for code in (0, 1):
        part = python(f"raise SystemExit({code})")
        monkeypatch.setattr(gpu, "parts", lambda *args, part=part: {"smoke": part})
        assert run_main(monkeypatch, *flags) == code
        assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == 1


def test_an_unknown_part_is_refused(monkeypatch):
    message = run_main(monkeypatch, "--parts", "smoke,all")
    assert message == (
        "expected --parts of compile,ceilings,smoke,tests,kernels,finetune,step_kernels,tune, "
        "got all"
    )
