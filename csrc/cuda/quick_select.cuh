// The code of rows on chip, for what is usual: few elements near the threshold or above it.
//
// One pass over memory. A block has a unit of a row, all of it if it is short enough, on chip
// (unit.cuh), and two kinds of warps. Four scan: they take the maxima of groups, one of them finds
// a bound L that as many of these reach as there are elements wanted, and each takes its
// candidates, which reach L less 36 alpha, from the groups that do, to places of its own. Then the
// next unit is asked for, and the fifth warp, while the others are already at that, solves the row
// and puts what is kept in order: it is never waited for, as long as it is quicker than the memory
// that its multiprocessor gets.
//
// What is wanted: so many elements from L on that they alone make up the budget at L - 4 alpha, so
// that the threshold lies above it, and what is not a candidate adds less than e^-32 of its like.
// Of a row in several units each has its share, with some to spare for chance; the last to
// be done puts the candidates together, and then it is seen whether the threshold lies above all
// units' bounds. That one is then behind the others: units of such rows are drawn, so that it takes
// fewer of them. Where L less 36 alpha is not above the activation's threshold all elements that
// are take part, and the zeros are a tie below them. A row that does not fit the pattern, or whose
// solution is not right, is marked, and left to the careful kernel of sparse_select.cu.
//
// An activation with one threshold for all and no bias costs nothing: what is not above it is never
// a candidate. With a bias or thresholds every thread applies them to its own chunks on chip.
//
// The ladder, in fractions of reading the rows (H200, bfloat16, k 32 to 96, alpha = 1e-4; 4096 rows
// of 16384 | 24576 | 65536, 8192 of 131072), where one warp did all for its row in turn, others of
// the block waiting at the next row's first barrier, and clusters agreed on one bound: 0.56 | 0.58
// | 0.53 | 0.40.
#pragma once

#include "few_select.cuh"
#include "maxima.cuh"
#include "unit.cuh"

