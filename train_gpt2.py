"""GPT-2 in one file: the model, its training and its sampling, to be read from top to bottom.

    python train_gpt2.py                    a small GPT-2 on this computer, in under four minutes
    python train_gpt2.py --generate "def "  what the newest run writes
    torchrun --standalone --nproc_per_node=8 train_gpt2.py      GPT-2 124M on eight GPUs
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --resume      goes on where it stopped

The first needs neither a GPU nor a network: where `python fineweb.py` has not prepared FineWeb-Edu,
the corpus is Python's own standard library and the preset `quick`. Where it has, the preset is
`gpt2`: 124M parameters, 10B tokens, 19,073 steps of 524,288 tokens. `--help` lists every flag.

A language model turns a sequence of tokens (whole numbers, each standing for a piece of text) into
a probability for every possible next token. This is how GPT-2 does it:

    idx (B, T) ─wte, wpe─▶ x (B, T, C) ─L blocks─▶ x (B, T, C) ─ln_f, lm_head─▶ logits (B, T, V)

Each token becomes a vector of C numbers, what it is (wte) plus where it stands (wpe): the residual
stream. Each block adds to it twice: attention brings in what earlier tokens have to say, the MLP
works on each token alone. The head compares the result with the vector of every token; softmax
turns these V scores, the logits, into probabilities. Training lowers the loss: -ln of the
probability that the true next token got, in nats, as the logarithm is the natural one.

Notation, everywhere in this project:
    B  sequences in a batch          C   channels, the width of the model (n_embd)
    T  tokens in a sequence          nh  attention heads (n_head); hs = C / nh, the size of a head
    V  rows of wte (vocab_size)      L   blocks (n_layer)

Sections: Configuration · Model · Optimizers and schedule · Data · Workers and devices ·
Evaluation · Checkpoints and the log · Training · Command line

"GPT-2" below is Radford et al. 2019, "GPT-3" Brown et al. 2020 (arXiv:2005.14165): its appendix B
gives the details of training that the GPT-2 paper leaves out.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tiktoken import Encoding
from torch import Tensor

import fineweb

# ------------------------------------------------------------------------------ Configuration


def option(default: Any, help: str, low: float = 0, high: float = 2**40, choices: str = "") -> Any:
    """A dataclass field that is a command-line flag too: its help and the values it may have."""
    allowed = (low, high, choices.split())
    return field(default=default, metadata=dict(help=help, allowed=allowed))


class Options:
    """A dataclass of options. ValueError names the first whose value is not allowed."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (low, high, choices) = getattr(self, f.name), f.metadata["allowed"]
            if choices and value not in choices:
                raise ValueError(f"{f.name}={value!r} is not one of {', '.join(choices)}")
            if f.type in (int, float) and not low <= value <= high:
                raise ValueError(f"{f.name}={value!r} is not from {low} to {high}")


@dataclass(frozen=True)
class GPTConfig(Options):
    """The shape of a model; by default that of GPT-2 small, 124M parameters."""

    block_size: int = option(1024, "longest context, tokens: the rows of wpe", 1, 2**20)
    vocab_size: int = option(50257, "rows of wte (default: the tokens, padded: 50304)", 1, 2**20)
    n_layer: int = option(12, "blocks", 1, 1024)
    n_head: int = option(12, "attention heads of a block", 1, 1024)
    n_embd: int = option(768, "channels, a multiple of n_head", 1, 2**16)
    dropout: float = option(0.0, "share of activations zeroed in training", 0, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")


@dataclass(frozen=True)
class TrainConfig(Options):
    """A run; by default the reproduction of GPT-2 124M on FineWeb-Edu."""

    data_dir: str = option("edu_fineweb10B", "folder of token shards (fineweb.py makes them)")
    log_dir: str = option("", "folder for the run's files (default: log/PRESET, log/PRESET-2, …)")
    init: str = option("", "weights to start from: gpt2[-medium|-large|-xl], a folder or .pt file")
    optimizer: str = option("adamw", "muon: on the blocks' matrices only", choices="adamw muon")
    total_batch_size: int = option(2**19, "tokens a step, over all workers and micro-steps", 1)
    micro_batch_size: int = option(64, "sequences at once, as a worker's memory allows", 1)
    seq_len: int = option(1024, "tokens a sequence, at most block_size", 1)
    max_steps: int = option(10**10 // 2**19, "steps (default: 10B tokens)", 1)
    warmup_steps: int = option(715, "steps of warm-up (default: 375M tokens, as GPT-3)")
    max_lr: float = option(6e-4, "the learning rate's peak (default: GPT-3's)", 1e-12, 1e3)
    min_lr_ratio: float = option(0.1, "learning rate at the end, as a share of the peak", 0, 1)
    weight_decay: float = option(0.1, "share of each matrix removed a step, times the rate")
    grad_clip: float = option(1.0, "the gradient's largest norm; 0 for any")
    eval_every: int = option(250, "steps from one evaluation to the next", 1)
    val_tokens: int = option(20 * 2**19, "tokens of an evaluation, at most", 1)
    sample_prompt: str = option("Hello, I'm a language model,", "what the samples start with")
    hellaswag: str = option("on", "evaluate on HellaSwag as well", choices="on off")
    checkpoint_every: int = option(500, "steps from one checkpoint to the next", 1)
    seed: int = option(1337, "of weights, data order, dropout and samples")
    device: str = option("auto", "where to compute", choices="auto cuda mps cpu")
    precision: str = option("auto", "of matrix products", choices="auto bf16 fp16 fp32")
    compile: str = option("auto", "torch.compile (auto: on CUDA)", choices="auto on off")

    def micro_steps(self, world_size: int) -> int:
        """How many passes of B·T tokens a worker adds up for one step, too large for its memory."""
        tokens = self.micro_batch_size * self.seq_len * world_size
        if self.total_batch_size % tokens:
            nearest = max(1, round(self.total_batch_size / tokens)) * tokens
            raise ValueError(
                f"total_batch_size={self.total_batch_size} is no multiple of micro_batch_size ·"
                f" seq_len · workers = {tokens}; the nearest is {nearest}"
            )
        return self.total_batch_size // tokens


@dataclass(frozen=True)
class SampleConfig(Options):
    """What --generate writes."""

    n: int = option(1, "samples", 1, 1024)
    max_new_tokens: int = option(200, "tokens of a sample, after the prompt", 0)
    temperature: float = option(1.0, "0: the likeliest token; 1: as the model believes", 0, 100)
    top_k: int = option(50, "of the k likeliest tokens only", 1)
    top_p: float = option(1.0, "of the likeliest with probability p together only", 1e-9, 1)


# What differs from the defaults above. The larger models' learning rates are GPT-3's, table 2.1.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        data_dir="data/stdlib", n_layer=3, n_head=2, n_embd=128, block_size=128, seq_len=128,
        total_batch_size=4096, micro_batch_size=32, max_steps=1000, warmup_steps=20, max_lr=1.5e-2,
        min_lr_ratio=0.0, optimizer="muon", eval_every=250, checkpoint_every=250, val_tokens=2**20,
        sample_prompt="def ", hellaswag="off",
    ),
    "gpt2": dict(),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4, micro_batch_size=32),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4, micro_batch_size=16),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4, micro_batch_size=8),
}  # fmt: skip

