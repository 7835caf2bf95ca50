"""How fast this GPT-2 is beside two others, and whether it computes what transformers computes.

    python bench.py                    every section of the table but the longest two
    python bench.py step generate      only these sections
    python bench.py --long             every section, with the two that take about an hour each:
                                       `long` (AdamW against Muon), `budget` (what time buys)
    python bench.py > bench.md         the table goes to the file, the rest to stderr
    python bench.py diff gpt2          the same weights in both programs, number by number
    python bench.py diff log/quick     … with the best model of a run, or with any folder

Each row of the table is a piece of work that up to three programs do side by side:
    ours   is train_gpt2.py, fineweb.py and hellaswag.py, as they are.
    (a)    is transformers: GPT2LMHeadModel, its cache, and the fused AdamW of its Trainer.
    (b)    is the plain way, which is written out below: PyTorch with its defaults. Attention is
           F.scaled_dot_product_attention, AdamW is not fused, and the loss takes all logits at
           once. Generation has no cache, HellaSwag goes example by example, and a pool of
           processes makes the shards.

Each of them runs in a process of its own, because the settings of a memory allocator hold for a
whole process. They take turns, A B C A B C, so that all suffer alike from whatever else the machine
does. A cell is the median of the turns ± half their range. × is a ratio of medians.

The last column is the share of a limit that ours reaches. For training, the limit is the speed of a
bare product of two 2048×2048 matrices (8192×8192 on CUDA) in the same precision. For generation, it
is the speed at which a sum reads 512 MB, because every token needs all weights from memory once.

The weights are random, because speed does not depend on them. The text is that of Python's standard
library.

`diff` loads the weights once with train_gpt2.py and once with transformers. Both models read the
same text, in fp32 on the CPU. The exit status is 1 if a difference is larger than its bound.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiktoken import Encoding
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, PRESETS, DataLoaderLite, GPTConfig, TrainConfig, Worker, start_worker

CONFIG = GPTConfig(vocab_size=train_gpt2.padded(50257))  # GPT-2 small, 124M
STEP = (4, 256)  # B and T of a training step
BIG_STEP = (8, 1024)  # B and T of the step whose memory is measured
NEW_TOKENS = 64  # that are generated
STRIDE = 32  # how many of them the plain way makes in one pass: see plain_generate
EXAMPLES = 12  # of HellaSwag
HERE = Path(__file__).parent

Turn = dict[str, float]  # what a contender measured in one turn, by name
Results = dict[str, list[Turn]]  # the turns of each contender
Contender = Callable[[], Iterator[Turn]]  # every next() of the iterator is a turn

# ------------------------------------------------------------------------------ Taking turns


def start_contender(name: str, contender: Contender) -> None:
    """Prepare a process for the turns of one contender."""
    global turns
    os.dup2(2, 1)  # What the process prints goes to stderr, because stdout is for the table.
    if name not in ("transformers", "plain"):
        start_worker()  # sets the allocator and TF32 for the process, as a run of ours does
    turns = contender()


def take_turn() -> Turn:
    return next(turns)


def race(contenders: dict[str, Contender], rounds: int = 2) -> Results:
    """Let each contender take a turn in every round. Errors: OSError if a process dies."""
    spawn = multiprocessing.get_context("spawn")
    results: Results = {name: [] for name in contenders}
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, spawn, start_contender, (name, f)))
            for name, f in contenders.items()
        }
        for _ in range(rounds):
            for name, process in processes.items():
                try:
                    results[name].append(process.submit(take_turn).result())
                except BrokenProcessPool as e:
                    sections = "measure the other sections by name (--help lists them)"
                    raise OSError(f"{name}: its process died, maybe for memory; {sections}") from e
    return results


def synchronize() -> None:
    """Wait until the GPU has done all that it was told to do. A CPU has always done it."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def peak_gb(device: torch.device) -> float:
    """The most memory that this process has had so far. On CUDA only the GPU's tensors count."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --------------------------------------------------------------------------------- The table


def median(turns: list[Turn], key: str) -> float:
    return statistics.median(turn[key] for turn in turns)


def cell(turns: list[Turn], key: str) -> str:
    """A measurement with three digits, and its spread if there were several turns."""
    values = [turn[key] for turn in turns]
    middle = median(turns, key)
    spread = f" ±{(max(values) - min(values)) / 2 / middle:.0%}" if len(turns) > 1 else ""
    return f"{middle:,.0f}{spread}" if middle >= 100 else f"{middle:.3g}{spread}"


def print_row(*cells: str) -> None:
    print("|", " | ".join([*cells, *[""] * (7 - len(cells))]), "|", flush=True)


def print_comparison(what: str, results: Results, key: str = "rate", share: str = "") -> None:
    """A row that compares one measurement of all contenders. share: the key of the last column."""
    ours, *others = (results.get(name) for name in ("ours", "transformers", "plain"))
    cells = [cell(turns, key) if turns else "" for turns in (ours, *others)]
    ratios = [f"{median(ours, key) / median(turns, key):.2f}" if turns else "" for turns in others]
    print_row(what, *cells, *ratios, f"{median(ours, share):.0%}" if share else "")


# --------------------------------------------------------------------------------- The models


def build_model(kind: str, c: GPTConfig, device: torch.device) -> nn.Module:
    """A model with random weights, which are the same for every kind."""
    torch.manual_seed(0)
    model = GPT(c)
    if kind == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        weights = train_gpt2.transpose_conv1d(model.state_dict())
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, eos_token_id=None,
        ))  # fmt: skip
        model.load_state_dict(weights)
    return model.to(device)


def plain_logits(model: GPT, idx: Tensor) -> Tensor:
    """GPT-2 as one would write it down, with our model's layers: ids (B, T) → logits (B, T, V)."""
    parts = model.transformer
    B, T = idx.shape
    x = parts.wte(idx) + parts.wpe(torch.arange(T, device=idx.device))  # (B, T, C)
    for block in parts.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2)  # (B, T, C) each
        q, k, v = (z.view(B, T, model.config.n_head, -1).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, T, -1))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
    return model.lm_head(parts.ln_f(x))


