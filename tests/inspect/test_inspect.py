"""fastrnn.inspect and the command line, on small kernels compiled in processes of their own."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fastrnn.__main__ import main
from fastrnn.compat import spills
from fastrnn.device import DeviceSpec
from fastrnn.inspect import doctor, flow, sass
from fastrnn.inspect.resources import occupancy
from fastrnn.inspect.timing import RATES, bounds, chain, modelled

from ..support import children

ROOT = Path(__file__).parents[2]
KEYS = [
    "cell", "pass", "arch", "backend", "dtype", "hidden", "batch", "programs", "ctas", "warps", "registers",
    "spill_bytes", "shared_bytes", "tensor_core_instructions", "weight_bytes_on_chip", "weight_global_loads_in_loop",
    "loop_instructions", "loop_stalls", "loop_waits", "modelled_cycles_per_step", "executed_max_error",
]  # fmt: skip


def cli(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess:
    with mock.patch.dict(os.environ, COLUMNS="100"):
        if not interpret:
            return children.run(["-m", "fastrnn", *arguments])
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-W", "error", "-m", "fastrnn", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# Triton 3.6 aborts at AMD's kernels, by an assertion of its own.
DUMPED = ("sm_90", "gfx942") if spills.triton_version() >= (3, 7) else ("sm_90",)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory) -> tuple[Path, list[dict]]:
    """What the compiler left of the GRU at H=16 on an H100 and an MI300X, and the records."""
    folder = tmp_path_factory.mktemp("dump")
    flags = ["--cell", "gru", "--hidden", "16", "--arch", *DUMPED, "--json", "--dump", str(folder)]
    done = cli("inspect", *flags, interpret=True)  # which it must undo for itself
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


def test_json_has_the_stable_keys(dumped):
    _, records = dumped
    assert [(r["arch"], r["pass"]) for r in records] == [(a, p) for a in DUMPED for p in ("forward", "backward")]
    for record in records:
        assert list(record)[: len(KEYS) - 1] == KEYS[:-1] and KEYS[-1] in record
        assert record["weight_global_loads_in_loop"] == record["spill_bytes"] == 0 < record["weight_global_loads"]
        assert record["weight_bytes_on_chip"] == 3 * 16 * 16 * 2
        assert record["executed_max_error"] is None
        assert record["loop_instructions"] > 50
    for record in records[:2]:
        assert record["modelled_cycles_per_step"] == max(record["modelled_bounds"].values())
        assert record["modelled_bounds"]["chain"] == chain(record["loop_stalls"], record["loop_waits"])
        assert record["modelled_barrier_cycles"] == 0
        assert all(kind.startswith("HMMA") for kind in record["tensor_core_instructions"])
        assert record["simulated_cycles_per_step"] > record["modelled_bounds"]["issue"]
        assert sum(record["simulated_waits"].values()) == pytest.approx(record["simulated_cycles_per_step"], rel=0.05)
        assert record["simulated_uses"]["tensor cores"] > 0 and record["simulated_unknown"] == []
    for record in records[2:]:
        assert (
            record["modelled_cycles_per_step"] is record["loop_stalls"] is record["simulated_cycles_per_step"] is None
        )
        assert record["simulated_missing"].startswith("simulation of gfx942 is missing")
        assert all(kind.startswith("v_mfma") for kind in record["tensor_core_instructions"])


def test_dump_writes_every_stage(dumped):
    folder, _ = dumped
    of_archs = {"sm_90": "ttgir llir ptx cubin sass", "gfx942": "ttgir llir amdgcn hsaco"}
    for arch, kinds in ((arch, of_archs[arch]) for arch in DUMPED):
        for which in ("forward", "backward"):
            files = folder.glob(f"gru-H16-B16-bfloat16-{arch}-resident-{which}.*")
            assert {file.suffix[1:] for file in files} == set(kinds.split())
    assert next(folder.glob("*.cubin")).read_bytes()[:4] == b"\x7fELF"


def code_of(folder: Path, arch: str) -> tuple[str, flow.Code]:
    parse, kind = (flow.parse_ptx, "ptx") if arch == "sm_90" else (flow.parse_llvm, "llir")
    text = next(folder.glob(f"*-{arch}-*-forward.{kind}")).read_text()
    return text, parse(text)


W_HH = 1  # the parameter's position in the forward kernel


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("arch", DUMPED)
def test_a_load_of_weights_inside_the_loop_is_seen(dumped, arch, renamed):
    """The loop's load of x_gates made one of W_hh: at its address, or at one that a new register holds."""
    text, code = code_of(dumped[0], arch)
    loop = code.step_loop()
    (*_, weight), loaded = code.global_loads(W_HH, code.statements), code.global_loads(0, loop)[0]
    assert code.global_loads(W_HH, loop) == []
    if arch == "sm_90":
        of_weight, of_x = (re.search(r"\[\s*(%\w+)", s.text)[1] for s in (weight, loaded))
        move = "add.s64 %rd99999, {}, 64;\n"
    else:
        of_weight, of_x = (re.search(r"addrspace\(8\) (%\w+)", s.text)[1] for s in (weight, loaded))
        move = "%renamed = bitcast ptr addrspace(8) {} to ptr addrspace(8)\n"
    register = of_weight
    changed = loaded.text
    if renamed:
        register = "%rd99999" if arch == "sm_90" else "%renamed"
    changed = (move.format(of_weight) if renamed else "") + re.sub(rf"{of_x}\b", register, changed)
    assert text.count(loaded.text) == 1
    mutant = text.replace(loaded.text, changed)
    code = flow.parse_ptx(mutant) if arch == "sm_90" else flow.parse_llvm(mutant)
    assert len(code.global_loads(W_HH, code.step_loop())) == 1


