// Blocks that share a row: their barrier, and writes into each other's shared memory (sm_90 on).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace softtopk::cuda {

inline constexpr int kMostBlocks = 16;  // of a cluster; 8 where a GPU promises no more

// Waits until a barrier of the copy engine or of messages, at a shared address, has passed `phase`,
// and makes that the next one.
__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t& phase) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(phase)
        : "memory");
  }
  phase ^= 1;
#endif
}

// Where a block waits for messages of the others. A message is stored in its shared memory together
// with the count of its bytes, so neither side needs a barrier or a fence, which would wait for all
// that was written to memory before. Messages of one phase must not meet those of the next: a block
// sends only after it has heard of the receiver's having passed the phase before, or, with COUNT =
// 2, the one before that.
template <int COUNT = 1>
class Mailbox {
 public:
  // By all threads; a barrier of the cluster must follow.
  __device__ explicit Mailbox(uint64_t* barriers)
      : barriers_(uint32_t(__cvta_generic_to_shared(barriers))) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barriers_ + 8 * i) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#endif
  }
  // Which of COUNT places the messages of this phase have.
  __device__ __forceinline__ int place() const { return COUNT == 1 ? 0 : int(turn_ & 1); }
  // Puts `message` where `to` is in block `rank`.
  template <class A>
  __device__ __forceinline__ void send(A* to, int rank, const A& message) const {
#if __CUDA_ARCH__ >= 900
    static_assert(sizeof(A) % 4 == 0);
    uint32_t words[sizeof(A) / 4];
    memcpy(words, &message, sizeof(A));
    uint32_t address, barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(uint32_t(__cvta_generic_to_shared(to))), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(current()), "r"(rank));
#pragma unroll
    for (int i = 0; i < int(sizeof(A) / 4); ++i) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
              address + 4 * i),
          "r"(words[i]), "r"(barrier)
          : "memory");
    }
#endif
  }
  // Waits for `bytes` of messages; thread 0 must be among those who do. All others must `pass`.
  __device__ __forceinline__ void receive(uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(current()), "r"(bytes)
                   : "memory");
    }
#endif
    uint32_t phase = turn_ / COUNT & 1;
    wait_for(current(), phase);
    pass();
  }
  __device__ __forceinline__ void pass() { ++turn_; }

 private:
  __device__ __forceinline__ uint32_t current() const { return barriers_ + 8 * place(); }

  uint32_t barriers_, turn_ = 0;
};

// A cluster of one block, without any of this.
struct NoCluster {
  static constexpr bool many = false;
  __device__ static int rank() { return 0; }
  __device__ static int size() { return 1; }
  __device__ static void sync() { __syncthreads(); }
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
