// The gradients of a code's weights, latent by latent (softtopk.h): grad[l] = sum_e scale_e
// y[row of e], and of its values: dots_e = <weight[l], y[row of e]>, from one gather of y.
//
// Bytes: every entry reads a row of y, from the L2 cache where that holds y; weight is read and
// grad written once. A warp has a piece of the entries, in the order of their latents, and a tile
// of the columns, 512 bytes wide, and needs nobody else: no barrier, no slower neighbour. Pieces
// have kPiece entries, so that a latent which fires everywhere is as good as any other: a piece
// follows its last latent to the end where that is near, and otherwise leaves a sum that a second
// kernel adds to those of its neighbours, in order. That kernel also adds up what the tiles have of
// every dot and squared norm. Where the gradient is projected, which needs whole rows of it, a
// block has all tiles of a piece, and its warps meet at the end of every latent.
//
// In development runs on an H200 (dW and dots in bfloat16, microseconds, (rows, k, d, n) = (4096,
// 64, 768, 24576) | (4096, 64, 2304, 16384) | (4096, 64, 2304, 65536) | (8192, 32, 4096, 131072)):
// - a block for a piece, all its threads at one entry, the weight's row made anew for each: 139 |
//   366 | 507 | 1327;
// - the weight's row kept for a latent, rows of y four ahead: 129 | 331 | 480 | 1199;
// - a warp for a piece and a tile: 127 | 333 | 391 | 851, in a quarter of the workspace; for other
//   types than bfloat16 this is what runs;
// - a block for a piece again, rows of y on their way in shared memory, another kernel: 125 | 313 |
//   351 | 828 in the same run;
// - sixteen entries at a time on tensor cores: not measured yet.
#include "gradient_pieces.cuh"
#include "gradient_tiles.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kFinishing = 512;  // threads of a block of the second kernel

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

// The sum over `count` values, `stride` apart.
template <class T>
__device__ __forceinline__ T strided_sum(const T* values, int64_t stride, int count) {
  T sum = 0;
#pragma unroll 8
  for (int i = 0; i < count; ++i) sum += values[i * stride];
  return sum;
}

// Whether the entries of a latent are shared among pieces: from the one where it begins to the one
// before its last, which takes the last's entries as well.
__device__ __forceinline__ bool is_shared(int32_t begin, int32_t end) {
  return end > (begin / kPiece + 2) * int64_t(kPiece);
}

// By a warp: clears the row of a latent's gradient.
template <class O>
__device__ __forceinline__ void clear_row(const GradientArgs& args, int64_t latent) {
  const int64_t size = args.d * int64_t(sizeof(O));
  unsigned char* const bytes = static_cast<unsigned char*>(args.grad) + latent * size;
  const int lane = int(threadIdx.x) % 32;
  // As many whole 16 bytes as there are, then the rest.
  const int64_t chunks = reinterpret_cast<uintptr_t>(bytes) % 16 == 0 ? size / 16 : 0;
  for (int64_t at = lane; at < chunks; at += 32) {
    store_global(bytes + 16 * at, make_uint4(0, 0, 0, 0));
  }
  for (int64_t at = 16 * chunks + lane; at < size; at += 32) bytes[at] = 0;
}

// By a block: adds up the partial sums of a shared latent, in the columns that are the block's.
template <class S, class O>
__device__ __forceinline__ void add_partial(const GradientArgs& args, int32_t latent,
                                            Compute<S> (&of_warps)[kFinishing / 32]) {
  using T = Compute<S>;
  const int t = int(threadIdx.x);
  const int32_t begin = args.offsets[latent], end = args.offsets[latent + 1];
  const int64_t first = begin / kPiece, pieces = (end - 1) / kPiece - first;
  const int64_t d = args.d, step = int64_t(gridDim.y) * kFinishing;
  T* const partial = static_cast<T*>(args.partial) + first * d;
  const auto* const weight = static_cast<const typename Element<S>::Raw*>(args.weight) +
                             (args.project ? int64_t(latent) * d : 0);
  auto* const out = static_cast<typename Element<O>::Raw*>(args.grad) + int64_t(latent) * d;
  T along = 0, square = 0;
  for (int64_t column = int64_t(blockIdx.y) * kFinishing + t; column < d; column += step) {
    T sum = 0;
#pragma unroll 16
    for (int64_t piece = 0; piece < pieces; ++piece) sum += partial[piece * d + column];
    if (args.project) {
      partial[column] = sum;  // this thread's from here on
      along = fma(sum, Element<S>::value(weight[column]), along);
    } else {
      out[column] = Element<O>::raw(Compute<O>(sum));
      square = fma(sum, sum, square);
    }
  }
  if (args.project) {
    along = sum_of_block(along, of_warps);
    for (int64_t column = t; column < d; column += kFinishing) {
      const T sum = partial[column] - along * Element<S>::value(weight[column]);
      out[column] = Element<O>::raw(Compute<O>(sum));
      square = fma(sum, sum, square);
    }
  }
  if (args.squares != nullptr) {
    square = sum_of_block(square, of_warps);
    if (t == 0) static_cast<T*>(args.squares)[latent] = square;
  }
  if (args.sums != nullptr && blockIdx.y == 0 && t == 0) {
    static_cast<T*>(args.sums)[latent] =
        strided_sum(static_cast<const T*>(args.partial_sums) + first, 1, int(pieces));
  }
}

