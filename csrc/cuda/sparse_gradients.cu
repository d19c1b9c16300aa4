// The gradients of a code's weights, latent by latent (softtopk.h): grad[l] = sum_e scale_e
// y[row of e], and of its values: dots_e = <weight[l], y[row of e]>, from one gather of y.
//
// Bytes: every entry reads a row of y, from the L2 cache where that holds y; weight is read and
// grad written once. The entries, in the order of their latents, are shared out among blocks in
// pieces of kPiece, so that a latent which fires everywhere is as good as any other: latents of up
// to kPiece entries belong to the piece where they begin, and the pieces of longer ones leave
// partial sums that a second kernel adds up, in order. All threads of a block are at one entry,
// each at its columns; rows of y and of the weight are asked for some entries ahead.
//
// In development runs on an H200 (dW and dots in bfloat16, microseconds, (rows, k, d, n) = (4096,
// 64, 768, 24576) | (4096, 64, 2304, 16384) | (4096, 64, 2304, 65536) | (8192, 32, 4096, 131072)),
// with the weight's row made anew for every entry: 139 | 366 | 507 | 1327, without dots 72 | 172 |
// 271 | -.
#include "launch.cuh"
#include "layout.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kPiece = 64;         // entries
constexpr int kMost = 2 * kPiece;  // of a block: the last latent may reach beyond its piece
constexpr int kFinishing = 256;    // threads of a block of the other kernels

struct GradientArgs {
  const void* scale;
  const int32_t* offsets;
  const int32_t* entries;
  int64_t max_active;
  int32_t n;
  int64_t d;
  const void* y;
  const void* weight;  // or null
  bool project, zero_silent;
  void* grad;
  void* dots;
  void* sums;
  void* squares;
  // The workspace.
  void* partial;       // (pieces, 2, d), where a piece begins or ends within a long latent
  void* partial_sums;  // (pieces, 2)
  int32_t* first;      // (pieces,) the latent that has a piece's first entry
  int32_t* longs;      // how many latents are long, and which, in any order
};

// Whether pieces share a latent's entries.
__device__ __forceinline__ bool is_long(int32_t begin, int32_t end) { return end - begin > kPiece; }

// Marks every piece with the latent that has its first entry, and lists the long latents.
__global__ void __launch_bounds__(kFinishing) find_pieces(const GradientArgs args) {
  const int64_t latent = int64_t(blockIdx.x) * kFinishing + threadIdx.x;
  if (latent >= args.n) return;
  const int32_t begin = args.offsets[latent], end = args.offsets[latent + 1];
  for (int32_t piece = (begin + kPiece - 1) / kPiece; piece * kPiece < end; ++piece) {
    args.first[piece] = int32_t(latent);
  }
  if (is_long(begin, end)) args.longs[1 + atomicAdd(args.longs, 1)] = int32_t(latent);
}

// What a block has to know of an entry.
enum Flags : int32_t {
  kFresh = 1,   // the block's first of its latent
  kLast = 2,    // the block's last of it
  kShared = 4,  // other blocks have entries of the latent
  kInside = 8,  // the latent begins after the first entry of the piece
};
template <class T>
struct alignas(16) Entry {
  int32_t row, flags;
  T scale;
};

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

// Of four values of every lane the sums over a warp: in lanes 0, 8, 16, 24.
template <class T>
__device__ __forceinline__ T sum_of_four(const T (&values)[4]) {
  const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
  const T a =
      (upper ? values[2] : values[0]) + __shfl_xor_sync(~0u, upper ? values[0] : values[2], 16);
  const T b =
      (upper ? values[3] : values[1]) + __shfl_xor_sync(~0u, upper ? values[1] : values[3], 16);
  T sum = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 8);
#pragma unroll
  for (int mask = 4; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return sum;
}

// A thread's columns of a row: VECTORS chunks, as many threads apart as a block has.
template <class S, int VECTORS, bool WIDE>
struct Columns {
  using Raw = typename Element<S>::Raw;
  static constexpr int size = Chunk<S>::size;

