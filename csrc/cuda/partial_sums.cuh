// The gradients of long latents, of which sparse_gradients.cu leaves partial sums by the piece.
#pragma once

#include "overlap.cuh"
#include "pieces.cuh"

namespace softtopk::cuda {

inline constexpr int kFinishing = 256;  // threads of a block
inline constexpr int kResident = 4;     // blocks of a multiprocessor
inline constexpr int kSearched = 16;    // pieces to a thread that are looked at at once
inline constexpr int kWide = 4;         // neighbouring columns of a thread
template <class T>
struct alignas(16) Wide {
  T values[kWide];
};

// The sum of a value over a block of kFinishing threads, in all of them.
template <class T>
__device__ __forceinline__ T sum_of_block(T value, T (&of_warps)[kFinishing / 32]) {
  value = sum_of_warp(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
#pragma unroll
  for (const T of_warp : of_warps) total += of_warp;
  return total;
}

// By a block: adds up the partial sums of a long latent, for its slice of columns, of which a
// thread has kWide neighbours.
template <class S, class O>
__device__ __forceinline__ void add_partial_of(const GradientArgs& args, int32_t latent,
                                               Compute<S> (&of_warps)[kFinishing / 32]) {
  using T = Compute<S>;
  const int t = int(threadIdx.x);
  const int64_t d = args.d;
  const int32_t begin = args.offsets[latent], end = args.offsets[latent + 1];
  // The first piece has it last, but where it begins with it; the others have it first.
  const int32_t first = begin / kPiece, last = (end - 1) / kPiece;
  T* const start =
      static_cast<T*>(args.partial) + (int64_t(first) * 2 + (begin > first * kPiece)) * d;
  const T* const others = static_cast<const T*>(args.partial) + int64_t(first) * 2 * d;
  const auto* const weight = static_cast<const typename Element<S>::Raw*>(args.weight) +
                             (args.project ? int64_t(latent) * d : 0);
  auto* const out = static_cast<typename Element<O>::Raw*>(args.grad) + int64_t(latent) * d;
  const int64_t first_column = (int64_t(blockIdx.y) * kFinishing + t) * kWide;
  const int64_t step = int64_t(gridDim.y) * kFinishing * kWide;
  T along = 0, square = 0;
  for (int64_t column = first_column; column < d; column += step) {
    const int count = int(min(int64_t(kWide), d - column));
    T sum[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) sum[i] = i < count ? start[column + i] : T(0);
    if (d % kWide == 0) {
#pragma unroll 8
      for (int32_t piece = 1; piece <= last - first; ++piece) {
        const Wide<T> own =
            *reinterpret_cast<const Wide<T>*>(others + int64_t(piece) * 2 * d + column);
#pragma unroll
        for (int i = 0; i < kWide; ++i) sum[i] += own.values[i];
      }
    } else {
      for (int32_t piece = 1; piece <= last - first; ++piece) {
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
          if (i < count) sum[i] += others[int64_t(piece) * 2 * d + column + i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      if (i >= count) continue;
      if (args.project) {
        start[column + i] = sum[i];  // this thread's from here on
        along = fma(sum[i], Element<S>::value(weight[column + i]), along);
      } else {
        out[column + i] = Element<O>::raw(Compute<O>(sum[i]));
        square = fma(sum[i], sum[i], square);
      }
    }
  }
  if (args.project) {
    along = sum_of_block(along, of_warps);
    for (int64_t column = first_column; column < d; column += step) {
      for (int64_t i = column; i < min(column + kWide, d); ++i) {
        const T sum = start[i] - along * Element<S>::value(weight[i]);
        out[i] = Element<O>::raw(Compute<O>(sum));
        square = fma(sum, sum, square);
      }
    }
  }
  if (args.squares != nullptr) {
    square = sum_of_block(square, of_warps);
    if (t == 0) static_cast<T*>(args.squares)[latent] = square;
  }
  if (args.sums != nullptr && blockIdx.y == 0 && t < 32) {
    const T* const sums = static_cast<const T*>(args.partial_sums);
    T sum = 0;
    for (int32_t piece = first + t; piece <= last; piece += 32) {
      sum += sums[int64_t(piece) * 2 + (piece == first && begin > first * kPiece)];
    }
    sum = sum_of_warp(sum);
    if (t == 0) static_cast<T*>(args.sums)[latent] = sum;
  }
}

// The long latents, in turns of the blocks. Each of these looks through all pieces for them,
// kSearched to a thread at a time.
template <class S, class O>
__global__ void __launch_bounds__(kFinishing, kResident) add_partial(const GradientArgs args) {
  constexpr int kWarps = kFinishing / 32, kEach = kSearched * kWarps / 32;
  __shared__ Compute<S> of_warps[kWarps];
  __shared__ int32_t found[kSearched * kFinishing], starts[kSearched * kWarps];
  __shared__ int32_t count;
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  wait_for_kernel_before();
  const int64_t pieces = (int64_t(args.offsets[args.n]) + kPiece - 1) / kPiece;
  int64_t before = 0, next = blockIdx.x;  // among all long latents
  for (int64_t base = 0; base < pieces; base += kSearched * kFinishing) {
    int32_t latents[kSearched];
#pragma unroll
    for (int i = 0; i < kSearched; ++i) {
      const int64_t piece = base + i * kFinishing + t;
      latents[i] = piece < pieces ? args.longs[piece] : -1;
    }
    uint32_t of_warp[kSearched];
#pragma unroll
    for (int i = 0; i < kSearched; ++i) {
      of_warp[i] = __ballot_sync(~0u, latents[i] >= 0);
      if (lane == 0) starts[i * kWarps + warp] = __popc(of_warp[i]);
    }
    __syncthreads();
    if (warp == 0) {
      int32_t* const own = starts + lane * kEach;
      int32_t sum = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += own[i];
      int32_t start = int32_t(inclusive_scan<32>(unsigned(sum), lane)) - sum;
      if (lane == 31) count = start + sum;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int32_t size = own[i];
        own[i] = start;
        start += size;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSearched; ++i) {
      const int32_t place = starts[i * kWarps + warp] + __popc(of_warp[i] & ((1u << lane) - 1));
      if (latents[i] >= 0) found[place] = latents[i];
    }
    __syncthreads();
    for (; next < before + count; next += gridDim.x) {
      add_partial_of<S, O>(args, found[next - before], of_warps);
    }
    before += count;
    __syncthreads();
  }
}

}  // namespace softtopk::cuda
