"""TensorRT plugins that run `VQNearest` and `VQResidual` with our kernels.

The nodes of a package name their plugin. Once it is registered, the ONNX parser prefers it to the function of the node.
The builder asks for PTX, times its variants, and stores the fastest one in the engine, which then needs neither Python
nor a plugin library.
"""

import importlib.util
from typing import Any

MODES = ("auto", "on", "off")
"""Whether a plan gets plugins: if possible, always (else an error), or never."""

VERSIONS = ((10, 15), (12, 0))
"""Range of TensorRT versions, end excluded, that prefer the plugin of a node to its function."""


def obstacle(backend: str, version: str) -> str | None:
    """Why engines cannot run the nodes with our kernels; None if they can.

    Args:
        backend: `tensorrt`, `tensorrt-rtx` or `onnxrt`.
        version: Version of the library of the backend.
    """
    if backend != "tensorrt":
        return f"{backend} has no ahead-of-time compiled plugins"
    first, end = VERSIONS
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not first <= numbers < end:
        return f"TensorRT must be at least {first[0]}.{first[1]} and below {end[0]}.{end[1]}, and is {version}"
    if importlib.util.find_spec("triton") is None:
        return "Triton, which compiles the kernels, is not installed (pip install triton)"
    return None


def register() -> None:
    """Registers the plugins with TensorRT, for all networks that this process parses from now on."""
    import tensorrt as trt
    import tensorrt.plugin as trtp

    from vqdeploy import kernels

    types = {trt.float32: ("FP32", "fp32"), trt.float16: ("FP16", "fp16"), trt.bfloat16: ("BF16", "bf16")}

    def variants(*tensors: Any) -> list[trtp.AutoTuneCombination]:
        """Plugin configurations: the types of the network, and a tactic for each number of vectors per program."""
        names = [types[tensor.dtype][0] if tensor.dtype in types else "INT64" for tensor in tensors]
        return [trtp.AutoTuneCombination(", ".join(names), "LINEAR", list(kernels.WARPS))]

    def launch(
        z: Any, codebook: Any, kernel: kernels.Ptx, rows: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        count, size = z.shape_expr[0], codebook.shape_expr[-2]
        parameters = trtp.KernelLaunchParams(
            grid_x=trtp.cdiv(count, rows), block_x=kernel.threads, shared_mem=kernel.shared
        )
        scalars = trtp.SymIntExprs.from_tuple((trtp.SymInt32(count), trtp.SymInt32(size)))
        return kernel.name, kernel.text, parameters, scalars

    def kinds(z: Any, codebook: Any) -> tuple[str, str]:
        return types[z.dtype][1], types[codebook.dtype][1]

    @trtp.register("vqdeploy::VQNearest")
    def nearest(z: trtp.TensorDesc, codebook: trtp.TensorDesc, metric: str) -> trtp.TensorDesc:
        return trtp.from_shape_expr((z.shape_expr[0],), trt.int64)

    @trtp.autotune("vqdeploy::VQNearest")
    def nearest_variants(
        z: trtp.TensorDesc, codebook: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]
    ) -> list[trtp.AutoTuneCombination]:
        return variants(z, codebook, *outputs)

    @trtp.aot_impl("vqdeploy::VQNearest")
    def nearest_kernel(
        z: trtp.TensorDesc, codebook: trtp.TensorDesc, metric: str, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        dim = codebook.shape_expr[1].constant_value()
        return launch(z, codebook, kernels.compile_nearest(kinds(z, codebook), dim, metric, tactic), tactic)

    @trtp.register("vqdeploy::VQResidual")
    def residual(
        z: trtp.TensorDesc, codebook: trtp.TensorDesc, depth: int, metric: str
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        return trtp.from_shape_expr((z.shape_expr[0], depth), trt.int64), z.like()

    @trtp.autotune("vqdeploy::VQResidual")
    def residual_variants(
        z: trtp.TensorDesc, codebook: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc, trtp.TensorDesc]
    ) -> list[trtp.AutoTuneCombination]:
        return variants(z, codebook, *outputs)

    @trtp.aot_impl("vqdeploy::VQResidual")
    def residual_kernel(
        z: trtp.TensorDesc,
        codebook: trtp.TensorDesc,
        depth: int,
        metric: str,
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        dim, shared = codebook.shape_expr[-1].constant_value(), len(codebook.shape_expr) == 2
        ptx = kernels.compile_residual(kinds(z, codebook), dim, depth, metric, shared, tactic)
        return launch(z, codebook, ptx, tactic)


def nodes(network: Any) -> list[str]:
    """Names of the nodes of a parsed network that a plugin runs."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    return [layer.name for layer in layers if layer.type.name == "PLUGIN_V3"]
