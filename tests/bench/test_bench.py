"""The benchmarks: implementations agree before they are timed, reports say what was found, a visit can be resumed."""

import contextlib
import importlib
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bench import (
    adapters,
    agreement,
    cases,
    clock,
    forms,
    gpu,
    matrix,
    needed,
    packing,
    prepare,
    processes,
    published,
    report,
    resident,
    stages,
    steps,
    tune,
    visit,
)
from bench.adapters import IMPLEMENTATIONS, Built, Missing
from bench.workload import Data, Workload
from fastrnn import cells, plan
from fastrnn.compat import spills
from fastrnn.device import DeviceSpec
from fastrnn.planning.kernel_plan import KernelPlan
from fastrnn.planning.tiers import TIERS
from tests.support.cases import CASES, CELLS, SEQUENCES, Case

from ..support.versions import NEEDS_CLUSTERS

SMALL = (
    Workload("t", "lstm", Case(5, 3, 4, 2), layers=2, input_size=3),
    Workload("t", "gru", Case(5, 3, 4, 1), heads=2),
    Workload("t", "lstm", Case(5, 3, 4, 2), heads=3, input_size=5),
    Workload("t", "slstm", Case(5, 3, 4, 1), heads=2),
    Workload("t", "slstm", Case(6, 3, 4, 2), layers=2, kind="reset", p=0.3),
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


@pytest.mark.parametrize("heads", (1, 2))
@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_of_the_benchmarks_is_the_specification(device, cell, heads):
    """The loop over cells, a network a head, in fp64, and fastrnn's reference backend, one layer in heads."""
    for case in CASES:
        data = Data(Workload("t", cell, case, heads=heads), device, torch.float64)
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


def test_heads_in_another_order_are_seen(device, monkeypatch):
    plain, head = IMPLEMENTATIONS["torch.nn"], Data.head

    def build(data):
        with monkeypatch.context() as patched:
            patched.setattr(Data, "head", lambda data, number: head(data, 1 - number))
            return plain(data)

    monkeypatch.setitem(IMPLEMENTATIONS, "torch.nn", build)
    found = agreement.disagreement("torch.nn", Workload("t", "gru", Case(5, 3, 4, 1), heads=2), device)
    assert {"y", "d_params[0]", "d_params[3]"} <= found.keys()


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
    assert {"tests", "over H", "over B", "over T", "ragged", "reset", "stacked", "heads"} <= {w.group for w in small}
    assert all(w.flops <= cases.MOST_FLOPS_ON_CPU for w in small) and len(cases.table("cuda")) == len(cases.TABLE)


def test_flops_are_those_of_the_weights():
    workload = Workload("t", "lstm", Case(7, 3, 5, 2), layers=2, input_size=4, heads=2)
    weights = sum(p.numel() for p in workload.module().parameters() if p.dim() == 2)
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


def setup(folder: Path, seconds: float = 1e6, out: Path | None = None) -> stages.Setup:
    return stages.Setup(folder, "interpreter", dry=True, seconds=seconds, started=time.monotonic(), out=out)


def test_a_stage_goes_on_where_it_stopped(tmp_path):
    ran = []

    def item(key: str) -> stages.Item:
        def work(left: float) -> list[dict]:
            ran.append(key)
            if key == "bad":
                raise RuntimeError("no")
            if key == "long" and ran.count(key) == 1:
                raise stages.Unfinished([{"key": "half"}])
            return [{"key": key}]

        return stages.Item(key, work)

    items = [item("a"), item("bad"), item("long"), item("b")]
    assert stages.run_stage(setup(tmp_path, 0), "steps", "", items) == [] and ran == []  # no time
    failed = {"item": "bad", "error": "RuntimeError: no"}
    found = stages.run_stage(setup(tmp_path), "steps", "", items[:3])
    assert ran == ["a", "bad", "long"] and found == [{"key": "a"}, failed, {"key": "half"}]
    found = stages.run_stage(setup(tmp_path), "steps", "", items)
    assert ran == ["a", "bad", "long", "long", "b"]
    assert found == [{"key": "a"}, failed, {"key": "long"}, {"key": "b"}]
    stages.run_stage(setup(tmp_path), "steps", "", [item("c")])
    assert ran[-1] == "b", "a complete stage is not run again"


def test_an_item_that_cannot_end_in_what_is_left_is_not_begun(tmp_path, capsys):
    ran = []

    def item(key: str, limit: float) -> stages.Item:
        return stages.Item(key, lambda seconds: ran.append((key, round(seconds))) or [], limit)

    stages.run_stage(setup(tmp_path, 50), "clients", "", [item("long", 60), item("short", 40)])
    assert ran == [("short", 50)] and "no time left for long" in capsys.readouterr().out
    stages.run_stage(setup(tmp_path, 100), "clients", "", [item("long", 60), item("short", 40)])
    assert [key for key, _ in ran] == ["short", "long"]
    # A stage that is not the last one: its first item may take of what comes later, the others may not.
    stages.run_stage(setup(tmp_path, 100), "steps", "", [item("first", 60), item("second", 60)])
    assert ran[2:] == [("first", 60)] and "no time left for second" in capsys.readouterr().out


def child(tmp_path: Path, monkeypatch, body: str) -> stages.Item:
    """An item of a process that measures 1, 2 and 3; body is what it does of each number n."""
    lines = ["import os, sys, time", "from bench.processes import Log, options"]
    lines += ["args = options('').parse_args()", "log = Log(args.out, args.seconds)"]
    lines += ["for n in log.each([1, 2, 3], lambda n: {'n': n}):", f"    {body}", "    log.add({'n': n, 'us': n})"]
    (tmp_path / "measuring.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(processes, "GRACE", 1)
    return processes.lines_item(setup(tmp_path), "x", "measuring", least=0)


def test_a_process_that_ends_early_keeps_what_it_has(tmp_path, monkeypatch):
    item = child(tmp_path, monkeypatch, "time.sleep(30 * (n == 2 and not os.path.exists(str(args.out) + '.again')))")
    with pytest.raises(stages.Unfinished) as unfinished:
        item.work(12)
    assert unfinished.value.records == [{"n": 1, "us": 1}]
    (tmp_path / "x.jsonl.again").touch()
    assert item.work(60) == [{"n": n, "us": n} for n in (1, 2, 3)]


def test_what_crashes_a_process_is_not_tried_again(tmp_path, monkeypatch):
    item = child(tmp_path, monkeypatch, "os._exit(9) if n == 2 else None")
    crashed = {"n": 2, "error": "its process crashed, or did not end"}
    assert item.work(60) == [{"n": 1, "us": 1}, crashed, {"n": 3, "us": 3}]


def test_nothing_that_a_process_started_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 1)
    file = tmp_path / "pid"
    code = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(file)!r}, 'w').write(str(p.pid)); "
    done = processes.run([sys.executable, "-c", code + "p.wait()"], 4)
    assert done.timed_out and done.seconds < 10
    state = Path(f"/proc/{file.read_text()}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("it still runs")


def test_results_are_packed_into_few_bounded_files(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MOST_BYTES", 20_000)
    folder, out, again = (tmp_path / name for name in ("work", "out", "again"))
    (folder / "logs").mkdir(parents=True)
    noise = random.Random(0)
    for number in range(12):
        (folder / "logs" / f"{number}.txt").write_bytes(noise.randbytes(8_000))
    for name, size in (("large.csv", 30_000), ("report.html", 100), ("tuned-sm_90.json", 10)):
        (folder / name).write_bytes(noise.randbytes(size))
    packing.pack(folder, out)
    assert len(list(out.iterdir())) <= 8 and all(file.stat().st_size < 21_000 for file in out.iterdir())
    assert packing.unpack(out, again)
    kept = [file.relative_to(again) for file in again.rglob("*") if file.is_file() and file.name != packing.LEFT_OUT]
    assert all((again / file).read_bytes() == (folder / file).read_bytes() for file in kept)
    left_out = (again / packing.LEFT_OUT).read_text().splitlines()
    assert "large.csv: 30000 bytes" in left_out and len(left_out) + len(kept) == 15
    for file in (folder / "logs").iterdir():
        file.unlink()
    packing.pack(folder, out)
    assert len(list(out.glob("results-*"))) == 1, "archives of before are gone"


def test_a_visit_without_time_says_so_and_can_be_gone_on_with(tmp_path, capsys):
    assert gpu.everything(setup(tmp_path, 0)) == 0
    assert capsys.readouterr().out.count("no time left") == len(visit.STAGES)
    assert not any(json.loads(file.read_text())["complete"] for file in tmp_path.glob("stage-*.json"))
    assert "Stage correctness" in (tmp_path / "report.md").read_text()


def test_stages_share_the_time():
    assert list(stages.UNTIL) == list(visit.STAGES) and list(stages.UNTIL.values())[-1] == 1.0
    real = stages.Setup(Path("."), "sm_90", dry=False, seconds=gpu.SECONDS, started=time.monotonic())
    limits = {stage: [item.limit for item in items(real)] for stage, (_, items) in visit.STAGES.items()}
    assert all(0 < limit < gpu.SECONDS / 2 for of_stage in limits.values() for limit in of_stage)
    named = {path for path in (*visit.KERNELS, *visit.LAYERS, *visit.ELSEWHERE)}
    assert all(list((gpu.ROOT / "tests").rglob(f"test_{name}.py")) for name in named)


def test_every_item_runs_what_there_is(tmp_path, monkeypatch):
    """The commands of a visit that is not dry: modules take their arguments, test files exist."""
    commands = []

    def run(command, seconds, interpret=False):
        assert not interpret and seconds > 0
        commands.append(command)
        return processes.Done(0, "{}", "", 1.0)

    for module in (processes, visit):
        monkeypatch.setattr(module, "run", run)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(shutil, "which", lambda program: program)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: find_spec(name, *of) or name)  # all is there
    monkeypatch.setattr(needed, "is_missing", lambda module: False)
    real = stages.Setup(tmp_path, "sm_90", dry=False, seconds=520, started=time.monotonic())
    for _, items in visit.STAGES.values():
        for item in items(real):
            item.work(100.0)
    assert len(commands) > 40
    groups = [command[command.index("--only") + 1] for command in commands if "--only" in command]
    assert sorted(groups) == sorted({w.group for w in cases.table("cuda")})
    ran = [gpu.ROOT / word for command in commands for word in command if word.startswith("tests/")]
    left_out = {f"test_{name}" for name in visit.ELSEWHERE - {"foreign"}}
    tests = [file for file in (gpu.ROOT / "tests").rglob("test_*.py") if file.stem not in left_out]
    assert sorted(ran) == sorted(tests), "each once"
    for command in commands:
        assert all((gpu.ROOT / word).exists() for word in command if word.startswith("tests/"))
        if command[1:3] == ["-m", "bench.launches"]:
            check, tier, cell, hidden, dtype, kind = command[3:]
            assert check == "check" and tier in TIERS and cell in cells.CELLS and hidden.isdecimal()
            assert dtype in ("float16", "bfloat16", "float32", "tf32") and kind in ("plain", *SEQUENCES)
        elif command[1:2] == ["-m"] and command[2].startswith("bench."):
            module = importlib.import_module(command[2])
            monkeypatch.setattr(sys, "argv", [module.__file__, *command[3:]])
            monkeypatch.setattr(module, "Log", mock.Mock(side_effect=ZeroDivisionError))
            with pytest.raises(ZeroDivisionError):  # its arguments were parsed
                module.main()


def test_the_sanitizers_summary_is_read(tmp_path, monkeypatch):
    """By programs in their place: one that finds an error, and none."""
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 2 errors'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    items = {item.key: item for item in visit.tools(setup(tmp_path))}
    (record,) = items["memcheck resident"].work(20)
    assert record["summary"] == "2 errors" and gpu.failed(record)
    (record,) = items["ncu resident"].work(20)
    assert record["missing"] == "ncu is not installed" and not gpu.failed(record)


def bare(folder: Path, packages: Path) -> Path:
    """Copy the checkout as it would be carried to a machine, and link the few packages that are there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (source := gpu.ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name, follow_symlinks=False)
    packages.mkdir()
    wanted, known = ["torch", "triton", "numpy", "pytest", "setuptools"], set()
    while wanted:
        if (name := wanted.pop()) in known:
            continue
        known.add(name)
        with contextlib.suppress(PackageNotFoundError):
            found = distribution(name)
            tops = {Path(file).parts[0] for file in found.files or () if ".." not in Path(file).parts}
            for top in tops - {"__pycache__"}:
                link = packages / top
                if not link.exists():
                    link.symlink_to(Path(str(found.locate_file(top))).resolve())
            wanted += [re.match(r"[\w.-]+", r)[0] for r in found.requires or () if "extra ==" not in r]
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_visit(tmp_path):
    """From a bare checkout, with torch, Triton, numpy and pytest alone; a second run finds everything done.

    With Triton 3.6.0, the oldest that a machine is likely to have, where bench.matrix has installed it.
    """
    checkout, out, results = bare(tmp_path / "checkout", tmp_path / "packages"), tmp_path / "out", tmp_path / "results"
    # The interpreter that a venv is made of, where it is one: without what is installed there, this project too.
    python = getattr(sys, "_base_executable", sys.executable)
    command = [python, "-S", "-m", "bench.gpu", "--dry-run", "--out", str(out), "--seconds", "5000"]
    # As from a shell: a session inside one of xdist's workers would be one of them, which measure nothing.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    oldest = matrix.FOLDER / matrix.TRITONS[0]
    paths = [oldest] * (oldest / "installed").exists() + [tmp_path / "packages"]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    for again in (False, True):
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (done.stdout.count("done before") == len(visit.STAGES)) == again
    files = list(out.iterdir())
    assert len(files) <= 8 and all(file.stat().st_size < 2**24 for file in files)
    assert {"report.html", "tuned-interpreter.json"} <= {file.name for file in files}
    assert packing.unpack(out, results)
    found = {f.stem.removeprefix("stage-"): json.loads(f.read_text()) for f in results.glob("stage-*.json")}
    assert found.keys() == visit.STAGES.keys()
    assert all(stage["complete"] and stage["records"] for stage in found.values())
    assert {r["disagreement"] for r in found["correctness"]["records"]} == {"none"}
    assert found["tests"]["records"][0]["passed"] > 0 and (results / "junit-kernels.xml").exists()
    missing = {r["missing"] for r in found["tools"]["records"] if "missing" in r}
    assert missing <= {"compute-sanitizer is not installed", "ncu is not installed"}
    assert found["suite"]["records"] == [{"group": "tests", "missing": "pytest-benchmark is not installed"}]
    names = ("tirex-ts and xlstm are", "tirex-ts and statsmodels are", "xlstm is")
    assert [r["missing"] for r in found["clients"]["records"]] == [f"{name} not installed" for name in names]
    doctor = {r["what"]: r.get("found") for r in found["machine"]["records"]}
    assert doctor["torch"].startswith(torch.__version__) and "rich" in doctor["inspect"]
    for file in ("steps", "compare", "host", "tuning", "forms"):
        assert processes.read(results / f"{file}.jsonl"), file
    report.write(results)
    assert "Stage steps" in (results / "report.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_group_of_the_suite(tmp_path):
    """The dry visit lacks what it runs on."""
    (item,) = visit.suite(setup(tmp_path))
    (record,) = item.work(100)
    assert record["exit status"] == 0 and list(tmp_path.glob("benchmark-*.json")), record


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
    found = tune.choose(rows)
    assert found == {"forms": {"k": {"forward": {"SHARES": 2}}}, "ctas": {}, "us": {"k": [5.0, 9.9]}}
    eight = [row("c8", 8, which, {}, 10.0, own=True) for which in ("forward", "backward")]
    four = [row("c4", 4, "forward", {}, 5.0), row("c4", 4, "backward", {}, 12.0)]
    assert tune.choose(eight + four)["ctas"] == {"lstm H=256 bfloat16 tiles=1": 4}
    assert tune.choose([*eight, *four[:1], row("c4", 4, "backward", {}, 16.0)])["ctas"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_writes_a_file_that_the_planner_reads(tmp_path):
    (problem,) = tune.problems("interpreter", dry=True)
    records = tune.tune(problem, setup(tmp_path))
    assert {r["pass"] for r in records} == {"forward", "backward"} and sum(r["planner's own"] for r in records) == 2
    (tmp_path / "tuning.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tune.write(setup(tmp_path))  # reads it too
    assert set(json.loads((tmp_path / "tuned-interpreter.json").read_text())) == {"made", "forms", "ctas", "us"}


@NEEDS_CLUSTERS
def test_what_is_tuned_is_compiled_before(monkeypatch):
    """For each of the planner's forms, on sm_90."""
    monkeypatch.setattr(tune, "_us_per_step", lambda *_: 1.0)
    monkeypatch.setattr(DeviceSpec, "of", lambda _: DeviceSpec.named("sm_90"))
    planned, trying = [], tune.trying
    monkeypatch.setattr(tune, "trying", lambda arch, tuned: planned.append(tuned) or trying(arch, tuned))
    for problem in tune.problems("sm_90", dry=False)[1:3]:
        before = list(tune.choices(problem, DeviceSpec.named("sm_90")))
        planned.clear()
        tune.tune(problem, stages.Setup(Path("."), "sm_90", False, 1e6, 0))
        assert len(before) > 10 and [tuned for tuned in planned if tuned.forms] == before


@NEEDS_CLUSTERS
def test_jobs_get_the_kernel_that_they_ask_for(monkeypatch):
    """A record of each, of sm_90, but for the time."""
    monkeypatch.setattr(steps.measure, "us_per_step", lambda *_: {"forward": 2.0, "backward": 3.0})
    for job in steps.JOBS["tiers"]:
        found = steps.timed(job, "sm_90", dry=False)
        assert found["backend"] == job.backend and found["ctas"] == max(1, job.ctas), job
        assert (found["forward"], found["backward"]) == (2.0, 3.0)
    assert "do not hold" in steps.timed(prepare.Job("lstm", 512, "cluster", 2), "sm_90", dry=False)["missing"]


@NEEDS_CLUSTERS
def test_forms_beside_the_planners(monkeypatch):
    """Each is planned as it says, and nothing of it stays."""
    before, times = plan_of(256), iter([64.0, 64.0 + 1024 * 1.5])
    monkeypatch.setattr(forms.measure, "tensors_of", lambda problem: {"steps": problem.seq_len})
    monkeypatch.setattr(forms, "call_of", lambda form, problem, tensors: (form, problem, tensors))

    def median_us(called):
        form, problem, tensors = called
        kernel = problem.plan().kernel
        assert (kernel.ctas, kernel.warps) == (form.ctas, form.warps) and tensors["steps"] == problem.seq_len
        spills._chosen["key"] = kernel.choices[form.which][0]
        return next(times)

    monkeypatch.setattr(forms.measure, "median_us", median_us)
    found = forms.timed(forms.Form("lstm", 256, 4, 16, 2, "forward"), "sm_90")
    assert found["us"] == 1.5 and "'SHARES': 2" in found["form"]
    assert plan_of(256) == before
    everything = [form for form in forms.forms() if form.possible]
    assert len(set(everything)) == len(everything) > 150


def plan_of(hidden: int) -> KernelPlan:
    return plan("lstm", hidden_size=hidden, batch_size=16, dtype=torch.bfloat16, device="sm_90").kernel


def test_the_driver_is_asked_how_many_clusters_are_resident():
    kernel = SimpleNamespace(function=77, metadata=SimpleNamespace(num_ctas=8, num_warps=16, shared=4096))
    asked = []

    def answer(count, function, config):
        given = config._obj
        attribute = given.attributes.contents
        asked.append((function.value, given.grid_x, given.block_x, given.shared, attribute.id, attribute.value[0]))
        count._obj.value = 15
        return 0

    driver = SimpleNamespace(
        cuFuncSetAttribute=lambda *of: asked.append(of[1:]) or 0, cuOccupancyMaxActiveClusters=answer
    )
    assert resident.of_kernel(driver, kernel) == {"rc": 0, "resident": 15, "shared": 4096}
    assert asked == [(13, 1), (77, 8, 512, 4096, 4, 8)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_the_clock_and_the_machine():
    assert clock.seconds(lambda: time.sleep(0.02), clock.WallClock()) >= 0.02
    found = clock.machine()
    assert found["torch"] == torch.__version__ and found["device"] in ("cpu", "cuda")
