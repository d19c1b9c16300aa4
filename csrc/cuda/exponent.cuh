// Both tails of a row from one exponential and one origin.
//
// With hi = a rounded product, x * rate - hi in one fused operation is rounded once, however large
// the two are: relative to an origin h, r_B * rate or the next number above it,
//
//   z = x * rate - h,   e^(-(x - r_A) / alpha) = 2^(z_A) 2^(-|z|)  from r_A on,
//                       e^(-(r_B - x) / alpha) = 2^(-z_B) 2^(-|z|) up to r_B.
//
// It lies next to r_B because 2^(-|z|) is 0 below 2^-126: the lower tail reaches as far down.
#pragma once

#include "threshold.cuh"

namespace softtopk::cuda {

struct Origin {
  float rate, h, z_A, z_B;
  bool serves;  // lies between the two, and the distance costs no accuracy; NaN does not

  // `most`: how far apart r_A and r_B may lie, in units of alpha ln 2. Where one side is empty, the
  // other has the origin.
  __device__ __forceinline__ Origin(float r_A, float r_B, float rate, float most)
      : rate(rate), h((r_B > -infinity<float> ? r_B : r_A) * rate) {
    const bool has_A = r_A<infinity<float>, has_B = r_B> - infinity<float>;
    if (has_B ? z(r_B) > 0 : z(r_A) < 0)
      h = nextafterf(h, has_B ? infinity<float> : -infinity<float>);
    z_A = has_A ? z(r_A) : 0;
    z_B = has_B ? z(r_B) : 0;
    serves = z_A >= 0 && z_B <= 0 && z_A - z_B <= most;
  }
  __device__ __forceinline__ float z(float x) const { return fmaf(x, rate, -h); }
  // From the threshold to the origin, in the units of z: h = 2^(-|z + shift|) / 2 on both sides,
  // for h = h_A e above and h_B e below (csrc/laplace.h).
  __device__ __forceinline__ float shift(float h_A, float h_B) const {
    return h_A >= h_B ? -(__log2f(2 * h_A) + z_A) : __log2f(2 * h_B) - z_B;
  }
  // What a factor of either side's tail becomes.
  __device__ __forceinline__ float of_A(float factor) const { return factor * faster_exp2(z_A); }
  __device__ __forceinline__ float of_B(float factor) const { return factor * faster_exp2(-z_B); }
};

}  // namespace softtopk::cuda
