// Attention and its gradients on a CPU, in f32, without the matrix of scores ever being in memory (Dao et al. 2022): for a tile of
// queries and a block of keys at a time, which stay in the nearest caches. Compiled once per instruction set, so nothing of the
// standard library is used: the linker would be free to take its functions from the wrong one of the two.
//
// Scores are kept times log2(e), as powers of two are the cheaper ones.
//
// The build says which one this is, FUSED_KERNEL with vectors of FUSED_LANES floats: the compiler may have been told of more.

#include "kernel.h"

#include <immintrin.h>

namespace attention_distillation_fused {
namespace {

constexpr int LANES = FUSED_LANES;
#if FUSED_LANES == 16
// Rows of the scores that are in registers at a time, two vectors wide: 28 of 32 registers.
constexpr int SCORES = 14;
// Rows of a product whose rows are queries, and whose rows are keys, up to three vectors wide.
constexpr int OF_QUERIES = 7, OF_KEYS = 8;
#else
constexpr int SCORES = 6;
constexpr int OF_QUERIES = 4, OF_KEYS = 4;
#endif
constexpr int PANEL = 2 * LANES;
constexpr int64_t BLOCK = 128;
constexpr int PARTS = LANES == 16 ? 2 : 4;
constexpr int TILE = PARTS * SCORES;
// Tiles that see a block of keys before the next block comes from a cache further off.
constexpr int64_t GROUP = 4;
constexpr float LOG2_E = 1.44269504f;
static_assert(BLOCK % PANEL == 0 && PANEL % OF_KEYS == 0 && TILE % OF_QUERIES == 0, "what is left over is nowhere looked after");

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Integers __attribute__((vector_size(4 * LANES)));

INLINE Vector load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }
INLINE void store(float *to, Vector x) { *reinterpret_cast<Unaligned *>(to) = x; }
INLINE Vector each(float x) { return x - Vector{}; }
INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t up_to_whole(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

INLINE float sum(Vector x) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += x[lane];
  return total;
}

// Whether a lane of one is above the other's.
INLINE bool exceeds(Vector a, Vector b) {
#if FUSED_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#endif
}

INLINE float largest(Vector x) {
  float most = x[0];
  for (int lane = 1; lane < LANES; lane++) most = x[lane] > most ? x[lane] : most;
  return most;
}

// 2^x for x up to 127, to 1e-7 of itself, and what is not a number stays so. 0 below 2^-60: sums of weights are at least 1 and do not
// see that, outputs do where a value is 1e11 times another; so small numbers times gradients come to what processors are slow with.
INLINE Vector power_of_two(Vector x) {
  // Adding 1.5 * 2^23 rounds; the lowest bits are then the whole number, here plus 127, as exponents are.
  const Vector rounder = each(12583039.f);
  const Vector shifted = x + rounder;
  const Vector rest = x - (shifted - rounder);
  // 2^rest from -0.5 to 0.5.
  Vector y = each(1.5353362e-4f);
  y = y * rest + 1.3398874e-3f;
  y = y * rest + 9.6184373e-3f;
  y = y * rest + 5.5503324e-2f;
  y = y * rest + 2.4022648e-1f;
  y = y * rest + 6.9314718e-1f;
  y = y * rest + 1.f;
  const Vector power = y * (Vector)((Integers)shifted << 23);
  return x < each(-60.f) ? Vector{} : power;
}

// Rows as columns, `count` at a time: (width, count), so that a product finds what it needs next to one another.
// Of `count` the first `rows`, from `first` on, are there; the others are 0.
INLINE void transpose(Rows from, int64_t first, int64_t rows, int64_t count, int64_t width, float factor, float *to) {
  for (int64_t at = 0; at < width; at++)
    for (int64_t row = 0; row < count; row++) to[at * count + row] = row < rows ? from.row(first + row)[at] * factor : 0.f;
}

// a b, where a is (width, SCORES) and b (width, PANEL), both transposed.
INLINE void product(const float *a, const float *b, int64_t width, Vector (&c)[SCORES][2]) {
  for (int row = 0; row < SCORES; row++) c[row][0] = c[row][1] = Vector{};
  for (int64_t at = 0; at < width; at++) {
    const Vector left = load(b + at * PANEL), right = load(b + at * PANEL + LANES);
#pragma GCC unroll 14
    for (int row = 0; row < SCORES; row++) {
      const Vector x = each(a[at * SCORES + row]);
      c[row][0] = x * left + c[row][0];
      c[row][1] = x * right + c[row][1];
    }
  }
}

// A matrix of which either way round may be contiguous.
struct Factor {
  const float *data;
  int64_t row;
  int64_t column;
};

// c += a b, where c is (ROWS, VECTORS vectors) and b (depth, VECTORS vectors).
template <int ROWS, int VECTORS>
INLINE void add_part(Factor a, const float *b, int64_t depth, float *c, int64_t stride, int64_t stride_of_c) {
  Vector sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
    for (int at = 0; at < VECTORS; at++) sums[row][at] = load(c + row * stride_of_c + at * LANES);
  for (int64_t k = 0; k < depth; k++) {
    Vector y[VECTORS];
#pragma GCC unroll 3
    for (int at = 0; at < VECTORS; at++) y[at] = load(b + k * stride + at * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
      const Vector x = each(a.data[row * a.row + k * a.column]);
#pragma GCC unroll 3
      for (int at = 0; at < VECTORS; at++) sums[row][at] = x * y[at] + sums[row][at];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
    for (int at = 0; at < VECTORS; at++) store(c + row * stride_of_c + at * LANES, sums[row][at]);
}

// c += a b, where c is (rows, padded), `padded` apart, and b (depth, padded); whole ROWS are done.
template <int ROWS> void add_product(Factor a, int64_t rows, Rows b, int64_t depth, int64_t padded, float *c) {
  for (int64_t row = 0; row < rows; row += ROWS) {
    const Factor part{a.data + row * a.row, a.row, a.column};
    float *to = c + row * padded;
    for (int64_t at = 0; at < padded;) {
      const int64_t left = (padded - at) / LANES;
      // 4 as 2 and 2: a product of one vector waits for itself.
      const int64_t vectors = left == 4 ? 2 : least(left, 3);
      if (vectors == 3) {
        add_part<ROWS, 3>(part, b.data + at, depth, to + at, b.stride, padded);
      } else if (vectors == 2) {
        add_part<ROWS, 2>(part, b.data + at, depth, to + at, b.stride, padded);
      } else {
        add_part<ROWS, 1>(part, b.data + at, depth, to + at, b.stride, padded);
      }
      at += vectors * LANES;
    }
  }
}

int64_t panel_floats(const Shape &shape) { return up_to_whole(shape.keys, PANEL) * shape.width; }

void panels(const Shape &shape, Rows rows, float *to) {
  for (int64_t key = 0; key < shape.keys; key += PANEL) {
    transpose(rows, key, least(PANEL, shape.keys - key), PANEL, shape.width, 1.f, to + key * shape.width);
  }
}

int64_t key_rows(const Shape &shape) { return up_to_whole(shape.keys, OF_KEYS); }

// Hands out parts of a piece of memory.
struct Scratch {
  float *at;

  float *take(int64_t floats) {
    float *taken = at;
    at += up_to_whole(floats, 16);
    return taken;
  }
};

int64_t scratch_floats(const Shape &shape) {
  // Of the backward pass, which needs more, with what rounding up may add.
  return TILE * (2 * BLOCK + GROUP * (2 * shape.width + 3 * shape.padded + 1 + LANES)) + 16 * 16;
}

// Weights of a tile's queries for a block of keys, and what they make of the values, so far.
struct Softmax {
  int64_t queries;    // that are there
  Rows bias;          // (queries, keys), from the block's first key on
  const float *query; // (PARTS, width, SCORES), scaled
  float *weights;     // (TILE, BLOCK)
  float *output;      // (TILE, padded)
  float *most;        // (TILE): the largest score
  float *sums;        // (TILE, LANES): of the weights, added up at the end
};

// bias * log2(e). What is finite stays so: the least number that there is is a usual way to forbid a key.
INLINE Vector in_powers_of_two(Vector bias) {
  const Vector most = each(3.40282347e38f);
  const Vector x = larger(-most, bias * LOG2_E);
  const Vector within = x > most ? most : x;
  return ((bias < -most) | (bias > most)) ? bias : within;
}

INLINE void add_bias(const float *bias, int64_t count, float *scores) {
  int64_t key = 0;
  for (; key + LANES <= count; key += LANES) store(scores + key, load(scores + key) + in_powers_of_two(load(bias + key)));
  if (key == count) return;
  Vector rest{};
  for (int64_t lane = 0; key + lane < count; lane++) rest[lane] = bias[key + lane];
  // Blocks are of whole vectors, and what is behind the last key is overwritten.
  store(scores + key, load(scores + key) + in_powers_of_two(rest));
}

void weigh(const Shape &shape, const Softmax &tile, const float *keys, int64_t count) {
  for (int part = 0; part < PARTS; part++) {
    const int first = part * SCORES;
    for (int64_t key = 0; key < count; key += PANEL) {
      Vector scores[SCORES][2];
      product(tile.query + part * SCORES * shape.width, keys + key * shape.width, shape.width, scores);
#pragma GCC unroll 14
      for (int row = 0; row < SCORES; row++) {
        store(tile.weights + (first + row) * BLOCK + key, scores[row][0]);
        store(tile.weights + (first + row) * BLOCK + key + LANES, scores[row][1]);
      }
    }
    for (int row = first; row < first + SCORES; row++) {
      if (tile.bias.data && row < tile.queries) add_bias(tile.bias.row(row), count, tile.weights + row * BLOCK);
      // Keys that are not there have the least score there can be.
      for (int64_t key = count; key < up_to_whole(count, PANEL); key++) tile.weights[row * BLOCK + key] = -__builtin_inff();
      Vector most = each(tile.most[row]);
      for (int64_t key = 0; key < count; key += PANEL) {
        const float *x = tile.weights + row * BLOCK + key;
        most = larger(larger(load(x), load(x + LANES)), most);
      }
      Vector left = load(tile.sums + row * LANES), right{};
      if (exceeds(most, each(tile.most[row]))) {
        const float now = largest(most);
        const float factor = power_of_two(each(tile.most[row] - now))[0];
        tile.most[row] = now;
        left *= factor;
        for (int64_t at = 0; at < shape.padded; at += LANES) {
          float *x = tile.output + row * shape.padded + at;
          store(x, load(x) * factor);
        }
      }
      // Where all scores so far are as small as can be, their difference from the largest is no number.
      const float from = tile.most[row] == -__builtin_inff() ? 0.f : tile.most[row];
      for (int64_t key = 0; key < count; key += PANEL) {
        float *x = tile.weights + row * BLOCK + key;
        const Vector a = power_of_two(load(x) - from), b = power_of_two(load(x + LANES) - from);
        store(x, a);
        store(x + LANES, b);
        left += a;
        right += b;
      }
      store(tile.sums + row * LANES, left + right);
    }
  }
}

void forward(const Shape &shape, const Forward &pass, Span span, float *memory) {
  const int64_t width = shape.width, padded = shape.padded;
  Scratch scratch{memory};
  float *weights = scratch.take(TILE * BLOCK), *query = scratch.take(GROUP * TILE * width), *output = scratch.take(GROUP * TILE * padded);
  float *most = scratch.take(GROUP * TILE), *sums = scratch.take(GROUP * TILE * LANES);
  for (int64_t group = span.from; group < span.to; group += GROUP * TILE) {
    const int64_t rows = least(GROUP * TILE, span.to - group), tiles = up_to_whole(rows, TILE) / TILE;
    for (int64_t row = 0; row < tiles * TILE; row += SCORES) {
      const int64_t here = row < rows ? least(SCORES, rows - row) : 0;
      transpose(pass.query, group + row, here, SCORES, width, shape.scale * LOG2_E, query + row * width);
    }
    for (int64_t i = 0; i < tiles * TILE * padded; i++) output[i] = 0;
    for (int64_t row = 0; row < tiles * TILE; row++) most[row] = -__builtin_inff();
    for (int64_t i = 0; i < tiles * TILE * LANES; i++) sums[i] = 0;
    for (int64_t key = 0; key < shape.keys; key += BLOCK) {
      const int64_t count = least(BLOCK, shape.keys - key);
      for (int64_t first = 0; first < tiles * TILE; first += TILE) {
        const Rows bias{pass.bias.data ? pass.bias.row(group + first) + key : nullptr, pass.bias.stride};
        const Softmax tile{rows - first, bias, query + first * width, weights, output + first * padded, most + first, sums + first * LANES};
        weigh(shape, tile, pass.keys + key * width, count);
        const Rows values{pass.values.row(key), pass.values.stride};
        add_product<OF_QUERIES>({weights, BLOCK, 1}, TILE, values, count, padded, tile.output);
      }
    }
    for (int64_t row = 0; row < rows; row++) {
      const float total = sum(load(sums + row * LANES));
      // Where all scores are as small as can be nothing is attended to, as by libtorch.
      const bool nothing = total == 0;
      const float inverse = nothing ? 0.f : 1.f / total;
      float *to = pass.output + (group + row) * pass.output_stride;
      for (int64_t at = 0; at < width; at++) to[at] = output[row * padded + at] * inverse;
      pass.log_sums[group + row] = nothing ? 0.f : most[row] + __builtin_log2f(total);
    }
  }
}

// A tile's queries, on the way back.
struct Slopes {
  const float *query;     // (PARTS, width, SCORES), scaled
  const float *of_output; // (PARTS, width, SCORES)
  const float *log_sums;  // (TILE)
  const float *dots;      // (TILE): of outputs and gradients by them
  float *weights;         // (TILE, BLOCK)
  float *of_scores;       // (TILE, BLOCK): gradient by the scores before they are scaled, over the scale
};

// Of keys that are not there come numbers without a meaning, in columns that nobody reads but for gradients by such keys.
void slopes(const Shape &shape, const Slopes &tile, const float *keys, const float *values, int64_t count) {
  for (int64_t key = 0; key < count; key += PANEL) {
    for (int part = 0; part < PARTS; part++) {
      const int first = part * SCORES;
      Vector x[SCORES][2];
      product(tile.query + first * shape.width, keys + key * shape.width, shape.width, x);
#pragma GCC unroll 14
      for (int row = 0; row < SCORES; row++) {
        float *to = tile.weights + (first + row) * BLOCK + key;
        store(to, power_of_two(x[row][0] - tile.log_sums[first + row]));
        store(to + LANES, power_of_two(x[row][1] - tile.log_sums[first + row]));
      }
      product(tile.of_output + first * shape.width, values + key * shape.width, shape.width, x);
#pragma GCC unroll 14
      for (int row = 0; row < SCORES; row++) {
        const int64_t at = (first + row) * BLOCK + key;
        store(tile.of_scores + at, (x[row][0] - tile.dots[first + row]) * load(tile.weights + at));
        store(tile.of_scores + at + LANES, (x[row][1] - tile.dots[first + row]) * load(tile.weights + at + LANES));
      }
    }
  }
}

void backward(const Shape &shape, const Backward &pass, Span span, float *memory) {
  const int64_t width = shape.width, padded = shape.padded, all = GROUP * TILE;
  Scratch scratch{memory};
  float *weights = scratch.take(TILE * BLOCK), *of_scores = scratch.take(TILE * BLOCK);
  float *query = scratch.take(all * width), *of_output = scratch.take(all * width);
  float *query_rows = scratch.take(all * padded), *of_output_rows = scratch.take(all * padded), *of_query = scratch.take(all * padded);
  float *dots = scratch.take(all), *log_sums = scratch.take(all);
  for (int64_t group = span.from; group < span.to; group += all) {
    const int64_t rows = least(all, span.to - group), tiles = up_to_whole(rows, TILE) / TILE;
    for (int64_t row = 0; row < tiles * TILE; row += SCORES) {
      const int64_t here = row < rows ? least(SCORES, rows - row) : 0;
      transpose(pass.query, group + row, here, SCORES, width, shape.scale * LOG2_E, query + row * width);
      transpose(pass.of_output, group + row, here, SCORES, width, 1.f, of_output + row * width);
    }
    for (int64_t i = 0; i < tiles * TILE * padded; i++) query_rows[i] = of_output_rows[i] = of_query[i] = 0;
    for (int64_t row = 0; row < tiles * TILE; row++) {
      dots[row] = log_sums[row] = 0;
      if (row >= rows) continue;
      const float *q = pass.query.row(group + row), *o = pass.output.row(group + row), *g = pass.of_output.row(group + row);
      for (int64_t at = 0; at < width; at++) {
        query_rows[row * padded + at] = q[at] * shape.scale;
        of_output_rows[row * padded + at] = g[at];
        dots[row] += o[at] * g[at];
      }
      log_sums[row] = pass.log_sums[group + row];
    }
    for (int64_t key = 0; key < shape.keys; key += BLOCK) {
      const int64_t count = least(BLOCK, shape.keys - key);
      for (int64_t first = 0; first < tiles * TILE; first += TILE) {
        const Slopes tile{query + first * width, of_output + first * width, log_sums + first, dots + first, weights, of_scores};
        slopes(shape, tile, pass.keys + key * width, pass.values + key * width, count);
        if (pass.of_query) {
          const Rows keys{pass.key.row(key), pass.key.stride};
          add_product<OF_QUERIES>({of_scores, BLOCK, 1}, TILE, keys, count, padded, of_query + first * padded);
        }
        // Queries that are not there have gradients of 0.
        const int64_t depth = least(TILE, rows - first);
        if (pass.of_key) {
          add_product<OF_KEYS>({of_scores, 1, BLOCK}, count, {query_rows + first * padded, padded}, depth, padded, pass.of_key + key * padded);
        }
        if (pass.of_value) {
          add_product<OF_KEYS>({weights, 1, BLOCK}, count, {of_output_rows + first * padded, padded}, depth, padded, pass.of_value + key * padded);
        }
      }
    }
    for (int64_t row = 0; pass.of_query && row < rows; row++) {
      float *to = pass.of_query + (group + row) * pass.of_query_stride;
      for (int64_t at = 0; at < width; at++) to[at] = of_query[row * padded + at] * shape.scale;
    }
  }
}

} // namespace

const Kernel FUSED_KERNEL{LANES, TILE, panel_floats, panels, key_rows, scratch_floats, forward, backward};

} // namespace attention_distillation_fused
