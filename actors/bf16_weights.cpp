// Gated experts, y = down · (silu(gate · x) * (up · x)), over bfloat16 weights with float32 rows and sums.
//
// A bfloat16 number is the upper half of a float32, so widening it is exact: what comes out is what float32
// weights would give, for half the bytes read. Decoding reads every weight once per step and waits for memory,
// so it takes little more than half the time.
//
// Weights lie in panels of 16 outputs (see actors/bf16_kernel.py): for every pair of inputs 2i and 2i+1 one
// vector of 16 words, input 2i in the lower half of a word and 2i+1 in the upper. A shift and a mask widen them.
// Vectors are GCC's, so the compiler lowers them to whatever the processor has.
//
// Every output is summed over its inputs in their order, however many rows are multiplied at once: a row's result
// does not depend on its company.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 16;
// Rows multiplied at once: two panels of so many rows fill half of AVX-512's registers.
constexpr int kRows = 8;

typedef float Floats __attribute__((vector_size(64)));
typedef float FloatsAnywhere __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64)));

// e^x to about one unit in the last place, for x clamped to what float32 can hold.
inline Floats exponential(Floats x) {
  const Floats high = Floats{} + 88.0f, low = Floats{} - 87.0f;
  x = x > high ? high : x;
  x = x < low ? low : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits of the significand.
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;
  const Floats whole = shifted - 12582912.0f;
  // ln 2 in two parts, of which the first has few enough bits to be multiplied exactly.
  const Floats r = (x - whole * 0.693145751953125f) - whole * 1.42860682030941723e-6f;
  // Taylor's series: |r| is at most ln(2) / 2, so the next term is below a tenth of a unit in the last place.
  Floats p = Floats{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // Times 2^whole, by adding to the exponent.
  return (Floats)((Words)p + ((Words)shifted << 23));
}

inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

// Two panels times R rows of 2 * pairs inputs.
template <int R>
inline void multiply(const Words *first, const Words *second, int pairs, const float *const *rows, Floats *a, Floats *b) {
  Floats sum_a[R] = {}, sum_b[R] = {};
  for (int i = 0; i < pairs; i++) {
    const Words wa = first[i], wb = second[i];
    const Floats a_even = (Floats)(wa << 16), a_odd = (Floats)(wa & 0xffff0000u);
    const Floats b_even = (Floats)(wb << 16), b_odd = (Floats)(wb & 0xffff0000u);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      sum_a[r] += a_even * rows[r][2 * i];
      sum_b[r] += b_even * rows[r][2 * i];
      sum_a[r] += a_odd * rows[r][2 * i + 1];
      sum_b[r] += b_odd * rows[r][2 * i + 1];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) a[r] = sum_a[r], b[r] = sum_b[r];
}

inline void multiply(int count, const Words *first, const Words *second, int pairs, const float *const *rows, Floats *a, Floats *b) {
  switch (count) {
    case 1: return multiply<1>(first, second, pairs, rows, a, b);
    case 2: return multiply<2>(first, second, pairs, rows, a, b);
    case 3: return multiply<3>(first, second, pairs, rows, a, b);
    case 4: return multiply<4>(first, second, pairs, rows, a, b);
    case 5: return multiply<5>(first, second, pairs, rows, a, b);
    case 6: return multiply<6>(first, second, pairs, rows, a, b);
    case 7: return multiply<7>(first, second, pairs, rows, a, b);
    default: return multiply<kRows>(first, second, pairs, rows, a, b);
  }
}

}  // namespace

// up: [experts][inner / 16][gate, up] panels of `hidden` inputs; down: [experts][hidden / 16] panels of `inner`.
// x, out: [rows][hidden]; slots, weights: [rows][top_k], a slot below 0 is not computed. hidden is a multiple of 32,
// inner of 16.
extern "C" void expertmesh_bf16_experts(const Words *up, const Words *down, int experts, int hidden, int inner, const float *x,
                                        const int32_t *slots, const float *weights, float *out, int rows, int top_k, int threads) {
  const int pairs = rows * top_k;
  // Kept from call to call: an engine's dispatches come on a thread of their own.
  thread_local std::vector<int32_t> begins, order;
  thread_local std::vector<Floats> between;
  // Pairs of row and slot, by expert.
  begins.assign(experts + 1, 0);
  order.resize(pairs);
  for (int pair = 0; pair < pairs; pair++)
    if (slots[pair] >= 0) begins[slots[pair] + 1]++;
  for (int expert = 0; expert < experts; expert++) begins[expert + 1] += begins[expert];
  {
    std::vector<int32_t> next(begins.begin(), begins.end() - 1);
    for (int pair = 0; pair < pairs; pair++)
      if (slots[pair] >= 0) order[next[slots[pair]]++] = pair;
  }
  const size_t needed = (size_t)pairs * inner / kLanes;
  if (between.size() < needed) between.resize(needed);
  const int32_t *const begin = begins.data(), *const sorted = order.data();
  float *const activated = (float *)between.data();

#pragma omp parallel num_threads(threads)
  {
    const float *read[kRows];
    Floats a[kRows], b[kRows];
    for (int expert = 0; expert < experts; expert++) {
      const int start = begin[expert], count = begin[expert + 1] - start;
      if (!count) continue;
      const Words *const panels = up + (size_t)expert * inner / kLanes * hidden;
#pragma omp for schedule(static) nowait
      for (int panel = 0; panel < inner / kLanes; panel++) {
        const Words *const gate = panels + (size_t)panel * hidden;
        for (int from = 0; from < count; from += kRows) {
          const int some = count - from < kRows ? count - from : kRows;
          for (int r = 0; r < some; r++) read[r] = x + (size_t)(sorted[start + from + r] / top_k) * hidden;
          multiply(some, gate, gate + hidden / 2, hidden / 2, read, a, b);
          for (int r = 0; r < some; r++)
            *(Floats *)(activated + (size_t)(start + from + r) * inner + panel * kLanes) = silu(a[r]) * b[r];
        }
      }
    }
#pragma omp barrier
    // Each thread owns columns of the output, so that a row's experts are added in one order.
#pragma omp for schedule(static) nowait
    for (int column = 0; column < hidden; column += 2 * kLanes) {
      for (int row = 0; row < rows; row++) std::memset(out + (size_t)row * hidden + column, 0, 2 * sizeof(Floats));
      for (int expert = 0; expert < experts; expert++) {
        const int start = begin[expert], count = begin[expert + 1] - start;
        if (!count) continue;
        const Words *const first = down + ((size_t)expert * hidden + column) / kLanes * (inner / 2);
        for (int from = 0; from < count; from += kRows) {
          const int some = count - from < kRows ? count - from : kRows;
          for (int r = 0; r < some; r++) read[r] = activated + (size_t)(start + from + r) * inner;
          multiply(some, first, first + inner / 2, inner / 2, read, a, b);
          for (int r = 0; r < some; r++) {
            const int pair = sorted[start + from + r];
            float *const to = out + (size_t)(pair / top_k) * hidden + column;
            *(FloatsAnywhere *)to += a[r] * weights[pair];
            *(FloatsAnywhere *)(to + kLanes) += b[r] * weights[pair];
          }
        }
      }
    }
  }
}
