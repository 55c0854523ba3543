// The machine, played on a CPU: every thread of a block is a fiber that runs until a warp or the block has to agree.
//
// Asynchronous copies arrive as late as they may: until they are waited for, their target holds NaN, so that a missing
// wait, or a copy into a stage that somebody still reads, gives wrong results instead of luck.
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define LB_HOST 1

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct Dim { int x, y; };
struct alignas(64) TensorMap { uint64_t opaque[16]; };

namespace host {

struct Copy { void* to; const void* from; int bytes; };
struct Range { const char* begin; size_t size; };

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  std::vector<char> stack;
  Dim thread;
  bool started = false, done = false;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  int arrived = 0;
  long round = 0;
  const void* in[32];
  void* out[32];
};

struct Warpgroup {
  int arrived = 0;
  long round = 0;
  const void* in[128];
  double result[128][128];
};

// A barrier of shared memory: a phase ends when all have arrived and all bytes are there. Here it ends when somebody waits.
struct Barrier {
  int count = 1, missing = 1;
  long bytes = 0;
  uint32_t phase = 0;
  std::vector<Copy> copies;
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps, groups;
inline std::vector<Warpgroup> warpgroups;
inline std::map<uint64_t*, Barrier> barriers;
inline std::vector<Range> ranges;
inline std::vector<unsigned char> shared;
inline unsigned char* shared_base;
inline int block_arrived;
inline long block_round;
inline Fiber* current;
inline jmp_buf scheduler;
inline Dim block, grid;
inline void (*body)();
inline const char* failure;

inline void fail(const char* what) {
  if (!failure) failure = what;
}

inline void yield() {
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

inline void enter() {
  body();
  current->done = true;
  _longjmp(scheduler, 1);
}

inline void resume(Fiber& f) {
  current = &f;
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  setcontext(&f.context);
}

inline void start_fibers(int threads) {
  static ucontext_t home;
  fibers.assign(threads, Fiber());
  warps.assign(threads / 32, Warp());
  groups.assign(threads / 32, Warp());
  warpgroups.assign(threads / 128 + 1, Warpgroup());
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.thread = {i, 0};
    f.stack.resize(256 << 10);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &home;
    makecontext(&f.context, enter, 0);
  }
}

inline void run_block(int threads) {
  start_fibers(threads);
  barriers.clear();
  block_arrived = 0;
  memset(shared_base, 0xff, shared.data() + shared.size() - shared_base);
  for (long turn = 0, left = threads; left > 0; ++turn) {
    left = 0;
    for (int i = 0; i < threads; ++i) {
      Fiber& f = fibers[turn % 2 ? threads - 1 - i : i];  // no order may matter
      if (!f.done) resume(f), left += !f.done;
    }
    if (turn > 10000000) return fail("threads wait for each other forever");
  }
}

// Every kernel has state of its own, which stays loaded: the stacks of its threads are tens of megabytes.
inline void release() {
  std::vector<Fiber>().swap(fibers);
  std::vector<Warpgroup>().swap(warpgroups);
  std::vector<unsigned char>().swap(shared);
}

// All lanes of a warp give `in` and get `out`; the last one computes for all.
template <class F> inline void agree(const void* in, void* out, F compute) {
  const int lane = current->thread.x % 32;
  Warp& w = warps[current->thread.x / 32];
  w.in[lane] = in, w.out[lane] = out;
  const long round = w.round;
  if (++w.arrived == 32) {
    compute(w);
    w.arrived = 0, ++w.round;
  }
  while (w.round == round) yield();
}

inline bool in_shared(const void* p, int bytes) {
  const unsigned char* c = (const unsigned char*)p;
  return c >= shared_base && c + bytes <= shared.data() + shared.size();
}

inline bool in_global(const void* p, int bytes) {
  for (const Range& r : ranges)
    if ((const char*)p >= r.begin && (const char*)p + bytes <= r.begin + r.size) return true;
  return bytes == 0;
}

inline void request(std::vector<Copy>& list, void* to, const void* from, int bytes, int whole) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || whole % 16) fail("a copy is not aligned to 16 bytes");
  if (!in_shared(to, whole)) return fail("a copy's target is outside shared memory");
  if (!in_global(from, bytes)) return fail("a copy's source is outside its tensor");
  memset(to, 0xff, whole);
  list.push_back({to, from, bytes});
  if (bytes < whole) list.push_back({(char*)to + bytes, nullptr, whole - bytes});
}

