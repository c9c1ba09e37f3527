// Vectors of 16 float32, the gate, and what a dispatch is.
//
// Vectors are GCC's own, so the compiler lowers them to whatever the processor has. It makes memory of those that are
// longer than the processor's, thirty times slower, so what is computed with is a Part: as much of a vector as a
// register holds.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef float FloatsAnywhere __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64)));

#if defined(__AVX512F__)
constexpr int kPart = 16;
#elif defined(__AVX__)
constexpr int kPart = 8;
#else
constexpr int kPart = 4;
#endif
constexpr int kParted = kLanes / kPart;

typedef float Part __attribute__((vector_size(4 * kPart), may_alias));
typedef float PartAnywhere __attribute__((vector_size(4 * kPart), aligned(4), may_alias));
typedef uint32_t PartWords __attribute__((vector_size(4 * kPart), may_alias));

// What the experts are. A panel is 16 outputs: for every pair of inputs 2i and 2i+1 one vector of 16 words, input 2i
// in the lower half of a word and 2i+1 in the upper.
struct Layer {
  const Words *up;    // [experts][inner / 16][gate, up] panels of `hidden` inputs
  const Words *down;  // [experts][hidden / 16] panels of `inner` inputs
  int experts, hidden, inner, threads;

  const Words *gate_panel(int expert, int panel) const {
    return up + ((size_t)expert * inner / kLanes + panel) * hidden;
  }
  const Words *down_panel(int expert, int column) const {
    return down + ((size_t)expert * hidden + column) / kLanes * (inner / 2);
  }
};

// A product as it would leave this host. Compilers multiply and add in one go, rounded once; then two experts of a row
// would give other bits on one host than on two, and a host's death could change a token.
inline Part rounded(Part product) {
  asm("" : "+m"(product));
  return product;
}

// What is asked of them: pairs of row and slot, sorted by expert.
struct Dispatch {
  const float *x;        // [rows][hidden]
  const float *weights;  // by pair
  float *out;            // [rows][hidden]
  int rows, top_k;
  const int32_t *begin;  // [experts + 1], where each expert's pairs begin
  const int32_t *pairs;  // row * top_k + slot

  int count(int expert) const { return begin[expert + 1] - begin[expert]; }
  int row(int place) const { return pairs[place] / top_k; }

  void clear(int column, int hidden) const {
    for (int row = 0; row < rows; row++)
      std::memset(out + (size_t)row * hidden + column, 0, 2 * sizeof(Floats));
  }
  // Adds 32 columns of the expert at a place to its row.
  void add(int place, int column, int hidden, Floats first, Floats second) const {
    const int pair = pairs[place];
    PartAnywhere *const to = (PartAnywhere *)(out + (size_t)(pair / top_k) * hidden + column);
    const Part *const a = (const Part *)&first, *const b = (const Part *)&second;
    for (int part = 0; part < kParted; part++) {
      to[part] += rounded(a[part] * weights[pair]);
      to[kParted + part] += rounded(b[part] * weights[pair]);
    }
  }
};

// e^x to about one unit in the last place, for x clamped to what float32 can hold.
inline Part exponential(Part x) {
  const Part high = Part{} + 88.0f, low = Part{} - 87.0f;
  x = x > high ? high : x;
  x = x < low ? low : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits of the significand.
  const Part shifted = x * 1.44269504088896341f + 12582912.0f;
  const Part whole = shifted - 12582912.0f;
  // ln 2 in two parts, of which the first has few enough bits to be multiplied exactly.
  const Part r = (x - whole * 0.693145751953125f) - whole * 1.42860682030941723e-6f;
  // Taylor's series: |r| is at most ln(2) / 2, so the next term is below a tenth of a unit in the last place.
  Part p = Part{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // Times 2^whole, by adding to the exponent.
  return (Part)((PartWords)p + ((PartWords)shifted << 23));
}

inline Part silu(Part x) { return x / (1.0f + exponential(-x)); }

// silu(gate) * up, of 16 numbers each.
inline Floats gated(Floats gate, Floats up) {
  Floats made;
  for (int part = 0; part < kParted; part++)
    ((Part *)&made)[part] = silu(((const Part *)&gate)[part]) * ((const Part *)&up)[part];
  return made;
}
