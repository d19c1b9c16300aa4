// The backward of log p and log(1 - p), with the names of log_backward in
// softtopk/backends/reference.py. backward.cuh says what is read and written.
#include "backward.cuh"
#include "log_domain.cuh"

namespace softtopk::cuda {
namespace {

template <class T>
struct LogMeans {
  T u, t, rest_q, rest_v;
  __device__ void combine(const LogMeans& other) {
    u += other.u;
    t += other.t;
    rest_q += other.rest_q;
    rest_v += other.rest_v;
  }
};

template <class S, class L>
__global__ void __launch_bounds__(L::block, L::resident(sizeof(S)))
    log_backward_kernel(const BackwardArgs args) {
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
  const bool complement = args.form == Form::log_complement;
  const Source<S> x_source(args.x.data, r * args.x.stride, n, args.wide_x, !args.x.largest);
  const Sink<S> sink(args.grad_x, r * n, n, args.wide_grad);
  T* grad_k = static_cast<T*>(args.grad_k) + r;
  T* grad_alpha = static_cast<T*>(args.grad_alpha) + r;

  if (!(s.P > 0 || s.Q > 0)) {  // a NaN row, or nothing that k or x could move
    const T value = s.D != s.D ? s.D : T(0);
    T x[kSize];
#pragma unroll
    for (T& each : x) each = value;
    for (int32_t i = Group::rank(); i < x_source.chunks(); i += Group::size()) {
      sink.store(i, Chunk<S>::of(x));
    }
    if (Group::rank() == 0) *grad_k = *grad_alpha = value;
    return;
  }

  const LogDensities d = log_densities(widened(s), double(alpha));
  const T q_A = s.P > 0 ? T(d.w_A / double(s.P)) : T(0);
  const T q_B = s.Q > 0 ? T(d.w_B / double(s.Q)) : T(0);
  const T h_A = T(std::exp(d.log_h_A)), h_B = T(std::exp(d.log_h_B));
  const T w_major = T(complement ? d.w_B : d.w_A), w_minor = T(complement ? d.w_A : d.w_B);

  const Source<S> v_source(args.v, r * args.v_stride, n, args.wide_v, false);
  const Row x_row(x_source, row_memory);
  const Row v_row(v_source, row_memory + L::template memory<S>(n));

  // The pivot: the first element with e = 1 on the side of the larger q.
  const bool pivot_above = q_A >= q_B, pivot_minor = pivot_above == complement;
  const T x_pivot = pivot_above ? s.r_A : s.r_B;
  const int32_t pivot = first_place<S>(x_row, group, n, [&](T x) { return x == x_pivot; });
  const T v_pivot = v_source.element(pivot);
  const T u_pivot = pivot_minor ? T(0) : v_pivot / (1 - (pivot_above ? h_A : h_B));
  const bool dominates = pivot_minor && (pivot_above ? q_A : q_B) > T(0.75);
  const T dominant = dominates ? T(0.75) : infinity<T>;

  const Tails<T> tails(s.r_A, s.r_B, alpha);
  const Steps<T> step = steps(alpha);
  const T origin = x_pivot * step.before;
  // Of an element; t is relative to the pivot and in units of 2^64.
  struct Terms {
    T q, h, t;
    bool minor;
  };
  const auto terms = [&](T x) {
    const bool above = tails.above(x);
    const T e = tails(x);
    Terms out;
    out.q = (above ? q_A : q_B) * e;
    out.h = (above ? h_A : h_B) * e;
    out.t = std::fma(x, step.before, -origin) * step.rate;
    out.minor = above == complement && std::abs(x) < infinity<T>;
    return out;
  };

  CompensatedSum<T> sum_u, sum_t, sum_q, sum_v;
  x_row.for_each([&](int32_t item) {
    T x[kSize], v[kSize], qu = 0, qt = 0, rest_q = 0, rest_v = 0;
    x_row.chunk(item).read(x);
    v_row.chunk(item).read(v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Terms at = terms(x[i]);
      const bool rest = at.q <= dominant;
      if (!at.minor && at.q != 0) qu += at.q * (v[i] / (1 - at.h) - u_pivot);
      if (at.q != 0) qt += at.q * at.t;
      if (rest) rest_q += at.q;
      if (rest && at.minor) rest_v += v[i];
    }
    sum_u.add(qu);
    sum_t.add(qt);
    sum_q.add(rest_q);
    sum_v.add(rest_v);
  });
  const LogMeans<T> mean =
      group.reduce(LogMeans<T>{sum_u.value(), sum_t.value(), sum_q.value(), sum_v.value()});
  const T M = u_pivot * w_major + mean.u, shift = u_pivot * w_minor - mean.u;
  const T V = mean.rest_v + (dominates ? v_pivot : T(0));

  const T sign = args.x.largest == complement ? T(-1) : T(1);
  CompensatedSum<T> covariance;
  x_row.for_each([&](int32_t item) {
    T x[kSize], v[kSize], gt = 0;
    x_row.chunk(item).read(x);
    v_row.chunk(item).read(v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Terms at = terms(x[i]);
      T z = 0, g = 0;
      if (at.minor) {
        g = z = v[i];
        if (at.q != 0) {
          z = at.q <= dominant ? v[i] - at.q * V : v[i] * mean.rest_q - at.q * mean.rest_v;
          z -= at.h * M;
        }
      } else if (at.q != 0) {
        const T u = v[i] / (1 - at.h);
        g = at.h * u;
        z = at.h * ((u - u_pivot) + shift) - at.q * V;
      }
      if (at.minor || at.q != 0) gt += g * (at.t - mean.t);
      x[i] = sign * (z * step.after * step.rate);
    }
    covariance.add(gt);
    sink.store(chunk_index<Group>(item), Chunk<S>::of(x));
  });
  const T total = group.reduce(Total<T>{covariance.value()}).value;

  if (Group::rank() == 0) {
    const double side = complement ? -1 : 1;
    *grad_k = T(side * ((V == 0 ? 0 : double(V) / d.R) + double(M)));
    *grad_alpha = T(-side * double(total) / double(alpha) * 0x1p64);
  }
}

}  // namespace

void log_backward(const BackwardArgs& args, int device, void* stream) {
  launch_backward<false>(
      args, device, stream, [](const BackwardArgs&, auto) { return false; },
      [](auto tag, auto layout) {
        return log_backward_kernel<typename decltype(tag)::type, decltype(layout)>;
      });
}

}  // namespace softtopk::cuda