inline void perform(std::vector<Copy>& list) {
  for (const Copy& c : list) c.from ? (void)memcpy(c.to, c.from, c.bytes) : (void)memset(c.to, 0, c.bytes);
  list.clear();
}

inline float to_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

inline float from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float v = exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : ldexpf((float)(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
  return h & 0x8000 ? -v : v;
}

// To the nearest 16-bit float, ties to even: by scaling so that rounding to an integer is what is asked for.
inline uint16_t narrow(double v, int mantissa, int bias) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0, top = (2 * bias + 1) << mantissa;
  v = fabs(v);
  if (std::isnan(v)) return 0x7fff;
  int exponent = v > 0 ? ilogb(v) : -bias;
  if (exponent < 1 - bias) exponent = 1 - bias;
  if (exponent > bias) return sign | top;
  const long units = lrint(ldexp(v, mantissa - exponent));
  const long bits = ((long)(exponent + bias - 1) << mantissa) + units;
  return sign | (uint16_t)(bits > top ? top : bits);
}

inline float from16(uint16_t bits) { return T::BF16 ? to_float((uint32_t)bits << 16) : from_half(bits); }
inline uint16_t to16(double v) { return T::BF16 ? narrow(v, 7, 127) : narrow(v, 10, 15); }

}  // namespace host

#define threadIdx (host::current->thread)
#define blockIdx (host::block)
#define gridDim (host::grid)

LB_DEV uint32_t band(uint32_t a, uint32_t mask) { return a & mask; }
LB_DEV uint32_t band_or(uint32_t a, uint32_t mask, uint32_t b) { return (a & mask) | b; }

LB_DEV uint32_t band_xor(uint32_t a, uint32_t mask, uint32_t b) { return (a & mask) ^ b; }
LB_DEV uint32_t rotr(uint32_t a, int by) { return a >> by | a << (32 - by); }

template <uint32_t SELECTOR> LB_DEV uint32_t prmt(uint32_t a, uint32_t b) {
  const uint64_t pool = (uint64_t)b << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= (uint32_t)(pool >> 8 * (SELECTOR >> 4 * i & 7) & 255) << 8 * i;
  return d;
}

LB_DEV uint32_t fma16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 32; i += 16)
    d |= (uint32_t)host::to16((double)host::from16(a >> i) * host::from16(b >> i) + host::from16(c >> i)) << i;
  return d;
}

template <int BY> LB_DEV uint32_t lookup(const uint16_t* table, uint32_t four) {
  return table[four >> 8 * BY & 255] | (uint32_t)table[four >> (8 * BY + 16) & 255] << 16;
}

LB_DEV void ldmatrix(uint32_t* d, const void* row) {
  if (!host::in_shared(row, 16) || (uintptr_t)row % 16) host::fail("ldmatrix reads outside shared memory");
  host::agree(row, d, [](host::Warp& w) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) memcpy((uint32_t*)w.out[lane] + i, (const char*)w.in[i * 8 + lane / 4] + lane % 4 * 4, 4);
  });
}

