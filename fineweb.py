"""Text becomes token shards: FineWeb-Edu, text of your own, or the corpus that every Python has.

    python fineweb.py                          FineWeb-Edu's 10B-token sample, into edu_fineweb10B
    python fineweb.py --max_tokens 1e9         only its first billion tokens
    python fineweb.py --input my.txt notes.jsonl pages/ --out_dir data/mine
    python fineweb.py --input my.txt --tokenizer train:8192 --out_dir data/mine
    python fineweb.py --stdlib                 Python's standard library, into data/stdlib
    python fineweb.py --inspect data/mine      show what is there, and check that it is whole

A shard is a one-dimensional .npy file of token ids, each a uint16. In front of every document
stands the token <|endoftext|>, from which a model learns that a new text begins.

The program may be stopped at any moment. Started again with the same arguments, it goes on after
the last whole shard, and the files at the end are the same as if it had never been stopped.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tiktoken

EOT = "<|endoftext|>"
FINEWEB = "HuggingFaceFW/fineweb-edu"
SAMPLES = {"sample-10BT": 10**10, "sample-100BT": 10**11, "sample-350BT": 35 * 10**10}  # tokens
SHARD_TOKENS = 100_000_000
BATCH_CHARS = 1 << 18  # characters that a worker encodes at a time, which takes it about 20 ms
TOKENIZER_BYTES = (
    100_000_000  # A tokenizer is trained on so much text. More would hardly change it.
)
TABLES = (".jsonl", ".jsonl.gz", ".parquet")  # Each line or row of these files is a document.
KINDS = (".txt", *TABLES)
# Folders of the standard library that hold tests, tables and other people's code.
NOT_CORPUS = set(
    "site-packages dist-packages test tests idlelib lib2to3 encodings turtledemo ensurepip".split()
)

# ---------------------------------------------------------------------------------- Tokenizers
# Byte-pair encoding (BPE) starts from the 256 bytes, so it can write any text. It has a list of
# merges. Each merge makes a new token of two tokens that often stand side by side. The ids are the
# bytes first, then the merges in the order in which they were learned, and <|endoftext|> last.

# GPT-2 first cuts a text into words, and merges only within a word. A word is the end of an English
# contraction, a run of letters, of digits or of signs, each with the space in front of it, or a run
# of white space. (A `++` never gives back what it took. The cuts are the same, found faster.)
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# OpenAI's files spell each byte as a visible character. A byte that is a visible character of
# Latin-1 stands for itself. The others, in order, are spelled as the characters from 256 on, so the
# space is "Ġ". The bytes that stand for themselves have the first ids: "!" is 0.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = VISIBLE + [b for b in range(256) if b not in VISIBLE]
CHARS = [chr(b) for b in VISIBLE] + [chr(256 + i) for i in range(256 - len(VISIBLE))]
CHAR_OF, BYTE_OF = dict(zip(BYTES, CHARS, strict=True)), dict(zip(CHARS, BYTES, strict=True))

# OpenAI and Hugging Face write the same two files under different names.
OPENAI_FILES, HF_FILES = ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")


def make_encoding(merged: Iterable[str]) -> tiktoken.Encoding:
    """A tokenizer like GPT-2's with these merged tokens, spelled as in OpenAI's files."""
    ranks = {bytes([b]): i for i, b in enumerate(BYTES)}
    for token in merged:
        ranks.setdefault(bytes(BYTE_OF[char] for char in token), len(ranks))
    special = {EOT: len(ranks)}
    return tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def token_ids(enc: tiktoken.Encoding) -> dict[str, int]:
    """The id of each token, spelled as in OpenAI's encoder.json."""
    tokens = map(enc.decode_single_token_bytes, range(enc.n_vocab))
    return {"".join(CHAR_OF[b] for b in token): i for i, token in enumerate(tokens)}


