// The backward of p for rows that one block, or a cluster of blocks, holds in shared memory.
//
// One pass over memory: the copy engine brings x and v, grad_x is written. In between three sweeps
// over shared memory: the pivot; the sums; the output. With u = v - v_pivot, and t relative to r_A
// on side A and to r_B on side B in units of alpha ln 2, the sums are <q, t>, <q, u>, <q, t u> and
// the part of <q, u> that is A's. Relative to one origin t on B is less by o, the distance between
// the sides, so
//
//   <q, (t - <q, t>)(u - <q, u>)> = <q, t u> - <q, t> <q, u> - o (w_A <q, u>_B - w_B <q, u>_A)
//
// with w the share of q on a side. A v where q = 0 counts unless it makes a sum infinite or NaN:
// then the row is done again by the careful way (backward_row.cuh).
#pragma once

#include "backward_row.cuh"
#include "few.cuh"
#include "resident.cuh"

namespace softtopk::cuda {

struct Moments {
  float t, u, tu, u_A;
  __device__ void combine(const Moments& other) {
    t += other.t;
    u += other.u;
    tu += other.tu;
    u_A += other.u_A;
  }
};

struct BackwardShared {
  uint64_t barriers[2];
  int32_t first_of_warps[kMostThreads / 32];
  int2 pivots[kMostBlocks];  // index, bits of v
  Moments of_warps[kMostThreads / 32];
  Moments moments[kMostBlocks];
};

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

template <class H>
__global__ void __launch_bounds__(H::threads, 1024 / H::threads)
    backward_resident(const BackwardArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ BackwardShared shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size;
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x);
  const Mapping<H> map{n};
  const int64_t step = int64_t(gridDim.x) / C::size();
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
  C::sync();

  for (int64_t r = int64_t(blockIdx.x) / C::size(); r < args.x.rows; r += step) {
    const bool x_fed = fed(r, args.wide_x, args.x.stride);
    const bool v_fed = fed(r, args.wide_v, args.v_stride);
    if (x_fed) x_row.ask(x_at(r));
    if (v_fed) v_row.ask(v_at(r));
    const float* solution = static_cast<const float*>(args.solution) + 5 * r;
    const Solution<float> s = {solution[0], solution[1], solution[2], solution[3], solution[4]};
    const float alpha = float(per_row(args.alpha, r));
    constexpr float kLog2e = 1.4426950408889634f;
    const float rate = kLog2e / alpha;
    const Densities<float> d = quick_densities(s, rate);
    const float r_A = fabsf(s.r_A) < infinity<float> ? s.r_A : 0,
                r_B = fabsf(s.r_B) < infinity<float> ? s.r_B : 0;
    if (!x_fed) x_row.copy(x_at(r), args.wide_x);
    if (!v_fed) v_row.copy(v_at(r), args.wide_v);
    if (x_fed) x_row.wait();
    if (v_fed) v_row.wait();
    if (!args.x.largest) x_row.negate();

    bool done = false;
    if (s.D == s.D && (s.P > 0 || s.Q > 0) && rate > 1e-36f && rate < 1e36f) {
      // The pivot: the first element with e = 1 on the side of the larger q.
      const float at_A = d.q_A >= d.q_B ? s.r_A : nan<float>,
                  at_B = d.q_B >= d.q_A ? s.r_B : nan<float>;
      int32_t first = n;
      x_row.for_each([&](int item) {
        float x[kSize];
        x_row.read(item, x);
#pragma unroll
        for (int i = kSize - 1; i >= 0; --i) {
          if (x[i] == at_A || x[i] == at_B) first = min(first, map.index(item, i));
        }
      });
      first = __reduce_min_sync(~0u, first);
      if (t % 32 == 0) shared.first_of_warps[t / 32] = first;
      __syncthreads();
#pragma unroll
      for (int warp = 0; warp < H::threads / 32; ++warp)
        first = min(first, shared.first_of_warps[warp]);
      float v_pivot = first < n ? v_row.element(first) : 0;
      if constexpr (C::many) {
        if (t < C::size())
          *C::at(&shared.pivots[C::rank()], t) = make_int2(first, __float_as_int(v_pivot));
        C::sync();
        int2 pivot = shared.pivots[0];
        for (int block = 1; block < C::size(); ++block) {
          if (shared.pivots[block].x < pivot.x) pivot = shared.pivots[block];
        }
        v_pivot = __int_as_float(pivot.y);
      }

      Moments sums = {0, 0, 0, 0};
      x_row.for_each([&](int item) {
        float x[kSize], v[kSize], qt[kSize], qu[kSize], qtu[kSize];
        x_row.read(item, x);
        v_row.read(item, v);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const bool above = x[i] >= s.r_A;
          const float t = fmaxf(-fabsf(x[i] - (above ? r_A : r_B)) * rate, -200.0f);
          const float q = (above ? d.q_A : d.q_B) * faster_exp2(t);
          qu[i] = q * (v[i] - v_pivot);
          qt[i] = q * (above ? -t : t);
          qtu[i] = (above ? -t : t) * qu[i];
          if (above) sums.u_A += qu[i];
        }
        sums.t += tree_sum(qt);
        sums.u += tree_sum(qu);
        sums.tu += tree_sum(qtu);
      });
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sums.combine(from_lane_xor(sums, mask));
      if (t % 32 == 0) shared.of_warps[t / 32] = sums;
      __syncthreads();
      sums = shared.of_warps[0];
#pragma unroll
      for (int warp = 1; warp < H::threads / 32; ++warp) sums.combine(shared.of_warps[warp]);
      if constexpr (C::many) {
        if (t < C::size()) *C::at(&shared.moments[C::rank()], t) = sums;
        C::sync();
        sums = shared.moments[0];
        for (int i = 1; i < C::size(); ++i) sums.combine(shared.moments[i]);
      }
      const float mean_u = sums.u, mean_t = sums.t;
      const float cross = d.q_A * s.P * (sums.u - sums.u_A) - d.q_B * s.Q * sums.u_A;
      float covariance = sums.tu - mean_t * mean_u;
      if (cross != 0 && s.P > 0 && s.Q > 0) covariance -= (r_A - r_B) * rate * cross;
      done = fabsf(mean_u) + fabsf(mean_t) + fabsf(covariance) < infinity<float>;
      if (done) {
        if (t == 0 && C::rank() == 0) {
          static_cast<float*>(args.grad_k)[r] = v_pivot + mean_u;
          static_cast<float*>(args.grad_alpha)[r] =
              d.R == 0 ? 0.0f : -(d.R * covariance / (kLog2e * alpha));
        }
        const float sign = args.x.largest ? 1.0f : -1.0f;
        const float per_alpha = sign / kLog2e * rate, s_A = d.h_A * per_alpha,
                    s_B = d.h_B * per_alpha;
        const ResidentSink<H> sink(static_cast<Raw*>(args.grad_x) + r * n, map, args.wide_grad);
        x_row.for_each([&](int item) {
          float x[kSize], v[kSize];
          x_row.read(item, x);
          v_row.read(item, v);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const bool above = x[i] >= s.r_A;
            const float e = faster_exp2(-fabsf(x[i] - (above ? r_A : r_B)) * rate);
            x[i] = (above ? s_A : s_B) * e * (v[i] - v_pivot - mean_u);
          }
          sink.store(item, Chunk<S>::of(x));
        });
      }
    }
    if (!done && t == 0 && C::rank() == 0) static_cast<uint32_t*>(args.grad_k)[r] = kLeftBackward;
    C::sync();  // the row has been read, and so have the sums
  }
}

}  // namespace softtopk::cuda
