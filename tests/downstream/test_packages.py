"""Packages written for the classic library, as they are: `make test-compat` installs them and runs these tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, compat
from hooked_lm.hooks import HookPoint

# The packages warn of their own matters.
pytestmark = [pytest.mark.packages, pytest.mark.filterwarnings("default")]

MODEL = "demo-tasks-4l"


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    if find_spec("sae_lens") is None or find_spec("circuitsvis") is None:
        pytest.fail("sae-lens and circuitsvis are not installed: run `make test-compat`")
    compat.install()
    yield
    compat.uninstall()


@pytest.fixture(scope="module")
def sae_lens(installed: None) -> ModuleType:
    import sae_lens

    return sae_lens


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing(MODEL)


@pytest.fixture(scope="module")
def spliced(sae_lens: ModuleType) -> Any:
    return sae_lens.HookedSAETransformer.from_pretrained_no_processing(MODEL)


@pytest.fixture(scope="module")
def prompts(model: HookedTransformer) -> Tensor:
    return torch.randint(5, model.cfg.d_vocab, (2, 9), generator=torch.Generator().manual_seed(3))


def random_autoencoder(sae_lens: ModuleType, width: int, hook_name: str) -> Any:
    """Return an autoencoder for a site, with random weights."""
    config = sae_lens.StandardSAEConfig(d_in=width, d_sae=2 * width, device="cpu")
    config.metadata.hook_name = hook_name
    autoencoder = sae_lens.StandardSAE(config)
    generator = torch.Generator().manual_seed(width)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
    return autoencoder


# sae-lens


def test_sae_lens_trains_an_autoencoder_on_the_bundled_model(sae_lens: ModuleType, model: HookedTransformer) -> None:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, model.cfg.d_vocab, (2000, 32), generator=generator)
    site, width = "blocks.1.hook_resid_post", model.cfg.d_model
    config = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_lens.StandardTrainingSAEConfig(d_in=width, d_sae=2 * width, l1_coefficient=1.0),
        model_name=MODEL,
        hook_name=site,
        dataset_path="made here",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=32,
        training_tokens=2**15,
        train_batch_size_tokens=1024,
        n_batches_in_buffer=64,
        store_batch_size_prompts=8,
        lr=1e-3,
        device="cpu",
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=None,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    runner = sae_lens.LanguageModelSAETrainingRunner(
        config, override_dataset=Dataset.from_dict({"tokens": rows.tolist()})
    )
    _, cache = model.run_with_cache(rows[:20], names_filter=site)

    def unexplained(autoencoder: Any) -> float:
        with torch.no_grad():
            left = cache[site] - autoencoder(cache[site])
            return float(left.square().sum() / (cache[site] - cache[site].mean((0, 1))).square().sum())

    before = unexplained(runner.sae)
    after = unexplained(runner.run())
    print(f"variance unexplained: {before:.3f} before training, {after:.3f} after")
    assert after < 0.3 * before


def test_an_autoencoder_is_spliced_exactly_at_every_site(
    sae_lens: ModuleType, model: HookedTransformer, spliced: Any, prompts: Tensor
) -> None:
    sites = [name for name, point in model.hook_dict.items() if point.differentiable]
    assert len(sites) > 80
    for site in sites:
        with torch.no_grad():
            clean = model(prompts)
            _, cache = model.run_with_cache(prompts, names_filter=site)
            autoencoder = random_autoencoder(sae_lens, cache[site].shape[-1], site)
            by_hook = model.run_with_hooks(prompts, fwd_hooks=[(site, lambda x, hook, sae=autoencoder: sae(x))])
            output = spliced.run_with_saes(prompts, saes=[autoencoder])
            assert torch.allclose(output, by_hook, rtol=0, atol=0, equal_nan=True), site
            assert not torch.allclose(output, clean, equal_nan=True), site
            assert torch.equal(spliced(prompts), clean), site
            if not site.endswith("hook_attn_scores"):  # where masked scores have no finite error
                with_error = spliced.run_with_saes(prompts, saes=[autoencoder], use_error_term=True)
                assert torch.allclose(with_error, clean, rtol=0, atol=2e-3), site


def test_features_of_a_spliced_autoencoder_are_cached_and_edited(
    sae_lens: ModuleType, model: HookedTransformer, spliced: Any, prompts: Tensor
) -> None:
    site = "blocks.2.hook_resid_pre"
    autoencoder = random_autoencoder(sae_lens, model.cfg.d_model, site)

    def zero(features: Tensor, hook: HookPoint) -> Tensor:
        features[:, :, 7] = 0.0
        return features

    with torch.no_grad():
        _, plain = model.run_with_cache(prompts, names_filter=site)
        _, cache = spliced.run_with_cache_with_saes(prompts, saes=[autoencoder])
        features = cache[f"{site}.hook_sae_acts_post"]
        torch.testing.assert_close(features, autoencoder.encode(plain[site]), rtol=1e-4, atol=1e-3)
        assert features[:, :, 7].abs().max() > 0
        edited = spliced.run_with_hooks_with_saes(
            prompts, saes=[autoencoder], fwd_hooks=[(f"{site}.hook_sae_acts_post", zero)]
        )
        features[:, :, 7] = 0.0
        expected = model.run_with_hooks(prompts, fwd_hooks=[(site, lambda x, hook: autoencoder.decode(features))])
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-4)
    assert torch.equal(spliced(prompts), model(prompts))


def test_a_transcoder_takes_an_mlps_place(
    sae_lens: ModuleType, model: HookedTransformer, spliced: Any, prompts: Tensor
) -> None:
    before, after = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    width = model.cfg.d_model
    config = sae_lens.TranscoderConfig(
        d_in=width, d_sae=2 * width, d_out=width, device="cpu", apply_b_dec_to_input=False
    )
    config.metadata.hook_name, config.metadata.hook_name_out = before, after
    transcoder = sae_lens.Transcoder(config)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape) / width**0.5)
        _, cache = model.run_with_cache(prompts, names_filter=before)
        replaced = [(after, lambda x, hook: transcoder(cache[before]))]
        expected = model.run_with_hooks(prompts, fwd_hooks=replaced)
        output = spliced.run_with_saes(prompts, saes=[transcoder])
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
        assert torch.equal(spliced(prompts), model(prompts))


# circuitsvis


def test_circuitsvis_renders_an_attention_pattern(model: HookedTransformer) -> None:
    import circuitsvis

    prompt = "Q: What is the capital of France?\nA:"
    _, cache = model.run_with_cache(prompt, remove_batch_dim=True)
    tokens = model.to_str_tokens(prompt)
    page = str(circuitsvis.attention.attention_patterns(tokens=tokens, attention=cache["pattern", 1]))
    (shown,) = re.findall(r"AttentionPatterns,\s*(\{.*\})", page)
    given = json.loads(shown)
    assert given["tokens"] == tokens
    assert torch.allclose(torch.tensor(given["attention"]), cache["pattern", 1])
    assert circuitsvis.logits.token_log_probs(
        model.to_tokens(prompt)[0], model(prompt)[0].log_softmax(-1), model.to_string
    )
