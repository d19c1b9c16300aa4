// The gradients of a code's values to its activations, to k and to alpha: the mathematics is in
// softtopk/backends/reference_sparse.py (code_backward).
//
// A warp to a row; its lanes stride over the entries, three times. 4 numbers are read and one is
// written for each place. The rest of the row, which is not in the code, enters by its two sums.
#include <type_traits>

#include "launch.cuh"
#include "threshold.cuh"

namespace softtopk::cuda {
namespace {

struct CodeBackwardArgs {
  int64_t rows, max_active;
  const void *active, *values;
  const int32_t* counts;
  const void* state;
  PerRow alpha;
  const void* g;
  double selection_gradient;
  void *grad_active, *grad_k, *grad_alpha;
};

// The entry of the largest q, of several the first.
template <class T>
struct Pivot {
  T q;
  int32_t place, unused;
  __device__ void combine(const Pivot& other) {
    if (other.q > q || (other.q == q && other.place < place)) *this = other;
  }
};

template <class T>
struct Sums {
  T v, t;
  __device__ void combine(const Sums& other) {
    v += other.v;
    t += other.t;
  }
};

constexpr int kBlock = 128;

template <class T>
__global__ void __launch_bounds__(kBlock) code_backward_kernel(const CodeBackwardArgs args) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t r = int64_t(blockIdx.x) * (kBlock / 32) + int(threadIdx.x) / 32;
  if (r >= args.rows) return;
  const int64_t first = r * args.max_active;
  const T* const active = static_cast<const T*>(args.active) + first;
  const T* const values = static_cast<const T*>(args.values) + first;
  const T* const g = static_cast<const T*>(args.g) + first;
  T* const grad_active = static_cast<T*>(args.grad_active) + first;
  const T* const state = static_cast<const T*>(args.state) + 7 * r;
  const Solution<T> s = {state[0], state[1], state[2], state[3], state[4]};
  const T Q_out = state[5], M_out = state[6];
  const T alpha = scale_in<T>(per_row(args.alpha, r));
  const int32_t count = int32_t(min(int64_t(args.counts[r]), args.max_active));
  const T selection = T(args.selection_gradient);

  const Densities<T> factors = densities(s, alpha);
  const Tails<T> tails(s.r_A, s.r_B, alpha);
  const auto q_of = [&](T a) { return (tails.above(a) ? factors.q_A : factors.q_B) * tails(a); };

  Pivot<T> pivot = {0, 0x7fffffff, 0};
  for (int32_t i = lane; i < count; i += 32) pivot.combine({q_of(active[i]), i, 0});
  pivot = reduce_lanes<32>(pivot);
  const T anchor = s.r_B == -infinity<T> ? s.r_A : s.r_B;
  const bool inside = pivot.q > 0 && !(Q_out > pivot.q);
  const T a_pivot = inside ? active[pivot.place] : anchor;
  const T v_pivot = inside ? g[pivot.place] * a_pivot : T(0);

  // v and t of an entry relative to the pivot; where q = 0 neither is looked at.
  struct Terms {
    T q, v, t;
  };
  const auto terms = [&](int32_t i) -> Terms {
    const T a = active[i], q = q_of(a);
    if (q == 0) return {0, 0, 0};
    return {q, g[i] * a - v_pivot, (a - a_pivot) / alpha};
  };
  Sums<T> mean = {0, 0};
  for (int32_t i = lane; i < count; i += 32) {
    const Terms at = terms(i);
    mean.v += at.q * at.v;
    mean.t += at.q * at.t;
  }
  mean = reduce_lanes<32>(mean);
  const T t_out = Q_out == 0 ? T(0) : M_out + Q_out * ((anchor - a_pivot) / alpha);
  mean.v -= Q_out * v_pivot;
  mean.t += t_out;

  const bool bad = s.D != s.D;
  Sums<T> covariance = {0, 0};
  for (int32_t i = lane; i < args.max_active; i += 32) {
    T gradient = 0;
    if (i < count) {
      const Terms at = terms(i);
      covariance.v += at.q * ((at.t - mean.t) * (at.v - mean.v));
      const T a = active[i], e = tails(a);
      const bool above = tails.above(a);
      const T h = (above ? factors.h_A : factors.h_B) * e, p = above ? 1 - h : h;
      const bool whole = args.values != nullptr;
      gradient = whole ? (values[i] != 0 ? g[i] : T(0)) : g[i] * p;
      if (h > 0) gradient += selection * (h * (at.v - mean.v) / alpha);
      if (bad) gradient = nan<T>;
    }
    grad_active[i] = gradient;
  }
  covariance = reduce_lanes<32>(covariance);
  if (lane != 0) return;
  const T total = covariance.v - (t_out - Q_out * mean.t) * (v_pivot + mean.v);
  const bool bound = s.P == 0 && s.Q == 0;
  T grad_k = bound ? T(0) : v_pivot + mean.v;
  T grad_alpha = factors.R == 0 ? T(0) : -factors.R * total / alpha;
  if (bad) grad_k = grad_alpha = nan<T>;
  static_cast<T*>(args.grad_k)[r] = grad_k;
  static_cast<T*>(args.grad_alpha)[r] = grad_alpha;
}

}  // namespace

void code_backward(Type compute, int64_t rows, int64_t max_active, const void* active,
                   const void* values, const int32_t* counts, const void* state,
                   const PerRow& alpha, const void* g, double selection_gradient, void* grad_active,
                   void* grad_k, void* grad_alpha, int device, void* stream) {
  const DeviceGuard guard(device);
  constexpr int64_t kRows = kBlock / 32;
  if (rows == 0) return;
  CodeBackwardArgs args = {rows, max_active,         active,      values, counts,    state, alpha,
                           g,    selection_gradient, grad_active, grad_k, grad_alpha};
  void* pointers[] = {&args};
  const auto kernel =
      compute == Type::float64 ? code_backward_kernel<double> : code_backward_kernel<float>;
  check(cudaLaunchKernel(kernel, dim3(unsigned((rows + kRows - 1) / kRows)), dim3(kBlock), pointers,
                         0, static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

}  // namespace softtopk::cuda
