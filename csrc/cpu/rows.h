// What the launchers of this folder share: per-row arguments, types, and the loop over rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

#include "pieces.h"
#include "threads.h"

namespace softtopk::cpu {

inline double value_at(const PerRow& argument, int64_t row) {
  if (argument.data == nullptr) return argument.number;
  const int64_t i = row * argument.stride;
  return argument.type == Type::float64 ? static_cast<const double*>(argument.data)[i]
                                        : static_cast<const float*>(argument.data)[i];
}

inline Row row_at(const Rows& x, int64_t row) {
  const char* data = static_cast<const char*>(x.data);
  return {data + row * x.stride * element_size(x.type), x.n, !x.largest};
}

// Where row `row` of a contiguous (rows, n) output of x's type starts.
inline void* output_at(const Rows& x, void* data, int64_t row) {
  return static_cast<char*>(data) + row * x.n * element_size(x.type);
}

// Calls f with a zero of the compute type.
template <typename F>
void with_compute_type(Type type, F f) {
  if (type == Type::float64)
    f(double{});
  else
    f(float{});
}

// f(row, team) for every row, on up to `threads` threads: on one each where there are enough rows.
// Of long rows those left over when every thread has had as many are done one by one, each by a
// team of all threads, unless that keeps fewer than half of them waiting.
template <typename F>
void for_rows(const Rows& x, int threads, F f) {
  const int64_t over = x.n > 2 * kPiece && threads > 1 ? x.rows % threads : 0;
  const int64_t shared = 2 * over <= threads ? over : 0, rows = x.rows - shared;
  const int64_t size = 1 + 4096 / x.n, chunks = (rows + size - 1) / size;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    const DefaultEnvironment environment;
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      for (int64_t row = chunk * size; row < std::min(rows, (chunk + 1) * size); ++row)
        f(row, nullptr);
  };
  if (threads > 1 && chunks > 1)
    on_threads(threads, rows * x.n, std::ref(work));
  else
    work();
  if (shared > 0)
    Team::run(threads, shared * x.n, [&](Team& team) {
      for (int64_t row = rows; row < x.rows; ++row) f(row, &team);
    });
}

}  // namespace softtopk::cpu
