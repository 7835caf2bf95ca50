"""GPT-2 in one file: the model, its training, and the text that it writes.

    python train_gpt2.py --preset quick        trains a small GPT-2 on this computer, in minutes
    python train_gpt2.py --generate "def "     lets the newest model continue this text
    python fineweb.py                          downloads 10 billion tokens of training text
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    trains GPT-2 124M on them

Read it from top to bottom. Its first part is GPT-2 itself, in the order in which one learns it. Its
second part is the machinery of a run. The first part uses some of its functions, whose names say
what they do: `require`, for instance, raises an error unless a condition holds.

Notation in all files of this project:
    B   sequences in a batch                     nh  attention heads in a block (n_head)
    T   tokens in a sequence                     hs  the size of a head: C / nh
    C   channels of a token's vector (n_embd)    L   blocks (n_layer)
    V   tokens in the vocabulary (vocab_size)
A comment like # (B, T, C) gives the shape of the tensor that its line makes; () is one number.

A language model reads text as tokens. A token is a frequent piece of text, and the model sees only
its number, the id. Byte-pair encoding (BPE) chooses the pieces. It starts from the 256 bytes, each
of which is a token, so any text can be written in tokens. Then it takes a large text that is cut
into words, each with the space before it. It finds the pair of neighbouring tokens that is most
frequent within the words, and merges it into a new token. It repeats this 50,000 times. In the end
a frequent word is one token, and a rare word is several. The same merges encode any other text.

GPT-2 takes T tokens and predicts, for each of them, which token comes next. This is
a sentence's way through GPT-2 small:

    "The cat sat on the"
      ▼ encode                      "The" " cat" " sat" " on" " the"
    ids       (B, T)                464 3797 3332 319 262                 (1, 5)
      ▼ wte + wpe                   a vector for each token
    x         (B, T, C)             the residual stream                   (1, 5, 768)
      ▼ L blocks                    each adds to x twice
    x         (B, T, C)                                                   (1, 5, 768)
      ▼ ln_f, lm_head               a score for each token that may follow
    logits    (B, T, V)             the last row: what follows " the"     (1, 5, 50257)

Each token becomes a vector of C numbers. It is the sum of one vector for what the token is (wte)
and one for where it stands (wpe). This vector is called the residual stream, because a block never
replaces it, but only adds something to it, a residual. A block adds twice. First, attention adds
what the token gathers from itself and the tokens before it. Then the MLP adds what it computes from
this token alone. At the end ln_f, a LayerNorm, brings the vector to a fixed scale, and lm_head
takes its dot product with a vector for each of the V tokens. The results are V scores, the logits
z. The softmax function turns them into probabilities that sum to 1:

    p_i = e^z_i / (e^z_1 + … + e^z_V)

Training shows the model text whose next tokens are known. The loss at a position is -ln p, where p
is the probability that the model gave to the true next token. The gradient of the loss says, for
each weight (each learned number), how fast the loss rises if that weight grows. PyTorch records
all operations from the weights to the loss, and the method `backward` goes back through them by the
chain rule. One backward pass gives the gradient for all weights. Then each weight takes a small
step in the direction in which the loss falls. Before training the loss is near ln V (11 in GPT-2),
as if all tokens were equally likely. OpenAI's GPT-2 small reaches 3.29 on FineWeb-Edu (measured by
build-nanogpt). It is then as unsure as if it chose among e^3.29 = 27 equally likely tokens.

The papers: "GPT-2" is Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
"GPT-3" is Brown et al. 2020, arXiv:2005.14165. It has the details of training that GPT-2 lacks.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tiktoken import Encoding
from torch import Tensor

# ---------------------------------------------------------------------------------- The model


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. The default is GPT-2 small, which has 124M parameters."""

    # The longest sequence that the model can read, in tokens.
    block_size: int = 1024
    # The number of tokens: 256 bytes, 50000 merges and <|endoftext|>, which comes before each text.
    # By default, training takes the tokenizer's number of tokens, rounded up to a multiple of 128.
    vocab_size: int = 50257
    # The number of blocks.
    n_layer: int = 12
    # The number of attention heads in each block.
    n_head: int = 12
    # The length of a token's vector, in channels. It has to be a multiple of n_head.
    n_embd: int = 768
    # The share of numbers that dropout sets to 0 in training, to make memorising harder.
    dropout: float = 0.0
    # Whether LayerNorm and Linear layers (except lm_head) add a learned vector, their bias.
    bias: bool = True

    def __post_init__(self) -> None:
        check_values(self)
        C, nh = self.n_embd, self.n_head
        require(C % nh == 0, f"n_embd={C} is not a multiple of n_head={nh}")


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q·kᵀ / √hs + mask)·v, for queries, keys and values of (B, nh, T, hs) each.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.2. Returns (B, nh, T, hs). A Linear layer
    makes a query, a key and a value from a token's vector. The query says what the token looks for,
    and the key what it offers. The dot product of a query and a key is a score for how well they
    match. The value is what the token hands over. This happens nh times side by side, in the
    attention heads, each of which can look for something different. One head with T = 3:

                  q·kᵀ / √hs + mask          attention weights: the softmax of each row
                  The    cat    sat          The    cat    sat
        The       0.4    -∞     -∞           1.00   0      0
        cat       1.0    2.0    -∞           0.27   0.73   0
        sat       1.0    2.0    0.0          0.24   0.67   0.09

    Here "sat" gathers 0.24 of the value of "The", 0.67 of that of "cat", and 0.09 of its own.
    """
    T, hs = q.shape[2:]
    # A score is a sum of hs products. If these were independent and had variance 1, the score would
    # have variance hs. Dividing by √hs brings the variance back to 1. If scores were much larger,
    # softmax would give nearly all weight to one token, and the scores would get hardly any
    # gradient. (It is cheaper to divide q.) k.mT is k with its last two dimensions swapped.
    scores = (q / math.sqrt(hs)) @ k.mT  # (B, nh, T, T): a row for each query
    # No token may look at later ones. Training asks each token for its successor. If it could see
    # the successor, it would only have to copy it. The loss would fall to nearly 0, and the model
    # would be useless for writing, where the next token does not exist yet. So the scores of later
    # tokens, above the diagonal, become -∞, and their weights become e^-∞ = 0.
    mask = scores.new_full((T, T), -math.inf).triu(1)  # (T, T)
    weights = (scores + mask).softmax(dim=-1)  # (B, nh, T, T): each row sums to 1
    weights = F.dropout(weights, dropout)  # see GPT; the caller gives 0 outside of training
    return weights @ v  # (B, nh, T, hs): for each query the weighted sum of the values


class CausalSelfAttention(nn.Module):
    """Lets a token gather from itself and the tokens before it. Takes and returns (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        # The names are OpenAI's. c_ stands for convolution, which at width 1 is a Linear layer. One
        # matrix makes queries, keys and values, because one large product is faster than three.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None):
        """Training gives x alone. cache is for writing text: see KVCache. mask replaces the causal
        mask; it is True where a query may look at a key. Only hellaswag.py gives one."""
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # The channels are cut into nh heads. @ multiplies in the last two dimensions, so nh has to
        # stand before them. No number moves: view and transpose only re-index the memory.
        hs = C // self.n_head
        q = q.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, nh, tokens so far, hs) each
        dropout = self.dropout if self.training else 0.0
        if formula_is_fast(q, mask):
            y = attention(q, k, v, dropout)  # (B, nh, T, hs); if T > 1, no keys are older
        else:
            # PyTorch computes the same in one call. It is slower only for short sequences in 16-bit
            # numbers on a CPU. It may use FlashAttention (arXiv:2205.14135), which never holds a
            # whole (T, T) matrix. If T = 1, the query is the last token's and may see all keys.
            is_causal = mask is None and T > 1
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # the results of all heads, side by side
        return self.resid_dropout(self.c_proj(y))  # c_proj lets the channels of all heads mix


