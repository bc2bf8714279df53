"""Weights and optimiser state by parameter name, whatever ZeRO stage and number of processes hold them.

DeepSpeed keeps float32 weights and optimiser states in flat tensors, of which every rank owns a part. Here such a part
is a `Shard`: the flat tensor and the pieces of named parameters inside it. A checkpoint is the pieces of all ranks, so
any other number of ranks or ZeRO stage can put together what it needs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """`numel` numbers of the flattened parameter `name` from `start` on, at `offset` of a flat tensor."""

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Shard:
    """A flat float32 tensor that this rank's optimiser steps, the key of its state, and what it is made of."""

    flat: torch.Tensor
    key: torch.Tensor
    pieces: list[Piece]


def shards(engine: Any) -> list[Shard]:
    """What this rank's optimiser steps.

    Without ZeRO in float32 every rank steps every parameter; else the optimisers of DeepSpeed 0.19 are told apart by
    the tensors that they keep.
    """
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        return _zero3_shards(optimizer, names)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        return _linked_shards(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, names)
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # bf16 with ZeRO 1
        return _linked_shards(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, names)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return [Shard(p.data.view(-1), p, [Piece(names[p], 0, 0, p.numel())]) for p in trained]


def _linked_shards(flats: list[torch.Tensor], groups: list[list[Any]], names: Mapping[Any, str]) -> list[Shard]:
    found = []
    for flat, group in zip(flats, groups, strict=True):
        linked = [(p, p._hp_mapping) for p in group if p._hp_mapping is not None]
        pieces = [
            Piece(names[p], m.lp_fragment_address.start, m.hp_fragment_address.start, m.hp_fragment_address.numel)
            for p, m in linked
        ]
        found.append(Shard(flat.data, flat, pieces))
    return found


def _zero3_shards(optimizer: Any, names: Mapping[Any, str]) -> list[Shard]:
    found = [Shard(flat.data, flat, []) for flat in optimizer.fp32_partitioned_groups_flat]
    rank = dist.get_rank()
    for parameters in optimizer.fp16_groups:
        for p in parameters:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            start = rank * size  # every rank holds as many numbers of a parameter; the last one's may be padding
            numel = min(size, p.ds_numel - start)
            if numel > 0:
                found[group].pieces.append(Piece(names[p], start, offset, numel))
    return found


def snapshot(engine: Any) -> dict[str, torch.Tensor]:
    """A copy of this rank's weights and optimiser states in the memory of the CPU: `kind|name|start` → flat tensor.

    Together the ranks' snapshots hold everything exactly once. `step|name|start` counts the optimiser's steps.
    """
    state = engine.basic_optimizer.state
    whole = engine.optimizer is engine.basic_optimizer
    rank, world = dist.get_rank(), dist.get_world_size()
    out: dict[str, torch.Tensor] = {}
    for number, shard in enumerate(shards(engine)):
        if whole and number % world != rank:
            continue  # every rank has all of them: each writes its share
        own = state.get(shard.key, {})
        kinds = {name: value.view(-1) for name, value in own.items() if _is_like(value, shard.flat)}
        for piece in shard.pieces:
            for kind, flat in {WEIGHT: shard.flat, **kinds}.items():
                part = flat[piece.offset : piece.offset + piece.numel]
                out[f"{kind}|{piece.name}|{piece.start}"] = part.detach().to("cpu", copy=True)
            if "step" in own:
                out[f"step|{piece.name}|{piece.start}"] = torch.tensor([float(own["step"])])
    return out


def _is_like(value: Any, flat: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == flat.numel() and value.dim() > 0


class Pieces:
    """Random access to the pieces of all ranks' files."""

    def __init__(self, files: list[Path]) -> None:
        self._files = [safe_open(path, framework="pt") for path in files]
        self._places: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        for file in self._files:
            for key in file.keys():  # noqa: SIM118 (a file is no mapping)
                kind, name, start = key.split("|")
                part = file.get_slice(key)
                place = (int(start), part.get_shape()[0], part)
                self._places.setdefault((kind, name), []).append(place)

    def kinds(self, name: str) -> list[str]:
        """What is stored of a parameter."""
        return [kind for kind, of in self._places if of == name]

    def names(self) -> set[str]:
        """All parameters."""
        return {name for _, name in self._places}

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """`numel` numbers of a flattened parameter (or of its state) from `start` on.

        Raises:
            ValueError: some of them are stored nowhere.
        """
        out, filled = torch.empty(numel), 0
        for first, count, part in self._places.get((kind, name), []):
            low, high = max(first, start), min(first + count, start + numel)
            if low < high:
                out[low - start : high - start] = part[low - first : high - first]
                filled += high - low
        if filled != numel:
            raise ValueError(f"the checkpoint holds {filled} of {numel} numbers of {kind} of {name}")
        return out

    def steps(self, name: str) -> float | None:
        """Steps that the optimiser has taken with a parameter; None before the first."""
        places = self._places.get(("step", name), [])
        return float(places[0][2][0:1][0]) if places else None


@torch.no_grad()
def restore(engine: Any, stored: Pieces) -> None:
    """Puts stored weights and optimiser states into the engine.

    Raises:
        ValueError: the checkpoint is of other parameters.
    """
    ours = {name for name, p in engine.module.named_parameters() if p.requires_grad}
    if ours != stored.names():
        other = sorted(ours ^ stored.names())
        raise ValueError(f"the checkpoint holds other parameters: {', '.join(other[:3])} …")
    for shard in shards(engine):
        if not shard.pieces:
            continue
        _restore_shard(engine.basic_optimizer, shard, stored)
    _refresh_weights(engine.optimizer)


def _restore_shard(optimizer: torch.optim.Optimizer, shard: Shard, stored: Pieces) -> None:
    first = shard.pieces[0].name
    targets = {WEIGHT: shard.flat}
    steps = stored.steps(first)
    if steps is not None:
        state = optimizer.state[shard.key]
        state["step"] = torch.tensor(steps, device=shard.flat.device)
        for kind in stored.kinds(first):
            if kind not in (WEIGHT, "step"):
                state[kind] = torch.zeros_like(shard.key)
                targets[kind] = state[kind].view(-1)
    for kind, flat in targets.items():
        for piece in shard.pieces:
            part = stored.read(kind, piece.name, piece.start, piece.numel)
            flat[piece.offset : piece.offset + piece.numel].copy_(part)


def _refresh_weights(optimizer: Any) -> None:
    """The weights that the forward pass uses, from the float32 ones that were just loaded."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def full_weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters of a module, whole and on the CPU, one after the other; every rank must go along."""
    import deepspeed

    for name, parameter in module.named_parameters(remove_duplicate=False):
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach().to("cpu", copy=True)
        else:
            yield name, parameter.detach().cpu()
