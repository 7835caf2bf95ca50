"""HellaSwag: which of four endings does a text go on with? The one whose tokens are the likeliest.

    python hellaswag.py --model gpt2           OpenAI's GPT-2 124M; gpt2-xl and so on
    python hellaswag.py --model log/gpt2       a run of train_gpt2.py, its newest checkpoint
    python hellaswag.py --model my/folder --data my.jsonl      Hugging Face's format, other examples

An example (Zellers et al. 2019, arXiv:1905.07830) is a context and four endings: the true one, and
three that a machine wrote and another took for true. Guessing gives .25. GPT-2 answers no
questions, but gives each ending a loss, -ln p of its tokens behind the context, and the least is
its answer. Short endings have fewer tokens to lose on, hence two figures: acc compares sums over an
ending's tokens, acc_norm these sums divided by its length. And two ways of scoring, not to be
compared with one another, have published figures (PUBLISHED below).

hellaswag_ is the way of build-nanogpt and llm.c, by which reproductions of GPT-2 are compared: the
text as it is in the file, lengths in tokens. A training run logs it. harness_ is EleutherAI's
lm-evaluation-harness, as in most papers: the activity's name goes in front, the unfinished sentence
starts with a capital, and WikiHow's [header], [title] and [step], which no web page shows, go. Such
text is nearer to what GPT-2 has read: the figures are higher. Lengths are in characters, and so the
same for every tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from tiktoken import Encoding
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

if TYPE_CHECKING:  # at run time only on the command line: train_gpt2.py may be the running program
    from train_gpt2 import GPT, Worker

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"
SPLITS = {"train": 39905, "val": 10042, "test": 10003}  # examples
FIELDS = dict(activity_label=str, ctx_a=str, ctx_b=str, ctx=str, endings=list, label=int)
NAMES = "hellaswag", "harness"  # of the two ways of scoring
Example = dict[str, Any]
Row = tuple[Tensor, Tensor]  # see pack

# Figures of the validation split. Their standard errors are between .0045 and .0050.
PUBLISHED = """\
                                        hellaswag_acc  _acc_norm    harness_acc  _acc_norm
    GPT-2 124M                                  .2859      .2955          .2892      .3114
    GPT-2 XL                                    .3842      .4893          .4004      .5089
    GPT-3 Small, scored in its own way                      .337
    (GPT-2: github.com/karpathy/build-nanogpt, hellaswag.py; GPT-3: arXiv:2005.14165, table H.1)"""

# ---------------------------------------------------------------------------------------- Data


def download(split: str) -> Path:
    """The path of train, val or test in hellaswag/, downloaded if it is not there yet.

    Errors: OSError.
    """
    path = Path("hellaswag", f"hellaswag_{split}.jsonl")
    if path.exists():
        return path
    for attempt in range(3):
        time.sleep(2 * attempt)  # s
        try:
            with urllib.request.urlopen(f"{URL}/{path.name}", timeout=30) as response:
                data = response.read()
            n_lines = len(data.splitlines())
            if n_lines != SPLITS[split]:
                raise OSError(f"{n_lines:,} lines came, not {SPLITS[split]:,}")
            break
        except (OSError, HTTPException) as e:  # no network, a status such as 404, not all bytes
            problem = e
    else:
        raise OSError(f"cannot download {URL}/{path.name} ({problem}): put it at {path} by hand")
    path.parent.mkdir(exist_ok=True)
    # A process that is killed here must not leave half a file, so the name comes last.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def iterate_examples(source: str | Path = "val") -> Iterator[Example]:
    """The examples of a split, or of a file. Errors: OSError; ValueError, with line and field."""
    path = download(str(source)) if source in SPLITS else Path(source)
    if not (lines := path.read_bytes().splitlines()):
        raise ValueError(f"{path} is empty")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}, is not HellaSwag"
        try:  # where a context has no second part, the field may be missing
            example = {"ctx_a": "", "ctx_b": ""} | json.loads(line)
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{where}: no JSON object") from None
        for field, kind in FIELDS.items():
            if not isinstance(example.get(field), kind):
                hint = " (the test split has none: use val)" if field == "label" else ""
                raise ValueError(f"{where}: no {field!r}{hint}")
        endings = example["endings"]
        if len(endings) != 4 or not all(isinstance(text, str) and text.strip() for text in endings):
            raise ValueError(f"{where}: 'endings' are not four texts that are not empty")
        if example["label"] not in range(4):
            raise ValueError(f"{where}: 'label' is {example['label']}, not 0 to 3")
        yield example


def load_examples(worker: Worker, split: str = "val") -> list[Example]:
    """A split, on every worker. Where one cannot have it, it says why, and all get []."""
    examples: list[Example] = []
    # Rank 0 downloads first, then a worker of each machine, if they do not share the folder.
    for my_turn in (worker.rank == 0, os.environ.get("LOCAL_RANK") == "0", True):
        failed = False
        if my_turn and not examples:
            try:
                examples = list(iterate_examples(split))
            except (OSError, ValueError) as e:
                failed = True
                print(f"going on without HellaSwag: {e}", flush=True)
        if worker.gather(failed).any():
            return []
    if len(examples) != SPLITS[split]:
        worker.print(f"HellaSwag: {len(examples):,} of {split}'s {SPLITS[split]:,} examples")
    return examples


# --------------------------------------------------------------------------------------- Tokens


def clean(text: str) -> str:
    """Without WikiHow's markers, exactly as lm-evaluation-harness does it (tasks/hellaswag)."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


