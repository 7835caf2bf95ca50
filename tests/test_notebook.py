"""play.ipynb: it runs whole and in any order, and every assert of it fails on some broken model."""

import ast
import builtins
import contextlib
import copy
import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from nbclient import NotebookClient
from torch import nn

import fineweb
import play
import train_gpt2

NOTEBOOK = nbformat.read(ROOT / "play.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TINY = [
    "--n_layer=2", "--n_embd=64", "--max_steps=10", "--warmup_steps=2", "--eval_every=10",
    "--val_tokens=4096", "--total_batch_size=1024", "--micro_batch_size=8",
]  # fmt: skip


def is_setup(cell) -> bool:
    return "setup" in cell.metadata.get("tags", [])


def with_phrase(phrase: str) -> str:
    """The one cell that has it."""
    (source,) = (cell.source for cell in CODE if phrase in cell.source)
    return source


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Executes the notebook offline, in an empty folder, where it trains a tiny model. After the
    first two code cells, the others run from the last to the first. Another thread waits for it."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "assets").mkdir()
    for name in ("ablations.json", "life.html"):
        shutil.copy(ROOT / "assets" / name, folder / "assets")
    notebook = copy.deepcopy(NOTEBOOK)
    setup = [cell for cell in notebook.cells if is_setup(cell)]
    setup[0].source = setup[0].source.replace("FLAGS = []", f"FLAGS = {TINY}")
    setup[0].source += "\nopen('ready', 'w').close()"
    others = [cell for cell in notebook.cells if cell.cell_type == "code" and not is_setup(cell)]
    notebook.cells = [*setup, *reversed(others)]
    env = dict(HF_HUB_OFFLINE="1", HTTPS_PROXY="http://127.0.0.1:9", PYTHONPATH=str(ROOT))
    env |= dict(OMP_NUM_THREADS="1")  # more would wait for each other
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        for name, value in env.items():
            patch.setenv(name, value)
        resources = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, timeout=900, startup_timeout=300, resources=resources)
        yield folder, pool.submit(client.execute)


@pytest.fixture(scope="module")
def executed(running):
    """The folder, and the notebook with its outputs; or the first error of a cell."""
    folder, execution = running
    return folder, execution.result()


def pictures(notebook) -> list:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


# ------------------------------------------------------------------------------ Its form


def names(source: str, context: type) -> set[str]:
    found = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name | ast.arg)
             and isinstance(getattr(n, "ctx", None), context)}  # fmt: skip
    if context is ast.Store:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.arguments):
                found |= {arg.arg for arg in (*node.args, *node.kwonlyargs)}
            elif isinstance(node, ast.ExceptHandler) and node.name:
                found.add(node.name)
    return found


def test_no_cell_needs_a_name_of_another_but_of_the_first_two_and_none_changes_those():
    shared = set().union(*(names(cell.source, ast.Store) for cell in CODE if is_setup(cell)))
    for cell in CODE[2:]:
        own = names(cell.source, ast.Store)
        assert not own & shared, cell.source
        assert not names(cell.source, ast.Load) - own - shared - set(dir(builtins)), cell.source


def test_the_first_idea_comes_with_the_third_cell():
    assert NOTEBOOK.cells[2].source == "look.show(SENTENCE)"
    assert all(map(is_setup, CODE[:2])) and not any(map(is_setup, CODE[2:]))


def test_no_cell_has_more_than_a_dozen_lines():
    for cell in CODE:
        assert len([line for line in cell.source.splitlines() if line.strip()]) <= 12, cell.source


def test_every_section_but_the_first_cells_has_two_exercises_with_folded_solutions():
    text = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
    for section in text.split("\n## ")[1:]:
        assert section.count("**Predict, then run.**") == section.count("**Break it.**") == 1
        assert section.count("<details><summary>Solution</summary>") == 2, section[:40]


def test_every_picture_says_what_is_seen_on_it():
    for output in pictures(NOTEBOOK):
        assert len(output.metadata["image/png"]["alt"]) > 30


# ---------------------------------------------------------------- Its claims, on broken models


class WrongTokenizer(SimpleNamespace):
    """Reads every text as capital letters, and single bytes as other ones."""

    def __init__(self, tokenizer):
        super().__init__(n_vocab=tokenizer.n_vocab, eot_token=tokenizer.eot_token)
        self.encode = lambda text, **how: list(text.upper().encode())
        self.decode = lambda ids: bytes(i % 256 for i in ids).decode("latin-1")
        self.encode_ordinary = self.encode
        self.encode_single_token = lambda token: tokenizer.encode_single_token(token) + 1
        self.decode_single_token_bytes = tokenizer.decode_single_token_bytes