class MLP(nn.Module):
    """A multilayer perceptron, which computes from each token's vector alone.

    Takes and returns (B, T, C). c_fc (fully connected) takes the dot product of the vector with 4C
    learned patterns. GELU keeps the matches and drops the rest. For each match, c_proj adds a
    learned vector, scaled by the match. The factor 4 is that of Vaswani et al.

    GELU (arXiv:1606.08415) is x·Φ(x), where Φ(x) is the share of the standard normal distribution
    below x. GELU is a smooth form of ReLU, max(x, 0). ReLU has no gradient for negative x. GELU has
    some where x is slightly negative. GPT-2 used an approximation with tanh.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Lets the tokens communicate (attention), then computes in each token alone (MLP).

    Takes and returns (B, T, C). Both sublayers add their result to the residual stream x. Both read
    the stream through a LayerNorm, which treats each token's C numbers separately:

        y = (x - mean(x)) / √(variance(x) + 1e-5) · weight + bias

    mean and variance are single numbers, and 1e-5 avoids a division by 0. weight and bias are
    learned vectors, (C,), that multiply and add channel by channel. So the sublayers read numbers
    of the same scale, however large the stream has grown. From the first block to the last, the
    stream itself is never normalised (pre-norm; GPT-2, section 2.3). Only additions change it. They
    pass gradients back unchanged, so these fade much less than if the stream were normalised after
    each addition, as Vaswani et al. did (post-norm).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None):
        x = x + self.attn(self.ln_1(x), mask, cache)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """The whole of GPT-2: two tables (wte, wpe), L blocks (h), a last LayerNorm, and lm_head.

    Its parameters have the names that Hugging Face's library transformers gives them.

    In training, dropout sets a share of the numbers, chosen at random, to 0. It divides the others
    by the share that is kept, so that the mean stays the same. The model then relies less on any
    single number, which helps if the same text is read many times. Dropout acts in four places: on
    the sum of the two look-ups, on the attention weights, and on the results of attention and MLP.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # word token embedding, (V, C)
            wpe=nn.Embedding(config.block_size, config.n_embd),  # word position embedding
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One tensor has two jobs (arXiv:1608.05859). As wte it looks a token up, and as lm_head it
        # scores one. So what the model learns about a token as an input also helps to predict this
        # token. It saves GPT-2 small 38.6M parameters.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def hidden(self, idx: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Returns the residual stream after ln_f, (B, T, C), for token ids idx (B, T).

        Training gives idx alone. caches: for writing text, one KVCache per block, of the tokens
        before idx. Errors: ValueError if there are more than block_size tokens.
        """
        start = caches[0].n_tokens if caches else 0
        end, limit = start + idx.size(1), self.config.block_size
        require(end <= limit, f"{end} tokens are more than block_size={limit}")
        pos = torch.arange(start, end, device=idx.device)  # (T,): in training 0, 1, …, T - 1
        # A look-up takes a row out of a table. wpe is a learned table as well, and it ends at
        # block_size. Positions are needed because a weighted sum has no order. Without them, an
        # attention layer would see earlier tokens as an unordered bag.
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache=caches[i] if caches else None)  # (B, T, C)
        return self.transformer.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Returns the logits, (B, T, V), for token ids idx (B, T); with targets the mean loss, ().

        targets (B, T) are the tokens that really come next. A sequence trains T predictions in one
        pass, each of them from the true tokens before it ("teacher forcing"). The loss is the mean
        of their cross entropies -ln p. Its unit is the nat, because ln is the natural logarithm:

            the true token got p = 0.25:        -ln(0.25)    =  1.39 nats
            all 50257 tokens equally likely:    -ln(1/50257) = 10.82 nats

        The gradient of the loss for logit i is (p_i - 1) / (B·T) if i is the true token, and
        p_i / (B·T) if not: what the model believes minus what is true, over B·T positions.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is not None and loss_in_pieces(x):
            # A CPU takes this shortcut. It gives the same as the lines below. The logits are the
            # largest tensor of all, and only some of them exist at a time.
            return ChunkedLoss.apply(x, self.lm_head.weight, targets, torch.is_grad_enabled())
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices from a normal distribution of standard deviation 0.02, or less for c_proj.

        Biases are 0, and the weights of LayerNorms stay 1. 0.02 is OpenAI's choice (its code has
        0.01 for wpe). It keeps the first logits small, so the first loss is little more than the
        ln V of equally likely tokens. (GPT-2 small's first logits are about normal, with variance
        s = 0.02²·C = 0.307. The mean of e^z is then e^(s/2), and the loss 10.825 + 0.154 = 10.98.)

        Each of the 2L sublayers (attention and MLP of every block) ends in a c_proj that adds to
        the stream. Variances of independent terms add up, so the stream would grow with depth. We
        draw c_proj smaller by a factor of √(2L). All 2L additions together then have the variance
        that one of them would have had (GPT-2, section 2.3).
        """
        for name, p in self.named_parameters():  # the tied tensor comes once
            if p.dim() == 2:
                adds_to_stream = name.endswith("c_proj.weight")
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if adds_to_stream else 0.02)
            elif name.endswith("bias"):
                p.zero_()

    def num_params(self) -> int:
        """The number of weights. The tensor that wte and lm_head share counts once."""
        return sum(p.numel() for p in self.parameters())

    def generate(self, idx: Tensor, max_new_tokens: int, stop: int | None = None,
                 n_vocab: int | None = None, **settings: Any) -> Tensor:  # fmt: skip
        """Continue each row of idx (B, T), token by token. Returns (B, at most T + max_new_tokens).

        As long as the text fits into block_size, this would do:

            for _ in range(max_new_tokens):
                logits = self(idx)[:, -1]            # (B, V): what may follow the last token
                token = sample(logits, **settings)   # (B, 1)
                idx = torch.cat((idx, token), dim=1)

        The form below gives the same tokens, up to rounding. It is faster, because each block keeps
        in a cache what it has computed so far, and reads only the new token. settings: see
        `sample`, below. stop: a row that has drawn this token repeats it to the end. ids from
        n_vocab on belong to no token, and are never drawn. Errors: ValueError if idx is empty.
        """
        require(idx.size(1) > 0, "the prompt is empty: it needs at least one token")
        block_size = self.config.block_size
        caches = [KVCache(block_size) for _ in self.transformer.h]
        ended = torch.zeros_like(idx[:, :1], dtype=torch.bool)  # (B, 1)
        with inference(self, rows=len(idx)):  # no gradients, no dropout; rows is for speed
            for _ in range(max_new_tokens):
                if idx.size(1) <= block_size:
                    x = self.hidden(idx[:, caches[0].n_tokens :], caches)  # (B, new, C)
                else:
                    # Now it reads the last block_size tokens. In each step every token has another
                    # position, so its old keys and values are no longer right.
                    x = self.hidden(idx[:, -block_size:])  # (B, block_size, C)
                logits = self.lm_head(x[:, -1])[:, :n_vocab].float()  # (B, n_vocab)
                token = sample(logits, **settings)  # (B, 1)
                if stop is not None:
                    token = token.masked_fill(ended, stop)
                    ended |= token == stop
                idx = torch.cat((idx, token), dim=1)
                if ended.all():
                    break
        return idx

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> GPT:
        """OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl, or another GPT-2, from a folder or
        Hugging Face's hub. The model is on the CPU. Errors: ValueError with the reason."""
        return load_hugging_face(name_or_path)

    def save_pretrained(self, folder: str | Path, tokenizer: Encoding | None = None):
        """Write a folder that the library transformers reads. Errors: OSError."""
        save_hugging_face(self, Path(folder), tokenizer)


# -------------------------------------------------------------------------------- Writing text


class KVCache:
    """The keys and values of the tokens that a block has read.

    A token never sees a later one, so its keys and values never change. While a text is written,
    the block keeps them, and computes only those of the newest token. A query is needed only once.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.n_tokens = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens, (B, nh, T, hs) each, and return those of all.

        The first call has the whole prompt, each later one a single token. Several would need a
        mask of another shape. Errors: ValueError.
        """
        B, nh, T, hs = k.size()
        start, end = self.n_tokens, self.n_tokens + T
        require(start == 0 or T == 1, f"{T} tokens after {start} cached ones: feed one at a time")
        if start == 0:
            self.keys = k.new_empty(B, nh, self.block_size, hs)
            self.values = v.new_empty(B, nh, self.block_size, hs)
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.n_tokens = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None, generator: torch.Generator | None = None,
           ) -> Tensor:  # fmt: skip
    """Draw a token for each row of logits (B, V). Returns ids (B, 1).

    First, the temperature divides the logits. At 1, each token is drawn with the probability that
    the model gives it. Below 1, likely tokens become likelier still, and at 0 the likeliest is
    always taken ("greedy"). Then top_k keeps the k likeliest tokens, and rescales their
    probabilities to sum to 1. Of these, top_p (arXiv:1904.09751) keeps the fewest of the likeliest
    that add up to top_p or more. With top_p=0.7:

        probability                  .5    .3    .15   .05
        sum of those before it        0    .5    .8    .95
        kept, if that is below .7    yes   yes   no    no      → drawn with .5/.8 and .3/.8
    """
    if temperature < 1e-5:
        return logits.argmax(dim=1, keepdim=True)  # (B, 1)
    if top_k is None and top_p is None:
        return torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)
    V = logits.size(1)
    logits, ids = logits.topk(min(top_k or V, V))  # (B, k) each, the likeliest first
    p = (logits / temperature).softmax(dim=1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(dim=1) - p >= top_p, 0.0)
    choice = torch.multinomial(p, 1, generator=generator)  # (B, 1); it divides p by the sum of p
    return ids.gather(1, choice)


# ---------------------------------------------------------------------------- How weights change


def configure_optimizers(model: GPT, cfg: TrainConfig, dtype: torch.dtype = torch.float32,
                         ) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimizer AdamW (arXiv:1711.05101).

    The plain way would be weight ← weight - lr·g, with the gradient g and a small number lr, the
    learning rate. But gradients of different weights differ a thousandfold in size, and no lr suits
    them all. So AdamW keeps two running averages for each weight: m of its gradients, and v of
    their squares. How slowly they forget is set by two numbers, the betas; here they are GPT-3's:

        m ← 0.9·m + 0.1·g        v ← 0.95·v + 0.05·g²        weight ← weight - lr·m / (√v + 1e-8)

    (Both start at 0. Step t = 1, 2, … corrects for that: it divides them by 1 - 0.9^t and
    1 - 0.95^t.) m / √v is between -1 and 1 or near that, whatever the size of the gradients. So a
    weight moves by about lr at most, and by less where the gradients of different batches disagree.

    Weight decay multiplies a weight by 1 - lr·weight_decay in each step, which keeps matrices from
    growing without end. Vectors (biases and LayerNorm's weights, 98 in GPT-2 small) do not decay:
    they are few, and a LayerNorm weight that is pulled to 0 would silence its channel.

    The preset `quick`, for a laptop, has a newer optimizer for the matrices of the blocks, Muon,
    which has a section of its own. (`--optimizer adamw` trains without it.) dtype is for Muon.
    """
    muon: list[Tensor] = []
    if cfg.optimizer == "muon":
        muon = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    taken = set(muon)
    rest = [p for p in model.parameters() if p not in taken]
    matrices = dict(params=[p for p in rest if p.dim() >= 2], weight_decay=cfg.weight_decay)
    vectors = dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)
    # train() sets the learning rate. fused=True updates a tensor in one pass over memory.
    adamw = torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.95), eps=1e-8, fused=True)
    return [adamw, Muon(muon, cfg.weight_decay, dtype)] if muon else [adamw]


def get_lr(step: int, cfg: TrainConfig) -> float:
    """The learning rate of a step (0, 1, …): a linear rise, then half a period of a cosine down.

    It starts low, because AdamW's averages still rest on few gradients, and large steps in a wrong
    direction do harm. It does not start at 0, as that step would be wasted. Then it falls, because
    small steps settle into a minimum that large ones jump over. For GPT-2 124M it rises for 715
    steps (375M tokens, as in GPT-3) to max_lr = 6e-4, and falls to a tenth of that at the end.
    """
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    min_lr = cfg.max_lr * cfg.min_lr_ratio
    return min_lr + (cfg.max_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


# ----------------------------------------------------------------------------------- The data


class DataLoaderLite:
    """Reads batches of token sequences from the shards in data_dir. Errors: ValueError.

    A shard is a file of token ids, in which an <|endoftext|> stands before each document. The shard
    is cut into windows of T inputs. The targets are the same tokens, shifted by one. For T = 4:

        shard         50256 464 3797 3332 319 262 2603  13 …
        first window  inputs  50256  464 3797 3332      targets   464 3797 3332 319
        second        inputs    319  262 2603   13      targets   262 2603   13   …

    A window may reach from one document into the next, and so may attention. The model learns from
    the <|endoftext|> between them that a new text begins.

    A run numbers the windows that it reads 0, 1, 2, … across all epochs, and `find_window` says
    where each of them lies. Training reads every window once per epoch, each time in a new order.
    Validation reads them as they stand. The order follows from the seed alone. So a stopped run
    finds its place by its step number, and several processes (world_size workers, each with a rank
    0, 1, …) can divide the windows of a step.
    """

    def __init__(self, data_dir: str | Path, split: str, B: int, T: int, rank: int = 0,
                 world_size: int = 1, seed: int = 1337, n_vocab: int = 2**16):  # fmt: skip
        self.B, self.T = B, T
        self.rank, self.world_size = rank, world_size
        self.seed, self.n_vocab, self.is_train = seed, n_vocab, split == "train"
        self.paths = find_shards(data_dir, split)
        self.open_shard = functools.lru_cache(maxsize=64)(open_shard)  # few files are open at once
        self.counts = [max(0, len(self.open_shard(path)) - 1) // T for path in self.paths]
        self.n_windows = sum(self.counts)
        no_window = f"{data_dir}: no {split} shard has the {T + 1} tokens of one window"
        require(self.n_windows > 0, f"{no_window}; take more text, or a lower --seq_len")

    def window(self, number: int) -> np.ndarray:
        """The T + 1 tokens of a window."""
        shard, i = find_window(number, self.counts, self.seed if self.is_train else None)
        path = self.paths[shard]
        tokens = self.open_shard(path)[i * self.T : (i + 1) * self.T + 1]
        largest = int(tokens.max())
        require(largest < self.n_vocab, f"{path}: id {largest} in a vocabulary of {self.n_vocab}")
        return tokens

    def windows(self, numbers: range) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these windows: int64, (B, T) each."""
        tokens = np.stack([self.window(number) for number in numbers]).astype(np.int64)
        tokens = torch.from_numpy(tokens)  # (B, T + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def batch(self, i: int) -> tuple[Tensor, Tensor]:
        """This worker's batch i of B windows. (Not for `train`: a step may not divide evenly.)"""
        first = (i * self.world_size + self.rank) * self.B
        return self.windows(range(first, first + self.B))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.batch, count())


