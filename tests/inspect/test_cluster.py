"""The rule of clusters on PTX with and without the barrier that it asks for; the miscompile that it was made for."""

import random
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from fastrnn.inspect.addresses import ANY, WORD, Value, binary, constant, extent, result
from fastrnn.inspect.cluster import unguarded
from fastrnn.inspect.ptx import FENCE, Instruction

from ..support import children
from .test_compiled import child

ROOT = Path(__file__).parents[2]
TRITON = version("triton")
compiles_clusters = pytest.mark.skipif(
    tuple(map(int, TRITON.split(".")[:2])) < (3, 9),
    reason=f"Triton {TRITON} cannot compile tile Triton with num_ctas > 1: TritonGPUPlanCTAPass fails up to 3.8",
)

HEADER = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 128
{
	mov.u32 %r0, %tid.x;
	mov.u32 %r1, %cluster_ctarank;
	xor.b32 %r2, %r1, 1;
	mov.b32 %r3, global_smem;
	shl.b32 %r4, %r0, 4;
	and.b32 %r5, %r0, 7;
	shl.b32 %r6, %r5, 4;
	xor.b32 %r7, %r4, %r6;       // swizzled, below 2048
	add.s32 %r8, %r3, %r7;
"""
BARRIER = "barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;"

# One buffer: a cluster barrier on either side of the remote read.
EXCHANGE = """
	st.shared.v4.b32 [%r8+4096], {%r10, %r11, %r12, %r13};
	BARRIER_1
	add.s32 %r9, %r8, 4096;
	mapa.shared::cluster.u32 %r14, %r9, %r2;
	ld.shared::cluster.v4.b32 {%r10, %r11, %r12, %r13}, [%r14];
	BARRIER_2
	st.shared.v4.b32 [%r8+4096], {%r10, %r11, %r12, %r13};
"""

# Two buffers from 4096 on, in turns, and a tile of the block's own below: one cluster barrier a step.
LOOP = """
	mov.b64 %rd1, 0;
	stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r8+4096], {%r10, %r11, %r12, %r13};
$STEP:
	BARRIER_1
	cvt.u32.u64 %r20, %rd1;
	and.b32 %r21, %r20, 2048;
	add.s32 %r22, %r8, %r21;
	add.s32 %r23, %r22, 4096;
	mapa.shared::cluster.u32 %r24, %r23, %r2;
	ld.shared::cluster.v4.b32 {%r10, %r11, %r12, %r13}, [%r24];
	st.shared.v4.b32 [%r8], {%r10, %r11, %r12, %r13};
	bar.sync 0;
	xor.b32 %r25, %r7, 64;
	add.s32 %r26, %r3, %r25;
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r26];
	add.s64 %rd1, %rd1, 2048;
	cvt.u32.u64 %r27, %rd1;
	and.b32 %r28, %r27, 2048;
	add.s32 %r29, %r8, %r28;
	stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r29+4096], {%r10, %r11, %r12, %r13};
	setp.lt.s64 %p1, %rd1, %rd2;
	@%p1 bra $STEP;
	BARRIER_2
