// The code of rows on chip, for what is usual: few elements near the threshold or above it.
//
// One pass over memory: the copy engine brings a row, its code is written. As in
// quick_hard_topk.cuh all warps take the maxima of groups, and one of them finds a bound L that
// more than k of these reach, so that L lies below the threshold. All mark the groups that reach L
// less 32 alpha; what lies lower is below e^-32 of what lies at L. That warp takes the candidates
// from these groups in the order of their indices. Then the next row is asked for, and the same
// warp solves, while the others already wait for the next row, whose one warp is another. Where L
// less 32 alpha is not above the activation's threshold all elements that are take part, and the
// zeros are a tie below them. A row that does not fit the pattern, or whose solution is not right,
// is marked, and left to the careful kernel of sparse_select.cu.
//
// An activation with one threshold for all and no bias costs nothing: what is not above it is never
// a candidate. With a bias or thresholds every thread applies them to its own chunks on chip.
#pragma once

#include "few_select.cuh"
#include "maxima.cuh"

namespace softtopk::cuda {

inline constexpr int kMostFew = 512;      // candidates of a row
inline constexpr int kMostListed = 128;   // groups of a warp that are looked at
inline constexpr float kReach = 32;       // alphas below L that candidates reach
inline constexpr int kTooMany = 0x10000;  // is added to a count of candidates that is not complete

struct Entry {
  float value;
  int32_t index;
};

template <class H>
struct SelectShared {
  uint64_t barrier;
  union {
    uint4 maxima[kMaxima / 4];                      // keys
    uint16_t listed[H::threads / 32][kMostListed];  // groups
  };
  int32_t found;  // candidates
  bool missed;    // some were not looked at
  LimitsShared<H> limits;
  // What the blocks of a cluster tell the first.
  uint64_t mailboxes[2];
  int32_t counts_of_blocks[H::C::many ? kMostBlocks : 1];
};

// By all threads: f(place, value, index) for the elements from `least` on, in any order. A warp
// looks at the groups of its own threads that have any; 32 chunks at a time, as few threads have
// one.
template <class H, class F>
__device__ __forceinline__ void collect(const ResidentRow<H>& row,
                                        const uint32_t (&key)[kGroupsOf<H>], float least,
                                        SelectShared<H>& shared, F f) {
  constexpr int kSize = Chunk<typename H::S>::size, kGroups = kGroupsOf<H>;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const uint32_t lanes_below = (1u << lane) - 1, bound = key_of(least);
  uint16_t* const listed = shared.listed[warp];
  int groups = 0;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const bool reaches = key[i] >= bound;
    const uint32_t lanes = __ballot_sync(~0u, reaches);
    const int place = groups + __popc(lanes & lanes_below);
    if (reaches && place < kMostListed) listed[place] = uint16_t(32 * i + lane);
    groups += __popc(lanes);
  }
  if (groups == 0) return;
  if (groups > kMostListed) {
    if (lane == 0) shared.missed = true;
    return;
  }
  __syncwarp();
#pragma unroll 1
  for (int first = 0; first < groups; first += 32) {
    const bool any = first + lane < groups;
    const int group = any ? listed[first + lane] : 0, thread = 32 * warp + group % 32;
#pragma unroll 1
    for (int item = group / 32; __any_sync(~0u, any && item < row.items()); item += kGroups) {
      uint32_t found = 0;
      if (any && item < row.items()) {
        float x[kSize];
        row.read(item, x, thread);
#pragma unroll
        for (int i = 0; i < kSize; ++i) found |= uint32_t(x[i] >= least) << i;
      }
      const int mine = __popc(found);
      int before = 0, all = 0;
#pragma unroll
      for (int bit = 1; bit <= kSize; bit *= 2) {
        const uint32_t lanes = __ballot_sync(~0u, mine & bit);
        before += bit * __popc(lanes & lanes_below);
        all += bit * __popc(lanes);
      }
      if (all == 0) continue;
      int32_t place = 0;
      if (lane == 0) place = atomicAdd(&shared.found, all);
      place = __shfl_sync(~0u, place, 0) + before;
      for (; found != 0; found &= found - 1) {
        const int32_t index = row.map().index(item, __ffs(int(found)) - 1, thread);
        f(place++, row.element(item, index), index);
      }
    }
  }
}

