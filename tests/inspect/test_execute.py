"""The executor of PTX: small kernels of its own against numpy, and what it must notice."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastrnn.inspect.execute import ExecutionError, execute_ptx

ROOT = Path(__file__).parents[2]

HEADER = """
.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2
)
{
	.reg .pred %p<16>;
	.reg .b16 %rs<32>;
	.reg .b32 %r<64>;
	.reg .b64 %rd<64>;
	ld.param.b64 %rd0, [kernel_param_0];
	ld.param.b64 %rd1, [kernel_param_1];
	ld.param.b64 %rd2, [kernel_param_2];
	mov.u32 %r0, %tid.x;
	mov.u32 %r1, %ctaid.x;
	mad.lo.s32 %r2, %r1, 64, %r0;
	mad.wide.u32 %rd3, %r2, 4, %rd0;
	mad.wide.u32 %rd4, %r2, 4, %rd1;
	mad.wide.u32 %rd5, %r2, 4, %rd2;
"""


def run(body: str, *tensors: torch.Tensor, programs: int = 1, threads: int = 32, **options):
    """Run a body between loads of the parameters and ret; %rd3.. point at a thread's own 4 bytes of each tensor."""
    return execute_ptx(HEADER + body + "\n\tret;\n}\n", (programs, 1, 1), threads, list(tensors), **options)


def elementwise(body: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """%r10 and %r11 in, %r12 out."""
    out = torch.empty_like(a)
    loads = "ld.global.b32 %r10, [%rd3];\nld.global.b32 %r11, [%rd4];\n"
    run(loads + body + "\nst.global.b32 [%rd5], %r12;", a, b, out)
    return out


INTEGERS = {
    "add.s32 %r12, %r10, %r11;": lambda a, b: a + b,
    "sub.s32 %r12, %r10, %r11;": lambda a, b: a - b,
    "mul.lo.s32 %r12, %r10, %r11;": lambda a, b: a * b,
    "mul.hi.s32 %r12, %r10, %r11;": lambda a, b: (a.astype(np.int64) * b >> 32).astype(np.int32),
    "cvt.u16.u32 %rs9, %r10;\nmul.hi.u16 %rs9, %rs9, -21845;\ncvt.u32.u16 %r12, %rs9;": (
        lambda a, b: ((a.view(np.uint32) & 65535) * 43691 >> 16).view(np.int32)
    ),
    "mul.hi.u32 %r12, %r10, -5;": lambda a, b: (
        (a.view(np.uint32).astype(np.uint64) * (2**32 - 5) >> np.uint64(32)).astype(np.uint32).view(np.int32)
    ),
    "mul.wide.s32 %rd9, %r10, %r11;\ncvt.u32.u64 %r12, %rd9;": lambda a, b: a * b,
    "mad.lo.s32 %r12, %r10, %r11, 7;": lambda a, b: a * b + 7,
    "and.b32 %r12, %r10, %r11;": lambda a, b: a & b,
    "or.b32 %r12, %r10, %r11;": lambda a, b: a | b,
    "xor.b32 %r12, %r10, -1;": lambda a, b: ~a,
    "not.b32 %r12, %r10;": lambda a, b: ~a,
    "neg.s32 %r12, %r10;": lambda a, b: -a,
    "abs.s32 %r12, %r10;": lambda a, b: np.abs(a),
    "shl.b32 %r12, %r10, 3;": lambda a, b: a << 3,
    "shl.b32 %r12, %r10, 32;": lambda a, b: a * 0,
    "shr.s32 %r12, %r10, 2;": lambda a, b: a >> 2,
    "shr.u32 %r12, %r10, 2;": lambda a, b: (a.view(np.uint32) >> 2).view(np.int32),
    "min.s32 %r12, %r10, %r11;": np.minimum,
    "max.u32 %r12, %r10, %r11;": lambda a, b: np.maximum(a.view(np.uint32), b.view(np.uint32)).view(np.int32),
    "div.s32 %r12, %r10, 3;": lambda a, b: np.trunc(a / 3).astype(np.int32),
    "rem.s32 %r12, %r10, 3;": lambda a, b: np.fmod(a, 3),
    "bfe.u32 %r12, %r10, 4, 5;": lambda a, b: a >> 4 & 31,
    "bfe.s32 %r12, %r10, 4, 1;": lambda a, b: -(a >> 4 & 1),
    "prmt.b32 %r12, %r10, %r11, 0x5410;": lambda a, b: a & 0xFFFF | b << 16,
    "setp.lt.s32 %p1, %r10, %r11;\nselp.b32 %r12, %r10, %r11, %p1;": np.minimum,
    "setp.gt.s32 %p1, %r10, 0;\nsetp.lt.and.s32 %p2, %r11, 0, %p1;\nselp.b32 %r12, 1, 0, %p2;": lambda a, b: (
        (a > 0) & (b < 0)
    ).astype(np.int32),
    "cvt.s64.s32 %rd9, %r10;\nshr.s64 %rd9, %rd9, 1;\ncvt.u32.u64 %r12, %rd9;": lambda a, b: a >> 1,
    "mov.b64 %rd9, {%r10, %r11};\nmov.b64 {%r13, %r12}, %rd9;": lambda a, b: b,
    "shfl.sync.bfly.b32 %r12, %r10, 4, 31, -1;": lambda a, b: a[np.arange(32) ^ 4],
    "shfl.sync.idx.b32 %r12, %r10, 5, 31, -1;": lambda a, b: a[[5] * 32],
    "shfl.sync.up.b32 %r12, %r10, 1, 0, -1;": lambda a, b: a[np.maximum(np.arange(32) - 1, 0)],
    "mov.b32 %r12, 1;\n@%p0 bra $SKIP;\nmov.b32 %r12, 2;\n$SKIP:\n".replace(
        "@%p0", "setp.gt.s32 %p0, %r10, 0;\n@%p0"
    ): lambda a, b: np.where(a > 0, 1, 2).astype(np.int32),
}


@pytest.mark.parametrize("body", INTEGERS)
def test_integer_instructions(body):
    a, b = torch.randint(-(2**31), 2**31 - 1, (2, 32), dtype=torch.int32)
    with np.errstate(over="ignore"):
        expected = INTEGERS[body](a.numpy(), b.numpy())
    np.testing.assert_array_equal(elementwise(body, a, b).numpy(), expected)


FLOATS = {
    "add.f32 %r12, %r10, %r11;": lambda a, b: a + b,
    "sub.rn.f32 %r12, %r10, %r11;": lambda a, b: a - b,
    "mul.f32 %r12, %r10, 0f40000000;": lambda a, b: 2 * a,
    "fma.rn.f32 %r12, %r10, %r11, %r10;": lambda a, b: (a.double() * b.double() + a.double()).float(),
    "div.full.f32 %r12, %r10, %r11;": lambda a, b: a / b,
    "max.f32 %r12, %r10, %r11;": torch.maximum,
    "neg.f32 %r12, %r10;": lambda a, b: -a,
    "abs.f32 %r12, %r10;": lambda a, b: a.abs(),
    "ex2.approx.f32 %r12, %r10;": lambda a, b: torch.exp2(a),
    "rcp.approx.f32 %r12, %r10;": lambda a, b: 1 / a,
    "setp.gt.f32 %p1, %r10, %r11;\nselp.f32 %r12, %r10, %r11, %p1;": torch.maximum,
    "cvt.rn.bf16.f32 %rs1, %r10;\ncvt.f32.bf16 %r12, %rs1;": lambda a, b: a.bfloat16().float(),
    "cvt.rn.f16.f32 %rs1, %r10;\ncvt.f32.f16 %r12, %rs1;": lambda a, b: a.half().float(),
    "cvt.rn.bf16x2.f32 %r13, %r10, %r11;\nmov.b32 {%rs1, %rs2}, %r13;\ncvt.f32.bf16 %r12, %rs2;": lambda a, b: (
        a.bfloat16().float()
    ),
    "cvt.rn.bf16.f32 %rs1, %r10;\nsub.rn.f32.bf16 %r12, %rs1, %r11;": lambda a, b: a.bfloat16().float() - b,
    "mov.b64 %rd9, {%r10, %r11};\nmov.b64 %rd10, {%r11, %r11};\nfma.rn.f32x2 %rd9, %rd9, %rd10, %rd10;\n"
    "mov.b64 {%r12, %r13}, %rd9;": lambda a, b: (a.double() * b.double() + b.double()).float(),
    "cvt.rn.f16x2.f32 %r13, %r11, %r10;\nadd.f16x2 %r13, %r13, %r13;\nmov.b32 {%rs1, %rs2}, %r13;\n"
    "cvt.f32.f16 %r12, %rs1;": lambda a, b: 2 * a.half().float(),
    "cvt.rn.f16x2.f32 %r13, %r11, %r10;\nmov.b32 %r14, 0;\nsetp.gt.f16x2 %p1|%p2, %r13, %r14;\n"
    "selp.f32 %r12, %r10, %r11, %p2;": lambda a, b: torch.where(b > 0, a, b),
    "cvt.rzi.s32.f32 %r12, %r10;\ncvt.rn.f32.s32 %r12, %r12;": lambda a, b: a.trunc(),
}


@pytest.mark.parametrize("body", FLOATS)
def test_float_instructions(body):
    a, b = torch.randn(2, 32)
    torch.testing.assert_close(elementwise(body, a, b), FLOATS[body](a, b), rtol=3e-7, atol=1e-37)


def test_tanh_approx_is_as_far_off_as_ptx_allows():
    a = torch.cat((torch.randn(30), torch.tensor([20.0, -20.0])))
    found, truth = elementwise("tanh.approx.f32 %r12, %r10;", a, a), torch.tanh(a)
    error = (found - truth).abs() / truth.abs()
    assert error.max() <= 2**-11 * 1.001 and error[:30].min() > 2**-12
    assert found.abs().max() <= 1


@pytest.mark.parametrize(("dtype", "name", "k"), ((torch.bfloat16, "bf16", 16), (torch.float16, "f16", 16)))
def test_matrix_product_of_shared_tiles(dtype, name, k):
    """ldmatrix of a, transposed ldmatrix of b, mma, for a [16, k] and b [k, 8] in shared memory."""
    a, b, out = torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype), torch.empty(16, 8)
    body = f"""
	// Each thread copies 16 bytes of a; the first 16 a row of b behind it.
	mul.lo.s32 %r3, %r0, 16;
	cvt.u64.u32 %rd9, %r3;
	add.s64 %rd10, %rd0, %rd9;
	ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd10];
	st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
	setp.lt.s32 %p1, %r0, 16;
	add.s64 %rd11, %rd1, %rd9;
	@%p1 ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd11];
	@%p1 st.shared.v4.b32 [%r3+512], {{%r4, %r5, %r6, %r7}};
	bar.sync 0;
	// Rows of the four 8x8 matrices of a: lanes 0-15 its rows, 16-31 the same, 8 columns on.
	and.b32 %r8, %r0, 15;
	shl.b32 %r8, %r8, 5;
	shr.u32 %r9, %r0, 4;
	shl.b32 %r9, %r9, 4;
	add.s32 %r8, %r8, %r9;
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r8];
	and.b32 %r9, %r0, 15;
	shl.b32 %r9, %r9, 4;
	ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r24, %r25}}, [%r9+512];
	mov.b32 %r30, 0;
	mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{ %r26, %r27, %r28, %r29 }}, {{ %r20, %r21, %r22, %r23 }}, {{ %r24, %r25 }}, {{ %r30, %r30, %r30, %r30 }};
	shl.b32 %r31, %r0, 3;
	cvt.u64.u32 %rd12, %r31;
	add.s64 %rd13, %rd2, %rd12;
	st.global.v2.b32 [%rd13], {{%r26, %r27}};
	st.global.v2.b32 [%rd13+256], {{%r28, %r29}};"""  # noqa: E501
    run(body, a, b, out, shared_bytes=1024)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_copy_async_arrives_only_when_waited_for():
    a, early, late = torch.randn(32), torch.zeros(32), torch.zeros(32)
    body = """
	shl.b32 %r3, %r0, 2;
	mov.b32 %r4, 0;
	st.shared.b32 [%r3], %r4;
	cp.async.ca.shared.global [%r3], [%rd3], 4;
	cp.async.commit_group;
	ld.shared.b32 %r5, [%r3];
	st.global.b32 [%rd4], %r5;
	cp.async.wait_group 0;
	ld.shared.b32 %r5, [%r3];
	st.global.b32 [%rd5], %r5;"""
    run(body, a, early, late, shared_bytes=128)
    assert torch.equal(early, torch.zeros(32)) and torch.equal(late, a)


EXCHANGE = """
	shl.b32 %r3, %r0, 2;
	xor.b32 %r4, %r3, 128;
	st.shared.b32 [%r3], %r0;
	BARRIER
	ld.shared.b32 %r5, [%r4];
	st.global.b32 [%rd3], %r5;"""


@pytest.mark.parametrize("seed", range(5))
def test_warps_exchange_through_shared_memory(seed):
    out = torch.empty(64, dtype=torch.int32)
    exchange = EXCHANGE.replace("BARRIER", "bar.sync 0;")
    executed = run(exchange, out, threads=64, shared_bytes=256, seed=seed)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32).roll(32))
    assert executed.instructions == 2 * (10 + exchange.count(";"))
    with pytest.raises(ExecutionError, match=r"race: .* shared memory .* PTX line \d+"):
        run(EXCHANGE.replace("BARRIER", ""), out, threads=64, shared_bytes=256, seed=seed)