  __device__ __forceinline__ static int64_t column(int vector) {
    return (int64_t(vector) * blockDim.x + threadIdx.x) * size;
  }
  __device__ __forceinline__ static Chunk<S> load(const void* data, int64_t row, int64_t d,
                                                  int vector) {
    const int64_t at = column(vector);
    const Raw* const from = static_cast<const Raw*>(data) + row * d + at;
    Chunk<S> chunk{};
    if constexpr (WIDE) {
      if (at < d) chunk.words = __ldg(reinterpret_cast<const uint4*>(from));
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        if (at + i < d) chunk.set_raw(i, from[i]);
      }
    }
    return chunk;
  }
  template <class T>
  __device__ __forceinline__ static void read(const T* row, int64_t d, int vector, T (&x)[size]) {
    const int64_t at = column(vector);
#pragma unroll
    for (int i = 0; i < size; ++i) x[i] = at + i < d ? row[at + i] : T(0);
  }
  template <class O, class T>
  __device__ __forceinline__ static void store(O* row, int64_t d, int vector, const T (&x)[size]) {
    using RawOut = typename Element<O>::Raw;
    constexpr int kOut = Chunk<O>::size;
    const int64_t at = column(vector);
    RawOut* const to = reinterpret_cast<RawOut*>(row) + at;
    if constexpr (WIDE && size % kOut == 0) {
      if (at >= d) return;
#pragma unroll
      for (int part = 0; part < size / kOut; ++part) {
        Compute<O> own[kOut];
#pragma unroll
        for (int i = 0; i < kOut; ++i) own[i] = Compute<O>(x[part * kOut + i]);
        store_global(to + part * kOut, Chunk<O>::of(own).words);
      }
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        if (at + i < d) to[i] = Element<O>::raw(Compute<O>(x[i]));
      }
    }
  }
};

// What the warps add to the sums of a block, in dynamic shared memory: to the dot of each entry, to
// the square of each latent, and to <grad, weight> of two latents in turn.
template <class T>
struct OfWarp {
  T dots[kMost], squares[kMost], along[2];
};

// With one vector to a thread registers suffice for the largest blocks.
template <int VECTORS>
inline constexpr int kMostThreads = VECTORS == 1 ? 1024 : 256;

