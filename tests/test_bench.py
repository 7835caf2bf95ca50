"""That bench.py's contenders do the same work, take turns, and fill the table; and its diff."""

import json
import math
import os
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import offline

import bench
import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, Worker

WORKER = Worker()  # fp32: what is equal is equal to six digits
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=1024, vocab_size=384)
KINDS = ("ours", "transformers", "plain")


@pytest.fixture
def data(sandbox, data_dir):
    return shutil.copytree(data_dir, sandbox / "stdlib")


@pytest.fixture
def tiny(monkeypatch, sandbox):
    """All sections within seconds: small shapes, contenders in this process, no training runs."""
    small = dict(CONFIG=CONFIG, STEP=(2, 16), BIG_STEP=(2, 32), NEW_TOKENS=8, STRIDE=4, EXAMPLES=3)
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    cfg = TrainConfig(micro_batch_size=2, seq_len=16)
    monkeypatch.setattr(bench, "quick", lambda data: (CONFIG, cfg))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **options: None)

    def race(contenders, rounds=2):
        started = {name: contender() for name, contender in contenders.items()}
        return {name: [next(turns) for _ in range(rounds)] for name, turns in started.items()}

    def run_quick(data, processes=1, optimizer="muon", max_lr=1e-2, seed=1, **flags):
        speed = max_lr * seed if optimizer == "adamw" else 2e-2
        steps = [dict(step=i, ms=100.0, tok_per_s=1000.0 + i) for i in range(20)]
        losses = {i: 8 - speed * i for i in range(0, 21, 5)}
        return steps + [dict(step=i, val_loss=v, bits_per_byte=v / 2) for i, v in losses.items()]

    monkeypatch.setattr(bench, "race", race)
    monkeypatch.setattr(bench, "run_quick", run_quick)
    monkeypatch.setattr(bench, "HERE", sandbox)
    (sandbox / "assets").mkdir()


def test_all_three_kinds_have_the_same_loss(data):
    cfg = TrainConfig(micro_batch_size=4, seq_len=32)
    steps = [bench.make_step(kind, WORKER, data, CONFIG, cfg, compiled=False) for kind in KINDS]
    losses = [step() for step in steps]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert steps[0]() != losses[0]  # the weights have moved, and the batch is another


def test_the_plain_way_generates_what_ours_does():
    model = bench.build_model("ours", CONFIG, WORKER.device).eval()
    idx = torch.randint(CONFIG.vocab_size, (3, 8))
    with torch.no_grad():
        plain = bench.plain_generate(model, idx, 24, k=1)
    assert torch.equal(plain, model.generate(idx, 24, temperature=0))


def test_the_quick_recipe_is_the_preset(data):
    config, cfg = bench.quick(data)
    assert config.n_embd == PRESETS["quick"][0].n_embd and config.vocab_size == 384
    assert cfg.max_lr == PRESETS["quick"][1].max_lr and cfg.optimizer == "muon"


def test_a_stride_makes_as_many_tokens():
    model, idx = (
        bench.build_model("plain", CONFIG, WORKER.device),
        torch.zeros(2, 8, dtype=torch.long),
    )
    with torch.no_grad():
        assert bench.plain_generate(model, idx, 24, stride=6).shape == (2, 32)


def test_the_plain_way_scores_hellaswag_as_ours_does(data, tiny, monkeypatch):
    monkeypatch.setattr(bench, "EXAMPLES", 12)
    model = bench.build_model("ours", CONFIG, WORKER.device).eval()
    tokenizer = fineweb.load_tokenizer(data)
    args = (model, tokenizer, bench.make_examples(data), WORKER)
    accuracies = [
        evaluate(*args)["hellaswag_acc_norm"]
        for evaluate in (hellaswag.evaluate, bench.plain_hellaswag)
    ]
    assert accuracies[0] == pytest.approx(accuracies[1]) and 0 < accuracies[0] < 1


