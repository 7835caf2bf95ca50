"""Text becomes token shards: FineWeb-Edu, text of your own, or the corpus that every Python has.

    python fineweb.py                          FineWeb-Edu's 10B-token sample, into edu_fineweb10B
    python fineweb.py --max_tokens 1e9         only its first billion tokens
    python fineweb.py --stdlib                 Python's standard library, into data/stdlib
    python fineweb.py --input my.txt notes.jsonl pages/ --tokenizer train --out_dir data/mine
    python fineweb.py --input stories.txt --separator '<|endoftext|>' --out_dir data/stories
    python fineweb.py --inspect data/mine      show what is there, and check that it is whole

Each row of a .jsonl, .json, .csv or .parquet file is a document. Any other file is text, and one
document, unless --separator says what stands between documents. A folder gives its .txt and its
tables. Text is UTF-8, or UTF-16 with a byte-order mark. A file may be compressed (.gz).

A shard is a one-dimensional .npy file of token ids (uint16). In front of every document stands
<|endoftext|>, from which a model learns that a new text begins. Stopped at any moment, the same
command goes on after the last whole shard, and ends with the same files as if never stopped.
"""

from __future__ import annotations

import argparse
import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, partial
from inspect import signature
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tiktoken
from tiktoken import Encoding

EOT = "<|endoftext|>"
FINEWEB = "HuggingFaceFW/fineweb-edu"
OFFLINE = "; with network run the same again, or prepare other text (--input, --stdlib)"
SPLITS, RECORDS = ("train", "val"), ("meta.json", "progress.json")
TABLES = (".jsonl", ".json", ".csv", ".parquet")
SHARD_TOKENS = 100_000_000
BATCH_CHARS = 1 << 18  # characters that a worker encodes at a time, which takes it about 20 ms
MAX_CHARS = 1 << 26  # of a document between separators, because it is held in memory
TOKENIZER_BYTES = 100_000_000  # of text, to train a tokenizer on; more would hardly change it
# Folders of the standard library that hold tests, tables and other people's code.
NOT_CORPUS = "site-packages dist-packages test tests idlelib lib2to3 encodings turtledemo ensurepip"

# ---------------------------------------------------------------------------------- Tokenizers
# Byte-pair encoding (BPE) starts from the 256 bytes, so it can write any text. Each of its merges
# makes a new token of two tokens that often stand side by side. The ids are the bytes first, then
# the merges in the order in which they were learned, and <|endoftext|> last.

# GPT-2 first cuts a text into words, and merges only within a word. A word is the end of an English
# contraction, a run of letters, of digits or of signs, each with the space in front of it, or a run
# of white space. (`++` never gives back what it took, which makes the same cuts faster.)
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# OpenAI's files spell each byte as a visible character. A byte that is a visible character of
# Latin-1 stands for itself. The others, in order, are spelled as the characters from 256 on, so the
# space is "Ġ". The bytes that stand for themselves have the first ids: "!" is 0.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = VISIBLE + [b for b in range(256) if b not in VISIBLE]
CHARS = [chr(b) for b in VISIBLE] + [chr(256 + i) for i in range(256 - len(VISIBLE))]
CHAR_OF, BYTE_OF = dict(zip(BYTES, CHARS, strict=True)), dict(zip(CHARS, BYTES, strict=True))

# A tokenizer's files: as OpenAI wrote them, as transformers does since version 5, and before.
OPENAI_FILES, HF_FILES = ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")
TOKENIZER_FILES = (OPENAI_FILES, ("tokenizer.json",), HF_FILES)


def find_merges(ids: dict[str, int]) -> list[str]:
    """The merge of each token ("t h" for "th"): what the merges before it leave of its bytes."""
    merges = []
    for token, i in sorted(ids.items(), key=lambda item: item[1]):
        parts = list(token)
        while len(parts) > 2:
            ranks = [ids.get(a + b, i) for a, b in zip(parts, parts[1:], strict=False)]
            at = ranks.index(min(ranks))  # In any text the earliest merge goes first.
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(" ".join(parts))
    return merges


