// hard_topk's indices for rows on chip and k of up to some hundreds.
//
// One pass over memory: the copy engine brings a row, the indices are written. In between two
// sweeps over shared memory: the maxima of groups, whence a bound that at least k elements reach;
// one that collects those. Among these few every thread ranks its own. A row that does not fit the
// pattern is marked, and left to hard_topk.cu.
#pragma once

#include "window.cuh"

namespace softtopk::cuda {

struct IndicesArgs {
  Rows x;
  PerRow k;
  int64_t max_k;
  int64_t* indices;
  int64_t* counts;
  bool wide_x;
  bool fed;  // of rows on chip: by the copy engine
  int64_t first_row;
};

inline constexpr int64_t kLeftCount = -2;  // marks a row, in the place of its count
inline constexpr int kMostRanked = 512;    // candidates
inline constexpr int32_t kLast = 0x7fffffff;

template <int WARPS>
struct HardShared {
  uint64_t barrier;
  BoundShared<WARPS> bound;
  float2 bounds_of_blocks[kMostBlocks];
  int32_t counts[WARPS];
  int32_t counts_of_blocks[kMostBlocks];
};

template <class H>
__global__ void __launch_bounds__(H::threads, 1280 / H::threads)
    hard_quick(const IndicesArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ HardShared<H::threads / 32> shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size, kWarps = H::threads / 32, kGroups = 8, kKeys = 4;
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x);
  const int warp = t / 32, lane = t % 32;
  const Mapping<H> map{n};
  ResidentRow<H> row(memory, &shared.barrier, map);
  // A candidate: its key above kLast less its index, so that the larger of two is selected first.
  uint64_t* candidates = reinterpret_cast<uint64_t*>(memory + (row.slot_bytes() + 15) / 16 * 16);
  C::sync();

  const int64_t step = int64_t(gridDim.x) / C::size();
  // Whole granules of the last ragged row would reach beyond its end.
  const auto fed = [&](int64_t r) {
    if (!args.fed || r >= args.x.rows) return false;
    return H::ragged ? r + 1 < args.x.rows && args.x.stride >= n : args.wide_x;
  };
  for (int64_t r = int64_t(blockIdx.x) / C::size(); r < args.x.rows; r += step) {
    const double rounded = std::floor(per_row(args.k, r) + 0.5);
    const int32_t limit = int32_t(args.max_k < n ? args.max_k : n);
    const int32_t k = rounded < limit ? int32_t(rounded) : limit;
    if (!(rounded >= 1 && k >= 1 && k < 96 * kWarps * C::size())) {
      if (t == 0 && C::rank() == 0) args.counts[r] = kLeftCount;
      continue;
    }
    const Raw* data = static_cast<const Raw*>(args.x.data) + r * args.x.stride;
    if (fed(r)) {
      row.ask(data);
      row.wait();
    } else {
      row.copy(data, args.wide_x);
    }
    if (!args.x.largest) row.negate();

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
    uint32_t key[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) key[i] = key_of(max_with_nan(maxima[i], maxima[i + kKeys]));
    float2 limits = bound_of_block<kWarps>(key, (k - 1) / C::size() + 1, true, shared.bound);
    if constexpr (C::many) {
      if (t < C::size()) *C::at(&shared.bounds_of_blocks[C::rank()], t) = limits;
      C::sync();
      limits = shared.bounds_of_blocks[0];
      for (int i = 1; i < C::size(); ++i) limits = widest(limits, shared.bounds_of_blocks[i]);
    }
    const float L = limits.x;

    uint32_t found_in = 0;  // items with candidates
    int32_t mine = 0;
    row.for_each([&](int item) {
      float x[kSize];
      row.read(item, x);
      const int32_t before = mine;
#pragma unroll
      for (int i = 0; i < kSize; ++i) mine += x[i] >= L;
      if (mine != before) found_in |= 1u << item;
    });
    const int32_t upto = int32_t(inclusive_scan<32>(unsigned(mine), lane));
    if (lane == 31) shared.counts[warp] = upto;
    __syncthreads();
    int32_t place = upto - mine, total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) place += shared.counts[i];
      total += shared.counts[i];
    }
    if constexpr (C::many) {
      if (t < C::size()) *C::at(&shared.counts_of_blocks[C::rank()], t) = total;
      C::sync();
      total = 0;
      for (int i = 0; i < C::size(); ++i) {
        if (i < C::rank()) place += shared.counts_of_blocks[i];
        total += shared.counts_of_blocks[i];
      }
    }
    // NaN, infinite elements, or too many ties at the bound.
    const bool usual = L > -infinity<float> && limits.y < infinity<float> && total <= kMostRanked;
    if (usual) {
      uint64_t* to = C::at(candidates, 0);
      for (; found_in != 0; found_in &= found_in - 1) {
        const int item = __ffs(int(found_in)) - 1;
        float x[kSize];
        row.read(item, x);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const uint32_t key = key_of(x[i] + 0.0f);  // -0 becomes +0
          if (x[i] >= L) to[place++] = uint64_t(key) << 32 | uint32_t(kLast - map.index(item, i));
        }
      }
    }
    C::sync();
    if (C::rank() == 0) {
      if (usual) {
        // Selected are those with fewer than k above them; where, the number of those with lower
        // indices.
        uint32_t selected[(kMostRanked + H::threads - 1) / H::threads];
#pragma unroll
        for (int j = 0; j < (kMostRanked + H::threads - 1) / H::threads; ++j) {
          const int32_t i = j * H::threads + t;
          selected[j] = 0;
          if (i < total) {
            const uint64_t own = candidates[i];
            int32_t above = 0;
#pragma unroll 8
            for (int32_t other = 0; other < total; ++other) above += candidates[other] > own;
            if (above < k) selected[j] = uint32_t(own) + 1;
          }
        }
        __syncthreads();
        uint32_t* chosen = reinterpret_cast<uint32_t*>(candidates);
#pragma unroll
        for (int j = 0; j < (kMostRanked + H::threads - 1) / H::threads; ++j) {
          const int32_t i = j * H::threads + t;
          if (i < total) chosen[i] = selected[j];
        }
        __syncthreads();
        int64_t* indices = args.indices + r * args.max_k;
#pragma unroll
        for (int j = 0; j < (kMostRanked + H::threads - 1) / H::threads; ++j) {
          if (selected[j] == 0) continue;
          int32_t before = 0;
#pragma unroll 8
          for (int32_t other = 0; other < total; ++other) before += chosen[other] > selected[j];
          indices[before] = int64_t(kLast - int32_t(selected[j] - 1));
        }
        for (int64_t i = k + t; i < args.max_k; i += H::threads) indices[i] = -1;
      }
      if (t == 0) args.counts[r] = usual ? k : kLeftCount;
    }
    C::meet();  // the row has been read, and so have the candidates
  }
}

}  // namespace softtopk::cuda