# -------------------------------------------------------------------------- The training loop
# Without all that makes it fast and safe, training is this loop:
#
#     for step in range(max_steps):
#         for _ in range(micro_steps):
#             x, y = next(batches)             # (B, T) each; batches = iter(DataLoaderLite(…))
#             loss = model(x, y) / micro_steps
#             loss.backward()                  # adds the loss's gradient to each weight's .grad
#         clip_grad_norm_(model.parameters(), 1.0)    # makes very large gradients smaller
#         for group in optimizer.param_groups:
#             group["lr"] = get_lr(step)
#         optimizer.step()                     # changes each weight a little
#         optimizer.zero_grad()
#
# A step of GPT-2 124M has 2^19 tokens (GPT-3, table 2.1), because the mean of many gradients is a
# reliable direction. Memory cannot hold so many, so a step has several forward and backward passes,
# the micro-steps. Each loss is divided by their number. So .grad becomes the mean loss's gradient.
# The two functions below are this loop, for any number of workers, with checkpoints and a log. At
# a first reading, look for the five numbered comments.


def accumulate_gradients(net: nn.Module, loader: DataLoaderLite, windows: range, micro_steps: int,
                         scaler: torch.amp.GradScaler, worker: Worker) -> Tensor:  # fmt: skip
    """Run this worker's share of a step's windows forward and backward.

    Returns this worker's loss, (). The mean over all workers is the loss of the step. net: the
    model, perhaps compiled. With several workers, PyTorch's DistributedDataParallel wraps it, and
    the last backward() takes the gradients' mean over all workers. scaler: see `train`.
    """
    mine = split_range(windows, worker.world_size)[worker.rank]
    total = torch.zeros((), device=worker.device)
    for i, batch in enumerate(split_range(mine, micro_steps), start=1):
        x, y = worker.to_device(*loader.windows(batch))  # (B, T) each
        # The mean over the workers takes time. One, after the last micro-step, is enough.
        net.require_backward_grad_sync = i == micro_steps
        with worker.autocast():  # matrix products in the worker's format, such as 16-bit numbers
            # Usually this factor is 1 / micro_steps. If the windows do not divide evenly, a batch
            # counts by its length. world_size cancels the division in the workers' mean.
            loss = net(x, y) * (len(batch) * worker.world_size / len(windows))
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


def train(model: GPT, cfg: TrainConfig, worker: Worker | None = None, resume: bool = False,
          signals: Sequence[int] = ()) -> int:  # fmt: skip
    """Train the model, which is on worker.device. All files of the run go to cfg.log_dir.

    worker: this process, by default alone, on the CPU, in fp32. resume: go on from the newest
    checkpoint in cfg.log_dir, if there is one. signals: when a signal handler appends to this list,
    the loop finishes its step, saves a checkpoint and returns the signal's number; otherwise 0.
    Errors: ValueError; OSError; FloatingPointError if loss or gradient is not finite.
    """
    worker = worker or Worker()
    tokenizer = load_tokenizer(cfg.data_dir)
    T = cfg.seq_len or model.config.block_size
    n_windows = cfg.total_batch_size // T  # of a step, for all workers together
    # net is the model, perhaps compiled. Evaluation uses the model: its inputs have many lengths,
    # and net would be compiled again for each of them.
    net, B, micro_steps = prepare_net(model.train(), cfg, T, worker)
    loader = DataLoaderLite(
        cfg.data_dir, "train", B, T, worker.rank, worker.world_size, cfg.seed, tokenizer.n_vocab
    )
    optimizers = configure_optimizers(model, cfg, worker.dtype)
    # In the format fp16, small gradients would become 0. The scaler multiplies the loss by a large
    # factor, and unscale_() divides the gradients by it. In other formats it does nothing.
    scaler = torch.amp.GradScaler(worker.device.type, enabled=worker.dtype == torch.float16)
    # run does all that is not learning: it evaluates, saves and restores checkpoints, and logs.
    run = Run(model, cfg, worker, tokenizer, loader, optimizers, scaler)
    first_step = run.restore() if resume else 0
    run.start_log(first_step)

    signum = 0  # the signal that stops the run, or 0
    for step in range(first_step, cfg.max_steps + 1):  # the last round only evaluates and saves
        finished = step == cfg.max_steps
        if (step % cfg.eval_every == 0 or finished) and not signum:
            run.evaluate(step)
        if step > first_step and (step % cfg.checkpoint_every == 0 or finished or signum):
            run.save(step)
        if finished or signum:
            break

        began = time.perf_counter()
        # Dropout draws from this seed. The seed follows from the step, so a resumed run draws the
        # same masks. It differs between workers, so each of them draws its own.
        torch.manual_seed((cfg.seed + step) * worker.world_size + worker.rank)

        # 1. Find the gradient of the loss on the tokens of this step.
        windows = range(step * n_windows, (step + 1) * n_windows)
        loss = accumulate_gradients(net, loader, windows, micro_steps, scaler, worker)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)

        # 2. Bound it. All gradients together are seen as one long vector. If its length, the norm,
        # is above grad_clip, they are scaled down. So no odd batch dominates AdamW's averages.
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()

        # 3. Let all workers agree. Each shares its loss and the signal that told it to stop (0 if
        # none did) with all others, so all decide alike.
        losses, numbers = worker.gather(loss.item(), signals[0] if signals else 0).unbind(dim=1)
        signum = int(numbers.max())
        # A loss or gradient that is not finite would spoil every weight, so it ends the run. Only
        # fp16 may overflow now and then. Then no optimizer takes this step.
        skip = run.must_skip(step, losses, norm)

        # 4. Step against the gradient, then forget the gradient.
        lr = get_lr(step, cfg)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if not skip:  # scaler.step() might skip one optimizer and not the other
                optimizer.step()
            optimizer.zero_grad()
        scaler.update()

        # 5. Write down how it went.
        run.log_step(step, losses.mean().item(), lr, norm, time.perf_counter() - began)
    if finished and not signum:
        run.finish()
    return signum


# ==============================================================================================
# Part II: a run. GPT-2 is complete at this point. What follows makes a run convenient, fast and
# safe: its options, files, workers and devices, evaluation, checkpoints and log, weights from and
# for other programs, shortcuts for a CPU, the optimizer Muon, and the command line, which at its
# end calls train().
# ==============================================================================================

# ------------------------------------------------------------------------------------ Options

