"""The order in which PyTorch tries its kernels of attention on a GPU."""
import contextlib
import os

from torch.nn.attention import SDPBackend, sdpa_kernel

ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
# To measure what it brings: EVIT_DEFAULT_KERNELS='attention' leaves the order to PyTorch
BY_DEFAULT = 'attention' in os.environ.get('EVIT_DEFAULT_KERNELS', '').split()


def flash_first(device):
    """A context, on a GPU only, in which attention is FlashAttention where that can do it.

    PyTorch prefers cuDNN's on some GPUs, which builds a plan for each new shape: hundreds while the keep rate falls.
    Forward, backward and compilation belong inside, since gradient checkpointing and the compiler choose again.
    """
    if device.type != 'cuda' or BY_DEFAULT:
        return contextlib.nullcontext()
    return sdpa_kernel(ORDER, set_priority=True)
