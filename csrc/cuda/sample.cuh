// A window around the threshold of a resident row, from a sample of its elements.
//
// The sample is one element of each of kSample pieces of equal length, at a place of the piece that
// depends on nothing but n. With F the Laplace CDF, the sum of F((x - c) / alpha) over the sample
// is S(c) of the row, but for a scale and an error whose deviation the variance of F in the sample
// tells. L is an element where that sum is about 3 deviations above what k asks for, U one where
// it is as far below: S(L) > k > S(U), nearly always, and the solution found in between is checked.
//
// One warp seeks L and another U, without a word to each other or a barrier: in each round two
// thresholds are tried. The first are the extremes and a quantile of 32 sorted elements; the others
// are where the logit of S should reach its aim.
#pragma once

#include "few.cuh"

namespace softtopk::cuda {

// Elements of the sample of a block of THREADS.
template <int THREADS>
inline constexpr int kSampleSize = THREADS == 64 ? 512 : 1024;
inline constexpr int kSampleRounds = 8;

// An end that was not found lies beyond all finite elements.
struct Limits {
  float L, U;
};

__device__ __forceinline__ float logit_of(float part, float all) {
  return __logf(__fdividef(part + 0.5f, all - part + 0.5f));
}

// One end of the window: L (sign 1) or U (sign -1). m = S - wanted - sign * deviations falls in c,
// is > 0 at lo and <= 0 at hi, so that lo serves as L, hi as U.
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
  // is known, just not. Every third time the middle of the few that were sorted, or the extreme
  // while none is known to serve, and past the ties of the end that serves.
  __device__ __forceinline__ float trial(int which, int round, float middle, float reach,
                                         int32_t size, float wanted, float sign) const {
    float c;
    if (round % 3 == 2 && which == 0 && !(miss < infinity<float>)) return sign > 0 ? lo : hi;
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

// Collects the sample into `samples` of every block: kSampleSize values.
template <class H>
__device__ __forceinline__ void take_sample(const ResidentRow<H>& row, float* samples) {
  using C = typename H::C;
  constexpr uint32_t kSize = kSampleSize<H::threads>;
  const uint32_t n = uint32_t(row.map().n), length = n / kSize;
#pragma unroll
  for (int i = 0; i < int(kSize) / H::threads; ++i) {
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

// One end of the window, by one warp: the element of the sample from which on S is large enough for
// L (sign 1), or small enough for U (sign -1). `wanted` is k's share of the sample. GRAIN: by how
// much the keys of neighbouring values differ.
template <uint32_t GRAIN, int SIZE>
__device__ __forceinline__ float end_of_window(const float* samples, float wanted, float rate,
                                               float sign) {
  constexpr float kFar = largest<float>;
  const int lane = int(threadIdx.x) % 32, which = lane % 2;
  const auto for_each = [&](auto f) {
#pragma unroll 4
    for (int i = 0; i < SIZE / 128; ++i) {
      const float4 x = reinterpret_cast<const float4*>(samples)[32 * i + lane];
      f(x.x), f(x.y), f(x.z), f(x.w);
    }
  };
  float min = infinity<float>, max = -infinity<float>;
  for_each([&](float x) {
    min = fminf(min, x);
    max = fmaxf(max, x);
  });
  min = value_of(__reduce_min_sync(~0u, key_of(min)));
  max = value_of(__reduce_max_sync(~0u, key_of(max)));
  const float unit = quick_sqrt(wanted * (SIZE - wanted)), root = quick_sqrt(float(SIZE)),
              deviations = 3.5f * unit + 2 * root, most = (3 * unit + 2 * root) / root;
  WindowEnd end;
  end.lo = fminf(fmaxf(min, -kFar / 8), kFar / 8), end.S_lo = SIZE;
  end.hi = fminf(fmaxf(max, -kFar / 8), kFar / 8), end.S_hi = 0.5f;
  end.spread = most;
  // Of ties: past it their F is small.
  const float reach = fminf(__fdividef(6, rate), (end.hi - end.lo) / 32);
  // First either side of where it may be among a few; where alpha is large, perhaps there is none,
  // which the extreme tells.
  const float few = sorted(samples[lane * (SIZE / 32) + SIZE / 64]);
  const int above = int((wanted + sign * (most + SIZE / 16)) * (32.0f / SIZE));
  float c[2] = {__shfl_sync(~0u, few, ::min(::max(32 - above + int(2 * sign), 0), 31)),
                __shfl_sync(~0u, few, ::min(::max(32 - above, 0), 31))};
  if ((end.hi - end.lo) * rate < 64 || !(fabsf(c[0]) < kFar / 8)) c[0] = sign > 0 ? end.lo : end.hi;
  if (!(fabsf(c[1]) < kFar / 8)) c[1] = c[0];
#pragma unroll 1
  for (int round = 1;; ++round) {
    float sum[2] = {0, 0}, squares[2] = {0, 0};  // of 2 F - 1
    for_each([&](float x) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float z = fmaf(x, rate, -c[i] * rate), f = copysignf(1 - faster_exp2(-fabsf(z)), z);
        sum[i] += f;
        squares[i] += f * f;
      }
    });
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], mask);
        squares[i] += __shfl_xor_sync(~0u, squares[i], mask);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // The variance of F, relative to that of a count with the same mean, and so its deviation
      // where the mean is what is wanted.
      const float S = (SIZE + sum[i]) / 2, variance = (squares[i] - sum[i] * sum[i] / SIZE) / 4,
                  ratio = __fdividef(variance, fmaxf(S * (SIZE - S), 1e-6f));
      const float s = fminf(deviations * quick_sqrt(fmaxf(ratio, 1e-6f / SIZE)), most);
      end.add(c[i], S, s, wanted, sign);
    }
    if (round == kSampleRounds || !end.template open<GRAIN>()) break;
    if (round > 2) {  // is it about more than a few elements of the sample?
      int inside = 0;
      for_each([&](float x) { inside += x > end.lo && x < end.hi; });
      if (__reduce_add_sync(~0u, inside) <= SIZE / 128) break;
    }
    const float mine =
        end.trial(which, round, middle_of(few, end.lo, end.hi), reach, SIZE, wanted, sign);
#pragma unroll
    for (int i = 0; i < 2; ++i) c[i] = __shfl_sync(~0u, mine, i);
  }
  if (!(end.miss < infinity<float>)) return -sign * kFar;
  // The element next to it, outwards; side by side, both ends are the same to look for.
  const float at = sign * (sign > 0 ? end.lo : end.hi);
  float next = -infinity<float>;
  for_each([&](float x) {
    if (sign * x <= at) next = fmaxf(next, sign * x);
  });
  next = value_of(__reduce_max_sync(~0u, key_of(next)));
  return sign * fmaxf(next, -kFar);
}

// The window, the same in all threads, by the warp `turn` and the one half of them further.
template <uint32_t GRAIN, int THREADS>
__device__ __forceinline__ Limits window_of_sample(const float* samples, float wanted, float rate,
                                                   int turn, Limits& shared) {
  constexpr int kWarps = THREADS / 32;
  const int t = int(threadIdx.x), place = (t / 32 - turn % kWarps + kWarps) % kWarps;
  if (place == 0 || place == kWarps / 2) {
    const float end = end_of_window<GRAIN, kSampleSize<THREADS>>(samples, wanted, rate,
                                                                 place == 0 ? 1.0f : -1.0f);
    if (t % 32 == 0) (place == 0 ? shared.L : shared.U) = end;
  }
  __syncthreads();
  return shared;
}

}  // namespace softtopk::cuda
