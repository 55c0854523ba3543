"""The PTX interpreter itself: small kernels with known answers, and mistakes that it has to notice."""

from __future__ import annotations

import struct

import pytest
import torch
from _ptx import PtxError, TensorMap, run_ptx

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 pool[];\n"


def kernel(body: str, params: str = "out") -> str:
    """A kernel with pointer parameters, their addresses in %rd1 and on, the thread's number in %r0."""
    names = params.split()
    given = ", ".join(f".param .u64 {n}" for n in names)
    loads = "".join(f"ld.param.u64 %rd{i + 1}, [{n}];\n" for i, n in enumerate(names))
    registers = ".reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<200>; .reg .f32 %f<200>; .reg .b64 %rd<40>;"
    return f"{HEAD}.visible .entry k({given})\n{{\n{registers}\nmov.u32 %r0, %tid.x;\n{loads}{body}\nret;\n}}\n"


STORE = "mul.wide.u32 %rd30, %r0, 4; add.s64 %rd31, %rd1, %rd30; st.global.b32 [%rd31], %r9;"


def words(body: str, threads: int = 32, shared: int = 0, apart: list[int] | None = None) -> list[int]:
    """What every thread leaves in %r9."""
    out = torch.zeros(threads, dtype=torch.int32)
    run_ptx(kernel(body + STORE), "k", (1,), (threads,), shared, [out], apart=apart)
    return [w % 2**32 for w in out.tolist()]


def bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


SINGLE = [
    ("add.s32 %r9, 2147483647, 1;", 0x80000000),
    ("mul.hi.u32 %r9, 0xffffffff, 0xffffffff;", 0xFFFFFFFE),
    ("mad.lo.s32 %r9, -3, 5, 7;", 0xFFFFFFF8),
    ("div.s32 %r9, -7, 2;", 0xFFFFFFFD),
    ("rem.s32 %r9, -7, 2;", 0xFFFFFFFF),
    ("mov.b32 %r1, 33; shl.b32 %r9, 5, %r1;", 0),
    ("mov.b32 %r1, 40; shr.s32 %r9, -8, %r1;", 0xFFFFFFFF),
    ("shf.l.wrap.b32 %r9, 0x80000001, 0x12345678, 36;", 0x23456788),
    ("shf.r.wrap.b32 %r9, 0x12345678, 0x9abcdef0, 8;", 0xF0123456),
    ("mov.b32 %r1, 0xf0; bfe.s32 %r9, %r1, 4, 4;", 0xFFFFFFFF),
    ("mov.b32 %r1, 28; bfe.u32 %r9, 0xabcdef01, %r1, 8;", 0xA),
    ("bfi.b32 %r9, 0x5, 0xffff0000, 4, 8;", 0xFFFF0050),
    ("lop3.b32 %r9, 0xf0f0f0f0, 0xcccccccc, 0xaaaaaaaa, 0x1b;", 0x1B1B1B1B),
    ("prmt.b32 %r9, 0x03020100, 0x07060584, 0x8c41;", 0x00FF8401),
    ("popc.b32 %r9, 0xf0f0;", 8),
    ("clz.b32 %r9, 0x00010000;", 15),
    ("brev.b32 %r9, 1;", 0x80000000),
    ("dp4a.s32.u32 %r9, 0xff02ff02, 0x01020304, 10;", 10 - 1 + 4 - 3 + 8),
    ("mov.f32 %f1, 0f3F800000; fma.rn.f32 %f2, %f1, %f1, 0f33800000; mov.b32 %r9, %f2;", bits(1.0)),
    ("mov.f32 %f1, 0fBFC00000; cvt.rni.s32.f32 %r9, %f1;", 0xFFFFFFFE),
    ("mov.f32 %f1, 0f7FC00000; cvt.rzi.s32.f32 %r9, %f1;", 0),
    ("mov.f32 %f1, 0f4F800000; cvt.rzi.u32.f32 %r9, %f1;", 0xFFFFFFFF),
    ("cvt.rn.bf16x2.f32 %r9, 0f3F808000, 0f3F818000;", 0x3F803F82),
    ("cvt.rn.f16x2.f32 %r9, 0f3F800000, 0fC0000000;", 0x3C00C000),
    ("cvt.rn.satfinite.e4m3x2.f32 %h1, 0f7F000000, 0f3F800000; cvt.u32.u16 %r9, %h1;", 0x7E38),
    ("mov.b16 %h1, 0x7e38; cvt.rn.f16x2.e4m3x2 %r9, %h1;", 0x5F003C00),
    ("fma.rn.bf16x2 %r9, 0x40003f80, 0x40404000, 0x3f803f80;", 0x40E04040),
    ("fma.rn.f16x2 %r9, 0x40003c00, 0x42004000, 0x3c003c00;", 0x47004200),
    ("max.f32 %f1, 0f7FC00000, 0f40000000; mov.b32 %r9, %f1;", bits(2.0)),
    ("setp.ne.f32 %p1, 0f7FC00000, 0f40000000; selp.u32 %r9, 1, 0, %p1;", 0),
    ("setp.neu.f32 %p1, 0f7FC00000, 0f40000000; selp.u32 %r9, 1, 0, %p1;", 1),
    ("mov.b64 %rd5, {7, 9}; mov.b64 {%r1, %r2}, %rd5; sub.u32 %r9, %r2, %r1;", 2),
    ("mov.b16 %h1, 0x3fc0; cvt.f32.bf16 %f1, %h1; mov.b32 %r9, %f1;", bits(1.5)),
    ("ex2.approx.f32 %f1, 0f40400000; mov.b32 %r9, %f1;", bits(8.0)),
]


