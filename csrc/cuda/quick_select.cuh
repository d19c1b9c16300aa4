// The code of rows on chip, for what is usual: few elements near the threshold or above it.
//
// One pass over memory. A block has a unit of a row, all of it if it is short enough, on chip
// (unit.cuh), and two kinds of warps. Four scan: they take the maxima of groups, one of them finds
// a bound L that as many of these reach as there are elements wanted, and each takes its
// candidates, which reach L less 36 alpha, from the groups that do (candidates.cuh), to places of
// its own in a slot (slots.cuh).
// Then the next unit is asked for. The other warps solve, each what comes into its slot: the row's
// threshold is sought, and what is kept is put in order. One such warp takes two or three times as
// long as a unit does to come and be scanned, nearly all of it latency, so that a multiprocessor
// must have many at work: they are never waited for, as long as together they are quicker than the
// memory that their multiprocessor gets.
//
// What is wanted: so many elements from L on that they alone make up the budget at L - 4 alpha, so
// that the threshold lies above it, and what is not a candidate adds less than e^-32 of its like.
// Of a row in several units each has its share, with some to spare for chance; the last to
// be done puts the candidates together, and then it is seen whether the threshold lies above all
// units' bounds. Units of such rows are drawn, for some blocks have more to solve than others.
// Where L less 36 alpha is not above the activation's threshold all elements that are take part,
// and the zeros are a tie below them. A row that does not fit the pattern, or whose solution is not
// right, is marked, and left to the careful kernel of sparse_select.cu.
//
// A block has room for 96 candidates of each scanning warp and looks for its bound among 256
// maxima; where more may be wanted (few_wanted in sparse_select.cu), for 256 among 512, so that up
// to 384 can be.
//
// An activation with one threshold for all and no bias costs nothing: what is not above it is never
// a candidate. With a bias or thresholds every thread applies them to its own chunks on chip.
//
// The ladder, in fractions of reading the rows (H200, bfloat16, k 32 to 96, alpha = 1e-4; 4096 rows
// of 16384 | 24576 | 65536, 8192 of 131072). One warp does all for its row in turn, others of the
// block wait at the next row's first barrier, and clusters agree on one bound: 0.56 | 0.60 | 0.55 |
// 0.40. Scanning warps and one that solves, units of up to 32 KiB, a row's in a power of two, order
// by counting: 0.46 | 0.36 | 0.60 | 0.81. Rows of up to 48 KiB one unit, two solving warps, sixteen
// groups: 0.71 | 0.78 | 0.78 | 0.90. This: 0.70 | 0.79 | 0.81 | 0.91.
// With 256 candidates of a warp k = 220 takes 147 | 181 us at 16384 | 24576 in place of the careful
// kernel's 1500 | 2164. Rows of 1024 were solved by a warp each from its registers: 262144 of them
// in 18.1 ms, here in 2.0, 6% of reading them: a row takes its turn of solving however short it is.
#pragma once

#include "candidates.cuh"
#include "overlap.cuh"
#include "slots.cuh"

