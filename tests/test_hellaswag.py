"""What hellaswag.py promises, each promise as a test. Offline, on models and examples made here."""

import copy
import errno
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, RUN, broken
from hypothesis import given
from hypothesis import strategies as st

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, GPTConfig, TrainConfig, Worker

REAL = ROOT.parent / "shared" / "data" / "hellaswag_val_300.jsonl"
SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=256, vocab_size=384)


def make_model(seed: int = 0, **shape) -> GPT:
    """A random model with weights so large that its answers differ from example to example."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SHAPE | shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def make_examples(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    words = ["the", "dog", "runs", "über", "[step]", "東京", "it's", "a", "[title]", "…", "🦜"]

    def text(low, high):
        return " ".join(rng.choices(words, k=rng.randint(low, high))) + f" {rng.random():.2}"

    examples = []
    for _ in range(n):
        a, b = text(1, 9), rng.choice(["", "then", "eine frau"])
        example = dict(activity_label="Playing", ctx_a=a, ctx_b=b, ctx=f"{a} {b}".strip())
        examples.append(
            example | dict(endings=[text(1, 7) for _ in range(4)], label=rng.randint(0, 3))
        )
    return examples


def write_examples(path: Path, examples: list) -> Path:
    path.parent.mkdir(exist_ok=True)
    lines = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in examples]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def score_plainly(model, tokenizer, examples) -> tuple[torch.Tensor, torch.Tensor]:
    """One row for each ending, all logits → nats (N, 4), the two answers (N, 2)."""
    encode, limit = tokenizer.encode_ordinary, model.config.block_size
    nats, means = [], []
    for example in examples:
        for ending in example["endings"]:
            n = len(target := encode(" " + ending))
            ids = torch.tensor((encode(example["ctx"]) + target)[-limit - 1 :])
            with torch.no_grad():
                logits = model(ids[None, :-1])[0, :, : tokenizer.n_vocab]
            nats.append(F.cross_entropy(logits, ids[1:], reduction="none")[-n:].sum().item())
            means.append(nats[-1] / n)
    nats, means = torch.tensor(nats).view(-1, 4), torch.tensor(means).view(-1, 4)
    return nats, torch.stack((nats.argmin(1), means.argmin(1)), 1)


def assert_same_as_plainly(model, tokenizer, examples, **how) -> None:
    nats, right, _ = hellaswag.score(model, tokenizer, examples, Worker(), **how)
    expected, answers = score_plainly(model, tokenizer, examples)
    torch.testing.assert_close(nats.float(), expected, rtol=1e-4, atol=1e-4)
    assert right.tolist() == [
        (answer == example["label"]).tolist()
        for answer, example in zip(answers, examples, strict=True)
    ]
    assert len(answers.unique(dim=0)) > 4 or len(examples) < 30  # else they would say little


def run_ranks(n: int, function) -> list:
    """What function(worker) returns on each of n workers, which are threads here."""
    barrier, told, results = threading.Barrier(n, timeout=30), [None] * n, [None] * n

    class Rank(Worker):
        def gather(self, *values):
            barrier.wait()
            told[self.rank] = [float(value) for value in values]
            barrier.wait()
            return torch.tensor(told, dtype=torch.float64)

    def run(rank):
        results[rank] = function(Rank(rank, n))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(scope="module")
def real():
    if not REAL.exists():
        pytest.skip(f"{REAL} is not here")
    return list(hellaswag.iterate_examples(REAL))


# -------------------------------------------------------------------------------------- Scoring


@pytest.mark.parametrize("seed", range(4))
def test_losses_and_answers_are_those_of_one_row_for_each_ending(seed, tokenizer):
    model = make_model(seed, n_layer=1 + seed)
    assert_same_as_plainly(model, tokenizer, make_examples(60, seed), batch_tokens=700)


@pytest.mark.parametrize("seed", range(3))
def test_answers_to_real_examples_are_those_of_one_row_for_each_ending(seed, gpt2, real):
    model = make_model(seed, vocab_size=50257, n_embd=16)
    assert_same_as_plainly(model, gpt2, real[seed::6])


def test_gpt2_124m_answers_as_with_one_row_for_each_ending(gpt2, real):
    assert_same_as_plainly(make_model(0, **asdict(GPTConfig())), gpt2, real[:3])


def test_no_ending_sees_another(tokenizer):
    model, example = make_model(), make_examples(1)[0]
    other = example | {"endings": [example["endings"][0], "x", "a long one indeed", "🦜🦜"]}
    (a, _, _), (b, _, _) = (
        hellaswag.score(model, tokenizer, [e], Worker()) for e in (example, other)
    )
    assert a[0, 0].item() == pytest.approx(b[0, 0].item(), rel=1e-5)
    assert a[0, 1].item() != pytest.approx(b[0, 1].item(), rel=1e-2)


def test_the_worked_example_of_a_packed_row_is_what_pack_makes():
    def shown(name: str) -> list[int]:
        line = re.search(rf"^ +{name} +([\d ]+)$", hellaswag.pack.__doc__, re.MULTILINE)
        return [int(number) for number in line[1].split()]

    row = hellaswag.pack([10, 11, 12], {0: [20, 21, 22], 1: [30, 31]})
    assert row._asdict() == {name: shown(name) for name in row._fields}
    assert shown("index") == list(range(len(row.tokens)))


def test_the_worked_example_of_a_mask_is_what_make_mask_makes():
    row = hellaswag.pack([10, 11, 12], {0: [20, 21, 22], 1: [30, 31]})
    lines = re.findall(r"^ +(\d\d)((?: +[01])+)$", hellaswag.make_mask.__doc__, re.MULTILINE)
    assert [int(token) for token, _ in lines] == row.tokens
    shown = torch.tensor([[int(number) for number in line.split()] for _, line in lines])
    assert hellaswag.make_mask(torch.tensor([row.parts])).equal(shown.bool()[None, None])


def test_endings_share_a_row_if_they_fit_and_have_their_own_if_not():
    question = hellaswag.Question([1, 2, 3], [[4, 5], [6, 7], [8], [9, 10]], [2, 2, 1, 2])
    questions = [question, question]
    assert [row.tokens for row in hellaswag.make_rows(questions, 6)] == 2 * [[1, 2, 3, 4, 6, 9]]
    rows = hellaswag.make_rows(questions, 5)
    assert [row.tokens for row in rows] == 2 * [[1, 2, 3, 4], [1, 2, 3, 6], [1, 2, 3], [1, 2, 3, 9]]
    assert [number for row in rows for number in row.numbers] == [
        0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7
    ]  # fmt: skip


def test_rows_of_a_batch_have_similar_lengths_and_batches_come_in_one_random_order():
    rng = random.Random(1)
    rows = [hellaswag.pack([0] * rng.randint(1, 300), {0: [0]}) for _ in range(200)]
    batches = hellaswag.make_batches(rows, 600)
    spans = [(len(batch[0].tokens), len(batch[-1].tokens)) for batch in batches]
    ordered = sorted(spans)
    assert all(high <= low for (_, high), (low, _) in zip(ordered, ordered[1:], strict=False))
    assert spans != ordered and spans != ordered[::-1]
    assert hellaswag.make_batches(rows, 600) == batches
    assert sorted(map(len, hellaswag.make_batches(rows[:5], 1))) == [1] * 5  # too long, so alone


def test_a_cpu_reads_512_tokens_at_once_and_another_device_16384(tokenizer, monkeypatch):
    limits = []
    monkeypatch.setattr(
        hellaswag, "make_batches", lambda rows, batch_tokens: limits.append(batch_tokens) or []
    )
    for name in ("cpu", "cuda"):
        hellaswag.score(
            make_model(), tokenizer, make_examples(1), Worker(device=torch.device(name))
        )
    assert limits == [512, 16384]


def test_scoring_keeps_no_gradients(tokenizer):
    model, grad_modes = make_model(), []
    model.transformer.wte.register_forward_hook(
        lambda *_: grad_modes.append(torch.is_grad_enabled())
    )
    nats, _, _ = hellaswag.score(model, tokenizer, make_examples(3), Worker())
    assert grad_modes and not any(grad_modes) and not nats.requires_grad


def test_a_worker_in_bf16_finds_nearly_the_losses_of_fp32(tokenizer):
    model, examples = make_model(), make_examples(10)
    exact = hellaswag.score(model, tokenizer, examples, Worker())[0]
    nats = hellaswag.score(model, tokenizer, examples, Worker(dtype=torch.bfloat16))[0]
    assert not nats.equal(exact)
    torch.testing.assert_close(nats, exact, rtol=0.05, atol=0)


def test_the_bar_counts_whole_examples_and_ends_with_the_result(tokenizer, monkeypatch):
    model, examples, numbers = make_model(block_size=40), make_examples(30), set()
    whole, counts, texts = [], [], []  # after each batch
    token_losses = hellaswag.token_losses

    def record(model, rows, n_vocab):
        numbers.update(number for row in rows for number in row.numbers)
        whole.append(sum(all(4 * i + k in numbers for k in range(4)) for i in range(30)))
        return token_losses(model, rows, n_vocab)

    def update(n: int) -> None:
        bar.n += n
        counts.append(bar.n)

    bar = SimpleNamespace(n=0, set_postfix_str=texts.append, update=update)
    monkeypatch.setattr(hellaswag, "token_losses", record)
    result = hellaswag.evaluate(model, tokenizer, examples, Worker(), 100, bar=bar)
    assert counts == whole and counts[-1] == 30 and len(set(counts)) > 5
    shown = "acc {hellaswag_acc:.4f}, acc_norm {hellaswag_acc_norm:.4f}".format(**result)
    assert texts[-1] == shown
    for text, n in zip(texts, counts, strict=True):
        for share in re.findall(r"\d\.\d+", text):  # before the first example is done: nan
            right = float(share) * n
            assert right == pytest.approx(round(right), abs=1e-4 * n)  # of those that are done


def test_a_batch_has_at_most_batch_tokens_and_its_size_changes_no_loss(tokenizer):
    model, examples, sizes, rows = make_model(), make_examples(40), [], []
    model.transformer.wte.register_forward_hook(lambda _, args, out: sizes.append(args[0].numel()))
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    whole = hellaswag.score(model, tokenizer, examples, Worker(), batch_tokens=2**20)[0]
    assert len(sizes) == 1 and sum(rows) < sum(sizes)
    for limit in (300, 1000, 3000):
        sizes.clear()
        nats = hellaswag.score(model, tokenizer, examples, Worker(), batch_tokens=limit)[0]
        assert max(sizes) <= limit and len(sizes) > 1
        torch.testing.assert_close(nats, whole, rtol=1e-5, atol=1e-4)


def test_logits_are_made_for_a_bounded_number_of_places_at_once(tokenizer, monkeypatch):
    model, rows = make_model(vocab_size=2**18), []
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    monkeypatch.setattr(type(tokenizer), "n_vocab", 2**18)
    hellaswag.score(model, tokenizer, make_examples(8), Worker(), batch_tokens=2**20)
    assert max(rows) == 2**26 // 2**18 and len(rows) > 1


def test_two_workers_find_what_one_finds(tokenizer):
    model, examples = make_model(), make_examples(31)

    def evaluate(worker):
        return hellaswag.evaluate(copy.deepcopy(model), tokenizer, examples, worker)

    (alone,) = run_ranks(1, evaluate)
    assert run_ranks(2, evaluate) == [alone, alone]
    assert run_ranks(40, evaluate) == [alone] * 40  # some have nothing to do


def test_figures_are_shares_of_right_answers_with_their_standard_errors(tokenizer):
    model, examples = make_model(), make_examples(40)
    _, answers = score_plainly(model, tokenizer, examples)
    result = hellaswag.evaluate(model, tokenizer, examples, Worker())
    for i, key in enumerate(("hellaswag_acc", "hellaswag_acc_norm")):
        p = sum(answers[n, i].item() == e["label"] for n, e in enumerate(examples)) / 40
        assert result[key] == p and 0 < p < 1
        assert result[f"{key}_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 39))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_and_scored_without_dropout(training, tokenizer):
    model, examples = make_model(dropout=0.5).train(training), make_examples(5)
    nats = hellaswag.score(model, tokenizer, examples, Worker())[0]
    assert model.training is training
    expected = score_plainly(model.eval(), tokenizer, examples)[0]
    torch.testing.assert_close(nats.float(), expected, rtol=1e-4, atol=1e-4)


def test_too_long_examples_lose_text_on_the_left_and_are_counted(tokenizer, capsys):
    model, examples = make_model(block_size=64), make_examples(30, seed=1)
    examples[7]["ctx"] = "the dog runs " * 50
    assert_same_as_plainly(model, tokenizer, examples)
    models = iter([model, copy.deepcopy(model)])
    run_ranks(2, lambda worker: hellaswag.evaluate(next(models), tokenizer, examples, worker))
    questions = [hellaswag.render_example(example, tokenizer) for example in examples]
    read = [len(q.context) + max(len(ending) for ending in q.endings) - 1 for q in questions]
    n = sum(tokens > 64 for tokens in read)
    assert 0 < n < 30
    assert (
        capsys.readouterr().out
        == f"HellaSwag: {n} of 30 examples exceed block_size=64: cut to fit\n"
    )
    for block_size, n_long in ((read[0], 0), (read[0] - 1, 1)):
        model = make_model(block_size=block_size)
        assert hellaswag.score(model, tokenizer, examples[:1], Worker())[2] == n_long


def test_an_ending_longer_than_the_model_can_read_stops_nothing(tokenizer):
    example = make_examples(1)[0]
    example["endings"][2] = "the dog runs " * 50
    nats, _, n_long = hellaswag.score(make_model(block_size=32), tokenizer, [example], Worker())
    assert n_long == 1 and nats.isfinite().all() and nats.min() > 0


def test_an_empty_context_is_the_start_of_a_text(tokenizer):
    example = make_examples(1)[0] | dict(ctx="", activity_label="[", ctx_a="]", ctx_b="")
    for harness in (False, True):  # which removes what stands between brackets
        question = hellaswag.render_example(example, tokenizer, harness)
        assert question.context == [tokenizer.eot_token]
        texts = [tokenizer.decode(ending).strip() for ending in question.endings]
        clean = hellaswag.clean if harness else str
        assert texts == [clean(ending).strip() for ending in example["endings"]]


def test_rows_without_a_token_in_a_padded_vocabulary_do_not_count(tokenizer):
    model, examples = make_model(vocab_size=384), make_examples(5)
    before = hellaswag.score(model, tokenizer, examples, Worker())[0]
    with torch.no_grad():
        model.lm_head.weight[tokenizer.n_vocab :] = 10
    assert hellaswag.score(model, tokenizer, examples, Worker())[0].equal(before)


# ---------------------------------------------------------------------- The text of the harness

# What lm-evaluation-harness 0.4.13 makes of them.
CLEANED = {
    "[header] How to win [title] Run. [step] Now.": " How to win. Run. Now.",
    "[title] Run": " Run",
    "a [title]b": "a. b",
    " two  spaces   and [a] [b] gone ": "two spaces  and  gone",
    "never [closed": "never [closed",
    "[over\nlines] stays": "[over\nlines] stays",
    "é [é] ß": "é ß",
    "x [step]": "x ",
}


@pytest.mark.parametrize("text", CLEANED)
def test_text_is_cleaned_as_the_harness_cleans_it(text):
    assert hellaswag.clean(text) == CLEANED[text]


def test_the_harness_reads_activity_and_capital_and_divides_by_characters(tokenizer):
    example = dict(
        activity_label="Žonglování", ctx_a="A man is in a park.", ctx_b="ößER Nu [step]", label=1,
        endings=["runs [title] Fast", "🦜 東京", "[substeps] a", "a  b"], ctx="not this",
    )  # fmt: skip
    context, endings, lengths = hellaswag.render_example(example, tokenizer, harness=True)
    assert tokenizer.decode(context) == "Žonglování: A man is in a park. Ößer nu"
    # The space that a marker leaves behind the context is read with the ending.
    assert [tokenizer.decode(e) for e in endings] == ["  runs. Fast", "  🦜 東京", "   a", "  a b"]
    assert lengths == [10, 4, 2, 3]  # characters, not bytes, and without the spaces in front
    question = hellaswag.render_example(example, tokenizer)
    assert tokenizer.decode(question.context) == "not this"
    assert tokenizer.decode(question.endings[0]) == " runs [title] Fast"
    assert question.lengths == [len(ending) for ending in question.endings]


def test_one_example_alone_has_a_figure_and_no_error(tokenizer):
    result = hellaswag.evaluate(make_model(), tokenizer, make_examples(1), Worker())
    assert result["hellaswag_acc"] in (0, 1) and result["hellaswag_acc_stderr"] == 0


def test_both_ways_of_scoring_compare_sums_and_sums_by_length(tokenizer):
    model, examples = make_model(), make_examples(30)
    for harness, name in ((False, "hellaswag"), (True, "harness")):
        nats = hellaswag.score(model, tokenizer, examples, Worker(), harness=harness)[0].tolist()
        result = hellaswag.evaluate(model, tokenizer, examples, Worker(), harness=harness)
        assert [*result] == [f"{name}_acc{end}" for end in ("", "_stderr", "_norm", "_norm_stderr")]
        hits = [0, 0]
        for example, losses in zip(examples, nats, strict=True):
            lengths = hellaswag.render_example(example, tokenizer, harness).lengths
            means = [loss / length for loss, length in zip(losses, lengths, strict=True)]
            hits[0] += losses.index(min(losses)) == example["label"]
            hits[1] += means.index(min(means)) == example["label"]
        assert [result[f"{name}_acc"], result[f"{name}_acc_norm"]] == [hit / 30 for hit in hits]


# ---------------------------------------------------------------------------------------- Data


def without(field: str) -> dict:
    return {key: value for key, value in make_examples(1)[0].items() if key != field}


BAD = {
    "line 2, is not HellaSwag: no JSON object": ["{}", "[1, 2]", '"text"', "{", "", "[" * 10**5],
    "line 2, is not HellaSwag: no 'activity_label'": [without("activity_label")],
    "line 2, is not HellaSwag: no 'ctx_a'": [without("ctx_a")],
    "line 2, is not HellaSwag: no 'ctx'": [without("ctx"), without("") | {"ctx": None}],
    "line 2, is not HellaSwag: no 'endings'": [without("endings"), without("") | {"endings": "a"}],
    "line 2, is not HellaSwag: no 'label' (the test split has none: use val)": [without("label")],
    "line 2, is not HellaSwag: 'endings' are not four texts that are not empty": [
        without("") | {"endings": endings}
        for endings in ([], ["a"] * 3, ["a"] * 5, ["a", "", "c", "d"], [" "] * 4, [1] * 4)
    ],
    "line 2, is not HellaSwag: 'label' is 4, not 0 to 3": [without("") | {"label": 4}],
    "line 2, is not HellaSwag: 'label' is -1, not 0 to 3": [without("") | {"label": -1}],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_line_that_is_no_example_is_named_with_what_it_lacks(message, tmp_path):
    for line in BAD[message][message.endswith("no JSON object") :]:
        path = write_examples(tmp_path / "bad.jsonl", [*make_examples(1), line])
        with pytest.raises(ValueError) as caught:
            list(hellaswag.iterate_examples(path))
        assert str(caught.value) == f"{path}, {message}"


LINES = broken(make_examples(1)[0]).map(lambda value: json.dumps(value).encode())


@given(LINES | st.binary(max_size=50))
def test_any_line_is_an_example_that_can_be_scored_or_named_in_one_line(tmp_path, tokenizer, line):
    (tmp_path / "any.jsonl").write_bytes(line)
    try:
        examples = list(hellaswag.iterate_examples(tmp_path / "any.jsonl"))
    except ValueError as e:
        assert str(e).startswith(str(tmp_path / "any.jsonl")) and "\n" not in str(e)
        return
    assert examples[0]["label"] in range(4)
    for harness in (False, True):
        nats, _, _ = hellaswag.score(make_model(), tokenizer, examples, Worker(), harness=harness)
        assert nats.isfinite().all()


def test_an_empty_file_and_one_that_is_no_text_are_told(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty is empty"):
        list(hellaswag.iterate_examples(tmp_path / "empty"))
    (tmp_path / "zip").write_bytes(b"PK\x03\x04\xff\xfe\n")
    with pytest.raises(ValueError, match="line 1, is not HellaSwag: no JSON object"):
        list(hellaswag.iterate_examples(tmp_path / "zip"))


def test_a_context_without_a_second_part_may_leave_it_out(tmp_path):
    path = write_examples(tmp_path / "a.jsonl", [without("ctx_b")])
    assert [e["ctx_b"] for e in hellaswag.iterate_examples(path)] == [""]


@pytest.fixture
def site(sandbox, monkeypatch):
    """The site that examples are downloaded from: answers what site.answers says, in turn."""

    class Site(BaseHTTPRequestHandler):
        answers: list = []
        asked: list = []

        def do_GET(self):
            self.asked.append(self.path)
            status, body, length = self.answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    Site.answers, Site.asked = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/data")
    monkeypatch.setattr(hellaswag, "SPLITS", {"val": 20})
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield Site
    server.shutdown()
    server.server_close()


def body(n: int) -> bytes:
    return "\n".join(map(json.dumps, make_examples(n))).encode()  # no newline at the end: 20 lines


OK, MISSING = (200, body(20), None), (404, b"not here", None)
LONG = (200, body(21), None)
SHORT, CUT, BROKEN = (200, body(19), None), (200, body(20), 10**6), (500, b"", None)


def test_a_download_is_tried_again_and_done_once(site):
    site.answers[:] = [BROKEN, CUT, OK]
    assert list(hellaswag.iterate_examples("val")) == make_examples(20)
    assert list(hellaswag.iterate_examples("val")) == make_examples(20)
    assert site.asked == ["/data/hellaswag_val.jsonl"] * 3
    assert [path.name for path in Path("hellaswag").iterdir()] == ["hellaswag_val.jsonl"]


@pytest.mark.parametrize(
    "answer, reason",
    [
        (MISSING, "404"),
        (BROKEN, "500"),
        (SHORT, "19 lines came, not 20"),
        (LONG, "21 lines came, not 20"),
        (CUT, "IncompleteRead"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_why(answer, reason, site):
    site.answers[:] = [answer] * 3
    with pytest.raises(OSError, match=rf"(?s)cannot download http.*{reason}.*by hand"):
        list(hellaswag.iterate_examples("val"))
    assert not list(Path().rglob("*val*"))


def test_a_download_waits_before_it_is_tried_again_and_for_no_answer_half_a_minute(
    site, monkeypatch
):
    waits, timeouts, urlopen = [], [], hellaswag.urllib.request.urlopen
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(
        "urllib.request.urlopen",
        lambda url, timeout=None: timeouts.append(timeout) or urlopen(url, timeout=timeout),
    )
    site.answers[:] = [BROKEN, BROKEN, OK]
    hellaswag.download("val")
    assert waits == [0, 2, 4] and timeouts == [30] * 3  # s


def test_a_full_disk_leaves_no_part_of_a_download(site, monkeypatch):
    names = []

    def full(file_descriptor: int) -> None:
        names.extend(path.name for path in Path("hellaswag").iterdir())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    site.answers[:] = [OK] * 3
    with pytest.raises(OSError, match="No space left"):
        hellaswag.download("val")
    # Until it is whole, it has a name that no other process uses.
    assert names == [f"hellaswag_val.jsonl.{os.getpid()}.tmp"]
    assert len(site.asked) == 1 and not list(Path("hellaswag").iterdir())


def test_each_of_two_machines_downloads_once_and_each_worker_reads_once(monkeypatch):
    rank, disks, downloads, reads = threading.local(), {0: [], 1: []}, [], []

    def iterate(split: str) -> list:
        machine = rank.number // 2  # each has its own disk
        reads.append(rank.number)
        if not disks[machine]:
            downloads.append(rank.number)
            time.sleep(0.1)  # long enough that another one that may would start as well
            disks[machine] = make_examples(20)
        return disks[machine]

    def environ(key: str, default: str | None = None) -> str | None:
        return str(rank.number % 2) if key == "LOCAL_RANK" else default

    def load(worker: Worker) -> list:
        rank.number = worker.rank
        return hellaswag.load_examples(worker)

    monkeypatch.setattr(hellaswag, "SPLITS", {"val": 20})
    monkeypatch.setattr(hellaswag, "iterate_examples", iterate)
    monkeypatch.setattr(hellaswag, "os", SimpleNamespace(environ=SimpleNamespace(get=environ)))
    assert run_ranks(4, load) == [make_examples(20)] * 4
    assert downloads == [0, 2] and sorted(reads) == [0, 1, 2, 3]


def test_all_workers_get_the_examples_of_one_download(site, capsys):
    site.answers[:] = [OK]
    assert run_ranks(3, hellaswag.load_examples) == [make_examples(20)] * 3
    assert len(site.asked) == 1 and capsys.readouterr().out == ""


def test_all_workers_go_without_when_the_download_fails_and_one_line_says_so(site, capsys):
    site.answers[:] = [MISSING] * 3
    assert run_ranks(3, hellaswag.load_examples) == [[], [], []]
    assert len(site.asked) == 3
    out = capsys.readouterr().out
    assert out.startswith("going on without HellaSwag: cannot download") and out.count("\n") == 1


def test_all_workers_go_without_when_one_of_them_cannot_read_the_examples(
    site, capsys, monkeypatch
):
    write_examples(Path("hellaswag/hellaswag_val.jsonl"), make_examples(20))
    read = hellaswag.iterate_examples

    def iterate(split):
        if threading.current_thread().name == "unlucky":
            raise OSError("no disk")
        return read(split)

    monkeypatch.setattr(hellaswag, "iterate_examples", iterate)

    def load(worker):
        threading.current_thread().name = "unlucky" if worker.rank == 2 else "other"
        return hellaswag.load_examples(worker)

    assert run_ranks(3, load) == [[], [], []]
    assert capsys.readouterr().out == "going on without HellaSwag: no disk\n"


def test_no_network_is_one_line_and_no_error(site, capsys, monkeypatch):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9")
    assert hellaswag.load_examples(Worker()) == []
    assert "going on without HellaSwag: cannot download" in capsys.readouterr().out


def test_a_split_that_is_not_whole_is_told(site, capsys):
    write_examples(Path("hellaswag/hellaswag_val.jsonl"), make_examples(7))
    assert len(hellaswag.load_examples(Worker())) == 7
    assert capsys.readouterr().out == "HellaSwag: 7 of val's 20 examples\n"


# ---------------------------------------------------------------- In training; the command line


def test_a_run_logs_both_figures_at_each_evaluation(sandbox, data_dir, tokenizer):
    write_examples(Path("hellaswag/hellaswag_val.jsonl"), make_examples(20))
    model = GPT(GPTConfig(**SHAPE))
    how = RUN | dict(
        max_steps=2, eval_every=1, hellaswag="on", data_dir=str(data_dir), log_dir="log"
    )
    Path("log").mkdir()
    train_gpt2.train(model, TrainConfig(**how))
    logged = [r for r in train_gpt2.read_log("log") if "val_loss" in r]
    assert len(logged) == 3 and all(0 <= r["hellaswag_acc"] <= 1 for r in logged)
    expected = hellaswag.evaluate(model, tokenizer, make_examples(20), Worker())
    assert expected.items() <= logged[-1].items()


@pytest.fixture
def checkpoint(sandbox, tokenizer) -> Path:
    """A run's folder, with a tokenizer of its own."""
    folder, model = Path("run"), make_model()
    folder.mkdir()
    fineweb.save_tokenizer(tokenizer, folder)
    train_gpt2.save_checkpoint(folder, 1, 5, config=asdict(model.config), model=model.state_dict())
    return folder