def load_tokenizer(folder: str | Path | None = None) -> tiktoken.Encoding:
    """The tokenizer whose files lie in the folder. Without any it is GPT-2's.

    Errors: ValueError where the files make no tokenizer, OSError where GPT-2's is out of reach.
    """
    pairs = [[Path(folder or "") / name for name in names] for names in (OPENAI_FILES, HF_FILES)]
    encoder, merges = next((pair for pair in pairs if any(p.exists() for p in pair)), pairs[0])
    if folder is None or not (encoder.exists() or merges.exists()):
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:
            raise OSError(
                f"GPT-2's tokenizer is not here and cannot be downloaded ({type(e).__name__}): set"
                " TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache from a machine that has network,"
                " or train one of your own (--tokenizer train:8192)"
            ) from e
    with reading(f"{encoder} and {merges.name} make no tokenizer"):
        # tiktoken has a reader for these files, but it remembers them by path. After a tokenizer
        # has been trained anew, it would return the old one.
        lines = merges.read_text("utf-8").split("\n")[1:]  # The first line says "#version: 0.2".
        enc = make_encoding(line.replace(" ", "") for line in lines if line)
        if json.loads(encoder.read_text("utf-8")) != token_ids(enc):
            raise ValueError("their ids differ")
    return enc


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """A byte-level BPE of vocab_size tokens that is learned from texts. <|endoftext|> is the last.

    Errors: ValueError where there can be no such size, or where the texts have too few merges.
    """
    if not 257 <= vocab_size <= 65536:
        raise ValueError(f"a tokenizer has 257 (bytes, {EOT}) to 65536 tokens: not {vocab_size}")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # It cuts by PATTERN.
    alphabet, size = pre_tokenizers.ByteLevel.alphabet(), vocab_size - 1
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    enc = make_encoding(a + b for a, b in json.loads(bpe.to_str())["model"]["merges"])
    if enc.n_vocab < vocab_size:
        raise ValueError(f"this text has merges for {enc.n_vocab} tokens at most: not {vocab_size}")
    return enc


def save_tokenizer(
    enc: tiktoken.Encoding, folder: str | Path, names: tuple[str, str] = OPENAI_FILES
) -> None:
    """Write the two files in which OpenAI released GPT-2's tokenizer. Errors: OSError."""
    ids = token_ids(enc)
    lines = ["#version: 0.2"]
    for token, i in ids.items():
        # tiktoken does not keep which two parts a token was merged from. They are what the earlier
        # merges leave of the token's bytes. Of the possible merges, the earliest always goes first.
        parts = list(token)
        while len(parts) > 2:
            ranks = [ids.get(a + b, len(ids)) for a, b in zip(parts, parts[1:], strict=False)]
            at = ranks.index(min(ranks))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2 and i != enc.eot_token:
            lines.append(" ".join(parts))
    write_file(Path(folder) / names[0], json.dumps(ids).encode())
    write_file(Path(folder) / names[1], ("\n".join(lines) + "\n").encode())


def save_hf_tokenizer(enc: tiktoken.Encoding, folder: str | Path, block_size: int) -> None:
    """Write the files that transformers' AutoTokenizer reads. Errors: OSError."""
    save_tokenizer(enc, folder, names=HF_FILES)
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}
    write_json(Path(folder) / "tokenizer_config.json", config)


# --------------------------------------------------------------------------------------- Files


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name only when it is whole.

    It is written under a temporary name, flushed to the disk, and then renamed.
    Errors: OSError where there is no room or no permission. No part of the file is left then.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(f"cannot write {path} ({e.strerror or e}): mend that, run it again") from e
    finally:
        with suppress(OSError):  # After a success there is no temporary file any more.
            temporary.unlink()


def write_file(path: Path, *chunks: bytes | np.ndarray) -> None:
    with whole_file(path) as file:
        file.writelines(chunks)


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_file(path, json.dumps(values, indent=2).encode(), b"\n")


@contextmanager
def reading(what: object, way_out: str = "") -> Iterator[None]:
    """Make a ValueError of whatever goes wrong inside. It says what was read, and the reason."""
    try:
        yield
    except Exception as e:  # Files and networks fail in the ways of a dozen libraries.
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        way_out = way_out or " (convert it to UTF-8)" * isinstance(e, UnicodeError)
        raise ValueError(f"{what}: {reason}{way_out}") from e


# ------------------------------------------------------------------------------------- Reading
# A source consists of parts, and each part can be read without those before it. A part gives its
# documents, each with the split that it is for. A document is a function, because not every text
# fits into memory: each call reads the text again, and gives it block by block.

Document = Callable[[], Iterable[str]]
Part = Callable[[], Iterator[tuple[str, Document]]]


