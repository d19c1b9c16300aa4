// Rows on the device: how one is read, where it is kept, and how the threads that share it agree.
//
// A row is a sequence of 16-byte chunks. With t threads to a row, thread i holds chunks i, i + t,
// i + 2t, ...; that mapping, and so the order of every sum, depends on n and the dtype alone. A
// row that does not start on 16 bytes is read element by element into the same chunks: slower,
// with the same bits as a result. Places beyond the end read as -inf.
//
// A short row lives in the registers of one warp, several rows to a block; a longer one in shared
// memory; the longest is left in global memory and read again on every sweep (launch.cuh chooses).
// Longer rows of up to 32 bits an element have kernels of their own (resident.cuh), for p and for
// hard_topk's indices; the log domain, masks and float64 are served here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../softtopk.h"

namespace softtopk::cuda {

// How an element is stored and computed with. `sign` is the bit that negates it, `grain` by how
// much the bits of neighbours differ in the compute type.
template <class S>
struct Element;
template <>
struct Element<float> {
  using Raw = uint32_t;
  using Compute = float;
  static constexpr Raw sign = 0x80000000u, minus_infinity = 0xff800000u;
  static constexpr uint32_t grain = 1;
  static __device__ float value(Raw raw) { return __uint_as_float(raw); }
  static __device__ Raw raw(float value) { return __float_as_uint(value); }
};
template <>
struct Element<double> {
  using Raw = uint64_t;
  using Compute = double;
  static constexpr Raw sign = 0x8000000000000000u, minus_infinity = 0xfff0000000000000u;
  static __device__ double value(Raw raw) {
    return __longlong_as_double(static_cast<long long>(raw));
  }
  static __device__ Raw raw(double value) { return static_cast<Raw>(__double_as_longlong(value)); }
};
template <>
struct Element<__half> {
  using Raw = uint16_t;
  using Compute = float;
  static constexpr Raw sign = 0x8000, minus_infinity = 0xfc00;
  static constexpr uint32_t grain = 1u << 13;
  static __device__ float value(Raw raw) { return __half2float(__ushort_as_half(raw)); }
  static __device__ Raw raw(float value) { return __half_as_ushort(__float2half_rn(value)); }
};
template <>
struct Element<__nv_bfloat16> {
  using Raw = uint16_t;
  using Compute = float;
  static constexpr Raw sign = 0x8000, minus_infinity = 0xff80;
  static constexpr uint32_t grain = 1u << 16;
  static __device__ float value(Raw raw) { return __uint_as_float(uint32_t(raw) << 16); }
  static __device__ Raw raw(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
};

template <class S>
using Compute = typename Element<S>::Compute;

// 16 bytes of a row. Indices must be compile-time constants after unrolling.
template <class S>
struct Chunk {
  using Raw = typename Element<S>::Raw;
  static constexpr int size = 16 / sizeof(S);
  uint4 words;

  __device__ uint32_t& word(int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
  }
  __device__ uint32_t word(int i) const {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
  }
  __device__ Raw raw(int i) const {
    if constexpr (sizeof(S) == 2) return Raw(word(i / 2) >> (16 * (i % 2)));
    if constexpr (sizeof(S) == 4) return word(i);
    if constexpr (sizeof(S) == 8) return Raw(word(2 * i + 1)) << 32 | word(2 * i);
  }
  __device__ void set_raw(int i, Raw raw) {  // into a place that is 0
    if constexpr (sizeof(S) == 2) word(i / 2) |= uint32_t(raw) << (16 * (i % 2));
    if constexpr (sizeof(S) == 4) word(i) = raw;
    if constexpr (sizeof(S) == 8) {
      word(2 * i) = uint32_t(raw);
      word(2 * i + 1) = uint32_t(raw >> 32);
    }
  }
  __device__ void read(Compute<S> (&x)[size]) const {
#pragma unroll
    for (int i = 0; i < size; ++i) x[i] = Element<S>::value(raw(i));
  }
  __device__ static Chunk of(const Compute<S> (&x)[size]) {
    Chunk chunk{};
#pragma unroll
    for (int i = 0; i < size; ++i) chunk.set_raw(i, Element<S>::raw(x[i]));
    return chunk;
  }
};

// Where a row is read from. `wide`: it starts on 16 bytes. `negate`: every value is read negated.
template <class S>
class Source {
  using Raw = typename Element<S>::Raw;

 public:
  __device__ Source(const void* data, int64_t offset, int32_t n, bool wide, bool negate)
      : row_(static_cast<const Raw*>(data) + offset),
        n_(n),
        flip_(negate ? Element<S>::sign : Raw(0)),
        wide_(wide) {}

