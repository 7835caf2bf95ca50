"""What train_gpt2.py promises, each promise as a test. Offline, on a CPU, on tiny models."""

import contextlib
import copy
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import RUN, SHAPE, Bomb, assert_same, broken, history, times
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fineweb
import train_gpt2
from train_gpt2 import (
    CHOICES,
    GPT,
    MLP,
    PRESETS,
    CausalSelfAttention,
    ChunkedLoss,
    DataLoaderLite,
    GPTConfig,
    KVCache,
    SampleConfig,
    TrainConfig,
    Worker,
    configure_optimizers,
    divide_step,
    evaluate,
    fast_precision,
    fit_to_corpus,
    flops_per_token,
    get_lr,
    inference,
    is_compiled,
    list_checkpoints,
    load_checkpoint,
    load_model,
    orthogonalize,
    padded,
    prepare_net,
    read_log,
    safe_device,
    sample,
    sample_texts,
    save_checkpoint,
    split_range,
    start_worker,
    train,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("sandbox")
mixed = pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])  # precision

SIZES = {  # blocks, heads, channels, parameters
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}
MATMUL_FLOPS = Worker.matmul_flops  # which `sandbox` replaces
TINY = SHAPE | dict(vocab_size=384, bias=True)  # padded: the tests' tokenizer has 300


@torch.no_grad()
def randomize(model: nn.Module, std: float) -> nn.Module:
    """Biases and LayerNorms are random too, and all so large that each of them matters."""
    for name, p in model.named_parameters():
        p.normal_(std=std) if p.dim() == 2 else p.normal_(float(name.endswith("weight")), 0.2)
    return model


def tiny(mode: str = "eval", std: float = 0.2, **shape) -> GPT:
    return randomize(GPT(GPTConfig(**TINY | shape)), std).train(mode == "train")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(*shape: int, high: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=generator(seed))


def autocast(enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


# ------------------------------------------------------------------------------ Configuration


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_whole_recipe(name):
    shape, cfg = PRESETS[name]
    world_size = 1 if name == "quick" else 8
    assert cfg.total_batch_size % (cfg.micro_batch_size * shape.block_size * world_size) == 0
    if name != "quick":
        assert (shape.n_layer, shape.n_head, shape.n_embd) == SIZES[name][:3]
        assert (cfg.total_batch_size, cfg.max_steps, cfg.warmup_steps) == (2**19, 19073, 715)


@pytest.mark.parametrize("config", [GPTConfig, TrainConfig, SampleConfig])
def test_a_wrong_value_is_an_error_that_names_it(config):
    for field in dataclasses.fields(config):
        numbers = (-1, -(2**70), 2**70, math.nan, math.inf, -math.inf)
        choices = ("", "ADAMW", "cuda:0") if field.name in CHOICES else ()
        for value in choices if isinstance(field.default, str) else numbers:
            with pytest.raises(ValueError, match=f"{field.name}={value}|{field.name}={value!r}"):
                config(**{field.name: value})


def test_heads_have_to_divide_the_channels():
    with pytest.raises(ValueError, match="n_embd=100 .* n_head=12"):
        GPTConfig(n_embd=100)


@pytest.mark.parametrize("config", [GPTConfig(), TrainConfig()])
def test_a_config_does_not_change(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_head = config.seed = 0


def test_a_whole_number_may_stand_where_a_fraction_is_expected():
    assert TrainConfig(max_lr=1, grad_clip=2).grad_clip == 2
    assert SampleConfig(temperature=0).temperature == 0


# -------------------------------------------------------------------------------------- Model


@pytest.mark.parametrize("name", SIZES)
def test_the_four_sizes_have_the_parameters_of_openais(name):
    n_layer, n_head, n_embd, parameters = SIZES[name]
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_params() == parameters


@pytest.fixture(scope="module")
def small():
    """GPT-2 124M, without its numbers."""
    with torch.device("meta"):
        return GPT(GPTConfig())


def test_the_parts_of_gpt2_small_have_the_parameters_of_openais(small):
    def size(module):
        return sum(p.numel() for p in module.parameters())

    parts = small.transformer
    assert {size(block) for block in parts.h} == {7_087_872} and size(parts.h) == 85_054_464
    assert (size(parts.wte), size(parts.wpe), size(parts.ln_f)) == (38_597_376, 786_432, 1_536)


def test_a_token_of_gpt2_small_costs_855_megaflops(small):
    assert round(flops_per_token(small, 1024) / 1e6) == 855


def test_without_biases_gpt2_small_has_none_in_any_linear_or_layer_norm():
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False))
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    biases = 12 * (3 + 1 + 4 + 1 + 2) * 768 + 768  # Linear and LayerNorm layers; ln_f
    assert model.num_params() == 124_439_808 - biases == 124_337_664
    assert tiny(bias=False)(tokens(2, 9)).isfinite().all()


@mixed
def test_no_token_sees_a_later_one(mixed):
    model, idx = tiny(), tokens(1, 32)
    with autocast(mixed):
        before = model(idx)
        for t in range(32):
            changed = idx.clone()
            changed[:, t] += 1
            after = model(changed)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.isclose(before[:, t:], after[:, t:]).all(dim=2).any()


def attention_by_hand(attn: CausalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """Equation 1 of Vaswani et al., head by head and token by token."""
    C, y = x.size(2), torch.zeros_like(x)
    hs = C // attn.n_head
    q, k, v = (x @ attn.c_attn.weight.T + attn.c_attn.bias).split(C, dim=2)
    for b, i, t in itertools.product(range(x.size(0)), range(0, C, hs), range(x.size(1))):
        head = slice(i, i + hs)
        scores = k[b, : t + 1, head] @ q[b, t, head] / math.sqrt(hs)
        y[b, t, head] = scores.softmax(dim=0) @ v[b, : t + 1, head]
    return y @ attn.c_proj.weight.T + attn.c_proj.bias


@mixed
@pytest.mark.parametrize("T", [1, 2, 17])
def test_attention_is_what_the_equation_says(T, mixed):
    attn, x = tiny().transformer.h[0].attn, torch.randn(2, T, 32)
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(2, 1, T, T)
    close = dict(atol=0.05, rtol=0.05, check_dtype=False) if mixed else {}
    with autocast(mixed):
        for y in (attn(x), attn(x, mask)):
            torch.testing.assert_close(y, attention_by_hand(attn, x), **close)


def test_the_mlp_has_the_tanh_gelu_of_gpt2():
    mlp = MLP(GPTConfig(n_embd=1, n_head=1)).requires_grad_(False)
    for p in mlp.parameters():
        p.zero_()
    mlp.c_fc.weight[0] = mlp.c_proj.weight[:, 0] = 1.0  # one detector, which passes x on
    for x, y in [(-0.5, -0.15429), (1.2, 1.06170), (2.0, 1.95460)]:  # exact: 1.06192
        assert mlp(torch.tensor([[x]])).item() == pytest.approx(y, abs=3e-5)


def test_a_block_adds_to_the_stream_what_it_makes_of_the_normalised_stream():
    block, x = tiny().transformer.h[0], torch.randn(2, 8, 32)

    def layer_norm(ln, x):
        x = x - x.mean(dim=2, keepdim=True)
        return x / (x.pow(2).mean(dim=2, keepdim=True) + 1e-5).sqrt() * ln.weight + ln.bias

    after = x + block.attn(layer_norm(block.ln_1, x))
    torch.testing.assert_close(block(x), after + block.mlp(layer_norm(block.ln_2, after)))


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="33 tokens .* block_size=32"):
        tiny()(tokens(1, 33))


def test_left_padded_rows_with_a_mask_give_what_the_rows_alone_give():
    block, lengths, T = tiny(std=0.1).transformer.h[0], (3, 9, 12), 12
    x, mask = torch.randn(3, T, 32), torch.ones(T, T, dtype=torch.bool).tril().repeat(3, 1, 1, 1)
    for i, n in enumerate(lengths):
        mask[i, :, T - n :, : T - n] = False
    for together, row, n in zip(block(x, mask), x, lengths, strict=True):
        torch.testing.assert_close(together[T - n :], block(row[None, T - n :])[0])


def loss_and_gradients(loss, x, weight, targets):
    x, weight = (t.clone().requires_grad_() for t in (x, weight))
    value = loss(x, weight, targets)
    (value * 0.5).backward()
    return value.detach(), x.grad, weight.grad


def chunked_loss(x, weight, targets):
    return ChunkedLoss.apply(x, weight, targets, torch.is_grad_enabled())


def plain_loss(x, weight, targets):
    return F.cross_entropy((x @ weight.T).float().flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("B, T, V", [(1, 1, 1), (2, 7, 300), (3, 50, 2**18), (1, 5, 2**20 + 3)])
def test_the_loss_in_chunks_and_its_gradients_are_pytorchs(B, T, V):
    x, weight, targets = torch.randn(B, T, 8) * 3, torch.randn(V, 8), torch.randint(V, (B, T))
    if V > 1:
        targets[0, 0] = (weight @ x[0, 0]).argmin()  # whose probability is near 0
    expected = loss_and_gradients(plain_loss, x, weight, targets)
    torch.testing.assert_close(loss_and_gradients(chunked_loss, x, weight, targets), expected)


def test_in_bf16_the_loss_in_chunks_is_as_near_to_the_truth_as_pytorchs():
    x, weight, targets = torch.randn(4, 16, 32), torch.randn(300, 32), torch.randint(300, (4, 16))
    truth = loss_and_gradients(plain_loss, x, weight, targets)
    with autocast(True):
        ours = loss_and_gradients(chunked_loss, x, weight, targets)
        theirs = loss_and_gradients(plain_loss, x, weight, targets)
    for a, b, true in zip(ours, theirs, truth, strict=True):
        assert a.dtype == torch.float32 and (a - true).norm() < 1.2 * (b - true).norm() + 1e-3


def test_the_loss_in_chunks_changes_none_of_its_inputs_and_refuses_second_derivatives():
    x, weight, targets = torch.randn(2, 3, 8), torch.randn(300, 8), torch.randint(300, (2, 3))
    x.requires_grad_()
    before = x.detach().clone(), weight.clone()
    loss = chunked_loss(x, weight, targets)
    (grad,) = torch.autograd.grad(loss * loss, x, create_graph=True)
    assert_same((x.detach(), weight), before)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_loss_in_chunks_takes_inputs_in_any_order_in_memory():
    x, weight, targets = torch.randn(7, 2, 8), torch.randn(8, 300), torch.randint(300, (2, 7))
    given = x.transpose(0, 1), weight.T, targets
    expected = loss_and_gradients(plain_loss, *given)
    torch.testing.assert_close(loss_and_gradients(chunked_loss, *given), expected)


def test_an_evaluation_computes_no_gradient(monkeypatch):
    model, idx = tiny(), tokens(2, 16)
    products = []
    for owner, name in ((torch, "mm"), (torch.Tensor, "__matmul__")):
        f = getattr(owner, name)
        count = lambda *args, f=f, **how: products.append(0) or f(*args, **how)  # noqa: E731
        monkeypatch.setattr(owner, name, count)
    loss = model(idx, idx).item()
    assert len(products) == 3  # logits, and the gradients of x and weight
    with torch.no_grad():
        assert model(idx, idx).item() == loss and len(products) == 4


def test_compiled_or_not_the_loss_is_the_mean_of_cross_entropy(monkeypatch):
    model, idx, targets = tiny("train"), tokens(2, 16), tokens(2, 16, seed=1)
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(idx, targets), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(model(idx, targets), expected)


def test_head_and_embedding_are_one_tensor_with_the_gradients_of_both_uses():
    model, idx, targets = tiny("train"), tokens(2, 16), tokens(2, 16, seed=1)
    wte = model.transformer.wte.weight
    assert model.lm_head.weight is wte and sum(p is wte for p in model.parameters()) == 1
    model(idx, targets).backward()
    read, predicted = (wte.detach().clone().requires_grad_() for _ in range(2))
    apart = {"transformer.wte.weight": read, "lm_head.weight": predicted}
    torch.func.functional_call(model, apart, (idx, targets), tie_weights=False).backward()
    torch.testing.assert_close(wte.grad, read.grad + predicted.grad)
    assert read.grad.abs().sum() > 0 and predicted.grad.abs().sum() > 0


def test_a_new_model_has_gpt2s_spread_of_weights():
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=1000, block_size=256))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03) and abs(p.mean()) < std / 30
        else:
            assert (p == ("ln_" in name and name.endswith("weight"))).all()