// By one warp: puts up to 128 elements in the order of their indices. `indices` is aligned to 16
// bytes and has room for three more.
__device__ __forceinline__ void put_few_in_order(float* values, int32_t* indices, int count) {
  constexpr int kOwn = 4;
  const int lane = int(threadIdx.x) % 32;
  int32_t own[kOwn], place[kOwn];
  float value[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = 32 * j + lane;
    own[j] = i < count ? indices[i] : 0x7fffffff;
    value[j] = i < count ? values[i] : 0;
    place[j] = 0;
  }
  if (lane < 3) indices[count + lane] = 0x7fffffff;
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < count; i += 4) {
    const int4 four = *reinterpret_cast<const int4*>(indices + i);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      place[j] += int(four.x < own[j]) + int(four.y < own[j]);
      place[j] += int(four.z < own[j]) + int(four.w < own[j]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    if (32 * j + lane >= count) continue;
    values[place[j]] = value[j];
    indices[place[j]] = own[j];
  }
  __syncwarp();
}
// The same of any number, by a bitonic network whose comparators all point one way: what it would
// compare with places beyond the end is left out.
__device__ __forceinline__ void put_many_in_order(float* values, int32_t* indices, int count) {
#pragma unroll 1
  for (int size = 2; size < 2 * count; size *= 2) {
#pragma unroll 1
    for (int half = size / 2; half > 0; half /= 2) {
      const int flip = half == size / 2 ? size - 1 : half;
      for (int i = int(threadIdx.x) % 32; i < count; i += 32) {
        const int other = i ^ flip;
        if (other < i || other >= count) continue;
        const int32_t a = indices[i], b = indices[other];
        if (a < b) continue;
        const float value = values[i];
        indices[i] = b;
        indices[other] = a;
        values[i] = values[other];
        values[other] = value;
      }
      __syncwarp();
    }
  }
}

// By one warp: the elements that a cluster's blocks have sent, `room` places for each, one after
// the other.
template <class C>
__device__ __forceinline__ void join_blocks(const Entry* entries, const int32_t* counts,
                                            int32_t room, float* values, int32_t* indices) {
  int32_t before = 0;
  for (int b = 0; b < C::size(); ++b) {
    for (int32_t i = int(threadIdx.x) % 32; i < counts[b]; i += 32) {
      const Entry own = entries[b * room + i];
      values[before + i] = own.value;
      indices[before + i] = own.index;
    }
    before += counts[b];
  }
  __syncwarp();
}

// The row's numbers.
struct Request {
  Budget k;
  float alpha;
  int32_t wanted;  // maxima that reach the bound; 0: the row is not for this kernel
};