  __device__ int32_t chunks() const { return (n_ + Chunk<S>::size - 1) / Chunk<S>::size; }
  __device__ Compute<S> element(int32_t i) const { return Element<S>::value(row_[i] ^ flip_); }
  __device__ Chunk<S> load(int32_t index) const {
    const int32_t first = index * Chunk<S>::size;
    Chunk<S> chunk{};
    if (wide_ && first + Chunk<S>::size <= n_) {
      chunk.words = __ldg(reinterpret_cast<const uint4*>(row_ + first));
      Chunk<S> flips{};
#pragma unroll
      for (int i = 0; i < Chunk<S>::size; ++i) flips.set_raw(i, flip_);
#pragma unroll
      for (int i = 0; i < 4; ++i) chunk.word(i) ^= flips.word(i);
      return chunk;
    }
#pragma unroll
    for (int i = 0; i < Chunk<S>::size; ++i) {
      const Raw raw = first + i < n_ ? Raw(row_[first + i] ^ flip_) : Element<S>::minus_infinity;
      chunk.set_raw(i, raw);
    }
    return chunk;
  }

 private:
  const Raw* __restrict__ row_;
  int32_t n_;
  Raw flip_;
  bool wide_;
};

// Where a row is written to.
template <class S>
class Sink {
  using Raw = typename Element<S>::Raw;

 public:
  __device__ Sink(void* data, int64_t offset, int32_t n, bool wide)
      : row_(static_cast<Raw*>(data) + offset), n_(n), wide_(wide) {}
  __device__ void store(int32_t index, const Chunk<S>& chunk) const {
    const int32_t first = index * Chunk<S>::size;
    if (wide_ && first + Chunk<S>::size <= n_) {
      *reinterpret_cast<uint4*>(row_ + first) = chunk.words;
      return;
    }
#pragma unroll
    for (int i = 0; i < Chunk<S>::size; ++i) {
      if (first + i < n_) row_[first + i] = chunk.raw(i);
    }
  }

 private:
  Raw* __restrict__ row_;
  int32_t n_;
  bool wide_;
};

// A struct of 32-bit words from the lane whose index differs in the bits of `mask`.
template <class A>
__device__ A from_lane_xor(const A& a, int mask) {
  static_assert(sizeof(A) % 4 == 0);
  uint32_t words[sizeof(A) / 4];
  memcpy(words, &a, sizeof(A));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, mask);
  A other;
  memcpy(&other, words, sizeof(A));
  return other;
}

// The combination over `LANES` lanes, the same bits in each: `combine` must be commutative.
template <int LANES, class A>
__device__ A reduce_lanes(A a) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) a.combine(from_lane_xor(a, mask));
  return a;
}

template <int LANES>
__device__ unsigned inclusive_scan(unsigned value, int lane) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    const unsigned lower = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += lower;
  }
  return value;
}

// The threads that share a row: a warp, or a block. Both are used by all of their threads at once.
class Warp {
 public:
  static constexpr int threads = 32;
  struct Storage {};

  __device__ static int size() { return threads; }
  __device__ explicit Warp(Storage&) {}
  __device__ static int rank() { return int(threadIdx.x) % 32; }
  template <class A>
  __device__ A reduce(const A& a) {
    return reduce_lanes<32>(a);
  }
  // The sum over the threads before this one; `total` is the sum over all.
  __device__ unsigned scan(unsigned value, unsigned* total) {
    const unsigned inclusive = inclusive_scan<32>(value, rank());
    *total = __shfl_sync(0xffffffffu, inclusive, 31);
    return inclusive - value;
  }
};

template <int THREADS>
class Block {
  static constexpr int kWarps = THREADS / 32;
  static constexpr int kSlot = 64;  // bytes of the largest struct that is reduced

 public:
  static constexpr int threads = THREADS;
  __device__ static int size() { return threads; }
  // Two sets, used in turns: between two uses of one set every thread passes the other's barrier.
  struct Storage {
    alignas(16) unsigned char slots[2][kWarps][kSlot];
  };

  __device__ explicit Block(Storage& storage) : storage_(storage) {}
  __device__ static int rank() { return int(threadIdx.x); }
  template <class A>
  __device__ A reduce(const A& a) {
    static_assert(sizeof(A) <= kSlot);
    const A mine = reduce_lanes<32>(a);
    const int set = next_set();
    if (rank() % 32 == 0) *slot<A>(set, rank() / 32) = mine;
    __syncthreads();
    return reduce_lanes<kWarps>(*slot<A>(set, rank() % kWarps));
  }
  __device__ unsigned scan(unsigned value, unsigned* total) {
    const unsigned inclusive = inclusive_scan<32>(value, rank() % 32);
    const int set = next_set();
    if (rank() % 32 == 31) *slot<unsigned>(set, rank() / 32) = inclusive;
    __syncthreads();
    const int lane = rank() % 32;
    const unsigned of_warps =
        inclusive_scan<32>(lane < kWarps ? *slot<unsigned>(set, lane) : 0u, lane);
    *total = __shfl_sync(0xffffffffu, of_warps, kWarps - 1);
    const unsigned upto_mine = __shfl_sync(0xffffffffu, of_warps, rank() / 32);
    const unsigned my_warp = __shfl_sync(0xffffffffu, inclusive, 31);
    return upto_mine - my_warp + inclusive - value;
  }

 private:
  __device__ int next_set() {
    set_ ^= 1;
    return set_;
  }
  template <class A>
  __device__ A* slot(int set, int warp) {
    return reinterpret_cast<A*>(storage_.slots[set][warp]);
  }

