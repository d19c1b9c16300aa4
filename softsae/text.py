"""Text to collect activations from: the prose of a Python installation, or the user's files.

Documents are split into train and held-out by name (topic, module, file), and every held-out
paragraph that also occurs in the training part is removed, so that held-out numbers are not earned
by memory: the same paragraph appears under several topics and in several modules.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHINGLE = 8  # words; two paragraphs that share half of their shingles count as the same
MIN_PARAGRAPH = 40  # characters; shorter docstrings say little
SECTION = 4000  # characters of a user's file that make one document
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
SKIPPED_FOLDERS |= {"__pycache__", "pydoc_data"}  # the topics are read by themselves


@dataclass(frozen=True)
class Document:
    """A named text: one topic, one module's docstrings, or one section of a file."""

    name: str
    text: str


def corpus(
    paths: Sequence[str | Path] | str | None = None, heldout: float = 0.1
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, from `paths` or, without any, from this Python's own prose.

    Args:
        paths: a text file in UTF-8 or several, or folders that are searched for *.txt, *.md and *.rst.
        heldout: the share of the characters that is held out, 0 < heldout < 1.

    Raises:
        FileNotFoundError, ValueError: a path that is missing, empty or not UTF-8; heldout out of
            range; too little text to split.
    """
    if not 0 < heldout < 1:
        raise ValueError(f"heldout={heldout} must lie between 0 and 1")
    paths = [paths] if isinstance(paths, str) else paths
    documents = read_files(paths) if paths else standard_library()
    return split(documents, heldout)


def standard_library() -> list[Document]:
    """The prose of this Python installation: help topics and the docstrings of its modules.

    A few hundred thousand tokens. Sources are parsed, nothing is imported or executed.
    """
    documents = []
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions strip it
        topics = {}
    documents += [Document(f"topic {name}", topic) for name, topic in sorted(topics.items())]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sources(root):
        if text := docstrings(path):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            documents.append(Document(f"module {name}", text))
    licence = root / "LICENSE.txt"
    if licence.is_file():
        documents.append(Document("LICENSE", licence.read_text("utf-8", errors="replace")))
    if not documents:
        raise ValueError(f"no help topics and no sources in {root}: give text files with --text")
    return documents


def sources(root: Path) -> list[Path]:
    """Python files below a folder, those of SKIPPED_FOLDERS left out without being looked through."""
    found: list[Path] = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def docstrings(path: Path) -> str:
    """The docstrings of a Python source in its order, as paragraphs; "" when it cannot be parsed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return ""
    found = [ast.get_docstring(node) for node in documented(tree)]
    return "\n\n".join(text for text in found if text and len(text) >= MIN_PARAGRAPH)


def documented(node: ast.AST) -> Iterable[ast.AST]:
    """The module, classes and functions in a tree; only statements are visited, which is most of the time."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, name, None) or ():
            yield from documented(child)


def read_files(paths: Sequence[str | Path]) -> list[Document]:
    """Text files as documents; a long file becomes several sections, cut at blank lines."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".rst"))
            if not inside:
                raise ValueError(f"text folder {str(path)!r} holds no .txt, .md or .rst file")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"text file {str(path)!r} does not exist")
    documents = []
    for file in files:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"text file {str(file)!r} is not UTF-8: {error}") from None
        sections = list(cut(paragraphs(text)))
        documents += [Document(f"{file}#{i}", section) for i, section in enumerate(sections)]
    if not documents:
        raise ValueError(f"no text in {', '.join(map(str, files))}")
    return documents


def cut(parts: Iterable[str]) -> Iterable[str]:
    """Paragraphs joined into sections of about SECTION characters."""
    section: list[str] = []
    for part in parts:
        section.append(part)
        if sum(map(len, section)) >= SECTION:
            yield "\n\n".join(section)
            section = []
    if section:
        yield "\n\n".join(section)


def split(documents: Sequence[Document], heldout: float) -> tuple[list[Document], list[Document]]:
    """(train, held-out), both in an order fixed by a hash of the names, without shared paragraphs."""
    order = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    wanted = heldout * sum(len(d.text) for d in order)
    held_names, held_size = set(), 0
    for document in order:
        if held_size >= wanted:
            break
        held_names.add(document.name)
        held_size += len(document.text)
    seen: set[int] = set()
    train = deduplicate([d for d in order if d.name not in held_names], seen)
    held = deduplicate([d for d in order if d.name in held_names], seen)
    for name, part in (("training", train), ("held-out", held)):
        if not part:
            raise ValueError(f"too little text: no {name} document is left of {len(documents)}")
    return train, held


def deduplicate(documents: Iterable[Document], seen: set[int]) -> list[Document]:
    """Documents without the paragraphs whose shingles are in `seen`, to which theirs are added."""
    kept = []
    for document in documents:
        new = []
        for paragraph in paragraphs(document.text):
            shingles = shingle_hashes(paragraph)
            if 2 * sum(s in seen for s in shingles) < len(shingles):
                new.append(paragraph)
            seen |= shingles
        if new:
            kept.append(Document(document.name, "\n\n".join(new)))
    return kept


def paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def shingle_hashes(paragraph: str) -> set[int]:
    """Hashes of the runs of SHINGLE words; of the whole paragraph when it is shorter."""
    words = re.findall(r"\w+", paragraph.lower()) or [paragraph.strip()]
    count = max(1, len(words) - SHINGLE + 1)
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(count)}
