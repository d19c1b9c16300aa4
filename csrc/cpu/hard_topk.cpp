// Hard top-k on the CPU: the K largest elements of a row, lowest index first among equals. Where
// they end is found by cut.h; then one sweep writes the mask or the indices.
#include <algorithm>
#include <limits>

#include "cut.h"
#include "rows.h"

namespace softtopk::cpu {
namespace {

template <typename F>
void for_cuts(const Rows& x, const PerRow& k, int64_t max_k, int threads, F f) {
  with_compute_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    for_rows(x, threads, [&](int64_t row, Team* team) {
      const RowSweeps<T> row_sweeps(x.type, team);
      const Row elements = row_at(x, row);
      f(row_sweeps, elements, row, cut(row_sweeps, elements, value_at(k, row), max_k));
    });
  });
}

// The elements of a row at `count` indices, then 0 up to max_k.
template <typename Bits>
void copy_values(const void* row, const int64_t* indices, int64_t count, int64_t max_k, void* out) {
  const Bits* const from = static_cast<const Bits*>(row);
  Bits* const to = static_cast<Bits*>(out);
  for (int64_t i = 0; i < count; ++i) to[i] = from[indices[i]];
  std::fill(to + count, to + max_k, Bits{0});
}

}  // namespace

void hard_topk_mask(const Rows& x, const PerRow& k, void* mask, int threads) {
  for_cuts(x, k, x.n, threads, [&](const auto& sweeps, const Row& elements, int64_t row, auto cut) {
    void* out = output_at(x, mask, row);
    if (cut.nan)
      sweeps.fill(elements, std::numeric_limits<decltype(cut.value)>::quiet_NaN(), out);
    else
      sweeps.mask(elements, cut.value, cut.ties, out);
  });
}

void hard_topk_indices(const Rows& x, const PerRow& k, int64_t max_k, int64_t* indices,
                       void* values, int64_t* counts, int threads) {
  const int64_t size = element_size(x.type);
  const auto copy = size == 8   ? copy_values<uint64_t>
                    : size == 4 ? copy_values<uint32_t>
                                : copy_values<uint16_t>;
  for_cuts(
      x, k, max_k, threads, [&](const auto& sweeps, const Row& elements, int64_t row, auto cut) {
        int64_t* const out = indices + row * max_k;
        if (cut.count > 0) sweeps.indices(elements, cut.value, cut.ties, out);
        std::fill(out + cut.count, out + max_k, int64_t{-1});
        counts[row] = cut.count;
        if (values == nullptr) return;
        copy(elements.data, out, cut.count, max_k, static_cast<char*>(values) + row * max_k * size);
      });
}

}  // namespace softtopk::cpu