@dataclass
class Corpus:
    """Text in local files. Each row of a table is a document, and each other file is one."""

    prefix: str  # of the shards' names
    files: list[Path]
    val_fraction: float
    text_field: str = "text"
    skip_bad_lines: bool = False
    skipped: Counter[str] = field(default_factory=Counter)
    expected_tokens = None  # Nobody knows it before everything is encoded.

    def parts(self) -> list[Part]:
        split = make_splitter(self.documents(), self.val_fraction)
        return [lambda: chain.from_iterable(map(split, self.documents()))]

    def documents(self) -> Iterator[Document]:
        self.skipped.clear()
        for path in self.files:
            if path.name.endswith(TABLES):
                documents = (partial(iter, [text]) for text in self.texts(path))
            elif path.stat().st_size <= 16 * BATCH_CHARS:
                documents = [partial(iter, ["".join(self.blocks(path))])]
            else:
                documents = [partial(self.blocks, path)]
            for document in documents:
                if any(document()):
                    yield document
                else:
                    self.skipped["empty documents"] += 1

    def blocks(self, path: Path) -> Iterator[str]:
        """The text of a file, block by block. With newline="" its line ends stay as they are."""
        with reading(path), path.open(encoding="utf-8", newline="") as file:
            while block := file.read(BATCH_CHARS):
                yield block

    def texts(self, path: Path) -> Iterator[str | None]:
        """The texts in a table."""
        with reading(path), path.open("rb") as file:
            if path.suffix == ".parquet":
                import pyarrow.parquet

                table = pyarrow.parquet.ParquetFile(file)
                if self.text_field not in (names := table.schema_arrow.names):
                    raise ValueError(f"no {self.text_field!r} (see --text_field) among {names}")
                for group in range(table.num_row_groups):  # All at once would all stay in memory.
                    for rows in table.iter_batches(256, [group], [self.text_field]):
                        yield from rows.column(self.text_field).cast("string").to_pylist()
                return
            for i, line in enumerate(gzip.open(file) if path.suffix == ".gz" else file):
                try:
                    if line.strip():
                        yield text_of_line(line, self.text_field)
                except ValueError as e:
                    if not self.skip_bad_lines:
                        raise ValueError(f"line {i + 1} {e} (or --skip_bad_lines)") from e
                    self.skipped["bad lines"] += 1


