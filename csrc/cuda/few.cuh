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
// Without the instructions that numbers below 2^-126 need: they count as 0.
__device__ __forceinline__ float quick_log2(float x) {
  float log;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(x));
  return log;
}
__device__ __forceinline__ float quick_ratio(float a, float b) {
  float ratio;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(ratio) : "f"(a), "f"(b));
  return ratio;
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
  Budget() = default;
  __device__ explicit Budget(double k) : whole(int32_t(rint(k))), rest(float(k - whole)) {}
  __device__ float excess(int32_t count) const { return float(count - whole) - rest; }
};

// What a row's output is written with; right = 0: not found here.
struct Found {
  float r_A, r_B, h_A, h_B;
  int32_t right;
};

// What of the elements a split at c finds: those from c on, counted, the least of them, and the
// largest below. As predicated instructions: what the compiler makes of an if is more.
struct Sides {
  int32_t count;
  float up, down;
  __device__ __forceinline__ void add(float x, float c) {
    asm("{\n"
        ".reg .pred p;\n"
        "setp.ge.f32 p, %3, %4;\n"
        "@p add.s32 %0, %0, 1;\n"
        "@p min.f32 %1, %1, %3;\n"
        "@!p max.f32 %2, %2, %3;\n"
        "}"
        : "+r"(count), "+f"(up), "+f"(down)
        : "f"(x), "f"(c));
  }
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
        rate_(rate) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int32_t place = int32_t(threadIdx.x) % 32 + 32 * i;
      own_[i] = place < count_ ? values_[place] : -infinity<float>;
    }
  }

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
        c = fmaxf(lo + alpha_ * kLn2 * quick_log2(quick_ratio(R + s.D, s.P)), next_up(lo));
      } else {
        hi = s.r_B;
        c = fminf(hi - alpha_ * kLn2 * quick_log2(quick_ratio(R - s.D, s.Q)), hi);
      }
      if (round % 4 == 3 || !(c > lo && c <= hi))
        c = lo + ((hi < infinity<float> ? hi : top_) - lo) / 2;
      if (!(c > lo)) c = next_up(lo);
    }
    return s;
  }

 private:
  static constexpr int kOwn = 4;  // a lane's first candidates, in registers
  static constexpr float kLn2 = 0.6931471805599453f;

  // Also of -inf.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) f(own_[i]);
#pragma unroll 4
    for (int32_t i = int32_t(threadIdx.x) % 32 + 32 * kOwn; i < count_; i += 32) f(values_[i]);
  }
  __device__ static float next_up(float x) { return value_of(key_of(x + 0.0f) + 1); }

  // A value with about k elements at or above it, above L.
  __device__ __forceinline__ float by_count() {
    float lo = L_, hi = top_, at_lo = count_ + 1, at_hi = 0.5f;
    const float wanted = fmaxf(k_.whole + k_.rest, 0.5f), log_wanted = quick_log2(wanted);
#pragma unroll 1
    for (int round = 0; round < 16 && at_lo >= wanted + 1; ++round) {
      // The number above falls about exponentially: three trials near where it should be k. Where
      // it does not, three that quarter the bit patterns.
      float trial[3];
      if (round % 4 == 2) {
        const uint32_t low = key_of(lo), quarter = (key_of(hi) - low) / 4;
#pragma unroll
        for (int i = 0; i < 3; ++i) trial[i] = value_of(low + (i + 1) * quarter + 1);
      } else {
        const float log_lo = quick_log2(at_lo), span = log_lo - quick_log2(at_hi);
        const float step = quick_ratio(hi - lo, span);
        const float aside = fminf(0.22f * step, 0.25f * (hi - lo)) + 1e-3f * (hi - lo);
        const float near = fmaf(log_lo - log_wanted, step, lo);
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          trial[i] = fminf(fmaxf(near + float(i - 1) * aside, lo), hi);
        }
      }
      int32_t reached[2] = {0, 0};  // by the first and the second, and by the third
      for_each([&](float x) {
        if (x >= trial[0]) reached[0] += 1;
        if (x >= trial[1]) reached[0] += 0x10000;
        if (x >= trial[2]) reached[1] += 1;
      });
#pragma unroll
      for (int32_t& sum : reached) sum = __reduce_add_sync(~0u, sum);
      const int32_t counts[3] = {reached[0] & 0xffff, reached[0] >> 16, reached[1]};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const float count = counts[i];
        const bool low = count >= wanted;
        lo = low ? fmaxf(lo, trial[i]) : lo;
        at_lo = low ? fminf(at_lo, count) : at_lo;
        hi = low ? hi : fminf(hi, trial[i]);
        at_hi = low ? at_hi : fmaxf(at_hi, count);
      }
      // At most one value is left, perhaps many times; where the two differ in sign, go on.
      if (__float_as_uint(hi) - __float_as_uint(lo) + GRAIN <= 2 * GRAIN) break;
    }
    return fmaxf(lo, next_up(L_));
  }
  // The split at c and its sums; returns how many elements are >= c.
  __device__ __forceinline__ int32_t split(float c, Solution<float>& s) const {
    Sides sides = {0, infinity<float>, L_};
    for_each([&](float x) { sides.add(x, c); });
    s.r_A = value_of(__reduce_min_sync(~0u, key_of(sides.up))) + 0.0f;  // -0 becomes +0
    s.r_B = value_of(__reduce_max_sync(~0u, key_of(sides.down))) + 0.0f;
    float P = 0, Q = 0;
    for_each([&](float x) {
      const bool above = x >= c;
      const float e = faster_exp2(-fabsf(x - (above ? s.r_A : s.r_B)) * rate_);
      if (above) {
        P += e;
      } else {
        Q += e;
      }
    });
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      P += __shfl_xor_sync(~0u, P, mask);
      Q += __shfl_xor_sync(~0u, Q, mask);
    }
    s.P = P;
    s.Q = Q + T_ * faster_exp2((L_ - s.r_B) * rate_);
    return __reduce_add_sync(~0u, sides.count);
  }

  const float* values_;
  float L_, top_, T_;
  int32_t count_;
  Budget k_;
  float alpha_, rate_;
  float own_[kOwn];
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