@pytest.mark.parametrize(("body", "want"), SINGLE, ids=[s.split(";")[-2].split()[0] for s, _ in SINGLE])
def test_single_instructions(body: str, want: int) -> None:
    assert words(body) == [want] * 32


def test_threads_that_part_meet_again() -> None:
    """Every thread counts to its own number; then all of the warp add up."""
    body = """
    mov.u32 %r1, 0;
    again: setp.ge.u32 %p1, %r1, %r0; @%p1 bra done; add.u32 %r1, %r1, 1; bra again;
    done: redux.sync.add.s32 %r9, %r1, 0xffffffff;
    """
    assert words(body, 64) == [31 * 16] * 32 + [31 * 16 + 32 * 32] * 32


def test_lanes_of_a_warp() -> None:
    assert words("shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;")[:4] == [1, 0, 3, 2]
    assert words("shfl.sync.up.b32 %r9|%p1, %r0, 2, 0, -1;")[:4] == [0, 1, 0, 1]
    assert words("shfl.sync.idx.b32 %r9, %r0, 3, 0x181f, -1;")[7:10] == [3, 11, 11]
    assert words("setp.gt.u32 %p1, %r0, 29; vote.sync.ballot.b32 %r9, %p1, -1;")[0] == 0xC0000000
    assert words("elect.sync %r8|%p1, 0xfffffff0; selp.u32 %r9, 1, 0, %p1;", 32)[:6] == [0, 0, 0, 0, 1, 0]


def test_names_of_inner_scopes_are_their_own() -> None:
    body = """mov.u32 %r9, 0;
    { .reg .pred p; setp.lt.u32 p, %r0, 3; @p bra out; add.u32 %r9, %r9, 1; out: }
    { .reg .pred p; setp.lt.u32 p, %r0, 5; @p bra out; add.u32 %r9, %r9, 1; out: }
    """
    assert words(body)[:7] == [0, 0, 0, 1, 1, 2, 2]


EXCHANGE = """mul.lo.u32 %r1, %r0, 4; mov.u32 %r2, pool; add.u32 %r3, %r1, %r2; st.shared.b32 [%r3], %r0; {}
xor.b32 %r4, %r0, 32; mul.lo.u32 %r4, %r4, 4; add.u32 %r4, %r4, %r2; ld.shared.b32 %r9, [%r4];"""


