"""HellaSwag: which of four endings continues a text? A test of what a language model has learned.

    python hellaswag.py --model gpt2           OpenAI's GPT-2 124M; gpt2-xl and so on
    python hellaswag.py --model log/gpt2       the best model of a run of train_gpt2.py
    python hellaswag.py --model my/folder --data my.jsonl      Hugging Face's format, other examples

An example (Zellers et al. 2019, arXiv:1905.07830) is a context and four endings, like this one:

    A woman fills a kettle with water and sets it on the stove. she
      0  paints the water with a small brush.
      1  waits until it boils.                        (the true ending)
      2  is shown throwing the kettle into a lake.
      3  sits on the stove and waves to the kettle.

The true ending is how the text really went on. A language model wrote the other three, and they
were kept because a classifier took them for true. People see that they are nonsense and answer more
than 95 % of the examples right. Guessing gives 25 %, because there are four endings; with only two
it would give 50 %, and less would be left to tell models apart.

GPT-2 was not trained to answer questions, but it can say how likely a text is. Each ending is put
behind the context and gets a loss, the sum of -ln p over the ending's tokens, where p is the
probability that the model gives to the token after all tokens before it. This is -ln of the
probability of the whole ending. The model's answer is the ending with the smallest loss.

Every token adds to the sum, so the sum favours short endings. Say that one ending has 4 tokens and
a loss of 12, and another has 8 tokens and a loss of 16. By the sum the first one wins. Divided by
the number of tokens the losses are 3 and 2, and the second one wins. Neither way is the right one
for every example, so there are two figures: acc is the share of right answers by the sum, acc_norm
by the sum divided by the length.

There are also two ways to prepare the text. Their figures must not be compared with one another.

hellaswag_  is the way of build-nanogpt and llm.c, by which reproductions of GPT-2 are compared.
            The text is taken as it is in the file. Lengths are in tokens. A training run logs it.
harness_    is the way of EleutherAI's lm-evaluation-harness, which most papers use. It puts the
            name of the activity in front ("Making tea: A woman fills …") and capitalises the
            unfinished sentence ("She"). It removes the markers [header], [title] and [step] from
            the examples that come from WikiHow. The result looks more like the web pages that
            GPT-2 was trained on, and the figures are higher. Lengths are in characters, because
            these do not depend on the tokenizer.

The program shows the model's figures beside published ones. It reads the examples, turns them into
tokens, packs the tokens into rows so that no context is read four times, and adds up the losses.
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

if TYPE_CHECKING:  # training imports this file, so only the command line imports train_gpt2.py
    from tqdm import tqdm

    from train_gpt2 import GPT, Worker

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"
SPLITS = {"train": 39905, "val": 10042, "test": 10003}  # number of examples
FIELDS = dict(activity_label=str, ctx_a=str, ctx_b=str, ctx=str, endings=list, label=int)
Example = dict[str, Any]

# Figures of the validation split. Their standard errors are between .0045 and .0050.
PUBLISHED = """\
                                        hellaswag_acc  _acc_norm    harness_acc  _acc_norm
    GPT-2 124M                                  .2859      .2955          .2892      .3114
    GPT-2 XL                                    .3842      .4893          .4004      .5089
    GPT-3 Small, scored in its own way                      .337
    (GPT-2: github.com/karpathy/build-nanogpt, hellaswag.py; GPT-3: arXiv:2005.14165, table H.1)"""

# ------------------------------------------------------------------------------------ Examples


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
    """The examples of a split, or of a file with the fields of FIELDS.

    Errors: OSError; ValueError, which names the line and what is wrong with it.
    """
    path = download(str(source)) if source in SPLITS else Path(source)
    lines = path.read_bytes().splitlines()
    if not lines:
        raise ValueError(f"{path} is empty")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}, is not HellaSwag"
        try:  # a context without a second part may leave this field out
            example = {"ctx_b": ""} | json.loads(line)
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
    """A split, on every worker. If one of them cannot have it, it says why, and all get []."""
    examples: list[Example] = []
    # The workers take turns, so that one downloads the file and the others find it on the disk.
    # Rank 0 is the first. Other machines may have their own disks, so one worker of each is next.
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


# -------------------------------------------------------------------------------------- Tokens


class Question(NamedTuple):
    """An example in tokens."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[int]  # of the endings; acc_norm divides by them


