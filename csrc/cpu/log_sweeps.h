// The sweeps of the log domain, for sweeps.cpp alone; backends/reference.py has the mathematics and
// what the minor and the major side are.
#pragma once

#include "lanes.h"

namespace softtopk::cpu::SOFTTOPK_ISA {
namespace {

// log(1 - h) for 0 <= h <= 1/2: -2 artanh(h / (2 - h)) by its series.
template <typename T>
INLINE Vector<T> log_of_rest(Vector<T> h) {
  constexpr int terms = sizeof(T) == 8 ? 16 : 7;
  const Vector<T> s = h / (T(2) - h);
  const Vector<T> floored = larger<T>(s, Vector<T>{} + T(0x1p-60));  // denormals are slow
  const Vector<T> square = floored * floored;
  Vector<T> series{};
  for (int i = terms - 1; i >= 0; --i) series = series * square + T(1) / T(2 * i + 1);
  return T(-2) * s * series;
}

// What one block of elements is in the log domain.
template <typename T>
struct Place {
  Mask<T> above[kVectors];
  Mask<T> minor[kVectors];  // and finite
  Block<T> e;
  bool tails;  // whether any e is not 0
};

template <typename T>
INLINE Place<T> place(const Block<T>& x, const Scale<T>& scale, bool complement) {
  constexpr T inf = Lanes<T>::infinity;
  const Mask<T> flip = Mask<T>{} - (complement ? 0 : 1);
  Place<T> out;
  Block<T> y;
  for (int j = 0; j < kVectors; ++j) {
    const Vector<T> v = x.v[j];
    out.above[j] = v >= scale.r_A;
    out.minor[j] = (out.above[j] ^ flip) & (v < inf) & (v > -inf);
    y.v[j] = exponent<T>(v, out.above[j], scale);
    out.e.v[j] = Vector<T>{};
  }
  out.tails = !all_underflow(y);
  if (out.tails)
    for (int j = 0; j < kVectors; ++j) out.e.v[j] = exp2_nonpositive<T>(y.v[j]);
  return out;
}

template <typename T>
INLINE bool any_minor(const Place<T>& at) {
  Mask<T> minor{};
  for (auto& m : at.minor) minor |= m;
  return any<T>(minor);
}

// (x - r) / alpha in units of 2^64.
template <typename T>
INLINE Vector<T> offset(Vector<T> x, Vector<T> r, const Steps<T>& steps) {
  return (x * steps.before - r * steps.before) * steps.rate;
}

template <typename T, typename In>
void log_probabilities(const Row& row, const Scale<T>& scale, const LogOutput<T>& form, void* out) {
  using V = Vector<T>;
  const Mask<T> flip = Mask<T>{} - (form.complement ? 0 : 1);
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t count) LAMBDA_INLINE {
    const Place<T> at = place(x, scale, form.complement);
    Block<T> result;
    for (int j = 0; j < kVectors; ++j) {
      const V r = at.above[j] ? V{} + scale.origin_A : V{} + scale.origin_B;
      const V t = offset(x.v[j], r, form.steps);
      const V log_h = form.log_h + (at.above[j] ? -t : t) * T(0x1p64);
      const V rest = at.tails ? log_of_rest<T>(form.h * at.e.v[j]) : V{};
      result.v[j] = at.above[j] ^ flip ? log_h : rest;
    }
    store_at<T, In>(result, out, first, count);
    return false;
  });
}

template <typename T, typename In>
LogMeans log_means(const Row& row, const Row& v, const Scale<T>& scale, const LogPivot<T>& pivot) {
  using V = Vector<T>;
  constexpr T least_q = Lanes<T>::smallest * T(0x1p64);  // q dt is in units of 2^64
  Sum<T> u_sum, t_sum, rest_q, rest_v;
  int blocks = 0;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t count) LAMBDA_INLINE {
    const Place<T> at = place(x, scale, pivot.complement);
    if (!at.tails && !any_minor(at)) return false;  // nothing here depends on v
    const Block<T> g = load_at<T, In>(v, first, count);
    for (int j = 0; j < kVectors; ++j) {
      const V q = weight<T>(at.e.v[j], at.above[j], pivot);
      const V h = (at.above[j] ? V{} + pivot.h_A : V{} + pivot.h_B) * at.e.v[j];
      const V dt = offset(x.v[j], V{} + pivot.x, pivot.steps);
      const Mask<T> rest = q <= pivot.dominant;
      u_sum.lanes[j] += at.minor[j] | (q == T(0)) ? V{} : q * (g.v[j] / (T(1) - h) - pivot.u);
      t_sum.lanes[j] += q * (q >= least_q ? dt : V{});
      rest_q.lanes[j] += rest ? q : V{};
      rest_v.lanes[j] += at.minor[j] & rest ? g.v[j] : V{};
    }
    if (++blocks % kBlocksPerSum == 0) u_sum.flush(), t_sum.flush(), rest_q.flush(), rest_v.flush();
    return false;
  });
  u_sum.flush(), t_sum.flush(), rest_q.flush(), rest_v.flush();
  return {u_sum.sum, t_sum.sum, rest_q.sum, rest_v.sum};
}

template <typename T, typename In>
double log_gradient(const Row& row, const Row& v, const Scale<T>& scale, const LogPivot<T>& pivot,
                    const LogMoments<T>& moments, void* grad_x) {
  using V = Vector<T>;
  const T sign = row.negate != pivot.complement ? -1 : 1;
  Sum<T> covariance;
  int blocks = 0;
  for_blocks<T, In>(row, [&](const Block<T>& x, int64_t first, int64_t count) LAMBDA_INLINE {
    const Place<T> at = place(x, scale, pivot.complement);
    Block<T> out{};
    if (at.tails || any_minor(at)) {
      const Block<T> incoming = load_at<T, In>(v, first, count);
      for (int j = 0; j < kVectors; ++j) {
        const V w = incoming.v[j], e = at.e.v[j];
        const V q = weight<T>(e, at.above[j], pivot);
        const V h = (at.above[j] ? V{} + pivot.h_A : V{} + pivot.h_B) * e;
        const Mask<T> none = (q == T(0)) & (h == T(0));
        const V u = w / (T(1) - h);
        const Mask<T> dominant = q > pivot.dominant;
        V centred = w - q * moments.V;
        if (any<T>(dominant))  // elsewhere the products with so small a rest would be denormal
          centred = dominant ? w * moments.rest_q - q * moments.rest_v : centred;
        const V minor = q == T(0) ? w : centred - h * moments.M;
        const V major = h * ((u - pivot.u) + moments.shift) - q * moments.V;
        const V z = at.minor[j] ? minor : (none ? V{} : major);
        const V g = at.minor[j] ? w : (none ? V{} : h * u);
        const V dt = offset(x.v[j], V{} + pivot.x, pivot.steps) - moments.t;
        covariance.lanes[j] += at.minor[j] | ~none ? g * dt : V{};
        out.v[j] = (z * pivot.steps.after) * pivot.steps.rate * sign;
      }
      if (++blocks % kBlocksPerSum == 0) covariance.flush();
    }
    store_at<T, In>(out, grad_x, first, count);
    return false;
  });
  covariance.flush();
  return covariance.sum;
}

}  // namespace
}  // namespace softtopk::cpu::SOFTTOPK_ISA
