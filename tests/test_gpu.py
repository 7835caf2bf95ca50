"""What holds on a GPU. Without one, all of these tests are skipped.

They compare the GPU with itself, or with the CPU, on tiny models. On a machine with a GPU:
python -m pytest tests/test_gpu.py
"""

import os

import pytest
import torch
import torch.distributed as dist
from conftest import RUN, SHAPE, history

import hellaswag
import train_gpt2
from train_gpt2 import (
    GPT,
    DataLoaderLite,
    GPTConfig,
    TrainConfig,
    Worker,
    evaluate,
    prepare_net,
    sample_texts,
    start_worker,
    train,
)

pytestmark = [
    pytest.mark.usefixtures("sandbox"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU of CUDA here"),
]
FORMATS = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
TINY = GPTConfig(**SHAPE, vocab_size=384)
T = TINY.block_size


@pytest.fixture(autouse=True)
def exact_fp32():
    """TF32, which start_worker switches on, keeps 11 bits only."""
    torch.set_float32_matmul_precision("highest")


def make_model(config=TINY):
    torch.manual_seed(0)
    return GPT(config).to("cuda")


def make_batch(B=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TINY.vocab_size, (B, T + 1), generator=generator).to("cuda")
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def cuda_worker(dtype=torch.float32):
    return Worker(device=torch.device("cuda"), dtype=dtype)


def loss_and_gradients(net, model, x, y):
    model.zero_grad()
    loss = net(x, y)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def begin(log_dir, data_dir, precision="fp32", resume=False, signals=(), **cfg):
    """A run in this process, as the command line would start it."""
    flags = dict(data_dir=str(data_dir), log_dir=str(log_dir), device="cuda", precision=precision)
    cfg = TrainConfig(**RUN | dict(compile="off") | flags | cfg)
    log_dir.mkdir(exist_ok=True)
    worker = start_worker("cuda", precision)
    torch.set_float32_matmul_precision("highest")
    return train(make_model(), cfg, worker, resume, signals)


def last_loss(log_dir):
    return [record["val_loss"] for record in history(log_dir) if "val_loss" in record][-1]


def test_a_gpu_computes_the_loss_and_gradients_of_a_cpu():
    model, (x, y) = make_model(), make_batch()
    on_gpu = loss_and_gradients(model, model, x, y)
    model = model.cpu()
    on_cpu = loss_and_gradients(model, model, x.cpu(), y.cpu())
    torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0], rtol=1e-5, atol=1e-6)
    for name, grad in on_gpu[1].items():
        torch.testing.assert_close(grad.cpu(), on_cpu[1][name], rtol=1e-4, atol=1e-6)


