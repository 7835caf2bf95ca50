"""What fineweb.py promises, each promise as a test. Offline, on files made here."""

import codecs
import csv
import errno
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import broken, times
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import fineweb  # noqa: E402

EOT = "<|endoftext|>"


def make_texts(n: int, seed: int = 0) -> list[str]:
    """Documents of very different lengths, in several scripts."""
    rng = random.Random(seed)
    words = "the train of tokens Straße číslo données 東京 🦜 it's 42".split() + ["\r\n"]
    return [" ".join(rng.choices(words, k=rng.choice([1, 20, 300]))) + f" {i}" for i in range(n)]


TEXTS = make_texts(150)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="session")
def bpe():
    return fineweb.train_tokenizer(TEXTS, 400)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(fineweb, "BATCH_CHARS", 2000)


def fail(message):
    def function(*args, **kwargs):
        raise OSError(message)

    return function


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def write_parquet(path: Path, texts, row_group_size=20, **columns) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": list(texts), **columns})
    parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def prepare(path, out_dir, **options) -> Path:
    inputs = [str(p) for p in (path if isinstance(path, list) else [path])]
    defaults = {"tokenizer": "train:300", "val_fraction": 0.1, "shard_tokens": 1500}
    fineweb.prepare_files(inputs, out_dir, **{**defaults, **options})
    return Path(out_dir)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents(folder: Path, split: str) -> list[str]:
    enc = fineweb.load_tokenizer(folder)
    ids = np.concatenate([shard for _, shard in fineweb.open_shards(folder, split)])
    starts = np.flatnonzero(ids == enc.eot_token)
    assert starts[0] == 0
    return [enc.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])]


def both(folder: Path) -> list[str]:
    return documents(folder, "train") + documents(folder, "val")


# ---------------------------------------------------------------------------------- Tokenizers


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_survives_a_trained_tokenizer(bpe, text):
    assert bpe.decode(bpe.encode(text, disallowed_special=())) == text


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.one_of(ANY_TEXT, st.just(f"a{EOT}b"), st.just(EOT))))
def test_endoftext_in_a_text_stays_text(bpe, texts):
    ids = fineweb.encode(bpe, [(EOT, text) for text in texts] or [("", "")])
    assert np.count_nonzero(ids == bpe.eot_token) == len(texts)
    assert bpe.decode(ids.tolist()) == "".join(EOT + text for text in texts)


def test_a_trained_tokenizer_has_the_ids_of_gpt2s_scheme(bpe, tmp_path):
    assert (bpe.n_vocab, bpe.eot_token) == (400, 399)
    assert [bpe.decode([i]) for i in (0, 1, 220)] == ["!", '"', " "]
    fineweb.save_tokenizer(bpe, tmp_path)
    assert (tmp_path / "vocab.bpe").read_text("utf-8").count("\n") == 1 + 400 - 257


def test_gpt2s_files_are_written_as_openai_released_them(gpt2, tmp_path):
    fineweb.save_tokenizer(gpt2, tmp_path)
    digests = [hashlib.sha256(data).hexdigest()[:16] for data in contents(tmp_path).values()]
    assert digests == ["196139668be63f3b", "1ce1664773c50f3e"]  # those that tiktoken checks
    assert fineweb.load_tokenizer(tmp_path).encode("Hello, I'm a language model,") == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11,
    ]  # fmt: skip


@pytest.mark.parametrize("which", ["bpe", "gpt2"])
def test_transformers_reads_the_same_tokenizer(which, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    enc = request.getfixturevalue(which)
    fineweb.save_hf_tokenizer(enc, tmp_path, block_size=1 << 20)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(1)
    noise = ["".join(chr(rng.choice([32, 97, 0x301, rng.randrange(0xD800)])) for _ in range(300))]
    for text in [*TEXTS, *noise, fineweb.__doc__, "aaaaaaa   \n\n\t x  's 'S"]:
        text = text.replace(EOT, "")  # theirs takes it for the special token
        assert theirs.encode(text) == enc.encode(text, disallowed_special=())
    assert theirs.eos_token_id == enc.eot_token and len(theirs) == enc.n_vocab
    assert fineweb.token_ids(fineweb.load_tokenizer(tmp_path)) == fineweb.token_ids(enc)


def test_a_retrained_tokenizer_replaces_its_predecessor(tmp_path):
    for size in (300, 320):
        fineweb.save_tokenizer(fineweb.train_tokenizer(TEXTS, size), tmp_path)
        assert fineweb.load_tokenizer(tmp_path).n_vocab == size


def test_training_a_tokenizer_twice_gives_the_same(bpe):
    assert fineweb.token_ids(fineweb.train_tokenizer(iter(TEXTS), 400)) == fineweb.token_ids(bpe)


@pytest.mark.parametrize("size", [-1, 0, 256, 65537, 60000])
def test_a_vocabulary_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match=rf"not {size}"):
        fineweb.train_tokenizer(TEXTS, size)


def test_half_a_tokenizer_is_refused(bpe, tmp_path):
    fineweb.save_tokenizer(bpe, tmp_path)
    lines = (tmp_path / "vocab.bpe").read_text("utf-8").splitlines()
    (tmp_path / "vocab.bpe").write_text("\n".join(lines[:-1]) + "\n", "utf-8")
    with pytest.raises(ValueError, match="make no tokenizer"):
        fineweb.load_tokenizer(tmp_path)
    (tmp_path / "vocab.bpe").unlink()
    with pytest.raises(ValueError, match="make no tokenizer"):
        fineweb.load_tokenizer(tmp_path)


def test_without_gpt2s_tokenizer_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", fail("no network"))
    with pytest.raises(OSError, match="TIKTOKEN_CACHE_DIR"):
        fineweb.load_tokenizer()


# ----------------------------------------------------------------- Tokenizers from elsewhere


NOISE = (
    "".join(map(chr, [*range(1, 0x250), 0x301, 0x3000, 0x6771, 0x1F99C])) + "  \n\n\t it's 'S 42"
)


