// The cheapest path through a trellis, row by row: `cheapest_paths` of quantizers/methods/trellis.py.
// LB_BITS: of a code. LB_STATES: registers there are.
#include <stdint.h>

namespace {

constexpr int kCodes = 1 << LB_BITS;
constexpr int kGroups = LB_STATES / kCodes;  // registers that differ in their oldest code alone come from a group
constexpr int kRuns = kGroups / kCodes;

// Where a register's cost is: those with the same oldest code side by side, so that the least of each group is found
// without moving anything. The costs after a code are in this order too if the least ones are sorted by what is then
// the oldest code, and the values once and for all.
constexpr int place(int reg) { return reg % kCodes * kGroups + reg / kCodes; }

// The cost of a squared error but for what all registers share: importance * (value**2 - 2 * target * value).
void step(const float* __restrict before, const float* __restrict values, float target, float importance,
          float* __restrict after) {
  alignas(64) float least[kGroups], sorted[kCodes][kRuns];
  for (int g = 0; g < kGroups; ++g) {
    float low = before[g];
    for (int code = 1; code < kCodes; ++code) low = before[code * kGroups + g] < low ? before[code * kGroups + g] : low;
    least[g] = low;
  }
  for (int run = 0; run < kRuns; ++run) {
    for (int code = 0; code < kCodes; ++code) sorted[code][run] = least[run * kCodes + code];
  }
  const float slope = -2 * importance * target;
  for (int oldest = 0; oldest < kCodes; ++oldest) {
    for (int code = 0; code < kCodes; ++code) {
      const float* v = values + oldest * kGroups + code * kRuns;
      float* to = after + oldest * kGroups + code * kRuns;
      for (int run = 0; run < kRuns; ++run) to[run] = v[run] * (v[run] * importance + slope) + sorted[oldest][run];
    }
  }
}

// The codes of the path that ends in the cheapest register.
void trace(const float* costs, int64_t columns, uint8_t* codes) {
  const float* last = costs + columns * LB_STATES;
  int found = 0;
  for (int reg = 1; reg < LB_STATES; ++reg) found = last[place(reg)] < last[place(found)] ? reg : found;
  for (int64_t t = columns - 1; t >= 0; --t) {
    codes[t] = uint8_t(found / kGroups);
    const int group = found % kGroups;
    const float* from = costs + t * LB_STATES + group;
    int oldest = 0;
    for (int code = 1; code < kCodes; ++code) oldest = from[code * kGroups] < from[oldest * kGroups] ? code : oldest;
    found = group * kCodes + oldest;
  }
}

}  // namespace

// target, importance: [n, columns]; start: [n]; values: [LB_STATES]; codes: [n, columns];
// costs: room for [columns + 1, LB_STATES].
extern "C" __attribute__((visibility("default"))) void lb_paths(const float* target, const float* importance,
                                                                const int32_t* start, const float* values,
                                                                uint8_t* codes, float* costs, int64_t n,
                                                                int64_t columns) {
  alignas(64) static thread_local float placed[LB_STATES];
  for (int reg = 0; reg < LB_STATES; ++reg) placed[place(reg)] = values[reg];
  for (int64_t row = 0; row < n; ++row) {
    for (int reg = 0; reg < LB_STATES; ++reg) costs[reg] = __builtin_inff();
    costs[place(start[row])] = 0.0f;
    const float *y = target + row * columns, *w = importance + row * columns;
    for (int64_t t = 0; t < columns; ++t) {
      step(costs + t * LB_STATES, placed, y[t], w[t], costs + (t + 1) * LB_STATES);
    }
    trace(costs, columns, codes + row * columns);
  }
}
