// Group lasso over channel slices: norms, largest |w| and gradient (prunetrain_kernels/ops/group_lasso.py has the maths).
//
// One pass over the weights sums squares by row (output channels) and by column; at the end of a chunk the columns are
// folded into input channels, so that a chunk leaves `channels` numbers and nothing has to be added atomically. A second,
// small pass folds the chunks in order: the same bits for any number of threads.
#pragma once

#include "common.h"

namespace prunetrain {

// Where partial results go: sums and largest values, as fp32 (fp64 of fp64). Those of a chunk's input channels from its
// `slots` on; those of a tensor's rows at `rows + row`, rows[tensor] being where they begin.
struct Partials {
  void* channel_sums;
  void* channel_maxima;
  void* row_sums;
  void* row_maxima;
  const int64_t* rows;
};

PRUNETRAIN_DECLARE(void, measure_chunk, const Entry&, const Chunk&, const void* weight, int64_t dtype, const Partials&)
PRUNETRAIN_DECLARE(
    void, fold_tensor, const Entry&, int64_t tensor, const Chunk* first, int64_t chunks, int64_t dtype,
    const Partials&, double eps, void* norms, void* max_abs)
// factors[j] = 1 / n_in of column j's channel; all 0 if the input groups are not used
PRUNETRAIN_DECLARE(void, column_factors, const Entry&, int64_t dtype, const void* norms, void* factors)
PRUNETRAIN_DECLARE(
    void, gradient_chunk, const Entry&, const Chunk&, const void* weight, void* gradient, int64_t dtype,
    const void* norms, const void* factors, double scale, bool add)

}  // namespace prunetrain

#ifdef PRUNETRAIN_KERNELS  // --------------------------------------------------------------------------------------------

namespace prunetrain {
namespace PRUNETRAIN_KERNELS {
namespace {

constexpr int64_t BLOCK = 8192;  // columns at a time, so that their sums stay in the cache; most layers have fewer

constexpr int64_t STRIP = 64;  // columns whose squares are summed before they join a row's sum, which keeps it exact

// Squares and largest sizes of a block of columns, of the rows that went by.
template <typename T>
struct Columns {
  Acc<T> sums[BLOCK];
  Bits<T> maxima[BLOCK];

  void clear(int64_t width) {
    for (int64_t j = 0; j < width; ++j) sums[j] = 0, maxima[j] = 0;
  }

  // Adds the columns [column0, column0 + width) to their input channels, [0, channels).
  void fold(const Entry& e, int64_t column0, int64_t width, Acc<T>* channel_sums, Acc<T>* channel_maxima) const {
    int64_t channel = (column0 / e.inner) % e.channels, left = e.inner - column0 % e.inner;
    for (int64_t j = 0; j < width;) {
      const int64_t end = least(width, j + left);
      for (; j < end; ++j) {
        channel_sums[channel] += sums[j];
        const Bits<T> before = bit_cast<Bits<T>>(channel_maxima[channel]);
        channel_maxima[channel] = bit_cast<Acc<T>>(most(before, maxima[j]));
      }
      left = e.inner;
      if (++channel == e.channels) channel = 0;
    }
  }
};

// f(row, column0, width): all rows of a chunk, a block of columns after the other; `begin` and `end` enclose a block.
template <typename Begin, typename Row, typename End>
inline void walk(const Entry& e, const Chunk& chunk, const Begin& begin, const Row& row, const End& end) {
  for (int64_t column0 = 0; column0 < e.columns; column0 += BLOCK) {
    const int64_t width = least(BLOCK, e.columns - column0);
    begin(column0, width);
    for (int64_t r = chunk.row0; r < chunk.row0 + chunk.rows; ++r) row(r, column0, width);
    end(column0, width);
  }
}

template <typename T>
inline Acc<T>* typed(void* base, int64_t offset = 0) {
  return static_cast<Acc<T>*>(base) + offset;
}
template <typename T>
inline const Acc<T>* typed(const void* base, int64_t offset = 0) {
  return static_cast<const Acc<T>*>(base) + offset;
}

}  // namespace

void measure_chunk(const Entry& e, const Chunk& chunk, const void* weight, int64_t dtype, const Partials& out) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const T* w = static_cast<const T*>(weight);
    Acc<T>* row_sums = typed<T>(out.row_sums, out.rows[chunk.tensor]);
    Acc<T>* row_maxima = typed<T>(out.row_maxima, out.rows[chunk.tensor]);
    Columns<T> columns;
    walk(
        e, chunk, [&](int64_t, int64_t width) { columns.clear(width); },
        [&](int64_t row, int64_t column0, int64_t width) {
          const T* at = w + row * e.columns + column0;
          Bits<T> largest = bit_cast<Bits<T>>(row_maxima[row]);
          for (int64_t strip = 0; strip < width; strip += STRIP) {
            const int64_t end = least(width, strip + STRIP);
            Acc<T> sum = 0;
#pragma omp simd reduction(+ : sum) reduction(max : largest)
            for (int64_t j = strip; j < end; ++j) {
              const Acc<T> value = load(at + j), square = value * value;
              const Bits<T> size = bit_cast<Bits<T>>(absolute(value));
              sum += square;
              largest = most(largest, size);
              columns.sums[j] += square;
              columns.maxima[j] = most(columns.maxima[j], size);
            }
            row_sums[row] += sum;
          }
          row_maxima[row] = bit_cast<Acc<T>>(largest);
        },
        [&](int64_t column0, int64_t width) {
          columns.fold(
              e, column0, width, typed<T>(out.channel_sums, chunk.slots), typed<T>(out.channel_maxima, chunk.slots));
        });
  });
}

