// The gradients of a piece of the entries (sparse_gradients.cu), for every type: entry by entry.
//
// A warp has a piece and a tile of the columns, 512 bytes wide, and needs nobody else: no barrier,
// no slower neighbour. Where the gradient is projected, which needs whole rows of it, a block has
// all tiles of a piece, and its warps meet at the end of every latent.
#pragma once

#include "gradient_args.cuh"

namespace softtopk::cuda {

constexpr int kTogether = 4;    // of them, whose rows are asked for at once
constexpr int kResident = 6;    // blocks of a multiprocessor, which leave 80 registers to a thread
constexpr int kWarps = 4;       // of a block whose warps are on their own
constexpr int kMostTiles = 16;  // of a block that has them all

// Of SIZE values of every lane, a power of two, the sums over a warp: value i in the lanes that
// have i in their highest bits.
template <class T, int SIZE>
__device__ __forceinline__ T sums_of_warp(const T (&values)[SIZE], int lane) {
  if constexpr (SIZE == 1) {
    T sum = values[0];
    return sum;
  } else {
    constexpr int kHalf = SIZE / 2;
    T half[kHalf];
    // The lanes in the upper half of those that share these values take the upper values.
    const int mask = 16 * SIZE / kTogether;
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const T mine = upper ? values[i + kHalf] : values[i];
      const T other = upper ? values[i] : values[i + kHalf];
      half[i] = mine + __shfl_xor_sync(~0u, other, mask);
    }
    return sums_of_warp(half, lane);
  }
}

// A lane's columns of a tile: VECTORS chunks, a warp's width apart.
template <class S, int VECTORS, bool WIDE>
struct Columns {
  using Raw = typename Element<S>::Raw;
  static constexpr int size = Chunk<S>::size;
  int32_t first, d;

  __device__ Columns(int tile, int lane, int64_t d)
      : first((tile * VECTORS * 32 + lane) * size), d(int32_t(d)) {}
  __device__ __forceinline__ int32_t column(int vector) const { return first + vector * 32 * size; }
  __device__ __forceinline__ void load(const void* data, int32_t row,
                                       Chunk<S> (&chunks)[VECTORS]) const {
    const Raw* const from = static_cast<const Raw*>(data) + uint64_t(uint32_t(row)) * uint32_t(d);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int32_t at = column(v);
      chunks[v] = Chunk<S>{};
      if constexpr (WIDE) {
        if (at < d) chunks[v].words = __ldg(reinterpret_cast<const uint4*>(from + at));
      } else {
#pragma unroll
        for (int i = 0; i < size; ++i) {
          if (at + i < d) chunks[v].set_raw(i, __ldg(from + at + i));
        }
      }
    }
  }
  template <class O, class T>
  __device__ __forceinline__ void store(O* row, const T (&x)[VECTORS][size]) const {
    using RawOut = typename Element<O>::Raw;
    constexpr int kOut = Chunk<O>::size;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int32_t at = column(v);
      RawOut* const to = reinterpret_cast<RawOut*>(row) + at;
      if constexpr (WIDE && size % kOut == 0) {
        if (at >= d) return;
#pragma unroll
        for (int part = 0; part < size / kOut; ++part) {
          Compute<O> own[kOut];
#pragma unroll
          for (int i = 0; i < kOut; ++i) own[i] = Compute<O>(x[v][part * kOut + i]);
          store_global(to + part * kOut, Chunk<O>::of(own).words);
        }
      } else {
#pragma unroll
        for (int i = 0; i < size; ++i) {
          if (at + i < d) to[i] = Element<O>::raw(Compute<O>(x[v][i]));
        }
      }
    }
  }
};

// 32 entries in their order, one to a lane.
template <class T>
struct Window {
  int32_t place, latent;
  T scale;

  __device__ __forceinline__ void load(const GradientArgs& args) {  // `place` is there
    latent = args.indices[place];
    scale = static_cast<const T*>(args.scale)[place];
  }
};