LB_DEV void ldmatrix_columns(uint32_t (&d)[4], uint32_t address) {
  const unsigned char* column = host::shared_base + address;
  if (!host::in_shared(column, 16) || address % 16) host::fail("ldmatrix reads outside shared memory");
  host::agree(column, d, [](host::Warp& w) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 8; ++i) {
        const char* from = (const char*)w.in[i / 2 * 8 + lane % 4 * 2 + i % 2];
        memcpy((char*)w.out[lane] + i * 2, from + lane / 4 * 2, 2);
      }
  });
}
template <class V> inline V load_checked(const void* p) {
  V v = {};
  if ((uintptr_t)p % sizeof(V) || !host::in_global(p, sizeof(V)))
    host::fail("a load is outside its tensor, or not aligned");
  else
    memcpy(&v, p, sizeof(V));
  return v;
}
LB_DEV uint4 load_once16(const void* p) { return load_checked<uint4>(p); }
LB_DEV uint2 load_once8(const void* p) { return load_checked<uint2>(p); }

LB_DEV uint64_t stream_policy() { return 0; }
LB_DEV void copy_stream(void* to, const void* from, uint64_t) { host::request(host::current->copies, to, from, 16, 16); }
LB_DEV void copy_padded(void* to, const void* from, int bytes) {
  host::request(host::current->copies, to, from, bytes, 16);
}
template <int BYTES> LB_DEV void copy_cached(uint32_t to, const void* from) {
  if (to % BYTES || (uintptr_t)from % BYTES || !host::in_global(from, BYTES)) return host::fail("a gather is not in its tensor");
  memset(host::shared_base + to, 0xff, BYTES);
  host::current->copies.push_back({host::shared_base + to, from, BYTES});
}
LB_DEV void copies_commit() {
  host::current->groups.push_back(host::current->copies);
  host::current->copies.clear();
}
template <int LEFT> LB_DEV void copies_wait() {
  while (host::current->groups.size() > LEFT) {
    host::perform(host::current->groups.front());
    host::current->groups.pop_front();
  }
}

LB_DEV void barrier_init(uint64_t* b, int count) { host::barriers[b] = {count, count}; }
LB_DEV void barriers_ready() {}
LB_DEV void barrier_arrive(uint64_t* b) {
  if (--host::barriers[b].missing < 0) host::fail("a barrier is armed twice");
}
LB_DEV void barrier_expect(uint64_t* b, uint32_t bytes) {
  barrier_arrive(b);
  host::barriers[b].bytes += bytes;
}
LB_DEV void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* b, uint64_t) {
  host::request(host::barriers[b].copies, to, from, bytes, bytes);
  host::barriers[b].bytes -= bytes;
}
LB_DEV void copy_tensor(void* to, const TensorMap* map, int column, int row, uint64_t* b) {
  const uint64_t *m = map->opaque, line = m[1] * m[4];  // address, columns, rows, bytes from row to row and of an element
  for (int i = 0; i < (int)m[5]; ++i)
    for (int piece = 0; piece < 8; ++piece) {
      const uint64_t at = column * m[4] + piece * 16;
      const long bytes = row + i >= (long)m[2] || at >= line ? 0 : line - at < 16 ? line - at : 16;
      const char* from = (const char*)m[0] + (bytes ? (uint64_t)(row + i) * m[3] + at : 0);
      host::request(host::barriers[b].copies, (char*)to + i * 128 + (piece ^ (i & 7)) * 16, from, bytes, 16);
      host::barriers[b].bytes -= 16;
    }
}
LB_DEV void barrier_wait(uint64_t* b, uint32_t parity) {
  host::Barrier& k = host::barriers[b];
  while (k.phase % 2 == parity && k.missing) host::yield();
  if (k.phase % 2 != parity) return;
  if (k.bytes) host::fail("a barrier expects other bytes than are copied");
  host::perform(k.copies);
  k.missing = k.count, ++k.phase;
}

