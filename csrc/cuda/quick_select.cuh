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
//
// The ladder, in fractions of reading the rows (H200, bfloat16, k about 64, alpha = 1e-4; 4096 rows
// of 16384 | 24576 | 65536, 8192 of 131072):
// - this kernel: 0.56 | 0.59 | 0.55 | 0.40 (the hard selection 0.68 | 0.69 | 0.62 | 0.47);
// - four warps that scan and one that solves, rows in units of 32 KiB, another kernel: 0.46 | 0.36
//   | 0.60 | 0.81 in the same session: the one warp is the slower where rows are short.
#pragma once

#include "few_select.cuh"
#include "maxima.cuh"

namespace softtopk::cuda {

inline constexpr int kMostFew = 512;      // candidates of a row
inline constexpr int kMostListed = 512;   // chunks looked at in one go
inline constexpr float kReach = 32;       // alphas below L that candidates reach
inline constexpr int kTooMany = 0x10000;  // is added to a count of candidates that is not complete

struct Entry {
  float value;
  int32_t index;
};

// A row's numbers.
struct Request {
  Budget k;
  float alpha;
  int32_t wanted;  // maxima that reach the bound; 0: the row is not for this kernel
};

template <class H>
struct SelectShared {
  static constexpr int warps = H::threads / 32, words = kGroupsOf<H> * warps;
  uint64_t barrier;
  union {
    uint4 maxima[kMaxima / 4];  // keys
    uint16_t listed[kMostListed];
  };
  Request requests[2];    // of this row and the next, in turns
  uint32_t marks[words];  // of groups that are looked at: item by item, a bit for each thread
  LimitsShared<H> limits;
  // What the blocks of a cluster tell the first.
  uint64_t mailboxes[2];
  int32_t counts_of_blocks[H::C::many ? kMostBlocks : 1];
};

// By all threads: marks the groups whose keys reach `least`.
template <class H>
__device__ __forceinline__ void mark_groups(const uint32_t (&key)[kGroupsOf<H>], float least,
                                            uint32_t* marks) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const uint32_t bound = key_of(least);
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kGroupsOf<H>; ++i) {
    const uint32_t word = __ballot_sync(~0u, key[i] >= bound);
    if (lane == i) mine = word;
  }
  if (lane < kGroupsOf<H>) marks[lane * (H::threads / 32) + warp] = mine;
}

// Which elements of a chunk are from `least` > 0 on, as bits.
template <class S>
class Reaching {
 public:
  __device__ explicit Reaching(float least) : least_(least) {
    if constexpr (sizeof(S) == 2) {
      uint32_t raw = Element<S>::raw(least);
      raw += Element<S>::value(typename Element<S>::Raw(raw)) < least;
      both_ = raw * 0x10001u;
    }
  }
  __device__ __forceinline__ uint32_t operator()(const Chunk<S>& chunk) const {
    uint32_t found = 0;
    if constexpr (sizeof(S) == 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) found |= pairs_from<S>(chunk.word(i), both_) & 0x10001u << 2 * i;
      return (found | found >> 15) & 0xffu;
    } else {
      float x[Chunk<S>::size];
      chunk.read(x);
#pragma unroll
      for (int i = 0; i < Chunk<S>::size; ++i) found |= uint32_t(x[i] >= least_) << i;
      return found;
    }
  }

 private:
  float least_;
  uint32_t both_ = 0;  // in both halves, the lowest of S that is not below
};

// By one warp: f(place, value, index) for the elements of the marked groups from `least` on, in the
// order of their indices. Returns their number, and kTooMany if it has not looked at all.
template <class H, class F>
__device__ __forceinline__ int32_t collect_in_order(const ResidentRow<H>& row, float least,
                                                    SelectShared<H>& shared, F f) {
  constexpr int kSize = Chunk<typename H::S>::size, kWords = SelectShared<H>::words;
  const int lane = int(threadIdx.x) % 32;
  const uint32_t lanes_below = (1u << lane) - 1;
  const int words = row.items() * SelectShared<H>::warps;
  const Reaching<typename H::S> reaching(least);
  int32_t count = 0;
#pragma unroll 1
  for (int first = 0; first < words; first += 32) {
    const int word = first + lane;
    uint32_t marked = word < words ? shared.marks[word % kWords] : 0;
    const int upto = int(inclusive_scan<32>(unsigned(__popc(marked)), lane));
    const int listed = __shfl_sync(~0u, upto, 31);
    if (listed > kMostListed) return count + kTooMany;
    uint16_t* to = shared.listed + (upto - __popc(marked));
    for (; marked != 0; marked &= marked - 1) {
      *to++ = uint16_t(word * 32 + __ffs(int(marked)) - 1);
    }
    __syncwarp();
#pragma unroll 1
    for (int start = 0; start < listed; start += 32) {
      const bool any = start + lane < listed;
      const int32_t chunk = any ? shared.listed[start + lane] : 0;
      const int item = chunk / H::threads, thread = chunk % H::threads;
      uint32_t found = any ? reaching(row.chunk(item, thread)) : 0;
      const int mine = __popc(found);
      int32_t place = count;
#pragma unroll
      for (int bit = 1; bit <= kSize; bit *= 2) {
        const uint32_t lanes = __ballot_sync(~0u, mine & bit);
        place += bit * __popc(lanes & lanes_below);
        count += bit * __popc(lanes);
      }
      for (; found != 0; found &= found - 1) {
        const int32_t index = row.map().index(item, __ffs(int(found)) - 1, thread);
        f(place++, row.element(item, index), index);
      }
    }
    __syncwarp();
  }
  return count;
}