def test_the_first_loss_is_that_of_a_uniform_guess_and_a_little_more():
    config = GPTConfig(n_layer=1, n_embd=768, vocab_size=8192, block_size=256)
    loss = GPT(config)(tokens(4, 256, high=8192), tokens(4, 256, high=8192, seed=1)).item()
    assert loss == pytest.approx(math.log(8192) + 0.02**2 * 768 / 2, abs=0.04)  # 9.011 + 0.154


def test_the_residual_stream_starts_as_wide_however_deep_the_model():
    def width(n_layer, scaled=True):
        model, found = GPT(GPTConfig(64, 512, n_layer, n_head=4, n_embd=64)), []
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight") and not scaled:
                p.data *= math.sqrt(2 * n_layer)
        model.transformer.ln_f.register_forward_pre_hook(lambda _, args: found.extend(args))
        model(tokens(4, 64))
        return found[0].std().item()

    assert width(24) == pytest.approx(width(2), rel=0.1)
    assert width(24, scaled=False) > 3 * width(24)


@mixed
def test_dropout_acts_in_four_places_and_in_training_only(mixed):
    model, idx = tiny("train", dropout=0.3), tokens(1, 16)
    places = [m for m in model.modules() if isinstance(m, (nn.Dropout, CausalSelfAttention))]
    assert len(places) == 1 + 3 * 2  # the embedding; in a block attention, its output, the MLP's

    def set_dropout(rate, *places):
        for place in places:
            setattr(place, "p" if isinstance(place, nn.Dropout) else "dropout", rate)

    with autocast(mixed):
        for place in places:
            set_dropout(0.0, *places)
            assert_same(model(idx), model(idx))
            set_dropout(0.3, place)
            assert not torch.allclose(model(idx), model(idx))
        set_dropout(0.3, *places)
        evaluated = model.eval()(idx)
        set_dropout(0.0, *places)
        assert_same(model.train()(idx), evaluated)


# ----------------------------------------------------------------------------------- Sampling


def naive_generate(model, idx, n, n_vocab=None, **how):
    """Without a cache: the whole window anew for each token."""
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size :])[:, -1, :n_vocab]
        idx = torch.cat((idx, sample(logits, **how)), dim=1)
    return idx


@torch.no_grad()
def test_a_cache_takes_several_tokens_at_first_and_then_one_at_a_time():
    model, idx = tiny(), tokens(2, 9)
    whole, caches = model.hidden(idx), [KVCache(32) for _ in range(2)]
    torch.testing.assert_close(model.hidden(idx[:, :5], caches=caches), whole[:, :5])
    for t in range(5, 8):
        x = model.hidden(idx[:, t : t + 1], caches=caches)
        torch.testing.assert_close(x, whole[:, t : t + 1])
    with pytest.raises(ValueError, match="2 tokens after 8 cached ones"):
        model.hidden(idx[:, 8:10].expand(2, 2), caches=caches)


@pytest.mark.parametrize("start, n", [(1, 30), (5, 60), (32, 5), (40, 8)])
@pytest.mark.parametrize("how", [
    dict(temperature=0), dict(), dict(temperature=0.7, top_k=20), dict(top_p=0.8, n_vocab=300),
])  # fmt: skip
@torch.no_grad()
def test_generation_with_the_cache_gives_the_tokens_of_generation_without(how, start, n):
    """Also where the window slides, past 32 tokens."""
    model, idx = tiny(), tokens(3, start)
    got = model.generate(idx, n, generator=generator(), **how)
    assert torch.equal(got, naive_generate(model, idx, n, generator=generator(), **how))
    assert len(got[:, start:].unique()) > 2


@pytest.mark.parametrize("how", [
    dict(temperature=0), dict(), dict(top_k=50), dict(top_p=0.9), dict(top_k=400, temperature=5.0),
])  # fmt: skip
def test_no_id_beyond_the_tokenizers_is_ever_sampled(how):
    model = tiny()
    with torch.no_grad():  # the padded rows are by far the likeliest
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[300:] = 10.0
    assert (model(tokens(4, 8)).argmax(dim=2) >= 300).all()
    assert model.generate(tokens(16, 4), 20, n_vocab=300, **how).max() < 300


ROWS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40)


@given(ROWS, st.integers(1, 50), st.floats(0.01, 1), st.floats(0.1, 5))
def test_top_k_and_top_p_draw_from_the_likeliest_only(row, k, p, temperature):
    logits = torch.tensor([row])
    probabilities = (logits[0].double() / temperature).softmax(dim=0)
    for _ in range(5):
        for how in (dict(top_k=k), dict(top_p=p)):
            token = sample(logits, temperature, **how).item()
            likelier = probabilities[logits[0] > logits[0, token]]
            assert len(likelier) < how.get("top_k", 99)
            assert likelier.sum() < how.get("top_p", 9) + 1e-5


@given(ROWS.filter(lambda row: sorted(row)[-1] > sorted(row)[-2]))
def test_every_way_to_sample_has_greedy_as_its_limit(row):
    best = max(range(len(row)), key=row.__getitem__)
    for how in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-9), dict(temperature=0, top_k=9)):
        assert sample(torch.tensor([row] * 4), **how).tolist() == [[best]] * 4


@pytest.mark.parametrize("how, kept", [
    (dict(), 5), (dict(top_k=3), 3), (dict(top_p=0.9), 3), (dict(temperature=2.0), 5),
])  # fmt: skip
def test_tokens_are_drawn_as_often_as_they_are_likely(how, kept):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    drawn = sample(logits.expand(20_000, 5), **how).flatten().bincount(minlength=5) / 20_000
    expected = (logits[:kept] / how.get("temperature", 1)).softmax(dim=0)
    torch.testing.assert_close(drawn[:kept], expected, atol=0.015, rtol=0)
    assert not drawn[kept:].any()


def test_a_row_that_stopped_repeats_the_stop_token_until_all_have():
    model, idx = tiny(), tokens(6, 4)
    free = model.generate(idx, 25, generator=generator())[:, 4:]
    stop = free[0, 7].item()
    rows = model.generate(idx, 25, stop=stop, generator=generator())[:, 4:]
    ends = [row.tolist().index(stop) if stop in row else 25 for row in free]
    for row, expected, end in zip(rows, free, ends, strict=True):
        assert torch.equal(row[:end], expected[:end]) and (row[end:] == stop).all()
    assert ends[0] <= 7 and max(ends) > ends[0]
    first = model.generate(idx[:1], 1, temperature=0)
    assert torch.equal(model.generate(idx[:1], 25, temperature=0, stop=first[0, 4].item()), first)


def test_sampling_has_its_own_randomness_and_leaves_the_model_as_it_was():
    model, state = tiny("train", dropout=0.5), torch.get_rng_state()
    for how in (dict(temperature=0), dict()):
        assert_same(*(model.generate(tokens(2, 4), 9, generator=generator(), **how) for _ in "ab"))
        assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prompt_has_block_size_tokens_at_most(tokenizer):
    with pytest.raises(ValueError, match="prompt is empty"):
        tiny().generate(torch.zeros(1, 0, dtype=torch.long), 5)
    with pytest.raises(ValueError, match=r"has 40\d* tokens; this model takes at most 32"):
        sample_texts(tiny(), tokenizer, Worker(), "the" * 40, n=1, seed=0, max_new_tokens=5)


def test_without_a_prompt_a_sample_is_what_follows_endoftext(tokenizer):
    model, how = tiny(), dict(temperature=0, max_new_tokens=20)
    idx = model.generate(torch.tensor([[tokenizer.eot_token]]), n_vocab=300, **how)[0, 1:].tolist()
    expected = tokenizer.decode(idx).split(fineweb.EOT)[0]
    assert sample_texts(model, tokenizer, Worker(), "", n=1, **how) == [expected]


def test_a_sample_ends_before_the_text_that_stops_it(tokenizer):
    model, how = tiny(), dict(n=9, max_new_tokens=30)
    whole = sample_texts(model, tokenizer, Worker(), "the abc", **how)
    stop = whole[0][12:14]
    stopped = sample_texts(model, tokenizer, Worker(), "the abc", stop=stop, **how)
    assert stopped == ["the abc" + text[7:].split(stop)[0] for text in whole] != whole
    in_prompt = sample_texts(model, tokenizer, Worker(), "the abc", stop="abc", **how)
    assert all(text.startswith("the abc") for text in in_prompt)


@pytest.mark.parametrize("temperature", [1e-40, 1e-6])
def test_a_temperature_near_0_is_0(temperature):
    logits = torch.randn(4, 300)
    assert_same(sample(logits, temperature), sample(logits, 0))


def test_samples_begin_with_the_prompt_and_end_before_endoftext(tokenizer):
    model, how = tiny(), dict(n=200, max_new_tokens=30)

    def write(seed):
        return sample_texts(model, tokenizer, Worker(), "the abc", seed=seed, **how)

    texts = write(0)
    assert len(set(texts)) > 150 and all(text.startswith("the abc") for text in texts)
    assert not any(fineweb.EOT in text for text in texts)
    assert min(map(len, texts)) < 20 < max(map(len, texts))
    assert texts == write(0) != write(1)


def test_endoftext_in_a_prompt_stays_text(tokenizer):
    prompt = f"a{fineweb.EOT}b"
    (text,) = sample_texts(tiny(), tokenizer, Worker(), prompt, n=1, seed=0, max_new_tokens=3)
    assert text.startswith(prompt)


@torch.no_grad()
def test_in_bf16_too_the_newest_token_sees_all_that_are_cached():
    model, idx, caches = tiny(std=0.1), tokens(2, 9), [KVCache(32) for _ in range(2)]
    with autocast(True):
        whole = model.hidden(idx)
        model.hidden(idx[:, :8], caches=caches)
        newest = model.hidden(idx[:, 8:], caches=caches)
    torch.testing.assert_close(newest, whole[:, 8:], atol=0.1, rtol=0.05)


def test_top_p_draws_no_token_more_than_it_takes_to_reach_p():
    logits = torch.tensor([[0.0, 0.0, -math.inf]] * 200)  # probabilities 1/2, 1/2 and 0
    assert len(sample(logits, top_p=0.5, generator=generator()).unique()) == 1
    assert len(sample(logits, top_p=0.51, generator=generator()).unique()) == 2


@pytest.mark.parametrize("how", [dict(top_k=2), dict(top_p=1.0)])
def test_the_temperature_also_acts_among_the_likeliest_tokens(how):
    logits = torch.tensor([[math.log(4), 0.0]] * 20_000)
    drawn = sample(logits, 2.0, generator=generator(), **how)
    assert drawn.double().mean() == pytest.approx(1 / 3, abs=0.015)  # 2 : 1, and not 4 : 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_computed_in_the_workers_precision(tokenizer, dtype):
    model, found = tiny(), set()
    model.transformer.h[0].mlp.register_forward_hook(lambda _, args, y: found.add(y.dtype))
    sample_texts(model, tokenizer, Worker(dtype=dtype), "the ", n=1, max_new_tokens=2)
    assert found == {dtype}


@pytest.mark.parametrize("name, in_fp32", [("AMD EPYC", True), ("Intel(R) Xeon(R)", False)])
def test_weights_are_packed_where_that_is_faster(name, in_fp32, monkeypatch):
    """In fp32 this is not so on Intel's processors."""
    has_bf16 = fast_precision("cpu") == "bf16"  # oneDNN packs nothing for a CPU without it
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(cpu_name=name), raising=False)
    model = GPT(GPTConfig(**TINY))
    for dtype, expected in ((torch.float32, in_fp32), (torch.bfloat16, has_bf16)):
        with Worker(dtype=dtype).inference(model, rows=1):
            assert ("forward" in vars(model.lm_head)) == expected


def test_generation_inside_of_inference_leaves_that_as_it_was():
    model, idx = tiny("train"), tokens(2, 8)
    with inference(model):
        before = model(idx)
        model.generate(idx, 3)
        assert_same(model(idx), before)
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and model(idx).requires_grad


# ------------------------------------------------------------------- Optimizers and schedule


def test_what_decays_in_gpt2_small_is_its_50_matrices():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304))
    (adamw,) = configure_optimizers(model, TrainConfig())
    decayed, rest = adamw.param_groups
    sizes = [(len(g["params"]), sum(p.numel() for p in g["params"])) for g in (decayed, rest)]
    assert sizes == [(50, 124_354_560), (98, 121_344)]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    for group in (decayed, rest):
        assert (group["betas"], group["eps"], group["fused"]) == ((0.9, 0.95), 1e-8, True)


