// A window around the threshold of a resident row, from a sample of its elements.
//
// The sample is one element of each of kSample pieces of equal length, at a place of the piece that
// depends on nothing but n. With F the Laplace CDF, the sum of F((x - c) / alpha) over the sample
// is S(c) of the row, but for a scale and an error whose deviation the variance of F in the sample
// tells. L is an element where that sum is about 3 deviations above what k asks for, U one where
// it is as far below: S(L) > k > S(U), nearly always, and the solution found in between is checked.
//
// Every thread holds some of the sample in registers. In a round all of them try the same four
// thresholds: first elements of the sample itself, then two for L and two for U, either side of
// where the logit of S should reach its aim. Every warp decides for itself, L in its lower lanes
// and U in its upper ones. Eight thresholds a round, in fewer rounds, were slower: registers did
// not suffice.
#pragma once

#include "few.cuh"

namespace softtopk::cuda {

// Elements of the sample of a block of THREADS.
template <int THREADS>
inline constexpr int kSampleSize = THREADS == 64 ? 512 : 1024;
inline constexpr int kSampleRounds = 6;
inline constexpr int kTrials = 4;  // thresholds that are tried in a round

// An end that was not found lies beyond all finite elements.
struct Limits {
  float L, U;
};

template <int WARPS>
struct SampleShared {
  float sums[2][WARPS][2 * kTrials];  // of two rounds: a warp may be ahead by one
  uint32_t extremes[WARPS][2], ends[WARPS][2];
};

__device__ __forceinline__ float logit_of(float part, float all) {
  return __logf(__fdividef(part + 0.5f, all - part + 0.5f));
}

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

// The sums of N values each over a warp: that of values[i] in the 32 / N lanes from i * 32 / N on.
template <int N>
__device__ __forceinline__ float sum_of_each(float (&values)[N]) {
#pragma unroll
  for (int half = N / 2, mask = 16; half > 0; half /= 2, mask /= 2) {
    const bool upper = int(threadIdx.x) & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? values[i + half] : values[i],
                  given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(~0u, given, mask);
    }
  }
#pragma unroll
  for (int mask = 16 / N; mask > 0; mask /= 2) {
    values[0] += __shfl_xor_sync(~0u, values[0], mask);
  }
  return values[0];
}

// Collects the sample into `samples` of every block: kSampleSize values.
template <class H>
__device__ __forceinline__ void take_sample(const ResidentRow<H>& row, float* samples) {
  using C = typename H::C;
  constexpr uint32_t kSize = kSampleSize<H::threads>;
  const uint32_t n = uint32_t(row.map().n), length = n / kSize;
#pragma unroll
  for (int i = 0; i < int(kSize) / H::threads; i += 4) {
    const uint32_t first = i * H::threads + 4 * threadIdx.x;
    float4 x;
    float* const each = &x.x;
    bool mine[4];
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      const uint32_t at = (first + j) * n / kSize + __umulhi((first + j) * 2654435769u, length);
      mine[j] = !C::many || int(at / row.map().piece_elements()) % C::size() == C::rank();
      if (mine[j]) each[j] = row.element(int32_t(at));
    }
    for (int b = 0; b < C::size(); ++b) {
      float* to = C::at(samples, b) + first;
      if (mine[0] && mine[1] && mine[2] && mine[3]) {
        *reinterpret_cast<float4*>(to) = x;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (mine[j]) to[j] = each[j];
        }
      }
    }
  }
  C::sync();
}

