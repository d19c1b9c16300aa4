// hard_topk's indices for rows on chip and k of up to some hundreds.
//
// One pass over memory: the copy engine brings a row, the indices are written. In between two
// sweeps over shared memory: the maxima of groups, whence a bound that at least k elements reach;
// one that collects those. Then the next row is asked for, and among these few every thread of the
// first block ranks its own. A row that does not fit the pattern is marked, and left to
// hard_topk.cu.
//
// The ladder, in fractions of reading the row (H200, k = 64, float32, n = 4096 | 16384 | 65536):
//   0.37 | 0.62 | 0.41  as above, the next row after the ranking, cluster barriers
//   0.29 | 0.58 | 0.35  a warp for a short row; all warps look at all candidates
//   0.44 | 0.74 | 0.45  blocks of 128, only warps with candidates look, the next row asked for
//   before,
//                       messages instead of cluster barriers
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
  bool fed;      // of rows on chip: by the copy engine
  int32_t room;  // and the words that a block has for candidates
  int64_t first_row;
};

inline constexpr int64_t kLeftCount = -2;  // marks a row, in the place of its count
inline constexpr int kMostRanked = 512;    // candidates
inline constexpr int32_t kLast = 0x7fffffff;

template <int WARPS>
struct HardShared {
  uint64_t barrier;
  BoundShared<WARPS> bound;
  int32_t counts[WARPS];
  // What the blocks of a cluster tell each other; bounds of two rows, as a block may be ahead by
  // one.
  uint64_t mailboxes[4];
  float2 bounds_of_blocks[2][kMostBlocks];
  int32_t counts_of_blocks[kMostBlocks];
};