@pytest.mark.parametrize("seed", range(5))
def test_warps_write_bytes_side_by_side(seed):
    """Byte 2 * lane + warp is a warp's own, beside another warp's in one word; byte lane is both warps'."""
    body = """
	and.b32 %r3, %r0, 31;
	shr.u32 %r4, %r0, 5;
	mad.lo.s32 %r5, %r3, 2, %r4;
	cvt.u16.u32 %rs0, %r4;
	st.shared.b8 [%r5], %rs0;
	bar.sync 0;
	shl.b32 %r6, %r3, 1;
	ld.shared.b16 %rs1, [%r6];
	cvt.u32.u16 %r7, %rs1;
	st.global.b32 [%rd3], %r7;"""
    out = torch.empty(64, dtype=torch.int32)
    run(body, out, threads=64, shared_bytes=64, seed=seed)
    assert out.tolist() == [256] * 64  # warp 0's byte is 0, warp 1's is 1
    with pytest.raises(ExecutionError, match="race: writes"):
        run(body.replace("[%r5], %rs0", "[%r3], %rs0"), out, threads=64, shared_bytes=64, seed=seed)


CLUSTER = """
	mov.u32 %r3, %cluster_ctarank;
	st.shared.b32 [global_smem], %r1;
	barrier.cluster.arrive.release.aligned;
	barrier.cluster.wait.acquire.aligned;
	xor.b32 %r4, %r3, 1;
	mov.b32 %r6, global_smem;
	mapa.shared::cluster.u32 %r5, %r6, %r4;
	ld.shared::cluster.b32 %r7, [%r5];
	st.global.b32 [%rd3], %r7;"""


