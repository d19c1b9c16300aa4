"""A tiny random Llama with a tokenizer of its own, made once per session and saved to a folder."""

from __future__ import annotations

import os
import random
import re

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a hub name fails at once, as it does on a machine without network

TEXT = """The residual stream of a language model carries what its blocks read and write.

A sparse autoencoder writes an activation as a sum of a few directions of a dictionary.

How many directions are needed differs from token to token: a comma needs few, a name many."""


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    """A folder with ten text files of distinct paragraphs."""
    folder = tmp_path_factory.mktemp("prose")
    words = sorted(set(re.findall(r"\w+", TEXT.lower())))
    draw = random.Random(0)
    for number in range(10):
        paragraphs = [" ".join(draw.choices(words, k=20)).capitalize() + "." for _ in range(30)]
        (folder / f"file{number}.txt").write_text("\n\n".join(paragraphs))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a Llama with 4 blocks, d = 32 and random weights, and a byte-level BPE tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    import torch

    folder = tmp_path_factory.mktemp("tiny")
    # Not trained: of equally frequent pairs the trainer merges others every time.
    merges = {}
    for word in sorted(set(re.findall("[A-Za-z]+", TEXT))):
        for end in range(len(word)):
            merges["Ġ" + word[:end], word[end]] = None
    merges = list(merges)[:120]
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<end>", *symbols, *map("".join, merges)]
    bpe = tokenizers.ByteLevelBPETokenizer({symbol: i for i, symbol in enumerate(vocabulary)}, merges)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # the blocks then write as much as the embedding: layers differ
    model.save_pretrained(folder)
    return folder
