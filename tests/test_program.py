"""The program from its command line to its files: processes started, stopped, killed, resumed."""

import dataclasses
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, RUN, SHAPE, Bomb, assert_same, history, offline, times
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import life
import train_gpt2
from train_gpt2 import (
    DataLoaderLite,
    GPTConfig,
    TrainConfig,
    Worker,
    evaluate,
    list_checkpoints,
    load_checkpoint,
    load_model,
    sample_texts,
)

pytestmark = pytest.mark.usefixtures("sandbox")
posix = pytest.mark.skipif(os.name != "posix", reason="needs the signals of POSIX")
FIELDS = [*dataclasses.fields(GPTConfig), *dataclasses.fields(TrainConfig)]
PNG = b"\x89PNG\r\n\x1a\n"


def flags(*more: str, shape=SHAPE, **values) -> list[str]:
    """The command line of a tiny run."""
    values = shape | RUN | dict(log_dir="log") | values
    return [f"--{name}={value}" for name, value in values.items()] + list(more)


def steps(log_dir="log") -> list[int]:
    """Those that the log has, in its order."""
    return [record["step"] for record in history(log_dir) if "loss" in record]


def last_saved(log_dir="log") -> int:
    return int(list_checkpoints(log_dir)[-1].stem[-6:])


def assert_same_run(log_dir, other) -> None:
    """The same log, and the same last checkpoint, to the bit."""
    assert history(log_dir) == history(other)
    ours, theirs = (load_checkpoint(list_checkpoints(d)[-1])[1] for d in (log_dir, other))
    assert_same(ours["model"], theirs["model"])
    for a, b in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        assert_same(a["state"], b["state"])


def assert_close_run(log_dir, other) -> None:
    """The same steps, the same losses within 1e-4."""
    for a, b in zip(history(log_dir), history(other), strict=True):
        keys = {"loss", "val_loss", "bits_per_byte"} & a.keys() & b.keys()
        assert keys and a["step"] == b["step"]
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], abs=1e-4)


# ------------------------------------------------------------------- Processes of the program
# A server that has imported the program forks a process for a run: in 30 ms, not in 3 seconds.


def micro_step(windows):
    """Which one it is for one of two workers, who share steps of 8 windows and take 2 at a time."""
    return windows.start // 8 * 2 + windows.start % 4 // 2


def program(argv, output, environment, pause=0.0, die_after=0, file_limit=0, nan_at=None):
    """The program, in a process of its own.

    pause: seconds before each micro-step. die_after: calls of any function, then it kills itself.
    file_limit: the largest file that it can write, bytes. nan_at: the rank and the micro-step of a
    loss that is no number.
    """
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    Worker.matmul_flops, windows = lambda worker: 1e12, DataLoaderLite.windows
    life.write_page = lambda *args, **how: None

    def before_windows(loader, numbers):
        if loader.is_train:
            time.sleep(pause)
            if (loader.rank, micro_step(numbers)) == nan_at:
                train_gpt2.ChunkedLoss.apply = lambda x, *_: x.sum() * math.nan
        return windows(loader, numbers)

    DataLoaderLite.windows = before_windows
    if file_limit:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if die_after:
        calls = itertools.count()
        kill = [os.getpid(), signal.SIGKILL]
        sys.setprofile(lambda *event: next(calls) == die_after and os.kill(*kill))
    sys.exit(train_gpt2.main(argv))


@pytest.fixture(scope="session")
def start():
    """Start the program: start(argv, …) -> its processes, by default one."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    slow = ["matplotlib.figure", "transformers.models.gpt2.modeling_gpt2"]
    context.set_forkserver_preload(["test_program", *slow])
    running = []

    def start(argv, output="output.txt", world_size=1, **how):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        everyone = dict(WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(world_size):
            environment = everyone | dict(RANK=rank, LOCAL_RANK=rank)
            args = argv, output, {key: str(value) for key, value in environment.items()}
            running.append(context.Process(target=program, args=args, kwargs=how))
            running[-1].start()
        return running[-world_size:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield start
    for process in running:
        process.kill()


@pytest.fixture(scope="session")
def finish(start):
    """Run the program to its end -> exit status and output."""

    def finish(argv, **how):
        Path("output.txt").unlink(missing_ok=True)
        processes = start(argv, **how)
        for process in processes:
            process.join(300)
        return processes[0].exitcode, Path("output.txt").read_text()

    return finish


@pytest.fixture(scope="session")
def run_in(finish, tmp_path_factory):
    """A function that runs the program in a new folder -> the run's directory."""

    def run(argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder := tmp_path_factory.mktemp("run"))
            code, output = finish(argv)
        assert code == 0, output
        return folder / "log"

    return run


LONG = dict(max_steps=40, eval_every=16, checkpoint_every=8, dropout=0.1)


@pytest.fixture(scope="session")
def whole(run_in, data_dir):
    """The directory of a run that was never stopped."""
    return run_in(flags(**LONG, data_dir=data_dir))


