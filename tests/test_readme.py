"""README.md, docs/ and the docstrings: their tables are what the code computes, their commands and
links lead somewhere."""

import argparse
import dataclasses
import math
import re
import shlex
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT, RUN, SHAPE
from hypothesis import settings

import bench
import fineweb
import hellaswag
import life
import train_gpt2
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, Worker, padded

FILES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path: path.read_text(encoding="utf-8") for path in FILES}
README = PAGES[ROOT / "README.md"]
SPEED = PAGES[ROOT / "docs" / "speed.md"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
PROGRAMS = {
    f"{program.__name__}.py": program for program in (train_gpt2, fineweb, hellaswag, bench, life)
}
FLAGS = [f"--{name}={value}" for name, value in {**SHAPE, **RUN, "max_steps": 2}.items()]
# Files that the texts name and that are not here: a reader has them, or a program makes them.
ELSEWHERE = """my.txt notes.jsonl shakespeare.txt log.jsonl loss.png life.html log/quick/life.html
    encoder.json vocab.json tokenizer.json meta.json""".split()


def code(text: str) -> list[str]:
    """The commands and names of a page: each line of a block of commands, and what is in backticks
    elsewhere."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands() -> list[list[str]]:
    """What pages and docstrings tell to type: program and arguments."""
    lines = [line for text in PAGES.values() for line in code(text)]
    docs = "\n".join(str(program.__doc__) for program in PROGRAMS.values())
    lines += [re.split(r"  +", line.strip())[0] for line in docs.splitlines()
              if re.match("    (python|torchrun) .*\\.py", line)]  # fmt: skip
    found = []
    for line in lines:
        if re.search(r"(python|torchrun)\b.* \w+\.py", line):
            words = shlex.split(line, comments=True)
            program = next(word for word in words if word in PROGRAMS)
            found.append(words[words.index(program) :])
    return found


def rows(text: str, start: str) -> list[list[str]]:
    """The cells of a page's table whose header starts so."""
    table = text[text.index(f"| {start}") :].split("\n\n")[0].splitlines()[2:]
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
    lines = [line for line in code(README) if re.search(r"python \w+\.py ", line)]
    lines = [shlex.split(line.split("&&")[-1], comments=True)[1:] for line in lines]
    programs, without = ("train_gpt2.py", "fineweb.py"), {"gpt2", "torchrun", "--max_tokens"}
    offline = [line for line in lines if line[0] in programs and not without & set(line)]
    offline = [line for line in offline if "--max_steps" not in line]
    assert len(offline) == 7
    offline.sort(key=lambda line: "--generate" in line or "--resume" in line)  # they need a run
    for program, *argv in offline:
        if program == "train_gpt2.py" and not {"--generate", "--help"} & set(argv):
            argv += FLAGS + ["--data_dir=data/mine"] * ("--resume" in argv)
        try:
            assert PROGRAMS[program].main(argv) == 0
        except SystemExit as e:
            assert not e.code and "--help" in argv, e
    out = capsys.readouterr().out

    assert re.search("^def", out, re.MULTILINE) and "usage: " in out and "resumed at step 2" in out


def test_the_models_table_is_what_the_code_computes():
    found = {row[0]: row[1:] for row in rows(SPEED, "preset")}
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
    assert (padded(50257) - 50257) * 768 == number(re.search(r"adds ([\d,]+) parameters", SPEED)[1])


def test_the_gpu_table_is_arithmetic():
    with torch.device("meta"):
        flops = train_gpt2.flops_per_token(GPT(GPTConfig(vocab_size=padded(50257))), 1024)
    assert f"{flops / 1e6:.1f} MFLOP" in SPEED
    peak, share, one, hours, eight, hours8 = (
        [number(c) for c in r[1:]] for r in rows(SPEED, "calculated")
    )
    for i in range(2):
        rate = peak[i] * 1e12 * share[i] / 100 / flops
        assert one[i] == pytest.approx(rate, rel=0.005)
        assert hours[i] == pytest.approx(1e10 / rate / 3600, abs=0.05)
        assert eight[i] == pytest.approx(8 * 0.97 * rate, rel=0.001)
        assert hours8[i] == pytest.approx(1e10 / eight[i] / 3600, abs=0.05)
    tenth = 1907 * 2**19 / 1e10
    assert f"A100 {tenth * hours[0]:.1f} h, H100 {tenth * hours[1]:.1f} h" in README
    days = [8 * 1e10 / eight[i] / 3600 for i in range(2)]  # GPU-hours
    assert (
        f"A100 {hours8[0]:.0f} h, ${2 * days[0]:.0f}; H100 {hours8[1]} h, ${3 * days[1]:.0f}"
        in README
    )


def test_steps_tokens_and_sizes_in_the_text_are_the_presets():
    shape, cfg = PRESETS["quick"]
    steps, tokens = f"{cfg.max_steps:,}", f"{cfg.total_batch_size:,}"
    assert f"takes {steps} steps of {tokens} tokens" in " ".join(README.split())
    with torch.device("meta"):
        model = GPT(shape)
    assert f"{model.num_params() / 1e6:.1f} million parameters" in README
    sizes = (
        f"L = {shape.n_layer}, nh = {shape.n_head}, C = {shape.n_embd} and T = {shape.block_size}"
    )
    assert sizes in SPEED


def test_published_figures_are_the_same_everywhere():
    for figure in (".2955", ".4893", ".337"):
        assert figure in README and figure in hellaswag.PUBLISHED


def test_results_in_readme_are_those_of_the_page_about_speed():
    table = "\n".join(" | ".join(row) for row in rows(README, "model"))
    ours, theirs, published = (
        next(row for row in rows(SPEED, "program") if row[0].startswith(name))
        for name in ("this, `quick", "nanoGPT's", "nanoGPT itself")
    )
    for _, _, seconds, bits in (ours, theirs):
        assert re.search(rf"Shakespeare, {seconds} s \(.*\) \| {bits} bits a byte", table)
    *seeds, mean = [float(row[2]) for row in rows(SPEED, "seed")]
    assert mean == pytest.approx(sum(seeds) / len(seeds), abs=6e-4)
    assert f"{mean:.2f} bits a byte, Python's library" in table
    nats, bits = map(float, re.search(r"([\d.]+) / ln 2 = ([\d.]+) bits", SPEED).groups())
    assert nats / math.log(2) == pytest.approx(bits, abs=0.005) and bits == float(published[3])


def test_readme_is_short_and_lists_every_file():
    assert len(README.splitlines()) <= 160
    listed = {row[0] for row in rows(README, "file")}
    folders = {"docs/", "assets/", "tests/"}
    assert listed == {path.name for path in ROOT.glob("*.py")} | {"play.ipynb"} | folders


def test_every_link_leads_somewhere():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("https://"):
                continue
            path, _, part = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if part:
                headings = re.findall(r"^#+ (.*)", PAGES[target], re.MULTILINE)
                assert part in {heading.lower().replace(" ", "-") for heading in headings}


def test_every_path_exists():
    texts = [part for text in PAGES.values() for part in code(text)]
    texts += [path.read_text(encoding="utf-8") for path in (WORKFLOW, ROOT / ".ci" / "run")]
    words = {word.strip("'\"(),;").rstrip(".") for text in texts for word in text.split()}
    folder, file = r"(docs|tests|assets|\.ci|\.github)/.*", r"[\w/-]+\.[a-z]{2,5}"
    known = ("py", "ipynb", "md", "txt", "toml", "svg", "png", "html", "json", "jsonl", "yml")
    paths = {word for word in words if re.fullmatch(folder, word)}
    paths |= {word for word in words if re.fullmatch(file, word) and word.endswith(known)}
    paths -= set(ELSEWHERE)
    assert len(paths) > 15 and not [path for path in paths if not (ROOT / path).exists()]


def test_profiles_and_tools_that_the_pages_name_exist():
    """… of pytest, ruff and pyright."""
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for line in [line for text in PAGES.values() for line in code(text)]:
        for words in map(str.split, re.split("&&|#", line)):
            if "pytest" in words:
                for option in [word for word in words[words.index("pytest") :] if word[:2] == "--"]:
                    assert settings.get_profile(option.removeprefix("--hypothesis-profile="))
            if words[:1] in (["ruff"], ["pyright"]):
                assert re.search(rf"^{words[0]}\b", required, re.MULTILINE)


def test_requirements_each_have_a_reason():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "torch>=2.9,<2.14" in [line.split("#")[0].strip() for line in lines]
    for line in filter(None, lines):
        assert re.fullmatch(r"(\S.*\S  +)?# .{3,}", line), line


def test_workflow_runs_what_readme_and_the_check_of_a_change_run():
    yaml = pytest.importorskip("yaml", reason="pyyaml, which transformers needs, reads the file")
    workflow = WORKFLOW.read_text(encoding="utf-8")
    jobs = yaml.safe_load(workflow)["jobs"]
    check = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for run in runs:
        tool = run.replace("pip install -r", "-r")
        assert re.search(rf"{re.escape(tool)}$", check, re.MULTILINE), run
    assert "python -m pytest" in runs and any("python -m pytest" in line for line in code(README))
    assert "has never run" in workflow.splitlines()[0]
    matrix = jobs["test"]["strategy"]["matrix"]
    oldest, newest = matrix["python"]
    assert f"Python {oldest} to {newest}" in README
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    settings_file = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'pythonVersion = "{oldest}"' in settings_file
    assert f'target-version = "py{oldest.replace(".", "")}"' in settings_file


def test_the_drawing_is_what_life_py_makes_of_gptconfig():
    """docs/contributing.md has the command that makes it again."""
    config = GPTConfig()
    drawing = (ROOT / "assets" / "gpt2.svg").read_text(encoding="utf-8")
    assert drawing == life.drawing(config)
    texts = [element.text or "" for element in ElementTree.fromstring(drawing).iter()]
    with torch.device("meta"):
        total = GPT(config).num_params()
    assert f"GPT-2 with {total:,} parameters" in texts
    found = " ".join(texts)
    block = int(re.search(r"one of 12: ([\d,]+)", found)[1].replace(",", ""))
    wte, wpe = (number(n) for n in re.search(r"([\d,]+) \+ ([\d,]+)", found).groups())
    assert wte + wpe + 12 * block + 2 * config.n_embd == total
    inside = found[found.index("one of 12") :]
    parts = [number(n) for n in re.findall(r"\b\d+(?:,\d{3})+\b", inside)][1:]
    assert sum(parts) == block


@pytest.mark.parametrize("shape", [dict(n_layer=1), dict(n_layer=3, n_head=2), dict(bias=False)])
def test_a_drawing_of_any_shape_is_whole(shape):
    config = GPTConfig(**shape)
    texts = [t.text or "" for t in ElementTree.fromstring(life.drawing(config)).iter()]
    with torch.device("meta"):
        assert f"GPT-2 with {GPT(config).num_params():,} parameters" in texts
    blocks = [text for text in texts if re.fullmatch(r"h\.\d+|…", text)]
    assert blocks[0] == "h.0" and blocks[-1] == f"h.{config.n_layer - 1}"
    assert len(blocks) == min(config.n_layer, 4)