def text_of_line(line: bytes, text_field: str) -> str:
    """The text in a line of JSON. Errors: ValueError."""
    try:
        text = json.loads(line.decode())[text_field]
        text.encode()  # JSON can spell half of a surrogate pair, which is no character.
        return text
    except UnicodeError as e:
        raise ValueError(f"is not UTF-8: {e.reason}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"is not JSON: {e}") from e
    except (LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"has no text under {text_field!r} (see --text_field)") from e


@dataclass
class FineWeb:
    """A sample of FineWeb-Edu, streamed from Hugging Face's hub. Each of its files is a part."""

    sample: str
    expected_tokens: int | None
    prefix = "edufineweb"
    skipped = Counter()

    def reading(self) -> AbstractContextManager:
        way_out = "; with network run the same again, or prepare other text (--input, --stdlib)"
        return reading(f"cannot stream {self.sample} of {FINEWEB}", way_out)

    def parts(self) -> list[Part]:
        with self.reading():
            import datasets

            options = dict(split="train", streaming=True, columns=["text"])
            data = datasets.load_dataset(FINEWEB, self.sample, **options)
            data = data.with_format("arrow")  # Row by row, reading would be slower than encoding.
            n = data.num_shards
            return [partial(self.documents, data.shard(n, i)) for i in range(n)]

    def documents(self, data: Any) -> Iterator[tuple[str, Document]]:
        with self.reading():
            for rows in data.iter(batch_size=256):
                for text in rows["text"].to_pylist():
                    yield "train", partial(iter, [text or ""])  # The first shard is validation.


# ---------------------------------------------------------------------- Training or validation
# The text of a document decides which split it is for. So the split is the same on every machine,
# and it does not change when other documents are added or when their order changes.


def digest(document: Document) -> tuple[int, int]:
    """The SHA-256 of a document's text, as a number, and its length in characters."""
    sha, length = hashlib.sha256(), 0
    for block in document():
        sha.update(block.encode())
        length += len(block)
    return int(sha.hexdigest(), 16), length


def excerpt(document: Document, start: int, stop: int) -> Iterator[str]:
    """A document's characters from start to stop."""
    for block in document():
        yield block[max(start, 0) : max(stop, 0)]
        start, stop = start - len(block), stop - len(block)


def make_splitter(
    documents: Iterable[Document], val_fraction: float
) -> Callable[[Document], list[tuple[str, Document]]]:
    """A function that gives a document with its split.

    The fraction is numerator / denominator. A document is for validation if its hash, modulo the
    denominator, is below the numerator. That may hold for no document or for all of them. Then the
    bound moves so far that one document changes sides. Documents are read until each side has one.
    If all documents are the same text, the end of each is for validation.
    Errors: ValueError where there is no text.
    """
    numerator, denominator = Fraction(str(val_fraction)).as_integer_ratio()
    bound = (numerator, 0)

    def key(document: Document) -> tuple[int, int]:
        number = digest(document)[0]
        return number % denominator, number

    low, high, last = (denominator, 0), (-1, 0), None
    for last in documents:
        value = key(last)
        low, high = min(low, value), max(high, value)
        if low < bound <= high:
            break
    if last is None:
        raise ValueError("the input has no document in it: there is nothing to prepare")
    if low < high:
        bound = min(max(bound, (low[0], low[1] + 1)), high)
        return lambda document: [("val" if key(document) < bound else "train", document)]
    length = digest(last)[1]
    cut = length - max(1, round(length * val_fraction))
    if cut < 1:
        raise ValueError("the only document is a single character: it cannot be split")
    return lambda document: [
        ("train", partial(excerpt, document, 0, cut)),
        ("val", partial(excerpt, document, cut, length)),
    ]


# ------------------------------------------------------------------------------------- Batches
# Text is encoded in batches, several at a time. Which text is in which batch depends on nothing but
# the source. So a batch's place is enough to go on from, whatever the number of workers.

Piece = tuple[str, str]  # EOT in front of a document's first piece (else ""), and the text
Batch = tuple[list[int], dict[str, list[Piece]]]  # its place (part, number), its pieces by split


def cut_text(blocks: Iterable[str]) -> Iterator[str]:
    """A text of any length in pieces of up to BATCH_CHARS characters.

    A piece ends where a word does and white space follows. PATTERN cuts there as well, so the
    tokens are those of the whole text. (Where BATCH_CHARS characters have no such place, the text
    is cut all the same.)
    """
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > BATCH_CHARS:
            end = start + BATCH_CHARS
            while end > start and (rest[end] not in " \n" or rest[end - 1].isspace()):
                end -= 1
            end = end if end > start else start + BATCH_CHARS
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def make_batches(parts: list[Part], first_part: int) -> Iterator[Batch]:
    """The text of a source, from one of its parts on."""
    for part in range(first_part, len(parts)):
        number, pieces, size = 0, {}, 0
        for split, document in parts[part]():
            mark = EOT
            for text in cut_text(document()):
                pieces.setdefault(split, []).append((mark, text))
                mark, size = "", size + len(text) + 100  # A short text takes its time, too.
                if size >= BATCH_CHARS:
                    yield [part, number], pieces
                    number, pieces, size = number + 1, {}, 0
        if pieces:
            yield [part, number], pieces


def encode(enc: tiktoken.Encoding, pieces: list[Piece]) -> np.ndarray:
    """The ids of (mark, text) pairs, uint16. A text that spells <|endoftext|> stays a text."""
    joined = "".join(mark + text for mark, text in pieces)
    if joined.count(EOT) == sum(mark == EOT for mark, _ in pieces):
        # During this one long call tiktoken releases the interpreter. So threads can keep every
        # core busy, and no text has to be sent to other processes.
        ids = enc.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())
    else:  # A text spells the mark out, so marks and texts are encoded one by one.
        ids = np.array([
            i for mark, text in pieces
            for i in (*enc.encode(mark, allowed_special={EOT}), *enc.encode_ordinary(text))
        ])  # fmt: skip
    return ids.astype("<u2")


def encode_batches(
    enc: tiktoken.Encoding, batches: Iterable[Batch], workers: int
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """The place of each batch and its ids by split, in order. Few batches are in memory at once."""

    def work(batch: Batch) -> tuple[list[int], dict[str, np.ndarray]]:
        place, pieces = batch
        return place, {split: encode(enc, pieces[split]) for split in pieces}

    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in batches:
            pending.append(pool.submit(work, batch))
            if len(pending) == 16 * workers:  # enough to do while a shard is being written
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# -------------------------------------------------------------------------------------- Shards
# A stream is a row of shards, which are filled one after the other. Own text has two streams, one
# for each split. FineWeb-Edu has one, whose first shard is validation.

Layout = Callable[[int], tuple[str, int]]  # the split of a stream's shard n, and its size in tokens


def token_lengths(enc: tiktoken.Encoding) -> np.ndarray:
    """The bytes of text that each token stands for, (n_vocab,). Only <|endoftext|> has 0."""
    lengths = [len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)]
    lengths[enc.eot_token] = 0
    return np.array(lengths)


