"""What play.ipynb is made of: its pictures, a tracer, and the variants of its ablations.

The notebook says what is true of a model. The functions here draw it, break it and train it, so
that its cells stay short. Look is the model in the notebook's hands. Its method `trace` gives all
that a model computes on its way from a text to the next token.
"""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn

import life
import train_gpt2

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# ---------------------------------------------------------------------- The notebook's pictures
#
# play.ipynb says what is true of a model, and draws it with these functions. In all pictures one
# colour stands for one thing. Numbers on both sides of 0 go from blue (negative) over white to red
# (positive). Shares between 0 and 1 go from white to black. `␣` is a space, and `⏎` a line's end.

COLORS = dict(wte="#0072b2", wpe="#e69f00", attention="#d55e00", mlp="#009e73", head="#aa4499",
              stream="#444444", loss="#56b4e9", rate="#882255")  # fmt: skip
LINES = ("o-", "s--", "^:", "x-.", "d-")  # so that curves differ without their colours


def visible(text: str) -> str:
    """The text with its white space made visible."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference between two tensors of one shape, element by element."""
    if a.shape != b.shape:
        raise ValueError(f"the shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    return (a - b).abs().max().item()


def say(text: str) -> None:
    """Show a text in Markdown below a cell."""
    from IPython.display import Markdown, display

    display(Markdown(text))


def table(header: str, rows: list[tuple]) -> None:
    """Show rows as a table. header: the names of the columns, separated by ` | `."""
    lines = [header, " | ".join("---" for _ in header.split(" | "))]
    lines += [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in rows]
    say("\n".join(f"| {line} |" for line in lines))


def picture(figure: Figure, caption: str) -> None:
    """Show a figure at double density. The caption, which says what is seen, is its alternative
    text as well."""
    from IPython.display import Image, display

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144)
    width = round(72 * figure.get_figwidth())
    display(Image(file.getvalue(), format="png", width=width, alt=caption))
    say(f"*{caption}*")


def panels(rows: int = 1, columns: int = 1, width: float = 9.0, height: float = 2.8, **how: Any):
    """A figure and its panels, one after another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **how)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, list(axes.flat)


def mark(ax: Axes, title: str, x: str = "", y: str = "", **how: Any) -> None:
    """Give a panel its title and the names of its axes."""
    ax.set(xlabel=x, ylabel=y, **how)
    ax.set_title(title, fontsize=10)


def names(ax: Axes, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> None:
    """Write names on the axes of a panel: tokens, for instance."""
    font = dict(fontsize=8, fontfamily="monospace")
    if len(columns):
        steep = 90 if max(map(len, columns)) > 3 else 0
        ax.set_xticks(range(len(columns)), columns, rotation=steep, **font)
    if len(rows):
        ax.set_yticks(range(len(rows)), rows, **font)


def matrix(ax: Axes, values: Tensor, rows: Sequence[str] = (), columns: Sequence[str] = (),
           limit: float | None = None, bar: str | None = "", square: bool = False,
           ) -> Any:  # fmt: skip
    """Draw a matrix in a panel. Where it has negative numbers, 0 is white; where nan, beige.

    limit: the number at the end of the colours. bar: what the colour bar is called; None: no bar.
    """
    from matplotlib import colormaps

    shown = values.detach().float()
    known = shown[~shown.isnan()]
    signed = bool((known < 0).any())
    limit = limit or known.abs().max().item()
    cmap = colormaps["RdBu_r" if signed else "Greys"].with_extremes(bad="#efe3c2")
    image = ax.imshow(shown.numpy(), cmap=cmap, vmin=-limit if signed else 0, vmax=limit,
                      aspect="equal" if square else "auto", interpolation="nearest")  # fmt: skip
    ax.spines[["left", "bottom"]].set_visible(False)
    names(ax, rows, columns)
    if bar is not None:
        ax.figure.colorbar(image, ax=ax, label=bar, fraction=0.05, pad=0.02).ax.tick_params(
            labelsize=8
        )
    return image


def strips(vectors: dict[str, Tensor], signs: str, title: str) -> Figure:
    """Vectors as strips of colour below each other. signs: one character in front of each."""
    figure, axes = panels(len(vectors), height=0.45 * len(vectors) + 1.0, sharex=True)
    limit = max(vector.abs().max().item() for vector in vectors.values())
    for ax, sign, (name, vector) in zip(axes, signs, vectors.items(), strict=True):
        # A strip without a negative number still belongs on the scale with two sides.
        image = ax.imshow(vector.detach()[None].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit,
                          aspect="auto", interpolation="nearest")  # fmt: skip
        ax.set_yticks([0], [f"{sign}  {name}"], fontsize=9, fontfamily="monospace")
        ax.tick_params(length=0)
    mark(axes[-1], "", "channel")
    axes[0].set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="value", fraction=0.03, pad=0.02)
    return figure


def bars(ax: Axes, labels: Sequence[str], values: Any, color: str, across: bool = False) -> None:
    """Bars with a name at each: upright, or across, the first one on top."""
    values = torch.as_tensor(values).detach().tolist()
    if across:
        ax.barh(range(len(labels)), values, color=COLORS[color])
        ax.invert_yaxis()
        names(ax, rows=labels)
    else:
        ax.bar(range(len(labels)), values, color=COLORS[color])
        names(ax, columns=labels)


def curves(ax: Axes, lines: dict[str, Any], color: str, x: Any = None, dots: bool = True) -> None:
    """Curves that differ in their line and their markers, with a legend where there are several."""
    places = None if x is None else torch.as_tensor(x).tolist()
    for style, (label, values) in zip(LINES, lines.items(), strict=False):
        values = torch.as_tensor(values).detach().tolist()
        ax.plot(places or range(len(values)), values, style if dots else style[1:],
                color=COLORS[color], label=label, ms=4, lw=1.3)  # fmt: skip
    if x is None and len(values) <= 13:
        ax.set_xticks(range(len(values)))
    if len(lines) > 1:
        ax.legend(fontsize=8, frameon=False)


def draw_tokens(tokens: list[str], ids: list[int]) -> Figure:
    """A string cut into its tokens, with the id below each."""
    width, places, row, end = 100, [], 0, 0  # a line has room for so many characters
    for token, i in zip(tokens, ids, strict=True):
        size = max(len(token), len(str(i))) + 1.5
        if end + size > width:
            row, end = row + 1, 0
        places.append((row, end, size))
        end += size
    figure, (ax,) = panels(height=0.75 * (row + 1))
    for (row, start, size), token, i in zip(places, tokens, ids, strict=True):
        ax.barh(row, size - 0.4, 0.5, start, color=COLORS["wte"], alpha=0.2)
        style = dict(ha="center", va="center", fontfamily="monospace")
        ax.text(start + size / 2 - 0.2, row, token, fontsize=10, **style)
        ax.text(start + size / 2 - 0.2, row + 0.4, str(i), fontsize=8, color=COLORS["wte"], **style)
    ax.set(xlim=(0, width), ylim=(row + 0.6, -0.3))
    ax.axis("off")
    return figure


def draw_lift(table: Tensor, row: int, color: str, title: str) -> Figure:
    """Some rows of an embedding's table, one of which is framed, and below them that row alone."""
    from matplotlib.patches import Rectangle

    first = max(0, min(row - 6, len(table) - 13))
    few = table[first : first + 13, :64]
    figure, (above, below) = panels(2, height=3.2, height_ratios=(8, 1), sharex=True)
    limit = few.abs().max().item()
    labels = [str(first + i) for i in range(len(few))]
    image = matrix(above, few, labels, limit=limit, bar=None)
    frame = dict(fill=False, edgecolor=COLORS[color], linewidth=3)
    above.add_patch(Rectangle((-0.5, row - first - 0.5), len(few[0]), 1, **frame))
    matrix(below, few[row - first][None], [str(row)], limit=limit, bar=None)
    mark(above, title, "", "row")
    mark(below, "", "channel (the first 64)")
    figure.colorbar(image, ax=[above, below], label="value", fraction=0.03, pad=0.02)
    return figure