template <class S, class O, int VECTORS, bool WIDE, bool DOTS>
__global__ void __launch_bounds__(kMostThreads<VECTORS>) add_pieces(const GradientArgs args) {
  using T = Compute<S>;
  using Own = Columns<S, VECTORS, WIDE>;
  constexpr int kSize = Chunk<S>::size, kTogether = 4;
  constexpr int kAhead = VECTORS == 1 ? kTogether : 1;  // as many rows as registers hold
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Entry<T> piece[kMost];
  __shared__ int32_t places[kMost], latents[kMost];  // of entries; of the block's latents in turn
  __shared__ int32_t known;                          // how many latents
  OfWarp<T>* const of_warps = reinterpret_cast<OfWarp<T>*>(memory);
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32, warps = int(blockDim.x) / 32;
  const int32_t total = args.offsets[args.n], begin = int32_t(blockIdx.x) * kPiece;
  if (begin >= total) return;

  // Which entries: from the first that belongs to nobody else, to the end of the last short latent.
  const int32_t head = args.first[blockIdx.x];
  int32_t from = begin, to = min(begin + kPiece, total);
  if (args.offsets[head] < begin && !is_long(args.offsets[head], args.offsets[head + 1])) {
    from = args.offsets[head + 1];
  }
  int32_t tail = args.n - 1;
  if (begin + kPiece < total) {
    tail = args.first[blockIdx.x + 1];
    const int32_t start = args.offsets[tail], end = args.offsets[tail + 1];
    if (start < to && !is_long(start, end)) to = max(end, from);
  }
  const int32_t count = to - from;
  if (count == 0) return;
  if (warp == 0) {
    int32_t before = 0;
    for (int i = lane; i - lane < count; i += 32) {
      const int32_t place = i < count ? args.entries[from + i] : 0;
      int32_t low = head, high = tail;  // the last latent that begins at or before the entry
      while (low < high) {
        const int32_t middle = low + (high - low + 1) / 2;
        if (args.offsets[middle] <= from + i) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      const int32_t start = args.offsets[low], end = args.offsets[low + 1];
      const bool fresh = i < count && (i == 0 || start == from + i);
      const uint32_t all = __ballot_sync(~0u, fresh);
      if (fresh) latents[before + __popc(all & ((1u << lane) - 1))] = low;
      before += __popc(all);
      if (i >= count) break;
      piece[i].row = place / int32_t(args.max_active);
      piece[i].flags = (fresh ? kFresh : 0) | (i + 1 == count || from + i + 1 == end ? kLast : 0) |
                       (is_long(start, end) ? kShared : 0) | (start > begin ? kInside : 0);
      piece[i].scale = static_cast<const T*>(args.scale)[place];
      places[i] = place;
    }
    if (lane == 0) known = before;
  }
  __syncthreads();

  T sum[VECTORS][kSize] = {}, w[VECTORS][kSize] = {}, along = 0, of_scales = 0;
  int latent = 0;  // of latents[]
  // The weight of the next latent is asked for when the one before begins.
  Chunk<S> next[VECTORS];
  const auto ask = [&](int which) {
    if constexpr (DOTS) {
      const int32_t row = latents[min(which, known - 1)];
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) next[v] = Own::load(args.weight, row, args.d, v);
    }
  };
  ask(0);
  // The sums of a latent, to where they belong.
  const auto finish = [&](int32_t flags) {
    if (flags & kShared) {
      const int64_t slot = int64_t(blockIdx.x) * 2 + ((flags & kInside) != 0);
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        Own::store(static_cast<T*>(args.partial) + slot * args.d, args.d, v, sum[v]);
      }
      if (t == 0) static_cast<T*>(args.partial_sums)[slot] = of_scales;
    } else {
      if constexpr (DOTS) {
        if (args.project) {
          const T own = sum_of_warp(along);
          if (lane == 0) of_warps[warp].along[latent % 2] = own;
          __syncthreads();
          T all = 0;
          for (int other = 0; other < warps; ++other) all += of_warps[other].along[latent % 2];
#pragma unroll
          for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
            for (int j = 0; j < kSize; ++j) sum[v][j] -= all * w[v][j];
          }
        }
      }
      O* const out = static_cast<O*>(args.grad) + int64_t(latents[latent]) * args.d;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) Own::store(out, args.d, v, sum[v]);
      if (args.squares != nullptr) {
        T square = 0;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
          for (const T x : sum[v]) square += x * x;
        }
        square = sum_of_warp(square);
        if (lane == 0) of_warps[warp].squares[latent] = square;
      }
      if (args.sums != nullptr && t == 0) {
        static_cast<T*>(args.sums)[latents[latent]] = of_scales;
      }
    }
    ++latent;
    along = of_scales = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
      for (T& x : sum[v]) x = 0;
    }
  };

  // kAhead rows of y are on their way: as soon as one is used the next is asked for.
  Chunk<S> y[kAhead][VECTORS];
  const auto load = [&](int i, int at) {
    const int32_t row = piece[min(at, count - 1)].row;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) y[i % kAhead][v] = Own::load(args.y, row, args.d, v);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(i, i);
#pragma unroll 1
  for (int base = 0; base < count; base += kTogether) {
    T dots[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      dots[i] = 0;
      if (base + i >= count) continue;
      const Entry<T> entry = piece[base + i];
      if (DOTS && entry.flags & kFresh) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) next[v].read(w[v]);
        ask(latent + 1);
      }
      of_scales += entry.scale;
      T x[VECTORS][kSize];
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) y[i % kAhead][v].read(x[v]);
      load(i, base + i + kAhead);
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          sum[v][j] = fma(entry.scale, x[v][j], sum[v][j]);
          if constexpr (DOTS) dots[i] = fma(w[v][j], x[v][j], dots[i]);
        }
      }
      if constexpr (DOTS) along = fma(entry.scale, dots[i], along);
      if (entry.flags & kLast) finish(entry.flags);
    }
    if constexpr (DOTS) {
      const T four = sum_of_four(dots);
      if (lane % 8 == 0 && base + lane / 8 < count) of_warps[warp].dots[base + lane / 8] = four;
    }
  }
  if (!DOTS && args.squares == nullptr) return;
  __syncthreads();
  for (int i = t; i < count; i += int(blockDim.x)) {
    if constexpr (DOTS) {
      T dot = 0;
      for (int other = 0; other < warps; ++other) dot += of_warps[other].dots[i];
      static_cast<T*>(args.dots)[places[i]] = dot;
    }
    if (!(piece[i].flags & kLast) || piece[i].flags & kShared || args.squares == nullptr) continue;
    // Which of the block's latents this is.
    int which = -1;
    for (int before = 0; before <= i; ++before) which += piece[before].flags & kFresh;
    T square = 0;
    for (int other = 0; other < warps; ++other) square += of_warps[other].squares[which];
    static_cast<T*>(args.squares)[latents[which]] = square;
  }
}

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