CHOICES = {
    "optimizer": ("adamw", "muon"), "hellaswag": ("on", "off"), "compile": ("auto", "on", "off"),
    "device": ("auto", "cuda", "mps", "cpu"), "precision": ("auto", "bf16", "fp16", "fp32"),
}  # fmt: skip
MAY_BE_0 = (
    "bias", "dropout", "seq_len", "warmup_steps", "min_lr_ratio", "weight_decay", "grad_clip",
    "seed", "max_new_tokens", "temperature",
)  # fmt: skip
AT_MOST = dict(
    block_size=2**20, vocab_size=2**20, n_layer=1024, n_head=1024, n_embd=2**16, dropout=0.999,
    max_lr=1e3, min_lr_ratio=1, n=1024, temperature=100, top_p=1,
)  # fmt: skip


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message, unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_values(config: GPTConfig | TrainConfig | SampleConfig) -> None:
    """Errors: ValueError that names the first value which is not allowed."""
    for f in fields(config):
        value, kind = getattr(config, f.name), type(f.default)
        fits = isinstance(value, (int, float) if kind is float else kind)
        require(fits, f"{f.name}={value!r} is not of type {kind.__name__}")
        if choices := CHOICES.get(f.name):
            require(value in choices, f"{f.name}={value!r} is not one of {', '.join(choices)}")
        elif kind is not str:
            low = 0 if f.name in MAY_BE_0 else 1 if kind is int else 1e-12
            high = AT_MOST.get(f.name, 2**40)
            require(low <= value <= high, f"{f.name}={value!r} is not from {low} to {high}")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The default is the reproduction of GPT-2 124M on FineWeb-Edu."""

    # `parse` reads this file, and takes the comment above a field as the help of its flag.

    # The folder of the token shards. fineweb.py makes it.
    data_dir: str = "edu_fineweb10B"
    # The folder for the files of the run. By default it is log/PRESET, or log/PRESET-2 and so on.
    log_dir: str = ""
    # The weights to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder in Hugging Face's
    # format, the folder of a run, or a checkpoint. By default they are random.
    init: str = ""
    # The optimizer. adamw changes all weights. With muon, Muon changes the matrices of the blocks,
    # and AdamW the rest.
    optimizer: str = "adamw"
    # The tokens of a step, over all workers and micro-steps.
    total_batch_size: int = 2**19
    # The most sequences that a worker processes at once. Halve it if memory runs out. The tokens of
    # a step stay the same.
    micro_batch_size: int = 64
    # The tokens of a sequence. 0 means as many as block_size allows.
    seq_len: int = 0
    # The steps of the run. The 19073 steps of the preset gpt2 read 10 billion tokens.
    max_steps: int = 10**10 // 2**19
    # The steps in which the learning rate rises. The 715 of gpt2 read 375M tokens, as in GPT-3.
    warmup_steps: int = 715
    # The highest learning rate.
    max_lr: float = 6e-4
    # The last learning rate, as a share of the highest.
    min_lr_ratio: float = 0.1
    # Each step multiplies the matrices by 1 - learning rate * weight_decay. This keeps them small.
    weight_decay: float = 0.1
    # The largest norm of the gradient. A larger one is scaled down to it. 0 sets no limit.
    grad_clip: float = 1.0
    # The steps from one evaluation to the next.
    eval_every: int = 250
    # The tokens of the validation split that an evaluation reads, at most.
    val_tokens: int = 20 * 2**19
    # The text that the samples of an evaluation continue.
    sample_prompt: str = "Hello, I'm a language model,"
    # Whether evaluations include HellaSwag, in which a model chooses the right one of four endings.
    hellaswag: str = "on"
    # The steps from one checkpoint to the next.
    checkpoint_every: int = 500
    # The seed of the first weights, the data order, dropout and samples.
    seed: int = 1337
    # The device to compute on. With auto it is cuda if there is one, else mps, else cpu.
    device: str = "auto"
    # The format of numbers in matrix products. With auto it is the fastest that the device has.
    precision: str = "auto"
    # Whether torch.compile is used. With auto it is used on cuda.
    compile: str = "auto"

    __post_init__ = check_values


@dataclass(frozen=True)
class SampleConfig:
    """What --generate writes."""

    # The number of samples.
    n: int = 1
    # The most tokens that are added to the prompt.
    max_new_tokens: int = 200
    # The logits are divided by it. 1 draws tokens as often as the model believes. Less prefers
    # likely tokens, and 0 always takes the likeliest.
    temperature: float = 1.0
    # Only this many of the likeliest tokens may be drawn.
    top_k: int = 50
    # Only the smallest set of likeliest tokens that together have this probability may be drawn.
    top_p: float = 1.0
    # A sample ends before this text. By default it ends with the document.
    stop: str = ""

    __post_init__ = check_values


# In training, wte has 50304 rows instead of 50257: see `padded`. The learning rates of the larger
# models are GPT-3's, table 2.1. The shape and the rates of quick gave the lowest loss, of what was
# tried, in three minutes on two CPU cores.
PRESETS = {
    "quick": (
        GPTConfig(block_size=128, vocab_size=4096, n_layer=3, n_head=2, n_embd=128),
        TrainConfig(
            data_dir="data/stdlib", optimizer="muon", total_batch_size=4096, micro_batch_size=32,
            max_steps=1000, warmup_steps=20, max_lr=1.5e-2, min_lr_ratio=0.0, val_tokens=2**20,
            sample_prompt="def ", hellaswag="off", checkpoint_every=250,
        ),
    ),
    "gpt2": (GPTConfig(1024, 50304, 12, 12, 768), TrainConfig()),
    "gpt2-medium": (
        GPTConfig(1024, 50304, 24, 16, 1024), TrainConfig(max_lr=3e-4, micro_batch_size=32)
    ),
    "gpt2-large": (
        GPTConfig(1024, 50304, 36, 20, 1280), TrainConfig(max_lr=2.5e-4, micro_batch_size=16)
    ),
    "gpt2-xl": (
        GPTConfig(1024, 50304, 48, 25, 1600), TrainConfig(max_lr=2e-4, micro_batch_size=8)
    ),
}  # fmt: skip

# ------------------------------------------------------------------------- Shards and tokenizer


def find_shards(data_dir: str | Path, split: str) -> list[Path]:
    """The shards of a split: the .npy files whose names contain _SPLIT_ or begin with SPLIT_.

    Errors: ValueError if there are none, or if fineweb.py has not finished the folder.
    """
    folder = Path(data_dir)
    how = "python fineweb.py --help says how to make one"
    require(folder.is_dir(), f"{folder}: no such folder ({how})")
    finished = (folder / "meta.json").exists() or not (folder / "progress.json").exists()
    require(finished, f"{folder} is unfinished: repeat the fineweb.py command that began it")
    paths = [p for p in sorted(folder.glob("*.npy")) if re.match(rf"(.*_)?{split}_", p.name)]
    require(len(paths) > 0, f"{folder} has no shards for {split} (*_{split}_*.npy)")
    return paths


def open_shard(path: Path) -> np.ndarray:
    """A shard's ids, uint16, mapped into memory: only what is used is read from the disk.

    Errors: ValueError if the file is no shard, or is damaged.
    """
    try:
        ids = np.load(path, mmap_mode="r")
        is_row = ids.dtype == np.uint16 and ids.ndim == 1
        require(is_row, f"it has {ids.dtype} of shape {ids.shape}, not a row of uint16")
        require(path.stat().st_size == ids.offset + ids.nbytes, "it is longer than its header says")
        return ids
    except Exception as e:  # numpy fails in a dozen ways
        raise ValueError(f"{path} is no shard, or damaged ({e}): make it again") from e


@functools.lru_cache(maxsize=8)
def shuffled(n: int, *key: int) -> list[int]:
    """The numbers 0 … n-1 in an order that follows from the key."""
    return np.random.default_rng(key).permutation(n).tolist()


def find_window(number: int, counts: list[int], seed: int | None) -> tuple[int, int]:
    """Which shard has a window, and where: (1, 0) is the first window of the second shard.

    counts: the windows of each shard. With a seed, every epoch has another order of the shards, and
    of the windows in each: perhaps windows 1, 0 of shard 1, then windows 2, 0, 1 of shard 0.
    """
    epoch, i = divmod(number, sum(counts))
    n = len(counts)
    for shard in range(n) if seed is None else shuffled(n, seed, epoch):
        if i < counts[shard]:  # it is in this shard
            break
        i -= counts[shard]
    # + 1, because for NumPy the seeds (a, b) and (a, b, 0) are the same.
    return shard, i if seed is None else shuffled(counts[shard], seed, epoch, shard + 1)[i]


def load_tokenizer(folder: str | Path) -> Encoding:
    """The tokenizer in a folder, or GPT-2's if there is none. Errors: ValueError, OSError."""
    try:
        import fineweb
    except ModuleNotFoundError:
        its_own = Path(folder, "vocab.bpe").exists()
        require(not its_own, f"{folder} has its own tokenizer: reading it takes fineweb.py")
        return tiktoken.get_encoding("gpt2")
    return fineweb.load_tokenizer(folder)


TOKENIZER_FILES = ("encoder.json", "vocab.bpe", "added_tokens.json")  # where it is not GPT-2's


def token_bytes(tokenizer: Encoding) -> list[bytes]:
    """The text that each token stands for, in bytes. <|endoftext|> stands for none."""
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab)]
    tokens[tokenizer.eot_token] = b""
    return tokens


def padded(n_vocab: int) -> int:
    """Rows of wte for n_vocab tokens: the next multiple of 128, such as 50304 for 50257.

    GPUs multiply matrices in tiles, and a size that is no multiple of a tile's leaves some tiles
    half empty. The rows that are added belong to no token.
    """
    return math.ceil(n_vocab / 128) * 128


def check_vocabulary(model: GPT, tokenizer: Encoding) -> None:
    """Errors: ValueError if the model was made for another number of tokens."""
    rows, n_vocab = model.config.vocab_size, tokenizer.n_vocab
    fits = n_vocab <= rows <= padded(n_vocab)
    require(fits, f"vocab_size={rows} does not fit the tokenizer's {n_vocab} tokens")


# ------------------------------------------------------------------------- Workers and devices


@dataclass(frozen=True)
class Worker:
    """This process, which may be one of several that train together (data parallelism).

    torchrun starts several, plain python starts one. All have the same weights, and each reads
    other windows. Their gradients are averaged, so all take the same step.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32  # of matrix products

    def print(self, *lines: str) -> None:
        """Print, if this is the first worker. A full disk behind stdout does not end the run."""
        for line in lines if self.rank == 0 else ():
            with suppress(OSError):
                print(line, flush=True)

    def gather(self, *values: float) -> Tensor:
        """The values of every worker, float64 (world_size, n), once all of them have called it."""
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

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Copy tensors to the device. From pinned memory, CUDA does so while the CPU goes on."""
        if self.device.type == "cuda":
            return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in tensors)
        return tuple(t.to(self.device) for t in tensors)

    @contextmanager
    def inference(self, model: GPT, rows: int) -> Iterator[None]:
        """Mixed precision, no dropout, no gradients. rows: see the function of this name."""
        with self.autocast(), inference(model, rows):
            yield

    def matmul_flops(self) -> float:
        """FLOP/s of a product of two large matrices, the limit to which a run is compared."""
        n, seconds = 8192 if self.device.type == "cuda" else 2048, []
        a = torch.randn(n, n, device=self.device, dtype=self.dtype)
        for _ in range(5):
            began = time.perf_counter()
            (a @ a)[0, 0].item()  # .item() waits for the result
            seconds.append(time.perf_counter() - began)
        return 2 * n**3 / min(seconds)


def flops_per_token(model: GPT, T: int) -> int:
    """FLOPs of training per token, in sequences of T tokens (arXiv:2204.02311, appendix B).

    A weight costs 2 FLOPs per token forward (a multiplication and an addition) and 4 backward, 6 in
    all. wpe is left out, because its rows are only looked up. wte counts, because as lm_head it
    multiplies. In each block, the scores and the weighted sums cost 2·C·T each forward and twice
    that backward, 12·C·T in all.
    """
    c = model.config
    return 6 * (model.num_params() - c.block_size * c.n_embd) + 12 * c.n_layer * c.n_embd * T


