// Processors with AMX: tiles of 16 rows by 32 inputs, times panels as they lie in memory.
//
// A float32 number is the sum of three bfloat16 ones, each with the next eight bits of its significand. So three
// products of bfloat16 with sums in float32 lose no more than one product in float32 does, and are made many times
// faster: prefill is no longer bound by arithmetic.

#pragma once

#include "common.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

constexpr int kTile = 16, kDepth = 32, kParts = 3;
constexpr size_t kTileItems = kTile * kDepth;
// Few rows wait for memory, and one core's own prefetching does not use all of it. So many vectors ahead (36 KB) gave
// up to a fifth more than none, and more than 8 or 18 KB.
constexpr int kAhead = 576;

typedef uint16_t Halves __attribute__((vector_size(32)));

// Whether this process may use tiles. Linux gives the registers on request only: without it the first instruction
// on them would kill the process.
inline bool tiles_ready() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool ready = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return ready;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 weights.
inline void configure(int rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) {
    config.bytes[tile] = 64;
    config.rows[tile] = tile < 6 ? rows : kTile;
  }
  _tile_loadconfig(&config);
}

// One or two blocks of up to 16 rows, of `inputs` numbers each, in tiles: [block][part][inputs / 32][16][32].
struct Blocks {
  uint16_t *tiles;
  int inputs;

  size_t part() const { return (size_t)inputs * kTile; }
  size_t block() const { return part() * kParts; }
  uint16_t *at(size_t index) const { return tiles + index * block(); }

  // Puts 16 numbers of a row, from the given one on, into the row's places.
  void put(size_t index, int row, int from, Floats x) const {
    uint16_t *to = at(index) + (from / kDepth) * kTileItems + row * kDepth + from % kDepth;
    for (int part_index = 0; part_index < kParts; part_index++, to += part()) {
      // Cut off, not rounded: what is left is exact, and a number too large or none at all stays so.
      const Words high = (Words)x & 0xffff0000u;
      *(Halves *)to = __builtin_convertvector(high >> 16, Halves);
      x -= (Floats)high;
    }
  }
};

// Two panels times one block or two: sums [block][panel][16 rows]. Sums are made in the same order in both cases, so
// that a row's result does not depend on the rows beside it.
template <bool Two>
inline void multiply_tiles(const Words *first, const Words *second, const Blocks &blocks, size_t index, Floats *sums) {
  _tile_zero(0);
  _tile_zero(1);
  if (Two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < blocks.inputs / kDepth; k++) {
    const uint16_t *x = blocks.at(index) + k * kTileItems;
    if (!Two)
      for (int vector = k * kTile; vector < (k + 1) * kTile; vector++) {
        __builtin_prefetch(first + vector + kAhead);
        __builtin_prefetch(second + vector + kAhead);
      }
    _tile_loadd(6, first + k * kTile, 64);
    _tile_loadd(7, second + k * kTile, 64);
    for (int part = 0; part < kParts; part++, x += blocks.part()) {
      _tile_loadd(4, x, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (Two) {
        _tile_loadd(5, x + blocks.block(), 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTile, 64);
  if (Two) {
    _tile_stored(2, sums + 2 * kTile, 64);
    _tile_stored(3, sums + 3 * kTile, 64);
  }
}

// Two panels times all blocks of an expert's `count` rows; `done` is called with each row's number and its two sums.
template <typename Done>
inline void multiply_rows(const Words *first, const Words *second, const Blocks &blocks, int first_block, int count,
                          int *configured, Done done) {
  alignas(64) Floats sums[4 * kTile];
  for (int from = 0; from < count; from += 2 * kTile) {
    const int some = count - from < 2 * kTile ? count - from : 2 * kTile, high = some < kTile ? some : kTile;
    if (high != *configured) configure(*configured = high);
    if (some > kTile)
      multiply_tiles<true>(first, second, blocks, first_block + from / kTile, sums);
    else
      multiply_tiles<false>(first, second, blocks, first_block + from / kTile, sums);
    for (int r = 0; r < some; r++) {
      const Floats *const sum = sums + r / kTile * 2 * kTile + r % kTile;
      done(from + r, sum[0], sum[kTile]);
    }
  }
}

inline void run_tiles(const Layer &layer, const Dispatch &asked) {
  const int hidden = layer.hidden, inner = layer.inner;
  thread_local std::vector<int32_t> firsts;
  thread_local std::vector<Floats> memory;
  // Each expert's rows fill blocks of their own.
  firsts.assign(layer.experts + 1, 0);
  for (int expert = 0; expert < layer.experts; expert++)
    firsts[expert + 1] = firsts[expert] + (asked.count(expert) + kTile - 1) / kTile;
  const int32_t *const first_block = firsts.data();
  const size_t blocks = firsts[layer.experts];
  Blocks read{nullptr, hidden}, activated{nullptr, inner};
  const size_t needed = blocks * (read.block() + activated.block()) * sizeof(uint16_t) / sizeof(Floats);
  if (memory.size() < needed) memory.resize(needed);
  read.tiles = (uint16_t *)memory.data();
  activated.tiles = read.at(blocks);

#pragma omp parallel num_threads(layer.threads)
  {
    int configured = 0;
    for (int expert = 0; expert < layer.experts; expert++) {
#pragma omp for schedule(static) nowait
      for (int r = 0; r < asked.count(expert); r++) {
        const float *const row = asked.x + (size_t)asked.row(asked.begin[expert] + r) * hidden;
        for (int from = 0; from < hidden; from += kLanes)
          read.put(first_block[expert] + r / kTile, r % kTile, from, *(const FloatsAnywhere *)(row + from));
      }
    }
#pragma omp barrier
    for (int expert = 0; expert < layer.experts; expert++) {
      if (!asked.count(expert)) continue;
#pragma omp for schedule(static) nowait
      for (int panel = 0; panel < inner / kLanes; panel++) {
        const Words *const gate = layer.gate_panel(expert, panel);
        multiply_rows(gate, gate + hidden / 2, read, first_block[expert], asked.count(expert), &configured,
                      [&](int r, Floats gate_sum, Floats up_sum) {
                        activated.put(first_block[expert] + r / kTile, r % kTile, panel * kLanes,
                                      gated(gate_sum, up_sum));
                      });
      }
    }
#pragma omp barrier
    // Each thread owns columns of the output, so that a row's experts are added in one order.
#pragma omp for schedule(static) nowait
    for (int column = 0; column < hidden; column += 2 * kLanes) {
      asked.clear(column, hidden);
      for (int expert = 0; expert < layer.experts; expert++) {
        if (!asked.count(expert)) continue;
        const Words *const down = layer.down_panel(expert, column);
        multiply_rows(down, down + inner / 2, activated, first_block[expert], asked.count(expert), &configured,
                      [&](int r, Floats first, Floats second) {
                        asked.add(asked.begin[expert] + r, column, hidden, first, second);
                      });
      }
    }
    if (configured) _tile_release();
  }
}

#else

inline bool tiles_ready() { return false; }
inline void run_tiles(const Layer &, const Dispatch &) {}

#endif
