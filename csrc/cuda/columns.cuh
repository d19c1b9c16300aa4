// The columns of rows that a lane works on, and how it brings them: copies on their way to places
// of shared memory that no other lane reads.
#pragma once

#include "layout.cuh"

namespace softtopk::cuda {

// Chunks of a row that a lane has, and rows on their way.
template <class S>
inline constexpr int kVectors = sizeof(S) == 2 ? 2 : 4;
template <class S>
inline constexpr int kStages = sizeof(S) == 2 ? 4 : 2;
// Columns of a warp.
template <class S>
inline constexpr int64_t kTile = kVectors<S> * 32 * Chunk<S>::size;

// Stores 16 bytes that are not soon read again.
__device__ __forceinline__ void store_passing(void* to, const uint4& words) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// How the L2 cache is to treat what is copied: y stays, a row of the weight is read but once.
struct Policies {
  uint64_t keep, pass;
  __device__ Policies() {
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(pass));
  }
};

// Copies 16 bytes to shared memory if `wanted`; wait_copies<N>() returns when all groups of copies
// but the last N that the thread closed with close_copies() have come, for the thread's own eyes.
__device__ __forceinline__ void copy_16(uint4* to, const void* from, bool wanted, uint64_t policy) {
  asm volatile(
      "{\n"
      "  .reg .pred wanted;\n"
      "  setp.ne.b32 wanted, %2, 0;\n"
      "  @wanted cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %3;\n"
      "}" ::"r"(shared_address(to)),
      "l"(from), "r"(int(wanted)), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A lane's columns: kVectors chunks, a warp's width apart. Its place for a chunk in shared memory
// is a warp's width from the next as well.
template <class S, bool WIDE>
struct Columns {
  using Raw = typename Element<S>::Raw;
  static constexpr int size = Chunk<S>::size, vectors = kVectors<S>;
  int32_t first, end, d;

  // Of a block that has those of rows of d from begin to end.
  __device__ Columns(int32_t begin, int32_t end, int32_t d)
      : first(begin +
              (int32_t(threadIdx.x / 32) * 32 * vectors + int32_t(threadIdx.x) % 32) * size),
        end(end),
        d(d) {}
  __device__ __forceinline__ int32_t column(int vector) const { return first + vector * 32 * size; }
  // The lane's part of the first row of y or of the weight.
  __device__ __forceinline__ const unsigned char* part(const void* data) const {
    return static_cast<const unsigned char*>(data) + int64_t(first) * int64_t(sizeof(S));
  }
  // Begins to copy that of another row; columns beyond the end are left alone.
  __device__ __forceinline__ void copy(uint4* to, const unsigned char* part, int32_t row,
                                       uint64_t policy) const {
    const unsigned char* const from =
        part + uint64_t(uint32_t(row)) * (uint32_t(d) * uint32_t(sizeof(S)));
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const int32_t at = column(v);
      if constexpr (WIDE) {
        copy_16(to + v * 32, from + v * 512, at < end && row >= 0, policy);
      } else {
        const Raw* const own = reinterpret_cast<const Raw*>(from + v * 512);
        Chunk<S> chunk{};
#pragma unroll
        for (int i = 0; i < size; ++i) {
          if (at + i < end && row >= 0) chunk.set_raw(i, __ldg(own + i));
        }
        to[v * 32] = chunk.words;
      }
    }
  }
  template <class T>
  __device__ __forceinline__ static void read(const uint4* from, int vector, T (&x)[size]) {
    Chunk<S>{from[vector * 32]}.read(x);
  }
  // PASSING: it is not soon read again.
  template <bool PASSING, class O, class T>
  __device__ __forceinline__ void store(O* row, int vector, const T (&x)[size]) const {
    using RawOut = typename Element<O>::Raw;
    constexpr int kOut = Chunk<O>::size;
    const int32_t at = column(vector);
    RawOut* const to = reinterpret_cast<RawOut*>(row) + at;
    if constexpr (WIDE && size % kOut == 0) {
      if (at >= end) return;
#pragma unroll
      for (int part = 0; part < size / kOut; ++part) {
        Compute<O> own[kOut];
#pragma unroll
        for (int i = 0; i < kOut; ++i) own[i] = Compute<O>(x[part * kOut + i]);
        const uint4 words = Chunk<O>::of(own).words;
        PASSING ? store_passing(to + part * kOut, words) : store_global(to + part * kOut, words);
      }
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        if (at + i < end) to[i] = Element<O>::raw(Compute<O>(x[i]));
      }
    }
  }
};

}  // namespace softtopk::cuda
