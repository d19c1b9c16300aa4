// The search among few candidates by one warp, without calls or double precision: while it works the
// other warps of its row wait, and a call would cost every value that lives across it a trip to memory.
#pragma once

#include "window.cuh"

namespace softtopk::cuda {

inline constexpr int kFew = 1024;  // candidates

__device__ __forceinline__ float quick_sqrt(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
// sqrt(a a + b b) for a, b >= 0, without overflow or underflow.
__device__ __forceinline__ float quick_hypot(float a, float b) {
  const float most = fmaxf(a, b), ratio = most > 0 ? __fdividef(fminf(a, b), most) : 0;
  return most * quick_sqrt(1 + ratio * ratio);
}

// k as a whole number and the rest, so that a count less k is exact.
struct Budget {
  int32_t whole;
  float rest;
  __device__ float excess(int32_t count) const { return float(count - whole) - rest; }
};

// What a row's output is written with; right = 0: not found here.
struct Found {
  float r_A, r_B, h_A, h_B;
  int32_t right;
};

class FewSearch {
 public:
  __device__ __forceinline__ FewSearch(const float* values, const Window& window, int32_t candidates, float T,
                                       const Budget& k, float alpha, float rate)
      : values_(values), L_(window.L), top_(candidates > 0 ? window.max : window.L), T_(T),
        count_(candidates), k_(k), alpha_(alpha), rate_(rate) {}

  // The solution is right if `right` is not 0.
  __device__ __forceinline__ Solution<float> solve(int32_t& right) {
    Solution<float> s;
    right = 0;
    float lo = L_, hi = infinity<float>;  // S(lo) > k; S(hi) <= k as far as is known
    float c = (top_ - lo) * rate_ < 8 ? lo : by_count();
#pragma unroll 1
    for (int round = 0; round < 16; ++round) {
      s.r_A = s.r_B = c;
      const int32_t count = sums(s);
      s.D = k_.excess(count);
      (s.D - s.P / 2 + s.Q / 2 > 0 ? lo : hi) = c;
      // The root if no element lies between it and c; the number there tells.
      const float R = quick_hypot(fabsf(s.D), quick_sqrt(s.P) * quick_sqrt(s.Q));
      float root = s.D >= 0 ? c + alpha_ * __logf(__fdividef(R + s.D, s.P))
                            : c - alpha_ * __logf(__fdividef(R - s.D, s.Q));
      if (!(root > lo && root < hi)) root = lo + ((hi < infinity<float> ? hi : top_) - lo) / 2;
      if (split(s.D == 0 ? c : root, s) == count) {
        sums(s);
        const float g = faster_exp2((s.r_B - s.r_A) * rate_);
        const float at_A = s.D - s.P / 2 + s.Q * g / 2, at_B = s.D - s.P * g / 2 + s.Q / 2;
        constexpr float tolerance = 2 * epsilon<float>;
        if (at_A <= tolerance * (s.P + s.Q * g) && at_B >= -tolerance * (s.P * g + s.Q)) {
          right = 1;
          return s;
        }
        // Past the root, or short of it: on to the next element on that side.
        if (at_A > 0) {
          lo = fmaxf(lo, s.r_A);
          Solution<float> next;
          split(value_of(key_of(s.r_A) + 1), next);
          root = fminf(next.r_A, top_);
        } else {
          hi = fminf(hi, s.r_A);
          root = s.r_B;
        }
      }
      c = root;
    }
    return s;
  }

 private:
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll 4
    for (int32_t i = int32_t(threadIdx.x) % 32; i < count_; i += 32) f(values_[i]);
  }
  // An element with about k at or above it.
  __device__ __forceinline__ float by_count() {
    float lo = L_, hi = top_, at_lo = count_ + 1, at_hi = 0.5f;
    const float wanted = fmaxf(k_.whole + k_.rest, 0.5f);
#pragma unroll 1
    for (int round = 0; round < 40 && lo < hi && at_lo >= wanted + 1; ++round) {
      // The number above falls about exponentially; where it does not, halve the bit patterns.
      const float share = __fdividef(__logf(__fdividef(at_lo, wanted)), __logf(__fdividef(at_lo, at_hi)));
      float c = lo + (hi - lo) * share;
      if (round % 3 == 2 || !(c > lo) || !(c <= hi)) {
        const uint32_t low = key_of(lo), high = key_of(hi);
        c = value_of(low + (high - low) / 2 + 1);
      }
      int32_t reached = 0;
      for_each([&](float x) { reached += x >= c; });
      const float count = __reduce_add_sync(~0u, reached);
      if (count >= wanted) {
        lo = c;
        at_lo = count;
      } else if (hi == c) {
        break;
      } else {
        hi = c;
        at_hi = fmaxf(count, 0.5f);
      }
    }
    return lo;
  }
  // P relative to r_A and Q to r_B; returns how many elements are >= r_A.
  __device__ __forceinline__ int32_t sums(Solution<float>& s) const {
    const float at_A = s.r_A < infinity<float> ? s.r_A : 0, r_A = s.r_A, r_B = s.r_B;
    int32_t count = 0;
    float P = 0, Q = 0;
    for_each([&](float x) {
      const bool above = x >= r_A;
      const float e = faster_exp2(-fabsf(x - (above ? at_A : r_B)) * rate_);
      count += above;
      P += above ? e : 0.0f;
      Q += above ? 0.0f : e;
    });
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      P += __shfl_xor_sync(~0u, P, mask);
      Q += __shfl_xor_sync(~0u, Q, mask);
    }
    s.P = P;
    s.Q = Q + T_ * faster_exp2((L_ - r_B) * rate_);
    return __reduce_add_sync(~0u, count);
  }
  // The elements next to c; returns how many are >= c.
  __device__ __forceinline__ int32_t split(float c, Solution<float>& s) const {
    int32_t count = 0;
    float up = infinity<float>, down = L_;
    for_each([&](float x) {
      const bool above = x >= c;
      count += above;
      up = fminf(up, above ? x : infinity<float>);
      down = fmaxf(down, above ? L_ : x);
    });
    s.r_A = value_of(__reduce_min_sync(~0u, key_of(up))) + 0.0f;  // -0 becomes +0
    s.r_B = value_of(__reduce_max_sync(~0u, key_of(down))) + 0.0f;
    return __reduce_add_sync(~0u, count);
  }

  const float* values_;
  float L_, top_, T_;
  int32_t count_;
  Budget k_;
  float alpha_, rate_;
};

// densities() of csrc/laplace.h in fewer instructions, for a solution that is right.
__device__ __forceinline__ void quick_densities(const Solution<float>& s, float rate, float& h_A, float& h_B) {
  const bool both = s.P > 0 && s.Q > 0;
  const float c =
      both ? quick_sqrt(s.P) * quick_sqrt(s.Q) * faster_exp2((s.r_B - s.r_A) * (rate / 2)) : 0.0f;
  const float magnitude = fabsf(s.D), R = quick_hypot(magnitude, c);
  float larger = (1 + __fdividef(magnitude, R)) / 2;
  float smaller = __fdividef(c, R) * __fdividef(c, R + magnitude) / 2;
  if (R == 0) larger = smaller = both ? 0.5f : 1.0f;
  h_A = s.P > 0 ? (s.D >= 0 ? larger : smaller) * __fdividef(R, s.P) : 0.0f;
  h_B = s.Q > 0 ? (s.D >= 0 ? smaller : larger) * __fdividef(R, s.Q) : 0.0f;
}

}  // namespace softtopk::cuda
