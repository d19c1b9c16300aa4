// The backward of p for rows that one block, or a cluster of blocks, holds in shared memory.
//
// One pass over memory: the copy engine brings x and v, grad_x is written. In between up to four
// sweeps over shared memory: which chunks have any q that is not 0 (of a sample, where that is most
// of them); the pivot; the sums; the output. With u = v - v_pivot and t = (x - m) / alpha in units
// of ln 2, the sums are <q, t>, <q, u> and <q, t u>. Where r_A and r_B are close, m lies between
// them, and h is the same multiple of 2^(-|t + shift|) on both sides (exponent.cuh). Where they are
// not, t is taken relative to r_A on side A and to r_B on side B, and the part of <q, u> that is
// A's is summed too: relative to one origin t on B is less by o, the distance between the sides, so
//
//   <q, (t - <q, t>)(u - <q, u>)> = <q, t u> - <q, t> <q, u> - o (w_A <q, u>_B - w_B <q, u>_A)
//
// with w the share of q on a side. In a cluster each block has a pivot of its own, and the sums are
// shifted to the first one's when they are put together; so the blocks meet once. A v where q = 0
// counts unless it makes a sum infinite or NaN: then the row is done again by the careful way
// (backward_row.cuh).
//
// The ladder, in fractions of 1.5 copies (H200, alpha = 1e-2, float32 n = 4096 | 16384 | 65536,
// bfloat16 n = 16384 | 65536):
//   0.66 | 0.49 | 0.46, 0.45         rows that the threads load, with the careful sums
//   0.92 | 0.72 | 0.62, 0.71         bulk copies, no calls, three cluster barriers a row
//   0.93 | 0.76 | 0.70, 0.83         one fused operation an exponent
//   0.94 | 0.86 | 0.75, 0.85         one message a row, registers for as many blocks as fit
//   0.94 | 0.90 | 0.76, 0.85 | 0.59  sums by fused operations
//   0.93 | 0.88 | 0.78, 0.90 | 0.74  one factor for both sides, chunks without weight left out
//   0.94 | 0.91 | 0.87, 0.90 | 0.77  every lane of a warp asks for a piece of a cluster's row
// and at alpha = 1, where a side is empty, the last step took 0.92 | 0.77 | 0.66, 0.67 | 0.51 to
// 0.95 | 0.91 | 0.84, 0.91 | 0.70: there is one origin then too. What did not help: asking for each
// quarter of the next row as soon as that of the last is written (0.91 | 0.66 | 0.61); smaller
// parts in larger clusters (0.64 | 0.53 at n = 16384 | 65536); exponentials kept in the place of x
// (0.86 | 0.77 at n = 16384 | 65536); chunks with weight written straight to memory among the zeros
// (0.82 | 0.80: half sectors).
#pragma once

#include "backward_row.cuh"
#include "exponent.cuh"
#include "few.cuh"
#include "resident.cuh"

