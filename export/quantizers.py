"""Exportable replacements of the quantizers of `vector-quantize-pytorch`, and their registry.

The modules of the library branch on tensors, repeat their codebook over the batch and specialize shapes, so most of
them cannot be exported, or are wrong at all batch sizes but the traced one. Each class here replaces the library's
class of the same name in inference: it takes codebooks, scales and layers from the live module, and has the same
methods, layouts and result types. Losses are zero. Quantizers compute in fp32 in every precision.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.errors import VqdeployError
from vqdeploy.models.modules import Modules
from vqdeploy.models.ops import lookup, nearest, residual_quantize

_TRAINING_ONLY = {
    "accum_ema_update",
    "ema_update",
    "ema_update_weight",
    "freeze_codebook",
    "inv_temperature",
    "rand_quantize_dropout_fixed_seed",
    "sample_codebook_temp",
}
"""Arguments of the library's `forward` that have no effect in inference."""


class Replacement(nn.Module):
    """A quantizer in an exported graph; it keeps public attributes such as `dim` of the original."""

    def __init__(self, original: nn.Module):
        super().__init__()
        plain = (bool, int, float, str, tuple)
        for name, value in vars(original).items():
            if isinstance(value, plain) and name not in vars(self):
                setattr(self, name, value)

    def far(self, x: Tensor, codes: Tensor, slack: float) -> Tensor:
        """Which codes are clearly worse than the best, given the codes before them.

        Args:
            x: Input of the quantizer.
            codes: Codes in the layout that the quantizer returns.
            slack: Allowed excess over the smallest distance, as a fraction of the largest distance.

        Returns:
            Bool in the shape of the codes.

        Raises:
            NotImplementedError: In this class.
        """
        raise NotImplementedError

    def _refuse(self, options: dict[str, Any]) -> None:
        given = [name for name, value in options.items() if value is not None and value is not False]
        asked = [name for name in given if name not in _TRAINING_ONLY]
        if asked:
            raise VqdeployError(f"{type(self).__name__} is called with {asked[0]}, which an exported one does not have")


def _channels_last(x: Tensor, first: bool) -> Tensor:
    return x.movedim(1, -1) if first else x


def _channels_first(x: Tensor, first: bool) -> Tensor:
    return x.movedim(-1, 1) if first else x


def _rows(codes: Tensor, table: Tensor) -> Tensor:
    """Rows of a table [K, D] by codes of any shape; negative codes count from the end, as in PyTorch."""
    codes = codes.long()
    codes = torch.where(codes < 0, codes + len(table), codes)
    return lookup(codes.reshape(-1, 1), table).view(*codes.shape, -1)


def _distances(z: Tensor, table: Tensor, metric: str) -> Tensor:
    """Squared distances [N, K] of vectors from a codebook; for `dot`, the largest norm minus each product."""
    z, table = z.double(), table.double()
    if metric == "l2":
        return torch.cdist(z, table).square()
    largest: Tensor = table.norm(dim=1).max()
    return largest - F.normalize(z, dim=1) @ table.T


def _far(z: Tensor, table: Tensor, metric: str, codes: Tensor, slack: float) -> Tensor:
    distances = _distances(z, table, metric)
    gap = distances.gather(1, codes[:, None])[:, 0] - distances.amin(1)
    return gap > slack * distances.max()


def _trained(book: Any, owner: str) -> None:
    """Rejects a codebook that cannot be expressed as a table.

    Args:
        book: The library's `Codebook`.
        owner: The class that it belongs to.
    """
    if book.affine_param:
        raise VqdeployError(f"{owner} with affine_param is not supported (its statistics follow each batch)")
    if not book.initted:
        raise VqdeployError(f"{owner} has an untrained codebook (kmeans_init waits for the first batch)")


def _table(layer: Any, owner: str) -> Tensor:
    """The codebooks [H, K, D] of a `VectorQuantize`."""
    book = layer._codebook
    _trained(book, owner)
    with torch.no_grad():
        table: Tensor = book.embed.detach().float()
        searched: Tensor = table.clone() if book.vq_bridge is None else book.vq_bridge(table).detach()
        return searched


def _metric(layer: Any) -> str:
    """Cosine search of the library: the largest product of the normalized vector with the stored table."""
    return "dot" if layer.use_cosine_sim else "l2"