def test_muon_gets_the_blocks_matrices_and_adamw_all_else():
    model = tiny()
    names = {p: name for name, p in model.named_parameters()}
    adamw, muon = (
        [names[p] for group in optimizer.param_groups for p in group["params"]]
        for optimizer in configure_optimizers(model, TrainConfig(optimizer="muon"))
    )
    assert sorted(adamw + muon) == sorted(names.values())
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sorted(muon) == sorted(f"transformer.h.{i}.{x}.weight" for i in (0, 1) for x in layers)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32), (3, 8, 24)])
def test_orthogonalize_keeps_directions_and_makes_all_as_strong(shape):
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    strengths = torch.linspace(0.05, 1, u.size(-1))
    for scale in (1e-3, 1e3):
        inner = u.mT @ orthogonalize(scale * u * strengths @ vt) @ vt.mT
        values = inner.diagonal(dim1=-2, dim2=-1)
        assert 0.6 < values.min() and values.max() < 1.25
        torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_muon_steps_as_its_paper_says():
    model = tiny()
    muon = configure_optimizers(model, TrainConfig(optimizer="muon"))[1]
    matrices = [p for group in muon.param_groups for p in group["params"]]
    expected = {p: (p.detach().clone(), torch.zeros_like(p)) for p in matrices}
    for _ in range(3):
        for p, (weight, average) in expected.items():
            p.grad = torch.randn_like(p)
            average = 0.95 * average + 0.05 * p.grad
            ahead = 0.05 * p.grad + 0.95 * average
            parts = ahead.chunk(3) if len(ahead) == 3 * ahead.size(1) else [ahead]  # q, k and v
            update = torch.cat([orthogonalize(a) * 0.2 * math.sqrt(max(a.shape)) for a in parts])
            assert update.pow(2).mean().sqrt() == pytest.approx(0.2, rel=0.25)  # AdamW's
            expected[p] = weight * (1 - 0.01 * 0.1) - 0.01 * update, average
        for group in muon.param_groups:
            group["lr"] = 0.01
        muon.step()
        for p, (weight, _) in expected.items():
            torch.testing.assert_close(p.detach(), weight)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_floor():
    cfg = TrainConfig()
    rates, peak = [get_lr(step, cfg) for step in range(cfg.max_steps + 100)], cfg.warmup_steps
    assert rates[0] == pytest.approx(6e-4 / 715) and rates[peak - 1] == max(rates) == 6e-4
    assert rates[peak] == pytest.approx(6e-4) and rates[peak + 1] < rates[peak]
    assert rates[(peak + cfg.max_steps) // 2] == pytest.approx(6e-4 * 0.55, rel=1e-3)
    assert rates[cfg.max_steps] == pytest.approx(6e-5)
    assert set(rates[cfg.max_steps :]) == {rates[-1]}


@given(st.integers(0, 30), st.integers(1, 60), st.floats(0, 1), st.floats(1e-6, 1))
def test_any_schedule_rises_and_falls_within_its_limits(warmup, n, ratio, peak):
    cfg = TrainConfig(max_steps=n, warmup_steps=warmup, min_lr_ratio=ratio, max_lr=peak)
    rates = [get_lr(step, cfg) for step in range(100)]
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


# --------------------------------------------------------------------------------------- Data

T = 8
LENGTHS = (100, 57, T + 1, T, 0, 33)  # tokens of a shard: 12, 7, 1, 0, 0 and 4 windows
N_WINDOWS = 24


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
    """Shards whose tokens count up, so that a window says where it is from."""
    folder = tmp_path_factory.mktemp("numbered")
    for split, (i, n) in itertools.product(("train", "val"), enumerate(LENGTHS)):
        np.save(folder / f"{split}_{i}.npy", np.arange(1000 * i, 1000 * i + n, dtype=np.uint16))
    return folder


def order(folder, B, world_size=1, n=96, seed=1337):
    """The first tokens of the first n windows, in the order in which all ranks take them."""
    where = [(rank, world_size, seed) for rank in range(world_size)]
    loaders, taken = [DataLoaderLite(folder, "train", B, T, *w) for w in where], []
    for i in range(math.ceil(n / B / world_size)):
        for x, y in (loader.batch(i) for loader in loaders):
            assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
            assert torch.equal(x + 1, y) and torch.equal(x[:, :1] + torch.arange(T), x)
            taken += x[:, 0].tolist()
    return taken[:n]


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_every_window_is_taken_once_an_epoch(numbered, B, world_size, seed):
    taken = order(numbered, B, world_size, 3 * N_WINDOWS, seed)
    windows = [1000 * i + T * w for i, n in enumerate(LENGTHS) for w in range((n - 1) // T)]
    epochs = [taken[i : i + N_WINDOWS] for i in range(0, 3 * N_WINDOWS, N_WINDOWS)]
    assert all(sorted(epoch) == windows != epoch for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_has_the_same_tokens_for_any_batch_and_number_of_workers(numbered):
    for B, world_size in [(4, 2), (2, 4), (1, 1), (12, 2), (3, 1)]:
        assert order(numbered, B, world_size) == order(numbered, 8)
    assert order(numbered, 8, seed=1) != order(numbered, 8, seed=2)


@pytest.mark.parametrize("workers", [1, 2, 3, 64])
@pytest.mark.parametrize("preset", ["quick", "gpt2", "gpt2-xl"])
def test_any_number_of_workers_shares_the_windows_of_a_step(preset, workers):
    shape, cfg = PRESETS[preset]
    T, windows = shape.block_size, cfg.total_batch_size // shape.block_size
    for device in ("cpu", "cuda"):
        worker = Worker(world_size=workers, device=torch.device(device))
        if workers > windows:
            with pytest.raises(ValueError, match="64 workers cannot share a step of 32 windows"):
                divide_step(cfg, T, worker)
            continue
        B, micro_steps = divide_step(cfg, T, worker)
        shares = split_range(range(windows), workers)
        batches = [batch for share in shares for batch in split_range(share, micro_steps)]
        assert [i for batch in batches for i in batch] == list(range(windows))
        sizes = [len(batch) for batch in batches]
        assert max(sizes) == B and min(sizes) >= max(1, B - 1)
        most = min(cfg.micro_batch_size, 8192 // T) if device == "cpu" else cfg.micro_batch_size
        assert B <= most
        assert (
            micro_steps == 1 or windows / workers / (micro_steps - 1) > most
        )  # no more than needed


def test_more_shards_than_files_may_be_open_are_read(tmp_path):
    pytest.importorskip("resource")
    for i in range(300):
        np.save(tmp_path / f"x_train_{i:03}.npy", np.full(9, i, dtype=np.uint16))
    already = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 100
    with limit("RLIMIT_NOFILE", already + 100):
        loader = DataLoaderLite(tmp_path, "train", 1, T)
        assert sorted(int(loader.batch(i)[0][0, 0]) for i in range(300)) == list(range(300))


def test_iterating_gives_the_batches_one_after_the_other(numbered):
    loader = DataLoaderLite(numbered, "train", 5, T, rank=1, world_size=2)
    for i, batch in zip(range(12), loader, strict=False):
        assert_same(batch, loader.batch(i))


def test_any_file_with_the_split_in_its_name_is_a_shard(tmp_path):
    for name in ("edufineweb_train_000001", "train_a", "x_train_y", "val_0", "strain_0", "b_val_1"):
        np.save(tmp_path / f"{name}.npy", np.arange(9, dtype=np.uint16))
    assert [DataLoaderLite(tmp_path, s, 1, T).n_windows for s in ("train", "val")] == [3, 2]


def test_an_id_beyond_the_vocabulary_is_an_error_that_names_the_shard(numbered):
    loader = DataLoaderLite(numbered, "val", 4, T, n_vocab=1040)
    loader.batch(0)
    with pytest.raises(ValueError, match=r"val_1\.npy: id 10\d\d in a vocabulary of 1040"):
        for i in range(1, 6):
            loader.batch(i)


@pytest.fixture
def alike(tmp_path):
    """Loaders of two shards with ten windows each -> the windows of an epoch, shard by shard."""
    for i in range(2):
        np.save(tmp_path / f"train_{i}.npy", np.arange(10 * T + 1, dtype=np.uint16) + 1000 * i)
    firsts = DataLoaderLite(tmp_path, "train", 800, T).batch(0)[0][:, 0]  # of 40 epochs
    return [[row[:10].tolist(), row[10:].tolist()] for row in firsts.view(40, 20)]


def test_each_epoch_takes_the_shards_in_another_order(alike):
    assert {epoch[0][0] // 1000 for epoch in alike} == {0, 1}


def test_each_epoch_takes_the_windows_of_a_shard_in_another_order(alike):
    orders = {tuple(part) for epoch in alike for part in epoch if part[0] < 1000}
    assert len(orders) == 40


def test_shards_of_the_same_length_are_shuffled_differently(alike):
    one, other = ([i % 1000 for i in part] for part in alike[0])
    assert sorted(one) == sorted(other) and one != other


def test_validation_reads_its_windows_in_the_order_of_the_shards(numbered):
    x, _ = DataLoaderLite(numbered, "val", N_WINDOWS, T).batch(0)
    assert x[:, 0].tolist() == sorted(x[:, 0].tolist())


def test_the_order_of_shards_does_not_depend_on_the_file_system(numbered, monkeypatch):
    expected, glob = order(numbered, 8), Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, how: reversed(sorted(glob(path, how))))
    assert order(numbered, 8) == expected


@pytest.mark.parametrize("batch, nearest", [(2**19 + 700, 2**19 + 1024), (2**19 + 300, 2**19)])
def test_a_step_that_does_not_divide_is_told_the_nearest_that_does(batch, nearest):
    with pytest.raises(ValueError, match=f"total_batch_size={batch} .* nearest is {nearest}$"):
        divide_step(TrainConfig(total_batch_size=batch), 1024, Worker())


# --------------------------------------------------------------------------------- Evaluation


class Alone(Worker):
    """One of several workers, which hears only of itself."""

    def gather(self, *values):
        return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize("val_tokens", [640, 1000, 10**9])
def test_validation_is_the_same_tokens_for_any_batch_and_number_of_workers(
    data_dir, tokenizer, val_tokens, monkeypatch
):
    model, losses, seen, window = tiny(std=0.05), [], [], DataLoaderLite.window
    monkeypatch.setattr(DataLoaderLite, "window", lambda self, i: seen.append(i) or window(self, i))
    n = min(val_tokens // 32, DataLoaderLite(data_dir, "val", 1, 32).n_windows)
    for B, world_size in [(1, 1), (7, 1), (4, 2), (64, 3), (3, 4)]:
        loss = 0.0
        for rank in range(world_size):
            loader = DataLoaderLite(data_dir, "val", B, 32, rank, world_size)
            loss += evaluate(model, loader, val_tokens, tokenizer, Alone(rank, world_size))[0]
        losses.append(loss)
        assert seen == list(range(n))
        seen.clear()
    assert max(losses) - min(losses) < 1e-5


def test_bits_a_byte_are_nats_over_the_bytes_of_the_decoded_targets(data_dir, tokenizer):
    model, loader = tiny("train", std=0.05, dropout=0.5), DataLoaderLite(data_dir, "val", 8, 32)
    loss, bits = evaluate(model, loader, 10**9, tokenizer)
    assert model.training  # again: dropout was off
    x, y = loader.windows(range(loader.n_windows))
    nats = F.cross_entropy(model.eval()(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    text = tokenizer.decode([i for i in y.flatten().tolist() if i != tokenizer.eot_token])
    assert (y == tokenizer.eot_token).sum() > 5
    assert loss == pytest.approx(nats / y.numel(), rel=1e-5)
    assert bits == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_an_evaluation_reads_at_least_one_window(data_dir, tokenizer):
    model, loader = tiny(std=0.05), DataLoaderLite(data_dir, "val", 4, 32)
    assert evaluate(model, loader, 1, tokenizer) == evaluate(model, loader, 32, tokenizer)


# --------------------------------------------------------------------- Checkpoints and the log


def begin(log_dir, data_dir, dtype=torch.float32, resume=False, signals=(), prepare=None,
          shape=(), **cfg):  # fmt: skip
    """Train a new tiny model in this process; prepare(model) is called before."""
    cfg = TrainConfig(**RUN | dict(data_dir=str(data_dir), log_dir=str(log_dir)) | cfg)
    log_dir.mkdir(exist_ok=True)
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(**TINY | dict(shape)))
    if prepare:
        prepare(model)
    return train(model, cfg, Worker(dtype=dtype), resume, signals)


def at_micro_steps(model, numbers, action):
    """Call action(loss) after these forward passes of training; what it returns is the new loss."""
    count = itertools.count()
    model.register_forward_hook(
        lambda _, args, loss: action(loss) if model.training and next(count) in numbers else None
    )


def weights(log_dir):
    return load_checkpoint(list_checkpoints(log_dir)[-1])[0].state_dict()


@pytest.fixture(scope="session")
def run(data_dir, tmp_path_factory):
    """The directory of a finished run."""
    log_dir = tmp_path_factory.mktemp("run") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "matmul_flops", lambda worker: 1e12)
        assert begin(log_dir, data_dir, shape=dict(dropout=0.1)) == 0
    return log_dir


def test_a_checkpoint_gives_back_the_model_and_its_configs(run):
    model, state = load_checkpoint(run / "checkpoint_000012.pt")
    assert dataclasses.asdict(model.config) == TINY | dict(dropout=0.1)
    assert state["step"] == 12 and TrainConfig(**state["train_config"]).log_dir == str(run)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert_same(model.state_dict(), state["model"])
    assert model(tokens(1, 8), tokens(1, 8)).isfinite()


def test_the_newest_two_checkpoints_stay_and_every_tenth(tmp_path):
    for step in (*range(5, 110, 5), 112):  # the last on a signal
        save_checkpoint(tmp_path, 50, step, nothing=None)
    steps = [torch.load(path, weights_only=True)["step"] for path in list_checkpoints(tmp_path)]
    assert steps == [50, 100, 105, 112]


def test_checkpoints_are_listed_by_their_steps(tmp_path):
    for step in (1_000_000, 999_999, 5):
        (tmp_path / f"checkpoint_{step:06d}.pt").touch()
    assert [int(path.stem[11:]) for path in list_checkpoints(tmp_path)] == [5, 999_999, 1_000_000]


def test_copies_that_somebody_made_of_checkpoints_are_left_alone(tmp_path):
    for name in ("best", "000005_copy", "000005 (1)"):
        (tmp_path / f"checkpoint_{name}.pt").touch()
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, 50, step, nothing=None)
    assert [path.stem[11:] for path in list_checkpoints(tmp_path)] == ["000010", "000015"]
    assert len(list(tmp_path.iterdir())) == 5


@contextlib.contextmanager
def limit(name, size):
    """This process cannot have more of something."""
    resource = pytest.importorskip("resource")
    what = getattr(resource, name)
    old = resource.getrlimit(what)
    resource.setrlimit(what, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, old)


@contextlib.contextmanager
def full_disk(room):
    """No file can be larger than this."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with limit("RLIMIT_FSIZE", room):
        yield
    signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(run, tmp_path):
    path = tmp_path / "checkpoint_000012.pt"
    shutil.copy(run / path.name, path)
    before, state = path.read_bytes(), load_checkpoint(path)[1]
    for room in (0, 1, 1000, 100_000, len(before) - 1):
        with full_disk(room), pytest.raises(OSError, match=path.name):
            save_checkpoint(tmp_path, 10, **state)
        assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def refuse(path):
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.fixture
def damaged(run, tmp_path):
    """A function that writes bytes as a checkpoint, and the bytes of a whole one."""
    path = tmp_path / "checkpoint_000012.pt"
    return lambda content: path.write_bytes(content) and path or path, (
        run / path.name
    ).read_bytes()


def test_a_truncated_checkpoint_is_detected(damaged):
    write, whole = damaged
    lengths = random.Random(0).sample(range(len(whole)), times(50, 1000))
    for length in (0, 1, 100, *lengths, len(whole) - 1):
        refuse(write(whole[:length]))


def test_a_flipped_byte_in_a_checkpoint_is_detected_or_of_no_effect(damaged):
    write, whole = damaged
    rng, end = random.Random(0), len(whole)
    directory = whole.index(b"PK\x01\x02")  # the archive's own; no checksum guards it
    flips = [(rng.randrange(end), 1 << rng.randrange(8)) for _ in range(times(100, 2000))]
    flips += [(rng.randrange(directory, end), 1 << rng.randrange(8)) for _ in range(200)]
    flips += [(directory + 10, method) for method in (8, 12, 14, 255)]  # how it is compressed
    flips += [(whole.rindex(b"archive/data/3") - 8, 16)]  # a folder, of which torch reads nothing
    (model, state), detected = load_checkpoint(write(whole)), 0
    for at, bits in flips:
        content = bytearray(whole)
        content[at] ^= bits
        try:
            found, found_state = load_checkpoint(write(content))
        except ValueError as e:
            assert "checkpoint_000012.pt" in str(e) and "\n" not in str(e)
            detected += 1
            continue
        assert found.config == model.config and found_state["step"] == 12
        assert_same(found.state_dict(), model.state_dict())
        for a, b in zip(found_state["optimizers"], state["optimizers"], strict=True):
            assert_same(a["state"], b["state"])
    assert detected > 150


def test_a_hostile_checkpoint_never_runs(tmp_path):
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"model": Bomb()}))
    for name, zipped in [("zip.pt", True), ("old.pt", False)]:
        state = dict(config=TINY, model=Bomb(), step=1)
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    for name in ("raw.pt", "zip.pt", "old.pt"):
        refuse(tmp_path / name)
    assert not Path("exploded").exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert Path("exploded").exists()  # it would have


@pytest.mark.parametrize("config", [
    {}, None, 5, "x", [1], TINY | {"n_embd": -32}, TINY | {"n_embd": 2**60}, TINY | {"n_head": 0},
    TINY | {"n_layer": 10**9}, TINY | {"n_layer": "2"}, TINY | {"n_layer": None},
    TINY | {"n_embd": 64}, TINY | {"n_layer": 1}, TINY | {"vocab_size": 2.5},
    TINY | {"surprise": 1}, TINY | {"n_embd": math.nan},
    TINY | {"n_layer": 20, "n_embd": 2**16, "n_head": 1},
])  # fmt: skip
def test_a_checkpoint_of_an_impossible_shape_is_refused(config, tmp_path):
    save_checkpoint(tmp_path, 10, 1, config=config, model=tiny().state_dict())
    refuse(tmp_path / "checkpoint_000001.pt")


@given(broken(TINY))
def test_a_checkpoint_of_any_config_has_that_shape_or_is_refused(config):
    torch.save(dict(config=config, model=tiny().state_dict()), path := Path("any.pt"))
    try:
        model, _ = load_checkpoint(path)
    except ValueError as e:
        assert str(e).startswith("any.pt") and "\n" not in str(e)
        return
    assert dataclasses.asdict(model.config).items() >= config.items()
    assert model(tokens(1, 8), tokens(1, 8)).isfinite()


def spread(tensors):
    """Tensors of these shapes that are one number each, in the file too."""
    return {name: torch.zeros([1] * t.dim()).expand(t.shape) for name, t in tensors.items()}


def test_a_checkpoint_that_claims_more_than_it_holds_is_refused(tmp_path):
    config = TINY | dict(n_embd=2**14)  # 13 GB in fp32
    with torch.device("meta"):
        large = GPT(GPTConfig(**config)).state_dict()
    for name, tensors in [("spread.pt", spread(large)), ("meta.pt", large)]:
        torch.save(dict(config=config, model=tensors), tmp_path / name)
        refuse(tmp_path / name)
    state = dict(config=TINY, model=tiny().state_dict(), more=torch.zeros(2**20))
    torch.save(state, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored:
        with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in stored.namelist():
                packed.writestr(name, stored.read(name))
    load_checkpoint(tmp_path / "stored.pt")
    refuse(tmp_path / "packed.pt")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    for state in ([1, 2], {}, {"config": TINY}, *(
        {"config": TINY, "model": model} for model in (None, {}, [1], {"a": 1})
    )):  # fmt: skip
        torch.save(state, tmp_path / "other.pt")
        refuse(tmp_path / "other.pt")
    zipfile.ZipFile(tmp_path / "empty.pt", "w").close()
    (tmp_path / "folder.pt").mkdir()
    for name in ("empty.pt", "folder.pt", "missing.pt"):
        refuse(tmp_path / name)


def test_a_log_that_a_kill_cut_short_is_read_to_its_last_whole_line(tmp_path):
    assert read_log(tmp_path) == []
    lines = "\n".join(json.dumps(dict(step=i, loss=1.0)) for i in range(3))
    (tmp_path / "log.jsonl").write_text(lines[:-5])
    assert [record["step"] for record in read_log(tmp_path)] == [0, 1]


DAMAGED_LOG = rb"""
{"step": 1, "loss": 1.0}
{"step": 2, "lo
\xff\xfe{"step": 3, "loss": 3.0}
{"stfp": 4, "loss": 4.0}
{"step": "5", "loss": 5.0}
{"step": null, "loss": 6.0}
{"step": 7, "loss": "7.0"}
8
[9]
null
\0\0\0\0{"step": 10, "loss": 10.0}
{"step": 0, "loss": 11.0}"""  # fmt: skip


def test_a_damaged_log_stops_neither_a_run_nor_its_resuming(tmp_path, data_dir, run, capsys):
    log_dir = shutil.copytree(run, tmp_path / "log")
    with open(log_dir / "log.jsonl", "ab") as file:
        file.write(DAMAGED_LOG)
    (log_dir / "checkpoint_000012.pt").unlink()
    (log_dir / "loss.png").unlink()
    begin(log_dir, data_dir, resume=True, shape=dict(dropout=0.1))
    assert "resumed at step 8" in capsys.readouterr().out
    assert_same(weights(log_dir), weights(run))
    steps = [record["step"] for record in history(log_dir) if "loss" in record]
    assert steps[:8] == list(range(8)) and steps[-4:] == list(range(8, 12))
    assert (log_dir / "loss.png").exists()


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    save_checkpoint(tmp_path, 10, 1, nothing=None)
    assert calls == ["fsync", "replace"]


def test_of_a_runs_checkpoints_every_tenth_stays(tmp_path, data_dir):
    begin(tmp_path / "log", data_dir, checkpoint_every=1, eval_every=12)
    names = [path.stem[-2:] for path in list_checkpoints(tmp_path / "log")]
    assert names == ["10", "11", "12"]


def test_a_resumed_run_in_fp16_goes_on_with_the_scale_that_overflow_has_lowered(tmp_path, data_dir):
    def scale(log_dir, **how):
        begin(log_dir, data_dir, dtype=torch.float16, prepare=overflow(0, 1), **how)
        return load_checkpoint(list_checkpoints(log_dir)[-1])[1]["scaler"]["scale"]

    assert scale(tmp_path / "log", max_steps=3) == 2.0**14  # 2¹⁶, halved twice
    begin(tmp_path / "log", data_dir, dtype=torch.float16, max_steps=4, resume=True)
    assert load_checkpoint(list_checkpoints(tmp_path / "log")[-1])[1]["scaler"]["scale"] == 2.0**14


def test_what_a_kill_left_half_written_is_gone_before_anything_is_computed(tmp_path, data_dir):
    (tmp_path / "log/hf").mkdir(parents=True)
    for name in ("checkpoint_000003.pt.tmp", "loss.png.tmp", "hf/model.safetensors.tmp"):
        (tmp_path / "log" / name).write_text("left by a kill")
    found = []

    def watch(model):
        model.register_forward_hook(lambda *_: found.append(list(tmp_path.rglob("*.tmp"))))

    begin(tmp_path / "log", data_dir, prepare=watch, max_steps=1)
    assert found and not any(found)


def test_a_model_of_a_checkpoint_is_loaded_for_evaluation(run):
    assert not load_model(list_checkpoints(run)[-1])[0].training


def test_the_log_begins_with_the_size_of_the_run(run, data_dir):
    first = read_log(run)[0]
    windows = DataLoaderLite(data_dir, "train", 8, 32).n_windows
    assert (first["tokens"], first["start_step"]) == (12 * 256, 0)
    assert first["epochs"] == round(12 * 8 / windows, 2) > 0
    assert first["parameters"] == tiny().num_params()
    assert (
        first["source"][7:]
        == hashlib.sha256(Path(train_gpt2.__file__).read_bytes()).hexdigest()[:12]
    )


def test_the_log_says_where_a_run_was_resumed(run, data_dir, tmp_path):
    log_dir = shutil.copytree(run, tmp_path / "log")
    begin(log_dir, data_dir, resume=True, shape=dict(dropout=0.1), max_steps=13)
    assert [r["start_step"] for r in read_log(log_dir) if "start_step" in r] == [0, 12]


# ----------------------------------------------------------------------------------- Training


def test_a_run_learns_and_leaves_all_its_files(run):
    assert {path.name for path in run.iterdir()} == {
        "log.jsonl", "loss.png", "life.html", "encoder.json", "vocab.bpe", "hf",
        "checkpoint_000008.pt", "checkpoint_000012.pt",
    }  # fmt: skip
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    first, *_, last = (r["val_loss"] for r in history(run) if "val_loss" in r)
    assert first == pytest.approx(math.log(384), abs=0.1) and last < first - 0.5


def test_the_log_says_what_was_run_and_each_step_once(run, data_dir):
    facts, *records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert facts["config"] == TINY | dict(dropout=0.1)
    assert facts["train_config"]["data_dir"] == str(data_dir)
    assert torch.__version__ in facts["versions"] and {"device", "source"} <= facts.keys()
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(12))
    assert {"lr", "grad_norm", "ms", "tok_per_s", "utilisation"} <= steps[0].keys()
    assert steps[0]["lr"] == pytest.approx(1e-2 / 4)
    evaluations = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 6, 12] and "bits_per_byte" in evaluations[0]


def test_accumulated_micro_batches_give_the_gradients_of_one_big_batch(
    tmp_path, data_dir, monkeypatch
):
    found, clip = {}, nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        found.setdefault(B, []).append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    for B in (8, 4, 1):
        begin(tmp_path / str(B), data_dir, micro_batch_size=B, max_steps=2, optimizer="adamw")
        torch.testing.assert_close(found[B], found[8], rtol=1e-4, atol=1e-6)
    for a, b in zip(history(tmp_path / "8"), history(tmp_path / "1"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("dtype, optimizer", [
    (torch.float32, "muon"), (torch.bfloat16, "muon"), (torch.float16, "adamw"),
])  # fmt: skip
def test_a_resumed_run_is_bit_identical_to_one_never_stopped(tmp_path, data_dir, dtype, optimizer):
    """Stopped where no checkpoint or evaluation was due, and with dropout."""
    whole, halved, signals = tmp_path / "whole", tmp_path / "halved", []

    def stop(model):
        at_micro_steps(model, {9}, lambda loss: signals.append(15))

    how = dict(dtype=dtype, optimizer=optimizer, shape=dict(dropout=0.2))
    assert begin(whole, data_dir, **how) == 0
    assert begin(halved, data_dir, signals=signals, prepare=stop, **how) == 15
    assert [path.stem[-2:] for path in list_checkpoints(halved)] == ["04", "05"]
    assert history(halved) == history(whole)[:6]  # an evaluation and five steps
    assert begin(halved, data_dir, resume=True, **how) == 0
    assert history(halved) == history(whole)
    assert_same(weights(halved), weights(whole))


def test_resuming_without_a_checkpoint_starts_at_step_0_and_says_so(
    tmp_path, data_dir, run, capsys
):
    begin(tmp_path / "new", data_dir, resume=True, shape=dict(dropout=0.1))
    assert "starts at step 0" in capsys.readouterr().out
    assert history(tmp_path / "new") == history(run)


@pytest.mark.parametrize("damage", [lambda c: c[:-100], lambda c: c.replace(b"model", b"nodel")])
def test_resuming_from_a_damaged_checkpoint_falls_back_loudly_to_the_one_before(
    run, data_dir, tmp_path, damage, capsys
):
    log_dir = shutil.copytree(run, tmp_path / "log")
    newest = log_dir / "checkpoint_000012.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    begin(log_dir, data_dir, resume=True, shape=dict(dropout=0.1))
    out, err = capsys.readouterr()
    assert "WARNING" in err and newest.name in err and "resumed at step 8" in out
    assert history(log_dir) == history(run)
    assert_same(weights(log_dir), weights(run))


def test_where_no_checkpoint_is_whole_resuming_is_an_error_that_leaves_the_log(
    run, data_dir, tmp_path
):
    log_dir = shutil.copytree(run, tmp_path / "log")
    for path in list_checkpoints(log_dir):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of its checkpoints is whole"):
        begin(log_dir, data_dir, resume=True, shape=dict(dropout=0.1))
    assert history(log_dir) == history(run)


def test_a_run_in_bf16_or_fp32_goes_on_in_fp16_and_back(tmp_path, data_dir, capsys):
    """As on another GPU, where the first is no longer to be had."""
    for steps, dtype in enumerate([torch.bfloat16, torch.float16, torch.float32, torch.float16], 1):
        begin(tmp_path / "log", data_dir, resume=True, dtype=dtype, max_steps=steps)
    assert "resumed at step 3" in capsys.readouterr().out


DROPOUT = dict(shape=dict(dropout=0.1))


def test_what_kills_left_is_removed_also_where_nothing_is_written_anew(tmp_path, data_dir, run):
    """And a file of somebody else's stays."""
    log_dir = shutil.copytree(run, tmp_path / "log")
    for name in ("loss.png.tmp", "hf/model.safetensors.tmp", "precious.tmp"):
        (log_dir / name).touch()
    begin(log_dir, data_dir, resume=True, **DROPOUT)
    left = {path.relative_to(log_dir).as_posix() for path in log_dir.rglob("*.tmp")}
    assert left == {"precious.tmp"}


@pytest.mark.parametrize("other", [
    dict(shape=dict(n_layer=1)), dict(shape=dict(n_embd=64)), DROPOUT | dict(optimizer="adamw"),
    DROPOUT | dict(max_steps=11),
])  # fmt: skip
def test_resuming_another_run_is_an_error_that_leaves_the_log(run, data_dir, tmp_path, other):
    log_dir = shutil.copytree(run, tmp_path / "log")
    before = (log_dir / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=re.escape(str(log_dir))):
        begin(log_dir, data_dir, resume=True, **other)
    assert (log_dir / "log.jsonl").read_bytes() == before


def poison_loss(model):
    at_micro_steps(model, {11}, lambda loss: loss * math.nan)


def poison_gradient(model):
    """Of one matrix and one micro-step alone."""
    count = itertools.count()
    weight = model.transformer.h[0].mlp.c_fc.weight
    weight.register_hook(lambda grad: grad * math.inf if next(count) == 11 else grad)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_a_run_stops_before_a_loss_or_gradient_that_is_not_finite_touches_the_weights(
    tmp_path, data_dir, poison, optimizer
):
    whole, log_dir, models = tmp_path / "whole", tmp_path / "log", []

    def prepare(model):
        models.append(model)
        poison(model)

    with pytest.raises(FloatingPointError, match="step 5.*--resume"):
        begin(log_dir, data_dir, prepare=prepare, optimizer=optimizer)
    begin(whole, data_dir, optimizer=optimizer)
    assert history(log_dir) == history(whole)[:6]
    assert [path.name for path in list_checkpoints(log_dir)] == ["checkpoint_000004.pt"]
    begin(log_dir, data_dir, optimizer=optimizer, resume=True, signals=[15])
    assert_same(weights(log_dir), models[0].state_dict())  # those after 5 steps


def fp16(log_dir, data_dir, spoil, **cfg):
    """A run in fp16 with a model that was spoiled -> its state at the end, and at first."""
    models = []

    def prepare(model):
        models.extend((model, copy.deepcopy(model)))
        spoil(model)

    begin(log_dir, data_dir, dtype=torch.float16, prepare=prepare, **cfg)
    return [model.state_dict() for model in models]


def overflow(*steps):
    """Gradients overflow in these steps, of two micro-steps each."""
    return lambda model: at_micro_steps(model, {2 * s for s in steps}, lambda loss: loss * 1e30)


def skipped(log_dir):
    return [r["step"] for r in history(log_dir) if "loss" in r and "grad_norm" not in r]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_fp16s_scaler_skips_changes_no_weight_and_is_no_nan(
    tmp_path, data_dir, optimizer
):
    all_nine = dict(optimizer=optimizer, max_steps=9)
    assert_same(*fp16(tmp_path / "none", data_dir, overflow(*range(9)), **all_nine))
    assert skipped(tmp_path / "none") == list(range(9))
    after, before = fp16(tmp_path / "some", data_dir, overflow(1, 3), optimizer=optimizer)
    assert skipped(tmp_path / "some") == [1, 3]
    assert all(t.isfinite().all() and not torch.equal(t, before[name]) for name, t in after.items())


def test_gradients_that_overflow_in_one_optimizers_share_skip_the_step_of_both(tmp_path, data_dir):
    """Muon has the blocks' matrices, AdamW the rest."""

    def spoil(model):
        model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda grad: grad * math.nan)

    assert_same(*fp16(tmp_path / "log", data_dir, spoil, max_steps=2))


def test_ten_skipped_steps_in_a_row_stop_the_run(tmp_path, data_dir):
    with pytest.raises(FloatingPointError, match="step 11:.* 10 steps skipped"):
        fp16(tmp_path / "log", data_dir, overflow(0, *range(2, 12)), max_steps=30)


@pytest.mark.parametrize("name", ["model_backup.safetensors", "model-00001-of-00002.safetensors"])
def test_other_weights_beside_those_of_a_folder_are_not_read(tmp_path, name):
    model, other = tiny(std=0.1), tiny(std=0.2)
    other.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    model.save_pretrained(tmp_path)
    read = GPT.from_pretrained(tmp_path)
    assert_same(read.transformer.wte.weight, model.transformer.wte.weight)


@pytest.mark.parametrize("name", ["log_dir", "data_dir", "device", "sample_prompt"])
def test_a_text_in_a_config_has_to_be_one(name):
    with pytest.raises(ValueError, match=f"{name}=5 "):
        TrainConfig(**{name: 5})


def test_a_run_that_is_resumed_at_its_best_step_writes_that_model_again(
    tmp_path, data_dir, monkeypatch, capsys
):
    """Although its loss is measured a little higher now, as on another machine."""
    losses = iter([3.0, 2.0, 2.1, 2.5])  # steps 0, 4; 4 again, 8
    monkeypatch.setattr("train_gpt2.evaluate", lambda *args: (next(losses), 1.0))
    log_dir = tmp_path / "log"
    begin(log_dir, data_dir, max_steps=4, eval_every=4)
    shutil.rmtree(log_dir / "hf")
    begin(log_dir, data_dir, max_steps=8, eval_every=4, resume=True)
    assert GPT.from_pretrained(log_dir / "hf")
    assert "hf/ the model of step 4" in capsys.readouterr().out


def test_hf_is_the_model_of_the_best_evaluation_also_after_resuming(
    tmp_path, data_dir, monkeypatch, capsys
):
    """The validation loss falls until step 6, and then rises. The run is stopped in step 8."""
    found = {}

    def losses(model, *args):
        step = len(found) * 3
        found[step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return abs(step - 6) + 3.0, 1.0

    monkeypatch.setattr("train_gpt2.evaluate", losses)
    log_dir, signals = tmp_path / "log", []
    stop = dict(prepare=lambda m: at_micro_steps(m, {17}, lambda loss: signals.append(15)))
    assert begin(log_dir, data_dir, eval_every=3, signals=signals, **stop) == 15
    begin(log_dir, data_dir, eval_every=3, resume=True)
    best = GPT.from_pretrained(log_dir / "hf")
    assert_same(best.transformer.wpe.weight, found[6]["transformer.wpe.weight"])
    records = [r for r in read_log(log_dir) if "val_loss" in r]
    assert [r["best_step"] for r in records] == [0, 3, 6, 6, 6]
    out = capsys.readouterr().out
    assert "hf/ the model of step 6" in out and "later models are worse" in out
    model, tokenizer = load_model(log_dir)
    assert_same(model.transformer.wpe.weight, best.transformer.wpe.weight)
    assert tokenizer.n_vocab == 300


def test_where_memory_is_full_in_the_first_pass_fewer_sequences_are_taken_at_once(
    tmp_path, data_dir, monkeypatch, capsys
):
    """The same run comes of it. Here passes of more than two sequences fail."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    whole, hidden, sizes = tmp_path / "whole", GPT.hidden, []
    begin(whole, data_dir, micro_batch_size=2)

    def small(self, idx, *args, **how):
        if self.training:
            sizes.append(len(idx))
            if len(idx) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, idx, *args, **how)

    monkeypatch.setattr(GPT, "hidden", small)
    begin(tmp_path / "log", data_dir, micro_batch_size=8, compile="on")
    assert sizes[:4] == [8, 4, 2, 2] and set(sizes[3:]) == {2}
    assert "memory is full: 4 sequences at once" in capsys.readouterr().out
    assert history(tmp_path / "log") == history(whole)


def test_three_workers_without_memory_for_one_sequence_do_not_try_for_ever(monkeypatch, capsys):
    """4 windows are at most one micro-step for the worker with the fewest, and two at once."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda net, **how: net)
    monkeypatch.setattr(train_gpt2, "first_pass_fits", lambda *args: False)
    cfg = TrainConfig(total_batch_size=4 * 32, micro_batch_size=1, compile="on")
    with pytest.raises(ValueError, match="not enough memory for a batch of 2"):
        prepare_net(tiny(), cfg, 32, Worker(world_size=3))


def test_the_first_pass_averages_nothing_and_is_made_inside_of_the_distributed_net(monkeypatch):
    """Compiled outside, a net would be one piece, whose gradients are all averaged at its end."""
    passes, wrapped = [], []

    class Distributed(nn.Module):
        def __init__(self, net, **how):
            super().__init__()
            self.net = net
            wrapped.append(self)

        def forward(self, *args):
            passes.append((self, self.require_backward_grad_sync))
            return self.net(*args)

    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Distributed)
    monkeypatch.setattr(Worker, "gather", lambda worker, *values: torch.tensor([values] * 2))
    cfg = TrainConfig(total_batch_size=4 * 32, micro_batch_size=2, compile="on")
    net, B, micro_steps = prepare_net(tiny(), cfg, 32, Worker(world_size=2))
    assert [net] == wrapped and passes == [(net, False)]


def test_a_best_model_that_was_not_written_stays_so_after_resuming(tmp_path, data_dir, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    once = dict(max_steps=6, min_lr_ratio=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "save_pretrained", full)
        with pytest.raises(OSError, match="lacks the best model"):
            begin(tmp_path / "log", data_dir, **once)
        monkeypatch.setattr(train_gpt2.Run, "evaluate", lambda run, step: None)
    with pytest.raises(OSError, match="lacks the best model"):
        begin(tmp_path / "log", data_dir, resume=True, **once)


def test_dropout_may_be_another_when_a_run_is_resumed(tmp_path, data_dir):
    begin(tmp_path / "log", data_dir, max_steps=4)
    assert begin(tmp_path / "log", data_dir, max_steps=8, shape=dict(dropout=0.1), resume=True) == 0
    with pytest.raises(ValueError, match="has another shape"):
        begin(tmp_path / "log", data_dir, max_steps=9, shape=dict(n_layer=1), resume=True)


def test_where_torch_compile_cannot_run_one_line_names_the_way_out(tmp_path, data_dir, monkeypatch):
    class Broken(nn.Module):
        def forward(self, *args):
            raise RuntimeError("No working C++ compiler found.\nAnd many more lines.")

    monkeypatch.setattr(torch, "compile", lambda model: Broken())
    with pytest.raises(ValueError, match=r"C\+\+ compiler found\.\): use --compile off$"):
        begin(tmp_path / "log", data_dir, compile="on")


def test_what_cannot_be_written_is_not_worth_the_run(tmp_path, data_dir, run, capsys, monkeypatch):
    """The disk is full when a checkpoint and the plots are written."""

    def replace(path, name):
        if name.name in ("checkpoint_000004.pt", "loss.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        os.rename(path, name)

    monkeypatch.setattr(os, "replace", replace)
    begin(tmp_path / "log", data_dir, shape=dict(dropout=0.1))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(warnings) == 4 and all("No space left on device" in line for line in warnings)
    assert sum("checkpoint_000004.pt" in line for line in warnings) == 1
    assert history(tmp_path / "log") == history(run)
    assert not list(tmp_path.glob("log/*.tmp"))


def test_apples_gpu_is_not_chosen_where_its_products_may_be_wrong(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def device(preset, **changes):
        shape, cfg = PRESETS[preset]
        return safe_device(dataclasses.replace(cfg, **changes), shape)

    assert device("quick") == "auto" and capsys.readouterr().out == ""
    assert device("gpt2") == "cpu" and "training on the cpu" in capsys.readouterr().out
    assert device("gpt2", device="mps") == "mps" and "known to be wrong" in capsys.readouterr().out
    assert device("gpt2", device="cpu") == "cpu" and capsys.readouterr().out == ""
    long = dict(micro_batch_size=256)  # B·T = 32,768 terms
    assert device("quick", **long) == "cpu" and "32,767 terms" in capsys.readouterr().out


def test_a_corpus_smaller_than_the_model_is_read_7_times_at_most_with_more_decay(data_dir, capsys):
    cfg = TrainConfig(**RUN, data_dir=str(data_dir), weight_decay=0.1)
    n = DataLoaderLite(data_dir, "train", 1, 32).n_windows
    small, large = GPT(GPTConfig(**TINY | dict(n_embd=8))), tiny()
    assert small.num_params() < n * 32 < large.num_params()
    per_epoch = n * 32 / cfg.total_batch_size
    cases = [(0.5, 1), (2.9, 1), (3.1, 10), (6.9, 10), (7.5, 10), (100, 10)]  # epochs, decay
    for epochs, decay in cases:
        asked = dataclasses.replace(cfg, max_steps=round(epochs * per_epoch))
        assert fit_to_corpus(asked, small, Worker()) == asked
        fitting = fit_to_corpus(asked, large, Worker())
        assert fitting.max_steps == min(asked.max_steps, int(7 * per_epoch))
        assert fitting.weight_decay == pytest.approx(0.1 * decay)
        assert ("has only" in capsys.readouterr().out) == (decay > 1)


def test_the_preset_quick_fits_itself_to_a_small_corpus_but_for_what_is_asked(
    tmp_path, data_dir, monkeypatch
):
    found = []
    monkeypatch.setattr(train_gpt2, "train", lambda model, cfg, *rest: found.append(cfg) or 0)
    argv = ["--preset=quick", f"--data_dir={data_dir}", "--block_size=32"]
    for more in ([], ["--max_steps=900", "--weight_decay=0.2"]):
        assert train_gpt2.main([*argv, f"--log_dir={tmp_path / str(len(more))}", *more]) == 0
    (fitting, asked) = found
    assert fitting.max_steps < 1000 and fitting.weight_decay == 1.0
    assert (asked.max_steps, asked.weight_decay) == (900, 0.2)


def test_workers_that_cannot_train_together_are_refused(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, n in dict(mps=1, cuda=2).items():
        with pytest.raises(
            ValueError, match=f"={device}: PyTorch finds {n} .* for 3 workers: take"
        ):
            start_worker(device)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_log_line_that_does_not_fit_is_lost_alone(tmp_path, data_dir, run, capsys, monkeypatch):
    log, saved = tmp_path / "log/log.jsonl", tmp_path / "saved"

    def full_disk_for_a_step(step, cfg):
        if step == 3:
            log.rename(saved)
            log.symlink_to("/dev/full")
        elif step == 4:
            saved.replace(log)
        return get_lr(step, cfg)

    monkeypatch.setattr("train_gpt2.get_lr", full_disk_for_a_step)
    begin(tmp_path / "log", data_dir, shape=dict(dropout=0.1))
    assert capsys.readouterr().err.count("WARNING: [Errno 28] No space left on device") == 1
    lost = [record for record in history(run) if record not in history(tmp_path / "log")]
    assert len(lost) == 1 and lost[0]["step"] == 3 and len(history(tmp_path / "log")) > 10


class OneOfTwo(Worker):
    """One of two workers; the other, which is not there, tells numbers of its own."""

    others = staticmethod(lambda *mine: mine)  # the same

    def gather(self, *values):
        rows = [values, self.others(*values)]
        return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def without_averaging(monkeypatch):
    """Gradients stay those of this worker, as no other is there."""
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda net, **how: net)


def begin_as(worker, log_dir, data_dir, prepare=None, shape=(), signals=(), resume=False, **cfg):
    cfg = TrainConfig(**RUN | dict(data_dir=str(data_dir), log_dir=str(log_dir)) | cfg)
    log_dir.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | dict(shape)))
    if prepare:
        prepare(model)
    return train(model, cfg, worker, resume, signals)


def test_every_worker_step_and_seed_has_dropout_masks_of_its_own(
    tmp_path, data_dir, without_averaging
):
    masks = []

    def watch(model):
        model.transformer.drop.register_forward_hook(
            lambda module, args, y: masks.append((y == 0).numpy().tobytes())
            if module.training else None
        )  # fmt: skip

    for rank, seed in [(0, 1), (1, 1), (0, 1000)]:
        begin_as(
            OneOfTwo(rank, 2), tmp_path / f"{rank} {seed}", data_dir, watch, dict(dropout=0.5),
            max_steps=3, seed=seed, eval_every=3,
        )  # fmt: skip
    assert len(masks) == len(set(masks)) == 3 * 3  # with one micro-step in a step


def test_a_signal_to_any_worker_stops_all_of_them(tmp_path, data_dir, without_averaging):
    class OtherIsStopped(OneOfTwo):
        others = staticmethod(lambda *mine: [15] * len(mine))

    assert begin_as(OtherIsStopped(0, 2), tmp_path / "log", data_dir) == 15
    assert [path.stem[-2:] for path in list_checkpoints(tmp_path / "log")] == ["01"]


def test_workers_that_found_different_checkpoints_do_not_go_on(
    tmp_path, data_dir, without_averaging
):
    class OtherFoundMore(OneOfTwo):
        others = staticmethod(lambda *mine: [value + 4 for value in mine])

    with pytest.raises(ValueError, match=r"checkpoints of different steps: \[0.0, 4.0\]"):
        begin_as(OtherFoundMore(0, 2), tmp_path / "log", data_dir, resume=True)


def test_where_memory_is_full_on_one_worker_all_take_fewer_sequences(
    tmp_path, data_dir, without_averaging, monkeypatch, capsys
):
    monkeypatch.setattr(torch, "compile", lambda model: model)

    class OtherIsFullAtFirst(OneOfTwo):
        full = itertools.chain([True], itertools.repeat(False))

        def gather(self, *values):
            full = values == (True,) and next(self.full)
            return torch.tensor([values, [False] if full else values], dtype=torch.float64)

    begin_as(OtherIsFullAtFirst(0, 2), tmp_path / "log", data_dir, max_steps=1, compile="on")
    assert "memory is full: 2 sequences at once" in capsys.readouterr().out


@pytest.mark.parametrize("room", [0, 1])
def test_memory_for_one_sequence_is_enough_and_for_none_is_an_error(
    tmp_path, data_dir, monkeypatch, room
):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    hidden = GPT.hidden

    def small(self, idx, *args, **how):
        if self.training and len(idx) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, idx, *args, **how)

    monkeypatch.setattr(GPT, "hidden", small)
    wrong = pytest.raises(ValueError, match="a batch of 1: use a lower --seq_len")
    with contextlib.nullcontext() if room else wrong:
        begin(tmp_path / "log", data_dir, max_steps=1, compile="on")


def test_only_the_first_worker_prints(capsys):
    for rank in (0, 1):
        Worker(rank, 2).print(f"worker {rank}")
    assert capsys.readouterr().out == "worker 0\n"


def test_a_number_that_is_gathered_keeps_all_its_digits():
    assert Worker().gather(2**40 + 1, 0.1).tolist() == [[2**40 + 1, 0.1]]


def test_a_batch_goes_to_the_workers_device():
    moved = Worker(device=torch.device("meta")).to_device(*torch.zeros(2, 3))
    assert [t.device.type for t in moved] == ["meta"] * 2


def test_a_bare_matmul_is_as_fast_as_in_its_best_of_five_rounds(monkeypatch):
    """Here the rounds take 3, 1, 0.5, 2 and 4 seconds by the clock. n·n·n products of n = 2048."""
    clock = iter([0, 3, 3, 4, 4, 4.5, 5, 7, 7, 11])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert MATMUL_FLOPS(Worker(dtype=torch.float32)) == 2 * 2048**3 / 0.5


@pytest.mark.parametrize("native", [True, False])
def test_bf16_that_a_gpu_only_emulates_is_not_chosen(native, monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert fast_precision("cuda") == ("bf16" if native else "fp16")


def test_compile_is_for_cuda_unless_it_is_switched_on_or_off():
    workers = [Worker(device=torch.device(name)) for name in ("cpu", "cuda")]
    for choice, compiled in dict(auto=[False, True], on=[True] * 2, off=[False] * 2).items():
        assert [is_compiled(TrainConfig(compile=choice), w) for w in workers] == compiled


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "cl")), reason="no C++ compiler here"
)
def test_a_compiled_model_has_the_loss_of_the_model_and_takes_the_same_step():
    shape = GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=16)
    tokens = torch.randint(64, (2, 17))
    losses, steps = [], []
    for choice in ("off", "on"):
        torch.manual_seed(0)
        model = GPT(shape)
        cfg = TrainConfig(total_batch_size=32, micro_batch_size=2, compile=choice, max_lr=1e-2)
        net, B, micro_steps = prepare_net(model, cfg, 16, Worker())
        assert (B, micro_steps) == (2, 1) and (net is model) == (choice == "off")
        loss = net(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        (adamw,) = configure_optimizers(model, cfg)
        adamw.step()
        losses.append(loss.detach())
        steps.append(model.state_dict())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device, cfg, shape, safe", [
    ("auto", dict(micro_batch_size=8), dict(), "mps"),
    ("auto", dict(micro_batch_size=64), dict(), "cpu"),
    ("auto", dict(micro_batch_size=64, seq_len=64), dict(), "mps"),
    ("auto", dict(micro_batch_size=8), dict(vocab_size=50304), "cpu"),
    ("mps", dict(micro_batch_size=8), dict(vocab_size=50304), "mps"),
    ("cpu", dict(micro_batch_size=8), dict(vocab_size=50304), "cpu"),
])  # fmt: skip
def test_apples_gpu_is_not_chosen_for_products_over_many_terms(
    device, cfg, shape, safe, monkeypatch
):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shape = GPTConfig(**dict(vocab_size=4096) | shape)
    chosen = safe_device(TrainConfig(device=device, **cfg), shape)
    assert (chosen if chosen != "auto" else "mps") == safe


@contextlib.contextmanager
def before_each_step(action):
    """Call action(optimizer) before each of its steps."""
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: action(optimizer))
    try:
        yield
    finally:
        handle.remove()


