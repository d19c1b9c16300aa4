// Decoding a sparse code on the CPU: every row's sum of weight rows, in the order of its entries.
#include <algorithm>
#include <vector>

#include "rows.h"

namespace softtopk::cpu {

void decode(const void* values, const int32_t* indices, const int32_t* counts, int64_t rows,
            int64_t max_active, const void* weight, Type type, int64_t, int64_t d, const void* bias,
            void* out, int threads) {
  with_compute_type(type, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> sums(std::max(threads, 1) * d);
    const Sweeps<T>& table = sweeps<T>(type);
    for_tasks(rows, 1, rows * max_active * d, threads, [&](int64_t i, int worker) {
      const int64_t first = i * max_active, count = std::min<int64_t>(counts[i], max_active);
      T* const sum = sums.data() + worker * d;
      std::fill_n(sum, d, T(0));
      table.accumulate(weight, d, indices + first, static_cast<const T*>(values) + first, count,
                       nullptr, sum, nullptr);
      table.write(sum, bias, d, static_cast<char*>(out) + i * d * element_size(type));
    });
  });
}

}  // namespace softtopk::cpu