namespace softtopk::cuda {

inline constexpr float kBelow = 4;   // alphas below L that the threshold may lie
inline constexpr float kReach = 36;  // and that candidates reach

// By one thread: the numbers of row r.
template <bool SOFT, int OF_WARP>
__device__ __forceinline__ Request request_of(const SelectArgs& args, int64_t r) {
  const double k = per_row(args.k, r), budget = SOFT ? k : std::floor(k + 0.5);
  const float alpha = SOFT ? float(per_row(args.alpha, r)) : 1.0f,
              rate = quick_ratio(1.4426950408889634f, alpha);
  const bool fits = (SOFT ? budget > 0 : budget >= 0) && budget < kMostFew<OF_WARP> &&
                    rate > 1e-36f && rate < 1e36f;
  if (!fits) return {Budget(0), 1, 0};
  const int32_t whole = int32_t(budget);
  // At L - 4 alpha p is 1 - e^-4 / 2 from L on.
  int32_t wanted = SOFT ? whole + whole / 64 + 2 : max(whole, 1);
  if (args.units.parts > 1) {
    const float share = quick_ratio(float(wanted), float(args.units.parts));
    wanted = int32_t(share + 5 * quick_sqrt(share)) + 4;
  }
  return {Budget(budget), alpha, wanted <= kMostWanted<OF_WARP> ? wanted : 0};
}

// The scanning warps; the block's first unit has been asked for.
template <class S, bool SOFT, int GROUPS, int OF_WARP>
__device__ __forceinline__ void scan_units(const SelectArgs& args, Unit<S>& unit,
                                           SelectShared& shared, Slot<OF_WARP>* slots) {
  using Keys =
      std::conditional_t<kMaximaFor<OF_WARP> / kScanners == 2, uint2, uint4>;  // of a thread
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  const auto after = [&](int slot) {
    return slot + 1 < (int(blockDim.x) - kScanners) / 32 ? slot + 1 : 0;
  };
  const int32_t parts = args.units.parts, units = int32_t(args.x.rows) * parts;
  const bool alone = parts == 1;
  const int32_t room = args.room;
  // What was drawn is not looked at before the next turn.
  const auto draw = [&](int32_t before) {
    return args.drawn != nullptr ? int32_t(gridDim.x) + atomicAdd(args.drawn, 1)
                                 : before + int32_t(gridDim.x);
  };
  uint32_t phase = 0;
  int at = 0;  // the slot
  int32_t now = int32_t(blockIdx.x), upcoming = 0;
  if (t == 32) upcoming = draw(now);
#pragma unroll 1
  while (now < units) {
    Slot<OF_WARP>& slot = slots[at];
    if (t == 32) {  // while the unit comes
      shared.next = upcoming;
      upcoming = draw(upcoming);
      shared.request = request_of<SOFT, OF_WARP>(args, now / parts);
    }
    __syncwarp();
    unit.receive(phase);
    if (args.activation.bias != nullptr || args.activation.thresholds != nullptr) {
      const Activated<S> activated(args);
      for (int item = 0; item < unit.own(); ++item) {
        unit.replace(item, activated(unit.chunk(item), unit.first(item)));
      }
      unit.release();
    }
    const Groups<S, GROUPS> groups(unit);
    wait_at<Barrier::emptied>(at);
    groups.keys(reinterpret_cast<Keys*>(slot.maxima)[t]);
    sync_scanners();
    if (warp == 0) {
      float2 limits = make_float2(0, infinity<float>);
      const Request request = shared.request;
      if (request.wanted > 0) {
        limits = bound_of_maxima<Element<S>::grain, kMaximaFor<OF_WARP>>(
            slot.maxima, request.wanted, request.wanted + request.wanted / 8);
      }
      if (lane == 0) {
        shared.limits = limits;
        slot.unit = now;
        slot.request = request;
      }
    }
    sync_scanners();
    float L = shared.limits.x;
    const float most = shared.limits.y, alpha = shared.request.alpha;
    const bool usual = most < infinity<float>;  // neither is NaN
    float least = SOFT ? L - kReach * alpha : L;
    if (!(least > args.threshold)) {
      L = -infinity<float>;  // all that there are
      least = value_of(key_of(args.threshold) + 1);
    }
    if (t == 0) slot.taken = {SOFT ? L - kBelow * alpha : L, least, most};
    int32_t count = kTooMany;
    if (usual) {
      Entry* const sent = args.sent + (int64_t(now) * kScanningWarps + warp) * room;
      count =
          collect(unit, groups, Reaching<S>(least), [&](int32_t place, float value, int32_t index) {
            if (place >= room) return;
            if (alone) {
              slot.values[place * kScanningWarps + warp] = value;
              slot.indices[place * kScanningWarps + warp] = index;
            } else {
              sent[place] = {value, index};
            }
          });
    }
    if (lane == 0) slot.counts[warp] = count;
    now = shared.next;
    sync_scanners();  // the unit has been read
    unit.move_to(now);
    if (warp == 0 && args.units.fed && now < units) unit.ask();
    arrive_at<Barrier::filled>(at);
    at = after(at);
  }
  // The end, for each solver, in the steps of a unit. No barrier is left behind half full.
#pragma unroll 1
  for (int i = kScanners; i < int(blockDim.x); i += 32) {
    wait_at<Barrier::emptied>(at);
    sync_scanners();
    if (t == 0) slots[at].unit = -1;
    sync_scanners();
    arrive_at<Barrier::filled>(at);
    at = after(at);
  }
}

// A row's candidates: at so many places, of which some may be empty.
struct Gathered {
  int32_t places, count;
  Taken taken;
};

// By one warp: those of the one unit of a row, where they are; empty places become -inf.
template <int OF_WARP>
__device__ __forceinline__ Gathered gather_warps(Slot<OF_WARP>& slot) {
  const int lane = int(threadIdx.x) % 32, warp = lane % kScanningWarps;
  const int32_t own = slot.counts[warp];  // of all places that this lane sees
  const int32_t most = __reduce_max_sync(~0u, own);
  const int32_t count = __reduce_add_sync(~0u, own) / (32 / kScanningWarps);
  if (most > OF_WARP) return {kTooMany, kTooMany, slot.taken};
#pragma unroll 2
  for (int32_t i = lane; i < most * kScanningWarps; i += 32) {
    if (i / kScanningWarps >= own) slot.values[i] = -infinity<float>;
  }
  __syncwarp();
  return {most * kScanningWarps, count, slot.taken};
}

// By one warp, the last one to come with candidates of row r: brings those of all units.
template <int OF_WARP>
__device__ __forceinline__ Gathered gather_units(const SelectArgs& args, int64_t r,
                                                 Slot<OF_WARP>& slot) {
  constexpr int kEach = kScanningWarps * kMostParts / 32;  // warps whose candidates a lane counts
  const int lane = int(threadIdx.x) % 32, parts = args.units.parts;
  const int segments = parts * kScanningWarps;
  const int64_t first = r * parts;
  const int32_t room = args.room;
  Taken own = {-infinity<float>, -infinity<float>, -infinity<float>};
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
                       value_of(__reduce_max_sync(~0u, key_of(own.least))),
                       value_of(__reduce_max_sync(~0u, key_of(own.most)))};
  const int32_t upto = int32_t(inclusive_scan<32>(unsigned(sum), lane));
  const int32_t count = __shfl_sync(~0u, upto, 31);
  if (__any_sync(~0u, !all_there)) return {kTooMany, kTooMany, taken};
  int32_t start = upto - sum;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    slot.starts[lane * kEach + i] = start;
    start += counts[i];
  }
  __syncwarp();
  constexpr int kAtOnce = 4;  // of a lane, so that it waits for memory less often
  int32_t kept = 0;           // what reaches every unit's bound