def norm(optimizer):
    """Of all its gradients, as one long vector."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return torch.cat([grad.flatten() for grad in grads]).norm().item()


@pytest.mark.parametrize("limit", [0.01, 0, 1000])
def test_a_gradient_that_is_too_long_is_scaled_down_to_grad_clip(tmp_path, data_dir, limit):
    norms, cfg = [], dict(grad_clip=limit, optimizer="adamw", max_steps=3)
    with before_each_step(lambda optimizer: norms.append(norm(optimizer))):
        begin(tmp_path / "log", data_dir, **cfg)
    logged = [r["grad_norm"] for r in history(tmp_path / "log") if "loss" in r]
    assert min(logged) > 0.1  # as it was before
    assert norms == pytest.approx([0.01] * 3 if limit == 0.01 else logged, rel=1e-3)


def test_every_optimizer_steps_with_the_learning_rate_that_is_logged(tmp_path, data_dir):
    rates = []
    with before_each_step(lambda o: rates.extend(group["lr"] for group in o.param_groups)):
        begin(tmp_path / "log", data_dir, max_steps=6)
    logged = [r["lr"] for r in history(tmp_path / "log") if "loss" in r]
    groups = len(rates) // 6  # 2 of AdamW, the others of Muon
    assert groups > 2 and rates == [rate for rate in logged for _ in range(groups)]
    assert len(set(logged)) > 4


def test_the_time_of_a_step_is_that_of_its_micro_steps_alone(tmp_path, data_dir, monkeypatch):
    """Here a micro-step takes 3 seconds by the clock, a matrix of evaluation 100, a file 1000."""
    clock, fsync = [0.0], os.fsync

    def after(seconds):
        clock[0] += seconds

    def slow(model):
        model.register_forward_hook(lambda m, *_: after(3 if m.training else 100))

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(os, "fsync", lambda fd: after(1000) or fsync(fd))
    how = dict(eval_every=2, checkpoint_every=2)
    begin(tmp_path / "log", data_dir, prepare=slow, max_steps=4, **how)
    begin(tmp_path / "log", data_dir, prepare=slow, max_steps=8, resume=True, **how)
    records = [r for r in read_log(tmp_path / "log") if "loss" in r]
    assert [r["ms"] for r in records] == [6000.0] * 8  # two micro-steps
    assert [r["tok_per_s"] for r in records] == pytest.approx([256 / 6] * 8)
    share = 256 / 6 * flops_per_token(tiny(), 32) / 1e12
    assert [r["utilisation"] for r in records] == pytest.approx([share] * 8)
    left = [0.3, 0.2, 0.1, 0.0] * 2  # 6 seconds are a tenth of a minute
    assert [r["minutes_left"] for r in records] == pytest.approx(left)


def test_of_two_workers_the_utilisation_is_that_of_one(tmp_path, data_dir, without_averaging):
    begin_as(OneOfTwo(0, 2), tmp_path / "log", data_dir, max_steps=2)
    for record in (r for r in read_log(tmp_path / "log") if "loss" in r):
        assert record["tok_per_s"] == pytest.approx(256 / record["ms"] * 1000)  # of both together
        flops = record["tok_per_s"] / 2 * flops_per_token(tiny(), 32)
        assert record["utilisation"] == pytest.approx(flops / 1e12)


def test_a_model_in_evaluation_mode_is_trained_with_dropout(tmp_path, data_dir, run):
    begin(tmp_path / "log", data_dir, prepare=lambda m: m.eval(), shape=dict(dropout=0.1))
    assert history(tmp_path / "log") == history(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_computes_in_the_workers_precision(tmp_path, data_dir, dtype):
    found = set()

    def watch(model):
        model.transformer.h[0].mlp.register_forward_hook(
            lambda module, args, y: found.add((module.training, y.dtype))
        )

    begin(tmp_path / "log", data_dir, dtype=dtype, prepare=watch, max_steps=1)
    assert found == {(True, dtype), (False, dtype)}


def test_training_reads_windows_of_the_training_split_in_an_order_that_the_seed_decides(
    tmp_path, data_dir
):
    first = {}
    for seed in (1, 2):
        seen = first.setdefault(seed, [])

        def watch(model, seen=seen):
            model.register_forward_pre_hook(
                lambda m, args: seen.extend(args[0].tolist()) if m.training else None
            )

        begin(tmp_path / str(seed), data_dir, prepare=watch, max_steps=1, seed=seed)
    loader = DataLoaderLite(data_dir, "train", 1, 32)
    windows = loader.windows(range(loader.n_windows))[0].tolist()
    assert all(row in windows for rows in first.values() for row in rows)
    assert len(first[1]) == 8 and first[1] != first[2]


def test_at_any_time_a_run_has_its_newest_two_checkpoints_and_every_tenth_alone(tmp_path):
    for step in range(5, 100, 5):
        save_checkpoint(tmp_path, 50, step, nothing=None)
        kept = [int(path.stem[11:]) for path in list_checkpoints(tmp_path)]
        assert kept == [s for s in range(5, step + 1, 5) if s >= step - 5 or s % 50 == 0]


def test_no_micro_step_is_empty():
    cfg = TrainConfig(total_batch_size=3 * 32, micro_batch_size=1)
    assert divide_step(cfg, 32, Worker(world_size=2)) == (2, 1)


def test_a_checkpoint_of_an_earlier_version_still_loads_but_is_not_resumed(tmp_path, data_dir):
    begin(tmp_path / "log", data_dir, max_steps=4)
    (path,) = list_checkpoints(tmp_path / "log")
    state = torch.load(path, weights_only=True)
    del state["best"], state["best_saved"]  # which it did not have
    torch.save(state, path)
    assert load_checkpoint(path)[0].config == GPTConfig(**TINY)
    with pytest.raises(ValueError, match="is of an earlier version, and cannot be resumed"):
        begin(tmp_path / "log", data_dir, max_steps=8, resume=True)


def test_a_run_that_is_told_to_stop_does_not_evaluate_before(tmp_path, data_dir):
    """Not even where an evaluation is due: who stops a run has little time."""
    signals, log_dir = [], tmp_path / "log"
    stop = dict(prepare=lambda m: at_micro_steps(m, {11}, lambda loss: signals.append(15)))
    assert begin(log_dir, data_dir, signals=signals, **stop) == 15
    assert history(log_dir)[-1]["step"] == 5 and "loss" in history(log_dir)[-1]
    assert [path.stem[-2:] for path in list_checkpoints(log_dir)] == ["04", "06"]


def test_a_run_that_is_stopped_in_its_last_step_is_finished_by_resuming(tmp_path, data_dir, capsys):
    signals, log_dir = [], tmp_path / "log"
    stop = dict(prepare=lambda m: at_micro_steps(m, {23}, lambda loss: signals.append(15)))
    assert begin(log_dir, data_dir, signals=signals, **stop) == 15
    assert "log has log.jsonl" not in capsys.readouterr().out
    assert begin(log_dir, data_dir, resume=True) == 0
    assert "log has log.jsonl" in capsys.readouterr().out
    assert "val_loss" in history(log_dir)[-1] and history(log_dir)[-1]["step"] == 12


def test_a_loss_that_is_no_number_ends_a_run_in_fp16_at_once(tmp_path, data_dir):
    with pytest.raises(FloatingPointError, match="step 5: loss .nan."):
        begin(tmp_path / "log", data_dir, dtype=torch.float16, prepare=poison_loss)


def test_only_where_later_models_are_worse_a_run_says_so(tmp_path, data_dir, capsys):
    begin(tmp_path / "log", data_dir)
    out = capsys.readouterr().out
    assert "hf/ the model of step 12" in out and "later models are worse" not in out


def test_the_seed_decides_the_samples_of_an_evaluation(tmp_path, data_dir, capsys):
    samples = []
    for seed in (1, 2):
        same = dict(prepare=lambda model: randomize(model, 0.0), max_steps=1)
        begin(tmp_path / str(seed), data_dir, seed=seed, **same)
        out = capsys.readouterr().out
        samples.append([line for line in out.splitlines() if line[:2] == "  "][:4])
    assert len(samples[0]) == 4 and samples[0] != samples[1]


# --------------------------------------------------------------------- Hugging Face, both ways


def hugging_face(**shape):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = dict(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=384)
    return randomize(GPT2LMHeadModel(GPT2Config(**config | shape, eos_token_id=None)), 0.05).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model of Hugging Face's, saved. Not to be changed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf")
    hugging_face().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name, n_layer, n_embd", [
    ("gpt2", 2, 768), ("gpt2-medium", 3, 256), ("gpt2-large", 4, 320), ("gpt2-xl", 5, 400),
])  # fmt: skip
def test_a_model_of_hugging_faces_is_the_same_here(name, n_layer, n_embd, tmp_path):
    """At reduced depth, and but for the first at a quarter of the width."""
    shape = dict(n_layer=n_layer, n_embd=n_embd, n_head=SIZES[name][1], n_positions=128)
    theirs = hugging_face(**shape, vocab_size=1000)
    theirs.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path)).eval(), tokens(2, 65, high=1000)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)
    losses = ours(idx[:, :-1], idx[:, 1:]), theirs(idx, labels=idx).loss
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for loss in losses:
        loss.backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    for key, p in ours.named_parameters():
        grad = gradients.pop(key)
        grad = grad.T if p.dim() == 2 and ".h." in key else grad  # a Conv1D
        assert (p.grad - grad).norm() <= 1e-4 * grad.norm()
    assert not gradients
    continued = theirs.generate(idx[:, :9], max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(idx[:, :9], 64, temperature=0), continued)


def in_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def under_the_name_of_the_head(model, folder):
    from safetensors.torch import save_model

    model.config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"))


def as_pickles_of_tensors(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_pickles_in_shards(model, folder):
    model.config.save_pretrained(folder)
    state = list(model.state_dict().items())
    for i in (0, 1):
        torch.save(dict(state[i::2]), folder / f"pytorch_model-0000{i + 1}-of-00002.bin")


def without_a_head(model, folder):
    model.transformer.save_pretrained(folder)


@pytest.mark.parametrize("save", [
    in_shards, under_the_name_of_the_head, as_pickles_of_tensors, as_pickles_in_shards,
    without_a_head,
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_load_in_every_form_in_which_transformers_reads_them(save, dtype, tmp_path):
    theirs = hugging_face().to(dtype)
    save(theirs, tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert ours.lm_head.weight is ours.transformer.wte.weight
    idx = tokens(2, 9)
    torch.testing.assert_close(ours(idx), theirs.float()(idx).logits, atol=1e-4, rtol=0)


def test_code_that_a_folder_brings_along_is_never_run(folder, tmp_path, monkeypatch):
    copied = shutil.copytree(folder, tmp_path / "hf")
    (copied / "evil.py").write_text("import pathlib\npathlib.Path('exploded').touch()\n")
    edit_config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"})(copied)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert_same(GPT.from_pretrained(copied).state_dict(), GPT.from_pretrained(folder).state_dict())
    assert not Path("exploded").exists()


def test_from_hugging_face_and_back_every_tensor_is_identical_to_the_bit(folder, tmp_path):
    from safetensors.torch import load_file

    GPT.from_pretrained(str(folder)).save_pretrained(tmp_path)
    assert_same(*(load_file(path / "model.safetensors") for path in (tmp_path, folder)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.items() >= dict(model_type="gpt2", n_layer=2, n_embd=32, vocab_size=384).items()


def edit_tensors(edit):
    """A function that edits the tensors of a folder."""

    def edit_file(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit_file


def test_openais_own_layout_loads_too(folder, tmp_path):
    """Its names have no prefix, its head is not stored, its masks are."""

    @edit_tensors
    def rename(tensors):
        tensors.pop("lm_head.weight", None)
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()

    rename(shutil.copytree(folder, tmp_path / "openai"))
    ours, theirs = (GPT.from_pretrained(str(f)) for f in (tmp_path / "openai", folder))
    assert_same(ours.state_dict(), theirs.state_dict())


def test_a_saved_model_has_the_same_logits_there_without_the_padded_rows(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    model, idx = tiny(), tokens(2, 32)
    model.save_pretrained(tmp_path, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(idx).logits, model(idx)[..., :300], atol=1e-4, rtol=0)
    assert (theirs.config.vocab_size, theirs.config.eos_token_id) == (300, 299)
    assert theirs.generation_config.eos_token_id == 299


def test_a_model_without_biases_is_saved_with_zeros_and_has_the_same_logits_there(tmp_path):
    from transformers import AutoModelForCausalLM

    model, idx = tiny(bias=False, dropout=0.25), tokens(2, 32)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=0)
    biases = [p for name, p in theirs.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1 and not any(bias.any() for bias in biases)
    c = theirs.config
    assert [c.resid_pdrop, c.embd_pdrop, c.attn_pdrop] == [0.25] * 3


@pytest.mark.parametrize("which", ["tokenizer", "gpt2"])
def test_a_pipeline_of_transformers_writes_the_same_text(which, tmp_path, request):
    from transformers import AutoTokenizer, pipeline

    tokenizer, prompt = request.getfixturevalue(which), "the abc, the"
    model = tiny(vocab_size=padded(tokenizer.n_vocab))
    model.save_pretrained(tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(prompt) == tokenizer.encode(prompt)
    write = pipeline("text-generation", str(tmp_path))
    (text,) = write(prompt, max_new_tokens=20, do_sample=False)
    how = dict(n=1, seed=0, max_new_tokens=20, temperature=0)
    assert [text["generated_text"]] == sample_texts(model, tokenizer, Worker(), prompt, **how)


def test_a_finished_run_leaves_what_a_pipeline_reads_and_what_loads_again(run):
    from transformers import pipeline

    (model, own), (again, its) = load_model(run), load_model(run / "hf")
    torch.testing.assert_close(again(tokens(1, 9)), model(tokens(1, 9))[..., :300])
    assert fineweb.token_ids(own) == fineweb.token_ids(its)
    how = dict(n=1, seed=0, max_new_tokens=25, temperature=0)
    (text,) = pipeline("text-generation", str(run / "hf"))(
        "the ", max_new_tokens=25, do_sample=False
    )
    assert [text["generated_text"]] == sample_texts(model, own, Worker(), "the ", **how)


TEXTS = [
    "the abc, the", "  two  spaces\n\nand lines\t", "12345 's 'LL don't", "a" * 99,
    "\xdcn\xefc\xf6d\xe9 \u4e2d\u6587 \U0001f600 e\u0301", "\x00\x7f\u0085\ufeff",
]  # fmt: skip


def same_ids(ours, theirs):
    return all(ours.encode(text, disallowed_special=()) == theirs.encode(text) for text in TEXTS)


def fine_tune(model, idx, steps=2):
    """As transformers' Trainer would: in training mode, with AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        model(idx, labels=idx).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_model_comes_back_from_a_fine_tuning_with_its_logits_and_ids(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(run / "hf")
    their_tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    before, idx = load_model(run / "hf")[0], tokens(4, 32)
    fine_tune(theirs.train(), idx).save_pretrained(tmp_path)
    their_tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "merges.txt").exists()  # only tokenizer.json
    ours, our_tokenizer = load_model(tmp_path)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)
    assert not torch.allclose(ours(idx), before(idx), atol=1e-2)
    assert same_ids(our_tokenizer, their_tokenizer) and our_tokenizer.n_vocab == 300
    ours.save_pretrained(tmp_path / "again", our_tokenizer)
    again, again_tokenizer = load_model(tmp_path / "again")
    assert_same(again.state_dict(), ours.state_dict())
    assert same_ids(again_tokenizer, their_tokenizer)


