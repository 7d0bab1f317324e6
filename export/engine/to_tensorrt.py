"""Compiling an ONNX file to a TensorRT engine, with `tensorrt` or `tensorrt_rtx`: same API, one code path.

`tensorrt_rtx` compiles ahead of time without a GPU; `tensorrt` builds on and for the GPU of the machine.  Networks are strongly
typed: every tensor keeps the type that the ONNX file gives it, so FP8 matrix products are exactly those between
QuantizeLinear / DequantizeLinear pairs.
"""

import importlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

from export.onnx_graph.metadata import metadata_of
from program.files import move_into_place, staging_folder

Flavour = Literal["auto", "tensorrt", "tensorrt_rtx"]
Range = tuple[int, int, int]
_FP8_CAPABILITY = (8, 9)
_LONGEST_NAME = 4095  # TensorRT logs an error for a longer one, and keeps the old
_CANDIDATE_TOKENS = 32  # of a film, an article or an answer, about
ENGINE_METADATA = ("precision", "labels")
"""What an engine keeps of its graph's metadata: as JSON in its name, the one text that TensorRT stores in an engine."""


@dataclass(frozen=True)
class Profile:
    """The sizes that an engine accepts, each as (minimum, size to optimize for, maximum).

    Attributes:
        batch: Conversations.
        sequence: New tokens of each conversation.
        past: Tokens of each conversation that are in the cache already; 0 for a fresh prompt.
    """

    batch: Range = (1, 1, 8)
    sequence: Range = (1, 128, 1024)
    past: Range = (0, 128, 1024)

    def of_prompts(self) -> "Profile":
        """The same for whole prompts, which come with an empty cache."""
        return replace(self, past=(self.past[0], self.past[0], self.past[2]))


_SIZES = Profile()


def default_profiles(sizes: Profile = _SIZES) -> list[Profile]:
    """One profile for prompts and one for single tokens after a cache; engines choose their kernels for each."""
    return [sizes.of_prompts(), replace(sizes, sequence=(1, 1, 1))]


def label_profiles(sizes: Profile) -> list[Profile]:
    """One profile for whole prompts and one for candidates, which are short, behind a prefix that they share."""
    smallest, usual, largest = sizes.sequence
    candidate = max(smallest, min(usual, _CANDIDATE_TOKENS))
    behind = (max(sizes.past[0], 1), max(sizes.past[1], 1), max(sizes.past[2], 1))
    return [sizes.of_prompts(), replace(sizes, sequence=(smallest, candidate, largest), past=behind)]


@dataclass(frozen=True)
class Engine:
    """A compiled engine and what is known about it without a GPU.

    Attributes:
        path: The engine's file.
        bytes: Its size.
        seconds: Time to parse and build.
        flavour: `tensorrt` or `tensorrt_rtx`.
        version: Version of that package.
        compute_capability: Target such as "8.9", or "portable" (tensorrt_rtx) or "this machine" (tensorrt).
        layers: Number of layers of the parsed network by type.
        matrix_multiplies: Number of matrix products with a weight.
        products: How many of those by the types on both sides, such as "FP8 x FP8" or "HALF x INT4".
    """

    path: Path
    bytes: int
    seconds: float
    flavour: Flavour
    version: str
    compute_capability: str
    layers: dict[str, int] = field(default_factory=dict)
    matrix_multiplies: int = 0
    products: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"path": str(self.path)}


def import_tensorrt(flavour: Flavour = "auto") -> ModuleType:
    """Import `tensorrt`, or `tensorrt_rtx`, or with "auto" the first of them that is installed.

    Raises:
        ModuleNotFoundError: Not installed.
    """
    names = ("tensorrt", "tensorrt_rtx") if flavour == "auto" else (flavour,)
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:  # an installation that is there but broken must not look like none
            continue
    raise ModuleNotFoundError(
        f"expected TensorRT ({' or '.join(names)}) to be installed, found none; run `pip install -e .[tensorrt-rtx]` "
        "(works without a GPU) or `pip install -e .[tensorrt]`, or leave the engine out (`--engine none`, or formats [hf, onnx])"
    )


