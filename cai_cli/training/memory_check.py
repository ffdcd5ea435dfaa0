"""Estimates before a model is loaded how much memory training will take on each device, and refuses what cannot fit."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.training import distributed, launcher
from cai_cli.training.activations import ModelShape, shape_of_dir
from cai_cli.training.config import TrainingConfig
from cai_cli.training.memory import GIB, MemoryPlan, Sharding, Workload, plan, static_plan

# Share of the free memory that a setting must leave unused to be recommended: for the CUDA context, the buffers of
# NCCL and cuBLAS, and fragments.
RESERVE = 0.07
GPU_COUNTS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of the device of one process.

    Attributes:
        name: What it is called in messages.
        free: Bytes that are free.
        on_cpu: Whether it is the memory of the machine, which processes share.
    """

    name: str
    free: float
    on_cpu: bool = False

    @property
    def size(self) -> str:
        """Its free memory as `78.0 GiB free on the GPU`."""
        return f"{self.free / GIB:.1f} GiB {self.name}"


H100 = DeviceMemory("of an H100", 78 * GIB)


def this_device(device: str) -> DeviceMemory:
    """The memory of this process's device, "cpu" or "cuda"."""
    if device == "cpu":
        return DeviceMemory("of RAM", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), on_cpu=True)
    import torch

    return DeviceMemory("free on the GPU", torch.cuda.mem_get_info()[0])


def sharding_here() -> Sharding:
    """What the processes of this training divide, as the launcher set it."""
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0"))
    if distributed.weights_are_sharded():
        stage = 3
    offloads = os.environ.get("FSDP_OFFLOAD_PARAMS") == "true" or any(
        os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") != "none"
        for what in ("OPTIMIZER", "PARAM")
    )
    return Sharding(distributed.world_size(), stage, offloads)


def sharding_of(accelerate_config: str | None, num_processes: int | None) -> Sharding:
    """What the processes of `accelerate launch` with these options divide. Raises UsageError."""
    if accelerate_config is None:
        return Sharding(num_processes or 1)
    given = launcher.read_config(accelerate_config)
    fsdp, deepspeed = given.get("fsdp_config") or {}, given.get("deepspeed_config") or {}
    stage = 3 if given.get("distributed_type") == "FSDP" else int(deepspeed.get("zero_stage", 0))
    offloads = bool(fsdp.get("fsdp_offload_params")) or any(
        deepspeed.get(f"offload_{what}_device", "none") != "none" for what in ("optimizer", "param")
    )
    return Sharding(launcher.group_size(accelerate_config, num_processes), stage, offloads)


@dataclass(frozen=True)
class Setting:
    """The settings of a trainer whose memory is estimated, and the options by which they differ from the user's."""

    shape: ModelShape
    training: TrainingConfig
    work: Workload
    sharding: Sharding
    device: DeviceMemory
    options: tuple[str, ...] = ()

    @cached_property
    def memory(self) -> MemoryPlan:
        """What each device holds."""
        return plan(self.shape, self.training, self.work, self.sharding, self.device.free)

    @property
    def on_one_device(self) -> int:
        """Number of processes that share the memory: all of a machine on a CPU, else one."""
        return self.sharding.processes if self.device.on_cpu else 1

    @property
    def impossible(self) -> bool:
        """Whether it cannot fit. On a CPU, where memory can be swapped out, what is there all the time decides."""
        needed = self.memory.held if self.device.on_cpu else self.memory.peak
        return needed * self.on_one_device > self.device.free

    @property
    def recommended(self) -> bool:
        """Whether it fits with a reserve."""
        return self.memory.peak * self.on_one_device <= (1 - RESERVE) * self.device.free

    @property
    def arithmetic(self) -> str:
        """The parts, their sum and the memory of the device."""
        batch = f" activations of {self.training.batch_size * self.work.sequences} x {self.work.length:,} tokens"
        processes = f" in each of {self.on_one_device} processes" if self.on_one_device > 1 else ""
        return f"{str(self.memory).replace(' activations', batch, 1)}{processes}, of {self.device.size}"

    def as_json(self) -> dict[str, Any]:
        """The parts in bytes, as `cai run --dry-run --json` prints them."""
        parts = {name.replace(" ", "_"): round(size) for name, size in self.memory.parts.items()}
        device = {"device": self.device.name.removeprefix("of "), "free": round(self.device.free)}
        return {**parts, "peak": round(self.memory.peak), **device, "fits": not self.impossible}

    def refuse_impossible(self, stage: str) -> None:
        """Raises CaiError (`not-enough-memory`) where it cannot fit, with the nearest settings that do."""
        if not self.impossible:
            return
        fitting = [
            f"{' '.join(one.options)} ({one.memory.peak / GIB:.1f} GiB{' on each' * (one.sharding.processes > 1)})"
            for one in nearest(self)
        ]
        raise CaiError(
            f"{stage} does not fit: {self.arithmetic}",
            hint=f"it fits with {', or with '.join(fitting)}" if fitting else "no option makes it fit such a device",
            code="not-enough-memory",
        )


