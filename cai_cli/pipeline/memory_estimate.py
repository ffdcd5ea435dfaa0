"""The memory that a training step of a run will take on each device, before anything is loaded."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cai_cli.common.errors import CaiError
from cai_cli.models.names import find_model
from cai_cli.phase2_feedback.rl_config import RlConfig
from cai_cli.runtime.cost import RowFlow
from cai_cli.runtime.shared_options import Device
from cai_cli.training.activations import ModelShape, shape_of_dir
from cai_cli.training.memory import Workload
from cai_cli.training.memory_check import H100, DeviceMemory, Setting, sharding_of, this_device
from cai_cli.training.options import TrainerOptions


def memory_of(config: TrainerOptions, rows: RowFlow, shapes: Mapping[str, ModelShape]) -> Setting | None:
    """What training with these options will hold on each device of this machine.

    On a machine without a GPU, what does not fit its RAM is planned for H100s, as GPU-hours are.

    Args:
        config: The options of a training stage.
        rows: The rows that it reads. The longest is taken to be twice as long as the mean.
        shapes: The models that earlier steps train, by their directories.

    Returns:
        None where a model is not on this machine.
    """
    import torch

    elsewhere = config.device is Device.CUDA and not torch.cuda.is_available()
    try:
        setting = setting_of(config, rows, shapes, H100 if elsewhere else None)
        if setting.device.on_cpu and setting.impossible:
            setting = setting_of(config, rows, shapes, H100)
    except CaiError:
        return None
    return setting


def setting_of(config: Any, rows: RowFlow, shapes: Mapping[str, ModelShape], gpu: DeviceMemory | None) -> Setting:
    """As `memory_of`, on GPUs like `gpu` in place of the devices of this machine.

    Raises:
        CaiError: A model is not on this machine, or there is no such device.
    """
    shape = _shape(config.model, shapes)
    work = _workload(config, rows, shape, shapes)
    sharding = sharding_of(config.accelerate_config, config.num_processes)
    here = config.model_copy(update={"device": Device.CPU}) if gpu else config
    training = here.training_config()
    if gpu:
        training = replace(training, device="cuda")
    if work.replies:  # those of a step are divided among the processes
        work = replace(work, replies=-(-work.replies // sharding.processes))
        if config.batch_size is None:
            training = replace(training, batch_size=-(-training.batch_size // sharding.processes))
    return Setting(shape, training, work, sharding, gpu or this_device(training.device))


def _shape(name: str, shapes: Mapping[str, ModelShape]) -> ModelShape:
    return shapes.get(name) or shape_of_dir(find_model(name, fetch=False))


def _workload(config: Any, rows: RowFlow, shape: ModelShape, shapes: Mapping[str, ModelShape]) -> Workload:
    if isinstance(config, RlConfig):
        scorers = sum(_shape(name, shapes).scorer for name in config.scorers)
        return config.workload(round(2 * rows.prompt_tokens) + config.max_new_tokens, scorers)
    longest = config.max_length if getattr(config, "packing", False) else 2 * (rows.prompt_tokens + rows.reply_tokens)
    work: Workload = config.workload(min(config.max_length, shape.window, max(1, round(longest))))
    return work
