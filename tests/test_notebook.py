"""play.ipynb: it runs whole, a broken model makes its cells fail, its outputs are of one run."""

import copy
import json
import math
import os

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from nbclient import NotebookClient
from torch import nn

import fineweb
import train_gpt2

NOTEBOOK = nbformat.read(ROOT / "play.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TINY = [
    "--n_layer=2", "--n_embd=64", "--max_steps=10", "--warmup_steps=2", "--eval_every=10",
    "--val_tokens=4096", "--total_batch_size=1024", "--micro_batch_size=8",
]  # fmt: skip
FEW = "RECIPE |= dict(max_steps=2, n_layer=2, val_tokens=2048); SEEDS = (1337,)\n"
FEW += 'ABLATIONS = {k: ABLATIONS[k] for k in ("baseline", "untied head", "post-norm")}'
TWICE = "before = results.read_bytes(); measure([('baseline', 1337)], results)\n"
TWICE += "assert results.read_bytes() == before"


def tagged(tag: str) -> list[str]:
    return [cell.source for cell in CODE if tag in cell.metadata.get("tags", [])]


def with_phrase(phrase: str) -> str:
    """The one cell that has it."""
    (source,) = (cell.source for cell in CODE if phrase in cell.source)
    return source


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Executed offline, in an empty folder: it trains a tiny model, and ablates a little."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = copy.deepcopy(NOTEBOOK)
    for i, cell in reversed(list(enumerate(notebook.cells))):
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += f"\nFLAGS = {TINY}\nRECOMPUTE = True"
        for phrase, more in (("ABLATIONS = {", FEW), ("measure([(what", TWICE)):
            if cell.cell_type == "code" and phrase in cell.source:
                notebook.cells.insert(i + 1, nbformat.v4.new_code_cell(more))
    offline = dict(HF_HUB_OFFLINE="1", HTTPS_PROXY="http://127.0.0.1:9", PYTHONPATH=str(ROOT))
    one_thread = dict(
        OMP_NUM_THREADS="1"
    )  # more would wait for each other where others compute too
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (offline | one_thread).items():
            patch.setenv(name, value)
        patch.delenv("MPLBACKEND", raising=False)  # the kernel's own draws into the notebook
        resources = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, timeout=900, startup_timeout=300, resources=resources)
        client.execute()  # which raises the first error of a cell
    return folder, notebook


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_every_cell_runs_offline_on_a_model_that_it_trained_itself(executed):
    folder, notebook = executed
    assert (folder / "log/quick/checkpoint_000010.pt").exists()
    assert pictures(notebook) == pictures(NOTEBOOK) > 20


def test_ablations_are_recomputed_where_asked_and_each_row_once(executed):
    rows = json.loads((executed[0] / "log/ablations.json").read_text())
    assert [row["name"] for row in rows] == ["baseline", "untied head", "post-norm"]
    assert all(2 < row["bits_per_byte"] < 4 and row["max_steps"] == 2 for row in rows)
    assert len({row["bits_per_byte"] for row in rows}) == 3  # the variants do differ


@pytest.fixture
def cells(executed, sandbox, monkeypatch):
    """A function that runs the setup and then cells, given by a phrase, in this process."""
    monkeypatch.chdir(executed[0])
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "rcParams", plt.rcParams.copy())
    space = {}

    def run(*phrases: str, **changed):
        if not space:
            for source in tagged("parameters") + tagged("setup"):
                exec(source, space)
                space.update(changed)
        for phrase in phrases:
            exec(with_phrase(phrase), space)
        return space

    yield run
    plt.close("all")


def no_mask(monkeypatch):
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: attention(q, k, v)
    )


def no_scale(monkeypatch):
    attention = F.scaled_dot_product_attention

    def broken(q, k, v, *_, **__):
        return attention(q, k, v, is_causal=True, scale=1.0)

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)


def exact_gelu(monkeypatch):
    def broken(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))

    monkeypatch.setattr(train_gpt2.MLP, "forward", broken)


