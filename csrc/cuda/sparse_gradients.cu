// The gradients of a code's weights, latent by latent (softtopk.h): grad[l] = sum_e scale_e
// y[row of e], and of its values: dots_e = <weight[l], y[row of e]>, from one gather of y.
//
// Bytes: every entry reads a row of y, from the L2 cache where that holds y; weight is read and
// grad written once. The entries, in the order of their latents, are shared out among blocks in
// pieces of kPiece, so that a latent which fires everywhere is as good as any other: latents of up
// to kPiece entries belong to the piece where they begin, and the pieces of longer ones leave
// partial sums that another kernel adds up, in order. All warps of a block are at the same entries,
// each at its own columns, as many as its registers have room to sum, so that what an entry costs
// beside the sums is shared by many of them. Every lane copies its own columns of the rows of y,
// and of the weight where a latent begins, kStages entries ahead into places of shared memory that
// no other lane reads: no registers hold what is on its way, no barrier is needed, and waiting for
// the oldest row does not wait for the others. Rows that are too long for one block, and halves of
// them where y is more than the L2 cache keeps, are gone through one after the other.
//
// In development runs on an H200 (dW and dots in bfloat16, microseconds, (rows, k, d, n) = (4096,
// 64, 768, 24576) | (4096, 64, 2304, 16384) | (4096, 64, 2304, 65536) | (8192, 32, 4096, 131072)):
// - a block for a piece, a chunk to a thread, the weight's row made anew for each entry: 139 | 366
//   | 507 | 1327;
// - the weight's row kept for a latent, rows of y four ahead in registers: 129 | 331 | 480 | 1199;
// - a warp for a piece and a tile of 512 bytes, another kernel for the dots: 127 | 333 | 391 | 851;
// - a block for a piece again, rows on their way in shared memory: 123 | 311 | 350 | 824;
// - on tensor cores, sixteen entries at a time, scales in two parts: 151 | 406 | 513 | 1339, for
//   what it loses in loads of 64 bytes;
// - a lane with 24 columns where a thread had 8: 97 | 208 | 285 | 867, with 32: 126 | 251 | 314 |
//   867, with 16: 96 | 198 | 279 | 861, bound by the L2 cache from here on;
// - the cache told what to keep, long latents looked for once, this: 94 | 196 | 264 | 816, without
//   dots 64 | 150 | 189 | 554, of Zipf latents 112 | - | 271 | -.
#include "columns.cuh"
#include "overlap.cuh"
#include "partial_sums.cuh"
#include "pieces.cuh"

