// Any processor: weights are widened in registers by a shift and a mask.

#pragma once

#include "common.h"

// Rows multiplied at once: two panels of so many rows fill half of AVX-512's registers, and as many of AVX's as leave
// room for the weights.
constexpr int kRows = kPart == 16 ? 8 : 4;

// Two panels times R rows of 2 * pairs inputs.
template <int R>
inline void multiply(const Words *first, const Words *second, int pairs, const float *const *rows, Floats *a,
                     Floats *b) {
  for (int part = 0; part < kParted; part++) {
    const PartWords *const one = (const PartWords *)first + part, *const other = (const PartWords *)second + part;
    Part sum_a[R] = {}, sum_b[R] = {};
    for (int i = 0; i < pairs; i++) {
      const PartWords wa = one[i * kParted], wb = other[i * kParted];
      const Part a_even = (Part)(wa << 16), a_odd = (Part)(wa & 0xffff0000u);
      const Part b_even = (Part)(wb << 16), b_odd = (Part)(wb & 0xffff0000u);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        sum_a[r] += a_even * rows[r][2 * i];
        sum_b[r] += b_even * rows[r][2 * i];
        sum_a[r] += a_odd * rows[r][2 * i + 1];
        sum_b[r] += b_odd * rows[r][2 * i + 1];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) ((Part *)&a[r])[part] = sum_a[r], ((Part *)&b[r])[part] = sum_b[r];
  }
}

inline void multiply(int count, const Words *first, const Words *second, int pairs, const float *const *rows,
                     Floats *a, Floats *b) {
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

inline void run_vectors(const Layer &layer, const Dispatch &asked) {
  const int hidden = layer.hidden, inner = layer.inner;
  // Kept from call to call: an engine's dispatches come on a thread of their own.
  thread_local std::vector<Floats> memory;
  const size_t needed = (size_t)asked.begin[layer.experts] * inner / kLanes;
  if (memory.size() < needed) memory.resize(needed);
  float *const activated = (float *)memory.data();

#pragma omp parallel num_threads(layer.threads)
  {
    const float *read[kRows];
    Floats a[kRows], b[kRows];
    for (int expert = 0; expert < layer.experts; expert++) {
      const int start = asked.begin[expert], count = asked.count(expert);
      if (!count) continue;
#pragma omp for schedule(static) nowait
      for (int panel = 0; panel < inner / kLanes; panel++) {
        const Words *const gate = layer.gate_panel(expert, panel);
        for (int from = 0; from < count; from += kRows) {
          const int some = count - from < kRows ? count - from : kRows;
          for (int r = 0; r < some; r++) read[r] = asked.x + (size_t)asked.row(start + from + r) * hidden;
          multiply(some, gate, gate + hidden / 2, hidden / 2, read, a, b);
          for (int r = 0; r < some; r++)
            *(Floats *)(activated + (size_t)(start + from + r) * inner + panel * kLanes) = gated(a[r], b[r]);
        }
      }
    }
#pragma omp barrier
    // Each thread owns columns of the output, so that a row's experts are added in one order.
#pragma omp for schedule(static) nowait
    for (int column = 0; column < hidden; column += 2 * kLanes) {
      asked.clear(column, hidden);
      for (int expert = 0; expert < layer.experts; expert++) {
        const int start = asked.begin[expert], count = asked.count(expert);
        if (!count) continue;
        const Words *const down = layer.down_panel(expert, column);
        for (int from = 0; from < count; from += kRows) {
          const int some = count - from < kRows ? count - from : kRows;
          for (int r = 0; r < some; r++) read[r] = activated + (size_t)(start + from + r) * inner;
          multiply(some, down, down + inner / 2, inner / 2, read, a, b);
          for (int r = 0; r < some; r++) asked.add(start + from + r, column, hidden, a[r], b[r]);
        }
      }
    }
  }
}