// The window, the same in all threads. `wanted` is k's share of the sample. GRAIN: by how much the
// keys of neighbouring values differ.
template <uint32_t GRAIN, int THREADS>
__device__ __forceinline__ Limits window_of_sample(const float* samples, float wanted, float rate,
                                                   SampleShared<THREADS / 32>& shared) {
  constexpr float kFar = largest<float>;
  constexpr int kSize = kSampleSize<THREADS>, kWarps = THREADS / 32, kOwn = kSize / THREADS,
                kLanes = 16 / kTrials;  // that have the same sum
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32, entry = lane % 16;
  const float sign = lane < 16 ? 1.0f : -1.0f;  // which end a lane is about: L or U
  float own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i += 4) {
    const float4 x = reinterpret_cast<const float4*>(samples)[i / 4 * THREADS + t];
    own[i] = x.x, own[i + 1] = x.y, own[i + 2] = x.z, own[i + 3] = x.w;
  }
  const float unit = quick_sqrt(wanted * (kSize - wanted)), root = quick_sqrt(float(kSize)),
              deviations = 3.5f * unit + 2 * root, most = (3 * unit + 2 * root) / root;

  // m = S - wanted - sign * deviations falls in c, is > 0 at lo and <= 0 at hi: lo serves as L, hi
  // as U. `miss`: by how much the one that serves is wider than it had to be.
  float lo, hi, S_lo = kSize, S_hi = 0.5f, miss = infinity<float>, spread = most;
  // First elements either side of where it should be, of a few; where alpha is large, the threshold
  // can be anywhere.
  const float few = sorted(samples[lane * (kSize / 32) + kSize / 64]);
  const float least = __shfl_sync(~0u, few, 0), range = __shfl_sync(~0u, few, 31) - least;
  const int below = 32 - int(wanted * (32.0f / kSize));
  int from = ::min(::max(below - kTrials + 2 * (entry % kTrials), 0), 31);
  if (!(range * rate >= 64)) from = (entry % kTrials) * 31 / (kTrials - 1);
  float mine = __shfl_sync(~0u, few, from);  // a lane's trial
  mine = fminf(fmaxf(mine, -kFar / 8), kFar / 8);
  int each = kTrials;  // trials for an end

