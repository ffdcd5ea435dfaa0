from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_model_dir

from cai_cli.models.loading import load_causal_lm
from cai_cli.training.cpu_logprobs import use_unfused_head


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("labelled", ["replies", "nothing"])
def test_the_plain_head_gives_what_trls_head_gives_values_and_gradients(
    tmp_path: Path, temperature: float, labelled: str
) -> None:
    import torch
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
