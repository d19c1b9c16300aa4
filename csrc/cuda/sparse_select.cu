// The code of every row of pre-activations: which activations are kept, and what they are worth
// (softtopk/sparse.py).
//
// Bytes: a row is read once where it fits on chip and few of its elements lie near the threshold or
// above it (quick_select.cuh), and where the registers of a warp hold it; on every sweep of the
// search otherwise. 12 bytes are written for each of the max_active places, and where a row is
// shared by several blocks 8 bytes are written and read for each candidate.
#include "launch.cuh"
#include "quick_select.cuh"
#include "resident_launch.cuh"

namespace softtopk::cuda {
namespace {

// The rows that select_quick has left, or all that are too long for it.
template <class S>
__global__ void __launch_bounds__(256, sizeof(S) == 8 ? 1 : 2)
    select_careful(const SelectArgs args) {
  wait_for_kernel_before();
  __shared__ typename Block<256>::Storage storage;
  Block<256> group(storage);
  const int64_t step = gridDim.x;
  for (int64_t first = blockIdx.x; first < args.x.rows; first += 32 * step) {
    const int64_t mine = first + int(threadIdx.x) % 32 * step;
    uint32_t left =
        __ballot_sync(~0u, mine < args.x.rows && (args.all || args.code.counts[mine] == kLeftRow));
    if (left != 0) __syncthreads();  // all have looked before one is done
    for (; left != 0; left &= left - 1) {
      const int64_t r = first + (__ffs(int(left)) - 1) * step;
      select_row<S, ActivatedRow<S, Block<256>>>(args, r, group);
    }
  }
}

constexpr int kItems = 24;                  // most stripes of a unit, so that four are on chip
constexpr int64_t kShortest = 32 * 2 * 16;  // bytes of a row that a warp's registers hold

// How rows of so many bytes are cut, into units as even as can be; items = 0: they do not fit.
Units cut_rows(int64_t bytes, bool ragged, bool fed) {
  const int64_t granules = (bytes + 15) / 16 + ragged;
  Units units = {1, 0, ragged, fed};
  if (bytes <= kShortest) return units;
  const auto cut = [&](int64_t parts) {
    return (granules + parts * kScanners - 1) / (parts * kScanners);
  };
  const int64_t parts = std::min<int64_t>((cut(1) + kItems - 1) / kItems, kMostParts);
  const int64_t items = cut(parts);
  if (items <= kMostStripes) units.parts = int(parts), units.items = int(items);
  return units;
}

// How units of so many stripes are selected from: by more warps that solve where those cost no
// block.
struct Quick {
  void (*kernel)(const SelectArgs);
  Plan plan;
};
template <class S, bool SOFT, int GROUPS, int OF_WARP>
Quick quick_of(int items, const Device& device) {
  // A multiprocessor has 1 KiB of shared memory more than a block can have, and each block has 1
  // KiB that is not its own.
  constexpr int64_t kReserved = 1024;
  const auto bytes = [&](int solvers) { return select_bytes<OF_WARP>(items, solvers); };
  const auto blocks = [&](int solvers) {
    const int64_t each = bytes(solvers) + int64_t(sizeof(SelectShared)) + kReserved;
    return std::min<int64_t>(blocks_of(GROUPS), (device.shared_limit + kReserved) / each);
  };
  int solvers = 2;
  while (solvers < kMostSolvers && blocks(solvers + 1) == blocks(2)) ++solvers;
  return {select_quick<S, SOFT, GROUPS, OF_WARP>,
          Plan{1, kScanners + 32 * solvers, 0, bytes(solvers)}};
}
// Whether few are wanted: at most kMostFewWanted by one budget for all, or else by what the code
// has room for, a quarter more than the budgets and some to spare (softtopk/sparse_checks.py).
constexpr double kMostFewWanted = 187;  // so that kMostWanted are not exceeded
constexpr int64_t kMostPlaces = 288;
bool few_wanted(const SelectArgs& args) {
  return args.k.data == nullptr ? args.k.number <= kMostFewWanted
                                : args.code.max_active <= kMostPlaces;
}

template <class S, bool SOFT>
Quick quick_for(int items, bool few, const Device& device) {
  if (!few) return quick_of<S, SOFT, 24, kManyOfWarp>(items, device);
  return items <= 16 ? quick_of<S, SOFT, 16, kFewOfWarp>(items, device)
                     : quick_of<S, SOFT, 24, kFewOfWarp>(items, device);
}

// Rows that the registers of a warp hold, two chunks to a lane.
using Short = Layout<Warp, RegisterRow, 2>;
template <class S>
__global__ void __launch_bounds__(Short::block, sizeof(S) == 8 ? 2 : 5)
    select_short(const SelectArgs args) {
  Warp::Storage none;
  Warp group(none);
  const int64_t r = Short::row(args.first_row);
  if (r < args.x.rows) select_row<S, ActivatedRegisters<S, Warp, 2>>(args, r, group);
}

template <class S>
void select_rows(SelectArgs args, void* workspace, const Device& device, void* stream) {
  const Rows& x = args.x;
  const int64_t chunks = (x.n * int64_t(sizeof(S)) + 15) / 16;
  if (chunks * 16 <= kShortest) return launch<Short>(select_short<S>, args, x.rows, 0, stream);
  if constexpr (sizeof(S) <= 4) {
    const bool ragged =
        !is_wide(x.data, x.rows, x.stride, sizeof(S)) || x.n * int64_t(sizeof(S)) % 16 != 0;
    const Units units = cut_rows(x.n * int64_t(sizeof(S)), ragged, device.fed());
    if (units.items > 0) {
      const int64_t all = x.rows * units.parts;
      args.all = false;
      args.units = units;
      const bool few = few_wanted(args);
      args.room = units.parts > 1 ? room_in_memory(units.parts) : few ? kFewOfWarp : kManyOfWarp;
      if (units.parts > 1) {
        args.sent_parts = static_cast<Part*>(workspace);
        args.sent = reinterpret_cast<Entry*>(args.sent_parts + all);
        args.arrived = reinterpret_cast<int32_t*>(args.sent + all * kScanningWarps * args.room);
        args.drawn = args.arrived + x.rows;
        check(cudaMemsetAsync(args.arrived, 0, size_t(4 * (x.rows + 1)),
                              static_cast<cudaStream_t>(stream)),
              "cudaMemsetAsync");
      }
      SelectArgs quick = args;
      quick.wide_bias = args.wide_bias && !ragged;
      const auto [kernel, plan] = args.mode == Selecting::hard
                                      ? quick_for<S, false>(units.items, few, device)
                                      : quick_for<S, true>(units.items, few, device);
      launch_resident(kernel, quick, all, plan, device, stream);
    }
  }
  launch_resident(select_careful<S>, args, x.rows, Plan{1, 256, 0, 0}, device, stream,
                  !args.all && device.fed());
}

}  // namespace

int64_t select_workspace(int64_t rows, int64_t n, Type type) {
  const int64_t size = type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2;
  if (size == 8) return 0;
  // A ragged row may have a unit more, or be too long to be cut.
  const int parts =
      std::max(cut_rows(n * size, false, true).parts, cut_rows(n * size, true, true).parts);
  if (parts == 1) return 0;
  const int64_t entries = int64_t(kScanningWarps) * room_in_memory(parts);
  return rows * (parts * (int64_t(sizeof(Part)) + entries * int64_t(sizeof(Entry))) + 4) + 4;
}

void code_forward(const Rows& z, const PerRow& k, const PerRow& alpha, const Activation& activation,
                  Selecting mode, const Code& code, void* workspace, int device, void* stream) {
  check_length(z.n);
  const DeviceGuard guard(device);
  with_type(z.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    SelectArgs args = {};
    args.x = z, args.k = k, args.alpha = alpha, args.activation = activation;
    args.mode = mode, args.code = code;
    args.wide_x = is_wide(z.data, z.rows, z.stride, sizeof(S));
    args.wide_bias = is_wide(activation.bias, 1, 0, sizeof(S));
    args.all = true;
    args.threshold = float(activation.threshold) + 0.0f;  // -0 becomes +0
    select_rows<S>(args, workspace, device_at(device), stream);
  });
}

}  // namespace softtopk::cuda
