// A row in the shared memory of one block, or shared out over those of a cluster (layout.cuh).
// Places beyond its end read as -inf, or 0 in rows that are only weighted.
#pragma once

#include "ragged.cuh"

namespace softtopk::cuda {

__device__ __forceinline__ float max_with_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}
__device__ __forceinline__ float min_with_nan(float a, float b) {
  float m;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}

// Of two pairs of 16-bit elements the larger ones, the smaller ones, and masks of which of `a` are
// as large as those of `b` and which are larger.
template <class S>
__device__ __forceinline__ uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  uint32_t both = a;
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<S, __half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
  }
#endif
  return both;
}
template <class S>
__device__ __forceinline__ uint32_t min_of_pairs(uint32_t a, uint32_t b) {
  uint32_t both = a;
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<S, __half>) {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
  } else {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
  }
#endif
  return both;
}
template <class S>
using PairOf = std::conditional_t<std::is_same_v<S, __half>, __half2, __nv_bfloat162>;
template <class S>
__device__ __forceinline__ uint32_t pairs_from(uint32_t a, uint32_t b) {
  return __hge2_mask(reinterpret_cast<const PairOf<S>&>(a), reinterpret_cast<const PairOf<S>&>(b));
}
template <class S>
__device__ __forceinline__ uint32_t pairs_above(uint32_t a, uint32_t b) {
  return __hgt2_mask(reinterpret_cast<const PairOf<S>&>(a), reinterpret_cast<const PairOf<S>&>(b));
}

template <class H>
class ResidentRow {
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  static constexpr int kSize = Chunk<S>::size;

 public:
  // `slot` is aligned to 16 bytes and of slot_bytes(), `barrier` no other's.
  __device__ ResidentRow(unsigned char* slot, uint64_t* barrier, const Mapping<H>& map,
                         bool weighted = false)
      : padding_(weighted ? Raw(0) : Element<S>::minus_infinity),
        map_(map),
        slot_(slot),
        barrier_(shared_address(barrier)),
        items_(map.items()) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier_) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#endif
    // What lies beyond the end is never written again, but for a ragged row's pad(). Where that row
    // is shifted, the chunk after a piece counts too.
    Chunk<S> padding{};
#pragma unroll
    for (int i = 0; i < kSize; ++i) padding.set_raw(i, padding_);
    for_each([&](int item) {
      if (map_.index(item, 0) >= map_.n) *chunk_at(item) = padding.words;
      if (H::ragged && (C::many || item == items_ - 1) && threadIdx.x == 0) {
        *chunk_at(item, H::threads) = padding.words;
      }
    });
    release();
    H::sync();
  }

  // Asks the copy engine for the row at `data`; nothing in shared memory is being read any more. By
  // one warp, which is `asking`: in a cluster every lane asks for a piece of its own. Whole 16-byte
  // granules are copied: those of its ends belong to the neighbours.
  __device__ void ask(const void* data, bool asking) {
    static_assert(kMostItems <= 32);
#if __CUDA_ARCH__ >= 900
    skip_ = int32_t(reinterpret_cast<uintptr_t>(data) % 16);
    if (!asking) return;
    const uint64_t first = reinterpret_cast<uint64_t>(data),
                   end = first + uint64_t(map_.n) * sizeof(S);
    const int lane = (H::ragged ? anew(int(threadIdx.x)) : int(threadIdx.x)) % 32;
    if (!C::many && lane != 0) return;
    Granules part = {0, 0};
    if (!C::many || lane < items_) part = granules(first, end, lane);
    const uint32_t total = C::many ? __reduce_add_sync(~0u, part.size) : part.size;
    if (lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier_), "r"(total)
                   : "memory");
    }
    if (C::many) __syncwarp();
    if (part.size > 0) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
          "[%3];" ::"r"(shared_address(slot_) + lane * H::stride),
          "l"(part.from), "r"(part.size), "r"(barrier_)
          : "memory");
    }
#endif
  }
  // Waits for what was asked for, by all threads; `phase` is 0 the first time, 1 the second, 0 the
  // third. Of a ragged row each may then read what its warp owns, and more only after a barrier.
  // TOGETHER: as many registers times four as the kernel has to spare for that.
  template <int TOGETHER>
  __device__ void wait(uint32_t phase) {
    wait_for(barrier_, phase);
    if constexpr (H::ragged) {
      if (skip_ != 0) Mover<H, TOGETHER>::move(slot_, items_, skip_);
      pad();
      skip_ = 0;  // not kept in a register
      release();
      __syncwarp();
    }
  }
  // The same without the copy engine.
  __device__ void copy(const void* data, bool aligned) {
    const Raw* row = static_cast<const Raw*>(data);
    skip_ = 0;
    for_each([&](int item) {
      const int32_t first = map_.index(item, 0), piece = map_.piece(item);
      if (!H::ragged && aligned) {
        if (first < map_.n) *chunk_at(item) = __ldg(reinterpret_cast<const uint4*>(row + first));
        return;
      }
      Raw* to = elements(item);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const int32_t place = i * H::threads + int32_t(threadIdx.x);
        to[place] = piece + place < map_.n ? row[piece + place] : padding_;
      }
    });
    release();
    H::sync();
  }

  // Every element negated; each thread reads none but its own.
  __device__ void negate() {
    for_each([&](int item) {
      const int32_t left = map_.n - map_.index(item, 0);
      if (left <= 0) return;
      Chunk<S> chunk{*chunk_at(item)}, signs{};
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        signs.set_raw(i, !H::ragged || i < left ? Element<S>::sign : 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) chunk.word(i) ^= signs.word(i);
      *chunk_at(item) = chunk.words;
    });
    release();
  }

  // f(item), item = 0, 1, ..., equally often in all threads. Many small blocks of 16-bit rows, each
  // at a place of its own in the code, are quicker with less of it: it does not fit in its cache.
  template <int TOGETHER = sizeof(S) == 2 && H::threads <= 64 ? 1 : 16 / kSize, class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll TOGETHER
    for (int item = 0; item < items_; ++item) f(item);
  }
  __device__ int items() const { return items_; }
  // Thread t's chunk.
  __device__ __forceinline__ void read(int item, Compute<S> (&x)[kSize],
                                       int32_t t = int32_t(threadIdx.x)) const {
    Chunk<S>{*chunk_at(item, uint32_t(t))}.read(x);
  }
  // The same as it is stored, and in its place another; chunks beyond the end stay.
  __device__ __forceinline__ Chunk<S> chunk(int item, int32_t t = int32_t(threadIdx.x)) const {
    return {*chunk_at(item, uint32_t(t))};
  }
  __device__ __forceinline__ void replace(int item, const Chunk<S>& chunk) {
    if (map_.index(item, 0) < map_.n) *chunk_at(item) = chunk.words;
  }
  // What was replaced is the copy engine's to overwrite.
  __device__ static void release() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }
  // The largest and the smallest of the calling thread's chunk; NaN if there is one.
  __device__ __forceinline__ float max(int item) const { return extreme<false>(item); }
  __device__ __forceinline__ float min(int item) const { return extreme<true>(item); }
  // Of 16-bit elements, the largest in even places and the largest in odd ones.
  __device__ __forceinline__ uint32_t pair_of_maxima(int item) const {
    return of_pairs<false>(*chunk_at(item));
  }
  // Whether one of the calling thread's chunk equals `value`, which is of S.
  __device__ __forceinline__ bool holds(int item, float value) const {
    if constexpr (sizeof(S) == 2) {
      const uint32_t wanted = Element<S>::raw(value) * 0x10001u;
      const uint4 words = *chunk_at(item);
      return (equal_pairs(words.x, wanted) | equal_pairs(words.y, wanted) |
              equal_pairs(words.z, wanted) | equal_pairs(words.w, wanted)) != 0;
    } else {
      float x[kSize];
      read(item, x);
      bool here = false;
#pragma unroll
      for (int i = 0; i < kSize; ++i) here = here || x[i] == value;
      return here;
    }
  }
  // Any element of this block's part.
  __device__ Compute<S> element(int32_t index) const {
    const int32_t piece = index / Mapping<H>::piece_elements();
    return Element<S>::value(
        elements(piece / C::size())[index - piece * Mapping<H>::piece_elements()]);
  }
  // The one at `index`, which is in a chunk `item`.
  __device__ Compute<S> element(int item, int32_t index) const {
    return Element<S>::value(elements(item)[index - map_.piece(item)]);
  }
  // The first of a piece.
  __device__ Raw* elements(int item) const {
    return reinterpret_cast<Raw*>(slot_ + item * H::stride);
  }
  __device__ const Mapping<H>& map() const { return map_; }
  __device__ int32_t slot_bytes() const { return items_ * H::stride + 16; }

 private:
  template <bool LEAST>
  __device__ __forceinline__ float extreme(int item) const {
    if constexpr (sizeof(S) == 2) {
      const uint4 words = *chunk_at(item);
      const uint32_t both = of_pairs<LEAST>(words);
      return of_two<LEAST>(Element<S>::value(Raw(both)), Element<S>::value(Raw(both >> 16)));
    } else {
      float x[kSize];
      read(item, x);
#pragma unroll
      for (int half = kSize / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; ++i) x[i] = of_two<LEAST>(x[i], x[i + half]);
      }
      return x[0];
    }
  }
  template <bool LEAST>
  __device__ static float of_two(float a, float b) {
    return LEAST ? min_with_nan(a, b) : max_with_nan(a, b);
  }
  template <bool LEAST>
  __device__ static uint32_t of_pairs(const uint4& words) {
    if (LEAST) {
      return min_of_pairs<S>(min_of_pairs<S>(words.x, words.y), min_of_pairs<S>(words.z, words.w));
    }
    return max_of_pairs<S>(max_of_pairs<S>(words.x, words.y), max_of_pairs<S>(words.z, words.w));
  }
  __device__ static uint32_t equal_pairs(uint32_t a, uint32_t b) {
    return __heq2_mask(reinterpret_cast<const PairOf<S>&>(a),
                       reinterpret_cast<const PairOf<S>&>(b));
  }
  struct Granules {
    uint64_t from;
    uint32_t size;
  };
  __device__ Granules granules(uint64_t first, uint64_t end, int item) const {
    uint64_t from = first, to = end;
    if (C::many) {
      from = first + uint64_t(map_.piece(item)) * sizeof(S);
      if (from >= end) return {0, 0};
      to = from + uint64_t(H::threads) * 16 < end ? from + uint64_t(H::threads) * 16 : end;
    }
    from &= ~uint64_t(15);
    return {from, uint32_t(((to + 15) & ~uint64_t(15)) - from)};
  }
  // Puts padding where a granule of the copy engine may have reached beyond the end.
  __device__ __forceinline__ void pad() {
    const int item = items_ - 1, t = anew(int(threadIdx.x));
    const int32_t left = map_.n - map_.index(item, 0, t);
    if (left >= kSize || left <= -kSize) return;
    Raw* const own = elements(item) + t * kSize;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i >= left) own[i] = padding_;
    }
  }
  __device__ uint4* chunk_at(int item, uint32_t t = threadIdx.x) const {
    return reinterpret_cast<uint4*>(slot_ + t * 16 + item * H::stride);
  }

  Raw padding_;
  Mapping<H> map_;
  unsigned char* slot_;
  uint32_t barrier_;
  int32_t skip_ = 0;  // bytes before the first element in each piece that was asked for
  int items_;
};