# ------------------------------------------------------------------ The same numbers as theirs


class Outcome(NamedTuple):
    """What a model computes from T tokens of text."""

    logits: Tensor  # (1, T, V)
    loss: float  # nats per token
    grads: dict[str, Tensor]  # of the loss, by the name of the parameter
    tokens: list[int]  # what it writes after the first half of the text, greedily


def load_in_transformers(name: str) -> nn.Module:
    """What `load_model` loads, but read by transformers. Errors: ValueError."""
    from transformers import GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    best = Path(name, "hf")  # the best model, if the name is that of a run
    folder = str(best) if best.is_dir() else name
    try:
        return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as e:  # it fails in many ways of its own and of other libraries
        reason = " ".join(str(e).split())
        wanted = "a folder with config.json and weights, such as a run's"
        raise ValueError(f"transformers has no GPT-2 from {folder!r}: {reason} ({wanted})") from e


def compute(model: nn.Module, idx: Tensor, targets: Tensor) -> Outcome:
    """Run one of the two models on token ids and the ids that come next, (1, T) each."""
    T = idx.size(1)
    prompt = idx[:, : max(1, T // 2)]
    n_new = min(64, T - prompt.size(1))
    if isinstance(model, GPT):
        logits = model(idx)
        loss = model(idx, targets)
        loss.backward()
        grads = {key: p.grad for key, p in model.named_parameters()}
        text = model.generate(prompt, n_new, temperature=0)
    else:
        from transformers import GenerationConfig

        output = model(idx, labels=targets, shift_labels=targets)
        logits, loss = output.logits, output.loss
        loss.backward()
        grads = train_gpt2.transpose_conv1d({key: p.grad for key, p in model.named_parameters()})
        # This replaces the settings that came with the weights. They may say how to sample, and at
        # which token to stop.
        model.generation_config = GenerationConfig(max_new_tokens=n_new, do_sample=False)
        text = model.generate(prompt)
    return Outcome(logits.detach(), loss.item(), grads, text[0, prompt.size(1) :].tolist())


def print_diff(name: str) -> bool:
    """Print how far our model and transformers' are apart → whether each figure is in its bound.

    name: what `load_model` takes, but no checkpoint. Errors: ValueError, OSError.
    """
    hint = f"{name}: transformers cannot read a checkpoint: name the folder of its run"
    train_gpt2.require(not name.endswith(".pt"), hint)
    model, tokenizer = train_gpt2.load_model(name)
    theirs = load_in_transformers(name)
    text = Path(train_gpt2.__file__).read_text("utf-8")
    ids = torch.tensor([tokenizer.encode_ordinary(text)[: model.config.block_size + 1]])
    a, b = (compute(m, ids[:, :-1], ids[:, 1:]) for m in (model, theirs))
    apart = torch.stack([(grad - b.grads[key]).abs().max() for key, grad in a.grads.items()])
    largest = torch.stack([grad.abs().max() for grad in b.grads.values()]).max()
    differ = sum(x != y for x, y in zip(a.tokens, b.tokens, strict=True))
    figures = {  # each with its bound
        "logits": ((a.logits - b.logits).abs().max().item(), 1e-4),
        "loss, nats per token": (abs(a.loss - b.loss), 1e-5),
        "gradients, relative to the largest": ((apart.max() / largest).item(), 1e-5),
        f"greedy tokens that differ, of {len(a.tokens)}": (differ, 0),
    }
    passed = {figure: value <= bound for figure, (value, bound) in figures.items()}  # NaN is not
    print(f"{name}: {ids.size(1) - 1:,} tokens of train_gpt2.py, in fp32 on the CPU")
    print(f"this program beside transformers {version('transformers')}, loss {a.loss:.4f}\n")
    print(f"{'':36}{'difference':>12}{'at most':>12}")
    for figure, (value, bound) in figures.items():
        print(f"{figure:36}{value:12.3g}{bound:12.3g}  {'ok' if passed[figure] else 'MISSED'}")
    return all(passed.values())


# ---------------------------------------------------------------------------------- Training


def make_optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Take a step with a learning rate of 0, so that the optimizers' state is in memory."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        optimizer.zero_grad()


def make_step(
    kind: str, worker: Worker, data: Path, config: GPTConfig, cfg: TrainConfig,
    compiled: bool | None = None,
) -> Callable[[], float]:  # fmt: skip
    """A function that takes a training step, from loading to zeroed gradients → its loss.

    compiled: whether torch.compile is used. If not given, it is as in a run of train_gpt2.py.
    """
    if compiled is None:
        compiled = kind == "ours" and worker.device.type == "cuda"
    model = build_model(kind, config, worker.device)
    net = torch.compile(model) if compiled else model
    loader = iter(DataLoaderLite(data, "train", cfg.micro_batch_size, cfg.seq_len))
    if kind == "ours":
        optimizers = train_gpt2.configure_optimizers(model, cfg, worker.dtype)
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), fused=kind == "transformers")]
    make_optimizer_state(model, optimizers)

    def step() -> float:
        x, y = (t.to(worker.device) for t in next(loader))  # (B, T) each
        with worker.autocast():
            if kind == "ours":
                loss = net(x, y)
            elif kind == "plain":
                loss = F.cross_entropy(plain_logits(model, x).flatten(0, 1), y.flatten())
            else:
                loss = net(x, labels=y, shift_labels=y, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cfg.max_lr
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def training(
    kind: str, worker: Worker, data: Path, config: GPTConfig, cfg: TrainConfig, steps: int = 1,
    warm_up: bool = True, compiled: bool | None = None,
) -> Iterator[Turn]:  # fmt: skip
    """A turn is some steps. An untimed step comes before them, unless warm_up is False.

    A process that waits loses memory to the kernel, and the untimed step gets it back.
    """
    step = make_step(kind, worker, data, config, cfg, compiled)
    tokens = steps * cfg.micro_batch_size * cfg.seq_len
    with torch.device("meta"):
        flops = train_gpt2.flops_per_token(GPT(config), cfg.seq_len) * tokens
    first = seconds(step) if warm_up else 0.0
    while True:
        took = seconds(lambda: [step() for _ in range(steps)])
        gb = peak_gb(worker.device)
        limit = worker.matmul_flops()
        share = flops / took / limit
        yield dict(first=first, rate=tokens / took, share=share, limit=limit / 1e9, gb=gb)
        if warm_up:
            step()


def bench_step(worker: Worker, data: Path) -> None:
    B, T = STEP
    args = (worker, data, CONFIG, TrainConfig(micro_batch_size=B, seq_len=T))
    names = ("ours", "transformers", "plain", "our transformers", "our plain")
    results = race({name: partial(training, name.split()[-1], *args) for name in names})
    print_row(f"limit, matrix product in {worker.dtype}: GFLOP/s", cell(results["ours"], "limit"))
    print_comparison(f"training step, B={B}, T={T}: tokens/s", results, share="share")
    results |= {name: results[f"our {name}"] for name in ("transformers", "plain")}
    print_comparison("… all with the allocator settings of ours", results, share="share")


def bench_memory(worker: Worker, data: Path) -> None:
    B, T = BIG_STEP
    args = (worker, data, CONFIG, TrainConfig(micro_batch_size=B, seq_len=T))
    # On CUDA the first step compiles the model. On a CPU it is as fast as the others, and long.
    on_cuda = worker.device.type == "cuda"
    results: Results = {}
    for kind in ("ours", "plain"):  # one after the other, because both may not fit into memory
        results |= race({kind: partial(training, kind, *args, warm_up=on_cuda)}, rounds=1)
    print_comparison(f"… B={B}, T={T}: peak memory, GB (less is better)", results, "gb")
    print_comparison(f"… B={B}, T={T}: tokens/s", results, share="share")


# -------------------------------------------------------------------------------- Generation


def plain_generate(model: GPT, idx: Tensor, n: int, stride: int = 1, k: int = 50) -> Tensor:
    """Continue idx (B, T) by n sampled tokens, without a cache → (B, T + n).

    Each token takes a pass over all tokens before it. With a stride this takes 1/stride of the
    time: one pass stands for that many, its length is their mean, and its token is repeated. The
    text makes no sense then.
    """
    for _ in range(0, n, stride):
        fed = torch.cat((idx, idx[:, -1:].expand(-1, stride // 2)), dim=1)  # idx, if stride is 1
        logits, ids = plain_logits(model, fed)[:, -1].float().topk(k)  # (B, k) each
        token = ids.gather(1, torch.multinomial(logits.softmax(dim=1), 1))  # (B, 1)
        idx = torch.cat((idx, token.expand(-1, stride)), dim=1)
    return idx


@torch.no_grad()
def generate(kind: str, model: nn.Module, worker: Worker, B: int, n: int) -> None:
    """Write n tokens after each of B random prompts of 8 tokens."""
    idx = torch.randint(CONFIG.vocab_size, (B, 8), device=worker.device)
    if kind == "transformers":  # without autocast, because its weights have worker.dtype already
        mask = torch.ones_like(idx)
        how = dict(max_new_tokens=n, do_sample=True, top_k=50, pad_token_id=0)
        model.generate(idx, attention_mask=mask, **how)
    elif kind == "plain":
        with worker.autocast():
            plain_generate(model, idx, n, STRIDE)
    else:
        with worker.autocast():
            model.generate(idx, n, top_k=50)


def generating(kind: str, worker: Worker) -> Iterator[Turn]:
    """A turn writes one text and then four at once, in worker.dtype and in fp32."""
    jobs = {}
    for dtype in dict.fromkeys((worker.dtype, torch.float32)):
        model = build_model(kind, CONFIG, worker.device).eval()
        model = model.to(dtype) if kind == "transformers" else model
        for B in (1, 4):
            jobs[B, dtype] = partial(generate, kind, model, replace(worker, dtype=dtype), B)
            jobs[B, dtype](2)  # a warm-up
    n_weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    vector = torch.ones(2**27, device=worker.device)  # 512 MB, far more than any cache
    while True:
        limit = 4 * vector.numel() / min(seconds(lambda: vector.sum().item()) for _ in range(5))
        turn = dict(limit=limit / 1e9)
        for (B, dtype), job in jobs.items():
            took = seconds(partial(job, NEW_TOKENS)) * (STRIDE if kind == "plain" else 1)
            key = f"B={B}, {dtype}"
            bytes_read = NEW_TOKENS * n_weights * dtype.itemsize
            turn[key] = B * NEW_TOKENS / took
            turn[f"share, {key}"] = bytes_read / took / limit
        yield turn


def bench_generate(worker: Worker, data: Path) -> None:
    kinds = ("ours", "transformers", "plain")
    results = race({kind: partial(generating, kind, worker) for kind in kinds})
    print_row("limit, reading memory: GB/s", cell(results["ours"], "limit"))
    for key in [key for key in results["ours"][0] if key.startswith("B")]:
        what = f"generation, {NEW_TOKENS} tokens, {key}: tokens/s"
        print_comparison(what, results, key, share=f"share, {key}")


# ------------------------------------------------------------------------ HellaSwag and shards


def make_examples(data: Path) -> list[dict[str, Any]]:
    """Examples that are as long as HellaSwag's, but make no sense.

    Of every three, two are as long as those from WikiHow, and one as those from ActivityNet.
    """
    tokenizer = train_gpt2.load_tokenizer(data)
    ids = train_gpt2.open_shard(train_gpt2.find_shards(data, "train")[0])
    rng = np.random.default_rng(0)

    def text(mean_tokens: int) -> str:
        start = rng.integers(len(ids) - 1000)
        length = round(mean_tokens * rng.normal(1, 0.15))
        return tokenizer.decode(ids[start : start + length].tolist())

    examples = []
    for i in range(EXAMPLES):
        context, ending = (64, 40) if i % 3 else (25, 14)  # mean tokens of each
        endings = [text(ending) for _ in range(4)]
        examples.append(dict(ctx=text(context), endings=endings, label=i % 4))
    return examples


@torch.no_grad()
def plain_hellaswag(
    model: GPT, tokenizer: Encoding, examples: list[dict[str, Any]], worker: Worker
) -> dict[str, float]:
    """One example at a time: four padded rows, each of which repeats the context."""
    encode = tokenizer.encode_ordinary
    right = []
    for example in examples:
        context = encode(example["ctx"])
        endings = [encode(f" {ending}") for ending in example["endings"]]
        rows = [torch.tensor(context + ending) for ending in endings]
        idx = pad_sequence(rows, batch_first=True).to(worker.device)  # (4, T)
        with worker.autocast():
            logits = plain_logits(model, idx)[:, :-1].flatten(0, 1)  # (4·(T - 1), V)
            nats = F.cross_entropy(logits, idx[:, 1:].flatten(), reduction="none").view(4, -1)
        n = len(context) - 1  # the place of the first ending token among the targets
        means = [nats[i, n : n + len(ending)].mean() for i, ending in enumerate(endings)]
        right.append(int(torch.stack(means).argmin()) == example["label"])
    return dict(hellaswag_acc_norm=statistics.mean(right))


def scoring(kind: str, worker: Worker, data: Path) -> Iterator[Turn]:
    """A turn scores all examples."""
    model = build_model(kind, CONFIG, worker.device).eval()
    tokenizer = train_gpt2.load_tokenizer(data)
    evaluate = hellaswag.evaluate if kind == "ours" else plain_hellaswag
    examples = make_examples(data)
    evaluate(model, tokenizer, examples[:2], worker)  # a warm-up
    while True:
        took = seconds(lambda: evaluate(model, tokenizer, examples, worker))
        yield dict(rate=len(examples) / took)


def bench_hellaswag(worker: Worker, data: Path) -> None:
    results = race({kind: partial(scoring, kind, worker, data) for kind in ("ours", "plain")})
    print_comparison("HellaSwag: examples/s", results)


def tokenize(tokenizer: Encoding, text: str) -> np.ndarray:
    return np.array([tokenizer.eot_token, *tokenizer.encode_ordinary(text)], dtype=np.uint16)


def plain_shards(paths: list[str], folder: str) -> None:
    """The usual way: half of the cores tokenize, and this process joins what they send to it."""
    shard = np.empty(fineweb.SHARD_TOKENS, dtype=np.uint16)
    n = 0
    work = partial(tokenize, fineweb.load_tokenizer())
    pool = multiprocessing.Pool(max(1, (os.cpu_count() or 1) // 2))
    with open(paths[0], encoding="utf-8") as file, pool:
        texts = (json.loads(line)["text"] for line in file)
        for ids in pool.imap(work, texts, chunksize=16):
            shard[n : n + len(ids)] = ids
            n += len(ids)
    np.save(Path(folder, "text_train_000000.npy"), shard[:n])


def sharding(kind: str, path: Path) -> Iterator[Turn]:
    """A turn makes the shards of one file, into an empty folder."""
    prepare = fineweb.prepare_files if kind == "ours" else plain_shards
    fineweb.load_tokenizer()  # it takes a second, and is kept
    while True:
        with tempfile.TemporaryDirectory() as folder:
            took = seconds(partial(prepare, [str(path)], folder))
            tokens = sum(len(np.load(shard)) for shard in Path(folder).glob("*.npy"))
        yield dict(rate=tokens / took)


def bench_shards(worker: Worker, data: Path) -> None:
    what = "shards, GPT-2's tokenizer: tokens/s"
    try:
        fineweb.load_tokenizer()
    except OSError:
        print_row(f"{what}: not measured, the tokenizer cannot be downloaded")
        return
    tokenizer = train_gpt2.load_tokenizer(data)
    ids = train_gpt2.open_shard(train_gpt2.find_shards(data, "train")[0])
    documents = tokenizer.decode(ids.tolist()).split(fineweb.EOT)[1:]
    path = data / "documents.jsonl"
    lines = "".join(json.dumps(dict(text=text)) + "\n" for text in documents)
    path.write_text(lines * 8, "utf-8")  # 75 MB, beside which the start of a pool is short
    results = race({kind: partial(sharding, kind, path) for kind in ("ours", "plain")}, rounds=3)
    print_comparison(what, results)


# ---------------------------------------------------------------------------- The quick recipe


def quick(data: Path) -> tuple[GPTConfig, TrainConfig]:
    """The configs of a run with the preset quick on this data."""
    shape, cfg = PRESETS["quick"]
    vocab_size = train_gpt2.padded(train_gpt2.load_tokenizer(data).n_vocab)
    return replace(shape, vocab_size=vocab_size), replace(cfg, seq_len=shape.block_size)


def run_quick(data: Path, processes: int = 1, **flags: Any) -> list[dict[str, Any]]:
    """Run `train_gpt2.py --preset quick` with these flags → its log."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as log_dir:
        flags |= dict(preset="quick", data_dir=data, log_dir=log_dir)
        options = [f"--{key}={value}" for key, value in flags.items()]
        program = [str(HERE / "train_gpt2.py"), *options]
        command = [sys.executable, *(torchrun if processes > 1 else []), *program]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return train_gpt2.read_log(log_dir)


def profiling(worker: Worker, data: Path) -> Iterator[Turn]:
    """The only turn gives each operation's share of the CPU's time, the largest first."""
    step = make_step("ours", worker, data, *quick(data), compiled=False)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(5):
            step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(times.values())
    yield {key: times[key] / total for key in sorted(times, key=times.get, reverse=True)}


def bench_quick(worker: Worker, data: Path) -> None:
    # A cache would have what an earlier run has compiled, and hide how long compiling takes.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    args = ("ours", worker, data, *quick(data), 10)
    contenders = {"eager": partial(training, *args, compiled=False)}
    if any(shutil.which(compiler) for compiler in ("g++", "clang++", "cl")):
        contenders["compiled"] = partial(training, *args, compiled=True)
    results = race(contenders)
    print_comparison("quick recipe's step: tokens/s", dict(ours=results["eager"]), share="share")
    if compiled := results.get("compiled"):
        what = f"… by torch.compile, after {compiled[0]['first']:.0f} s: tokens/s"
        print_comparison(what, dict(ours=compiled), share="share")
    else:
        print_row("… by torch.compile: not measured, there is no C++ compiler")
    (times,) = race({"profile": partial(profiling, worker, data)}, rounds=1)["profile"]
    shares = [f"{key.removeprefix('aten::')} {share:.0%}" for key, share in times.items()]
    print_row(f"… where its time goes: {', '.join(shares[:8])}")


def bench_growth(worker: Worker, data: Path) -> None:
    """Time and peak memory of a step, along three axes. Each point has a process of its own."""

    @functools.cache  # one point lies on all three axes
    def point(B: int, T: int, L: int) -> str:
        cfg = TrainConfig(micro_batch_size=B, seq_len=T)
        contender = partial(training, "ours", worker, data, replace(CONFIG, n_layer=L), cfg)
        (turn,) = race({"ours": contender}, rounds=1)["ours"]
        return f"{B * T / turn['rate']:.2g} s {turn['gb']:.2g} GB"

    middle = dict(B=1, T=256, L=12)
    for axis, values in dict(T=(128, 256), B=(1, 2), L=(6, 12)).items():
        fixed = ", ".join(f"{key}={middle[key]}" for key in middle if key != axis)
        points = [point(**middle | {axis: value}) for value in values]
        what = f"step, {fixed}, {axis} = {', '.join(map(str, values))}"
        print_row(what, ", ".join(points))


def bench_costs(worker: Worker, data: Path) -> None:
    """What a training run costs beside its steps: more processes, loading, checkpoints, a start."""
    for n in (1, 2):
        log = run_quick(data, n, max_steps=20, val_tokens=4096, device="cpu")
        turns = [record for record in log if "tok_per_s" in record][5:]
        print_row(f"quick recipe, processes (gloo): {n}: tokens/s", cell(turns, "tok_per_s"))

    loader = iter(DataLoaderLite(data, "train", 64, 1024))
    turns = [dict(ms=1e3 * seconds(lambda: next(loader))) for _ in range(60)]
    print_row("loading 64×1024 tokens: ms", cell(turns[40:], "ms"))  # now from memory, not disk

    model = GPT(CONFIG)
    optimizers = train_gpt2.configure_optimizers(model, TrainConfig())
    make_optimizer_state(model, optimizers)
    state = dict(config=asdict(CONFIG), model=model.state_dict())
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    saving = seconds(lambda: train_gpt2.save_checkpoint(data, 1, 1, **state))
    (path,) = train_gpt2.list_checkpoints(data)
    loading = seconds(lambda: train_gpt2.load_checkpoint(path))
    gb = path.stat().st_size / 1e9
    times = f"{gb:.2f} GB; {saving:.1f} s to save, {loading:.1f} s to load and check"
    print_row("checkpoint", times)

    run_silently = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, cwd=HERE)
    for program in ("train_gpt2.py --help", "-c 'import torch'"):
        command = [sys.executable, *shlex.split(program)]
        turns = [dict(s=seconds(partial(run_silently, command))) for _ in range(2)]
        print_row(f"start-up, python {program}: s", cell(turns, "s"))


def bench_long(worker: Worker, data: Path) -> None:
    """Steps and seconds that AdamW and Muon take to the loss at which AdamW ends."""

    def curve(optimizer: str, lr: float, seed: int) -> list[tuple[int, float, float]]:
        """Steps, seconds of training and validation loss, at each evaluation of a run."""
        often = dict(eval_every=25, val_tokens=2**16, checkpoint_every=10**6)
        log = run_quick(data, optimizer=optimizer, max_lr=lr, seed=seed, **often)
        took = np.cumsum([0.0, *(record["ms"] / 1e3 for record in log if "ms" in record)]).tolist()
        evaluations = [record for record in log if "val_loss" in record]
        return [(r["step"], took[r["step"]], r["val_loss"]) for r in evaluations]

    # AdamW gets the best of three learning rates.
    tuning = {lr: curve("adamw", lr, seed=1) for lr in (1e-3, 2e-3, 4e-3)}
    best = min(tuning, key=lambda lr: tuning[lr][-1][2])
    muon_lr = quick(data)[1].max_lr
    curves = {
        f"AdamW at {best}, of {', '.join(map(str, tuning))} the best rate":
            [tuning[best], curve("adamw", best, seed=2), curve("adamw", best, seed=3)],
        f"Muon at {muon_lr}": [curve("muon", muon_lr, seed) for seed in (1, 2, 3)],
    }  # fmt: skip
    # The largest of AdamW's three last losses is one that all three of its runs have reached.
    target = max(points[-1][2] for points in next(iter(curves.values())))
    for name, three in curves.items():
        hits = [next((p for p in points if p[2] <= target), points[-1]) for points in three]
        spread = zip(np.mean(hits, axis=0), np.std(hits, axis=0, ddof=1), strict=True)
        steps, took, loss = (f"{mean:.4g} ± {deviation:.2g}" for mean, deviation in spread)
        print_row(f"to loss {target:.3f}, {name}", f"{steps} steps, {took} s, to {loss}")


BUDGETS = {  # flags that change the quick recipe
    "a quarter of the steps": dict(max_steps=250),
    "the quick recipe": dict(),
    "4 times the steps": dict(max_steps=4000),
    "half the width": dict(n_embd=64, n_head=1),
    "twice the width": dict(n_embd=256, n_head=4),
}


def learning_curve(log: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Seconds of training, and bits per byte, at each evaluation of a run but that of step 0."""
    per_step = statistics.median(record["ms"] for record in log if "ms" in record) / 1e3
    evaluations = [record for record in log if "val_loss" in record]
    return [(r["step"] * per_step, r["bits_per_byte"]) for r in evaluations[1:]]


def draw_budget(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Bits per byte against seconds, a line for each run, with a dot where it ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", dpi=160)
    axes = figure.subplots()
    axes.set(xlabel="seconds of training", ylabel="bits per byte (validation)", xscale="log")
    axes.set_title("What another minute buys: the quick recipe, longer and wider")
    colors = ("#56b4e9", "#000000", "#0072b2", "#e69f00", "#d55e00")
    for (name, points), color in zip(curves.items(), colors, strict=True):
        label = f"{name}: {points[-1][1]:.3f}"
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markevery=[-1], label=label)
    axes.legend(loc="upper right", frameon=False)
    low, high = axes.get_xlim()
    axes.set_xlim(low, 2 * high)  # room for the legend
    ticks = [t for t in (3, 10, 30, 60, 120, 300, 600, 1200, 3600) if low < t < 2 * high]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def bench_budget(worker: Worker, data: Path) -> None:
    """Longer runs and wider models. The picture goes to assets/budget.png."""
    curves = {name: learning_curve(run_quick(data, **flags)) for name, flags in BUDGETS.items()}
    for name, points in curves.items():
        took, bits = points[-1]
        print_row(f"{name}: bits per byte", f"{bits:.3f} after {took:.0f} s")
    draw_budget(curves, HERE / "assets" / "budget.png")


# ------------------------------------------------------------------------------ Command line

SECTIONS = dict(
    step=bench_step, memory=bench_memory, generate=bench_generate, hellaswag=bench_hellaswag,
    shards=bench_shards, quick=bench_quick, growth=bench_growth, costs=bench_costs,
    long=bench_long, budget=bench_budget,
)  # fmt: skip


def describe_machine(worker: Worker) -> str:
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")  # on Linux, where platform does not know the name
    if worker.device.type == "cuda":
        name = torch.cuda.get_device_name(worker.device)
    elif cpu_info.exists():
        lines = cpu_info.read_text().splitlines()
        names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    system = f"{platform.system()}, Python {platform.python_version()}, {versions}"
    return f"{name}, {torch.get_num_threads()} threads, {worker.dtype}; {system}"


def print_table(names: Sequence[str]) -> None:
    """Measure these sections."""
    worker = start_worker()
    print(describe_machine(worker), end="\n\n")
    contenders = ("ours", "(a) transformers", "(b) plain")
    print_row("GPT-2 124M", *contenders, "× (a)", "× (b)", "of the limit")
    print_row("---", *["---:"] * 6)
    # Windows does not delete a file that is still mapped into memory. It is left over then.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data = Path(folder, "stdlib")
        with contextlib.redirect_stdout(sys.stderr):
            fineweb.prepare_stdlib(data)
        for name in names:
            SECTIONS[name](worker, data)


def run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: train_gpt2.require(False, f"{message} (--help lists all flags)")
    known = ", ".join(SECTIONS)
    parser.add_argument("names", nargs="*", metavar="section", help=f"{known}; or: diff MODEL")
    parser.add_argument("--long", action="store_true", help="Measure every section.")
    args = parser.parse_args(argv)
    if "diff" in args.names:
        is_one = args.names[0] == "diff" and len(args.names) == 2 and not args.long
        train_gpt2.require(is_one, "diff takes the name of one model: python bench.py diff gpt2")
        return 0 if print_diff(args.names[1]) else 1
    names = args.names or [name for name in SECTIONS if args.long or name not in ("long", "budget")]
    unknown = [name for name in names if name not in SECTIONS]
    train_gpt2.require(
        not unknown, f"no section {', '.join(unknown)}; there are {known}, and diff MODEL"
    )
    print_table(names)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line → the exit status: 0, 1 after an error or a large difference, or 130."""
    with contextlib.suppress(AttributeError):  # Jupyter's output cannot do this, and need not
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that lacks a character
    try:
        return run(argv)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
