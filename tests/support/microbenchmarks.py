"""Small kernels in PTX whose times others have measured and published, assembled and simulated.

Each repeats its body in a loop over the kernel's only number. fastrnn/inspect/simulator/figures.py has the sources.
"""

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from fastrnn.inspect import programs
from fastrnn.inspect.simulator.figures import figures
from fastrnn.inspect.simulator.simulate import Kernel, Simulated, simulate

STEPS = 6
FRAME = """
.version 8.0
.target {arch}
.address_size 64
.shared .align 128 .b8 tile[32768];
.visible .entry kernel(.param .u64 pointer, .param .u32 steps)
{clusters}{{
	.reg .pred %p<9>;
	.reg .b32 %r<99>;
	.reg .f32 %f<99>;
	.reg .b64 %rd<9>;
	ld.param.u64 %rd0, [pointer];
	ld.param.u32 %r0, [steps];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd1, %r1, 8;
	add.s64 %rd2, %rd0, %rd1;
	ld.global.v4.f32 {{%f0, %f1, %f2, %f3}}, [%rd0];
	ld.global.v4.f32 {{%f4, %f5, %f6, %f7}}, [%rd0+16];
	ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd0+32];
	ld.global.v4.b32 {{%r14, %r15, %r16, %r17}}, [%rd0+48];
	mov.u32 %r2, tile;
	and.b32 %r3, %r1, 31;
	{prepare}
LOOP:
	.pragma "nounroll";
	{body}
	sub.u32 %r0, %r0, 1;
	setp.ne.u32 %p0, %r0, 0;
	@%p0 bra LOOP;
	{finish}
	st.global.v4.f32 [%rd0], {{%f0, %f1, %f2, %f3}};
	st.global.v4.f32 [%rd0+16], {{%f4, %f5, %f6, %f7}};
	st.global.v4.b32 [%rd0+32], {{%r10, %r11, %r12, %r13}};
	st.global.v4.b32 [%rd0+48], {{%r14, %r15, %r16, %r17}};
	ret;
}}
"""


@dataclass(frozen=True)
class Microbenchmark:
    """A kernel whose body is repeated; an {offset} in it is a kilobyte a repetition."""

    body: str
    opcode: str  # of the instruction that is counted
    repeats: int = 32
    warps: int = 1
    ctas: int = 1
    prepare: str = ""
    finish: str = ""
    arch: str = "sm_90"

    @property
    def kernel(self) -> Kernel:
        return Kernel(_assembled(self), self.warps, (4000,), self.ctas)

    def simulated(self, is_cached: bool = False, **changes: float) -> Simulated:
        """Simulated, with other figures than the architecture's where they are given."""
        known = replace(figures(self.arch), **changes)
        return simulate(self.kernel, self.arch, of=known, steps=STEPS, is_cached=is_cached)

    def cycles(self, is_cached: bool = False, **changes: float) -> float:
        """A warp's, of one instruction of the kind that is counted."""
        found = self.simulated(is_cached, **changes)
        warp = found.machine.warps[0]
        count = sum(found.ops[index].code.opcode.startswith(self.opcode) for _, index in warp.issues)
        assert count >= self.repeats * STEPS, (self.opcode, count)
        return (found.ends[-1] - min(warp.began[0] for warp in found.machine.warps)) / count


@functools.cache
def _assembled(of: Microbenchmark) -> bytes:
    body = "\n\t".join(of.body.replace("{offset}", str(1024 * n)) for n in range(of.repeats))
    clusters = f".explicitcluster .reqnctapercluster {of.ctas}\n" if of.ctas > 1 else ""
    ptx = FRAME.format(clusters=clusters, arch=of.arch, prepare=of.prepare, body=body, finish=of.finish)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        tool = programs.nvidia_tool("ptxas")
        programs.run([tool, f"-arch={of.arch}", str(source), "-o", str(cubin)], "a microbenchmark")
        return cubin.read_bytes()


def eight(text: str) -> str:
    """Of eight registers in turn."""
    return "\n\t".join(text.replace("#", str(n)) for n in range(8))


def apart(bits: int) -> str:
    """Lanes of a warp so many bytes apart, as a power of two, in shared memory."""
    return f"shl.b32 %r4, %r3, {bits};\n\tadd.u32 %r2, %r2, %r4;"


