import time
from types import SimpleNamespace

import pytest
import torch
from golden_models import fresh_config
from torch.utils.flop_counter import FlopCounterMode

from modeling_umae import UMAEForPreTraining
from umae.sharing import cards
from umae.speed import ideal_seconds, matmul_rate, peak_flops, training_flops
from umae.training import log as training_log
from umae.training.hardware import usual_workers
from umae.training.log import MetricsLog


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


def test_the_rate_is_the_best_of_several_products_with_all_their_operations(monkeypatch):
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(time, "perf_counter", counter.get_total_flops)  # a clock that ticks with every operation
        assert matmul_rate(torch.device("cpu"), torch.float32) == 1
        # Start and end of products, of which the third is the best; a slow device computes one only
        for scale, products, best in ((1, 1, 8), (1e-4, 20, 2e-4)):
            clock = iter([scale * now for now in (0, 8, 8, 12, 12, 14, *range(20, 1000, 10))])
            monkeypatch.setattr(time, "perf_counter", lambda clock=clock: next(clock))
            before = counter.get_total_flops()
            rate = matmul_rate(torch.device("cpu"), torch.float32)
            assert rate == pytest.approx((counter.get_total_flops() - before) / products / best)


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
    assert cards.read_metrics(tmp_path) == [
        {"step": 1, "matmul_share": 0.5},
        {"step": 2, "matmul_share": 0.6, "mfu": 0.3},
    ]


def test_a_line_of_metrics_says_how_fast_training_is_and_how_long_it_waits(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(training_log, "ideal_seconds", lambda *arguments: {"matmul_share": 0.001, "mfu": 0.0005})
    accelerator = SimpleNamespace(
        is_main_process=True, log=lambda values, step: None, device=torch.device("cpu"), mixed_precision="no",
        num_processes=1,
    )  # fmt: skip
    log = MetricsLog(accelerator, tmp_path, images_per_step=8)
    log.begin(step=0, flops=1)

    def slow_batches():
        for batch in ({"index": 0}, {"index": 1}):
            clock.now += 0.375
            yield batch

    batches = log.waited_for(slow_batches())
    for step in log.progress(2):
        assert next(batches) == {"index": step}
        assert log.bar.n == step, "also between its own lines"
        clock.now += 0.125
    with log.evaluating():
        clock.now += 0.5
    log.write(2, {"reconstruction_loss": 0.5, "participation_ratio": 2.0}, "loss 0.5")
    line = cards.read_metrics(tmp_path)[0]
    assert line["pictures_per_second"] == 16.0  # 16 in a second, without the diagnostics
    assert (
        line["diagnostics_seconds"] == 0.5
        and line["data_wait"] == 0.75
        and line["matmul_share"] == 0.016
        and line["mfu"] == 0.008
    )
    assert next(batches, None) is None


def test_workers_are_shared_by_gpus_and_left_out_where_training_takes_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(20))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert usual_workers(torch.device("cuda")) == 5
    assert usual_workers(torch.device("cpu")) == 0