def make_encoding(ids: dict[str, int], merges: list[str], added: Iterable[str] = ()) -> Encoding:
    """The tokenizer of these ids and merges. Errors: ValueError where these do not go together."""
    pairs = [merge.split(" ") for merge in merges]
    ordinary = {*CHARS, *chain(*pairs), *map("".join, pairs)}
    special = {token: ids[token] for token in ids.keys() - ordinary}
    ranks = {token: ids[token] for token in ordinary}
    if sorted(ids.values()) != list(range(len(ids))) or EOT not in special or "" in special:
        raise ValueError(f"the ids are not 0, 1, 2 and so on, or {EOT} has none")
    if find_merges(ranks) != merges:  # tiktoken gets the ids alone, and merges in their order.
        raise ValueError("the ids are not in the order of the merges")
    if other := special.keys() - {EOT, *added}:
        raise ValueError(f"{min(other)!r} is neither a byte nor merged nor added")
    ranks = {bytes(BYTE_OF[char] for char in token): i for token, i in ranks.items()}
    return Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def token_ids(enc: Encoding) -> dict[str, int]:
    """The id of each token, spelled as in OpenAI's encoder.json."""
    ids = {}
    for i, token in enumerate(map(enc.decode_single_token_bytes, range(enc.n_vocab))):
        ids[token.decode() if enc.is_special_token(i) else "".join(CHAR_OF[b] for b in token)] = i
    return ids


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a file of a tokenizer lies in the folder."""
    return any(Path(folder, name).exists() for name in chain(*TOKENIZER_FILES))


def load_tokenizer(folder: str | Path | None = None) -> Encoding:
    """The tokenizer whose files lie in the folder. Without any it is GPT-2's.

    Special and added tokens have their ids, but a text that spells them out is ordinary text.
    Errors: ValueError where the files make no tokenizer, OSError where GPT-2's is out of reach.
    """
    if folder is None or not has_tokenizer(folder):
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:
            way_out = "set TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache, or --tokenizer train"
            raise OSError(f"no tokenizer of GPT-2's ({type(e).__name__}): {way_out}") from e
    forms = [[Path(folder, name) for name in names] for names in TOKENIZER_FILES]
    paths = next(paths for paths in forms if any(map(Path.exists, paths)))
    with reading(f"{' and '.join(map(str, paths))} make no tokenizer of GPT-2's kind"):
        spec = json.loads(paths[0].read_text("utf-8"))
        if len(paths) == 1:
            return make_encoding(*parse_tokenizer_json(spec))
        lines, extra = paths[1].read_text("utf-8").split("\n"), Path(folder, "added_tokens.json")
        added = json.loads(extra.read_text("utf-8")) if extra.exists() else {}
        merges = [line for line in lines if line and not line.startswith("#version")]
        added |= spec if paths[0].name == HF_FILES[0] else {}  # There, any token may be special.
        return make_encoding(spec | added, merges, added)


def parse_tokenizer_json(spec: dict[str, Any]) -> tuple[dict[str, int], list[str], Iterable[str]]:
    """Its ids, merges and added tokens. Errors: ValueError where it is not of GPT-2's kind."""
    model, cutter, post = spec["model"], spec["pre_tokenizer"] or {}, spec["post_processor"] or {}
    by_words = cutter.get("type") == "ByteLevel" and cutter.get("use_regex", True)
    others = {
        "model": model.get("type", "BPE") != "BPE" or model.get("dropout"),
        "affix": model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"),
        "normalizer": spec["normalizer"],
        "pre_tokenizer": not by_words or cutter["add_prefix_space"],
        "post_processor": post.get("special_tokens") or post.get("cls"),
    }
    for part in filter(others.get, others):
        raise ValueError(f"its {part} is not GPT-2's")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    return model["vocab"] | added, merges, added


def train_tokenizer(texts: Iterable[str], vocab_size: int, or_fewer: bool = False) -> Encoding:
    """A byte-level BPE of vocab_size tokens that is learned from texts. <|endoftext|> is the last.
    Errors: ValueError where there can be no such size, or the texts have too few merges for it.
    """
    if not 257 <= vocab_size <= 65536:
        raise ValueError(f"a tokenizer has 257 (bytes, {EOT}) to 65536 tokens: not {vocab_size}")
    from tokenizers import ByteLevelBPETokenizer  # It cuts by PATTERN.

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size - 1, min_frequency=0, show_progress=False)
    merges = [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*CHARS, *(merge.replace(" ", "") for merge in merges), EOT]
    if len(tokens) < vocab_size and not or_fewer:
        raise ValueError(f"this text has merges for {len(tokens)} tokens at most: not {vocab_size}")
    return make_encoding({token: i for i, token in enumerate(tokens)}, merges)


def choose_vocab_size(n_bytes: int) -> int:
    """The power of two nearest to the root of a text's size, from 512 to GPT-2's 50,257 tokens."""
    return min(max(512, 2 ** round(np.log2(n_bytes or 1) / 2)), 50257)  # 4,096 for 10 MB


def save_tokenizer(enc: Encoding, folder: str | Path, names: Sequence[str] = OPENAI_FILES) -> None:
    """Write the two files in which OpenAI released GPT-2's tokenizer. Errors: OSError."""
    ids = token_ids(enc)
    special = {token: i for token, i in ids.items() if enc.is_special_token(i)}
    merges = find_merges({token: ids[token] for token in ids.keys() - special.keys()})
    if special.keys() != {EOT}:  # transformers lists added tokens in a third file.
        write_json(Path(folder, "added_tokens.json"), special)
    write_file(Path(folder, names[0]), json.dumps(ids).encode())
    write_file(Path(folder, names[1]), "\n".join(["#version: 0.2", *merges, ""]).encode())


