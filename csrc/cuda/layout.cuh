// Where a row lies in the shared memory of one block, or of those of a cluster.
//
// A row is cut into pieces of as many 16-byte chunks as a block has threads; block b of a cluster
// of B holds pieces b, b + B, ..., so that a sorted row is spread evenly. Within a piece thread t
// owns chunk t. All that depends on n and the dtype alone, and so does the order of every sum.
// Where n is not a whole number of chunks ("ragged") rows start anywhere in memory: ragged.cuh.
#pragma once

#include <type_traits>

#include "cluster.cuh"
#include "row.cuh"

namespace softtopk::cuda {

inline constexpr int kMostItems = 32;  // of its chunks that a thread owns

// How rows are shared out. C: Cluster or NoCluster.
template <class STORED, class CLUSTER, int THREADS, bool RAGGED>
struct Sharing {
  using S = STORED;
  using C = CLUSTER;
  static constexpr int threads = THREADS;
  static constexpr bool ragged = RAGGED;
  // Bytes from one piece to the next in shared memory. The pieces of a cluster's row lie apart:
  // each comes in whole 16-byte granules, one more than its own at most.
  static constexpr int stride = THREADS * 16 + (C::many ? 16 : 0);
  // The barrier of a block.
  __device__ static void sync() {
    if constexpr (THREADS == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

// Where a block's part of a row is in the row.
template <class H>
struct Mapping {
  using C = typename H::C;
  static constexpr int kSize = Chunk<typename H::S>::size;
  int32_t n;

  __device__ static constexpr int32_t piece_elements() { return H::threads * kSize; }
  __device__ static int32_t piece(int item) {
    return (item * C::size() + C::rank()) * piece_elements();
  }
  // Pieces that every block has, some of them beyond the end.
  __device__ int items() const {
    const int32_t all = piece_elements() * C::size();
    return (n + all - 1) / all;
  }
  // The index of element i of thread t's chunk `item`; it may lie beyond the end.
  __device__ int32_t index(int item, int i, int32_t t = int32_t(threadIdx.x)) const {
    return piece(item) + t * kSize + i;
  }
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// The same value, of which the compiler does not know: what is made of it once a row is made anew,
// and not kept from before in registers that the search needs.
__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ int64_t anew(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

template <class T>
__device__ __forceinline__ const T* anew(const T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

__device__ __forceinline__ void store_global(void* to, const uint4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

}  // namespace softtopk::cuda
