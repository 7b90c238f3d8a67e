// The kernels as an operator of libtorch, which knows its gradients and shares out the work among libtorch's own threads.
// Every function returns null, or what went wrong, to be freed by fused_attention_free_error.

#include "kernel.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

namespace {

using at::Tensor;
using fused::Kernel;
using fused::Rows;
using fused::Shape;
using fused::Span;
using torch::autograd::AutogradContext;

// The kernel with vectors of so many floats, if this processor, and its system, can do that.
const Kernel *kernel_of(int64_t lanes) {
  static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl");
  static const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return wide && lanes == fused::avx512.lanes ? &fused::avx512 : narrow && lanes == fused::avx2.lanes ? &fused::avx2 : nullptr;
}

const Kernel &known_kernel_of(int64_t lanes) {
  const Kernel *kernel = kernel_of(lanes);
  TORCH_CHECK(kernel, "attention: this processor has no vectors of ", lanes, " floats");
  return *kernel;
}

// Heads of all pictures, (pictures, heads, tokens, width), of any strides but the width's.
struct Heads {
  explicit Heads(const Tensor &tensor) : data(tensor.data_ptr<float>()), heads(tensor.size(1)), of_picture(tensor.stride(0)), of_head(tensor.stride(1)), of_token(tensor.stride(2)) {}

  float *head(int64_t index) const { return data + index / heads * of_picture + index % heads * of_head; }
  Rows rows(int64_t index) const { return {head(index), of_token}; }

  float *data;
  int64_t heads, of_picture, of_head, of_token;
};

Tensor by_rows(const Tensor &x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

// Whole vectors wide: itself, or a copy with zeros behind.
Tensor padded(const Tensor &x, int64_t width) { return x.size(3) == width ? x : at::constant_pad_nd(x, {0, width - x.size(3)}); }

// Laid out as networks do, with the heads of a token side by side, so that putting them together takes no copy.
Tensor like(const Tensor &x) { return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options().requires_grad(false)).transpose(1, 2); }

Shape shape_of(const Kernel &kernel, const Tensor &query, const Tensor &key, double scale) {
  const int64_t width = query.size(3), lanes = kernel.lanes;
  return {query.size(2), key.size(2), width, (width + lanes - 1) / lanes * lanes, static_cast<float>(scale)};
}

// `work(index)` for each index below `count`, by as many threads as there are.
template <typename Work> void each_in_parallel(int64_t count, const Work &work) {
  const auto run = [](int64_t from, int64_t to, void *context) {
    for (int64_t index = from; index < to; index++) (*static_cast<const Work *>(context))(index);
  };
  TORCH_CHECK(torch_parallel_for(0, count, 1, run, const_cast<Work *>(&work)) == 0, "attention: libtorch's threads could not be used");
}

Tensor panels(const Kernel &kernel, const Shape &shape, const Tensor &x) {
  const int64_t heads = x.size(0) * x.size(1), floats = kernel.panel_floats(shape);
  Tensor packed = at::empty({heads, floats}, x.options().requires_grad(false));
  float *to = packed.data_ptr<float>();
  const Heads from(x);
  each_in_parallel(heads, [&](int64_t head) { kernel.panels(shape, from.rows(head), to + head * floats); });
  return packed;
}

// Queries of one head, for one thread.
struct Piece {
  int64_t head;
  Span span;
};

int64_t threads() {
  uint32_t count = 1;
  TORCH_CHECK(torch_get_num_threads(&count) == 0, "attention: libtorch does not say how many threads it has");
  return count;
}

// All queries of all heads in as many even shares as there are threads, each of pieces in order. A share's order of sums depends on
// their number alone, not on which is done first.
std::vector<std::vector<Piece>> shares(int64_t tile, int64_t heads, int64_t queries) {
  const int64_t tiles = (queries + tile - 1) / tile, all = heads * tiles;
  const int64_t count = std::max<int64_t>(1, std::min(threads(), all));
  std::vector<std::vector<Piece>> shares(count);
  for (int64_t share = 0; share < count; share++) {
    const int64_t end = all * (share + 1) / count;
    for (int64_t at = all * share / count; at < end;) {
      const int64_t head = at / tiles, next = std::min(end, (head + 1) * tiles);
      shares[share].push_back({head, {(at - head * tiles) * tile, std::min(queries, (next - head * tiles) * tile)}});
      at = next;
    }
  }
  return shares;
}

struct Outcome {
  Tensor output;
  Tensor log_sums;
};

Outcome forward(const Kernel &kernel, const Tensor &query, const Tensor &key, const Tensor &value, double scale) {
  const Shape shape = shape_of(kernel, query, key, scale);
  const int64_t heads = query.size(0) * query.size(1);
  const Tensor keys = panels(kernel, shape, key), values = padded(value, shape.padded);
  Outcome outcome{like(query), at::empty({heads, shape.queries}, keys.options())};
  const auto all = shares(kernel.tile, heads, shape.queries);
  const int64_t floats = kernel.scratch_floats(shape);
  const Tensor memory = at::empty({static_cast<int64_t>(all.size()), floats}, keys.options());
  const Heads q(query), v(values), o(outcome.output);
  const float *k = keys.data_ptr<float>();
  float *log_sums = outcome.log_sums.data_ptr<float>(), *scratch = memory.data_ptr<float>();
  each_in_parallel(all.size(), [&](int64_t share) {
    for (const Piece &piece : all[share]) {
      const fused::Forward pass{q.rows(piece.head), k + piece.head * keys.size(1), v.rows(piece.head), o.head(piece.head), o.of_token,
                                log_sums + piece.head * shape.queries};
      kernel.forward(shape, pass, piece.span, scratch + share * floats);
    }
  });
  return outcome;
}

// Sums over the queries of a head that several shares have parts of: the first share's are where they belong, the others' beside
// it, to be added.
struct Sums {
  Sums(const std::vector<std::vector<Piece>> &shares, int64_t heads, int64_t rows, int64_t width, const at::TensorOptions &options)
      : total(at::zeros({heads, rows, width}, options)) {
    int64_t further = 0;
    for (const auto &pieces : shares) {
      places.emplace_back();
      for (const Piece &piece : pieces) {
        const bool first = piece.span.from == 0;
        places.back().push_back(first ? Place{true, piece.head} : Place{false, further});
        if (!first) {
          added.push_back(piece.head);
          further++;
        }
      }
    }
    beside = at::zeros({further, rows, width}, options);
  }