namespace softtopk::cuda {

struct Moments {
  float q, t, u, tu;  // sums of q, q t, q u, q t u
  float q_A, u_A;     // the parts of side A of the first and the third, where they are needed
  __device__ void combine(const Moments& other) {
    q += other.q;
    t += other.t;
    u += other.u;
    tu += other.tu;
    q_A += other.q_A;
    u_A += other.u_A;
  }
  __device__ void scale(float factor) {
    q *= factor;
    t *= factor;
    u *= factor;
    tu *= factor;
  }
  // For u less by `step` everywhere.
  __device__ void shift(float step) {
    u -= step * q;
    tu -= step * t;
    u_A -= step * q_A;
  }
};

// A block's pivot: the first element of the largest q.
struct Pivot {
  int32_t index;
  float v;
};

// What a block of a cluster tells the others.
struct Share {
  Pivot pivot;
  Moments sums;  // relative to it
};

template <class H>
struct BackwardShared {
  uint64_t barriers[2];
  int32_t first_of_warps[H::threads / 32];
  Moments of_warps[H::threads / 32];
  uint64_t mailboxes[2];
  Share shares[2][H::C::many ? kMostBlocks : 1];  // of two rows: a block may be ahead by one
};

// The lowest index of a chunk's elements that equal `value`.
template <class H, int N>
__device__ __forceinline__ int32_t first_index(const Mapping<H>& map, const float (&x)[N], int item,
                                               float value) {
  int32_t first = map.n;
#pragma unroll
  for (int i = N - 1; i >= 0; --i) {
    if (x[i] == value) first = min(first, map.index(item, i));
  }
  return first;
}

// The mark of a row that is left to be done the careful way, in the place of grad_k: a NaN of no
// computation.
inline constexpr uint32_t kLeftBackward = 0x7fc0d1e5;

// The rows that backward_resident has left.
template <class S>
__global__ void __launch_bounds__(256, 4) backward_careful(const BackwardArgs args) {
  using Row = GlobalRow<S, Block<256>, 0>;
  __shared__ typename Block<256>::Storage storage;
  Block<256> group(storage);
  const int32_t n = int32_t(args.x.n);
  const uint32_t* marks = static_cast<const uint32_t*>(args.grad_k);
  for (int64_t first = int64_t(blockIdx.x) * 32; first < args.x.rows;
       first += int64_t(gridDim.x) * 32) {
    const int64_t mine = first + int(threadIdx.x) % 32;
    uint32_t left = __ballot_sync(~0u, mine < args.x.rows && marks[mine] == kLeftBackward);
    if (left != 0) __syncthreads();  // all have looked before one is done
    for (; left != 0; left &= left - 1) {
      const int64_t r = first + __ffs(int(left)) - 1;
      const Source<S> x_source(args.x.data, r * args.x.stride, n, args.wide_x, !args.x.largest);
      const Source<S> v_source(args.v, r * args.v_stride, n, args.wide_v, false);
      const Row x_row(x_source, nullptr), v_row(v_source, nullptr);
      backward_of_row<S>(args, r, x_source, v_source, x_row, v_row, group);
    }
  }
}

// As many blocks as fit on chip: registers must suffice for them.
template <class H>
inline constexpr int kBackwardBlocks = H::threads == 256   ? 3
                                       : H::threads == 128 ? 7
                                                           : 13;

template <class H>
__global__ void __launch_bounds__(H::threads, kBackwardBlocks<H>)
    backward_resident(const BackwardArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ BackwardShared<H> shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size, kWarps = H::threads / 32;
  constexpr int kTogether = C::many && sizeof(S) == 4 ? 1 : 4;
  constexpr float kLog2e = 1.4426950408889634f;
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x), warp = t / 32;
  const Mapping<H> map{n};
  const auto x_at = [&](int64_t r) {
    return static_cast<const Raw*>(args.x.data) + r * args.x.stride;
  };
  const auto v_at = [&](int64_t r) { return static_cast<const Raw*>(args.v) + r * args.v_stride; };
  // Whole granules of the last ragged row would reach beyond its end.
  const auto fed = [&](int64_t r, bool wide, int64_t stride) {
    if (!args.fed || r >= args.x.rows) return false;
    return H::ragged ? r + 1 < args.x.rows && stride >= n : wide;
  };

  ResidentRow<H> x_row(memory, &shared.barriers[0], map);
  ResidentRow<H> v_row(memory + x_row.slot_bytes(), &shared.barriers[1], map, true);
  Mailbox<2> mailbox(shared.mailboxes);
  C::sync();