def cpu_features() -> dict[str, Any]:
    """What the CPU has, and its name; {} with PyTorch 2.9, which cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def fast_precision(device: str) -> str:
    """The fastest format of numbers that a device computes with, and does not only emulate.

    bf16 has the range of fp32 and 8 significant bits. Older CUDA cards have only fp16: 11
    significant bits, but values below 3e-8 become 0, hence the gradient scaler. Some cards report
    bf16 although they only emulate it, slowly, so we ask for native support.
    """
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    features = cpu_features() if device == "cpu" else {}
    return "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "fp32"


def start_worker(device: str = "auto", precision: str = "auto") -> Worker:
    """Choose device and precision, and join the workers that torchrun started, if it did.

    Errors: ValueError if the device is missing or cannot do what is asked.
    """
    n_cuda, n_mps = torch.cuda.device_count(), int(torch.backends.mps.is_available())
    n_devices = dict(cuda=n_cuda, mps=n_mps, cpu=2**16)  # a CPU serves any number of workers
    device = next(name for name, n in n_devices.items() if n) if device == "auto" else device
    by_torchrun = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0) | os.environ
    rank, world_size, local_rank = (
        int(by_torchrun[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    n = n_devices[device]
    too_few = f"device={device}: PyTorch finds {n} on this machine for {local_rank + 1} workers"
    require(local_rank < n, f"{too_few}: take --device cpu, or a lower --nproc_per_node")
    emulated = device == "cpu" and precision == "fp16"
    require(not emulated, "precision=fp16: a CPU emulates it, very slowly; take bf16 or fp32")
    here = torch.device(device, local_rank if device == "cuda" else None)
    if device == "cuda":
        torch.cuda.set_device(here)
    if world_size > 1:
        # Workers write their addresses into a store of torchrun's, and read those of the others
        # there. The store outlives them. After a restart they must not find the addresses of dead
        # workers in it, so each start gets its own part of the store. Machines count their starts
        # separately, so this works on one machine only.
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=world_size,
            device_id=here if device == "cuda" else None,
        )  # fmt: skip
    if device == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32: the range of fp32, 11 significant bits
    name = fast_precision(device) if precision == "auto" else precision
    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
    return Worker(rank, world_size, here, dtypes[name])


def split_range(numbers: range, n: int) -> list[range]:
    """Split a range into n ranges, whose lengths differ by at most 1."""
    return [numbers[len(numbers) * i // n : len(numbers) * (i + 1) // n] for i in range(n)]


def divide_step(cfg: TrainConfig, T: int, worker: Worker) -> tuple[int, int]:
    """The most windows of a micro-step (B), and the micro-steps of a step, for each worker.

    B is at most micro_batch_size, unless a micro-step would then be empty: 2 workers that share 3
    windows take 1 and 2, even if at most 1 is asked. On a CPU it has at most 8,192 tokens, because
    more are no faster there. Errors: ValueError if a step cannot be divided into windows.
    """
    windows, rest = divmod(cfg.total_batch_size, T)
    nearest = max(1, round(cfg.total_batch_size / T)) * T
    wrong = f"total_batch_size={cfg.total_batch_size} is no multiple of seq_len={T}"
    require(rest == 0, f"{wrong}; the nearest is {nearest}")
    workers, most = worker.world_size, cfg.micro_batch_size
    require(workers <= windows, f"{workers} workers cannot share a step of {windows} windows")
    if worker.device.type == "cpu":
        most = min(most, max(1, 8192 // T))
    micro_steps = min(math.ceil(windows / (workers * most)), windows // workers)  # none is empty
    return math.ceil(windows / (workers * micro_steps)), micro_steps


def is_compiled(cfg: TrainConfig, worker: Worker) -> bool:
    return cfg.compile == "on" or (cfg.compile == "auto" and worker.device.type == "cuda")


def first_pass_fits(net: nn.Module, B: int, T: int, worker: Worker) -> bool:
    """Run forward and backward once on every worker → whether the memory of all sufficed. A step
    also has the gradients of earlier micro-steps and AdamW's two averages in memory."""
    fits, x = True, torch.zeros(B, T, dtype=torch.int64, device=worker.device)
    try:
        others = [torch.empty_like(p) for p in net.parameters() for _ in range(3)]
        with worker.autocast():
            net(x, x).backward()
        del others
    except torch.OutOfMemoryError:
        fits = False
    net.zero_grad()
    return bool(worker.gather(fits).all())