#pragma unroll 1
  for (int32_t i = lane; i - lane < count; i += 32 * kAtOnce) {
    int2 words[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int32_t place = i + 32 * j;
      int segment = 0;  // the last that starts there or before
#pragma unroll
      for (int step = kScanningWarps * kMostParts / 2; step > 0; step /= 2) {
        if (slot.starts[segment + step] <= place) segment += step;
      }
      words[j] = {int(0xff800000u), 0};
      if (place < count) {
        words[j] = __ldcg(reinterpret_cast<const int2*>(args.sent +
                                                        (first * kScanningWarps + segment) * room +
                                                        (place - slot.starts[segment])));
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const bool keep = __int_as_float(words[j].x) >= taken.least;
      const uint32_t all = __ballot_sync(~0u, keep);
      const int32_t place = kept + __popc(all & ((1u << lane) - 1));
      if (keep && place < kMostFew<OF_WARP>) {
        slot.values[place] = __int_as_float(words[j].x);
        slot.indices[place] = words[j].y;
      }
      kept += __popc(all);
    }
  }
  __syncwarp();
  return {kept, kept, taken};
}

// By one warp: the code of row r from its candidates, if they suffice.
template <class S, bool SOFT, int OF_WARP>
__device__ __forceinline__ bool write_row(const SelectArgs& args, int64_t r,
                                          const Gathered& gathered, const Request& now,
                                          Slot<OF_WARP>& slot) {
  if (gathered.places > kMostFew<OF_WARP>) return false;
  constexpr float kLog2e = 1.4426950408889634f;
  const Taken& taken = gathered.taken;
  const bool complete = taken.limit == -infinity<float>;
  const Few few = {slot.values,    slot.indices,
                   slot.order,     gathered.places,
                   gathered.count, complete ? int32_t(args.x.n) - gathered.count : 0,
                   taken.least,    taken.most};
  if (!complete && args.units.parts > 1 && args.mode != Selecting::soft) {
    // Whether all that a mask can have are above every unit's bound.
    int32_t above = 0;
#pragma unroll 2
    for (int32_t i = int(threadIdx.x) % 32; i < few.places; i += 32) {
      above += slot.values[i] >= taken.limit;
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

// A warp that solves, of the units in its slot.
template <class S, bool SOFT, int OF_WARP>
__device__ __forceinline__ void solve_rows(const SelectArgs& args, int at, Slot<OF_WARP>& slot) {
  const int lane = int(threadIdx.x) % 32, parts = args.units.parts;
#pragma unroll 1
  while (true) {
    arrive_at<Barrier::emptied>(at);
    wait_at<Barrier::filled>(at);
    const int32_t unit = slot.unit;
    if (unit < 0) break;
    const Request now = slot.request;
    const int32_t r = unit / parts;
    Gathered gathered;
    if (parts == 1) {
      gathered = gather_warps(slot);
    } else {
      Part* const part = args.sent_parts + unit;
      if (lane < kScanningWarps) part->counts[lane] = slot.counts[lane];
      if (lane == kScanningWarps) part->taken = slot.taken;
      __syncwarp();
      int32_t before = 0;
      if (lane == 0) before = add_in_order(args.arrived + r, 1);
      if (__shfl_sync(~0u, before, 0) != parts - 1) continue;
      gathered = gather_units(args, r, slot);
    }
    if (!write_row<S, SOFT, OF_WARP>(args, r, gathered, now, slot) && lane == 0) {
      args.code.counts[r] = kLeftRow;
    }
  }
}

// Blocks that a multiprocessor must have registers for: with more groups of chunks fewer.
constexpr int blocks_of(int groups) { return groups > 16 ? 4 : 5; }

// GROUPS: as many as a unit has stripes, if there can be, so that a chunk is not looked through for
// what others of its group have.
template <class S, bool SOFT, int GROUPS, int OF_WARP>
__global__ void __launch_bounds__(kScanners + 32 * kMostSolvers, blocks_of(GROUPS))
    select_quick(const SelectArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ SelectShared shared;
  auto* const slots = reinterpret_cast<Slot<OF_WARP>*>(memory + unit_bytes(args.units.items));
  Unit<S> unit(memory, &shared.barrier, args.units, args.x);
  wait_for_kernel_before();
  let_kernel_after_start();
  const bool scans = threadIdx.x < kScanners;
  if (scans) {
    unit.move_to(int32_t(blockIdx.x));
    if (args.units.fed && threadIdx.x < 32) unit.ask();
  }
  __syncthreads();
  if (scans) {
    scan_units<S, SOFT, GROUPS, OF_WARP>(args, unit, shared, slots);
  } else {
    const int at = int(threadIdx.x - kScanners) / 32;
    solve_rows<S, SOFT, OF_WARP>(args, at, slots[at]);
  }
}

}  // namespace softtopk::cuda
