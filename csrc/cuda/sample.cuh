// A window around the threshold of a resident row, from a sample of its elements.
//
// The sample is one element of each of kSample pieces of equal length, at a place of the piece that
// depends on nothing but n. With F the Laplace CDF, the sum of F((x - c) / alpha) over the sample
// is S(c) of the row, but for a scale and an error whose deviation the variance of F in the sample
// tells. L is an element where that sum is about 3 deviations above what k asks for, U one where
// it is as far below: S(L) > k > S(U), nearly always, and the solution found in between is checked.
//
// Both are sought at once, by all warps: in each round four thresholds are tried, two for either
// end. The first are quantiles of 32 sorted elements; the others are where the logit of S should
// reach its aim.
#pragma once

#include "few.cuh"

namespace softtopk::cuda {

inline constexpr int kTrials = 4;          // thresholds in a round
inline constexpr int kSampleOfWarp = 512;  // elements that a warp tries one of them on
inline constexpr int kSampleOfThread = 4;  // elements of the sample for each thread of a block
inline constexpr int kSampleRounds = 8;

// An end that was not found lies beyond all finite elements.
struct Limits {
  float L, U;
};

template <int WARPS>
struct SampleShared {
  float2 sums[WARPS];
  uint2 ends[WARPS];
  float trials[kTrials];
  Limits limits;
  float2 open[2];  // where L and U are still sought; empty where they are not
  int32_t searching;
};

__device__ __forceinline__ float logit_of(float part, float all) {
  return __logf(__fdividef(part + 0.5f, all - part + 0.5f));
}

// One end of the window, as the lanes of the leading warp keep it: those of lower lanes L (sign 1),
// those of higher ones U (sign -1). m = S - wanted - sign * deviations falls in c, is > 0 at lo and
// <= 0 at hi, so that lo serves as L, hi as U.
struct WindowEnd {
  float lo, hi, S_lo, S_hi;
  float miss = infinity<float>;  // by how much the one that serves is wider than it had to be
  float spread;

  __device__ __forceinline__ void add(float c, float S, float s, float wanted, float sign) {
    const float m = S - wanted - sign * s;
    if (m > 0 && c >= lo) {
      lo = c, S_lo = S, spread = s;
      if (sign > 0) miss = m;
    } else if (!(m > 0) && c <= hi) {
      hi = c, S_hi = S, spread = s;
      if (sign < 0) miss = -m;
    }
  }
  template <uint32_t GRAIN>
  __device__ __forceinline__ bool open() const {
    return lo < hi && !(miss <= spread / 6) && key_of(hi) - key_of(lo) > GRAIN;
  }
  // Of two trials a round: one that should just serve, and one that should serve surely or, if such
  // is known, just not. Every third time the middle of the few that were sorted, and past the ties
  // of the end that serves.
  __device__ __forceinline__ float trial(int which, int round, float middle, float reach,
                                         int32_t size, float wanted, float sign) const {
    float c;
    if (round % 3 == 2) {
      c = which == 0 ? middle : sign > 0 ? lo + reach : hi - reach;
    } else {
      const float past = which == 0      ? 0.08f
                         : miss > spread ? 1.0f
                                         : -0.3f,
                  margin = 0.02f * (S_lo - S_hi),
                  aim = fminf(fmaxf(wanted + sign * spread * (1 + past), S_hi + margin),
                              S_lo - margin);
      const float from = logit_of(S_lo, size), to = logit_of(S_hi, size);
      c = lo + (hi - lo) * __fdividef(from - logit_of(aim, size), from - to);
    }
    return c > lo && c < hi ? c : middle;
  }
};

// A warp's values in ascending order.
__device__ __forceinline__ float sorted(float value) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int size = 2; size <= 32; size *= 2) {
#pragma unroll
    for (int mask = size / 2; mask > 0; mask /= 2) {
      const float other = __shfl_xor_sync(~0u, value, mask);
      const bool lesser = ((lane & mask) == 0) == ((lane & size) == 0);
      value = lesser ? fminf(value, other) : fmaxf(value, other);
    }
  }
  return value;
}
// The middle one of those between lo and hi, or of lo and hi.
__device__ __forceinline__ float middle_of(float ascending, float lo, float hi) {
  const int first = __popc(__ballot_sync(~0u, !(ascending > lo))),
            end = __popc(__ballot_sync(~0u, ascending < hi));
  const float middle = __shfl_sync(~0u, ascending, (first + end) / 2);
  return first < end ? middle : lo + (hi - lo) / 2;
}