def prepare_net(model: GPT, cfg: TrainConfig, T: int, worker: Worker) -> tuple[nn.Module, int, int]:
    """The model, compiled and distributed if it should be; B and micro-steps as in divide_step.

    The first pass, in which compiling happens, is made here for CUDA and for compiled models. So no
    step's time includes it, and B can be halved until memory suffices. Errors: ValueError.
    """
    limit = model.config.block_size
    require(T <= limit, f"seq_len={T} is more than block_size={limit}")
    B, micro_steps = divide_step(cfg, T, worker)
    compiled = is_compiled(cfg, worker)
    tries = compiled or worker.device.type == "cuda"
    net: nn.Module = torch.compile(model) if compiled else model
    if worker.world_size > 1:
        # The net is compiled inside of this, in parts. Then the gradients of one part are averaged
        # while those of the next are computed.
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    net.require_backward_grad_sync = False  # a worker without memory must not leave others waiting
    try:
        while tries and not first_pass_fits(net, B, T, worker):
            before = B
            cfg = replace(cfg, micro_batch_size=max(1, B // 2))
            B, micro_steps = divide_step(cfg, T, worker)
            require(B < before, f"not enough memory for a batch of {B}: use a lower --seq_len")
            worker.print(f"memory is full: {B} sequences at once from now on")
    except (RuntimeError, ImportError) as e:  # what torch.compile needs is not on every machine
        if not compiled:
            raise
        reason = (str(e).strip() or repr(e)).splitlines()[0]
        raise ValueError(f"torch.compile cannot run here ({reason}): use --compile off") from e
    return net, B, micro_steps


# --------------------------------------------------------------------------------- Evaluation


def evaluate(model: GPT, loader: DataLoaderLite, val_tokens: int, tokenizer: Encoding,
             worker: Worker = Worker()) -> tuple[float, float]:  # fmt: skip
    """The loss over the first val_tokens tokens of a loader, in nats per token and bits per byte.

    The tokens are the same for any batch size and number of workers. Bits per byte compare models
    with different tokenizers. A larger vocabulary needs fewer tokens for the same text, and each of
    them is harder to predict, so losses per token do not compare.
    """
    lengths = torch.tensor([len(token) for token in token_bytes(tokenizer)])
    n = min(max(1, val_tokens // loader.T), loader.n_windows)
    mine, B = split_range(range(n), worker.world_size)[worker.rank], loader.B
    nats = n_bytes = 0.0
    with worker.inference(model, rows=B * loader.T):
        for i in range(0, len(mine), B):
            x, y = loader.windows(mine[i : i + B])  # (B, T) each
            n_bytes += float(lengths[y].sum())
            nats += model(*worker.to_device(x, y)).item() * y.numel()
    nats, n_bytes = worker.gather(nats, n_bytes).sum(dim=0).tolist()
    return nats / (n * loader.T), nats / math.log(2) / max(1, n_bytes)


def encode_prompt(prompt: str, model: GPT, tokenizer: Encoding) -> list[int]:
    """The ids of a prompt. An empty one begins a document. Errors: ValueError if it is too long."""
    ids = tokenizer.encode(prompt, disallowed_special=()) or [tokenizer.eot_token]
    T, limit = len(ids), model.config.block_size
    require(T <= limit, f"the prompt has {T} tokens; this model takes at most {limit}")
    return ids


def sample_texts(model: GPT, tokenizer: Encoding, worker: Worker, prompt: str, n: int,
                 seed: int = 1337, stop: str = "", **settings: Any) -> list[str]:  # fmt: skip
    """n texts that begin with the prompt. Without a prompt they begin as documents do.

    A text ends where it contains `stop`, if this is given. settings: see GPT.generate. Errors: as
    encode_prompt.
    """
    ids, eot = encode_prompt(prompt, model, tokenizer), tokenizer.eot_token
    idx = torch.tensor([ids] * n, device=worker.device)  # (n, T)
    settings["generator"] = torch.Generator(worker.device).manual_seed(seed)
    with worker.autocast():
        rows = model.generate(idx, stop=eot, n_vocab=tokenizer.n_vocab, **settings)
    new = [[*row, eot] for row in rows[:, len(ids) :].tolist()]
    texts = [tokenizer.decode(row[: row.index(eot)]) for row in new]
    return [prompt + (text.partition(stop)[0] if stop else text) for text in texts]


# ---------------------------------------------------------------------------- Files of a run


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which gets its name only when it is complete and on the disk.

    Errors: OSError if it cannot be written; then nothing of it is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save makes a RuntimeError of a full disk
        cause = e if isinstance(e, OSError) else e.__context__
        raise OSError(f"cannot write {path} ({getattr(cause, 'strerror', None) or e})") from e
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def only_warn(*errors: type[Exception]) -> Iterator[None]:
    """Print these errors as warnings, and go on. Always among them are files that cannot be
    written, on a full disk for instance, and modules that are missing and not essential."""
    try:
        yield
    except (OSError, ModuleNotFoundError, *errors) as e:
        with suppress(OSError):
            print(f"WARNING: {e}", file=sys.stderr, flush=True)


def list_checkpoints(log_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    paths = [p for p in Path(log_dir).glob("checkpoint_*.pt") if p.stem[11:].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem[11:]))


def save_checkpoint(log_dir: Path, keep_every: int, step: int, **state: Any) -> None:
    """Write the checkpoint of a step. Of the older ones, keep the newest, and those whose step is a
    multiple of keep_every. Errors: OSError."""
    with whole_file(log_dir / f"checkpoint_{step:06d}.pt") as file:
        torch.save(state | {"step": step}, file)
    steps = {int(path.stem[11:]): path for path in list_checkpoints(log_dir)}
    for old in [old for old in steps if old < step][:-1]:
        if old % keep_every:
            steps[old].unlink()


def build(config: GPTConfig, tensors: dict[str, Tensor], n_bytes: float = math.inf) -> GPT:
    """The model of this shape that consists of these tensors, from files of n_bytes.

    Errors: RuntimeError if their names or shapes do not fit; ValueError if the files are too small
    to hold the weights. (In a file, a tensor may be one number that counts a million times.)
    """
    with torch.device("meta"):  # shapes without numbers: this takes no memory
        model = GPT(config)
    n = model.num_params()
    require(2 * n <= n_bytes, f"the files hold fewer than the {n:,} parameters of the config")
    model.load_state_dict(tensors, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def load_checkpoint(path: str | Path) -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint, on the CPU, and all that the file holds. Errors: ValueError.

    The file is a zip archive of tensors and plain values, and loading it runs no code. This checks
    the archive's checksums, because torch does not. The checksums do not cover the archive's
    directory. There a flipped bit may mark a record as compressed, or as a folder, which torch
    would read as nothing. So such marks are refused.
    """
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            marked = any(r.external_attr or r.compress_type for r in archive.infolist())
            require(not marked, "its directory is damaged")
            require(archive.testzip() is None, "a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = build(GPTConfig(**state["config"]), state["model"], os.path.getsize(path))
        return model.float(), state
    except Exception as e:  # zip, pickle and torch each fail in their own ways
        reason = (str(e) or repr(e)).splitlines()[0]
        raise ValueError(
            f"{path} is damaged, or from another version of this program: {reason}"
        ) from e


def newest_checkpoint(log_dir: str | Path) -> tuple[Path, GPT, dict[str, Any]] | None:
    """The newest checkpoint that is whole: its path and load_checkpoint's answer. None if there is
    no checkpoint yet. Errors: ValueError if there are some, but none is whole."""
    paths = list_checkpoints(log_dir)
    for path in reversed(paths):
        with only_warn(ValueError):
            return path, *load_checkpoint(path)
    require(not paths, f"{log_dir}: none of its checkpoints is whole")
    return None


def parse_record(line: bytes) -> dict[str, Any]:
    """A line of log.jsonl, or {} if a kill or a full disk has cut it short."""
    with suppress(ValueError):
        if isinstance(record := json.loads(line), dict):
            return record
    return {}


def read_log(log_dir: str | Path) -> list[dict[str, Any]]:
    """The whole records of a run's log.jsonl."""
    path = Path(log_dir) / "log.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [record for record in map(parse_record, lines) if record]


class Run:
    """What surrounds the training loop. Errors: ValueError if model, data and cfg do not fit."""

    def __init__(self, model: GPT, cfg: TrainConfig, worker: Worker, tokenizer: Encoding,
                 loader: DataLoaderLite, optimizers: list[torch.optim.Optimizer],
                 scaler: torch.amp.GradScaler) -> None:  # fmt: skip
        self.model, self.cfg, self.worker, self.tokenizer = model, cfg, worker, tokenizer
        self.loader, self.optimizers, self.scaler = loader, optimizers, scaler
        self.log_dir = Path(cfg.log_dir)
        self.skipped = 0  # steps in a row
        self.seconds = 0.0  # of all steps so far
        self.best, self.best_saved = (math.inf, 0), True  # the lowest validation loss, its step
        check_vocabulary(model, tokenizer)
        encode_prompt(cfg.sample_prompt, model, tokenizer)  # an error comes now, not later
        sizes = loader.B, loader.T, worker.rank, worker.world_size, cfg.seed, tokenizer.n_vocab
        self.val_loader = DataLoaderLite(cfg.data_dir, "val", *sizes)
        self.examples = []
        if cfg.hellaswag == "on":
            with only_warn():  # if hellaswag.py is not there
                import hellaswag

                self.hellaswag, self.examples = hellaswag, hellaswag.load_examples(worker)

    def evaluate(self, step: int) -> None:
        """Log the validation loss and HellaSwag after `step` steps, draw loss.png, print samples,
        and write the model into hf/ if it is the best so far. Errors: FloatingPointError."""
        cfg, worker, model = self.cfg, self.worker, self.model
        val_loss, bits = evaluate(model, self.val_loader, cfg.val_tokens, self.tokenizer, worker)
        if not math.isfinite(val_loss):
            raise FloatingPointError(f"step {step}: the validation loss is {val_loss}")
        found = val_loss, step
        again = step == self.best[1]  # a run that is resumed at its best step measures it anew
        self.best = found if again else min(self.best, found)
        record = dict(step=step, val_loss=val_loss, bits_per_byte=bits, best_step=self.best[1])
        if self.examples:
            record |= self.hellaswag.evaluate(model, self.tokenizer, self.examples, worker)
        self.log(**record)
        if worker.rank == 0:
            with only_warn(), whole_file(self.log_dir / "loss.png") as file:
                import life

                life.plot_log(read_log(self.log_dir), file)
            how = dict(n=4, seed=cfg.seed, max_new_tokens=32, top_k=50)
            samples = sample_texts(model, self.tokenizer, worker, cfg.sample_prompt, **how)
            worker.print(*(f"  {text!r}" for text in samples))
            if self.best == found:
                self.best_saved = False
                with only_warn():
                    model.save_pretrained(self.log_dir / "hf", self.tokenizer)
                    self.best_saved = True

    def finish(self) -> None:
        """Say what the run leaves behind. Errors: OSError if the best model could not be saved."""
        if not self.best_saved:
            raise OSError(f"{self.log_dir}/hf lacks the best model, as it could not be written")
        if self.worker.rank == 0:
            with only_warn(ValueError):
                import life

                page = self.log_dir / "life.html"
                life.write_page(*load_model(self.log_dir), page, name=self.cfg.log_dir)
        best_step = self.best[1]
        which = f"in hf/ the model of step {best_step}, whose validation loss is the lowest"
        self.worker.print(
            f"{self.log_dir} has log.jsonl, loss.png, life.html, checkpoints, and {which}"
        )
        if best_step < self.cfg.max_steps:
            self.worker.print("later models are worse: fewer steps or more text would help")

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps. It holds what training changes. It needs neither
        the data order nor the learning rate nor dropout, because these follow from the step."""
        if self.worker.rank == 0:
            with only_warn():
                save_checkpoint(
                    self.log_dir, 10 * self.cfg.checkpoint_every, step,
                    config=asdict(self.model.config), train_config=asdict(self.cfg),
                    model=self.model.state_dict(), scaler=self.scaler.state_dict(),
                    optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
                    best=self.best, best_saved=self.best_saved,
                )  # fmt: skip

    def restore(self) -> int:
        """Load the newest checkpoint that is whole → its step, or 0 if there is none yet.

        Errors: ValueError if none is whole, or if they are of another run.
        """
        step = 0
        if found := newest_checkpoint(self.log_dir):
            path, saved, state = found
            same = replace(saved.config, dropout=self.model.config.dropout) == self.model.config
            require(same, f"{path} has another shape: {saved.config}, not {self.model.config}")
            optimizer = state["train_config"]["optimizer"]
            require(optimizer == self.cfg.optimizer, f"{path} is of a run with {optimizer}")
            self.model.load_state_dict(saved.state_dict())
            for mine, theirs in zip(self.optimizers, state["optimizers"], strict=True):
                groups = mine.state_dict()["param_groups"]  # cfg may have another weight decay
                mine.load_state_dict(theirs | {"param_groups": groups})
            if state["scaler"]:  # it is empty unless the run was in fp16
                self.scaler.load_state_dict(state["scaler"])
            require("best" in state, f"{path} is of an earlier version, and cannot be resumed")
            step, self.best, self.best_saved = state["step"], state["best"], state["best_saved"]
        steps, end = self.worker.gather(step).unique().tolist(), self.cfg.max_steps
        differ = f"{self.log_dir}: the workers found checkpoints of different steps: {steps}"
        require(len(steps) == 1, differ)
        require(step <= end, f"{self.log_dir} is at step {step} already, but max_steps is {end}")
        self.worker.print(f"resumed at step {step}" if found else "no checkpoint: starts at step 0")
        return step

    def must_skip(self, step: int, losses: Tensor, norm: float) -> bool:
        """Whether a step must not change the weights, because fp16 has overflowed.

        Errors: FloatingPointError if a worker's loss or the gradient is not finite. fp16 may skip
        nine steps in a row because of its gradient, and the tenth ends the run.
        """
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if not losses.isfinite().all() or self.skipped == (10 if self.scaler.is_enabled() else 1):
            raise FloatingPointError(
                f"step {step}: loss {losses.tolist()} (rank by rank), gradient norm {norm},"
                f" {self.skipped} steps skipped; no weight was touched. --resume goes on from the"
                " newest checkpoint: try a lower --max_lr, or another --precision"
            )
        return self.skipped > 0

    def start_log(self, start: int) -> None:
        """Print and log what this run is. Drop the records of steps that will be computed again,
        and the files that a kill left half written."""
        import hashlib

        cfg, worker, self.start = self.cfg, self.worker, start
        self.limit = worker.matmul_flops()
        tokens, threads = cfg.total_batch_size * cfg.max_steps, torch.get_num_threads()
        facts = dict(
            device=f"{worker.device}, {threads} threads, {worker.world_size} workers",
            precision=f"{worker.dtype}, a bare matmul does {self.limit / 1e12:.3g} TFLOP/s",
            chosen=f"compile {is_compiled(cfg, worker)}, {cfg.optimizer}, AdamW fused",
            config=asdict(self.model.config), train_config=asdict(cfg), tokens=tokens,
            parameters=self.model.num_params(), start_step=start,
            epochs=round(tokens / self.loader.T / self.loader.n_windows, 2),
            versions=f"python {platform.python_version()}, torch {torch.__version__}",
            source="sha256 " + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12],
        )  # fmt: skip
        worker.print(*(f"{key}: {value}" for key, value in facts.items()))
        if worker.rank == 0:
            for pattern in ("checkpoint_*.tmp", "*.png.tmp", "*.html.tmp", "hf/*.tmp"):
                for half_written in self.log_dir.glob(pattern):
                    half_written.unlink()
            for path in [Path(cfg.data_dir, name) for name in TOKENIZER_FILES]:
                if path.exists():  # the tokenizer is not GPT-2's
                    (self.log_dir / path.name).write_bytes(path.read_bytes())
            with open(self.log_dir / "log.jsonl", "a+b") as file:
                file.seek(0)
                kept = 0  # bytes
                for line in file:
                    step = parse_record(line).get("step", -1)
                    if not line.endswith(b"\n") or (isinstance(step, int) and step >= start):
                        break
                    kept += len(line)
                file.truncate(kept)
                file.write(json.dumps(facts).encode() + b"\n")

    def log(self, **record: float) -> None:
        """Print a record and write it. Numbers that are not finite are left out: JSON has none."""
        record = {key: value for key, value in record.items() if math.isfinite(value)}
        shown = {k: v if isinstance(v, int) else f"{v:.5g}" for k, v in record.items()}
        self.worker.print(" | ".join(f"{key} {value}" for key, value in shown.items()))
        if self.worker.rank == 0:
            with only_warn(), open(self.log_dir / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def log_step(self, step: int, loss: float, lr: float, norm: float, seconds: float) -> None:
        self.seconds += seconds
        per_step = self.seconds / (step - self.start + 1)
        left = per_step * (self.cfg.max_steps - step - 1)
        tok_per_s = self.cfg.total_batch_size / seconds  # of all workers together
        flops = tok_per_s / self.worker.world_size * flops_per_token(self.model, self.loader.T)
        self.log(
            step=step, loss=loss, lr=lr, ms=seconds * 1e3, grad_norm=norm, tok_per_s=tok_per_s,
            utilisation=flops / self.limit, minutes_left=left / 60,
        )  # fmt: skip


# --------------------------------------------------------------------- Weights of other programs


def transpose_conv1d(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the matrices of the blocks from (in, out) to (out, in), or back.

    OpenAI wrote these layers as convolutions of width 1, whose matrices are (in, out), and Hugging
    Face has kept that. The matrices of nn.Linear are (out, in).
    """
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: t.T.contiguous() if name.endswith(conv1d) else t for name, t in tensors.items()}


def local_folder(name: str | Path) -> Path:
    """The folder of this name, or a copy of the repository of this name on Hugging Face's hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.bpe", "model*.safetensors"]
    folder = Path(snapshot_download(str(name), allow_patterns=patterns))
    if not any(folder.glob("*.safetensors")):  # an older model
        snapshot_download(str(name), allow_patterns=[*patterns, "pytorch_model*.bin"])
    return folder


# Each of these changes what the weights compute, and in GPT-2 it has one value only.
FIXED = dict(
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True,
)  # fmt: skip


def load_hugging_face(name: str | Path) -> GPT:
    """See GPT.from_pretrained. The files hold tensors, and nothing in them is executed."""
    from safetensors.torch import load_file

    load_bin = functools.partial(torch.load, map_location="cpu", weights_only=True)
    try:
        folder = local_folder(name)
        c = FIXED | json.loads((folder / "config.json").read_text("utf-8"))
        others = [f"{key}={c[key]}" for key in FIXED if c[key] != FIXED[key]]
        require(not others, f"its {', '.join(others)} is not GPT-2's")
        shape = [c.get(k) for k in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")]
        # A large model is in several files, and an older one in pytorch_model.bin.
        patterns = ("model.safetensors", "model-*-of-*.safetensors",
                    "pytorch_model.bin", "pytorch_model-*-of-*.bin")  # fmt: skip
        files = next((f for p in patterns if (f := sorted(folder.glob(p)))), [])
        require(len(files) > 0, "there is no model.safetensors and no pytorch_model.bin")
        load = load_bin if files[0].suffix == ".bin" else load_file
        # OpenAI's names lack the prefix, and its causal masks are not weights.
        tensors = {
            f"transformer.{name.removeprefix('transformer.')}": t
            for file in files for name, t in load(file).items()
            if not name.endswith((".attn.bias", ".attn.masked_bias"))
        }  # fmt: skip
        head = tensors.pop("transformer.lm_head.weight", None)
        if head is not None:  # some programs keep only one of the two
            wte = tensors.setdefault("transformer.wte.weight", head)
            require(torch.equal(head, wte), "its lm_head differs from wte; in GPT-2 they are one")
        tensors["lm_head.weight"] = tensors.get("transformer.wte.weight")
        n_bytes = sum(file.stat().st_size for file in files)
        return build(GPTConfig(*shape), transpose_conv1d(tensors), n_bytes).float()
    except Exception as e:  # the hub, safetensors and torch each fail in their own ways
        reason = " ".join((str(e) or repr(e)).split())
        raise ValueError(
            f"no GPT-2 from {str(name)!r}: {reason} (possible are gpt2, gpt2-medium, gpt2-large,"
            " gpt2-xl, or a folder with config.json and model.safetensors)"
        ) from e


def save_hugging_face(model: GPT, folder: Path, tokenizer: Encoding | None) -> None:
    """See GPT.save_pretrained. Rows of wte that belong to no token are left out. Where the model
    has no biases they are written as zeros, because transformers' GPT-2 always has them."""
    from safetensors.torch import save

    c, tensors = model.config, model.transformer.state_dict(prefix="transformer.")
    eot = tokenizer.eot_token if tokenizer else None
    n_vocab = tokenizer.n_vocab if tokenizer else c.vocab_size
    config = FIXED | dict(
        architectures=["GPT2LMHeadModel"], dtype="float32", bos_token_id=eot, eos_token_id=eot,
        n_positions=c.block_size, vocab_size=n_vocab, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, embd_pdrop=c.dropout, attn_pdrop=c.dropout, resid_pdrop=c.dropout,
    )  # fmt: skip
    for name in [name for name in tensors if name.endswith("weight") and "wpe" not in name]:
        tensors.setdefault(name.replace("weight", "bias"), torch.zeros(len(tensors[name])))
    del tensors["transformer.wte.bias"]
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:n_vocab].contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode())
    with whole_file(folder / "model.safetensors") as file:
        file.write(save(transpose_conv1d(tensors), metadata={"format": "pt"}))
    if tokenizer:
        with only_warn():  # if fineweb.py is not there
            import fineweb

            fineweb.save_hf_tokenizer(tokenizer, folder, c.block_size)


def load_model(name: str | Path) -> tuple[GPT, Encoding]:
    """A model in evaluation mode, on the CPU, and its tokenizer. name: the folder of a run (for its
    best model), a checkpoint, or what GPT.from_pretrained takes. Errors: ValueError, OSError."""
    path, best = Path(name), Path(name, "hf")
    checkpoints = [path] if path.suffix == ".pt" else list_checkpoints(path)
    if best.is_dir():
        model, tokenizer = GPT.from_pretrained(best), load_tokenizer(path)
    elif checkpoints:
        newest = checkpoints[-1]
        model, tokenizer = load_checkpoint(newest)[0], load_tokenizer(newest.parent)
    else:
        import fineweb

        model, folder = GPT.from_pretrained(name), local_folder(name)
        files = "vocab.json and merges.txt, or tokenizer.json,"
        require(fineweb.has_tokenizer(folder), f"{name} has no tokenizer: copy {files} into it")
        tokenizer = load_tokenizer(folder)
    check_vocabulary(model, tokenizer)
    return model.eval(), tokenizer


# --------------------------------------------------------------------------- Shortcuts for a CPU
# They change how fast a CPU computes, and not what. The model touches each in one line. (Only
# `inference` does more: it switches gradients and dropout off, on any device.)


def formula_is_fast(q: Tensor, mask: Tensor | None) -> bool:
    """Whether `attention` is faster than PyTorch's function: on a CPU in bf16, for short sequences.
    A step of `quick` then runs 1.25 times as fast."""
    short_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < q.size(2) <= 256
    return short_on_cpu and mask is None


def loss_in_pieces(x: Tensor) -> bool:
    """Whether ChunkedLoss is faster. torch.compile has to see plain operations."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class ChunkedLoss(torch.autograd.Function):
    """The mean cross entropy of x·weightᵀ, (), for x (B, T, C), weight (V, C), targets (B, T).

    The B·T·V logits are by far the largest tensor of a step. Here only some rows of them exist at a
    time. Their gradient is used while they exist: forward() computes the gradients of x and weight
    as well, if `learns` says so, and backward() only scales them. Second derivatives are refused.
    With autocast, the three products are in its dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, learns: bool) -> Tensor:
        shape = x.shape
        x = x.flatten(0, 1)  # (N, C)
        x_grad = torch.empty_like(x)
        weight_grad = torch.zeros_like(weight if learns else weight[:0])
        targets = targets.flatten()[:, None]  # (N, 1)
        if torch.is_autocast_enabled("cpu"):
            x, weight = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, weight))
        loss = torch.zeros(())
        ctx.N, V = len(x), len(weight)
        rows = 2**25 // V + 1  # products are fast if they are large
        few = 2**20 // V + 1  # the rest is fast if it fits into a CPU's cache
        # Each piece writes into the same memory.
        all_logits, product = x.new_empty(min(rows, ctx.N), V), torch.empty_like(weight)
        for i in range(0, ctx.N, rows):
            some = x[i : i + rows]  # (rows, C)
            logits = torch.mm(some, weight.T, out=all_logits[: len(some)])  # (rows, V)
            pieces = zip(logits.split(few), targets[i : i + rows].split(few), strict=True)
            for z, target in pieces:  # (few, V), (few, 1)
                full = z.float()  # sums over V terms need fp32
                p = full.softmax(dim=1)
                # For every token ln Σ e^z is z - ln p. We take the likeliest one, because the p of
                # the target may be too small for fp32. The loss of the target is ln Σ e^z - z.
                log_sum = full.amax(dim=1) - p.amax(dim=1).log()  # (few,)
                loss += log_sum.sum() - full.gather(1, target).sum()
                if learns:  # the gradient takes the place of the logits: p, minus 1 at the target
                    z.copy_(p.scatter_add_(1, target, -torch.ones_like(p[:, :1])))
            if learns:
                x_grad[i : i + rows] = logits @ weight
                torch.mm(logits.T, some, out=product)  # (V, C)
                # In parts, because PyTorch would first make a copy in fp32 of a whole bf16 product.
                for total, part in zip(weight_grad.split(1024), product.split(1024), strict=True):
                    total += part
        ctx.save_for_backward(x_grad.view(shape), weight_grad)
        return loss / ctx.N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * (grad / ctx.N), weight_grad * (grad / ctx.N), None, None