def test_the_command_line_shows_all_figures_beside_the_published_ones(
    checkpoint, tokenizer, capsys
):
    examples = make_examples(30)
    path = write_examples(Path("my.jsonl"), examples)
    how = ["--limit", "20", "--precision", "fp32", "--device", "cpu"]
    hellaswag.main(["--model", str(checkpoint), "--data", str(path), *how])
    out, err = capsys.readouterr()
    assert "20/20" in err and "acc_norm" in err  # the progress bar
    assert out.startswith("20 examples on cpu in torch.float32")
    lines, model, figures = out.splitlines(), make_model(), {}
    for harness in (False, True):  # with the tokenizer that the model was trained with
        figures |= hellaswag.evaluate(model, tokenizer, examples[:20], Worker(), harness=harness)
    shown = [f"{value:.4f}".lstrip("0") for value in figures.values()]
    header, *published = hellaswag.PUBLISHED.splitlines()
    table = lines[lines.index(header) :]
    assert table[3:] == published
    assert table[1].split() == ["this", "model,", "20", "examples", *shown[::2]]
    assert table[2].split() == ["standard", "error", *shown[1::2]]


def test_published_figures_are_those_of_the_sources():
    figures = re.findall(r"\.\d{3,4}\b", hellaswag.PUBLISHED.split("(")[0])
    assert figures == ".2859 .2955 .2892 .3114 .3842 .4893 .4004 .5089 .337".split()


