// Backward: grad_x (rows, n), grad_k and grad_alpha (rows,) from x, the solution and v.
//
//   grad_x = s (v - <q, v>),  grad_k = <q, v>,  grad_alpha = -R / alpha <q, (t - <q, t>)(v - <q,
//   v>)>
//
// with h and q = h / R as densities() of csrc/laplace.h gives them, s = h / alpha, t = x / alpha.
// v and t are taken relative to their values at the pivot, the first element of the largest q:
// else one dominant element cancels everything. Where q = 0, v and t are not looked at.
// backward.cuh says what is read and written.
#include "backward.cuh"

namespace softtopk::cuda {
namespace {

template <class T>
struct Means {
  T v, t;
  __device__ void combine(const Means& other) {
    v += other.v;
    t += other.t;
  }
};

template <class S, class L>
__global__ void __launch_bounds__(L::block, L::resident(sizeof(S)))
    backward_kernel(const BackwardArgs args) {
  using T = Compute<S>;
  using Group = typename L::Group;
  using Row = typename L::template Row<S>;
  constexpr int kSize = Chunk<S>::size;
  extern __shared__ uint4 row_memory[];
  __shared__ typename Group::Storage storage;

  const int64_t r = L::row(args.first_row);
  const int32_t n = int32_t(args.x.n);
  if (r >= args.x.rows) return;  // all threads of the group
  Group group(storage);
  const T* solution = static_cast<const T*>(args.solution) + 5 * r;
  const Solution<T> s = {solution[0], solution[1], solution[2], solution[3], solution[4]};
  const T alpha = scale_in<T>(per_row(args.alpha, r));
  const Densities<T> factors = densities(s, alpha);
  const Tails<T> tails(s.r_A, s.r_B, alpha);

  const Source<S> x_source(args.x.data, r * args.x.stride, n, args.wide_x, !args.x.largest);
  const Source<S> v_source(args.v, r * args.v_stride, n, args.wide_v, false);
  const Row x_row(x_source, row_memory);
  const Row v_row(v_source, row_memory + L::template memory<S>(n));

  // The pivot: an element with e = 1, on the side of the larger q.
  const bool at_A = factors.q_A >= factors.q_B, at_B = factors.q_B >= factors.q_A;
  const int32_t pivot = first_place<S>(
      x_row, group, n, [&](T x) { return (at_A && x == s.r_A) || (at_B && x == s.r_B); });
  const T x_pivot = x_source.element(pivot), v_pivot = v_source.element(pivot);

  const T per_alpha = 1 / alpha < largest<T> ? 1 / alpha : largest<T>;
  // e, q, v and t of an element, the last two relative to the pivot.
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
    out.t = out.q == 0 ? T(0) : (x - x_pivot) * per_alpha;
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

  const Steps<T> step = steps(alpha);  // 1 / alpha as one number may overflow
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
    static_cast<T*>(args.grad_alpha)[r] = factors.R == 0 ? T(0) : -(factors.R * total / alpha);
  }
}

}  // namespace

void soft_topk_backward(const Rows& x, const void* solution, const PerRow& alpha, Form form,
                        const void* v, int64_t v_stride, void* grad_x, void* grad_k,
                        void* grad_alpha, int device, void* stream) {
  const BackwardArgs args = {x,      solution,   alpha, form,  v,     v_stride, grad_x,
                             grad_k, grad_alpha, false, false, false, 0};
  if (form != Form::p) return log_backward(args, device, stream);
  launch_backward(args, device, stream, [](auto tag, auto layout) {
    return backward_kernel<typename decltype(tag)::type, decltype(layout)>;
  });
}

}  // namespace softtopk::cuda
