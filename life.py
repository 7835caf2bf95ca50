"""The life of a token: a page for your browser, in which one token goes through a model of yours.

    python life.py log/quick                          writes log/quick/life.html
    python life.py gpt2 --text "The cat sat on the"   writes life.html

The page is one file that needs no server, no network and no library. It holds the weights, rounded
to 16 bits, and the tokenizer. Type a sentence, pick one of its tokens, and follow it from its bytes
to the next token. Every number on the page is the model's own, because the page computes GPT-2's
forward pass itself, in plain JavaScript (`assets/life.html`).

How can one trust these numbers? The page carries the logits that PyTorch computed for a reference
sentence from the same rounded weights. When it opens, it computes them again and shows the largest
difference. The logits of one sentence do not depend on every row of wte, so a checksum also covers
all that was put into the page.

A model of more than 20M weights would make the page large and slow. Its page therefore has the
outputs of all matrices for the reference sentence in the place of the weights.
"""

from __future__ import annotations

import argparse
import base64
import copy
import functools
import json
import os
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn

import train_gpt2

if TYPE_CHECKING:
    pass

TEXT = "If the file does not exist, the"  # the reference sentence: English, and good for Python too
PAGE_WEIGHTS = 20_000_000  # the largest model that a page computes itself
PAGE_TOKENS = 128  # the longest text that a page computes
REFERENCE_TOKENS = 64  # the longest reference sentence of a page that computes
TRACE_TOKENS = 16  # ... and of a page that has the trace alone: it grows by 0.3 MB a token for 124M
REFERENCE_LOGITS = 2**18  # as many logits as a page carries, in whole tokens (1 MB)
LENS = 5  # how many of the likeliest tokens a trace has for each block
TEMPLATE = Path(__file__).parent / "assets" / "life.html"
MARKER = "<!-- life.py puts the data of one model here -->"


# -------------------------------------------------------------------------------- The tokenizer


@functools.cache
def character_ranges(pattern: str) -> list[int]:
    """The characters that tiktoken takes for `pattern`: first, last, first, last, … code point.

    Each browser knows the Unicode version of its day, and calls other characters letters than
    tiktoken does. JavaScript's \\s differs as well: it has U+FEFF and lacks U+0085. So we ask
    tiktoken about every character there is (0.1 s), and the page's pattern spells the answer out.
    """
    # With single bytes as its only tokens, encode and decode give back exactly what was matched.
    single_bytes = {bytes([b]): b for b in range(256)}
    matcher = tiktoken.Encoding(
        "matcher", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={}
    )
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    matched = matcher.decode(matcher.encode_ordinary(everything))
    points = np.array([ord(character) for character in matched])
    first = points[np.diff(points, prepend=-2) != 1]
    last = points[np.diff(points, append=-2) != 1]
    return np.stack((first, last), axis=1).ravel().tolist()


def tokenizer_data(tokenizer: tiktoken.Encoding) -> dict:
    """What the page needs to give the same ids as this tokenizer, whose pattern is GPT-2's."""
    tokens: list[str | None] = [None] * tokenizer.n_vocab
    for token in tokenizer.token_byte_values():
        tokens[tokenizer.encode_single_token(token)] = token.decode("latin-1")  # a character a byte
    special = {tokenizer.encode_single_token(s): s for s in tokenizer.special_tokens_set}
    return {
        "tokens": tokens, "special": special,
        "letters": character_ranges(r"\p{L}"), "numbers": character_ranges(r"\p{N}"),
        "spaces": character_ranges(r"\s"),
    }  # fmt: skip


# ------------------------------------------------------------------- What the page computes with


