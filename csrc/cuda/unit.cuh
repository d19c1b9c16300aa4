// The part of a row that one block has on chip, where rows are only read.
//
// Memory comes in granules of 16 bytes. A row takes the granules that it touches, wherever it
// starts, so that its first and last may hold neighbours' elements, which are made -inf here. Its
// granules are cut into stripes of one for each scanning thread; of a row in P parts the p-th has
// stripes p, p + P, ..., so that what is sorted or comes in clumps is spread evenly.
#pragma once

#include "layout.cuh"

namespace softtopk::cuda {

inline constexpr int kScanners = 128;    // threads that read a unit
inline constexpr int kMostStripes = 32;  // of a unit: a warp asks for them

// How rows are cut.
struct Units {
  int parts;    // units of a row
  int items;    // stripes of a unit
  bool ragged;  // some row does not start or end with a granule
  bool fed;     // by the copy engine
};

// By the scanning threads, that is the first kScanners of a block.
__device__ __forceinline__ void sync_scanners() {
  asm volatile("bar.sync 1, %0;" ::"n"(kScanners) : "memory");
}

template <class S>
class Unit {
  using Raw = typename Element<S>::Raw;
  static constexpr int kSize = Chunk<S>::size;

 public:
  // `slot` is aligned to 16 bytes and has items * kScanners * 16; a barrier of the block follows.
  __device__ Unit(unsigned char* slot, uint64_t* barrier, const Units& units, const Rows& x)
      : slot_(slot), barrier_(shared_address(barrier)), units_(units), x_(x) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier_) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#endif
  }

  // Makes unit u the one that is spoken of, which may be none.
  __device__ __forceinline__ void move_to(int32_t u) {
    int32_t row = u;
    if (units_.parts > 1) row = u / units_.parts, part_ = u - row * units_.parts;
    const uint64_t first =
        reinterpret_cast<uint64_t>(x_.data) + uint64_t(row * x_.stride) * sizeof(S);
    granule_ = first & ~uint64_t(15);
    skip_ = int32_t(first - granule_) / int32_t(sizeof(S));
    granules_ = int32_t((int64_t(skip_) + x_.n + kSize - 1) / kSize);
    // What follows the last row, or one that others overlap, may be nobody's to read.
    const bool partial = (skip_ + int32_t(x_.n % kSize)) % kSize != 0;
    alone_ = partial && (row + 1 == x_.rows || x_.stride < x_.n);
    // Only in the last stripe may there be nothing for a thread.
    own_ = units_.items - (granule(units_.items - 1) >= granules_);
  }

  // Asks the copy engine for it, by one warp; nothing in the slot is being read any more.
  __device__ __forceinline__ void ask() const {
#if __CUDA_ARCH__ >= 900
    const int lane = int(threadIdx.x) % 32;
    const int32_t whole = granules_ - alone_;
    int32_t first = 0, count = 0;
    if (units_.parts == 1) {
      if (lane == 0) count = whole;
    } else if (lane < units_.items) {
      first = granule(lane, 0);
      count = max(0, min(whole - first, kScanners));
    }
    const uint32_t all = uint32_t(__reduce_add_sync(~0u, count)) * 16;
    if (lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier_), "r"(all)
                   : "memory");
    }
    __syncwarp();
    if (count > 0) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
          "[%3];" ::"r"(shared_address(slot_) + lane * kScanners * 16),
          "l"(granule_ + uint64_t(first) * 16), "r"(count * 16), "r"(barrier_)
          : "memory");
    }
#endif
  }
  // Waits for it or brings it, by all scanners, and makes -inf what is not the row's. Each may then
  // read its own granules, and others' after a barrier.
  __device__ __forceinline__ void receive(uint32_t& phase) {
    if (units_.fed) {
      wait_for(barrier_, phase);
    } else {
      sync_scanners();  // the one before has been read
      for (int item = 0; item < units_.items; ++item) {
        const int32_t at = granule(item);
        if (at < granules_ - alone_) {
          *words(item, threadIdx.x) =
              __ldg(reinterpret_cast<const uint4*>(granule_ + uint64_t(at) * 16));
        }
      }
    }
    if (!units_.ragged) return;
    for (int item = 0; item < units_.items; ++item) {
      const int32_t at = granule(item), first = at * kSize - skip_;
      if (at >= granules_ || (first >= 0 && first + kSize <= x_.n)) continue;
      Raw* const own = reinterpret_cast<Raw*>(words(item, threadIdx.x));
      const Raw* const row = reinterpret_cast<const Raw*>(granule_) + skip_;
      for (int i = 0; i < kSize; ++i) {
        const bool inside = first + i >= 0 && first + i < x_.n;
        if (!inside) own[i] = Element<S>::minus_infinity;
        if (inside && alone_ && at == granules_ - 1) own[i] = row[first + i];
      }
      release();
    }
  }

  // The granule of the row that a thread has as its item-th.
  __device__ __forceinline__ int32_t granule(int item, int t = int(threadIdx.x)) const {
    return (item * units_.parts + part_) * kScanners + t;
  }
  // How many the calling thread has.
  __device__ __forceinline__ int own() const { return own_; }
  // The index of its first element, which may lie before the row's.
  __device__ __forceinline__ int32_t first(int item, int t = int(threadIdx.x)) const {
    return granule(item, t) * kSize - skip_;
  }
  __device__ __forceinline__ Chunk<S> chunk(int item, int t = int(threadIdx.x)) const {
    return {*words(item, uint32_t(t))};
  }
  __device__ __forceinline__ Compute<S> element(int item, int t, int i) const {
    return Element<S>::value(reinterpret_cast<const Raw*>(words(item, uint32_t(t)))[i]);
  }
  __device__ __forceinline__ void replace(int item, const Chunk<S>& chunk) {
    *words(item, threadIdx.x) = chunk.words;
  }
  // What was written here is the copy engine's to overwrite.
  __device__ static void release() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }

 private:
  __device__ __forceinline__ uint4* words(int item, uint32_t t) const {
    return reinterpret_cast<uint4*>(slot_ + (uint32_t(item) * kScanners + t) * 16);
  }

  unsigned char* slot_;
  uint32_t barrier_;
  const Units& units_;
  const Rows& x_;
  // Of the unit: the row's first granule in memory, the elements in it before the row, its number
  // of granules, how many the thread has, and whether the last is not to be read as a whole.
  uint64_t granule_ = 0;
  int32_t skip_ = 0, granules_ = 0, part_ = 0, own_ = 0;
  bool alone_ = false;
};

}  // namespace softtopk::cuda