// Finishes what the pieces have left: dots, squared norms, shared latents and silent ones.
template <class S, class O>
__global__ void __launch_bounds__(kFinishing) finish_gradients(const GradientArgs args) {
  using T = Compute<S>;
  constexpr int kFinishingWarps = kFinishing / 32;
  __shared__ T of_warps[kFinishingWarps];
  __shared__ int32_t shared[kFinishing];
  __shared__ int count;
  const int t = int(threadIdx.x), lane = t % 32;
  const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t blocks = int64_t(gridDim.x) * gridDim.y;
  if (args.dots != nullptr) {
    T* const dots = static_cast<T*>(args.dots);
    const int32_t total = args.offsets[args.n];
    for (int64_t i = block * kFinishing + t; i < args.places; i += blocks * kFinishing) {
      if (i < total && args.tiles > 0) {
        dots[args.entries[i]] =
            strided_sum(static_cast<const T*>(args.partial_dots) + i, args.places, args.tiles);
      }
      if (args.indices[i] >= args.n) dots[i] = 0;
    }
  }
  // Neighbours, which may all be shared, go to different blocks.
  for (int64_t base = blockIdx.x; base < args.n; base += int64_t(gridDim.x) * kFinishing) {
    const int64_t latent = base + int64_t(t) * gridDim.x;
    if (t == 0) count = 0;
    __syncthreads();
    bool silent = false;
    if (latent < args.n) {
      const int32_t begin = args.offsets[latent], end = args.offsets[latent + 1];
      silent = begin == end;
      if (is_shared(begin, end)) {
        shared[atomicAdd(&count, 1)] = int32_t(latent);
      } else if (blockIdx.y == 0) {
        if (silent && args.sums != nullptr) static_cast<T*>(args.sums)[latent] = 0;
        if (args.squares != nullptr && (silent || args.tiles > 0)) {
          const T* const squares = static_cast<const T*>(args.partial_squares) + latent;
          static_cast<T*>(args.squares)[latent] =
              silent ? T(0) : strided_sum(squares, args.n, args.tiles);
        }
      }
    }
    if (args.zero_silent && blockIdx.y == 0) {
      for (uint32_t left = __ballot_sync(~0u, silent); left != 0; left &= left - 1) {
        clear_row<O>(args, latent + int64_t(__ffs(int(left)) - 1 - lane) * gridDim.x);
      }
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) add_partial<S, O>(args, shared[i], of_warps);
    __syncthreads();
  }
}