def tokenizer_of_capitals(space, patch):
    space["tokenizer"] = WrongTokenizer(space["tokenizer"])


def cut_at_spaces_only(space, patch):
    patch.setattr(fineweb, "PATTERN", r"\S+|\s+")


def no_merge(space, patch):
    patch.setattr(play, "join_pair", lambda parts, pair: tuple(parts))
    patch.setattr(play, "merge_stages", lambda tokenizer, word: [[bytes([b]) for b in b"word"]])


def gpt2_tokenizer_of_a_walkthrough(space, patch):
    wrong = SimpleNamespace(encode=lambda text: [2343], decode=lambda ids: "?", n_vocab=50257)
    patch.setattr(play, "gpt2_tokenizer", lambda: wrong)


def next_row_of_wte(space, patch):
    wte = space["model"].transformer.wte
    patch.setattr(wte, "forward", lambda idx: wte.weight[(idx + 1) % len(wte.weight)])


def embeddings_doubled(space, patch):
    patch.setattr(space["model"].transformer.drop, "forward", lambda x: 2 * x)


def no_mean_taken_off(space, patch):
    ln = space["model"].transformer.h[-1].ln_1
    patch.setattr(ln, "forward", lambda x: F.rms_norm(x, x.shape[-1:]) * ln.weight + ln.bias)


def positions_in_the_model_without(space, patch):
    patch.setattr(play, "NoPositions", train_gpt2.GPT)


def plain_stack_with_residuals(space, patch):
    patch.setattr(play, "Bare", train_gpt2.Block)
    patch.setattr(play, "NoResidual", train_gpt2.Block)


def positions_without_end(space, patch):
    wpe = space["model"].transformer.wpe
    patch.setattr(train_gpt2, "require", lambda *args: None)
    patch.setattr(wpe, "forward", lambda pos: wpe.weight[pos % len(wpe.weight)])


def always_the_least_likely(space, patch):
    patch.setattr(train_gpt2, "sample", lambda logits, **how: logits.argmin(dim=1, keepdim=True))


def cache_of_zeros(space, patch):
    extend = train_gpt2.KVCache.extend
    patch.setattr(train_gpt2.KVCache, "extend", lambda *a: tuple(kv.flip(-1) for kv in extend(*a)))
    for block in space["model"].transformer.h:  # enlarged, so that attention decides
        patch.setattr(block.attn.c_proj.weight, "data", 50 * block.attn.c_proj.weight.data)


def never_stops(space, patch):
    generate = train_gpt2.GPT.generate

    def broken(self, idx, n, stop=None, *args, **how):
        return generate(self, idx, n, None, *args, **how)

    patch.setattr(train_gpt2.GPT, "generate", broken)


def loss_is_a_sum(space, patch):
    loss = train_gpt2.ChunkedLoss.apply
    patch.setattr(train_gpt2.ChunkedLoss, "apply", lambda x, w, y, _: loss(x, w, y, _) * y.numel())


def cross_entropy_is_a_sum(space, patch):
    plain = F.cross_entropy
    patch.setattr(F, "cross_entropy", lambda z, y, **how: plain(z, y, **how) * y.numel())


def mlp_of_2c(space, patch):
    patch.setattr(train_gpt2, "MLP", play.MLPOf2C)
    block = space["model"].transformer.h[0]
    patch.setitem(block._modules, "mlp", play.MLPOf2C(space["model"].config))


def large_init(space, patch):
    init = train_gpt2.GPT.init_weights

    def broken(self):
        init(self)
        self.transformer.wte.weight.data *= 3

    patch.setattr(train_gpt2.GPT, "init_weights", broken)


def unscaled_init_is_scaled(space, patch):
    patch.setattr(play, "UnscaledInit", train_gpt2.GPT)


def dropout_halves(space, patch):
    patch.setattr(F, "dropout", lambda x, *_, **__: x / 2)


def dropout_never_off(space, patch):
    patch.setattr(nn.Dropout, "forward", lambda self, x: x * (torch.rand_like(x) > 0.1))


def positions_shuffled(space, patch):
    wpe = space["model"].transformer.wpe.weight
    distance = torch.arange(len(wpe)) % 2  # even positions alike, odd ones alike
    patch.setattr(wpe, "data", wpe.data[distance * (len(wpe) - 1)] + 0.01 * wpe.data)


