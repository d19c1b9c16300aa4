"""The corpus: where it comes from, that its halves share nothing, and how it becomes sequences."""

from __future__ import annotations

import numpy as np
import pytest

from softsae.sequences import tokenize
from softsae.text import Document, corpus, docstrings, paragraphs, shingle_hashes, split


@pytest.fixture(scope="module")
def python_prose():
    return corpus(heldout=0.1)


def test_the_prose_of_this_python_is_plenty(python_prose):
    train, held = python_prose
    assert sum(len(d.text) for d in train) > 1_000_000
    share = sum(len(d.text) for d in held) / sum(len(d.text) for d in train + held)
    assert 0.07 < share < 0.13
    kinds = {d.name.split()[0] for d in held}
    assert {"topic", "module"} <= kinds


def test_heldout_shares_no_document_and_no_paragraph_with_train(python_prose):
    train, held = python_prose
    assert not {d.name for d in train} & {d.name for d in held}
    known = {" ".join(p.split()).lower() for d in train for p in paragraphs(d.text)}
    assert not [p for d in held for p in paragraphs(d.text) if " ".join(p.split()).lower() in known]
    shingles = set().union(*(shingle_hashes(p) for d in train for p in paragraphs(d.text)))
    for d in held:
        for p in paragraphs(d.text):
            own = shingle_hashes(p)
            assert 2 * len(own & shingles) < len(own)


def test_the_split_depends_on_names_only(python_prose):
    again = corpus(heldout=0.1)
    assert [d.name for d in again[1]] == [d.name for d in python_prose[1]]


def test_near_duplicates_are_removed_from_the_heldout_part():
    sentence = " ".join(f"word{i}" for i in range(40))
    documents = [Document(str(i), f"own words of number {i} here\n\n{sentence} tail{i}") for i in range(10)]
    train, held = split(documents, 0.3)
    assert sum(sentence in d.text for d in train) == 1
    assert held and not any(sentence in d.text for d in held)


def test_docstrings_are_read_without_running_anything(tmp_path):
    (tmp_path / "m.py").write_text(
        '"""A module with a docstring that is long enough to keep."""\nraise SystemExit\n'
        'def f():\n    """Short."""\ndef g():\n    """A function with a docstring that is long enough."""\n'
    )
    text = docstrings(tmp_path / "m.py")
    assert text.split("\n\n")[1].startswith("A function") and "Short" not in text
    (tmp_path / "bad.py").write_text("def (")
    assert docstrings(tmp_path / "bad.py") == ""


def test_wrong_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        corpus([tmp_path / "absent.txt"])
    with pytest.raises(ValueError, match="holds no .txt"):
        corpus([tmp_path])
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt' is not UTF-8"):
        corpus([tmp_path / "latin.txt"])
    (tmp_path / "one.txt").write_text("a single paragraph")
    with pytest.raises(ValueError, match="too little text"):
        corpus([tmp_path / "one.txt"])
    with pytest.raises(ValueError, match="heldout=1.5"):
        corpus(heldout=1.5)


class Words:
    """A tokenizer: one token per word, its number being its length."""

    def __call__(self, texts, add_special_tokens, verbose):
        class Encoded:
            input_ids = [[len(word) for word in text.split()] for text in texts]

        return Encoded


def test_sequences_cut_documents_and_draw_at_random():
    documents = [Document(str(i), " ".join(["a" * (i + 1)] * 50)) for i in range(9)]
    every = tokenize(Words(), documents, context=20)
    assert every.tokens == 450 and len(every) == 27 and every.longest == 20
    assert all((every[s] == every.document[s] + 1).all() for s in range(len(every)))
    assert (np.diff([len(every[s]) for s in range(len(every))]) <= 0).all()
    some = tokenize(Words(), documents, context=20, max_tokens=100, seed=1)
    assert 100 <= some.tokens < 120
    assert not np.array_equal(
        some.document, tokenize(Words(), documents, context=20, max_tokens=100, seed=2).document
    )
    batches = list(every.batches(4))
    assert sum(int(lengths.sum()) for _, lengths in batches) == 450
    ids, lengths = batches[-1]
    assert ids.shape == (len(lengths), lengths.max())
    drawn = every.draw(100, seed=0)
    assert 100 <= drawn.tokens < 120 and set(drawn.document) <= set(every.document)
    with pytest.raises(ValueError, match="context=3"):
        tokenize(Words(), documents, context=3)
    with pytest.raises(ValueError, match="no document of 1 has 8 tokens"):
        tokenize(Words(), [Document("d", "too few words")], context=20)