template <class H>
__global__ void __launch_bounds__(H::threads, H::threads == 32 ? 24 : 1280 / H::threads)
    hard_quick(const IndicesArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ HardShared<H::threads / 32> shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size, kWarps = H::threads / 32;
  constexpr int kMost = kWarps == 1 ? kMostRanked / 2 : kMostRanked;
  constexpr int kEach = (kMost + H::threads - 1) / H::threads;
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x);
  const int warp = t / 32, lane = t % 32;
  const Mapping<H> map{n};
  ResidentRow<H> row(memory, &shared.barrier, map);
  // A candidate: its key above kLast less its index, so that the larger of two is selected first.
  // Those of a cluster's blocks lie one after the other in the first block.
  uint64_t* candidates = reinterpret_cast<uint64_t*>(memory + (row.slot_bytes() + 15) / 16 * 16);
  const int32_t room = args.room / 2 / C::size();
  Mailbox bounds[2] = {Mailbox(&shared.mailboxes[0]), Mailbox(&shared.mailboxes[1])};
  Mailbox counts(&shared.mailboxes[2]), values(&shared.mailboxes[3]);
  int parity = 0;
  C::sync();

  const int64_t step = int64_t(gridDim.x) / C::size();
  const int32_t limit = int32_t(args.max_k < n ? args.max_k : n);
  // The row's k; 0: not for this kernel.
  const auto budget = [&](int64_t r) {
    const double rounded = std::floor(per_row(args.k, r) + 0.5);
    const int32_t k = rounded < limit ? int32_t(rounded) : limit;
    return rounded >= 1 && k < 2 * kMostBudget<H> * C::size() ? k : 0;
  };
  const auto data = [&](int64_t r) {
    return static_cast<const Raw*>(args.x.data) + r * args.x.stride;
  };
  // Whole granules of the last ragged row would reach beyond its end.
  const auto fed = [&](int64_t r) {
    if (!args.fed || r >= args.x.rows) return false;
    return H::ragged ? r + 1 < args.x.rows && args.x.stride >= n : args.wide_x;
  };
  const int64_t first_row = int64_t(blockIdx.x) / C::size();
  if (fed(first_row)) row.ask(data(first_row));
  for (int64_t r = first_row; r < args.x.rows; r += step) {
    if (fed(r)) {
      row.wait();
    } else {
      row.copy(data(r), args.wide_x);
    }
    const int32_t k = budget(r);
    bool usual = k > 0;
    int32_t total = 0;
    if (usual) {
      if (!args.x.largest) row.negate();
      uint32_t key[kKeysOf<H>];
      keys_of_maxima(row, key);
      float2 limits =
          bound_of_block<kWarps>(key, (k - 1) / C::size() + 1, kWarps > 1, shared.bound);
      if constexpr (C::many) {
        float2* of_blocks = shared.bounds_of_blocks[parity];
        const uint32_t bytes = C::size() * sizeof(float2);
        if (parity == 0) {
          if (t < C::size()) bounds[0].send(&of_blocks[C::rank()], t, limits);
          bounds[0].receive(bytes);
        } else {
          if (t < C::size()) bounds[1].send(&of_blocks[C::rank()], t, limits);
          bounds[1].receive(bytes);
        }
        parity ^= 1;
        limits = of_blocks[0];
        for (int i = 1; i < C::size(); ++i) limits = widest(limits, of_blocks[i]);
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
      int32_t place = upto - mine;
      total = __shfl_sync(~0u, upto, 31);
      if constexpr (kWarps > 1) {
        if (lane == 0) shared.counts[warp] = total;
        __syncthreads();
        total = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
          if (i < warp) place += shared.counts[i];
          total += shared.counts[i];
        }
      }
      // Not where there is NaN, an infinite element, or too many ties at the bound.
      usual = L > -infinity<float> && limits.y < infinity<float>;
      if (usual && total <= room) {
        for (; found_in != 0; found_in &= found_in - 1) {
          const int item = __ffs(int(found_in)) - 1;
          float x[kSize];
          row.read(item, x);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const uint32_t key = key_of(x[i] + 0.0f);  // -0 becomes +0
            if (!(x[i] >= L)) continue;
            const uint64_t candidate = uint64_t(key) << 32 | uint32_t(kLast - map.index(item, i));
            if constexpr (C::many) {
              values.send(candidates + C::rank() * room + place, 0, candidate);
            } else {
              candidates[place] = candidate;
            }
            ++place;
          }
        }
      }
      if constexpr (C::many) {
        if (t == 0) counts.send(&shared.counts_of_blocks[C::rank()], 0, total);
      }
    }
    H::sync();  // the row has been read
    if (fed(r + step)) row.ask(data(r + step));
    if (C::rank() != 0) continue;

    if constexpr (C::many) {
      if (k > 0) {
        counts.receive(C::size() * sizeof(int32_t));
        int32_t sent = 0;
        for (int b = 0; usual && b < C::size(); ++b) {
          const int32_t count = shared.counts_of_blocks[b];
          sent += count <= room ? count : 0;
        }
        values.receive(sent * sizeof(uint64_t));
      }
      usual = usual && total <= room;
      for (int b = 1; b < C::size(); ++b) {  // up to those of the blocks before
        const int32_t count = shared.counts_of_blocks[b];
        usual = usual && count <= room;
        if (!usual) break;
        const uint64_t moved = t < count ? candidates[b * room + t] : 0;
        const uint64_t more = t + H::threads < count ? candidates[b * room + H::threads + t] : 0;
        __syncthreads();
        if (t < count) candidates[total + t] = moved;
        if (t + H::threads < count) candidates[total + H::threads + t] = more;
        total += count;
      }
      __syncthreads();
    } else {
      usual = usual && total <= room;
    }
    usual = usual && total <= kMost;
    if (usual) {
      // Selected are those with fewer than k above them; where, the number of those with lower
      // indices.
      uint64_t own[kEach];
      int32_t above[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        own[j] = j * H::threads + t < total ? candidates[j * H::threads + t] : 0;
        above[j] = 0;
      }
      // Only warps that have any look at the others'; one warp compares all of its own at once.
      constexpr int kTogether = kWarps == 1 ? kEach : 1;
#pragma unroll
      for (int first = 0; first < kEach; first += kTogether) {
        const int32_t others = first * H::threads + warp * 32 < total ? total : 0;
#pragma unroll 4
        for (int32_t other = 0; other < others; ++other) {
          const uint64_t candidate = candidates[other];
#pragma unroll
          for (int j = first; j < first + kTogether; ++j) above[j] += candidate > own[j];
        }
      }
      H::sync();
      uint32_t* chosen = reinterpret_cast<uint32_t*>(candidates);
      uint32_t selected[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        selected[j] = own[j] != 0 && above[j] < k ? uint32_t(own[j]) + 1 : 0;
        if (j * H::threads + t < total) chosen[j * H::threads + t] = selected[j];
        above[j] = 0;
      }
      H::sync();
#pragma unroll
      for (int first = 0; first < kEach; first += kTogether) {
        const int32_t others = first * H::threads + warp * 32 < total ? total : 0;
#pragma unroll 8
        for (int32_t other = 0; other < others; ++other) {
          const uint32_t candidate = chosen[other];
#pragma unroll
          for (int j = first; j < first + kTogether; ++j) above[j] += candidate > selected[j];
        }
      }
      int64_t* indices = args.indices + r * args.max_k;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (selected[j] != 0) indices[above[j]] = int64_t(kLast - int32_t(selected[j] - 1));
      }
      for (int64_t i = k + t; i < args.max_k; i += H::threads) indices[i] = -1;
    }
    if (t == 0) args.counts[r] = usual ? k : kLeftCount;
    H::sync();  // the candidates have been read
  }
  C::sync();  // a block that has left can no longer be written to
}

}  // namespace softtopk::cuda