def count(ids: np.ndarray, lengths: np.ndarray) -> Counter[str]:
    """The number of tokens, of bytes of text, and of documents (that is, of <|endoftext|>)."""
    lengths = lengths[ids]
    documents = len(ids) - int(np.count_nonzero(lengths))
    return Counter(tokens=len(ids), bytes=int(lengths.sum()), documents=documents)


@dataclass
class ShardWriter:
    """Writes the shards of a stream as its tokens come."""

    path: Path  # of the shards, up to their split
    layout: Layout
    # These two are parts of progress.json, and describe whole shards only.
    totals: dict[str, Counter[str]]  # what they hold, by split
    position: dict[str, Any]  # which shard is next, and the place of its first token
    lengths: np.ndarray
    chunks: list[np.ndarray] = field(default_factory=list)  # tokens of the next shard
    counts: Counter[str] = field(default_factory=Counter)  # of what is in the chunks

    def room(self) -> int:
        """How many tokens the next shard still needs. 0 means that there is no next shard."""
        return self.layout(self.position["shard"])[1] - self.counts["tokens"]

    def add(self, place: list[int], ids: np.ndarray) -> bool:
        """Take the tokens of a batch. Returns whether a shard became whole."""
        shard = self.position["shard"]
        start = self.position["offset"] if place == self.position["place"] else 0
        while start < len(ids) and self.room():
            chunk = ids[start : start + self.room()]
            start += len(chunk)
            self.chunks.append(chunk)
            self.counts += count(chunk, self.lengths)
            if not self.room():
                self.flush()
                self.position |= {"place": place, "offset": start}
        return self.position["shard"] > shard

    def flush(self) -> None:
        """Write what there is as a shard."""
        if self.chunks:
            split, _ = self.layout(self.position["shard"])
            array = {"descr": "<u2", "fortran_order": False, "shape": (self.counts["tokens"],)}
            name = f"{self.path.name}_{split}_{self.position['shard']:06d}.npy"
            with whole_file(self.path.with_name(name)) as file:
                np.lib.format.write_array_header_1_0(file, array)
                file.writelines(self.chunks)
            self.totals[split] = self.totals[split] + self.counts + Counter(shards=1)
            self.position["shard"] += 1
            self.chunks, self.counts = [], Counter()


def write_shards(
    path: Path, enc: tiktoken.Encoding, source: Corpus | FineWeb, parts: list[Part],
    layouts: dict[str, Layout], record: dict[str, Any], workers: int,
) -> None:  # fmt: skip
    """Encode what is not in whole shards yet, write it, and record each whole shard."""
    from tqdm import tqdm

    totals, positions, lengths = record["splits"], record["positions"], token_lengths(enc)
    writers = {
        name: ShardWriter(path, layouts[name], totals, positions[name], lengths) for name in layouts
    }

    def unwritten() -> Iterator[Batch]:
        first_part = min(position["place"] for position in positions.values())[0]
        for place, pieces in make_batches(parts, first_part):
            unfinished = [name for name in writers if writers[name].room()]
            wanting = [name for name in unfinished if place >= positions[name]["place"]]
            if wanted := {split: pieces[split] for split in pieces if split in wanting}:
                yield place, wanted
            elif not unfinished:
                return

    done = sum(total["tokens"] for total in totals.values())
    total = source.expected_tokens
    with tqdm(total=total, initial=done, unit="tok", unit_scale=True, disable=None) as bar:
        for place, ids_by_split in encode_batches(enc, unwritten(), workers):
            for name, ids in ids_by_split.items():
                if writers[name].add(place, ids):
                    write_json(path.with_name("progress.json"), record)
                bar.update(len(ids))
    for writer in writers.values():
        writer.flush()


# --------------------------------------------------------------------------- A data directory
# progress.json says how far the directory is. meta.json is written last, when it is finished.


def read_record(path: Path) -> dict[str, Any]:
    """What is in progress.json or meta.json. Errors: ValueError."""
    with reading(path, "; not a record of this program's, or damaged"):
        record = json.loads(path.read_text("utf-8"))
        record["splits"] = {split: Counter(record["splits"][split]) for split in ("train", "val")}
        numbers = [number for totals in record["splits"].values() for number in totals.values()]
        if path.name == "meta.json":
            record.pop("positions", None)
        for position in record.get("positions", {}).values():
            part, batch = position["place"]
            numbers += [position["shard"], part, batch, position["offset"]]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("has numbers that cannot be")
        return record | {"arguments": dict(record["arguments"])}