def test_the_plain_way_makes_shards_of_the_same_tokens(sandbox, gpt2):
    path = sandbox / "documents.jsonl"
    path.write_text("".join(f'{{"text": "The {i}th document is short."}}\n' for i in range(100)))
    tokens = []
    for prepare in (fineweb.prepare_files, bench.plain_shards):
        folder = sandbox / prepare.__name__
        folder.mkdir()
        prepare([str(path)], str(folder))
        shards = [np.load(shard) for shard in folder.glob("*.npy")]
        tokens.append(np.sort(np.concatenate(shards)))
    assert np.array_equal(*tokens)


def clock():
    while True:
        yield dict(process=os.getpid(), began=time.time())


def test_contenders_take_turns_in_processes_of_their_own():
    results = bench.race(dict(ours=clock, plain=clock), rounds=2)
    first, second = results.values()
    assert len({turn["process"] for turn in first + second} - {os.getpid()}) == 2
    times = [turn["began"] for turns in zip(first, second, strict=True) for turn in turns]
    assert times == sorted(times)


@pytest.mark.parametrize(
    "name",
    ["step", "memory", "generate", "hellaswag", "quick", "growth", "costs", "long", "budget"],
)
def test_a_section_fills_rows_of_the_table(name, data, tiny, capsys):
    getattr(bench, f"bench_{name}")(WORKER, data)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) >= 1 and all(row.count("|") == 8 for row in rows), rows
    assert not any("nan" in row for row in rows)


def test_the_cell_of_a_faster_contender_has_a_ratio_above_one(capsys):
    turns = dict(ours=[dict(rate=r) for r in (190, 200, 210)], plain=[dict(rate=100.0)])
    bench.print_comparison("speed", turns)
    assert capsys.readouterr().out == "| speed | 200 ±5% |  | 100 |  | 2.00 |  |\n"


def test_a_cell_is_the_median_of_the_turns_and_half_their_range():
    turns = [dict(rate=r) for r in (1.0, 5.0, 9.0, 2.0)]
    assert bench.cell(turns, "rate") == "3.5 ±114%"
    assert bench.cell([dict(rate=12345.6)], "rate") == "12,346"


def test_the_last_column_is_the_share_of_ours(capsys):
    results = dict(ours=[dict(rate=8.0, share=0.25)], plain=[dict(rate=4.0, share=0.125)])
    bench.print_comparison("speed", results, share="share")
    assert capsys.readouterr().out == "| speed | 8 |  | 4 |  | 2.00 | 25% |\n"


@pytest.mark.parametrize("kind", KINDS)
def test_steps_on_one_batch_lower_its_loss_and_forget_their_gradients(kind, data, monkeypatch):
    x = torch.arange(64).view(2, 32)
    monkeypatch.setattr(bench, "DataLoaderLite", lambda *args: [(x, x + 1)] * 5)
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(bench.nn.utils, "clip_grad_norm_", lambda *a: norms.append(clip(*a).item()))
    fast, still = TrainConfig(max_lr=1e-2), TrainConfig(max_lr=1e-12)
    step = bench.make_step(kind, WORKER, data, CONFIG, fast, compiled=False)
    losses = [step() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[4] < losses[0] - 0.5
    norms.clear()
    step = bench.make_step(kind, WORKER, data, CONFIG, still, compiled=False)
    for _ in range(3):
        step()
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3)  # gradients that add up would grow


def test_generation_counts_the_tokens_of_all_rows_and_what_the_stride_left_out(tiny, monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda work: work() and None or 2.0)
    ours, plain = (next(bench.generating(kind, WORKER)) for kind in ("ours", "plain"))
    one, four = f"B=1, {WORKER.dtype}", f"B=4, {WORKER.dtype}"
    assert (ours[one], ours[four]) == (8 / 2, 4 * 8 / 2)
    assert (plain[one], plain[four]) == (8 / 2 / 4, 4 * 8 / 2 / 4)  # STRIDE is 4


