"""Speed and memory of this GPT-2 beside two others, measured in one run: a table in Markdown.

    python bench.py                    all sections but `long`
    python bench.py step generate      these sections
    python bench.py --long             AdamW against Muon to a given loss too
    python bench.py > bench.md         the table alone: what else there is to say goes to stderr

Side by side, on the same work:
    ours   train_gpt2.py, fineweb.py and hellaswag.py, as they are
    (a)    transformers' GPT2LMHeadModel, its cache, and AdamW as its Trainer has it (fused)
    (b)    the plain way, written out below: PyTorch with its defaults, of which attention is one
           (F.scaled_dot_product_attention); AdamW unfused, all logits at once, no cache, HellaSwag
           example by example, shards by a pool of processes

Each contender is a process of its own, as an allocator's settings hold for a whole process. They
take turns, A B C A B C, so that what else the machine does hits all alike. A cell is the median of
the turns ± half their range; × is a ratio of medians. The limit is a bare product of two 2048×2048
matrices of the same precision (8192 on a GPU); for generation it is to read all weights once a
token, as fast as a sum reads 512 MB.

Weights are random, as speed does not depend on them. The text is Python's standard library.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
STEP, BIG_STEP = (4, 256), (8, 1024)  # B and T
NEW_TOKENS, STRIDE = 256, 32  # STRIDE: see plain_generate
EXAMPLES = 24  # of HellaSwag
HERE = Path(__file__).parent

Turn = dict[str, float]  # what a contender measured in a turn
Results = dict[str, list[Turn]]  # of each contender

# ------------------------------------------------------------------------------ Taking turns


def sit_down(name: str, contender: Callable[[], Iterator[Turn]]) -> None:
    """In a contender's process, first of all."""
    global turns
    os.dup2(2, 1)  # stdout is for the table
    if name not in ("transformers", "plain"):
        start_worker()  # for what it sets in the process: the allocator, TF32
    turns = contender()


def take_turn() -> Turn:
    return next(turns)


def race(contenders: dict[str, Callable[[], Iterator[Turn]]], rounds: int = 3) -> Results:
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        seats = {
            name: stack.enter_context(ProcessPoolExecutor(1, spawn, sit_down, (name, contender)))
            for name, contender in contenders.items()
        }
        played = [
            {name: seat.submit(take_turn).result() for name, seat in seats.items()}
            for _ in range(rounds)
        ]
    return {name: [turns[name] for turns in played] for name in contenders}


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_gb(device: torch.device) -> float:
    """The most memory that this process ever had: on a GPU in tensors, else altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --------------------------------------------------------------------------------- The table


def median(turns: list[Turn], key: str) -> float:
    return statistics.median(turn[key] for turn in turns)


def show(turns: list[Turn], key: str) -> str:
    values, middle = [turn[key] for turn in turns], median(turns, key)
    spread = f" ±{(max(values) - min(values)) / 2 / middle:.0%}" if len(turns) > 1 else ""
    return f"{middle:,.0f}{spread}" if middle >= 100 else f"{middle:.3g}{spread}"


def row(*cells: str) -> None:
    print("|", " | ".join([*cells, *[""] * (7 - len(cells))]), "|", flush=True)


def compare(what: str, results: Results, key: str = "rate", limit: str = "") -> None:
    ours, *others = (results.get(name) for name in ("ours", "transformers", "plain"))
    cells = [show(turns, key) if turns else "" for turns in (ours, *others)]
    ratios = [f"{median(ours, key) / median(turns, key):.2f}" if turns else "" for turns in others]
    row(what, *cells, *ratios, f"{median(ours, limit):.0%}" if limit else "")


# --------------------------------------------------------------------------------- The models


def build(kind: str, c: GPTConfig, device: torch.device) -> nn.Module:
    """Of whichever kind, it is the same model with the same weights."""
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
    t, (B, T) = model.transformer, idx.shape
    x = t.wte(idx) + t.wpe(torch.arange(T, device=idx.device))  # (B, T, C)
    for block in t.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2)  # (B, T, C) each
        q, k, v = (z.view(B, T, model.config.n_head, -1).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, T, -1))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
    return model.lm_head(t.ln_f(x))


# ---------------------------------------------------------------------------------- Training


def give_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """A step that changes no weight: in the first an optimizer makes its state, which is memory."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        optimizer.zero_grad()


