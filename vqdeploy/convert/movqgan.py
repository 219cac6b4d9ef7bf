"""ai-forever/MoVQGAN: VQGAN with a decoder modulated by the code vectors."""

from vqdeploy.convert.containers import Source
from vqdeploy.convert.conv import averaged
from vqdeploy.convert.parts import Part, section
from vqdeploy.convert.taming import convolutional

TOKENIZER = r"decoder\.norm_out\.conv_y\.weight"


def tokenizer(source: Source) -> Part:
    """A MoVQGAN, from its moving averages if the file has them.

    Raises:
        ArtifactError: Only some weights have an average, a weight is missing, left over or of the wrong shape, or the
            configuration contradicts the weights.
    """
    source, notes = averaged(source, _shadow)
    declared = section(source.config, "ddconfig")
    return convolutional(source, "movq", declared, section(declared.get("ddconfig")), notes, modulation=True)


def _shadow(key: str) -> str:
    module, _, rest = key.partition(".")
    return f"ema_{module}.{rest.replace('.', '')}"
