// The search of a resident row (resident.cuh) in one pass.
//
// Below any element L with S(L) > k the tails are one sum, T = sum of e^((x - L) / alpha): what is
// left to search are the elements above, the candidates, about k of them. L comes from the maxima
// of M disjoint groups: where more than 2k of them are >= L, each adds at least 1/2 to S(L). For
// larger k a second element U with S(U) <= k collapses what lies above it in the same way, and both
// come from a sample, 3.5 standard deviations to each side of its own threshold. Neither has to be
// proved: the solution found between them is checked against the definition, and a row that fails,
// or whose candidates overflow their buffer, is solved by the general search (threshold.cuh).
#pragma once

#include "resident.cuh"
#include "threshold.cuh"

namespace softtopk::cuda {

inline constexpr int kMostKeys = 1024;       // maxima or samples that a block looks at
inline constexpr int kWarpCandidates = 512;  // more of them are searched by the whole block

// Floats as integers of the same order; a NaN made by max.NaN is the largest.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Bounds of the threshold, and the largest element.
struct Window {
  float L, U, max;
  __device__ void combine(const Window& other) {
    L = other.L < L ? other.L : L;
    U = other.U > U ? other.U : U;
    max = max_with_nan(max, other.max);
  }
};

// What lies outside of the window, and how many candidates lie inside.
struct Collapsed {
  int32_t candidates, above;  // L < x < U, x >= U
  float T, P;                 // sums of e^((x - L) / alpha), e^((U - x) / alpha) outside
  __device__ void combine(const Collapsed& other) {
    candidates += other.candidates;
    above += other.above;
    T += other.T;
    P += other.P;
  }
};

// The lesser bound and the greater maximum of two.
__device__ __forceinline__ float2 widest(const float2& a, const float2& b) {
  return make_float2(fminf(a.x, b.x), max_with_nan(a.y, b.y));
}

// The smallest of a warp's keys, N a lane, that at least `need` of them, and not many more, reach.
template <int N>
__device__ __forceinline__ uint32_t bound_of_keys(const uint32_t (&key)[N], int need) {
  uint32_t least = key[0], most = key[0];
#pragma unroll
  for (int i = 1; i < N; ++i) {
    least = min(least, key[i]);
    most = max(most, key[i]);
  }
  // `low` is reached by at least `need`, `high + 1` by none.
  uint32_t low = __reduce_min_sync(~0u, least), high = __reduce_max_sync(~0u, most);
  const int enough = need + need / 4 + 1;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    int reached = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) reached += key[i] >= middle;
    reached = __reduce_add_sync(~0u, reached);
    if (reached >= need) {
      low = middle;
      if (reached <= enough) break;
    } else {
      high = middle - 1;
    }
  }
  least = ~0u;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (key[i] >= low) least = min(least, key[i]);
  }
  return __reduce_min_sync(~0u, least);
}

// What bound_of_block() needs of shared memory.
template <int WARPS>
struct BoundShared {
  float2 of_warps[WARPS];  // bound and maximum
  int32_t reached[WARPS];
};

// A bound that at least `need` of a block's keys reach, N a thread, and the maximum. Every warp
// offers a bound that its share of `need` reach. The least of them serves; where a warp's share is
// so small that it is far below the others, the greatest that does serve.
template <int WARPS, int N>
__device__ __forceinline__ float2 bound_of_block(const uint32_t (&key)[N], int need, bool sharper,
                                                 BoundShared<WARPS>& shared) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  uint32_t most = key[0];
#pragma unroll
  for (int i = 1; i < N; ++i) most = max(most, key[i]);
  most = __reduce_max_sync(~0u, most);
  const uint32_t bound = bound_of_keys(key, (need - 1) / WARPS + 1);
  if (lane == 0) {
    shared.of_warps[warp] = make_float2(value_of(bound), value_of(most));
    shared.reached[warp] = 0;
  }
  __syncthreads();
  float2 limits = shared.of_warps[0];
#pragma unroll
  for (int i = 1; i < WARPS; ++i) limits = widest(limits, shared.of_warps[i]);
  if (!sharper) return limits;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    const uint32_t trial = key_of(shared.of_warps[i].x);
    int reached = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) reached += key[j] >= trial;
    reached = __reduce_add_sync(~0u, reached);
    if (lane == i) atomicAdd(&shared.reached[i], reached);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    if (shared.reached[i] >= need) limits.x = fmaxf(limits.x, shared.of_warps[i].x);
  }
  return limits;
}

struct TwoSums {
  float at_low, at_high;
  __device__ void combine(const TwoSums& other) {
    at_low += other.at_low;
    at_high += other.at_high;
  }
};
struct Range {
  uint32_t min, max;
  __device__ void combine(const Range& other) {
    min = ::min(min, other.min);
    max = ::max(max, other.max);
  }
};

