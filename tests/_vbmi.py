"""Kernels for `avx512vbmi` on machines without it: scalar functions in the place of its instructions.

What they do is written from the definitions of VPERMB and VPERMI2B in Intel's software developer's manual. Any other
instruction of AVX-512 VBMI is refused by the compiler, which is told that the machine has none.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.assemble import ISA_FLAGS
from lowbit.codegen.cpp.toolchain import FLAGS

_INCLUDE = "#include <immintrin.h>\n"
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
};
#define _mm512_permutexvar_epi8 Emulated::one
#define _mm512_permutex2var_epi8 Emulated::two
"""


def emulated(source: Source) -> Source:
    """The same kernel for machines with `avx512vnni`."""
    assert source.text.count(_INCLUDE) == 1
    flags = (*FLAGS, *ISA_FLAGS["avx512vnni"])
    assert set(source.flags) - set(flags) == {"-mavx512vbmi"}
    return replace(source, text=source.text.replace(_INCLUDE, _INCLUDE + _SCALAR), flags=flags)
