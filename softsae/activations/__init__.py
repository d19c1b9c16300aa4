"""Activations to train on: tensors, iterators, .npy files, folders of shards from a language model."""

from __future__ import annotations
