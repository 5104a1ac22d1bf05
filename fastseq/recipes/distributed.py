"""Training in several processes, which torchrun starts: what they share, and what the first one does alone.

A batch of the configuration is the batch of all processes together, and its order is that of one process: the update
is the same to rounding, whatever the number of processes, and a run may go on with another number (`loading.Shares`).
The first process alone reads and writes the run directory, and sends the others what they need of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from fastseq.recipes.batch_norm import share_statistics
from fastseq.recipes.config import TrainConfig
from fastseq.recipes.errors import ConfigError

TIMEOUT = timedelta(hours=2)
"""How long processes wait for each other: as long as the first one may take to fetch and encode the data."""

T = TypeVar("T")


def initialized() -> bool:
    """Whether this process has met its group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check(config: TrainConfig, processes: int) -> None:
    """Finds out whether so many processes can train this configuration.

    Raises:
        ConfigError: they cannot.
    """
    if config.batch_size < processes:
        raise ConfigError(
            f"train.batch_size: it is of all processes together, and at least one example for each of the {processes} "
            f"is wanted, got {config.batch_size}"
        )
    if config.fsdp and config.find_batch_size:
        raise ConfigError(
            "train.find_batch_size: not together with train.fsdp, whose processes exchange layers while they compute: "
            "one that runs out of memory would leave the others waiting"
        )


def from_first(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in all of them. Where it fails there, all of them end."""
    if accelerator.num_processes == 1:
        return make()
    box: list[Any] = [None, False]
    try:
        if accelerator.is_main_process:
            box = [make(), True]
    finally:  # the others wait: they must hear of a failure too
        torch.distributed.broadcast_object_list(box, src=0)
    if not box[1]:
        raise SystemExit(1)  # the first process says why
    return cast(T, box[0])


def own_generators(accelerator: Accelerator, seed: int, step: int) -> None:
    """Gives each process but the first random numbers of its own, for dropout, from a step on.

    It is done at the start and at each checkpoint, so that a resumed run draws what an uninterrupted one would; the
    generators of the first process are in the checkpoint.
    """
    if not accelerator.is_main_process:
        sequence = np.random.SeedSequence((seed, accelerator.process_index, step))
        set_seed(int(sequence.generate_state(1)[0]))


def shared(model: nn.Module, accelerator: Accelerator, config: TrainConfig) -> nn.Module:
    """The model on its device and under autocast, with its gradients shared: by DDP, by FSDP, or by `average`.

    Args:
        model: gets hooks; where it is sharded, its parameters are replaced.
        accelerator: says where, and with whom.
        config: `fsdp` shards the layers of a text encoder; `find_batch_size` leaves gradients to `average`.

    Raises:
        ConfigError: there are no layers to shard.
    """
    alone = accelerator.num_processes == 1
    layers = _layers(model) if config.fsdp else []
    if alone:
        return cast(nn.Module, accelerator.prepare_model(model))
    if not (config.fsdp or config.find_batch_size):
        return cast(nn.Module, accelerator.prepare_model(share_statistics(model, accelerator.device)))
    model = accelerator.prepare_model(model, evaluation_mode=True)  # which leaves DDP out
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor.detach(), src=0)
    if config.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if hasattr(model, "predict"):  # evaluation goes that way in, past `forward`
            register_fsdp_forward_method(model, "predict")
    return model


def _layers(model: nn.Module) -> list[nn.Module]:
    from fastseq.models.pooled_encoder import PooledEncoder

    encoders = [module for module in model.modules() if isinstance(module, PooledEncoder)]
    if not encoders:
        raise ConfigError("train.fsdp: it shards the layers of a text encoder, and this model has none, got true")
    return [layer for encoder in encoders for layer in encoder.layers]


@contextmanager
def last_of_update(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged in the backward pass of an update's last piece, and added up locally before."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def average(model: nn.Module) -> None:
    """Replaces each gradient by its mean over the processes."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    waiting = [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
    for work, gradient in zip(waiting, gradients, strict=True):
        work.wait()
        gradient.div_(torch.distributed.get_world_size())


def share(accelerator: Accelerator, items: Sequence[T]) -> list[T]:
    """What of `items` is for this process; they are dealt out in turns.

    All processes get as many, since they have to take part in each batch of a sharded model: what is missing in the
    last turn is the first item again.
    """
    processes: int = accelerator.num_processes
    mine = list(items[accelerator.process_index :: processes])
    return mine + list(items[:1]) * (-(-len(items) // processes) - len(mine))


def collected(accelerator: Accelerator, mine: list[T], count: int) -> list[T]:
    """What the processes have made of their shares, one value of each item, in the order of the `count` items."""
    if accelerator.num_processes == 1:
        return mine
    shares: list[list[T]] = [[]] * accelerator.num_processes
    torch.distributed.all_gather_object(shares, mine)
    return [value for turn in zip(*shares, strict=True) for value in turn][:count]


def largest_of_all(accelerator: Accelerator, number: int) -> int:
    """The largest of the numbers that the processes have."""
    if accelerator.num_processes == 1:
        return number
    found = torch.tensor(number, device=accelerator.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found.item())


def whole(state: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """A state_dict for the first process to save: what is sharded is gathered there, and nowhere else.

    Args:
        state: of a model or an optimizer; all processes have to call this.
        accelerator: says which process this is.
    """
    if accelerator.num_processes == 1:
        return state
    from torch.distributed.tensor import DTensor
    from torch.utils._pytree import tree_map_only

    def gathered(value: DTensor) -> Tensor | None:
        full = value.full_tensor()  # with all the others, so that it is not left out where nothing is kept
        return full.cpu() if accelerator.is_main_process else None

    return cast(dict[str, Any], tree_map_only(DTensor, gathered, state))


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads whole weights into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the whole state of an optimizer, of which each process may have a share of the parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {
        i: {name: _like(value, parameters[i]) for name, value in values.items()} for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": own})


def _like(value: Any, tensor: Tensor | None) -> Any:
    """A whole tensor sharded as another one of its shape is; anything else as it is."""
    if not hasattr(tensor, "placements"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    sharded = cast(DTensor, tensor)
    if not isinstance(value, Tensor) or value.shape != sharded.shape:
        return value
    return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)