def test_the_first_examples_are_shown_with_the_losses_of_their_endings(
    checkpoint, tokenizer, capsys
):
    examples = make_examples(5)
    path = write_examples(Path("my.jsonl"), examples)
    hellaswag.main(["--model", str(checkpoint), "--data", str(path), "--precision", "fp32"])
    blocks = capsys.readouterr().out.split("\n\n")[1:4]
    nats, _ = score_plainly(make_model(), tokenizer, examples[:3])
    for example, block, losses in zip(examples[:3], blocks, nats.tolist(), strict=True):
        context, *lines = block.splitlines()
        assert context == example["ctx"]
        lengths = hellaswag.render_example(example, tokenizer).lengths
        means = [loss / length for loss, length in zip(losses, lengths, strict=True)]
        for k, line in enumerate(lines):
            best = ["<" if c[k] == min(c) else " " for c in (losses, means)]
            true = "*" if k == example["label"] else " "
            ending = example["endings"][k]
            assert line == f"{losses[k]:8.2f}{best[0]}{means[k]:8.2f}{best[1]} {true} {ending}"


def test_flags_reach_the_scoring(checkpoint, monkeypatch, capsys):
    path, calls = write_examples(Path("my.jsonl"), make_examples(4)), []
    make_batches = hellaswag.make_batches
    monkeypatch.setattr(
        hellaswag, "make_batches",
        lambda rows, batch_tokens: calls.append(batch_tokens) or make_batches(rows, batch_tokens),
    )  # fmt: skip
    how = ["--batch_tokens", "77", "--device", "cpu"]
    for precision, dtype in (("bf16", "torch.bfloat16"), ("fp32", "torch.float32")):
        calls.clear()
        hellaswag.main(
            ["--model", str(checkpoint), "--data", str(path), *how, "--precision", precision]
        )
        assert calls == [512, 77, 77]  # the first examples, then both ways of scoring
        assert f"on cpu in {dtype};" in capsys.readouterr().out