@contextmanager
def inference(model: GPT, rows: int = 1) -> Iterator[None]:
    """Inside, there are no gradients and no dropout, and a CPU's weights are packed for oneDNN.

    rows: how many rows the matrices typically multiply. oneDNN would otherwise reorder the weights
    in every call, and with few rows that takes longer than the product. Packed, 124M generates 1.2
    to 1.3 times as fast in bf16. In fp32 it generates 1.7 to 2.9 times as fast on AMD's processors,
    and slower on Intel's, where fp32 stays as it is. Do not copy the model in here: the copy would
    keep its packed weights.
    """
    was_training = model.training
    with torch.no_grad():
        model.eval()
        layers = pack_linears(model, rows)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # which brings that of nn.Linear back
            model.train(was_training)


def pack_linears(model: GPT, rows: int) -> list[nn.Linear]:
    """Give the Linear layers packed weights, if this pays on their device → those that got them.
    The functions are private ones of PyTorch. Where one is missing or does not work, the layers
    stay as they are."""
    packed: list[nn.Linear] = []
    on_cpu = model.lm_head.weight.device.type == "cpu"
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    # In fp32, PyTorch has Intel's MKL, which is faster than oneDNN on Intel's processors, and on
    # others much slower.
    by_mkl = dtype == torch.float32 and "Intel" in cpu_features().get("cpu_name", "")
    with suppress(AttributeError, RuntimeError):
        pack = torch.ops.mkldnn._reorder_linear_weight
        multiply = torch.ops.mkldnn._linear_pointwise
        for layer in model.modules() if on_cpu and not by_mkl else ():
            if isinstance(layer, nn.Linear) and "forward" not in vars(layer):  # not packed yet
                bias = None if layer.bias is None else layer.bias.to(dtype)
                args = (pack(layer.weight.to(dtype), rows), bias, "none", [], "")
                layer.forward = lambda x, args=args: multiply(x.to(dtype), *args)
                packed.append(layer)
    return packed


def keep_freed_memory() -> None:
    """Let Linux's C library keep the memory of freed tensors instead of giving it back.

    The kernel would hand it out again page by page in every step. A 124M step on two cores takes
    1.5 times as long without this.
    """
    import ctypes

    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD


# --------------------------------------------------------------------------------------- Muon


def orthogonalize(g: Tensor) -> Tensor:
    """Bring all singular values of a matrix (…, rows, columns) near 1, and keep their directions.

    In a gradient a few directions are usually much larger than the rest. With all singular values
    near 1, the rare directions take steps of the same size.

    This is a Newton-Schulz iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    Divided by its norm, g has no singular value above 1. aX + bXXᵀX + c(XXᵀ)²X raises the small
    ones, and five rounds bring most of them between 0.7 and 1.2. The numbers a, b and c are chosen
    to get there fast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # x·xᵀ is then the smaller of the two products
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps along a running average of each matrix's gradients, after making it orthogonal.

    An orthogonal matrix has a root mean square of 1/√max(rows, columns). 0.2·√max(rows, columns)
    times that is 0.2, about as much as AdamW's steps have, so one learning rate serves both
    (arXiv:2502.16982). Matrices of one shape form a group and are computed together, which makes a
    step of the quick preset 4 % shorter.
    """

    def __init__(self, matrices: list[Tensor], weight_decay: float, dtype: torch.dtype) -> None:
        shapes = dict.fromkeys(p.shape for p in matrices)  # each once, in order
        groups = [dict(params=[p for p in matrices if p.shape == shape]) for shape in shapes]
        super().__init__(groups, dict(lr=0.0, weight_decay=weight_decay, momentum=0.95))
        self.dtype = dtype  # of `orthogonalize`, which need not be exact

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            grad = torch.stack([p.grad for p in params])  # (n, rows, columns)
            average = self.state[params[0]].setdefault("average", torch.zeros_like(grad))
            average.lerp_(grad, 1 - momentum)
            update = grad.lerp(average, momentum).to(self.dtype)  # Nesterov: looks one step ahead
            rows, columns = grad.shape[1:]
            if rows == 3 * columns:  # c_attn is three matrices (as one: 0.025 bits per byte worse)
                rows = columns
            update = orthogonalize(update.view(-1, rows, columns)).reshape(grad.shape)
            for p, u in zip(params, update, strict=True):
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(u, alpha=-0.2 * lr * max(rows, columns) ** 0.5)