def test_the_compiled_model_has_the_loss_and_gradients_of_the_model():
    model, (x, y) = make_model(), make_batch()
    eager = loss_and_gradients(model, model, x, y)
    compiled = loss_and_gradients(torch.compile(model), model, x, y)
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-5, atol=1e-6)
    for name, grad in compiled[1].items():
        torch.testing.assert_close(grad, eager[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_ends_near_the_loss_of_one_in_fp32(tmp_path, data_dir, precision):
    if precision == "bf16" and train_gpt2.fast_precision("cuda") != "bf16":
        pytest.skip("this GPU has no bf16")
    for name in ("fp32", precision):
        assert begin(tmp_path / name, data_dir, name) == 0
    assert abs(last_loss(tmp_path / precision) - last_loss(tmp_path / "fp32")) < 0.05


@pytest.mark.parametrize("name", FORMATS)
def test_generation_with_the_cache_takes_the_likeliest_token_of_the_whole_pass(name):
    if name == "bf16" and train_gpt2.fast_precision("cuda") != "bf16":
        pytest.skip("this GPU has no bf16")
    model, prompt = make_model().eval(), make_batch(B=3)[0][:, :5]
    with torch.no_grad(), cuda_worker(FORMATS[name]).autocast():
        written = model.generate(prompt, 20, temperature=0)  # (3, 25)
        logits = model(written[:, :-1]).float()[:, 4:]  # (3, 20, V)
    chosen = logits.gather(2, written[:, 5:, None])[..., 0]
    near = 1e-4 if name == "fp32" else 2e-2  # half precision rounds, and may swap equals
    assert (logits.max(dim=2).values - chosen).max() < near


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, data_dir):
    constant = dict(min_lr_ratio=1.0)  # so that the rate does not depend on max_steps
    assert begin(tmp_path / "whole", data_dir, **constant) == 0
    assert begin(tmp_path / "parts", data_dir, max_steps=8, **constant) == 0
    assert begin(tmp_path / "parts", data_dir, resume=True, **constant) == 0
    assert [r["step"] for r in history(tmp_path / "parts") if "loss" in r] == list(range(12))
    # A GPU adds in an order that differs from run to run, so the last bits may differ.
    assert abs(last_loss(tmp_path / "parts") - last_loss(tmp_path / "whole")) < 1e-3


def test_one_worker_under_nccl_has_the_gradients_of_a_plain_process(monkeypatch, tmp_path):
    model, (x, y) = make_model(), make_batch()
    alone = loss_and_gradients(model, model, x, y)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        averaged = loss_and_gradients(net, model, x, y)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(averaged[0], alone[0])
    for name, grad in averaged[1].items():
        torch.testing.assert_close(grad, alone[1][name], rtol=1e-4, atol=1e-6)


def test_evaluating_and_sampling_compile_nothing(data_dir, tokenizer):
    """Each of them has inputs of many lengths, for each of which a compiled net would be made."""
    cfg = TrainConfig(**RUN | dict(compile="on", data_dir=str(data_dir)))
    model, worker = make_model(), cuda_worker()
    prepare_net(model, cfg, T, worker)  # compiles, in its first pass
    loader = DataLoaderLite(data_dir, "val", 4, T)
    examples = [dict(ctx="the the", endings=["a", "the", "b b", "d"], label=1)] * 3
    with torch.compiler.set_stance("fail_on_recompile"):
        evaluate(model, loader, 10 * T, tokenizer, worker)
        sample_texts(model, tokenizer, worker, "the ", n=2, max_new_tokens=5)
        hellaswag.evaluate(model, tokenizer, examples, worker)


def test_a_compiled_step_of_gpt2_with_8_sequences_fits_into_16_gb(tmp_path):
    if torch.cuda.get_device_properties(0).total_memory < 17e9:
        pytest.skip("this GPU has less than 16 GB")
    shape = GPTConfig(vocab_size=50304)
    torch.manual_seed(0)
    model = GPT(shape).to("cuda")
    cfg = TrainConfig(total_batch_size=8 * 1024, micro_batch_size=8)
    worker = cuda_worker(FORMATS[train_gpt2.fast_precision("cuda")])
    torch.cuda.reset_peak_memory_stats()
    net, B, micro_steps = prepare_net(model, cfg, 1024, worker)
    optimizers = train_gpt2.configure_optimizers(model, cfg, worker.dtype)
    x = torch.randint(50257, (B, 1024), device="cuda")
    with worker.autocast():
        loss = net(x, x)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    peak = torch.cuda.max_memory_allocated()
    print(f"peak memory: {peak / 1e9:.2f} GB")
    assert (B, micro_steps) == (8, 1) and peak < 16e9


def test_a_micro_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch, capfd):
    cfg = TrainConfig(total_batch_size=8 * T, micro_batch_size=8, compile="off")
    model, worker = make_model(), cuda_worker()
    forward = model.forward

    def small_card(idx, targets=None):
        if len(idx) > 2:
            torch.empty(2**50, device="cuda")  # a petabyte
        return forward(idx, targets)

    monkeypatch.setattr(model, "forward", small_card)
    _, B, micro_steps = prepare_net(model, cfg, T, worker)
    assert (B, micro_steps) == (2, 4)
    assert "2 sequences at once" in capfd.readouterr().out


def test_a_worker_more_than_there_are_gpus_is_refused(monkeypatch):
    n = torch.cuda.device_count()
    for key, value in dict(RANK=n, WORLD_SIZE=n + 1, LOCAL_RANK=n).items():
        monkeypatch.setitem(os.environ, key, str(value))
    with pytest.raises(ValueError, match="take --device cpu, or a lower"):
        start_worker("cuda")
