"""One network over many processes: a replica in each (DDP), or shards of it (FSDP2), and back to whole tensors.

torch's sharding is imported where it is used: that takes a second, which a run of one process need not wait.
"""

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.distributed import World
from train.execution import blocks_of


def shard(module: nn.Module, world: World) -> None:
    """Cuts the parameters of a module over all processes, in place; each block is whole only while it is used."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks_of(module):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in ("encode", "decode"):  # what else than forward uses parameters
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def replicate(module: nn.Module, world: World) -> nn.Module:
    """The module as a training step calls it: gradients are averaged over processes while they are computed."""
    if world.size == 1 or is_sharded(module):
        return module
    devices = [world.device] if world.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    own_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    # Kernels give gradients other strides along axes of length 1. DDP warns of it, and no copy is saved or made by it.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides", category=UserWarning)
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **{own_buffers: False})


def synchronized(replica: nn.Module, last: bool) -> AbstractContextManager:
    """Around forward and backward of one part of a batch: processes exchange gradients at the last part alone."""
    if is_sharded(replica):
        replica.set_requires_gradient_sync(last)
    elif isinstance(replica, DistributedDataParallel) and not last:
        return replica.no_sync()
    return nullcontext()


def is_sharded(thing: nn.Module | Tensor) -> bool:
    """Whether a module, or a tensor, is cut over processes."""
    return hasattr(thing, "unshard") or hasattr(thing, "to_local")


def in_step(network: nn.Module) -> Callable[..., Tensor] | None:
    """What processes that share a network sample with: an `on_step` that changes nothing. A forward needs all of them,
    and a solver that is watched calls the network at every step, however little there is to draw. None: each may do
    as it likes.
    """
    return (lambda i, t, s, x, said: x) if is_sharded(network) else None


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or a whole tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards: all processes must ask. A whole one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in each process, cut as `other` is; as it is where that is whole."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """This process's gradients, shards where parameters are sharded."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def gradient_norm(parameters: list[nn.Parameter], world: World) -> Tensor:
    """The norm of all gradients together, those of other processes' shards included."""
    norm = torch.nn.utils.get_total_norm(gradients(parameters))
    if any(is_sharded(p) for p in parameters):
        norm = world.sum(norm.square()).sqrt()
    return norm