def open_record(out_dir: Path, arguments: dict[str, Any], streams: Iterable[str]) -> dict[str, Any]:
    """The directory's record, or a new one. Only an unfinished directory's has positions.

    Errors: ValueError where the directory was made with other arguments or by another program.
    """
    for path in (out_dir / "meta.json", out_dir / "progress.json"):
        if path.exists():
            record = read_record(path)
            old = record["arguments"]
            names = [name for name in {**old, **arguments} if old.get(name) != arguments.get(name)]
            if changes := "; ".join(f"{n} {old.get(n)!r}, now {arguments.get(n)!r}" for n in names):
                way_out = "use the same, or another --out_dir, or delete this one"
                raise ValueError(f"{out_dir} has other arguments ({changes}): {way_out}")
            if path.name == "progress.json" and set(record.get("positions", ())) != set(streams):
                raise ValueError(f"{path} is damaged: delete {out_dir}, make it again")
            return record
    for path in [*out_dir.glob("*.npy"), *out_dir.glob("encoder.json"), *out_dir.glob("vocab.bpe")]:
        raise ValueError(f"{path} is of another program: use another --out_dir")
    return {
        "format_version": 1,
        "arguments": arguments,
        "splits": {"train": Counter(), "val": Counter()},
        "positions": {s: {"shard": 0, "place": [0, 0], "offset": 0} for s in streams},
    }


def training_texts(part: Part) -> Iterator[str]:
    """The first TOKENIZER_BYTES of a part's training documents."""
    left = TOKENIZER_BYTES
    for split, document in part():
        for text in cut_text(document()) if split == "train" else ():
            yield text
            left -= len(text.encode())
            if left <= 0:
                return


def prepare(
    out_dir: str | Path, source: Corpus | FineWeb, layouts: dict[str, Layout],
    arguments: dict[str, Any], workers: int | None,
) -> bool:  # fmt: skip
    """Make a data directory, or go on with it. Returns False where it was finished before."""
    vocabulary = re.fullmatch(r"gpt2|train:(\d+)", arguments["tokenizer"])
    if not vocabulary:
        raise ValueError(f"--tokenizer is gpt2 or train:N: not {arguments['tokenizer']}")
    out_dir = Path(out_dir)
    record = open_record(out_dir, arguments, layouts)
    if "positions" not in record:
        (out_dir / "progress.json").unlink(missing_ok=True)  # It may have been stopped before that.
        return False
    # Everything that can be wrong with the arguments shows before the first file is written.
    parts, trained = source.parts(), None
    if vocabulary[1] and not (out_dir / "vocab.bpe").exists():  # the second of its two files
        print(f"{out_dir}: training a tokenizer of {vocabulary[1]} tokens", flush=True)
        trained = train_tokenizer(training_texts(parts[0]), int(vocabulary[1]))
    enc = trained or load_tokenizer(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "progress.json", record)
    if trained:
        save_tokenizer(trained, out_dir)

    workers = workers or os.cpu_count() or 1
    write_shards(out_dir / source.prefix, enc, source, parts, layouts, record, workers)
    for split, totals in record["splits"].items():
        if not totals["tokens"]:
            raise ValueError(f"{out_dir}: no text is left for {split}: delete it, give more text")
        numbers = f"{totals['tokens']:,} {split} tokens of {totals['documents']:,} documents"
        print(f"{out_dir}: {numbers}")
    for what, number in source.skipped.items():
        print(f"{out_dir}: skipped {number:,} {what}")
    del record["positions"]
    record |= {"n_vocab": enc.n_vocab, "skipped": source.skipped}
    write_json(out_dir / "meta.json", record)
    (out_dir / "progress.json").unlink()
    return True