def no_residual(monkeypatch):
    def broken(self, x, *context):
        return self.mlp(self.ln_2(self.attn(self.ln_1(x), *context)))

    monkeypatch.setattr(train_gpt2.Block, "forward", broken)


def untied(monkeypatch):
    load_model = train_gpt2.load_model

    def broken(name):
        model, tokenizer = load_model(name)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model, tokenizer

    monkeypatch.setattr(train_gpt2, "load_model", broken)


def no_positions(monkeypatch):
    def hidden(self, idx, *_, **__):
        x = self.transformer.wte(idx)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    monkeypatch.setattr(train_gpt2.GPT, "hidden", hidden)


@pytest.mark.parametrize(
    "fault, phrase",
    [
        (no_mask, "moved.tril(-1).max() < 1e-3"),
        (no_scale, "b.attn.c_proj(heads)"),
        (exact_gelu, "mlp.c_proj(gelu(mlp.c_fc(h)))"),
        (no_residual, "b.attn.c_proj(heads)"),
        (untied, "torch.func.functional_call"),
        (no_positions, '(t["wte"] + t["wpe"], t["h.0.in"])'),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_model_makes_a_cell_fail(fault, phrase, cells, monkeypatch):
    before = ["def gelu(x):"] if "gelu" in phrase else []
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises((AssertionError, KeyError)):
            cells(*before, phrase)


def test_those_cells_pass_where_nothing_is_broken(cells):
    phrases = ("moved.tril(-1).max() < 1e-3", "b.attn.c_proj(heads)", "def gelu(x):")
    cells(*phrases, "mlp.c_proj(gelu(mlp.c_fc(h)))", "torch.func.functional_call")
    cells('(t["wte"] + t["wpe"], t["h.0.in"])')


def test_a_model_that_cannot_be_had_is_said_and_the_quick_run_taken(cells, capsys):
    space = cells(MODEL="no/such/model")
    assert space["name"] == "log/quick"
    assert "no/such/model cannot be had here" in capsys.readouterr().out


def test_gpt2s_ids_are_shown_where_its_tokenizer_can_be_had(cells, gpt2, capsys):
    cells("[15496, 11, 314, 1101")
    assert "[464, 3797, 3332, 319, 262]" in capsys.readouterr().out


def test_without_gpt2s_tokenizer_a_sentence_says_so(cells, monkeypatch, capsys):
    load = fineweb.load_tokenizer

    def none_without_a_folder(folder=None):
        if folder is None:
            raise OSError("offline")
        return load(folder)

    monkeypatch.setattr(fineweb, "load_tokenizer", none_without_a_folder)
    cells("[15496, 11, 314, 1101")
    out = capsys.readouterr().out
    assert "GPT-2's tokenizer is not in tiktoken's cache here" in out and "15496" not in out


def test_the_tracer_has_at_most_thirty_lines():
    source = with_phrase("def trace(sentence):")
    assert len(source[: source.index("return seen")].splitlines()) <= 30


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


def test_ablations_json_has_every_variant_as_defined_with_three_seeds():
    space = {}
    for source in tagged("setup")[:1] + tagged("ablations"):
        exec(source, space)
    rows = json.loads((ROOT / "assets/ablations.json").read_text())
    found = {(row["name"], row["seed"]): row for row in rows}
    assert len(space["SEEDS"]) == 3 and len(found) == len(rows)
    assert set(found) == {(name, seed) for name in space["ABLATIONS"] for seed in space["SEEDS"]}
    for (name, seed), row in found.items():
        flags = {k: v for k, v in space["ABLATIONS"][name].items() if k in space["RECIPE"]}
        assert row | space["RECIPE"] | flags | {"seed": seed} == row
        bits = row["bits_per_byte"]
        assert bits is None or (math.isfinite(bits) and 0.5 < bits < 4)
    assert torch.get_num_threads() == 1
