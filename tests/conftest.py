"""What the tests share: a tiny model, corpus and run, and a process that they leave as it was."""

import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import fineweb  # noqa: E402
import train_gpt2  # noqa: E402

torch.set_num_threads(1)  # the tests' models are so small that more would only wait for each other
checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=checks
)
settings.register_profile("long", settings.get_profile("same"), max_examples=2500)
settings.load_profile("same")


def times(short, long):
    """How often a test generates, kills or damages something: in the suite, and in its long form,
    which is python -m pytest --hypothesis-profile=long."""
    return long if settings.get_current_profile_name() == "long" else short


# What a damaged or hostile JSON file may hold.
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9) | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 2**60, "", "train", "text"]),
    lambda some: st.lists(some) | st.dictionaries(st.text(max_size=9), some), max_leaves=6,
)  # fmt: skip


def broken(whole):
    """What a file may hold in the place of this JSON: one value in it is another, or is gone."""
    if not isinstance(whole, dict) or not whole:
        return ANY_JSON
    missing = [{k: v for k, v in whole.items() if k != key} for key in whole]
    replaced = [broken(whole[key]).map(lambda v, key=key: whole | {key: v}) for key in whole]
    return st.one_of(ANY_JSON, st.sampled_from(missing), *replaced)


SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=32)
RUN = dict(
    total_batch_size=8 * 32, micro_batch_size=4, seq_len=32, max_steps=12, warmup_steps=4,
    max_lr=1e-2, optimizer="muon", eval_every=6, checkpoint_every=4, val_tokens=640,
    sample_prompt="the ", hellaswag="off",
)  # fmt: skip


class Bomb:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def history(log_dir) -> list[dict]:
    """What a run's log says of its steps, but for time."""
    keys = ("step", "loss", "lr", "grad_norm", "val_loss", "bits_per_byte")
    records = train_gpt2.read_log(log_dir)
    return [{key: r[key] for key in keys if key in r} for r in records if "step" in r]


def assert_same(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An empty working directory. Seeds, and puts back what train_gpt2 sets in the whole process.

    Leaves out of a run what takes long: measuring the device, drawing the plot, writing the page.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2.Worker, "matmul_flops", lambda worker: 1e12)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **how: None)
    monkeypatch.setattr("life.write_page", lambda *args, **how: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()
    torch.manual_seed(0)
    yield tmp_path
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data directory as other programs leave one: shards, and here a tokenizer of 300 tokens."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abdeiklmnorstu", k=rng.randint(1, 6))) for _ in range(60)]
    lines = ["the " + " ".join(rng.choices(words, range(60, 0, -1), k=9)) for _ in range(900)]
    texts = ["\n".join(lines[i : i + 10]) + "\n" for i in range(0, 900, 10)]
    tokenizer = fineweb.train_tokenizer(texts, 300)
    folder = tmp_path_factory.mktemp("data")
    fineweb.save_tokenizer(tokenizer, folder)
    parts = dict(val_000000=texts[:15], train_000001=texts[15:60], train_000002=texts[60:])
    for name, texts in parts.items():
        ids = fineweb.encode(tokenizer, [(fineweb.EOT, text) for text in texts])
        np.save(folder / f"edufineweb_{name}.npy", ids)
    return folder


@pytest.fixture(scope="session")
def tokenizer(data_dir):
    return fineweb.load_tokenizer(data_dir)


def offline(*args):
    raise OSError("offline")


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer, where tiktoken has it in its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiktoken.load.read_file", offline)
        try:
            return fineweb.load_tokenizer()
        except OSError:
            pytest.skip("tiktoken's cache has no GPT-2 here (see TIKTOKEN_CACHE_DIR)")
