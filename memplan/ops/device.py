"""What of a device decides how kernels use memory: its kind, its size, which attention kernel it prefers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """A device as far as temporaries depend on it."""

    name: str
    is_cuda: bool = True
    """Off, kernels ask for no buffers whose size they choose inside (split reductions, cuDNN, cub): tests compare with
    the real model on fake tensors, which has none."""
    num_sms: int = 132
    max_threads_per_sm: int = 2048
    prefers_cudnn_attention: bool = False
    """sdpa takes cuDNN's kernel before flash: sdp_utils.cpp `check_prefer_cudnn_attention` (Hopper, Blackwell)."""


# H100 and H200 SXM: 132 multiprocessors of 2048 threads (torch.cuda.get_device_properties on an H200).
HOPPER = Device("hopper", prefers_cudnn_attention=True)
FAKE_CPU = Device("fake-cpu", is_cuda=False, prefers_cudnn_attention=True)
