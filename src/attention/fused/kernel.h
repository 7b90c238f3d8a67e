// What a kernel offers, and what it works on. Two are made from kernel.cpp: for AVX-512 and for AVX2.
#pragma once

#include <cstdint>

// Functions that all files share must leave no copy of their own in any: the linker keeps one of them, which may be of instructions
// that another processor lacks.
#define INLINE inline __attribute__((always_inline))

namespace attention_distillation_fused {

// Rows of a matrix: those of a tensor (or of a copy of it), one head of one picture.
struct Rows {
  const float *data;
  int64_t stride; // in floats, from one row to the next

  INLINE const float *row(int64_t index) const { return data + index * stride; }
};

struct Shape {
  int64_t queries;
  int64_t keys;
  int64_t width;  // of queries, keys and values
  int64_t padded; // the width up to whole vectors
  float scale;    // of the scores
};

// Queries `from` to `to` of a head: what a thread does at a time.
struct Span {
  int64_t from;
  int64_t to;
};

struct Forward {
  Rows query;
  const float *keys;  // in panels, see `Kernel::panels`
  Rows values;        // `padded` wide
  Rows bias;          // (queries, keys), added to the scores; without data: none
  float *output;      // (queries, width)
  int64_t output_stride;
  float *log_sums;    // (queries): base 2, of the sums that the softmax divides by
};

struct Backward {
  Rows query;
  Rows output;
  Rows of_output;      // gradient by the output
  const float *log_sums;
  const float *keys;   // in panels
  const float *values; // in panels
  Rows key;            // `padded` wide
  float *of_query;     // gradient by the queries, (queries, width); null: not wanted
  int64_t of_query_stride;
  // What these queries add to the gradients by keys and values, (`Kernel::key_rows` of keys, padded); null: not wanted.
  float *of_key;
  float *of_value;
};

struct Kernel {
  int64_t lanes; // floats of a vector
  int64_t tile;  // queries that belong together: a span begins at a multiple of it
  // Keys or values in the order in which scores are computed.
  int64_t (*panel_floats)(const Shape &);
  void (*panels)(const Shape &, Rows, float *);
  // Rows that gradients by keys and values need, some more than there are keys.
  int64_t (*key_rows)(const Shape &);
  // `scratch` is memory for that many floats.
  int64_t (*scratch_floats)(const Shape &);
  void (*forward)(const Shape &, const Forward &, Span, float *scratch);
  void (*backward)(const Shape &, const Backward &, Span, float *scratch);
};

extern const Kernel avx512;
extern const Kernel avx2;

} // namespace attention_distillation_fused