// Clears what belongs to silent latents.
template <class T, class O>
__global__ void __launch_bounds__(kFinishing) clear_silent(const GradientArgs args) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t first = (int64_t(blockIdx.x) * (kFinishing / 32) + warp) * 32;
  const int64_t mine = first + lane;
  const bool silent = mine < args.n && args.offsets[mine] == args.offsets[mine + 1];
  if (silent && args.sums != nullptr) static_cast<T*>(args.sums)[mine] = 0;
  if (silent && args.squares != nullptr) static_cast<T*>(args.squares)[mine] = 0;
  if (!args.zero_silent) return;
  for (uint32_t left = __ballot_sync(~0u, silent); left != 0; left &= left - 1) {
    const int64_t latent = first + __ffs(int(left)) - 1, size = args.d * int64_t(sizeof(O));
    unsigned char* const bytes = static_cast<unsigned char*>(args.grad) + latent * size;
    // As many whole 16 bytes as there are, then the rest.
    const int64_t chunks = reinterpret_cast<uintptr_t>(bytes) % 16 == 0 ? size / 16 : 0;
    for (int64_t at = lane; at < chunks; at += 32) {
      store_global(bytes + 16 * at, make_uint4(0, 0, 0, 0));
    }
    for (int64_t at = 16 * chunks + lane; at < size; at += 32) bytes[at] = 0;
  }
}

// By a block: adds up the partial sums of a long latent.
template <class S, class O>
__device__ __forceinline__ void add_partial_of(const GradientArgs& args, int32_t which,
                                               Compute<S> (&of_warps)[kFinishing / 32]) {
  using T = Compute<S>;
  const int t = int(threadIdx.x);
  const int32_t latent = args.longs[1 + which];
  const int32_t begin = args.offsets[latent], end = args.offsets[latent + 1];
  // The first piece has it last, but where it begins with it; the others have it first.
  const int32_t first = begin / kPiece, last = (end - 1) / kPiece;
  const int64_t start = int64_t(first) * 2 + (begin > first * kPiece);
  T* const partial = static_cast<T*>(args.partial);
  const auto* const weight = static_cast<const typename Element<S>::Raw*>(args.weight) +
                             (args.project ? int64_t(latent) * args.d : 0);
  T along = 0;
  for (int64_t column = t; column < args.d; column += kFinishing) {
    T sum = partial[start * args.d + column];
#pragma unroll 8
    for (int32_t piece = first + 1; piece <= last; ++piece) {
      sum += partial[int64_t(piece) * 2 * args.d + column];
    }
    partial[start * args.d + column] = sum;  // this thread's from here on
    if (args.project) along = fma(sum, Element<S>::value(weight[column]), along);
  }
  if (args.project) along = sum_of_block(along, of_warps);
  auto* const out = static_cast<typename Element<O>::Raw*>(args.grad) + int64_t(latent) * args.d;
  T square = 0;
  for (int64_t column = t; column < args.d; column += kFinishing) {
    T sum = partial[start * args.d + column];
    if (args.project) sum -= along * Element<S>::value(weight[column]);
    out[column] = Element<O>::raw(Compute<O>(sum));
    square = fma(sum, sum, square);
  }
  if (args.squares != nullptr) {
    square = sum_of_block(square, of_warps);
    if (t == 0) static_cast<T*>(args.squares)[latent] = square;
  }
  if (args.sums != nullptr && t == 0) {
    const T* const sums = static_cast<const T*>(args.partial_sums);
    T sum = sums[start];
    for (int32_t piece = first + 1; piece <= last; ++piece) sum += sums[int64_t(piece) * 2];
    static_cast<T*>(args.sums)[latent] = sum;
  }
}

template <class S, class O>
__global__ void __launch_bounds__(kFinishing) add_partial(const GradientArgs args) {
  __shared__ Compute<S> of_warps[kFinishing / 32];
  const int32_t longs = *args.longs;
  for (int32_t which = int32_t(blockIdx.x); which < longs; which += int32_t(gridDim.x)) {
    add_partial_of<S, O>(args, which, of_warps);
  }
}

