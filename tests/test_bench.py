"""The benchmarks: implementations agree before they are timed, reports say what was found, a visit can be resumed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import adapters, agreement, cases, clock, gpu, published, report, stages, tune
from bench.adapters import IMPLEMENTATIONS, Built, Missing
from bench.workload import Data, Workload
from fastrnn import reference
from tests.cases import CASES, Case

SMALL = (
    Workload("t", "lstm", Case(5, 3, 4, 2), layers=2, input_size=3),
    Workload("t", "gru", Case(5, 3, 4, 1), heads=2),
    Workload("t", "rnn_relu", Case(5, 3, 4, 1)),
    Workload("t", "gru", Case(6, 3, 4, 2), kind="ragged"),
    Workload("t", "lstm", Case(6, 3, 4, 2), kind="reset", p=0.3),
    Workload("t", "lstm", Case(6, 3, 4, 1), layers=2, kind="reset", p=0.3),
)


@pytest.mark.parametrize("workload", SMALL, ids=str)
@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n != "fastrnn cluster"])
def test_implementations_agree_with_the_reference(device, name, workload):
    try:
        assert agreement.disagreement(name, workload, device) == {}
    except Missing as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("cell", reference.STEPS)
def test_the_reference_of_the_benchmarks_is_the_specification(device, cell):
    """The loop over torch.nn's cells in fp64, and fastrnn's reference backend."""
    for case in CASES:
        data = Data(Workload("t", cell, case), device, torch.float64)
        loop, own = (agreement.results(IMPLEMENTATIONS[n](data), data) for n in ("step loop", "fastrnn reference"))
        for name in loop:
            torch.testing.assert_close(own[name], loop[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wrong", ("y", "gradient"))
def test_what_computes_something_else_is_seen(device, monkeypatch, wrong):
    def build(data):
        built = adapters.torch_nn(data)
        if wrong == "y":
            return Built(lambda input: built.call(input) + 1e-4, built.leaves)
        return Built(built.call, built.leaves, lambda gradients: [gradients[0] * 1.001, *gradients[1:]])

    monkeypatch.setitem(IMPLEMENTATIONS, "torch.nn", build)
    found = agreement.disagreement("torch.nn", Workload("t", "gru", Case(5, 3, 4, 1)), device)
    assert found.keys() == ({"y"} if wrong == "y" else {"d_params[0]"})


def test_masks_of_ragged_and_reset_workloads():
    ragged = Data(Workload("t", "gru", Case(9, 3, 4, 1), kind="ragged"), "cpu")
    assert ragged.lengths.tolist() == [1, 5, 9] and ragged.valid.sum() == 15
    reset = Data(Workload("t", "gru", Case(1000, 4, 4, 1), kind="reset"), "cpu")
    assert 0.005 < reset.reset.float().mean() < 0.015


def test_the_table():
    """Rows have names of their own, the tests' cases are in it, and a CPU gets the small ones."""
    names = [str(w) for w in cases.TABLE]
    assert len(set(names)) == len(names)
    assert {w.shape for w in cases.TABLE if w.group == "tests"} == set(CASES)
    assert {w for w in published.PUBLISHED} <= set(cases.TABLE)
    small = cases.table("cpu")
    assert {"tests", "over H", "over B", "over T", "ragged", "reset", "stacked"} <= {w.group for w in small}
    assert all(w.flops <= cases.MOST_FLOPS_ON_CPU for w in small) and len(cases.table("cuda")) == len(cases.TABLE)


def test_flops_are_those_of_the_weights():
    workload = Workload("t", "lstm", Case(7, 3, 5, 2), layers=2, input_size=4, heads=2)
    weights = 2 * sum(p.numel() for p in workload.module().parameters() if p.dim() == 2)
    assert workload.flops == 2 * 7 * 3 * weights


def test_published_numbers_have_sources():
    for numbers in published.PUBLISHED.values():
        for number in numbers:
            assert number.source.startswith("https://") and number.hardware + number.note
            assert number.value is None or number.hardware, "a time without hardware"


