import time
from types import SimpleNamespace

import pytest
import torch
from golden_models import fresh_config
from torch.utils.flop_counter import FlopCounterMode

import run_pretrain
from modeling_umae import UMAEForPreTraining
from umae.runs import MetricsLog
from umae.speed import ideal_seconds, matmul_rate, peak_flops, training_flops


@pytest.mark.parametrize(
    "changes",
    [{}, {"pooling": "mean"}, {"decoder_num_hidden_layers": 0}, {"image_size": (16, 32), "mask_ratio": 0.4}],
    ids=str,
)
def test_the_formula_counts_what_torch_counts(changes):
    config = fresh_config(**changes)
    model = UMAEForPreTraining._from_config(config, attn_implementation="eager").train()
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, *config.image_height_width)).loss.backward()
    assert counter.get_total_flops() == 2 * training_flops(config)


def test_the_rate_is_that_of_a_matrix_product():
    a = torch.randn(1024, 1024)
    a @ a
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    expected = 10 * 2 * 1024**3 / (time.perf_counter() - start)
    assert expected / 4 < matmul_rate(torch.device("cpu"), torch.float32) < expected * 4  # other work may disturb


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA H100 80GB HBM3", "no", None),  # float32 has other units
        ("Tesla V100-SXM2-16GB", "bf16", None),  # has none for it
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),  # a part of one
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
    ],
)
def test_the_peak_is_that_of_the_data_sheet_or_none(name, precision, expected):
    assert peak_flops(name, precision) == expected


def test_without_a_known_peak_there_is_no_mfu():
    assert ideal_seconds(10**9, torch.device("cpu"), "no", 1).keys() == {"matmul_share"}


def test_what_older_runs_called_mfu_is_read_as_what_it_was(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mfu": 0.5}\n{"step": 2, "matmul_share": 0.6, "mfu": 0.3}\n')
    assert run_pretrain.cards.read_metrics(tmp_path) == [
        {"step": 1, "matmul_share": 0.5},
        {"step": 2, "matmul_share": 0.6, "mfu": 0.3},
    ]


def test_a_line_of_metrics_says_how_fast_training_is_and_how_long_it_waits(tmp_path):
    accelerator = SimpleNamespace(is_main_process=True, log=lambda values, step: None, device=torch.device("cpu"))
    log = MetricsLog(
        accelerator, tmp_path, start=0, pictures_per_step=8, ideal_seconds={"matmul_share": 0.001, "mfu": 0.0005}
    )

    def slow_batches():
        for batch in ({"index": 0}, {"index": 1}):
            time.sleep(0.3)
            yield batch

    batches = log.waited_for(slow_batches())
    for step in log.progress(2):
        assert next(batches) == {"index": step}
        time.sleep(0.1)
    with log.diagnosing():
        time.sleep(0.4)
    log.write(2, {"reconstruction_loss": 0.5, "participation_ratio": 2.0}, "loss 0.5")
    line = run_pretrain.cards.read_metrics(tmp_path)[0]
    assert 10 < line["pictures_per_second"] <= 20  # 16 in 0.8 seconds, without the diagnostics
    assert 0.4 <= line["diagnostics_seconds"] < 0.6
    assert line["matmul_share"] == pytest.approx(line["pictures_per_second"] * 0.001, rel=1e-3)
    assert line["mfu"] == pytest.approx(line["pictures_per_second"] * 0.0005, rel=1e-3)
    assert 0.6 < line["data_wait"] < 0.9
    assert next(batches, None) is None


def test_workers_are_shared_by_gpus_and_left_out_where_training_takes_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(20))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert run_pretrain.usual_workers(torch.device("cuda")) == 5
    assert run_pretrain.usual_workers(torch.device("cpu")) == 0
