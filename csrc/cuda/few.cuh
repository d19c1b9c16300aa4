// The search among few candidates by one warp, without calls or double precision: while it works
// the other warps of its row wait, and a call would cost every value that lives across it a trip to
// memory.
#pragma once

#include "window.cuh"

namespace softtopk::cuda {

inline constexpr int kFew = 2304;  // candidates

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

// k as the nearest whole number and the rest, so that a count less k is exact, also next to a whole
// number.
struct Budget {
  int32_t whole;
  float rest;
  __device__ explicit Budget(double k) : whole(int32_t(rint(k))), rest(float(k - whole)) {}
  __device__ float excess(int32_t count) const { return float(count - whole) - rest; }
};

// What a row's output is written with; right = 0: not found here.
struct Found {
  float r_A, r_B, h_A, h_B;
  int32_t right;
};

// GRAIN: by how much the keys of neighbouring values differ.
template <uint32_t GRAIN>
class FewSearch {
 public:
  __device__ __forceinline__ FewSearch(const float* values, const Window& window,
                                       int32_t candidates, float T, const Budget& k, float alpha,
                                       float rate)
      : values_(values),
        L_(window.L),
        top_(candidates > 0 ? window.max : window.L),
        T_(T),
        count_(candidates),
        k_(k),
        alpha_(alpha),
        rate_(rate) {}

  // The solution is right if `right` is not 0.
  __device__ __forceinline__ Solution<float> solve(int32_t& right) {
    Solution<float> s;
    float lo = L_, hi = infinity<float>;  // elements: lo is in B, hi in A
    float c = (top_ - lo) * rate_ < 8 ? next_up(lo) : by_count();
    right = 0;
#pragma unroll 1
    for (int round = 0; round < 24; ++round) {
      s.D = k_.excess(split(c, s));
      const float gap = faster_exp2((s.r_B - s.r_A) * rate_);
      const float at_A = s.D - s.P / 2 + s.Q * gap / 2, at_B = s.D - s.P * gap / 2 + s.Q / 2;
      constexpr float tolerance = 2 * epsilon<float>;
      const bool raise = s.r_A < hi && at_A > tolerance * (s.P + s.Q * gap);
      const bool lower = s.r_B > lo && at_B < -tolerance * (s.P * gap + s.Q);
      if (!raise && !lower) {
        right = at_A <= tolerance * (s.P + s.Q * gap) && at_B >= -tolerance * (s.P * gap + s.Q);
        break;
      }
      // The root if no other element lay between; it is never passed.
      const float R = quick_hypot(fabsf(s.D), quick_sqrt(s.P) * quick_sqrt(s.Q) * quick_sqrt(gap));
      if (raise) {
        lo = s.r_A;
        c = fmaxf(lo + alpha_ * __logf(__fdividef(R + s.D, s.P)), next_up(lo));
      } else {
        hi = s.r_B;
        c = fminf(hi - alpha_ * __logf(__fdividef(R - s.D, s.Q)), hi);
      }
      if (round % 4 == 3 || !(c > lo && c <= hi))
        c = lo + ((hi < infinity<float> ? hi : top_) - lo) / 2;
      if (!(c > lo)) c = next_up(lo);
    }
    return s;
  }

 private:
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll 4
    for (int32_t i = int32_t(threadIdx.x) % 32; i < count_; i += 32) f(values_[i]);
  }
  __device__ static float next_up(float x) { return value_of(key_of(x + 0.0f) + 1); }