def draw_spread(spread: dict[str, Tensor], tokens: list[str]) -> Figure:
    """For each name a panel with a dot for each token, all on one logarithmic scale."""
    figure, axes = panels(1, len(spread), width=10.5, sharex=True, sharey=True)
    for ax, (title, values) in zip(axes, spread.items(), strict=True):
        ax.plot(values.tolist(), "o", color=COLORS["stream"], ms=5)
        names(ax, columns=tokens)
        mark(ax, title, "", "standard deviation" if ax is axes[0] else "", yscale="log")
    return figure


def draw_steps(steps: dict[str, Tensor], tokens: list[str]) -> Figure:
    """The four steps from queries and keys to weights, (T, T) each. The first has a scale of its
    own, the second and the third share one, and the last goes from 0 to 1."""
    figure, axes = panels(1, len(steps), width=10.5, height=3.7)
    first, second = (s.abs().max().item() for s in list(steps.values())[:2])
    limits = (first, second, second, 1.0)
    for ax, limit, (title, values) in zip(axes, limits, steps.items(), strict=True):
        matrix(ax, values.masked_fill(values.isinf(), torch.nan), tokens if ax is axes[0] else (),
               tokens, limit, None, square=True)  # fmt: skip
        mark(ax, title, "key", "query" if ax is axes[0] else "")
        if ax is not axes[0]:
            ax.set_yticks([])
    for place, label in ((axes[:1], "score"), (axes[1:3], "score / √hs"), (axes[3:], "weight")):
        figure.colorbar(place[0].images[0], ax=place, label=label, orientation="horizontal",
                        fraction=0.06, pad=0.02, aspect=12 * len(place))  # fmt: skip
    return figure


def draw_heads(weights: dict[str, Tensor], tokens: list[str], across: int) -> Figure:
    """Attention weights, (T, T) for each head under its name, `across` heads beside each other."""
    down = -(-len(weights) // across)
    figure, axes = panels(down, across, min(10.5, 2.7 * across + 0.9), 2.4 * down + 0.8)
    for ax in axes[len(weights) :]:
        ax.axis("off")
    for n, (ax, (title, values)) in enumerate(zip(axes, weights.items(), strict=False)):
        rows = tokens if n % across == 0 else ()
        columns = tokens if n + across >= len(weights) else ()
        image = matrix(ax, values, rows, columns, 1.0, None, square=True)
        mark(ax, title, "key" if len(columns) else "", "query" if len(rows) else "")
        if not len(rows):
            ax.set_yticks([])
        if not len(columns):
            ax.set_xticks([])
    figure.colorbar(image, ax=axes, label="weight", shrink=0.5, pad=0.02)
    return figure


def draw_guesses(
    p: Tensor, guesses: list[list[str]], rows: list[str], columns: list[str]
) -> Figure:
    """A table of guessed tokens, each on its probability as a shade of grey."""
    figure, (ax,) = panels(width=10.5, height=0.42 * len(rows) + 1.3)
    matrix(ax, p, rows, columns, 1.0, "probability")
    ax.tick_params(axis="x", rotation=0)
    for i, row in enumerate(guesses):
        for j, guess in enumerate(row):
            color = "white" if p[i, j] > 0.55 else "black"
            ax.text(j, i, guess[:11], ha="center", va="center", color=color, fontsize=8,
                    fontfamily="monospace")  # fmt: skip
    return figure


def draw_shares(shares: dict[str, dict[str, float]], title: str, x: str) -> Figure:
    """For each row a bar that is cut into its shares, named in a legend."""
    figure, (ax,) = panels(height=0.4 * len(shares) + 1.5)
    start = np.zeros(len(shares))
    for part in next(iter(shares.values())):
        size = np.array([row[part] for row in shares.values()])
        color = COLORS.get(part, "#bbbbbb")
        ax.barh(list(shares), size, left=start, color=color, label=part, ec="white")
        start += size
    ax.invert_yaxis()
    mark(ax, title, x, xlim=(0, 1))
    ax.legend(ncol=6, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.32))
    return figure


def draw_samples(shares: dict[str, tuple[Tensor, Tensor]], tokens: list[str]) -> Figure:
    """For each setting how often tokens were drawn, how often they should be, and the first setting
    as a line. shares: (drawn, expected), the likeliest token first."""
    figure, axes = panels(1, len(shares), width=11.0, height=2.9, sharey=True)
    reference = next(iter(shares.values()))[1]
    for ax, (title, (drawn, expected)) in zip(axes, shares.items(), strict=True):
        bars(ax, tokens, drawn[: len(tokens)], "head")
        dots = dict(color=COLORS["stream"], ms=4)
        ax.plot(reference[: len(tokens)].tolist(), "-", lw=1, label="temperature 1", **dots)
        ax.plot(expected[: len(tokens)].tolist(), "o", label="expected", **dots)
        mark(ax, title, "", "share" if ax is axes[0] else "")
    axes[-1].legend(fontsize=8, frameon=False)
    return figure