namespace softtopk::cuda {
namespace {

constexpr int kMost = 2 * kPiece;  // of a block: the last latent may reach beyond its piece
constexpr int kTogether = 4;       // entries whose dots are summed at once
constexpr int kRegisters = 96;     // of a thread
constexpr int kMostWarps = 65536 / (kRegisters * 32);
constexpr int64_t kClearing = 1024;    // blocks that clear silent latents, if there are so many
constexpr int64_t kCached = 32 << 20;  // bytes of y that stay in the L2 cache

// What a block has to know of an entry.
enum Flags : int32_t {
  kFresh = 1,   // the block's first of its latent
  kLast = 2,    // the block's last of it
  kShared = 4,  // other blocks have entries of the latent
  kInside = 8,  // the latent begins after the first entry of the piece
};
template <class T>
struct alignas(16) Entry {
  T scale;
  int32_t flags;
  int32_t row;     // of y, or -1: there is none
  int32_t weight;  // to be brought: the latent if the entry is its first, or -1
};

// Of SIZE values of every lane, a power of two, the sums over a warp: value i in the lanes i * 32 /
// SIZE and following.
template <int LANES = 32, class T, int SIZE>
__device__ __forceinline__ T sums_of_warp(const T (&values)[SIZE]) {
  constexpr int kMask = LANES / 2;
  if constexpr (SIZE == 1) {
    T sum = values[0];
#pragma unroll
    for (int mask = kMask; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    return sum;
  } else {
    // The upper half of the lanes takes the upper half of the values.
    const bool upper = threadIdx.x & kMask;
    T half[SIZE / 2];
#pragma unroll
    for (int i = 0; i < SIZE / 2; ++i) {
      const T mine = upper ? values[i + SIZE / 2] : values[i];
      const T other = upper ? values[i] : values[i + SIZE / 2];
      half[i] = mine + __shfl_xor_sync(~0u, other, kMask);
    }
    return sums_of_warp<kMask>(half);
  }
}

// What a warp adds to the sums of its block, in dynamic shared memory: to the dot of each entry, to
// the square of each latent, kept with its last entry, and to <grad, weight> of two latents in
// turn.
template <class T>
struct OfWarp {
  T dots[kMost], squares[kMost], along[2];
};

// By one of so many blocks: clears what belongs to the unused ones among its share of the code's
// places, and to the silent ones among its share of the latents.
template <class T, class O>
__device__ __forceinline__ void clear_unused(const GradientArgs& args, int64_t blocks) {
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  const int threads = int(blockDim.x), warps = threads / 32;
  if (args.dots != nullptr) {
    for (int64_t i = int64_t(blockIdx.x) * threads + t; i < args.places; i += blocks * threads) {
      if (args.indices[i] >= args.n) static_cast<T*>(args.dots)[i] = 0;
    }
  }
  const int64_t share = (int64_t(args.n) + blocks - 1) / blocks;
  const int64_t end = min(int64_t(args.n), (blockIdx.x + 1) * share);
  for (int64_t first = blockIdx.x * share + warp; first < end; first += 32 * warps) {
    const int64_t mine = first + lane * warps;
    const bool silent = mine < end && args.offsets[mine] == args.offsets[mine + 1];
    if (silent && args.sums != nullptr) static_cast<T*>(args.sums)[mine] = 0;
    if (silent && args.squares != nullptr) static_cast<T*>(args.squares)[mine] = 0;
    if (!args.zero_silent) continue;
    for (uint32_t left = __ballot_sync(~0u, silent); left != 0; left &= left - 1) {
      const int64_t latent = first + (__ffs(int(left)) - 1) * warps;
      const int64_t size = int64_t(args.d) * int64_t(sizeof(O));
      unsigned char* const bytes = static_cast<unsigned char*>(args.grad) + latent * size;
      // As many whole 16 bytes as there are, then the rest.
      const int64_t chunks = reinterpret_cast<uintptr_t>(bytes) % 16 == 0 ? size / 16 : 0;
      for (int64_t at = lane; at < chunks; at += 32) {
        store_passing(bytes + 16 * at, make_uint4(0, 0, 0, 0));
      }
      for (int64_t at = 16 * chunks + lane; at < size; at += 32) bytes[at] = 0;
    }
  }
}

// By a block: a piece of the entries. Where WIDE, rows come kStages ahead; otherwise they are
// brought when they are needed.
template <class S, class O, bool WIDE, bool DOTS>
__device__ __forceinline__ void add_piece(const GradientArgs& args, int64_t which, int32_t total) {
  using T = Compute<S>;
  using Own = Columns<S, WIDE>;
  constexpr int kSize = Chunk<S>::size, kMany = kVectors<S>, kAhead = WIDE ? kStages<S> : 1;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Entry<T> piece[kMost + kAhead];
  __shared__ int32_t places[kMost], latents[kMost];  // of the entries
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  const int threads = int(blockDim.x), warps = threads / 32;
  const bool leading = args.first_column == 0;  // the first to go through the entries
  const int64_t begin = which * kPiece;

  // Which entries: from the first that belongs to nobody else, to the end of the last short latent.
  const int32_t limit = min(int32_t(begin) + kPiece, total);
  const int32_t first = args.indices[args.entries[begin]];
  const int32_t last = args.indices[args.entries[limit - 1]];
  const int32_t first_start = args.offsets[first], first_end = args.offsets[first + 1];
  const int32_t last_start = args.offsets[last], last_end = args.offsets[last + 1];
  const bool first_long = is_long(first_start, first_end),
             last_long = is_long(last_start, last_end);
  const int32_t from = first_start < begin && !first_long ? first_end : int32_t(begin);
  const int32_t to = last_start >= begin && !last_long ? last_end : limit;
  const int32_t count = to - from;
  if (t == 0 && leading) args.longs[which] = last_long && last_start >= begin ? last : -1;
  if (count <= 0) return;
  // The lane's places for rows on their way: a ring of y's, and of the weight's after it.
  constexpr int kRow = kMany * 32, kRing = kAhead * kRow;
  uint4* const rows = reinterpret_cast<uint4*>(memory) + warp * (DOTS ? 2 : 1) * kRing + lane;
  uint4* const weights = rows + kRing;
  OfWarp<T>* const of_warps = reinterpret_cast<OfWarp<T>*>(reinterpret_cast<uint4*>(memory) +
                                                           warps * (DOTS ? 2 : 1) * kRing);
  for (int i = t; i < count; i += threads) {
    const int32_t place = args.entries[from + i];
    places[i] = place;
    latents[i] = args.indices[place];
    piece[i].row = int32_t(uint32_t(place) / uint32_t(args.max_active));
    piece[i].scale = static_cast<const T*>(args.scale)[place];
    if (args.given) of_warps->dots[i] = static_cast<const T*>(args.dots)[place];
  }

  const Own own(args.first_column, args.end_column, args.d);
#pragma unroll
  for (int v = 0; v < kMany; ++v) {
    if (own.column(v) < own.end) continue;
    for (int i = 0; i < (DOTS ? 2 : 1) * kAhead; ++i) rows[i * kRow + v * 32] = uint4{};
  }
  __syncthreads();
  for (int i = t; i < (count + kTogether - 1) / kTogether * kTogether + kAhead; i += threads) {
    if (i >= count) {
      piece[i] = {0, 0, -1, -1};
      continue;
    }
    const int32_t latent = latents[i];
    const bool fresh = i == 0 || latents[i - 1] != latent;
    const bool ends = i + 1 == count || latents[i + 1] != latent;
    const bool shared = (latent == first && first_long) || (latent == last && last_long);
    const bool inside = latent != first || first_start > begin;
    piece[i].flags =
        (fresh ? kFresh : 0) | (ends ? kLast : 0) | (shared ? kShared : 0) | (inside ? kInside : 0);
    piece[i].weight = fresh ? latent : -1;
  }
  __syncthreads();
  const unsigned char *const y = own.part(args.y), *const weight = own.part(args.weight);
  const Policies policies;
  const auto ask = [&](int i, int slot) {
    own.copy(rows + slot * kRow, y, piece[i].row, policies.keep);
    const int32_t latent = piece[i].weight;
    if (DOTS && latent >= 0) own.copy(weights + slot * kRow, weight, latent, policies.pass);
    close_copies();
  };

  T sum[kMany][kSize] = {}, w[kMany][kSize] = {}, along = 0, of_scales = 0;
  int turn = 0;  // of `along` in shared memory
  // The sums of a latent, to where they belong, after the block's last entry of it.
  const auto finish = [&](int i, int32_t flags) {
    const int32_t latent = latents[i];
    if (flags & kShared) {
      const int64_t slot = which * 2 + ((flags & kInside) != 0);
#pragma unroll
      for (int v = 0; v < kMany; ++v) {
        own.template store<false>(static_cast<T*>(args.partial) + slot * args.d, v, sum[v]);
      }
      if (t == 0 && leading) static_cast<T*>(args.partial_sums)[slot] = of_scales;
    } else {
      if constexpr (DOTS) {
        if (args.project) {
          T all = 0;
          if (args.given) {
            for (int e = i; all += piece[e].scale * of_warps->dots[e], !(piece[e].flags & kFresh);)
              --e;
          } else if (all = sum_of_warp(along); warps > 1) {
            if (lane == 0) of_warps[warp].along[turn] = all;
            __syncthreads();
            all = 0;
            for (int other = 0; other < warps; ++other) all += of_warps[other].along[turn];
            turn ^= 1;
          }
#pragma unroll
          for (int v = 0; v < kMany; ++v) {
#pragma unroll
            for (int j = 0; j < kSize; ++j) sum[v][j] -= all * w[v][j];
          }
        }
      }
      O* const out = static_cast<O*>(args.grad) + int64_t(latent) * args.d;
#pragma unroll
      for (int v = 0; v < kMany; ++v) own.template store<true>(out, v, sum[v]);
      if (args.squares != nullptr) {
        T square = 0;
#pragma unroll
        for (int v = 0; v < kMany; ++v) {
#pragma unroll
          for (const T x : sum[v]) square = fma(x, x, square);
        }
        square = sum_of_warp(square);
        if (lane == 0) of_warps[warp].squares[i] = square;
      }
      if (args.sums != nullptr && t == 0 && leading) static_cast<T*>(args.sums)[latent] = of_scales;
    }
    along = of_scales = 0;
#pragma unroll
    for (int v = 0; v < kMany; ++v) {
#pragma unroll
      for (T& x : sum[v]) x = 0;
    }
  };

  static_assert(kTogether % kAhead == 0);
  if constexpr (WIDE) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ask(i, i);
  }
#pragma unroll 1
  for (int base = 0; base < count; base += kTogether) {
    T dots[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int slot = i % kAhead;
      if constexpr (WIDE) {
        wait_copies<kAhead - 1>();
      } else {
        ask(base + i, slot);
      }
      const int32_t flags = piece[base + i].flags;
      const T scale = piece[base + i].scale;
      if (DOTS && flags & kFresh) {
#pragma unroll
        for (int v = 0; v < kMany; ++v) Own::read(weights + slot * kRow, v, w[v]);
      }
      T dot = 0;
#pragma unroll
      for (int v = 0; v < kMany; ++v) {
        T x[kSize];
        Own::read(rows + slot * kRow, v, x);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          sum[v][j] = fma(scale, x[j], sum[v][j]);
          if constexpr (DOTS) dot = fma(w[v][j], x[j], dot);
        }
      }
      if constexpr (WIDE) ask(base + i + kAhead, slot);  // into the place of what was read
      dots[i] = dot;
      of_scales += scale;
      if constexpr (DOTS) along = fma(scale, dot, along);
      if (flags & kLast) finish(base + i, flags);
    }
    if constexpr (DOTS) {
      constexpr int kLanes = 32 / kTogether;
      const T own_sum = sums_of_warp(dots);
      if (lane % kLanes == 0 && !args.given) of_warps[warp].dots[base + lane / kLanes] = own_sum;
    }
  }
  if (!DOTS && args.squares == nullptr) return;
  __syncthreads();
  for (int i = t; i < count; i += threads) {
    if (DOTS && !args.given) {
      T* const out = static_cast<T*>(args.dots) + places[i];
      T dot = leading ? 0 : *out;
      for (int other = 0; other < warps; ++other) dot += of_warps[other].dots[i];
      *out = dot;
    }
    if (!(piece[i].flags & kLast) || piece[i].flags & kShared || args.squares == nullptr) continue;
    T* const out = static_cast<T*>(args.squares) + latents[i];
    T square = leading ? 0 : *out;
    for (int other = 0; other < warps; ++other) square += of_warps[other].squares[i];
    *out = square;
  }
}

template <class S, class O, bool WIDE, bool DOTS>
__global__ void __maxnreg__(kRegisters) add_pieces(const GradientArgs args) {
  wait_for_kernel_before();
  let_kernel_after_start();
  const int32_t total = args.offsets[args.n];
  const int64_t pieces = (int64_t(total) + kPiece - 1) / kPiece, blocks = gridDim.x;
  // The blocks that have entries clear as well, so that what is bound by memory is done beside what
  // is bound by the cache; others help if these are few.
  const int64_t clearing = min(blocks, max(pieces, kClearing));
  if (args.first_column == 0 && blockIdx.x < clearing) {
    clear_unused<Compute<S>, O>(args, clearing);
  }
  for (int64_t which = blockIdx.x; which < pieces; which += blocks) {
    add_piece<S, O, WIDE, DOTS>(args, which, total);
    __syncthreads();
  }
}

int64_t pieces_of(int64_t places) { return (places + kPiece - 1) / kPiece; }

template <class S, class O>
void gradients(GradientArgs args, int64_t rows, const Device& device, void* stream) {
  using T = Compute<S>;
  const int64_t d = args.d, arrays = args.weight != nullptr ? 2 : 1;
  const auto warps_of = [](int64_t columns) {  // at least one: d may be 0
    return std::max<int64_t>((columns + kTile<S> - 1) / kTile<S>, 1);
  };
  const auto shared_of = [&](int64_t warps, int64_t stages) {
    return warps * (arrays * stages * kVectors<S> * 512 + int64_t(sizeof(OfWarp<T>)));
  };
  const int64_t room = device.shared_limit - 8 * 1024;  // beside what every block has
  const bool wide = is_wide(args.y, rows, d, sizeof(S)) &&
                    is_wide(args.weight, args.n, d, sizeof(S)) &&
                    is_wide(args.grad, args.n, d, sizeof(O)) && d % Chunk<S>::size == 0;
  const int64_t most_warps =
      std::min<int64_t>(kMostWarps, room / shared_of(1, wide ? kStages<S> : 1));
  int64_t slices = (warps_of(d) + most_warps - 1) / most_warps;
  // A projection needs whole rows, or else the dots beforehand.
  const bool twice = args.project && slices > 1;
  if (!args.project && warps_of(d) > 1 && rows * d * int64_t(sizeof(S)) > kCached) {
    slices = std::max<int64_t>(slices, 2);
  }
  const auto kernel =
      wide ? (args.weight != nullptr ? add_pieces<S, O, true, true> : add_pieces<S, O, true, false>)
           : (args.weight != nullptr ? add_pieces<S, O, false, true>
                                     : add_pieces<S, O, false, false>);
  const int64_t width = (warps_of(d) + slices - 1) / slices * kTile<S>;
  // A code has more room than entries: of full ones the first blocks have two pieces.
  const int64_t blocks =
      std::max((args.pieces * 5 + 7) / 8, std::min((int64_t(args.n) + 31) / 32, kClearing));
  const auto add = [&](GradientArgs now) {
    for (int64_t slice = 0; slice < slices && blocks > 0; ++slice) {
      now.first_column = int32_t(slice * width);
      now.end_column = int32_t(std::min(d, (slice + 1) * width));
      const int64_t warps = warps_of(now.end_column - now.first_column);
      const int64_t shared = shared_of(warps, wide ? kStages<S> : 1);
      if (shared > 32 * 1024) allow_shared_once(reinterpret_cast<const void*>(kernel));
      launch_overlapping(kernel, now, dim3(unsigned(blocks)), warps * 32, shared, device.fed(),
                         stream);
    }
  };
  if (twice) {
    GradientArgs dots = args;
    dots.project = dots.zero_silent = false;
    dots.squares = nullptr;
    add(dots);
    args.given = true;
  }
  add(args);
  if (args.pieces == 0) return;
  const bool whole = args.project || args.squares != nullptr;
  constexpr int64_t kColumns = kFinishing * kWide;
  const int64_t parts = whole ? 1 : std::clamp<int64_t>((d + kColumns - 1) / kColumns, 1, 4);
  const int64_t turns = std::max<int64_t>(device.multiprocessors * kResident / parts, 1);
  launch_overlapping(add_partial<S, O>, args,
                     dim3(unsigned(std::min(args.pieces, turns)), unsigned(parts)), kFinishing, 0,
                     device.fed(), stream);
}

}  // namespace

