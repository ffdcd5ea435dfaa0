from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from local_models import model_dir
from tiny import tiny_model_dir

from cai_cli.engines.base import Sampling
from cai_cli.engines.local.engine import LocalEngine
from cai_cli.models.loading import load_causal_lm
from cai_cli.training.cpu_logprobs import use_unfused_head


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("labelled", ["replies", "nothing"])
def test_the_plain_head_gives_what_trls_head_gives_values_and_gradients(
    tmp_path: Path, temperature: float, labelled: str
) -> None:
    from trl.trainer.utils import add_fused_lm_head

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 400, (3, 12), generator=generator)
    labels = ids.clone()
    for row, start in enumerate((5, 7, 4) if labelled == "replies" else (12, 12, 12)):
        labels[row, :start] = -100
    if labelled == "replies":
        labels[1, 10:] = -100
    results = []
    tiny_model_dir(tmp_path)
    for plain in (False, True):
        model = load_causal_lm(tmp_path)
        add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy", "is_top1"))
        if plain:
            args = SimpleNamespace(device=torch.device("cpu"))
            use_unfused_head(SimpleNamespace(model=model, args=args), temperature)
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        out.log_probs.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((out, gradient, model))
    (ours, our_gradient, model), (trls, trl_gradient, _) = results[1], results[0]
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(ours, name), getattr(trls, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_gradient, trl_gradient, atol=1e-4, rtol=1e-4)
    assert bool(trls.log_probs.any()) == (labelled == "replies")
    torch.testing.assert_close(model(input_ids=ids).logits, load_causal_lm(tmp_path)(input_ids=ids).logits)


def test_a_model_with_the_plain_head_still_takes_its_cache_when_it_samples() -> None:
    from trl.trainer.utils import add_fused_lm_head

    prompts, sampling = [[5, 6, 7, 8], [9, 10, 11]], Sampling(temperature=0.0, max_new_tokens=6)
    path = str(model_dir("gpt2"))
    engines = [LocalEngine(path, batch_size=2, device="cpu", dtype="float32") for _ in range(2)]
    trained = engines[1].model
    add_fused_lm_head(trained, temperature=1.0, outputs=("log_probs", "entropy", "is_top1"))
    use_unfused_head(SimpleNamespace(model=trained, args=SimpleNamespace(device=torch.device("cpu"))))
    plain, patched = (engine.generate_ids(prompts, (1, 2), sampling) for engine in engines)
    assert plain == patched