def open_shards(data_dir: str | Path, split: str) -> list[tuple[Path, np.ndarray]]:
    """The shards of a split, memory-mapped, in the order of their names.

    Every file whose name contains the split is a shard of it. So the shards of other programs can
    be read as well. Errors: ValueError where something is wrong.
    """
    data_dir, shards = Path(data_dir), []
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir}: no such folder (python fineweb.py --help: how to make one)")
    if (data_dir / "progress.json").exists() and not (data_dir / "meta.json").exists():
        raise ValueError(
            f"{data_dir} is unfinished: run the fineweb.py command again that began it"
        )
    for path in sorted(data_dir.glob("*.npy")):
        if not re.match(rf"(.*_)?{split}_", path.name):
            continue
        with reading(path, "; it is no shard, or damaged: make it again"):
            ids = np.load(path, mmap_mode="r")
            if ids.dtype != np.uint16 or ids.ndim != 1:
                raise ValueError(f"has {ids.dtype} of shape {ids.shape}, not a row of uint16")
            if path.stat().st_size != ids.offset + ids.nbytes:
                raise ValueError("is longer than it says")
        shards.append((path, ids))
    if not shards:
        raise ValueError(f"{data_dir} has no shards for {split} (*_{split}_*.npy)")
    return shards


def inspect_shards(data_dir: str | Path) -> None:
    """Print what a data directory holds. Errors: ValueError where that is not what it should be."""
    shards = {split: open_shards(data_dir, split) for split in ("train", "val")}
    enc, meta = load_tokenizer(data_dir), Path(data_dir, "meta.json")
    recorded, lengths = read_record(meta)["splits"] if meta.exists() else {}, token_lengths(enc)
    for split in shards:
        found = Counter(shards=len(shards[split]))
        for path, ids in shards[split]:
            for chunk in np.split(ids, range(1 << 24, len(ids), 1 << 24)):
                if (largest := int(chunk.max(initial=0))) >= enc.n_vocab:
                    raise ValueError(f"{path}: id {largest} in a vocabulary of {enc.n_vocab}")
                found += count(chunk, lengths)
        numbers = ", ".join(f"{number:,} {what}" for what, number in found.items())
        print(f"{split}: {numbers}, {found['bytes'] / found['tokens']:.3f} bytes a token")
        if recorded and found != recorded[split]:
            expected = ", ".join(f"{number:,} {what}" for what, number in recorded[split].items())
            raise ValueError(
                f"{data_dir} is damaged, make it again: {split} should have {expected}"
            )
    start = shards["train"][0][1][:4096]
    first = np.split(start, np.flatnonzero(start == enc.eot_token))[:2][-1]
    print("the first document:", enc.decode(first[first != enc.eot_token].tolist())[:500])
    print(data_dir, "is whole" if recorded else "has no meta.json to be compared with")


# --------------------------------------------------------------------------- The three corpora


def stream_per_split(shard_tokens: int) -> dict[str, Layout]:
    return {split: lambda _, split=split: (split, shard_tokens) for split in ("train", "val")}


def prepare_stdlib(
    out_dir: str | Path = "data/stdlib", vocab_size: int = 4096, workers: int | None = None
) -> bool:
    """Make the quick recipe's data of Python's own standard library, 10 MB of English and Python.

    Returns False where the data is finished already. Errors: ValueError, OSError.
    """
    root, files = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - NOT_CORPUS  # os.walk enters only those that are left.
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    arguments = {"source": "stdlib", "tokenizer": f"train:{vocab_size}"}
    source = Corpus("stdlib", files, val_fraction=1 / 20)
    return prepare(out_dir, source, stream_per_split(SHARD_TOKENS), arguments, workers)


