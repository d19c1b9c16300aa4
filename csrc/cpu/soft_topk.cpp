// Soft top-k on the CPU: forward and backward; the mathematics is in
// softtopk/backends/reference.py.
//
// The forward reads a row once to find its range, a few times more while its elements are split
// (mostly from cache), and once to write p or its logarithm. The backward reads x and v twice, and
// v only near the threshold and, in the log domain, on the minor side. One row is one task, or
// each of its sweeps is shared out (rows.h, pieces.h); no sum depends on the number of threads.
#include <cmath>

#include "../laplace.h"
#include "pivot.h"
#include "rows.h"
#include "search.h"

namespace softtopk::cpu {
namespace {

template <typename T>
void forward_row(const Rows& x, int64_t i, double k, T alpha, Form form, void* result, T* solution,
                 Team* team) {
  const RowSweeps<T> row_sweeps(x.type, team);
  const Row row = row_at(x, i);
  const Solution<double> solved =
      solve<T>(row_sweeps, RowSweeps<T>(kType<T>, nullptr), row, k, alpha);
  const Solution<T> s{static_cast<T>(solved.r_A), static_cast<T>(solved.r_B),
                      static_cast<T>(solved.P), static_cast<T>(solved.Q), static_cast<T>(solved.D)};
  if (solution != nullptr) {
    solution[0] = s.r_A, solution[1] = s.r_B, solution[2] = s.P, solution[3] = s.Q;
    solution[4] = s.D;
  }
  if (form == Form::none) return;
  void* out = output_at(x, result, i);
  if (std::isnan(s.D)) return row_sweeps.fill(row, s.D, out);
  const Scale<T> scale = scale_of(s.r_A, s.r_B, alpha);
  if (form == Form::p) {
    const Densities<double> d = densities(solved, static_cast<double>(alpha));
    return row_sweeps.probabilities(row, scale, static_cast<T>(d.h_A), static_cast<T>(d.h_B), out);
  }
  const LogDensities d = log_densities(solved, static_cast<double>(alpha));
  const bool complement = form == Form::log_complement;
  row_sweeps.log_probabilities(
      row, scale,
      {complement, static_cast<T>(complement ? d.log_h_A : d.log_h_B),
       static_cast<T>(std::exp(complement ? d.log_h_B : d.log_h_A)), steps(alpha)},
      out);
}

template <typename T>
void backward_row(const Rows& x, int64_t i, const T* solution, T alpha, const Row& v, void* grad_x,
                  T* grad_k, T* grad_alpha, Team* team) {
  const RowSweeps<T> row_sweeps(x.type, team);
  const Row row = row_at(x, i);
  const Solution<double> s{solution[0], solution[1], solution[2], solution[3], solution[4]};
  const double scale = alpha;
  const Densities<double> d = densities(s, scale);
  Pivot<T> pivot = pivot_of(s, d, alpha);
  pivot.v = row_sweeps.element(v, row_sweeps.find(row, pivot.x));
  const Scale<T> factors = scale_of(solution[0], solution[1], alpha);
  const Means means = row_sweeps.means(row, v, factors, pivot);
  const double covariance = row_sweeps.gradient(row, v, factors, pivot, means, grad_x);
  *grad_k = static_cast<T>(pivot.v + means.v);
  constexpr double ln2 = 0.69314718055994531;
  *grad_alpha = d.R == 0 ? T(0) : static_cast<T>(-d.R / scale * covariance * ln2);
}

// The names are those of log_backward in softtopk/backends/reference.py.
template <typename T>
void log_backward_row(const Rows& x, int64_t i, const T* solution, T alpha, bool complement,
                      const Row& v, void* grad_x, T* grad_k, T* grad_alpha, Team* team) {
  const RowSweeps<T> row_sweeps(x.type, team);
  const Row row = row_at(x, i);
  const Solution<double> s{solution[0], solution[1], solution[2], solution[3], solution[4]};
  const LogDensities d = log_densities(s, static_cast<double>(alpha));
  const double q_A = s.P > 0 ? d.w_A / s.P : 0, q_B = s.Q > 0 ? d.w_B / s.Q : 0;
  const bool pivot_above = q_A >= q_B, pivot_minor = pivot_above == complement;
  LogPivot<T> pivot{complement,
                    static_cast<T>(q_A),
                    static_cast<T>(q_B),
                    least_e(static_cast<T>(q_A)),
                    least_e(static_cast<T>(q_B)),
                    static_cast<T>(std::exp(d.log_h_A)),
                    static_cast<T>(std::exp(d.log_h_B)),
                    pivot_above ? solution[0] : solution[1],
                    T(0),
                    std::numeric_limits<T>::infinity(),
                    steps(alpha)};
  const T v_pivot = row_sweeps.element(v, row_sweeps.find(row, pivot.x));
  const bool dominant = pivot_minor && (pivot_above ? pivot.q_A : pivot.q_B) > T(0.75);
  if (dominant) pivot.dominant = T(0.75);
  if (!pivot_minor) pivot.u = v_pivot / (1 - (pivot_above ? pivot.h_A : pivot.h_B));

  const Scale<T> factors = scale_of(solution[0], solution[1], alpha);
  const LogMeans means = row_sweeps.log_means(row, v, factors, pivot);
  const double M = pivot.u * (complement ? d.w_B : d.w_A) + means.u;
  const double V = means.rest_v + (dominant ? v_pivot : T(0));
  const LogMoments<T> moments{static_cast<T>(M),
                              static_cast<T>(pivot.u * (complement ? d.w_A : d.w_B) - means.u),
                              static_cast<T>(V),
                              static_cast<T>(means.rest_q),
                              static_cast<T>(means.rest_v),
                              static_cast<T>(means.t)};
  const double covariance = row_sweeps.log_gradient(row, v, factors, pivot, moments, grad_x);
  const double sign = complement ? -1 : 1;
  *grad_k = static_cast<T>(sign * ((V == 0 ? 0 : V / d.R) + M));
  *grad_alpha = static_cast<T>(-sign * covariance / alpha * 0x1p64);
}

}  // namespace

void soft_topk_forward(const Rows& x, const PerRow& k, const PerRow& alpha, Form form, void* out,
                       void* solution, int threads) {
  with_compute_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    for_rows(x, threads, [&](int64_t row, Team* team) {
      forward_row<T>(x, row, value_at(k, row), scale_in<T>(value_at(alpha, row)), form, out,
                     solution == nullptr ? nullptr : static_cast<T*>(solution) + 5 * row, team);
    });
  });
}