@pytest.fixture(scope="session")
def theirs(bpe, tmp_path_factory):
    """A folder that transformers wrote, with added tokens of every kind."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "ours").mkdir()
    fineweb.save_hf_tokenizer(bpe, folder / "ours", block_size=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "ours")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["hello world", "日本", " the", "!"])  # The last is there already.
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_that_transformers_wrote_has_its_ids_and_added_tokens(theirs, tmp_path):
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(theirs)
    assert not (theirs / "vocab.json").exists()
    enc = fineweb.load_tokenizer(theirs)
    assert enc.n_vocab == len(tokenizer) == 404 and enc.eot_token == tokenizer.eos_token_id
    ids = {token: i for token, i in fineweb.token_ids(enc).items() if i >= 400}
    assert ids == {"[PAD]": 400, "hello world": 401, "日本": 402, " the": 403}
    plain = pytest.importorskip("tokenizers").Tokenizer.from_file(str(theirs / "tokenizer.json"))
    for text in [*TEXTS, NOISE]:
        for added in [*ids, "!", EOT]:
            text = text.replace(added, "-")
        assert plain.encode(text).ids == tokenizer.encode(text)
        assert enc.encode(text, disallowed_special=()) == tokenizer.encode(text)
    assert enc.decode([400, 401, 402, 403]) == "[PAD]hello world日本 the"
    spelled = "a[PAD] hello world" + EOT
    assert max(enc.encode(spelled, disallowed_special=())) < 399  # ordinary text


def test_a_tokenizer_with_added_tokens_comes_back_from_either_form(theirs, tmp_path):
    transformers = pytest.importorskip("transformers")
    enc = fineweb.load_tokenizer(theirs)
    (tmp_path / "openai").mkdir()
    (tmp_path / "hf").mkdir()
    fineweb.save_tokenizer(enc, tmp_path / "openai")
    fineweb.save_hf_tokenizer(enc, tmp_path / "hf", block_size=64)
    for folder in ("openai", "hf"):
        again = fineweb.load_tokenizer(tmp_path / folder)
        assert fineweb.token_ids(again) == fineweb.token_ids(enc)
        assert again.eot_token == enc.eot_token
        assert [again.is_special_token(i) for i in range(404)] == [i > 398 for i in range(404)]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(f) for f in (theirs, tmp_path / "hf")]
    for text in [*TEXTS, NOISE, "a[PAD] hello world the 日本 the!"]:
        assert tokenizers[0].encode(text) == tokenizers[1].encode(text)


def test_gpt2s_tokenizer_comes_back_from_transformers(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "ours").mkdir()
    fineweb.save_hf_tokenizer(gpt2, tmp_path / "ours", block_size=1024)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path)
    assert fineweb.token_ids(fineweb.load_tokenizer(tmp_path)) == fineweb.token_ids(gpt2)


def tokenizer_json(enc, **changes) -> dict:
    """A tokenizer.json as transformers 4 wrote it: merges are strings."""
    ids = fineweb.token_ids(enc)
    merges = fineweb.find_merges({t: i for t, i in ids.items() if i != enc.eot_token})
    cutter = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="",
                 end_of_word_suffix="", fuse_unk=False, vocab=ids, merges=merges)  # fmt: skip
    added = [dict(id=enc.eot_token, content=EOT, single_word=False, lstrip=False, rstrip=False,
                  normalized=True, special=True)]  # fmt: skip
    spec = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                pre_tokenizer=cutter, post_processor=cutter | {"trim_offsets": False},
                decoder=cutter, model=model)  # fmt: skip
    for key, value in changes.items():
        part, _, name = key.partition("__")
        spec[part] = spec[part] | {name: value} if name else value
    return spec


def test_an_older_tokenizer_json_is_the_same_tokenizer(bpe, tmp_path):
    for form, join in (("strings", " ".join), ("lists", list)):
        spec = tokenizer_json(bpe)
        spec["model"]["merges"] = [join(merge.split()) for merge in spec["model"]["merges"]]
        path = tmp_path / form / "tokenizer.json"
        path.parent.mkdir()
        path.write_text(json.dumps(spec), "utf-8")
        assert fineweb.token_ids(fineweb.load_tokenizer(path.parent)) == fineweb.token_ids(bpe)


def test_special_tokens_may_come_first(tmp_path):
    """As tokenizers' ByteLevelBPETokenizer writes them."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(TEXTS, vocab_size=320, special_tokens=["<pad>", EOT])
    for form in ("json", "pair"):
        (tmp_path / form).mkdir()
    theirs.save(str(tmp_path / "json/tokenizer.json"))
    theirs.save_model(str(tmp_path / "pair"))
    for form in ("json", "pair"):
        enc = fineweb.load_tokenizer(tmp_path / form)
        assert (enc.eot_token, enc.n_vocab) == (1, 320)
        for text in [*TEXTS, NOISE]:
            assert enc.encode(text, disallowed_special=()) == theirs.encode(text).ids
    (tmp_path / "again").mkdir()
    fineweb.save_tokenizer(enc, tmp_path / "again")
    again = fineweb.load_tokenizer(tmp_path / "again")
    assert fineweb.token_ids(again) == fineweb.token_ids(enc) and again.eot_token == 1


ADDS_EOT = {"type": "TemplateProcessing", "single": [], "special_tokens": {EOT: {"id": EOT}}}
OTHER_KINDS = [
    ("normalizer", dict(normalizer={"type": "NFC"})),
    ("pre_tokenizer", dict(pre_tokenizer__add_prefix_space=True)),
    ("pre_tokenizer", dict(pre_tokenizer=None)),
    ("pre_tokenizer", dict(pre_tokenizer__use_regex=False)),
    ("pre_tokenizer", dict(pre_tokenizer__type="Whitespace")),
    ("post_processor", dict(post_processor=ADDS_EOT)),
    ("post_processor", dict(post_processor={"type": "BertProcessing", "cls": ["a", 1]})),
    ("model", dict(model__type="WordPiece")),
    ("model", dict(model__dropout=0.1)),
    ("affix", dict(model__continuing_subword_prefix="##")),
    ("affix", dict(model__end_of_word_suffix="</w>")),
    ("the ids are not 0, 1, 2", dict(added_tokens=[dict(id=500, content="<pad>")])),
    ("the ids are not 0, 1, 2", dict(added_tokens=[dict(id=400, content="")])),
    ("neither a byte nor merged nor added", dict(model__merges=[])),
]


@pytest.mark.parametrize("reason, changes", OTHER_KINDS)
def test_a_tokenizer_json_of_another_kind_is_refused_with_the_reason(
    reason, changes, bpe, tmp_path
):
    spec = tokenizer_json(bpe, **changes)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(ValueError, match=rf"tokenizer.json .*{reason}"):
        fineweb.load_tokenizer(tmp_path)


