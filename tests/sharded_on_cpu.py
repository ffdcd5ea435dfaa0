"""`cai` in processes that shard weights on a CPU, where accelerate by itself allows FSDP and DeepSpeed on GPUs only.

`accelerate launch --config_file CONFIG --module sharded_on_cpu sft ...`: torch's FSDP and DeepSpeed do work with gloo,
and everything but the place of the tensors is what runs on GPUs.
"""

import os

os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")

from accelerate import DistributedType, PartialState

PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    from cai_cli.cli.app import main

    main()
