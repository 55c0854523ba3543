// The machine: what PTX has no C++ for. `host.cuh` has the same names for running kernels on a CPU. No header is needed,
// so that compilers inside a process (NVRTC) need no folder of them.
struct alignas(64) TensorMap { uint64_t opaque[16]; };

LB_DEV uint32_t band(uint32_t a, uint32_t mask) { return a & mask; }

// (a & mask) | b in one instruction, also where mask and b are constants.
LB_DEV uint32_t band_or(uint32_t a, uint32_t mask, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
  return d;
}

// (a & mask) ^ b in one instruction.
LB_DEV uint32_t band_xor(uint32_t a, uint32_t mask, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
  return d;
}

LB_DEV uint32_t rotr(uint32_t a, int by) { return __funnelshift_r(a, a, by); }

template <uint32_t SELECTOR> LB_DEV uint32_t prmt(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "n"(SELECTOR));
  return d;
}

LB_DEV uint32_t fma16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (T::BF16)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <int BY> LB_DEV uint32_t lookup(const uint16_t* table, uint32_t four) {
  return table[four >> 8 * BY & 255] | (uint32_t)table[four >> 8 * BY + 16 & 255] << 16;
}

// c += a (16 rows x 16 columns) * b (16 columns x 8 tokens)
LB_DEV void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
#define LB_MMA(type)                                                                                       \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
      "{%0,%1,%2,%3};"                                                                                     \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (T::BF16)
    LB_MMA("bf16");
  else
    LB_MMA("f16");
#undef LB_MMA
}

// The same of signed bytes, 16 rows x 32 columns; or of their halves, signed by unsigned ones, 16 rows x 64 columns.
LB_DEV void mma(int (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
#define LB_MMA(shape)                                                                                         \
  asm("mma.sync.aligned." shape ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                  \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (T::BITS == 4)
    LB_MMA("m16n8k64.row.col.s32.s4.u4");
  else
    LB_MMA("m16n8k32.row.col.s32.s8.s8");
#undef LB_MMA
}

LB_DEV uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Four 8x8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
LB_DEV void ldmatrix(uint32_t* d, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each transposed: lane i gives the shared address of a column of eight.
LB_DEV void ldmatrix_columns(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// 16 bytes that are read once.
LB_DEV uint4 load_once16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
LB_DEV uint2 load_once8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

LB_DEV uint64_t stream_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes of a stream that nobody reads again.
LB_DEV void copy_stream(void* to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "l"(policy)
               : "memory");
}

// `bytes` (0 to 16) bytes, then zeros up to 16.
LB_DEV void copy_padded(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// BYTES (4, 8 or 16) of what is read again.
template <int BYTES> LB_DEV void copy_cached(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

LB_DEV void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> LB_DEV void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

#if __CUDA_ARCH__ >= 900
LB_DEV void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
LB_DEV void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
LB_DEV void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrive, and expect bytes of copies beside.
LB_DEV void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
LB_DEV void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// The map's box of 128 bytes x rows from (byte or half `column`, row) on, pieces exchanged as `swizzle` does; zeros where
// the tensor has ended.
LB_DEV void copy_tensor(void* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
LB_DEV void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\n"
      "done:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
#else  // never called: kernels with bulk copies are for sm_90 on
LB_DEV void barrier_init(uint64_t*, int) {}
LB_DEV void barriers_ready() {}
LB_DEV void barrier_expect(uint64_t*, uint32_t) {}
LB_DEV void copy_bulk(void*, const void*, uint32_t, uint64_t*, uint64_t) {}
LB_DEV void barrier_wait(uint64_t*, uint32_t) {}
#endif

// A warpgroup's registers, a multiple of 8 of them: given up for others, or more of them.
template <int N> LB_DEV void registers_less() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> LB_DEV void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

LB_DEV void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LB_DEV void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until then the sums belong to the matrix units.
template <int N> LB_DEV void warpgroup_wait(float (&sums)[N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < N * 4; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
}
template <int N> LB_DEV void warpgroup_wait(int (&sums)[N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < N * 4; ++i) asm volatile("" : "+r"(sums[i / 4][i % 4])::"memory");
}
// Operands in registers are the matrix units' as well: without a use after the wait, the compiler would put the next ones
// where they are while a product is under way.
template <int N> LB_DEV void warpgroup_used(const uint32_t (&operand)[N][4]) {
#pragma unroll
  for (int i = 0; i < N * 4; ++i) asm volatile("" ::"r"(operand[i / 4][i % 4]) : "memory");
}

// Programmatic dependent launch: what came before in the stream is finished from here on.
LB_DEV void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
LB_DEV void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

LB_DEV void warp_sync() { __syncwarp(); }
LB_DEV void group_sync(int group, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(threads) : "memory");
}
LB_DEV void block_sync() { __syncthreads(); }
LB_DEV void fence() { __threadfence(); }
LB_DEV int arrive(int* counter) { return atomicAdd(counter, 1); }
LB_DEV float load_fresh(const float* p) { return __ldcg(p); }
LB_DEV unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// The largest over `lanes` (a power of two) neighbours.
LB_DEV uint32_t lanes_max(uint32_t v, int lanes) {
  for (int by = 1; by < lanes; by *= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, v, by);
    v = v > other ? v : other;
  }
  return v;
}

LB_DEV float lanes_sum(float v) {
  for (int by = 1; by < 32; by *= 2) v += __shfl_xor_sync(0xffffffffu, v, by);
  return v;
}

LB_DEV float half_float(uint16_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
LB_DEV float bfloat_float(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
LB_DEV uint16_t float_half(float v) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
LB_DEV uint16_t float_bfloat(float v) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
// Two equal halves.
LB_DEV uint32_t pair16(float v) {
  const uint32_t one = T::BF16 ? float_bfloat(v) : float_half(v);
  return one | one << 16;
}
LB_DEV float bits_float(uint32_t bits) { return __uint_as_float(bits); }
LB_DEV uint32_t float_bits(float v) { return __float_as_uint(v); }
// 2**23 plus a byte of a word.
LB_DEV float raised_byte(uint32_t word, int i) { return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540u + i)); }
LB_DEV float exponential(float v) { return __expf(v); }
LB_DEV float fma32(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LB_DEV float divide(float a, float b) { return __fdiv_rn(a, b); }