LB_DEV uint32_t shared_address(const void* p) { return (uint32_t)((const unsigned char*)p - host::shared_base); }
template <int> LB_DEV void registers_less() {}
template <int> LB_DEV void registers_more() {}
LB_DEV void warpgroup_fence() {}
LB_DEV void warpgroup_commit() {}
template <class S> LB_DEV void warpgroup_wait(S&) {}
template <int N> LB_DEV void warpgroup_used(const uint32_t (&)[N][4]) {}
LB_DEV void wait_for_inputs() {}
LB_DEV void let_next_start() {}
LB_DEV void warp_sync() { host::agree(nullptr, nullptr, [](host::Warp&) {}); }
LB_DEV void block_sync() {
  const long round = host::block_round;
  if (++host::block_arrived == (int)host::fibers.size()) host::block_arrived = 0, ++host::block_round;
  while (host::block_round == round) host::yield();
}
LB_DEV void group_sync(int group, int threads) {
  host::Warp& w = host::groups[group];
  const long round = w.round;
  if (++w.arrived == threads) w.arrived = 0, ++w.round;
  while (w.round == round) host::yield();
}
LB_DEV void fence() {}
LB_DEV int arrive(int* counter) { return (*counter)++; }
LB_DEV float load_fresh(const float* p) { return *p; }
LB_DEV unsigned char* shared_memory() { return host::shared_base; }

LB_DEV uint32_t lanes_max(uint32_t v, int lanes) {
  struct In { uint32_t v; int lanes; } in = {v, lanes};
  host::agree(&in, &v, [](host::Warp& w) {
    for (int lane = 0; lane < 32; ++lane) {
      const int lanes = ((const In*)w.in[lane])->lanes, first = lane / lanes * lanes;
      uint32_t most = 0;
      for (int i = first; i < first + lanes; ++i) most = std::max(most, ((const In*)w.in[i])->v);
      *(uint32_t*)w.out[lane] = most;
    }
  });
  return v;
}

LB_DEV float lanes_sum(float v) {
  host::agree(&v, &v, [](host::Warp& w) {
    float sum = 0.0f;
    for (int lane = 0; lane < 32; ++lane) sum += *(const float*)w.in[lane];
    for (int lane = 0; lane < 32; ++lane) *(float*)w.out[lane] = sum;
  });
  return v;
}

LB_DEV float half_float(uint16_t bits) { return host::from_half(bits); }
LB_DEV float bfloat_float(uint16_t bits) { return host::to_float((uint32_t)bits << 16); }
LB_DEV uint16_t float_half(float v) { return host::narrow(v, 10, 15); }
LB_DEV uint16_t float_bfloat(float v) { return host::narrow(v, 7, 127); }
LB_DEV uint32_t pair16(float v) { return host::to16(v) * 0x00010001u; }
LB_DEV float bits_float(uint32_t bits) { return host::to_float(bits); }
LB_DEV uint32_t float_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
LB_DEV float raised_byte(uint32_t word, int i) { return 8388608.0f + (float)(word >> 8 * i & 255); }
LB_DEV float divide(float a, float b) { return a / b; }
LB_DEV float exponential(float v) { return expf(v); }
LB_DEV float fma32(float a, float b, float c) { return fmaf(a, b, c); }

struct Args;
void lb_launch(const Args& a, int kernel);

// Runs a kernel (0: the main one; 1: that before it); thread blocks one after the other, in the given order
// (x + y * gridDim.x). Returns what went wrong.
extern "C" __attribute__((visibility("default"))) const char* lb_emulate(
    const Args* args, int kernel, int blocks_x, int blocks_y, int threads, int shared_bytes, const int* order,
    const host::Range* ranges, int range_count) {
  static const Args* a;
  static int which;
  a = args, which = kernel;
  host::failure = nullptr;
  host::ranges.assign(ranges, ranges + range_count);
  host::shared.assign(shared_bytes + 1024, 0);
  host::shared_base = (unsigned char*)(((uintptr_t)host::shared.data() + 1023) & ~(uintptr_t)1023);
  host::shared.resize(host::shared_base - host::shared.data() + shared_bytes);
  host::grid = {blocks_x, blocks_y};
  host::body = [] { lb_launch(*a, which); };
  for (int i = 0; i < blocks_x * blocks_y; ++i) {
    host::block = {order[i] % blocks_x, order[i] / blocks_x};
    host::run_block(threads);
  }
  host::release();
  return host::failure;
}