@pytest.mark.parametrize("seed", range(5))
def test_programs_of_a_cluster_read_each_other(seed):
    out = torch.empty(4 * 64, dtype=torch.int32)
    run(CLUSTER, out, programs=4, cluster=2, shared_bytes=16, seed=seed)
    assert out.view(4, 64)[:, 0].tolist() == [1, 0, 3, 2]
    with pytest.raises(ExecutionError, match="race"):
        run(CLUSTER.replace("barrier.cluster.arrive.release.aligned;", "").replace(
            "barrier.cluster.wait.acquire.aligned;", "bar.sync 0;"), out, programs=4, cluster=2, shared_bytes=16,
            seed=seed)  # fmt: skip


HANDSHAKE = """
	setp.ne.s32 %p1, %r1, 0;
	@%p1 bra $READER;
	st.global.b32 [%rd4], %r0;
	bar.sync 0;
	setp.eq.s32 %p2, %r0, 0;
	@%p2 red.global.gpu.release.add.u32 [%rd2], 1;
	bra.uni $END;
$READER:
	ld.global.gpu.acquire.b32 %r5, [%rd2];
	setp.eq.s32 %p3, %r5, 0;
	@%p3 bra $READER;
	mad.wide.u32 %rd6, %r0, 4, %rd1;
	ld.global.cg.b32 %r6, [%rd6];
	st.global.b32 [%rd3], %r6;
$END:"""


