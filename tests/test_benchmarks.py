"""A benchmark's figures are for people, but an error in it should not wait for them."""

from benchmarks import loader


def test_loading_is_measured_on_a_small_set(monkeypatch):
    measured = loader.images_per_second
    monkeypatch.setattr(loader, "images_per_second", lambda batches_of, plan, batches: measured(batches_of, plan, 1))
    table = loader.small_set("digits", repetitions=1)
    assert "1,438 images of 8 x 8, no worker" in table and table.count("ours") == 2