def kept(load: str, count: int) -> str:
    """A load whose results, so many registers, are added to a sum: else the assembler drops it."""
    names = [f"%r{20 + k}" for k in range(count)]
    added = "\n\t".join(f"xor.b32 %r10, %r10, {name};" for name in names)
    result = f"{{{', '.join(names)}}}" if count > 1 or "ldmatrix" in load else names[0]
    return f"{load} {result}, [%r2+{{offset}}];\n\t{added}"


def in_chain(load: str, address: str) -> str:
    """A load of a known address that cannot issue before the last one's result was added to a sum."""
    return f"{load} %r10, [{address}];\n\txor.b32 %r11, %r11, %r10;"


LDMATRIX = "ldmatrix.sync.aligned.m8n8"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{0}}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{{0}}};"
SUMS = [", ".join(f"%f{4 * n + k}" for k in range(4)) for n in range(8)]
SUMMED = "\n\t".join(f"add.f32 %f0, %f0, %f{n};" for n in range(8, 32))
FMA, TANH = eight("fma.rn.f32 %f#, %f#, %f9, %f8;"), eight("tanh.approx.f32 %f#, %f#;")
MAD, UNKNOWN = eight("mad.lo.s32 %r1#, %r1#, %r18, %r19;"), "mov.u32 %r18, %clock;\n\tmov.u32 %r19, %clock;"
RED = "red.global.add.u32 [%rd2], %r1;"
SHUFFLE = "shfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;"
STORE_LOAD = "st.shared.b32 [%r2], %r10;\n\tld.volatile.shared.b32 %r10, [%r2];"
RELAXED = "barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;"
ORDERED = "barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;"

POLL = """red.release.gpu.global.add.u32 [%rd0], 1;
POLL:
	ld.acquire.gpu.global.u32 %r10, [%rd0];
	setp.lt.u32 %p1, %r10, %r0;
	@%p1 bra POLL;"""
COME = """st.relaxed.gpu.global.b32 [%rd0], %r0;
	st.relaxed.gpu.global.b32 [%rd0+128], %r0;
COME:
	ld.relaxed.gpu.global.b32 %r10, [%rd0];
	setp.ne.u32 %p1, %r10, %r0;
	@%p1 bra COME;
COME_TOO:
	ld.relaxed.gpu.global.b32 %r11, [%rd0+128];
	setp.ne.u32 %p1, %r11, %r0;
	@%p1 bra COME_TOO;"""
# Nine loads, since the assembler makes predicates of fewer.
ASIDE, BESIDE = (
    "\n\t".join(
        f"ld.volatile.shared.b32 %r2{n}, [%r2+{4 * n + at}];\n\txor.b32 %r1{k}, %r1{k}, %r2{n};" for n in range(9)
    )
    for k, at in ((0, 0), (1, 4096))
)
PARTED = f"""setp.lt.u32 %p1, %r3, 8;
	@%p1 bra ASIDE;
	{BESIDE}
	bra TOGETHER;
ASIDE:
	{ASIDE}
TOGETHER:
	bar.warp.sync 0xffffffff;
	{SHUFFLE}"""

