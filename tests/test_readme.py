"""README.md and the docstrings: their tables are what the code computes, their commands work."""

import argparse
import dataclasses
import math
import re
import shlex

import pytest
import torch
from conftest import ROOT, RUN, SHAPE

import bench
import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, Worker, padded

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = {
    f"{program.__name__}.py": program for program in (train_gpt2, fineweb, hellaswag, bench)
}
FLAGS = [f"--{name}={value}" for name, value in {**SHAPE, **RUN, "max_steps": 2}.items()]


def commands() -> list[list[str]]:
    """What README and docstrings tell to type: program and arguments."""
    texts = [README, *(program.__doc__ for program in PROGRAMS.values())]
    blocks = [block for text in texts for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [
        code for code in re.findall(r"`([^`\n]+)`", README) if re.match("python|torchrun", code)
    ]
    docs = "\n".join(texts[1:])
    lines += [re.split(r"  +", line.strip())[0] for line in docs.splitlines()
              if re.match("    (python|torchrun) .*\\.py", line)]  # fmt: skip
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if program := next((word for word in words if word in PROGRAMS), None):
            found.append(words[words.index(program) :])
    return found


def rows(start: str) -> list[list[str]]:
    """The cells of README's table whose header starts so."""
    table = README[README.index(f"| {start}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]


def number(cell: str) -> float:
    return float(cell.replace(",", "").removesuffix(" %"))


def test_every_command_parses(monkeypatch):
    """… and no flag of it is misspelt, for then it would not have got so far."""

    class ParsedError(Exception):
        pass

    def parse_args(parser, argv=None):
        args, unknown = parser.parse_known_args(argv)
        assert not unknown
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    found = commands()
    assert len(found) > 25 and {program for program, *_ in found} == set(PROGRAMS)
    for program, *argv in found:
        if "--help" not in argv:
            with pytest.raises(ParsedError):
                PROGRAMS[program].main(argv)


def test_the_workers_of_every_torchrun_command_can_share_a_step():
    found = re.findall(r"torchrun ([^`\n]*)train_gpt2.py([^`\n]*)", README)
    assert len(found) == 2
    for options, argv in found:
        counts = re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", options)
        cfg = train_gpt2.with_flags(TrainConfig(), train_gpt2.parse(argv.split()))
        worker = Worker(world_size=math.prod(map(int, counts)), device=torch.device("cuda"))
        B, micro_steps = train_gpt2.divide_step(cfg, 1024, worker)
        assert B * micro_steps * worker.world_size * 1024 == cfg.total_batch_size


def test_everyday_commands_work_as_written(sandbox, gpt2, capsys):
    """Those that need no network; only the run is shorter than its default."""
    monkey = " ".join(["the quick brown fox jumps over the lazy dog"] * 2000)
    (sandbox / "my.txt").write_text(monkey)
    (sandbox / "notes.jsonl").write_text('{"text": "a note"}\n' * 300)
    block = README[README.index("## Everyday commands") :]
    block = re.search(r"```sh\n(.*?)```", block, re.DOTALL)[1].replace("\\\n", " ")
    lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    offline = [line for line in lines if "gpt2" not in line and line[0] in list(PROGRAMS)[:2]]
    assert len(offline) == 6
    offline.sort(key=lambda line: "--generate" in line or "--resume" in line)  # they need a run
    for program, *argv in offline:
        if program == "train_gpt2.py" and not {"--generate", "--help"} & set(argv):
            argv += FLAGS + ["--data_dir=data/mine"] * ("--resume" in argv)
        try:
            assert PROGRAMS[program].main(argv) == 0
        except SystemExit as e:
            assert not e.code and "--help" in argv, e
    out = capsys.readouterr().out

    assert "def " in out and "usage: " in out and "resumed at step 2" in out


def test_the_models_table_is_what_the_code_computes():
    found = {row[0]: row[1:] for row in rows("preset")}
    assert list(found) == list(PRESETS)[1:]
    for preset, (L, nh, C, parameters, flops, max_lr, B) in found.items():
        shape, cfg = PRESETS[preset]
        config = dataclasses.replace(shape, vocab_size=50257)
        with torch.device("meta"):
            model = GPT(config)
        assert [config.n_layer, config.n_head, config.n_embd] == [int(L), int(nh), int(C)]
        assert model.num_params() == number(parameters)
        assert train_gpt2.flops_per_token(model, 1024) == number(flops)
        assert (cfg.max_lr, cfg.micro_batch_size) == (float(max_lr), int(B))
    assert (padded(50257) - 50257) * 768 == number(
        re.search(r"adds ([\d,]+) parameters", README)[1]
    )


def test_the_gpu_table_is_arithmetic():
    with torch.device("meta"):
        flops = train_gpt2.flops_per_token(GPT(GPTConfig(vocab_size=padded(50257))), 1024)
    assert f"{flops / 1e6:.1f} MFLOP" in README
    peak, share, one, hours, eight, hours8 = (
        [number(c) for c in r[1:]] for r in rows("calculated")
    )
    for i in range(2):
        rate = peak[i] * 1e12 * share[i] / 100 / flops
        assert one[i] == pytest.approx(rate, rel=0.005)
        assert hours[i] == pytest.approx(1e10 / rate / 3600, abs=0.05)
        assert eight[i] == pytest.approx(8 * 0.97 * rate, rel=0.001)
        assert hours8[i] == pytest.approx(1e10 / eight[i] / 3600, abs=0.05)


def test_steps_tokens_and_sizes_in_the_text_are_the_presets():
    shape, cfg = PRESETS["quick"]
    steps, tokens = f"{cfg.max_steps:,}", f"{cfg.total_batch_size:,}"
    assert f"takes {steps} steps of {tokens} tokens" in " ".join(README.split())
    with torch.device("meta"):
        model = GPT(shape)
    assert f"{model.num_params() / 1e6:.1f} million parameters" in README


def test_published_figures_are_the_same_everywhere():
    for figure in (".2955", ".4893", ".337"):
        assert figure in README and figure in hellaswag.PUBLISHED


def test_every_file_is_in_the_list_and_every_link_leads_somewhere():
    listed = {row[0] for row in rows("file")}
    files = {path.name for path in ROOT.glob("*.py")} | {"play.ipynb", "assets/", "tests/"}
    assert listed == files
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists()