@torch.no_grad()
def weights_and_logits(model: train_gpt2.GPT, ids: list[int]) -> dict[str, np.ndarray]:
    """All weights in fp16, and the logits (n, V) of the last n tokens from these same weights.

    PyTorch computes them in fp64, so what the page shows as a difference is its own rounding.
    Errors: ValueError where a weight is no number, or too large for fp16.
    """
    rounded = copy.deepcopy(model).cpu().eval()
    arrays = {}
    for name, p in rounded.named_parameters():  # the tied head is there once, as wte
        half = p.half()
        if not half.isfinite().all():
            raise ValueError(f"{name} has values that fp16 cannot hold: no page of this model")
        arrays[name] = half.numpy()
        p.data = half.double()
    n = max(1, REFERENCE_LOGITS // model.config.vocab_size)
    logits = rounded(torch.tensor([ids]))[0, -n:]  # (n, V)
    return {"reference.logits": logits.float().numpy()} | arrays


@torch.no_grad()
def trace(model: train_gpt2.GPT, ids: list[int], n_vocab: int) -> dict[str, np.ndarray]:
    """What every matrix of the model gives for these T ids, (T, out) each, under the matrix's name.

    The page computes the rest from it: LayerNorms, scores, softmax, GELU and additions need only
    these and the vectors among the weights. Also the logits, (T, V), and for the stream before each
    block the likeliest tokens, (L, T, LENS), if ln_f and the head followed at once.
    """
    outputs: dict[str, Tensor] = {}

    def hook(name: str):
        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            outputs[name] = output.detach().reshape(len(ids), -1).float()

        return keep

    matrices = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    hooks = [module.register_forward_hook(hook(name)) for name, module in matrices]
    was_training = model.training
    model.eval()
    try:
        model(torch.tensor([ids], device=model.lm_head.weight.device))
    finally:
        model.train(was_training)
        for handle in hooks:
            handle.remove()
    logits = outputs.pop("lm_head")
    stream = outputs["transformer.wte"] + outputs["transformer.wpe"]  # (T, C)
    lens = []
    for i in range(model.config.n_layer):
        guesses = model.lm_head(model.transformer.ln_f(stream))[:, :n_vocab]  # (T, n_vocab)
        lens.append(guesses.softmax(dim=1).topk(LENS))
        block = f"transformer.h.{i}"
        stream = stream + outputs[f"{block}.attn.c_proj"] + outputs[f"{block}.mlp.c_proj"]
    vectors = {name: p for name, p in model.named_parameters() if p.dim() == 1 and ".ln_" in name}
    kept = {name: t.half() for name, t in (outputs | vectors).items()}
    if overflow := [name for name, t in kept.items() if not t.isfinite().all()]:
        raise ValueError(f"{overflow[0]} has values that fp16 cannot hold: no page of this model")
    kept["reference.logits"] = logits
    kept["lens.p"] = torch.stack([p for p, _ in lens]).half()
    kept["lens.ids"] = torch.stack([ids for _, ids in lens]).int()
    return {name: t.detach().cpu().numpy() for name, t in kept.items()}


# -------------------------------------------------------------------------------------- The page


def write_page(
    model: train_gpt2.GPT,
    tokenizer: tiktoken.Encoding,
    path: str | Path,
    text: str = TEXT,
    name: str = "GPT-2",
) -> None:
    """Write the page of a model to path. text: the reference sentence (its first 64 tokens; 16
    where the page has the trace alone). name: what the page calls the model.

    The model stays as it is. Errors: ValueError where no page of it is possible, OSError.
    """
    config = model.config
    computes = sum(p.numel() for p in model.parameters()) <= PAGE_WEIGHTS
    longest = min(config.block_size, REFERENCE_TOKENS if computes else TRACE_TOKENS)
    ids = tokenizer.encode_ordinary(text)[:longest]
    if not ids:
        raise ValueError("the reference sentence is empty: it needs at least one token")
    if computes:
        arrays = weights_and_logits(model, ids)
    else:
        arrays = trace(model, ids, tokenizer.n_vocab)
    # In whole fours of bytes first: a browser reads such an array only from a multiple of four.
    order = sorted(arrays, key=lambda key: -arrays[key].itemsize)
    data = {
        "name": name,
        "computes": computes,
        "config": {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd")}
        | {"block_size": config.block_size, "vocab_size": config.vocab_size},
        "max_tokens": min(config.block_size, PAGE_TOKENS),
        "parameters": [[key, list(p.shape)] for key, p in model.named_parameters()],
        "reference": ids,
        "tokenizer": tokenizer_data(tokenizer),
        "arrays": [[key, arrays[key].dtype.str[1:], list(arrays[key].shape)] for key in order],
    }
    # JSON has `<` in strings alone, where \u003c means the same: nothing can end the script early.
    text_data = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    numbers = b"".join(arrays[key].astype(arrays[key].dtype.newbyteorder("<")) for key in order)
    text_numbers = base64.b64encode(numbers).decode()
    checksum = zlib.crc32((text_data + text_numbers).encode())
    scripts = (
        f'<script id="data" type="application/json" data-crc32="{checksum}">{text_data}</script>\n'
        f'<script id="numbers" type="text/plain">{text_numbers}</script>'
    )
    before, after = TEMPLATE.read_text("utf-8").split(MARKER)
    temporary = Path(f"{path}.tmp")  # a page has its name only once it is whole
    try:
        temporary.write_text(before + scripts + after, "utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # as a rule it has been renamed
            temporary.unlink()


# ---------------------------------------------------------------------------- GPT-2 as a drawing

STYLE = """
svg { --paper: #faf8f4; --card: #fff; --ink: #1c1e22; --soft: #5c6270; --line: #b3ada1;
  --token: #7b3fa0; font: 13px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --paper: #131519; --card: #1b1e24; --ink: #e9e7e2;
  --soft: #a3a9b5; --line: #5a616d; --token: #cf9ff0; } }
rect, circle { fill: var(--card); stroke: var(--line); } .paper { fill: var(--paper); }
path { fill: none; stroke: var(--line); stroke-width: 1.5; } .tip { fill: var(--line); }
.zoom { fill: none; stroke: var(--token); stroke-dasharray: 4 4; }
.stream { stroke: var(--token); stroke-width: 5; } .add { stroke: var(--token); stroke-width: 2; }
text { fill: var(--ink); } .soft { fill: var(--soft); } .token { fill: var(--token); }
.big { font-size: 18px; } .name { font-weight: 600; }
.number { font: 11.5px ui-monospace, monospace; }
"""


def drawing(config: train_gpt2.GPTConfig) -> str:
    """GPT-2 of this shape as an SVG. Above is the whole model, from a text to the next token, and
    below one of its blocks. Each box has the shape of its output and its number of weights.

    The colours follow the settings of the browser that shows it, light or dark.
    """
    with torch.device("meta"):  # the shapes alone, without memory
        model = train_gpt2.GPT(config)
    count = {name.removeprefix("transformer."): sum(p.numel() for p in module.parameters())
             for name, module in model.named_modules()}  # fmt: skip
    L, nh, C, V = config.n_layer, config.n_head, config.n_embd, config.vocab_size
    x_shape = f"(T, {C})"
    parts: list[str] = []

    def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        parts.append(
            f'<text x="{x:g}" y="{y}" class="{style}" text-anchor="{anchor}">{words}</text>'
        )

    def line(path: str, style: str = "") -> None:
        parts.append(f'<path d="{path}" class="{style}"/>')

    def station(x: int, y: int, width: int, name: str, shape: str, weights: str) -> None:
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="70" rx="8"/>')
        text(x + width / 2, y + 23, name, "name", "middle")
        text(x + width / 2, y + 42, shape, "number", "middle")
        text(x + width / 2, y + 60, weights, "number soft", "middle")

    parts.append('<rect width="980" height="456" rx="12" class="paper"/>')
    text(24, 38, f"GPT-2 with {model.num_params():,} parameters", "big name")
    text(956, 38, f"T: the tokens of the text, at most {config.block_size:,}", "soft", "end")

    # The whole model, whose stream runs at y = 97.
    line("M100 97H150M660 97H840")
    line("M300 97H584", "stream")
    station(24, 62, 100, "text → ids", "(T,)", "BPE")
    station(138, 62, 170, "wte[id] + wpe[pos]", x_shape, f"{count['wte']:,} + {count['wpe']:,}")
    blocks = [f"h.{i}" for i in range(L)] if L < 4 else ["h.0", "h.1", "…", f"h.{L - 1}"]
    step = 258 // len(blocks)
    for i, name in enumerate(blocks):
        station(322 + i * step, 62, step - 12, "", name, "")
    station(584, 62, 92, "ln_f", x_shape, f"{count['ln_f']:,}")
    station(690, 62, 124, "lm_head", f"(T, {V})", "is wte again")
    station(828, 62, 128, "softmax", f"last: ({V},)", "→ the next token")

    # Its first block, whose stream runs at y = 234.
    line(f"M322 132L24 184M{310 + step} 132L956 184", "zoom")
    parts.append('<rect x="24" y="184" width="932" height="248" rx="10" class="zoom"/>')
    text(44, 214, f"Residual stream {x_shape}. Attention and MLP read it, and add to it.", "token")
    text(936, 214, f"block h.0, one of {L}: {count['h.0']:,} parameters", "name", "end")
    line("M86 234V320H517V234M626 234V320H874V234")
    line("M24 234H956", "stream")
    for x in (86, 626):
        line(f"M{x - 6} 272L{x} 285L{x + 6} 272Z", "tip")
    for x in (517, 874):
        line(f"M{x - 6} 259L{x} 246L{x + 6} 259Z", "tip")
        parts.append(f'<circle cx="{x}" cy="234" r="12" class="add"/>')
        text(x, 239, "+", "token name", "middle")
    y, attn, mlp = 285, "h.0.attn", "h.0.mlp"
    station(44, y, 84, "ln_1", x_shape, f"{count['h.0.ln_1']:,}")
    station(142, y, 130, "c_attn: q, k, v", f"3 × {x_shape}", f"{count[f'{attn}.c_attn']:,}")
    station(286, y, 156, f"attention, {nh} heads", x_shape, "no parameters")
    station(456, y, 122, "c_proj", x_shape, f"{count[f'{attn}.c_proj']:,}")
    station(592, y, 84, "ln_2", x_shape, f"{count['h.0.ln_2']:,}")
    station(690, y, 124, "c_fc, GELU", f"(T, {4 * C})", f"{count[f'{mlp}.c_fc']:,}")
    station(828, y, 108, "c_proj", x_shape, f"{count[f'{mlp}.c_proj']:,}")
    text(44, 384, "Attention: each token gathers from itself and the tokens before it.")
    text(44, 408, f"softmax(q·kᵀ / √{C // nh} + mask)·v in each head", "number")
    text(592, 384, "MLP: changes each token, without the others.")
    text(936, 408, "A box has the shape of its output and its number of weights.", "soft", "end")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 456">'
    return "\n".join([svg, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def plot_log(records: list[dict[str, Any]], file: BinaryIO) -> None:
    """Draw a run's losses over its steps, and HellaSwag beside them if it was evaluated, as PNG."""
    from matplotlib.figure import Figure

    panels = {"training and validation loss, nats per token": ("loss", "val_loss")}
    if any("hellaswag_acc" in record for record in records):
        panels["HellaSwag, share of right answers"] = ("hellaswag_acc", "hellaswag_acc_norm")
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    for i, (title, keys) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(1, len(panels), i, title=title, xlabel="step")
        for key in keys:
            points = [(r["step"], r[key]) for r in records if {"step", key} <= r.keys()]
            steps, values = np.reshape(points, (-1, 2)).T
            ax.plot(steps, values, "-" if key == "loss" else "o-", label=key, ms=4, lw=1)
        ax.legend()
    figure.savefig(file, format="png", dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = "The folder of a run, a checkpoint, or the name of a model on Hugging Face's hub."
    parser.add_argument("model", help=known)
    parser.add_argument("--text", default=TEXT, help="The sentence that the page opens with.")
    args = parser.parse_args(argv)
    folder = Path(args.model) if Path(args.model).is_dir() else Path(args.model).parent
    path = (folder if folder.is_dir() else Path()) / "life.html"
    try:
        model, tokenizer = train_gpt2.load_model(args.model)
        write_page(model, tokenizer, path, args.text, name=args.model)
    except (OSError, ValueError) as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        return 1
    print(f"{path}: open it in a browser ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
