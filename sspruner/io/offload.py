"""Offloading for models larger than one device: blocks are on disk or on several devices, and run one after another."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from sspruner.compute.device import OFFLOADED, moved, offloaded, working_on
from sspruner.errors import ModelError
from sspruner.files import strict_json
from sspruner.files.journal import write_tensors
from sspruner.formats.checkpoint import INDEX, unpickled, weight_files
from sspruner.formats.native import EMBEDDING
from sspruner.graph.causality import check_causal
from sspruner.graph.site import within
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.io.placement import DISK, Place, device_of, places
from sspruner.surgery.record import RECORD

M_MMAP_THRESHOLD = -3  # option of glibc's mallopt: larger blocks are mapped, and unmapped when they are freed
CPU = torch.device("cpu")
REST = ""  # stands for a block: all parameters in no block, or in several


class Blocks:
    """Weights of a model's blocks, on disk. The model, on the meta device, has those of one block at a time.

    Parameters outside the blocks (embeddings, last norm, head), parameters that several blocks share, and blocks with a
    home device stay in memory. A changed block is written to a file of its own in `folder` (`keep`), and read from
    there afterwards. A forward of the whole model works, too: each block is read when it is called, and for a block on
    an accelerator inputs and outputs are moved.
    """

    def __init__(
        self,
        model: Any,
        graph: SSMGraph,
        sources: dict[str, Path],
        where: str,
        folder: Path | None,
        homes: Mapping[str, torch.device],
    ) -> None:
        """Index the checkpoint and install the hooks. Raises ModelError if the tensors do not fit the model.

        sources: name of a tensor in the checkpoint -> its file. homes: block -> device on which it stays.
        """
        self.model, self.where, self.folder, self.homes = model, where, folder, homes
        self.mixers = {
            site.path: site.layout.sizes.get("hidden") for site in graph.layers
        }  # path -> width of its input
        count = len(model.get_submodule(graph.blocks))
        self.blocks = [f"{graph.blocks}.{i}" for i in range(count)]
        self.sources = sources
        self.kept: set[str] = set()
        self._held: Counter[str] = Counter()
        self._shared = _shared(model, self.blocks)
        self._conversions = _conversions(model)
        self._raw: dict[str, list[str]] = {}  # block -> the checkpoint's names of its tensors
        self._index()
        self._calls: dict[str, tuple[torch.device, ExitStack]] = {}  # device of the input, clean-up of the call
        self._load(REST)
        for block in self.blocks:
            module = model.get_submodule(block)
            module.register_forward_pre_hook(self._enters(block), with_kwargs=True)
            module.register_forward_hook(self._leaves(block), always_call=True)
            if block in homes:
                self._enter(block)  # stays in memory
        setattr(model, OFFLOADED, self)

    def block_of(self, path: str) -> str:
        """Return the block that alone has the module or parameter at `path`; "" for what is always in memory."""
        if path in self._shared:
            return REST
        return next((block for block in self.blocks if within(path, block)), REST)

    @contextmanager
    def resident(self, path: str) -> Iterator[None]:
        """Context manager that keeps the block around `path` in memory.

        Changes are lost afterwards unless `keep` was called.
        """
        block = self.block_of(path)
        self._enter(block)
        try:
            yield
        finally:
            self._leave(block)

    def keep(self, block: str) -> None:
        """Write a block in its current form to its file in the folder, atomically."""
        write_tensors(self._file(block), self.tensors(block))
        self.kept.add(block)

    def take_kept(self, block: str) -> None:
        """Read a block from now on from its file in the folder, written by an earlier run. The model has its sizes."""
        if not self._file(block).is_file():
            raise ModelError(f"{self._file(block)} is missing: start without --resume")
        self.kept.add(block)

    def tensors(self, block: str) -> dict[str, torch.Tensor]:
        """Return a block's own parameters, and the buffers that are saved with them, by their names in the model."""
        module = self.model.get_submodule(block)
        values = module.state_dict(prefix=f"{block}.", keep_vars=True)
        return {name: value for name, value in values.items() if self.block_of(name) == block}

    def rest(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are always in memory, by their names in the model."""
        return {n: v for n, v in self.model.state_dict(keep_vars=True).items() if self.block_of(n) == REST}

    def _file(self, block: str) -> Path:
        assert self.folder is not None  # streaming.check_offloaded
        return self.folder / f"{block}.safetensors"

    def _enter(self, block: str) -> None:
        if block != REST and not self._held[block]:
            self._load(block)
        self._held[block] += 1

    def _leave(self, block: str) -> None:
        self._held[block] -= 1
        if block != REST and not self._held[block]:
            for name, value in self.tensors(block).items():
                _set(self.model, name, torch.empty_like(value, device="meta"), value)

    def _enters(self, block: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            if "forward" in vars(module):  # its forward is replaced (calibrate.replay)
                return None
            self._enter(block)
            home = self.homes.get(block, CPU)
            if home.type == "cpu":  # the caller decides on the device
                return None
            stack = ExitStack()
            stack.enter_context(working_on(module, home))
            self._calls[block] = (args[0] if args else kwargs["hidden_states"]).device, stack
            return moved(args, home), moved(kwargs, home)

        return hook

    def _leaves(self, block: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if "forward" in vars(module):
                return None
            self._leave(block)
            if block not in self._calls:
                return None
            origin, stack = self._calls.pop(block)
            stack.close()
            return moved(out, origin)

        return hook

    def _load(self, block: str) -> None:
        """Load a block's values."""
        if block in self.kept:
            names = self.model.state_dict(keep_vars=True)
            for name, value in load_file(self._file(block)).items():
                _set(self.model, name, value.to(self.homes.get(block, CPU)), names[name])
            return
        with _opened({self.sources[raw] for raw in self._raw[block]}) as tensors:
            # Read here, since transformers reads in threads, whose heaps keep freed memory.
            self._convert({EMBEDDING.get(raw, raw): tensors[raw][...] for raw in self._raw[block]})
        if missing := [name for name, value in self._own(block).items() if value.is_meta]:
            raise ModelError(f"model {self.where}: its weights lack {missing[0]}, or have it in another shape")
        for path, width in self.mixers.items():
            if block != REST and within(path, block):
                check_causal(self.model.get_submodule(path), path, width)
        for name, value in self._own(block).items() if block in self.homes else ():
            _set(self.model, name, value.to(self.homes[block]), value)

    def _own(self, block: str) -> dict[str, torch.Tensor]:
        return self.rest() if block == REST else self.tensors(block)

    def _convert(self, tensors: dict[str, Any]) -> None:
        """Write tensors of the checkpoint into the model, converted to its names, form and dtype."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        from sspruner.io.source import tie

        dtype = self.model.config.dtype
        settings = LoadStateDictConfig(
            dtype=dtype, dtype_plan=self.model._get_dtype_plan(dtype), weight_mapping=self._conversions
        )
        with _silent():
            convert_and_load_state_dict_in_model(self.model, tensors, settings)
        tie(self.model)

    def _index(self) -> None:
        """Determine which of the checkpoint's tensors belong to which block.

        Raises ModelError for an unused tensor in a cut model, which is built to the exact sizes.
        """
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        names = self.model.state_dict()
        self._raw = {block: [] for block in (REST, *self.blocks)}
        for raw in self.sources:
            known = EMBEDDING.get(raw, raw)  # mamba_ssm's names
            name, _ = rename_source_key(known, renamings, converters, self.model.base_model_prefix, names)
            if name in names:
                self._raw[self.block_of(name)].append(raw)
            elif hasattr(self.model.config, RECORD):
                raise ModelError(f"model {self.where}: config.json knows nothing of {raw}, which is among its weights")


def offload(
    model: Any,
    where: str,
    weights: Path,
    folder: Path | None,
    device_map: str | Mapping[str, Place] | None = None,
    max_memory: Mapping[Place, int | str] | None = None,
) -> Any:
    """Load the weights of a model on the meta device (`io.skeleton`), its blocks one by one when they are used.

    weights     folder of the checkpoint
    folder      folder for changed blocks
    device_map  which blocks stay on a device instead (`io.placement`)

    Returns the model; None if the map puts all of it in one place in memory.
    """
    graph = trace(model)
    if not graph.blocks:
        raise ModelError(f"model {where}: its mixers are not inside a list of blocks; it cannot be read block by block")
    homes: dict[str, torch.device] = {}
    if device_map is not None:
        blocks = [f"{graph.blocks}.{i}" for i in range(len(model.get_submodule(graph.blocks)))]
        block_places = places(model, blocks, _outside(model, blocks), device_map, max_memory)
        homes = {block: device_of(place) for block, place in block_places.items() if place != DISK}
        if len(homes) == len(blocks) and len({*homes.values()}) == 1:
            return None
    _return_what_is_freed()
    Blocks(model, graph, tensor_files(weights), where, folder, homes)
    return model


def _return_what_is_freed() -> None:
    """Make glibc return the memory of every freed tensor to the system: its heap would keep pieces of each block."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor of a checkpoint, by the tensor's name there."""
    files: dict[str, Path] = {}
    for file in weight_files(folder):
        with _opened({file}) as tensors:
            files |= dict.fromkeys(tensors, file)
    return files


def saved_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of a checkpoint's first tensor, as transformers uses it if the config names none."""
    with _opened({weight_files(folder)[0]}) as tensors:
        return next(iter(tensors.values()))[...].dtype  # type: ignore[no-any-return]


def write_weights(model: Any, folder: Path) -> None:
    """Write the weights of a model whose blocks are on disk, like `model.save_pretrained`: one file per block."""
    blocks: Blocks = offloaded(model)
    parts = [REST, *blocks.blocks]
    weight_map: dict[str, str] = {}
    size = 0
    part_folder = folder / "part"  # a separate folder, since save_pretrained removes existing shards
    for number, block in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        with blocks.resident(block), _silent():
            tensors = blocks.rest() if block == REST else blocks.tensors(block)
            model.save_pretrained(part_folder, state_dict={n: value.detach().cpu() for n, value in tensors.items()})
        (part_folder / "model.safetensors").rename(folder / name)
        with safe_open(folder / name, framework="pt") as written:
            weight_map |= dict.fromkeys(written.keys(), name)
        size += (folder / name).stat().st_size
    for file in part_folder.iterdir():
        file.rename(folder / file.name)
    part_folder.rmdir()
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"model.safetensors{INDEX}").write_text(strict_json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shared(model: nn.Module, blocks: list[str]) -> set[str]:
    """Return the names, inside blocks, of parameters that other modules share."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if uses[id(p)] > 1 and any(within(name, block) for block in blocks)
    }


def _outside(model: nn.Module, blocks: list[str]) -> int:
    """Return the bytes of the parameters outside all blocks."""
    return sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if not any(within(name, block) for block in blocks)
    )


def _conversions(model: Any) -> list[Any]:
    """Return transformers' conversions from the checkpoint's tensors to those of this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model) or [])


def _set(model: nn.Module, name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """Replace a parameter or buffer by `value` without conversion."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=like.requires_grad)


@contextmanager
def _silent() -> Iterator[None]:
    """Context manager that hides transformers' progress bars, of which there would be one per block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _opened(files: set[Path]) -> Iterator[dict[str, Any]]:
    """Context manager that returns the tensors of files by name, without reading them."""
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in files:
            if file.suffix == ".safetensors":
                opened = stack.enter_context(safe_open(str(file), framework="pt"))
                tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            else:
                tensors |= unpickled(file)
        yield tensors