class Question(NamedTuple):
    """An example in tokens."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[int]  # of the endings, by which acc_norm divides


def render_example(example: Example, tokenizer: Encoding, harness: bool = False) -> Question:
    encode = tokenizer.encode_ordinary
    if not harness:
        endings = [encode(" " + text) for text in example["endings"]]
        context = encode(example["ctx"]) or [tokenizer.eot_token]  # something has to predict
        return Question(context, endings, [len(ending) for ending in endings])
    ctx = clean(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")
    texts = [clean(text) for text in example["endings"]]
    # A space is part of the token behind it, so those that end the context belong to the ending.
    context = encode(ctx.rstrip())
    endings = [encode(f"{ctx} {text}")[len(context) :] for text in texts]
    return Question(context, endings, [len(text) for text in texts])


# -------------------------------------------------------------------------------------- Scoring


def pack(context: list[int], endings: dict[int, list[int]]) -> Row:
    """A row of the context, read once, and numbered endings → what is read, what is asked.

    Read, (T, 3): token; position, for each ending from where the context ends; part (0 the context,
    1, 2, … the endings). Asked, (N, 3), for each token of the endings: the place in the row that
    predicts it; the token; its ending's number.
    """
    n, asked = len(context), []
    read = [(token, i, 0) for i, token in enumerate(context)]
    for part, (number, ending) in enumerate(endings.items(), 1):
        places = [n - 1, *range(len(read), len(read) + len(ending) - 1)]
        asked += [(place, token, number) for place, token in zip(places, ending, strict=True)]
        # An ending's last token predicts nothing more, so it is not read.
        read += [(token, i, part) for i, token in enumerate(ending[:-1], n)]
    return torch.tensor(read), torch.tensor(asked)


def make_batches(
    questions: Sequence[Question], block_size: int, batch_tokens: int
) -> list[list[Row]]:
    """Batches of rows: at most batch_tokens tokens, padding included, or one row, if that is more.

    The endings have the numbers 0 to 3, 4 to 7 and so on.
    """
    rows: list[Row] = []
    for i, (context, endings, _) in enumerate(questions):
        group = {4 * i + k: ending[:block_size] for k, ending in enumerate(endings)}
        fits = len(context) + sum(len(ending) - 1 for ending in group.values()) <= block_size
        # Endings that do not fit together get a row each. If one is too long still, its context
        # loses the first tokens.
        for some in [group] if fits else [{number: group[number]} for number in group]:
            room = block_size + 1 - max(map(len, some.values()))
            rows.append(pack(context[-room:], some))
    rows.sort(key=lambda row: len(row[0]))  # like beside like, as all are padded to the longest
    batches = []
    while rows:
        B = max(1, batch_tokens // len(rows[-1][0]))
        batches.append(rows[-B:])
        del rows[-B:]
    random.Random(0).shuffle(batches)  # so that what is done tells of what is left
    return batches


def token_losses(model: GPT, rows: Sequence[Row], n_vocab: int) -> tuple[Tensor, Tensor]:
    """The losses that packed rows ask for, nats, and the numbers of their endings: (N,) each."""
    device = model.lm_head.weight.device
    read = pad_sequence([read for read, _ in rows], batch_first=True).to(device)  # (B, T, 3)
    idx, pos, part = read.unbind(dim=2)  # (B, T) each
    T = idx.size(1)
    # A token sees the context and its own ending, up to itself. The padding is behind all others.
    mask = (part[:, None] == 0) | (part[:, None] == part[:, :, None])  # (B, T, T): [query, key]
    mask &= torch.ones(T, T, dtype=torch.bool, device=device).tril()
    x = model.hidden(idx, pos=pos, mask=mask[:, None]).flatten(0, 1)  # (B·T, C)
    asked = torch.cat([asked + torch.tensor([b * T, 0, 0]) for b, (_, asked) in enumerate(rows)])
    places, targets, numbers = asked.to(device).unbind(dim=1)  # (N,) each
    # The head is applied to these places alone, and to so many at once: 256 MiB of fp32 logits.
    chunk = max(1, 2**26 // n_vocab)
    losses = [
        F.cross_entropy(model.lm_head(x[at])[:, :n_vocab].float(), target, reduction="none")
        for at, target in zip(places.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(losses), numbers


@torch.no_grad()
def score(
    model: GPT, tokenizer: Encoding, examples: Sequence[Example], worker: Worker,
    batch_tokens: int | None = None, harness: bool = False, progress: bool = False,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Each ending's loss, nats (N, 4); whether the answer is right by acc and by acc_norm (N, 2);
    and how many examples were longer than block_size. batch_tokens bounds the memory."""
    # A CPU is fastest where activations stay in its caches, a GPU where all of it has work.
    batch_tokens = batch_tokens or (2**9 if worker.device.type == "cpu" else 2**14)
    questions = [render_example(example, tokenizer, harness) for example in examples]
    labels = torch.tensor([[example["label"]] for example in examples])  # (N, 1)
    lengths = torch.tensor([question.lengths for question in questions])  # (N, 4)
    nats, right = torch.zeros(len(examples), 4, dtype=torch.float64), torch.zeros(len(examples), 2)
    block_size = model.config.block_size
    bar = tqdm(desc=NAMES[harness], total=len(examples), disable=not progress)
    with worker.autocast(), model.inference(worker.dtype, batch_tokens), bar:
        for batch in make_batches(questions, block_size, batch_tokens):
            losses, numbers = token_losses(model, batch, tokenizer.n_vocab)
            nats.view(-1).index_add_(0, numbers.cpu(), losses.cpu().double())
            right = torch.stack((nats, nats / lengths), dim=1).argmin(dim=2) == labels  # (N, 2)
            done = nats.all(dim=1)
            bar.update(int(done.sum()) - bar.n)
            bar.set_postfix_str("acc {:.4f}, acc_norm {:.4f}".format(*right[done].double().mean(0)))
    n_long = sum(len(q.context) + max(map(len, q.endings)) - 1 > block_size for q in questions)
    return nats, right, n_long