def test_a_model_comes_back_from_a_lora_of_peft_that_was_merged(run, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, which is not in the requirements")
    from transformers import AutoModelForCausalLM

    idx, theirs = tokens(4, 32), AutoModelForCausalLM.from_pretrained(run / "hf")
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    merged = fine_tune(peft.get_peft_model(theirs, config).train(), idx).merge_and_unload()
    merged.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(ours(idx), merged.eval()(idx).logits, atol=1e-4, rtol=0)
    assert not torch.allclose(ours(idx), load_model(run / "hf")[0](idx), atol=1e-3)


def test_a_folder_without_a_tokenizer_is_refused_where_one_is_needed(folder):
    with pytest.raises(
        ValueError, match="has no tokenizer: copy vocab.json and merges.txt, or tok"
    ):
        load_model(folder)
    assert GPT.from_pretrained(folder)


def edit_config(**changes):
    """A function that edits the config of a folder."""

    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def only_a_pickle(content):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return edit


def remove_a_shard(folder):
    (folder / "model.safetensors").unlink()
    hugging_face().save_pretrained(folder, max_shard_size="40KB")
    max(folder.glob("model-*"), key=os.path.getsize).unlink()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_folder_that_claims_more_than_it_holds_takes_no_memory(folder, tmp_path):
    """Here 3 GB, and 200 GB, where one more may be had."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * os.sysconf("SC_PAGE_SIZE") + 2**30
    copied = shutil.copytree(folder, tmp_path / "hf")
    for n_layer, n_embd in [(60, 1024), (64, 2**13)]:
        edit_config(n_layer=n_layer, n_embd=n_embd)(copied)
        with limit("RLIMIT_AS", room), pytest.raises(ValueError, match="no GPT-2 from") as error:
            GPT.from_pretrained(str(copied))
        assert "allocate" not in str(error.value)


NAME = "transformer.h.1.mlp.c_fc.bias"
BAD_FOLDERS = {
    "without config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "without weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "another architecture": (edit_config(model_type="gpt_neo"), "model_type"),
    "an unknown architecture": (edit_config(model_type="gpt9"), "gpt9"),
    "another activation": (edit_config(activation_function="relu"), "activation_function"),
    "unscaled attention": (edit_config(scale_attn_weights=False), "scale_attn_weights"),
    "an untied head": (edit_config(tie_word_embeddings=False), "tie_word_embeddings"),
    "a narrow MLP": (
        lambda folder: hugging_face(n_inner=64).save_pretrained(folder),
        "c_fc|n_inner",
    ),
    "negative size": (edit_config(n_layer=-1), "n_layer"),
    "gigantic size": (edit_config(n_embd=2**60, n_head=1), "n_embd"),
    "a size that is no number": (edit_config(n_embd="x"), "n_embd"),
    "another width": (edit_config(n_embd=64), "wte|parameters"),
    "more blocks": (edit_config(n_layer=3), r"\bh\.2\."),
    "fewer blocks": (edit_config(n_layer=1), r"\bh\.1\."),
    "fewer positions": (edit_config(n_positions=16), "wpe"),
    "a missing tensor": (edit_tensors(lambda tensors: tensors.pop(NAME)), NAME[12:]),
    "one left over": (edit_tensors(lambda tensors: tensors.update(extra=torch.ones(1))), "extra"),
    "another shape": (
        edit_tensors(lambda tensors: tensors.update({NAME: torch.ones(7)})),
        NAME[12:],
    ),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 99_999), ""),
    "a pickle without tensors": (only_a_pickle({}), "fewer than|wte"),
    "only a hostile pickle": (only_a_pickle(Bomb()), "fewer than|weights_only|Unsupported"),
    "another head": (
        edit_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(384, 32)})),
        "lm_head differs from wte",
    ),
    "exact GELU": (edit_config(activation_function="gelu"), "activation_function=gelu"),
    "a shard that is missing": (lambda folder: remove_a_shard(folder), "wte|h\\.[01]"),
}


@pytest.mark.parametrize("damage, names", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_folder_that_is_no_gpt2_is_refused_with_the_reason(damage, names, folder, tmp_path):
    damage(copied := shutil.copytree(folder, tmp_path / "hf"))
    with pytest.raises(ValueError, match=re.escape(str(copied))) as error:
        GPT.from_pretrained(str(copied))
    assert re.search(names, str(error.value)) and "\n" not in str(error.value)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["gpt2", "no-such/model", "no/such/folder", ""])
def test_a_model_that_cannot_be_fetched_is_one_clear_line(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=f"no GPT-2 from '{name}'.*folder with config.json"
    ) as error:
        GPT.from_pretrained(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    dict(layer_norm_epsilon=1e-6), dict(scale_attn_by_inverse_layer_idx=True),
])  # fmt: skip
def test_a_folder_whose_weights_compute_something_else_is_refused(change, folder, tmp_path):
    edit_config(**change)(copied := shutil.copytree(folder, tmp_path / "hf"))
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=f"its {key}={value} is not GPT-2's"):
        GPT.from_pretrained(str(copied))


def test_of_a_model_on_the_hub_pickles_are_fetched_only_if_it_has_nothing_newer(
    folder, tmp_path, monkeypatch
):
    older = tmp_path / "cache"
    older.mkdir()
    shutil.copy(folder / "config.json", older)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, "pytorch_model*.bin" in allow_patterns))
        if asked[-1] == ("older", True):
            as_pickles_of_tensors(hugging_face(), older)
        return str(dict(older=older, newer=folder)[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("newer", "older"):
        assert GPT.from_pretrained(name).config.n_embd == 32
    assert asked == [("newer", False), ("older", False), ("older", True)]


def test_pickles_whose_tensors_repeat_one_number_are_no_weights(folder, tmp_path):
    """Of the right shapes, and so small a file that it cannot hold the weights."""
    copied = shutil.copytree(folder, tmp_path / "hf")
    only_a_pickle(spread(hugging_face().state_dict()))(copied)
    with pytest.raises(ValueError, match="hold fewer than the"):
        GPT.from_pretrained(str(copied))


def test_half_a_line_at_the_end_of_a_log_goes_before_the_next_is_written(tmp_path, data_dir):
    begin(tmp_path / "log", data_dir, max_steps=1)
    log = tmp_path / "log/log.jsonl"
    lines = [line for line in log.read_text().splitlines() if '"step": 1' not in line]
    log.write_text("\n".join([*lines, '{"step": 1, "val_lo']))  # cut short by a kill
    begin(tmp_path / "log", data_dir, max_steps=2, resume=True)
    assert [json.loads(line) for line in log.read_text().splitlines()] == read_log(tmp_path / "log")
    assert [r["start_step"] for r in read_log(tmp_path / "log") if "start_step" in r] == [0, 1]