def test_only_one_contender_of_the_quick_recipe_is_compiled(data, tiny, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    monkeypatch.setattr(shutil, "which", lambda program: program)
    bench.bench_quick(WORKER, data)
    assert len(compiled) == 1 and capsys.readouterr().out.count("tokens/s") == 2


def test_growth_varies_one_axis_at_a_time(data, tiny, monkeypatch, capsys):
    def training(kind, worker, data, config, cfg):
        yield dict(rate=1.0, gb=config.n_layer)  # the seconds are then B·T

    monkeypatch.setattr(bench, "training", training)
    bench.bench_growth(WORKER, data)
    cells = [row.split(" | ")[1] for row in capsys.readouterr().out.splitlines()]
    assert cells == [
        "1.3e+02 s 12 GB, 2.6e+02 s 12 GB",
        "2.6e+02 s 12 GB, 5.1e+02 s 12 GB",
        "2.6e+02 s 6 GB, 2.6e+02 s 12 GB",
    ]


def test_the_long_section_takes_adamws_best_rate_and_a_loss_that_it_reached(data, tiny, capsys):
    """In the fixture, AdamW's loss falls by rate · seed in each of its 20 steps, Muon's by 0.02."""
    bench.bench_long(WORKER, data)
    adamw, muon = capsys.readouterr().out.splitlines()
    assert adamw.startswith("| to loss 7.920, AdamW at 0.004, of 0.001, 0.002, 0.004 the best rate")
    assert muon.split(" | ")[1].startswith("5 ± 0 steps, 0.5 ± 0 s")


def test_a_learning_curve_takes_the_usual_time_of_a_step_for_all_steps():
    """One step that something else held up does not make a run look slow."""
    steps = [dict(step=i, ms=ms) for i, ms in enumerate([100.0, 90.0, 9000.0, 110.0])]
    evaluations = [dict(step=i, val_loss=9 - i, bits_per_byte=5 - i) for i in (0, 2, 4)]
    assert bench.learning_curve(steps + evaluations) == [(2 * 0.105, 3), (4 * 0.105, 1)]


def test_what_time_buys_is_drawn(tmp_path):
    curves = {name: [(1.0, 3.0), (2.0, 2.0 + i)] for i, name in enumerate(bench.BUDGETS)}
    bench.draw_budget(curves, tmp_path / "budget.png")
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes_are_started_by_torchrun(sandbox, monkeypatch):
    ran = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **how: ran.append(command))
    for n in (1, 2):
        assert bench.run_quick(sandbox, n, max_steps=3) == []
    alone, two = ran
    assert "--max_steps=3" in alone and not any("torch.distributed" in word for word in alone)
    assert {"torch.distributed.run", "--nproc_per_node=2", "--max_steps=3"} <= set(two)


def test_the_others_do_without_our_settings_of_the_process(monkeypatch):
    started = []
    monkeypatch.setattr(bench.os, "dup2", lambda a, b: None)
    monkeypatch.setattr(bench, "start_worker", lambda: started.append(name))
    monkeypatch.setattr(bench, "turns", None, raising=False)
    for name in ("ours", "transformers", "plain", "our transformers", "our plain"):
        bench.start_contender(name, clock)
    assert started == ["ours", "our transformers", "our plain"]


def test_a_training_turn_counts_its_tokens_and_not_the_untimed_step(data, monkeypatch):
    steps = []
    monkeypatch.setattr(bench, "make_step", lambda *args: lambda: steps.append(len(steps)))
    monkeypatch.setattr(bench, "seconds", lambda work: work() and None or 2.0)
    monkeypatch.setattr(Worker, "matmul_flops", lambda worker: 1e9)
    cfg = TrainConfig(micro_batch_size=4, seq_len=32)
    turns = bench.training("ours", WORKER, data, CONFIG, cfg, steps=3)
    turn = next(turns)
    assert len(steps) == 1 + 3 and turn["rate"] == 3 * 4 * 32 / 2.0
    with torch.device("meta"):
        flops = train_gpt2.flops_per_token(GPT(CONFIG), 32)
    assert turn["share"] == pytest.approx(flops * turn["rate"] / 1e9)
    next(turns)
    assert len(steps) == 1 + 3 + 1 + 3


def die():
    os._exit(9)
    yield {}