@pytest.mark.parametrize("seed", range(5))
def test_programs_hand_over_through_global_memory(seed):
    def hand_over(body):
        out, data, flag = torch.zeros(128, dtype=torch.int32), torch.zeros(32, dtype=torch.int32), torch.zeros(1)
        run(body, out, data, flag.int(), programs=2, seed=seed)
        return out[64:96]

    assert torch.equal(hand_over(HANDSHAKE), torch.arange(32, dtype=torch.int32))
    for old, new, message in (
        ("gpu.release", "gpu.relaxed", "race"),
        ("gpu.acquire", "gpu.relaxed", "race"),
        ("ld.global.cg", "ld.global", "stale: reads through L1"),
        ("@%p2 red.global.gpu.release.add.u32 [%rd2], 1;", "", "deadlock"),
        ("st.global.b32 [%rd3], %r6", "st.global.b32 [%rd3+512], %r6", "out of bounds: 4 bytes"),
    ):
        with pytest.raises(ExecutionError, match=message):
            hand_over(HANDSHAKE.replace(old, new))


SENT = """
	add.s32 %r4, %r0, 1;
	mad.wide.u32 %rd6, %r0, 4, %rd1;
	setp.ne.s32 %p1, %r1, 0;
	@%p1 bra $READER;
	st.relaxed.gpu.global.b32 [%rd4], %r4;
	bra.uni $END;
$READER:
	ld.relaxed.gpu.global.b32 %r6, [%rd6];
	setp.eq.s32 %p3, %r6, 0;
	@%p3 bra $READER;
	st.global.b32 [%rd3], %r6;
$END:"""