"""
FLIPPED = (LOOP.replace("mov.b64 %rd1, 0;", "mov.b64 %rd1, 0;\n\tmov.b32 %r20, 0;")
           .replace("cvt.u32.u64 %r20, %rd1;\n\tand.b32 %r21, %r20, 2048;", "mov.b32 %r21, %r20;")
           .replace("cvt.u32.u64 %r27, %rd1;\n\tand.b32 %r28, %r27, 2048;",
                    "xor.b32 %r20, %r20, 2048;\n\tmov.b32 %r28, %r20;")
           )  # fmt: skip


def found(body: str, *changes: tuple[str, str]) -> list[tuple[str, str]]:
    """Opcodes of what the rule reports of a body, its barriers in place unless they are changed."""
    for old, new in changes:
        assert old in body, f"{old} is not in the PTX: the mutation changes nothing"
        body = body.replace(old, new)
    body = body.replace("BARRIER_1", BARRIER).replace("BARRIER_2", BARRIER)
    pairs = unguarded(HEADER + body + f"\n\t{BARRIER}\n\tret;\n}}\n")
    return sorted({(remote.parts[0], other.parts[0]) for remote, other in pairs})


@pytest.mark.parametrize("body", (EXCHANGE, LOOP, FLIPPED), ids=("exchange", "loop", "flipped"))
def test_right_code_is_silent(body):
    assert found(body) == []


@pytest.mark.parametrize("barrier", ("", "bar.sync 0;", BARRIER.replace("arrive", "arrive.relaxed")))
@pytest.mark.parametrize(
    ("body", "which", "expected"),
    [
        (EXCHANGE, "BARRIER_1", [("ld", "st")]),
        (EXCHANGE, "BARRIER_2", [("ld", "st")]),
        (LOOP, "BARRIER_1", [("ld", "stmatrix")]),
        (FLIPPED, "BARRIER_1", [("ld", "stmatrix")]),
    ],
)
def test_a_missing_cluster_barrier_is_reported(body, which, expected, barrier):
    assert found(body, (which, barrier)) == expected


FENCED = f"{FENCE};\n\t" + BARRIER.replace("arrive", "arrive.relaxed")


@pytest.mark.parametrize("body", (EXCHANGE, LOOP, FLIPPED), ids=("exchange", "loop", "flipped"))
def test_a_fence_before_a_relaxed_arrival_publishes(body):
    assert found(body, ("BARRIER_1", FENCED)) == []


@pytest.mark.parametrize(
    "barrier",
    (
        FENCED.replace(f"{FENCE};", f"{FENCE};\n\tst.shared.b32 [%r8+4096], %r1;"),  # written behind the fence
        FENCED.replace(".release", ".acquire"),
        FENCED.replace(f"{FENCE};\n", f"{FENCE};\n$AGAIN:\n\t@%p1 bra $AGAIN;\n"),  # another block: not followed
    ),
    ids=("store behind it", "acquire", "another block"),
)
def test_a_fence_that_does_not_publish_is_reported(barrier):
    assert found(EXCHANGE, ("BARRIER_1", barrier)) == [("ld", "st")]


@pytest.mark.parametrize(
    ("body", "old", "new", "expected"),
    [
        # Both steps in one buffer: a store after the read, before the next barrier, around the loop's end or not.
        (LOOP, "and.b32 %r21, %r20, 2048;", "mov.b32 %r21, 0;", [("ld", "stmatrix")]),
        (LOOP, "add.s64 %rd1, %rd1, 2048;", "add.s64 %rd1, %rd1, 4096;", [("ld", "stmatrix")]),
        (LOOP, "and.b32 %r28, %r27, 2048;", "mov.b32 %r28, %r21;", [("ld", "stmatrix")]),
        (FLIPPED, "xor.b32 %r20, %r20, 2048;", "xor.b32 %r20, %r20, 0;", [("ld", "stmatrix")]),
        # The block's own tile where the buffers are.
        (LOOP, "st.shared.v4.b32 [%r8]", "st.shared.v4.b32 [%r8+4096]", [("ld", "st")]),
        # One row too many, one thread in all.
        (LOOP, "st.shared.v4.b32 [%r8]", "st.shared.v4.b32 [%r8+2064]", [("ld", "st")]),
        # An address that is not understood may be anywhere.
        (LOOP, "st.shared.v4.b32 [%r8]", "st.shared.v4.b32 [%r99]", [("ld", "st")]),
        (LOOP, "cvt.u32.u64 %r20, %rd1;", "div.u32 %r20, %r9, 3;", [("ld", "stmatrix")]),
        # The store between arrival and wait: the others may read before it.
        (EXCHANGE, "BARRIER_2", "barrier.cluster.arrive.aligned;\nst.shared.b32 [%r8+4096], %r1;\n"
         "barrier.cluster.wait.aligned;", [("ld", "st")]),
        (EXCHANGE, "BARRIER_1", "barrier.cluster.arrive.aligned;\nst.shared.b32 [%r8+4096], %r1;\n"
         "barrier.cluster.wait.aligned;", [("ld", "st")]),
        # A store to another block, which that block reads.
        (EXCHANGE, "ld.shared::cluster.v4.b32 {%r10, %r11, %r12, %r13}, [%r14];",
         "st.shared::cluster.b32 [%r14], %r1;\nld.shared.b32 %r1, [%r8+4096];", [("st", "ld")]),
        # Only one branch has the barrier.
        (EXCHANGE, "BARRIER_1", f"@%p1 bra $READ;\n{BARRIER}\n$READ:\n", [("ld", "st")]),
        (EXCHANGE, "BARRIER_1", f"@%p1 bra $WAIT;\nbra.uni $READ;\n$WAIT:\n{BARRIER}\n$READ:\n", [("ld", "st")]),
        # A buffer that a condition chooses is either.
        (EXCHANGE, "BARRIER_1", f"{BARRIER}\nselp.b32 %r30, 0, 4096, %p1;\nadd.s32 %r31, %r8, %r30;\n"
         "st.shared.b32 [%r31], %r1;", [("ld", "st")]),
        (EXCHANGE, "BARRIER_1", f"{BARRIER}\nmov.b32 %r30, 4096;\n@%p1 mov.b32 %r30, 0;\nadd.s32 %r31, %r8, %r30;\n"
         "st.shared.b32 [%r31], %r1;", [("ld", "st")]),
        (EXCHANGE, "BARRIER_1", f"{BARRIER}\nmov.b32 %r30, 8192;\nld.shared.v2.b32 {{%r30, %r32}}, [%r8];\n"
         "add.s32 %r31, %r8, %r30;\nst.shared.b32 [%r31], %r1;", [("ld", "st")]),
        (EXCHANGE, "BARRIER_1", f"{BARRIER}\n@%p1 mov.b32 %r30, 0;\nadd.s32 %r31, %r8, %r30;\n"
         "st.shared.b32 [%r31], %r1;", [("ld", "st")]),
    ],
)  # fmt: skip
def test_each_part_of_the_rule_is_needed(body, old, new, expected):
    assert found(body, (old, new)) == expected


def test_a_block_that_is_read_from_may_not_exit():
    read = "ld.shared::cluster.b32 %r1, [%r8];\n"
    assert [other.opcode for _, other in unguarded(HEADER + read + "ret;\n}")] == ["ret"]
    assert unguarded(HEADER + read + BARRIER + "\nret;\n}") == []


OPERATIONS = {
    "add.s32": lambda a, b: a + b, "sub.s32": lambda a, b: a - b, "mul.lo.s32": lambda a, b: a * b,
    "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b, "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << (b & 31), "shr.u32": lambda a, b: a >> (b & 31),
    "shr.s32": lambda a, b: (a - ((a & 1 << 31) << 1)) >> (b & 31),
    "selp.b32": lambda a, b: a if a % 3 else b, "bfe.u32": lambda a, b: a >> (b & 7) & 31,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_an_address_lies_where_it_is_said_to(seed):
    """Instructions by chance on thread numbers and constants: every thread's result is one that the Value admits."""
    chance = random.Random(seed)
    for _ in range(100):
        known = {"%r0": ([*range(128)], Value(0, 127)), "%r1": ([i % 2 for i in range(128)], Value(0, 15))}
        for step in range(8):
            name = chance.choice(list(OPERATIONS))
            small = name.startswith(("sh", "bfe"))
            number = chance.choice([chance.randrange(8), 1 << chance.randrange(16), chance.randrange(-64, 1 << 16)])
            second = str(number % 8 if small else number) if small or chance.random() < 0.6 else chance.choice([*known])
            first = chance.choice([*known])
            operands = ["%d", first, second, *({"selp.b32": ["%p1"], "bfe.u32": ["5"]}.get(name, []))]
            sources = [known[o][1] if o in known else constant(o) or ANY for o in operands[1:]]
            said = result(Instruction(name, tuple(operands), None, False, 0, "", ""), sources)
            right = known[second][0] if second in known else [int(second) & WORD] * 128
            values = [OPERATIONS[name](a, b) & WORD for a, b in zip(known[first][0], right, strict=True)]
            for value in values:
                assert (value - said.base & WORD) & ~said.spread == 0, (name, operands, sources, said, value)
                start, end = extent(said, 4)
                assert start <= value < end or start <= value - (1 << 32) < end, (said, value)
            known[f"%r{step + 2}"] = (values, said)