def clean(text: str) -> str:
    """The text without WikiHow's markers, exactly as lm-evaluation-harness removes them."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def render_example(example: Example, tokenizer: Encoding, harness: bool = False) -> Question:
    encode = tokenizer.encode_ordinary
    if harness:
        name, start, unfinished = example["activity_label"], example["ctx_a"], example["ctx_b"]
        text = clean(f"{name}: {start} {unfinished.capitalize()}")
        texts = [clean(ending) for ending in example["endings"]]
        # In GPT-2's tokens a space belongs to the word behind it. If the context ends with a space,
        # this space is therefore part of the ending's first token.
        context = encode(text.rstrip())
        endings = [encode(f"{text} {ending}")[len(context) :] for ending in texts]
        lengths = [len(ending) for ending in texts]  # characters
    else:
        context = encode(example["ctx"])
        endings = [encode(f" {ending}") for ending in example["endings"]]
        lengths = [len(ending) for ending in endings]  # tokens
    # Without a context the ending is the start of a document, and <|endoftext|> stands before it.
    return Question(context or [tokenizer.eot_token], endings, lengths)


# -------------------------------------------------------------------------------- Packed rows
# An ending's loss depends on the context, so the plain way is to read the context four times, once
# with each ending. Here it is read once, and the endings follow it in one row. In 300 examples of
# the validation split this is 26,517 tokens to read instead of 51,918. The losses stay the same,
# because to the model each ending looks as if it stood alone behind the context: its positions
# follow the context's, and a mask hides the other endings.


class Row(NamedTuple):
    """A context and one or more endings, packed (see pack for an example)."""

    # What the model reads:
    tokens: list[int]  # first the context, then each ending without its last token
    positions: list[int]  # of each token in its own text; they select rows of wpe
    parts: list[int]  # 0 for tokens of the context, 1, 2, … for those of the endings
    # What it has to predict, each token of each ending:
    targets: list[int]  # the token
    places: list[int]  # the index in `tokens` at which the model predicts it
    numbers: list[int]  # the number of its ending, to which its loss is added


def pack(context: list[int], endings: dict[int, list[int]]) -> Row:
    """Pack a context and endings, which have numbers, into a row.

    For the context [10, 11, 12] and the endings {0: [20, 21, 22], 1: [30, 31]} the model reads six
    tokens. It does not read 22 and 31, because no token follows them that it should predict.

        index       0   1   2   3   4   5
        tokens     10  11  12  20  21  30
        positions   0   1   2   3   4   3
        parts       0   0   0   1   1   2

    It predicts five. The end of the context, at index 2, predicts the first token of each ending.

        targets    20  21  22  30  31
        places      2   3   4   2   5
        numbers     0   0   0   1   1
    """
    n = len(context)
    row = Row(list(context), list(range(n)), [0] * n, [], [], [])
    for part, (number, ending) in enumerate(endings.items(), 1):
        read = ending[:-1]
        start = len(row.tokens)
        row.places.extend([n - 1, *range(start, start + len(read))])
        row.targets.extend(ending)
        row.numbers.extend([number] * len(ending))
        row.tokens.extend(read)
        row.positions.extend(range(n, n + len(read)))
        row.parts.extend([part] * len(read))
    return row


def make_mask(parts: Tensor) -> Tensor:
    """The parts of rows (B, T) → where a token (query) may look (key), bool (B, 1, T, T).

    Each token sees the context and its own ending, up to itself. For the row in pack's example:

        query \\ key   10  11  12  20  21  30
                 10    1   0   0   0   0   0
                 11    1   1   0   0   0   0
                 12    1   1   1   0   0   0
                 20    1   1   1   1   0   0
                 21    1   1   1   1   1   0
                 30    1   1   1   0   0   1
    """
    T = parts.size(1)
    is_context = parts[:, None, :] == 0  # (B, 1, T)
    same_part = parts[:, None, :] == parts[:, :, None]  # (B, T, T)
    not_later = torch.ones(T, T, dtype=torch.bool, device=parts.device).tril()  # (T, T)
    mask = (is_context | same_part) & not_later  # (B, T, T)
    return mask[:, None]


def make_rows(questions: Sequence[Question], block_size: int) -> list[Row]:
    """Rows of at most block_size tokens. Ending k of question i gets the number 4i + k."""
    rows = []
    for i, question in enumerate(questions):
        endings = {4 * i + k: ending[:block_size] for k, ending in enumerate(question.endings)}
        row = pack(question.context, endings)
        if len(row.tokens) <= block_size:
            rows.append(row)
            continue
        # The endings do not fit into one row, so each gets a row of its own. If that is too long
        # as well, the context loses its first tokens.
        for number, ending in endings.items():
            room = block_size + 1 - len(ending)
            rows.append(pack(question.context[-room:], {number: ending}))
    return rows


def make_batches(rows: Sequence[Row], batch_tokens: int) -> list[list[Row]]:
    """Batches of at most batch_tokens tokens, padding included. A longer row is a batch alone."""
    # A batch is padded to the length of its longest row, so its rows should have similar lengths.
    rows = sorted(rows, key=lambda row: len(row.tokens))
    batches = []
    while rows:
        n_rows = max(1, batch_tokens // len(rows[-1].tokens))
        batches.append(rows[-n_rows:])
        del rows[-n_rows:]
    # In a random order the first batches already tell the time and the figures to expect.
    random.Random(0).shuffle(batches)
    return batches


# ------------------------------------------------------------------------------------- Scoring


def pad(lists: Sequence[list[int]], device: torch.device) -> Tensor:
    """Lists of different lengths → (B, T), with zeros behind the shorter ones."""
    return pad_sequence([torch.tensor(numbers) for numbers in lists], batch_first=True).to(device)


def token_losses(model: GPT, rows: Sequence[Row], n_vocab: int) -> Tensor:
    """The loss of each of the N targets of some rows, in nats: (N,), row after row."""
    device = model.lm_head.weight.device
    idx = pad([row.tokens for row in rows], device)  # (B, T)
    pos = pad([row.positions for row in rows], device)  # (B, T)
    mask = make_mask(pad([row.parts for row in rows], device))  # (B, 1, T, T)
    # This is `GPT.hidden` with our own positions and mask. Padding stands behind the tokens of its
    # row, so none of them sees it.
    parts = model.transformer
    x = parts.wte(idx) + parts.wpe(pos)  # (B, T, C)
    for block in parts.h:
        x = block(x, mask=mask)  # (B, T, C)
    # Only the vectors that predict a target go through the head, which is expensive.
    b = torch.tensor([b for b, row in enumerate(rows) for _ in row.places], device=device)  # (N,)
    t = torch.tensor([place for row in rows for place in row.places], device=device)  # (N,)
    x = parts.ln_f(x[b, t])  # (N, C)
    targets = torch.tensor([token for row in rows for token in row.targets], device=device)  # (N,)
    chunk_size = 2**26 // n_vocab  # so many rows of fp32 logits take 256 MiB
    losses = [
        F.cross_entropy(model.lm_head(chunk)[:, :n_vocab].float(), target, reduction="none")
        for chunk, target in zip(x.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    return torch.cat(losses)  # (N,)


def pick_answers(nats: Tensor, lengths: Tensor) -> Tensor:
    """The losses and lengths of endings, (N, 4) → acc's and acc_norm's answers, (N, 2)."""
    return torch.stack((nats, nats / lengths), dim=1).argmin(dim=2)


@torch.no_grad()
def score(
    model: GPT, tokenizer: Encoding, examples: Sequence[Example], worker: Worker,
    batch_tokens: int | None = None, harness: bool = False, bar: tqdm | None = None,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Let the model answer the examples.

    Returns each ending's loss in nats, float64 (N, 4); whether the answer is right by acc and by
    acc_norm, bool (N, 2); and how many examples were longer than block_size and had to be cut.
    batch_tokens bounds the memory. bar shows the progress.
    """
    if batch_tokens is None:
        # A CPU is fastest while activations fit into its caches. A GPU needs more work at once.
        batch_tokens = 512 if worker.device.type == "cpu" else 16384
    block_size = model.config.block_size
    questions = [render_example(example, tokenizer, harness) for example in examples]
    lengths = torch.tensor([question.lengths for question in questions]).view(-1, 4)  # (N, 4)
    labels = torch.tensor([example["label"] for example in examples]).view(-1, 1)  # (N, 1)
    nats = torch.zeros(len(examples), 4, dtype=torch.float64)
    batches = make_batches(make_rows(questions, block_size), batch_tokens)
    with worker.inference(model, batch_tokens):
        for batch in batches:
            losses = token_losses(model, batch, tokenizer.n_vocab).cpu().double()
            numbers = torch.tensor([number for row in batch for number in row.numbers])
            nats.view(-1).index_add_(0, numbers, losses)  # each target's loss, to its ending's sum
            if bar is not None:
                done = nats.all(dim=1)
                right = (pick_answers(nats, lengths) == labels)[done]
                acc, acc_norm = right.double().mean(dim=0).tolist()
                bar.set_postfix_str(f"acc {acc:.4f}, acc_norm {acc_norm:.4f}")
                bar.update(int(done.sum()) - bar.n)
    right = pick_answers(nats, lengths) == labels
    n_long = sum(len(q.context) + max(map(len, q.endings)) - 1 > block_size for q in questions)
    return nats, right, n_long


