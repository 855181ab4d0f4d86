"""Weights of other families to models of ours, and ours to other formats."""

from umae.convert.families import read_model
from umae.convert.loading import (
    encoder_from_pretrained,
    leave_out_final_layernorm,
    load_exactly,
    resize_positions,
    set_pooling,
)

__all__ = [
    "encoder_from_pretrained",
    "leave_out_final_layernorm",
    "load_exactly",
    "read_model",
    "resize_positions",
    "set_pooling",
]