def make_step(
    kind: str, worker: Worker, data: Path, config: GPTConfig, cfg: TrainConfig, compiled: bool
) -> Callable[[], float]:
    """A step, from loading to zeroed gradients → its loss."""
    model = build(kind, config, worker.device)
    compiled |= kind == "ours" and worker.device.type == "cuda"  # as train_gpt2 does
    net = torch.compile(model) if compiled else model
    loader = iter(DataLoaderLite(data, "train", cfg.micro_batch_size, cfg.seq_len))
    optimizers = [torch.optim.AdamW(model.parameters(), fused=kind == "transformers")]
    if kind == "ours":
        optimizers = train_gpt2.configure_optimizers(model, cfg, worker.dtype)
    give_state(model, optimizers)

    def step() -> float:
        x, y = (t.to(worker.device) for t in next(loader))
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
    warm_up: bool = True, compiled: bool = False,
) -> Iterator[Turn]:  # fmt: skip
    """A turn is some steps, after one to find again what memory was reclaimed while it was idle."""
    step = make_step(kind, worker, data, config, cfg, compiled)
    tokens = steps * cfg.micro_batch_size * cfg.seq_len
    with torch.device("meta"):
        flops = GPT(config).flops_per_token(cfg.seq_len) * tokens
    first = seconds(step) if warm_up else 0.0
    while True:
        if warm_up:
            step()
        took, limit = seconds(lambda: [step() for _ in range(steps)]), worker.matmul_flops()
        turn = dict(first=first, rate=tokens / took, share=flops / took / limit)
        yield turn | dict(limit=limit / 1e9, gb=peak_gb(worker.device))


def bench_step(worker: Worker, data: Path) -> None:
    B, T = STEP
    args = (worker, data, CONFIG, TrainConfig(micro_batch_size=B, seq_len=T))
    names = ("ours", "transformers", "plain", "our transformers", "our plain")
    results = race({name: partial(training, name.split()[-1], *args) for name in names})
    row(f"limit, matrix product in {worker.dtype}: GFLOP/s", show(results["ours"], "limit"))
    compare(f"training step, B={B}, T={T}: tokens/s", results, limit="share")
    results |= {name: results[f"our {name}"] for name in ("transformers", "plain")}
    compare("… all with the allocator settings of ours", results, limit="share")


def bench_memory(worker: Worker, data: Path) -> None:
    B, T = BIG_STEP
    args = (worker, data, CONFIG, TrainConfig(micro_batch_size=B, seq_len=T))
    results: Results = {}
    for kind in ("ours", "plain"):  # one after the other: there may not be room for both
        results |= race({kind: partial(training, kind, *args, warm_up=False)}, rounds=1)
    compare(f"… B={B}, T={T}: peak memory, GB (less is better)", results, "gb")
    compare(f"… B={B}, T={T}: tokens/s", results, limit="share")


# -------------------------------------------------------------------------------- Generation


