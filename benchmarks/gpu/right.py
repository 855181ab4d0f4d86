"""Is what is computed on the GPU what a CPU computes, and does training keep its promises there?"""

import importlib
import pkgutil
import shutil
from contextlib import contextmanager
from functools import partial
from typing import Any

import golden_inputs
import torch
from golden_models import SETUP, VALUES, batch, pretraining_model
from torch._dynamo.utils import counters
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import umae
from benchmarks import measure
from benchmarks.gpu import programs
from benchmarks.gpu.fast import backend_of
from benchmarks.gpu.items import Bench, Item
from benchmarks.gpu.training import Training, largest_difference
from modeling_umae import UMAEForPreTraining, gather_patches, random_masking, uniformity_loss
from umae import UMAEConfig, seeding
from umae.training.checkpoints import Writer
from umae.training.failures import stop_if_failed
from umae.training.pretraining import VALUES as LOGGED

NAMES = ("norm_pix_loss", "mask_ratio", "pooling")  # of a golden case
WAYS = ("no", "layers", "model", "graphs")


def items(bench: Bench) -> list[Item]:
    found = [
        Item("all modules are imported", all_modules, 20),
        Item("attention kernels", partial(attention_kernels, bench), 10),
        Item("golden values, float64", partial(golden, bench, torch.float64, "highest", 1e-10), 10),
        Item("golden values, float32", partial(golden, bench, torch.float32, "highest", 1e-5), 10),
        Item("golden values, TF32", partial(golden, bench, torch.float32, "high", None), 10),
        Item("uniformity, float32", partial(uniformity, bench, "highest"), 5),
        Item("uniformity, TF32", partial(uniformity, bench, "high"), 5),
        Item("embeddings in training and evaluation", partial(embeddings, bench), 5),
        Item("random numbers and masks", partial(random_numbers, bench), 5),
        Item("an image that is not finite", partial(not_finite, bench), 10),
        Item("an overflow in fp16", partial(overflow, bench), 10),
        Item("names of a checkpoint's tensors", partial(names, bench), 10),
    ]
    found += [Item(f"no waiting, {way}", partial(no_waiting, bench, way), 10 if way == "no" else 60) for way in WAYS]
    found += [Item(f"number of graphs, {way}", partial(graphs, bench, way), 60) for way in WAYS[1:]]
    found += [
        Item(f"same bits, {precision}, {way}, {backend}", partial(same_bits, bench, precision, way, backend), seconds)
        for way, seconds in (("no", 10), ("model", 60))
        for precision in ("bf16", "fp16")
        for backend in ("flash", "efficient")
    ]
    return [*found, *programs.items(bench)]


def all_modules() -> dict[str, Any]:
    modules = [module.name for module in pkgutil.walk_packages(umae.__path__, "umae.")]
    for name in modules:
        if name not in ("umae.__main__", "umae.evaluation.metrics"):  # the latter needs `evaluate`
            importlib.import_module(name)
    return {"modules": len(modules)}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def attention_kernels(bench: Bench) -> dict[str, Any]:
    """What `sdpa` takes in a training step, by precision."""
    taken = {}
    config = UMAEConfig(**bench.fields("ViT-B/16"))
    model = UMAEForPreTraining._from_config(config, attn_implementation="sdpa").to(bench.device).train()
    pixel_values = torch.randn(2, config.num_channels, *config.image_height_width, device=bench.device)
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}.items():
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            with torch.autocast(bench.device, dtype, enabled=name != "float32"):
                loss = model(pixel_values).loss
            loss.backward()
        prefix = "aten::_scaled_dot_product_"
        used = {event.key for event in profiler.key_averages() if event.key.startswith(prefix)}
        taken[name] = ", ".join(sorted(key.removeprefix(prefix) for key in used if "backward" not in key))
    return taken


