"""L1: the pages in device memory, as the engine's attention reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hicache_core.errors import SpecError
from hicache_core.kv.spec import Component, KVSpec
from hicache_core.pools.allocator import PageAllocator
from hicache_core.pools.limits import check_memory
from hicache_core.pools.mapping import map_memory

Buffers = Sequence[Sequence[torch.Tensor]]

LAYER_ALIGNMENT = 4096


class DevicePool:
    """Paged tensors, one for each component and layer, and their allocator.

    Attributes:
        spec: what a token's row is.
        page_size: tokens of a page.
        n_pages: pages.
        device: where the tensors are.
        allocator: which pages are free; owner thread only.
        buffers: ``buffers[component][i]`` of shape (n_pages, page_size, *component.shape) and the
            component's dtype, for the i-th of the layers that have it (``KVSpec.layers_of``). Slot
            ``page * page_size + n`` of the flattened first two dimensions is token n of the page.
        groups: the pools of the spec's groups, in that order; a unit of a group is a page of its
            pool.
    """

    def __init__(
        self,
        spec: KVSpec,
        page_size: int,
        n_pages: int,
        device: str | torch.device = "cpu",
        *,
        buffers: Buffers | None = None,
        groups: Sequence[DevicePool] = (),
    ) -> None:
        """Allocates tensors of zeros (faulted in on a CPU), unless ``buffers`` are given.

        Args:
            spec: shapes and dtypes of the KV.
            page_size: tokens in a page.
            n_pages: pages of the pool.
            device: torch device of the tensors.
            buffers: tensors of the engine to use instead, ``buffers[component][i]`` of shape
                ``(n_pages, page_size, *component.shape)`` for the i-th layer that has it.
            groups: a pool for each group of ``spec``, in that order.

        Raises:
            SpecError: page_size or n_pages is not positive, or ``buffers`` do not fit.
            NotEnoughMemory: a pool on the CPU is larger than what is left.
        """
        if page_size < 1:
            raise SpecError(f"page_size must be positive, found {page_size}")
        self.spec = spec
        self.page_size = page_size
        self.n_pages = n_pages
        # As tensors name it: "cuda" is the current GPU, "cuda:0" for instance.
        self.device = torch.empty(0, device=device).device
        self.allocator = PageAllocator(n_pages)
        self.groups = tuple(groups)
        self.buffers = self._allocate() if buffers is None else [list(b) for b in buffers]
        self._check()

    @classmethod
    def with_groups(
        cls,
        spec: KVSpec,
        page_size: int,
        n_pages: int,
        n_units: Sequence[int],
        device: str | torch.device = "cpu",
    ) -> DevicePool:
        """A pool and those of its groups.

        Args:
            spec: shapes and dtypes of the KV.
            page_size: tokens in a page.
            n_pages: full pages.
            n_units: units of each group of ``spec``.
            device: torch device of the tensors.

        Raises:
            SpecError, NotEnoughMemory: as the constructor.
        """
        groups = [
            cls(group.spec, group.page_size(page_size), n, device)
            for group, n in zip(spec.groups, n_units, strict=True)
        ]
        return cls(spec, page_size, n_pages, device, groups=groups)

    @classmethod
    def from_buffers(cls, spec: KVSpec, page_size: int, buffers: Buffers) -> DevicePool:
        """A pool over tensors that an engine owns; nothing is copied.

        Args:
            spec: what a token's row is.
            page_size: tokens of a page.
            buffers: for each component, for each layer that has it, a tensor of shape
                (n_pages, page_size, *component.shape). A tensor of slots
                (n_slots, *component.shape) is brought there by ``paged``.

        Raises:
            SpecError: names the tensor that does not fit the spec.
        """
        if not buffers or not buffers[0]:
            raise SpecError("a device pool needs a tensor for each component and layer; none given")
        first = buffers[0][0]
        return cls(spec, page_size, len(first), first.device, buffers=buffers)

    def _allocate(self) -> list[list[torch.Tensor]]:
        """One allocation, cut into components and layers; each starts on a 4 KiB boundary."""
        rows = self.page_size * self.n_pages
        parts = [
            (component, _aligned(component.row_nbytes * rows), len(self.spec.layers_of(component)))
            for component in self.spec.components
        ]
        flat = self._memory(sum(step * n_layers for _, step, n_layers in parts))
        buffers: list[list[torch.Tensor]] = []
        start = 0
        for component, step, n_layers in parts:
            end = start + step * n_layers
            layers = flat[start:end].view(n_layers, step)
            buffers.append([self._typed(layer, component) for layer in layers])
            start = end
        return buffers

    def _memory(self, nbytes: int) -> torch.Tensor:
        """Zeros, uint8 (nbytes,)."""
        if self.device.type != "cpu" or not nbytes:  # nothing cannot be mapped
            return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        check_memory(nbytes, "device pool (on the CPU)")
        return torch.frombuffer(map_memory(nbytes), dtype=torch.uint8)

    def _typed(self, layer: torch.Tensor, component: Component) -> torch.Tensor:
        shape = (self.n_pages, self.page_size, *component.shape)
        dtype: torch.dtype = getattr(torch, component.dtype)
        return layer.view(dtype)[: math.prod(shape)].view(shape)

    def _check(self) -> None:
        spec = self.spec
        pools = [(pool.spec, pool.page_size) for pool in self.groups]
        if pools != [(group.spec, group.page_size(self.page_size)) for group in spec.groups]:
            raise SpecError(
                f"the spec has groups {[group.name for group in spec.groups]}: give a pool of the "
                f"right spec and page size for each, in this order; found {len(pools)} pools"
            )
        needed = [len(spec.layers_of(component)) for component in spec.components]
        if [len(layers) for layers in self.buffers] != needed:
            raise SpecError(
                f"need tensors for {len(spec.components)} components of {needed} layers, "
                f"found {[len(layers) for layers in self.buffers]}"
            )
        for component, layers in zip(spec.components, self.buffers, strict=True):
            shape = (self.n_pages, self.page_size, *component.shape)
            for layer, tensor in zip(spec.layers_of(component), layers, strict=True):
                found = (tuple(tensor.shape), str(tensor.dtype), tensor.device)
                wanted = (shape, f"torch.{component.dtype}", self.device)
                if found != wanted:
                    raise SpecError(
                        f"{component.name} of layer {layer}: need shape, dtype and device "
                        f"{wanted}, found {found}"
                    )
                if not tensor[0, 0].is_contiguous():
                    raise SpecError(f"{component.name} of layer {layer}: a row has gaps inside")


def paged(slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """A view of slots (n_slots, *row) as whole pages (n_slots // page_size, page_size, *row).

    Slots behind the last whole page are left out.
    """
    n_pages = len(slots) // page_size
    return slots[: n_pages * page_size].view(n_pages, page_size, *slots.shape[1:])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // LAYER_ALIGNMENT) * LAYER_ALIGNMENT