def check_memory(stage: str, base: Path, training: TrainingConfig, work: Workload) -> None:
    """Print how much memory training will take on each device; nothing where it is a small part of a CPU's memory.

    Called by all processes together, before the model is loaded.

    Args:
        stage: The stage, for messages.
        base: Directory of the model to train, of which only the config is read.
        training: The settings of the trainer.
        work: What the stage does with the model.

    Raises:
        CaiError: It cannot fit (`not-enough-memory`).
    """

    def of_this_process() -> Setting | None:
        here = Setting(shape_of_dir(base), training, work, sharding_here(), this_device(training.device))
        if here.device.on_cpu and _is_small(here):
            return None
        here.memory  # noqa: B018 - computed once, not by every process
        return here

    here = distributed.from_rank_zero(of_this_process)
    if here is None:
        return
    here.refuse_impossible(stage)
    console.say(f"{stage}: memory {'' if here.device.on_cpu else 'on each GPU '}{here.arithmetic}")
    if not here.recommended:
        console.warn(f"{stage}: little or no memory is left; a smaller --batch-size needs less")


def _is_small(setting: Setting) -> bool:
    """Whether a rough bound is below half of the memory, so that nothing needs to be traced."""
    shape, work = setting.shape, setting.work
    static = static_plan(shape, setting.training, work, setting.sharding)
    tokens = setting.training.batch_size * work.sequences * work.length
    rough = 4 * tokens * (50 * shape.hidden * shape.layers + 4 * shape.vocabulary * bool(work.scored))
    return 2 * (static.peak + rough) * setting.on_one_device < setting.device.free


def nearest(setting: Setting) -> list[Setting]:
    """The settings that fit: the nearest on as many devices, and the nearest with the same training on more GPUs."""
    fitting = [next((s for s in _on_same_devices(setting) if s.recommended), None)]
    if not setting.device.on_cpu:
        fitting.append(next((s for s in _on_more_gpus(setting) if s.recommended), None))
    return [one for one in fitting if one]


def _on_same_devices(setting: Setting) -> Iterator[Setting]:
    """Settings that need less and less memory: without another result first, then adapters in place of all weights."""
    for one in _with_other_memory(setting):
        if _with_batch(one, 1).recommended:
            batch = setting.training.batch_size
            yield from (_with_batch(one, size) for size in range(batch, 0, -1) if batch % size == 0)


def _with_other_memory(setting: Setting) -> Iterator[Setting]:
    if not setting.training.checkpoints_activations:
        setting = _changed(setting, "--gradient-checkpointing on", gradient_checkpointing="on")
    yield setting
    if setting.work.scorer_parameters:
        yield replace(
            setting, work=replace(setting.work, scorer_parameters=0), options=(*setting.options, "--pm-url URL")
        )
    if setting.training.lora_rank is None:
        if not setting.device.on_cpu and setting.sharding.stage < 3:  # bitsandbytes does not divide its state
            yield _changed(setting, "--optimizer adamw-8bit", optimizer="adamw-8bit")
        setting = _changed(setting, "--lora", lora_rank=16)
        yield setting
    if setting.training.quantize is None and not setting.device.on_cpu:
        yield _changed(setting, "--quantize 4bit", quantize="4bit")


def _on_more_gpus(setting: Setting) -> Iterator[Setting]:
    """Settings with the same training, its weights sharded over more GPUs."""
    if not setting.training.checkpoints_activations:
        setting = _changed(setting, "--gradient-checkpointing on", gradient_checkpointing="on")
    for count in GPU_COUNTS:
        if count > setting.sharding.processes or setting.sharding.stage < 3:
            options = (*setting.options, f"--accelerate-config fsdp2 --num-processes {count}")
            yield replace(setting, sharding=Sharding(count, 3), options=options)


def _changed(setting: Setting, option: str, **fields: Any) -> Setting:
    return replace(setting, training=replace(setting.training, **fields), options=(*setting.options, option))


def _with_batch(setting: Setting, size: int) -> Setting:
    training = setting.training
    if size == training.batch_size:
        return setting
    accumulation = training.gradient_accumulation * training.batch_size // size
    option = f"--batch-size {size}"
    if not setting.work.replies:  # in `rl` the accumulation follows from the replies of a step
        option += f" --gradient-accumulation {accumulation}"
    return _changed(setting, option, batch_size=size, gradient_accumulation=accumulation)