  const auto x_fed = [&](int64_t r) { return fed(r, args.wide_x, args.x.stride); };
  const auto v_fed = [&](int64_t r) { return fed(r, args.wide_v, args.v_stride); };
  const auto ask = [&](int64_t r) {
    if (x_fed(r)) x_row.ask(x_at(r), warp == 0);
    if (v_fed(r)) v_row.ask(v_at(r), warp == 1);
  };
  // A row's number is made anew from that of its turn, which alone is kept.
  const auto row_of_turn = [&](int turn) {
    const int blocks = anew(C::size());
    return int64_t(blockIdx.x / blocks) + turn * int64_t(gridDim.x / blocks);
  };
  ask(row_of_turn(0));
  for (int turn = 0;; ++turn) {
    const int64_t r = row_of_turn(turn);
    if (r >= args.x.rows) break;
    const float* solution = static_cast<const float*>(args.solution) + 5 * r;
    const Solution<float> s = {solution[0], solution[1], solution[2], solution[3], solution[4]};
    const float alpha = float(per_row(args.alpha, r));
    const float rate = kLog2e / alpha;
    const Densities<float> d = quick_densities(s, rate);
    const float r_A = fabsf(s.r_A) < infinity<float> ? s.r_A : 0,
                r_B = fabsf(s.r_B) < infinity<float> ? s.r_B : 0;
    const Origin origin(s.r_A, s.r_B, rate, 4);
    const float shift = origin.shift(d.h_A, d.h_B);
    const bool one_origin = origin.serves && fabsf(shift) <= 8;
    if (!x_fed(r)) x_row.copy(x_at(r), args.wide_x);
    if (!v_fed(r)) v_row.copy(v_at(r), args.wide_v);
    // Which of them is fed is the same for all rows but the last, so that every turn is a phase.
    if (x_fed(r)) x_row.template wait<kTogether>(turn & 1);
    if (v_fed(r)) v_row.template wait<kTogether>(turn & 1);
    if (!args.x.largest) x_row.negate();

    bool done = false;
    if (s.D == s.D && (s.P > 0 || s.Q > 0) && rate > 1e-36f && rate < 1e36f) {
      // The chunks in which any q is not 0. A warp that finds most of its first ones so looks no
      // further.
      const float reach = 127 / rate, least = s.r_B - reach, most = s.r_A + reach;
      const auto weighs = [&](int item) {
        return uint32_t(x_row.max(item) >= least && x_row.min(item) <= most) << item;
      };
      const int items = x_row.items(), first_items = min(items, 2);
      uint32_t weighty = 0;
      for (int item = 0; item < first_items; ++item) weighty |= weighs(item);
      const bool dense = one_origin && __reduce_add_sync(~0u, __popc(weighty)) > 20 * first_items;
      if (!dense) {
#pragma unroll 2
        for (int item = first_items; item < items; ++item) weighty |= weighs(item);
      }
      const auto for_weighty = [&](auto f) {
        // Half as many at a time as elsewhere: with x and v there are no registers for more.
        if (dense) return x_row.template for_each<sizeof(S) == 4 ? 2 : 1>(f);
        for (uint32_t left = weighty; left != 0; left &= left - 1) f(__ffs(int(left)) - 1);
      };

      const float at_pivot = d.q_A >= d.q_B ? s.r_A : s.r_B;
      int32_t first = n;
      for_weighty([&](int item) {
        if (!x_row.holds(item, at_pivot)) return;
        float x[kSize];
        x_row.read(item, x);
        first = min(first, first_index(map, x, item, at_pivot));
      });
      first = __reduce_min_sync(~0u, first);
      if (t % 32 == 0) shared.first_of_warps[warp] = first;
      H::sync();
#pragma unroll
      for (int i = 0; i < kWarps; ++i) first = min(first, shared.first_of_warps[i]);
      Pivot pivot = {first, first < n ? v_row.element(first) : 0};

      Moments sums = {0, 0, 0, 0, 0, 0};
      if (one_origin) {
        Moments parts[2] = {};
        for_weighty([&](int item) {
          float x[kSize], v[kSize];
          x_row.read(item, x);
          v_row.read(item, v);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const float z = fmaxf(origin.z(x[i]), -200.0f);
            const float e = faster_exp2(-fabsf(z + shift));
            const float eu = e * (v[i] - pivot.v);
            Moments& part = parts[i % 2];
            if constexpr (C::many) part.q += e;
            part.t = fmaf(e, z, part.t);
            part.u += eu;
            part.tu = fmaf(eu, z, part.tu);
          }
        });
        sums = parts[0];
        sums.combine(parts[1]);
        sums.scale(0.5f / d.R);
      } else {
        for_weighty([&](int item) {
          float x[kSize], v[kSize];
          x_row.read(item, x);
          v_row.read(item, v);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const bool above = x[i] >= s.r_A;
            const float t = fminf(fmaxf((x[i] - (above ? r_A : r_B)) * rate, -200.0f), 200.0f);
            const float q = (above ? d.q_A : d.q_B) * faster_exp2(-fabsf(t));
            const float qu = q * (v[i] - pivot.v);
            sums.q += q;
            sums.t += q * t;
            sums.u += qu;
            sums.tu += qu * t;
            if (above) {
              sums.q_A += q;
              sums.u_A += qu;
            }
          }
        });
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sums.combine(from_lane_xor(sums, mask));
      if constexpr (kWarps > 1) {
        if (t % 32 == 0) shared.of_warps[warp] = sums;
        __syncthreads();
        sums = shared.of_warps[0];
#pragma unroll
        for (int i = 1; i < kWarps; ++i) sums.combine(shared.of_warps[i]);
      }
      if constexpr (C::many) {
        Share* shares = shared.shares[mailbox.place()];
        if (t < C::size()) mailbox.send(&shares[C::rank()], t, Share{pivot, sums});
        mailbox.receive(C::size() * sizeof(Share));
        for (int b = 0; b < C::size(); ++b) {
          if (shares[b].pivot.index < pivot.index) pivot = shares[b].pivot;
        }
        sums = {0, 0, 0, 0, 0, 0};
        for (int b = 0; b < C::size(); ++b) {
          Moments of_block = shares[b].sums;
          of_block.shift(pivot.v - shares[b].pivot.v);
          sums.combine(of_block);
        }
      }
      const float mean_u = sums.u, mean_t = sums.t;
      float covariance = sums.tu - mean_t * mean_u;
      const float cross = d.q_A * s.P * (sums.u - sums.u_A) - d.q_B * s.Q * sums.u_A;
      if (!one_origin && cross != 0 && s.P > 0 && s.Q > 0) {
        covariance -= (r_A - r_B) * rate * cross;
      }
      done = fabsf(mean_u) + fabsf(mean_t) + fabsf(covariance) < infinity<float>;
      if (done) {
        if (t == 0 && C::rank() == 0) {
          static_cast<float*>(args.grad_k)[r] = pivot.v + mean_u;
          static_cast<float*>(args.grad_alpha)[r] =
              d.R == 0 ? 0.0f : -(d.R * covariance / (kLog2e * alpha));
        }
        const float per_alpha = (args.x.largest ? rate : -rate) / kLog2e;
        const ResidentSink<H> sink(static_cast<Raw*>(args.grad_x) + r * n, map, args.wide_grad);
        const float half = 0.5f * per_alpha, s_A = d.h_A * per_alpha, s_B = d.h_B * per_alpha;
        const auto near = [&](int item) {
          float x[kSize], v[kSize];
          x_row.read(item, x);
          v_row.read(item, v);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const float e = faster_exp2(-fabsf(origin.z(x[i]) + shift));
            x[i] = half * e * (v[i] - pivot.v - mean_u);
          }
          return Chunk<S>::of(x);
        };
        const auto far = [&](int item) {
          float x[kSize], v[kSize];
          x_row.read(item, x);
          v_row.read(item, v);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const bool above = x[i] >= s.r_A;
            const float e = faster_exp2(-fabsf(x[i] - (above ? r_A : r_B)) * rate);
            x[i] = (above ? s_A : s_B) * e * (v[i] - pivot.v - mean_u);
          }
          return Chunk<S>::of(x);
        };
        if (dense) {
          sink.fill(x_row, near);
        } else {  // few chunks are not 0: they go through the place of x, the rest straight out
          if (one_origin) {
            for_weighty([&](int item) { x_row.replace(item, near(item)); });
          } else {
            for_weighty([&](int item) { x_row.replace(item, far(item)); });
          }
          sink.fill(x_row,
                    [&](int item) { return weighty >> item & 1 ? x_row.chunk(item) : Chunk<S>{}; });
          x_row.release();
        }
        sink.flush(x_row);
      }
    }
    if (!done && t == 0 && C::rank() == 0) static_cast<uint32_t*>(args.grad_k)[r] = kLeftBackward;
    H::sync();  // the row has been read
    ask(row_of_turn(turn + 1));
  }
  C::sync();  // a block that has left can no longer be written to
}

}  // namespace softtopk::cuda