# -------------------------------------------------------------------------------------- Model


def attends_by_hand(device: torch.device, dtype: torch.dtype, T: int) -> bool:
    """Where the form by hand below beats PyTorch's kernel: 1.25 times, in a step of quick."""
    return device.type == "cpu" and dtype == torch.bfloat16 and 1 < T <= 256


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and those before it: softmax(q·kᵀ / √hs)·v, head by head.

    (B, T, C) → (B, T, C). Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: Tensor | None = None, past: int = 0
    ) -> Tensor:
        """The context (mask, cache, past): see GPT.hidden."""
        B, T, C = x.size()
        # A token's query says what it looks for, its key what it can be found by, its value what it
        # gives. One matrix makes all three, as one large product is faster than three small ones.
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # A head is hs of the C channels. Splitting is a view, no number moves: (B, nh, T, hs) each.
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            cache[0, :, :, past : past + T], cache[1, :, :, past : past + T] = k, v
            k, v = cache[:, :, :, : past + T]  # (B, nh, past + T, hs) each
        if mask is None and attends_by_hand(x.device, q.dtype, T):
            # Divided by √hs: a sum of hs independent products of mean 0 and variance 1 has variance
            # hs, and softmax of large numbers picks one token, with hardly a gradient. Causal: the
            # scores of later tokens become -inf, so their weights are 0.
            later = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)  # 0 up to the diagonal
            scores = q / math.sqrt(q.size(-1)) @ k.mT + later  # (B, nh, T, T)
            weights = scores.softmax(dim=-1)  # each row sums to 1
            y = F.dropout(weights, self.dropout, self.training) @ v  # (B, nh, T, hs)
        else:
            # The same in one call. Where the device has such a kernel (FlashAttention,
            # arXiv:2205.14135) no (T, T) matrix is ever held. is_causal is the mask from above. A
            # single query is the last token and may see all keys; is_causal would leave it one.
            y = F.scaled_dot_product_attention(
                q, k, v, mask, self.dropout * self.training, is_causal=mask is None and T > 1
            )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again; c_proj mixes them
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token by itself: 4C detectors (c_fc, GELU), each of which writes its vector (c_proj).

    (B, T, C) → (B, T, C). GELU (arXiv:1606.08415) is x·P(N(0, 1) < x): like ReLU, x or nothing far
    from 0, but smooth, and with a slope for negative x too. GPT-2 used the tanh approximation.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Communication (attention), then computation (MLP); each adds to the residual stream x.

    Pre-norm (GPT-2, section 2.3): LayerNorm stands before each sublayer, not on the stream after it
    (post-norm, Vaswani et al.), so the gradient below ln_f reaches every block through additions
    alone. It brings each token's C numbers, by themselves, to mean 0 and variance 1, then scales
    and shifts them by two learned vectors: however large the stream has grown, a sublayer's input
    has one size.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.attn(self.ln_1(x), *context)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


