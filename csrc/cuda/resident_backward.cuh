// The backward of p for rows that one block, or a cluster of blocks, holds in shared memory.
//
// One pass over memory: the copy engine brings x and v, grad_x is written. In between three sweeps
// over shared memory: the pivot; the sums; the output. With y = -|x - r| / (alpha ln 2), e = 2^y and
// u = v - v_pivot, the sums over each side, A and B, are those of e y, e u and e y u. In units of
// alpha ln 2, t = y + o on B, o the distance between the sides, and t = -y on A, so that
//
//   <q, (t - <q, t>)(u - <q, u>)> = <q, y' u> - <q, y'> <q, u> + o (w_A <q, u>_B - w_B <q, u>_A)
//
// with y' = y on B and -y on A, and w the share of q on a side. Nothing is looked at where e = 0
// unless a sum is not finite: then the row is done again by the careful way (backward_row.cuh).
#pragma once

#include "backward_row.cuh"
#include "resident.cuh"

namespace softtopk::cuda {

// Of one side: sums of e y', e u, e y' u.
struct SideSums {
  float y, u, yu;
};
struct Moments {
  SideSums A, B;
  __device__ void combine(const Moments& other) {
    A.y += other.A.y, A.u += other.A.u, A.yu += other.A.yu;
    B.y += other.B.y, B.u += other.B.u, B.yu += other.B.yu;
  }
};

struct BackwardShared {
  uint64_t barriers[2];
  int32_t first_of_warps[kMostThreads / 32];
  int2 pivots[kMostBlocks];  // index, bits of v
  Moments moments[kMostBlocks];
  WholeBlock::Storage block;
};

template <class S>
__device__ __noinline__ void backward_of_global_row(const BackwardArgs& args, int64_t r,
                                                    WholeBlock::Storage& storage) {
  const int32_t n = int32_t(args.x.n);
  WholeBlock group(storage);
  const Source<S> x_source(args.x.data, r * args.x.stride, n, args.wide_x, !args.x.largest);
  const Source<S> v_source(args.v, r * args.v_stride, n, args.wide_v, false);
  using Row = GlobalRow<S, WholeBlock, 0>;
  const Row x_row(x_source, nullptr), v_row(v_source, nullptr);
  backward_of_row<S>(args, r, x_source, v_source, x_row, v_row, group);
}

template <class H>
__global__ void __launch_bounds__(H::threads, 1024 / H::threads) backward_resident(const BackwardArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ BackwardShared shared;
  using S = typename H::S;
  using C = typename H::C;
  using Raw = typename Element<S>::Raw;
  constexpr int kSize = Chunk<S>::size;
  const int32_t n = int32_t(args.x.n), t = int32_t(threadIdx.x);
  const Mapping<H> map{n};
  const int64_t step = int64_t(gridDim.x) / C::size();
  const auto x_at = [&](int64_t r) { return static_cast<const Raw*>(args.x.data) + r * args.x.stride; };
  const auto v_at = [&](int64_t r) { return static_cast<const Raw*>(args.v) + r * args.v_stride; };
  // Whole granules of the last ragged row would reach beyond its end.
  const auto fed = [&](int64_t r, bool wide, int64_t stride) {
    return args.fed && (H::ragged ? r + 1 < args.x.rows && stride >= n : wide);
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
    const float alpha = scale_in<float>(per_row(args.alpha, r));
    const Densities<float> d = densities(s, alpha);
    constexpr float kLog2e = 1.4426950408889634f;
    const float rate = kLog2e / alpha;
    const float r_A = fabsf(s.r_A) < infinity<float> ? s.r_A : 0, r_B = fabsf(s.r_B) < infinity<float> ? s.r_B : 0;
    if (!x_fed) x_row.copy(x_at(r), args.wide_x);
    if (!v_fed) v_row.copy(v_at(r), args.wide_v);
    if (x_fed) x_row.wait();
    if (v_fed) v_row.wait();
    if (!args.x.largest) x_row.negate();

    bool done = false;
    if (s.D == s.D && (s.P > 0 || s.Q > 0) && rate > 1e-36f && rate < 1e36f) {
      // The pivot: the first element with e = 1 on the side of the larger q.
      const float at_A = d.q_A >= d.q_B ? s.r_A : nan<float>, at_B = d.q_B >= d.q_A ? s.r_B : nan<float>;
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
      for (int warp = 0; warp < H::threads / 32; ++warp) first = min(first, shared.first_of_warps[warp]);
      if (t < C::size()) {
        const float v = first < n ? Element<S>::value(v_at(r)[first]) : 0;
        *C::at(&shared.pivots[C::rank()], t) = make_int2(first, __float_as_int(v));
      }
      C::sync();
      int2 pivot = shared.pivots[0];
      for (int block = 1; block < C::size(); ++block) {
        if (shared.pivots[block].x < pivot.x) pivot = shared.pivots[block];
      }
      const float v_pivot = __int_as_float(pivot.y);

      Moments sums = {{0, 0, 0}, {0, 0, 0}};
      x_row.for_each([&](int item) {
        float x[kSize], v[kSize];
        x_row.read(item, x);
        v_row.read(item, v);
        bool any_above = false;
#pragma unroll
        for (float value : x) any_above |= value >= s.r_A;
        SideSums B = {0, 0, 0};
        if (!any_above) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const float y = fmaxf((x[i] - r_B) * rate, -200.0f), e = faster_exp2(y);
            const float eu = e * (v[i] - v_pivot);
            B.y += e * y;
            B.u += eu;
            B.yu += eu * y;
          }
        } else {
          SideSums A = {0, 0, 0};
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const bool above = x[i] >= s.r_A;
            const float y = fmaxf((above ? r_A - x[i] : x[i] - r_B) * rate, -200.0f), e = faster_exp2(y);
            const float eu = e * (v[i] - v_pivot);
            if (above) {
              A.y -= e * y;
              A.u += eu;
              A.yu -= eu * y;
            } else {
              B.y += e * y;
              B.u += eu;
              B.yu += eu * y;
            }
          }
          sums.A.y += A.y, sums.A.u += A.u, sums.A.yu += A.yu;
        }
        sums.B.y += B.y, sums.B.u += B.u, sums.B.yu += B.yu;
      });
      WholeBlock block(shared.block);
      sums = block.reduce(sums);
      if constexpr (C::many) {
        if (t < C::size()) *C::at(&shared.moments[C::rank()], t) = sums;
        C::sync();
        sums = shared.moments[0];
        for (int i = 1; i < C::size(); ++i) sums.combine(shared.moments[i]);
      }
      const float u_A = d.q_A * sums.A.u, u_B = d.q_B * sums.B.u, mean_u = u_A + u_B;
      const float mean_y = d.q_A * sums.A.y + d.q_B * sums.B.y;
      const float yu = d.q_A * sums.A.yu + d.q_B * sums.B.yu;
      const float cross = d.q_A * s.P * u_B - d.q_B * s.Q * u_A;
      float covariance = yu - mean_y * mean_u;
      if (cross != 0 && s.P > 0 && s.Q > 0) covariance += (r_B - r_A) * rate * cross;
      done = fabsf(mean_u) + fabsf(mean_y) + fabsf(covariance) < infinity<float>;
      if (done) {
        if (t == 0 && C::rank() == 0) {
          static_cast<float*>(args.grad_k)[r] = v_pivot + mean_u;
          static_cast<float*>(args.grad_alpha)[r] =
              d.R == 0 ? 0.0f : -(d.R * covariance / (kLog2e * alpha));
        }
        const float sign = args.x.largest ? 1.0f : -1.0f;
        const float s_A = sign * (d.h_A / alpha), s_B = sign * (d.h_B / alpha);
        const ResidentSink<H> sink(static_cast<Raw*>(args.grad_x) + r * n, map, args.wide_grad);
        x_row.for_each([&](int item) {
          float x[kSize], v[kSize];
          x_row.read(item, x);
          v_row.read(item, v);
          bool any_above = false;
          float g[kSize];
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            g[i] = s_B * faster_exp2((x[i] - r_B) * rate);
            any_above |= x[i] >= s.r_A;
          }
          if (any_above) {
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              if (x[i] >= s.r_A) g[i] = s_A * faster_exp2((r_A - x[i]) * rate);
            }
          }
#pragma unroll
          for (int i = 0; i < kSize; ++i) x[i] = g[i] * (v[i] - v_pivot - mean_u);
          sink.store(item, Chunk<S>::of(x));
        });
      }
    }
    if (!done && C::rank() == 0) backward_of_global_row<S>(args, r, shared.block);
    C::sync();  // the row has been read, and so have the sums
  }
}

}  // namespace softtopk::cuda