// Writes chunks to the places of a row that a ResidentRow has them from.
template <class H>
class ResidentSink {
  using S = typename H::S;
  using Raw = typename Element<S>::Raw;
  static constexpr int kSize = Chunk<S>::size;

 public:
  __device__ ResidentSink(void* row, const Mapping<H>& map, bool aligned)
      : row_(static_cast<Raw*>(row)), map_(map), aligned_(aligned) {}
  // f(item) is the calling thread's chunk, and the last to read the row there. Ragged ones take the
  // row's place on chip, until they are flushed.
  template <class F>
  __device__ __forceinline__ void fill(ResidentRow<H>& row, F f) const {
    if constexpr (H::ragged) {
      row.for_each([&](int item) { row.replace(item, f(item)); });
    } else if (aligned_) {
      const int32_t first = map_.index(0, 0), step = map_.index(1, 0) - first;
      const int mine = first < map_.n ? (map_.n - first + step - 1) / step : 0;
      Raw* to = row_ + first;
      row.for_each([&](int item) {
        const Chunk<S> chunk = f(item);
        if (item < mine) store_global(to, chunk.words);
        to += step;
      });
    } else {
      row.for_each([&](int item) {
        const Chunk<S> chunk = f(item);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const int32_t index = map_.index(item, i);
          if (index < map_.n) row_[index] = chunk.raw(i);
        }
      });
    }
  }
  // Writes what fill() has left on chip, by all threads.
  __device__ __forceinline__ void flush(const ResidentRow<H>& row) const {
    if constexpr (H::ragged) {
      row.release();
      Writer<H>::write(reinterpret_cast<unsigned char*>(row.elements(0)), row.items(), row_, map_);
    }
  }

 private:
  Raw* row_;
  Mapping<H> map_;
  bool aligned_;
};

}  // namespace softtopk::cuda
