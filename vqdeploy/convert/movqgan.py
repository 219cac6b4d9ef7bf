"""ai-forever/MoVQGAN: VQGAN's layers with a decoder that the code vectors modulate."""

from vqdeploy.convert.containers import Source
from vqdeploy.convert.conv import averaged
from vqdeploy.convert.parts import Part, section
from vqdeploy.convert.taming import convolutional

TOKENIZER = r"decoder\.norm_out\.conv_y\.weight"


def tokenizer(source: Source) -> Part:
    """A MoVQGAN, by its moving averages where the file has them."""
    source, notes = averaged(source, _shadow)
    declared = section(source.config, "ddconfig")
    return convolutional(source, "movq", declared, section(declared.get("ddconfig")), notes, modulation=True)


def _shadow(key: str) -> str:
    module, _, rest = key.partition(".")
    return f"ema_{module}.{rest.replace('.', '')}"