  // A value with about k elements at or above it, above L.
  __device__ __forceinline__ float by_count() {
    float lo = L_, hi = top_, at_lo = count_ + 1, at_hi = 0.5f;
    const float wanted = fmaxf(k_.whole + k_.rest, 0.5f);
#pragma unroll 1
    for (int round = 0; round < 16 && at_lo >= wanted + 1; ++round) {
      // The number above falls about exponentially: three trials near where it should be k. Where
      // it does not, three that quarter the bit patterns.
      const float span = __logf(__fdividef(at_lo, at_hi)),
                  share = __fdividef(__logf(__fdividef(at_lo, wanted)), span);
      const float aside = fminf(__fdividef(0.15f, span), 0.25f) + 1e-3f;
      const uint32_t low = key_of(lo), quarter = (key_of(hi) - low) / 4;
      float trial[3];
      int32_t reached[3] = {0, 0, 0};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const float near = lo + (hi - lo) * (share + float(i - 1) * aside);
        trial[i] = round % 3 == 2 ? value_of(low + (i + 1) * quarter + 1)
                                  : fminf(fmaxf(near, next_up(lo)), hi);
      }
      for_each([&](float x) {
#pragma unroll
        for (int i = 0; i < 3; ++i) reached[i] += x >= trial[i];
      });
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const float count = __reduce_add_sync(~0u, reached[i]);
        if (count >= wanted) {
          if (trial[i] > lo) lo = trial[i], at_lo = count;
        } else if (trial[i] < hi) {
          hi = trial[i];
          at_hi = fmaxf(count, 0.5f);
        }
      }
      if (key_of(hi) - key_of(lo) <= GRAIN) break;  // at most one value is left, perhaps many times
    }
    return fmaxf(lo, next_up(L_));
  }
  // The split at c and its sums; returns how many elements are >= c.
  __device__ __forceinline__ int32_t split(float c, Solution<float>& s) const {
    int32_t count = 0;
    float up = infinity<float>, down = L_, P = 0, Q = 0;
    for_each([&](float x) {
      const bool above = x >= c;
      const float e = faster_exp2(-fabsf(x - c) * rate_);
      count += above;
      up = fminf(up, above ? x : infinity<float>);
      down = fmaxf(down, above ? L_ : x);
      P += above ? e : 0.0f;
      Q += above ? 0.0f : e;
    });
    s.r_A = value_of(__reduce_min_sync(~0u, key_of(up))) + 0.0f;  // -0 becomes +0
    s.r_B = value_of(__reduce_max_sync(~0u, key_of(down))) + 0.0f;
    // Relative to c the sums are as exact, unless c lies far from the elements next to it.
    const float to_A = s.r_A < infinity<float> ? (s.r_A - c) * rate_ : 0,
                to_B = (c - s.r_B) * rate_;
    if (to_A > 4 || to_B > 4) {
      const float at_A = s.r_A < infinity<float> ? s.r_A : 0, at_B = s.r_B;
      P = Q = 0;
      for_each([&](float x) {
        const bool above = x >= c;
        const float e = faster_exp2(-fabsf(x - (above ? at_A : at_B)) * rate_);
        P += above ? e : 0.0f;
        Q += above ? 0.0f : e;
      });
    } else {
      P *= faster_exp2(to_A);
      Q *= faster_exp2(to_B);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      P += __shfl_xor_sync(~0u, P, mask);
      Q += __shfl_xor_sync(~0u, Q, mask);
    }
    s.P = P;
    s.Q = Q + T_ * faster_exp2((L_ - s.r_B) * rate_);
    return __reduce_add_sync(~0u, count);
  }

  const float* values_;
  float L_, top_, T_;
  int32_t count_;
  Budget k_;
  float alpha_, rate_;
};

// densities() of csrc/laplace.h in fewer instructions, for rows that are not NaN.
__device__ __forceinline__ Densities<float> quick_densities(const Solution<float>& s, float rate) {
  const bool both = s.P > 0 && s.Q > 0;
  const float c =
      both ? quick_sqrt(s.P) * quick_sqrt(s.Q) * faster_exp2((s.r_B - s.r_A) * (rate / 2)) : 0.0f;
  const float magnitude = fabsf(s.D);
  Densities<float> d;
  d.R = quick_hypot(magnitude, c);
  float larger = (1 + __fdividef(magnitude, d.R)) / 2;
  float smaller = __fdividef(c, d.R) * __fdividef(c, d.R + magnitude) / 2;
  if (d.R == 0) larger = smaller = both ? 0.5f : 1.0f;
  d.q_A = s.P > 0 ? __fdividef(s.D >= 0 ? larger : smaller, s.P) : 0.0f;
  d.q_B = s.Q > 0 ? __fdividef(s.D >= 0 ? smaller : larger, s.Q) : 0.0f;
  d.h_A = d.q_A * d.R;
  d.h_B = d.q_B * d.R;
  return d;
}

}  // namespace softtopk::cuda