void run(void (*kernel)(GradientArgs), GradientArgs args, dim3 blocks, int64_t threads,
         void* stream) {
  void* pointers[] = {&args};
  check(cudaLaunchKernel(kernel, blocks, dim3(unsigned(threads)), pointers, 0,
                         static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

template <class S, class O, int VECTORS, bool WIDE>
void add(GradientArgs args, void* stream) {
  if (args.project) {
    run(add_pieces<S, O, VECTORS, WIDE, true, true>, args, dim3(unsigned(args.pieces)),
        args.tiles * 32, stream);
    return;
  }
  const auto kernel = args.dots != nullptr ? add_pieces<S, O, VECTORS, WIDE, true, false>
                                           : add_pieces<S, O, VECTORS, WIDE, false, false>;
  const dim3 blocks(unsigned((args.pieces + kWarps - 1) / kWarps), unsigned(args.tiles));
  run(kernel, args, blocks, kWarps * 32, stream);
}

int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// On tensor cores; returns whether that can be.
template <class O>
bool add_by_tiles(GradientArgs& args, void* stream) {
  const int64_t tiles = std::max<int64_t>((args.d + kTileColumns - 1) / kTileColumns, 1);
  if (args.project && tiles > kWholeWarps) return false;
  const int64_t slices = args.project ? 1 : (tiles + kTileWarps - 1) / kTileWarps;
  const int64_t warps = (tiles + slices - 1) / slices;
  args.tiles = slices == 1 ? 0 : int(slices);
  const bool full = args.d == slices * warps * kTileColumns;
  const bool dots = args.dots != nullptr;
  const auto kernel =
      args.project ? (full ? add_tiles<O, true, true, true> : add_tiles<O, false, true, true>)
      : dots       ? (full ? add_tiles<O, true, true, false> : add_tiles<O, false, true, false>)
                   : (full ? add_tiles<O, true, false, false> : add_tiles<O, false, false, false>);
  run(kernel, args, dim3(unsigned(args.pieces), unsigned(slices)), warps * 32, stream);
  return true;
}

// Tiles of the columns, at least one: d may be 0.
int64_t tiles_of(int64_t d, int64_t size, int64_t vectors) {
  const int64_t width = vectors * 32 * (16 / size);
  return std::max<int64_t>((d + width - 1) / width, 1);
}

template <class S, class O>
void gradients(GradientArgs args, int64_t rows, void* stream) {
  constexpr int64_t kSize = Chunk<S>::size;
  constexpr int kMany = 8;  // vectors of a tile, where a block has not enough warps otherwise
  const int64_t d = args.d;
  const bool wide = is_wide(args.y, rows, d, sizeof(S)) &&
                    is_wide(args.weight, args.n, d, sizeof(S)) &&
                    is_wide(args.grad, args.n, d, sizeof(O)) && d % kSize == 0;
  bool done = args.pieces == 0;
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    if (!done && wide) done = add_by_tiles<O>(args, stream);
  }
  const bool many = !done && args.project && args.tiles > kMostTiles;
  if (many) {
    args.tiles = int(tiles_of(d, sizeof(S), kMany));
    if (args.tiles > kMostTiles) {
      throw std::runtime_error("softtopk: d=" + std::to_string(d) +
                               " is more than the CUDA backend projects in this type, " +
                               std::to_string(kMostTiles * kMany * 32 * kSize));
    }
  }
  if (!done) {
    if (many) {
      run(add_pieces<S, O, kMany, false, true, true>, args, dim3(unsigned(args.pieces)),
          args.tiles * 32, stream);
    } else if (wide) {
      add<S, O, 1, true>(args, stream);
    } else {
      add<S, O, 1, false>(args, stream);
    }
  }
  // What needs a whole row of the gradient takes all columns at once.
  const bool whole = args.project || args.squares != nullptr;
  const int64_t columns = whole ? 1 : (d + kFinishing - 1) / kFinishing;
  const int64_t most = std::max<int64_t>((args.n + 31) / 32, (args.places + 511) / 512);
  run(finish_gradients<S, O>, args,
      dim3(unsigned(std::clamp<int64_t>(most, 1, 1024)),
           unsigned(std::clamp<int64_t>(columns, 1, 16))),
      kFinishing, stream);
}

int64_t pieces_of(int64_t places) { return (places + kPiece - 1) / kPiece; }

}  // namespace

int64_t gradients_workspace(Type type, int64_t rows, int64_t max_active, int64_t n, int64_t d,
                            bool dots, bool squares) {
  const int64_t size = type == Type::float64 ? 8 : 4, places = rows * max_active;
  const int64_t tiles = tiles_of(d, size_of(type), 1);
  return size *
         (pieces_of(places) * (d + 1) + (dots ? tiles * places : 0) + (squares ? tiles * n : 0));
}

void latent_gradients(const void* scale, const int32_t* indices, const int32_t* offsets,
                      const int32_t* entries, int64_t rows, int64_t max_active, int64_t n,
                      int64_t d, const void* y, const void* weight, Type type, Type out_type,
                      bool project, bool zero_silent, void* grad, void* dots, void* sums,
                      void* squares, void* workspace, int device, void* stream) {
  check_length(n);
  check_length(rows * max_active);
  const DeviceGuard guard(device);
  const int64_t places = rows * max_active;
  with_type(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Compute<S>;
    GradientArgs args = {};
    args.scale = scale, args.indices = indices, args.offsets = offsets, args.entries = entries;
    args.places = places, args.max_active = int32_t(max_active), args.n = int32_t(n), args.d = d;
    args.y = y, args.weight = weight, args.project = project, args.zero_silent = zero_silent;
    args.grad = grad, args.dots = dots, args.sums = sums, args.squares = squares;
    args.pieces = pieces_of(places), args.tiles = int(tiles_of(d, sizeof(S), 1));
    T* const partial = static_cast<T*>(workspace);
    T* const partial_sums = partial + args.pieces * d;
    T* const partial_dots = partial_sums + args.pieces;
    T* const partial_squares = partial_dots + (dots != nullptr ? args.tiles * places : 0);
    args.partial = partial, args.partial_sums = partial_sums;
    args.partial_dots = partial_dots, args.partial_squares = partial_squares;
    if constexpr (sizeof(S) == 8) {
      gradients<S, S>(args, rows, stream);
    } else if (out_type == Type::float32) {
      gradients<S, float>(args, rows, stream);
    } else if (out_type == type) {
      gradients<S, S>(args, rows, stream);
    } else {
      throw std::runtime_error("softtopk: a gradient is of float32 or of the type of y");
    }
  });
}

}  // namespace softtopk::cuda
