"""The engine that samples the replies that `cai rl` trains on: the local engine, or vLLM through TRL's `use_vllm`.

With vLLM the prompts are encoded and replies end as in `cai sample`, but replies are no longer equal to the byte in a
repeated, resumed or differently divided run; the manifest says so.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.engines.choice import Machine, reason_against_vllm

# Settings that `--engine-arg` may give to vLLM's rollouts: TRL's `vllm_NAME` without an option or a fixed value.
ENGINE_ARGS = frozenset(
    {"gpu_memory_utilization", "tensor_parallel_size", "enable_sleep_mode", "max_model_length", "model_impl",
     "server_timeout", "group_port"}
)  # fmt: skip
REPLIES = {
    "local": "a reply depends on the seed, the step and its index alone, up to rounding",
    "vllm": "replies also depend on vLLM's version, kernels and batches: another run samples other replies",
}


class Rollouts(StrEnum):
    """The engine that samples the replies."""

    AUTO = "auto"
    LOCAL = "local"
    VLLM = "vllm"
    VLLM_SERVER = "vllm-server"


def pick_rollouts(requested: Rollouts, base: Path, machine: Machine) -> Rollouts:
    """Return the engine that samples the replies on this machine; prints it where there is a choice.

    Args:
        requested: The option; auto is vLLM where `reason_against_vllm` gives none, else local.
        base: Directory of the policy.
        machine: The machine that trains.

    Raises:
        UsageError: vLLM is requested, but not installed (`missing-dependency`).
        CaiError: vLLM is requested, but there is no CUDA device (`no-device`).
    """
    if requested is Rollouts.LOCAL:
        return requested
    if requested is Rollouts.AUTO:
        reason = reason_against_vllm(base, machine)
        if machine.cuda:
            console.say(
                f"rl: the local engine samples the replies, because {reason}"
                if reason
                else "rl: vLLM samples the replies"
            )
        return Rollouts.LOCAL if reason else Rollouts.VLLM
    if not machine.cuda:  # vLLM repacks the weights on a CPU and cannot replace them; its servers receive them by NCCL
        raise CaiError(
            f"--rollouts {requested}: vLLM takes the weights of each step on CUDA devices only",
            hint="--rollouts local",
            code="no-device",
        )
    if not machine.vllm:
        raise UsageError(
            f"--rollouts {requested}: vLLM is not installed", hint="pip install '.[vllm]'", code="missing-dependency"
        )
    return requested


def trl_arguments(
    rollouts: Rollouts, ends: frozenset[int], longest: int, url: str | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of TRL's config for these rollouts.

    Args:
        rollouts: The engine that samples the replies.
        ends: The token ids that end a reply.
        longest: The most tokens of a prompt and its reply.
        url: Address of the server, for `vllm-server`.
        settings: Settings of vLLM by name, as `--engine-arg` gives them.
    """
    if rollouts is Rollouts.LOCAL:
        return {}
    placed: dict[str, Any] = {"vllm_mode": "server", "vllm_server_base_url": url}
    if rollouts is Rollouts.VLLM:  # asleep, vLLM leaves its memory to training
        placed = {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "vllm_max_model_length": longest}
    given = {f"vllm_{name}": value for name, value in settings.items()}
    return {"use_vllm": True, "generation_kwargs": {"stop_token_ids": sorted(ends)}, **placed, **given}


def rollout_facts(rollouts: Rollouts) -> dict[str, str]:
    """What the manifest says about the rollouts: the engine, and what its replies depend on."""
    if rollouts is Rollouts.LOCAL:
        return {"rollouts": "local", "replies": REPLIES["local"]}
    import vllm

    return {
        "rollouts": f"{rollouts.value}, {vllm.__version__}",
        "replies": REPLIES["vllm"],
        "importance_sampling": "a reply is weighted by its probability in training over that in vLLM",
    }


def check_options(rollouts: Rollouts, batch_size: int | None, url: str | None, settings: Mapping[str, Any]) -> None:
    """Check the options of the rollouts against one another. Raises UsageError."""
    if batch_size and rollouts not in (Rollouts.AUTO, Rollouts.LOCAL):
        raise UsageError("--rollout-batch-size is for --rollouts local", code="option-conflict")
    if bool(url) != (rollouts is Rollouts.VLLM_SERVER):
        raise UsageError(
            "--rollout-url is the address of --rollouts vllm-server",
            hint="give both or neither",
            code="option-conflict",
        )
    if settings and rollouts is Rollouts.LOCAL:
        raise UsageError("--engine-arg is for vLLM", hint="--rollouts vllm", code="option-conflict")
    if unknown := sorted(settings.keys() - ENGINE_ARGS):
        raise UsageError(
            f"--engine-arg {unknown[0]} cannot be set",
            hint=f"one of {', '.join(sorted(ENGINE_ARGS))}",
            code="option-conflict",
        )
