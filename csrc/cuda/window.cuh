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

// Whether the maxima of a thread's groups are kept as they are stored, in pairs of 16 bits.
template <class H>
inline constexpr bool kPaired = H::threads == 32 && sizeof(typename H::S) == 2;

// The maxima of N groups as keys. Groups are counted as bits: half the instructions of a sum.
template <int N>
struct Maxima {
  static constexpr int size = N;
  uint32_t key[N];

  __device__ static uint32_t to_key(float x) { return key_of(x); }
  __device__ static float to_value(uint32_t key) { return value_of(key); }
  template <class H>
  __device__ __forceinline__ void read(const ResidentRow<H>& row) {
    keys_of_maxima(row, key);
  }
  // The groups from a key on.
  __device__ __forceinline__ uint32_t from(uint32_t least) const {
    uint32_t groups = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) groups |= uint32_t(key[i] >= least) << i;
    return groups;
  }
  __device__ __forceinline__ uint32_t from_value(float least) const { return from(key_of(least)); }
  // The smallest of their keys.
  __device__ __forceinline__ uint32_t least(uint32_t from) const {
    uint32_t least = ~0u;
#pragma unroll
    for (int i = 0; i < N; ++i) least = min(least, key[i] >= from ? key[i] : ~0u);
    return least;
  }
  __device__ __forceinline__ uint32_t least() const {
    uint32_t least = key[0];
#pragma unroll
    for (int i = 1; i < N; ++i) least = min(least, key[i]);
    return least;
  }
  __device__ __forceinline__ uint32_t most() const {
    uint32_t most = key[0];
#pragma unroll
    for (int i = 1; i < N; ++i) most = max(most, key[i]);
    return most;
  }
};

// The same of 16-bit elements S: groups i and i + 8 are a pair. Keys have 16 bits, and are compared
// as the values that they stand for: -0 equals +0, and NaN is from none on.
template <class S>
struct PairedMaxima {
  static constexpr int size = 16;
  uint32_t pair[size / 2];

  __device__ static uint32_t key_of_raw(uint32_t raw) {
    return raw & 0x8000u ? ~raw & 0xffffu : raw | 0x8000u;
  }
  __device__ static uint32_t to_raw(uint32_t key) {
    return key & 0x8000u ? key & 0x7fffu : ~key & 0xffffu;
  }
  __device__ static uint32_t to_key(float x) { return key_of_raw(Element<S>::raw(x)); }
  __device__ static float to_value(uint32_t key) {
    return Element<S>::value(typename Element<S>::Raw(to_raw(key)));
  }
  template <class H>
  __device__ __forceinline__ void read(const ResidentRow<H>& row) {
    constexpr uint32_t lowest = Element<S>::minus_infinity * 0x10001u;
#pragma unroll
    for (uint32_t& both : pair) both = lowest;
#pragma unroll 1
    for (int first = 0; first < row.items(); first += size) {
      const int left = row.items() - first;
#pragma unroll
      for (int i = 0; i < size / 2; ++i) {
        uint32_t a = lowest, b = lowest;
        if (i < left) a = row.pair_of_maxima(first + i);
        if (i + size / 2 < left) b = row.pair_of_maxima(first + i + size / 2);
        const uint32_t even = __byte_perm(a, b, 0x5410), odd = __byte_perm(a, b, 0x7632);
        pair[i] = max_of_pairs<S>(pair[i], max_of_pairs<S>(even, odd));
      }
    }
  }
  __device__ __forceinline__ uint32_t from(uint32_t least) const {
    return from_pair(to_raw(least) * 0x10001u);
  }
  // A value between two elements stands for the nearer.
  __device__ __forceinline__ uint32_t from_value(float least) const {
    return from_pair(Element<S>::raw(least) * 0x10001u);
  }
  __device__ __forceinline__ uint32_t from_pair(uint32_t both) const {
    uint32_t groups = 0;
#pragma unroll
    for (int i = 0; i < size / 2; ++i) groups |= pairs_from<S>(pair[i], both) & 0x1000001u << i;
    return (groups | groups >> 16) & 0xffffu;
  }
  __device__ __forceinline__ uint32_t least(uint32_t from) const {
    constexpr uint32_t highest = (Element<S>::minus_infinity ^ Element<S>::sign) * 0x10001u;
    const uint32_t both = to_raw(from) * 0x10001u;
    uint32_t least = highest;
#pragma unroll
    for (int i = 0; i < size / 2; ++i) {
      const uint32_t mask = pairs_from<S>(pair[i], both);
      least = min_of_pairs<S>(least, (pair[i] & mask) | (highest & ~mask));
    }
    return min(key_of_raw(least & 0xffffu), key_of_raw(least >> 16));
  }
  __device__ __forceinline__ uint32_t least() const {
    uint32_t least = pair[0];
#pragma unroll
    for (int i = 1; i < size / 2; ++i) least = min_of_pairs<S>(least, pair[i]);
    return min(key_of_raw(least & 0xffffu), key_of_raw(least >> 16));
  }
  __device__ __forceinline__ uint32_t most() const {
    uint32_t most = pair[0];
#pragma unroll
    for (int i = 1; i < size / 2; ++i) most = max_of_pairs<S>(most, pair[i]);
    return max(key_of_raw(most & 0xffffu), key_of_raw(most >> 16));
  }
};