@pytest.mark.parametrize(
    ("store", "size"),
    [
        ("st.shared.b16", 2),
        ("st.shared.b32", 4),
        ("st.shared.v4.b32", 16),
        ("stmatrix.sync.aligned.m8n8.x4.shared.b16", 16),
    ],
)
def test_an_access_is_as_wide_as_it_is(store, size):
    for place, expected in ((64 - size, 0), (66 - size, 1), (67, 1), (68, 0)):
        body = (
            f"ld.shared::cluster.b32 %r1, [global_smem+64];\n{store} [global_smem+{place}], %r2;\n{BARRIER}\nret;\n}}"
        )
        assert len(unguarded(HEADER + body)) == expected, place


def test_an_address_of_which_little_is_known_may_be_at_the_start():
    assert extent(Value(1, WORD - 1), 4) == (0, WORD + 4)
    assert extent(binary("add", Value(0, 127), constant("-16")), 4) == (-16, 115)


@pytest.fixture(scope="module")
def records() -> dict[str, dict]:
    """What the rule and four schedules say of tests/support/cluster_race.py, compiled here."""
    return {record["case"]: record for record in child("clusters")}


@compiles_clusters
def test_triton_miscompiles_two_products(records):
    """Expected wrong. If this fails, Triton is fixed."""
    found = records["two products"]
    fixed = (
        f"Triton {TRITON} is fixed: tests/support/cluster_race.py compiles to right code. docs/upstream-num-ctas.md, "
        "this test and the rule that tile Triton is not used with num_ctas > 1 can go."
    )
    assert found["unguarded"] or found["noticed"], f"{fixed} {found}"
    assert found["unguarded"] and found["noticed"], f"the rule and the execution disagree: {found}"
    assert all(re.match(r"ld\.shared::cluster.*, stmatrix", pair) for pair in found["unguarded"])
    assert found["noticed"].startswith("race: ") and "ld.shared::cluster" in found["noticed"]