int64_t gradients_workspace(Type type, int64_t rows, int64_t max_active, int64_t, int64_t d, bool,
                            bool) {
  const int64_t size = type == Type::float64 ? 8 : 4;
  return pieces_of(rows * max_active) * (size * 2 * (d + 1) + int64_t(sizeof(int32_t)));
}

void latent_gradients(const void* scale, const int32_t* indices, const int32_t* offsets,
                      const int32_t* entries, int64_t rows, int64_t max_active, int64_t n,
                      int64_t d, const void* y, const void* weight, Type type, Type out_type,
                      bool project, bool zero_silent, void* grad, void* dots, void* sums,
                      void* squares, void* workspace, int device, void* stream) {
  check_length(n);
  check_length(rows * max_active);
  const DeviceGuard guard(device);
  with_type(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Compute<S>;
    GradientArgs args = {};
    args.scale = scale, args.indices = indices, args.offsets = offsets, args.entries = entries;
    args.places = rows * max_active, args.max_active = int32_t(max_active);
    args.n = int32_t(n), args.d = int32_t(d);
    args.y = y, args.weight = weight, args.project = project, args.zero_silent = zero_silent;
    args.grad = grad, args.dots = dots, args.sums = sums, args.squares = squares;
    args.pieces = pieces_of(args.places);
    args.partial = workspace;
    T* const partial_sums = static_cast<T*>(workspace) + args.pieces * 2 * d;
    args.partial_sums = partial_sums;
    args.longs = reinterpret_cast<int32_t*>(partial_sums + args.pieces * 2);
    if constexpr (sizeof(S) == 8) {
      gradients<S, S>(args, rows, device_at(device), stream);
    } else if (out_type == Type::float32) {
      gradients<S, float>(args, rows, device_at(device), stream);
    } else if (out_type == type) {
      gradients<S, S>(args, rows, device_at(device), stream);
    } else {
      throw std::runtime_error("softtopk: a gradient is of float32 or of the type of y");
    }
  });
}

}  // namespace softtopk::cuda