PTX = """
.visible .entry forward(
	.param .u64 .ptr .global .align 1 forward_param_0,
	.param .u64 .ptr .global .align 1 forward_param_1
)
{
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [forward_param_0];
	ld.param.b64 	%rd2, [forward_param_1];
	cvta.to.global.u64 	%rd3, %rd2;
	ld.global.b32 	%r1, [%rd3];
	bra.uni 	$L_MIDDLE;
$L_TOP:
	ld.global.b32 	%r2, [%rd1+4];
	add.s64 	%rd1, %rd1, 8;
$L_MIDDLE:
	setp.lt.s32 	%p1, %r2, 5;
	@%p1 bra 	$L_TOP;
	ld.global.b32 	%r3, [%rd3+64];
	ret;
}
"""


@pytest.mark.parametrize(
    ("old", "new", "loads"),
    [
        ("", "", 0),  # before and behind the loop, which is entered in its middle
        ("%r2, [%rd1+4]", "%r2, [%rd3+4]", 1),
        ("add.s64 	%rd1, %rd1, 8;", "mov.b64 %rd1, %rd3;", 1),  # from the second step on
        ("add.s64 	%rd1, %rd1, 8;", "selp.b64 %rd1, %rd1, %rd3, %p1;", 1),
        ("add.s64 	%rd1, %rd1, 8;", "cp.async.cg.shared.global [%r9], [%rd3+16], 16;", 1),
        ("[%rd1+4];", "[%rd1+4];\n	ld.global.v2.b32 	{%r5, %r6}, [%rd3];", 1),
        ("[%rd1+4];", "[%rd1+4];\n	st.global.b32 	[%rd3], %r5;", 0),
        ("[%rd1+4];", "[%rd1+4];\n	ld.shared.b32 	%r5, [%rd3];", 0),
        ("%r2, [%rd1+4];", "%rd5, [%rd1+4];\n	ld.global.b32 	%r5, [%rd5];", 0),  # through a pointer from memory
    ],
)
def test_flow_from_a_parameter(old, new, loads):
    code = flow.parse_ptx(PTX.replace(old, new))
    assert len(code.global_loads(1, code.statements)) == 2 + loads
    assert len(code.global_loads(1, code.step_loop())) == loads


