"""The model against values that the original code computed in float64 (golden.json says how)."""

import golden_inputs
import numpy as np
import pytest
import torch
from golden_models import SETUP, VALUES, batch, our_name, pretraining_model

from modeling_umae import CODING_RATE_SCALE, coding_rate_loss, random_masking, sincos_position_table, uniformity_loss
from umae.training.schedules import decay_groups, learning_rate_at

CASES = pytest.mark.parametrize(
    "case", VALUES["cases"], ids=lambda c: f"{c['pooling']}-{c['mask_ratio']}-{'norm' if c['norm_pix_loss'] else 'raw'}"
)


def model_of(case, dtype=torch.float32, **config):
    names = ("norm_pix_loss", "mask_ratio", "pooling")
    return pretraining_model(dtype=dtype, **{name: case[name] for name in names}, **config)


def head_of(dtype=torch.float32) -> torch.nn.Linear:
    """golden's online classifier, which sees detached features."""
    weights = golden_inputs.weights(SETUP)
    head = torch.nn.Linear(SETUP.hidden_size, SETUP.num_classes)
    head.load_state_dict({kind: torch.tensor(weights[f"classifier.{kind}"]) for kind in ("weight", "bias")})
    return head.to(dtype)


@CASES
def test_losses_predictions_and_features_are_the_originals(case):
    pixel_values, noise = batch()
    output = model_of(case)(pixel_values, noise=noise, output_logits=True)
    assert output.reconstruction_loss.item() == pytest.approx(case["loss_mae"], rel=2e-6)
    assert output.uniformity_loss.item() == pytest.approx(case["loss_reg"], rel=2e-6)
    assert output.loss.item() == pytest.approx(case["loss"], rel=2e-6)
    assert output.logits.norm().item() == pytest.approx(case["pred_norm"], rel=2e-6)
    for *at, value in case["pred"]:
        assert output.logits[tuple(at)].item() == pytest.approx(value, abs=1e-5)
    for *at, value in case["features"]:
        assert output.features[tuple(at)].item() == pytest.approx(value, abs=1e-5)


@CASES
def test_losses_agree_to_ten_digits_in_float64(case):
    pixel_values, noise = batch(dtype=torch.float64)
    output = model_of(case, torch.float64)(pixel_values, noise=noise)
    assert output.reconstruction_loss.item() == pytest.approx(case["loss_mae"], rel=1e-10)
    assert output.uniformity_loss.item() == pytest.approx(case["loss_reg"], rel=1e-10)
    assert output.loss.item() == pytest.approx(case["loss"], rel=1e-10)


@CASES
@pytest.mark.parametrize("term", ["mae", "reg", "total"])
def test_gradient_norms_are_the_originals(case, term):
    model = model_of(case, uniformity_weight=0.0 if term == "mae" else 0.01)
    pixel_values, noise = batch()
    output = model(pixel_values, noise=noise)
    loss = uniformity_loss(output.features) if term == "reg" else output.loss
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, norm in case["grad_norms"][term].items():
        if our_name(name) not in parameters:  # fc_norm exists only with mean pooling
            assert norm is None
            continue
        grad = parameters[our_name(name)].grad
        if norm is None:
            assert grad is None or not grad.any(), f"the {term} term reaches {name}"
        else:
            assert grad.norm().item() == pytest.approx(norm, rel=5e-6), name


@pytest.mark.parametrize("ratio", VALUES["masks"])
def test_masks_are_the_originals_bit_for_bit(ratio):
    _, mask, _ = random_masking(batch()[1], float(ratio))
    assert ["".join(str(int(bit)) for bit in row) for row in mask] == VALUES["masks"][ratio]


def test_class_pooling_norms_twice_and_keeps_the_diagonal():
    case = VALUES["cases"][0]
    pixel_values, noise = batch()
    value = model_of(case)(pixel_values, noise=noise).uniformity_loss.item()
    assert value == pytest.approx(0.489737, abs=1e-6)
    assert abs(value - case["wrong_loss_reg"]["without_last_norm"]) > 0.02
    assert abs(value - case["wrong_loss_reg"]["without_diagonal"]) > 0.1


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_position_tables_are_the_originals(part):
    expected = VALUES["position_embedding"][part]
    table = sincos_position_table(expected["shape"][-1], (SETUP.grid, SETUP.grid))
    assert list(table.shape) == expected["shape"]
    assert table.double().sum().item() == pytest.approx(expected["sum"], rel=1e-7)
    for row, column, value in expected["entries"]:
        assert table[0, row, column].item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("case", VALUES["uniformity"], ids=lambda c: f"{c['count']}x{c['size']}-{c['shared']}")