def _is_first(layer: Any) -> bool:
    """Whether a `VectorQuantize` has its channels in dimension 1."""
    return bool(layer.accept_image_fmap or layer.accept_3d_fmap or not layer.channel_last)


class VectorQuantize(Replacement):
    """Vector quantization (van den Oord et al., 2017), with several heads, by distance or by angle."""

    heads: int
    separate_codebook_per_head: bool
    return_zeros_for_masked_padding: bool
    tables: Tensor  # [H or 1, K, D], searched
    stored: Tensor  # [H or 1, K, D], looked up by code; the library leaves out the bridge there

    def __init__(self, original: Any):
        super().__init__(original)
        self.project_in, self.project_out = original.project_in, original.project_out
        self.metric, self.first = _metric(original), _is_first(original)
        self.register_buffer("tables", _table(original, "VectorQuantize"))
        self.register_buffer("stored", original._codebook.embed.detach().float().clone())

    @property
    def codebook(self) -> Tensor:
        """The table [K, D], or [H, K, D] of separate heads."""
        return self.stored if self.separate_codebook_per_head else self.stored[0]

    def _split(self, x: Tensor) -> Tensor:
        """Channels last -> vectors of the heads [..., H, D]."""
        z: Tensor = self.project_in(x.float()).unflatten(-1, (self.heads, -1))
        return z

    def forward(
        self, x: Tensor, mask: Tensor | None = None, lens: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._refuse(options)
        first = self.first and x.ndim > 2  # for a single token, channels are last
        given = _channels_last(x, first)
        z = self._split(given)
        if self.separate_codebook_per_head:
            heads = [
                nearest(z[..., h, :].flatten(0, -2), table, self.metric).view(z.shape[:-2])
                for h, table in enumerate(self.tables)
            ]
            codes = torch.stack(heads, -1)
            parts = [_rows(code, table) for code, table in zip(heads, self.tables, strict=True)]
            chosen = torch.cat(parts, -1)
        else:
            codes = nearest(z.flatten(0, -2), self.tables[0], self.metric).view(z.shape[:-1])
            chosen = _rows(codes, self.tables[0]).flatten(-2)
        quantized = self.project_out(chosen).to(x.dtype)
        if self.heads == 1:
            codes = codes.squeeze(-1)
        if lens is not None:
            mask = torch.arange(given.shape[1], device=x.device) < lens[:, None]
        if mask is not None:
            quantized, codes = _masked(mask, quantized, codes, given, self.return_zeros_for_masked_padding)
        return _channels_first(quantized, first), codes, torch.zeros(())

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes -> their codebook vectors, before the output projection."""
        if self.separate_codebook_per_head and self.heads > 1:
            parts = [_rows(indices[..., h], table) for h, table in enumerate(self.stored)]
            vectors = torch.cat(parts, -1)
        else:
            vectors = _rows(indices, self.stored[0])
        return _channels_first(vectors, self.first)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Codes -> their vectors, after the output projection."""
        output: Tensor = self.project_out(self.get_codes_from_indices(indices))
        return output

    def far(self, x: Tensor, codes: Tensor, slack: float) -> Tensor:
        """See `Replacement.far`."""
        z = self._split(_channels_last(x, self.first and x.ndim > 2))
        found = codes.reshape(z.shape[:-1])
        used = found >= 0  # -1 where masked
        tables = self.tables.expand(self.heads, -1, -1)
        far = [
            _far(z[..., h, :].flatten(0, -2), table, self.metric, found[..., h].clamp(min=0).flatten(), slack)
            for h, table in enumerate(tables)
        ]
        return (torch.stack(far, -1).view(found.shape) & used).view(codes.shape)


def _masked(mask: Tensor, quantized: Tensor, codes: Tensor, given: Tensor, zeros: bool) -> tuple[Tensor, Tensor]:
    """Where the mask [B, N] is False, vectors [B, N, D] become zeros or the input, and codes [B, N, ...] become -1."""
    quantized = torch.where(mask[..., None], quantized, torch.zeros_like(quantized) if zeros else given)
    return quantized, torch.where(mask.view(*mask.shape, *[1] * (codes.ndim - mask.ndim)), codes, -1)


class _Residual(Replacement):
    """Base of residual quantizers: codes [..., Q] whose vectors are summed. -1 and missing codes add nothing."""

    books: Tensor  # [Q, K, D], smaller ones filled up with zeros, or one for all depths [K, D]

    def _keep(self, tables: Sequence[Tensor], shared: bool = False) -> None:
        self.sizes = [len(table) for table in tables]
        filled = [F.pad(table, (0, 0, 0, max(self.sizes) - len(table))) for table in tables]
        self.register_buffer("books", filled[0].clone() if shared else torch.stack(filled))

    def _tables(self) -> list[Tensor]:
        books = self.books.expand(len(self.sizes), -1, -1)
        return [book[:size] for book, size in zip(books, self.sizes, strict=True)]

    def _sum(self, codes: Tensor) -> Tensor:
        """Sums of the vectors of codes [..., q], q at most Q."""
        return lookup(codes.long().flatten(0, -2), self.books).view(*codes.shape[:-1], -1)

    def _each(self, codes: Tensor) -> Tensor:
        """The vector of each code [Q, ..., D]; zeros for missing codes."""
        codes = F.pad(codes.long(), (0, len(self.sizes) - codes.shape[-1]), value=-1)
        parts = zip(codes.unbind(-1), self._tables(), strict=True)
        return torch.stack([lookup(code.reshape(-1, 1), table).view(*code.shape, -1) for code, table in parts])

    def _far_by_depth(self, z: Tensor, codes: Tensor, metric: str, slack: float) -> Tensor:
        """`far` of vectors [..., D]."""
        residual, far = z.flatten(0, -2), []
        for code, table in zip(codes.flatten(0, -2).unbind(-1), self._tables(), strict=True):
            used = code >= 0
            code = code.clamp(min=0)
            far.append(_far(residual, table, metric, code, slack) & used)
            residual = residual - table[code]
        return torch.stack(far, -1).view(codes.shape)


class ResidualVQ(_Residual):
    """Residual quantization (Zeghidour et al., SoundStream, 2021, algorithm 1), codebooks per depth or shared."""

    return_zeros_for_masked_padding: bool

    def __init__(self, original: Any):
        super().__init__(original)
        if original.implicit_neural_codebook:
            raise VqdeployError(
                "ResidualVQ with implicit_neural_codebook is not supported (its codebooks are networks)"
            )
        if (original.eval_beam_size or 1) > 1:
            fix = "set eval_beam_size to 1 for greedy codes"
            raise VqdeployError("ResidualVQ with beam search is not supported", fix=fix)
        if original.diveq:
            raise VqdeployError("ResidualVQ with diveq is not supported (it adds noise in evaluation too)")
        layers = list(original.layers)
        self.project_in, self.project_out = original.project_in, original.project_out
        self.metric, self.first = _metric(layers[0]), _is_first(layers[0])
        self._keep([_table(layer, "ResidualVQ")[0] for layer in layers], original.shared_codebook)
        stored = [layer._codebook.embed[0].detach().float() for layer in layers]
        if not all(torch.equal(a, b) for a, b in zip(stored, self._tables(), strict=True)):
            raise VqdeployError("ResidualVQ with vq_bridge is not supported (it decodes other vectors than it encodes)")

    @property
    def codebook_size(self) -> int:
        """Codes of the first depth."""
        return self.sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """All tables [Q, K, D], or a tuple of tables of several sizes."""
        tables = self._tables()
        return torch.stack(tables) if len(set(self.sizes)) == 1 else tuple(tables)

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [N, D] -> codes [N, Q] and sums [N, D]."""
        if len(set(self.sizes)) == 1:
            return residual_quantize(z, self.books, len(self.sizes), self.metric)
        residual, total, codes = z, torch.zeros_like(z), []
        for table in self._tables():
            code = nearest(residual, table, self.metric)
            chosen = lookup(code[:, None], table)
            residual, total = residual - chosen, total + chosen
            codes.append(code)
        return torch.stack(codes, 1), total

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_all_codes: bool = False, **options: Any
    ) -> tuple[Tensor, ...]:
        self._refuse(options)
        z = _channels_last(self.project_in(x.float()), self.first)  # the library projects the last dimension of a map
        codes, total = self._quantize(z.flatten(0, -2))
        codes, total = codes.view(*z.shape[:-1], -1), total.view(z.shape)
        quantized = self.project_out(_channels_first(total, self.first)).to(x.dtype)
        if mask is not None:
            quantized, codes = _masked(mask, quantized, codes, x, self.return_zeros_for_masked_padding)
        result = quantized, codes, torch.zeros(len(self.sizes))
        return (*result, self.get_codes_from_indices(codes)) if return_all_codes else result

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes [..., Q] -> the vector of each code [Q, ..., D], zeros for missing codes."""
        return self._each(indices)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Codes -> sums of their vectors over the depths, after the output projection."""
        output: Tensor = self.project_out(self._sum(indices))
        return output

    def far(self, x: Tensor, codes: Tensor, slack: float) -> Tensor:
        """See `Replacement.far`."""
        z = _channels_last(self.project_in(x.float()), self.first)
        return self._far_by_depth(z, codes, self.metric, slack)


class Grouped(Replacement):
    """Groups of channels with a residual quantizer each; codes [G, ..., Q]."""

    groups: int
    rvqs: Any  # modules that stand for residual quantizers

    def __init__(self, original: Any):
        super().__init__(original)
        self.rvqs: Modules[Any] = Modules(map(_serve, original.rvqs))
        self.along = 1 if original.accept_image_fmap else -1

    def forward(self, x: Tensor, return_all_codes: bool = False, **options: Any) -> tuple[Any, ...]:
        options["return_all_codes"] = return_all_codes
        parts = [rvq(part, **options) for rvq, part in zip(self.rvqs, x.chunk(self.groups, self.along), strict=True)]
        quantized, *rest = zip(*parts, strict=True)
        every = rest[-1:] if return_all_codes else []  # the library does not concatenate these
        return torch.cat(quantized, self.along), *map(torch.stack, rest[: len(rest) - len(every)]), *every

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes [G, ..., Q] -> the vectors of each group."""
        return torch.stack([rvq.get_codes_from_indices(own) for rvq, own in zip(self.rvqs, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Codes -> sums of their vectors over the depths, after the output projection."""
        parts = [rvq.get_output_from_indices(own) for rvq, own in zip(self.rvqs, indices, strict=True)]
        return torch.cat(parts, self.along)

    def far(self, x: Tensor, codes: Tensor, slack: float) -> Tensor:
        """See `Replacement.far`."""
        parts = x.chunk(self.groups, self.along)
        return torch.stack([r.far(p, c, slack) for r, p, c in zip(self.rvqs, parts, codes, strict=True)])


class SimVQ(Replacement):
    """SimVQ (Zhu et al., 2024): the codebook is a transform of a frozen one, a constant here."""

    channel_first: bool
    rotation_trick: bool
    table: Tensor  # [K, D]

    def __init__(self, original: Any):
        super().__init__(original)
        with torch.no_grad():
            self.register_buffer("table", original.codebook.detach().float())

    @property
    def codebook(self) -> Tensor:
        """The table [K, D]."""
        return self.table

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = _channels_last(x, self.channel_first).float()
        codes = nearest(z.flatten(0, -2), self.table, "l2").view(z.shape[:-1])
        quantized = _rows(codes, self.table)
        if self.rotation_trick:  # rotates in evaluation too; a zero vector stays
            quantized = quantized * _nonzero(z)
        return _channels_first(quantized.to(x.dtype), self.channel_first), codes, torch.zeros(())

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes -> their vectors."""
        return _channels_first(_rows(indices, self.table), self.channel_first)

    def far(self, x: Tensor, codes: Tensor, slack: float) -> Tensor:
        """See `Replacement.far`."""
        z = _channels_last(x, self.channel_first)
        return _far(z.flatten(0, -2), self.table, "l2", codes.flatten(), slack).view(codes.shape)


def _nonzero(z: Tensor) -> Tensor:
    """1.0 for nonzero vectors [..., D], else 0.0; [..., 1]."""
    return z.abs().amax(-1, keepdim=True).gt(0).to(z.dtype)


class ResidualSimVQ(_Residual):
    """`SimVQ` at each depth of a residual quantizer."""

    channel_first: bool
    of_zero: Tensor  # [Q], the codes of a zero vector

    def __init__(self, original: Any):
        super().__init__(original)
        with torch.no_grad():
            self._keep([layer.codebook.detach().float() for layer in original.layers])
        self.rotates = original.layers[0].rotation_trick
        zero = torch.zeros(1, self.books.shape[-1])
        self.register_buffer("of_zero", torch.cat([nearest(zero, table, "l2") for table in self._tables()]))

    @property
    def codebooks(self) -> Tensor:
        """All tables [Q, K, D]."""
        return self.books

    def forward(self, x: Tensor, return_all_codes: bool = False, **options: Any) -> tuple[Tensor, ...]:
        self._refuse(options)
        z = _channels_last(x, self.channel_first).float()
        depth = len(self.sizes)
        codes, total = residual_quantize(z.flatten(0, -2), self.codebooks, depth, "l2")
        codes, total = codes.view(*z.shape[:-1], -1), total.view(z.shape)
        if self.rotates:  # what stays zero at every depth
            some = _nonzero(z)
            codes, total = torch.where(some > 0, codes, self.of_zero), total * some
        result = _channels_first(total.to(x.dtype), self.channel_first), codes, torch.zeros(depth)
        return (*result, self.get_codes_from_indices(codes)) if return_all_codes else result

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes [..., Q] -> the vector of each code [Q, ..., D], zeros for missing codes."""
        vectors = self._each(indices)
        return vectors.movedim(-1, 2) if self.channel_first else vectors

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Codes -> sums of their vectors over the depths, after the output projection."""
        return _channels_first(self._sum(indices), self.channel_first)

    def far(self, x: Tensor, codes: Tensor, slack: float) -> Tensor:
        """See `Replacement.far`."""
        z = _channels_last(x, self.channel_first).float()
        kept = _nonzero(z) > 0 if self.rotates else torch.ones_like(z[..., :1], dtype=torch.bool)
        return self._far_by_depth(z, codes, "l2", slack) & kept


class Scalar(Replacement):
    """`FSQ`, `LFQ` and `LatentQuantize`, which can be exported as they are, in fp32.

    Mentzer et al., FSQ (2024); Yu et al., MAGVIT-v2 (2024); Hsu et al., latent quantization (2023).
    """

    def __init__(self, original: Any):
        super().__init__(original)
        self.original = original

    def forward(self, x: Tensor, **options: Any) -> tuple[Any, ...]:
        self._refuse(options)
        quantized, *rest = self.original(x.float())
        return quantized.to(x.dtype), *rest

    def indices_to_codes(self, indices: Tensor, **options: Any) -> Tensor:
        """Codes -> their vectors, after the output projection."""
        vectors: Tensor = self.original.indices_to_codes(indices, **options)
        return vectors

    def far(self, x: Tensor, codes: Tensor, slack: float) -> Tensor:
        """Which codes have a digit that no change of the input by `slack` times its largest magnitude yields."""
        return _far_digits(self.original, _inner(self.original, x), codes, slack)


def _inner(quantizer: Any, x: Tensor) -> Tensor:
    """The values that a scalar quantizer rounds: [..., C, d] of its input."""
    first = getattr(quantizer, "channel_first", None)
    first = x.ndim >= 4 or bool(first) if first is not True else True
    if type(quantizer).__name__ == "LatentQuantize":
        first = True
    z: Tensor = quantizer.project_in(_channels_last(x, first).float())
    if (clamp := getattr(quantizer, "soft_clamp_input_value", None)) is not None:
        z = (z / clamp).tanh() * clamp
    z = z.unflatten(-1, (quantizer.num_codebooks, -1))
    return z @ quantizer.orthogonal_rot if getattr(quantizer, "orthogonal_rotation", False) else z


def _far_digits(quantizer: Any, z: Tensor, codes: Tensor, slack: float) -> Tensor:
    shift = slack * z.abs().max()
    digits = _digits(quantizer, codes.reshape(z.shape[:-1]))
    reached = torch.stack([_digits(quantizer, _code_of(quantizer, moved)) for moved in (z - shift, z, z + shift)])
    return ((digits < reached.amin(0)) | (digits > reached.amax(0))).any(-1).view(codes.shape)


def _code_of(quantizer: Any, z: Tensor) -> Tensor:
    """Codes [...] of inner vectors [..., d]."""
    if hasattr(quantizer, "mask"):
        bits: Tensor = (z > 0) * quantizer.mask
        return bits.sum(-1)
    codes: Tensor = quantizer.codes_to_indices(quantizer.quantize(z))
    return codes


def _digits(quantizer: Any, codes: Tensor) -> Tensor:
    """The level of each dimension [..., d]."""
    codes = codes[..., None].long()
    if hasattr(quantizer, "mask"):
        bits: Tensor = (codes & quantizer.mask) != 0
        return bits.long()
    levels: Tensor = (codes // quantizer._basis) % quantizer._levels
    return levels


class ResidualScalar(_Residual):
    """`ResidualFSQ` and `ResidualLFQ`: encoding is exported as it is, decoding is a sum of table lookups."""

    def __init__(self, original: Any):
        super().__init__(original)
        self.original = original
        scales = getattr(original, "scales", torch.ones(original.num_quantizers, 1))
        with torch.no_grad():
            self._keep([table.float() * scale for table, scale in zip(original.codebooks, scales, strict=True)])

    @property
    def codebooks(self) -> Tensor:
        """The tables [Q, K, d] of the library, unscaled."""
        tables: Tensor = self.original.codebooks
        return tables

    def forward(self, x: Tensor, return_all_codes: bool = False, **options: Any) -> tuple[Any, ...]:
        self._refuse(options)
        quantized, codes, *rest = self.original(x.float())
        result = quantized.to(x.dtype), codes, *rest
        return (*result, self.get_codes_from_indices(codes)) if return_all_codes else result

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes [..., Q] -> the vector of each code [Q, ..., D], zeros for missing codes."""
        return self._each(indices)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Codes -> sums of their vectors over the depths, after the output projection."""
        output: Tensor = self.original.project_out(self._sum(indices))
        return output

    def far(self, x: Tensor, codes: Tensor, slack: float) -> Tensor:
        """See `Replacement.far`."""
        original = self.original
        first = getattr(original, "is_channel_first", False)
        residual = original.project_in(_channels_last(x, first).float()).flatten(0, -2)[None]
        if (clamp := getattr(original, "soft_clamp_input_value", None)) is not None:
            residual = (residual / clamp).tanh() * clamp
        own = _channels_last(codes, first)
        scales = getattr(original, "scales", [1.0] * len(self.sizes))
        far = []
        for layer, scale, code in zip(original.layers, scales, own.flatten(0, -2).unbind(-1), strict=True):
            far.append(_far_digits(layer, _inner(layer, residual / scale), code[None], slack))
            residual = residual - layer.indices_to_codes(code[None]) * scale
        return _channels_first(torch.cat(far).T.view(own.shape), first)


class RandomProjectionQuantizer(Replacement):
    """Codes of random projections, one per codebook (Chiu et al., BEST-RQ, 2022)."""

    rand_projs: Tensor  # [H, dim, D]

    def __init__(self, original: Any):
        super().__init__(original)
        self.norm, self.vq = original.norm, VectorQuantize(original.vq)
        self.register_buffer("rand_projs", original.rand_projs.detach().float())

    def _project(self, x: Tensor) -> Tensor:
        return torch.einsum("bnd,hde->bnhe", self.norm(x.float()), self.rand_projs).flatten(2)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        self._refuse(options)
        codes: Tensor = self.vq(self._project(x))[1]
        return codes

    def far(self, x: Tensor, codes: Tensor, slack: float) -> Tensor:
        """See `Replacement.far`."""
        return self.vq.far(self._project(x), codes, slack)


def _refuse(original: Any) -> nn.Module:
    raise VqdeployError(f"{type(original).__name__} is not supported", fix="register_quantizer")


_LIBRARY = "vector_quantize_pytorch"

_SERVED: dict[str, Callable[[Any], nn.Module]] = {
    "VectorQuantize": VectorQuantize,
    "ResidualVQ": ResidualVQ,
    "GroupedResidualVQ": Grouped,
    "SimVQ": SimVQ,
    "ResidualSimVQ": ResidualSimVQ,
    "FSQ": Scalar,
    "ResidualFSQ": ResidualScalar,
    "GroupedResidualFSQ": Grouped,
    "LFQ": Scalar,
    "ResidualLFQ": ResidualScalar,
    "GroupedResidualLFQ": Grouped,
    "LatentQuantize": Scalar,
    "RandomProjectionQuantizer": RandomProjectionQuantizer,
} | dict.fromkeys(["FSP", "EvoLFQ", "BinaryMapper", "HierarchicalVQ"], _refuse)
"""Class name of the library -> its replacement."""

_registered: dict[type, Callable[[Any], nn.Module]] = {}

_LOOKS = {
    "VectorQuantize": ("_codebook", "heads", "project_in"),
    "GroupedResidualVQ": ("rvqs", "groups"),
    "ResidualFSQ": ("layers", "num_quantizers", "levels"),
    "ResidualVQ": ("layers", "num_quantizers"),
    "SimVQ": ("frozen_codebook", "code_transform"),
    "FSQ": ("_levels", "_basis"),
    "LFQ": ("codebook_scale", "mask"),
    "RandomProjectionQuantizer": ("rand_projs", "vq"),
}
"""Class of the library -> attributes that identify a copy of it; the first match counts."""


def register_quantizer(kind: type, function: Callable[[Any], nn.Module]) -> None:
    """Registers a replacement for a class of quantizers, such as a copy of the library in another project.

    Args:
        kind: The class itself; subclasses are not included.
        function: Maps a module of that class to an exportable one with the same inference behaviour, such as
            `vqdeploy.export.quantizers.ResidualVQ`. `export_module` verifies the result against the original.
    """
    _registered[kind] = function


def _server(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    kind = type(module)
    own = _SERVED.get(kind.__name__) if kind.__module__.partition(".")[0] == _LIBRARY else None
    return _registered.get(kind, own)


def _serve(module: nn.Module) -> nn.Module:
    server = _server(module)
    if server is None:
        raise VqdeployError(f"{type(module).__name__} is not a registered quantizer", fix="register_quantizer")
    return server(module)


def quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost registered quantizers of a model by name, each once."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _server(module) and not _inside(name, found):
            found[name] = module
    return found


def _inside(name: str, outer: Iterable[str]) -> bool:
    return any(name.startswith(f"{each}.") if each else bool(name) for each in outer)


def look_alikes(model: nn.Module) -> list[str]:
    """A warning for each module that looks like a quantizer of the library and is not registered."""
    found = quantizers(model)
    alike: list[str] = []
    sentences = []
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, Replacement):
            alike.append(name)
        if name in found or name in alike or _inside(name, [*found, *alike]):
            continue
        for theirs, attributes in _LOOKS.items():
            if all(hasattr(module, attribute) for attribute in attributes):
                server = _SERVED[theirs].__name__
                sentences.append(
                    f"{name or 'the model'} ({kind.__module__}.{kind.__name__}) looks like {theirs} of {_LIBRARY} and"
                    f" is exported as it is; if it does the same, register_quantizer({kind.__name__},"
                    f" vqdeploy.export.quantizers.{server}) replaces it"
                )
                alike.append(name)
                break
    return sentences


def replace_quantizers(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy of a model with its quantizers replaced; it shares no tensor with the model.

    Args:
        model: Any module, or a quantizer itself.

    Returns:
        The copy, and the replacement of each quantizer by name.

    Raises:
        VqdeployError: A quantizer is not supported; the message names it.
    """
    reference = copied(model)
    served = replacements(reference)
    stand_ins = {id(module): served[name] for name, module in quantizers(reference).items()}
    return _copied(reference, lambda tensor: tensor, stand_ins), served


def replacements(model: nn.Module) -> dict[str, nn.Module]:
    """The replacement of each quantizer of a model by name; they share its weights.

    Raises:
        VqdeployError: A quantizer is not supported; the message names it.
    """
    served = {}
    for name, module in quantizers(model).items():
        try:
            served[name] = _serve(module)
        except VqdeployError as error:
            raise VqdeployError(f"{name or 'the model'}: {error}") from error
    return served


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model on the CPU, in fp32 and evaluation mode. It shares no tensor: a module may write to its own."""
    return _copied(model, _plain, {})


def _copied(model: nn.Module, convert: Callable[[Tensor], Tensor], stand_ins: dict[int, nn.Module]) -> nn.Module:
    """A copy of a model with its tensors converted, and some modules replaced, by `id`."""
    memo: dict[int, Any] = dict(stand_ins)  # of deepcopy
    for module in model.modules():
        # Weight norm leaves non-leaf tensors in attributes, which deepcopy rejects.
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = convert(tensor)
    return copy.deepcopy(model, memo).eval()


def _plain(tensor: Tensor) -> Tensor:
    plain = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
    return nn.Parameter(plain, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain
