// What the kernels of the gradients have in common (sparse_gradients.cu).
#pragma once

#include "launch.cuh"
#include "layout.cuh"

namespace softtopk::cuda {

#ifndef SOFTTOPK_TILE_CHUNKS
#define SOFTTOPK_TILE_CHUNKS 4
#endif
#ifndef SOFTTOPK_TILE_BLOCKS
#define SOFTTOPK_TILE_BLOCKS 4
#endif
constexpr int kPiece = 64;  // entries

struct GradientArgs {
  const void* scale;
  const int32_t* indices;
  const int32_t* offsets;
  const int32_t* entries;
  int64_t places;
  int32_t max_active, n;
  int64_t d;
  const void* y;
  const void* weight;  // or null
  bool project, zero_silent;
  void* grad;
  void* dots;
  void* sums;
  void* squares;
  // The workspace.
  int64_t pieces;
  int tiles;              // of the dots and squares here; 0: none, they are written at once
  void* partial;          // (pieces, d), of a piece's last latent where it is not the piece's alone
  void* partial_sums;     // (pieces,)
  void* partial_dots;     // (tiles, places) in the order of the entries
  void* partial_squares;  // (tiles, n)
};

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

// Which entries belong to a piece that begins with entry `begin` of latent `first` and has its last
// before `limit`, of latent `last`: without those of a latent that a piece before has followed to
// its end, and with the rest of the last latent if that ends before the piece after the next
// begins. `shared`: other pieces have entries of the last latent.
struct Span {
  int32_t from, to;
  bool shared;

  __device__ Span(const GradientArgs& args, int32_t begin, int32_t limit, int32_t first,
                  int32_t last) {
    const int32_t first_start = args.offsets[first], first_end = args.offsets[first + 1];
    const int32_t last_start = args.offsets[last], last_end = args.offsets[last + 1];
    from = first_start < begin && first_end <= begin + kPiece ? first_end : begin;
    to = last_end <= begin + 2 * kPiece ? last_end : limit;
    shared = last_start < begin || to < last_end;
  }
};

}  // namespace softtopk::cuda
