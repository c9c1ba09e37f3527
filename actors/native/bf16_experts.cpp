// Gated experts, y = down · (silu(gate · x) * (up · x)), over bfloat16 weights with float32 rows and sums.
//
// A bfloat16 number is the upper half of a float32, so widening it is exact: what comes out is what float32
// weights would give, for half the bytes read. Decoding reads every weight once per step and waits for memory,
// so it takes little more than half the time.
//
// Every output is summed in one order, however many rows are multiplied at once: a row's result does not depend on
// its company.

#include "common.h"
#include "tiles.h"
#include "vectors.h"

// up, down: see Layer. x, out: [rows][hidden]; slots, weights: [rows][top_k], a slot below 0 is not computed.
// hidden and inner are multiples of 32. With `vectors` tiles are not used.
extern "C" void expertmesh_bf16_experts(const Words *up, const Words *down, int experts, int hidden, int inner,
                                        const float *x, const int32_t *slots, const float *weights, float *out,
                                        int rows, int top_k, int threads, int vectors) {
  thread_local std::vector<int32_t> begin, next, sorted;
  const int pairs = rows * top_k;
  begin.assign(experts + 1, 0);
  sorted.resize(pairs);
  for (int pair = 0; pair < pairs; pair++)
    if (slots[pair] >= 0) begin[slots[pair] + 1]++;
  for (int expert = 0; expert < experts; expert++) begin[expert + 1] += begin[expert];
  next.assign(begin.begin(), begin.end());
  for (int pair = 0; pair < pairs; pair++)
    if (slots[pair] >= 0) sorted[next[slots[pair]]++] = pair;

  const Layer layer{up, down, experts, hidden, inner, threads};
  const Dispatch asked{x, weights, out, rows, top_k, begin.data(), sorted.data()};
  if (!vectors && tiles_ready())
    run_tiles(layer, asked);
  else
    run_vectors(layer, asked);
}

extern "C" int expertmesh_bf16_tiles() { return tiles_ready(); }