int64_t pieces_of(int64_t rows, int64_t max_active) {
  return (rows * max_active + kPiece - 1) / kPiece;
}

void run(void (*kernel)(GradientArgs), GradientArgs args, int64_t blocks, int64_t threads,
         void* stream, int64_t shared = 0) {
  if (blocks == 0) return;
  void* pointers[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers,
                         size_t(shared), static_cast<cudaStream_t>(stream)),
        "kernel launch");
}

template <class S, class O, int VECTORS, bool WIDE>
void add(const GradientArgs& args, int64_t pieces, int64_t threads, void* stream) {
  const auto kernel = args.weight != nullptr ? add_pieces<S, O, VECTORS, WIDE, true>
                                             : add_pieces<S, O, VECTORS, WIDE, false>;
  const int64_t shared = threads / 32 * int64_t(sizeof(OfWarp<Compute<S>>));
  if (shared > 32 * 1024) allow_shared_once(reinterpret_cast<const void*>(kernel));
  run(kernel, args, pieces, threads, stream, shared);
}

template <class S, class O>
void gradients(const GradientArgs& args, int64_t rows, void* stream) {
  constexpr int64_t kSize = Chunk<S>::size, kMostColumns = 8 * kMostThreads<8> * kSize;
  const int64_t d = args.d, pieces = pieces_of(rows, args.max_active);
  const bool wide = is_wide(args.y, rows, d, sizeof(S)) &&
                    is_wide(args.weight, args.n, d, sizeof(S)) &&
                    is_wide(args.grad, args.n, d, sizeof(O)) && d % kSize == 0;
  if (d > kMostColumns) {
    throw std::runtime_error("softtopk: d=" + std::to_string(d) +
                             " is more than the CUDA backend's gradients take of this type, " +
                             std::to_string(kMostColumns));
  }
  // Whole warps, at least one: d may be 0.
  const auto threads = [&](int64_t vectors) {
    const int64_t columns = vectors * kSize * 32;
    return std::max<int64_t>((d + columns - 1) / columns, 1) * 32;
  };
  run(find_pieces, args, (args.n + kFinishing - 1) / kFinishing, kFinishing, stream);
  if (threads(1) > kMostThreads<1>) {
    add<S, O, 8, false>(args, pieces, threads(8), stream);
  } else if (wide) {
    add<S, O, 1, true>(args, pieces, threads(1), stream);
  } else {
    add<S, O, 1, false>(args, pieces, threads(1), stream);
  }
  run(add_partial<S, O>, args, std::min<int64_t>({pieces, args.n, 2048}), kFinishing, stream);
  run(clear_silent<Compute<S>, O>, args, (args.n + kFinishing - 1) / kFinishing, kFinishing,
      stream);
}

}  // namespace

int64_t gradients_workspace(int64_t rows, int64_t max_active, int64_t d, Type type) {
  const int64_t pieces = pieces_of(rows, max_active), size = type == Type::float64 ? 8 : 4;
  return pieces * (2 * size * (d + 1) + 8) + 4;
}

void latent_gradients(const void* scale, const int32_t* offsets, const int32_t* entries,
                      int64_t rows, int64_t max_active, int64_t n, int64_t d, const void* y,
                      const void* weight, Type type, Type out_type, bool project, bool zero_silent,
                      void* grad, void* dots, void* sums, void* squares, void* workspace,
                      int device, void* stream) {
  check_length(n);
  check_length(rows * max_active);
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t pieces = pieces_of(rows, max_active), size = type == Type::float64 ? 8 : 4;
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  void* const partial_sums = bytes + pieces * 2 * size * d;
  int32_t* const first = reinterpret_cast<int32_t*>(bytes + pieces * 2 * size * (d + 1));
  check(cudaMemsetAsync(first + pieces, 0, 4, on), "cudaMemsetAsync");
  if (dots != nullptr) {
    check(cudaMemsetAsync(dots, 0, size_t(rows * max_active * size), on), "cudaMemsetAsync");
  }
  const GradientArgs args = {scale, offsets, entries,   max_active,   int32_t(n), d,
                             y,     weight,  project,   zero_silent,  grad,       dots,
                             sums,  squares, workspace, partial_sums, first,      first + pieces};
  with_type(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
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
