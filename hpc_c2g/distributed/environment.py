"""The only module that reads or writes the launch environment: device, process group, DeepSpeed's accelerator."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist

from hpc_c2g.errors import C2GError


def pick_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        C2GError: ``cuda`` without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise C2GError("device=cuda, but PyTorch sees no GPU", "use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def prepare_libraries(device: torch.device, deterministic: bool) -> None:
    """Settings that must be in the environment before DeepSpeed is imported or CUDA starts."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def ensure_process_group(device: torch.device) -> None:
    """The process group of this process (gloo on CPU, nccl on GPU), made once: DeepSpeed keeps handles to it until the process ends."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")  # DeepSpeed reads these itself