# ------------------------------------------------------------------------------ Command line


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that were given, by name. Each field of the three configs has a flag."""
    examples, _, _ = __doc__.partition("\n\nRead it from top to bottom")
    parser = argparse.ArgumentParser(
        description=examples, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.error = lambda message: require(False, f"{message} (--help lists all flags)")
    parser.add_argument("--preset", choices=PRESETS, help=
        "The recipe, which the other flags change. By default it is gpt2 if edu_fineweb10B has"
        " shards or --init is given, and otherwise quick. Defaults are those of gpt2."
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help=
        "Go on from the newest checkpoint in --log_dir, or in the newest log/PRESET folder. Without"
        " one, start at step 0."
    )  # fmt: skip
    parser.add_argument("--generate", metavar="PROMPT", help=
        "Do not train. Write samples that continue PROMPT, with the model of --init or of the"
        " newest run."
    )  # fmt: skip
    source = Path(__file__).read_text("utf-8")
    comments = re.findall(r"((?:    # .*\n)+)    (\w+): ", source)  # and the names below them
    texts = {name: " ".join(comment.replace("# ", "").split()) for comment, name in comments}
    for config in (GPTConfig, TrainConfig, SampleConfig):
        group = parser.add_argument_group(config.__name__, config.__doc__)
        for f in fields(config):
            text, kind, choices = texts[f.name], type(f.default), CHOICES.get(f.name)
            if "default" not in text:
                quick = [vars(c)[f.name] for c in PRESETS["quick"] if f.name in vars(c)]
                differs = f", quick: {quick[0]}" if quick and quick[0] != f.default else ""
                text += f" (default: {f.default}{differs})"
            if kind is bool:
                kind, choices = {"True": True, "False": False}.get, (True, False)
            group.add_argument(f"--{f.name}", type=kind, choices=choices, help=text)
    return vars(parser.parse_args(argv))


def with_flags(config: Any, flags: dict[str, Any]) -> Any:
    """The config, changed by those of the flags that are among its fields. Errors: ValueError."""
    return replace(config, **{f.name: flags[f.name] for f in fields(config) if f.name in flags})


def print_samples(flags: dict[str, Any]) -> None:
    settings = asdict(with_flags(SampleConfig(), flags))
    runs = sorted(Path("log").glob("*/hf"), key=os.path.getmtime)
    name = flags.get("init") or (runs and runs[-1].parent)
    require(bool(name), "there is no run in log/ to sample from: train one, or give --init")
    model, tokenizer = load_model(name)
    worker = start_worker(flags.get("device", "auto"), flags.get("precision", "auto"))
    settings["seed"] = flags.get("seed", TrainConfig.seed)
    model.to(worker.device)
    for text in sample_texts(model, tokenizer, worker, flags["generate"], **settings):
        print(text, end="\n\n")


def take_log_dir(names: list[str], worker: Worker) -> str:
    """Take the first of these folders that holds no run → its name, on all workers.

    The first worker takes it by creating its log.jsonl. Of several runs that start at the same
    moment, only one can do that. Errors: ValueError if all hold a run; OSError.
    """
    chosen = 0
    for name in names if worker.rank == 0 else ():
        Path(name).mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            Path(name, "log.jsonl").touch(exist_ok=False)
            break
        chosen += 1
    chosen = int(worker.gather(chosen)[0, 0])
    require(chosen < len(names), f"log_dir={names[0]} holds a run: --resume goes on with it")
    return names[chosen]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file, if the system can do this in the way of Unix. Errors: ValueError if another
    process has locked it."""
    with path.open("rb") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ModuleNotFoundError:
            pass  # on Windows
        except BlockingIOError as e:
            raise ValueError(f"{path.parent}: another process is writing this run") from e
        yield


def make_model(flags: dict[str, Any], shape: GPTConfig, cfg: TrainConfig) -> GPT:
    """A new model of this shape, or the one that cfg.init names, for the tokenizer of cfg.data_dir.

    Errors: ValueError if that model has another tokenizer, or cannot get the shape that was asked.
    """
    tokenizer = load_tokenizer(cfg.data_dir)
    resumed = flags.get("resume", False) and list_checkpoints(cfg.log_dir)
    if not cfg.init or resumed:  # a checkpoint's weights will take the place of the random ones
        torch.manual_seed(cfg.seed)
        return GPT(replace(shape, vocab_size=flags.get("vocab_size", padded(tokenizer.n_vocab))))
    loaded, its_tokenizer = load_model(cfg.init)
    same = token_bytes(its_tokenizer) == token_bytes(tokenizer)
    require(same, f"init={cfg.init}: its tokenizer is not that of data_dir={cfg.data_dir}")
    config = with_flags(loaded.config, flags)
    same = replace(config, dropout=0.0) == replace(loaded.config, dropout=0.0)
    require(same, f"init={cfg.init} is a {loaded.config}: it cannot become a {config}")
    return build(config, loaded.state_dict())


def fit_to_corpus(cfg: TrainConfig, model: GPT, worker: Worker) -> TrainConfig:
    """The recipe `quick`, cfg, for the corpus in cfg.data_dir, which may be small.

    If a text has fewer tokens than the model has weights and is read many times, the model learns
    it by heart, and then the validation loss rises. So such a text is read seven times at most, and
    the weights decay ten times as fast. (Tiny Shakespeare: 2.14 bits per byte instead of 2.20.)
    """
    T = cfg.seq_len or model.config.block_size
    n_tokens = T * DataLoaderLite(cfg.data_dir, "train", 1, T).n_windows
    if n_tokens >= model.num_params() or cfg.max_steps * cfg.total_batch_size <= 3 * n_tokens:
        return cfg
    steps = min(cfg.max_steps, max(1, 7 * n_tokens // cfg.total_batch_size))
    decay = 10 * cfg.weight_decay
    fitting = f"max_steps is {steps} and weight_decay {decay}, unless they are given"
    worker.print(f"{cfg.data_dir} has only {n_tokens:,} tokens to train on: {fitting}")
    return replace(cfg, max_steps=steps, weight_decay=decay)


def safe_device(cfg: TrainConfig, shape: GPTConfig) -> str:
    """cfg.device, but the CPU for auto where Apple's GPU might compute wrongly.

    There products over 32,767 terms or more may read past their operands (PyTorch's issues 153957
    and 177116). Training has products over V, and over the B·T tokens of a micro-step.
    """
    terms = max(shape.vocab_size, cfg.micro_batch_size * (cfg.seq_len or shape.block_size))
    on_mps = torch.backends.mps.is_available() and not torch.cuda.is_available()
    if not on_mps or terms < 32767 or cfg.device not in ("auto", "mps"):
        return cfg.device
    known = "matrix products over 32,767 terms or more are known to be wrong on some Apple GPUs"
    print(f"{known}: {'training on the cpu' if cfg.device == 'auto' else 'beware'}", flush=True)
    return "cpu" if cfg.device == "auto" else "mps"


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM do not end the process. Their numbers come into this list."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: Any) -> None:
        received.append(number)
        # A second Ctrl-C does not wait for a checkpoint. A second SIGTERM does: a scheduler sends
        # it to every process, and torchrun then once more to its workers.
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    try:
        for number in before:
            signal.signal(number, on_signal)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def execute(flags: dict[str, Any]) -> int:
    """Do what the flags say → 0, or the number of the signal that ended it."""
    if "generate" in flags:
        print_samples(flags)
        return 0
    resume, given = flags.get("resume", False), flags.get("log_dir")
    has_shards = any(Path(TrainConfig.data_dir).glob("*train_*.npy"))
    preset = flags.get("preset") or ("gpt2" if has_shards or "init" in flags else "quick")
    names = [given] if given else [f"log/{preset}", *(f"log/{preset}-{i}" for i in range(2, 1000))]
    runs = [name for name in names if resume and Path(name, "log.jsonl").exists()]
    own: dict[str, Any] = {}
    starts = [r for r in read_log(runs[-1]) if "train_config" in r] if runs else []
    if starts:  # what is not given is as in the run so far, and not as in the preset
        own = starts[-1]["config"] | starts[-1]["train_config"]
    shape, cfg = (with_flags(config, own | flags) for config in PRESETS[preset])
    worker = start_worker(safe_device(cfg, shape), cfg.precision)
    changed = [key for key in own if key in flags and own[key] != flags[key]]
    worker.print(*(f"{key} was {own[key]!r}, now it is {flags[key]!r}" for key in changed))
    if own:
        flags = flags | {"vocab_size": shape.vocab_size}
    cfg = replace(cfg, log_dir=runs[-1] if runs else take_log_dir(names, worker))
    if preset == "quick" and not flags.keys() & {"preset", "data_dir"} and not runs:
        worker.print("no shards in edu_fineweb10B (python fineweb.py makes them): preset quick")
    log = Path(cfg.log_dir, "log.jsonl")
    with locked(log) if worker.rank == 0 else nullcontext():
        try:
            if cfg.data_dir == PRESETS["quick"][1].data_dir and "data_dir" not in flags:
                import fineweb

                fineweb.prepare_stdlib(cfg.data_dir)  # one worker makes it, the others wait
            for split in ("train", "val"):  # an error in these is clearer than one that they cause
                find_shards(cfg.data_dir, split)
            model = make_model(flags, shape, cfg).to(worker.device)
            if preset == "quick" and not starts:
                cfg = with_flags(fit_to_corpus(cfg, model, worker), flags)
            with collect_signals() as signals:
                return train(model, cfg, worker, resume, signals)
        finally:
            if worker.rank == 0 and log.stat().st_size == 0:
                log.unlink()  # nothing has begun


def main(argv: Sequence[str] | None = None) -> int:
    """The command line → the exit status: 0, 1 after an error, or 128 + the number of a signal."""
    with suppress(AttributeError):  # Jupyter's output cannot do this, and need not
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that lacks a character
    try:
        signum = execute(parse(argv))
        return 128 + signum if signum else 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError) as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    status = main()
    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            # gloo's threads now and then abort a process that ends in Python's usual way, and
            # torchrun would start the finished run again. This process ends without their help.
            sys.stdout.flush()
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)
