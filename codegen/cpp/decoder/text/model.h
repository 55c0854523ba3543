// What a program is given: weights and buffers. The Python side builds the same structures with ctypes.
#include <math.h>
#include <time.h>

typedef int (*Run)(const void* x, int64_t m, const void* const* weight, const float* bias, const void* residual,
                   void* out, void* scratch, int64_t scratch_bytes, int threads);

// The generated kernels of one shape: run[i] serves up to tokens[i] tokens, the last one any number.
struct Kernel {
  int64_t classes, tokens[16];
  Run run[16];
};
enum Type { kF32, kF16, kBf16 };
// y = x @ w.T: by `kernel` on packed operands `weight`, or, where that is null, from `dense` rows of numbers of a `type`.
struct Linear {
  const Kernel* kernel;
  const void* const* weight;
  const float* bias;
  const void* dense;
  int64_t n, k, type;
};
// A feed-forward part. gate holds silu(gate) * up where gate.n is down.k and up.n is 0, and both where gate.n is twice
// that.
struct Gated {
  Linear gate, up, down;
};
// `count` experts, of which a token goes to `active`; their shares add up to one where `normalised`. shared: an expert
// for all tokens, absent where its down.n is 0, and the number whose sigmoid it is scaled with.
struct Mixture {
  const Gated* experts;
  int64_t count, active, normalised;
  Linear router, shared_gate;
  Gated shared;
};
// q holds q, k and v where k.n is 0. window: positions a token sees, 0 for all. rope: which table of rotary positions.
// mixture: in the place of `mlp`, or null.
struct Layer {
  const float *input_norm, *inner_norm, *query_norm, *key_norm;
  Linear q, k, v, o;
  Gated mlp;
  int64_t window, rope;
  const Mixture* mixture;
};
struct Model {
  const Layer* layers;
  const void* embedding;
  const float* norm;
  const float* rope[2];  // [position][cosines, sines]
  Linear head;
};
// context: positions of the cache, a multiple of 16. tokens, threads: the most of one step.
struct State {
  void *keys, *values;
  int64_t context, tokens, threads;
  float *hidden, *normed, *qkv, *mixed, *inner, *scores;
  void* scratch;
  int64_t scratch_bytes;
  // A packed cache: planes, scales, minima and windows of keys and of values, the windows' rows; keys and values above
  // are then float32 buffers of one layer. few: queries and results of a step of few tokens.
  void* packed[8];
  int64_t k_rows, v_rows;
  float *partial, *few;
  // Mixtures of experts: one expert's tokens and results, router logits, shares by token; chosen experts of the last
  // step, [layer][token][expert]; places of these sorted by expert, and where each expert's end.
  float *rows, *given, *odds, *shares;
  int32_t *chosen, *places, *ends;
};