def results_in(folder: Path, seconds: dict[str, float]) -> None:
    """As pytest-benchmark writes them: medians of one workload, by implementation, backward twice as long."""
    workload = {"group": "over H", "cell": "gru", "shape": [4, 2, 8, 1], "dtype": "float32"}
    benchmarks = [
        {
            "extra_info": {"workload": workload, "implementation": name, "pass": which, "peak_bytes": 2**20},
            "stats": {"median": median * (3 if which != "forward" else 1)},
        }
        for name, median in seconds.items()
        for which in ("forward", "forward+backward")
    ]
    machine = {"machine_info": {"bench": {"device": "a|b"}}, "datetime": "now", "benchmarks": benchmarks}
    (folder / "benchmark-x.json").write_text(json.dumps(machine))
    notes = {"left_out": {"test_speed[x]": "no <time>\nleft"}, "auto_over_torch": {"w": 1.01}}
    (folder / "notes.json").write_text(json.dumps(notes))


def test_report(tmp_path):
    results_in(tmp_path, {"torch.nn": 4e-6, "fastrnn auto": 2e-6})
    stage = {"stage": "model", "text": "a text", "records": [{"cell": "gru", "us": 0.5}, {"cell": "lstm"}]}
    (tmp_path / "stage-model.json").write_text(json.dumps(stage))
    report.write(tmp_path)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| over_H-gru-T4-B2-H8-float32 | 1.00 | 0.50 (2.00x) |" in text  # forward, us a step
    assert "| over_H-gru-T4-B2-H8-float32 | 3.00 | 1.50 (2.00x) |" in text
    assert "| over H | forward | 2.00x (2.00 to 2.00) |" in text  # at a glance
    assert "| device | a\\|b |" in text and "| gru | 0.5 |" in text and "| w | 1.010 |" in text
    assert "| no <time> | 1 | test_speed[x] |" in text and "no &lt;time&gt;" in page
    assert "149194" in text and "data:image/png;base64," in page
    assert "http" not in page.replace("https://arxiv", "").replace("https://github", ""), "it must stand alone"
    assert {p.name for p in tmp_path.glob("*.png")} == {"time-over-H-float32.png", "speed-up-over-H-float32.png"}


def test_a_report_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="folder: expected one with benchmark"):
        report.write(tmp_path)


def test_published_units():
    workload = Workload("packed", "lstm", Case(10, 2, 8, 1), kind="ragged")
    plain = Workload("packed", "lstm", Case(10, 2, 8, 1))
    measured = {
        (w, "torch.nn", which): report.Result(w, "torch.nn", which, seconds, 0)
        for w, times in ((workload, (6e-3, 16e-3)), (plain, (2e-3, 4e-3)))
        for which, seconds in zip(("forward", "forward+backward"), times, strict=True)
    }

    def shown(which: str, unit: str) -> str:
        return report.in_unit(published.Published("x", which, 1.0, unit, "", ""), workload, "torch.nn", measured)

    assert shown("forward", "ms") == "6.00 ms" and shown("forward+backward", "us a step") == "1,600.00 us a step"
    assert shown("forward", "times") == "3.00 times" and shown("backward", "times") == "5.00 times"


def setup(folder: Path, seconds: float = 1e6) -> stages.Setup:
    return stages.Setup(folder, "interpreter", dry=True, seconds=seconds, started=time.monotonic())