def sample(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Draw a token for each row of logits (B, V) → ids (B, 1). Settings: see SampleConfig."""
    if temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    V = logits.size(1)
    limited = top_k is not None or top_p is not None
    logits, ids = logits.topk(min(top_k or V, V)) if limited else (logits, None)  # likeliest first
    p = (logits / temperature).softmax(dim=1)
    if top_p is not None:  # a token stays while those before it fall short of top_p
        p = p.masked_fill(p.cumsum(dim=1) - p >= top_p, 0.0)
    choice = torch.multinomial(p, num_samples=1, generator=generator)
    return ids.gather(1, choice) if limited else choice


class CrossEntropy(torch.autograd.Function):
    """logits (B·T, V), targets (B·T,) → the sum of -ln softmax(logits)[target], nats: ().

    Its gradient is softmax(logits), less 1 at the target: what is believed minus what is true. It
    is written over the logits, by far the largest tensor of a step, a few rows at a time: they fit
    into a CPU's cache, and only they are held in fp32, which sums over V terms need. At B=8, T=1024
    a 124M step takes 6.4 GB so, with F.cross_entropy 11.1 and 1.24 times as long.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        loss, rows = torch.zeros((), device=logits.device), max(1, 2**20 // logits.size(1))
        for some, target in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
            x = some.float()  # (rows, V)
            p = x.softmax(dim=1)
            # p = exp(x) / Σ exp(x), so ln Σ exp(x) = x - ln p; safest for the largest p.
            loss += (x.amax(dim=1) - p.amax(dim=1).log()).sum() - x.gather(1, target).sum()
            some.copy_(p.scatter_add_(1, target, p.new_full(target.shape, -1.0)))
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0].mul_(grad), None


class GPT(nn.Module):
    """GPT-2. The parameters have the names of OpenAI's checkpoint."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        t = self.transformer = nn.ModuleDict()
        t.wte = nn.Embedding(config.vocab_size, config.n_embd)  # a row for each token
        t.wpe = nn.Embedding(config.block_size, config.n_embd)  # a row for each position
        t.drop = nn.Dropout(config.dropout)
        t.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        t.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One tensor in two roles (arXiv:1608.05859): what a token means where it is read, and how
        # it scores where it is predicted, are learned as one. GPT-2 small saves 38.6M weights.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices normal with standard deviation 0.02, biases 0; LayerNorms are the identity.

        2L sublayers add to the residual stream, and variances add up: scaled by 1/√(2L), their last
        projections together add as much as one would (GPT-2, section 2.3). ln_f gives the head C
        numbers of variance 1: a logit has variance 0.02²·C, and the first loss is about
        ln V + 0.02²·C / 2, where a uniform guess has ln V.
        """
        for name, p in self.named_parameters():  # which gives the tied tensor once
            if p.dim() == 2:
                residual = name.endswith("c_proj.weight")
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                p.zero_()

    def num_params(self) -> int:
        """The number of weights; those of the tied head count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """FLOPs a token, forward and backward, in sequences of T (arXiv:2204.02311, appendix B).

        Forward a multiplication and an addition for each weight, backward twice that; wpe is only
        looked up, wte multiplies as the head. Scores and weighted sums: 4·T·C a block, the masked
        half counted too, and backward twice that.
        """
        c = self.config
        return 6 * (self.num_params() - c.block_size * c.n_embd) + 12 * c.n_layer * c.n_embd * T

    def hidden(
        self, idx: Tensor, pos: Tensor | None = None, mask: Tensor | None = None,
        cache: Tensor | None = None, past: int = 0,
    ) -> Tensor:  # fmt: skip
        """Token ids idx (B, T) → the residual stream after the last LayerNorm, (B, T, C).

        pos (T,) or (B, T): the tokens' positions, where they are not past, past + 1, …
        mask (B, 1, T, T): true where a query may look, where that is not at all tokens up to it.
        cache (L, 2, B, nh, block_size, hs): keys and values of `past` tokens; gets those of idx,
            which is one token where past > 0: the mask above would be wrong for several.
        """
        if pos is None:
            end = past + idx.size(1)
            if end > self.config.block_size:
                raise ValueError(f"{end} tokens are more than block_size={self.config.block_size}")
            pos = torch.arange(past, end, device=idx.device)  # (T,)
        # Looking up a row of wte is multiplying by a one-hot vector, without the zeros. Positions
        # are learned rows too, no formula: so there are none beyond block_size. Without them a
        # token would see the earlier ones as a heap, with no order.
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, mask, None if cache is None else cache[i], past)
        return self.transformer.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """idx (B, T) → logits (B, T, V); with targets (B, T), the next tokens: → mean loss, nats.

        Every position predicts its next token from the true ones so far (teacher forcing): T
        predictions for one pass.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        logits, targets = self.lm_head(x).flatten(0, 1), targets.flatten()  # (B·T, V), (B·T,)
        if logits.is_cuda or torch.compiler.is_compiling():  # compiled, it is fused
            return F.cross_entropy(logits.float(), targets)
        return CrossEntropy.apply(logits, targets) / len(targets)

    @contextlib.contextmanager
    def inference(self, dtype: torch.dtype, rows: int) -> Iterator[None]:
        """Inside, dropout is off and a CPU's weights are packed as oneDNN wants them for such rows.

        Unpacked, it packs them in every call, which for few rows takes longer than the product:
        124M generates 1.2 to 1.3 times as fast in bf16, 1.7 to 2.9 times in fp32.
        """
        oneDNN, was_training = torch.ops.mkldnn, self.training
        able = self.lm_head.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if able and dtype != torch.float32:
            able = dtype == torch.bfloat16 and oneDNN._is_mkldnn_bf16_supported()
        linears = [m for m in self.modules() if isinstance(m, nn.Linear) and able]
        for m in linears:
            weight = oneDNN._reorder_linear_weight(m.weight.to(dtype), rows)
            rest = (weight, None if m.bias is None else m.bias.to(dtype), "none", [], "")
            m.forward = lambda x, rest=rest: oneDNN._linear_pointwise(x.to(dtype), *rest)
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)
            for m in linears:
                del m.forward

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, stop: int | None = None, n_vocab: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue the rows of idx (B, T) → (B, T + max_new_tokens), or shorter if all rows stop.

        temperature, top_k, top_p (arXiv:1904.09751): see SampleConfig. stop: this token ends a row,
        which then repeats it. n_vocab: the tokenizer's size, where wte is padded beyond it.

        No token looks ahead, so the keys and values of earlier ones never change: they are kept,
        and each step feeds one token. Past block_size the window slides, every token has a new
        position, and all is computed anew.
        """
        if idx.size(1) == 0:
            raise ValueError("the prompt is empty: it needs at least one token")
        c, kind, past = self.config, idx.device.type, 0
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else self.lm_head.weight.dtype
        shape = (c.n_layer, 2, len(idx), c.n_head, c.block_size, c.n_embd // c.n_head)
        cache = torch.empty(shape, dtype=dtype, device=idx.device)
        stopped = torch.zeros_like(idx[:, :1], dtype=torch.bool)
        with self.inference(dtype, len(idx)):
            for _ in range(max_new_tokens):
                if idx.size(1) <= c.block_size:
                    x, past = self.hidden(idx[:, past:], cache=cache, past=past), idx.size(1)
                else:
                    x = self.hidden(idx[:, -c.block_size :])
                logits = self.lm_head(x[:, -1])[:, :n_vocab].float()  # (B, n_vocab)
                token = sample(logits, temperature, top_k, top_p, generator)  # (B, 1)
                if stop is not None:
                    token = token.masked_fill(stopped, stop)
                    stopped |= token == stop
                idx = torch.cat((idx, token), dim=1)
                if stopped.all():
                    break
        return idx

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> "GPT":
        """gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder, in Hugging Face's format, on the CPU.

        Reads safetensors only, which hold numbers and no code. Errors: ValueError, with the reason.
        """
        from safetensors.torch import load_file
        from transformers import AutoConfig, GPT2Config
        from transformers.utils import cached_file

        same = ("model_type", "activation_function", "layer_norm_epsilon", "scale_attn_weights",
                "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")  # fmt: skip
        try:
            c, gpt2 = AutoConfig.from_pretrained(name_or_path), GPT2Config()
            if others := [key for key in same if getattr(c, key, None) != getattr(gpt2, key)]:
                raise ValueError(f"not a GPT-2, it has another {', '.join(others)}")
            with torch.device("meta"):  # shapes without numbers: no memory is taken but the file's
                model = cls(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd))
            items = load_file(cached_file(name_or_path, "model.safetensors")).items()
            # OpenAI's own lack the prefix, and hold causal masks, which are no weights.
            skip = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")
            tensors = {n.removeprefix("transformer."): t for n, t in items if not n.endswith(skip)}
            model.transformer.load_state_dict(transpose_conv1d(tensors), assign=True)
            model.lm_head.weight = model.transformer.wte.weight
            return model.float()
        except Exception as e:  # the hub, safetensors and transformers each fail in their own ways
            reason = " ".join((str(e) or repr(e)).split())
            raise ValueError(
                f"no GPT-2 from {name_or_path!r}: {reason} (what can be: gpt2, gpt2-medium,"
                " gpt2-large, gpt2-xl, or a folder with config.json and model.safetensors)"
            ) from e

    def save_pretrained(self, folder: str | Path, tokenizer: Encoding | None = None) -> None:
        """Write a folder that transformers' AutoModelForCausalLM, AutoTokenizer and pipeline read.

        Rows of wte beyond the tokenizer's vocabulary are left out. Errors: OSError.
        """
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        c, eot = self.config, tokenizer.eot_token if tokenizer else None
        n_vocab = tokenizer.n_vocab if tokenizer else c.vocab_size
        hf = GPT2Config(
            n_positions=c.block_size, vocab_size=n_vocab, n_layer=c.n_layer, n_head=c.n_head,
            n_embd=c.n_embd, bos_token_id=eot, eos_token_id=eot,
        )  # fmt: skip
        theirs, tensors = GPT2LMHeadModel(hf), transpose_conv1d(self.state_dict())
        for name in ("transformer.wte.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:n_vocab]
        theirs.load_state_dict(tensors)
        try:
            theirs.save_pretrained(folder)
        except Exception as e:  # safetensors has an error of its own for a full disk
            raise OSError(f"cannot write {folder}: {e}") from e
        if tokenizer:
            fineweb.save_hf_tokenizer(tokenizer, folder, c.block_size)


def transpose_conv1d(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI wrote these layers as 1×1 convolutions, (in, out), and Hugging Face keeps that layout
    ("Conv1D"); nn.Linear's is (out, in). So both loading and saving transpose."""
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: t.T.contiguous() if name.endswith(conv1d) else t for name, t in tensors.items()}