def test_a_contender_that_is_killed_is_named():
    with pytest.raises(OSError, match="plain: its process died"):
        bench.race(dict(plain=die))


def test_without_a_compiler_the_row_says_so(data, tiny, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    bench.bench_quick(WORKER, data)
    assert "torch.compile: not measured" in capsys.readouterr().out


def test_without_gpt2s_tokenizer_the_row_of_the_shards_says_so(data, tiny, monkeypatch, capsys):
    monkeypatch.setattr(fineweb, "load_tokenizer", offline)
    bench.bench_shards(WORKER, data)
    assert "tokens/s: not measured" in capsys.readouterr().out


def test_the_section_of_the_shards_fills_its_row(data, tiny, gpt2, capfd):
    bench.bench_shards(WORKER, data)
    (row,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    assert row.count("|") == 8 and row.split("|")[2].strip() and row.split("|")[4].strip()


@pytest.mark.parametrize(
    "platform, system", [("win32", "psutil"), ("darwin", "resource"), ("linux", "resource")]
)
def test_peak_memory_is_in_gigabytes_on_every_system(platform, system, monkeypatch):
    """Windows and macOS give bytes, Linux KiB."""
    usage = 3e9 / 1024 if platform == "linux" else 3e9
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=usage))
    psutil = SimpleNamespace(Process=lambda: process)
    resource = SimpleNamespace(
        RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=usage)
    )
    others = dict(psutil=psutil, resource=resource)
    monkeypatch.setattr(sys, "platform", platform)
    for name, module in others.items():
        monkeypatch.setitem(sys.modules, name, module if name == system else None)
    assert bench.peak_gb(torch.device("cpu")) == pytest.approx(3)


def test_a_section_that_does_not_exist_is_an_error(capsys):
    assert bench.main(["stpe"]) == 1
    assert "no section stpe" in capsys.readouterr().err


def test_all_sections_but_the_two_long_ones_run_unless_named(monkeypatch):
    chosen = []
    monkeypatch.setattr(bench, "print_table", chosen.append)
    assert [bench.main(argv) for argv in ([], ["--long"], ["long", "step"])] == [0, 0, 0]
    usual, every, named = chosen
    assert named == ["long", "step"] and every == [*usual, "long", "budget"] and len(usual) == 8


# ----------------------------------------------------------------------------------- The diff

FIGURES = dict(logits=1e-4, loss=1e-5, gradients=1e-5, greedy=1)  # what is just too much


