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