SHARED = dict(max_steps=20, eval_every=10, checkpoint_every=4, micro_batch_size=2, precision="fp32")


@pytest.fixture(scope="session")
def finished(run_in, data_dir):
    """The directory of a run in fp32, which one process made."""
    return run_in(flags(**SHARED, data_dir=data_dir))


def wait_for(step) -> None:
    """Until so many steps are logged, for five minutes of waiting at most."""
    for _ in range(30_000):
        if len(steps()) >= step:
            return
        time.sleep(0.01)
    pytest.fail(Path("output.txt").read_text())


def stop(process, signum) -> int:
    """Send a signal to a running process -> the number of steps logged by then."""
    os.kill(process.pid, signal.SIGSTOP)
    logged = len(steps())
    os.kill(process.pid, signum)
    os.kill(process.pid, signal.SIGCONT)
    return logged


@posix
@pytest.mark.parametrize("step", [11, *range(1, times(1, 40), 4)])
@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_a_run_that_a_signal_ended_goes_on_as_if_it_never_had(
    name, status, step, start, finish, whole, data_dir
):
    argv = flags("--resume", **LONG, data_dir=data_dir)
    (process,) = start(argv, pause=0.02)
    wait_for(step)
    logged = stop(process, getattr(signal, name))
    process.join(300)
    assert process.exitcode == status
    if name == "SIGKILL":
        assert 0 <= logged - (last_saved() if list_checkpoints("log") else 0) <= 8
    else:  # the step in progress is saved, or the next where that one was done
        assert last_saved() == len(steps()) and last_saved() - logged in (0, 1, 2)
    resumed = f"resumed at step {last_saved()}" if list_checkpoints("log") else "starts at step 0"
    code, output = finish(argv)
    assert code == 0 and resumed in output, output
    assert_same_run("log", whole)


@posix
def test_a_sigterm_that_comes_more_than_once_saves_too(start, data_dir):
    """Schedulers send it to every process, and torchrun then once more to its own."""
    (process,) = start(flags(**LONG, data_dir=data_dir), pause=0.02)
    wait_for(11)
    for _ in range(3):
        stop(process, signal.SIGTERM)
        time.sleep(0.01)
    process.join(300)
    assert process.exitcode == 143 and last_saved() == len(steps())


@posix
@pytest.mark.parametrize("series", range(times(1, 10)))
def test_a_run_killed_at_twenty_random_moments_is_bit_identical_to_one_never_killed(
    series, finish, whole, data_dir
):
    """While it starts, resumes, trains, evaluates, samples, writes a checkpoint or the log."""
    argv, rng = flags("--resume", **LONG, data_dir=data_dir), random.Random(series)
    code, kills, recomputed = -9, 0, []
    while code == -9:
        done = len(steps())
        code, output = finish(argv, die_after=rng.randrange(1_200_000) if kills < 20 else 0)
        kills += code == -9
        if at := re.search("(?:resumed|starts) at step (\\d+)", output):
            recomputed.append(done - int(at[1]))
        assert steps() == list(range(len(steps()))) and "Traceback" not in output
    assert (code, kills) == (0, 20) and 0 < max(recomputed) <= 8
    assert_same_run("log", whole)


@posix
@pytest.mark.parametrize("sizes", [(2, 1, 4), *itertools.product([1, 2], repeat=3)][: times(1, 9)])
def test_a_run_goes_on_with_another_number_of_processes(sizes, start, finish, finished, data_dir):
    """And in the end with two: the same tokens in the same order."""
    argv = flags("--resume", **SHARED, data_dir=data_dir)
    for step, world_size in zip((3, 7, 13), sizes, strict=True):
        processes = start(argv, world_size=world_size, pause=0.04)
        wait_for(step)
        stop(processes[0], signal.SIGTERM)
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [143] * world_size
    code, output = finish(argv, world_size=2)
    assert code == 0 and "2 workers" in output, output
    assert_close_run("log", finished)


@posix
def test_a_full_disk_ends_no_run_and_leaves_no_part_of_a_file(finish, data_dir):
    """No file can be larger than a fifth of a checkpoint."""
    code, output = finish(flags(data_dir=data_dir), file_limit=100_000)
    warnings = re.findall(r"WARNING: cannot write log/checkpoint_.*\(File too large\)", output)
    assert len(warnings) == 3 and "Traceback" not in output
    assert len(steps()) == 12 and not list(Path("log").glob("checkpoint_*"))
    assert code == 1 and output.splitlines()[-1].startswith("error: ")  # hf/ is its very result


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_run_whose_output_cannot_be_written_goes_on(start, whole, data_dir):
    """As with `nohup … > train.log` on a full disk, or `| tee` that was killed."""
    (process,) = start(flags(**LONG, data_dir=data_dir), output="/dev/full")
    process.join(300)
    assert_same_run("log", whole)
    load_model("log/hf")