void fold_tensor(
    const Entry& e, int64_t tensor, const Chunk* first, int64_t chunks, int64_t dtype, const Partials& out, double eps,
    void* norms, void* max_abs) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    Acc<T>* sums = typed<T>(out.channel_sums, first->slots);
    Acc<T>* maxima = typed<T>(out.channel_maxima, first->slots);
    for (int64_t i = 1; i < chunks; ++i) {
      for (int64_t c = 0; c < e.channels; ++c) {
        sums[c] += sums[i * e.channels + c];
        const Bits<T> size = bit_cast<Bits<T>>(maxima[i * e.channels + c]);
        maxima[c] = bit_cast<Acc<T>>(most(bit_cast<Bits<T>>(maxima[c]), size));
      }
    }
    const Acc<T>* row_sums = typed<T>(out.row_sums, out.rows[tensor]);
    const Acc<T>* row_maxima = typed<T>(out.row_maxima, out.rows[tensor]);
    Acc<T>* to = typed<T>(norms, e.norms);
    for (int64_t c = 0; c < e.channels; ++c) to[c] = square_root(sums[c] + static_cast<Acc<T>>(eps));
    for (int64_t r = 0; r < e.rows; ++r) to[e.channels + r] = square_root(row_sums[r] + static_cast<Acc<T>>(eps));
    if (max_abs == nullptr) return;
    to = typed<T>(max_abs, e.norms);
    for (int64_t c = 0; c < e.channels; ++c) to[c] = maxima[c];
    for (int64_t r = 0; r < e.rows; ++r) to[e.channels + r] = row_maxima[r];
  });
}

void column_factors(const Entry& e, int64_t dtype, const void* norms, void* factors) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    Acc<T>* to = static_cast<Acc<T>*>(factors);
    const Acc<T>* n = typed<T>(norms, e.norms);
    int64_t channel = 0;
    for (int64_t j = 0; j < e.columns;) {
      const Acc<T> factor = e.used & 1 ? 1 / n[channel] : 0;
      for (const int64_t end = j + e.inner; j < end; ++j) to[j] = factor;
      if (++channel == e.channels) channel = 0;
    }
  });
}

void gradient_chunk(
    const Entry& e, const Chunk& chunk, const void* weight, void* gradient, int64_t dtype, const void* norms,
    const void* factors, double scale, bool add) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const T* w = static_cast<const T*>(weight) + chunk.row0 * e.columns;
    T* g = static_cast<T*>(gradient) + chunk.row0 * e.columns;
    const Acc<T>* by_column = static_cast<const Acc<T>*>(factors);
    const Acc<T>* n = typed<T>(norms, e.norms + e.channels + chunk.row0);
    const Acc<T> strength = static_cast<Acc<T>>(scale);
    for (int64_t r = 0; r < chunk.rows; ++r, w += e.columns, g += e.columns) {
      const Acc<T> by_row = e.used & 2 ? 1 / n[r] : 0;
      if (add) {
#pragma omp simd
        for (int64_t j = 0; j < e.columns; ++j)
          store(g + j, load(w + j) * ((by_column[j] + by_row) * strength) + load(g + j));
      } else {
#pragma omp simd
        for (int64_t j = 0; j < e.columns; ++j) store(g + j, load(w + j) * ((by_column[j] + by_row) * strength));
      }
    }
  });
}

}  // namespace PRUNETRAIN_KERNELS
}  // namespace prunetrain

#else  // -----------------------------------------------------------------------------------------------------------------

namespace prunetrain {

// Memory for the partial results of a table, set to zero.
class Scratch {
 public:
  Scratch(const Table& table, int64_t dtype) : wide_(dtype == FLOAT64) {
    int64_t rows = 0;
    for (int64_t t = 0; t < table.count; ++t) {
      rows_.push_back(rows);
      rows += table.entries[t].used ? table.entries[t].rows : 0;
    }
    const size_t size = wide_ ? sizeof(double) : sizeof(float);
    memory_.assign(2 * static_cast<size_t>(table.slots + rows) * size / sizeof(float), 0.0f);
    char* at = reinterpret_cast<char*>(memory_.data());
    void** parts[] = {&partials.channel_sums, &partials.channel_maxima, &partials.row_sums, &partials.row_maxima};
    const int64_t counts[] = {table.slots, table.slots, rows, rows};
    for (int i = 0; i < 4; at += static_cast<size_t>(counts[i]) * size, ++i) *parts[i] = at;
    partials.rows = rows_.data();
  }