def test_sass_loop_and_control_codes():
    def line(text: str, stall: int, wait: int) -> str:
        return f"  /*0000*/ {text} ; /* 0x{0:016x} */\n      /* 0x{stall << 41 | wait << 52:016x} */\n"

    text = line("MOV R1, R2", 1, 0) + ".L_x_0:\n" + line("@P1 LDG.E.128 R4, [R2]", 4, 0) + line("LDS.64 R8, [R3]", 2, 3)
    text += line("HMMA.16816.F32.BF16 R4, R8, R9, R4", 11, 1) + line("MUFU.TANH R4, R4", 1, 0)
    text += line("@P0 BRA `(.L_x_0)", 5, 0) + line("EXIT", 5, 0)
    instructions, loop = sass.parse(text)
    assert [i.opcode for i in instructions][1:3] == ["LDG.E.128", "LDS.64"]
    assert [(i.stall, i.waits) for i in loop] == [(4, False), (2, True), (11, True), (1, False), (5, False)]
    assert bounds(loop, warps=8, multiply_adds=1024) == {
        "chain": 23 + 14 * 2,
        "issue": 10,
        "special": 32 * 8 // 16,
        "tensor cores": 16,
        "shared memory": 8 * 32 * 8 // 128,
        "L2": 16 * 32 * 8 // 64,
    }


@pytest.mark.parametrize(("stalls", "waits", "us", "a_wait"), [(1289, 126, 1.94, 16.8), (3151, 216, 3.15, 11.0)])
def test_modelled_against_published_times(stalls, waits, us, a_wait):
    """FlashRNN's Triton kernel, LSTM forward, H=64 and H=128, B=16, bf16, H100: the model was fitted to these."""
    cycles = us * 1000 * RATES["sm_90"].ghz
    assert (cycles - stalls) / waits == pytest.approx(a_wait, abs=0.06)
    assert chain(stalls, waits) == pytest.approx(cycles, rel=0.12)


@pytest.mark.parametrize(("steps", "cycles"), ((0, 1755), (32, 55)))
def test_kernels_that_poll_have_a_share_of_the_grid_barrier(steps, cycles, monkeypatch):
    monkeypatch.setattr(sass, "disassemble", lambda cubin: "")
    monkeypatch.setattr(sass, "parse", lambda text: ([], []))
    launch = SimpleNamespace(
        spec=DeviceSpec.named("sm_90"), asm={"cubin": b""}, warps=8, arguments={"exchange.counters": 0},
        constants={"FORM": SimpleNamespace(ROUND=steps)},
    )  # fmt: skip
    assert modelled(launch).barrier == cycles
    launch.arguments = {}
    assert modelled(launch).barrier == 0


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "programs"),
    [
        ("sm_90", 255, 8, 0, 1),  # 65,536 registers
        ("sm_90", 32, 16, 0, 4),  # 64 warps
        ("sm_90", 32, 4, 227 * 1024, 1),
        ("sm_90", 32, 4, 113 * 1024, 2),
        ("sm_80", 256, 16, 0, 0),
        ("gfx942", 352, 4, 8192, 1),  # one wave a SIMD
        ("gfx942", 128, 4, 8192, 4),
        ("gfx942", 128, 4, 40960, 1),
    ],
)
def test_occupancy(arch, registers, warps, shared, programs):
    assert occupancy(DeviceSpec.named(arch), registers, warps, shared) == programs


def test_executed_code_agrees_with_the_reference():
    flags = ["--cell", "lstm", "gru", "--hidden", "24", "--batch", "3", "--dtype", "bfloat16", "--arch", "sm_90"]
    done = cli("inspect", *flags, "--execute", "--steps", "2", "--seed", "1", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["pass"] for row in rows] == ["forward", "backward"] * 2
    for row in rows:
        assert 0 < row["executed_max_error"] < 0.1 and 0 < row["executed_budget_used"] <= 1, row
        # What the warps of a program run a step is what the machine code's loop holds for one, about.
        ratio = row["executed_instructions_per_step"] / (row["warps"] * row["loop_instructions"])
        assert 0.5 < ratio < 2, row
        assert sum(row["executed_instructions_by_block"].values()) == pytest.approx(
            row["executed_instructions_per_step"], abs=1
        )


@pytest.mark.skipif("gfx942" not in DUMPED, reason="Triton 3.6 compiles no AMD kernels of ours")
def test_amd_code_is_not_executed():
    done = cli("inspect", "--cell", "gru", "--hidden", "16", "--arch", "gfx942", "--execute")
    assert done.returncode == 2 and "execution of gfx942 code is missing" in done.stderr