@pytest.fixture(scope="module", params=["ours", "transformers"])
def folder(request, tokenizer, tmp_path_factory):
    """A tiny model with its tokenizer, saved by us or by transformers. It has 84 padded rows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    if request.param == "ours":
        GPT(GPTConfig(128, 384, n_layer=2, n_head=2, n_embd=32)).save_pretrained(folder)
    else:
        shape = dict(n_positions=128, vocab_size=384, n_layer=2, n_head=2, n_embd=32)
        GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)
    fineweb.save_tokenizer(tokenizer, folder)
    return str(folder)


def missed(out: str) -> list[str]:
    """The first words of the figures that are beyond their bound."""
    return [line.split()[0].strip(",") for line in out.splitlines() if line.endswith("MISSED")]


def test_the_same_weights_pass_the_diff(folder, capsys):
    assert bench.main(["diff", folder]) == 0
    out = capsys.readouterr().out
    assert "128 tokens of train_gpt2.py" in out and "greedy tokens that differ, of 64" in out
    assert out.count("  ok\n") == 4 and not missed(out)


@pytest.mark.parametrize("side", ["ours", "transformers"])
def test_a_weight_that_differs_is_found(side, folder, monkeypatch, capsys):
    original = dict(ours=train_gpt2.load_model, transformers=bench.load_in_transformers)[side]

    def load_changed(name):
        loaded = original(name)
        model = loaded[0] if side == "ours" else loaded
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[3, 5] += 0.1
        return loaded

    module, name = (train_gpt2, "load_model") if side == "ours" else (bench, "load_in_transformers")
    monkeypatch.setattr(module, name, load_changed)
    assert bench.main(["diff", folder]) == 1
    assert "logits" in missed(capsys.readouterr().out)


def spoil(figure, by, model, monkeypatch):
    """Make one figure of our model wrong by so much, and leave the other three as they are."""
    if figure == "logits":  # One is enough. The loss on a CPU does not go through lm_head.
        one = torch.zeros(384)
        one[383] = by
        model.lm_head.register_forward_hook(lambda layer, args, logits: logits + one)
    elif figure == "loss":
        apply = train_gpt2.ChunkedLoss.apply
        monkeypatch.setattr(train_gpt2.ChunkedLoss, "apply", lambda *args: apply(*args) + by)
    elif figure == "gradients":
        for p in model.parameters():  # one of which has the largest gradient
            p.register_hook(lambda grad: grad + by * grad.abs().max() * (grad == grad.max()))
    else:
        generate = model.generate
        wrong = lambda *args, **settings: generate(*args, **settings) + int(by)  # noqa: E731
        monkeypatch.setattr(model, "generate", wrong)


@pytest.mark.parametrize("share", [0.5, 1.5])
@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_can_miss_its_bound_alone(figure, share, folder, monkeypatch, capsys):
    """Half of what is allowed passes, and half as much again does not."""
    load_model = train_gpt2.load_model

    def load_spoiled(name):
        model, tokenizer = load_model(name)
        spoil(figure, share * FIGURES[figure], model, monkeypatch)
        return model, tokenizer

    monkeypatch.setattr(train_gpt2, "load_model", load_spoiled)
    assert bench.main(["diff", folder]) == (1 if share > 1 else 0)
    assert missed(capsys.readouterr().out) == ([figure] if share > 1 else [])


def test_numbers_that_are_none_miss_their_bound(folder, monkeypatch, capsys):
    def load_nan(name, load=bench.load_in_transformers):
        model = load(name)
        torch.nn.init.constant_(model.transformer.ln_f.bias, math.nan)
        return model

    monkeypatch.setattr(bench, "load_in_transformers", load_nan)
    assert bench.main(["diff", folder]) == 1
    assert missed(capsys.readouterr().out)[:3] == ["logits", "loss", "gradients"]


def test_settings_for_generation_that_came_with_the_weights_are_not_used(folder, sandbox):
    """These would sample, avoid what was written, and stop after any token."""
    shutil.copytree(folder, "copy")
    settings = dict(do_sample=True, repetition_penalty=3.0, eos_token_id=list(range(384)))
    (sandbox / "copy" / "generation_config.json").write_text(json.dumps(settings))
    assert bench.main(["diff", "copy"]) == 0


def test_the_diff_of_a_run_is_that_of_its_best_model(folder, sandbox, capsys):
    shutil.copytree(folder, sandbox / "run" / "hf")
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(sandbox / "run" / "hf" / name, sandbox / "run" / name)
    assert bench.main(["diff", "run"]) == 0


@pytest.mark.parametrize("name", ["nothing/at/all", "empty", "run", "checkpoint_000001.pt"])
def test_a_name_that_cannot_be_had_is_one_line(name, sandbox, data_dir, capsys):
    """Our program takes a run that has checkpoints but no hf/, and transformers does not."""
    for folder in ("empty", "run"):
        (sandbox / folder).mkdir()
    for file in ("encoder.json", "vocab.bpe"):
        shutil.copy(data_dir / file, sandbox / "run" / file)
    config = dict(block_size=8, vocab_size=384, n_layer=1, n_head=1, n_embd=8)
    weights = GPT(GPTConfig(**config)).state_dict()
    train_gpt2.save_checkpoint(sandbox / "run", 1, 1, config=config, model=weights)
    assert bench.main(["diff", name]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and not output.out
    assert name in output.err and ("config.json" in output.err or "folder of its run" in output.err)


@pytest.mark.parametrize("argv", [["diff"], ["diff", "a", "b"], ["step", "diff"], ["--nonsense"]])
def test_a_command_that_makes_no_sense_is_one_line(argv, capsys):
    assert bench.main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
