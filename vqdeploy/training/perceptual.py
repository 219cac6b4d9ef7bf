"""The perceptual term, LPIPS on VGG features (Zhang et al., CVPR 2018)."""

from pathlib import Path, PurePosixPath

import torch
from torch import nn

from vqdeploy.errors import VqdeployError


def perceptual_network() -> nn.Module:
    """Frozen LPIPS: two batches of images [B, 3, H, W] in -1..1 -> a distance for each pair.

    Raises:
        VqdeployError: torchvision is not installed, or its VGG weights are not on this machine: vqdeploy downloads
            nothing.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        from torchvision.models import VGG16_Weights

        file = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(VGG16_Weights.IMAGENET1K_V1.url).name)
        if not file.is_file():
            raise VqdeployError(
                f"the perceptual loss needs torchvision's VGG16 weights in {file}",
                fix="python -c 'from torchvision.models import vgg16; vgg16(weights=\"IMAGENET1K_V1\")'",
            )
        network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
    except ModuleNotFoundError as error:
        raise VqdeployError("the perceptual loss needs torchvision", fix="pip install torchvision") from error
    except OSError as error:
        raise VqdeployError(
            f"the perceptual loss needs torchvision's VGG16 weights in {torch.hub.get_dir()} ({error})",
            fix="vqdeploy train --perceptual-weight 0",
        ) from error
    return network.requires_grad_(False)
