// The backward of p for one row by a group of threads: the careful way, for every alpha, dtype and
// v.
//
//   grad_x = s (v - <q, v>),  grad_k = <q, v>,
//   grad_alpha = -R / alpha <q, (t - <q, t>)(v - <q, v>)>
//
// with h and q = h / R as densities() of csrc/laplace.h gives them, s = h / alpha, t = x / alpha.
// v and t are taken relative to their values at the pivot, the first element of the largest q:
// else one dominant element cancels everything. Where q = 0, v and t are not looked at.
#pragma once

#include "backward.cuh"

namespace softtopk::cuda {

template <class T>
struct Means {
  T v, t;
  __device__ void combine(const Means& other) {
    v += other.v;
    t += other.t;
  }
};

template <class S, class Row, class Group>
__device__ __forceinline__ void backward_of_row(const BackwardArgs& args, int64_t r,
                                                const Source<S>& x_source,
                                                const Source<S>& v_source, const Row& x_row,
                                                const Row& v_row, Group& group) {
  using T = Compute<S>;
  constexpr int kSize = Chunk<S>::size;
  const int32_t n = int32_t(args.x.n);
  const T* solution = static_cast<const T*>(args.solution) + 5 * r;
  const Solution<T> s = {solution[0], solution[1], solution[2], solution[3], solution[4]};
  const T alpha = scale_in<T>(per_row(args.alpha, r));
  const Densities<T> factors = densities(s, alpha);
  const Tails<T> tails(s.r_A, s.r_B, alpha);
  // The pivot: an element with e = 1, on the side of the larger q.
  const bool at_A = factors.q_A >= factors.q_B, at_B = factors.q_B >= factors.q_A;
  const int32_t pivot = first_place<S>(
      x_row, group, n, [&](T x) { return (at_A && x == s.r_A) || (at_B && x == s.r_B); });
  const T x_pivot = x_source.element(pivot), v_pivot = v_source.element(pivot);

  const Steps<T> step = steps(alpha);  // 1 / alpha as one number may overflow
  // e, q, v and t of an element, the last two relative to the pivot; t in units of 1 / step.after.
  struct Terms {
    T e, q, v, t;
    bool above;
  };
  const auto terms = [&](T x, T v) {
    Terms out;
    out.e = tails(x);
    out.above = tails.above(x);
    out.q = (out.above ? factors.q_A : factors.q_B) * out.e;
    out.v = out.q == 0 ? T(0) : v - v_pivot;
    out.t = out.q == 0 ? T(0) : (x - x_pivot) * step.rate;
    return out;
  };

  CompensatedSum<T> sum_v, sum_t;
  x_row.for_each([&](int32_t item) {
    T x[kSize], v[kSize], qv[kSize], qt[kSize];
    x_row.chunk(item).read(x);
    v_row.chunk(item).read(v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Terms at = terms(x[i], v[i]);
      qv[i] = at.q * at.v;
      qt[i] = at.q * at.t;
    }
    sum_v.add(tree_sum(qv));
    sum_t.add(tree_sum(qt));
  });
  const Means<T> mean = group.reduce(Means<T>{sum_v.value(), sum_t.value()});

  const T s_A = factors.h_A * step.rate, s_B = factors.h_B * step.rate;
  const T scale = args.x.largest ? step.after : -step.after;
  const Sink<S> sink(args.grad_x, r * n, n, args.wide_grad);
  CompensatedSum<T> covariance;
  x_row.for_each([&](int32_t item) {
    T x[kSize], v[kSize], qtv[kSize];
    x_row.chunk(item).read(x);
    v_row.chunk(item).read(v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Terms at = terms(x[i], v[i]);
      qtv[i] = at.q * (at.t - mean.t) * (at.v - mean.v);
      const T slope = at.e == 0 && s_A == s_A ? T(0) : (at.above ? s_A : s_B) * at.e;
      x[i] = slope == 0 ? T(0) : slope * (at.v - mean.v) * scale;
    }
    covariance.add(tree_sum(qtv));
    sink.store(chunk_index<Group>(item), Chunk<S>::of(x));
  });
  const T total = group.reduce(Total<T>{covariance.value()}).value;

  if (Group::rank() == 0) {
    const bool bound = s.P == 0 && s.Q == 0;  // k outside its range, or no finite element
    static_cast<T*>(args.grad_k)[r] = bound ? T(0) : v_pivot + mean.v;
    const double per_alpha = double(step.after) / double(alpha);
    static_cast<T*>(args.grad_alpha)[r] =
        factors.R == 0 ? T(0) : T(-double(factors.R) * double(total) * per_alpha);
  }
}

}  // namespace softtopk::cuda
