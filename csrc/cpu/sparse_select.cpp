// Sparse codes on the CPU: selection and its backward; softtopk/backends/reference_sparse.py has
// the mathematics.
//
// A row's activations are written once, to memory of the thread's own, and solved as any row is
// (search.h, cut.h). What a code keeps is then what lies above one value, with the first of those
// equal to it: a sweep copies it and weighs the rest. The backward is that of a row of the entries
// alone, to which the weight of the rest is added.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../laplace.h"
#include "cut.h"
#include "pivot.h"
#include "rows.h"
#include "search.h"

namespace softtopk::cpu {
namespace {

// An entry is kept where p or q is at least this.
constexpr double kLeastShare = 0x1p-24;
constexpr double kLn2 = 0.69314718055994531;

// The entries of one row.
template <typename T>
struct Entries {
  T *values, *active, *state;  // state is null for a hard selection
  int32_t *indices, *count;
};

template <typename T>
Entries<T> entries_at(const Code& code, int64_t row) {
  const int64_t first = row * code.max_active;
  return {static_cast<T*>(code.values) + first, static_cast<T*>(code.active) + first,
          code.state == nullptr ? nullptr : static_cast<T*>(code.state) + 7 * row,
          code.indices + first, code.counts + row};
}

// What is kept of a row: above `value`, and the first `ties` equal to it.
template <typename T>
struct Limit {
  T value;
  int64_t ties;
};

// All entries with p or q at least kLeastShare: above the threshold p >= 1/2, below it p = h_B e
// and q = q_B e, e = exp((x - r_B) / alpha).
template <typename T>
Limit<T> soft_limit(const Solution<double>& s, const Densities<double>& d, double alpha) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  const double share = std::max(d.h_B, d.q_B);
  const double exact = share > 0 ? s.r_B - alpha * std::log(share / kLeastShare) : s.r_A;
  T least = static_cast<T>(std::min(exact, s.r_A));
  if (least < std::min(exact, s.r_A)) least = std::nextafter(least, inf);
  return {std::max(std::nextafter(least, -inf), T(0)), 0};
}

// The hard mask where it is not 0: activations are positive or 0.
template <typename T>
Limit<T> hard_limit(const Cut<T>& cut) {
  return cut.value > 0 ? Limit<T>{cut.value, cut.ties} : Limit<T>{T(0), 0};
}

template <typename T>
void bad_row(const Entries<T>& out, int64_t n, int64_t max_active) {
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  std::fill_n(out.indices, max_active, static_cast<int32_t>(n));
  std::fill_n(out.values, max_active, T(0));
  std::fill_n(out.active, max_active, T(0));
  out.indices[0] = 0, out.values[0] = out.active[0] = nan, *out.count = 1;
  if (out.state != nullptr) std::fill_n(out.state, 7, nan);
}

// Writes the row's indices, activations and count; returns how many of them there are, and what the
// others weigh.
template <typename T>
struct Stored {
  int64_t count;
  Kept kept;
};

template <typename T>
Stored<T> store_entries(const Sweeps<T>& table, const Row& row, const Limit<T>& limit,
                        const Scale<T>& scale, const Pivot<T>* pivot, int64_t max_active,
                        const Entries<T>& out) {
  const Kept kept =
      table.keep(row, limit.value, limit.ties, scale, pivot, max_active, out.indices, out.active);
  const int64_t stored = std::min(kept.count, max_active), unused = max_active - stored;
  *out.count = static_cast<int32_t>(kept.count);
  std::fill_n(out.indices + stored, unused, static_cast<int32_t>(row.n));
  std::fill_n(out.active + stored, unused, T(0));
  std::fill_n(out.values + stored, unused, T(0));
  return {stored, kept};
}

template <typename T>
void hard_row(const Sweeps<T>& table, const Row& row, double k, int64_t max_active,
              const Entries<T>& out) {
  const Cut<T> cut = softtopk::cpu::cut(RowSweeps<T>(kType<T>, nullptr), row, k, row.n);
  if (cut.nan) return bad_row(out, row.n, max_active);
  const auto [count, kept] =
      store_entries<T>(table, row, hard_limit(cut), {}, nullptr, max_active, out);
  std::copy_n(out.active, count, out.values);
}

template <typename T>
void soft_row(const Sweeps<T>& table, const Row& row, double k, T alpha, bool straight_through,
              int64_t max_active, const Entries<T>& out) {
  const RowSweeps<T> row_sweeps(kType<T>, nullptr);
  const Solution<double> s = solve<T>(row_sweeps, row_sweeps, row, k, alpha);
  if (std::isnan(s.D)) return bad_row(out, row.n, max_active);
  const Densities<double> d = densities(s, static_cast<double>(alpha));
  const Scale<T> scale = scale_of(static_cast<T>(s.r_A), static_cast<T>(s.r_B), alpha);
  Pivot<T> pivot = pivot_of(s, d, alpha);
  pivot.x = static_cast<T>(std::isinf(s.r_B) ? s.r_A : s.r_B);

  Limit<T> limit = soft_limit<T>(s, d, static_cast<double>(alpha)), hard{};
  if (straight_through) {
    hard = hard_limit(cut(row_sweeps, row, k, row.n));
    // Every element equal to the larger limit is above the smaller one.
    if (hard.value <= limit.value) limit = hard;
  }
  const auto [count, kept] = store_entries(table, row, limit, scale, &pivot, max_active, out);
  if (straight_through) {
    for (int64_t j = 0; j < count; ++j) {
      const T a = out.active[j];
      out.values[j] = a > hard.value || (a == hard.value && hard.ties-- > 0) ? a : T(0);
    }
  } else {
    table.probabilities({out.active, count, false}, scale, static_cast<T>(d.h_A),
                        static_cast<T>(d.h_B), out.values);
    for (int64_t j = 0; j < count; ++j)
      out.values[j] =
          out.values[j] < static_cast<T>(kLeastShare) ? T(0) : out.values[j] * out.active[j];
  }
  const double state[] = {s.r_A, s.r_B, s.P, s.Q, s.D, kept.q, kept.t * kLn2};
  std::transform(state, state + 7, out.state, [](double x) { return static_cast<T>(x); });
}

// To grad_x (count,), which holds v = g a when this is called, s (v - <q, v>) for the entries, and
// the gradients to k and alpha. For the rest of the row v = 0.
template <typename T>
void selection_gradients(const Row& row, const T* state, T alpha, T* grad_x, T* grad_k,
                         T* grad_alpha) {
  const RowSweeps<T> sweeps(kType<T>, nullptr);
  const Row v{grad_x, row.n, false};
  const Solution<double> s{state[0], state[1], state[2], state[3], state[4]};
  const double scale = alpha;
  const Densities<double> d = densities(s, scale);
  Pivot<T> pivot = pivot_of(s, d, alpha);
  const int64_t place = sweeps.find(row, pivot.x);
  if (place >= 0) pivot.v = grad_x[place];

  const double rest = state[5], origin = std::isinf(s.r_B) ? s.r_A : s.r_B;
  const double moved = (origin - static_cast<double>(pivot.x)) / scale;
  const double rest_t = rest == 0 ? 0 : (state[6] + rest * moved) / kLn2;
  const Scale<T> factors = scale_of(state[0], state[1], alpha);
  Means means = sweeps.means(row, v, factors, pivot);
  means.v -= rest * static_cast<double>(pivot.v), means.t += rest_t;
  const double mean_v = pivot.v + means.v;
  const double covariance =
      sweeps.gradient(row, v, factors, pivot, means, grad_x) - (rest_t - rest * means.t) * mean_v;
  *grad_k = static_cast<T>(mean_v);
  *grad_alpha = d.R == 0 ? T(0) : static_cast<T>(-d.R / scale * covariance * kLn2);
}

// grad += g p, `part` times the grad that is there; or g where the value is not 0.
template <typename T>
void add_gates(const Row& row, const T* values, const T* state, T alpha, const T* g, T part,
               T* grad) {
  const Sweeps<T>& table = sweeps<T>(kType<T>);
  const Scale<T> scale = scale_of(state[0], state[1], alpha);
  const Densities<double> d =
      densities<double>({state[0], state[1], state[2], state[3], state[4]}, alpha);
  constexpr int64_t size = 256;
  for (int64_t first = 0; first < row.n; first += size) {
    const int64_t count = std::min(size, row.n - first);
    T gates[size];
    if (values == nullptr)
      table.probabilities({static_cast<const T*>(row.data) + first, count, false}, scale,
                          static_cast<T>(d.h_A), static_cast<T>(d.h_B), gates);
    else
      std::transform(values + first, values + first + count, gates, [](T x) { return x != 0; });
    for (int64_t j = 0; j < count; ++j) {
      T& out = grad[first + j];
      out = g[first + j] * gates[j] + (part == 0 ? T(0) : part * out);
    }
  }
}

template <typename T>
void backward_row(const Row& row, const T* values, const T* state, T alpha, const T* g, T part,
                  T* grad, T* grad_k, T* grad_alpha) {
  *grad_k = *grad_alpha = std::isnan(state[4]) ? state[4] : T(0);
  if (std::isnan(state[4])) return void(std::fill_n(grad, row.n, state[4]));
  const bool moves = state[2] > 0 || state[3] > 0;
  const T* active = static_cast<const T*>(row.data);
  for (int64_t j = 0; j < row.n; ++j) grad[j] = moves ? g[j] * active[j] : T(0);
  if (moves) selection_gradients(row, state, alpha, grad, grad_k, grad_alpha);
  add_gates(row, values, state, alpha, g, part, grad);
}

}  // namespace

