// hard_topk's indices and values for rows on chip and k of up to some hundreds.
//
// One pass over memory: the copy engine brings a row, the indices are written. All warps take the
// maxima of groups, one of them finds a bound that at least k of these reach; all list the groups
// that do, and that one looks for the elements above the bound in these alone. Then the next row is
// asked for, and the same warp selects and orders the few elements it has found, while the others
// already wait for the next row, whose one warp is another. A row that does not fit the pattern is
// marked, and left to hard_topk.cu.
//
// The ladder, in fractions of reading the row (H200, k = 64, float32 n = 4096 | 16384 | 65536,
// bfloat16 n = 4096 | 16384 | 65536), up to the last line without the values, which torch fetched:
//   0.37 | 0.62 | 0.41                       the next row asked for after the ranking, cluster
//                                            barriers, every element compared with the bound
//   0.29 | 0.58 | 0.35                       a warp for a short row; all warps look at all
//                                            candidates
//   0.44 | 0.74 | 0.45                       blocks of 128, only warps with candidates look, the
//                                            next row asked for before, messages
//   0.80 | 0.93 | 0.92, 0.40 | 0.86 | 0.92   as above
//   0.80 | 0.93 | 0.92, 0.58 | 0.86 | 0.92   blocks of 64 for the shortest rows
#pragma once

#include "maxima.cuh"

namespace softtopk::cuda {

struct IndicesArgs {
  Rows x;
  PerRow k;
  int64_t max_k;
  int64_t* indices;
  void* values;  // not written where it is null
  int64_t* counts;
  bool wide_x;
  bool fed;      // of rows on chip: by the copy engine
  int32_t room;  // and the words that a block has for candidates
  int64_t first_row;
};

// Writes place `place` of row r of the results.
template <class S>
__device__ __forceinline__ void write_selected(const IndicesArgs& args, int64_t r, int64_t place,
                                               int64_t index, Compute<S> value) {
  using Raw = typename Element<S>::Raw;
  place += r * args.max_k;
  args.indices[place] = index;
  if (args.values != nullptr) {
    const Raw sign = args.x.largest ? Raw(0) : Element<S>::sign;
    static_cast<Raw*>(args.values)[place] = Element<S>::raw(value) ^ sign;
  }
}
// What is written to an unused one.
template <class S>
__device__ __forceinline__ void write_unused(const IndicesArgs& args, int64_t r, int64_t place) {
  using Raw = typename Element<S>::Raw;
  place += r * args.max_k;
  args.indices[place] = -1;
  if (args.values != nullptr) static_cast<Raw*>(args.values)[place] = 0;
}

inline constexpr int64_t kLeftCount = -2;  // marks a row, in the place of its count
inline constexpr int kFewMaxima = 96;      // as many at most reach a bound that one warp finds

template <class H>
struct HardShared {
  uint64_t barrier;
  union {
    uint4 maxima[kMaxima / 4];     // keys
    uint16_t groups[kMostRanked];  // that reach the bound
  };
  LimitsShared<H> limits;
  int32_t listed;
  int32_t kept;
  // What the blocks of a cluster tell the first.
  uint64_t mailboxes[2];
  int32_t counts_of_blocks[kMostBlocks];
};

// By all threads: lists the groups whose keys reach the bound, thread + threads * number, in any
// order, and counts them. `groups` has room for kMostRanked.
template <class H>
__device__ __forceinline__ void list_groups(const uint32_t (&key)[kGroupsOf<H>], float bound,
                                            uint16_t* groups, int32_t* listed) {
  const int lane = int(threadIdx.x) % 32;
  const uint32_t least = key_of(bound == 0 ? -0.0f : bound);
  uint32_t reach = 0;
#pragma unroll
  for (int i = 0; i < kGroupsOf<H>; ++i) reach |= uint32_t(key[i] >= least) << i;
  const int all = __reduce_add_sync(~0u, __popc(reach));
  if (all == 0) return;
  int place = 0;
  if (lane == 0) place = atomicAdd(listed, all);
  place = __shfl_sync(~0u, place, 0);
  for (uint32_t lanes; (lanes = __ballot_sync(~0u, reach != 0)) != 0; place += __popc(lanes)) {
    const int mine = place + __popc(lanes & ((1u << lane) - 1));
    if (reach != 0 && mine < kMostRanked) {
      groups[mine] = uint16_t(threadIdx.x + H::threads * (__ffs(int(reach)) - 1));
    }
    reach &= reach - 1;
  }
}

// By one warp: f(place, candidate) for the elements of the listed groups that reach the bound.
// Returns their number.
template <class H, class F>
__device__ __forceinline__ int32_t collect(const ResidentRow<H>& row, float bound,
                                           const uint16_t* groups, int32_t listed, F f) {
  constexpr int kSize = Chunk<typename H::S>::size;
  const int lane = int(threadIdx.x) % 32;
  int32_t count = 0;
  for (int32_t first = 0; first < listed; first += 32) {
    const bool any = first + lane < listed;
    const int32_t group = any ? groups[first + lane] : 0;
    const int32_t thread = group % H::threads;
#pragma unroll 1
    for (int start = 0; start < row.items(); start += kGroupsOf<H>) {
      const int item = start + group / H::threads;
      uint32_t found = 0;
      if (any && item < row.items()) {
        float x[kSize];
        row.read(item, x, thread);
#pragma unroll
        for (int i = 0; i < kSize; ++i) found |= uint32_t(x[i] >= bound) << i;
      }
      for (uint32_t lanes; (lanes = __ballot_sync(~0u, found != 0)) != 0; count += __popc(lanes)) {
        if (found != 0) {
          const int32_t index = row.map().index(item, __ffs(int(found)) - 1, thread);
          f(count + __popc(lanes & ((1u << lane) - 1)),
            Candidate::of(row.element(item, index), index));
        }
        found &= found - 1;
      }
    }
  }
  return count;
}

template <class H>
__global__ void __launch_bounds__(H::threads, H::C::many          ? 3
                                              : H::threads <= 128 ? 1280 / H::threads
                                                                  : 4)
    hard_quick(const IndicesArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ HardShared<H> shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kWarps = H::threads / 32, kKeys = kGroupsOf<H>;
  static_assert(kKeys * H::threads <= 0x10000);
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x);
  const int warp = t / 32, lane = t % 32;
  const Mapping<H> map{n};
  ResidentRow<H> row(memory, &shared.barrier, map);
  // Those of a cluster's blocks lie one after the other in the first block.
  Candidate* candidates = reinterpret_cast<Candidate*>(memory + (row.slot_bytes() + 15) / 16 * 16);
  const int32_t room = args.room / 2 / C::size();
  Mailbox<2> bounds(shared.limits.mailboxes);
  Mailbox<> counts(&shared.mailboxes[0]), values(&shared.mailboxes[1]);
  C::sync();