namespace softtopk::cuda {

inline constexpr int kGroups = 16;  // of a thread's chunks: chunk i is of group i modulo this
inline constexpr int kScanningWarps = kScanners / 32;
inline constexpr int kOfWarp = 96;  // candidates of a row from one warp
inline constexpr int kMostFew = kScanningWarps * kOfWarp;
inline constexpr int kMostWanted = 192;   // of kMaxima maxima
inline constexpr int kMostParts = 16;     // units of a row
inline constexpr float kBelow = 4;        // alphas below L that the threshold may lie
inline constexpr float kReach = 36;       // and that candidates reach
inline constexpr int kTooMany = 0x10000;  // a count of candidates that are not to be had

// Barriers of the collecting warp and the one that solves.
enum : int { kFilled = 2, kEmptied = 3 };
__device__ __forceinline__ void arrive_at(int barrier) {
  __syncwarp();
  asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_at(int barrier) {
  __syncwarp();
  asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
}

// The candidates that a warp has room for in memory, where a row has several units.
__host__ __device__ constexpr int32_t room_of_warp(int parts) { return 192 / parts + 12; }

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

// A unit that is to come, and its row's numbers.
struct Request {
  int64_t unit;
  Budget k;
  float alpha;
  int32_t wanted;  // maxima that reach the bound; 0: the row is not for this kernel
};

struct SelectShared {
  uint64_t barrier;
  uint4 maxima[kMaxima / 4];  // keys
  float2 limits;              // the bound and the maximum
  Request requests[2];        // of this unit and the next, in turns
  // What is handed over. A warp's candidates are kScanningWarps places apart. Those of a row in
  // several units go by way of memory, and the places here are the solving warp's.
  int32_t counts[kScanningWarps];
  Taken taken;
  Request request;
  float values[kMostFew];
  alignas(16) int32_t indices[kMostFew];
  union {
    uint16_t order[kMostFew];
    int32_t starts[kScanningWarps * kMostParts];  // of the candidates in memory
  };
};

// The largest elements of the calling thread's groups, as keys; of a NaN, the largest of all.
template <class S>
__device__ __forceinline__ void keys_of_groups(const Unit<S>& unit, uint32_t (&key)[kGroups]) {
  if constexpr (sizeof(S) == 2) {
    constexpr uint32_t kLeast = Element<S>::minus_infinity * 0x10001u;
    uint32_t most[kGroups];
#pragma unroll
    for (uint32_t& pair : most) pair = kLeast;
#pragma unroll 1
    for (int first = 0; first < unit.items(); first += kGroups) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (first + i >= unit.items() || !unit.has(first + i)) continue;
        const uint4 words = unit.chunk(first + i).words;
        most[i] = max_of_pairs<S>(max_of_pairs<S>(most[i], words.x),
                                  max_of_pairs<S>(words.y, max_of_pairs<S>(words.z, words.w)));
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      using Raw = typename Element<S>::Raw;
      key[i] = key_of(
          max_with_nan(Element<S>::value(Raw(most[i])), Element<S>::value(Raw(most[i] >> 16))));
    }
  } else {
    float most[kGroups];
#pragma unroll
    for (float& value : most) value = -infinity<float>;
#pragma unroll 1
    for (int first = 0; first < unit.items(); first += kGroups) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (first + i >= unit.items() || !unit.has(first + i)) continue;
        float x[4];
        unit.chunk(first + i).read(x);
        most[i] =
            max_with_nan(max_with_nan(most[i], x[0]), max_with_nan(x[1], max_with_nan(x[2], x[3])));
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) key[i] = key_of(most[i]);
  }
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

// By a scanning warp: f(place, value, index) for its elements from `least` on; returns how many.
// Where they go depends on nothing but the row.
template <class S, class F>
__device__ __forceinline__ int32_t collect(const Unit<S>& unit, const uint32_t (&key)[kGroups],
                                           float least, F f) {
  constexpr int kSize = Chunk<S>::size;
  const int t = int(threadIdx.x), lane = t % 32;
  const uint32_t lanes_below = (1u << lane) - 1, bound = key_of(least);
  const Reaching<S> reaching(least);
  uint32_t left = 0;  // of the thread's chunks
#pragma unroll
  for (int i = 0; i < kGroups; ++i) left |= uint32_t(key[i] >= bound) << i;
  left |= left << kGroups;
  int32_t count = 0;
#pragma unroll 1
  while (__any_sync(~0u, left != 0)) {
    const int item = left != 0 ? __ffs(int(left)) - 1 : kMostStripes;
    left &= left - 1;
    uint32_t found = item < unit.items() && unit.has(item) ? reaching(unit.chunk(item)) : 0;
    const int mine = __popc(found);
    int32_t place = count;
#pragma unroll
    for (int bit = 1; bit <= kSize; bit *= 2) {
      const uint32_t lanes = __ballot_sync(~0u, mine & bit);
      place += bit * __popc(lanes & lanes_below);
      count += bit * __popc(lanes);
    }
    for (; found != 0; found &= found - 1) {
      const int i = __ffs(int(found)) - 1;
      f(place++, unit.element(item, t, i), unit.first(item) + i);
    }
  }
  return count;
}

// Unit u, which may be none, and the numbers of its row.
template <bool SOFT>
__device__ __forceinline__ Request request_of(const SelectArgs& args, int64_t u) {
  const int64_t r = u >> args.units.log_parts;
  if (r >= args.x.rows) return {u, Budget(0), 1, 0};
  const double k = per_row(args.k, r), budget = SOFT ? k : std::floor(k + 0.5);
  const float alpha = SOFT ? float(per_row(args.alpha, r)) : 1.0f,
              rate = 1.4426950408889634f / alpha;
  const bool fits =
      (SOFT ? budget > 0 : budget >= 0) && budget < kMostFew && rate > 1e-36f && rate < 1e36f;
  if (!fits) return {u, Budget(0), 1, 0};
  const int32_t whole = int32_t(budget);
  // At L - 4 alpha p is 1 - e^-4 / 2 from L on.
  int32_t wanted = SOFT ? whole + whole / 64 + 2 : max(whole, 1);
  if (args.units.log_parts > 0) {
    const float share = float(wanted) / float(1 << args.units.log_parts);
    wanted = int32_t(share + 5 * quick_sqrt(share)) + 4;
  }
  return {u, Budget(budget), alpha, wanted <= kMostWanted ? wanted : 0};
}

// The scanning warps.
template <class S, bool SOFT>
__device__ __forceinline__ void scan_units(const SelectArgs& args, Unit<S>& unit,
                                           SelectShared& shared) {
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  const int64_t units = args.x.rows << args.units.log_parts;
  const bool alone = args.units.log_parts == 0;
  const int32_t room = alone ? kOfWarp : room_of_warp(1 << args.units.log_parts);
  uint32_t phase = 0;
  int slot = 0;
  unit.move_to(blockIdx.x);
  if (args.units.fed && warp == 0) unit.ask();
  while (true) {
    const Request now = shared.requests[slot];
    if (now.unit >= units) break;
    slot ^= 1;
    unit.receive(phase);
    uint32_t key[kGroups];
    if (now.wanted > 0) {
      if (args.activation.bias != nullptr || args.activation.thresholds != nullptr) {
        const Activated<S> activated(args);
        for (int item = 0; item < unit.items(); ++item) {
          if (unit.has(item)) unit.replace(item, activated(unit.chunk(item), unit.first(item)));
        }
        unit.release();
      }
      keys_of_groups(unit, key);
      uint32_t most[2] = {key[0], key[1]};
#pragma unroll
      for (int i = 2; i < kGroups; ++i) most[i % 2] = max(most[i % 2], key[i]);
      uint32_t* const maxima = reinterpret_cast<uint32_t*>(shared.maxima);
      maxima[t] = most[0];
      maxima[kScanners + t] = most[1];
    }
    sync_scanners();
    if (warp == 0) {
      float2 limits = make_float2(0, infinity<float>);
      if (now.wanted > 0) {
        limits = bound_of_maxima<Element<S>::grain>(shared.maxima, now.wanted,
                                                    now.wanted + now.wanted / 8);
      }
      wait_at(kEmptied);
      if (lane == 0) shared.limits = limits;
    }
    sync_scanners();
    float L = shared.limits.x;
    const float most = shared.limits.y;
    const bool usual = most < infinity<float>;  // neither is NaN
    float least = SOFT ? L - kReach * now.alpha : L;
    if (!(least > args.threshold)) {
      L = -infinity<float>;  // all that there are
      least = value_of(key_of(args.threshold) + 1);
    }
    int32_t count = kTooMany;
    if (usual) {
      Entry* const sent = args.sent + (now.unit * kScanningWarps + warp) * room;
      count = collect(unit, key, least, [&](int32_t place, float value, int32_t index) {
        if (place >= room) return;
        if (alone) {
          shared.values[place * kScanningWarps + warp] = value;
          shared.indices[place * kScanningWarps + warp] = index;
        } else {
          sent[place] = {value, index};
        }
      });
    }
    if (lane == 0) shared.counts[warp] = count;
    sync_scanners();  // the unit has been read
    const int64_t next = shared.requests[slot].unit;
    unit.move_to(next);
    if (warp == 0) {
      if (args.units.fed && next < units) unit.ask();
      if (lane == 0) {
        shared.taken = {SOFT ? L - kBelow * now.alpha : L, least, most};
        shared.request = now;
      }
      arrive_at(kFilled);
    }
  }
  if (warp == 0) wait_at(kEmptied);  // no barrier is left behind half full
}

// A row's candidates: at so many places, of which some may be empty.
struct Gathered {
  int32_t places, count;
  Taken taken;
};

// By one warp: those of the one unit of a row, where they are; empty places become -inf.
__device__ __forceinline__ Gathered gather_warps(SelectShared& shared) {
  const int lane = int(threadIdx.x) % 32, warp = lane % kScanningWarps;
  const int32_t own = shared.counts[warp];  // of all places that this lane sees
  const int32_t most = __reduce_max_sync(~0u, own);
  const int32_t count = __reduce_add_sync(~0u, own) / (32 / kScanningWarps);
  if (most > kOfWarp) return {kTooMany, kTooMany, shared.taken};
  for (int32_t i = lane; i < most * kScanningWarps; i += 32) {
    if (i / kScanningWarps >= own) shared.values[i] = -infinity<float>;
  }
  __syncwarp();
  return {most * kScanningWarps, count, shared.taken};
}

// By one warp, the last one to come with candidates of row r: brings those of all units.
__device__ __forceinline__ Gathered gather_units(const SelectArgs& args, int64_t r,
                                                 SelectShared& shared) {
  constexpr int kEach = kScanningWarps * kMostParts / 32;  // warps whose candidates a lane counts
  const int lane = int(threadIdx.x) % 32, parts = 1 << args.units.log_parts;
  const int segments = parts * kScanningWarps;
  const int64_t first = r << args.units.log_parts;
  const int32_t room = room_of_warp(parts);
  Taken own = {-infinity<float>, infinity<float>, -infinity<float>};
  if (lane < parts) {
    const float* const from = &args.sent_parts[first + lane].taken.limit;
    own = {__ldcg(from), __ldcg(from + 1), __ldcg(from + 2)};
  }
  int32_t counts[kEach], sum = 0;
  bool all_there = true;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int segment = lane * kEach + i;
    counts[i] = segment < segments ? __ldcg(&args.sent_parts[first + segment / kScanningWarps]
                                                 .counts[segment % kScanningWarps])
                                   : 0;
    all_there = all_there && counts[i] <= room;
    sum += counts[i];
  }
  const Taken taken = {value_of(__reduce_max_sync(~0u, key_of(own.limit))),
                       value_of(__reduce_min_sync(~0u, key_of(own.least))),
                       value_of(__reduce_max_sync(~0u, key_of(own.most)))};
  const int32_t upto = int32_t(inclusive_scan<32>(unsigned(sum), lane));
  const int32_t count = __shfl_sync(~0u, upto, 31);
  if (__any_sync(~0u, !all_there) || count > kMostFew) return {kTooMany, kTooMany, taken};
  int32_t start = upto - sum;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    shared.starts[lane * kEach + i] = start;
    start += counts[i];
  }
  __syncwarp();
