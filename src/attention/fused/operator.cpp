// The kernels as an operator of libtorch, which knows its gradients and shares out the work among libtorch's own threads.

#include "kernel.h"

#include <ATen/ATen.h>
#include <ATen/TracerMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <utility>
#include <vector>

namespace attention_distillation_fused {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const Kernel &kernel_of(int64_t lanes) {
  TORCH_CHECK(lanes == avx512.lanes || lanes == avx2.lanes, "attention: there is no kernel for vectors of ", lanes, " floats");
  return lanes == avx512.lanes ? avx512 : avx2;
}

// Heads of all pictures, (pictures, heads, tokens, width), of any strides but the width's.
struct Heads {
  // None, of which there are rows without data.
  Heads() : data(nullptr), heads(0), of_picture(0), of_head(0), of_token(0) {}
  explicit Heads(const Tensor &tensor)
      : data(tensor.data_ptr<float>()), heads(tensor.size(1)), of_picture(tensor.stride(0)), of_head(tensor.stride(1)), of_token(tensor.stride(2)) {}

  float *head(int64_t index) const { return data + index / heads * of_picture + index % heads * of_head; }
  Rows rows(int64_t index) const { return {data ? head(index) : nullptr, of_token}; }

  float *data;
  int64_t heads, of_picture, of_head, of_token;
};

// A token's numbers side by side, as they are: libtorch may have put off to change their sign.
Tensor by_rows(const Tensor &x) {
  const Tensor resolved = x.resolve_neg();
  return resolved.stride(3) == 1 ? resolved : resolved.contiguous();
}

// What the kernels compute in: itself, or of a half precision a copy.
Tensor in_f32(const Tensor &x) { return by_rows(x.to(at::kFloat)); }

// Whole vectors wide: itself, or a copy with zeros behind.
Tensor padded(const Tensor &x, int64_t width) { return x.size(3) == width ? x : at::constant_pad_nd(x, {0, width - x.size(3)}).contiguous(); }

// Laid out as networks do, with the heads of a token side by side, so that putting them together takes no copy.
Tensor like(const Tensor &x) {
  const int64_t pictures = x.size(0), heads = x.size(1), tokens = x.size(2), width = x.size(3);
  return at::empty_strided({pictures, heads, tokens, width}, {tokens * heads * width, width, heads * width, 1}, x.options().requires_grad(false));
}

Shape shape_of(const Kernel &kernel, const Tensor &query, const Tensor &key, double scale) {
  const int64_t width = query.size(3), lanes = kernel.lanes;
  return {query.size(2), key.size(2), width, (width + lanes - 1) / lanes * lanes, static_cast<float>(scale)};
}

// `work(index)` for each index below `count`, by libtorch's threads. (`at::parallel_for` is theirs only where OpenMP is compiled for.)
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
using Shares = std::vector<std::vector<Piece>>;

// All queries of all heads in `count` even shares, each of pieces in order. In which order a share adds up depends on their number
// alone, not on which is done first.
Shares shares_of(int64_t count, int64_t tile, int64_t heads, int64_t queries) {
  const int64_t tiles = (queries + tile - 1) / tile, all = heads * tiles;
  Shares shares(std::max<int64_t>(1, std::min(count, all)));
  count = shares.size();
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

Outcome attend(const Kernel &kernel, const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &bias, double scale, int64_t threads) {
  const Shape shape = shape_of(kernel, query, key, scale);
  const int64_t heads = query.size(0) * query.size(1);
  const Tensor keys = panels(kernel, shape, key), values = padded(value, shape.padded);
  Outcome outcome{like(query), at::empty({heads, shape.queries}, keys.options())};
  const Shares shares = shares_of(threads, kernel.tile, heads, shape.queries);
  const int64_t floats = kernel.scratch_floats(shape);
  const Tensor memory = at::empty({static_cast<int64_t>(shares.size()), floats}, keys.options());
  const Heads q(query), v(values), b = bias.defined() ? Heads(bias) : Heads(), o(outcome.output);
  const float *k = keys.data_ptr<float>();
  float *log_sums = outcome.log_sums.data_ptr<float>(), *scratch = memory.data_ptr<float>();
  each_in_parallel(shares.size(), [&](int64_t share) {
    for (const Piece &piece : shares[share]) {
      const Forward pass{q.rows(piece.head), k + piece.head * keys.size(1), v.rows(piece.head), b.rows(piece.head), o.head(piece.head),
                         o.of_token, log_sums + piece.head * shape.queries};
      kernel.forward(shape, pass, piece.span, scratch + share * floats);
    }
  });
  return outcome;
}

// Sums over the queries of a head that several shares have parts of: the first share's are where they belong, the others' beside
// it, to be added. Each share begins with zeros of its own making.
struct Sums {
  Sums(const Shares &shares, int64_t heads, int64_t rows, int64_t width, const at::TensorOptions &options) : total(at::empty({heads, rows, width}, options)) {
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
    beside = at::empty({further, rows, width}, options);
  }

  float *begin(int64_t share, size_t piece) const {
    const Place place = places[share][piece];
    const Tensor &in = place.first ? total : beside;
    float *to = in.data_ptr<float>() + place.index * in.stride(0);
    std::fill_n(to, in.stride(0), 0.f);
    return to;
  }

  // In the order of the shares, whoever does it.
  void add_up() {
    if (added.empty()) return;
    const int64_t rows = total.size(1), width = total.size(2);
    float *to = total.data_ptr<float>();
    const float *from = beside.data_ptr<float>();
    each_in_parallel(rows, [&](int64_t row) {
      for (size_t index = 0; index < added.size(); index++) {
        float *sum = to + (added[index] * rows + row) * width;
        const float *part = from + (index * rows + row) * width;
        for (int64_t at = 0; at < width; at++) sum[at] += part[at];
      }
    });
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

// By queries, keys and values, as far as they are wanted.
variable_list gradients(const Kernel &kernel, const variable_list &saved, const Tensor &of_output, double scale, int64_t threads, const bool (&wanted)[3]) {
  const Tensor &query = saved[0], &key = saved[1], &value = saved[2], &output = saved[3], &log_sums = saved[4];
  const Shape shape = shape_of(kernel, query, key, scale);
  const int64_t heads = query.size(0) * query.size(1), rows = kernel.key_rows(shape);
  const Tensor keys = panels(kernel, shape, key), values = panels(kernel, shape, value), key_rows = padded(key, shape.padded);
  const Shares shares = shares_of(threads, kernel.tile, heads, shape.queries), none;
  const int64_t floats = kernel.scratch_floats(shape);
  const Tensor memory = at::empty({static_cast<int64_t>(shares.size()), floats}, keys.options());
  const Tensor of_query = wanted[0] ? like(query) : Tensor();
  Sums of_key(wanted[1] ? shares : none, wanted[1] ? heads : 0, rows, shape.padded, keys.options());
  Sums of_value(wanted[2] ? shares : none, wanted[2] ? heads : 0, rows, shape.padded, keys.options());
  // Without a gradient by queries the last is not looked at.
  const Heads q(query), o(output), g(of_output), k(key_rows), dq(wanted[0] ? of_query : query);
  const float *k_panels = keys.data_ptr<float>(), *v_panels = values.data_ptr<float>(), *sums = log_sums.data_ptr<float>();
  float *scratch = memory.data_ptr<float>();
  each_in_parallel(shares.size(), [&](int64_t share) {
    for (size_t index = 0; index < shares[share].size(); index++) {
      const Piece &piece = shares[share][index];
      const int64_t head = piece.head;
      const Backward pass{q.rows(head), o.rows(head), g.rows(head), sums + head * shape.queries, k_panels + head * keys.size(1),
                          v_panels + head * values.size(1), k.rows(head), wanted[0] ? dq.head(head) : nullptr, dq.of_token,
                          wanted[1] ? of_key.begin(share, index) : nullptr, wanted[2] ? of_value.begin(share, index) : nullptr};
      kernel.backward(shape, pass, piece.span, scratch + share * floats);
    }
  });
  of_key.add_up();
  of_value.add_up();
  return {of_query, wanted[1] ? of_key.gradient(key) : Tensor(), wanted[2] ? of_value.gradient(value) : Tensor()};
}

// A gradient that has none itself, and says so to who asks.
struct Last : torch::autograd::Function<Last> {
  static Tensor forward(AutogradContext *, const Tensor &gradient, const Tensor &, const Tensor &, const Tensor &, const Tensor &) { return gradient.clone(); }

  static variable_list backward(AutogradContext *, variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "attention: its gradients have no gradients, as libtorch's fused kernels' have none; where they are wanted, have a hook compute it by matmul and softmax");
  }
};

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext *context, const Tensor &query, const Tensor &key, const Tensor &value, double scale, int64_t lanes, int64_t threads) {
    auto [exact, log_sums] = attend(kernel_of(lanes), in_f32(query), in_f32(key), in_f32(value), {}, scale, threads);
    // Half precisions are kept as such: copies would take twice the memory for as long as the graph is there.
    const Tensor output = exact.to(query.scalar_type());
    context->save_for_backward({query, key, value, output, log_sums});
    context->saved_data["scale"] = scale;
    context->saved_data["lanes"] = lanes;
    context->saved_data["threads"] = threads;
    return output;
  }

  static variable_list backward(AutogradContext *context, variable_list of_outputs) {
    auto &data = context->saved_data;
    const variable_list saved = context->get_saved_variables();
    const bool wanted[3] = {context->needs_input_grad(0), context->needs_input_grad(1), context->needs_input_grad(2)};
    variable_list found;
    {
      at::NoGradGuard no_graph;
      const at::ScalarType kind = saved[0].scalar_type();
      const variable_list exact = {in_f32(saved[0]), in_f32(saved[1]), in_f32(saved[2]), in_f32(saved[3]), saved[4]};
      found = gradients(kernel_of(data["lanes"].toInt()), exact, in_f32(of_outputs[0]), data["scale"].toDouble(), data["threads"].toInt(), wanted);
      for (Tensor &gradient : found) {
        if (gradient.defined()) gradient = gradient.to(kind);
      }
    }
    for (Tensor &gradient : found) {
      if (gradient.defined() && at::GradMode::is_enabled()) gradient = Last::apply(gradient, saved[0], saved[1], saved[2], of_outputs[0]);
    }
    found.resize(6); // Numbers have none.
    return found;
  }
};

// What kernels that know only addresses rely on.
void check(const Tensor &query, const Tensor &key, const Tensor &value) {
  const at::ScalarType kind = query.scalar_type();
  const bool known = kind == at::kFloat || kind == at::kBFloat16 || kind == at::kHalf;
  for (const Tensor *x : {&query, &key, &value}) {
    TORCH_CHECK(known && x->dim() == 4 && x->layout() == at::kStrided && x->device().is_cpu() && x->scalar_type() == kind, "attention: all f32, all bf16 or all f16, of four dimensions on the CPU, not ", x->toString(), x->sizes());
    TORCH_CHECK(x->numel() > 0 && x->size(0) == query.size(0) && x->size(1) == query.size(1) && x->size(3) == query.size(3), "attention: queries of ", query.sizes(), " for keys or values of ", x->sizes());
  }
  TORCH_CHECK(key.size(2) == value.size(2), "attention: ", key.size(2), " keys for ", value.size(2), " values");
}

// With a bias there are no gradients: the method needs none.
Tensor attend_with_bias(const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &bias, double scale, int64_t lanes, int64_t threads) {
  TORCH_CHECK(query.scalar_type() == at::kFloat, "attention: with a bias in f32, not ", query.toString());
  const int64_t of_scores[] = {query.size(0), query.size(1), query.size(2), key.size(2)};
  bool fits = bias.dim() == 4 && bias.layout() == at::kStrided && bias.device().is_cpu() && bias.scalar_type() == at::kFloat && bias.size(3) == of_scores[3];
  for (int64_t side = 0; fits && side < 3; side++) fits = bias.size(side) == of_scores[side] || bias.size(side) == 1;
  TORCH_CHECK(fits, "attention: a bias of f32 on the CPU, of a number for each score, not ", bias.toString(), bias.sizes());
  bool followed = false;
  for (const Tensor *x : {&query, &key, &value, &bias}) followed = followed || x->requires_grad();
  TORCH_CHECK(!(followed && at::GradMode::is_enabled()), "attention: no gradients with a bias");
  return attend(kernel_of(lanes), by_rows(query), by_rows(key), by_rows(value), by_rows(bias).expand(of_scores), scale, threads).output;
}

char no_memory[] = "not enough memory for an error's message";

char *message(const char *text) noexcept {
  char *copy = strdup(text);
  return copy ? copy : no_memory;
}

} // namespace
} // namespace attention_distillation_fused

