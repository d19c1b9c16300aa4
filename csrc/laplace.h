// The closed form of the soft top-k solution: the only native copy, for host and device.
//
// Notation and derivation: softtopk/backends/reference.py. A row is solved when the split
// A = {x >= r_A}, B = {x <= r_B} has S(r_A) <= k < S(r_B), where with D = |A| - k
//   S(r_A) - k = D - P / 2 + Q g / 2,   S(r_B) - k = D - P g / 2 + Q / 2,
//   g = exp(-(r_A - r_B) / alpha).
// Everything is relative to r_A and r_B, so that differences near the threshold are exact, and
// S - k is never formed as a difference of two large numbers: its error is relative to the slope.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define SOFTTOPK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SOFTTOPK_HOST_DEVICE inline
#endif

namespace softtopk {

template <typename T>
inline constexpr T kLeast = std::numeric_limits<T>::denorm_min();
template <typename T>
inline constexpr T kMost = std::numeric_limits<T>::max();
template <typename T>
inline constexpr T kInfinite = std::numeric_limits<T>::infinity();

// An empty A has r_A = +inf and P = 0, an empty B has r_B = -inf and Q = 0; P = Q = 0 marks a row
// whose k was clamped (no gradient to k); all NaN marks a NaN row.
template <typename T>
struct Solution {
  T r_A, r_B, P, Q, D;
};

// h = h_A e above and h_B e below, q = q_A e above and q_B e below, e = exp(-|x - r| / alpha).
template <typename T>
struct Densities {
  T R;         // sum of h
  T h_A, h_B;  // H_A / P, H_B / Q
  T q_A, q_B;  // H_A / (R P), H_B / (R Q), right also where R underflows
};

// sqrt(P Q exp(-(r_A - r_B) / alpha)), underflowing only where its own value does.
template <typename T>
SOFTTOPK_HOST_DEVICE T coupling(const Solution<T>& s, T alpha) {
  if (s.P == 0 || s.Q == 0) return 0;
  return std::sqrt(s.P) * std::sqrt(s.Q) * std::exp(-(s.r_A - s.r_B) / alpha / 2);
}

// The masses w = H / R come first: at D = 0 they are 1/2 exactly, however small R is, and the
// smaller one is taken in its conjugate form, without cancellation.
template <typename T>
SOFTTOPK_HOST_DEVICE Densities<T> densities(const Solution<T>& s, T alpha) {
  const T c = coupling(s, alpha);
  const T magnitude = std::abs(s.D);
  const T R = std::hypot(s.D, c);
  T w_A, w_B;
  if (R == 0) {  // D = 0 and the coupling underflowed or one side is empty: the limit
    const T both = s.P > 0 && s.Q > 0 ? T(0.5) : T(1);
    w_A = s.P > 0 ? both : T(0);
    w_B = s.Q > 0 ? both : T(0);
  } else {
    const T larger = (1 + magnitude / R) / 2;
    const T smaller = (c / R) * (c / (R + magnitude)) / 2;
    w_A = s.D >= 0 ? larger : smaller;
    w_B = s.D >= 0 ? smaller : larger;
  }
  Densities<T> out;
  out.R = R;
  out.q_A = s.P == 0 ? T(0) : w_A / s.P;
  out.q_B = s.Q == 0 ? T(0) : w_B / s.Q;
  out.h_A = out.q_A * R;
  out.h_B = out.q_B * R;
  if (s.D != s.D) out.h_A = out.h_B = out.q_A = out.q_B = s.D;  // a NaN row
  return out;
}

// The same for the log domain: log h = log_h_A + log e above, log_h_B + log e below. log h holds
// where h underflows.
struct LogDensities {
  double R;
  double w_A, w_B;  // H_A / R, H_B / R, right also where R underflows
  double log_h_A, log_h_B;
};

// The steps of densities() by way of logarithms.
SOFTTOPK_HOST_DEVICE LogDensities log_densities(const Solution<double>& s, double alpha) {
  constexpr double inf = kInfinite<double>, ln2 = 0.69314718055994531;
  const bool both = s.P > 0 && s.Q > 0;
  const double log_P = std::log(s.P), log_Q = std::log(s.Q), log_D = std::log(std::abs(s.D));
  double half_gap = (s.r_A - s.r_B) / alpha / 2;
  if (half_gap == inf) half_gap = (s.r_A / 2 - s.r_B / 2) / alpha;
  const double log_c = both ? (log_P + log_Q) / 2 - half_gap : -inf;
  const double most = log_D > log_c ? log_D : log_c, least = log_D > log_c ? log_c : log_D;
  double log_R = most, larger, smaller;  // larger, smaller: log w
  if (most == -inf) {
    larger = smaller = both ? -ln2 : 0;
  } else {
    log_R += std::log1p(std::exp(2 * (least - most))) / 2;
    const double magnitude = std::log1p(std::exp(log_D - log_R));  // log((R + |D|) / R)
    larger = magnitude - ln2;
    smaller = 2 * (log_c - log_R) - magnitude - ln2;
  }
  const double log_w_A = s.P == 0 ? -inf : s.D >= 0 ? larger : smaller;
  const double log_w_B = s.Q == 0 ? -inf : s.D >= 0 ? smaller : larger;
  LogDensities out;
  out.R = std::exp(log_R);
  out.w_A = std::exp(log_w_A);
  out.w_B = std::exp(log_w_B);
  out.log_h_A = s.P == 0 ? -inf : log_w_A + log_R - log_P;
  out.log_h_B = s.Q == 0 ? -inf : log_w_B + log_R - log_Q;
  if (s.D != s.D) out.R = out.w_A = out.w_B = out.log_h_A = out.log_h_B = s.D;  // a NaN row
  return out;
}

// alpha in the compute type: a positive finite one does not round to 0 or to infinity.
template <typename T>
SOFTTOPK_HOST_DEVICE T scale_in(double alpha) {
  constexpr T least = kLeast<T>, most = kMost<T>;
  if (alpha > 0 && alpha < least) return least;
  if (alpha > most && alpha < kInfinite<double>) return most;
  return static_cast<T>(alpha);
}

// t = (x - r) / alpha in the log domain, in units of 2^64: ((x * before - r * before) * rate) does
// not overflow where t does, and is t / 2^64 to the last places of t or 2^-21, if that is more.
// Likewise z / alpha = z * after * rate.
template <typename T>
struct Steps {
  T before, rate, after;
};

template <typename T>
SOFTTOPK_HOST_DEVICE Steps<T> steps(T alpha) {
  constexpr double unit = 1 / 0x1p64;
  const double exact = static_cast<double>(alpha);
  if (exact < unit) return {T(1), static_cast<T>(unit / exact), T(0x1p64)};
  return {T(unit), static_cast<T>(1 / exact), T(1)};
}

// A starting point for the next split, given one that is not right: the root if the split held.
// It never passes the true root, so it tightens a bracket from its own side.
//   above = true:  the root lies above r_A; the result is >= r_A
//   above = false: the root lies at or below r_B; the result is <= r_B
template <typename T>
SOFTTOPK_HOST_DEVICE T closed_form_step(const Solution<T>& s, T alpha, bool above) {
  const T c = coupling(s, alpha);
  const T R = std::hypot(s.D, c);
  // H_A = P exp((b - r_A) / alpha) / 2 = (R + D) / 2, and its mirror image.
  if (above) return s.r_A + alpha * std::log((R + s.D) / s.P);
  return s.r_B - alpha * std::log((R - s.D) / s.Q);
}

}  // namespace softtopk
