// What one warp does with the few candidates of a row: the search for the threshold, or the hard
// mask, and the code.
#pragma once

#include "few.cuh"
#include "few_largest.cuh"
#include "select.cuh"

namespace softtopk::cuda {

inline constexpr int kSorted = 128;  // so few are sorted in registers
inline constexpr int kPlaceBits =
    12;  // of a place among the elements; an index has no more than 20

// The elements of a row that may be in its code. All others lie far below the threshold, or are the
// `zeros`, which take part in the budget.
struct Few {
  float* values;
  int32_t* indices;  // aligned to 16 bytes
  uint16_t* order;   // room for an order of them, aligned to 8 bytes
  int32_t places;    // of the arrays, a multiple of 4; what is not an element is -inf
  int32_t count, zeros;
  float least, most;  // no value lies below or above
};

// By one warp: sorts 128 numbers, 4 of each lane; the lanes have them in order, 4 by 4.
__device__ __forceinline__ void sort_of_warp(uint32_t (&x)[4]) {
  const int lane = int(threadIdx.x) % 32;
  const auto in_lane = [&](int i, int j) {
    const uint32_t least = min(x[i], x[j]);
    x[j] = max(x[i], x[j]);
    x[i] = least;
  };
  // With those of the lane `across`, in reverse where two sorted halves first meet.
  const auto with_lane = [&](int across, bool reverse) {
    uint32_t other[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) other[i] = __shfl_xor_sync(~0u, x[reverse ? 3 - i : i], across);
    const bool upper = (lane & (reverse ? (across + 1) / 2 : across)) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = upper ? max(x[i], other[i]) : min(x[i], other[i]);
  };
  in_lane(0, 1), in_lane(2, 3);
  in_lane(0, 3), in_lane(1, 2);
  in_lane(0, 1), in_lane(2, 3);
#pragma unroll
  for (int lanes = 2; lanes <= 32; lanes *= 2) {
    with_lane(lanes - 1, true);
#pragma unroll
    for (int across = lanes / 4; across > 0; across /= 2) with_lane(across, false);
    in_lane(0, 2), in_lane(1, 3);
    in_lane(0, 1), in_lane(2, 3);
  }
}

// By one warp: moves the elements for which keep(value), asked of all 32 at once, to the front, and
// puts them in the order of their indices; their number.
template <class F>
__device__ __forceinline__ int32_t keep_in_order(const Few& few, F keep) {
  const int lane = int(threadIdx.x) % 32;
  int32_t kept = 0;
#pragma unroll 1
  for (int32_t i = lane; i - lane < few.places; i += 32) {
    const float x = i < few.places ? few.values[i] : -infinity<float>;
    const int32_t index = i < few.places ? few.indices[i] : 0;
    const bool own = keep(x);
    const uint32_t all = __ballot_sync(~0u, own);
    __syncwarp();  // all have read before one writes
    if (own) {
      const int32_t place = kept + __popc(all & ((1u << lane) - 1));
      few.values[place] = x;
      few.indices[place] = index;
    }
    kept += __popc(all);
  }
  __syncwarp();
  if (kept <= kSorted) {
    uint32_t key[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int32_t place = lane + 32 * j;
      key[j] = place < kept ? uint32_t(few.indices[place]) << kPlaceBits | place : ~0u;
    }
    sort_of_warp(key);
    constexpr uint32_t kPlaces = (1u << kPlaceBits) - 1;
    reinterpret_cast<uint2*>(few.order)[lane] =
        make_uint2((key[0] & kPlaces) | (key[1] & kPlaces) << 16,
                   (key[2] & kPlaces) | (key[3] & kPlaces) << 16);
    __syncwarp();
    return kept;
  }
  const int32_t whole = (kept + 3) / 4 * 4;
  if (lane < whole - kept) few.indices[kept + lane] = kLast;
  __syncwarp();
#pragma unroll 1
  for (int32_t i = lane; i < kept; i += 32) {
    const int32_t own = few.indices[i];
    int32_t before = 0;
#pragma unroll 4
    for (int32_t j = 0; j < whole; j += 4) {
      const int4 others = *reinterpret_cast<const int4*>(few.indices + j);
      before += (others.x < own) + (others.y < own);
      before += (others.z < own) + (others.w < own);
    }
    few.order[before] = uint16_t(i);
  }
  __syncwarp();
  return kept;
}

// Which of few elements are in the hard mask: those with a key above the bound, and of those with
// the bound for a key the first `ties`.
struct MaskCut {
  uint32_t bound;
  int32_t ties;
};

// By one warp: the cut after the k largest of them, or after all.
template <uint32_t GRAIN>
__device__ __forceinline__ MaskCut mask_cut(const Few& few, int32_t k) {
  const int lane = int(threadIdx.x) % 32;
  const auto reach = [&](uint32_t least) {
    int32_t reached = 0;
#pragma unroll 2
    for (int32_t i = lane; i < few.places; i += 32) {
      reached += key_of(few.values[i]) / GRAIN >= least;
    }
    return __reduce_add_sync(~0u, reached);
  };
  uint32_t low = key_of(few.least) / GRAIN, high = key_of(few.most) / GRAIN;
  int32_t reached_low = few.count;
#pragma unroll 1
  while (low < high && reached_low > k) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    const int32_t reached = reach(middle);
    if (reached >= k) {
      low = middle;
      reached_low = reached;
    } else {
      high = middle - 1;
    }
  }
  return {low, reached_low <= k ? k : k - reach(low + 1)};
}