#pragma unroll 4
  for (int32_t i = lane; i < count; i += 32) {
    int segment = 0;  // the last that starts at i or before
    for (int step = segments / 2; step > 0; step /= 2) {
      if (shared.starts[segment + step] <= i) segment += step;
    }
    const Entry* const entry =
        args.sent + (first * kScanningWarps + segment) * room + (i - shared.starts[segment]);
    const int2 words = __ldcg(reinterpret_cast<const int2*>(entry));
    shared.values[i] = __int_as_float(words.x);
    shared.indices[i] = words.y;
  }
  __syncwarp();
  return {count, count, taken};
}

// By one warp: the code of row r from its candidates, if they suffice.
template <class S, bool SOFT>
__device__ __forceinline__ bool write_row(const SelectArgs& args, int64_t r,
                                          const Gathered& gathered, const Request& now,
                                          SelectShared& shared) {
  if (gathered.places > kMostFew) return false;
  constexpr float kLog2e = 1.4426950408889634f;
  const Taken& taken = gathered.taken;
  const bool complete = taken.limit == -infinity<float>;
  const Few few = {shared.values,  shared.indices,
                   shared.order,   gathered.places,
                   gathered.count, complete ? int32_t(args.x.n) - gathered.count : 0,
                   taken.least,    taken.most};
  if (!complete && args.units.log_parts > 0 && args.mode != Selecting::soft) {
    // Whether all that a mask can have are above every unit's bound.
    int32_t above = 0;
    for (int32_t i = int(threadIdx.x) % 32; i < few.places; i += 32) {
      above += shared.values[i] >= taken.limit;
    }
    if (__reduce_add_sync(~0u, above) < hard_budget(args, r)) return false;
  }
  if constexpr (SOFT) {
    return write_soft<Element<S>::grain>(args, r, few, complete ? 0 : taken.limit, now.k, now.alpha,
                                         kLog2e / now.alpha);
  } else {
    write_hard<Element<S>::grain>(args, r, few);
    return true;
  }
}

