// Compiles and launches the kernels of careful_forward.cuh, apart from the other forwards because
// either takes a minute.
#include "careful_forward.cuh"
#include "resident_launch.cuh"

namespace softtopk::cuda {

template <class S>
void launch_careful(ForwardArgs args, const Plan& plan, const Device& device, void* stream) {
  args.room = plan.room;
  with_sharing<S, 64, 128, 256>(plan, args.x.n, [&](auto sharing) {
    launch_resident(forward_careful<decltype(sharing)>, args, args.x.rows, plan, device, stream);
  });
}

template void launch_careful<float>(ForwardArgs, const Plan&, const Device&, void*);
template void launch_careful<__half>(ForwardArgs, const Plan&, const Device&, void*);
template void launch_careful<__nv_bfloat16>(ForwardArgs, const Plan&, const Device&, void*);

}  // namespace softtopk::cuda