void soft_topk_backward(const Rows& x, const void* solution, const PerRow& alpha, Form form,
                        const void* v, int64_t v_stride, void* grad_x, void* grad_k,
                        void* grad_alpha, int threads) {
  const Rows incoming{v, x.type, x.rows, x.n, v_stride, true};
  with_compute_type(x.type, [&](auto zero) {
    using T = decltype(zero);
    for_rows(x, threads, [&](int64_t row, Team* team) {
      const T* solved = static_cast<const T*>(solution) + 5 * row;
      const T scale = scale_in<T>(value_at(alpha, row));
      void* to_x = output_at(x, grad_x, row);
      T *to_k = static_cast<T*>(grad_k) + row, *to_alpha = static_cast<T*>(grad_alpha) + row;
      if (!(solved[2] > 0 || solved[3] > 0)) {  // a NaN row, or nothing that k or x could move
        *to_k = *to_alpha = std::isnan(solved[4]) ? solved[4] : T(0);
        return RowSweeps<T>(x.type, team).fill(row_at(x, row), *to_k, to_x);
      }
      const Row v_row = row_at(incoming, row);
      if (form == Form::p)
        backward_row<T>(x, row, solved, scale, v_row, to_x, to_k, to_alpha, team);
      else
        log_backward_row<T>(x, row, solved, scale, form == Form::log_complement, v_row, to_x, to_k,
                            to_alpha, team);
    });
  });
}

}  // namespace softtopk::cpu