// By the block: the window around the threshold of a sample of `count` keys, for the share k of
// all.
inline __device__ __noinline__ Window window_of_sample(const uint32_t* keys, int count, float share,
                                                       float rate, WholeBlock& block) {
  const int size = WholeBlock::size(), rank = WholeBlock::rank();
  Range range{~0u, 0u};
  for (int i = rank; i < count; i += size) {
    range.min = min(range.min, keys[i]);
    range.max = max(range.max, keys[i]);
  }
  range = block.reduce(range);
  const float wanted = share * count, spread = 3.5f * sqrtf(wanted * (1 - share)) + 2;
  uint32_t L = range.min, L_end = range.max, U = range.max, U_start = range.min;
  bool has_L = false, has_U = false;
  // S of the sample is >= wanted + spread at L, less at L_end + 1; <= wanted - spread at U.
  for (int round = 0; round < 16 && (L < L_end || U_start < U); ++round) {
    const uint32_t try_L = L + (L_end - L + 1) / 2, try_U = U_start + (U - U_start) / 2;
    const float l = value_of(try_L), u = value_of(try_U);
    TwoSums sums{0, 0};
    for (int i = rank; i < count; i += size) {
      const float x = value_of(keys[i]);
      const float e_l = faster_exp2(-fabsf(x - l) * rate) / 2,
                  e_u = faster_exp2(-fabsf(x - u) * rate) / 2;
      sums.at_low += x >= l ? 1 - e_l : e_l;
      sums.at_high += x >= u ? 1 - e_u : e_u;
    }
    sums = block.reduce(sums);
    if (L < L_end) {
      if (sums.at_low >= wanted + spread) {
        L = try_L;
        has_L = true;
      } else {
        L_end = try_L - 1;
      }
    }
    if (U_start < U) {
      if (sums.at_high <= wanted - spread) {
        U = try_U;
        has_U = true;
      } else {
        U_start = try_U + 1;
      }
    }
  }
  // The elements next to them, outwards.
  Range outside{~0u, 0u};
  for (int i = rank; i < count; i += size) {
    if (keys[i] <= L) outside.max = max(outside.max, keys[i]);
    if (keys[i] >= U) outside.min = min(outside.min, keys[i]);
  }
  outside = block.reduce(outside);
  return {has_L ? value_of(outside.max) : -infinity<float>,
          has_U ? value_of(outside.min) : infinity<float>, -infinity<float>};
}

// What the threads of a row write their part of the output with.
struct Outcome {
  Solution<float> solution;
  float h_A, h_B;
  int32_t right;  // else the window was wrong, and nothing is known
};

struct Count {
  int32_t value;
  __device__ void combine(const Count& other) { value += other.value; }
};

// S - k = D - P / 2 + Q / 2 at c, from the candidates and what was collapsed. P and Q relative to
// c.
struct Evaluation {
  float P, Q;
  int32_t count;  // of elements >= c
  __device__ void combine(const Evaluation& other) {
    P += other.P;
    Q += other.Q;
    count += other.count;
  }
};

// Whether a split is right: S(r_A) <= k < S(r_B) up to rounding, as in search().
__device__ __forceinline__ bool is_right(const Solution<float>& s, float alpha) {
  constexpr float tolerance = 4 * epsilon<float>;
  const float g = expf(-(s.r_A - s.r_B) / alpha);
  const float slope_A = (s.P + s.Q * g) / 2, slope_B = (s.P * g + s.Q) / 2;
  return s.D - s.P / 2 + s.Q * g / 2 <= tolerance * slope_A &&
         s.D - s.P * g / 2 + s.Q / 2 >= -tolerance * slope_B;
}

// The threshold among candidates, by a group of threads that holds `own` of them in shared memory.
template <class Group>
class CandidateSearch {
 public:
  __device__ CandidateSearch(const float* values, int32_t own, const Window& window,
                             const Collapsed& rest, double k, float alpha, Group& group)
      : values_(values),
        own_(own),
        window_(window),
        rest_(rest),
        k_(k),
        alpha_(alpha),
        group_(group) {
    rate_ = 1.4426950408889634f / alpha;
    if (rest_.above == 0) rest_.P = 0, window_.U = infinity<float>;
  }

  __device__ Outcome solve() {
    Outcome out;
    out.right = 0;
    float lo = window_.L, hi = infinity<float>;  // S(lo) > k; S(hi) <= k as far as is known
    float c = wide() ? lo : by_count();
#pragma unroll 1
    for (int round = 0; round < 24 && !out.right; ++round) {
      const Evaluation at = evaluate(c);
      const float D = float(at.count - k_), excess = D - at.P / 2 + at.Q / 2;
      if (excess > 0) {
        lo = c > lo ? c : lo;
      } else {
        hi = c < hi ? c : hi;
      }
      // The root if no element lies between it and c; the number there tells.
      const float coupled = sqrtf(at.P) * sqrtf(at.Q), R = hypotf(D, coupled);
      float root = D >= 0 ? c + alpha_ * logf((R + D) / at.P) : c - alpha_ * logf((R - D) / at.Q);
      const bool lost = !(root > lo && root < hi);  // by rounding or underflow
      if (lost)
        root = lo + ((hi < infinity<float> ? hi
                      : rest_.above > 0    ? window_.U
                                           : window_.max) -
                     lo) /
                        2;
      Split<float> split = split_at(root);
      if (split.count != at.count && D == 0) split = split_at(c);
      out.solution = sums_at(split);
      if (split.count == at.count) {
        const Solution<float>& s = out.solution;
        out.right = is_right(s, alpha_);
        // Past the root, or short of it: on to the next element on that side.
        if (!out.right) {
          const float g = expf(-(s.r_A - s.r_B) / alpha_);
          if (s.D - s.P / 2 + s.Q * g / 2 > 0) {
            lo = fmaxf(lo, s.r_A);
            root = next_above(s.r_A);
          } else {
            hi = fminf(hi, s.r_A);
            root = s.r_B;
          }
        }
      }
      c = root;
    }
    const Densities<float> d = densities(out.solution, alpha_);
    out.h_A = d.h_A;
    out.h_B = d.h_B;
    return out;
  }

