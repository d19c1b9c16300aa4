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
// exp(-kReach) is 0 to the sweeps.
template <typename T>
constexpr T kReach = -std::numeric_limits<T>::min_exponent;
// From here on a look at a sample of a row pays.
constexpr int64_t kLongRow = 4096;

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
  const double at = share > 0 ? s.r_B - alpha * std::log(share / kLeastShare) : s.r_A;
  const double exact = std::max(std::min(at, s.r_A), 0.0);
  T least = static_cast<T>(exact);
  if (least < exact) least = std::nextafter(least, inf);
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

// A row of activations, or those of it that are above `floor`: few, where that is not 0.
template <typename T>
struct Elements {
  Row row;
  T floor;
  const int32_t* indices;  // of the few in the row of n
  int64_t n;

  // Whether the others weigh nothing: exp(-(r_B - floor) / alpha) underflows.
  bool hold(const Solution<double>& s, T alpha) const {
    return floor == 0 || s.r_B - floor > kReach<T> * static_cast<double>(alpha);
  }
};

// What a selection of few finds in a row it finds among a few hundred of its elements too: in 10.5
// ms for 512 rows of 16384 on one core, instead of 16.9. They are those above a guess, at most
// `capacity`; the row itself where they would not do.
template <typename T>
Elements<T> few_of(const Sweeps<T>& table, const Row& row, double k, T alpha, int64_t capacity,
                   T* elements, int32_t* indices) {
  const Elements<T> whole{row, T(0), nullptr, row.n};
  if (!(row.n >= kLongRow && k > 0 && k < static_cast<double>(row.n / 8))) return whole;
  const Guesses<T> guesses(RowSweeps<T>(kType<T>, nullptr), row, k / static_cast<double>(row.n));
  if (!(guesses.low > 0 && guesses.spread > kReach<T> * alpha)) return whole;
  const int64_t count =
      table.keep(row, guesses.low, 0, {}, nullptr, capacity, indices, elements).count;
  if (count > capacity || static_cast<double>(count) <= k + 1) return whole;
  return {{elements, count, false}, guesses.low, indices, row.n};
}

// How many entries of a row are there, and what is said of all that a code would keep.
struct Stored {
  int64_t count;
  Kept kept;
};

// Writes the row's indices, activations and count.
template <typename T>
Stored store_entries(const Sweeps<T>& table, const Elements<T>& of, const Limit<T>& limit,
                     const Scale<T>& scale, const Pivot<T>* pivot, int64_t max_active,
                     const Entries<T>& out) {
  const Kept kept = table.keep(of.row, limit.value, limit.ties, scale, pivot, max_active,
                               out.indices, out.active);
  const int64_t stored = std::min(kept.count, max_active), unused = max_active - stored;
  *out.count = static_cast<int32_t>(kept.count);
  if (of.floor > 0)
    for (int64_t j = 0; j < stored; ++j) out.indices[j] = of.indices[out.indices[j]];
  std::fill_n(out.indices + stored, unused, static_cast<int32_t>(of.n));
  std::fill_n(out.active + stored, unused, T(0));
  std::fill_n(out.values + stored, unused, T(0));
  return {stored, kept};
}

template <typename T>
void hard_row(const Sweeps<T>& table, const Elements<T>& of, double k, int64_t max_active,
              const Entries<T>& out) {
  const Cut<T> cut = softtopk::cpu::cut(RowSweeps<T>(kType<T>, nullptr), of.row, k, of.row.n);
  if (cut.nan) return bad_row(out, of.n, max_active);
  const auto [count, kept] =
      store_entries<T>(table, of, hard_limit(cut), {}, nullptr, max_active, out);
  std::copy_n(out.active, count, out.values);
}

// False where the few elements do not hold the solution.
template <typename T>
bool soft_row(const Sweeps<T>& table, const Elements<T>& of, double k, T alpha,
              bool straight_through, int64_t max_active, const Entries<T>& out) {
  const RowSweeps<T> row_sweeps(kType<T>, nullptr);
  const Solution<double> s = solve<T>(row_sweeps, row_sweeps, of.row, k, alpha);
  if (std::isnan(s.D)) return bad_row(out, of.n, max_active), true;
  if (!of.hold(s, alpha)) return false;
  const Densities<double> d = densities(s, static_cast<double>(alpha));
  const Scale<T> scale = scale_of(static_cast<T>(s.r_A), static_cast<T>(s.r_B), alpha);
  Pivot<T> pivot = pivot_of(s, d, alpha);
  pivot.x = static_cast<T>(std::isinf(s.r_B) ? s.r_A : s.r_B);

  Limit<T> limit = soft_limit<T>(s, d, static_cast<double>(alpha)), hard{};
  if (straight_through) {
    hard = hard_limit(cut(row_sweeps, of.row, k, of.row.n));
    // Every element equal to the larger limit is above the smaller one.
    if (hard.value <= limit.value) limit = hard;
  }
  const auto [count, kept] = store_entries(table, of, limit, scale, &pivot, max_active, out);
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
  return true;
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

int64_t select_workspace(int64_t, int64_t, Type) { return 0; }

void code_forward(const Rows& z, const PerRow& k, const PerRow& alpha, const Activation& activation,
                  Selecting mode, const Code& code, void*, int threads) {
  with_compute_type(z.type, [&](auto zero) {
    using T = decltype(zero);
    // For every thread a row of activations, and room for the few.
    const int64_t room = z.n / 4, workers = std::max(threads, 1);
    std::vector<T> activations(workers * (z.n + room));
    std::vector<int32_t> places(workers * room);
    const Sweeps<T>&from_row = sweeps<T>(z.type), &table = sweeps<T>(kType<T>);
    const int64_t C = code.max_active;
    for_tasks(z.rows, 1 + 4096 / z.n, z.rows * z.n, threads, [&](int64_t i, int worker) {
      T* const a = activations.data() + worker * (z.n + room);
      const Entries<T> out = entries_at<T>(code, i);
      Row row = row_at(z, i);
      row.negate = false;
      if (from_row.activate(row, activation, a)) return bad_row(out, z.n, C);
      row.data = a;
      const bool hard = mode == Selecting::hard, straight = mode == Selecting::straight_through;
      const double budget = value_at(k, i);
      const T scale = hard ? T(0) : scale_in<T>(value_at(alpha, i));
      const Elements<T> few =
          few_of(table, row, budget, scale, room, a + z.n, places.data() + worker * room);
      if (hard) return hard_row(table, few, budget, C, out);
      if (!soft_row(table, few, budget, scale, straight, C, out))
        soft_row<T>(table, {row, T(0), nullptr, z.n}, budget, scale, straight, C, out);
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