def test_table_for_people():
    pytest.importorskip("rich")
    done = cli("inspect", "--cell", "rnn_tanh", "--hidden", "16", "--pass", "forward")
    assert done.returncode == 0, done.stderr
    assert "rnn_tanh, H=16, B=16, bfloat16, sm_90: resident" in done.stdout
    assert re.search(r"weight_global_loads_in_loop\W+0\b", done.stdout)
    assert "modelled: the largest of six bounds, from the compiled code, not measured" in done.stdout
    assert "simulated, not measured: a simulation of this kind gave two published times" in done.stdout
    assert re.search(r"simulated_cycles_per_step\W+\d", done.stdout)


def test_bounds_alone_are_not_simulated():
    done = cli("inspect", "--cell", "rnn_tanh", "--hidden", "16", "--pass", "forward", "--bounds", "--json")
    record = json.loads(done.stdout)
    assert record["modelled_bounds"] and not any(key.startswith("simulated") for key in record)


def test_a_step_is_shown_and_resources_made_free(tmp_path):
    pytest.importorskip("rich")
    file = tmp_path / "step.png"
    flags = ["--timeline", *([str(file)] if importlib.util.find_spec("matplotlib") else []), "--what-if"]
    done = cli("inspect", "--cell", "rnn_tanh", "--hidden", "16", "--pass", "forward", *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"simulated_what_if\W+.* [\d,]+", done.stdout) and "special functions" in done.stdout
    assert "warps, " in done.stdout and "barriers and fences:" in done.stdout
    assert done.stdout.count("simulated, not measured") == 2
    assert not flags[1].endswith(".png") or file.read_bytes()[:4] == b"\x89PNG"


def test_a_table_without_rich_names_the_extra(monkeypatch):
    from fastrnn.inspect.report import print_table

    for module in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match="tables need rich: pip install rich"):
        print_table([{"missing": "everything"}])


