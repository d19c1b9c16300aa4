// Blocks that share a row: their barrier, and writes into each other's shared memory (sm_90 on).
#pragma once

#include <cstdint>

namespace softtopk::cuda {

inline constexpr int kMostBlocks = 16;  // of a cluster; 8 where a GPU promises no more

// A cluster of one block, without any of this.
struct NoCluster {
  static constexpr bool many = false;
  __device__ static int rank() { return 0; }
  __device__ static int size() { return 1; }
  __device__ static void sync() { __syncthreads(); }
  __device__ static void meet() { __syncthreads(); }
  template <class A>
  __device__ static A* at(A* mine, int) {
    return mine;
  }
};

struct Cluster {
  static constexpr bool many = true;
  __device__ static int rank() {
    uint32_t r = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
    return int(r);
  }
  __device__ static int size() {
    uint32_t n = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
#endif
    return int(n);
  }
  __device__ static void sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
#endif
  }
  // The same for those who have only read: what they wrote to memory need not have arrived.
  __device__ static void meet() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::
                     : "memory");
#endif
  }
  // The same variable of another block.
  template <class A>
  __device__ static A* at(A* mine, int rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(rank));
    return reinterpret_cast<A*>(there);
#else
    return mine;
#endif
  }
};

}  // namespace softtopk::cuda
