"""The types of GGUF tensors: which one a tensor gets, and how float32 rows are stored in it."""

import gguf
import numpy as np
import torch

Type = gguf.GGMLQuantizationType
FileType = gguf.LlamaFileType

# quantization: the type of matrices, the type of those that matter more, the file's type
QUANTIZATIONS = {
    "f32": (Type.F32, Type.F32, FileType.ALL_F32),
    "f16": (Type.F16, Type.F16, FileType.MOSTLY_F16),
    "bf16": (Type.BF16, Type.BF16, FileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, Type.Q8_0, FileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, Type.Q5_1, FileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, Type.Q5_0, FileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, Type.Q4_1, FileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, Type.Q4_0, FileType.MOSTLY_Q4_0),
    "q6_k": (Type.Q6_K, Type.Q6_K, FileType.MOSTLY_Q6_K),
    "q5_k_m": (Type.Q5_K, Type.Q6_K, FileType.MOSTLY_Q5_K_M),
    "q4_k_m": (Type.Q4_K, Type.Q6_K, FileType.MOSTLY_Q4_K_M),
}
PROJECTORS = ("f32", "f16", "bf16", "q8_0")
# Where 256 does not divide a row: types with blocks of 32, as llama.cpp's own quantiser chooses them.
FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
K_TYPES = tuple(FALLBACK)


def checked_quantization(quantization: str, allowed=tuple(QUANTIZATIONS), argument: str = "quantization") -> str:
    """The name of a quantisation in lower case: llama.cpp writes Q4_K_M. `libgguf` is there if it is needed.

    Raises:
        ValueError: the name is unknown.
        ImportError: a K-quant without `libgguf`.
    """
    name = quantization.lower() if isinstance(quantization, str) else None
    if name not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {quantization!r}")
    if QUANTIZATIONS[name][0] in K_TYPES:
        try:
            import libgguf  # noqa: F401
        except ImportError:
            raise ImportError(
                f"quantization must be one of gguf's own without the package libgguf, got {quantization!r}; "
                "pip install libgguf==0.2.2, or take q8_0 or q4_0"
            ) from None
    return name


def text_type(quantization: str, name: str, columns: int, layers: int, tied: bool) -> Type:
    """The type of a matrix of the text model.

    The K-quants with _m give 6 bits to the output head (a tied embedding is one), and to half of the value and down
    projections, as llama.cpp does: the first and last eighth of the layers and every third between them.

    Args:
        quantization: a key of `QUANTIZATIONS`.
        name: the tensor's, in the file.
        columns: the length of its rows.
        layers: how many layers the model has.
        tied: whether the embedding is the head, too.
    """
    plain, better, _ = QUANTIZATIONS[quantization]
    head = name == "output.weight" or (tied and name == "token_embd.weight")
    chosen = better if head or _matters(name, layers) else plain
    return fitting(chosen, columns)


def _matters(name: str, layers: int) -> bool:
    if not name.endswith((".attn_v.weight", ".ffn_down.weight")):
        return False
    layer = int(name.split(".")[1])
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def fitting(wanted: Type, columns: int) -> Type:
    """`wanted` if its blocks divide a row; else the type of `FALLBACK`; else F16."""
    for one in (wanted, FALLBACK.get(wanted)):
        if one is not None and columns % gguf.GGML_QUANT_SIZES[one][0] == 0:
            return one
    return Type.F16


def row_bytes(kind: Type, columns: int) -> int:
    """Bytes of a row."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if columns % block:
        raise ValueError(f"columns must be a multiple of {block} for {kind.name}, got {columns}")
    return columns // block * size


def encode(values: torch.Tensor, kind: Type, name: str) -> np.ndarray:
    """Store float32 values.

    Args:
        values: [..., columns] float32, on the CPU.
        kind: the type.
        name: the tensor's, for the error.

    Returns:
        Their bytes, as an array of the type that `gguf` gives.

    Raises:
        ValueError: a value is beyond float16's range and `kind` stores values or scales in float16.
    """
    array = np.ascontiguousarray(values.numpy(), dtype=np.float32)
    if kind == Type.F32:
        return array
    if kind != Type.BF16 and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(f"quantization must hold the values of {name}, which are beyond float16's range, got "
                         f"{kind.name}; take bf16 or f32")  # fmt: skip
    if kind == Type.F16:
        return array.astype(np.float16)
    if kind in K_TYPES:
        import libgguf

        return libgguf.quantize_rows(array, int(kind))
    return gguf.quants.quantize(array, kind)
