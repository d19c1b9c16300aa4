"""The sparse autoencoder: normalisation -> encoder -> selector -> decoder -> normalisation undone.

With x' the normalised input:  pre = W_enc (x' - b_dec) + b_enc,  f = select(relu(pre)),
x_hat' = f W_dec + b_dec,  x_hat = x' units undone. Normalisation is part of the model: everything
outside is in the units of the activations, the losses and alpha are in normalised units.

A transcoder (config.d_out is not None) reconstructs another vector y (..., d_out), the target, from x. There
b_dec is the bias of the decoder alone and the encoder's centre is a parameter of its own, b_in:
pre = W_enc (x' - b_in) + b_enc,  y_hat' = f W_dec + b_dec; and y' has a shift and a scale of its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softsae import checkpoint, losses, selectors, sparse
from softsae.architectures import ARCHITECTURES, registered
from softsae.checks import number
from softsae.config import AutoencoderConfig, own_options, resolve_autoencoder
from softsae.keys import build
from softsae.normalization import geometric_median, set_normalization
from softsae.output import Output
from softsae.runs import write_json
from softsae.schedules import Phase
from softsae.sparse import Sparse, shaped
from softsae.transcoder import fit_decoder
from softtopk import SparseCode, sparse_decode
from softtopk.shift import shifted

FORMAT = "softsae autoencoder 2"


class SparseAutoencoder(nn.Module):
    """A dictionary of n latents for activations of width d, and the rule that selects among them.

    Parameters: W_enc (n, d) and W_dec (n, d), one row per latent, rows of W_dec of unit norm;
    b_enc (n,); b_dec (d,); those of `selector`. Buffers: shift (d,) and scale (d,) of the
    normalisation x' = (x - shift) / scale. Until `initialize` (or training, or loading) the weights
    are random and shift, scale are 0, 1. A transcoder has W_dec (n, d_out) and b_dec (d_out,), besides
    a parameter b_in (d,) and buffers target_shift and target_scale (d_out,). Attribute d_out: the width
    of what is reconstructed, d in an autoencoder.

    Raises ValueError for a configuration without d.
    """

    def __init__(self, config: AutoencoderConfig, seed: int = 0):
        super().__init__()
        if config.d is None:
            raise ValueError("d=None: an autoencoder needs the width of its activations")
        config = resolve_autoencoder(config)
        self.config = config
        self.d_out = config.d_out or config.d
        self.W_enc = nn.Parameter(torch.empty(config.n, config.d))
        self.b_enc = nn.Parameter(torch.zeros(config.n))
        self.W_dec = nn.Parameter(torch.empty(config.n, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_buffer("shift", torch.zeros(config.d))
        self.register_buffer("scale", torch.ones(config.d))
        if config.d_out is not None:
            self.b_in = nn.Parameter(torch.zeros(config.d))
            self.register_buffer("target_shift", torch.zeros(config.d_out))
            self.register_buffer("target_scale", torch.ones(config.d_out))
        self.selector = selectors.of(config.architecture)(config)
        self.reset_parameters(seed)

    @property
    def is_transcoder(self) -> bool:
        return self.config.d_out is not None

    @property
    def center(self) -> nn.Parameter:
        """What the encoder subtracts from x': b_dec, in a transcoder b_in."""
        return self.b_in if self.is_transcoder else self.b_dec

    @torch.no_grad()
    def reset_parameters(self, seed: int):
        """W_dec random unit rows, W_enc the same (in a transcoder others), biases 0, the selector's own
        start; from the seed."""
        generator = torch.Generator().manual_seed(seed)
        self.W_dec.copy_(F.normalize(torch.randn(self.W_dec.shape, generator=generator), dim=1))
        if self.is_transcoder:
            self.W_enc.copy_(F.normalize(torch.randn(self.W_enc.shape, generator=generator), dim=1))
        else:
            self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.zero_()
        self.center.zero_()
        self.selector.initialize(self.W_enc, generator)

    @torch.no_grad()
    def initialize(self, x: Tensor, target: Tensor | None = None):
        """Set the normalisation, and b_dec to the geometric median, from samples x (N, d).

        Of a transcoder b_in is that of x, b_dec that of the samples' target (N, d_out), and the decoder
        starts from what its latents have to do with the target (softsae/transcoder.py).
        """
        x = x.to(self.b_dec.device).double()
        set_normalization(self.config.normalization, x, self.shift, self.scale)
        self.center.copy_(geometric_median(self.normalize(x)))
        if self.is_transcoder:
            target = target.to(self.b_dec.device).double()
            set_normalization(self.config.normalization, target, self.target_shift, self.target_scale)
            self.b_dec.copy_(geometric_median(self.normalize_target(target)))
            fit_decoder(self, self.normalize(x).float(), self.normalize_target(target).float())

    def normalize(self, x: Tensor) -> Tensor:
        """x' = (x - shift) / scale, in float32 or wider."""
        return shifted(x, self.shift, self.scale)

    def normalize_target(self, target: Tensor) -> Tensor:
        """The same of what is reconstructed, in an autoencoder x itself."""
        if not self.is_transcoder:
            return self.normalize(target)
        return shifted(target, self.target_shift, self.target_scale)

    def denormalize(self, x_hat: Tensor) -> Tensor:
        """What is reconstructed, in its own units."""
        if not self.is_transcoder:
            return x_hat * self.scale + self.shift
        return x_hat * self.target_scale + self.target_shift

    def rows(self, x: Tensor) -> Tensor:
        """A checked x (..., d) as normalised rows (B, d)."""
        return self.normalize(self.checked(x, "x", "d", self.config.d))

    def target_rows(self, x: Tensor, rows: Tensor, target: Tensor | None) -> Tensor | None:
        """What is to be reconstructed as normalised rows (B, d_out): of an autoencoder the rows of x.

        None for a transcoder without a target; ValueError for a target that does not belong to x.
        """
        if not self.is_transcoder:
            if target is not None:
                raise ValueError("a target is given, but this is an autoencoder: its d_out is None")
            return rows
        if target is None:
            return None
        wanted = self.checked(target, "target", "d_out", self.d_out)
        if target.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"x has shape {tuple(x.shape)}, its target {tuple(target.shape)}")
        return self.normalize_target(wanted)

    def checked(self, x: Tensor, name: str, width_name: str, width: int) -> Tensor:
        """x (..., width) as rows, if that is what it is."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of floats, not {found}")
        if x.dim() == 0 or x.shape[-1] != width:
            raise ValueError(f"{name} of shape {tuple(x.shape)} must end in {width_name}={width}")
        if x.device != self.b_dec.device:
            raise ValueError(f"{name} is on {x.device}, the autoencoder on {self.b_dec.device}")
        return x.reshape(-1, width)

    def split(self, batch: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """x and its target, None for an autoencoder, of a batch from a source of activations.

        A transcoder's batch is a pair, or a tensor (..., d + d_out) with both side by side.
        """
        if not self.is_transcoder:
            return batch, None
        if isinstance(batch, Tensor):
            if batch.shape[-1] != self.config.d + self.d_out:
                raise ValueError(
                    f"a batch of shape {tuple(batch.shape)} must end in d + d_out ="
                    f" {self.config.d} + {self.d_out}, x and its target side by side"
                )
            return batch[..., : self.config.d], batch[..., self.config.d :]
        x, target = batch
        return x, target

    def encoder(self, x: Tensor) -> Tensor:
        """Pre-activations (B, n) of normalised rows (B, d)."""
        return F.linear(shifted(x, self.center.detach()), self.W_enc, sparse.encoder_bias(self))

    def decoder(self, latents: Tensor) -> Tensor:
        """Normalised reconstruction (B, d_out) of latents (B, n)."""
        return torch.addmm(self.b_dec, latents, self.W_dec)

    def inference_phase(self, hard: bool) -> Phase:
        return Phase(alpha=self.config.section.alpha, k_target=self.config.k, hard=hard)

    def budgets(self, k: float | Tensor, lead: torch.Size) -> Tensor:
        """A checked k, a number or a tensor that broadcasts to `lead`, for every row: (B,), float32."""
        if not isinstance(k, Tensor):
            number("k", k, 0, self.config.n)
            return torch.full((lead.numel(),), float(k), device=self.b_dec.device)
        if k.dtype == torch.bool or k.is_complex():
            raise TypeError(f"k must be a number or a tensor of numbers, not of dtype {k.dtype}")
        sizes = zip(reversed(k.shape), reversed(lead), strict=False)
        if k.dim() > len(lead) or any(size not in (1, wanted) for size, wanted in sizes):
            raise ValueError(f"k of shape {tuple(k.shape)} must broadcast to {tuple(lead)}, x without d")
        if k.device != self.b_dec.device:
            raise ValueError(f"k is on {k.device}, the autoencoder on {self.b_dec.device}")
        return k.detach().float().clamp(0, self.config.n).expand(lead).reshape(-1)

    def select(
        self,
        x: Tensor,
        rows: Tensor,
        phase: Phase,
        k: float | Tensor | None,
        how: Sparse | None = None,
    ) -> selectors.Selection:
        """The rule's selection for the normalised rows (B, d) of x (..., d), or the k largest; a code if it
        is said how."""
        budgets = None if k is None else self.budgets(k, x.shape[:-1])
        if how is not None and (reason := self.selector.dense_only(phase)):
            raise ValueError(f"sparse: {reason}")
        if how is not None:
            if k is None:
                return self.selector.sparse(self, rows, phase, how)
            return self.selector.sparse_largest(self, rows, budgets, how)
        pre = self.encoder(rows)
        if k is None:
            return self.selector(self, rows, pre, phase)
        return self.selector.largest(self, pre, budgets)

    def reconstruct(
        self, selection: selectors.Selection, wanted: Tensor | None, nested: bool, how: Sparse | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The normalised reconstruction (B, d_out) and, where something is wanted, its loss."""
        ends = self.config.prefixes() if nested else ()
        if nested and how is not None:
            term, x_hat = sparse.nested_reconstruction(self, wanted, selection.latents, ends, how)
            return x_hat, {"reconstruction": term}
        if how is not None:
            x_hat = sparse.decode(self, selection.latents, how)
        else:
            x_hat = self.decoder(selection.latents)
        if wanted is None:
            return x_hat, {}
        if not nested:
            return x_hat, {"reconstruction": losses.reconstruction(wanted, x_hat)}
        term = losses.nested_reconstruction(wanted, selection.latents, self.W_dec, self.b_dec, ends)
        return x_hat, {"reconstruction": term}

    def forward(
        self,
        x: Tensor,
        phase: Phase | None = None,
        target: Tensor | None = None,
        *,
        k: float | Tensor | None = None,
        how: Sparse | None = None,
    ) -> Output:
        """Reconstruct x (..., d), or a transcoder's target.

        Args:
            x: activations of any float dtype; the arithmetic is float32 (autocast apart).
            phase: the moment of training; None is inference: hard selection, the final alpha.
            target: (..., d_out), what a transcoder is to make of x; without it there are no losses.
            k: keep the k largest activations in place of what the rule selects: a number or a tensor
                that broadcasts to (...), rounded half up, beyond 0 ... n clamped where it is a tensor.
                Of relu, gated and jumprelu, which decide on each latent by itself, at most those that
                they keep; of all others of relu(pre), whatever the threshold or the estimator says.
                The only loss is the reconstruction.
            how: of a sparse pass, in which nothing of size (B, n) is made but the pre-activations.

        Raises:
            TypeError, ValueError: x or the target is no float tensor, has another width or is on
                another device; a target that does not belong to x, or to an autoencoder; k is out of
                range as a number, has another shape, or is given in training; a sparse pass of a rule that
                has none, or with a regularizer.
        """
        if k is not None and phase is not None:
            raise ValueError(f"k={k!r} has a meaning at inference only, phase must be None")
        rows = self.rows(x)
        wanted = self.target_rows(x, rows, target)
        phase = phase or self.inference_phase(hard=True)
        selection = self.select(x, rows, phase, k, how)
        nested = self.config.matryoshka is not None and phase.step is not None and wanted is not None
        reconstruction, terms = self.reconstruct(selection, wanted, nested, how)
        if wanted is not None and k is None:
            terms |= self.selector.loss_terms(self, wanted, selection, phase)
        if phase.regularizer is not None:
            if selection.activations is None:
                raise ValueError(f"regularizer: {type(self.selector).__name__} hands over no activations")
            terms |= losses.regularizers(selection.activations, selection.latents, phase.regularizer)
        lead = x.shape[:-1]
        if how is None:
            latents, overflow = selection.latents.reshape(*lead, self.config.n), None
        else:
            latents = shaped(selection.latents, (*lead, self.config.n))
            overflow = latents.overflow if selection.overflow is None else selection.overflow
        return Output(
            reconstruction.reshape(*lead, self.d_out),
            latents,
            selection.k_hat.reshape(lead),
            terms,
            overflow,
            lambda x_hat: self.denormalize(x_hat).to(x.dtype),
        )

    def auxk_loss(self, x: Tensor, x_hat: Tensor, dead: Tensor, target: Tensor | None = None) -> Tensor:
        """AuxK for x (B, d), x_hat (B, d_out) and, of a transcoder, the target (B, d_out), all in their own
        units, and the indices (n_dead,) of the dead latents."""
        rows = self.normalize(x)
        wanted = self.target_rows(x, rows, target)
        pre = F.linear(rows - self.center.detach(), self.W_enc[dead], self.b_enc[dead])
        return losses.auxk(wanted - self.normalize_target(x_hat), pre, self.W_dec[dead])

    def pre_activations(self, x: Tensor) -> Tensor:
        """W_enc (x' - center) + b_enc, before ReLU and selection: (..., d) -> (..., n)."""
        return self.encoder(self.rows(x)).reshape(*x.shape[:-1], self.config.n)

    def encode(
        self, x: Tensor, hard: bool = True, *, k: float | Tensor | None = None, sparse: bool = False
    ) -> Tensor | SparseCode:
        """Latents (..., n) of x (..., d); hard=False gates softly, at the final alpha; k as in `forward`.

        With sparse=True as a code; of a rule with a sparse path, which all but relu, gated and jumprelu have,
        nothing of size (B, n) is made for it but the pre-activations.
        """
        if k is not None and not hard:
            raise ValueError(f"k={k!r} is a hard selection, hard must not be False")
        phase = self.inference_phase(hard)
        how = Sparse() if sparse and self.selector.dense_only(phase) is None else None
        latents, shape = self.select(x, self.rows(x), phase, k, how).latents, (*x.shape[:-1], self.config.n)
        if how is not None:
            return shaped(latents, shape)
        return SparseCode.from_dense(latents.reshape(shape)) if sparse else latents.reshape(shape)

    def decode(self, latents: Tensor | SparseCode) -> Tensor:
        """Reconstruction (..., d_out), in its own units, of latents (..., n), dense or a code."""
        if latents.shape[-1:] != (self.config.n,):
            raise ValueError(f"latents of shape {tuple(latents.shape)} must end in n={self.config.n}")
        if isinstance(latents, SparseCode):
            return self.denormalize(sparse_decode(latents, self.W_dec, self.b_dec))
        x_hat = self.denormalize(self.decoder(latents.reshape(-1, self.config.n)))
        return x_hat.reshape(*latents.shape[:-1], self.d_out)

    @torch.no_grad()
    def normalize_decoder(self):
        """Scale every row of W_dec to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    @torch.no_grad()
    def project_decoder_gradient(self):
        """Remove from W_dec's gradient what is parallel to each row, which has unit norm."""
        gradient = self.W_dec.grad
        parallel = (gradient * self.W_dec).sum(1, keepdim=True)
        gradient.addcmul_(self.W_dec, parallel, value=-1)

    def save(self, path: str | Path) -> Path:
        """Write the weights and the configuration; returns the file.

        A path that ends in .safetensors is that file; any other is a folder, which gets
        sae.safetensors and, for the reader, config.json. Written to a temporary name, then renamed.
        """
        path = Path(path)
        config = dataclasses.asdict(self.config)
        file = path if path.suffix == ".safetensors" else path / "sae.safetensors"
        header = {"format": FORMAT, "config": config}
        if registered(self.config.architecture):
            header["registered_by"] = type(self.selector).__module__
        checkpoint.write(file, dict(self.state_dict()), header)
        if file != path:
            write_json(path / "config.json", config)
        return file


def load(path: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """The autoencoder saved at a path: a folder with sae.safetensors, or the file itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, not one of ours, lacks parameters, or its architecture is
            registered by a module that is not imported; the message names it.
    """
    path = Path(path)
    file = path / "sae.safetensors" if path.is_dir() else path
    tensors, header = checkpoint.read(file, FORMAT)
    name = header.get("config", {}).get("architecture")
    if "registered_by" in header and name not in ARCHITECTURES:
        raise ValueError(
            f"{file} has the architecture {name!r}, which nothing has registered: import the module that"
            f" calls softsae.register first ({header['registered_by']!r} when it was saved; --plugin on the"
            " command line)"
        )
    sae = checkpoint.parse(
        file, lambda: SparseAutoencoder(build(AutoencoderConfig, own_options(header["config"]), "config"))
    )
    checkpoint.fill(file, sae, tensors)
    return sae.to(device).eval()
