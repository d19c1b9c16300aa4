// The k largest of few candidates, selected by one warp and put in the order of their indices.
#pragma once

#include "window.cuh"

namespace softtopk::cuda {

inline constexpr int kMostRanked = 512;  // candidates
inline constexpr int kMostOfWarp = 64;   // more are put in order by all warps
inline constexpr int32_t kLast = 0x3fffffff;

// An element that may be selected: the one with the larger key first, then the one with the larger
// `order`, which is the one with the lower index. Of equal keys are -0 and +0: which it is, is the
// last bit of `order`. Neither is ever 0.
struct alignas(8) Candidate {
  uint32_t order, key;

  __device__ static Candidate of(float x, int32_t index) {
    const uint32_t minus_zero = __float_as_uint(x) == 0x80000000u;
    return {uint32_t(kLast - index) << 1 | minus_zero, key_of(x + 0.0f)};
  }
  __device__ int32_t index() const { return kLast - int32_t(order >> 1); }
  __device__ float value() const { return order & 1 ? -0.0f : value_of(key); }
};

// Bisects for a bound between `low`, which at least `wanted` of a warp's keys reach, N a lane, and
// `high`, the largest: it ends where at most `enough` reach the bound, or ties leave no other.
// Returns how many do, never fewer than `wanted`; `low` is then the bound.
template <int N>
__device__ __forceinline__ int bisect(const uint32_t (&key)[N], int wanted, int enough,
                                      uint32_t& low, uint32_t high, int reached_low) {
  while (low < high && reached_low > enough) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    uint32_t reach = 0;  // bits: half the instructions of a sum
#pragma unroll
    for (int i = 0; i < N; ++i) reach |= uint32_t(key[i] >= middle) << i;
    const int reached = __reduce_add_sync(~0u, __popc(reach));
    if (reached >= wanted) {
      low = middle;
      reached_low = reached;
    } else {
      high = middle - 1;
    }
  }
  return reached_low;
}

// By one warp: moves the k largest of `count` candidates, at most 32 N, to the front. All lie
// between the values `least` and `most`; GRAIN is by how much the keys of neighbours differ.
template <int N, uint32_t GRAIN>
__device__ __forceinline__ void keep_largest(Candidate* candidates, int count, int k, float least,
                                             float most) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t key[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    key[j] = j * 32 + lane < count ? candidates[j * 32 + lane].key / GRAIN : 0;
  }
  uint32_t bound = key_of(least + 0.0f) / GRAIN;
  const uint32_t highest = key_of(most + 0.0f) / GRAIN;
  if (bisect(key, k, k, bound, highest, count) > k) {
    // Of those that tie with the last, the ones with the lowest indices.
    uint32_t first = 0, last = ~0u;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (key[j] == bound) {
        key[j] = candidates[j * 32 + lane].order;
        first = max(first, key[j]);
        last = min(last, key[j]);
      } else {
        key[j] = key[j] > bound ? ~0u : 0;
      }
    }
    bound = __reduce_min_sync(~0u, last);
    bisect(key, k, k, bound, __reduce_max_sync(~0u, first), count + 1);
  }
  int kept = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j * 32 >= count) break;
    const bool selected = key[j] >= bound;
    const uint32_t all = __ballot_sync(~0u, selected);
    Candidate candidate{};
    if (selected) candidate = candidates[j * 32 + lane];
    __syncwarp();  // before any is overwritten
    if (selected) candidates[kept + __popc(all & ((1u << lane) - 1))] = candidate;
    kept += __popc(all);
  }
  __syncwarp();
}

// 1 for a candidate after another, else 0; orders are below 2^31.
__device__ __forceinline__ uint32_t is_after(uint32_t order, uint32_t other) {
  return (order - other) >> 31;
}

// f(place, candidate) for each of k <= kMostOfWarp candidates, its place in the order of their
// indices, by one warp. `candidates` is aligned to 16 bytes and has room for half as many more.
template <class F>
__device__ __forceinline__ void warp_in_order(Candidate* candidates, int k, F f) {
  const int lane = int(threadIdx.x) % 32;
  Candidate own[2]{};
  uint32_t* orders = reinterpret_cast<uint32_t*>(candidates + kMostOfWarp);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j * 32 + lane < k) own[j] = candidates[j * 32 + lane];
    orders[j * 32 + lane] = own[j].order;  // 0 is after all others
  }
  __syncwarp();
  uint32_t place[2] = {0, 0};
#pragma unroll 4
  for (int i = 0; i < k; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(orders + i);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      place[j] += is_after(own[j].order, four.x);
      place[j] += is_after(own[j].order, four.y);
      place[j] += is_after(own[j].order, four.z);
      place[j] += is_after(own[j].order, four.w);
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (own[j].order != 0) f(int32_t(place[j]), own[j]);
  }
}
// The same of any number, by all threads of a block.
template <class F>
__device__ __forceinline__ void block_in_order(const Candidate* candidates, int k, F f) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < k; i += int(blockDim.x)) {
    const Candidate own = candidates[i];
    uint32_t place = 0;
#pragma unroll 8
    for (int j = 0; j < k; ++j) place += is_after(own.order, candidates[j].order);
    f(int32_t(place), own);
  }
}

}  // namespace softtopk::cuda