// The mask of few elements, asked for 32 at a time, from the first on: ties count down.
template <uint32_t GRAIN>
class Mask {
 public:
  __device__ explicit Mask(const MaskCut& cut) : cut_(cut) {}
  // Whether the calling lane's value is, for all lanes of a warp.
  __device__ __forceinline__ bool holds(float x) {
    const uint32_t key = key_of(x) / GRAIN;
    const uint32_t tied = __ballot_sync(~0u, key == cut_.bound);
    const bool first = __popc(tied & lanes_below()) < cut_.ties;
    cut_.ties -= __popc(tied);
    return key > cut_.bound || (key == cut_.bound && first);
  }
  __device__ static uint32_t lanes_below() { return (1u << threadIdx.x % 32) - 1; }

 private:
  MaskCut cut_;
};

// How many elements the mask of row r has, if there are as many.
__device__ __forceinline__ int32_t hard_budget(const SelectArgs& args, int64_t r) {
  return int32_t(std::floor(per_row(args.k, r) + 0.5));
}

// By one warp: writes the hard code of row r.
template <uint32_t GRAIN>
__device__ __forceinline__ void write_hard(const SelectArgs& args, int64_t r, const Few& few) {
  const int lane = int(threadIdx.x) % 32;
  const MaskCut cut = mask_cut<GRAIN>(few, hard_budget(args, r));
  const int32_t count = keep_in_order(few, [&](float x) { return key_of(x) / GRAIN >= cut.bound; });
  Mask<GRAIN> mask(cut);
  const CodeRow<float> to(args.code, r);
  int32_t kept = 0;
#pragma unroll 1
  for (int32_t i = lane; i - lane < count; i += 32) {
    const int own = i < count ? few.order[i] : 0;
    const float x = i < count ? few.values[own] : -infinity<float>;
    const bool keep = mask.holds(x);
    const uint32_t all = __ballot_sync(~0u, keep);
    const int32_t place = kept + __popc(all & Mask<GRAIN>::lanes_below());
    if (keep) to.write(place, few.indices[own], x, x);
    kept += __popc(all);
  }
  to.write_rest(kept, int32_t(args.x.n), lane, 32);
}

// By one warp: solves row r and writes its code, or returns false: it must be left. The threshold
// is sought above L, which is 0 where there are zeros; r_B may be L itself, if no element is next
// to the threshold from below.
template <uint32_t GRAIN>
__device__ __forceinline__ bool write_soft(const SelectArgs& args, int64_t r, const Few& few,
                                           float L, const Budget& k, float alpha, float rate) {
  const int lane = int(threadIdx.x) % 32;
  int32_t right;
  const Solution<float> s =
      FewSearch<GRAIN>(few.values, {L, few.most}, few.places, float(few.zeros), k, alpha, rate)
          .solve(right);
  if (!right) return false;
  const Densities<float> d = quick_densities(s, rate);
  const float larger = fmaxf(d.h_B, d.q_B);
  const bool masked = args.mode == Selecting::straight_through;
  MaskCut cut = {~0u, 0};
  if (masked) cut = mask_cut<GRAIN>(few, hard_budget(args, r));
  constexpr float kLn2 = 0.6931471805599453f;
  float Q_out = 0, M_out = 0;
  const auto tail = [&](float x) {
    return faster_exp2(-fabsf(x - (x >= s.r_A ? s.r_A : s.r_B)) * rate);
  };
  const auto leave = [&](float x) {  // out of the code
    const float q = (x >= s.r_A ? d.q_A : d.q_B) * tail(x);
    Q_out += q;
    if (q > 0) M_out = fmaf(q, (x - s.r_B) * rate, M_out);
  };
  const int32_t count = keep_in_order(few, [&](float x) {
    const bool keep =
        x >= s.r_A || larger * tail(x) >= kLeastKept || (masked && key_of(x) / GRAIN >= cut.bound);
    if (!keep) leave(x);
    return keep;
  });
  Mask<GRAIN> mask(cut);
  const CodeRow<float> to(args.code, r);
  int32_t kept = 0;
#pragma unroll 1
  for (int32_t i = lane; i - lane < count; i += 32) {
    const int own = i < count ? few.order[i] : 0;
    const float x = i < count ? few.values[own] : -infinity<float>;
    const bool above = x >= s.r_A;
    const float e = tail(x);
    bool keep = above || larger * e >= kLeastKept;
    const float p = above ? fmaf(-d.h_A, e, 1.0f) : d.h_B * e;
    float value = p >= kLeastKept ? x * p : 0;
    if (masked) {
      const bool in_mask = mask.holds(x);
      keep = keep || in_mask;
      value = in_mask ? x : 0;
    }
    const uint32_t all = __ballot_sync(~0u, keep);
    const int32_t place = kept + __popc(all & Mask<GRAIN>::lanes_below());
    if (keep) to.write(place, few.indices[own], value, x);
    if (i < count && !(keep && place < to.room())) leave(x);
    kept += __popc(all);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    Q_out += __shfl_xor_sync(~0u, Q_out, lanes);
    M_out += __shfl_xor_sync(~0u, M_out, lanes);
  }
  const float zeros = float(few.zeros) * d.q_B * faster_exp2(-s.r_B * rate);
  if (zeros > 0) {
    Q_out += zeros;
    M_out = fmaf(-zeros, s.r_B * rate, M_out);
  }
  if (lane == 0) write_state(args.code, r, s, Q_out, M_out * kLn2);
  to.write_rest(kept, int32_t(args.x.n), lane, 32);
  return true;
}

}  // namespace softtopk::cuda