def prepare_files(
    inputs: list[str], out_dir: str | Path, tokenizer: str = "gpt2", val_fraction: float = 0.01,
    text_field: str = "text", skip_bad_lines: bool = False, shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
) -> bool:  # fmt: skip
    """Make a data directory of files with text, and of folders with such files.

    Returns False where the data is finished already. Errors: ValueError, OSError.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction is a share between 0 and 1: not {val_fraction}")
    files = list_files(map(Path, inputs))
    sizes = "".join(f"{path.as_posix()} {path.stat().st_size}\n" for path in files)
    # A directory goes on only with the arguments that it was begun with. skip_bad_lines is not
    # among them, because what has been written so far is the same with and without it.
    arguments = dict(
        source=[str(path) for path in inputs], files=len(files),
        sizes=hashlib.sha256(sizes.encode()).hexdigest()[:16], text_field=text_field,
        tokenizer=tokenizer, val_fraction=val_fraction, shard_tokens=shard_tokens,
    )  # fmt: skip
    source = Corpus("text", files, val_fraction, text_field, skip_bad_lines)
    return prepare(out_dir, source, stream_per_split(shard_tokens), arguments, workers)


def list_files(paths: Iterable[Path]) -> list[Path]:
    """The files, and those in the folders, in an order that is the same on every machine."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = [
                file for file in path.rglob("*") if file.name.endswith(KINDS) and file.is_file()
            ]
            files += sorted(found, key=lambda file: file.relative_to(path).as_posix())
            if not found:
                raise ValueError(f"{path}: a folder without any {', '.join(KINDS)}")
        elif not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        elif not path.name.endswith(KINDS):
            raise ValueError(f"{path}: the name of a file to read ends in {', '.join(KINDS)}")
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def prepare_fineweb(
    out_dir: str | Path | None = None, sample: str = "sample-10BT", max_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS, workers: int | None = None,
) -> bool:  # fmt: skip
    """Make a data directory of FineWeb-Edu. The first shard is validation, a tenth at most.

    Returns False where the data is finished already. Errors: ValueError, OSError.
    """
    out_dir = out_dir or f"edu_fineweb{sample.removeprefix('sample-').removesuffix('T')}"
    limit = max_tokens or 1 << 62
    val_tokens = min(shard_tokens, limit // 10)

    def layout(shard: int) -> tuple[str, int]:
        left = limit - val_tokens - (shard - 1) * shard_tokens
        return ("train", max(0, min(shard_tokens, left))) if shard else ("val", val_tokens)

    arguments = dict(
        source=FINEWEB, sample=sample, max_tokens=max_tokens, tokenizer="gpt2",
        shard_tokens=shard_tokens,
    )  # fmt: skip
    source = FineWeb(sample, max_tokens or SAMPLES.get(sample))
    return prepare(out_dir, source, {"train": layout}, arguments, workers)


# ---------------------------------------------------------------------------- The command line

HELP = {
    "input": "Prepare these files, and the files in these folders.",
    "stdlib": "Prepare Python's standard library, which the quick recipe trains on.",
    "inspect": "Show what is in a data directory, and check that it is whole.",
    "out_dir": "Write to this folder. (edu_fineweb10B or data/stdlib; --input needs one)",
    "tokenizer": "Encode --input with GPT-2's tokenizer, or train one of N tokens: train:N. (gpt2)",
    "text_field": "Take this field of .jsonl, or column of .parquet, for the text. (text)",
    "sample": "Take this sample of FineWeb-Edu. (sample-10BT)",
    "workers": "Use so many threads. The files are the same with any number. (one per core)",
    "shard_tokens": "Put so many tokens into a shard. (1e8)",
    "max_tokens": "Take only so many tokens of FineWeb-Edu, validation included. (all)",
    "val_fraction": "Keep this share of --input for validation. (0.01)",
    "skip_bad_lines": "Skip and count the lines of --input that cannot be read.",
}


def number(text: str) -> int:
    """A positive whole number, such as 100000000 or 1e8."""
    if (value := float(text)) < 1 or value % 1:
        raise ValueError
    return int(value)


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # What is not given is left to a function's default.
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--input", dest="inputs", nargs="+", metavar="PATH", help=HELP["input"])
    what.add_argument("--stdlib", action="store_true", help=HELP["stdlib"])
    what.add_argument("--inspect", dest="data_dir", metavar="DIR", help=HELP["inspect"])
    for name in ("out_dir", "tokenizer", "text_field", "sample"):
        parser.add_argument(f"--{name}", help=HELP[name])
    for name in ("workers", "shard_tokens", "max_tokens"):
        parser.add_argument(f"--{name}", type=number, metavar="N", help=HELP[name])
    parser.add_argument("--val_fraction", type=float, metavar="X", help=HELP["val_fraction"])
    parser.add_argument("--skip_bad_lines", action="store_true", help=HELP["skip_bad_lines"])
    options = vars(parser.parse_args(argv))
    if "inputs" in options:
        make = prepare_files
        if "out_dir" not in options:
            parser.error("--input needs an --out_dir")
    elif "data_dir" in options:
        make = inspect_shards
    else:
        make = prepare_stdlib if options.pop("stdlib", False) else prepare_fineweb
    for name in options.keys() - signature(make).parameters.keys():
        parser.error(f"--{name} has no meaning here")
    if make(**options) is False:
        print("finished already: nothing to do (--inspect DIR shows what is there)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # In Jupyter it is something else.
        sys.stdout.reconfigure(errors="backslashreplace")  # A terminal may lack a character.
    try:
        run(argv)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on after the last whole shard", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError) as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