def test_nothing_planned_is_said():
    done = cli("inspect", "--cell", "lstm", "--hidden", "9999", "--json")
    assert done.returncode == 1 and not done.stderr
    assert "W_hh does not fit one program" in json.loads(done.stdout)["missing"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("inspect --cell lstm --hidden 0", "ValueError: hidden_size: expected a positive int, got 0"),
        ("inspect --cell elman --hidden 8", "argument --cell: invalid choice: 'elman'"),
        ("inspect --cell lstm --hidden 8 --arch sm_70", "argument --arch: invalid choice: 'sm_70'"),
        ("plan --cell lstm --hidden 8 --backend resident --batch 0", "batch_size: expected a positive int, got 0"),
        (
            "plan --cell slstm --hidden 64 --heads 3",
            "ValueError: num_heads: expected a divisor of hidden_size, which is 64",
        ),
        ("inspect --cell gru --hidden 64 --num-heads 0", "ValueError: num_heads: expected a divisor of hidden_size"),
        ("plan --cell lstm --hidden 4096 --backend resident", "NotImplementedError: backend='resident': W_hh does not"),
        (
            "inspect --cell gru --hidden 8 --bounds --what-if",
            "ValueError: bounds: expected neither --timeline nor --what-if",
        ),
        (
            "inspect --cell gru --hidden 8 --json --timeline",
            "ValueError: timeline: expected --timeline FILE with --json, for a picture",
        ),
        (
            "inspect --cell gru --hidden 8 --arch sm_89 --what-if",
            "NotImplementedError: simulation of sm_89 is missing: ",
        ),
        ("", "required: command"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    done = cli(*arguments.split())
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_measuring_without_a_gpu_says_so():
    done = cli("inspect", "--cell", "rnn_relu", "--hidden", "16", "--measure", "--json")
    assert done.returncode == 2 and "RuntimeError: measuring needs a GPU" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to measure on")
def test_measured_on_the_gpu_at_hand():
    arch = DeviceSpec.of(torch.device("cuda")).arch
    done = cli("inspect", "--cell", "gru", "--hidden", "64", "--arch", arch, "--measure", "--json")
    assert done.returncode == 0, done.stderr
    assert all(0 < json.loads(line)["measured_us_per_step"] < 1000 for line in done.stdout.splitlines())


def test_plan_prints_each_problem(capsys):
    cells, kinds = ["--cell", "lstm", "gru"], ["--dtype", "bfloat16", "float32", "--precision", "tf32", "ieee"]
    assert main(["plan", *cells, "--hidden", "64", *kinds, "--steps", "9"]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert len(heads) == 7 and heads[-1] == "defaults taken: --batch 16, --arch sm_90"
    assert heads[0] == "lstm, T=9, B=16, H=64, bfloat16, on sm_90: backend resident"
    assert main(["plan", "--cell", "slstm", "--hidden", "768", "--num-heads", "12"]) == 0
    printed = capsys.readouterr().out
    assert "slstm, T=1024, B=16, H=768 in 12 heads, bfloat16, on sm_90: backend resident" in printed
    assert "24 = 2 batch tile(s) of 8 rows x 1 direction(s) x 12 heads" in printed
    assert printed.endswith("defaults taken: --batch 16, --dtype bfloat16, --arch sm_90, --steps 1024\n")
    sizes = ("--batch", "8", "--dtype", "float16", "--arch", "sm_80", "--steps", "7")
    assert main(["plan", "--cell", "lstm", "--hidden", "64", *sizes]) == 0
    assert "defaults" not in capsys.readouterr().out


def test_inspect_knows_heads():
    """A program a head, of the size of one; what the table's title says is in the record."""
    done = cli("inspect", "--cell", "slstm", "--hidden", "48", "--num-heads", "3", "--pass", "forward", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["hidden"], record["heads"], record["programs"]) == (48, 3, 3)
    assert record["weight_bytes_on_chip"] == 2 * 4 * 16 * 16


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    found = dict(re.findall(r"^(\S+(?: \S+)?)\s{2,}(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert torch.__version__ in found["torch"]
    assert found["backend resident"] == found["backend cooperative"] == found["backend torch"] == "usable"
    if not torch.cuda.is_available():
        done = cli("doctor")
        assert "backend resident     not usable" in done.stdout
        assert done.stdout.count("TRITON_INTERPRET=1") == 1  # the other tiers refer to it
        assert "backend cooperative  not usable, as resident" in done.stdout


@pytest.mark.parametrize(
    ("version", "found"), (((3, 5), "needs Triton 3.6"), ((3, 7), "but for clusters"), ((3, 9), "usable"))
)
def test_doctor_knows_what_a_triton_compiles(version, found, monkeypatch):
    monkeypatch.setattr(spills, "triton_version", lambda: version)
    assert found in doctor.gluon()


@pytest.mark.parametrize(("flags", "program"), [((), "cuobjdump"), (("--execute",), "gcc")])
def test_a_missing_program_is_said_in_one_line(tmp_path, flags, program):
    """As on a machine that lacks it: nothing on the path, and none beside Triton."""
    code = "import os, sys; from unittest import mock; from fastrnn.__main__ import main\n"
    code += f"access = os.access; os.access = lambda p, m: not str(p).endswith({program!r}) and access(p, m)\n"
    arguments = ["inspect", "--cell", "gru", "--hidden", "16", "--pass", "forward", "--json", *flags]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", code + f"sys.exit(main({arguments}))"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    said = done.stderr.splitlines()[0]  # behind it nanobind may count, as Python ends, what an exception still held
    assert said.startswith("RuntimeError: ") and program in said and "Traceback" not in done.stderr


def test_a_program_that_fails_says_why(tmp_path, monkeypatch):
    from fastrnn.inspect import programs

    (tmp_path / "tool").write_text("#!/bin/sh\necho no such architecture >&2\nexit 3\n")
    (tmp_path / "tool").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="^counting: tool failed with status 3: no such architecture$"):
        programs.run(["tool"], "counting")
    (tmp_path / "tool").chmod(0o644)
    with pytest.raises(RuntimeError, match="^counting needs tool, which does not run here: "):
        programs.run(["tool"], "counting")


@pytest.mark.parametrize("flag", ("--trace", "--plot"))
def test_a_file_that_cannot_be_written_is_said_in_one_line(flag, tmp_path, capsys, monkeypatch):
    from fastrnn.__main__ import main
    from fastrnn.inspect import profile

    monkeypatch.setattr(profile.Light, "of", lambda device, dtype: None)
    asked = ["profile", "--cell", "gru", "--hidden", "4", "--seq", "3", flag, str(tmp_path / "nothing" / "file.png")]
    assert main(asked) == 2
    assert "nothing" in capsys.readouterr().err