def draw_habits(habits: dict[str, list], heads: list[str], even: float) -> Figure:
    """For each head a bar for each of its habits, and a dotted line for one that has none."""
    figure, (ax,) = panels(width=10.0)
    for k, (what, values) in enumerate(habits.items()):
        places = [place + (k - 1) * 0.27 for place in range(len(heads))]
        style = dict(color=COLORS["attention"], alpha=(1.0, 0.6, 0.3)[k], hatch=("", "//", "..")[k])
        ax.bar(places, torch.stack(values).tolist(), 0.27, label=what, edgecolor="white", **style)
    ax.axhline(float(even), color=COLORS["stream"], lw=1.3, ls=":")
    names(ax, columns=heads)
    mark(ax, "What each head attends to", "block.head", "mean weight")
    ax.legend(ncol=3, fontsize=8, frameon=False)
    return figure


def draw_log(log: list[dict[str, Any]], wanted: dict[str, tuple[str, ...]]) -> Figure:
    """A panel for each title, in which the log's records of these keys are drawn over the steps."""
    figure, axes = panels(1, len(wanted), width=4.5 * len(wanted), height=3.0)
    for ax, (title, keys) in zip(axes, wanted.items(), strict=True):
        for key in keys:
            steps, values = zip(*((r["step"], r[key]) for r in log if key in r), strict=True)
            style = dict(alpha=0.45, label="training loss") if key == "loss" else dict(marker="o")
            ax.plot(
                steps, values, **dict(label="on unseen text", color=COLORS["loss"], ms=4) | style
            )
        name, _, unit = title.partition(", ")
        mark(ax, name, "step", unit or title)
        ax.legend(fontsize=8, frameon=False)
    return figure


