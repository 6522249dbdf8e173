// SGD with momentum, the lasso's gradient inside, and the next step's norms (prunetrain_kernels/ops/sgd.py has the maths).
//
// One pass: parameter, gradient and momentum are read, parameter and momentum written, and the new weights measured while
// they are in registers, as in group_lasso.h.
#pragma once

#include "common.h"
#include "group_lasso.h"

namespace prunetrain {

// Of one parameter. Pointers are null where there is none of it.
struct SgdStep {
  void* param;
  void* grad;
  void* buffer;
  bool begins;          // the momentum buffer holds nothing yet
  double lr, momentum, undamped, decay, nesterov, sign;
  double pull;          // lambda
  double grad_scale;    // gradients are divided by it, in place; 1 leaves them alone
  const void* norms;    // before the step; null for no lasso
  const void* factors;  // column factors
  bool measure;
};

PRUNETRAIN_DECLARE(void, sgd_chunk, const Entry&, const Chunk&, const SgdStep&, int64_t dtype, const Partials&)

}  // namespace prunetrain

#ifdef PRUNETRAIN_KERNELS  // --------------------------------------------------------------------------------------------

namespace prunetrain {
namespace PRUNETRAIN_KERNELS {
namespace {

enum class Momentum { NONE, PLAIN, NESTEROV };

template <typename T>
struct Rates {
  Acc<T> lr, momentum, undamped, decay, sign, pull;
};

// A strip of columns of one row: [start, end).
template <typename T, Momentum MOMENTUM, bool LASSO, bool MEASURE>
inline void update(
    T* __restrict p, const T* __restrict g, T* __restrict b, const Acc<T>* __restrict by_column, Acc<T> by_row,
    int64_t start, int64_t end, const Rates<T>& rate, Columns<T>& columns, Acc<T>& row_sum, Acc<T>& row_maximum) {
  Acc<T> sum = 0;
  Bits<T> largest = 0;
  Acc<T>* __restrict sums = columns.sums;
  Bits<T>* __restrict maxima = columns.maxima;
#pragma omp simd reduction(+ : sum) reduction(max : largest)
  for (int64_t j = start; j < end; ++j) {
    const Acc<T> w = load(p + j);
    // Rounded as torch.optim.SGD rounds: the same bits.
    Acc<T> step = load(g + j) * rate.sign;
    if constexpr (LASSO) step += w * ((by_column[j] + by_row) * rate.pull);  // as a gradient that was added before
    step = multiply_add(w, rate.decay, step);
    if constexpr (MOMENTUM != Momentum::NONE) {
      const Acc<T> velocity = multiply_add(rate.undamped, step, rate.momentum * load(b + j));
      store(b + j, velocity);
      step = MOMENTUM == Momentum::NESTEROV ? multiply_add(rate.momentum, velocity, step) : velocity;
    }
    store(p + j, multiply_add(-rate.lr, step, w));
    if constexpr (MEASURE) {
      const Acc<T> value = load(p + j), square = value * value;
      const Bits<T> size = bit_cast<Bits<T>>(absolute(value));
      sum += square;
      largest = most(largest, size);
      sums[j] += square;
      maxima[j] = most(maxima[j], size);
    }
  }
  if constexpr (MEASURE) {
    row_sum += sum;
    row_maximum = bit_cast<Acc<T>>(most(bit_cast<Bits<T>>(row_maximum), largest));
  }
}

template <typename T, Momentum MOMENTUM, bool LASSO, bool MEASURE>
void update_chunk(const Entry& e, const Chunk& chunk, const SgdStep& step, const Partials& out) {
  using A = Acc<T>;
  const bool begins = MOMENTUM != Momentum::NONE && step.begins;
  const Rates<T> rate{static_cast<A>(step.lr),    static_cast<A>(step.momentum), begins ? 1 : static_cast<A>(step.undamped),
                      static_cast<A>(step.decay), static_cast<A>(step.sign),     static_cast<A>(step.pull)};
  const A grad_scale = static_cast<A>(step.grad_scale);
  const A* norms = LASSO ? typed<T>(step.norms, e.norms + e.channels) : nullptr;
  const A* factors = static_cast<const A*>(step.factors);
  A nothing = 0;
  A* row_sums = MEASURE ? typed<T>(out.row_sums, out.rows[chunk.tensor]) : nullptr;
  A* row_maxima = MEASURE ? typed<T>(out.row_maxima, out.rows[chunk.tensor]) : nullptr;
  Columns<T> columns;
  walk(
      e, chunk,
      [&](int64_t, int64_t width) {
        if (MEASURE) columns.clear(width);
      },
      [&](int64_t row, int64_t column0, int64_t width) {
        const int64_t at = row * e.columns + column0;
        width = least(width, e.numel - at);  // the last row of a tensor that is cut into rows may be short
        T* g = static_cast<T*>(step.grad) + at;
        T* b = static_cast<T*>(step.buffer) + (MOMENTUM == Momentum::NONE ? 0 : at);
        if (begins) __builtin_memset(static_cast<void*>(b), 0, static_cast<size_t>(width) * sizeof(T));
        if (grad_scale != 1)
          for (int64_t j = 0; j < width; ++j) store(g + j, load(g + j) / grad_scale);
        const int64_t strip = MEASURE ? STRIP : width;
        for (int64_t start = 0; start < width; start += strip)
          update<T, MOMENTUM, LASSO, MEASURE>(
              static_cast<T*>(step.param) + at, g, b, LASSO ? factors + column0 : nullptr,
              LASSO && (e.used & 2) ? 1 / norms[row] : 0, start, least(width, start + strip), rate, columns,
              MEASURE ? row_sums[row] : nothing, MEASURE ? row_maxima[row] : nothing);
      },
      [&](int64_t column0, int64_t width) {
        if (MEASURE)
          columns.fold(
              e, column0, width, typed<T>(out.channel_sums, chunk.slots), typed<T>(out.channel_maxima, chunk.slots));
      });
}

template <typename T, Momentum MOMENTUM>
void update_chunk(const Entry& e, const Chunk& chunk, const SgdStep& step, const Partials& out) {
  if (!step.measure) return update_chunk<T, MOMENTUM, false, false>(e, chunk, step, out);
  if (step.norms == nullptr) return update_chunk<T, MOMENTUM, false, true>(e, chunk, step, out);
  return update_chunk<T, MOMENTUM, true, true>(e, chunk, step, out);
}

}  // namespace

void sgd_chunk(const Entry& e, const Chunk& chunk, const SgdStep& step, int64_t dtype, const Partials& out) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    if (step.buffer == nullptr) return update_chunk<T, Momentum::NONE>(e, chunk, step, out);
    if (step.nesterov != 0) return update_chunk<T, Momentum::NESTEROV>(e, chunk, step, out);
    return update_chunk<T, Momentum::PLAIN>(e, chunk, step, out);
  });
}

}  // namespace PRUNETRAIN_KERNELS
}  // namespace prunetrain