// The warp that solves. It also says which units are to come, and asks for their numbers.
template <class S, bool SOFT>
__device__ __forceinline__ void solve_rows(const SelectArgs& args, SelectShared& shared) {
  const int lane = int(threadIdx.x) % 32, parts = 1 << args.units.log_parts;
  const int64_t units = args.x.rows << args.units.log_parts, step = gridDim.x;
  int slot = 0;
  // The unit after the two that are requested. What was drawn is not looked at before the next
  // turn.
  int64_t upcoming = blockIdx.x + 2 * step;
  if (lane == 0 && args.drawn != nullptr) upcoming = 2 * step + atomicAdd(args.drawn, 1);
  arrive_at(kEmptied);
  while (shared.requests[slot].unit < units) {
    wait_at(kFilled);
    const Request now = shared.request;
    if (lane == 0) {
      shared.requests[slot] = request_of<SOFT>(args, upcoming);
      upcoming = args.drawn != nullptr ? 2 * step + atomicAdd(args.drawn, 1) : upcoming + step;
    }
    slot ^= 1;
    const int64_t r = now.unit >> args.units.log_parts;
    Gathered gathered;
    if (parts == 1) {
      gathered = gather_warps(shared);
    } else {
      Part* const part = args.sent_parts + now.unit;
      if (lane < kScanningWarps) part->counts[lane] = shared.counts[lane];
      if (lane == kScanningWarps) part->taken = shared.taken;
      arrive_at(kEmptied);
      __threadfence();
      __syncwarp();
      int32_t before = 0;
      if (lane == 0) before = atomicAdd(args.arrived + r, 1);
      if (__shfl_sync(~0u, before, 0) != parts - 1) continue;
      __threadfence();
      gathered = gather_units(args, r, shared);
    }
    if (!write_row<S, SOFT>(args, r, gathered, now, shared) && lane == 0) {
      args.code.counts[r] = kLeftRow;
    }
    if (parts == 1) {
      arrive_at(kEmptied);
    } else {
      __syncwarp();  // before others' candidates take their place
    }
  }
}

template <class S, bool SOFT>
__global__ void __launch_bounds__(kScanners + 32, 6) select_quick(const SelectArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ SelectShared shared;
  Unit<S> unit(memory, &shared.barrier, args.units, args.x);
  if (threadIdx.x < 2) {
    shared.requests[threadIdx.x] =
        request_of<SOFT>(args, blockIdx.x + threadIdx.x * int64_t(gridDim.x));
  }
  __syncthreads();
  if (threadIdx.x < kScanners) {
    scan_units<S, SOFT>(args, unit, shared);
  } else {
    solve_rows<S, SOFT>(args, shared);
  }
}

}  // namespace softtopk::cuda
