"""Checkpoints: their files, their tensors, and the networks built from them."""