@pytest.mark.parametrize("seed", range(5))
def test_programs_poll_what_is_sent(seed):
    def sent(body):
        out, data = torch.zeros(128, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
        run(body, out, data, torch.zeros(1), programs=2, seed=seed)
        return out[64:96]

    assert torch.equal(sent(SENT), torch.arange(1, 33, dtype=torch.int32))
    store, load = "st.relaxed.gpu.global.b32 [%rd4], %r4;", "ld.relaxed.gpu.global.b32"
    for old, new, message in (
        (store, "", "deadlock"),
        (store, "st.global.b32 [%rd4], %r4;", "race: reads what another program wrote"),
        (load, "ld.global.cg.b32", "race: reads weakly"),
        (store, store.replace("b32", "b16"), "race: reads 4 bytes where line"),
        (store, f"{store}\n{store}".replace("%r4;", "%r0;", 1), "sent twice"),
        (
            "st.global.b32 [%rd3], %r6",
            "st.global.b32 [%rd6], %r6",
            "race: writes where another program stores strongly",
        ),
    ):
        with pytest.raises(ExecutionError, match=message):
            sent(SENT.replace(old, new))


def test_shared_memory_has_an_end():
    with pytest.raises(ExecutionError, match="out of bounds: 4 bytes at 16 of 16 bytes of shared memory"):
        run("st.shared.b32 [global_smem+16], %r0;", torch.zeros(1), shared_bytes=16)


def test_an_unknown_instruction_is_named_with_its_line():
    with pytest.raises(NotImplementedError, match=r"PTX line \d+ .*: vote.sync.any.pred"):
        run("vote.sync.any.pred %p1, %p2, -1;")
