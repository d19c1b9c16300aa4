// The code of every row of pre-activations: which activations are kept, and what they are worth
// (softtopk/sparse.py).
//
// Bytes: a row is read once where it fits on chip and few of its elements lie near the threshold or
// above it (quick_select.cuh), and where the registers of a warp hold it; on every sweep of the
// search otherwise. 12 bytes are written for each of the max_active places.
#include "launch.cuh"
#include "quick_select.cuh"
#include "resident_launch.cuh"

namespace softtopk::cuda {
namespace {

// Room for 416 candidates lets six rows of 2048 chunks onto a multiprocessor, for 512 five.
constexpr Demand kQuick = {1, kAnyPart, 3, {64, 128, 128}, {800, 832, 832}, 2048};

// The rows that select_quick has left, or all that are too long for it.
template <class S>
__global__ void __launch_bounds__(256, sizeof(S) == 8 ? 1 : 2)
    select_careful(const SelectArgs args) {
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

// Rows that the registers of a warp hold.
template <int ITEMS>
using Short = Layout<Warp, RegisterRow, ITEMS>;
template <class S, int ITEMS>
__global__ void __launch_bounds__(Short<ITEMS>::block, sizeof(S) == 8 ? 2
                                                       : ITEMS > 2    ? 3
                                                                      : 5)
    select_short(const SelectArgs args) {
  Warp::Storage none;
  Warp group(none);
  const int64_t r = Short<ITEMS>::row(args.first_row);
  if (r < args.x.rows) select_row<S, ActivatedRegisters<S, Warp, ITEMS>>(args, r, group);
}

template <class S>
void select_rows(SelectArgs args, const Device& device, void* stream) {
  const Rows& x = args.x;
  const int64_t chunks = (x.n * int64_t(sizeof(S)) + 15) / 16;
  if (chunks <= 32 * 2) return launch<Short<2>>(select_short<S, 2>, args, x.rows, 0, stream);
  if (chunks <= 32 * 8) return launch<Short<8>>(select_short<S, 8>, args, x.rows, 0, stream);
  if constexpr (sizeof(S) <= 4) {
    const Plan plan = plan_resident(x.n, sizeof(S), kQuick, device);
    if (plan.blocks > 0) {
      args.all = false;
      args.room = plan.room;
      with_sharing<S, 64, 128, 256>(plan, x.n, [&](auto sharing) {
        using H = decltype(sharing);
        const auto kernel =
            args.mode == Selecting::hard ? select_quick<H, false> : select_quick<H, true>;
        launch_resident(kernel, args, x.rows, plan, device, stream);
      });
    }
  }
  launch_resident(select_careful<S>, args, x.rows, Plan{1, 256, 0, 0}, device, stream);
}

}  // namespace

void code_forward(const Rows& z, const PerRow& k, const PerRow& alpha, const Activation& activation,
                  Selecting mode, const Code& code, int device, void* stream) {
  check_length(z.n);
  const DeviceGuard guard(device);
  with_type(z.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Device& gpu = device_at(device);
    const bool wide_x = is_wide(z.data, z.rows, z.stride, sizeof(S));
    const bool wide_bias = is_wide(activation.bias, 1, 0, sizeof(S));
    const float threshold = float(activation.threshold) + 0.0f;  // -0 becomes +0
    const SelectArgs args = {z,         k,         alpha, activation, mode,      code, wide_x,
                             wide_bias, gpu.fed(), true,  0,          threshold, 0};
    select_rows<S>(args, gpu, stream);
  });
}

}  // namespace softtopk::cuda