def test_a_stage_goes_on_where_it_stopped(tmp_path):
    ran = []

    def item(key: str) -> stages.Item:
        def work(left: float) -> list[dict]:
            ran.append(key)
            if key == "bad":
                raise RuntimeError("no")
            return [{"key": key}]

        return stages.Item(key, work)

    items = [item("a"), item("bad"), item("b")]
    assert stages.run_stage(setup(tmp_path, 0), "model", "", items) == [] and ran == []  # no time
    stages.run_stage(setup(tmp_path), "model", "", items[:2])
    left = json.loads((tmp_path / "stage-model.json").read_text())
    (tmp_path / "stage-model.json").write_text(json.dumps(left | {"complete": False}))  # as if it had been killed
    found = stages.run_stage(setup(tmp_path), "model", "", items)
    assert ran == ["a", "bad", "b"]
    assert found == [{"key": "a"}, {"item": "bad", "error": "RuntimeError: no"}, {"key": "b"}]
    stages.run_stage(setup(tmp_path), "model", "", [item("c")])
    assert ran == ["a", "bad", "b"], "a complete stage is not run again"


def test_a_visit_without_time_says_so_and_can_be_gone_on_with(tmp_path, capsys):
    assert gpu.visit(setup(tmp_path, 0)) == 0
    assert capsys.readouterr().out.count("no time left") == 4
    assert not any(json.loads(file.read_text())["complete"] for file in tmp_path.glob("stage-*.json"))
    assert "Stage correctness" in (tmp_path / "report.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_goes_through_all_stages(tmp_path):
    """As `make bench-gpu` does on a GPU, and a second run finds everything done."""
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path)]
    # As from a shell: a session inside one of xdist's workers would be one of them, which measure nothing.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    for again in (False, True):
        done = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (done.stdout.count("done before") == 4) == again
    found = {f.stem: json.loads(f.read_text()) for f in tmp_path.glob("stage-*.json")}
    assert len(found) == 4 and all(stage["complete"] and stage["records"] for stage in found.values())
    assert all(r.get("disagreement", "none") == "none" for r in found["stage-correctness"]["records"])
    assert (tmp_path / "report.html").exists()


def row(kernel: str, ctas: int, which: str, form: dict, us: float | None, own: bool = False) -> dict:
    cluster = "lstm H=256 bfloat16 tiles=1" if ctas > 1 else None
    record = {"kernel": kernel, "cluster": cluster, "ctas": ctas, "pass": which, "form": json.dumps(form), "us": us}
    return record | {"planner's own": own}


def test_only_what_is_clearly_faster_is_written_down():
    rows = [
        row("k", 1, "forward", {"SHARES": 1}, 10.0, own=True), row("k", 1, "forward", {"SHARES": 2}, 5.0),
        row("k", 1, "backward", {"SHARES": 1}, 10.0, own=True), row("k", 1, "backward", {"SHARES": 2}, 9.9),
        row("l", 1, "forward", {"SHARES": 1}, None, own=True), row("l", 1, "forward", {"SHARES": 2}, 5.0),
    ]  # fmt: skip
    assert tune.choose(rows) == {"forms": {"k": {"forward": {"SHARES": 2}}}, "ctas": {}}
    eight = [row("c8", 8, which, {}, 10.0, own=True) for which in ("forward", "backward")]
    four = [row("c4", 4, "forward", {}, 5.0), row("c4", 4, "backward", {}, 12.0)]
    assert tune.choose(eight + four)["ctas"] == {"lstm H=256 bfloat16 tiles=1": 4}
    assert tune.choose([*eight, *four[:1], row("c4", 4, "backward", {}, 16.0)])["ctas"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_writes_a_file_that_the_planner_reads(tmp_path):
    (item,) = tune.items(setup(tmp_path))
    records = item.work(60.0)
    assert {r["pass"] for r in records} == {"forward", "backward"} and sum(r["planner's own"] for r in records) == 2
    (tmp_path / "stage-tuning.json").write_text(json.dumps({"records": records}))
    tune.write(setup(tmp_path))  # reads it too
    assert set(json.loads((tmp_path / "tuned-interpreter.json").read_text())) == {"made", "forms", "ctas"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_the_clock_and_the_machine():
    assert clock.seconds(lambda: time.sleep(0.02), clock.WallClock()) >= 0.02
    found = clock.machine()
    assert found["torch"] == torch.__version__ and found["device"] in ("cpu", "cuda")