def test_merges_in_another_order_than_the_ids_are_refused(bpe, tmp_path):
    spec = tokenizer_json(bpe)
    spec["model"]["merges"] = spec["model"]["merges"][::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(ValueError, match="order of the merges"):
        fineweb.load_tokenizer(tmp_path)


def test_a_folder_has_a_tokenizer_where_any_of_its_files_lies(bpe, tmp_path):
    assert not fineweb.has_tokenizer(tmp_path) and not fineweb.has_tokenizer(tmp_path / "none")
    for name in ("encoder.json", "vocab.bpe", "tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_text("")
        assert fineweb.has_tokenizer(tmp_path)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            fineweb.load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("form", ["encoder.json", "vocab.bpe", "tokenizer.json", "vocab.json",
                                  "merges.txt", "added_tokens.json"])  # fmt: skip
@settings(max_examples=times(60, 1000))
@given(data=st.data())
def test_any_tokenizer_file_is_a_tokenizer_or_named(form, data, tmp_path):
    """One value in it is another, or gone, or one of its bytes is another."""
    tiny = fineweb.train_tokenizer(["the the then"], 260)
    for file in tmp_path.iterdir():
        file.unlink()
    if form in ("encoder.json", "vocab.bpe"):
        fineweb.save_tokenizer(tiny, tmp_path)
    else:
        fineweb.save_hf_tokenizer(tiny, tmp_path, block_size=64)
    whole = {"added_tokens.json": {EOT: 259}, "tokenizer.json": tokenizer_json(tiny)}
    path = tmp_path / form
    if form in whole:
        path.write_text(json.dumps(whole[form]))
    content = path.read_bytes()
    if form.endswith(".json") and data.draw(st.booleans()):
        spec = json.loads(content)
        if form == "tokenizer.json" and data.draw(st.booleans()):
            spec["model"] = data.draw(broken(spec["model"]))
            path.write_text(json.dumps(spec))
        else:
            path.write_text(json.dumps(data.draw(broken(spec))))
    else:
        at, byte = data.draw(st.integers(0, len(content))), data.draw(st.binary(max_size=2))
        path.write_bytes(content[:at] + byte + content[at + 1 :])
    try:
        enc = fineweb.load_tokenizer(tmp_path)
    except ValueError as e:
        assert str(tmp_path) in str(e) and "\n" not in str(e)
        return
    assert len(fineweb.token_ids(enc)) == enc.n_vocab == len(fineweb.token_lengths(enc))
    text = "the then ä\n 東"
    assert enc.decode(enc.encode(text, disallowed_special=())) == text


@settings(max_examples=times(100, 2000))
@given(merges=st.lists(st.tuples(*[st.sampled_from("a b aa ab ba bb aab abb Ġa Ġ".split())] * 2),
                       max_size=8))  # fmt: skip
def test_any_merges_give_the_ids_of_the_tokenizers_library_or_are_refused(merges, tmp_path):
    """tiktoken knows no merges, only ids. Where that would make a difference, they are refused."""
    tokenizers = pytest.importorskip("tokenizers")
    tokens = list(dict.fromkeys([*fineweb.CHARS, *(a + b for a, b in merges), EOT]))
    spec = tokenizer_json(fineweb.train_tokenizer(["a"], 257))
    spec["model"] |= dict(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    spec["added_tokens"][0]["id"] = len(tokens) - 1
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    try:
        enc = fineweb.load_tokenizer(tmp_path)
    except ValueError:
        return
    theirs = tokenizers.Tokenizer.from_file(str(path))
    for length in range(1, 8):
        for letters in itertools.product("ab", repeat=length):
            text = "".join(letters)
            assert enc.encode(text) == theirs.encode(text).ids


# --------------------------------------------------------------------------------- Own data


def test_every_form_of_file_gives_the_same_documents(tmp_path):
    (tmp_path / "txt/deeper").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        folder = tmp_path / "txt" / ("deeper" if i % 2 else "")
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    jsonl = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    gz = tmp_path / "b.jsonl.gz"
    gz.write_bytes(gzip.compress(jsonl.read_bytes()))
    parquet = write_parquet(tmp_path / "c.parquet", TEXTS, other=list(range(len(TEXTS))))
    for i, path in enumerate([tmp_path / "txt", jsonl, gz, parquet]):
        out = prepare(path, tmp_path / f"out{i}")
        assert sorted(both(out)) == sorted(TEXTS)
        assert documents(out, "val") == [t for t in both(out) if t in set(documents(out, "val"))]
        fineweb.inspect_shards(out)
    vals = [sorted(documents(tmp_path / f"out{i}", "val")) for i in range(4)]
    assert vals[0] == vals[1] == vals[2] == vals[3] and len(vals[0]) > 1


def test_validation_depends_neither_on_order_nor_on_the_other_documents(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "b.jsonl", TEXTS[::-1])
    write_jsonl(tmp_path / "c.jsonl", TEXTS[:100])
    a, b, c = (documents(prepare(tmp_path / f"{x}.jsonl", tmp_path / x), "val") for x in "abc")
    assert sorted(a) == sorted(b) and set(c) == set(a) & set(TEXTS[:100])
    assert 5 <= len(a) <= 27  # 15 expected


@pytest.mark.parametrize("fraction, n", [(0.01, 2), (0.01, 20), (0.99, 2), (0.99, 20), (0.5, 3)])
def test_both_splits_have_a_document(fraction, n, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [text * 30 for text in TEXTS[:n]])
    out = prepare(path, tmp_path / "out", val_fraction=fraction, tokenizer="train:257")
    assert documents(out, "train") and documents(out, "val") and len(both(out)) == n


@pytest.mark.parametrize("copies", [1, 3])
def test_a_single_text_is_split_by_position(copies, tmp_path):
    text = "東京 é\r\n🦜 " * 1000
    (tmp_path / "in").mkdir()
    for i in range(copies):
        (tmp_path / f"in/{i}.txt").write_bytes(text.encode())
    out = prepare(tmp_path / "in", tmp_path / "out", tokenizer="train:260")
    head, tail = documents(out, "train"), documents(out, "val")
    assert head + tail == [text[:7200]] * copies + [text[7200:]] * copies


def test_a_text_too_large_to_hold_is_read_in_blocks_to_the_same_tokens(tmp_path, monkeypatch, bpe):
    text = "\n".join(TEXTS) + "   \n\n " * 50 + "x" * 5000 + "\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    whole = prepare(tmp_path / "a.txt", tmp_path / "whole", shard_tokens=10**6)
    monkeypatch.setattr(fineweb, "BATCH_CHARS", 500)
    monkeypatch.setattr(fineweb, "make_batches", make_batches := spy(fineweb.make_batches))
    cut = prepare(tmp_path / "a.txt", tmp_path / "cut", shard_tokens=10**6)
    assert len(make_batches.items) > 50
    assert both(cut) == both(whole)
    enc = fineweb.load_tokenizer(cut)
    tokens = [np.load(folder / "text_train_000000.npy") for folder in (cut, whole)]
    end = int(np.argmax(tokens[1] == enc.encode_single_token(b"x"))) - 10  # the run of x is cut
    assert np.array_equal(tokens[0][:end], tokens[1][:end])


def spy(function):
    def wrapper(*args):
        for item in function(*args):
            wrapper.items.append(item)
            yield item

    wrapper.items = []
    return wrapper


def test_pieces_of_a_text_have_the_tokens_of_the_whole(gpt2, monkeypatch):
    monkeypatch.setattr(fineweb, "BATCH_CHARS", 40)
    rng, exact = random.Random(2), 0
    for _ in range(200):
        text = "".join(rng.choices("ab 's1!\n\t\x1c\u3000é ", k=300))
        pieces = list(fineweb.cut_text([text[:120], text[120:]]))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 40
        cuts = [a[-1] + b[0] for a, b in zip(pieces, pieces[1:], strict=False)]
        if all(re.match(r"\S[ \n]", cut) for cut in cuts):
            exact += 1
            assert [i for piece in pieces for i in gpt2.encode(piece)] == gpt2.encode(text)
    assert exact > 100


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path, small_batches):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    one, many = (contents(prepare(path, tmp_path / str(n), workers=n)) for n in (1, 7))
    assert one == many and len(one) > 10


def test_shards_are_full_but_the_last_and_meta_counts_them(tmp_path):
    out = prepare(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    meta, enc = json.loads((out / "meta.json").read_bytes()), fineweb.load_tokenizer(out)
    for split in ("train", "val"):
        lengths = [len(ids) for _, ids in fineweb.open_shards(out, split)]
        assert all(n == 1500 for n in lengths[:-1]) and 0 < lengths[-1] <= 1500
        texts = documents(out, split)
        n_bytes = sum(len(text.encode()) for text in texts)
        totals = dict(tokens=sum(lengths), bytes=n_bytes, documents=len(texts), shards=len(lengths))
        assert meta["splits"][split] == totals
    first = np.load(out / "text_train_000000.npy")
    assert first.dtype == np.uint16 and first.ndim == 1 and first[0] == enc.eot_token


def test_a_tokenizer_is_trained_on_a_bounded_share_of_the_training_documents(tmp_path, monkeypatch):
    train, seen = fineweb.train_tokenizer, []

    def train_and_see(texts, vocab_size):
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(fineweb, "train_tokenizer", train_and_see)
    monkeypatch.setattr(fineweb, "TOKENIZER_BYTES", 10_000)
    out = prepare(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    assert 10_000 <= sum(len(text.encode()) for text in seen) < 15_000
    assert set(seen) <= set(documents(out, "train"))


def test_the_standard_library_is_prepared_by_its_hash_and_then_left_alone(tmp_path, capsys):
    assert fineweb.prepare_stdlib(tmp_path / "stdlib", vocab_size=300)
    for split, remainders in (("val", {0}), ("train", set(range(1, 20)))):
        texts = documents(tmp_path / "stdlib", split)
        digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        assert {int(digest, 16) % 20 for digest in digests} == remainders
    before = contents(tmp_path / "stdlib")
    shards = ["stdlib_train_000000.npy", "stdlib_val_000000.npy"]
    assert sorted(before) == ["encoder.json", "meta.json", *shards, "vocab.bpe"]
    capsys.readouterr()
    assert not fineweb.prepare_stdlib(tmp_path / "stdlib", vocab_size=300)
    assert capsys.readouterr() == ("", "") and contents(tmp_path / "stdlib") == before


def test_it_runs_in_a_spawned_process(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    arguments = [
        "--input",
        str(path),
        "--out_dir",
        str(tmp_path / "out"),
        "--tokenizer",
        "train:300",
    ]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(fineweb.main, [arguments]) == 0
    assert sorted(both(tmp_path / "out")) == sorted(TEXTS)


def test_importing_it_loads_nothing_heavy():
    code = "import sys, fineweb; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(out.stdout.split())
    assert "fineweb" in loaded
    assert not loaded & {"torch", "datasets", "tokenizers", "pyarrow", "transformers", "tqdm"}


# ------------------------------------------------------------------------- Text as people have it

UNIX = "Zeile 1 ä\nZeile 2 東京\n" * 40
WINDOWS = UNIX.replace("\n", "\r\n")
SEPARATED = [f"|{text}|" for text in TEXTS]  # They neither begin nor end with line ends.


def csv_of(texts, **options) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, **options)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return file.getvalue()


FORMS = {  # the same documents in files of every form
    "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    "windows.jsonl": "".join(json.dumps({"id": 1, "text": text}) + "\r\n\r\n" for text in TEXTS),
    "mac.jsonl": "".join(json.dumps({"text": text}) + "\r" for text in TEXTS),
    "texts.jsonl": "\n".join(map(json.dumps, TEXTS)),
    "a.json": json.dumps([{"text": text, "meta": {"n": [1]}} for text in TEXTS], indent=1),
    "TEXTS.JSON": "\n" + json.dumps(TEXTS, ensure_ascii=False),
    "a.csv": csv_of(TEXTS),
    "unix.csv": csv_of(TEXTS, lineterminator="\n", quoting=csv.QUOTE_ALL),
    "mac.csv": csv_of(TEXTS, lineterminator="\r"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gzip"])
def test_a_table_of_any_form_and_encoding_gives_its_texts(name, encoding, tmp_path):
    data = FORMS[name].encode("utf-8-sig" if encoding == "gzip" else encoding)
    path = tmp_path / (name + ".gz" if encoding == "gzip" else name)
    path.write_bytes(gzip.compress(data) if encoding == "gzip" else data)
    plain = write_jsonl(tmp_path / "plain.jsonl", TEXTS)
    assert both(prepare(path, tmp_path / "out")) == both(prepare(plain, tmp_path / "plain"))


@pytest.mark.parametrize("name", ["notes.md", "README", "A.TXT", "a.txt.gz", "a.pdf", "a.b.c"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_named_file_is_text_whatever_its_name_and_its_mark_is_none(name, encoding, tmp_path):
    data = WINDOWS.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    out = prepare(tmp_path / name, tmp_path / "out", tokenizer="train:257")
    assert "".join(both(out)) == WINDOWS


def test_the_marks_in_files_that_were_joined_are_no_text(tmp_path):
    jsonl, text = FORMS["a.jsonl"].encode("utf-8-sig"), f"one{EOT}\n".encode("utf-8-sig")
    (tmp_path / "a.jsonl").write_bytes(jsonl * 2)
    assert sorted(both(prepare(tmp_path / "a.jsonl", tmp_path / "a"))) == sorted(TEXTS * 2)
    (tmp_path / "b.txt").write_bytes(text * 300)
    out = prepare(tmp_path / "b.txt", tmp_path / "b", separator=EOT, tokenizer="train:257")
    assert not any("\ufeff" in text or "\n" in text for text in both(out))


def test_utf16_of_either_order_is_read(tmp_path):
    for name, mark in (("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE)):
        (tmp_path / f"{name}.txt").write_bytes(mark + UNIX.encode(name))
        out = prepare(tmp_path / f"{name}.txt", tmp_path / name, tokenizer="train:257")
        assert "".join(both(out)) == UNIX


def test_a_folder_gives_all_forms_and_skips_and_counts_json_that_holds_no_texts(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "a.json", "a.csv", "TEXTS.JSON"):
        (folder / "deep" / name).write_text(FORMS[name], "utf-8", newline="")
    (folder / "A.Txt").write_text("an upper-case name")
    (folder / "notes.md").write_text("not asked for")
    bad = {
        "config": "{}",
        "list": "[1, 2]",
        "mixed": '["a", 1]',
        "cut": '["a"',
        "deep": "[" * 10**5,
    }
    for name, text in bad.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "latin1.json").write_bytes(b'["\xe9"]')
    out = prepare(folder, tmp_path / "out")
    assert sorted(both(out)) == sorted([*TEXTS * 4, "an upper-case name"])
    assert list(json.loads((out / "meta.json").read_bytes())["skipped"].values()) == [6]
    assert "skipped 6 .json files" in capsys.readouterr().out


def test_a_data_directory_inside_its_input_can_be_prepared_again(tmp_path, small_batches):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for out in (tmp_path, tmp_path / "deep/er"):
        arguments = ["--input", str(tmp_path), "--tokenizer", "train:300", "--out_dir", str(out)]
        assert run_killed(arguments, 4) == -signal.SIGKILL
        assert fineweb.main(arguments) == 0
        assert not fineweb.prepare_files([str(tmp_path)], out, tokenizer="train:300")
        shutil.rmtree(out) if out != tmp_path else [f.unlink() for f in out.glob("[!a]*")]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_nulls_are_empty_documents_in_every_form(form, tmp_path):
    path = tmp_path / f"a.{form}"
    texts = [None if i % 3 == 0 else text for i, text in enumerate(TEXTS)]
    if form == "parquet":
        write_parquet(path, texts)
    elif form == "csv":
        path.write_text(csv_of(texts) + "150,\n151\n", "utf-8", newline="")
    else:
        rows = [{"text": text} for text in texts]
        data = json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows))
        path.write_text(data)
    out = prepare(path, tmp_path / "out")
    assert sorted(both(out)) == sorted(text for text in texts if text)
    skipped = json.loads((out / "meta.json").read_bytes())["skipped"]
    assert skipped == {"empty documents": 52 if form == "csv" else 50}


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_when_the_field_is_missing_the_fields_that_there_are_are_listed(form, tmp_path, capsys):
    path, rows = tmp_path / f"a.{form}", [{"content": "a", "Text ": "b"}] * 5
    if form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(__import__("pyarrow").Table.from_pylist(rows), path)
    elif form == "csv":
        path.write_text("content,Text \na,b\n")
    else:
        data = json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows))
        path.write_text(data)
    assert fineweb.main(["--input", str(path), "--out_dir", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert f"{path}: " in err and "--text_field" in err and "'content', 'Text '" in err
    assert err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_field_of_csv_may_have_any_length_and_hold_quotes_and_line_ends(tmp_path):
    texts = ['She said "no",\r\nand left.\n' * 20000, "short"]  # 520,000 characters
    (tmp_path / "a.csv").write_text(csv_of(texts), "utf-8", newline="")
    out = prepare(tmp_path / "a.csv", tmp_path / "out", tokenizer="train:257")
    assert sorted(both(out)) == sorted(texts)


JOINS = ["<|endoftext|>", "\n<|endoftext|>\n", "\r\n<|endoftext|>\r\n\r\n", "\n\n<|endoftext|>"]


@pytest.mark.parametrize("join", JOINS)
def test_a_separator_makes_documents_and_line_ends_beside_it_are_no_text(join, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(join.join(SEPARATED), "utf-8", newline="")
    out = prepare(tmp_path / "a.txt", tmp_path / "out", separator=EOT)
    assert sorted(both(out)) == sorted(SEPARATED)
    assert json.loads((out / "meta.json").read_bytes())["arguments"]["separator"] == EOT
    said = capsys.readouterr().out
    assert "stands" not in said and "skipped" not in said


@pytest.mark.parametrize("separator", [EOT, "\n", "aa", "x", "=====\n", "東京"])
@settings(max_examples=times(60, 1000))
@given(data=st.data())
def test_a_separator_across_the_border_of_two_blocks_is_found(separator, tmp_path, data):
    piece = st.sampled_from([separator, separator[:-1], separator[1:], "a", "x\n", "b", "é\r\n"])
    text = data.draw(st.lists(piece, min_size=1).map("".join))
    size = data.draw(st.integers(1, 9))
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = fineweb.Corpus([tmp_path / "a.txt"], 0.1, separator=separator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "BATCH_CHARS", size)
        found = ["".join(document()) for document in corpus.documents()]
    stripped = [part.strip("\r\n") for part in text.split(separator)]
    assert found == [part for part in stripped if part]


@settings(max_examples=times(60, 1000))
@given(
    parts=st.lists(st.sampled_from([EOT, EOT[:-1], EOT[3:], "a", "é\n"])), size=st.integers(1, 30)
)
def test_marks_across_the_border_of_two_blocks_are_counted(tmp_path, parts, size):
    (tmp_path / "a.txt").write_text("".join(parts), "utf-8")
    corpus = fineweb.Corpus([tmp_path / "a.txt"], 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "BATCH_CHARS", size)
        assert "".join(corpus.blocks(tmp_path / "a.txt")) == "".join(parts)
    assert sum(corpus.marks.values()) == "".join(parts).count(EOT)


def test_a_large_file_with_separators_is_read_in_bounded_memory(tmp_path):
    with (tmp_path / "a.txt").open("w") as file:
        for i in range(200):
            file.write(f"{i} " * 30_000 + "\n<|endoftext|>\n")
    corpus = fineweb.Corpus([tmp_path / "a.txt"], 0.1, separator=EOT)
    tracemalloc.start()
    assert sum(1 for _ in corpus.documents()) == 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6 < 0.25 * (tmp_path / "a.txt").stat().st_size


def test_a_document_between_separators_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "MAX_CHARS", 1000)
    monkeypatch.setattr(fineweb, "BATCH_CHARS", 100)
    (tmp_path / "a.txt").write_text("a" * 900 + EOT + "b" * 1200)
    with pytest.raises(ValueError, match="a.txt: no --separator within 1,000 characters"):
        prepare(tmp_path / "a.txt", tmp_path / "out", separator=EOT)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_among_separated_texts_it_ends_with_the_same_bytes(tmp_path, small_batches):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(SEPARATED), "utf-8", newline="")
    options = dict(separator=EOT, tokenizer="train", val_fraction=0.2)
    whole = contents(prepare(tmp_path / "a.txt", tmp_path / "whole", **options))
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", "train", "--separator", EOT]
    arguments += ["--val_fraction", "0.2", "--shard_tokens", "1500"]
    arguments += ["--out_dir", str(tmp_path / "killed")]
    codes = [run_killed(arguments, kill_at) for kill_at in (3, 6.5, 11, 0)]
    assert codes == [-signal.SIGKILL] * 3 + [0] and contents(tmp_path / "killed") == whole


def test_the_mark_as_text_is_told_with_the_way_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(SEPARATED), "utf-8")
    for size in (100, 1 << 18):  # read in blocks, and at once
        monkeypatch.setattr(fineweb, "BATCH_CHARS", size)
        out = prepare(tmp_path / "a.txt", tmp_path / f"out{size}")
        told = [line for line in capsys.readouterr().out.split("\n") if EOT in line]
        assert len(told) == 1 and "149 times" in told[0] and f"--separator '{EOT}'" in told[0]
        assert len(both(out)) == 2  # one document, split by position


def test_a_line_end_as_separator_can_be_written_in_any_shell(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\nthree" + b"\r\nfour" * 300)
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", "train:257"]
    arguments += ["--out_dir", str(tmp_path / "out"), "--separator", r"\n"]
    assert fineweb.main(arguments) == 0
    assert sorted(both(tmp_path / "out")) == sorted(["one", "two", "three", *["four"] * 300])


def test_train_chooses_the_vocabulary_from_the_size_of_the_text(tmp_path):
    sizes = {1: 512, 10**6: 1024, 1_115_394: 1024, 96 * 10**5: 4096, 10**7: 4096}
    sizes |= {10**8: 8192, 10**9: 32768, 10**11: 50257}
    assert {n_bytes: fineweb.choose_vocab_size(n_bytes) for n_bytes in sizes} == sizes
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"{i:x}" for i in range(50_000)))
    out = prepare(path, tmp_path / "out", tokenizer="train")
    assert fineweb.load_tokenizer(out).n_vocab == 512


def test_train_takes_a_smaller_vocabulary_where_a_text_has_no_more_merges(tmp_path):
    (tmp_path / "a.txt").write_text("A file that an editor saved.\n" * 500)
    out = prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="train")
    assert 257 < fineweb.load_tokenizer(out).n_vocab < 300


# --------------------------------------------------------------------------------- FineWeb-Edu


@pytest.fixture
def hub(bpe, tmp_path, monkeypatch):
    """A data set in the form of FineWeb-Edu, read by `datasets` itself; its tokenizer is bpe."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(fineweb, "FINEWEB", str(tmp_path / "hub"))
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: bpe)
    for i in range(3):
        texts = [*TEXTS[i * 50 : i * 50 + 50], ""]
        others = dict(
            id=["<urn>"] * 51, url=["http://a"] * 51, token_count=[9] * 51, score=[3.5] * 51
        )
        write_parquet(tmp_path / f"hub/sample/10BT/{i:03}_00000.parquet", texts, **others)
        write_parquet(
            tmp_path / f"hub/data/CC-MAIN-2013-20/{i}.parquet", ["no sample"], score=[3.5]
        )
    configs = {"default": "data/*/*", "sample-10BT": "sample/10BT/*"}
    lines = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n"
        for name, path in configs.items()
    ]
    (tmp_path / "hub/README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n", "utf-8")
    return tmp_path / "hub"


def tokens(folder: Path, split: str) -> list[int]:
    return np.concatenate([ids for _, ids in fineweb.open_shards(folder, split)]).tolist()


def test_finewebs_first_shard_is_validation_and_the_rest_training(hub, bpe, tmp_path):
    assert fineweb.prepare_fineweb(tmp_path / "out", shard_tokens=2000)
    expected = []
    for text in TEXTS:
        expected += [bpe.eot_token, *bpe.encode(text, disallowed_special=())]
    assert tokens(tmp_path / "out", "val") == expected[:2000]
    assert tokens(tmp_path / "out", "train") == expected[2000:]
    names = sorted(path.name for path in (tmp_path / "out").glob("*.npy"))
    assert names[0] == "edufineweb_train_000001.npy" and names[-1] == "edufineweb_val_000000.npy"
    fineweb.inspect_shards(tmp_path / "out")
    assert not fineweb.prepare_fineweb(tmp_path / "out", shard_tokens=2000)


@pytest.mark.parametrize("max_tokens, val", [(3000, 300), (15_000, 1000), (1001, 100)])
def test_max_tokens_is_kept_to_the_token_with_a_tenth_of_validation(hub, tmp_path, max_tokens, val):
    fineweb.prepare_fineweb(tmp_path / "out", max_tokens=max_tokens, shard_tokens=1000)
    assert len(tokens(tmp_path / "out", "val")) == val
    assert len(tokens(tmp_path / "out", "train")) == max_tokens - val


def test_a_sample_that_cannot_be_streamed_leaves_nothing_and_tells_the_way_out(hub, tmp_path):
    with pytest.raises(ValueError, match="sample-9BT.*--input, --stdlib"):
        fineweb.prepare_fineweb(tmp_path / "out", sample="sample-9BT")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ Interruption

KILLER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import fineweb
fineweb.BATCH_CHARS, fineweb.FINEWEB = 2000, sys.argv[3]
fineweb.tiktoken.get_encoding = lambda name: fineweb.load_tokenizer(sys.argv[3])
left, replace = float(sys.argv[2]), os.replace
def replace_or_die(*paths):
    global left
    left -= 1
    if left == -0.5:
        os.kill(os.getpid(), signal.SIGKILL)  # the temporary file is written
    replace(*paths)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)  # the file has its name
os.replace = replace_or_die
sys.exit(fineweb.main(sys.argv[4:]))
"""


def run_killed(arguments, kill_at, fineweb_path="") -> int:
    """Run the program, killed at its kill_at-th file, in (.5) or just after renaming it."""
    command = [sys.executable, "-c", KILLER, str(ROOT), str(kill_at), str(fineweb_path), *arguments]
    return subprocess.run(command, capture_output=True, timeout=120).returncode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_at_any_file_and_run_again_it_ends_with_the_same_bytes(tmp_path, small_batches):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = contents(prepare(path, tmp_path / "whole"))
    arguments = ["--input", str(path), "--tokenizer", "train:300", "--val_fraction", "0.1"]
    arguments += ["--shard_tokens", "1500", "--out_dir", str(tmp_path / "killed")]
    codes = []
    for kill_at in (0.5, 1, 1.5, 2, 2.5, 3, 7.5, 8, 13, 0):
        codes.append(run_killed(arguments, kill_at))
        for shard in (tmp_path / "killed").glob("*.npy"):
            assert shard.read_bytes() == whole[shard.name]
    assert codes.count(-signal.SIGKILL) == 9 and codes[-1] == 0
    assert contents(tmp_path / "killed") == whole


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_fineweb_goes_on_after_the_last_whole_shard(hub, bpe, tmp_path, small_batches, monkeypatch):
    fineweb.save_tokenizer(bpe, hub)  # for the killed process
    fineweb.prepare_fineweb(tmp_path / "whole", shard_tokens=1500)
    arguments = ["--out_dir", str(tmp_path / "killed"), "--shard_tokens", "1500"]
    assert run_killed(arguments, 12.5, hub) == -signal.SIGKILL  # in the second file
    read, read_documents = [], fineweb.FineWeb.documents
    monkeypatch.setattr(
        fineweb.FineWeb, "documents", lambda *args: read.append(1) or read_documents(*args)
    )
    fineweb.prepare_fineweb(tmp_path / "killed", shard_tokens=1500)
    assert len(read) == 2  # the first file was not read again
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_killed_between_its_last_two_steps_it_is_finished(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = contents(out := prepare(path, tmp_path / "out"))
    (out / "progress.json").write_bytes(whole["meta.json"])
    assert fineweb.open_shards(out, "train")
    assert contents(prepare(path, out)) == whole


def test_other_arguments_are_refused_saying_which(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = prepare(path, tmp_path / "out")
    before = contents(out)
    others = {"tokenizer": "train:301", "val_fraction": 0.2, "text_field": "t", "shard_tokens": 9}
    for name, value in others.items():
        with pytest.raises(ValueError, match=rf"{name} .*, now '?{value}"):
            prepare(path, out, **{name: value})
    write_jsonl(path, TEXTS[:-1])
    with pytest.raises(ValueError, match="sizes .*, now"):
        prepare(path, out)
    with pytest.raises(ValueError, match="source .*, now 'stdlib'"):
        fineweb.prepare_stdlib(out)
    (out / "meta.json").rename(out / "progress.json")  # unfinished makes no difference
    with pytest.raises(ValueError, match="source .*, now 'stdlib'"):
        fineweb.prepare_stdlib(out)
    (out / "progress.json").rename(out / "meta.json")
    assert contents(out) == before


def test_shards_of_other_programs_are_not_overwritten(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    np.save(tmp_path / "edufineweb_train_000001.npy", np.zeros(9, np.uint16))
    with pytest.raises(ValueError, match="of another program"):
        prepare(path, tmp_path)


# ----------------------------------------------------------------------- Two at the same time

PREPARE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import fineweb
if sys.argv[2] == "slow":
    def slowly(*args, make_batches=fineweb.make_batches):
        for batch in make_batches(*args):
            print("begun", flush=True)
            time.sleep(0.2)
            yield batch
    fineweb.make_batches = slowly
fineweb.BATCH_CHARS = 2000
sys.exit(fineweb.main(sys.argv[3:]))
"""


def start(pace: str, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-c", PREPARE, str(ROOT), pace, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("killed", [False, True])
def test_two_that_prepare_the_same_folder_both_end_with_the_whole_of_it(
    killed, tmp_path, small_batches
):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:60])
    whole = contents(prepare(path, tmp_path / "whole", val_fraction=0.01))
    arguments = ["--input", str(path), "--tokenizer", "train:300", "--shard_tokens", "1500"]
    arguments += ["--out_dir", str(tmp_path / "out")]
    first = start("slow", arguments)
    while "begun" not in first.stdout.readline():
        pass
    second = start("fast", arguments)
    assert "another process prepares" in second.stdout.readline()
    if killed:
        first.kill()
    out, err = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert second.returncode == 0, err
    assert (first.returncode == 0) == (not killed)
    assert ("finished already" in out) == (not killed)
    assert contents(tmp_path / "out") == whole


def test_many_that_start_at_once_all_end_with_the_whole_of_it(tmp_path, small_batches):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:60])
    whole = contents(prepare(path, tmp_path / "whole", val_fraction=0.01))
    arguments = ["--input", str(path), "--tokenizer", "train:300", "--shard_tokens", "1500"]
    arguments += ["--out_dir", str(tmp_path / "out")]
    started = [start("fast", arguments) for _ in range(4)]
    for process in started:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert contents(tmp_path / "out") == whole


def test_one_that_waits_for_one_that_fails_fails_in_its_turn(tmp_path):
    """The folder disappears while the second waits for it."""
    code = "import fineweb, pathlib, sys, time\n"
    code += "with fineweb.sole_writer(pathlib.Path(sys.argv[1])): print('in', flush=True);"
    code += " time.sleep(float(sys.argv[2]))"
    commands = [[sys.executable, "-c", code, str(tmp_path / "out"), s] for s in ("1", "0")]
    first = subprocess.Popen(commands[0], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    second = subprocess.run(commands[1], cwd=ROOT, capture_output=True, text=True, timeout=60)
    first.communicate(timeout=60)
    assert second.returncode == 0 and second.stdout.endswith("in\n"), second.stderr
    assert not (tmp_path / "out").exists()


def test_a_finished_directory_on_a_disk_that_cannot_be_written_is_left_alone(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(path, tmp_path / "out")
    monkeypatch.setattr(fineweb, "sole_writer", fail("read-only"))
    assert not fineweb.prepare_files([str(path)], tmp_path / "out", tokenizer="train:300",
                                     val_fraction=0.1, shard_tokens=1500)  # fmt: skip


# ----------------------------------------------------------------------------------- Bad input


def test_each_wrong_line_is_named_and_can_be_skipped_and_counted(tmp_path, capsys):
    good = json.dumps({"text": "good " * 50}).encode()
    bad = {
        b"{": "not JSON",
        b"5": "no text under 'text'",
        b'{"txt": "a", "b": 1}': "no text under 'text' .*'txt', 'b'",
        b'{"text": 5}': "no text under 'text'",
        b'{"text": ["a"]}': "no text under 'text'",
        b'{"text": "\xff"}': "not UTF-8",
        b'{"id": "\xff", "text": "a"}': "not UTF-8",
        b'{"text": "\\ud800"}': "surrogates",
        b"[" * 100_000: "not JSON",
    }
    for line, message in bad.items():
        (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, b"", line, good]))
        with pytest.raises(ValueError, match=rf"a.jsonl: line 3 .*{message}.*--skip_bad_lines"):
            prepare(tmp_path / "a.jsonl", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    lines = [good, good.replace(b"good", b"also"), *bad, b'{"text": ""}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    out = prepare(
        tmp_path / "a.jsonl", tmp_path / "out", skip_bad_lines=True, tokenizer="train:257"
    )
    assert sorted(both(out)) == ["also " * 50, "good " * 50]
    skipped = json.loads((out / "meta.json").read_bytes())["skipped"]
    assert skipped == {"bad lines": 9, "empty documents": 1}
    assert "skipped 9 bad lines" in capsys.readouterr().out


def damaged_gzip(path):
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 9999)[:-20])


BAD_FILES = {
    "latin1.txt": (lambda path: path.write_bytes("é".encode("latin-1") * 50), "UTF-8"),
    "surrogate.txt": (lambda path: path.write_bytes(b"a\xed\xa0\x80b"), "UTF-8"),
    "empty.txt": (lambda path: path.write_bytes(b""), "no document"),
    "one.txt": (lambda path: path.write_bytes(b"a"), "single character"),
    "empty.jsonl": (lambda path: path.write_bytes(b'{"text": ""}\n\n'), "no document"),
    "cut.jsonl.gz": (damaged_gzip, "cut.jsonl.gz: .*ended before"),
    "no.jsonl.gz": (lambda path: path.write_bytes(b"a"), "no.jsonl.gz: Not a gzipped file"),
    "quote.csv": (
        lambda path: path.write_text('id,text\n1,"a\n2,b\n'),
        "quote.csv: unexpected end",
    ),
    "header.csv": (lambda path: path.write_text("id,text\n"), "no document"),
    "fields.csv": (lambda path: path.write_bytes(b"text\n\xe9\n"), "fields.csv: .*UTF-8"),
    "object.json": (lambda path: path.write_text('{"data": ["a"]}'), "object.json: no JSON array"),
    "lines.json": (lambda path: path.write_text('{"text": "a"}\n' * 2), "a line is a .jsonl"),
    "number.json": (lambda path: path.write_text('["a", 1]'), "number.json: no JSON array"),
    "half.json": (lambda path: path.write_text('["\\ud800"]'), "half.json: .*surrogates"),
    "deep.json": (lambda path: path.write_text("[" * 10**5), "deep.json: no JSON array"),
    "utf16.txt": (lambda path: path.write_bytes(b"\xff\xfea"), "utf16.txt: .*UTF-8"),
    "mark.txt": (lambda path: path.write_bytes(b"\xef\xbb\xbf"), "no document"),
    "no.txt.gz": (lambda path: path.write_bytes(b"a"), "no.txt.gz: Not a gzipped file"),
    "no.parquet": (lambda path: path.write_bytes(b"a" * 99), "no.parquet: .*[Pp]arquet"),
    "names.parquet": (lambda path: write_parquet(path, ["a"]), "names.parquet: .*text"),
    "book.pdf": (lambda path: path.write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3"), "UTF-8"),
    "missing.txt": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "folder without any"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_in_one_line_and_nothing_is_left(name, tmp_path, capsys):
    make, message = BAD_FILES[name]
    make(tmp_path / name)
    arguments = ["--input", str(tmp_path / name), "--out_dir", str(tmp_path / "out")]
    if name == "names.parquet":
        arguments += ["--text_field", "body"]
        message = "no text under .body. .*among .text."
    assert fineweb.main([*arguments, "--tokenizer", "train:257"]) == 1
    out, err = capsys.readouterr()
    assert re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tokenizer", "train:256"], "257"),
        (["--tokenizer", "train:65537"], "65536"),
        (["--tokenizer", "train:60000"], "60000"),
        (["--tokenizer", "train:"], "gpt2 or train:N"),
        (["--tokenizer", "gpt4"], "gpt2 or train:N"),
        (["--val_fraction", "0"], "between 0 and 1"),
        (["--val_fraction", "1"], "between 0 and 1"),
        (["--separator", ""], "--separator is not empty"),
        (["--input", os.devnull], "no such file or folder"),
    ],
)
def test_a_bad_argument_is_named_in_one_line_and_nothing_is_left(
    options, message, tmp_path, capsys
):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert fineweb.main(["--input", str(path), "--out_dir", str(tmp_path / "out"), *options]) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    ["--input a.txt", "--stdlib --sample b", "--max_tokens 1e9 --text_field c", "--max_tokens 0.5",
     "--workers 0", "--inspect d --stdlib", "--shard_tokens many"],
)  # fmt: skip
def test_arguments_that_do_not_go_together_are_refused(arguments):
    with pytest.raises(SystemExit) as error:
        fineweb.main(arguments.split())
    assert error.value.code == 2


def test_a_full_disk_leaves_whole_shards_to_go_on_from(
    tmp_path, monkeypatch, capsys, small_batches
):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = contents(prepare(path, tmp_path / "whole"))
    arguments = ["--input", str(path), "--tokenizer", "train:300", "--val_fraction", "0.1"]
    arguments += ["--shard_tokens", "1500", "--out_dir", str(tmp_path / "out")]
    fsync, left = os.fsync, [9]

    def fsync_until_full(number):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(os, "fsync", fsync_until_full)
    assert fineweb.main(arguments) == 1
    err = capsys.readouterr().err
    assert "No space left" in err and "cannot write" in err and err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.tmp"))
    shards = [path for path in (tmp_path / "out").iterdir() if path.suffix == ".npy"]
    assert shards and all(whole[path.name] == path.read_bytes() for path in shards)
    monkeypatch.setattr(os, "fsync", fsync)
    assert fineweb.main(arguments) == 0 and contents(tmp_path / "out") == whole


def test_ctrl_c_ends_with_130_and_one_sentence(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(fineweb, "write_shards", interrupt)
    arguments = [
        "--input",
        str(path),
        "--out_dir",
        str(tmp_path / "out"),
        "--tokenizer",
        "train:257",
    ]
    assert fineweb.main(arguments) == 130
    assert (
        capsys.readouterr().err
        == "\nstopped; the same command goes on after the last whole shard\n"
    )


def test_it_runs_where_stdout_is_no_file_as_in_jupyter(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert fineweb.main(["--inspect", str(tmp_path)]) == 1


def interrupt(*args):
    raise KeyboardInterrupt


# --------------------------------------------------------------------- Looking into a directory


def test_inspect_says_what_is_there(tmp_path, capsys):
    out = prepare(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    capsys.readouterr()
    assert fineweb.main(["--inspect", str(out)]) == 0
    said = capsys.readouterr().out
    for split in ("train", "val"):
        shards = fineweb.open_shards(out, split)
        n_tokens = sum(len(ids) for _, ids in shards)
        texts = documents(out, split)
        n_bytes = sum(len(text.encode()) for text in texts)
        for part in (f"{len(shards)} shards", f"{n_tokens:,} tokens", f"{len(texts)} documents",
                     f"{n_bytes / n_tokens:.3f} bytes a token"):  # fmt: skip
            assert part in said
    assert documents(out, "train")[0][:500] in said and "is whole" in said


def rewrite(path: Path, change) -> None:
    ids = np.load(path)
    np.save(path, change(ids))


def with_id(i):
    return lambda ids: np.where(np.arange(len(ids)) == 5, i, ids).astype(ids.dtype)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "with more at its end": lambda path: path.write_bytes(path.read_bytes() + b"a"),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "shortened": lambda path: rewrite(path, lambda ids: ids[:-1]),
    "of another type": lambda path: rewrite(path, lambda ids: ids.astype(np.int32)),
    "with an id beyond the vocabulary": lambda path: rewrite(path, with_id(300)),
    "with one more document": lambda path: rewrite(path, with_id(299)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_inspect_finds_a_shard(damage, tmp_path, capsys):
    out = prepare(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    DAMAGES[damage](out / "text_train_000002.npy")
    capsys.readouterr()
    assert fineweb.main(["--inspect", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def open_or_name(path: Path) -> None:
    """Open a shard. It is a whole row of uint16, or an error of one line names it."""
    try:
        ((_, ids),) = fineweb.open_shards(path.parent, "train")
    except ValueError as e:
        assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
        return
    assert ids.dtype == np.uint16 and ids.ndim == 1
    assert path.read_bytes().endswith(ids.tobytes()) and len(ids)


def test_a_shard_cut_at_any_length_is_named(tmp_path):
    np.save(path := tmp_path / "train_1.npy", np.arange(1000, dtype=np.uint16))
    whole = path.read_bytes()
    for length in (0, 1, *random.Random(0).sample(range(len(whole)), times(50, 1000))):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            fineweb.open_shards(tmp_path, "train")


SIZES = st.integers(-2, 12) | st.sampled_from([2**31, 2**60, 2**63, 2**64, 1.5, "x", None, True])
HEADERS = st.fixed_dictionaries({
    "descr": st.sampled_from(["<u2", ">u2", "<i2", "|u1", "<u8", "<f2", "|O", "|V2", "<U1", "x"]),
    "fortran_order": st.sampled_from([False, True, 0]),
    "shape": st.lists(SIZES, max_size=3).map(tuple) | SIZES,
}).map(str) | st.text(st.characters(max_codepoint=126), max_size=60)  # fmt: skip


def header(*shape):
    return str({"descr": "<u2", "fortran_order": False, "shape": shape})


@example(header(2, 2), 8, b"\1\0")
@example(header(3), 8, b"\1\0")
@given(HEADERS, st.integers(0, 20), st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\t\t"]))
def test_a_file_of_any_header_is_a_shard_or_named(tmp_path, header, n_bytes, version):
    length = len(header).to_bytes(2 if version == b"\1\0" else 4, "little")
    content = b"\x93NUMPY" + version + length + header.encode() + bytes(n_bytes)
    (tmp_path / "train_1.npy").write_bytes(content)
    open_or_name(tmp_path / "train_1.npy")


@example(22, ord("i"))  # signed
@given(st.integers(0, 147), st.integers(0, 255))
def test_a_shard_with_any_byte_replaced_is_a_shard_or_named(tmp_path, at, byte):
    np.save(path := tmp_path / "train_1.npy", np.arange(10, dtype=np.uint16))
    content = bytearray(path.read_bytes())
    content[at] = byte
    path.write_bytes(content)
    open_or_name(path)


@pytest.mark.parametrize("name", ["meta.json", "progress.json"])
@given(data=st.data())
def test_any_record_is_taken_or_refused_in_one_line(name, data, tmp_path, capsys):
    path, out = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20]), tmp_path / "out"
    if not (tmp_path / "whole").exists():
        prepare(path, tmp_path / "whole")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(tmp_path / "whole", out)
    record = json.loads((out / "meta.json").read_bytes())
    if name == "progress.json":  # before the second shard
        (out / "meta.json").unlink()
        position = {"shard": 1, "place": [0, 0], "offset": 1500}
        record["positions"] = {"train": position, "val": position}
    (out / name).write_text(json.dumps(data.draw(broken(record))))
    before = contents(out)
    arguments = ["--input", str(path), "--tokenizer", "train:300", "--val_fraction", "0.1"]
    arguments += ["--shard_tokens", "1500", "--out_dir", str(out)]
    for command in (["--inspect", str(out)], arguments):
        capsys.readouterr()
        if fineweb.main(command):
            err = capsys.readouterr().err
            assert err.startswith("error: ") and err.count("\n") == 1
            assert name == "progress.json" or contents(out) == before
            assert not list(out.glob("*.tmp"))


def test_shards_made_elsewhere_can_be_opened_and_inspected(gpt2, tmp_path, capsys):
    for name in ("edufineweb_train_000001", "val_000000"):
        ids = [gpt2.eot_token, *gpt2.encode("Hello, I'm a language model,")]
        np.save(tmp_path / f"{name}.npy", np.array(ids, dtype=np.uint16))
    assert fineweb.main(["--inspect", str(tmp_path)]) == 0
    assert "Hello, I'm a language model," in capsys.readouterr().out


def test_good_shards_beyond_the_limit_of_open_files_are_not_called_damaged(tmp_path):
    resource = pytest.importorskip("resource")
    for i in range(60):
        np.save(tmp_path / f"train_{i:03}.npy", np.zeros(9, np.uint16))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"train_0\d\d.npy: Too many open files$"):
            fineweb.open_shards(tmp_path, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("what", ["missing", "empty", "unfinished"])
def test_a_directory_without_shards_is_refused(what, tmp_path):
    if what != "missing":
        (tmp_path / "data").mkdir()
    if what == "unfinished":
        np.save(tmp_path / "data/train_000000.npy", np.zeros(9, np.uint16))
        (tmp_path / "data/progress.json").write_text("{}")
    with pytest.raises(ValueError, match="no such folder|no shards|unfinished"):
        fineweb.open_shards(tmp_path / "data", "train")