// WHOLE: a block has all tiles of a piece.
template <class S, class O, int VECTORS, bool WIDE, bool DOTS, bool WHOLE>
__global__ void __launch_bounds__(WHOLE ? kMostTiles * 32 : kWarps * 32, WHOLE ? 1 : kResident)
    add_pieces(const GradientArgs args) {
  using T = Compute<S>;
  using Own = Columns<S, VECTORS, WIDE>;
  constexpr int kSize = Chunk<S>::size;
  constexpr int kAtOnce = VECTORS == 1 ? kTogether : 1;  // as many rows as registers hold
  constexpr uint32_t kAll = ~0u;
  __shared__ T of_warps[2][WHOLE ? kMostTiles : 1];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int tile = WHOLE ? warp : int(blockIdx.y);
  const int64_t piece = WHOLE ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * kWarps + warp;
  const int32_t total = args.offsets[args.n];
  if (piece * kPiece >= total) return;
  const int32_t begin = int32_t(piece) * kPiece, limit = min(begin + kPiece, total);
  const Own own(tile, lane, args.d);

  // Which entries: without those of a latent that a piece before has followed to its end, and with
  // the rest of the last latent if that ends before the piece after the next begins.
  Window<T> window;
  window.place = begin + lane < limit ? args.entries[begin + lane] : 0;
  int32_t bound = lane == 0 ? begin : limit - 1;
  bound = args.indices[args.entries[bound]];  // lane 0: the first latent, others: the last
  const int32_t bound_start = args.offsets[bound], bound_end = args.offsets[bound + 1];
  window.load(args);
  const int32_t first_start = __shfl_sync(kAll, bound_start, 0);
  const int32_t first_end = __shfl_sync(kAll, bound_end, 0);
  const int32_t last_latent = __shfl_sync(kAll, bound, 1);
  const int32_t last_start = __shfl_sync(kAll, bound_start, 1);
  const int32_t last_end = __shfl_sync(kAll, bound_end, 1);
  const int32_t from = first_start < begin && first_end <= begin + kPiece ? first_end : begin;
  const int32_t to = last_end <= begin + 2 * kPiece ? last_end : limit;
  const bool shared = last_start < begin || to < last_end;  // the last latent
  if (from >= to) return;

  T sum[VECTORS][kSize] = {}, w[VECTORS][kSize] = {}, along = 0, of_scales = 0;
  int32_t latent = -1;
  int turn = 0;
  // The sums of a latent, to where they belong.
  const auto finish = [&]() {
    const bool sharing = shared && latent == last_latent;
    if (sharing) {
      own.store(static_cast<T*>(args.partial) + piece * args.d, sum);
      if (lane == 0 && tile == 0) static_cast<T*>(args.partial_sums)[piece] = of_scales;
    } else {
      if constexpr (WHOLE) {
        along = sum_of_warp(along);
        if (lane == 0) of_warps[turn][warp] = along;
        __syncthreads();
        T all = 0;
        for (int other = 0; other < args.tiles; ++other) all += of_warps[turn][other];
        turn ^= 1;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
          for (int j = 0; j < kSize; ++j) sum[v][j] -= all * w[v][j];
        }
      }
      own.store(static_cast<O*>(args.grad) + int64_t(latent) * args.d, sum);
      if (args.squares != nullptr) {
        T square = 0;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
          for (const T x : sum[v]) square = fma(x, x, square);
        }
        square = sum_of_warp(square);
        if (lane == 0) {
          static_cast<T*>(args.partial_squares)[int64_t(tile) * args.n + latent] = square;
        }
      }
      if (args.sums != nullptr && tile == 0 && lane == 0) {
        static_cast<T*>(args.sums)[latent] = of_scales;
      }
    }
    along = of_scales = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
      for (T& x : sum[v]) x = 0;
    }
  };

  int32_t before = -1;  // the latent of the last entry of the window before
#pragma unroll 1
  for (int32_t base = begin; base < to; base += 32) {
    if (base > begin) window.load(args);
    const int32_t row = int32_t(uint32_t(window.place) / uint32_t(args.max_active));
    const bool active = base + lane >= from && base + lane < to;
    int32_t previous = __shfl_up_sync(kAll, window.latent, 1);
    if (lane == 0) previous = before;
    before = __shfl_sync(kAll, window.latent, 31);
    const uint32_t actives = __ballot_sync(kAll, active);
    // Where a latent begins.
    const uint32_t fresh =
        __ballot_sync(kAll, active && (window.latent != previous || base + lane == from));
    const Window<T> now = window;
    if (base + 32 < to) window.place = base + 32 + lane < to ? args.entries[base + 32 + lane] : 0;
    T* const dots = static_cast<T*>(args.partial_dots) + tile * args.places + base;
#pragma unroll 1
    for (int start = 0; start < 32; start += kAtOnce) {
      const uint32_t here = actives >> start;
      if ((here & ((1u << kAtOnce) - 1)) == 0) {
        if (here == 0) break;
        continue;
      }
      Chunk<S> y[kAtOnce][VECTORS], weights[kAtOnce][VECTORS];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t which = __shfl_sync(kAll, row, start + i);
        const int32_t of = __shfl_sync(kAll, now.latent, start + i);
        if (actives >> (start + i) & 1) own.load(args.y, which, y[i]);
        if (DOTS && fresh >> (start + i) & 1) own.load(args.weight, of, weights[i]);
      }
      T dot[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        dot[i] = 0;
        if (!(actives >> (start + i) & 1)) continue;
        if (fresh >> (start + i) & 1) {
          if (latent >= 0) finish();
          latent = __shfl_sync(kAll, now.latent, start + i);
          if constexpr (DOTS) {
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) weights[i][v].read(w[v]);
          }
        }
        const T scale = __shfl_sync(kAll, now.scale, start + i);
        of_scales += scale;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
          T x[kSize];
          y[i][v].read(x);
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            sum[v][j] = fma(scale, x[j], sum[v][j]);
            if constexpr (DOTS) dot[i] = fma(w[v][j], x[j], dot[i]);
          }
        }
        if constexpr (WHOLE) along = fma(scale, dot[i], along);
      }
      if constexpr (DOTS) {
        constexpr int kLanes = 32 / kAtOnce;
        T mine = dot[0];
        if constexpr (kAtOnce > 1) mine = sums_of_warp(dot, lane);
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) {
          mine += __shfl_xor_sync(kAll, mine, mask);
        }
        const int at = start + lane / kLanes;
        if (lane % kLanes == 0 && actives >> at & 1) dots[at] = mine;
      }
    }
  }
  finish();
}

}  // namespace softtopk::cuda