#pragma unroll 1
  for (int round = 1;; ++round) {
    float c[kTrials], sums[2 * kTrials];  // of f = 2 F - 1 and of its square
#pragma unroll
    for (int i = 0; i < kTrials; ++i) {
      c[i] = rate * __shfl_sync(~0u, mine, each == kTrials || i < each ? i : 16 + i - each);
      sums[i] = sums[i + kTrials] = 0;
    }
#pragma unroll
    for (float x : own) {
#pragma unroll
      for (int i = 0; i < kTrials; ++i) {
        const float z = fmaf(x, rate, -c[i]), f = copysignf(1 - faster_exp2(-fabsf(z)), z);
        sums[i] += f;
        sums[i + kTrials] = fmaf(f, f, sums[i + kTrials]);
      }
    }
    float total = sum_of_each(sums);  // of sum lane / kLanes
    float (&of_warps)[kWarps][2 * kTrials] = shared.sums[round % 2];
    if (lane % kLanes == 0) of_warps[warp][lane / kLanes] = total;
    if (round == 1) {
      float min = own[0], max = own[0];
#pragma unroll
      for (float x : own) min = fminf(min, x), max = fmaxf(max, x);
      const uint32_t key_min = __reduce_min_sync(~0u, key_of(min)),
                     key_max = __reduce_max_sync(~0u, key_of(max));
      if (lane == 0) shared.extremes[warp][0] = key_min, shared.extremes[warp][1] = key_max;
    }
    __syncthreads();
    total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w += 2) total += of_warps[w + lane % 2][lane / kLanes];
    total += __shfl_xor_sync(~0u, total, 1);
    if (round == 1) {
      const int w = lane % kWarps;
      lo = fmaxf(value_of(__reduce_min_sync(~0u, shared.extremes[w][0])), -kFar / 8);
      hi = fminf(value_of(__reduce_max_sync(~0u, shared.extremes[w][1])), kFar / 8);
    }
    // The variance of F, relative to that of a count with the same mean, and so its deviation where
    // the mean is what is wanted.
    const float squares = __shfl_down_sync(~0u, total, 16), S_here = (kSize + total) / 2,
                variance = (squares - total * total / kSize) / 4,
                ratio = __fdividef(variance, fmaxf(S_here * (kSize - S_here), 1e-6f)),
                s_here = fminf(deviations * quick_sqrt(fmaxf(ratio, 1e-6f / kSize)), most);
    const int place = kLanes * ((entry & (each - 1)) + (each == kTrials || lane < 16 ? 0 : each));
    const float S = __shfl_sync(~0u, S_here, place), s = __shfl_sync(~0u, s_here, place),
                m = S - wanted - sign * s;
    // The trials ascend: the last with m > 0 is the new lo, the one after it the new hi.
    const uint32_t both = __ballot_sync(~0u, entry < each && m > 0),
                   low = (lane < 16 ? both : both >> 16) & 0xffffu;
    const int before = 31 - __clz(int(low)), after = before + 1, base = lane & 16;
    const int of_lo = base + ::max(before, 0), of_hi = base + ::min(after, each - 1);
    const float c_lo = __shfl_sync(~0u, mine, of_lo), c_hi = __shfl_sync(~0u, mine, of_hi),
                S_at_lo = __shfl_sync(~0u, S, of_lo), S_at_hi = __shfl_sync(~0u, S, of_hi),
                s_lo = __shfl_sync(~0u, s, of_lo), s_hi = __shfl_sync(~0u, s, of_hi);
    if (before >= 0) {
      lo = c_lo, S_lo = S_at_lo;
      if (sign > 0) miss = S_lo - wanted - s_lo, spread = s_lo;
    }
    if (after < each) {
      hi = c_hi, S_hi = S_at_hi;
      if (sign < 0) miss = wanted - S_hi - s_hi, spread = s_hi;
    }
    const bool open = lo < hi && !(miss <= spread / 6) && key_of(hi) - key_of(lo) > GRAIN;
    if (round == kSampleRounds || !__any_sync(~0u, open)) break;
    // Next: near where one should just serve and further to either side, or evenly in between.
    // While none is known to serve, the extreme too.
    each = kTrials / 2;
    const float margin = 0.02f * (S_lo - S_hi),
                aim = fminf(fmaxf(wanted + sign * spread * 1.08f, S_hi + margin), S_lo - margin),
                at = logit_of(S_lo, kSize), to = logit_of(S_hi, kSize),
                near = __fdividef(at - logit_of(aim, kSize), at - to);
    const bool upper = entry >= each / 2;
    const float aside = 0.12f;
    float share = upper ? near + (1 - near) * aside : near - near * aside;
    if (round % 3 == 0 || !(share > 0 && share < 1)) share = (entry + 1) * (1.0f / (each + 1));
    mine = fminf(fmaxf(lo + (hi - lo) * share, lo), hi);
    if (!(miss < infinity<float>) && sign > 0 && entry == 0) mine = lo;
    if (!(miss < infinity<float>) && sign < 0 && entry == each - 1) mine = hi;
  }
  // The elements next to what serves, outwards; side by side, both ends are the same to look for.
  const float serves = miss < infinity<float> ? sign * (sign > 0 ? lo : hi) : -kFar;
  const float at_L = __shfl_sync(~0u, serves, 0), at_U = __shfl_sync(~0u, serves, 16);
  float next_L = -kFar, next_U = -kFar;
#pragma unroll
  for (float x : own) {
    if (x <= at_L) next_L = fmaxf(next_L, x);
    if (-x <= at_U) next_U = fmaxf(next_U, -x);
  }
  const uint32_t key_L = __reduce_max_sync(~0u, key_of(next_L)),
                 key_U = __reduce_max_sync(~0u, key_of(next_U));
  if (lane == 0) shared.ends[warp][0] = key_L, shared.ends[warp][1] = key_U;
  __syncthreads();
  const int w = lane % kWarps;
  return {value_of(__reduce_max_sync(~0u, shared.ends[w][0])),
          -value_of(__reduce_max_sync(~0u, shared.ends[w][1]))};
}

}  // namespace softtopk::cuda