def test_a_missing_barrier_is_noticed_when_warps_go_apart() -> None:
    want = [t ^ 32 for t in range(64)]
    assert words(EXCHANGE.format("bar.sync 0;"), 64, 256, [1, 0]) == want
    assert words(EXCHANGE.format("barrier.sync 3, 64;"), 64, 256, [0, 1]) == want
    assert words(EXCHANGE.format(""), 64, 256) == want  # in step it happens to work
    assert words(EXCHANGE.format(""), 64, 256, [0, 1])[:32] == [0xFFFFFFFF] * 32


def test_a_deadlock_says_who_waits_where() -> None:
    with pytest.raises(
        PtxError, match=r"deadlock; threads wait: 32 from 0 to 31 at barrier 1 .*line \d+ \(.*bar.sync 1"
    ):
        words("setp.gt.u32 %p1, %r0, 31; @%p1 bra on; bar.sync 1, 64; on: mov.u32 %r9, 0;", 64)
    with pytest.raises(PtxError, match="for a barrier in memory"):
        words("mov.u32 %r1, pool; mbarrier.init.shared.b64 [%r1], 1;\n"
              "w: mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0; @!%p1 bra w; mov.u32 %r9, 1;", 32, 64)  # fmt: skip


def test_accesses_that_are_wrong() -> None:
    with pytest.raises(
        PtxError, match=r"thread 31, line \d+: st.global.*outside of all buffers; nearest is int32\[32\]"
    ):
        words("add.s64 %rd1, %rd1, 4;\nmov.u32 %r9, 0;\n")
    with pytest.raises(PtxError, match="not aligned"):
        words("add.s64 %rd1, %rd1, 2; mov.u32 %r9, 0;")
    with pytest.raises(PtxError, match="in shared memory are outside"):
        words("mov.u32 %r1, pool; ld.shared.b32 %r9, [%r1+64];", 32, 64)
    with pytest.raises(PtxError, match=r"line \d+: bogus.sync.*unknown instruction"):
        words("mov.u32 %r9, 0;\nbogus.sync %r9;\n")


COPY = """mul.wide.u32 %rd5, %r0, 16; add.s64 %rd6, %rd2, %rd5; mul.lo.u32 %r1, %r0, 16; mov.u32 %r2, pool;
add.u32 %r1, %r1, %r2; cp.async.cg.shared.global [%r1], [%rd6], 16, {size}; cp.async.commit_group;
{wait} ld.shared.v4.b32 {{%r9, %r10, %r11, %r12}}, [%r1];""" + STORE.replace("%r9;", "%r12;")


@pytest.mark.parametrize(("wait", "size", "seen"), [("cp.async.wait_group 0;", 16, True), ("", 16, False),
                                                    ("cp.async.wait_group 1;", 16, False)])  # fmt: skip
def test_copies_are_there_when_they_were_waited_for(wait: str, size: int, seen: bool) -> None:
    out, x = torch.zeros(32, dtype=torch.int32), torch.arange(128, dtype=torch.int32)
    run_ptx(kernel(COPY.format(wait=wait, size=size), "out x"), "k", (1,), (32,), 512, [out, x])
    assert torch.equal(out, x[3::4]) == seen
    assert seen or bool((out == -1).all())


def test_what_a_copy_does_not_read_is_zero() -> None:
    out, x = torch.zeros(32, dtype=torch.int32), torch.arange(128, dtype=torch.int32)
    run_ptx(kernel(COPY.format(wait="cp.async.wait_all;", size=12), "out x"), "k", (1,), (32,), 512, [out, x])
    assert not out.any()


BULK = (
    """mov.u32 %r2, pool; add.u32 %r3, %r2, 4096; setp.ne.u32 %p1, %r0, 0; @%p1 bra wait;
mbarrier.init.shared::cta.b64 [%r3], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 128;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd2], 128, [%r3];
wait: bar.sync 0; {wait} mul.lo.u32 %r4, %r0, 4; add.u32 %r4, %r4, %r2; ld.shared.b32 %r9, [%r4];"""
    + STORE
)
WAIT = "again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra again;"


