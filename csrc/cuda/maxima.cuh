// The bound of a resident row (resident.cuh) of which few elements are looked for: a warp finds it
// among the maxima of a block's groups, and the blocks of a cluster agree on the lowest.
#pragma once

#include "few_largest.cuh"

namespace softtopk::cuda {

inline constexpr int kMaxima = 256;  // a bound for few is among so many

// What it needs of shared memory. Blocks of a cluster tell each other their bounds, of two rows: a
// block may be ahead by one.
template <class H>
struct LimitsShared {
  uint64_t mailboxes[2];
  float2 limits;  // the bound and the maximum
  BoundShared<H::threads / 32> bound;
  float2 of_blocks[2][H::C::many ? kMostBlocks : 1];
};

// By one warp: a bound that at least `need` of N maxima reach, if ties allow it at most `enough`;
// and the greatest of them. GRAIN: by how much the keys of neighbouring values differ.
template <uint32_t GRAIN, int N = kMaxima>
__device__ __forceinline__ float2 bound_of_maxima(const uint4* maxima, int need, int enough) {
  constexpr int kOwn = N / 32;
  const int lane = int(threadIdx.x) % 32;
  uint32_t key[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i += 4) {
    const uint4 four = maxima[i * 8 + lane];
    key[i] = four.x / GRAIN, key[i + 1] = four.y / GRAIN;
    key[i + 2] = four.z / GRAIN, key[i + 3] = four.w / GRAIN;
  }
  // The least of N / 2 maxima of two: so many reach it.
  uint32_t least = ~0u, least_of_pairs = ~0u, most = 0;
#pragma unroll
  for (int i = 0; i < kOwn / 2; ++i) {
    least = min(least, min(key[i], key[i + kOwn / 2]));
    least_of_pairs = min(least_of_pairs, max(key[i], key[i + kOwn / 2]));
    most = max(most, max(key[i], key[i + kOwn / 2]));
  }
  uint32_t bound = __reduce_min_sync(~0u, need <= N / 2 ? least_of_pairs : least);
  const uint32_t high = __reduce_max_sync(~0u, most);
  bisect(key, need, enough, bound, high, N);
  return make_float2(value_of(bound * GRAIN), value_of(high * GRAIN));
}

// By all threads: a bound that at least `need` of a block's maxima reach, and the greatest; of a
// cluster's blocks the widest of these. The warp in turn, in a cluster the first, puts them in
// shared.limits, for all after a barrier. Up to `few`, at most half of kMaxima, are sought by that
// warp alone, with `of_block` to tell it the maxima.
template <class H>
__device__ __forceinline__ void find_limits(const Maxima<kGroupsOf<H>>& maxima, int need, int few,
                                            bool in_turn, uint4* of_block, LimitsShared<H>& shared,
                                            Mailbox<2>& bounds) {
  using C = typename H::C;
  constexpr int kWarps = H::threads / 32, kKeys = kGroupsOf<H>;
  constexpr int kEach = kMaxima / H::threads;  // maxima of a thread
  const int t = int(threadIdx.x);
  float2 limits;
  if (need <= few) {
    uint32_t most[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      most[i] = maxima.key[i];
#pragma unroll
      for (int j = i + kEach; j < kKeys; j += kEach) most[i] = max(most[i], maxima.key[j]);
      reinterpret_cast<uint32_t*>(of_block)[i * H::threads + t] = most[i];
    }
    H::sync();
    if (in_turn) limits = bound_of_maxima<1>(of_block, need, need + need / 4 + 1);
  } else {
    limits = bound_of_block<kWarps>(maxima, need, kWarps > 1, shared.bound);
  }
  if (!in_turn) return;
  if constexpr (C::many) {
    float2* of_blocks = shared.of_blocks[bounds.place()];
    if (t < C::size()) bounds.send(&of_blocks[C::rank()], t, limits);
    bounds.receive(C::size() * sizeof(float2));
    limits = of_blocks[0];
    for (int i = 1; i < C::size(); ++i) limits = widest(limits, of_blocks[i]);
  }
  if (t % 32 == 0) shared.limits = limits;
}

}  // namespace softtopk::cuda
