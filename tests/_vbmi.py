"""Kernels for `avx512vbmi` and `avx512bf16` on machines without them: scalar functions in the place of instructions.

What they do is written from the definitions of VPERMB, VPERMI2B and VDPBF16PS in Intel's software developer's manual.
Any other instruction of these sets is refused by the compiler, which is told that the machine has none; of what is
written as assembly, VDPBF16PS is the only one.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.assemble import ISA_FLAGS
from lowbit.codegen.cpp.toolchain import FLAGS

_INCLUDE = "#include <immintrin.h>\n"
_DOT = 'asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));'
_SCALAR = r"""
struct Emulated {
  // Bytes of `a`, then of `b`, that the lowest seven bits of each byte of `index` choose; of `a` by the lowest six.
  static __m512i two(__m512i a, __m512i index, __m512i b) {
    uint8_t table[128], at[64], found[64];
    memcpy(table, &a, 64), memcpy(table + 64, &b, 64), memcpy(at, &index, 64);
    for (int i = 0; i < 64; ++i) found[i] = table[at[i] & 127];
    return _mm512_loadu_si512(found);
  }
  static __m512i one(__m512i index, __m512i a) { return two(a, index, a); }
  // acc + products of pairs of bfloat16 numbers, the upper ones first; what is below normal floats counts as 0.
  static __m512 dot(__m512 acc, __m512i x, __m512i y) {
    float sum[16];
    uint32_t a[16], b[16];
    memcpy(sum, &acc, 64), memcpy(a, &x, 64), memcpy(b, &y, 64);
    for (int i = 0; i < 16; ++i) {
      sum[i] = __builtin_fmaf(number(a[i] & 0xffff0000u), number(b[i] & 0xffff0000u), sum[i]);
      sum[i] = __builtin_fmaf(number(a[i] << 16), number(b[i] << 16), sum[i]);
    }
    return _mm512_loadu_ps(sum);
  }
  static float number(uint32_t bits) {
    float found;
    if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
    memcpy(&found, &bits, 4);
    return found;
  }
};
#define _mm512_permutexvar_epi8 Emulated::one
#define _mm512_permutex2var_epi8 Emulated::two
"""


def emulated(source: Source) -> Source:
    """The same kernel for machines with `avx512vnni`."""
    assert source.text.count(_INCLUDE) == 1
    flags = (*FLAGS, *ISA_FLAGS["avx512vnni"])
    assert set(source.flags) - set(flags) <= {"-mavx512vbmi", "-mavx512bf16"}
    assert source.text.count(_DOT) == 1
    text = source.text.replace(_INCLUDE, _INCLUDE + _SCALAR).replace(_DOT, "acc = Emulated::dot(acc, w, x);")
    return replace(source, text=text, flags=flags)