// Collects the sample into `samples` of every block: kSampleOfThread * H::threads values.
template <class H>
__device__ __forceinline__ void take_sample(const ResidentRow<H>& row, float* samples) {
  using C = typename H::C;
  constexpr uint32_t kSize = kSampleOfThread * H::threads;
  const uint32_t n = uint32_t(row.map().n), length = n / kSize;
#pragma unroll
  for (int i = 0; i < kSampleOfThread; ++i) {
    const uint32_t j = i * H::threads + threadIdx.x;
    const uint32_t at = j * n / kSize + __umulhi(j * 2654435769u, length);
    if constexpr (C::many) {
      if (int(at / row.map().piece_elements()) % C::size() != C::rank()) continue;
      const float x = row.element(int32_t(at));
      for (int b = 0; b < C::size(); ++b) C::at(samples, b)[j] = x;
    } else {
      samples[j] = row.element(int32_t(at));
    }
  }
  C::sync();
}

// The window, the same in all threads; `wanted` is k's share of the sample. GRAIN: by how much the
// keys of neighbouring values differ.
template <uint32_t GRAIN, int WARPS>
__device__ __forceinline__ Limits window_of_sample(const float* samples, float wanted, float rate,
                                                   SampleShared<WARPS>& shared) {
  constexpr int32_t kSize = kSampleOfThread * 32 * WARPS;
  static_assert(kSize / kSampleOfWarp * kTrials == WARPS);
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  const float4 own = reinterpret_cast<const float4*>(samples)[t];
  {
    const float least = fminf(fminf(own.x, own.y), fminf(own.z, own.w)),
                most = fmaxf(fmaxf(own.x, own.y), fmaxf(own.z, own.w));
    const uint32_t low = __reduce_min_sync(~0u, key_of(least)),
                   high = __reduce_max_sync(~0u, key_of(most));
    if (lane == 0) shared.ends[warp] = make_uint2(low, high);
  }
  __syncthreads();

  // Of the leading warp. Which trial a lane makes, and for which end.
  const int mine = lane % kTrials, which = mine % 2;
  const float sign = mine < 2 ? 1.0f : -1.0f;
  const float unit = quick_sqrt(wanted * (kSize - wanted)), root = quick_sqrt(float(kSize)),
              deviations = 3.5f * unit + 2 * root, most = (3 * unit + 2 * root) / root;
  WindowEnd end;
  float c = 0, few = 0, reach = 0;  // reach of ties: past it their F is small
  if (warp == 0) {
    uint2 range = shared.ends[lane % WARPS];
    range.x = __reduce_min_sync(~0u, range.x);
    range.y = __reduce_max_sync(~0u, range.y);
    constexpr float kFar = largest<float> / 8;
    end.lo = fminf(fmaxf(value_of(range.x), -kFar), kFar), end.S_lo = kSize;
    end.hi = fminf(fmaxf(value_of(range.y), -kFar), kFar), end.S_hi = 0.5f;
    reach = fminf(__fdividef(6, rate), (end.hi - end.lo) / 32);
    end.spread = most;
    // First the extremes, and in between once for either end.
    few = sorted(samples[lane * (kSize / 32) + kSize / 64]);
    const float above = (wanted + sign * (most + kSize / 16)) * (32.0f / kSize);
    c = __shfl_sync(~0u, few, min(max(int(32 - above), 0), 31));
    c = which == 0 || !(fabsf(c) < kFar) ? sign > 0 ? end.lo : end.hi : c;
    if (lane < kTrials) shared.trials[lane] = c;
  }
  __syncthreads();
#pragma unroll 1
  for (int round = 0;; ++round) {
    {
      const float at = shared.trials[warp % kTrials];
      const float4* part =
          reinterpret_cast<const float4*>(samples + warp / kTrials * kSampleOfWarp) + lane;
      float sum = 0, squares = 0;  // of 2 F - 1
#pragma unroll
      for (int i = 0; i < kSampleOfWarp / 128; ++i) {
        const float4 x = part[32 * i];
        const auto add = [&](float value) {
          const float d = value - at, f = copysignf(1 - faster_exp2(-fabsf(d) * rate), d);
          sum += f;
          squares += f * f;
        };
        add(x.x), add(x.y), add(x.z), add(x.w);
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(~0u, sum, mask);
        squares += __shfl_xor_sync(~0u, squares, mask);
      }
      if (lane == 0) shared.sums[warp] = make_float2(sum, squares);
    }
    __syncthreads();
    if (warp == 0) {
      float2 total = shared.sums[mine];
#pragma unroll
      for (int i = 1; i < WARPS / kTrials; ++i) {
        total.x += shared.sums[i * kTrials + mine].x;
        total.y += shared.sums[i * kTrials + mine].y;
      }
      // The variance of F, relative to that of a count with the same mean, and so its deviation
      // where the mean is what is wanted.
      const float S = (kSize + total.x) / 2, variance = (total.y - total.x * total.x / kSize) / 4;
      const float ratio = __fdividef(variance, fmaxf(S * (kSize - S), 1e-6f));
      const float s = fminf(deviations * quick_sqrt(fmaxf(ratio, 1e-6f / kSize)), most);
#pragma unroll
      for (int i = 0; i < kTrials; ++i) {
        end.add(__shfl_sync(~0u, c, i), __shfl_sync(~0u, S, i), __shfl_sync(~0u, s, i), wanted,
                sign);
      }
      const bool open = end.template open<GRAIN>(),
                 searching = round + 1 < kSampleRounds && __any_sync(~0u, open);
      const bool found = end.miss < infinity<float>;
      const float middle_L =
                      middle_of(few, __shfl_sync(~0u, end.lo, 0), __shfl_sync(~0u, end.hi, 0)),
                  middle_U = middle_of(few, __shfl_sync(~0u, end.lo, kTrials - 1),
                                       __shfl_sync(~0u, end.hi, kTrials - 1));
      if (open) {
        c = end.trial(which, round + 1, sign > 0 ? middle_L : middle_U, reach, kSize, wanted, sign);
      }
      if (lane < kTrials) shared.trials[lane] = c;
      if (lane == 0) shared.limits.L = found ? end.lo : -infinity<float>;
      if (lane == kTrials / 2) shared.limits.U = found ? end.hi : infinity<float>;
      if (which == 0 && lane < kTrials) {
        shared.open[mine / 2] = open ? make_float2(end.lo, end.hi) : make_float2(0, 0);
      }
      if (lane == 0) shared.searching = searching;
    }
    __syncthreads();
    if (!shared.searching) break;
    if (round >= 2) {  // is it about more than a few elements of the sample?
      const float2 at_L = shared.open[0], at_U = shared.open[1];
      const auto inside = [&](float x) {
        return (x > at_L.x && x < at_L.y) || (x > at_U.x && x < at_U.y);
      };
      const bool any = inside(own.x) || inside(own.y) || inside(own.z) || inside(own.w);
      if (__syncthreads_count(any) <= kSize / 128) break;
    }
  }

  // The elements next to them, outwards.
  const float L = shared.limits.L, U = shared.limits.U;
  uint32_t low = 0, high = ~0u;
  const auto look = [&](float x) {
    if (x <= L) low = max(low, key_of(x));
    if (x >= U) high = min(high, key_of(x));
  };
  look(own.x), look(own.y), look(own.z), look(own.w);
  low = __reduce_max_sync(~0u, low);
  high = __reduce_min_sync(~0u, high);
  if (lane == 0) shared.ends[warp] = make_uint2(low, high);
  __syncthreads();
  uint2 ends = shared.ends[lane % WARPS];
  low = __reduce_max_sync(~0u, ends.x);
  high = __reduce_min_sync(~0u, ends.y);
  constexpr float kFar = largest<float>;
  return {low > key_of(-kFar) ? value_of(low) : -kFar, high < key_of(kFar) ? value_of(high) : kFar};
}

}  // namespace softtopk::cuda
