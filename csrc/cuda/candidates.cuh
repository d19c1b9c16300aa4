// A unit's candidates: the maxima of a thread's groups of chunks, and the elements from a bound on,
// which are looked for in the groups that reach it.
#pragma once

#include "maxima.cuh"
#include "unit.cuh"

namespace softtopk::cuda {

// Which elements of a chunk are from `least` > 0 on, as bits.
template <class S>
class Reaching {
 public:
  __device__ explicit Reaching(float least) : least_(least) {
    if constexpr (sizeof(S) == 2) {
      uint32_t raw = Element<S>::raw(least);
      raw += Element<S>::value(typename Element<S>::Raw(raw)) < least;
      both_ = raw * 0x10001u;
    }
  }
  __device__ __forceinline__ uint32_t operator()(const Chunk<S>& chunk) const {
    uint32_t found = 0;
    if constexpr (sizeof(S) == 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) found |= pairs_from<S>(chunk.word(i), both_) & 0x10001u << 2 * i;
      return (found | found >> 15) & 0xffu;
    } else {
      float x[Chunk<S>::size];
      chunk.read(x);
#pragma unroll
      for (int i = 0; i < Chunk<S>::size; ++i) found |= uint32_t(x[i] >= least_) << i;
      return found;
    }
  }
  // Whether some of what a group's largest are of is.
  __device__ __forceinline__ bool any(uint32_t pair) const {
    return pairs_from<S>(pair, both_) != 0;
  }
  __device__ __forceinline__ bool any(float most) const { return most >= least_; }

 private:
  float least_;
  uint32_t both_ = 0;  // in both halves, the lowest of S that is not below
};

// The largest elements of the calling thread's groups of chunks, chunk i is of group i modulo
// GROUPS: of 16-bit elements those of the even and those of the odd ones. A NaN is the largest of
// all.
template <class S, int GROUPS>
class Groups {
  using Most = std::conditional_t<sizeof(S) == 2, uint32_t, float>;

 public:
  __device__ __forceinline__ explicit Groups(const Unit<S>& unit) {
#pragma unroll
    for (Most& most : most_) most = least();
    const int own = unit.own();
#pragma unroll 1
    for (int first = 0; first < own; first += GROUPS) {
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) {
        if (first + i < own) most_[i] = larger(most_[i], of_chunk(unit.chunk(first + i)));
      }
    }
  }
  // The keys of the largest in groups of groups: of two, or of four.
  __device__ __forceinline__ void keys(uint2& to) const {
    const Most even = most_of<2>(0), odd = most_of<2>(1);
    to = {key(even), key(odd)};
  }
  __device__ __forceinline__ void keys(uint4& to) const {
    if constexpr (sizeof(S) == 2) {
      const Most even = most_of<2>(0), odd = most_of<2>(1);
      to = {key_of_half(even), key_of_half(even >> 16), key_of_half(odd), key_of_half(odd >> 16)};
    } else {
      to = {key(most_of<4>(0)), key(most_of<4>(1)), key(most_of<4>(2)), key(most_of<4>(3))};
    }
  }
  // Which groups have elements that reach it, as bits.
  __device__ __forceinline__ uint32_t from(const Reaching<S>& reaching) const {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) found |= uint32_t(reaching.any(most_[i])) << i;
    return found;
  }

 private:
  __device__ static Most least() {
    if constexpr (sizeof(S) == 2) {
      return Element<S>::minus_infinity * 0x10001u;
    } else {
      return -infinity<float>;
    }
  }
  __device__ static uint32_t larger(uint32_t a, uint32_t b) { return max_of_pairs<S>(a, b); }
  __device__ static float larger(float a, float b) { return max_with_nan(a, b); }
  __device__ __forceinline__ static Most of_chunk(const Chunk<S>& chunk) {
    if constexpr (sizeof(S) == 2) {
      return larger(larger(chunk.word(0), chunk.word(1)), larger(chunk.word(2), chunk.word(3)));
    } else {
      float x[4];
      chunk.read(x);
      return larger(larger(x[0], x[1]), larger(x[2], x[3]));
    }
  }
  // Of every STEP-th group, from `first` on.
  template <int STEP>
  __device__ __forceinline__ Most most_of(int first) const {
    Most most = most_[first];
#pragma unroll
    for (int i = STEP; i < GROUPS; i += STEP) most = larger(most, most_[first + i]);
    return most;
  }
  __device__ static uint32_t key(float most) { return key_of(most); }
  __device__ static uint32_t key(uint32_t pair) {
    return key_of(max_with_nan(half(pair), half(pair >> 16)));
  }
  __device__ static uint32_t key_of_half(uint32_t raw) { return key_of(half(raw)); }
  __device__ static float half(uint32_t raw) {
    return Element<S>::value(typename Element<S>::Raw(raw));
  }

  Most most_[GROUPS];
};

// By a scanning warp: f(place, value, index) for its elements that reach; returns how many. Each
// thread has one in a turn. Where they go depends on nothing but the row.
template <class S, int GROUPS, class F>
__device__ __forceinline__ int32_t collect(const Unit<S>& unit, const Groups<S, GROUPS>& groups,
                                           const Reaching<S>& reaching, F f) {
  const int t = int(threadIdx.x);
  const uint32_t lanes_below = (1u << t % 32) - 1;
  uint32_t left = groups.from(reaching);
  left = (left | left << GROUPS) & uint32_t((uint64_t(1) << unit.own()) - 1);  // of the own chunks
  uint32_t found = 0;                                                          // of chunk `item`
  int item = 0;
  int32_t count = 0;
#pragma unroll 1
  while (__any_sync(~0u, (left | found) != 0)) {
    if (found == 0 && left != 0) {
      item = __ffs(int(left)) - 1;
      left &= left - 1;
      found = reaching(unit.chunk(item));
    }
    const bool has = found != 0;
    const uint32_t all = __ballot_sync(~0u, has);
    if (has) {
      const int i = __ffs(int(found)) - 1;
      found &= found - 1;
      f(count + __popc(all & lanes_below), unit.element(item, t, i), unit.first(item) + i);
    }
    count += __popc(all);
  }
  return count;
}

}  // namespace softtopk::cuda