template <class H>
using MaximaOf = std::conditional_t<kPaired<H>, PairedMaxima<typename H::S>, Maxima<kGroupsOf<H>>>;

// Those of the calling thread's chunks whose group has an element from `least` on.
template <class H>
class ChunkSet {
  static constexpr int kGroups = kGroupsOf<H>;

 public:
  ChunkSet() = default;
  __device__ __forceinline__ ChunkSet(const ResidentRow<H>& row, const MaximaOf<H>& maxima,
                                      float least) {
    static_assert(kMostItems == 32 && (kGroups == 8 || kGroups == 16));
    const uint32_t groups = maxima.from_value(least);
    chunks_ = groups * (kGroups == 8 ? 0x1010101u : 0x10001u) & ~0u >> (32 - row.items());
    const int most = int(__reduce_max_sync(~0u, uint32_t(__popc(chunks_))));
    most_ = 4 * most > 3 * row.items();
  }
  // Whether a thread of the warp has most of its chunks, so that to look at all is quicker.
  __device__ __forceinline__ bool most() const { return most_; }
  __device__ __forceinline__ bool has(int item) const { return chunks_ >> item & 1; }
  // f(item), from the last to the first.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll 1
    for (uint32_t left = chunks_; left != 0;) {
      const int item = 31 - __clz(int(left));
      left ^= 1u << item;
      f(item);
    }
  }

 private:
  uint32_t chunks_ = 0;
  bool most_ = false;
};

// The smallest of a warp's keys that at least `need` of them, and not many more, reach.
template <class M>
__device__ __forceinline__ uint32_t bound_of_keys(const M& maxima, int need) {
  // `low` is reached by at least `need`, `high + 1` by none.
  uint32_t low = __reduce_min_sync(~0u, maxima.least()),
           high = __reduce_max_sync(~0u, maxima.most());
  const int enough = need + need / 4 + 1;
  // Of many small groups a few have no large element at all: the first trials halve the values, for
  // most keys stand for values next to 0.
  constexpr int kOfValues = M::size > 8 ? 6 : 0;
  float from = M::to_value(low), to = M::to_value(high);
#pragma unroll 1
  for (int round = 0; low < high; ++round) {
    uint32_t middle = low + (high - low) / 2 + 1;
    if (round < kOfValues) middle = min(max(M::to_key((from + to) / 2), low + 1), high);
    const int reached = __reduce_add_sync(~0u, __popc(maxima.from(middle)));
    if (reached >= need) {
      low = middle, from = M::to_value(middle);
      if (reached <= enough) break;
    } else {
      high = middle - 1, to = M::to_value(middle);
    }
  }
  return __reduce_min_sync(~0u, maxima.least(low));
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
template <int WARPS, class M>
__device__ __forceinline__ float2 bound_of_block(const M& maxima, int need, bool sharper,
                                                 BoundShared<WARPS>& shared) {
  constexpr int N = M::size;
  if constexpr (N == 8) {
    if (need <= 2 * 32 * WARPS) {  // half as many are enough, and faster
      Maxima<4> half;
#pragma unroll
      for (int i = 0; i < 4; ++i) half.key[i] = max(maxima.key[i], maxima.key[i + 4]);
      return bound_of_block<WARPS>(half, need, sharper, shared);
    }
  }
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const float most = M::to_value(__reduce_max_sync(~0u, maxima.most()));
  const float bound = M::to_value(bound_of_keys(maxima, (need - 1) / WARPS + 1));
  if constexpr (WARPS == 1) return make_float2(bound, most);
  if (lane == 0) {
    shared.of_warps[warp] = make_float2(bound, most);
    shared.reached[warp] = 0;
  }
  __syncthreads();
  float2 limits = shared.of_warps[0];
#pragma unroll
  for (int i = 1; i < WARPS; ++i) limits = widest(limits, shared.of_warps[i]);
  if (!sharper) return limits;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    const uint32_t trial = M::to_key(shared.of_warps[i].x);
    const int reached = __reduce_add_sync(~0u, __popc(maxima.from(trial)));
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