def read_back_at_random(space, patch):
    config = space["model"].config
    patch.setattr(train_gpt2.GPT, "from_pretrained", lambda folder: train_gpt2.GPT(config))


def parameters_missing(space, patch):
    patch.setattr(play, "gradients", lambda model, loss, n: {"wte": torch.zeros(1)})


def one_order_for_all_epochs(space, patch):
    patch.setattr(train_gpt2, "shuffled", lambda n, *key: range(n))


def one_window_again_and_again(space, patch):
    window = train_gpt2.DataLoaderLite.window
    patch.setattr(train_gpt2.DataLoaderLite, "window", lambda self, i: window(self, 7))


def workers_read_the_same(space, patch):
    batch = train_gpt2.DataLoaderLite.batch

    def broken(self, i):
        self.rank = 0
        return batch(self, i)

    patch.setattr(train_gpt2.DataLoaderLite, "batch", broken)


def targets_are_the_inputs(space, patch):
    windows = train_gpt2.DataLoaderLite.windows
    patch.setattr(train_gpt2.DataLoaderLite, "windows", lambda self, n: (windows(self, n)[0],) * 2)


def no_clipping(space, patch):
    patch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(1.0))


def other_optimizer(space, patch):
    def broken(model, cfg, *args):
        return [torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.1)]

    patch.setattr(train_gpt2, "configure_optimizers", broken)


def muon_takes_the_gradient(space, patch):
    patch.setattr(train_gpt2, "orthogonalize", lambda g: g)


def rate_of_zero(space, patch):
    patch.setattr(train_gpt2, "get_lr", lambda step, cfg: 0.0)


def no_mixed_precision(space, patch):
    patch.setattr(torch, "autocast", lambda *args: contextlib.nullcontext())


def bits_per_token(space, patch):
    evaluate = train_gpt2.evaluate

    def broken(*args):
        loss = evaluate(*args)[0]
        return loss, loss / math.log(2)

    patch.setattr(train_gpt2, "evaluate", broken)


def budget_without_biases(space, patch):
    budget = play.budget
    patch.setattr(play, "budget", lambda config: budget(config) | {"LayerNorm": 0})


FAULTS = {  # a break of the notebook's own, or a function; and a phrase of each cell that notices
    "no mask": ("for j in range(nh):", "variants = row.repeat", "left = model(torch.cat",
                "expected in ((", "growing = torch.stack", "differ = ["),
    "no scale": ("for j in range(nh):", "by_pieces ="),
    "exact GELU": ("def gelu(x):",),
    "no residual": ('total = t["wte"]',),
    "untied head": ('wte @ t["ln_f"]', "as_wte, as_head"),
    "no positions": ("play.draw_lift(wpe",),
    positions_without_end: ("play.draw_lift(wpe",),
    tokenizer_of_capitals: ("strange =", "rows in wte", "spelled = tokenizer.encode_ordinary"),
    cut_at_spaces_only: ("word_by_word",),
    no_merge: ("play.train_tokenizer(", "stages = play.merge_stages"),
    gpt2_tokenizer_of_a_walkthrough: ("play.mistakes",),
    next_row_of_wte: ("one_hot =",),
    embeddings_doubled: ('t["wte"] + t["wpe"], t["h.0.in"]',),
    no_mean_taken_off: ("normal * ln.weight",),
    positions_in_the_model_without: ("play.NoPositions(",),
    plain_stack_with_residuals: ("play.signals",),
    always_the_least_likely: ("play.draw_many", "theirs.generate("),
    cache_of_zeros: ("torch.equal(cached, idx)",),
    never_stops: ("stop=first",),
    loss_is_a_sum: ("growing = torch.stack", "undivided =", "losses[-1] < losses[0]"),
    cross_entropy_is_a_sum: ("believed_minus_true",),
    mlp_of_2c: ("play.JOURNEY", "totals =", "play.budget(c)", "factor == 4", "FlopCounterMode("),
    large_init: ("logits.logsumexp(",),
    unscaled_init_is_scaled: ("play.UnscaledInit",),
    dropout_halves: ("noisy =",),
    dropout_never_off: ("noisy =",),
    positions_shuffled: ("assert near > far",),
    read_back_at_random: ("back = GPT.from_pretrained",),
    parameters_missing: ("differ = [",),
    one_order_for_all_epochs: ("epochs =",),
    one_window_again_and_again: ("epochs =",),
    workers_read_the_same: ("epochs =",),
    targets_are_the_inputs: ("epochs =",),
    no_clipping: ("TrainConfig().grad_clip",),
    other_optimizer: ("(optimizer,) =", "groups = train_gpt2"),
    muon_takes_the_gradient: ("muon = train_gpt2.Muon",),
    rate_of_zero: ("rates = [", "pupil ="),
    no_mixed_precision: ("torch.autocast",),
    bits_per_token: ("train_gpt2.evaluate(",),
    budget_without_biases: ("play.COMPONENTS",),
}  # fmt: skip


