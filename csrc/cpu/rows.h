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

// The compute type's own.
template <typename T>
constexpr Type kType = sizeof(T) == 8 ? Type::float64 : Type::float32;

// f(task, worker) for every task in [0, count), `size` of them at a time, on up to `threads`
// threads; their numbers, the workers, are below `threads`.
template <typename F>
void for_tasks(int64_t count, int64_t size, int64_t elements, int threads, F f) {
  const int64_t chunks = (count + size - 1) / size;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
  const auto work = [&] {
    const DefaultEnvironment environment;
    const int worker = workers.fetch_add(1, std::memory_order_relaxed);
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      for (int64_t task = chunk * size; task < std::min(count, (chunk + 1) * size); ++task)
        f(task, worker);
  };
  if (threads > 1 && chunks > 1)
    on_threads(threads, elements, std::ref(work));
  else
    work();
}

// f(row, team) for every row, on up to `threads` threads: on one each where there are enough rows.
// Of long rows those left over when every thread has had as many are done one by one, each by a
// team of all threads, unless that keeps fewer than half of them waiting.
template <typename F>
void for_rows(const Rows& x, int threads, F f) {
  const int64_t over = x.n > 2 * kPiece && threads > 1 ? x.rows % threads : 0;
  const int64_t shared = 2 * over <= threads ? over : 0, rows = x.rows - shared;
  for_tasks(rows, 1 + 4096 / x.n, rows * x.n, threads,
            [&](int64_t row, int) { f(row, static_cast<Team*>(nullptr)); });
  if (shared > 0)
    Team::run(threads, shared * x.n, [&](Team& team) {
      for (int64_t row = rows; row < x.rows; ++row) f(row, &team);
    });
}

}  // namespace softtopk::cpu