def test_a_terminal_that_lacks_a_character_stops_nothing(checkpoint, monkeypatch):
    path = write_examples(Path("my.jsonl"), [make_examples(1)[0] | {"ctx": "東京"}])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    hellaswag.main(["--model", str(checkpoint), "--data", str(path)])
    sys.stdout.flush()
    assert rb"\u6771\u4eac" in sys.stdout.buffer.getvalue()


def test_help_ends_with_the_published_figures(capsys):
    with pytest.raises(SystemExit) as caught:
        hellaswag.main(["--help"])
    assert not caught.value.code
    assert capsys.readouterr().out.endswith(f"{hellaswag.PUBLISHED}\n")


def test_the_file_alone_can_be_imported_and_says_that_train_gpt2_is_missing(sandbox):
    shutil.copy(ROOT / "hellaswag.py", sandbox)
    done = subprocess.run([sys.executable, "hellaswag.py"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: No module named 'train_gpt2'\n"


def test_what_cannot_be_scored_is_one_line_and_exit_status_1(checkpoint, site, gpt2, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = str(write_examples(Path("good.jsonl"), make_examples(3)))
    bad = str(write_examples(Path("bad.jsonl"), ["{}"]))
    site.answers[:] = [MISSING] * 3
    Path("empty.jsonl").touch()
    for arguments, message in [
        (["--model", "no/such"], "error: no GPT-2 .*'no/such'"),
        (["--model", "no.pt"], "error: no.pt is damaged"),
        (["--data", bad], "error: bad.jsonl, line 1, is not HellaSwag: no 'activity_label'"),
        (["--data", "empty.jsonl"], "error: empty.jsonl is empty"),
        (["--data", "none.jsonl"], "error: .*No such file.*none.jsonl"),
        (["--data", "val"], "error: cannot download .*404"),
        (["--limit", "0"], "error: --limit 0"),
        (["--batch_tokens", "0"], "error: --batch_tokens 0"),
        (["--limit", "x"], "error: argument --limit: invalid int value"),
    ]:
        with pytest.raises(SystemExit, match=message) as caught:
            hellaswag.main(["--model", str(checkpoint), "--data", good, *arguments])
        assert "\n" not in str(
            caught.value.code
        )  # a text: Python prints it and exits with status 1
