"""A benchmark's figures are for people, but an error in it should not wait for them."""

import json

import pytest
from processes import run

from benchmarks import loader
from benchmarks.gpu.trace import category


def test_loading_is_measured_on_a_small_set(monkeypatch):
    measured = loader.images_per_second
    monkeypatch.setattr(loader, "images_per_second", lambda batches_of, plan, batches: measured(batches_of, plan, 1))
    table = loader.small_set("digits", repetitions=1)
    assert "1,438 images of 8 x 8, no worker" in table and table.count("ours") == 2


def on_a_gpu(folder, *flags: str, check: bool = True):
    """`python -m benchmarks.gpu --tiny`; the process, and the newest record of every item."""
    result = run("-m", "benchmarks.gpu", "--tiny", "--output_dir", folder, *flags, check=check, timeout=3000)
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return result, {(line["part"], line["item"]): line for line in lines if "item" in line}


QUICK = {
    "right": "golden values, float64|uniformity|numbers|finite|fp16, no, flash|overflow|waiting, no$",
    "fast": "eager|attention",
    "judged": "",
}


@pytest.mark.parametrize(
    "part", ["right", *(pytest.param(part, marks=pytest.mark.slow) for part in ("fast", "judged"))]
)
def test_what_a_gpu_takes_no_compiler_for_is_tried_on_a_cpu(part, tmp_path):
    result, records = on_a_gpu(tmp_path, "--part", part, "--items", QUICK[part])
    assert len(records) > 5 and {record["status"] for record in records.values()} == {"done"}
    (report,) = tmp_path.glob("gpu_*.md")
    for _, item in records:
        assert item == "import" or f"    done in {records[part, item]['seconds']:.1f} s" in result.stdout
    assert f"## {part.capitalize()}" in report.read_text()


def test_an_item_that_fails_is_recorded_and_run_again_and_one_that_is_done_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    flags = ("--part", "fed", "--items", "loader, Pillow, 1 ", "--images", tmp_path / "empty")
    first, before = on_a_gpu(tmp_path / "work", *flags, check=False)
    lines = (tmp_path / "work" / "records.jsonl").read_text().splitlines()
    second, after = on_a_gpu(tmp_path / "work", *flags, check=False)
    assert first.returncode == second.returncode == 1
    done, failed = before
    assert before[done]["status"] == "done" and before[done] == after[done]
    assert before[failed]["status"] == after[failed]["status"] == "failed"
    added = [json.loads(line) for line in (tmp_path / "work" / "records.jsonl").read_text().splitlines()[len(lines) :]]
    assert [record["item"] for record in added if "item" in record] == [failed[1]]
    (report,) = (tmp_path / "work").glob("gpu_*.md")
    text = report.read_text()
    assert "**Failed: loader, Pillow, 1 workers**" in text and before[failed]["error"].splitlines()[-1] in text


@pytest.mark.slow
def test_every_item_for_a_gpu_is_tried_on_a_cpu(tmp_path):
    _, records = on_a_gpu(tmp_path)
    (report,) = tmp_path.glob("gpu_*.md")
    assert {part for part, _ in records} == {"right", "fast", "fed", "judged"}
    assert "Not run" not in report.read_text() and "Failed" not in report.read_text()


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "GEMM"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1", "attention"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", "norms"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float>", "norms"),
        ("triton_per_fused_add_native_layer_norm_5", "norms"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>", "casts"),
        ("triton_poi_fused__to_copy_3", "casts"),
        ("triton_poi_fused__to_copy_gelu_gelu_backward_12", "elementwise"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<..., FusedAdamMathFunctor>", "optimiser"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
    ],
)
def test_kernels_are_sorted_by_their_names(kernel, expected):
    assert category(kernel) == expected
