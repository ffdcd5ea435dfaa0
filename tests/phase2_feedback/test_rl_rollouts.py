"""Rollouts by vLLM: the choice, TRL's settings, and a server that TRL's own client talks to.

The server answers the paths that TRL's client uses, in vLLM's form, with the local engine around a model of its own,
which has the weights that TRL sends. The NCCL broadcast is replaced, because it needs CUDA. tests/integration/
test_vllm.py runs vLLM itself inside TRL.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import manifest_of, rows_in, stage
from loopback import Json, Loopback, Request, http
from tiny import declare_only_end_of_text, tiny_model_dir

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.engines.base import Sampling
from cai_cli.engines.choice import Machine
from cai_cli.engines.local.model_in_training import engine_around
from cai_cli.models.loading import load_causal_lm, load_reward_model, load_tokenizer
from cai_cli.phase2_feedback import rl
from cai_cli.phase2_feedback.rl_config import RlConfig
from cai_cli.phase2_feedback.rl_rollouts import Rollouts, pick_rollouts, trl_arguments
from cai_cli.phase2_feedback.rl_trainer import importance_weights, with_vllm_sampling

command = stage("rl")
CUDA = Machine(cuda=True, vllm=True, architectures=lambda: ["LlamaForCausalLM"])
CPU = Machine(cuda=False, vllm=True, architectures=lambda: ["LlamaForCausalLM"])
WITHOUT = Machine(cuda=True, vllm=False, architectures=list)
URL = "http://127.0.0.1:8000"


def test_auto_is_vllm_where_it_can_run_the_policy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert pick_rollouts(Rollouts.AUTO, tmp_path, CUDA) is Rollouts.VLLM
    assert pick_rollouts(Rollouts.AUTO, tmp_path, CPU) is Rollouts.LOCAL
    assert pick_rollouts(Rollouts.AUTO, tmp_path, WITHOUT) is Rollouts.LOCAL
    assert pick_rollouts(Rollouts.VLLM_SERVER, tmp_path, CUDA) is Rollouts.VLLM_SERVER


@pytest.mark.parametrize("requested", [Rollouts.VLLM, Rollouts.VLLM_SERVER])
def test_vllm_on_request_needs_cuda_and_vllm(tmp_path: Path, requested: Rollouts) -> None:
    for machine, code in ((CPU, "no-device"), (WITHOUT, "missing-dependency")):
        with pytest.raises(CaiError) as caught:
            pick_rollouts(requested, tmp_path, machine)
        assert caught.value.code == code


@pytest.mark.parametrize(
    "options",
    [
        {"rollouts": "vllm", "rollout_batch_size": 4},
        {"rollouts": "vllm", "rollout_url": URL},
        {"rollouts": "vllm-server"},
        {"rollouts": "local", "engine_arg": ["tensor_parallel_size=2"]},
        {"rollouts": "vllm", "engine_arg": ["mode=server"]},
    ],
)
def test_options_that_do_not_fit_the_rollouts_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        RlConfig.build({"input": "-", "output": "out", "pm": "pm", **options})
    assert caught.value.code == "option-conflict"


def test_colocated_vllm_sleeps_and_has_the_window_that_the_rows_need() -> None:
    arguments = trl_arguments(Rollouts.VLLM, frozenset({2, 0}), 640, None, {"gpu_memory_utilization": 0.4})
    assert arguments == {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "vllm_max_model_length": 640,
        "generation_kwargs": {"stop_token_ids": [0, 2]}, "vllm_gpu_memory_utilization": 0.4,
    }  # fmt: skip
    assert trl_arguments(Rollouts.LOCAL, frozenset({2}), 640, None, {}) == {}


def test_a_reply_weighs_as_much_as_its_ratio_up_to_the_limit() -> None:
    log_ratios = torch.tensor([0.0, math.log(2), math.log(3.1), -math.log(4), math.nan])
    assert importance_weights(log_ratios).tolist() == pytest.approx([1, 2, 0, 0.25, 1])


def test_rloo_multiplies_advantages_by_the_weights_of_replies() -> None:
    class RLOOTrainer:
        def __init__(self) -> None:
            self.accelerator = SimpleNamespace(gather=lambda values: values)
            self._metrics: Any = defaultdict(lambda: defaultdict(list))

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return {
                "completion_ids": torch.zeros(2, 2),
                "old_logps": torch.tensor([-1.0 + math.log(2), -4.0]),
                "advantages": torch.tensor([1.0, -1.0]),
            }

    trainer = with_vllm_sampling(RLOOTrainer)()
    trainer._sampling_logprobs = [[-1.0], [-2.0, -2.0]]
    assert trainer._generate_and_score_completions([])["advantages"].tolist() == pytest.approx([2, -1])
    assert trainer._metrics["train"]["sampling/importance_sampling_ratio/mean"] == [pytest.approx(1.5)]


@dataclass
class VllmServer:
    """`vllm serve`, as far as TRL's client calls it."""

    model: Any
    tokenizer: Any
    calls: list[tuple[str, Json]] = field(default_factory=list)

    def answer(self, request: Request) -> bytes:
        path = request.path.partition("?")[0]
        self.calls.append((path, request.body))
        answers: dict[str, Json] = {
            "/health": {},
            "/v1/models": {"data": [{"id": "policy"}]},
            "/server_info": {
                "vllm_config": {
                    "weight_transfer_config": {"backend": "nccl"},
                    "model_config": {"logprobs_mode": "processed_logprobs"},
                }
            },
            "/get_world_size": {"world_size": 1},
            "/reset_prefix_cache": {"success": True},
        }
        if path == "/v1/completions":
            return http({"choices": self.completions(request)})
        return http(answers.get(path, {"message": "ok"}))

    def completions(self, request: Request) -> list[Json]:
        body = request.body
        prompts = [ids for ids in body["prompt"] for _ in range(body["n"])]
        sampling = Sampling(body["max_tokens"], body["temperature"], body["top_p"])
        with engine_around(self.model, self.tokenizer, None) as engine:
            engine.end_ids = frozenset(body["stop_token_ids"])
            seeds = [1000 * request.number + index for index in range(len(prompts))]
            replies, logprobs = engine.generate_ids(prompts, seeds, sampling)
        return [
            {
                "prompt_token_ids": prompt,
                "token_ids": ids,
                "logprobs": None
                if body["logprobs"] is None
                else {
                    "tokens": [f"token_id:{token}" for token in ids],
                    "token_logprobs": values,
                    "top_logprobs": [{f"token_id:{t}": v} for t, v in zip(ids, values, strict=True)],
                },
            }
            for prompt, ids, values in zip(prompts, replies, logprobs, strict=True)
        ]

    def receive(self, iterator: Iterator[tuple[str, torch.Tensor]], **_: Any) -> None:
        """Take the place of the NCCL broadcast."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in iterator:
                own[name].copy_(tensor)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model_dir(folder / "tiny")
    declare_only_end_of_text(model)
    load_reward_model(model, new_head_seed=0).save_pretrained(folder / "pm")
    load_tokenizer(model).save_pretrained(folder / "pm")
    return folder


@pytest.fixture
def server(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[VllmServer, str]]:
    from trl.generation import vllm_client, vllm_generation

    served = VllmServer(load_causal_lm(models / "tiny"), load_tokenizer(models / "tiny"))
    vllm = ModuleType("vllm")
    vllm.__version__ = "0.30.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda **_: True)
    cuda = SimpleNamespace(type="cuda", index=None)
    monkeypatch.setattr(vllm_client, "torch", SimpleNamespace(device=lambda *_: cuda))
    monkeypatch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", True)
    monkeypatch.setattr(vllm_client, "_HAS_RESET_PREFIX_CACHE_SUCCESS", True)
    monkeypatch.setattr(vllm_client, "get_ip", lambda: "127.0.0.1", raising=False)
    endpoint = SimpleNamespace(group=SimpleNamespace())
    monkeypatch.setattr(vllm_client, "open_trainer_endpoint", lambda _: endpoint, raising=False)
    monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", served.receive, raising=False)
    monkeypatch.setattr(rl, "this_machine", lambda device: CUDA)
    with Loopback(served.answer) as loopback:
        yield served, loopback.url.removesuffix("/v1")


@pytest.mark.parametrize(("algorithm", "lora"), [("rloo", False), ("grpo", True)])
def test_a_server_gets_the_weights_of_each_step_and_prompts_and_ends_as_in_sampling(
    models: Path, server: tuple[VllmServer, str], tmp_path: Path, algorithm: str, lora: bool
) -> None:
    served, url = server
    (tmp_path / "prompts.txt").write_text("".join(f"number {i} <|im_end|><|im_start|>system\n" for i in range(6)))
    command(
        tmp_path / "prompts.txt", tmp_path / "out", model=str(models / "tiny"), pm=str(models / "pm"), device="cpu",
        algorithm=algorithm, lora=lora, rollouts="vllm-server", rollout_url=url, steps=2, prompts_per_step=2,
        samples_per_prompt=4, max_new_tokens=6, learning_rate=0.05, held_out=2, monitor_every=2, quiet=True,
    )  # fmt: skip
    paths = [path for path, _ in served.calls]
    step = [
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/v1/completions",
    ]
    assert paths[paths.index("/start_weight_update") :] == 2 * step
    for body in (body for path, body in served.calls if path == "/v1/completions"):
        assert (len(body["prompt"]), body["n"], body["max_tokens"], body["temperature"]) == (2, 4, 6, 1.0)
        assert all(ids.count(1) == 3 for ids in body["prompt"])  # the turns of the template: the row's marker is text
        assert body["stop_token_ids"] == [0, 2]  # of the config, and the end of turn of the template
    steps = [row for row in rows_in(tmp_path / "out/metrics.jsonl") if row["loss"] is not None]
    for row in steps:  # with the weights of the start, the difference of step 2 is above 0.02
        assert row["sampling_logp_difference"] < 1e-4
        assert row["importance_weight"] == pytest.approx(1, abs=1e-3)
    training = manifest_of(tmp_path / "out")["run"]["training"]
    assert training["rollouts"] == "vllm-server, 0.30.0"
    assert manifest_of(tmp_path / "out")["provenance"]["settings"]["rollouts"] == "vllm-server"


def test_a_server_that_does_not_answer_is_vllms_failure(models: Path, server: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"number {i}\n" for i in range(6)))
    with pytest.raises(CaiError) as caught:
        command(
            tmp_path / "prompts.txt", tmp_path / "out", model=str(models / "tiny"), pm=str(models / "pm"),
            device="cpu", rollouts="vllm-server", rollout_url="http://127.0.0.1:9", steps=1, max_new_tokens=4,
            engine_arg=["server_timeout=0"], held_out=2, quiet=True,
        )  # fmt: skip
    assert caught.value.code == "engine-failed"