#else  // -----------------------------------------------------------------------------------------------------------------

namespace prunetrain {

// Tables as ops/tables.py makes them: addresses of parameters, gradients, buffers (0: none), and of the learning rate of
// each group of hyperparameters; `hyper` (groups, 5): momentum, 1 - dampening, weight decay, nesterov, sign.
void sgd(
    const Tensor& tensors, const Tensor& params, const Tensor& grads, const Tensor& buffers, const Tensor& first,
    int64_t dtype, Tensor& norms, Tensor& max_abs, const Tensor& learning_rates, const Tensor& hyper,
    const std::optional<Tensor>& coefficient, const std::optional<Tensor>& grad_scale,
    const std::optional<Tensor>& found_inf, double eps) {
  if (number(found_inf, 0) != 0) return;
  const Table table(tensors);
  const int64_t *param = numbers(params), *grad = numbers(grads), *buffer = numbers(buffers);
  const int64_t* rates = numbers(learning_rates);
  const auto* begins = static_cast<const int32_t*>(first.data_ptr());
  const bool wide = dtype == FLOAT64;
  std::vector<double> settings(static_cast<size_t>(hyper.numel()));
  for (size_t i = 0; i < settings.size(); ++i)
    settings[i] = wide ? static_cast<const double*>(hyper.data_ptr())[i] : static_cast<const float*>(hyper.data_ptr())[i];
  const std::optional<Factors> factors =
      coefficient.has_value() ? std::make_optional<Factors>(table, dtype, norms.data_ptr()) : std::nullopt;
  Scratch scratch(table, dtype);
  std::vector<SgdStep> steps;
  for (int64_t t = 0; t < table.count; ++t) {
    const Entry& e = table.entries[t];
    const double* own = settings.data() + 5 * e.group;
    const void* rate = reinterpret_cast<const void*>(rates[e.group]);
    const bool pulled = e.used && coefficient.has_value();
    steps.push_back(
        {reinterpret_cast<void*>(param[t]), reinterpret_cast<void*>(grad[t]), reinterpret_cast<void*>(buffer[t]),
         begins[t] != 0, wide ? *static_cast<const double*>(rate) : *static_cast<const float*>(rate), own[0], own[1],
         own[2], own[3], own[4], number(coefficient, 0), number(grad_scale, 1), pulled ? norms.data_ptr() : nullptr,
         pulled ? factors->of(t) : nullptr, e.used != 0});
  }
  each(static_cast<int64_t>(table.chunks.size()), [&](int64_t i) {
    const Chunk& chunk = table.chunks[i];
    PRUNETRAIN_PICK(sgd_chunk)(table.entries[chunk.tensor], chunk, steps[chunk.tensor], dtype, scratch.partials);
  });
  scratch.fold(table, dtype, eps, norms.data_ptr(), max_abs.numel() ? max_abs.data_ptr() : nullptr);
}

}  // namespace prunetrain

STABLE_TORCH_LIBRARY_FRAGMENT(prunetrain_kernels_cpu, m) {
  m.def(
      "sgd(Tensor tensors, Tensor params, Tensor grads, Tensor buffers, Tensor first, int dtype, Tensor(a!) norms, "
      "Tensor(b!) max_abs, Tensor learning_rates, Tensor hyper, Tensor? coefficient, Tensor? grad_scale, "
      "Tensor? found_inf, float eps) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(prunetrain_kernels_cpu, CPU, m) { m.impl("sgd", TORCH_BOX(&prunetrain::sgd)); }

#endif