class Noting(ast.NodeTransformer):
    """Turns `assert check` into `noted("check", lambda: check)`, so that all asserts are heard."""

    def visit_Assert(self, node):
        call = ast.parse(f"noted({ast.unparse(node.test)!r}, lambda: ({ast.unparse(node.test)}))")
        return ast.copy_location(call.body[0], node)


def asserts(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    raised = {n.exc.args[0].value for n in nodes if isinstance(n, ast.Raise)}
    return raised | {ast.unparse(n.test) for n in nodes if isinstance(n, ast.Assert)}


def failed(source: str, space: dict) -> set[str]:
    """The asserts of a cell that do not hold."""
    found = set()

    def noted(text, check):
        try:
            holds = bool(check())
        except Exception:
            holds = False
        if not holds:
            found.add(text)

    tree = ast.fix_missing_locations(Noting().visit(ast.parse(source)))
    try:
        exec(compile(tree, "cell", "exec"), space | dict(noted=noted))
    except AssertionError as e:
        found.add(str(e))
    except Exception:  # a broken model may break a cell after its assert
        pass
    return found


@pytest.fixture(scope="module")
def space(running):
    """What the first cell defines, in this process, as soon as the tiny model is trained."""
    folder, execution = running
    while not (folder / "ready").exists() and not execution.done():
        time.sleep(0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("say", "table", "picture"):
            patch.setattr(play, name, lambda *args: None)
        found = {}
        exec(CODE[0].source, found)
        yield found


@pytest.fixture(scope="module")
def heard(space):
    """For each fault and each cell that is to notice it: the asserts that fail."""
    found = {}
    for fault, phrases in FAULTS.items():
        for phrase in phrases:
            with pytest.MonkeyPatch.context() as patch:
                mine = dict(space)
                if callable(fault):
                    fault(mine, patch)
                else:
                    space["look"].break_model(fault)
                found[fault, phrase] = failed(with_phrase(phrase), mine)
            space["look"].break_model("nothing")
    return found


PAIRS = [(fault, phrase) for fault, phrases in FAULTS.items() for phrase in phrases]


@pytest.mark.parametrize("fault, phrase", PAIRS, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_model_makes_a_claim_fail(fault, phrase, heard):
    assert heard[fault, phrase]


def test_every_assert_of_the_notebook_was_seen_to_fail(heard):
    every = set().union(*(asserts(cell.source) for cell in CODE))
    assert len(every) > 50
    assert every == set().union(*heard.values())


def test_every_break_of_the_notebook_is_among_the_faults_and_is_mended(space):
    assert set(play.BREAKS) <= set(FAULTS)
    look, model = space["look"], space["model"]
    x, y = look.windows(2)
    before = model(x, y)
    for fault in play.BREAKS:
        look.break_model(fault)
        assert model(x, y) != before, fault
        look.break_model("nothing")
        assert model(x, y) == before, fault


def test_a_break_that_is_not_there_is_named_with_those_that_are(space):
    with pytest.raises(ValueError, match="no such break: 'no head'; there are no mask, no scale"):
        space["look"].break_model("no head")


# ------------------------------------------------------------- The whole, and what it falls back to


def test_every_cell_runs_offline_and_in_any_order_on_a_model_that_it_trained_itself(executed):
    folder, notebook = executed
    assert (folder / "log/quick/checkpoint_000010.pt").exists()
    assert len(pictures(notebook)) == len(pictures(NOTEBOOK)) > 25


def test_a_model_that_cannot_be_had_is_said_and_the_quick_run_taken(space, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert play.Look("no/such/model").name == "log/quick"
    assert "no/such/model cannot be had here" in capsys.readouterr().out


def test_gpt2s_ids_are_shown_where_its_tokenizer_can_be_had(space, gpt2):
    rows = play.mistakes(space["look"], play.gpt2_tokenizer())
    assert (
        "“How are you?” is 5299 553 481 30",
        "2437 389 345 30",
        "ids by GPT-2's tokenizer",
    ) in rows


def test_without_gpt2s_tokenizer_a_sentence_says_so(space, monkeypatch, capsys):
    def offline(folder=None):
        raise OSError("offline")

    monkeypatch.setattr(fineweb, "load_tokenizer", offline)
    assert play.gpt2_tokenizer() is None and "offline" in capsys.readouterr().out
    assert len(play.mistakes(space["look"], None)) >= 18


# ------------------------------------------------------------------------ Its outputs and ablations


def test_committed_outputs_are_of_one_whole_run_from_top_to_bottom():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert os.path.getsize(ROOT / "play.ipynb") < 3e6


def test_committed_outputs_name_no_path_of_a_machine():
    for cell in CODE:
        for output in cell.outputs:
            data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            text = json.dumps(data) + output.get("text", "")
            assert not [r for r in ("/tmp", "/home", "/root", "/work", "Users") if r in text]


def test_ablations_are_recomputed_where_asked_and_each_row_once(space, tmp_path, monkeypatch):
    few = dict(max_steps=2, n_layer=2, val_tokens=2048)
    monkeypatch.setattr(play, "RECIPE", play.RECIPE | few)
    wanted = [(name, 1337) for name in ("baseline", "untied head", "post-norm")]
    play.measure(wanted, f"{tmp_path}/rows.json")
    written = (tmp_path / "rows.json").read_bytes()
    play.measure(wanted, f"{tmp_path}/rows.json")
    assert (tmp_path / "rows.json").read_bytes() == written
    rows = json.loads(written)
    assert [(row["name"], row["seed"]) for row in rows] == wanted
    assert all(2 < row["bits_per_byte"] < 4 for row in rows)
    assert len({row["bits_per_byte"] for row in rows}) == 3  # the variants do differ
    assert rows[1]["params"] - rows[0]["params"] == 4096 * 64  # a head of its own


def test_ablations_json_has_three_seeds_of_a_variant_and_those_of_the_recipe_as_defined():
    rows = json.loads((ROOT / "assets/ablations.json").read_text())
    found = {(row["name"], row["seed"], row["max_steps"], row["precision"]): row for row in rows}
    assert len(play.SEEDS) == 3 and len(found) == len(rows)
    kinds = {(name, *how) for name, _, *how in found}
    with torch.device("meta"):  # shapes without numbers
        params = {k: play.make_variant(v, 0).num_params() for k, v in play.ABLATIONS.items()}
    assert set(found) == {(name, seed, *how) for name, *how in kinds for seed in play.SEEDS}
    assert {name for name, *_ in kinds} == set(play.ABLATIONS)
    for (name, _, *how), row in found.items():
        flags = {k: v for k, v in play.ABLATIONS[name].items() if k in play.RECIPE}
        if how == [play.RECIPE["max_steps"], play.RECIPE["precision"]]:
            assert row | play.RECIPE | flags == row
        assert row["params"] == params[name]
        bits = row["bits_per_byte"]
        assert bits is None or (math.isfinite(bits) and 0.5 < bits < 4)


@pytest.mark.parametrize("name", play.ABLATIONS)
def test_each_variant_learns_from_a_batch(name):
    model = play.make_variant(play.ABLATIONS[name], 0)
    idx = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    model(idx[:, :-1], idx[:, 1:]).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]  # "no positions": not wpe
    assert len(grads) >= len(list(model.parameters())) - 1
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


def test_a_variant_is_held_against_the_baseline_that_was_measured_in_the_same_way(tmp_path):
    rows = [("baseline", 250, "fp32", 2.0), ("ReLU", 250, "fp32", 2.5), ("AdamW", 250, "fp32", 3.0),
            ("AdamW, no warm-up", 250, "fp32", 3.125), ("baseline", 400, "bf16", 1.0),
            ("post-norm", 400, "bf16", 1.25)]  # fmt: skip
    keys = ("name", "max_steps", "precision", "bits_per_byte")
    text = json.dumps([dict(zip(keys, row, strict=True)) for row in rows])
    (tmp_path / "rows.json").write_text(text)
    results = play.read_rows(f"{tmp_path}/rows.json")
    costs = {name: play.difference(name, results)[0] for name in results}
    assert list(costs.values()) == [0.0, 0.5, 1.0, 0.125, 0.0, 0.25]
    assert play.cost_of("post-norm", results) == "post-norm (400 steps, bf16): +0.250"
    assert play.verdict("ReLU", results) == "worse"
    assert play.verdict("baseline", results) == "not told apart"
