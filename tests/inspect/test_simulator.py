"""The simulator beside microbenchmarks that others have published, and with figures and rules of it broken."""

import importlib
import inspect
import re
import textwrap
from dataclasses import fields

import pytest

from fastrnn.inspect import sass
from fastrnn.inspect.simulator import ERROR, barriers, memory, multiprocessor, note, timeline
from fastrnn.inspect.simulator import figures as table
from fastrnn.inspect.simulator.decode import Operand, decode, decoded, operand, split
from fastrnn.inspect.simulator.simulate import conflicts, prepared, simulate
from fastrnn.inspect.simulator.what_if import FREED, what_if

from ..support.microbenchmarks import MICROBENCHMARKS, STEPS

# Name of a microbenchmark, published cycles of one instruction of a warp (of 16 warps on 4 schedulers: 4 a scheduler),
# how far off the simulated ones may be, and the source as in figures.py.
PUBLISHED = (
    ("fma, dependent", 4.11, 0.03, "N"),
    ("fma", 1.10, 0.07, "N"),
    ("fma, 8 warps", 2 * 1.0, 0.03, "G"),
    ("imad", 2.07, 0.03, "N"),
    ("imad, 8 warps", 2 * 2, 0.02, "G"),
    ("tanh, dependent", 18, 0.02, "A"),
    ("sine, dependent", 22.97, 0.04, "N"),
    ("tanh", 8.3, 0.03, "N"),
    ("tanh, 8 warps", 2 * 8, 0.01, "G"),
    ("shared load, dependent", 23.00, 0.01, "N"),
    ("shared store and load", 28.00, 0.04, "N"),
    ("ldmatrix x1, dependent", 23.1, 0.02, "S, A100"),
    ("ldmatrix x2, dependent", 25.1, 0.02, "S, A100"),
    ("ldmatrix x4, dependent", 29.3, 0.02, "S, A100"),
    ("shared store", 4.14, 0.02, "N"),
    ("global store of 8 bytes", 8.11, 0.03, "N"),
    ("reduction", 6.64, 0.11, "N"),
    ("shuffle, dependent", 26.0, 0.01, "N"),
    ("mma, dependent", 24.17, 0.02, "N"),
    ("mma, 16 warps", 4 * 6.1, 0.03, "L: 65.3% of the peak"),
    ("ldmatrix x1, 16 warps", 16 * 128 / 128, 0.09, "L: 128 bytes a cycle"),
    ("ldmatrix x2, 16 warps", 16 * 256 / 128, 0.03, "L: 128 bytes a cycle"),
    ("ldmatrix x4, 16 warps", 16 * 512 / 128, 0.03, "L: 128 bytes a cycle"),
    ("shared loads of 4 bytes, 16 warps", 16 * 128 / 128, 0.1, "L: 128 bytes a cycle"),
    ("shared loads of 8 bytes, 16 warps", 16 * 256 / 128, 0.09, "L: 128 bytes a cycle"),
    ("shared loads of 16 bytes, 16 warps", 16 * 512 / 128, 0.05, "L: 128 bytes a cycle"),
    ("shared loads that meet a bank 2 times, 16 warps", 16 * 2, 0.09, "S: a pass a conflict"),
    ("shared loads that meet a bank 4 times, 16 warps", 16 * 4, 0.03, "S: a pass a conflict"),
    ("shared loads that meet a bank 8 times, 16 warps", 16 * 8, 0.03, "S: a pass a conflict"),
    ("ldmatrix x1 of rows 128 bytes apart, 16 warps", 16 * 8, 0.03, "S: a pass a conflict"),
    ("bar.sync, 1 warp", 14.16, 0.06, "N"),
    ("bar.sync, 2 warps, sm_80", 25, 0.04, "B"),
    ("bar.sync, 4 warps, sm_80", 29, 0.04, "B"),
    ("bar.sync, 8 warps, sm_80", 37, 0.04, "B"),
    ("bar.sync, 16 warps, sm_80", 53, 0.03, "B"),
    ("bar.sync, 32 warps, sm_80", 85, 0.03, "B"),
    ("fence of the device", 668.9, 0.04, "N"),
    ("cluster barrier, relaxed", 74.73, 0.02, "N"),
    ("cluster barrier", 761.1, 0.02, "N"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "published", "within", "source"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_a_published_microbenchmark(name, published, within, source):
    assert MICROBENCHMARKS[name].cycles() == pytest.approx(published, rel=within), source


@pytest.mark.parametrize(
    ("longer", "shorter", "published"),
    (
        ("L2 in a chain", "shared load in a chain", 280 - 23),  # [N]
        ("cluster load in a chain, another's", "cluster load in a chain, one's own", 203 - 32),  # [N]
        ("cluster load in a chain, one's own", "shared load in a chain", 32 - 23),  # [N]
    ),
)
def test_latencies_apart(longer, shorter, published):
    """Loads of one chain, from two places: what the chain takes beside them drops out, but for who maps an address."""
    found = MICROBENCHMARKS[longer].cycles(is_cached=True) - MICROBENCHMARKS[shorter].cycles()
    address = 22 if "cluster" in longer and "shared" in shorter else 0  # a special register says where its window is
    assert found - address == pytest.approx(published, abs=8)


def test_what_is_not_in_l2_comes_from_memory():
    chain = MICROBENCHMARKS["L2 in a chain"]
    assert chain.cycles() - chain.cycles(is_cached=True) == pytest.approx(670 - 280, abs=2)  # [N]


# A latency, a pipe, a rule taken out, and the microbenchmark that must move by a tenth at least.
MUTATIONS = (
    ({"special_latency": 0}, "tanh, dependent"),
    ({"shared_latency": 0}, "shared load, dependent"),
    ({"wavefront_latency": 0, "link": 1e9}, "ldmatrix x4, dependent"),
    ({"shuffle_latency": 0}, "shuffle, dependent"),
    ({"fma": 0}, "imad, 8 warps"),
    ({"fma_pipes": 1}, "fma"),
    ({"special": 0}, "tanh, 8 warps"),
    ({"tensor": 0}, "mma, 16 warps"),
    ({"shared_bytes": 1e9}, "shared loads that meet a bank 8 times, 16 warps"),
    ({"address": 0, "link": 1e9}, "reduction, 8 warps"),
    ({"barrier": 0}, "bar.sync, 1 warp"),
    ({"barrier_warp": 0}, "bar.sync, 32 warps"),
    ({"fence_device": 0}, "fence of the device"),
    ({"cluster_barrier": 0}, "cluster barrier, relaxed"),
    ({"dsmem_latency": 0}, "cluster load in a chain, another's"),
    ({"dsmem_own_latency": 0}, "cluster load in a chain, one's own"),
    ({"hbm_latency": 0, "l2_latency": 0}, "L2 in a chain"),
)  # fmt: skip


@pytest.mark.parametrize(("changes", "name"), MUTATIONS, ids=["+".join(changes) for changes, _ in MUTATIONS])
def test_a_figure_that_is_taken_out_is_noticed(changes, name):
    benchmark = MICROBENCHMARKS[name]
    assert abs(benchmark.cycles(**changes) / benchmark.cycles() - 1) > 0.1


BROKEN = (
    ("multiprocessor.Multiprocessor.wakes", "warp.blocked or any(", "any(", "bar.sync, 8 warps"),
    ("multiprocessor.Multiprocessor.wakes", "for board in op.code.awaits", "for board in ()", "shared load, dependent"),
    ("multiprocessor.Multiprocessor.issue", "max(1, code.stall)", "1", "fma, dependent"),
    ("multiprocessor.Multiprocessor._compute", "free[pipe] = begins + cycles", "free[pipe] = time", "mma, 16 warps"),
    ("accesses.wavefronts", ".sum(axis=1)", ".max(axis=1)", "ldmatrix x4, 16 warps"),
    ("accesses.wavefronts", "group, words = 8, 4", "group, words = 1, 4", "ldmatrix x1, 16 warps"),
    ("accesses.most_distinct", ".max(axis=1)", ".min(axis=1)", "shared loads that meet a bank 8 times, 16 warps"),
    ("barriers.Barriers._fence", "figures.fence_device if op.is_far_fence else", "", "fence of the device"),
    ("barriers.Barriers.stored", "time + self.figures.reduction_travel", "time", "data, polled"),
    ("barriers.Barriers.must_poll_again", "return not found", "return False", "data, polled"),
)  # fmt: skip


@pytest.mark.parametrize(("function", "old", "new", "name"), BROKEN, ids=[f"{row[0]}: {row[2]}" for row in BROKEN])
def test_a_rule_that_is_broken_is_noticed(function, old, new, name, monkeypatch):
    """A text of the simulator replaced: the microbenchmark moves by a tenth, or nothing runs."""
    expected = MICROBENCHMARKS[name].cycles()
    module_name, *path = function.split(".")
    module = importlib.import_module(f"fastrnn.inspect.simulator.{module_name}")
    owner = module if len(path) == 1 else getattr(module, path[0])
    source = textwrap.dedent(inspect.getsource(getattr(owner, path[-1])))
    assert old in source, f"{old!r} is not in {function} any more: break what took its place"
    scope: dict = {}
    exec(source.replace(old, new), vars(module), scope)
    monkeypatch.setattr(owner, path[-1], scope[path[-1]])
    prepared.cache_clear()
    try:
        found = MICROBENCHMARKS[name].cycles()
    except (AssertionError, RuntimeError):
        return
    finally:
        prepared.cache_clear()
    assert abs(found / expected - 1) > 0.1


# The first pass.


def test_operands():
    assert split("R4, desc[UR8][R200.64+0x40], c[0x0][0x210], 0x8, !PT") == [
        "R4", "desc[UR8][R200.64+0x40]", "c[0x0][0x210]", "0x8", "!PT",
    ]  # fmt: skip
    assert operand("-R7") == Operand("R", 7, negated=True, text="-R7")
    assert (operand("RZ").number, operand("-0x1").number) == (-1, 0xFFFFFFFF)


def instruction(text: str) -> sass.Instruction:
    opcode = text.split()[1] if text.startswith("@") else text.split()[0]
    return sass.Instruction(text, opcode, 1, (), None, None, None)


@pytest.mark.parametrize(
    ("text", "results", "address"),
    (
        ("IADD3 R10, P1, PT, R2, UR4, RZ", ("R10", "P1", "PT"), None),
        ("ISETP.GE.U32.AND P0, PT, R0, UR5, PT", ("P0", "PT"), None),
        ("LOP3.LUT P0, RZ, R1, 0x1f, RZ, 0xc0, !PT", ("P0", "RZ"), None),
        ("STS.64 [R3+UR5+0x10], R4", (), (("R", 3, False, 1), ("UR", 5, False, 1), ("number", 16, False, 1))),
        ("LDG.E R4, desc[UR8][R2.64+-0x8]", ("R4",), (("R", 2, True, 1), ("number", -8, False, 1))),
        ("LD.E R4, [R2.U32+UR6]", ("R4",), (("R", 2, False, 1), ("UR", 6, True, 1))),
        ("LDS R4, [R2.X4+0x8]", ("R4",), (("R", 2, False, 4), ("number", 8, False, 1))),
    ),
)
def test_what_an_instruction_writes_and_where(text, results, address):
    op = decode(0, instruction(text))
    assert tuple(one.text for one in op.results) == results and op.address == address


def test_an_unknown_instruction_is_said():
    with pytest.raises(NotImplementedError, match="simulation of HGMMA.64x64x16.F32 is missing"):
        decode(0, instruction("HGMMA.64x64x16.F32 R4, gdesc[UR4], R4"))


def test_without_a_loop_there_is_nothing_to_simulate():
    from fastrnn.inspect.simulator.decode import step_loop

    with pytest.raises(ValueError, match="expected a loop over time in the machine code, found none"):
        step_loop(sass.Code([instruction("EXIT")], []))


def test_conflicts_of_banks_are_counted():
    of = MICROBENCHMARKS["shared loads that meet a bank 4 times, 16 warps"]
    found = conflicts(of.kernel)
    assert len(found) == 32 and {(one.wavefronts, one.least, one.is_ldmatrix) for one in found} == {(4, 1, False)}
    found = conflicts(MICROBENCHMARKS["ldmatrix x1 of rows 128 bytes apart, 16 warps"].kernel)
    assert len(found) == 32 and {(one.wavefronts, one.least, one.is_ldmatrix) for one in found} == {(8, 1, True)}
    assert conflicts(MICROBENCHMARKS["ldmatrix x4, 16 warps"].kernel) == []


def test_lanes_that_part_run_one_after_the_other_and_meet_again():
    (ran,) = prepared(MICROBENCHMARKS["lanes that part"].kernel, STEPS).traces.ran
    loads = [one.lanes for one in ran if one.op.name == "LDS"]
    assert sorted(loads) == STEPS * 9 * [8] + STEPS * 9 * [24]
    assert {one.lanes for one in ran if one.op.name == "SHFL"} == {32}
    assert {one.lanes for one in ran if one.op.name == "BSYNC"} == {8, 24}


def test_a_loop_whose_length_is_in_memory_goes_on():
    found = MICROBENCHMARKS["a length from memory"].simulated()
    assert len(found.ends) == STEPS + 1 and [text.split()[1] for text in found.unknown] == ["BRA"]
    assert MICROBENCHMARKS["a length from memory"].cycles() == pytest.approx(4.11, rel=0.03)


def test_a_counter_is_polled_until_it_is_high_enough():
    """A release, the addition's way to L2, and loads that come too early: each is in the step."""
    benchmark = MICROBENCHMARKS["a counter, polled"]
    found = prepared(benchmark.kernel, STEPS)
    assert found.poll is not None and found.poll.ahead == 1
    whole = benchmark.cycles()
    assert whole > 680 + 200 + 280
    assert whole - benchmark.cycles(fence_device=0) == pytest.approx(680, abs=40)
    assert benchmark.cycles(reduction_travel=1000) > whole + 500  # by whole polls
    polls = [index for _, index in benchmark.simulated().machine.warps[0].issues if index == found.poll.load]
    assert len(polls) > STEPS


def test_data_are_polled_until_they_have_come():
    """No fence: the store's way to L2, and loads until they find it."""
    benchmark = MICROBENCHMARKS["data, polled"]
    found = prepared(benchmark.kernel, STEPS)
    assert found.poll is not None and (found.poll.ahead, found.poll.stores, len(found.poll.others)) == (1, 2, 1)
    simulated, whole = benchmark.simulated(), benchmark.cycles()
    assert simulated.unknown == () and whole == benchmark.cycles(fence_device=0)
    # Two stores a step, then a load that comes too early, one that does not, and that of the second loop.
    assert 3 * 280 < 2 * whole < 200 + 3 * 280
    assert benchmark.cycles(reduction_travel=1000) > whole + 300  # by whole polls
    polls = [index for _, index in simulated.machine.warps[0].issues if index == found.poll.load]
    assert len(polls) > STEPS


# Figures.


def test_every_figure_has_a_source_and_an_architecture():
    for name, meaning, arch, value, source in table.table():
        assert meaning and arch in table.ARCHS and value > 0
        assert "assumed" in source or "[" in source, name
    sources = set("GWFHNLSABCPJ")
    cited = {letter for *_, source in table.table() for letter in sources if f"[{letter}]" in source}
    described = {letter for letter in sources if f"[{letter}]" in (table.__doc__ or "")}
    assert described == sources and cited == described


def test_figures_of_other_architectures_are_named():
    own = {arch: {one.name for one in fields(table.Figures)} - set(table.borrowed(arch)) for arch in table.ARCHS}
    assert own["sm_80"] == {"fma_pipes", "tensor", "barrier", "fence_device"} and own["sm_120"] == {"tensor"}
    assert own["sm_100"] == set() and len(own["sm_90"]) == len(fields(table.Figures))


def test_a_simulation_says_whose_figures_it_has():
    assert note("sm_90") == ERROR
    assert note("sm_80").endswith(
        f"; {len(fields(table.Figures)) - 4} of its {len(fields(table.Figures))} figures are sm_90's"
    )


def test_an_architecture_without_figures_is_refused():
    with pytest.raises(NotImplementedError, match="simulation of sm_89 is missing: .* sm_80, sm_90, sm_100, sm_120"):
        simulate(MICROBENCHMARKS["fma"].kernel, "sm_89")


# What is made of it.


def test_a_warps_cycles_add_up():
    """Each cycle of each warp is an issue or has one cause."""
    for name in ("tanh, 8 warps", "bar.sync, 8 warps", "shared loads of 16 bytes, 16 warps"):
        for warp in MICROBENCHMARKS[name].simulated().machine.warps:
            cycles = [time for time, _ in warp.issues]
            cycles += [time for start, end, _ in warp.waits for time in range(start, end)]
            assert sorted(cycles) == list(range(min(cycles), warp.issues[-1][0] + 1))


def test_what_warps_wait_for_adds_up_to_the_step():
    """Where a barrier holds them together."""
    found = MICROBENCHMARKS["bar.sync, 8 warps"].simulated()
    assert sum(found.waits.values()) == pytest.approx(found.cycles, rel=0.01)
    assert found.waits["barrier"] > 0.9 * found.cycles


def test_what_if_frees_each_resource():
    kernel = MICROBENCHMARKS["tanh, dependent"].kernel
    found, plain = what_if(kernel, "sm_90"), simulate(kernel, "sm_90").cycles
    assert set(found) == set(FREED)
    assert found["latency of special functions"] < 0.6 * plain and found["tensor cores"] == plain


def test_the_text_of_a_timeline():
    found = MICROBENCHMARKS["bar.sync, 8 warps"].simulated()
    lines = list(timeline.text(found))
    assert lines[0].startswith(f"{found.cycles:,.0f} cycles a step, simulated")
    assert sum("BAR.SYNC" in line for line in lines) > 20
    assert [line.split("|")[0].strip() for line in lines if line.endswith("|")] == [str(n) for n in range(8)]
    assert any(line.startswith("  barrier ") for line in lines)


def test_a_picture_of_a_timeline(tmp_path):
    pytest.importorskip("matplotlib")
    timeline.picture(MICROBENCHMARKS["tanh, 8 warps"].simulated(), "tanh", tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_knows_every_cause_of_waiting():
    """A cause that belongs to none of the six kinds would end the picture of a kernel that meets it."""
    causes = set(multiprocessor.LOADS.values())
    for room in (multiprocessor, memory, barriers):
        for line in inspect.getsource(room).splitlines():
            if re.search(r"\.block\(|\.hold\(|\buntil\(|\blevel = ", line):
                causes |= set(re.findall(r'"([\w ]+)"', line))
    assert causes >= {"cluster barrier", "fence", "branch", "stall count", "another warp issued", "device memory", "L1"}
    assert {timeline.kind_of(cause) for cause in causes} == set(timeline.KINDS) - {"pipes"}
    assert timeline.kind_of("pipe: integer") == timeline.kind_of("special function") == "pipes"


def test_all_of_a_kernel_is_decoded():
    kernel = MICROBENCHMARKS["mma, dependent"].kernel
    ops = decoded(sass.read(sass.disassemble(kernel.cubin)))
    assert {op.pipe for op in ops} >= {"tensor", "memory", "integer", "branch"}