@contextmanager
def matmul_precision(precision: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def golden(bench: Bench, dtype: torch.dtype, precision: str, limit: float | None) -> dict[str, Any]:
    """Largest relative differences: of the losses from the original's values, of gradients from the CPU's."""
    worst = {"losses": 0.0, "gradients": 0.0}
    for case in VALUES["cases"]:
        gradients = []
        for device in ("cpu", bench.device):
            model = pretraining_model(dtype=dtype, **{name: case[name] for name in NAMES}).to(device)
            pixel_values, noise = (tensor.to(device) for tensor in batch(dtype=dtype))
            with matmul_precision(precision if device == bench.device else "highest"):
                output = model(pixel_values, noise=noise)
                output.loss.backward()
            gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
        found = (output.reconstruction_loss, output.uniformity_loss, output.loss)
        for value, key in zip(found, ("loss_mae", "loss_reg", "loss"), strict=True):
            worst["losses"] = max(worst["losses"], abs(value.item() / case[key] - 1))
        length = torch.nn.utils.get_total_norm(list(gradients[0].values())).item()
        worst["gradients"] = max(worst["gradients"], largest_difference(*gradients) / length)
    assert limit is None or max(worst.values()) < limit, f"{worst}, expected less than {limit}"
    return worst


def uniformity(bench: Bench, precision: str) -> dict[str, Any]:
    """The term alone, value and norm of the gradient, which stays exact whatever precision is set."""
    worst = 0.0
    for case in VALUES["uniformity"]:
        features = golden_inputs.features(SETUP.variant, case["count"], case["size"], case["shared"])
        features = torch.tensor(features, device=bench.device, requires_grad=True)
        with matmul_precision(precision):
            loss = uniformity_loss(features)
            loss.backward()
        relative = loss.item() / case["loss_reg"], features.grad.norm().item() / case["grad_norm"]
        worst = max(worst, *(abs(value - 1) for value in relative))
    assert worst < 1e-5, f"{worst}, expected less than 1e-5"
    return {"largest relative difference": worst}


def embeddings(bench: Bench) -> dict[str, Any]:
    """Of the visible patches alone in training, of all patches in evaluation; and those of a CPU, by a convolution."""
    config = UMAEConfig(**bench.fields("ViT-B/16"))
    module = UMAEForPreTraining(config).vit.embeddings
    pixel_values = torch.randn(4, config.num_channels, *config.image_height_width)
    ids_keep, _, _ = random_masking(torch.rand(4, config.grid[0] * config.grid[1]), 0.75)
    with torch.no_grad():
        by_cpu = gather_patches(module.eval()(pixel_values, None, config.grid)[:, 1:], ids_keep)
        module, pixel_values, ids_keep = (on.to(bench.device) for on in (module, pixel_values, ids_keep))
        trained = module.train()(pixel_values, ids_keep, config.grid)[:, 1:]
        evaluated = gather_patches(module.eval()(pixel_values, None, config.grid)[:, 1:], ids_keep)
    found = {"training": trained - evaluated, "CPU": by_cpu - evaluated.cpu()}
    largest = evaluated.abs().max().item()
    differences = {name: difference.abs().max().item() / largest for name, difference in found.items()}
    assert differences["training"] < 1e-6, f"{differences}, expected less than 1e-6 in training"
    return differences


def random_numbers(bench: Bench) -> dict[str, Any]:
    """Bit-equal on CPU and device: `seeding.uniform`'s device is that of the indices."""
    index = torch.arange(bench.pick(4096, 64))
    noise = seeding.uniform(3, seeding.MASK, 7, index, 196)
    masks = random_masking(noise, 0.75)
    there = random_masking(noise.to(bench.device), 0.75)
    drawn = seeding.uniform(3, seeding.MASK, 7, index.to(bench.device), 196)
    assert torch.equal(noise, drawn.cpu()), "seeding.uniform differs"
    for name, mine, theirs in zip(("ids_keep", "mask", "ids_restore"), masks, there, strict=True):
        assert torch.equal(mine, theirs.cpu()), f"random_masking's {name} differs"
    return {"numbers": noise.numel()}


# ----------------------------------------------------------------------------------------------------------------------
# Training


def no_waiting(bench: Bench, way: str) -> dict[str, Any]:
    """Steps that raise where they wait for the device, after some that may compile."""
    training = Training(bench, "bf16", way).steps(3)
    count = bench.pick(20, 2)
    batches = [training.batch(3 + i) for i in range(count)]  # pinning memory waits
    measure.synchronize(bench.device)
    try:
        if bench.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        for batch_of_step in batches:
            training.step(batch_of_step)
    finally:
        if bench.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return {"steps": count, **training.state.means()}


def graphs(bench: Bench, way: str) -> dict[str, Any]:
    """Compiled graphs after two steps, and after more with an evaluation between them."""
    counters.clear()
    training = Training(bench, "bf16", way).steps(2)
    after_two = counters["stats"]["unique_graphs"]
    training.steps(bench.pick(5, 1))
    training.state.model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # as `Monitor.evaluate`
        pixel_values = torch.randn(3, 3, *training.config.image_height_width, device=bench.device)
        training.state.model(pixel_values, features_only=True, mask_ratio=0.0)
    training.state.model.train()
    training.steps(bench.pick(5, 1))
    count = counters["stats"]["unique_graphs"]
    assert count == after_two > 0, f"{after_two} graphs after two steps, {count} after {training.state.step}"
    return {"graphs": count, "breaks": sum(counters["graph_break"].values())}


def same_bits(bench: Bench, precision: str, way: str, backend: str) -> dict[str, Any]:
    """Five steps, again, and with a checkpoint after three that a new process would continue from."""
    folder = bench.folder / "same_bits"
    shutil.rmtree(folder, ignore_errors=True)
    make = partial(Training, bench, precision, way, attention="sdpa")
    with sdpa_kernel(backend_of(bench.device, backend)):
        first = make().steps(5).tensors()
        torch._dynamo.reset()
        second = make().steps(5).tensors()
        torch._dynamo.reset()
        with Writer() as writer:
            make().steps(3).save(folder, writer)
        torch._dynamo.reset()
        resumed = make()
        resumed.state.restore(folder)
        resumed = resumed.steps(2).tensors()
    found = {"again": largest_difference(first, second), "resumed": largest_difference(first, resumed)}
    return {"equal": not any(found.values()), **found}


def not_finite(bench: Bench) -> dict[str, Any]:
    """An image of NaN in step 3: the weights stay those of step 2, and the error names the step's images."""
    training, spoiled = Training(bench, "bf16", "no"), []

    def spoil(model, arguments):
        pixel_values = arguments[0].clone()
        pixel_values[1] = torch.nan
        return (pixel_values, *arguments[1:]) if spoiled else None

    training.state.model.register_forward_pre_hook(spoil)
    before = training.steps(2).weights()
    spoiled.append(True)
    training.step()
    spoiled.clear()
    training.step()
    difference = largest_difference(before, training.weights())
    assert difference == 0, f"the weights have changed by {difference}"
    used = {step + 1: training.batch(step)["index"].tolist() for step in range(4)}
    try:
        stop_if_failed(training.failed, "image {}".format, "the bench", used, LOGGED, ("reconstruction_loss",))
    except FloatingPointError as error:
        assert "at step 3" in str(error) and f"image {used[3][1]}" in str(error), str(error)
        return {"error": str(error).split(", with the images")[0]}
    raise AssertionError("no error")


def overflow(bench: Bench) -> dict[str, Any]:
    """A gradient that overflows in step 3 of fp16: that step alone is left out, and the scale is halved."""
    training, spoiled = Training(bench, "fp16", "no"), []
    parameter = next(p for name, p in training.state.model.named_parameters() if name.endswith("vit.layernorm.bias"))
    parameter.register_hook(lambda gradient: gradient * torch.inf if spoiled else None)
    changed, scales = [], []
    for step in range(5):
        before = training.weights()
        spoiled[:] = [True] * (step == 2)
        training.step()
        changed.append(largest_difference(before, training.weights()) > 0)
        scales.append(training.accelerator.scaler.get_scale())
    # The first step has a learning rate of 0
    assert changed[1:] == [True, False, True, True] and scales[2] == scales[1] / 2 == scales[4], (changed, scales)
    assert training.failed[0].item() == 0, training.failed.tolist()
    return {"scale": f"{scales[1]:g}, then {scales[2]:g}"}


def names(bench: Bench) -> dict[str, Any]:
    """Of a checkpoint: the same whatever is compiled."""
    found = {way: set(Training(bench, "bf16", way).tensors()) for way in WAYS}
    for way in WAYS:
        assert found[way] == found["no"], f"{way}: {sorted(found[way] ^ found['no'])[:5]}"
    return {"tensors": len(found["no"])}


# ----------------------------------------------------------------------------------------------------------------------


def tables(results: dict[str, dict[str, Any]], bench: Bench) -> list[str]:
    rows = [
        [name, "; ".join(f"{key} {shown(value)}" for key, value in found.items())] for name, found in results.items()
    ]
    return [measure.table(("passed", "measured"), rows)] if rows else []


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