  void fold(const Table& table, int64_t dtype, double eps, void* norms, void* max_abs) {
    each(table.count, [&](int64_t t) {
      const int64_t first = table.first_chunk[t], chunks = table.first_chunk[t + 1] - first;
      if (!table.entries[t].used) return;
      // Of a weight without rows there are norms of its input channels, sqrt(eps), and no chunk.
      Chunk none{t, 0, 0, 0};
      Partials nothing = partials;
      std::vector<double> zeros;
      if (chunks == 0) {
        zeros.assign(static_cast<size_t>(table.entries[t].channels), 0.0);
        nothing.channel_sums = nothing.channel_maxima = zeros.data();
      }
      PRUNETRAIN_PICK(fold_tensor)(
          table.entries[t], t, chunks ? &table.chunks[first] : &none, chunks, dtype, chunks ? partials : nothing, eps,
          norms, max_abs);
    });
  }

  Partials partials{};

 private:
  bool wide_;
  std::vector<float> memory_;
  std::vector<int64_t> rows_;
};

// The column factors of all weights of a table with a lasso, one after the other.
class Factors {
 public:
  Factors(const Table& table, int64_t dtype, const void* norms) {
    const int64_t size = dtype == FLOAT64 ? 2 : 1;
    int64_t total = 0;
    for (int64_t t = 0; t < table.count; ++t) {
      at_.push_back(total);
      total += table.entries[t].used ? table.entries[t].columns * size : 0;
    }
    memory_.resize(static_cast<size_t>(total));
    for (int64_t t = 0; t < table.count; ++t)
      if (table.entries[t].used) PRUNETRAIN_PICK(column_factors)(table.entries[t], dtype, norms, memory_.data() + at_[t]);
  }

  const void* of(int64_t tensor) const { return memory_.data() + at_[tensor]; }

 private:
  std::vector<float> memory_;
  std::vector<int64_t> at_;
};

// norms = sqrt(sum of squares + eps) and, if it has elements, max_abs of all slices of all weights of a table.
void slice_statistics(
    const Tensor& tensors, const Tensor& weights, int64_t dtype, Tensor& norms, Tensor& max_abs, double eps) {
  const Table table(tensors);
  const int64_t* address = numbers(weights);
  Scratch scratch(table, dtype);
  each(static_cast<int64_t>(table.chunks.size()), [&](int64_t i) {
    const Chunk& chunk = table.chunks[i];
    PRUNETRAIN_PICK(measure_chunk)(
        table.entries[chunk.tensor], chunk, reinterpret_cast<const void*>(address[chunk.tensor]), dtype,
        scratch.partials);
  });
  scratch.fold(table, dtype, eps, norms.data_ptr(), max_abs.numel() ? max_abs.data_ptr() : nullptr);
}

// gradients (+)= scale * dR/dW
void group_lasso_gradient(
    const Tensor& tensors, const Tensor& weights, const Tensor& gradients, int64_t dtype, const Tensor& norms,
    const Tensor& scale, bool add) {
  const Table table(tensors);
  const int64_t *weight = numbers(weights), *gradient = numbers(gradients);
  const Factors factors(table, dtype, norms.data_ptr());
  const double strength = number(scale, 1);
  each(static_cast<int64_t>(table.chunks.size()), [&](int64_t i) {
    const Chunk& chunk = table.chunks[i];
    PRUNETRAIN_PICK(gradient_chunk)(
        table.entries[chunk.tensor], chunk, reinterpret_cast<const void*>(weight[chunk.tensor]),
        reinterpret_cast<void*>(gradient[chunk.tensor]), dtype, norms.data_ptr(), factors.of(chunk.tensor), strength, add);
  });
}

}  // namespace prunetrain

STABLE_TORCH_LIBRARY_FRAGMENT(prunetrain_kernels_cpu, m) {
  m.def("slice_statistics(Tensor tensors, Tensor weights, int dtype, Tensor(a!) norms, Tensor(b!) max_abs, float eps) -> ()");
  m.def(
      "group_lasso_gradient(Tensor tensors, Tensor weights, Tensor gradients, int dtype, Tensor norms, Tensor scale, "
      "bool add) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(prunetrain_kernels_cpu, CPU, m) {
  m.impl("slice_statistics", TORCH_BOX(&prunetrain::slice_statistics));
  m.impl("group_lasso_gradient", TORCH_BOX(&prunetrain::group_lasso_gradient));
}

#endif
