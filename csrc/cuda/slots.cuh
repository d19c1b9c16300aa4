// What the scanning warps of quick_select.cuh hand over to those that solve, and how: slots on
// chip, their barriers, and what goes by way of memory of a row in several units.
#pragma once

#include "few_select.cuh"
#include "maxima.cuh"
#include "unit.cuh"

namespace softtopk::cuda {

inline constexpr int kScanningWarps = kScanners / 32;
// Candidates of a row from one warp that there is room for: where few are wanted, and where more
// are, for which blocks have less of a multiprocessor.
inline constexpr int kFewOfWarp = 96, kManyOfWarp = 256;
template <int OF_WARP>
inline constexpr int kMostFew = kScanningWarps * OF_WARP;
template <int OF_WARP>
inline constexpr int kMaximaFor = OF_WARP > kFewOfWarp ? 2 * kMaxima : kMaxima;
template <int OF_WARP>
inline constexpr int kMostWanted = kMaximaFor<OF_WARP> / 4 * 3;  // of so many maxima
inline constexpr int kMostParts = 16;                            // units of a row
inline constexpr int kMostSolvers = 3;                           // warps of a block that solve
static_assert(int64_t(kMostParts) * kMostStripes * kScanners * 8 <= int64_t(1)
                                                                        << (32 - kPlaceBits));
static_assert(kMostFew<kManyOfWarp> <= 1 << kPlaceBits);
inline constexpr int kTooMany = 0x10000;  // a count of candidates that are not to be had

// A block hands rows over in slots, one for each of its solving warps. Of each slot two barriers,
// at which its solver meets all that scan: one when it is empty, and one when it is filled. (Where
// only one scanning warp came to the second, for the others as well, racecheck took the slot for
// contended.) They are spelled out, for a barrier whose number is not known counts as all of a
// block's, of which a multiprocessor has not enough.
enum class Barrier { emptied, filled };
template <Barrier B, class F>
__device__ __forceinline__ void with_barrier(int slot, F f) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kMostSolvers; ++i) {
    if (slot == i) f(2 + 2 * i + int(B));
  }
}
template <Barrier B>
__device__ __forceinline__ void arrive_at(int slot) {
  with_barrier<B>(slot, [](int barrier) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kScanners + 32) : "memory");
  });
}
template <Barrier B>
__device__ __forceinline__ void wait_at(int slot) {
  with_barrier<B>(slot, [](int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kScanners + 32) : "memory");
  });
}

// *to += value by one thread of a warp, in memory. What the block wrote before, all see that read
// the sum, and the warp sees what others did that added before.
__device__ __forceinline__ int32_t add_in_order(int32_t* to, int32_t value) {
  int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(to), "r"(value)
               : "memory");
  return before;
}

// The candidates of a warp that there is room for in memory, of a row in several units.
constexpr int32_t room_in_memory(int parts) { return 192 / parts + 12; }

struct Entry {
  float value;
  int32_t index;
};
// What is known of candidates: above which value the threshold must lie, -infinity if all positive
// activations are candidates; bounds on all values.
struct Taken {
  float limit, least, most;
};
// The same of a unit in memory, with how many each warp has, more than its room if they are not all
// there.
struct alignas(16) Part {
  int32_t counts[kScanningWarps];
  Taken taken;
};

// A row's numbers.
struct Request {
  Budget k;
  float alpha;
  int32_t wanted;  // maxima that reach the bound; 0: the row is not for this kernel
};

// What is handed over. A warp's candidates are kScanningWarps places apart. Those of a row in
// several units go by way of memory, and the places here are the solving warp's.
template <int OF_WARP>
struct alignas(16) Slot {
  union {
    uint4 maxima[kMaximaFor<OF_WARP> / 4];  // keys, before there are candidates
    float values[kMostFew<OF_WARP>];
  };
  int32_t indices[kMostFew<OF_WARP>];
  union {
    uint16_t order[kMostFew<OF_WARP>];
    int32_t starts[kScanningWarps * kMostParts];  // of the candidates in memory
  };
  int32_t counts[kScanningWarps];
  Taken taken;
  int32_t unit;  // -1: there are no more
  Request request;
};

struct SelectShared {
  uint64_t barrier;
  float2 limits;    // the bound and the maximum
  Request request;  // of the unit's row
  int32_t next;     // unit
};

// What a block has besides: the unit, and the slots after it.
__host__ __device__ constexpr int32_t unit_bytes(int items) { return items * kScanners * 16; }
template <int OF_WARP>
__host__ __device__ constexpr int32_t select_bytes(int items, int solvers) {
  return unit_bytes(items) + solvers * int32_t(sizeof(Slot<OF_WARP>));
}

}  // namespace softtopk::cuda
