"""The CUDA backend: csrc/cuda, on the tensor's device and torch's current stream there."""

import torch
from torch import Tensor

from softtopk.backends.native import _C, Kernels, reads
from softtopk.backends.native_activity import ActivityKernels
from softtopk.backends.native_budget import BudgetKernels
from softtopk.backends.native_error import ErrorKernels
from softtopk.backends.native_gate import GateKernels
from softtopk.backends.native_optim import OptimKernels
from softtopk.backends.native_projection import NativeSteps
from softtopk.backends.native_shift import ShiftKernels
from softtopk.backends.native_sparse import SparseKernels
from softtopk.backends.projection import Projection


def reason() -> str | None:
    """Why this backend cannot run here, or None."""
    if not _C.has_cuda:
        return (
            f"softtopk._C was built without CUDA ({_C.cuda_reason}); with the CUDA toolkit's nvcc on the"
            " PATH run `SOFTTOPK_CUDA=1 pip install --force-reinstall --no-deps .` in the source tree"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if not any(serves(architecture, capability) for architecture in _C.cuda_architectures.split(";")):
        asked = "{}.{}".format(*capability)
        return (
            f"softtopk._C was built for CUDA architectures {_C.cuda_architectures}, this GPU is {asked};"
            f" rebuild it with TORCH_CUDA_ARCH_LIST={asked}"
        )
    return None


def serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for "90", "90a" or "120+PTX" runs on a GPU of this compute capability."""
    number = int(architecture.removesuffix("+PTX").rstrip("af"))
    major, minor = divmod(number, 10)
    if architecture.endswith("+PTX") and (major, minor) <= capability:
        return True
    if architecture.endswith("a"):
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


if (why := reason()) is not None:
    raise ImportError(why)


def device_and_stream(x: Tensor) -> tuple[int, int]:
    index = x.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)  # current_stream(x.device).cuda_stream, quicker


kernels = Kernels(_C.cuda, device_and_stream, log_needs_solution=True)
sparse = SparseKernels(_C.cuda, device_and_stream)
activities = ActivityKernels(_C.cuda, device_and_stream)
budgets = BudgetKernels(_C.cuda, device_and_stream)
errors = ErrorKernels(_C.cuda, device_and_stream)
gates = GateKernels(_C.cuda, device_and_stream)
optim = OptimKernels(_C.cuda, device_and_stream)
shifts = ShiftKernels(_C.cuda, device_and_stream)
__all__ = [
    "activities",
    "adam_flat",
    "adam_rows",
    "budgets",
    "clip_factors",
    "errors",
    "gates",
    "hard_topk_indices",
    "hard_topk_mask",
    "reads",
    "relu_projection_backward",
    "relu_projection_forward",
    "shifts",
    "soft_topk_backward",
    "soft_topk_forward",
]
soft_topk_forward = kernels.soft_topk_forward
soft_topk_backward = kernels.soft_topk_backward
hard_topk_mask = kernels.hard_topk_mask
hard_topk_indices = kernels.hard_topk_indices

projection = Projection(NativeSteps(_C.cuda, device_and_stream))
relu_projection_forward = projection.relu_projection_forward
relu_projection_backward = projection.relu_projection_backward

adam_rows, adam_flat = optim.adam_rows, optim.adam_flat
clip_factors = optim.clip_factors