# ------------------------------------------------------------------- Optimizers and schedule


def get_lr(step: int, cfg: TrainConfig) -> float:
    """The learning rate of step 0, 1, …: linear warm-up, half a cosine, then flat.

    Step 0 gets max_lr / warmup_steps, as a rate of 0 would waste it. Warm-up: the optimizer's
    averages mean little yet. The fall: smaller steps settle in the valley that large ones found.
    """
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    done = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
    low = cfg.max_lr * cfg.min_lr_ratio
    return low + (cfg.max_lr - low) * 0.5 * (1.0 + math.cos(math.pi * done))


def orthogonalize(g: Tensor) -> Tensor:
    """A matrix (…, rows, columns) with all its singular values brought near 1, in g's dtype.

    Newton–Schulz iteration. Divided by its norm g has none above 1; aX + bXXᵀX + c(XXᵀ)²X lifts the
    small ones, and five steps bring most to 0.7 … 1.2. a, b, c (below) are chosen for speed: it
    goes no nearer to 1 (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    """
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.mT if (tall := x.size(-2) > x.size(-1)) else x  # of x·xᵀ and xᵀ·x the smaller
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: a step moves all directions of a matrix about equally.

    A few directions dominate a gradient; so the rare ones learn as fast. An orthogonal matrix has
    RMS 1/√max(rows, columns); 0.2·√max(rows, columns) times that is 0.2, about AdamW's, so one
    learning rate serves both (arXiv:2502.16982). A group is of matrices of one shape, computed as
    one batch: 4 % off a step of the quick preset.
    """

    def __init__(self, groups: list[list[Tensor]], weight_decay: float, dtype: torch.dtype) -> None:
        defaults = dict(lr=0.0, weight_decay=weight_decay, momentum=0.95)
        super().__init__([dict(params=group) for group in groups], defaults)
        self.dtype = dtype  # of the orthogonalization, which need not be exact

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            grad = torch.stack([p.grad for p in params])  # (n, rows, columns)
            average = self.state[params[0]].setdefault("average", torch.zeros_like(grad))
            average.lerp_(grad, 1 - momentum)
            update = grad.lerp(average, momentum).to(self.dtype)  # Nesterov: one step ahead
            rows, columns = grad.shape[1:]
            if rows == 3 * columns:  # c_attn is three matrices; as one, 0.025 bits a byte worse
                rows = columns
            update = orthogonalize(update.view(-1, rows, columns)).reshape(grad.shape)
            for p, u in zip(params, update, strict=True):
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(u, alpha=-0.2 * lr * max(rows, columns) ** 0.5)


def configure_optimizers(
    model: GPT, cfg: TrainConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv:1711.05101); for cfg.optimizer="muon" Muon takes the blocks' matrices from it.

    AdamW divides a weight's average gradient by its usual size; betas are GPT-3's. Decay keeps the
    matrices, wte and wpe too, from growing without end. Biases and LayerNorms have none: a scale
    pulled to 0 would shut its channel. fused: a tensor's whole update in one pass over memory.
    """
    params = dict(model.named_parameters())
    muon = [n for n, p in params.items() if cfg.optimizer == "muon" and ".h." in n and p.dim() == 2]
    rest = [p for n, p in params.items() if n not in muon]
    matrices = dict(params=[p for p in rest if p.dim() >= 2], weight_decay=cfg.weight_decay)
    vectors = dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)
    adamw = torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.95), eps=1e-8, fused=True)
    shapes = dict.fromkeys(params[n].shape for n in muon)
    same_shape = [[params[n] for n in muon if params[n].shape == shape] for shape in shapes]
    return [adamw, Muon(same_shape, cfg.weight_decay, dtype)] if muon else [adamw]


# --------------------------------------------------------------------------------------- Data


