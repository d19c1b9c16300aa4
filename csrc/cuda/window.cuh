// A bound below the threshold of a resident row (resident.cuh), from the maxima of groups.
//
// Below any element L with S(L) > k the tails are one sum, T = sum of e^((x - L) / alpha): what is
// left to search are the elements above, the candidates, about k of them. L comes from the maxima
// of M disjoint groups: where more than 2k of them are >= L, each adds at least 1/2 to S(L). For
// larger k the window comes from a sample (sample.cuh).
#pragma once

#include "resident.cuh"
#include "threshold.cuh"

namespace softtopk::cuda {

// Floats as integers of the same order; a NaN made by max.NaN is the largest.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A bound below the threshold, and the largest element.
struct Window {
  float L, max;
};

// The lesser bound and the greater maximum of two.
__device__ __forceinline__ float2 widest(const float2& a, const float2& b) {
  return make_float2(fminf(a.x, b.x), max_with_nan(a.y, b.y));
}

// How many groups a thread makes of its chunks: chunk i is of group i modulo this.
template <class H>
inline constexpr int kGroupsOf = H::threads == 32 ? 16 : 8;
// The bound takes at most three quarters of the keys.
template <class H>
inline constexpr int kMostBudget = kGroupsOf<H> * H::threads * 3 / 8;

// The maxima of the calling thread's groups as keys.
template <class H>
__device__ __forceinline__ void keys_of_maxima(const ResidentRow<H>& row,
                                               uint32_t (&key)[kGroupsOf<H>]) {
  constexpr int kGroups = kGroupsOf<H>;
  float maxima[kGroups];
#pragma unroll
  for (float& max : maxima) max = -infinity<float>;
  const int items = row.items();
#pragma unroll 1
  for (int first = 0; first < items; first += kGroups) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (first + i < items) maxima[i] = max_with_nan(maxima[i], row.max(first + i));
    }
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) key[i] = key_of(maxima[i]);
}

// Those of the calling thread's chunks whose group has an element from `least` on.
template <class H>
class ChunkSet {
  static constexpr int kGroups = kGroupsOf<H>;

 public:
  ChunkSet() = default;
  __device__ __forceinline__ ChunkSet(const ResidentRow<H>& row, const uint32_t (&key)[kGroups],
                                      float least) {
    const uint32_t from = key_of(least);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) groups_ |= uint32_t(key[i] >= from) << i;
    const int most = int(__reduce_max_sync(~0u, uint32_t(__popc(groups_))));
    most_ = 4 * most > 3 * ::min(row.items(), kGroups);
  }
  // Whether a thread of the warp has most of its chunks, so that to look at all is quicker.
  __device__ __forceinline__ bool most() const { return most_; }
  __device__ __forceinline__ bool has(int item) const { return groups_ >> item % kGroups & 1; }
  template <class F>
  __device__ __forceinline__ void for_each(const ResidentRow<H>& row, F f) const {
    for (uint32_t left = groups_; left != 0; left &= left - 1) {
#pragma unroll 1
      for (int item = __ffs(int(left)) - 1; item < row.items(); item += kGroups) f(item);
    }
  }

 private:
  uint32_t groups_ = 0;
  bool most_ = false;
};

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
    uint32_t reach = 0;  // bits: half the instructions of a sum
#pragma unroll
    for (int i = 0; i < N; ++i) reach |= uint32_t(key[i] >= middle) << i;
    const int reached = __reduce_add_sync(~0u, __popc(reach));
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
  if constexpr (N == 8) {
    if (need <= 2 * 32 * WARPS) {  // half as many are enough, and faster
      uint32_t half[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) half[i] = max(key[i], key[i + 4]);
      return bound_of_block<WARPS>(half, need, sharper, shared);
    }
  }
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  uint32_t most = key[0];
#pragma unroll
  for (int i = 1; i < N; ++i) most = max(most, key[i]);
  most = __reduce_max_sync(~0u, most);
  const uint32_t bound = bound_of_keys(key, (need - 1) / WARPS + 1);
  if constexpr (WARPS == 1) return make_float2(value_of(bound), value_of(most));
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

}  // namespace softtopk::cuda