def save_hf_tokenizer(enc: Encoding, folder: str | Path, block_size: int) -> None:
    """Write the files that transformers' AutoTokenizer reads. Errors: OSError."""
    save_tokenizer(enc, folder, names=HF_FILES)
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}
    write_json(Path(folder, "tokenizer_config.json"), config)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to. It gets its name when it is whole and on the disk. Errors: OSError."""
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
        with suppress(OSError):  # After a success it has another name.
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
        hint = " (convert it to UTF-8)" if isinstance(e, UnicodeError) else way_out
        reason = (str(e) or type(e).__name__) + hint  # What the system says needs no hint.
        raise ValueError(f"{what}: {getattr(e, 'strerror', None) or reason}") from e


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make a folder, and wait until no other process writes there. A killed process frees it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    for timeout in chain([0], repeat(-1)):
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout, FileNotFoundError):  # One that failed has removed the folder.
            lock.acquire(timeout)
            break
        print(f"{folder}: another process prepares this; waiting for it", flush=True)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps the lock for now. A folder that has files stays.
            (folder / "lock").unlink()
            folder.rmdir()
        lock.release()


# ------------------------------------------------------------------------------------- Reading
# A source consists of parts, and each part can be read without those before it. A part gives its
# documents, each with the split that it is for. A document is a function that reads its text, as
# often as it is called. It gives the text block by block, because not every text fits into memory.
Document = Callable[[], Iterable[str]]
Part = Callable[[], Iterator[tuple[str, Document]]]


@dataclass
class Corpus:
    """Text in local files. It becomes two streams of shards, one for each split."""

    files: list[Path]
    val_fraction: float
    shard_tokens: int = SHARD_TOKENS
    text_field: str = "text"
    separator: str | None = None
    skip_bad_lines: bool = False
    named: Iterable[Path] = ()  # The other files were found in folders.
    prefix: str = "text"  # of the shards' names
    skipped: Counter[str] = field(default_factory=Counter)
    marks: Counter[Path] = field(default_factory=Counter)  # how often EOT is in a file's text
    streams, expected_tokens = SPLITS, None  # Nobody knows the number before all is encoded.

    def layout(self, stream: str, shard: int) -> tuple[str, int]:
        return stream, self.shard_tokens

    @cached_property
    def parts(self) -> list[Part]:
        split = make_splitter(self.documents(), self.val_fraction)
        return [lambda: chain.from_iterable(map(split, self.documents()))]

    def documents(self) -> Iterator[Document]:
        self.skipped.clear()
        for path in self.files:
            if kind_of(path) in TABLES:
                texts = self.table_texts(path)
            elif self.separator:
                texts = self.separate_texts(path)
            elif path.stat().st_size <= 16 * BATCH_CHARS:
                texts = ["".join(self.blocks(path))]
            else:
                texts = []
                yield partial(self.blocks, path)
            for text in texts:
                if text:
                    yield partial(iter, [text])
                else:
                    self.skipped["empty documents"] += 1

    def blocks(self, path: Path) -> Iterator[str]:
        """The text of a file, block by block."""
        marks, text = 0, ""
        with reading(path), open_text(path) as file:
            while block := file.read(BATCH_CHARS):
                yield block
                text = text[-len(EOT) + 1 :] + block  # A mark may be cut in two.
                marks += text.count(EOT)
        self.marks[path] = marks

    def separate_texts(self, path: Path) -> Iterator[str]:
        """The texts between separators, without line ends at either end."""
        rest, no_text = "", "\r\n\ufeff"  # Where files were joined, there is a byte-order mark.
        for block in self.blocks(path):
            *texts, rest = (rest + block).split(self.separator)
            if len(rest) > MAX_CHARS:
                raise ValueError(f"{path}: no --separator within {MAX_CHARS:,} characters")
            yield from (text.strip(no_text) for text in texts)
        yield rest.strip(no_text)

    def table_texts(self, path: Path) -> Iterator[str]:
        """The texts in the rows of a table."""
        kind = kind_of(path)
        with reading(path):
            if kind == ".parquet":
                import pyarrow.parquet

                table = pyarrow.parquet.ParquetFile(path)
                self.text_of(dict.fromkeys(table.schema_arrow.names))  # Is there such a column?
                for group in range(table.num_row_groups):  # All at once would all stay in memory.
                    for rows in table.iter_batches(256, [group], [self.text_field]):
                        yield from map(self.text_of, rows.column(0).cast("string").to_pylist())
            elif kind == ".csv":
                csv.field_size_limit((1 << 31) - 1)  # The default is 131,072 characters.
                with open_text(path) as file:
                    table = csv.DictReader(file, strict=True)
                    self.text_of(dict.fromkeys(table.fieldnames or ()))  # Is there such a column?
                    yield from map(self.text_of, table)
            elif kind == ".json":
                yield from map(self.text_of, self.json_array(path))
            else:
                yield from self.json_lines(path)

    def json_array(self, path: Path) -> list[dict | str | None]:
        with suppress(ValueError, RecursionError), open_text(path) as file:
            rows = json.load(file)
            if isinstance(rows, list) and all(isinstance(row, dict | str | None) for row in rows):
                return rows
        if path in self.named:
            raise ValueError("no JSON array of objects or texts (one object a line is a .jsonl)")
        self.skipped[".json files without an array of objects or texts"] += 1
        return []

    def json_lines(self, path: Path) -> Iterator[str]:
        reasons = {UnicodeEncodeError: "is not UTF-8: ", TypeError: ""}
        with open_text(path, errors="surrogateescape") as file:
            for i, line in enumerate(file, 1):
                try:
                    line.encode()  # A byte that is not UTF-8 has become half a surrogate pair.
                    if line := line.strip("\ufeff \t\r\n"):
                        yield self.text_of(json.loads(line))
                except (ValueError, TypeError, RecursionError) as e:
                    if not self.skip_bad_lines:
                        reason = reasons.get(type(e), "is not JSON: ")
                        raise ValueError(f"line {i} {reason}{e} (or --skip_bad_lines)") from e
                    self.skipped["bad lines"] += 1

    def text_of(self, row: Any) -> str:
        """The text in a row of a table. Null is an empty text. Errors: TypeError, UnicodeError."""
        fields = row if isinstance(row, dict) else {self.text_field: row}
        text = fields.get(self.text_field, ...)
        if not isinstance(text, str | None):
            names = ", ".join(map(repr, fields))[:300]
            raise TypeError(f"has no text under {self.text_field!r} (--text_field) among {names}")
        (text or "").encode()  # JSON can spell half of a surrogate pair, which is no character.
        return text or ""


def kind_of(path: Path) -> str:
    """The ending of a file's name, in small letters. It says how to read the file."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_text(path: Path, errors: str = "strict") -> io.TextIOWrapper:
    """A file of text. Its byte-order mark is no text. Its line ends stay as they are."""
    file = gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")
    is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    file.seek(0)
    return io.TextIOWrapper(file, "utf-16" if is_utf16 else "utf-8-sig", errors, newline="")