  Storage& storage_;
  int set_ = 0;
};

// A block of up to 256 threads whose size is known at its launch.
class WholeBlock {
  static constexpr int kSlot = 32, kWarps = 8;

 public:
  struct Storage {
    alignas(16) unsigned char slots[2][kWarps][kSlot];
  };

  __device__ explicit WholeBlock(Storage& storage) : storage_(storage) {}
  __device__ static int size() { return int(blockDim.x); }
  __device__ static int rank() { return int(threadIdx.x); }
  template <class A>
  __device__ A reduce(const A& a) {
    static_assert(sizeof(A) <= kSlot);
    const A mine = reduce_lanes<32>(a);
    set_ ^= 1;
    if (rank() % 32 == 0) *reinterpret_cast<A*>(storage_.slots[set_][rank() / 32]) = mine;
    __syncthreads();
    return of_warps(*reinterpret_cast<const A*>(storage_.slots[set_][rank() % kWarps]));
  }
  // The combination of what every eighth lane holds of as many warps as there are, in all lanes.
  template <class A>
  __device__ static A of_warps(A a) {
    const int warps = size() / 32, lane = rank() % kWarps;
#pragma unroll
    for (int mask = 1; mask < kWarps; mask *= 2) {
      const A other = from_lane_xor(a, mask);
      const bool has = (lane & ~(mask - 1)) < warps,
                 other_has = ((lane ^ mask) & ~(mask - 1)) < warps;
      if (has && other_has) {
        a.combine(other);
      } else if (other_has) {
        a = other;
      }
    }
    return a;
  }

 private:
  Storage& storage_;
  int set_ = 0;
};

// The place in its row of a thread's chunk number `item`.
template <class Group>
__device__ int32_t chunk_index(int32_t item) {
  return item * Group::size() + Group::rank();
}

// A row's chunks in registers, in shared memory, or left in global memory. for_each(f) calls
// f(item), item = 0, 1, ..., equally often in all threads; chunk(item) is this thread's.
template <class S, class Group, int ITEMS>
class RegisterRow {
 public:
  __device__ RegisterRow(const Source<S>& source, uint4*) : chunks_(source.chunks()) {
    for_each([&](int32_t item) { row_[item] = source.load(chunk_index<Group>(item)); });
  }
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll
    for (int32_t item = 0; item < ITEMS; ++item) {
      if (item * Group::size() < chunks_) f(item);
    }
  }
  __device__ Chunk<S> chunk(int32_t item) const { return row_[item]; }

 protected:
  Chunk<S> row_[ITEMS];

 private:
  int32_t chunks_;
};

// Of a row longer than the registers; every thread touches its own chunks only.
template <class S, class Group>
class LongRow {
  static constexpr int kUnroll =
      Chunk<S>::size > 4 ? 1 : 2;  // about 8 elements at a time: 64 registers hold no more

 public:
  __device__ explicit LongRow(int32_t chunks)
      : items_((chunks + Group::size() - 1) / Group::size()) {}
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll kUnroll
    for (int32_t item = 0; item < items_; ++item) f(item);
  }

 protected:
  int32_t items_;
};

template <class S, class Group, int>
class SharedRow : public LongRow<S, Group> {
 public:
  __device__ SharedRow(const Source<S>& source, uint4* memory)
      : LongRow<S, Group>(source.chunks()), memory_(memory) {
#pragma unroll 4  // loads in flight
    for (int32_t item = 0; item < this->items_; ++item) {
      const int32_t index = chunk_index<Group>(item);
      memory_[index] = source.load(index).words;
    }
  }
  __device__ Chunk<S> chunk(int32_t item) const { return {memory_[chunk_index<Group>(item)]}; }

 private:
  uint4* memory_;
};

template <class S, class Group, int>
class GlobalRow : public LongRow<S, Group> {
 public:
  __device__ GlobalRow(const Source<S>& source, uint4*)
      : LongRow<S, Group>(source.chunks()), source_(source) {}
  __device__ Chunk<S> chunk(int32_t item) const { return source_.load(chunk_index<Group>(item)); }

 private:
  Source<S> source_;
};

// A row's k or alpha.
__device__ inline double per_row(const PerRow& value, int64_t row) {
  if (value.data == nullptr) return value.number;
  const int64_t at = row * value.stride;
  return value.type == Type::float32 ? double(static_cast<const float*>(value.data)[at])
                                     : static_cast<const double*>(value.data)[at];
}

// What threshold.cuh searches: a row and the threads that share it.
template <class S, class Row, class Group>
class Sweeper {
 public:
  __device__ Sweeper(const Row& row, Group& group) : row_(row), group_(group) {}
  template <class A>
  __device__ __forceinline__ auto sweep(A accumulator) {
    row_.for_each([&](int32_t item) {
      Compute<S> x[Chunk<S>::size];
      row_.chunk(item).read(x);
      accumulator.add(x);
    });
    return group_.reduce(accumulator.result());
  }

 private:
  const Row& row_;
  Group& group_;
};

}  // namespace softtopk::cuda