template <class H, bool SOFT>
__global__ void __launch_bounds__(H::threads, H::C::many ? 3 : 1024 / H::threads)
    select_quick(const SelectArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ SelectShared<H> shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kWarps = H::threads / 32, kKeys = kGroupsOf<H>;
  constexpr float kLog2e = 1.4426950408889634f;
  static_assert(kKeys <= 32 && kMostItems * H::threads <= 0x10000);
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x);
  const int warp = t / 32, lane = t % 32;
  const Mapping<H> map{n};
  ResidentRow<H> row(memory, &shared.barrier, map);
  // The candidates of a row, then those that the blocks of a cluster have sent to the first.
  const int32_t most = C::many ? kMostFew : min(kMostFew, (args.room - 4) / 2) / 4 * 4;
  float* const few_values = reinterpret_cast<float*>(memory + row.slot_bytes());
  int32_t* const few_indices = reinterpret_cast<int32_t*>(few_values + most);
  Entry* const sent = reinterpret_cast<Entry*>(few_indices + most + 4);
  const int32_t room = C::many ? kMostFew / C::size() : most;
  Mailbox<2> bounds(shared.limits.mailboxes);
  Mailbox<> counts(&shared.mailboxes[0]), entries(&shared.mailboxes[1]);
  C::sync();

  const int step = int(gridDim.x) / C::size();
  const float threshold = float(args.activation.threshold) + 0.0f;  // -0 becomes +0
  const bool activated = args.activation.bias != nullptr || args.activation.thresholds != nullptr;
  const auto request = [&](int64_t r) -> Request {
    if (r >= args.x.rows) return {Budget(0), 1, 0};
    const double k = per_row(args.k, r), budget = SOFT ? k : std::floor(k + 0.5);
    const float alpha = SOFT ? float(per_row(args.alpha, r)) : 1.0f, rate = kLog2e / alpha;
    const int32_t limit = min(most * 3 / 4, C::size() * kKeys * H::threads / 2);
    const bool fits =
        (SOFT ? budget > 0 : budget >= 0) && budget < limit && rate > 1e-36f && rate < 1e36f;
    if (!fits) return {Budget(0), 1, 0};
    const int32_t whole = int32_t(budget);
    const int32_t wanted = SOFT ? whole + whole / 8 + 6 : max(whole, 1);
    return {Budget(budget), alpha, wanted <= limit ? wanted : 0};
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
  Request next = request(first_row);
  // The warps take turns, as each has its place among those of other blocks; messages are the
  // first one's.
  int turn = 0;
  for (int64_t r = first_row; r < args.x.rows; r += step) {
    const bool in_turn = warp == turn;
    if constexpr (!C::many) turn = (turn + 1) % kWarps;
    const Request now = next;
    if (fed(r)) {
      row.template wait<1>(phase);
      phase ^= 1;
    } else {
      H::sync();  // the row before has been read
      row.copy(data(r), args.wide_x);
    }
    bool usual = false;
    float L = 0, least = 0, maximum = 0;
    if (now.wanted > 0) {
      if (activated) {
        const Activated<S> activation(args);
        row.for_each(
            [&](int item) { row.replace(item, activation(row.chunk(item), map.index(item, 0))); });
        row.release();
      }
      Maxima<kKeys> maxima;
      keys_of_maxima(row, maxima.key);
      find_limits(maxima, (now.wanted - 1) / C::size() + 1, kMaxima / 2, in_turn, shared.maxima,
                  shared.limits, bounds);
      if (in_turn && lane == 0) shared.found = 0, shared.missed = false;
      H::sync();
      L = shared.limits.limits.x, maximum = shared.limits.limits.y;
      usual = maximum < infinity<float>;  // neither is NaN
      least = SOFT ? L - kReach * now.alpha : L;
      if (!(least > threshold)) least = value_of(key_of(threshold) + 1);
      if (usual) {
        collect(row, maxima.key, least, shared, [&](int32_t place, float value, int32_t index) {
          if (place >= room) return;
          if constexpr (C::many) {
            entries.send(sent + C::rank() * room + place, 0, Entry{value, index});
          } else {
            few_values[place] = value;
            few_indices[place] = index;
          }
        });
      }
    }
    H::sync();  // the row has been read
    int32_t count = 0;
    if (in_turn && now.wanted > 0) {
      count = usual ? shared.found : 0;
      usual = usual && !shared.missed;
      if constexpr (C::many) {
        if (lane == 0) {
          counts.send(&shared.counts_of_blocks[C::rank()], 0, usual ? count : count + kTooMany);
        }
        __syncwarp();
      }
    }
    if (fed(r + step)) row.ask(data(r + step), in_turn);
    next = request(r + step);
    if (C::rank() != 0 || !in_turn) continue;

    usual = usual && count <= room;
    if constexpr (C::many) {
      if (now.wanted > 0) {
        counts.receive(C::size() * sizeof(int32_t));
        int32_t arriving = 0;
        count = 0;
        for (int b = 0; b < C::size(); ++b) {
          const int32_t of_block = shared.counts_of_blocks[b];
          usual = usual && of_block <= room;
          arriving += min(of_block % kTooMany, room);
          count += of_block;
        }
        entries.receive(arriving * sizeof(Entry));
        if (usual) join_blocks<C>(sent, shared.counts_of_blocks, room, few_values, few_indices);
      }
    }
    if (usual) {
      if (count <= 128) {
        put_few_in_order(few_values, few_indices, count);
      } else {
        put_many_in_order(few_values, few_indices, count);
      }
      const bool with_zeros = !(L - kReach * now.alpha > threshold);
      const Few few = {few_values, few_indices, count, with_zeros ? n - count : 0, least, maximum};
      if constexpr (SOFT) {
        usual = write_soft<Element<S>::grain>(args, r, few, with_zeros ? 0 : L, now.k, now.alpha,
                                              kLog2e / now.alpha);
      } else {
        write_hard<Element<S>::grain>(args, r, few);
      }
    }
    if (!usual && lane == 0) args.code.counts[r] = kLeftRow;
  }
  C::sync();  // a block that has left can no longer be written to
}

}  // namespace softtopk::cuda