@dataclass
class FineWeb:
    """A sample of FineWeb-Edu on Hugging Face's hub. Each of its files is a part."""

    sample: str
    max_tokens: int
    shard_tokens: int
    expected_tokens: int | None
    prefix, streams, skipped = "edufineweb", ("train",), Counter()

    def layout(self, stream: str, shard: int) -> tuple[str, int]:
        """The first shard of its one stream is validation, a tenth of all tokens at most."""
        val_tokens = min(self.shard_tokens, self.max_tokens // 10)
        left = self.max_tokens - val_tokens - (shard - 1) * self.shard_tokens
        return ("train", max(0, min(self.shard_tokens, left))) if shard else ("val", val_tokens)

    @cached_property
    def parts(self) -> list[Part]:
        with reading(f"cannot stream {self.sample} of {FINEWEB}", OFFLINE):
            import datasets

            options = dict(split="train", streaming=True, columns=["text"])
            data = datasets.load_dataset(FINEWEB, self.sample, **options)
            data = data.with_format("arrow")  # Row by row, reading would be slower than encoding.
            n = data.num_shards
            return [partial(self.documents, data.shard(n, i)) for i in range(n)]

    def documents(self, data: Any) -> Iterator[tuple[str, Document]]:
        with reading(f"cannot stream {self.sample} of {FINEWEB}", OFFLINE):
            for rows in data.iter(batch_size=256):
                for text in rows["text"].to_pylist():
                    yield "train", partial(iter, [text or ""])  # The first shard is validation.


# ---------------------------------------------------------------------- Training or validation
# The text of a document decides which split it is for. So the split is the same on every machine,
# and it does not change when other documents are added or when their order changes.


def excerpt(document: Document, start: int, stop: int) -> Iterator[str]:
    """A document's characters from start to stop."""
    for block in document():
        yield block[max(start, 0) : max(stop, 0)]
        start, stop = start - len(block), stop - len(block)


def make_splitter(documents: Iterable[Document], val_fraction: float) -> Callable:
    """A function from a document to a list of (split, document). Errors: ValueError without text.

    A document is for validation if its hash, modulo the fraction's denominator, is below the
    numerator. Where that holds for none or for all, the bound moves so far that one changes sides.
    Where all are the same text, the end of each is for validation.
    """
    numerator, denominator = Fraction(str(val_fraction)).as_integer_ratio()
    bound = (numerator, 0)

    def key(document: Document) -> tuple[int, int]:
        sha = hashlib.sha256()
        for block in document():
            sha.update(block.encode())
        return (number := int(sha.hexdigest(), 16)) % denominator, number

    low, high, last = (denominator, 0), (-1, 0), None
    for last in documents:
        low, high = min(low, value := key(last)), max(high, value)
        if low < bound <= high:  # Each split has a document.
            break
    if low < high:
        bound = min(max(bound, (low[0], low[1] + 1)), high)
        return lambda document: [("val" if key(document) < bound else "train", document)]
    length = sum(map(len, last())) if last else 0
    cut = length - max(1, round(length * val_fraction))
    if cut < 1:
        raise ValueError("the input has no document in it, or only a single character")
    return lambda document: [
        ("train", partial(excerpt, document, 0, cut)),
        ("val", partial(excerpt, document, cut, length)),
    ]


# ------------------------------------------------------------------------------------- Batches
# Text is encoded in batches, several at a time. Which text is in which batch depends on nothing but
# the source. So a batch's place is enough to go on from, whatever the number of workers.
# A batch is its place (part, number), and its pieces by split. A piece is a mark and a text. The
# mark of a document's first piece is <|endoftext|>. That of the others is empty.
Batch = tuple[list[int], dict[str, list[tuple[str, str]]]]


def cut_text(blocks: Iterable[str]) -> Iterator[str]:
    """Pieces of at most BATCH_CHARS characters. Where a word ends and white space follows, PATTERN
    cuts a text. A piece ends at such a place if it can, so the tokens are those of the whole text.
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


def encode(enc: Encoding, pieces: list[tuple[str, str]]) -> np.ndarray:
    """The ids of (mark, text) pairs, uint16. A text that spells <|endoftext|> stays a text."""
    joined = "".join(mark + text for mark, text in pieces)
    if joined.count(EOT) == sum(mark == EOT for mark, _ in pieces):
        # During this one long call tiktoken releases the interpreter. So threads can keep every
        # core busy, and no text has to be sent to other processes.
        ids = enc.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())
    else:  # A text spells the mark out, so marks and texts are encoded one by one.
        marks_ids = {"": [], EOT: [enc.eot_token]}
        ids = [i for mark, text in pieces for i in marks_ids[mark] + enc.encode_ordinary(text)]
    return np.asarray(ids, dtype="<u2")


def encode_batches(enc: Encoding, batches: Iterable[Batch], workers: int) -> Iterator[tuple]:
    """The place of each batch and the future of its ids by split. Few of them wait at a time."""
    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        for place, pieces in batches:
            pending.append((place, {s: pool.submit(encode, enc, pieces[s]) for s in pieces}))
            if len(pending) == 16 * workers:  # enough to do while a shard is being written
                yield pending.popleft()
        yield from pending


# -------------------------------------------------------------------------------------- Shards
# A stream is a row of shards, which are filled one after the other. A source's layout gives, for
# each shard of a stream, the split that it is for and its size in tokens.


def token_lengths(enc: Encoding) -> np.ndarray:
    """The bytes of text that each token stands for, (n_vocab,). Only <|endoftext|> has 0."""
    lengths = [len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)]
    lengths[enc.eot_token] = 0
    return np.array(lengths)


def count(ids: np.ndarray, lengths: np.ndarray) -> Counter[str]:
    """The number of tokens, of bytes of text, and of documents (that is, of <|endoftext|>)."""
    lengths = lengths[ids]
    documents = len(ids) - int(np.count_nonzero(lengths))
    return Counter(tokens=len(ids), bytes=int(lengths.sum()), documents=documents)


def write_shards(
    path: Path, enc: Encoding, source: Corpus | FineWeb, record: dict[str, Any], workers: int
) -> None:
    """Encode what is not in whole shards yet, write it, and record each whole shard.

    A stream's position in the record is the number of its next shard, and the part, the batch in
    the part, and the token in the batch with which that shard begins.
    """
    from tqdm import tqdm

    totals, positions, lengths = record["splits"], record["positions"], token_lengths(enc)
    chunks: dict[str, list[np.ndarray]] = {stream: [] for stream in positions}  # of the next shard
    room = {s: source.layout(s, positions[s][0])[1] for s in positions}  # what it still needs

    def write_shard(stream: str) -> None:
        shard, ids = positions[stream][0], chunks[stream]
        split, _ = source.layout(stream, shard)
        header = {"descr": "<u2", "fortran_order": False, "shape": (sum(map(len, ids)),)}
        with whole_file(path.with_name(f"{path.name}_{split}_{shard:06d}.npy")) as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.writelines(ids)
        totals[split] += sum((count(i, lengths) for i in ids), Counter()) + Counter(shards=1)
        positions[stream][0], chunks[stream] = shard + 1, []
        _, room[stream] = source.layout(stream, shard + 1)  # no room where there is no next shard

    def unwritten_batches() -> Iterator[Batch]:
        for place, pieces in make_batches(source.parts, min(p[1] for p in positions.values())):
            wanting = [s for s in pieces if room[s] and place >= positions[s][1:3]]
            if wanting:
                yield place, {stream: pieces[stream] for stream in wanting}
            elif not any(room.values()):
                return

    with tqdm(unit="tok", unit_scale=True, total=source.expected_tokens, disable=None) as bar:
        bar.update(sum(counts["tokens"] for counts in totals.values()))
        for place, futures in encode_batches(enc, unwritten_batches(), workers):
            for stream, future in futures.items():
                ids = future.result()
                start = positions[stream][3] if place == positions[stream][1:3] else 0
                while start < len(ids) and room[stream]:
                    chunks[stream].append(ids[start : start + room[stream]])
                    start += len(chunks[stream][-1])
                    room[stream] -= len(chunks[stream][-1])
                    if not room[stream]:
                        write_shard(stream)
                        positions[stream][1:] = [*place, start]
                        write_json(path.with_name("progress.json"), record)
                bar.update(len(ids))
    for stream in filter(chunks.get, positions):  # The last shard of a stream may be short.
        write_shard(stream)


# --------------------------------------------------------------------------- A data directory
# progress.json says how far the directory is. meta.json is written last, when it is finished.


def read_record(path: Path) -> dict[str, Any]:
    """What is in meta.json or progress.json. Errors: ValueError."""
    with reading(path, "; it is no record of this program's, or damaged"):
        record = {"positions": {}} | json.loads(path.read_text("utf-8"))
        record["arguments"] = dict(record["arguments"])
        record["splits"] = {split: Counter(record["splits"][split]) for split in SPLITS}
        positions = record["positions"].values() if path.name == "progress.json" else ()
        numbers = [*chain(*positions, *(totals.values() for totals in record["splits"].values()))]
        if any(type(n) is not int or n < 0 for n in numbers) or {len(p) for p in positions} - {4}:
            raise ValueError("has numbers that cannot be")
        return record


def open_record(out_dir: Path, arguments: dict[str, Any], streams: Iterable[str]) -> dict[str, Any]:
    """The directory's record, or a new one. Errors: ValueError where it was made by other means."""
    for path in map(out_dir.joinpath, RECORDS):
        if path.exists():
            record = read_record(path)
            old = record["arguments"]
            names = [name for name in {**old, **arguments} if old.get(name) != arguments.get(name)]
            if changes := "; ".join(f"{n} {old.get(n)!r}, now {arguments.get(n)!r}" for n in names):
                way_out = "use the same, or another --out_dir, or delete this one"
                raise ValueError(f"{out_dir} has other arguments ({changes}): {way_out}")
            if path.name == "progress.json" and record["positions"].keys() != set(streams):
                raise ValueError(f"{path} is damaged: delete {out_dir}, make it again")
            return record
    if has_tokenizer(out_dir) or any(out_dir.glob("*.npy")):
        raise ValueError(f"{out_dir} has files of another program: use another --out_dir")
    splits, positions = {s: Counter() for s in SPLITS}, {s: [0, 0, 0, 0] for s in streams}
    return dict(format_version=1, arguments=arguments, splits=splits, positions=positions)


def training_texts(part: Part) -> Iterator[str]:
    """The first TOKENIZER_BYTES of a part's training documents."""
    left = TOKENIZER_BYTES
    for text in (t for split, doc in part() if split == "train" for t in cut_text(doc())):
        yield text
        if (left := left - len(text.encode())) <= 0:
            return


def prepare(out_dir: Path, source: Any, arguments: dict[str, Any], workers: int | None) -> bool:
    """Make a data directory, or go on with it. Returns False where it was finished before."""
    tokenizer, meta, progress = arguments["tokenizer"], *map(out_dir.joinpath, RECORDS)
    if not re.fullmatch(r"gpt2|train(:\d+)?", tokenizer):
        raise ValueError(f"--tokenizer is gpt2 or train:N or train: not {tokenizer}")
    with nullcontext() if meta.exists() else sole_writer(out_dir):  # A disk may be read-only.
        record = open_record(out_dir, arguments, source.streams)
        if meta.exists():
            progress.unlink(missing_ok=True)  # It may have been stopped before it could do this.
            return False
        parts = source.parts  # What is wrong shows here, before the first file is written.
        train = tokenizer != "gpt2" and not (out_dir / "vocab.bpe").exists()  # the second of two
        if train:
            size = tokenizer[6:] or choose_vocab_size(sum(f.stat().st_size for f in source.files))
            print(f"{out_dir}: training a tokenizer of {size} tokens", flush=True)
            or_fewer = {} if tokenizer[6:] else {"or_fewer": True}
            enc = train_tokenizer(training_texts(parts[0]), int(size), **or_fewer)
        else:
            enc = load_tokenizer(out_dir)
        write_json(progress, record)
        if train:
            save_tokenizer(enc, out_dir)
        write_shards(out_dir / source.prefix, enc, source, record, workers or os.cpu_count() or 1)
        for split, n in record["splits"].items():
            if not n["tokens"]:
                raise ValueError(f"{out_dir}: no text is left for {split}: delete it, add text")
            print(f"{out_dir}: {n['tokens']:,} {split} tokens of {n['documents']:,} documents")
        for what, n in source.skipped.items():
            print(f"{out_dir}: skipped {n:,} {what}")
        del record["positions"]
        write_json(meta, record | {"n_vocab": enc.n_vocab, "skipped": source.skipped})
        progress.unlink()
        return True


def open_shards(data_dir: str | Path, split: str) -> list[tuple[Path, np.ndarray]]:
    """The files named for a split, of whatever program, memory-mapped. Errors: ValueError."""
    data_dir, shards = Path(data_dir), []
    if (data_dir / "progress.json").exists() and not (data_dir / "meta.json").exists():
        raise ValueError(f"{data_dir} is unfinished: run the command again that began it")
    for path in sorted(data_dir.glob("*.npy")):
        if re.match(rf"(.*_)?{split}_", path.name):
            with reading(path, "; it is no shard, or damaged: make it again"):
                ids = np.load(path, mmap_mode="r")
                whole = path.stat().st_size == ids.offset + ids.nbytes
                if ids.dtype != np.uint16 or ids.ndim != 1 or not whole:
                    raise ValueError(f"is not one row of uint16, but {ids.dtype} {ids.shape}")
            shards.append((path, ids))
    if not shards:
        raise ValueError(f"{data_dir} has no shards *_{split}_*.npy (fineweb.py --help: make some)")
    return shards


def inspect_shards(data_dir: str | Path) -> None:
    """Print what a data directory holds. Errors: ValueError where that is not what it should be."""
    shards = {split: open_shards(data_dir, split) for split in SPLITS}
    enc, meta = load_tokenizer(data_dir), Path(data_dir, "meta.json")
    recorded, lengths = read_record(meta)["splits"] if meta.exists() else {}, token_lengths(enc)
    for split in shards:
        found = Counter(shards=len(shards[split]))
        for path, ids in shards[split]:
            for chunk in np.split(ids, range(1 << 24, len(ids), 1 << 24)):
                with reading(path):  # An id may be larger than the vocabulary.
                    found += count(chunk, lengths)
        numbers = ", ".join(f"{number:,} {what}" for what, number in found.items())
        print(f"{split}: {numbers}, {found['bytes'] / found['tokens']:.3f} bytes a token")
        if recorded and found != recorded[split]:
            raise ValueError(f"{split} should have {dict(recorded[split])}: make {data_dir} again")
    start = enc.decode(shards["train"][0][1][:4096].tolist())
    print("the first document:", start.split(EOT)[:2][-1][:500])
    print(data_dir, "is whole" if recorded else "has no meta.json to be compared with")


# --------------------------------------------------------------------------- The three corpora
# Each function makes a data directory. It returns False, and does nothing, where that is finished
# already. Errors: ValueError for bad input, OSError where a file cannot be written.


def prepare_stdlib(
    out_dir: str | Path = "data/stdlib", vocab_size: int = 4096, workers: int | None = None
) -> bool:
    """Python's own standard library, 10 MB of English and Python, for the quick recipe."""
    root, files = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - {*NOT_CORPUS.split()}  # os.walk enters what is left.
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    arguments = {"source": "stdlib", "tokenizer": f"train:{vocab_size}"}
    return prepare(Path(out_dir), Corpus(files, 1 / 20, prefix="stdlib"), arguments, workers)


def prepare_files(
    inputs: list[str], out_dir: str | Path, tokenizer: str = "gpt2", val_fraction: float = 0.01,
    text_field: str = "text", skip_bad_lines: bool = False, shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None, separator: str | None = None,
) -> bool:  # fmt: skip
    """Files with text, and folders with such files."""
    if not 0 < val_fraction < 1 or separator == "":
        values = f"not {val_fraction} and {separator!r}"
        raise ValueError(f"--val_fraction is between 0 and 1, --separator is not empty: {values}")
    separator = separator and separator.replace("\\n", "\n")  # Not every shell writes line ends.
    named, out_dir = [Path(path) for path in inputs], Path(out_dir)
    files = list_files(named, out_dir)
    sizes = "".join(f"{path.as_posix()} {path.stat().st_size}\n" for path in files)
    # A directory goes on only with the arguments that it was begun with. skip_bad_lines is not
    # among them, because what has been written so far is the same with and without it.
    arguments = dict(
        source=[str(path) for path in inputs], files=len(files),
        sizes=hashlib.sha256(sizes.encode()).hexdigest()[:16], text_field=text_field,
        tokenizer=tokenizer, val_fraction=val_fraction, shard_tokens=shard_tokens,
    ) | ({"separator": separator} if separator else {})  # fmt: skip
    source = Corpus(files, val_fraction, shard_tokens, text_field, separator, skip_bad_lines, named)
    made = prepare(out_dir, source, arguments, workers)
    if made and not separator and (marks := sum(source.marks.values())):
        way_out = f"if it separates documents, delete {out_dir} and add --separator '{EOT}'"
        print(f"{out_dir}: {EOT} stands {marks:,} times in the text, as text; {way_out}")
    return made


def list_files(paths: list[Path], out_dir: Path) -> list[Path]:
    """The files, and those in the folders, in an order that is the same on every machine."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = [f for f in path.rglob("*") if kind_of(f) in (".txt", *TABLES) and f.is_file()]
            own = set(out_dir.resolve().glob("*.json"))  # They are this program's, and no text.
            found = [file for file in found if file.resolve() not in own]
            files += sorted(found, key=lambda file: file.relative_to(path).as_posix())
            if not found:
                raise ValueError(f"{path}: a folder without any .txt, {', '.join(TABLES)}")
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder (a pipe cannot be read twice)")
    return list(dict.fromkeys(files))


def prepare_fineweb(
    out_dir: str | Path | None = None, sample: str = "sample-10BT", max_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS, workers: int | None = None,
) -> bool:  # fmt: skip
    """A sample of FineWeb-Edu, or the first max_tokens of it."""
    out_dir = out_dir or f"edu_fineweb{sample.removeprefix('sample-').removesuffix('T')}"
    arguments = dict(source=FINEWEB, sample=sample, max_tokens=max_tokens, tokenizer="gpt2")
    expected_tokens = max_tokens or {"sample-10BT": 10**10}.get(sample)
    source = FineWeb(sample, max_tokens or 1 << 62, shard_tokens, expected_tokens)
    return prepare(Path(out_dir), source, arguments | {"shard_tokens": shard_tokens}, workers)


# ---------------------------------------------------------------------------- The command line


def number(text: str) -> int:
    """A positive whole number, such as 100000000 or 1e8."""
    if (value := float(text)) < 1 or value % 1:
        raise ValueError
    return int(value)


OPTIONS = {
    "input": dict(nargs="+", metavar="PATH", help="Prepare these files and folders of files."),
    "stdlib": dict(action="store_true", help="Prepare Python's standard library."),
    "inspect": dict(metavar="DIR", help="Show what is in a data directory, and check it."),
    "out_dir": dict(metavar="DIR", help="Write to this folder. (edu_fineweb10B or data/stdlib)"),
    "tokenizer": dict(help="gpt2, train (made from this text), or train:N (of N tokens). (gpt2)"),
    "separator": dict(help="Cut files of text where this stands, \\n for a line end. (nowhere)"),
    "text_field": dict(help="This field or column of a table holds the text. (text)"),
    "skip_bad_lines": dict(action="store_true", help="Skip and count bad lines of a .jsonl."),
    "val_fraction": dict(type=float, help="This share of --input is for validation. (0.01)"),
    "sample": dict(help="Take this sample of FineWeb-Edu. (sample-10BT)"),
    "max_tokens": dict(type=number, help="Take only so many tokens of FineWeb-Edu. (all)"),
    "shard_tokens": dict(type=number, help="Put so many tokens into a shard. (1e8)"),
    "workers": dict(type=number, help="Use so many threads. No file depends on it. (all cores)"),
}


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # What is not given is left to a function's default.
    )  # fmt: skip
    for name, settings in OPTIONS.items():
        parser.add_argument(f"--{name}", **settings)
    options = vars(parser.parse_args(argv))
    if "input" in options:
        make, options["inputs"] = prepare_files, options.pop("input")
        if "out_dir" not in options:
            parser.error("--input needs an --out_dir")
    elif "inspect" in options:
        make, options["data_dir"] = inspect_shards, options.pop("inspect")
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