def evaluate(
    model: GPT, tokenizer: Encoding, examples: Sequence[Example], worker: Worker,
    batch_tokens: int | None = None, harness: bool = False, bar: tqdm | None = None,
) -> dict[str, float]:  # fmt: skip
    """acc and acc_norm, each with its standard error. The workers share the examples."""
    mine = examples[worker.rank :: worker.world_size]
    _, right, n_long = score(model, tokenizer, mine, worker, batch_tokens, harness, bar)
    sums = worker.gather(len(mine), n_long, *right.sum(dim=0).tolist()).sum(dim=0)
    n, n_long, *hits = sums.tolist()
    if n_long:
        limit = f"block_size={model.config.block_size}"
        worker.print(f"HellaSwag: {n_long:.0f} of {n:.0f} examples exceed {limit}: cut to fit")
    result = {}
    for figure, hit in zip(("acc", "acc_norm"), hits, strict=True):
        key = f"{'harness' if harness else 'hellaswag'}_{figure}"
        p = hit / n
        result[key] = p
        result[f"{key}_stderr"] = math.sqrt(p * (1 - p) / max(1, n - 1))
    return result


# -------------------------------------------------------------------------------- Command line


def print_losses(
    model: GPT, tokenizer: Encoding, examples: Sequence[Example], worker: Worker
) -> None:
    """Show contexts, and the loss of each ending, whole and per token."""
    nats, _, _ = score(model, tokenizer, examples, worker)  # (N, 4)
    print("loss of each ending, and loss per token: < is the model's answer, * the true ending")
    for example, losses in zip(examples, nats, strict=True):
        lengths = torch.tensor(render_example(example, tokenizer).lengths)
        columns = losses.tolist(), (losses / lengths).tolist()
        print(f"\n{example['ctx']}")
        for k, ending in enumerate(example["endings"]):
            figures = "".join(f"{c[k]:8.2f}{'<' if c[k] == min(c) else ' '}" for c in columns)
            print(f"{figures} {'*' if k == example['label'] else ' '} {ending}")