// By one warp: puts the entries of a cluster's blocks, each in order and in `room` places, in the
// order of all.
template <class C>
__device__ __forceinline__ void merge_blocks(const Entry* entries, const int32_t* counts,
                                             int32_t room, float* values, int32_t* indices) {
  for (int b = 0; b < C::size(); ++b) {
    for (int32_t i = int(threadIdx.x) % 32; i < counts[b]; i += 32) {
      const Entry own = entries[b * room + i];
      int32_t place = i;
      for (int other = 0; other < C::size(); ++other) {
        if (other == b) continue;
        int32_t low = 0, high = counts[other];  // those before own lie below `low`
        while (low < high) {
          const int32_t middle = (low + high) / 2;
          if (entries[other * room + middle].index < own.index) {
            low = middle + 1;
          } else {
            high = middle;
          }
        }
        place += low;
      }
      values[place] = own.value;
      indices[place] = own.index;
    }
  }
  __syncwarp();
}

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
  const int32_t most = C::many ? kMostFew : min(kMostFew, args.room / 2);
  float* const few_values = reinterpret_cast<float*>(memory + row.slot_bytes());
  int32_t* const few_indices = reinterpret_cast<int32_t*>(few_values + most);
  Entry* const sent = reinterpret_cast<Entry*>(few_indices + most);
  const int32_t room = C::many ? kMostFew / C::size() : most;
  Mailbox<2> bounds(shared.limits.mailboxes);
  Mailbox<> counts(&shared.mailboxes[0]), entries(&shared.mailboxes[1]);

  const int step = int(gridDim.x) / C::size();
  const int64_t first_row = int64_t(blockIdx.x) / C::size();
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
  if (t == 0) shared.requests[0] = request(first_row);
  C::sync();

  const auto data = [&](int64_t r) {
    return static_cast<const Raw*>(args.x.data) + r * args.x.stride;
  };
  // Whole granules of the last ragged row would reach beyond its end.
  const auto fed = [&](int64_t r) {
    if (!args.fed || r >= args.x.rows) return false;
    return H::ragged ? r + 1 < args.x.rows && args.x.stride >= n : args.wide_x;
  };
  uint32_t phase = 0;
  if (fed(first_row)) row.ask(data(first_row), warp == 0);
  // The warps take turns, as each has its place among those of other blocks; messages are the
  // first one's.
  int turn = 0, slot = 0;
  for (int64_t r = first_row; r < args.x.rows; r += step) {
    const bool in_turn = warp == turn;
    if constexpr (!C::many) turn = (turn + 1) % kWarps;
    const Request now = shared.requests[slot];
    slot ^= 1;
    // Another one than the one in turn asks for the next row's numbers, which take their time.
    if (t == (C::many ? 32 : turn * 32)) shared.requests[slot] = request(r + step);
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
      if (args.activation.bias != nullptr || args.activation.thresholds != nullptr) {
        const Activated<S> activation(args);
        row.template for_each<1>(
            [&](int item) { row.replace(item, activation(row.chunk(item), map.index(item, 0))); });
        row.release();
      }
      Maxima<kKeys> maxima;
      keys_of_maxima(row, maxima.key);
      find_limits(maxima, (now.wanted - 1) / C::size() + 1, kMaxima / 2, in_turn, shared.maxima,
                  shared.limits, bounds);
      H::sync();
      L = shared.limits.limits.x, maximum = shared.limits.limits.y;
      usual = maximum < infinity<float>;  // neither is NaN
      least = SOFT ? L - kReach * now.alpha : L;
      if (!(least > args.threshold)) least = value_of(key_of(args.threshold) + 1);
      mark_groups<H>(maxima.key, least, shared.marks);
    }
    H::sync();  // the row has been read, but for the groups marked
    int32_t count = 0;
    if (in_turn) {
      if (usual) {
        count =
            collect_in_order(row, least, shared, [&](int32_t place, float value, int32_t index) {
              if (place >= room) return;
              if constexpr (C::many) {
                entries.send(sent + C::rank() * room + place, 0, Entry{value, index});
              } else {
                few_values[place] = value;
                few_indices[place] = index;
              }
            });
      }
      if constexpr (C::many) {
        if (lane == 0 && now.wanted > 0) {
          counts.send(&shared.counts_of_blocks[C::rank()], 0, count);
        }
      }
      __syncwarp();
    }
    if (fed(r + step)) row.ask(data(r + step), in_turn);
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
        if (usual) {
          merge_blocks<C>(sent, shared.counts_of_blocks, room, few_values, few_indices);
        }
      }
    }
    if (usual) {
      const bool with_zeros = !(L - kReach * now.alpha > args.threshold);
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