def test_bulk_copies_and_their_barriers() -> None:
    out, x = torch.zeros(32, dtype=torch.int32), torch.arange(32, dtype=torch.int32)
    run_ptx(kernel(BULK.format(wait=WAIT), "out x"), "k", (1,), (32,), 8192, [out, x])
    assert torch.equal(out, x)
    with pytest.raises(PtxError, match="ended while 1 bulk copies fly"):
        run_ptx(kernel(BULK.format(wait=""), "out x"), "k", (1,), (32,), 8192, [out, x])
    assert bool((out == -1).all())


def test_atomics_and_thread_blocks_in_any_order() -> None:
    out = torch.zeros(2, dtype=torch.int32)
    body = "atom.global.add.u32 %r1, [%rd1], 1; red.global.max.u32 [%rd1+4], %r1;"
    run_ptx(kernel(body), "k", (3, 2), (40,), 0, [out], order=[5, 3, 1, 0, 2, 4])
    assert out.tolist() == [240, 239]


def product(kind: str, k: int, to: str, size: int, a: torch.Tensor, b: torch.Tensor, sums: torch.dtype) -> torch.Tensor:
    """a [16, k] times b [8, k] by ldmatrix and mma.sync; numbers have `size` bytes, so that k of them are 32 bytes."""
    out, step = torch.zeros(16, 8, dtype=sums), 32 // size
    register = "%f" if to == "f32" else "%r"
    d = "{" + ", ".join(f"{register}{100 + i}" for i in range(4)) + "}"
    body = f"""
    // Shared memory: 16 lines of 32 bytes of a, then 8 of b; a lane copies 16 bytes of each.
    mul.wide.u32 %rd5, %r0, 16; mul.lo.u32 %r1, %r0, 16; mov.u32 %r2, pool; add.u32 %r3, %r1, %r2;
    add.s64 %rd6, %rd2, %rd5; ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd6];
    st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
    setp.gt.u32 %p1, %r0, 15; add.s64 %rd6, %rd3, %rd5;
    @!%p1 ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd6]; @!%p1 st.shared.v4.b32 [%r3+512], {{%r4, %r5, %r6, %r7}};
    bar.warp.sync -1;
    and.b32 %r4, %r0, 15; mul.lo.u32 %r4, %r4, 32; shr.u32 %r5, %r0, 4; mad.lo.u32 %r4, %r5, 16, %r4;
    add.u32 %r4, %r4, %r2; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r4];
    and.b32 %r4, %r0, 7; mul.lo.u32 %r4, %r4, 32; shr.u32 %r5, %r0, 3; and.b32 %r5, %r5, 1;
    mad.lo.u32 %r4, %r5, 16, %r4; add.u32 %r4, %r4, %r2;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r14, %r15}}, [%r4+512];
    mov.b32 {register}100, 0; mov.b32 {register}101, 0; mov.b32 {register}102, 0; mov.b32 {register}103, 0;
    mma.sync.aligned.m16n8k{step}.row.col.{to}.{kind}.{kind}.{to} {d}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {d};
    // Lane 4 g + p holds rows g and g + 8, columns 2 p and 2 p + 1.
    shr.u32 %r4, %r0, 2; and.b32 %r5, %r0, 3; mul.lo.u32 %r4, %r4, 32; mad.lo.u32 %r4, %r5, 8, %r4;
    cvt.u64.u32 %rd6, %r4; add.s64 %rd6, %rd6, %rd1;
    st.global.v2.b32 [%rd6], {{{register}100, {register}101}};
    st.global.v2.b32 [%rd6+256], {{{register}102, {register}103}};
    """
    run_ptx(kernel(body, "out a b"), "k", (1,), (32,), 1024, [out, a, b])
    assert k == step
    return out


def test_products_of_warps() -> None:
    rng = torch.Generator().manual_seed(0)
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, 16, generator=rng).to(dtype) for n in (16, 8))
        torch.testing.assert_close(product(kind, 16, "f32", 2, a, b, torch.float32), a.float() @ b.float().T)
    a, b = (torch.randn(n, 32, generator=rng).to(torch.float8_e4m3fn) for n in (16, 8))
    torch.testing.assert_close(product("e4m3", 32, "f32", 1, a, b, torch.float32), a.float() @ b.float().T)
    a, b = (torch.randint(-128, 128, (n, 32), generator=rng, dtype=torch.int8) for n in (16, 8))
    assert torch.equal(product("s8", 32, "s32", 1, a, b, torch.int32), a.int() @ b.int().T)