def draw_costs(costs: dict[str, list[float]], title: str) -> Figure:
    """A row of dots for each variant, one for each seed, and a line at their mean."""
    figure, (ax,) = panels(width=8.0, height=0.24 * len(costs) + 1.1)
    for row, values in enumerate(costs.values()):
        ax.plot(values, [row] * len(values), "o", alpha=0.5, color=COLORS["stream"], ms=5)
        ax.plot(np.mean(values), row, "|", ms=13, mew=2.5, color="black")
    ax.axvline(0, color=COLORS["stream"], lw=1, ls=":")
    ax.set_yticks(range(len(costs)), list(costs), fontsize=8)
    ax.set_xscale("symlog", linthresh=0.05)
    marks = (-0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
    ax.set_xticks(marks, [f"{m:+g}" if m else "0" for m in marks])
    ax.invert_yaxis()
    mark(ax, title, "bits per byte more than the baseline (logarithmic beyond ±0.05)")
    return figure


# ---------------------------------------------------------------- The model in the notebook's hands

# The stations of B sentences of T tokens, in the order in which they pass them.
JOURNEY = (
    ("wte", "B T C", "a row of the table wte for each id"),
    ("wpe", "T C", "a row of the table wpe for each position; the same for every sentence"),
    ("h.0.in", "B T C", "their sum: the residual stream begins"),
    ("h.0.ln_1", "B T C", "each token brought to one scale, for reading only"),
    ("h.0.attn.c_attn", "B T 3C", "query, key and value of every token, from one matrix"),
    ("h.0.q", "B nh T hs", "the queries, cut into heads; the keys and values likewise"),
    ("h.0.scores", "B nh T T", "every query times every key"),
    ("h.0.weights", "B nh T T", "divided by √hs, masked, and softmax of each row"),
    ("h.0.y", "B nh T hs", "the weighted sum of the values, in each head"),
    ("h.0.attn.c_proj.in", "B T C", "the heads side by side"),
    ("h.0.attn", "B T C", "mixed by c_proj, and added to the stream"),
    ("h.0.ln_2", "B T C", "the new stream, brought to one scale"),
    ("h.0.mlp.c_fc", "B T 4C", "a match with each of 4C patterns; GELU follows"),
    ("h.0.mlp", "B T C", "from 4C back to C, and added to the stream"),
    ("h.0", "B T C", "the stream after the first of L blocks; the others repeat this"),
    ("ln_f", "B T C", "brought to one scale a last time"),
    ("lm_head", "B T V", "a score for every token of the vocabulary, at every position"),
)  # fmt: skip
BREAKS = {
    "no mask": "attention sees all tokens, also later ones",
    "no scale": "the scores are not divided by √hs",
    "exact GELU": "GELU by the normal distribution, and not by its tanh approximation",
    "no residual": "a block hands on what its sublayers make, and adds nothing",
    "untied head": "lm_head has numbers of its own",
    "no positions": "wpe gives zeros",
}


class Look:
    """A model, opened to look inside.

    name: "quick" is the newest run of the quick recipe. If there is none, one is trained, with
    these flags. Any other name is one that load_model takes. If that model cannot be had, a line
    says so, and the quick run takes its place.
    """

    def __init__(self, name: str = "quick", flags: Sequence[str] = ()) -> None:
        try:
            path = quick_run(flags) if name == "quick" else name
            self.model, self.tokenizer = train_gpt2.load_model(path)
        except (ValueError, OSError) as e:
            if name == "quick":
                raise
            print(f"{name} cannot be had here, so the newest quick run takes its place: {e}")
            path = quick_run(flags)
            self.model, self.tokenizer = train_gpt2.load_model(path)
        self.name = path
        c = self.model.config
        self.sizes = c.n_layer, c.n_head, c.n_embd, c.vocab_size, c.n_embd // c.n_head
        print(
            f"{path}: {c.n_layer} blocks of {c.n_head} heads, {c.n_embd} channels, "
            f"a vocabulary of {c.vocab_size:,} tokens, {self.model.num_params():,} weights"
        )

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens of these ids, with visible spaces."""
        return [visible(self.tokenizer.decode([int(i)])) for i in ids]

    def windows(self, n: int) -> tuple[Tensor, Tensor]:
        """n windows of text that the model was not trained on, (n, T), and each one's next tokens.

        The text is the validation split of the quick recipe, in this model's tokens.
        """
        text = held_out_text()
        ids = torch.tensor(self.tokenizer.encode(text, allowed_special="all"))
        T = min(128, self.model.config.block_size)
        return ids[: n * T].view(n, T), ids[1 : n * T + 1].view(n, T)

    def has_tokens_of(self, loader: train_gpt2.DataLoaderLite) -> bool:
        """Whether a loader's tokens are this model's, and its windows are short enough."""
        ids = self.tokenizer.encode(held_out_text()[:1000], disallowed_special=())
        same = loader.window(0)[1:9].tolist() == ids[:8]
        return same and loader.T <= self.model.config.block_size

    @torch.no_grad()
    def trace(self, text: str | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """What each module gives on the way of a text (or of ids) through the model: name → tensor.

        `NAME.in` is what the module got. What happens between q, k, v and the output is computed
        by hand here, because the model does it in one step. Shapes: (T, C); of a batch, (B, T, C).
        """
        model, tokenizer = self.model, self.tokenizer
        idx = torch.as_tensor(tokenizer.encode(text) if isinstance(text, str) else text)
        seen: dict[str, Tensor] = {}

        def hook(name: str):
            def note(module: nn.Module, args: tuple, output: Tensor) -> None:
                seen[f"{name}.in"], seen[name] = (
                    value[0] if idx.dim() == 1 and value.dim() == 3 else value
                    for value in (args[0], output)
                )

            return note

        handles = [
            module.register_forward_hook(hook(name.removeprefix("transformer.")))
            for name, module in model.named_modules()
        ]
        model(idx.view(-1, idx.size(-1)))
        for handle in handles:
            handle.remove()
        L, nh, _, _, hs = self.sizes
        later = torch.ones(2 * idx.shape[-1:], dtype=torch.bool).triu(1)  # (T, T)
        for i in range(L):
            qkv = seen[f"h.{i}.attn.c_attn"].unflatten(-1, (3, nh, hs))  # (…, T, 3, nh, hs)
            q, k, v = (part.transpose(-3, -2) for part in qkv.unbind(-3))  # (…, nh, T, hs)
            scores = q @ k.mT  # (…, nh, T, T)
            scaled = scores / hs**0.5
            masked = scaled.masked_fill(later, -torch.inf)
            weights = masked.softmax(dim=-1)
            seen |= {f"h.{i}.q": q, f"h.{i}.k": k, f"h.{i}.v": v, f"h.{i}.scores": scores,
                     f"h.{i}.scaled": scaled, f"h.{i}.masked": masked,
                     f"h.{i}.weights": weights, f"h.{i}.y": weights @ v}  # fmt: skip
        return seen

    @torch.no_grad()
    def lens(self, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What ln_f and the head would make of the stream before each block and after the last.

        Returns the probability of the likeliest token and its id, (L + 1, T) each.
        """
        model, n_layer = self.model, self.sizes[0]
        stations = ["h.0.in", *(f"h.{i}" for i in range(n_layer))]
        logits = torch.stack([model.lm_head(model.transformer.ln_f(t[s])) for s in stations])
        return logits[..., : self.tokenizer.n_vocab].softmax(dim=-1).max(dim=-1)

    def show(self, text: str) -> None:
        """Draw how a text goes through the model, from its tokens to the likeliest next ones."""
        ids = self.tokenizer.encode(text)
        tokens, t, n_layer, n_head = self.tokens(ids), self.trace(text), *self.sizes[:2]
        last, end = repr(tokens[-1])[1:-1], len(ids) - 1
        figure = draw_tokens(tokens, ids)
        picture(figure, f"The text is cut into {len(ids)} tokens. Below each stands its id, the "
                        "number by which the model knows it. ␣ is a space. ⏎ is a line's "
                        "end.")  # fmt: skip
        parts = {f"wte[{ids[-1]}]": t["wte"][-1], f"wpe[{end}]": t["wpe"][-1]}
        parts["stream"] = t["h.0.in"][-1]
        figure = strips({k: v[:96] for k, v in parts.items()}, " +=", f"Two look-ups for {last}")
        picture(figure, f"The last token, {last}, is looked up twice: by its id in the table wte, "
                        f"and by its position, {end}, in the table wpe. The sum of the two rows is "
                        "what the model works on (the first 96 channels).")  # fmt: skip
        stations, before = {"wte + wpe": t["h.0.in"][-1]}, t["h.0.in"][-1]
        share = {}  # how long what a sublayer adds is, beside the stream before it
        for i in range(n_layer):
            for part, after in (("attention", f"h.{i}.ln_2.in"), ("MLP", f"h.{i}")):
                stations[f"+ {part} {i}"] = t[after][-1]
                share[f"{part} {i}"] = (t[after][-1] - before).norm() / before.norm()
                before = t[after][-1]
        figure, (ax,) = panels(height=0.22 * len(stations) + 1.3)
        rows = torch.stack(list(stations.values()))  # (1 + 2L, C)
        sizes = rows.std(dim=1, keepdim=True)
        labels = [f"{s:13} {size:6.2f}" for s, size in zip(stations, sizes.flatten(), strict=True)]
        matrix(ax, (rows / sizes)[:, :96], labels, limit=3.0, bar="value / std. deviation")
        mark(ax, f"The residual stream of {last} at every station", "channel")
        picture(figure, "Each row is the vector of the last token after one more addition, divided "
                        "by its standard deviation, which stands on the left. Each part only adds. "
                        "A column keeps its colour where little is added, and gets a new one where "
                        f"much is added. In this model {max(share, key=share.get)} adds most, "
                        "compared with the stream before it.")  # fmt: skip
        few = max(1, 12 // n_head)  # blocks, of which the first and the last are among them
        blocks = sorted({round(i * (n_layer - 1) / max(1, few - 1)) for i in range(few)})
        weights = {f"block {i}, head {j}": t[f"h.{i}.weights"][j, -24:, -24:]
                   for i in blocks for j in range(min(12, n_head))}  # fmt: skip
        picture(draw_heads(weights, tokens[-24:], min(4, n_head)),
                "What each head of attention looks at. Each row is a token that looks, each column "
                "a token that it looks at. The darker a cell, the larger its weight.")  # fmt: skip
        p, guesses = (part[:, -10:] for part in self.lens(t))
        rows = ["wte + wpe", *(f"block {i}" for i in range(n_layer))]
        same = sum(int(guess) == i for guess, i in zip(guesses[0], ids[-10:], strict=True))
        figure = draw_guesses(p, [self.tokens(row) for row in guesses], rows, tokens[-10:])
        mark(figure.axes[0], "The likeliest next token, as each block would have it", "after")
        picture(figure, "In each cell stands the token that the model would predict if it ended "
                        "after this block (the logit lens). The darker, the surer. The first row "
                        f"comes before all blocks. In {same} of its {len(guesses[0])} cells stands "
                        "the token itself. Section 7 says why.")  # fmt: skip
        p, best = t["lm_head"][-1, : self.tokenizer.n_vocab].softmax(dim=-1).topk(10)
        figure, (ax,) = panels(width=7.0)
        bars(ax, self.tokens(best), p, "head", across=True)
        mark(ax, "The ten likeliest next tokens", "probability")
        guess = self.tokens(best[:1])[0]
        picture(figure, f"The likeliest next token is {guess}. Its probability is {p[0]:.2f}. "
                        f"Together, the ten have {p.sum():.2f}.")  # fmt: skip

    def page(self, text: str) -> None:
        """Show the page of this model in a frame. A viewer without frames shows its name alone."""
        from IPython.display import IFrame, display

        path = Path("log/look.html")
        path.parent.mkdir(exist_ok=True)
        life.write_page(self.model, self.tokenizer, path, text, name=str(self.name))
        display(IFrame(path.as_posix(), width="100%", height=640))

    def break_model(self, what: str = "nothing") -> None:
        """Change one line of the model, as BREAKS says. "nothing" mends it."""
        if what not in ("nothing", *BREAKS):
            raise ValueError(f"no such break: {what!r}; there are {', '.join(BREAKS)}, and nothing")
        parts = self.model.transformer
        for module in self.model.modules():
            vars(module).pop("forward", None)  # that of the class is in force again
        self.model.lm_head.weight = parts.wte.weight
        if what == "untied head":
            noise = 0.02 * torch.randn(parts.wte.weight.shape)
            self.model.lm_head.weight = nn.Parameter(parts.wte.weight.detach() + noise)
        if what == "no positions":
            parts.wpe.forward = lambda pos: torch.zeros(*pos.shape, parts.wpe.embedding_dim)
        for block in parts.h:
            if what in ("no mask", "no scale"):
                block.attn.forward = functools.partial(attend, block.attn, what)
            if what == "exact GELU":
                block.mlp.forward = lambda x, m=block.mlp: m.c_proj(nn.functional.gelu(m.c_fc(x)))
            if what == "no residual":
                block.forward = functools.partial(NoResidual.forward, block)
        print("The model is whole." if what == "nothing" else f"Now {BREAKS[what]}.")


def attend(attn: nn.Module, fault: str, x: Tensor, mask: Any = None, cache: Any = None) -> Tensor:
    """What CausalSelfAttention computes, without its mask or without its scale."""
    B, T, C = x.size()
    heads = attn.c_attn(x).view(B, T, 3, attn.n_head, C // attn.n_head).transpose(1, 3)
    q, k, v = heads.unbind(2)  # (B, nh, T, hs) each
    if cache is not None:
        k, v = cache.extend(k, v)
    how = dict(scale=1.0, is_causal=T > 1) if fault == "no scale" else {}
    y = nn.functional.scaled_dot_product_attention(q, k, v, **how)
    return attn.c_proj(y.transpose(1, 2).reshape(B, T, C))


def draw_many(logits: Tensor, order: Tensor, settings: dict[str, tuple[dict, Tensor]],
              n: int = 1000) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """How often each token is drawn, of n draws, and how often it should be.

    settings: the arguments of `sample`, and what is expected of the tokens in this order.
    """
    shares = {}
    for name, (how, expected) in settings.items():
        draws = train_gpt2.sample(logits.expand(n, -1), **how).flatten()
        drawn = torch.bincount(draws, minlength=len(logits))[order] / n
        shares[name] = drawn, expected / expected.sum()
    return shares


def stream(model: train_gpt2.GPT, idx: Tensor) -> list[Tensor]:
    """The residual stream before each block and after the last, (B, T, C) each."""
    seen: list[Tensor] = []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.transformer.ln_f.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(idx)
    return [x.detach() for x in seen]


def signals(block: type) -> tuple[list[float], list[float]]:
    """Of a fresh model of twelve such blocks: the norm of the loss's gradient at each block, and
    the mean cosine between its tokens after each block."""
    config = train_gpt2.GPTConfig(64, 512, n_layer=12, n_head=6, n_embd=192)
    torch.manual_seed(1337)
    with patch.object(train_gpt2, "Block", block):
        model = train_gpt2.GPT(config).double()  # so that tiny numbers do not become 0
    outputs: list[Tensor] = []
    for b in model.transformer.h:
        b.register_forward_hook(lambda _, args, out: outputs.append(out))
    logits = model(torch.randint(512, (2, 64)))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(512, (128,)))
    norms = [g.norm().item() for g in torch.autograd.grad(loss, outputs)]
    units = [(x / x.norm(dim=-1, keepdim=True))[0].detach() for x in outputs]  # (T, C) each
    return norms, [((u @ u.T).sum().item() - 64) / (64 * 63) for u in units]


def sizes(config: train_gpt2.GPTConfig) -> dict[str, train_gpt2.GPTConfig]:
    """This model, and OpenAI's four with their own vocabulary."""
    presets = {name: preset[0] for name, preset in train_gpt2.PRESETS.items() if name != "quick"}
    return {"this model": config} | {
        name: replace(shape, vocab_size=50257) for name, shape in presets.items()
    }


def budget(config: train_gpt2.GPTConfig) -> dict[str, int]:
    """The weights of each part of a GPT-2 with biases, by hand."""
    L, C = config.n_layer, config.n_embd
    return {
        "wte": config.vocab_size * C, "wpe": config.block_size * C,
        "attention": L * (4 * C**2 + 4 * C), "mlp": L * (8 * C**2 + 5 * C),
        "LayerNorm": L * 4 * C + 2 * C,
    }  # fmt: skip


def export(model: train_gpt2.GPT, tokenizer: tiktoken.Encoding) -> Path:
    """A folder, which is gone when Python ends, with the model in Hugging Face's format."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    model.save_pretrained(folder.name, tokenizer)
    return Path(folder.name)


def in_transformers(model: train_gpt2.GPT, tokenizer: tiktoken.Encoding) -> Any:
    """The model as the library transformers reads it. Its generate does not stop at a token."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = GPT2LMHeadModel.from_pretrained(export(model, tokenizer)).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = tokenizer.eot_token
    return theirs


def gradients(model: nn.Module, loss: Tensor, n_vocab: int) -> dict[str, Tensor]:
    """The gradient of each parameter, turned as in our file, without rows that are no token."""
    parameters = dict(model.named_parameters())
    found = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    if not isinstance(model, train_gpt2.GPT):
        found = train_gpt2.transpose_conv1d(found)
    return {name: g[:n_vocab] if "wte" in name else g for name, g in found.items()}


def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradient: Tensor, rate: float):
    """One step of an optimizer, with this gradient for this weight."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    weight.grad = gradient.clone()
    optimizer.step()


def train_step(model: train_gpt2.GPT, optimizers: list, x: Tensor, y: Tensor, rate: float) -> float:
    """One step of training, with the gradient clipped. Returns the loss before it."""
    loss = model(x, y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def join_pair(parts: Sequence[Any], pair: tuple) -> tuple:
    """The parts of a word, with this pair of neighbours joined wherever it occurs."""
    joined = list(parts[:1])
    for part in parts[1:]:
        if (joined[-1], part) == pair:
            joined[-1] = joined[-1] + part
        else:
            joined.append(part)
    return tuple(joined)


def merge_stages(tokenizer: tiktoken.Encoding, word: str) -> list[tuple[bytes, ...]]:
    """A word's stages from single bytes to tokens. Each joins the pair that was learned first."""
    ranks = {token: tokenizer.encode_single_token(token) for token in tokenizer.token_byte_values()}
    stages = [tuple(bytes([b]) for b in word.encode())]
    while True:
        pairs = [pair for pair in pairwise(stages[-1]) if b"".join(pair) in ranks]
        if not pairs:
            return stages
        stages.append(join_pair(stages[-1], min(pairs, key=lambda pair: ranks[b"".join(pair)])))


def quick_run(flags: Sequence[str]) -> str:
    """The folder of the newest quick run. If there is none, one is trained."""
    runs = list(Path("log").glob("quick*/checkpoint_*.pt"))
    if not runs:
        command = [sys.executable, train_gpt2.__file__, "--preset=quick", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
            for line in program.stdout:  # each over the one before
                print(line.rstrip()[:100].ljust(100), end="\r", flush=True)
        runs = list(Path("log").glob("quick*/checkpoint_*.pt"))
    if not runs:
        raise OSError(f"the quick run wrote no checkpoint: run {' '.join(command)} and see why")
    return max(runs, key=os.path.getmtime).parent.as_posix()


@functools.cache
def held_out_text() -> str:
    """The beginning of the quick recipe's validation split."""
    import fineweb

    data_dir = train_gpt2.PRESETS["quick"][1].data_dir
    fineweb.prepare_stdlib(data_dir)
    shards = [shard for _, shard in fineweb.open_shards(data_dir, "val")]
    return fineweb.load_tokenizer(data_dir).decode(np.concatenate(shards)[1:40_000].tolist())


def cut(text: str) -> list[str]:
    """The words into which GPT-2 cuts a text before it looks for tokens."""
    import regex

    import fineweb

    return regex.findall(fineweb.PATTERN, text)


def train_tokenizer(text: str, vocab_size: int) -> tiktoken.Encoding:
    """A tokenizer that is learned from this text."""
    import fineweb

    return fineweb.train_tokenizer([text], vocab_size)


def gpt2_tokenizer() -> tiktoken.Encoding | None:
    """GPT-2's tokenizer. If it cannot be had, a line says so."""
    import fineweb

    try:
        return fineweb.load_tokenizer()
    except OSError as e:
        print(f"What needs GPT-2's tokenizer is missing here: {e}")
        return None


# ------------------------------------------------------------------------- The notebook's ablations

# A small model of eight blocks, because some effects do not show in fewer, and a short training.
RECIPE = dict(
    n_layer=8, n_head=4, n_embd=64, block_size=128, vocab_size=4096, bias=True, dropout=0.0,
    data_dir="data/stdlib", seq_len=128, micro_batch_size=16, total_batch_size=2048, max_steps=250,
    warmup_steps=20, optimizer="muon", max_lr=1.5e-2, min_lr_ratio=0.0, val_tokens=2**20,
    precision="fp32",
)  # fmt: skip
SEEDS = (1337, 1338, 1339)  # each gives other first weights and another order of the data


class NoAttention(train_gpt2.Block):
    def __init__(self, config: train_gpt2.GPTConfig) -> None:
        super().__init__(config)
        del self.ln_1, self.attn

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        return x + self.mlp(self.ln_2(x))


class NoMLP(train_gpt2.Block):
    def __init__(self, config: train_gpt2.GPTConfig) -> None:
        super().__init__(config)
        del self.ln_2, self.mlp

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        return x + self.attn(self.ln_1(x), **context)


class NoResidual(train_gpt2.Block):
    def forward(self, x: Tensor, **context: Any) -> Tensor:
        return self.mlp(self.ln_2(self.attn(self.ln_1(x), **context)))


class PostNorm(train_gpt2.Block):  # as in the Transformer of 2017
    def forward(self, x: Tensor, **context: Any) -> Tensor:
        x = self.ln_1(x + self.attn(x, **context))
        return self.ln_2(x + self.mlp(x))


class Bare(train_gpt2.Block):  # neither residuals nor LayerNorms
    def forward(self, x: Tensor, **context: Any) -> Tensor:
        return self.mlp(self.attn(x, **context))


class NoScale(train_gpt2.CausalSelfAttention):
    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return attend(self, "no scale", x)


class ReluMLP(train_gpt2.MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x).relu())


class MLPOf2C(train_gpt2.MLP):
    factor = 2

    def __init__(self, config: train_gpt2.GPTConfig) -> None:
        super().__init__(config)
        C = config.n_embd
        self.c_fc = nn.Linear(C, self.factor * C)
        self.c_proj = nn.Linear(self.factor * C, C)


class MLPOf8C(MLPOf2C):
    factor = 8


class NoPositions(train_gpt2.GPT):
    def __init__(self, config: train_gpt2.GPTConfig) -> None:
        super().__init__(config)
        self.transformer.wpe.weight.data.zero_()
        self.transformer.wpe.requires_grad_(False)


class NoLayerNorm(train_gpt2.GPT):
    def __init__(self, config: train_gpt2.GPTConfig) -> None:
        super().__init__(config)
        self.transformer.ln_f = nn.Identity()
        for block in self.transformer.h:
            block.ln_1 = block.ln_2 = nn.Identity()


class UnscaledInit(train_gpt2.GPT):
    def __init__(self, config: train_gpt2.GPTConfig) -> None:
        super().__init__(config)
        for block in self.transformer.h:
            for matrix in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(matrix.weight, std=0.02)


class UntiedHead(train_gpt2.GPT):
    def __init__(self, config: train_gpt2.GPTConfig) -> None:
        super().__init__(config)
        self.lm_head.weight = nn.Parameter(torch.empty_like(self.lm_head.weight).normal_(std=0.02))


ADAMW_RATE = 2e-3  # the best of 1e-3, 2e-3 and 4e-3, tried with one seed
ADAMW = dict(optimizer="adamw", max_lr=ADAMW_RATE)
ABLATIONS: dict[str, dict[str, Any]] = {  # what differs from RECIPE: a class, or a flag
    "baseline": {},
    "no attention": dict(Block=NoAttention),
    "no MLP": dict(Block=NoMLP),
    "ReLU": dict(MLP=ReluMLP),
    "no 1/√hs": dict(CausalSelfAttention=NoScale),
    "MLP of 2C": dict(MLP=MLPOf2C),
    "MLP of 8C": dict(MLP=MLPOf8C),
    "no bias": dict(bias=False),
    "no positions": dict(GPT=NoPositions),
    "no residual": dict(Block=NoResidual),
    "no LayerNorm": dict(GPT=NoLayerNorm),
    "post-norm": dict(Block=PostNorm),
    "init not scaled": dict(GPT=UnscaledInit),
    "untied head": dict(GPT=UntiedHead),
    "no warm-up": dict(warmup_steps=0),
    "dropout 0.1": dict(dropout=0.1),
    "one head": dict(n_head=1),
    "AdamW": ADAMW,
    "AdamW, no LayerNorm": ADAMW | dict(GPT=NoLayerNorm),
    "AdamW, init not scaled": ADAMW | dict(GPT=UnscaledInit),
    "AdamW, no warm-up": ADAMW | dict(warmup_steps=0),
}


def make_variant(change: dict[str, Any], seed: int) -> train_gpt2.GPT:
    """A fresh model of RECIPE with this change."""
    classes = {name: value for name, value in change.items() if isinstance(value, type)}
    torch.manual_seed(seed)
    with patch.multiple(train_gpt2, **classes or dict(GPT=train_gpt2.GPT)):
        return train_gpt2.GPT(config_of(train_gpt2.GPTConfig, RECIPE | change))


def config_of(cls: type, values: dict[str, Any]) -> Any:
    return cls(**{key: values[key] for key in values if key in cls.__dataclass_fields__})


def train_variant(change: dict[str, Any], seed: int) -> float:
    """Train RECIPE with this change, in fp32. Returns bits per byte on the validation split."""
    import fineweb

    model = make_variant(change, seed)
    cfg = config_of(train_gpt2.TrainConfig, RECIPE | change)
    B, T = cfg.micro_batch_size, cfg.seq_len
    batches = train_gpt2.DataLoaderLite(cfg.data_dir, "train", B, T, seed=seed)
    optimizers = train_gpt2.configure_optimizers(model, cfg)
    for n in range(cfg.max_steps):
        rate = train_gpt2.get_lr(n, cfg)
        if not np.isfinite(train_step(model, optimizers, *batches.batch(n), rate)):
            return float("nan")
    validation = train_gpt2.DataLoaderLite(cfg.data_dir, "val", B, T)
    tokenizer = fineweb.load_tokenizer(cfg.data_dir)
    return train_gpt2.evaluate(model, validation, cfg.val_tokens, tokenizer)[1]


def measure(wanted: list[tuple[str, int]], file: str) -> None:
    """Add the rows (name, seed) that the file does not have yet. It is written after each row, so
    a computation that was interrupted goes on where it stopped."""
    path = Path(file)
    rows = json.loads(path.read_text()) if path.exists() else []
    for name, seed in wanted:
        flags = {key: value for key, value in ABLATIONS[name].items() if key in RECIPE}
        row = dict(name=name, seed=seed) | RECIPE | flags
        if not any(old | row == old for old in rows):
            bits = train_variant(ABLATIONS[name], seed)
            params = make_variant(ABLATIONS[name], seed).num_params()
            row |= dict(params=params, bits_per_byte=None if np.isnan(bits) else bits)
            rows.append(row)
            path.with_suffix(".tmp").write_text(format_rows(rows))
            os.replace(path.with_suffix(".tmp"), path)


def read_rows(file: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each variant. Those that were measured in another way say so in their names."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(Path(file).read_text()):
        how = "{max_steps} steps, {precision}"
        kind = "" if how.format(**row) == how.format(**RECIPE) else f" ({how.format(**row)})"
        found.setdefault(row["name"] + kind, []).append(row)
    return found


def difference(name: str, results: dict[str, list[dict[str, Any]]]) -> list[float]:
    """What a variant costs in bits per byte, for each seed: it minus the mean of its baseline,
    which was measured in the same way."""
    mean = np.mean([row["bits_per_byte"] for row in results[baseline_of(name, results)]])
    return [(row["bits_per_byte"] or np.inf) - mean for row in results[name]]


def baseline_of(name: str, results: dict[str, list[dict[str, Any]]]) -> str:
    kind = name.removeprefix(results[name][0]["name"])
    return ("AdamW" if name.startswith("AdamW,") else "baseline") + kind


def verdict(name: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """Whether a variant is worse than its baseline, or better, with every seed against every."""
    bits, others = (
        [row["bits_per_byte"] or np.inf for row in results[n]]
        for n in (name, baseline_of(name, results))
    )
    if min(bits) > max(others):
        return "worse"
    return "better" if max(bits) < min(others) else "not told apart"


def costs(name: str, results: dict[str, list[dict[str, Any]]]) -> tuple[str, ...]:
    """A variant's weights, how many more than the baseline's, its mean bits per byte, their range,
    and what it costs, as text. A run that diverged has inf bits."""
    bits = [row["bits_per_byte"] or np.inf for row in results[name]]
    params, baseline = results[name][0]["params"], results["baseline"][0]["params"]
    return (f"{params:,}", f"{params / baseline - 1:+.1%}", f"{np.mean(bits):.3f}",
            f"{min(bits):.3f} – {max(bits):.3f}",
            signed(np.mean(difference(name, results))))  # fmt: skip


def signed(number: float) -> str:
    """A difference with its sign. What rounds to 0 has none."""
    text = f"{number:+.3f}"
    return text if float(text) else "0.000"


def by_training(results: dict[str, list[dict[str, Any]]]) -> dict[str, list[tuple]]:
    """The rows of a table for each way of training, such as "250 steps, fp32"."""
    tables: dict[str, list[tuple]] = {}
    for name, rows in results.items():
        how = "{max_steps} steps, {precision}".format(**rows[0])
        tables.setdefault(how, []).append((rows[0]["name"], *costs(name, results)))
    return tables


def cost_of(variant: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """The mean cost of a variant, however it was measured."""
    name = next(name for name, rows in results.items() if rows[0]["name"] == variant)
    return f"{name}: {signed(np.mean(difference(name, results)))}"


def costs_of(variants: Sequence[str], results: dict[str, list[dict[str, Any]]]) -> str:
    """The mean costs of variants, with how many more weights each has, if it has."""
    found = []
    for variant in variants:
        rows = next(rows for rows in results.values() if rows[0]["name"] == variant)
        more = rows[0]["params"] / results["baseline"][0]["params"] - 1
        weights = f" ({more:+.0%} weights)" if abs(more) > 0.01 else ""
        found.append(cost_of(variant, results) + weights)
    return "; ".join(found)


# A part of the model, its job, and the variants that go without it or replace it.
COMPONENTS = (
    ("wte", "what a token is; as lm_head, which one comes next", ("untied head",)),
    ("wpe", "where a token stands", ("no positions",)),
    ("attention", "gathers from earlier tokens", ("no attention",)),
    ("mlp", "computes in each token", ("no MLP",)),
    ("LayerNorm", "keeps what is read at one scale", ("no LayerNorm", "AdamW, no LayerNorm")),
)


def format_rows(rows: list[dict[str, Any]]) -> str:
    """JSON with a line for each row."""
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


# ------------------------------------------------------------------- What is often said otherwise


@torch.no_grad()
def mistakes(look: Look, gpt2: tiktoken.Encoding | None) -> list[tuple[str, str, str]]:
    """What walkthroughs of GPT-2 say, what it is (computed here), and why.

    gpt2: GPT-2's tokenizer. Without it, what needs it is left out.
    """
    small = train_gpt2.GPTConfig()
    with torch.device("meta"):  # shapes without numbers
        net = train_gpt2.GPT(small)
    block, n_weights = net.transformer.h[0], net.num_params()
    embeddings = net.transformer.wte.weight.numel() + net.transformer.wpe.weight.numel()
    hidden, width = block.mlp.c_fc.weight.shape
    gelu = functools.partial(nn.functional.gelu, approximate="tanh")
    at_half, at_more = gelu(torch.tensor([-0.5, 1.2])).tolist()
    scores = torch.tensor([0.2, 0.5, 0.8, 2.1, 1.5, 1.0])
    weights = torch.tensor([0.05, 0.10, 0.15, 0.40, 0.25, 0.05])
    values = torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.8, -0.1], [-0.3, 0.4, 0.7],
                           [0.9, -0.5, 0.2], [0.1, -0.2, 0.3], [0.6, 0.3, -0.4]])  # fmt: skip
    ln_v, half_variance = np.log(small.vocab_size), 0.02**2 * small.n_embd / 2
    first_rate = train_gpt2.get_lr(0, train_gpt2.PRESETS["gpt2"][1])
    t = look.trace(life.TEXT)
    growth = t[f"h.{look.sizes[0] - 1}"][1:].std() / t["h.0.in"][1:].std()
    likeliest = t["lm_head"].softmax(dim=-1).amax(dim=-1).mean()
    order = [name for name, _ in block.named_children()]
    kept = sorted({str(p.dtype) for p in look.model.parameters()})
    rows = [
        ("GPT-2 small has 124,396,864 parameters", f"{n_weights:,}", "counted in the model"),
        ("A block has 7,080,960", f"{sum(p.numel() for p in block.parameters()):,}",
         "the biases had been left out"),
        ("84,999,424 are outside the embeddings", f"{n_weights - embeddings:,}",
         "the blocks and ln_f"),
        ("GELU makes small negative numbers more negative", f"GELU(-0.5) = {at_half:.3f}",
         "it brings them nearer to 0"),
        ("GELU(1.2) = 1.19", f"{at_more:.3f}", "1.2 times the share of a normal below 1.2"),
        (f"softmax of {_numbers(scores, 1)} is {_numbers(weights, 2)}",
         _numbers(scores.softmax(0), 3), "e^z of each score, divided by their sum"),
        ("With those weights, the values add up to 0.52, -0.18, 0.25",
         _numbers(weights @ values, 3), "the values are those of the same example"),
        (f"The first loss is ln V = {ln_v:.2f}", f"{ln_v + half_variance:.2f}",
         "half the variance of the logits comes on top"),
        ("Warm-up starts at a rate of 0", f"{first_rate:.1e}",
         "max_lr / warmup_steps: a step of rate 0 would be wasted"),
        ("P(mat) = .42 at a score of 4.8, and P(the) = .05 at 2.3",
         f"P(the) = {0.42 * np.exp(2.3 - 4.8):.3f}", "a ratio of e^(2.3 - 4.8)"),
        ("The 4x layer is a bottleneck", f"{width} → {hidden} → {width}",
         "a bottleneck is narrow in the middle; this is wide"),
        ("A dropout of 0.1 drops two of ten", f"{0.1 * 10:.0f} of 10", "on average"),
        ("LayerNorm follows the MLP", ", ".join(order),
         "the order in a block: it stands before each sublayer"),
        ("In the last layer the values are still normalised",
         f"{growth:.1f} times the first standard deviation",
         "the stream of this model; only what the sublayers read is normalised"),
        ("The head is the transpose of the embedding",
         f"{tuple(net.lm_head.weight.shape)} and {tuple(net.transformer.wte.weight.shape)}",
         "one tensor, not turned"),
        ("Mixed precision halves the memory", ", ".join(kept),
         "the weights of this model; only activations shrink"),
        ("The likeliest token is chosen", f"in {likeliest:.0%} of the cases, if drawn at 1",
         "this model, on average over a sentence; GPT-2's samples were drawn"),
        ("Without positions, word order plays no role",
         f"{_order_without_positions():.3f}", "how far the last logits are apart for two orders "
         "of the tokens before the same last one, in a model of two blocks without positions"),
        ("Single channels have meanings (“is it an animal?”)", "see section 7",
         "directions may have one, at best"),
    ]  # fmt: skip
    if gpt2:
        spelled = {text: gpt2.encode(text) for text in ("How are you?", " mat", "The", " the")}
        rows += [
            ("“How are you?” is 5299 553 481 30", " ".join(map(str, spelled["How are you?"])),
             "ids by GPT-2's tokenizer"),
            ("“ mat” is 2343, or 13625", str(*spelled[" mat"]),
             f"those are {gpt2.decode([2343])!r} and {gpt2.decode([13625])!r}"),
            ("“the” is 0", str(*gpt2.encode("the")), f"0 is {gpt2.decode([0])}"),
            ("“The” and “ the” are the same token", f"{spelled['The'][0]} and {spelled[' the'][0]}",
             "each has a vector of its own"),
            ("Ids such as 54924 or 78922", f"at most {gpt2.n_vocab - 1:,}", "<|endoftext|>"),
            ("Shorter texts are padded with 0", f"0 is {gpt2.decode([0])}",
             "GPT-2 has no padding token; on the right, whatever one puts there does no harm"),
        ]  # fmt: skip
    return rows


def _numbers(values: Tensor, digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values.tolist())


def _order_without_positions() -> float:
    torch.manual_seed(1337)
    model = NoPositions(train_gpt2.GPTConfig(16, 64, n_layer=2, n_head=2, n_embd=32))
    for p in model.transformer.h.parameters():
        p.normal_(std=0.3)  # large enough for every part to matter
    one, other = torch.tensor([[5, 9, 2, 7], [2, 5, 9, 7]])
    return apart(model(one[None])[0, -1], model(other[None])[0, -1])