def run(argv: Sequence[str] | None) -> None:
    from tqdm import tqdm

    from train_gpt2 import load_model, start_worker

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=PUBLISHED, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(f"error: {message} (--help lists all flags)")
    flag = parser.add_argument
    flag(
        "--model", default="gpt2", help="The model to score: gpt2, gpt2-medium, gpt2-large,"
        " gpt2-xl, a folder or a checkpoint. The default is gpt2.",
    )  # fmt: skip
    flag(
        "--data", default="val", metavar="FILE.jsonl", help="The file with the examples. The"
        " default is the validation split, which is downloaded once.",
    )  # fmt: skip
    flag("--limit", type=int, help="Only the first LIMIT examples are scored.")
    flag(
        "--batch_tokens", type=int, help="The model reads so many tokens at once. Fewer need less"
        " memory. The default is 512 on a CPU and 16384 elsewhere.",
    )  # fmt: skip
    flag(
        "--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
        help="The device that computes. The default is a GPU, if there is one.",
    )  # fmt: skip
    flag(
        "--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
        help="The format of matrix products. The default is one that the device is fast at.",
    )  # fmt: skip
    args = parser.parse_args(argv)
    for name in ("limit", "batch_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: it has to be 1 or more")
    examples = list(iterate_examples(args.data))[: args.limit]
    model, tokenizer = load_model(args.model)
    worker = start_worker(args.device, args.precision)
    model.to(worker.device)
    print(f"{len(examples):,} examples on {worker.device} in {worker.dtype}; losses in the first:")
    print_losses(model, tokenizer, examples[:3], worker)
    result: dict[str, float] = {}
    for harness in (False, True):
        with tqdm(desc="harness" if harness else "hellaswag", total=len(examples)) as bar:
            result |= evaluate(model, tokenizer, examples, worker, args.batch_tokens, harness, bar)
    values = [f"{value:.4f}".lstrip("0") for value in result.values()]  # figure, error, figure, …
    line = "    {:35}{:>14}{:>11}{:>15}{:>11}".format
    header, *published = PUBLISHED.splitlines()
    ours = line(f"this model, {len(examples):,} examples", *values[::2])
    print(f"\n{header}", ours, line("standard error", *values[1::2]), *published, sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that lacks a character
    try:
        run(argv)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