@posix
def test_a_loss_that_is_no_number_stops_all_workers_and_is_told_by_rank(
    start, finish, finished, data_dir
):
    argv = flags("--resume", **SHARED, data_dir=data_dir)
    processes = start(argv, world_size=2, nan_at=(1, 11))
    for process in processes:
        process.join(300)
    output = Path("output.txt").read_text()
    assert [process.exitcode for process in processes] == [1, 1] and "Traceback" not in output
    assert re.search(r"^error: step 5: loss \[[\d.]+, nan\] .* no weight was touched", output, re.M)
    assert last_saved() == 4 and steps() == [0, 1, 2, 3, 4]
    code, output = finish(argv, world_size=2)
    assert code == 0 and "resumed at step 4" in output, output
    assert_close_run("log", finished)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_stopping_and_resuming_leaves_memory_and_open_files_as_they_were(data_dir, monkeypatch):
    """A run is stopped in its first step, each time; in the long form for ten minutes."""
    step, used, sigterm = train_gpt2.accumulate_gradients, [], (os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(
        train_gpt2, "accumulate_gradients", lambda *args: os.kill(*sigterm) or step(*args)
    )
    argv = flags("--resume", data_dir=data_dir, max_steps=10**5, eval_every=3)
    end = time.monotonic() + times(0, 600)
    while len(used) < 12 or time.monotonic() < end:
        assert train_gpt2.main(argv) == 143
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append((len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")))
    assert steps() == list(range(len(used)))
    first, *_, last = used[len(used) // 2 :]
    print(f"{len(used)} stops: open files and bytes in memory from {first} to {last}")
    assert first[0] == last[0] and last[1] - first[1] < 2**24


def test_two_runs_that_start_at_once_take_two_directories_and_both_finish(start):
    """Also in a fresh folder, where both have to prepare the data."""
    argv = [f for f in flags("--preset=quick", shape={}, max_steps=2) if "log_dir" not in f]
    processes = [*start(argv), *start(argv, output="output2.txt")]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0], Path("output2.txt").read_text()
    assert steps("log/quick") == steps("log/quick-2") == [0, 1]
    assert sorted(path.name for path in Path("log").iterdir()) == ["quick", "quick-2"]


@posix
def test_a_run_that_is_still_alive_is_not_resumed_by_another_process(start, finish, data_dir):
    (process,) = start(flags(**LONG, data_dir=data_dir), output="first.txt", pause=0.05)
    wait_for(3)
    code, output = finish(flags("--resume", **LONG, data_dir=data_dir))
    assert code == 1 and "log: another process is writing this run" in output
    process.join(300)
    assert process.exitcode == 0 and steps() == list(range(40))


@posix
def test_three_workers_share_a_step_whose_windows_do_not_divide(finish, finished, data_dir):
    code, output = finish(flags(**SHARED, data_dir=data_dir), world_size=3)
    assert code == 0 and "3 workers" in output, output
    assert_close_run("log", finished)


# ------------------------------------------------------------------------------------ torchrun

SCRIPT = """
import os, signal, sys, time, train_gpt2
windows = train_gpt2.DataLoaderLite.windows

def before_windows(loader, numbers):
    if loader.is_train:
        i = numbers.start // 8 * 2 + numbers.start % 4 // 2  # as micro_step in the tests
        {}
    return windows(loader, numbers)

train_gpt2.DataLoaderLite.windows = before_windows
sys.exit(train_gpt2.main())
"""
RESTARTS = "int(os.environ['TORCHELASTIC_RESTART_COUNT'])"
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def torchrun():
    """Start the program in two processes that do something before each micro-step."""
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    running = []

    def torchrun(before, argv):
        Path("script.py").write_text(SCRIPT.format(before))
        command.extend(["--max-restarts=3", "script.py", *argv])
        with open("output.txt", "w") as output:
            running.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        return running[0]

    yield torchrun
    for process in running:
        process.terminate()  # and with it its workers
        process.wait(60)


def deaths(series):
    """Up to three: in which micro-step which of the two workers dies, of 40 micro-steps."""
    rng = random.Random(series)
    return [(i, rng.randrange(2)) for i in sorted(rng.sample(range(8, 40), 3))]


@posix
@pytest.mark.parametrize("deaths", [[(22, 1)], *map(deaths, range(times(0, 6)))])
def test_two_workers_one_of_which_dies_and_is_restarted_have_the_losses_of_one_process(
    deaths, torchrun, finished, data_dir
):
    before = f"if [(i, loader.rank)] == {deaths}[{RESTARTS}:][:1]: {DIE}"
    running = torchrun(before, flags("--resume", **SHARED, data_dir=data_dir))
    assert running.wait(600) == 0
    output = Path("output.txt").read_text()
    restarts = re.findall(r"(?:resumed|starts) at step (\d+)", output)
    assert restarts == [str(i // 2 // 4 * 4) for i in (0, *(i for i, _ in deaths))]
    assert_close_run("log", finished)


@posix
def test_sigterm_to_torchrun_saves_a_checkpoint(torchrun, finish, finished, data_dir):
    argv = flags("--resume", **SHARED, data_dir=data_dir)
    running = torchrun("time.sleep(0.05)", argv)
    wait_for(1)
    running.terminate()
    running.wait(300)
    saved = last_saved()
    assert saved == len(steps()) < 20
    code, output = finish(argv)
    assert code == 0 and f"resumed at step {saved}" in output, output
    assert_close_run("log", finished)


# ----------------------------------------------------------------------------- As a user has it


def python(folder, *argv) -> str:
    """Run the program with these arguments -> what it prints."""
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *argv]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """The folder where the one command ran, shortened, and what it printed."""
    folder = tmp_path_factory.mktemp("quick")
    argv = "--max_steps=3 --val_tokens=4096 --n_layer=1 --n_embd=48".split()
    return folder, python(folder, *argv)


def test_the_one_command_needs_no_data_and_no_flag(quick):
    folder, output = quick
    lines = output.splitlines()
    assert "preset quick" in lines[0] and (folder / "data/stdlib/meta.json").exists()
    assert {path.name for path in (folder / "log/quick").iterdir()} == {
        "log.jsonl", "loss.png", "life.html", "encoder.json", "vocab.bpe", "hf",
        "checkpoint_000003.pt",
    }  # fmt: skip
    assert (folder / "log/quick/loss.png").read_bytes().startswith(PNG)
    (first, *others) = (line for line in lines if re.match(r"step \d \| loss ", line))
    assert len(others) == 2
    for words in (" lr ", " ms ", " grad_norm ", " tok_per_s ", " utilisation ", " minutes_left "):
        assert words in first
    assert sum(line.startswith(("  'def ", '  "def ')) for line in lines) == 2 * 4  # samples
    for words in ("cpu", "float", "compile", "fused", "parameters", "val_loss", "bits_per_byte"):
        assert words in output


def test_the_newest_run_continues_a_prompt(quick):
    folder, _ = quick
    argv = ["--generate=def main(", "--n=2", "--max_new_tokens=9", "--precision=fp32"]
    model, tokenizer = load_model(folder / "log/quick")
    how = dict(n=2, seed=TrainConfig.seed, max_new_tokens=9, top_k=50)
    texts = sample_texts(model, tokenizer, Worker(), "def main(", **how)
    assert python(folder, *argv) == "".join(f"{text}\n\n" for text in texts)


def test_the_file_alone_trains_resumes_and_samples(tmp_path, gpt2, monkeypatch):
    """In an empty folder, with shards and GPT-2's tokenizer, and nothing else of this project."""
    folder = tmp_path / "alone"
    (folder / "shards").mkdir(parents=True)
    shutil.copy(ROOT / "train_gpt2.py", folder)
    for split in ("train", "val"):
        ids = np.array(gpt2.encode_ordinary("the cat sat on the mat. " * 60), dtype=np.uint16)
        np.save(folder / f"shards/x_{split}_0.npy", ids)
    small = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=32 --total_batch_size=128".split()
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def alone(*argv):
        command = [sys.executable, "train_gpt2.py", *argv]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    output = alone("--preset=gpt2", "--data_dir=shards", "--max_steps=2", "--eval_every=1", *small)
    for module in ("hellaswag", "fineweb", "life"):
        assert f"WARNING: No module named '{module}'" in output
    assert "resumed at step 2" in alone("--preset=gpt2", "--resume", "--max_steps=3")
    assert steps(folder / "log/gpt2") == [0, 1, 2]
    assert alone("--generate=the cat", "--max_new_tokens=5").startswith("the cat")
    assert {path.name for path in (folder / "log/gpt2/hf").iterdir()} == {
        "config.json", "model.safetensors",
    }  # fmt: skip


QUIET = """
import os, signal, sys, torch
def state():
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    rng, threads = torch.get_rng_state().tolist(), torch.get_num_threads()
    return os.listdir(), handlers, rng, threads, torch.get_float32_matmul_precision()
before = state()
import train_gpt2
assert state() == before and not torch.distributed.is_initialized()
print("imported", flush=True)
try:
    train_gpt2.main(["--help"])
finally:
    heavy = {"transformers", "datasets", "tokenizers", "matplotlib", "pandas"} & sys.modules.keys()
    assert not heavy, heavy
"""


def test_importing_does_nothing_and_help_names_every_field_and_loads_nothing_heavy():
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", QUIET]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("imported\nusage: ")
    text = " ".join(done.stdout.split())
    for field in FIELDS:
        assert f"--{field.name} " in text
    for flag in ("preset", "resume", "generate", "n", "temperature", "top_k", "top_p"):
        assert f"--{flag} " in text


# -------------------------------------------------------------- The command line, in this process


@pytest.fixture
def generate(capsys):
    """What the program prints with --generate."""

    def generate(*argv):
        capsys.readouterr()
        train_gpt2.main(["--generate=the ", "--max_new_tokens=9", "--precision=fp32", *argv])
        return capsys.readouterr().out

    return generate


def test_samples_come_from_a_run_a_checkpoint_or_a_folder(finished, generate):
    first, *_, newest = list_checkpoints(finished)  # in this run the newest is the best
    texts = [generate(f"--init={name}") for name in (finished, newest, finished / "hf", first)]
    assert texts[0].startswith("the ") and len(texts[0]) > 8
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_without_a_name_samples_come_from_the_newest_run(finished, generate):
    for i, name in enumerate("bac"):
        folder = shutil.copytree(finished, Path("log", name))
        if name != "a":  # another model
            load_checkpoint(list_checkpoints(finished)[0])[0].save_pretrained(folder / "hf")
        os.utime(folder / "hf", (1e9 + i % 2, 1e9 + i % 2))
    assert generate() == generate("--init=log/a") != generate("--init=log/b")


def test_samples_obey_their_flags(finished, generate):
    init = f"--init={finished}"
    greedy = generate(init, "--temperature=0")
    assert greedy == generate(init, "--top_k=1") == generate(init, "--top_p=1e-9", "--seed=5")
    assert generate(init) == generate(init) != generate(init, "--seed=5")
    assert len(set(generate(init, "--n=3", "--temperature=3").split("\n\n"))) == 3 + 1
    assert len(generate(init, "--max_new_tokens=1")) < len(generate(init, "--max_new_tokens=20"))


def test_each_run_gets_a_directory_and_resume_takes_the_last(data_dir, capsys):
    argv = [flag for flag in flags("--preset=quick", data_dir=data_dir) if "log_dir" not in flag]
    for name in ("quick", "quick-2"):
        train_gpt2.main([*argv, "--max_steps=1"])
        assert steps(f"log/{name}") == [0]
    train_gpt2.main([*argv, "--max_steps=2", "--resume"])
    assert "resumed at step 1" in capsys.readouterr().out
    assert (steps("log/quick"), steps("log/quick-2")) == ([0], [0, 1])
    assert sorted(path.name for path in Path("log").iterdir()) == ["quick", "quick-2"]


def test_resume_alone_goes_on_with_the_runs_own_arguments(data_dir, capsys):
    train_gpt2.main(flags(data_dir=data_dir, max_steps=2, log_dir="log/quick"))
    assert train_gpt2.main(["--resume", "--max_steps=4", "--weight_decay=0.5"]) == 0
    out = capsys.readouterr().out
    assert "max_steps was 2, now it is 4" in out and "weight_decay was 0.1, now it is 0.5" in out
    assert out.count("now it is") == 2 and "resumed at step 2" in out
    assert steps("log/quick") == [0, 1, 2, 3]
    facts = [record for record in train_gpt2.read_log("log/quick") if "config" in record][-1]
    config, cfg = facts["config"], facts["train_config"]
    assert config["n_embd"] == SHAPE["n_embd"] and cfg["total_batch_size"] == 256
    assert (cfg["weight_decay"], cfg["data_dir"]) == (0.5, str(data_dir))
    groups = load_checkpoint("log/quick/checkpoint_000004.pt")[1]["optimizers"]
    decays = {g["weight_decay"] for o in groups for g in o["param_groups"]}
    assert decays == {0.0, 0.5}


def test_what_one_resume_has_changed_stays_so_in_the_next(data_dir, capsys):
    train_gpt2.main(flags(data_dir=data_dir, max_steps=2, log_dir="log/quick"))
    train_gpt2.main(["--resume", "--max_steps=3", "--max_lr=0.5"])
    capsys.readouterr()
    assert train_gpt2.main(["--resume", "--max_steps=4"]) == 0
    assert capsys.readouterr().out.count("now it is") == 1
    facts = [record for record in train_gpt2.read_log("log/quick") if "config" in record][-1]
    assert facts["train_config"]["max_lr"] == 0.5


def test_a_run_that_began_with_other_weights_goes_on_when_these_are_gone(finished, data_dir):
    init = shutil.copytree(finished, "begun_with")
    argv = flags(data_dir=data_dir, shape={}, max_steps=1, init=init, log_dir="log/gpt2")
    assert train_gpt2.main(argv) == 0
    shutil.rmtree(init)
    assert train_gpt2.main(["--resume", "--max_steps=2", "--preset=gpt2"]) == 0
    assert steps("log/gpt2") == [0, 1]


def test_a_weight_decay_that_was_changed_on_resuming_shrinks_the_weights(data_dir):
    norms = []
    for decay in (0.1, 50.0):
        argv = flags(data_dir=data_dir, max_steps=2, log_dir=f"log/{decay}")
        train_gpt2.main(argv)
        argv += ["--resume", "--max_steps=6", f"--weight_decay={decay}"]
        assert train_gpt2.main(argv) == 0
        model, _ = load_checkpoint(list_checkpoints(f"log/{decay}")[-1])
        norms.append(model.transformer.wte.weight.norm().item())
    assert norms[1] < 0.5 * norms[0]


def test_main_runs_where_stdout_is_no_terminal_and_puts_the_signal_handlers_back(
    data_dir, monkeypatch
):
    """As in Jupyter, whose output is an object of its own."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert train_gpt2.main(flags(data_dir=data_dir, max_steps=1)) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@posix
def test_an_interrupt_in_a_notebook_saves_a_checkpoint_and_a_second_one_interrupts(
    data_dir, monkeypatch
):
    windows = DataLoaderLite.windows

    def interrupted(times):
        calls = itertools.count()

        def interrupting(loader, numbers):
            if loader.is_train and next(calls) == 3:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
            return windows(loader, numbers)

        monkeypatch.setattr(DataLoaderLite, "windows", interrupting)
        return train_gpt2.main(flags("--resume", data_dir=data_dir))

    # As in a notebook. A process in the background may have been started with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert interrupted(1) == 130 and last_saved() == len(steps()) == 2
        assert interrupted(2) == 130 and last_saved() == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_resumed_quick_run_makes_a_missing_corpus_again(monkeypatch, capsys):
    def prepare(folder):
        raise ValueError(f"{folder} is made again")

    monkeypatch.setattr("fineweb.prepare_stdlib", prepare)
    shape, cfg = train_gpt2.PRESETS["quick"]
    facts = dict(config=dataclasses.asdict(shape), train_config=dataclasses.asdict(cfg))
    Path("log/quick").mkdir(parents=True)
    Path("log/quick/log.jsonl").write_text(json.dumps(facts) + "\n")
    assert train_gpt2.main(["--preset=quick", "--resume"]) == 1
    assert "data/stdlib is made again" in capsys.readouterr().err


def test_ipythons_run_magic_runs_the_program(data_dir):
    argv = " ".join(flags(data_dir=data_dir, max_steps=1))
    command = [sys.executable, "-m", "IPython", "-c", f"%run {ROOT / 'train_gpt2.py'} {argv}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stdout + done.stderr and steps() == [0], done.stdout


@pytest.mark.parametrize("pattern", [".", "checkpoint_000020.pt", "hf"])
def test_training_starts_from_the_weights_that_init_names(pattern, finished, data_dir):
    init = finished / pattern
    train_gpt2.main(
        flags(
            "--dropout=0.1", shape={}, data_dir=data_dir, max_steps=1, init=init, precision="fp32"
        )
    )
    model, tokenizer = load_model(init)
    loader = DataLoaderLite(data_dir, "val", 8, 32)
    expected, _ = evaluate(model, loader, RUN["val_tokens"], tokenizer)
    assert history("log")[0]["val_loss"] == pytest.approx(expected, abs=1e-5)
    config = load_checkpoint(list_checkpoints("log")[-1])[0].config
    assert config == dataclasses.replace(model.config, dropout=0.1)


def test_what_the_terminal_cannot_show_stops_nothing(data_dir, monkeypatch):
    """A new model's samples have characters of all kinds, and so has --help."""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "ascii"))
    train_gpt2.main(flags(data_dir=data_dir, max_steps=1))
    with pytest.raises(SystemExit) as error:
        train_gpt2.main(["--help"])
    assert not error.value.code and b"\\ufffd" in output.getvalue()


@pytest.mark.parametrize("text, value", [("True", True), ("False", False)])
def test_the_flag_bias_takes_the_words_true_and_false(text, value, data_dir):
    assert train_gpt2.main(flags(data_dir=data_dir, max_steps=1, bias=text)) == 0
    assert load_checkpoint("log/checkpoint_000001.pt")[0].config.bias is value


def test_help_tells_the_default_of_every_field(capsys):
    with pytest.raises(SystemExit):
        train_gpt2.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in FIELDS:
        assert "default" in text.split(f" --{field.name} ")[-1].split(" --")[0].lower()


def test_with_init_the_preset_is_gpt2(finished, data_dir):
    argv = flags(f"--init={finished}", shape={}, data_dir=data_dir, max_steps=1)
    assert train_gpt2.main([flag for flag in argv if "log_dir" not in flag]) == 0
    assert steps("log/gpt2") == [0]


# ----------------------------------------------------------------------------------- Bad input


@pytest.fixture
def error_of(capsys):
    """Run the program with a mistake -> the one line that it ends with, on stderr."""

    def error_of(argv) -> str:
        capsys.readouterr()
        assert train_gpt2.main(list(map(str, argv))) == 1
        line = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
        assert line.startswith("error: ")
        return line

    return error_of


@pytest.fixture
def fails(error_of):
    """The program ends with one line that has these words, and has begun no run."""

    def fails(argv, *words) -> None:
        line = error_of(argv)
        assert all(re.search(word, line) for word in words), line
        assert not [path for path in Path("log").rglob("*") if path.is_file()]
        assert not Path("exploded").exists()

    return fails


@pytest.mark.parametrize("flag, words", [
    ("--preset=gpt3", ["gpt3", "gpt2-medium"]),
    ("--layers=3", ["--layers", "--help"]),
    ("--n_lay=3", ["--n_lay"]),
    ("--n_layer", ["n_layer"]),
    ("--n_layer=three", ["n_layer", "three"]),
    ("--n_layer=-1", ["n_layer=-1"]),
    ("--n_embd=1152921504606846976", ["n_embd=1152921504606846976"]),
    ("--n_embd=33", ["n_embd=33", "n_head=2"]),
    ("--n_head=0", ["n_head=0"]),
    ("--dropout=1", ["dropout=1"]),
    ("--optimizer=sgd", ["optimizer", "sgd", "adamw"]),
    ("--max_lr=nan", ["max_lr=nan"]),
    ("--max_steps=0", ["max_steps=0"]),
    ("--total_batch_size=1000", ["total_batch_size=1000", "nearest is 992"]),
    ("--seq_len=64", ["seq_len=64", "block_size=32"]),
    ("--sample_prompt=" + "the " * 50, ["prompt", "32"]),
    ("--vocab_size=256", ["vocab_size=256", "300"]),
    ("--vocab_size=512", ["vocab_size=512", "300"]),
    ("--log_dir=file/log", ["file"]),
    ("--log_dir=file", ["file"]),
    ("surprise", ["surprise"]),
])  # fmt: skip
def test_a_wrong_flag_is_one_clear_line(flag, words, data_dir, fails):
    Path("file").touch()
    fails(flags(flag, data_dir=data_dir), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what it asks for")
def test_a_device_that_is_not_there_is_one_clear_line(data_dir, fails):
    fails(flags(data_dir=data_dir, device="cuda"), "device=.?cuda")


def test_a_precision_that_the_device_only_emulates_is_refused(data_dir, fails):
    fails(flags(data_dir=data_dir, device="cpu", precision="fp16"), "precision=fp16", "bf16")


def test_a_directory_that_holds_a_run_is_not_overwritten(finished, data_dir, fails):
    shutil.copytree(finished, "run")
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    fails(flags(data_dir=data_dir, log_dir="run"), "log_dir=run holds a run: --resume goes on")
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}


def test_resuming_a_model_of_another_shape_is_one_clear_line(finished, data_dir, fails):
    before = Path(shutil.copytree(finished, "run"), "log.jsonl").read_bytes()
    argv = flags("--resume", data_dir=data_dir, log_dir="run", n_layer=1)
    fails(argv, "checkpoint_000020.pt", "n_layer=2", "n_layer=1")
    assert Path("run/log.jsonl").read_bytes() == before


def numbers(array, **how):
    """A function that writes this array as a shard."""
    return lambda path: np.save(path, array, **how)


def claim(*shape):
    """A function that writes a shard which says to be of another size than it is."""

    def write(path):
        with open(path, "wb") as file:
            header = dict(descr="<u2", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(1000))

    return write


BAD_SHARDS = {
    "truncated": (claim(501), ""),
    "longer than its header says": (claim(499), ""),
    "claims 2^60 tokens": (claim(2**60), ""),
    "claims a negative size": (claim(-5), ""),
    "an empty file": (Path.touch, ""),
    "text": (lambda path: path.write_text("the " * 100), ""),
    "int64": (numbers(np.ones(500, np.int64)), "int64"),
    "two-dimensional": (numbers(np.ones((50, 50), np.uint16)), "50, 50"),
    "objects that would run": (numbers(np.array([Bomb()] * 500), allow_pickle=True), ""),
    "an id beyond the vocabulary": (numbers(np.full(500, 300, np.uint16)), "id 300 .*300"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("write, words", BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_a_bad_shard_among_good_ones_is_one_clear_line_that_names_it(
    write, words, split, data_dir, error_of
):
    shutil.copytree(data_dir, "data")
    write(Path(f"data/x_{split}_1.npy"))
    argv = flags(data_dir="data", max_steps=100, eval_every=99, val_tokens=10**6)
    assert re.search(rf"x_{split}_1\.npy.*{words}", error_of(argv))
    assert not Path("exploded").exists()


def remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


BAD_DIRECTORIES = {
    "missing": (shutil.rmtree, "data.*no such folder.*fineweb.py"),
    "empty": (remove("*"), "data.*no shards"),
    "without validation": (remove("*_val_*"), "data.*val"),
    "without training": (remove("*_train_*"), "data.*train"),
    "unfinished": (lambda folder: (folder / "progress.json").touch(), "data.*unfinished"),
    "half a tokenizer": (remove("vocab.bpe"), "vocab.bpe"),
    "shorter than a window": (
        lambda folder: [np.save(path, np.ones(32, np.uint16)) for path in folder.glob("*.npy")],
        "data.*train.*33 tokens",
    ),
}


@pytest.mark.parametrize("damage, words", BAD_DIRECTORIES.values(), ids=BAD_DIRECTORIES)
def test_a_bad_data_directory_is_one_clear_line(damage, words, data_dir, monkeypatch, fails):
    """Also where GPT-2's tokenizer, which a directory without its own would need, is not here."""
    monkeypatch.setattr("tiktoken.get_encoding", offline)
    damage(Path(shutil.copytree(data_dir, "data")))
    fails(flags(data_dir="data"), words)


def test_a_preset_without_its_data_is_an_error_and_no_silent_fall_back(monkeypatch, fails):
    monkeypatch.setattr("tiktoken.get_encoding", offline)
    fails(["--preset=gpt2"], "edu_fineweb10B.*fineweb.py")


@pytest.mark.parametrize("flag, words", [
    ("--generate=" + "the " * 50, "prompt.*32"),
    ("--n=0", "n=0"),
    ("--n=-1", "n=-1"),
    ("--max_new_tokens=-1", "max_new_tokens=-1"),
    ("--temperature=-1", "temperature=-1"),
    ("--temperature=nan", "temperature=nan"),
    ("--top_k=0", "top_k=0"),
    ("--top_k=-3", "top_k=-3"),
    ("--top_p=0", "top_p=0"),
    ("--top_p=2", "top_p=2"),
    ("--init=log/none", "log/none"),
    ("--init=missing.pt", "missing.pt"),
    ("--init=", "no run in log/"),
])  # fmt: skip
def test_a_wrong_wish_for_samples_is_one_clear_line(flag, words, finished, monkeypatch, fails):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails(["--generate=the ", f"--init={finished}", "--precision=fp32", flag], words)


@pytest.mark.parametrize("shape, words", [
    (dict(n_layer=3), ["n_layer=2", "n_layer.*3"]),
    (dict(block_size=64), ["block_size=32", "block_size.*64"]),
    (dict(vocab_size=300), ["vocab_size=384", "vocab_size.*300"]),
])  # fmt: skip
def test_weights_that_cannot_become_what_is_asked_are_one_clear_line(
    shape, words, finished, data_dir, fails
):
    init = list_checkpoints(finished)[-1]
    fails(flags(data_dir=data_dir, init=init, **shape), "init=", *words)


def test_weights_of_another_tokenizer_are_one_clear_line(finished, quick, data_dir, fails):
    argv = flags(data_dir=quick[0] / "data/stdlib", init=finished)
    fails(argv, "init=.*tokenizer.*data_dir=")


def test_poisoned_weights_stop_at_their_step_in_one_clear_line(finished, data_dir, error_of):
    shutil.copytree(finished, "poisoned")
    newest = list_checkpoints("poisoned")[-1]
    state = load_checkpoint(newest)[1]
    state["model"]["transformer.ln_f.bias"][0] = torch.nan
    torch.save(state, newest)
    assert re.search("step 0: .*nan", error_of(flags(data_dir=data_dir, init=newest)))
    assert not list_checkpoints("log")


def test_a_rate_so_high_that_training_diverges_is_one_clear_line(data_dir, error_of):
    how = dict(max_lr=1000, grad_clip=0, optimizer="adamw", max_steps=60, eval_every=1)
    argv = flags(data_dir=data_dir, precision="fp32", **how)
    assert re.search(r"step \d+: .*--max_lr", error_of(argv))


ANY = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-3, 3), st.floats(), st.text(max_size=20),
    st.sampled_from(["", "on", "None", "1e3", "0x10", "١٢", "inf", "-", "gpt2", "fp16"]),
)  # fmt: skip
NAMES = {field.name for field in FIELDS} | {"preset", "n", "top_k", "generate"}


@given(st.dictionaries(st.sampled_from(sorted(NAMES - {"log_dir", "init"})), ANY, max_size=4))
def test_any_flags_without_data_end_in_one_clear_line(fails, values):
    fails(["--data_dir=missing", *(f"--{k}={v}" for k, v in values.items()), "--data_dir=missing"])


WRONG = [
    ("train_gpt2.py", "--data_dir=missing"), ("hellaswag.py", "--data=missing"),
    ("fineweb.py", "--inspect=missing"), ("fineweb.py", "--input=missing", "--out_dir=log"),
]  # fmt: skip
WORDS = st.from_regex(r"--?[a-z_]{1,8}(=\w{0,8})?|[^\x00]{0,9}", fullmatch=True)


@settings(max_examples=times(2, 20), phases=[Phase.generate])
@given(st.sampled_from(WRONG), st.lists(WORDS, max_size=3))
def test_any_command_without_data_ends_in_an_error_without_a_traceback(command, words):
    program, *argv = command
    command = [sys.executable, str(ROOT / program), *argv, *words, *argv]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode and b"Traceback" not in done.stderr and b"error: " in done.stderr
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_the_seed_decides_the_first_weights(data_dir):
    losses = []
    for i, seed in enumerate((1, 1, 2)):
        train_gpt2.main(flags(data_dir=data_dir, max_steps=1, seed=seed, log_dir=f"log{i}"))
        losses.append(history(f"log{i}")[0]["val_loss"])  # before the first step
    assert losses[0] == losses[1] != losses[2]