@functools.lru_cache(maxsize=8)
def permutation(n: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(n)


class DataLoaderLite:
    """Micro-batches of windows of tokens; which ones is a function of the micro-batch's number.

    A shard of n tokens holds (n-1)//T windows of T inputs, each with its T targets one further on.
    Windows cross the borders of documents, and attention with them: accepted, as the <|endoftext|>
    between them says what happened. An epoch of the training split visits every window once, the
    shards shuffled and the windows shuffled in each; validation comes in order.

    Micro-batch i takes the next world_size · B windows, rank 0 the first B, rank 1 the next B, …:
    no two workers read the same, and none has to ask. A step's tokens depend neither on B nor on
    the number of workers, and a run goes on from its step number alone. Errors: ValueError.
    """

    def __init__(
        self, data_dir: str | Path, split: str, B: int, T: int, rank: int = 0, world_size: int = 1,
        seed: int = 1337, n_vocab: int = 2**16,
    ) -> None:  # fmt: skip
        self.B, self.T, self.rank, self.world_size = B, T, rank, world_size
        self.seed, self.n_vocab, self.shuffled = seed, n_vocab, split == "train"
        self.files, self.shards = zip(*fineweb.open_shards(data_dir, split), strict=True)  # mmap
        self.counts = np.array([(len(shard) - 1) // T for shard in self.shards]).clip(0)
        self.n_windows = int(self.counts.sum())
        if self.n_windows == 0:
            raise ValueError(f"{data_dir}: no {split} shard has the {T + 1} tokens of one window")

    def window(self, i: int) -> np.ndarray:
        """The T + 1 tokens of window i of the endless order, uint16."""
        epoch, i = divmod(i, self.n_windows)
        n, key = len(self.shards), (self.seed, epoch)
        order = permutation(n, *key) if self.shuffled else np.arange(n)
        ends = self.counts[order].cumsum()
        place = int(ends.searchsorted(i, side="right"))  # the shard's, in this epoch's order
        shard = int(order[place])
        i -= int(ends[place] - self.counts[shard])
        i = permutation(int(self.counts[shard]), *key, shard + 1)[i] if self.shuffled else i
        tokens = self.shards[shard][i * self.T : (i + 1) * self.T + 1]
        if (largest := tokens.max()) >= self.n_vocab:
            raise ValueError(f"{self.files[shard]}: id {largest} in a vocabulary of {self.n_vocab}")
        return tokens

    def windows(self, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these windows, int64 (B, T) each."""
        tokens = torch.from_numpy(np.stack([self.window(i) for i in numbers]).astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def batch(self, i: int) -> tuple[Tensor, Tensor]:
        """This rank's micro-batch i since the start of the run: x and y, int64 (B, T) each."""
        first = (i * self.world_size + self.rank) * self.B
        return self.windows(range(first, first + self.B))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.batch, itertools.count())


# -------------------------------------------------------------------------- Workers and devices


@dataclass(frozen=True)
class Worker:
    """This process: its place among those that train together, and what it computes with.

    torchrun starts many, plain python one. All hold the same weights, each reads other data; their
    gradients are averaged, so that all take the same step (data parallelism).
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32  # of matrix products

    def print(self, *text: str) -> None:
        if self.rank == 0:
            with contextlib.suppress(OSError):  # a full disk must not end a run
                print(*text, sep="\n", flush=True)

    def gather(self, *values: float) -> Tensor:
        """Every worker's values, float64 (world_size, n). Returns once all have called it."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.world_size == 1:
            return mine[None]
        everyone = [torch.empty_like(mine, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine.to(self.device))
        return torch.stack(everyone).cpu()

    def autocast(self) -> torch.autocast:
        """Mixed precision: matrix products in dtype, which saves time and memory. Weights, their
        gradients, the optimizer's state, the residual stream and the loss stay fp32: what a step
        adds to a weight, or a block to the stream, would often be lost in bf16's 8 bits."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def matmul_rate(self) -> float:
        """FLOP/s of a bare matrix product, the limit that utilisation is measured by."""
        n, seconds = 8192 if self.device.type == "cuda" else 2048, []
        a = torch.randn(n, n, device=self.device, dtype=self.dtype)
        for _ in range(5):
            began = time.perf_counter()
            (a @ a)[0, 0].item()  # which waits for the result
            seconds.append(time.perf_counter() - began)
        return 2 * n**3 / min(seconds)


def start_worker(device: str = "auto", precision: str = "auto") -> Worker:
    """Join the workers that torchrun started; choose device and precision. Errors: ValueError.

    bf16 where the hardware has it: fp32's range, 8 significant bits. fp16 on older CUDA cards: 11,
    but nothing below 6e-8. (A device that emulates bf16 is slow, and may say it supports it.)
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if not dict(cuda=cuda, mps=mps, cpu=True)[device]:
        raise ValueError(f"device={device}: PyTorch finds none on this machine")
    if device == "cpu" and precision == "fp16":
        raise ValueError("precision=fp16: a CPU emulates it, very slowly; take bf16 or fp32")
    alone = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)  # without torchrun
    rank, world_size, local_rank = (int(os.environ.get(k, v)) for k, v in alone.items())
    if world_size > 1 and device == "mps":
        raise ValueError(f"{world_size} workers cannot train together on mps: take --device cpu")
    if device == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"worker {local_rank} has no GPU, of {gpus}: lower --nproc_per_node")
        torch.cuda.set_device(local_rank)
    if precision == "auto" and device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp16"
    elif precision == "auto":
        has = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch cannot tell: fp32
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        native = wide and (has.get("avx512_bf16") or has.get("amx_bf16"))
        precision = "bf16" if device == "cpu" and native else "fp32"
    if world_size > 1:
        # torchrun keeps one store over restarts; a restarted worker must not find in it the address
        # that a peer had before it died: each start gets its own part of the store. Restarts are
        # counted by each machine, so this is for one machine (for several see the README).
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    if platform.libc_ver()[0] == "glibc":
        # glibc returns large freed buffers to the kernel, and each step faults their pages in
        # again: without this a 124M step on two cores takes 1.5 times as long.
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    torch.set_float32_matmul_precision("high")  # TF32: fp32's range, fp16's 11 bits
    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
    name = f"cuda:{local_rank}" if device == "cuda" else device
    return Worker(rank, world_size, torch.device(name), dtypes[precision])


# --------------------------------------------------------------------------------- Evaluation


@torch.no_grad()
def evaluate(
    model: GPT, loader: DataLoaderLite, val_tokens: int, tokenizer: Encoding,
    worker: Worker = Worker(),
) -> tuple[float, float]:  # fmt: skip
    """Loss in nats a token and in bits a byte, over the loader's first val_tokens tokens, at most.

    The same tokens for any B and number of workers. Bits a byte compare models across tokenizers: a
    larger vocabulary makes fewer and harder predictions of the same text.
    """
    token_bytes = fineweb.token_lengths(tokenizer)  # 0 for <|endoftext|>
    n = min(max(1, val_tokens // loader.T), loader.n_windows)
    first, end = (n * (worker.rank + i) // worker.world_size for i in (0, 1))
    nats = n_bytes = 0.0
    with worker.autocast(), model.inference(worker.dtype, loader.B * loader.T):
        for i in range(first, end, loader.B):
            x, y = loader.windows(range(i, min(i + loader.B, end)))
            n_bytes += float(token_bytes[y].sum())
            nats += model(x.to(worker.device), y.to(worker.device)).item() * y.numel()
    nats, n_bytes = worker.gather(nats, n_bytes).sum(dim=0).tolist()
    return nats / (n * loader.T), nats / math.log(2) / max(1, n_bytes)


def sample_texts(
    model: GPT, tokenizer: Encoding, worker: Worker, prompt: str, n: int, seed: int = 1337,
    **settings: Any,
) -> list[str]:  # fmt: skip
    """n continuations of the prompt, which they include. settings: see GPT.generate."""
    ids, eot = tokenizer.encode(prompt, disallowed_special=()), tokenizer.eot_token
    limit = model.config.block_size
    if not 1 <= len(ids) <= limit:
        raise ValueError(f"the prompt has {len(ids)} tokens; this model takes 1 to {limit}")
    settings |= dict(stop=eot, n_vocab=tokenizer.n_vocab)
    settings["generator"] = torch.Generator(worker.device).manual_seed(seed)
    with worker.autocast():
        rows = model.generate(torch.tensor([ids] * n, device=worker.device), **settings)
    new = rows[:, len(ids) :].tolist()
    return [prompt + tokenizer.decode(list(itertools.takewhile(eot.__ne__, row))) for row in new]


# --------------------------------------------------------------------- Checkpoints and the log


def list_checkpoints(log_dir: str | Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    paths = [p for p in Path(log_dir).glob("checkpoint_*.pt") if p.stem[11:].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem[11:]))


def save_checkpoint(log_dir: Path, keep_every: int, step: int, **state: Any) -> None:
    """Save what a run needs to go on after `step` steps. The rest (data order, learning rate,
    dropout, samples) are functions of the step. Of the checkpoints the newest two stay, and each
    whose step is a multiple of keep_every. Errors: OSError."""
    with fineweb.whole_file(log_dir / f"checkpoint_{step:06d}.pt") as file:
        torch.save(state | {"step": step}, file)
    for old in list_checkpoints(log_dir)[:-2]:
        if int(old.stem[11:]) % keep_every:
            old.unlink()


def load_checkpoint(path: str | Path) -> tuple[GPT, dict[str, Any]]:
    """A checkpoint's model, on the CPU, and what else is in it. Runs no code. Errors: ValueError.

    The file is a zip archive with a CRC-32 for each tensor, which torch does not look at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
            if any(record.external_attr or record.compress_type for record in archive.infolist()):
                raise ValueError("its directory is damaged")  # torch writes 0 for both
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # shapes without numbers: no memory is taken but the file's
            model = GPT(GPTConfig(**state["config"]))
        model.load_state_dict(state["model"], assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        if 4 * model.num_params() > os.path.getsize(path):
            raise ValueError("it claims to hold more than it does")
        return model.float(), state
    except Exception as e:  # zip, pickle and torch each fail in ways of their own
        reason = (str(e) or repr(e)).splitlines()[0]
        raise ValueError(f"{path} is no whole checkpoint of this version: {reason}") from e


def load_model(name: str | Path) -> tuple[GPT, Encoding]:
    """A model in evaluation mode, on the CPU, and its tokenizer. name: a checkpoint, a run's folder
    (its newest checkpoint), or what GPT.from_pretrained takes. Errors: ValueError, OSError."""
    path = (list_checkpoints(name) or [Path(name)])[-1]
    is_checkpoint = path.suffix == ".pt"
    model = load_checkpoint(path)[0] if is_checkpoint else GPT.from_pretrained(str(name))
    tokenizer = fineweb.load_tokenizer(path.parent if is_checkpoint else path)
    check_vocabulary(model, tokenizer)
    return model.eval(), tokenizer


def check_vocabulary(model: GPT, tokenizer: Encoding) -> None:
    rows, n_vocab = model.config.vocab_size, tokenizer.n_vocab
    if not n_vocab <= rows <= padded(n_vocab):
        raise ValueError(f"vocab_size={rows} does not fit the tokenizer's {n_vocab} tokens")


def padded(n_vocab: int) -> int:
    """Rows of wte for n_vocab tokens: the next multiple of 128, 50,257 → 50,304. GPUs multiply
    matrices in tiles; odd sizes leave some of them half empty. No token has the added rows."""
    return math.ceil(n_vocab / 128) * 128


def read_log(log_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl, but for a last line that a kill cut short."""
    path, records = Path(log_dir) / "log.jsonl", []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def start_log(log_dir: Path, start: int, facts: dict[str, Any]) -> None:
    """log.jsonl as it stood before step `start`, and the facts. Removes what kills left behind."""
    for rest in log_dir.glob("*.tmp"):
        rest.unlink()
    kept = [r for r in read_log(log_dir) if type(i := r.get("step", -1)) is int and i < start]
    lines = (json.dumps(r).encode() + b"\n" for r in [*kept, facts | dict(start_step=start)])
    fineweb.write_file(log_dir / "log.jsonl", *lines)


def plot_log(log_dir: Path) -> None:
    """loss.png: the losses over the steps, and HellaSwag beside them where it was evaluated."""
    from matplotlib.figure import Figure

    records = read_log(log_dir)
    panels = {"training and validation loss, nats a token": ("loss", "val_loss")}
    if any("hellaswag_acc" in record for record in records):
        panels["HellaSwag, share of right answers"] = ("hellaswag_acc", "hellaswag_acc_norm")
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    for ax, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key in panels[title]:
            points = [(r["step"], r[key]) for r in records if {"step", key} <= r.keys()]
            style = "-" if key == "loss" else "o-"
            ax.plot(*np.reshape(points, (-1, 2)).T, style, label=key, ms=4, lw=1)
        ax.set(title=title, xlabel="step")
        ax.legend()
    with fineweb.whole_file(log_dir / "loss.png") as file:
        figure.savefig(file, format="png", dpi=120)


@contextlib.contextmanager
def only_warn() -> Iterator[None]:
    """An error in here, a full disk say, is printed as a warning, and training goes on."""
    try:
        yield
    except Exception as e:
        with contextlib.suppress(OSError):
            print(f"WARNING: {e}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------- Training


def describe(
    model: GPT, cfg: TrainConfig, worker: Worker, compiled: bool, peak: float, epochs: float
) -> dict[str, Any]:
    """What a run prints and logs before its first step: what it does, where, and how."""
    device, source = worker.device, Path(__file__).read_bytes()
    c, kernel = model.config, "PyTorch's choice"  # mps does not say which
    if attends_by_hand(device, worker.dtype, cfg.seq_len):
        kernel = "BY_HAND"
    elif device.type != "mps":
        shape = (1, c.n_head, cfg.seq_len, c.n_embd // c.n_head)
        q = torch.empty(shape, device=device, dtype=worker.dtype)
        choice = torch._fused_sdp_choice(q, q, q, dropout_p=c.dropout, is_causal=True)
        kernel = nn.attention.SDPBackend(choice).name
    return dict(
        device=f"{device}, {torch.get_num_threads()} threads, {worker.world_size} workers",
        precision=f"{worker.dtype}, a bare matmul does {peak / 1e12:.3g} TFLOP/s",
        chosen=f"compile {compiled}, attention {kernel}, {cfg.optimizer}, AdamW fused",
        config=asdict(c), train_config=asdict(cfg), parameters=model.num_params(),
        tokens=cfg.total_batch_size * cfg.max_steps, epochs=round(epochs, 2),
        versions=f"python {platform.python_version()}, torch {torch.__version__}",
        source=f"sha256 of train_gpt2.py {hashlib.sha256(source).hexdigest()[:12]}",
    )  # fmt: skip


def restore(
    log_dir: Path, model: GPT, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler
) -> int:
    """Put the newest whole checkpoint into all of these → its step; 0 where there is none yet."""
    if not (paths := list_checkpoints(log_dir)):
        return 0
    for path in reversed(paths):
        with only_warn():  # and try the one before it
            saved, state = load_checkpoint(path)
            break
    else:
        raise ValueError(f"{log_dir}: none of its checkpoints is whole; name another log_dir")
    if saved.config != model.config:
        raise ValueError(f"{path} has another shape: {saved.config}, not {model.config}")
    try:
        for optimizer, its_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        if state["scaler"]:  # the run so far was in fp16
            scaler.load_state_dict(state["scaler"])
    except (ValueError, LookupError) as e:
        raise ValueError(f"{path} is of a run with other optimizers: {e}") from None
    model.load_state_dict(saved.state_dict())
    return state["step"]


def train(
    model: GPT, cfg: TrainConfig, worker: Worker = Worker(), resume: bool = False,
    signals: Sequence[int] = (),
) -> int:  # fmt: skip
    """Train model, which is on worker.device, as cfg says; the run's files go to cfg.log_dir.

    resume: go on from the newest checkpoint there, if there is one. signals: once a signal's
    number is in it, a checkpoint is saved after the step in progress and the number returned; at
    the end 0 is. Errors: ValueError, OSError; FloatingPointError where the loss or the gradient is
    not finite, before any weight is touched.
    """
    import hellaswag

    T, device, log_dir, master = cfg.seq_len, worker.device, Path(cfg.log_dir), worker.rank == 0
    if T > model.config.block_size:
        raise ValueError(f"seq_len={T} is more than block_size={model.config.block_size}")
    accumulation = cfg.micro_steps(worker.world_size)
    tokenizer = fineweb.load_tokenizer(cfg.data_dir)
    check_vocabulary(model.train(), tokenizer)
    sample_texts(model, tokenizer, worker, cfg.sample_prompt, 1, max_new_tokens=0)  # does it fit?
    how = (cfg.micro_batch_size, T, worker.rank, worker.world_size, cfg.seed, tokenizer.n_vocab)
    train_loader = DataLoaderLite(cfg.data_dir, "train", *how)
    val_loader = DataLoaderLite(cfg.data_dir, "val", *how)
    examples = hellaswag.load_examples(worker) if cfg.hellaswag == "on" else []
    optimizers = configure_optimizers(model, cfg, worker.dtype)
    # A gradient below 6e-8 would be 0 in fp16. The scaler multiplies the loss and divides the
    # gradients; when they overflow it halves its factor. For other dtypes it does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=worker.dtype == torch.float16)
    start = restore(log_dir, model, optimizers, scaler) if resume else 0
    if start > cfg.max_steps or len(worker.gather(start).unique()) > 1:
        raise ValueError(f"{log_dir}: resumed at {start}, beyond max_steps or where others did not")
    if resume:
        worker.print(f"resumed at step {start}" if start else "no checkpoint yet: starts at step 0")
    compiled = cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")
    net = torch.compile(model) if compiled else model  # the same weights; evaluation uses model
    if worker.world_size > 1:
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    def micro_step(i: int) -> Tensor:
        """Add micro-batch i to the gradients → its part of the step's loss."""
        x, y = train_loader.batch(i)
        if device.type == "cuda":  # from pinned memory the CPU need not wait for the copy
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with worker.autocast():
            # backward() adds to the gradients, and each loss is a mean over B·T tokens. Divided,
            # they add up to the mean over all of the step's tokens, as one large batch has it.
            loss = net(x, y) / accumulation
        scaler.scale(loss).backward()
        return loss.detach()

    if compiled:  # now, so that no step's time includes it
        micro_step(0)
        model.zero_grad()
    peak = worker.matmul_rate()  # FLOP/s
    flops = model.flops_per_token(T) * cfg.total_batch_size / worker.world_size  # a worker's step
    if master:
        if tokenizer.name != "gpt2":
            fineweb.save_tokenizer(tokenizer, log_dir)
        epochs = cfg.total_batch_size * cfg.max_steps / T / train_loader.n_windows
        facts = describe(model, cfg, worker, compiled, peak, epochs)
        worker.print(*(f"{key}: {value}" for key, value in facts.items()))
        start_log(log_dir, start, facts)

    def log(record: dict[str, Any]) -> None:
        worker.print(" | ".join(f"{key} {value:.5g}" for key, value in record.items()))
        if master:
            with only_warn(), open(log_dir / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def assess(step: int) -> None:
        """Evaluate, draw the log, write samples."""
        val_loss, bits = evaluate(model, val_loader, cfg.val_tokens, tokenizer, worker)
        if not math.isfinite(val_loss):
            raise FloatingPointError(f"step {step}: the validation loss is {val_loss}")
        scores = hellaswag.evaluate(model, tokenizer, examples, worker) if examples else {}
        log(dict(step=step, val_loss=val_loss, bits_per_byte=bits) | scores)
        if master:
            with only_warn():
                plot_log(log_dir)
            settings = dict(n=4, seed=cfg.seed, max_new_tokens=32, top_k=50)
            for text in sample_texts(model, tokenizer, worker, cfg.sample_prompt, **settings):
                worker.print(f"  {text!r}")

    def save(step: int) -> None:
        with only_warn():
            save_checkpoint(
                log_dir, 10 * cfg.checkpoint_every, step, config=asdict(model.config),
                train_config=asdict(cfg), model=model.state_dict(), scaler=scaler.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
            )  # fmt: skip

    skipped, seconds, signum = 0, 0.0, 0
    for step in range(start, cfg.max_steps + 1):
        last = step == cfg.max_steps
        if (step % cfg.eval_every == 0 or last) and not signum:
            assess(step)
        if master and step > start and (step % cfg.checkpoint_every == 0 or last or signum):
            save(step)
        if last or signum:
            break  # the last turn only evaluates and saves

        began, lr = time.perf_counter(), get_lr(step, cfg)
        torch.manual_seed((cfg.seed + step) * worker.world_size + worker.rank)  # of dropout
        loss = torch.zeros((), device=device)
        for i in range(accumulation):
            # DDP averages gradients in the backward pass; once a step is enough.
            net.require_backward_grad_sync = i == accumulation - 1
            loss += micro_step(step * accumulation + i)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        # The norm of all gradients is capped: one odd batch must not throw the weights far.
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
        told = worker.gather(loss.item(), signals[0] if signals else 0)  # (world_size, 2)
        losses, signum = told[:, 0], int(told[:, 1].max())
        # fp16 may overflow: the step is skipped, as the scaler adapts. Ten in a row are a failure.
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if not losses.isfinite().all() or skipped == (10 if scaler.is_enabled() else 1):
            raise FloatingPointError(
                f"step {step}: loss {losses.tolist()} (rank by rank), gradient norm {norm},"
                f" {skipped} steps skipped; no weight was touched. --resume goes on from the newest"
                " checkpoint: try a lower --max_lr, or another --precision"
            )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if not skipped:
                optimizer.step()
            optimizer.zero_grad()
        scaler.update()

        took = time.perf_counter() - began
        seconds += took
        record = dict(step=step, loss=losses.mean().item(), lr=lr, ms=took * 1e3)
        record |= {} if skipped else dict(grad_norm=norm)  # JSON has no inf
        record |= dict(tok_per_s=cfg.total_batch_size / took, utilisation=flops / took / peak)
        left = seconds / (step - start + 1) * (cfg.max_steps - step - 1)
        log(record | dict(minutes_left=left / 60))
    if last and master:
        model.save_pretrained(log_dir / "hf", tokenizer)
        worker.print(f"{log_dir} holds log.jsonl, loss.png, checkpoints, and hf/ for transformers")
    return signum


# ------------------------------------------------------------------------------- Command line


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that were given, by name. Those of the two configs are made from their fields."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.error = lambda message: sys.exit(f"error: {message} (--help lists all flags)")
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: gpt2 for --init or FineWeb-Edu, else quick")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--generate", metavar="PROMPT", help="write samples with --init or the newest run, and end")
    for config in (GPTConfig, TrainConfig, SampleConfig):
        group = parser.add_argument_group(config.__name__)
        for f in fields(config):
            help, choices = f.metadata["help"], f.metadata["allowed"][2] or None
            help += "" if "default" in help else f" (default: {f.default})"
            group.add_argument(f"--{f.name}", type=f.type, choices=choices, help=help)
    return vars(parser.parse_args(argv))


def of(config: type, flags: dict[str, Any]) -> dict[str, Any]:
    """Those of the flags that are fields of a config."""
    return {f.name: flags[f.name] for f in fields(config) if f.name in flags}


def print_samples(flags: dict[str, Any]) -> None:
    how = asdict(SampleConfig(**of(SampleConfig, flags)))
    newest = max(Path("log").glob("*/checkpoint_*.pt"), key=os.path.getmtime, default=None)
    if not (name := flags.get("init") or newest):
        raise ValueError("there is no run in log/ to sample from: train one, or give --init")
    model, tokenizer = load_model(name)
    worker = start_worker(flags.get("device", "auto"), flags.get("precision", "auto"))
    model.to(worker.device)
    how["seed"] = flags.get("seed", TrainConfig.seed)
    for text in sample_texts(model, tokenizer, worker, flags["generate"], **how):
        print(text, end="\n\n")


def pick_log_dir(flags: dict[str, Any], preset: str) -> str:
    """The folder that was given, or log/PRESET, log/PRESET-2, …: the first that no run has taken,
    or with --resume the last that one has."""
    resume, given = flags.get("resume", False), flags.get("log_dir")
    names = [given] if given else [f"log/{preset}", *(f"log/{preset}-{i}" for i in range(2, 1000))]
    taken = [Path(name, "log.jsonl").exists() for name in names]
    if given and taken[0] and not resume:
        raise ValueError(f"log_dir={given} holds a run: --resume goes on with it; or name another")
    free = taken.index(False) if False in taken else 1
    return names[max(0, free - 1) if resume or given else free]


def make_model(flags: dict[str, Any], shape: dict[str, Any], cfg: TrainConfig) -> GPT:
    """A fresh model of this shape, or the one that cfg.init names, for cfg.data_dir's tokenizer."""
    tokenizer = fineweb.load_tokenizer(cfg.data_dir)
    if not cfg.init:
        torch.manual_seed(cfg.seed)
        return GPT(GPTConfig(**({"vocab_size": padded(tokenizer.n_vocab)} | shape)))
    start, own = load_model(cfg.init)
    if fineweb.spell(own) != fineweb.spell(tokenizer):
        raise ValueError(f"init={cfg.init}: its tokenizer is not that of data_dir={cfg.data_dir}")
    asked = of(GPTConfig, flags)
    model = GPT(replace(start.config, **asked))
    try:
        model.load_state_dict(start.state_dict())
    except RuntimeError:
        raise ValueError(f"init={cfg.init} is a {start.config}: it cannot become {asked}") from None
    return model


def run(flags: dict[str, Any]) -> None:
    if "generate" in flags:
        return print_samples(flags)
    has_shards = any(Path(TrainConfig.data_dir).glob("*train_*.npy"))
    preset = flags.get("preset") or ("gpt2" if has_shards or "init" in flags else "quick")
    chosen = PRESETS[preset] | flags
    GPTConfig(**of(GPTConfig, chosen))  # a wrong value is an error now, not after preparing data
    cfg = TrainConfig(**of(TrainConfig, chosen) | {"log_dir": pick_log_dir(flags, preset)})
    cfg.micro_steps(int(os.environ.get("WORLD_SIZE", 1)))
    worker = start_worker(cfg.device, cfg.precision)
    if preset == "quick" and not flags.keys() & {"preset", "data_dir"}:
        worker.print("no shards in edu_fineweb10B (python fineweb.py makes them): preset quick")
    signals: list[int] = []

    def note(number: int, frame: Any) -> None:
        signals.append(number)
        # A second Ctrl-C does not wait for a checkpoint. SIGTERM may come twice by itself, from the
        # scheduler and from torchrun.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        Path(cfg.log_dir).mkdir(parents=True, exist_ok=True)
        if "data_dir" not in flags and preset == "quick":
            fineweb.prepare_stdlib(cfg.data_dir)
    worker.gather(0)  # the others wait here
    for split in ("train", "val"):
        fineweb.open_shards(cfg.data_dir, split)  # an error here comes before anything is computed
    model = make_model(flags, of(GPTConfig, chosen), cfg).to(worker.device)
    signum = train(model, cfg, worker, flags.get("resume", False), signals)
    status = 128 + signum if signum else 0
    if worker.world_size > 1:
        dist.destroy_process_group()
        os._exit(status)  # gloo's threads can abort a process that ends in Python's usual way
    if status:
        sys.exit(status)


def main(argv: Sequence[str] | None = None) -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that lacks a character
    try:
        run(parse(argv))
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
