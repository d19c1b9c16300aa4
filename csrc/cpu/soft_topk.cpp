// Soft top-k on the CPU: forward and backward; the mathematics is in
// softtopk/backends/reference.py.
//
// The forward reads a row once to find its range, a few times more while its elements are split
// (mostly from cache), and once to write p. The backward reads x and v twice, and v only near the
// threshold. One row is one task; no sum depends on the number of threads.
#include <cmath>

#include "../laplace.h"
#include "rows.h"
#include "search.h"

namespace softtopk::cpu {
namespace {

template <typename T>
constexpr Type kType = sizeof(T) == 8 ? Type::float64 : Type::float32;

template <typename T>
void forward_row(const Rows& x, int64_t i, double k, T alpha, void* p, T* solution) {
  const Sweeps<T>& row_sweeps = sweeps<T>(x.type);
  const Row row = row_at(x, i);
  const Solution<double> solved = solve<T>(row_sweeps, sweeps<T>(kType<T>), row, k, alpha);
  const Solution<T> s{static_cast<T>(solved.r_A), static_cast<T>(solved.r_B),
                      static_cast<T>(solved.P), static_cast<T>(solved.Q), static_cast<T>(solved.D)};
  solution[0] = s.r_A, solution[1] = s.r_B, solution[2] = s.P, solution[3] = s.Q;
  solution[4] = s.D;
  void* out = output_at(x, p, i);
  if (std::isnan(s.D)) return row_sweeps.fill(row, s.D, out);
  const Densities<double> d = densities(solved, static_cast<double>(alpha));
  row_sweeps.probabilities(row, scale_of(s.r_A, s.r_B, alpha), static_cast<T>(d.h_A),
                           static_cast<T>(d.h_B), out);
}

template <typename T>
void backward_row(const Rows& x, int64_t i, const T* solution, T alpha, const Row& v, void* grad_x,
                  T* grad_k, T* grad_alpha) {
  const Sweeps<T>& row_sweeps = sweeps<T>(x.type);
  const Row row = row_at(x, i);
  const Solution<double> s{solution[0], solution[1], solution[2], solution[3], solution[4]};
  if (!(s.P > 0 || s.Q > 0)) {  // a NaN row, or nothing that k or x could move
    const T value = std::isnan(s.D) ? solution[4] : T(0);
    *grad_k = *grad_alpha = value;
    return row_sweeps.fill(row, value, grad_x);
  }
  const double scale = alpha;
  const Densities<double> d = densities(s, scale);
  Pivot<T> pivot{static_cast<T>(d.q_A),
                 static_cast<T>(d.q_B),
                 static_cast<T>(d.h_A / scale),
                 static_cast<T>(d.h_B / scale),
                 d.q_A >= d.q_B ? solution[0] : solution[1],
                 T(0)};
  pivot.v = row_sweeps.element(v, row_sweeps.find(row, pivot.x));
  const Scale<T> factors = scale_of(solution[0], solution[1], alpha);
  const Means means = row_sweeps.means(row, v, factors, pivot);
  const double covariance = row_sweeps.gradient(row, v, factors, pivot, means, grad_x);
  *grad_k = static_cast<T>(pivot.v + means.v);
  constexpr double ln2 = 0.69314718055994531;
  *grad_alpha = d.R == 0 ? T(0) : static_cast<T>(-d.R / scale * covariance * ln2);
}

}  // namespace

void soft_topk_forward(const Rows& x, const PerRow& k, const PerRow& alpha, void* p, void* solution,
                       int threads) {
  with_compute_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    for_rows(x, threads, [&](int64_t row) {
      forward_row<T>(x, row, value_at(k, row), static_cast<T>(value_at(alpha, row)), p,
                     static_cast<T*>(solution) + 5 * row);
    });
  });
}

void soft_topk_backward(const Rows& x, const void* solution, const PerRow& alpha, const void* v,
                        int64_t v_stride, void* grad_x, void* grad_k, void* grad_alpha,
                        int threads) {
  const Rows incoming{v, x.type, x.rows, x.n, v_stride, true};
  with_compute_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    for_rows(x, threads, [&](int64_t row) {
      backward_row<T>(x, row, static_cast<const T*>(solution) + 5 * row,
                      static_cast<T>(value_at(alpha, row)), row_at(incoming, row),
                      output_at(x, grad_x, row), static_cast<T*>(grad_k) + row,
                      static_cast<T*>(grad_alpha) + row);
    });
  });
}

}  // namespace softtopk::cpu