extern "C" {

// Tensors on the CPU, of f32 or, without a bias, a half precision, (pictures, heads, tokens, width), where only the tokens of the queries
// may differ from the others'; the processor must have what vectors of so many lanes want. A bias on the scores or null: 1 or as many
// pictures, heads and queries as the scores are of, all keys; without gradients. Null, or what went wrong, to be freed by the other function.
char *attention_distillation_attend(const at::Tensor *query, const at::Tensor *key, const at::Tensor *value, const at::Tensor *bias, double scale,
                                    int64_t lanes, int64_t threads, at::Tensor **output) noexcept {
  using namespace attention_distillation_fused;
  try {
    check(*query, *key, *value);
    Tensor attended;
    if (at::tracer::impl::is_dispatch_enabled()) {
      // A module that is being traced would remember nothing of kernels.
      attended = at::scaled_dot_product_attention(*query, *key, *value, bias ? std::optional<Tensor>(*bias) : std::nullopt, 0.0, false, scale);
    } else if (bias) {
      attended = attend_with_bias(*query, *key, *value, *bias, scale, lanes, threads);
    } else {
      attended = Attention::apply(by_rows(*query), by_rows(*key), by_rows(*value), scale, lanes, threads);
    }
    *output = new Tensor(std::move(attended));
    return nullptr;
  } catch (const std::exception &error) {
    return message(error.what());
  } catch (...) {
    return message("an exception of an unknown kind");
  }
}

// Whether who computes now may come for gradients.
bool attention_distillation_keeps_graphs() noexcept { return at::GradMode::is_enabled(); }

void attention_distillation_free_error(char *error) {
  if (error != attention_distillation_fused::no_memory) free(error);
}

} // extern "C"
