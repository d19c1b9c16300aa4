// Backward: grad_x (rows, n), grad_k and grad_alpha (rows,) from x, the solution and v.
//
// Short rows are a warp's, those that fit on chip a block's or a cluster's (resident_backward.cuh),
// the longest, and float64, those of a block that reads them three times (backward_row.cuh).
#include "backward_row.cuh"
#include "resident_backward.cuh"
#include "resident_launch.cuh"

namespace softtopk::cuda {
namespace {

// Of the shortest rows twelve on a multiprocessor are faster than thirteen (0.70 of the floor
// against 0.65 in bfloat16 at n = 4096): hence the room.
constexpr Demand kDemand = {2, kAnyPart, 3, {64, 128, 256}, {256, 0, 0}, 0};

template <class S, class L>
__global__ void __launch_bounds__(L::block, L::resident(sizeof(S)))
    backward_kernel(const BackwardArgs args) {
  using Group = typename L::Group;
  using Row = typename L::template Row<S>;
  extern __shared__ uint4 row_memory[];
  __shared__ typename Group::Storage storage;

  const int64_t r = L::row(args.first_row);
  const int32_t n = int32_t(args.x.n);
  if (r >= args.x.rows) return;  // all threads of the group
  Group group(storage);
  const Source<S> x_source(args.x.data, r * args.x.stride, n, args.wide_x, !args.x.largest);
  const Source<S> v_source(args.v, r * args.v_stride, n, args.wide_v, false);
  const Row x_row(x_source, row_memory);
  const Row v_row(v_source, row_memory + L::template memory<S>(n));
  backward_of_row<S>(args, r, x_source, v_source, x_row, v_row, group);
}

}  // namespace

void soft_topk_backward(const Rows& x, const void* solution, const PerRow& alpha, Form form,
                        const void* v, int64_t v_stride, void* grad_x, void* grad_k,
                        void* grad_alpha, int device, void* stream) {
  const BackwardArgs args = {x,      solution,   alpha, form,  v,     v_stride, grad_x,
                             grad_k, grad_alpha, false, false, false, false,    0};
  if (form != Form::p) return log_backward(args, device, stream);
  launch_backward<true>(
      args, device, stream,
      [&](const BackwardArgs& with_flags, auto tag) {
        using S = typename decltype(tag)::type;
        if constexpr (sizeof(S) <= 4) {
          const Device& gpu = device_at(device);
          const Plan plan = plan_resident(x.n, sizeof(S), kDemand, gpu);
          if (x.n * sizeof(S) <= 128 * 16 || plan.blocks == 0) return false;
          BackwardArgs fed = with_flags;
          fed.fed = gpu.fed();
          with_sharing<S, 64, 128, 256>(plan, x.n, [&](auto sharing) {
            launch_resident(backward_resident<decltype(sharing)>, fed, x.rows, plan, gpu, stream);
          });
          launch_resident(backward_careful<S>, fed, (x.rows + 31) / 32, Plan{1, 256, 0, 0}, gpu,
                          stream);
          return true;
        }
        return false;
      },
      [](auto tag, auto layout) {
        return backward_kernel<typename decltype(tag)::type, decltype(layout)>;
      });
}

}  // namespace softtopk::cuda