MICROBENCHMARKS = {
    "a counter, polled": Microbenchmark(POLL, "RED", repeats=1),
    "data, polled": Microbenchmark(COME, "STG", repeats=1),
    "lanes that part": Microbenchmark(PARTED, "SHFL", repeats=1),
    "a length from memory": Microbenchmark(
        "fma.rn.f32 %f0, %f0, %f1, %f2;", "FFMA", prepare="ld.global.u32 %r0, [%rd0+64];"
    ),
    "fma, dependent": Microbenchmark("fma.rn.f32 %f0, %f0, %f1, %f2;", "FFMA"),
    "fma": Microbenchmark(FMA, "FFMA"),
    "fma, 8 warps": Microbenchmark(FMA, "FFMA", warps=8),
    "imad": Microbenchmark(MAD, "IMAD", prepare=UNKNOWN),
    "imad, 8 warps": Microbenchmark(MAD, "IMAD", warps=8, prepare=UNKNOWN),
    "tanh, dependent": Microbenchmark("tanh.approx.f32 %f0, %f0;", "MUFU"),
    "sine, dependent": Microbenchmark("sin.approx.f32 %f0, %f0;", "MUFU"),
    "tanh": Microbenchmark(TANH, "MUFU", repeats=8),
    "tanh, 8 warps": Microbenchmark(TANH, "MUFU", repeats=8, warps=8),
    "shared load, dependent": Microbenchmark("ld.shared.b32 %r10, [%r10];", "LDS"),
    "shared store and load": Microbenchmark(STORE_LOAD, "LDS"),
    "ldmatrix x1, dependent": Microbenchmark(LDMATRIX + ".x1.shared.b16 {%r10}, [%r10];", "LDSM"),
    "ldmatrix x2, dependent": Microbenchmark(LDMATRIX + ".x2.shared.b16 {%r10, %r11}, [%r10];", "LDSM"),
    "ldmatrix x4, dependent": Microbenchmark(LDMATRIX + ".x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r10];", "LDSM"),
    "shared store": Microbenchmark("st.shared.b32 [%r2+{offset}], %r1;", "STS", prepare=apart(2)),
    "global store of 8 bytes": Microbenchmark("st.global.v2.b32 [%rd2+{offset}], {%r1, %r3};", "STG"),
    "reduction": Microbenchmark(RED, "RED"),
    "reduction, 8 warps": Microbenchmark(RED, "RED", warps=8),
    "shuffle, dependent": Microbenchmark(SHUFFLE, "SHFL", prepare="add.u32 %r10, %r10, %r1;"),
    "mma, dependent": Microbenchmark(MMA.format(SUMS[0]), "HMMA"),
    "mma, 16 warps": Microbenchmark("\n\t".join(map(MMA.format, SUMS)), "HMMA", repeats=4, warps=16, finish=SUMMED),
    "bar.sync, 1 warp": Microbenchmark("bar.sync 0;", "BAR"),
    "fence of the device": Microbenchmark("membar.gl;", "MEMBAR", repeats=4),
    "cluster barrier, relaxed": Microbenchmark(RELAXED, "UCGABAR_WAIT", repeats=8, ctas=2),
    "cluster barrier": Microbenchmark(ORDERED, "UCGABAR_WAIT", repeats=4, ctas=2),
    "shared load in a chain": Microbenchmark(in_chain("ld.volatile.shared.b32", "%r2"), "LDS", repeats=1),
    "L2 in a chain": Microbenchmark(
        in_chain("ld.global.b32", "%rd2") + "\n\tadd.s64 %rd2, %rd2, 256;", "LDG", repeats=1
    ),
}
for name, lines in (("prefetched", 3), ("prefetched too late", 1)):
    MICROBENCHMARKS[f"L2 in a chain, {name}"] = Microbenchmark(
        f"prefetch.global.L2 [%rd2+{256 * lines}];\n\t{MICROBENCHMARKS['L2 in a chain'].body}", "LDG", repeats=1
    )
for rank, whose in enumerate(("another's", "one's own")):  # the second program of the cluster is simulated
    MICROBENCHMARKS[f"cluster load in a chain, {whose}"] = Microbenchmark(
        in_chain("ld.volatile.shared::cluster.b32", "%r5"), "LD.", repeats=1, ctas=2,
        prepare=f"mov.u32 %r4, {rank};\n\tmapa.shared::cluster.u32 %r5, %r2, %r4;",
    )  # fmt: skip
for bits, width in ((2, ""), (3, ".v2"), (4, ".v4")):
    MICROBENCHMARKS[f"shared loads of {1 << bits} bytes, 16 warps"] = Microbenchmark(
        kept(f"ld.volatile.shared{width}.b32", 1 << bits - 2), "LDS", warps=16, prepare=apart(bits)
    )
for ways, bits in ((2, 3), (4, 4), (8, 5)):
    MICROBENCHMARKS[f"shared loads that meet a bank {ways} times, 16 warps"] = Microbenchmark(
        kept("ld.volatile.shared.b32", 1), "LDS", warps=16, prepare=apart(bits)
    )
for matrices in (1, 2, 4):
    MICROBENCHMARKS[f"ldmatrix x{matrices}, 16 warps"] = Microbenchmark(
        kept(f"{LDMATRIX}.x{matrices}.shared.b16", matrices), "LDSM", warps=16, prepare=apart(4)
    )
MICROBENCHMARKS["ldmatrix x1 of rows 128 bytes apart, 16 warps"] = replace(
    MICROBENCHMARKS["ldmatrix x1, 16 warps"], prepare=apart(7)
)
for warps in (2, 4, 8, 16, 32):
    MICROBENCHMARKS[f"bar.sync, {warps} warps"] = Microbenchmark("bar.sync 0;", "BAR", warps=warps)
    MICROBENCHMARKS[f"bar.sync, {warps} warps, sm_80"] = Microbenchmark("bar.sync 0;", "BAR", warps=warps, arch="sm_80")