@compiles_clusters
@pytest.mark.parametrize("case", ("one product", "two products, with a cluster barrier more"))
def test_right_code_of_a_cluster_is_silent_and_right(records, case):
    assert records[case]["remote_reads"] > 0
    assert records[case]["unguarded"] == [] and records[case]["noticed"] is None


@compiles_clusters
def test_one_product_without_its_cluster_barrier_is_wrong(records):
    found = records["one product, without its cluster barrier"]
    assert found["unguarded"] and found["noticed"].startswith("race: ")


def test_inspect_counts_it():
    assert child("counted") == [{"counts": [1, 0, 1, 0]}]  # of either pass, without the cluster barrier and with it


@compiles_clusters
def test_the_report_is_what_the_compiler_does():
    """Its program is tests/support/cluster_race.py; what it says the program prints is what it prints."""
    program = ROOT / "tests" / "support" / "cluster_race.py"
    report = (ROOT / "docs" / "upstream-num-ctas.md").read_text()
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", report, re.MULTILINE | re.DOTALL))
    assert blocks["python"] == program.read_text()
    done = children.run([str(program)], errors=False)
    assert done.returncode == 0, done.stderr
    if f"Triton {TRITON}" in report:
        printed = [line.split(" <-")[0].rstrip() for line in blocks["text"].splitlines()]
        assert printed == done.stdout.splitlines()