GROUP = """mov.u32 %r2, pool; add.u32 %r3, %r2, 32768; setp.ne.u32 %p1, %r0, 0; @%p1 bra ready;
mbarrier.init.shared::cta.b64 [%r3], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {bytes};
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [amap, {{0, 0}}], [%r3];
add.u32 %r4, %r2, 16384;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r4], [bmap, {{0, 0}}], [%r3];
ready: bar.sync 0;
again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra again;
{before}
wgmma.fence.sync.aligned;
mov.u32 %r4, pool; shr.u32 %r4, %r4, 4; cvt.u64.u32 %rd5, %r4; or.b64 %rd5, %rd5, {layout};
add.s64 %rd6, %rd5, {behind};
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f1, %f2, %f3, %f4}}, %rd5, %rd6, 0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
{early}
wgmma.wait_group.sync.aligned 0;
shr.u32 %r4, %r0, 5; and.b32 %r5, %r0, 31; shr.u32 %r6, %r5, 2; and.b32 %r5, %r5, 3;
mad.lo.u32 %r6, %r4, 16, %r6; mul.lo.u32 %r6, %r6, 32; mad.lo.u32 %r6, %r5, 8, %r6;
cvt.u64.u32 %rd7, %r6; add.s64 %rd7, %rd7, %rd1;
st.global.v2.f32 [%rd7], {{%f1, %f2}}; st.global.v2.f32 [%rd7+256], {{%f3, %f4}};"""


def warpgroup(a: torch.Tensor, b: torch.Tensor, swizzle: int, before: str = "", early: str = "") -> torch.Tensor:
    """a [64, 16] times b [8, 16], whose lines of `swizzle` bytes the copy engine brings."""
    width = swizzle // 2
    stride = 8 * swizzle  # from eight lines to the next
    layout = {128: 1, 64: 2, 32: 3}[swizzle] << 62 | stride >> 4 << 32 | 1 << 16
    wide = [torch.nn.functional.pad(t, (0, width - 16)).contiguous() for t in (a, b)]
    maps = [TensorMap.of(t, tuple(t.shape), swizzle) for t in wide]
    signed = layout - (1 << 64) * (layout >> 63)
    body = GROUP.format(bytes=72 * swizzle, before=before, early=early, layout=signed, behind=16384 >> 4)
    text = kernel(body, "out x").replace("ld.param.u64 %rd2, [x];", "")
    text = text.replace(".param .u64 x)", ".param .align 64 .b8 amap[128], .param .align 64 .b8 bmap[128])")
    out = torch.full((64, 8), float("nan"))
    held = [out, *wide]
    run_ptx(text, "k", (1,), (128,), 40960, [out, *maps], tensors=held)
    return out


@pytest.mark.parametrize("swizzle", [128, 64, 32])
def test_products_of_warpgroups(swizzle: int) -> None:
    rng = torch.Generator().manual_seed(swizzle)
    a, b = (torch.randn(n, 16, generator=rng).bfloat16() for n in (64, 8))
    torch.testing.assert_close(warpgroup(a, b, swizzle), a.float() @ b.float().T)


def test_operands_of_warpgroups_must_stay_and_be_fenced() -> None:
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    write = "mov.u32 %r7, pool; mov.u32 %r8, 0; st.shared.b32 [%r7], %r8;"
    with pytest.raises(PtxError, match=r"wrote what is read here without fence\.proxy\.async"):
        warpgroup(a, b, 128, before=write)
    fenced = write + "fence.proxy.async; bar.sync 0;"
    assert torch.isfinite(warpgroup(a, b, 128, before=fenced)).all()
    with pytest.raises(PtxError, match="the left operand changed before"):
        warpgroup(a, b, 128, early=fenced)
    with pytest.raises(PtxError, match="sums were written before"):
        warpgroup(a, b, 128, early="mov.f32 %f1, 0f00000000;")