def check_target(precision: str, compute_capabilities: Sequence[str]) -> None:
    """Raise `ValueError` if GPUs of these compute capabilities ("8.9") do not have the precision, or one is no number."""
    for capability in compute_capabilities:
        if not re.fullmatch(r"\d+\.\d", capability):
            raise ValueError(
                f"expected a compute capability such as 8.9, found {capability!r}; look up that of your GPU"
            )
        if precision.startswith("fp8") and tuple(map(int, capability.split("."))) < _FP8_CAPABILITY:
            raise ValueError(
                f"expected a compute capability of at least 8.9 for an FP8 engine, found {capability}; "
                "use precision fp16, or a newer GPU"
            )


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    profiles: Iterable[Profile] | None = None,
    compute_capabilities: Sequence[str] = (),
    flavour: Flavour = "auto",
) -> Engine:
    """Compile an ONNX file written by `export_onnx`.

    Args:
        onnx_path: The graph, its weights beside it.
        engine_path: File to write; an existing one is replaced at the very end.
        profiles: Accepted sizes; default: `default_profiles()`.
        compute_capabilities: Target GPUs such as "8.9" (tensorrt_rtx only); none: portable over what the package supports.
        flavour: Which TensorRT to use.

    Raises:
        ModuleNotFoundError: TensorRT is not installed.
        ValueError: The target can't run the file's precision, its labels are too many, or TensorRT refuses the file.
    """
    metadata = metadata_of(onnx_path)
    precision, name = metadata.get("precision", "fp32"), _engine_name(metadata)
    check_target(precision, compute_capabilities)
    trt = import_tensorrt(flavour)
    start = time.perf_counter()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(1 << int(flag) if flag is not None else 0)
    _parse(trt, network, logger, onnx_path)
    network.name = name
    config = builder.create_builder_config()
    for profile in profiles or default_profiles():
        config.add_optimization_profile(_optimization_profile(builder, network, profile))
    target = _set_target(trt, config, compute_capabilities)
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32: TF32 products keep three digits
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ValueError(
            f"expected {trt.__name__} {trt.__version__} to build an engine from {onnx_path.name}, found an error (see its "
            "messages above); try --opset 21, other --batch / --sequence / --past sizes or another precision"
        )
    with staging_folder(engine_path.parent) as folder:
        (folder / engine_path.name).write_bytes(memoryview(serialized))
        move_into_place(folder / engine_path.name, engine_path)
    return Engine(
        path=engine_path,
        bytes=engine_path.stat().st_size,
        seconds=time.perf_counter() - start,
        flavour=cast(Flavour, trt.__name__),
        version=trt.__version__,
        compute_capability=target,
        **inspect(trt, network),
    )


def _engine_name(metadata: dict[str, str]) -> str:
    name = json.dumps({key: metadata[key] for key in ENGINE_METADATA if key in metadata})
    if len(name) > _LONGEST_NAME:
        raise ValueError(
            f"expected labels whose texts and tokens fit into an engine's name of {_LONGEST_NAME} characters, found {len(name)}; "
            "export fewer or shorter labels, or leave the engine out"
        )
    return name


def _parse(trt: ModuleType, network: Any, logger: Any, onnx_path: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise ValueError(
            f"expected {trt.__name__} {trt.__version__} to read {onnx_path.name}, found: {errors}; try --opset 21"
        )
    for layer in _layers(network):
        # Without this the builder refuses an Attention that has no dedicated kernel on the target (float32, unusual widths).
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _optimization_profile(builder: Any, network: Any, profile: Profile) -> Any:
    result = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [_shape(tensor, *triple) for triple in zip(profile.batch, profile.sequence, profile.past, strict=True)]
        result.set_shape(tensor.name, *sizes)
    return result


def _shape(tensor: Any, batch: int, sequence: int, past: int) -> tuple[int, ...]:
    if tensor.name.startswith("past_key_values."):
        return batch, tensor.shape[1], past, tensor.shape[3]
    return batch, past + sequence if tensor.name == "attention_mask" else sequence


def _set_target(trt: ModuleType, config: Any, capabilities: Sequence[str]) -> str:
    if not hasattr(config, "set_compute_capability"):  # full TensorRT builds for the GPU it runs on
        return "this machine"
    known = [f"{name[2:-1]}.{name[-1]}" for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    unknown = [capability for capability in capabilities if capability not in known]
    if unknown:
        raise ValueError(
            f"expected compute capabilities that {trt.__name__} {trt.__version__} supports ({', '.join(known)}), found "
            f"{unknown[0]}; choose among these, or build with --engine tensorrt on that GPU"
        )
    if not capabilities:
        return "portable"
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), index)
    return "+".join(capabilities)


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(index) for index in range(network.num_layers)]


def inspect(trt: ModuleType, network: Any) -> dict[str, Any]:
    """Layers of a parsed network by type, and its matrix products with a weight by the types of their operands."""
    layers = _layers(network)
    producers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}

    def origin(tensor: Any) -> Any:
        """The layer that made a tensor, behind changes of its shape."""
        layer = producers.get(tensor.name)
        while layer is not None and layer.type == trt.LayerType.SHUFFLE:
            layer = producers.get(layer.get_input(0).name)
        return layer

    def is_weight(layer: Any) -> bool:
        if layer is not None and layer.type == trt.LayerType.DEQUANTIZE:
            layer = origin(layer.get_input(0))
        return layer is not None and layer.type == trt.LayerType.CONSTANT

    def numbers(tensor: Any) -> str:
        layer = origin(tensor)
        dequantized = layer is not None and layer.type == trt.LayerType.DEQUANTIZE
        name: str = (layer.get_input(0) if dequantized else tensor).dtype.name
        return name

    products = [
        f"{numbers(layer.get_input(0))} x {numbers(layer.get_input(1))}"
        for layer in layers
        if layer.type == trt.LayerType.MATRIX_MULTIPLY and is_weight(origin(layer.get_input(1)))
    ]
    return {
        "layers": dict(Counter(layer.type.name for layer in layers)),
        "matrix_multiplies": len(products),
        "products": dict(Counter(products)),
    }
