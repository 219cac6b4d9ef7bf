"""From PyTorch to an ONNX package: for a system (`package.export`) or any module (`export_module`)."""

from vqdeploy.export.modules import Stage, export_module, quantizer_stages
from vqdeploy.export.quantizers import register_quantizer

__all__ = ["Stage", "export_module", "quantizer_stages", "register_quantizer"]