def evaluate(
    model: GPT, tokenizer: Encoding, examples: Sequence[Example], worker: Worker,
    batch_tokens: int | None = None, harness: bool = False, progress: bool = False,
) -> dict[str, float]:  # fmt: skip
    """acc and acc_norm, each with its standard error, over the shares of all workers."""
    mine = examples[worker.rank :: worker.world_size]
    _, right, n_long = score(model, tokenizer, mine, worker, batch_tokens, harness, progress)
    n, n_long, *hits = worker.gather(len(mine), n_long, *right.sum(dim=0)).sum(dim=0).tolist()
    if n_long:
        limit = f"block_size={model.config.block_size}"
        worker.print(f"HellaSwag: {n_long:.0f} of {n:.0f} examples exceed {limit}: cut to fit")
    result = {}
    for key, p in zip(("acc", "acc_norm"), (hit / n for hit in hits), strict=True):
        key = f"{NAMES[harness]}_{key}"
        result |= {key: p, f"{key}_stderr": math.sqrt(p * (1 - p) / max(1, n - 1))}
    return result


# --------------------------------------------------------------------------------- Command line


def print_losses(
    model: GPT, tokenizer: Encoding, examples: Sequence[Example], worker: Worker
) -> None:
    """Contexts, and each ending's loss, whole and a token: < the least, * the true ending."""
    nats, _, _ = score(model, tokenizer, examples, worker)  # (N, 4)
    for example, losses in zip(examples, nats, strict=True):
        print(f"\n{example['ctx']}")
        lengths = torch.tensor(render_example(example, tokenizer).lengths)
        columns = losses.tolist(), (losses / lengths).tolist()
        for k, ending in enumerate(example["endings"]):
            row = "".join(f"{c[k]:8.2f}{'<' if c[k] == min(c) else ' '}" for c in columns)
            print(f"{row} {'*' if k == example['label'] else ' '} {ending}")


def run(argv: Sequence[str] | None) -> None:
    from train_gpt2 import load_model, start_worker

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=PUBLISHED, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(f"error: {message} (--help lists all flags)")
    add = parser.add_argument
    add("--model", default="gpt2", help="gpt2[-medium|-large|-xl], a folder or a checkpoint (gpt2)")
    add("--data", default="val", metavar="FILE.jsonl", help="examples (the validation split)")
    add("--limit", type=int, help="only so many of them, the first")
    add("--batch_tokens", type=int, help="at once; bounds the memory (512 on a CPU, else 16384)")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: it takes one example at least")
    examples = list(iterate_examples(args.data))[: args.limit]
    model, tokenizer = load_model(args.model)
    worker = start_worker(args.device, args.precision)
    model.to(worker.device)
    print(f"{len(examples):,} examples on {worker.device} in {worker.dtype}; losses in the first:")
    print_losses(model, tokenizer, examples[:3], worker)
    result: dict[str, float] = {}
    for harness in (False, True):
        result |= evaluate(model, tokenizer, examples, worker, args.batch_tokens, harness, True)
    header, *published = PUBLISHED.splitlines()
    values = [f"{value:.4f}".lstrip("0") for value in result.values()]  # figure, error, figure, …
    line = "    {:35}{:>14}{:>11}{:>15}{:>11}".format
    ours = line(f"this model, {len(examples):,} examples", *values[::2])
    print(f"\n{header}", ours, line("standard error", *values[1::2]), *published, sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that lacks a character
    try:
        run(argv)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
