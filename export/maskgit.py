"""The stage of MaskGIT: `step`."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.export.layers import InferenceBlock, Projection, attend_to_all, widened
from vqdeploy.export.stage import Dimension, Stage
from vqdeploy.models.adaptive_maskgit import AdaptiveMaskGIT
from vqdeploy.models.bert_maskgit import BertMaskGIT
from vqdeploy.models.class_last_maskgit import ClassLastMaskGIT
from vqdeploy.models.maskgit import MaskGIT, unmask
from vqdeploy.models.modules import Modules

MaskedPrior = MaskGIT | AdaptiveMaskGIT | ClassLastMaskGIT | BertMaskGIT


class Logits(nn.Module):
    """`MaskGIT.logits`: codes int64 [B, h, w, Q] and labels [B] -> [B, h, w, Q, K]."""

    codes_first: Tensor  # [Q]
    table: Tensor  # [Q * (K + 1), width / Q]
    labels: Tensor  # [classes + 1, width]
    positions: Tensor  # [h * w, width]

    def __init__(self, prior: MaskGIT):
        super().__init__()
        self.grid = prior.config.grid
        self.blocks = Modules(InferenceBlock(block) for block in prior.transformer.blocks)
        self.norm, self.head = prior.norm, Projection(prior.head)
        self.register_buffer("codes_first", prior.codes_first)
        self.register_buffer("table", prior.tok_emb.weight.detach())
        self.register_buffer("labels", (prior.cls_emb.weight + prior.pos_emb[0, 0]).detach())
        self.register_buffer("positions", prior.pos_emb[0, 1:].detach())

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        entries = F.embedding(codes.flatten(1, 2) + self.codes_first, self.table).flatten(2) + self.positions
        x = torch.cat([F.embedding(labels, self.labels)[:, None], entries], 1)
        for block in self.blocks:
            x = block.whole(x)
        logits: Tensor = self.head(self.norm(x[:, 1:]))
        grid: Tensor = logits.unflatten(1, self.grid[:2]).unflatten(-1, (self.grid[2], -1))
        return grid


class PlainLogits(nn.Module):
    """`logits` of a prior that is exported as it is, except for attention."""

    def __init__(self, prior: nn.Module):
        super().__init__()
        self.prior: Any = copy.deepcopy(prior)
        module: Any
        for module in self.prior.modules():
            if hasattr(module, "attend"):
                module.attend = attend_to_all

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.prior.logits(codes, labels)
        return logits


class Step(nn.Module):
    """One step of parallel decoding; see `vqdeploy.models.maskgit.unmask`.

    Each image has one label or, with guidance, two, whose logits are summed with the weights `guidance`. All labels of
    all images go through the transformer as one batch.
    """

    def __init__(self, prior: nn.Module):
        super().__init__()
        self.logits = Logits(prior) if isinstance(prior, MaskGIT) else PlainLogits(prior)

    def forward(
        self,
        codes: Tensor,
        given: Tensor,
        label: Tensor,
        guidance: Tensor,
        noise: Tensor,
        choice_noise: Tensor,
        masked: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        choice_temperature: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, conditions = label.shape
        repeated = codes[:, None].expand(-1, conditions, -1, -1, -1).flatten(0, 1)
        logits = widened(self.logits(repeated, label.flatten())).reshape(batch, conditions, -1)
        guided = (guidance[:, None] @ logits).view(noise.shape)
        options = (temperature, top_k, top_p, choice_temperature)
        return *unmask(guided, given, noise, choice_noise, masked, *options), guided


def stages(prior: MaskedPrior) -> list[Stage]:
    """The stage of a masked prior."""
    grid, size = prior.config.grid, prior.config.codebook_size
    per_code = (2, grid[-1])
    inputs: dict[str, Tensor | list[Tensor]] = {
        "codes": torch.zeros(2, *grid, dtype=torch.int64),
        "given": torch.zeros(2, *grid, dtype=torch.int64),
        "label": torch.zeros(2, 2, dtype=torch.int64),
        "guidance": torch.zeros(2, 2),
        "noise": torch.zeros(2, *grid, size),
        "choice_noise": torch.zeros(2, *grid),
        "masked": torch.zeros(2, dtype=torch.int64),
        "temperature": torch.ones(per_code),
        "top_k": torch.ones(per_code, dtype=torch.int64),
        "top_p": torch.ones(per_code),
        "choice_temperature": torch.ones(2),
    }
    conditions = {1: Dimension("conditions", 2)}
    step = Stage(
        "step",
        Step(prior),
        inputs,
        ["drawn", "remaining", "logits"],
        dynamic={"label": conditions, "guidance": conditions},
    )
    return [step]