  float *of(int64_t share, size_t piece) const {
    const Place place = places[share][piece];
    const Tensor &in = place.first ? total : beside;
    return in.data_ptr<float>() + place.index * in.stride(0);
  }

  void add_up() {
    for (size_t index = 0; index < added.size(); index++) total[added[index]].add_(beside[index]);
  }

  // (pictures, heads, tokens, width), without the rows and columns that were there for the kernel.
  Tensor gradient(const Tensor &x) const {
    return total.view({x.size(0), x.size(1), total.size(1), total.size(2)}).narrow(2, 0, x.size(2)).narrow(3, 0, x.size(3));
  }

  struct Place {
    bool first;
    int64_t index;
  };
  Tensor total, beside;
  std::vector<std::vector<Place>> places;
  std::vector<int64_t> added;
};

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext *context, const Tensor &query, const Tensor &key, const Tensor &value, double scale, int64_t lanes) {
    auto [output, log_sums] = ::forward(known_kernel_of(lanes), query, key, value, scale);
    context->save_for_backward({query, key, value, output, log_sums});
    context->saved_data["scale"] = scale;
    context->saved_data["lanes"] = lanes;
    return output;
  }

  static torch::autograd::variable_list backward(AutogradContext *context, torch::autograd::variable_list gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "attention: gradients of gradients are not there; build without the feature fused-attention");
    const Kernel &kernel = known_kernel_of(context->saved_data["lanes"].toInt());
    const auto saved = context->get_saved_variables();
    const Tensor &query = saved[0], &key = saved[1], &value = saved[2], &output = saved[3], &log_sums = saved[4];
    const bool by_query = context->needs_input_grad(0), by_key = context->needs_input_grad(1), by_value = context->needs_input_grad(2);
    const Shape shape = shape_of(kernel, query, key, context->saved_data["scale"].toDouble());
    const int64_t heads = query.size(0) * query.size(1), rows = kernel.key_rows(shape);
    const Tensor of_output = by_rows(gradients[0]);
    const Tensor keys = panels(kernel, shape, key), values = panels(kernel, shape, value);
    const Tensor key_rows = padded(key, shape.padded);
    const auto all = shares(kernel.tile, heads, shape.queries);
    const int64_t floats = kernel.scratch_floats(shape);
    const Tensor memory = at::empty({static_cast<int64_t>(all.size()), floats}, keys.options());
    const Tensor of_query = by_query ? like(query) : Tensor();
    const std::vector<std::vector<Piece>> none;
    Sums of_key(by_key ? all : none, by_key ? heads : 0, rows, shape.padded, keys.options());
    Sums of_value(by_value ? all : none, by_value ? heads : 0, rows, shape.padded, keys.options());
    // Without a gradient by queries the last is not looked at.
    const Heads q(query), o(output), g(of_output), k(key_rows), dq(by_query ? of_query : query);
    const float *k_panels = keys.data_ptr<float>(), *v_panels = values.data_ptr<float>(), *sums = log_sums.data_ptr<float>();
    float *scratch = memory.data_ptr<float>();
    each_in_parallel(all.size(), [&](int64_t share) {
      for (size_t index = 0; index < all[share].size(); index++) {
        const Piece &piece = all[share][index];
        const int64_t head = piece.head;
        const fused::Backward pass{q.rows(head), o.rows(head), g.rows(head), sums + head * shape.queries, k_panels + head * keys.size(1),
                                   v_panels + head * values.size(1), k.rows(head), by_query ? dq.head(head) : nullptr, dq.of_token,
                                   by_key ? of_key.of(share, index) : nullptr, by_value ? of_value.of(share, index) : nullptr};
        kernel.backward(shape, pass, piece.span, scratch + share * floats);
      }
    });
    of_key.add_up();
    of_value.add_up();
    return {of_query, by_key ? of_key.gradient(key) : Tensor(), by_value ? of_value.gradient(value) : Tensor(), Tensor(), Tensor()};
  }
};

char no_memory[] = "not enough memory for an error's message";

char *message(const char *text) noexcept {
  char *copy = strdup(text);
  return copy ? copy : no_memory;
}

} // namespace

extern "C" {

// Whether this processor can work with vectors of so many floats.
bool fused_attention_can(int64_t lanes) { return kernel_of(lanes) != nullptr; }

// Tensors of f32 on the CPU, (pictures, heads, tokens, width), where only the tokens of the queries may differ from the others'.
char *fused_attention(const Tensor *query, const Tensor *key, const Tensor *value, double scale, int64_t lanes, Tensor **output) noexcept {
  try {
    *output = new Tensor(Attention::apply(by_rows(*query), by_rows(*key), by_rows(*value), scale, lanes));
    return nullptr;
  } catch (const std::exception &error) {
    return message(error.what());
  } catch (...) {
    return message("an exception of an unknown kind");
  }
}

void fused_attention_free_error(char *error) {
  if (error != no_memory) free(error);
}

} // extern "C"