def plain_generate(model: GPT, idx: Tensor, n: int, stride: int = 1, k: int = 50) -> Tensor:
    """Sample n tokens, each by a pass over all those before it. With a stride one pass, of middling
    length, stands for so many: 1/stride of the time, and the tokens make no sense."""
    for _ in range(0, n, stride):
        fed = torch.cat((idx, idx[:, -1:].expand(-1, stride // 2)), dim=1)  # stride 1: idx
        logits, ids = plain_logits(model, fed)[:, -1].float().topk(k)  # (B, k) each
        token = ids.gather(1, torch.multinomial(logits.softmax(dim=1), 1))  # (B, 1)
        idx = torch.cat((idx, token.expand(-1, stride)), dim=1)
    return idx


@torch.no_grad()
def generate(kind: str, model: nn.Module, worker: Worker, B: int, n: int) -> None:
    idx = torch.randint(CONFIG.vocab_size, (B, 8), device=worker.device)
    settings = dict(attention_mask=torch.ones_like(idx), do_sample=True, top_k=50, pad_token_id=0)
    if kind == "transformers":  # its weights are of the precision in which it computes
        model.generate(idx, max_new_tokens=n, **settings)
        return
    with worker.autocast():
        plain_generate(model, idx, n, STRIDE) if kind == "plain" else model.generate(
            idx, n, top_k=50
        )


def generating(kind: str, worker: Worker) -> Iterator[Turn]:
    """A turn is one row and four, in each precision."""
    jobs = {}
    for dtype in dict.fromkeys((worker.dtype, torch.float32)):
        model = build(kind, CONFIG, worker.device).eval()
        model = model.to(dtype) if kind == "transformers" else model
        for B in (1, 4) if dtype == worker.dtype else (1,):
            jobs[B, dtype] = partial(generate, kind, model, replace(worker, dtype=dtype), B)
            jobs[B, dtype](2)
    weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    vector = torch.ones(2**27, device=worker.device)  # 512 MB: far more than any cache
    while True:
        limit = 4 * vector.numel() / min(seconds(lambda: vector.sum().item()) for _ in range(5))
        turn = dict(limit=limit / 1e9)
        for (B, dtype), job in jobs.items():
            took = seconds(partial(job, NEW_TOKENS)) * (STRIDE if kind == "plain" else 1)
            key, read = f"B={B}, {dtype}", NEW_TOKENS * weights * dtype.itemsize
            turn |= {key: B * NEW_TOKENS / took, f"share, {key}": read / took / limit}
        yield turn


def bench_generate(worker: Worker, data: Path) -> None:
    kinds = ("ours", "transformers", "plain")
    results = race({kind: partial(generating, kind, worker) for kind in kinds}, rounds=2)
    row("limit, reading memory: GB/s", show(results["ours"], "limit"))
    for key in [key for key in results["ours"][0] if key.startswith("B")]:
        compare(f"generation, {NEW_TOKENS} tokens, {key}: tokens/s", results, key, f"share, {key}")


# ------------------------------------------------------------------------ HellaSwag and shards


def make_examples(data: Path) -> list[dict[str, Any]]:
    """As long as HellaSwag's: two thirds are WikiHow's, the others ActivityNet's. Less sensible."""
    tokenizer, ids = fineweb.load_tokenizer(data), fineweb.open_shards(data, "train")[0][1]
    rng, examples = np.random.default_rng(0), []

    def text(tokens: int) -> str:
        start, length = rng.integers(len(ids) - 1000), round(tokens * rng.normal(1, 0.15))
        return tokenizer.decode(ids[start : start + length].tolist())

    for i in range(EXAMPLES):
        context, ending = (64, 40) if i % 3 else (25, 14)  # tokens
        endings = [text(ending) for _ in range(4)]
        examples.append(dict(ctx=text(context), endings=endings, label=i % 4))
    return examples


@torch.no_grad()
def plain_hellaswag(
    model: GPT, tokenizer: Encoding, examples: list[dict[str, Any]], worker: Worker
) -> dict[str, float]:
    """One example at a time, in four padded rows that all have the context."""
    encode, right = tokenizer.encode_ordinary, []
    for example in examples:
        context, endings = encode(example["ctx"]), [encode(f" {e}") for e in example["endings"]]
        rows = [torch.tensor(context + ending) for ending in endings]
        idx = pad_sequence(rows, batch_first=True).to(worker.device)  # (4, T)
        with worker.autocast():
            logits = plain_logits(model, idx)[:, :-1].flatten(0, 1)  # (4·(T - 1), V)
            nats = F.cross_entropy(logits, idx[:, 1:].flatten(), reduction="none").view(4, -1)
        n = len(context) - 1
        means = [nats[i, n : n + len(ending)].mean() for i, ending in enumerate(endings)]
        right.append(int(torch.stack(means).argmin()) == example["label"])
    return dict(hellaswag_acc_norm=statistics.mean(right))


def scoring(kind: str, worker: Worker, data: Path) -> Iterator[Turn]:
    model, tokenizer = build(kind, CONFIG, worker.device).eval(), fineweb.load_tokenizer(data)
    evaluate = hellaswag.evaluate if kind == "ours" else plain_hellaswag
    examples = make_examples(data)
    evaluate(model, tokenizer, examples[:2], worker)
    while True:
        took = seconds(lambda: evaluate(model, tokenizer, examples, worker))
        yield dict(rate=len(examples) / took)


def bench_hellaswag(worker: Worker, data: Path) -> None:
    kinds = ("ours", "plain")
    results = race({kind: partial(scoring, kind, worker, data) for kind in kinds}, rounds=2)
    compare("HellaSwag: examples/s", results)


def tokenize(tokenizer: Encoding, text: str) -> np.ndarray:
    return np.array([tokenizer.eot_token, *tokenizer.encode_ordinary(text)], dtype=np.uint16)


def plain_shards(paths: list[str], folder: str) -> None:
    """The usual way: half the cores tokenize, and this process puts together what they send."""
    shard, n = np.empty(fineweb.SHARD_TOKENS, dtype=np.uint16), 0
    texts = (json.loads(line)["text"] for line in open(paths[0], encoding="utf-8"))
    with multiprocessing.Pool(max(1, (os.cpu_count() or 1) // 2)) as pool:
        work = partial(tokenize, fineweb.load_tokenizer())
        for ids in pool.imap(work, texts, chunksize=16):
            shard[n : n + len(ids)] = ids
            n += len(ids)
    np.save(Path(folder, "text_train_000000.npy"), shard[:n])


def sharding(kind: str, path: Path) -> Iterator[Turn]:
    prepare = fineweb.prepare_files if kind == "ours" else plain_shards
    while True:
        with tempfile.TemporaryDirectory() as folder:
            took = seconds(partial(prepare, [str(path)], folder))
            tokens = sum(len(np.load(shard)) for shard in Path(folder).glob("*.npy"))
        yield dict(rate=tokens / took)


def bench_shards(worker: Worker, data: Path) -> None:
    tokenizer, ids = fineweb.load_tokenizer(data), fineweb.open_shards(data, "train")[0][1]
    documents = tokenizer.decode(ids.tolist()).split(fineweb.EOT)[1:]
    path = data / "documents.jsonl"
    lines = "".join(json.dumps(dict(text=text)) + "\n" for text in documents)
    path.write_text(lines * 8, "utf-8")  # 75 MB: what starting a pool takes is soon forgotten
    kinds = ("ours", "plain")
    results = race({kind: partial(sharding, kind, path) for kind in kinds}, rounds=2)
    compare("shards, GPT-2's tokenizer: tokens/s", results)


# ---------------------------------------------------------------------------- The quick recipe


def quick(data: Path) -> tuple[GPTConfig, TrainConfig]:
    """What the preset means."""
    vocab_size = train_gpt2.padded(fineweb.load_tokenizer(data).n_vocab)
    shape, cfg = PRESETS["quick"]
    return replace(shape, vocab_size=vocab_size), replace(cfg, seq_len=shape.block_size)


def run_quick(data: Path, processes: int = 1, **flags: Any) -> list[dict[str, Any]]:
    """`train_gpt2.py --preset quick` with these flags → its log."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as log_dir:
        flags |= dict(preset="quick", data_dir=data, log_dir=log_dir)
        options = [f"--{key}={value}" for key, value in flags.items()]
        program = [*torchrun * (processes > 1), str(HERE / "train_gpt2.py"), *options]
        subprocess.run([sys.executable, *program], check=True, stdout=sys.stderr)
        return train_gpt2.read_log(log_dir)


def profiling(worker: Worker, data: Path) -> Iterator[Turn]:
    """A turn is the share of each operation in a step's time on the CPU, the largest first."""
    step = make_step("ours", worker, data, *quick(data), compiled=False)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(5):
            step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(times.values())
    yield {key: times[key] / total for key in sorted(times, key=times.get, reverse=True)}


def bench_quick(worker: Worker, data: Path) -> None:
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # an earlier run's would hide the cost
    args = ("ours", worker, data, *quick(data), 10)
    contenders = {f"compile {on}": partial(training, *args, compiled=on) for on in (False, True)}
    eager, compiled = race(contenders).values()
    compare("quick recipe's step: tokens/s", dict(ours=eager), limit="share")
    what = f"… by torch.compile, after {compiled[0]['first']:.0f} s: tokens/s"
    compare(what, dict(ours=compiled), limit="share")
    (times,) = race({"profile": partial(profiling, worker, data)}, rounds=1)["profile"]
    where = [f"{key.removeprefix('aten::')} {share:.0%}" for key, share in times.items()]
    row(f"… where its time goes: {', '.join(where[:8])}")


def bench_growth(worker: Worker, data: Path) -> None:
    """Time and peak memory of a step, along each axis. Each point has its own process."""

    @functools.cache
    def point(B: int, T: int, L: int) -> str:
        cfg = TrainConfig(micro_batch_size=B, seq_len=T)
        contender = partial(training, "ours", worker, data, replace(CONFIG, n_layer=L), cfg)
        (turn,) = race({"ours": contender}, rounds=1)["ours"]
        return f"{B * T / turn['rate']:.2g} s {turn['gb']:.2g} GB"

    base = dict(B=1, T=256, L=12)
    for axis, values in dict(T=(128, 256, 1024), B=(1, 2), L=(6, 12)).items():
        fixed = ", ".join(f"{key}={base[key]}" for key in base if key != axis)
        points = [point(**base | {axis: value}) for value in values]
        row(f"step, {fixed}, {axis} = {', '.join(map(str, values))}", ", ".join(points))


def bench_costs(worker: Worker, data: Path) -> None:
    """What comes with training: more processes, loading, checkpoints, starting up."""
    B = quick(data)[1].micro_batch_size
    for n in (1, 2):
        flags = dict(max_steps=20, val_tokens=4096, device="cpu", micro_batch_size=B // n)
        turns = [record for record in run_quick(data, n, **flags) if "tok_per_s" in record]
        row(f"quick recipe, processes (gloo): {n}: tokens/s", show(turns[5:], "tok_per_s"))
    loader = iter(DataLoaderLite(data, "train", 64, 1024))
    turns = [dict(ms=1e3 * seconds(lambda: next(loader))) for _ in range(60)]
    row("loading 64×1024 tokens: ms", show(turns[40:], "ms"))  # by now they are in the page cache

    model = GPT(CONFIG)
    optimizers = train_gpt2.configure_optimizers(model, TrainConfig())
    give_state(model, optimizers)
    state = dict(config=asdict(CONFIG), model=model.state_dict())
    state |= dict(optimizers=[optimizer.state_dict() for optimizer in optimizers])
    saving = seconds(lambda: train_gpt2.save_checkpoint(data, 1, 1, **state))
    (path,) = train_gpt2.list_checkpoints(data)
    loading, gb = seconds(lambda: train_gpt2.load_checkpoint(path)), path.stat().st_size / 1e9
    row("checkpoint", f"{gb:.2f} GB; {saving:.1f} s to save, {loading:.1f} s to load and check")

    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, cwd=HERE)
    for program in ("train_gpt2.py --help", "-c 'import torch'"):
        command = [sys.executable, *shlex.split(program)]
        turns = [dict(s=seconds(partial(run, command))) for _ in range(2)]
        row(f"start-up, python {program}: s", show(turns, "s"))


def bench_long(worker: Worker, data: Path) -> None:
    """Steps and seconds to the loss at which AdamW ends, at the best of three rates."""
    often = dict(eval_every=25, val_tokens=2**16, checkpoint_every=10**6)

    def curve(optimizer: str, lr: float, seed: int) -> list[tuple[int, float, float]]:
        """Steps, seconds of training and validation loss, at each evaluation."""
        log = run_quick(data, optimizer=optimizer, max_lr=lr, seed=seed, **often)
        took = np.cumsum([0.0, *(record["ms"] / 1e3 for record in log if "ms" in record)])
        evaluations = [record for record in log if "val_loss" in record]
        return [(r["step"], took[r["step"]], r["val_loss"]) for r in evaluations]

    tuning = {lr: curve("adamw", lr, seed=1) for lr in (1e-3, 2e-3, 4e-3)}
    best, muon = min(tuning, key=lambda lr: tuning[lr][-1][2]), quick(data)[1].max_lr
    curves = {
        f"AdamW at {best}, of {', '.join(map(str, tuning))} the best rate":
            [tuning[best], curve("adamw", best, seed=2), curve("adamw", best, seed=3)],
        f"Muon at {muon}": [curve("muon", muon, seed) for seed in (1, 2, 3)],
    }  # fmt: skip
    target = max(points[-1][2] for points in next(iter(curves.values())))  # all of AdamW's reach it
    for name, three in curves.items():
        hits = [next((p for p in points if p[2] <= target), points[-1]) for points in three]
        spread = zip(np.mean(hits, axis=0), np.std(hits, axis=0, ddof=1), strict=True)
        steps, took, loss = (f"{mean:.4g} ± {deviation:.2g}" for mean, deviation in spread)
        row(f"to loss {target:.3f}, {name}", f"{steps} steps, {took} s, to {loss}")


# ------------------------------------------------------------------------------ Command line


def machine(worker: Worker) -> str:
    name = platform.processor() or platform.machine()
    if worker.device.type == "cuda":
        name = torch.cuda.get_device_name(worker.device)
    elif (info := Path("/proc/cpuinfo")).exists():  # Linux, where platform does not know the name
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(": ")[1] if names else name
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    system = f"{platform.system()}, Python {platform.python_version()}, {versions}"
    return f"{name}, {torch.get_num_threads()} threads, {worker.dtype}; {system}"


def main(argv: list[str] | None = None) -> None:
    sections = {key.removeprefix("bench_"): f for key, f in globals().items() if "bench_" in key}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sections", nargs="*", metavar="section", help=", ".join(sections))
    add("--long", action="store_true", help="all sections")
    args = parser.parse_args(argv)
    chosen = args.sections or [name for name in sections if args.long or name != "long"]
    if unknown := set(chosen) - set(sections):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(sections)}")
    worker = start_worker()
    print(machine(worker), end="\n\n")
    row("GPT-2 124M", "ours", "(a) transformers", "(b) plain", "× (a)", "× (b)", "of the limit")
    row("---", *["---:"] * 6)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "stdlib")
        with contextlib.redirect_stdout(sys.stderr):
            fineweb.prepare_stdlib(data)
        for name in chosen:
            sections[name](worker, data)


if __name__ == "__main__":
    main()