  const int step = int(gridDim.x) / C::size();
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
  uint32_t phase = 0;
  if (fed(first_row)) row.ask(data(first_row), warp == 0);
  int32_t k = budget(first_row);
  // The warps take turns, as each has its place among those of other blocks; messages are the
  // first one's.
  int turn = 0;
  for (int64_t r = first_row; r < args.x.rows; r += step) {
    const bool in_turn = warp == turn;
    if constexpr (!C::many) turn = (turn + 1) % kWarps;
    if (fed(r)) {
      row.template wait<1>(phase);
      phase ^= 1;
    } else {
      H::sync();  // the row before has been read
      row.copy(data(r), args.wide_x);
    }
    bool usual = false;
    if (k > 0) {
      if (!args.x.largest) row.negate();
      Maxima<kKeys> maxima;
      keys_of_maxima(row, maxima.key);
      find_limits(maxima, (k - 1) / C::size() + 1, kFewMaxima, in_turn, shared.maxima,
                  shared.limits, bounds);
      if (in_turn && lane == 0) shared.listed = 0;
      H::sync();
      // Not where there is NaN or an infinite element.
      const float2 limits = shared.limits.limits;
      usual = limits.x > -infinity<float> && limits.y < infinity<float>;
      if (usual) list_groups<H>(maxima.key, limits.x, shared.groups, &shared.listed);
    }
    H::sync();  // the row has been read, but for the groups listed
    const float2 limits = shared.limits.limits;
    int32_t count = 0;
    if (in_turn) {
      if (usual) {
        const auto keep = [&](int32_t place, const Candidate& candidate) {
          if (place >= room) return;
          if constexpr (C::many) {
            values.send(candidates + C::rank() * room + place, 0, candidate);
          } else {
            candidates[place] = candidate;
          }
        };
        count = collect(row, limits.x, shared.groups, min(shared.listed, kMostRanked), keep);
      }
      if constexpr (C::many) {
        if (lane == 0 && k > 0) counts.send(&shared.counts_of_blocks[C::rank()], 0, count);
      }
      __syncwarp();
    }
    if (fed(r + step)) row.ask(data(r + step), in_turn);
    const int32_t row_k = k;
    if (args.k.data != nullptr && r + step < args.x.rows) k = budget(r + step);
    if (C::rank() != 0) continue;

    if (in_turn) {
      // Nor where there are too many ties at the bound.
      usual = usual && count < room;
      if constexpr (C::many) {
        if (row_k > 0) {
          counts.receive(C::size() * sizeof(int32_t));
          int32_t sent = 0;
          for (int b = 0; b < C::size(); ++b) sent += min(shared.counts_of_blocks[b], room);
          values.receive(sent * sizeof(Candidate));
        }
        for (int b = 1; b < C::size() && usual; ++b) {  // up to those of the blocks before
          const int32_t more = shared.counts_of_blocks[b];
          usual = more < room;
          for (int32_t i = lane; i - lane < more && usual; i += 32) {
            Candidate moved{};
            if (i < more) moved = candidates[b * room + i];
            __syncwarp();
            if (i < more) candidates[count + i] = moved;
          }
          count += more;
        }
        usual = usual && count <= kMostRanked;
      }
      __syncwarp();
      if (usual) {
        if (count <= 128) {
          keep_largest<4, Element<S>::grain>(candidates, count, row_k, limits.x, limits.y);
        } else {
          keep_largest<kMostRanked / 32, Element<S>::grain>(candidates, count, row_k, limits.x,
                                                            limits.y);
        }
        for (int64_t i = row_k + lane; i < args.max_k; i += 32) write_unused<S>(args, r, i);
      }
      if (lane == 0) {
        args.counts[r] = usual ? row_k : kLeftCount;
        shared.kept = usual ? row_k : 0;
      }
    }
    const auto write = [&](int32_t place, const Candidate& candidate) {
      write_selected<S>(args, r, place, candidate.index(), candidate.value());
    };
    if (row_k > kMostOfWarp) {
      H::sync();
      block_in_order(candidates, shared.kept, write);
    } else if (in_turn && usual) {
      warp_in_order(candidates, row_k, write);
    }
  }
  C::sync();  // a block that has left can no longer be written to
}

}  // namespace softtopk::cuda