 private:
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll 4
    for (int32_t i = Group::rank(); i < own_; i += Group::size()) f(values_[i]);
  }
  // Whether most of the candidates lie within a few alpha.
  __device__ bool wide() const { return (window_.max - window_.L) * rate_ < 8; }

  // An element with about k at or above it.
  __device__ float by_count() {
    float lo = window_.L, hi = rest_.above > 0 ? window_.U : window_.max;
    int32_t at_lo = rest_.candidates + rest_.above + 1, at_hi = rest_.above;
    const float wanted = fmaxf(float(k_), 0.5f);
#pragma unroll 1
    for (int round = 0; round < 40 && lo < hi && !(at_lo < wanted + 1); ++round) {
      // The number above falls about exponentially; where it does not, halve the bit patterns.
      const float share = logf(at_lo / wanted) / logf(at_lo / fmaxf(float(at_hi), 0.25f));
      float c = round % 3 < 2 ? lo + (hi - lo) * share : between_patterns(lo, hi, 0.5f);
      if (!(c > lo) || !(c <= hi)) c = between_patterns(lo, hi, 0.5f);
      const int32_t count = count_from(c);
      if (count >= wanted) {
        lo = c;
        at_lo = count;
      } else {
        if (hi == c) break;
        hi = c;
        at_hi = count;
      }
    }
    return lo;
  }
  __device__ int32_t count_from(float c) {
    int32_t count = 0;
    for_each([&](float x) { count += x >= c; });
    return group_.reduce(Count{count}).value + (window_.U >= c ? rest_.above : 0);
  }
  __device__ Evaluation evaluate(float c) {
    Evaluation e = {0, 0, 0};
    for_each([&](float x) {
      const float tail = faster_exp2(-fabsf(x - c) * rate_);
      if (x >= c) {
        e.P += tail;
        ++e.count;
      } else {
        e.Q += tail;
      }
    });
    e = group_.reduce(e);
    if (rest_.above > 0) {
      e.count += rest_.above;
      e.P += rest_.P * faster_exp2((c - window_.U) * rate_);
    }
    e.Q += rest_.T * faster_exp2((window_.L - c) * rate_);
    return e;
  }
  __device__ Split<float> split_at(float c) {
    Split<float> split = {0, infinity<float>, -infinity<float>};
    for_each([&](float x) {
      if (x >= c) {
        split.r_A = fminf(split.r_A, x);
        ++split.count;
      } else {
        split.r_B = fmaxf(split.r_B, x);
      }
    });
    split = group_.reduce(split);
    split.count += rest_.above;
    split.r_A = fminf(split.r_A, window_.U) + 0.0f;  // -0 becomes +0
    split.r_B = fmaxf(split.r_B, window_.L) + 0.0f;
    return split;
  }
  __device__ float next_above(float r) {
    float next = window_.U;
    for_each([&](float x) {
      if (x > r) next = fminf(next, x);
    });
    return group_.reduce(Split<float>{0, next, 0}).r_A;
  }
  __device__ Solution<float> sums_at(const Split<float>& split) {
    const Tails<float> tails(split.r_A, split.r_B, alpha_);
    TailSums<float> sums = {0, 0};
    for_each([&](float x) {
      const float tail = tails(x);
      if (tails.above(x)) {
        sums.P += tail;
      } else {
        sums.Q += tail;
      }
    });
    sums = group_.reduce(sums);
    if (rest_.above > 0) sums.P += rest_.P * tails(window_.U);
    sums.Q += rest_.T * tails(window_.L);
    return {split.r_A, split.r_B, sums.P, sums.Q, float(split.count - k_)};
  }

  const float* values_;
  int32_t own_;
  Window window_;
  Collapsed rest_;
  double k_;
  float alpha_, rate_;
  Group& group_;
};

template <class Group>
__device__ __noinline__ Outcome solve_candidates(const float* values, int32_t own, Window window,
                                                 Collapsed rest, double k, float alpha,
                                                 Group& group) {
  return CandidateSearch<Group>(values, own, window, rest, k, alpha, group).solve();
}

}  // namespace softtopk::cuda