def test_uniformity_term_alone_is_the_originals(case):
    features = golden_inputs.features(SETUP.variant, case["count"], case["size"], case["shared"])
    features = torch.tensor(features, requires_grad=True)
    loss = uniformity_loss(features)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss_reg"], rel=2e-6)
    assert features.grad.norm().item() == pytest.approx(case["grad_norm"], rel=5e-6)
    for *at, value in case["grad"]:
        assert features.grad[tuple(at)].item() == pytest.approx(value, rel=1e-4)


def coding_rate_in_numpy(features: np.ndarray, scale: float) -> tuple[float, np.ndarray]:
    """`-log det(I + scale / N * F^T F)` of the features on the unit sphere, from singular values, and its gradient."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / lengths
    left, values, right = np.linalg.svd(unit, full_matrices=False)
    eigenvalues = values**2 / len(unit)
    gradient = -(left * (2 * scale / len(unit) * values / (1 + scale * eigenvalues))) @ right
    gradient -= (gradient * unit).sum(axis=1, keepdims=True) * unit  # along a feature its direction does not change
    return -np.log1p(scale * eigenvalues).sum(), gradient / lengths


@pytest.mark.parametrize("case", VALUES["uniformity"], ids=lambda c: f"{c['count']}x{c['size']}-{c['shared']}")
def test_coding_rate_is_that_of_its_definition_in_float64(case):
    features = golden_inputs.features(SETUP.variant, case["count"], case["size"], case["shared"])
    value, gradient = coding_rate_in_numpy(features.astype(np.float64), CODING_RATE_SCALE)
    for dtype, accuracy in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        tensor = torch.tensor(features, dtype=dtype, requires_grad=True)
        loss = coding_rate_loss(tensor)
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=accuracy)
        assert np.linalg.norm(tensor.grad.numpy() - gradient) < 20 * accuracy * np.linalg.norm(gradient)


def test_coding_rate_is_that_of_mmae_for_its_batch_and_width():
    """yifanzhang-pro/M-MAE computes -log det(I + mu / D * F^T F), with mu 1 by default, its script on 1,024 images."""
    features = golden_inputs.features(SETUP.variant, 1024, 768, 1.0).astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    _, value = np.linalg.slogdet(np.eye(768) + 1.0 / 768 * unit.T @ unit)
    assert coding_rate_loss(torch.tensor(features)).item() == pytest.approx(-value, rel=1e-12)


@pytest.mark.parametrize("run", VALUES["training"], ids=lambda r: f"accumulation-{r['accumulation']}")
def test_training_runs_are_the_originals_step_by_step(run):
    model, head = model_of(run, uniformity_weight=run["lamb"]).train(), head_of()
    both = torch.nn.ModuleList([model, head])
    optimizer = torch.optim.AdamW(
        decay_groups(both, run["weight_decay"]), lr=0.0, betas=run["betas"], eps=run["eps"], fused=True
    )
    accumulation, per_epoch = run["accumulation"], run["batches_per_epoch"]
    total, warmup = run["epochs"] * per_epoch, run["warmup_epochs"] * per_epoch
    for i, expected in enumerate(run["batches"]):
        if i % accumulation == 0:
            learning_rate = learning_rate_at(i, total, warmup, run["lr"], run["min_lr"])
            assert learning_rate == pytest.approx(expected["lr"], rel=1e-9)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        pixel_values, noise = batch(step=i)
        output = model(pixel_values, noise=noise)
        labels = torch.tensor(golden_inputs.labels(SETUP, step=i))
        loss = output.loss + torch.nn.functional.cross_entropy(head(output.features.detach()), labels)
        (loss / accumulation).backward()
        assert output.reconstruction_loss.item() == pytest.approx(expected["loss_mae"], rel=5e-6)
        assert output.uniformity_loss.item() == pytest.approx(expected["loss_reg"], rel=5e-6)
        assert loss.item() == pytest.approx(expected["loss_with_classifier"], rel=5e-6)
        if (i + 1) % accumulation == 0:
            grads = [p.grad for p in both.parameters() if p.grad is not None]
            assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(expected["grad_norm"], rel=5e-6)
            optimizer.step()
            optimizer.zero_grad()
    parameters = {**dict(model.named_parameters()), **{f"classifier.{k}": v for k, v in head.named_parameters()}}
    for name, norm in run["final_parameter_norms"].items():
        if our_name(name) in parameters:
            assert parameters[our_name(name)].norm().item() == pytest.approx(norm, rel=5e-6), name


@pytest.mark.parametrize("row", VALUES["learning_rate"], ids=lambda r: f"{r['recipe']}-{r['step']}")
def test_learning_rate_is_the_originals(row):
    total, warmup = (row[name] * row["steps_per_epoch"] for name in ("epochs", "warmup_epochs"))
    value = learning_rate_at(row["step"], total, warmup, row["lr"], row["min_lr"])
    assert value == pytest.approx(row["value"], rel=1e-9, abs=1e-15)