void code_forward(const Rows& z, const PerRow& k, const PerRow& alpha, const Activation& activation,
                  Selecting mode, const Code& code, int threads) {
  with_compute_type(z.type, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> activations(std::max(threads, 1) * z.n);
    const Sweeps<T>&from_row = sweeps<T>(z.type), &table = sweeps<T>(kType<T>);
    for_tasks(z.rows, 1 + 4096 / z.n, z.rows * z.n, threads, [&](int64_t i, int worker) {
      T* const a = activations.data() + worker * z.n;
      const Row row{a, z.n, false};
      Row given = row_at(z, i);
      given.negate = false;
      from_row.activate(given, activation, a);
      const Entries<T> out = entries_at<T>(code, i);
      const double budget = value_at(k, i);
      if (mode == Selecting::hard) return hard_row(table, row, budget, code.max_active, out);
      soft_row(table, row, budget, scale_in<T>(value_at(alpha, i)),
               mode == Selecting::straight_through, code.max_active, out);
    });
  });
}

void code_backward(Type compute, int64_t rows, int64_t max_active, const void* active,
                   const void* values, const int32_t* counts, const void* state,
                   const PerRow& alpha, const void* g, double selection_gradient, void* grad_active,
                   void* grad_k, void* grad_alpha, int threads) {
  with_compute_type(compute, [&](auto zero) {
    using T = decltype(zero);
    for_tasks(
        rows, 1 + 1024 / std::max<int64_t>(max_active, 1), rows * max_active, threads,
        [&](int64_t i, int) {
          const int64_t first = i * max_active, count = std::min<int64_t>(counts[i], max_active);
          T* const grad = static_cast<T*>(grad_active) + first;
          std::fill(grad + count, grad + max_active, T(0));
          backward_row<T>({static_cast<const T*>(active) + first, count, false},
                          values == nullptr ? nullptr : static_cast<const T*>(values) + first,
                          static_cast<const T*>(state) + 7 * i, scale_in<T>(value_at(alpha, i)),
                          static_cast<const T*>(g) + first, static_cast<T>(selection_gradient),
                          grad, static_cast<T*>(grad_k) + i, static_cast<T*>(grad_alpha) + i);
        });
  });
}

}  // namespace softtopk::cpu
