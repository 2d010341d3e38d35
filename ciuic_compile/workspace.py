"""Temporaries that external CUDA kernels allocate for themselves, in bytes, from the tensors they get.

Formulas after torch's sources (flash_api.cpp, attention_backward.cu, MHA.cpp, EmbeddingBackwardKernel.cu,
ConvShared.cpp); a test holds them against bench/results/workspaces-h200.json. What cuDNN copies beside was
measured on an H200 in bfloat16, and is taken to be the same in float16. It takes 0 to 18 MiB more for partial
sums, another choice for every shape: not counted. Nor is anything of its own for float32, 1x1, grouped or
transposed convolutions, or for those in one or three dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

Shape = Sequence[int]
_FLOAT, _HALF = 4, 2
_ATTENTION_BACKWARD = {  # op: rows are padded to a multiple of, and grouped keys and values are expanded
    "flash_attention_backward": (128, True),
    "flash_attention_for_cpu_backward": (128, True),  # traced on a CPU, planned for a GPU: the same there
    "efficient_attention_backward": (64, False),
    "cudnn_attention_backward": (1, True),
}
_EMBEDDING_BACKWARD = ("embedding_dense_backward", "ciuic.embedding_gradient")
_CONVOLUTION, _CONVOLUTION_BACKWARD = "aten.convolution.", "aten.convolution_backward."
_SORTED_BY_BLOCKS = 3072  # tokens up to which an embedding's gradient needs no sorting
_MATMULS = ("mm", "addmm", "bias_addmm", "bmm", "baddbmm", "mm_plus_mm", "_int_mm")
_CHANNELS = 8  # of half precision in a row: what tensor cores read is padded to a multiple


@dataclass(frozen=True)
class Operand:
    """A tensor as an external kernel reads or writes it; dynamic sizes are torch's symbolic integers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.itemsize

    @property
    def plain(self) -> Operand:
        """The same with its elements in the order of its dimensions, without gaps."""
        strides = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return Operand(self.shape, strides, self.itemsize)

    @property
    def last(self) -> Operand:
        """An image with its channels side by side, without gaps."""
        _, channels, height, width = self.shape
        strides = (channels * height * width, 1, width * channels, channels)
        return Operand(self.shape, strides, self.itemsize)

    @property
    def is_plain(self) -> bool:
        """Whether it lies so; a dimension of one has no stride that matters."""
        given = zip(self.shape, self.strides, self.plain.strides, strict=True)
        return all(size == 1 or stride == expected for size, stride, expected in given)

    @property
    def suggests_channels_last(self) -> bool:
        """Whether torch takes it for channels last (``suggest_memory_format``): where in doubt, not."""
        if len(self.shape) != 4 or self.strides[1] == 0:
            return False
        least = 0
        for dim in (1, 3, 2, 0):
            if self.strides[dim] < least or (dim == 0 and least == self.strides[1]):
                return False
            least = self.strides[dim] * max(1, self.shape[dim])
        return True

    @property
    def channels_last(self) -> bool:
        """Whether an image's channels lie side by side in memory, without gaps."""
        if not len(self.shape) == len(self.strides) == 4:
            return False
        expected = 1
        for dim in (1, 3, 2, 0):
            if self.shape[dim] != 1 and self.strides[dim] != expected:
                return False
            expected *= self.shape[dim]
        return True


def workspaces(
    op: str,
    operands: Sequence[Operand],
    result: Operand | None = None,
    arguments: Mapping[str, object] | None = None,
) -> tuple[int, ...]:
    """Bytes of the blocks that ``op`` allocates beside its results, all at once; of unknown ones, none.

    Args:
        op: e.g. ``"aten._scaled_dot_product_flash_attention_backward.default"``.
        operands: its tensor arguments, in order.
        result: what it returns, where that is one tensor.
        arguments: its other arguments, by their names in the op's schema, as far as they are known.
    """
    return tuple(n for n in _blocks(op, operands, result, arguments or {}) if n)


def takes_workspace(op: str) -> bool:
    """Whether an op is one that :func:`workspaces` knows."""
    known = (*_ATTENTION_BACKWARD, *_EMBEDDING_BACKWARD, _CONVOLUTION_BACKWARD, _CONVOLUTION)
    return any(name in op for name in known)


def _blocks(
    op: str, operands: Sequence[Operand], result: Operand | None, arguments: Mapping[str, object]
) -> Sequence[int]:
    shapes = [o.shape for o in operands]
    if not operands:
        return ()
    for name, (row_block, expands) in _ATTENTION_BACKWARD.items():
        if name in op:
            return (_attention(shapes, operands[0].itemsize, row_block, expands),)
    if any(name in op for name in _EMBEDDING_BACKWARD):
        return (_embedding(shapes[0], shapes[1]),)
    if _CONVOLUTION_BACKWARD in op and len(operands) == 3:
        gradient, image, weight = operands
        return _convolution_backward(gradient, image, weight, arguments)
    if _CONVOLUTION in op and result is not None:
        image, weight = operands[:2]
        if _read_as_it_is(image, weight, arguments):
            return ()
        return (_convolution(image, weight, result, arguments),)
    return ()


def blas_libraries(kernel: str, operands: Iterable[Operand]) -> tuple[str, ...]:
    """The libraries that a matmul of Inductor's calls (``"addmm"`` of ``"extern_kernels.addmm"``), in order.

    Each keeps a workspace for the thread. A bias of one row is added by cuBLASLt, with cuBLAS's handle.
    """
    if kernel not in _MATMULS:
        return ()
    bias = next(iter(operands))
    row = kernel in ("addmm", "bias_addmm") and (len(bias.shape) == 1 or bias.strides[0] == 0)
    return ("cublas", "cublaslt") if row or kernel == "_int_mm" else ("cublas",)


def _convolution_backward(
    gradient: Operand, image: Operand, weight: Operand, arguments: Mapping[str, object]
) -> Sequence[int]:
    """What torch copies into the layout that image and weight suggest (ConvShared.cpp), then cuDNN does."""
    if len(image.shape) != 4:
        return (_convolution(image, weight, gradient, arguments),)
    if image.suggests_channels_last or weight.suggests_channels_last:
        copies = [o.nbytes for o in (gradient, image) if not o.channels_last]
        return (*copies, _convolution(image.last, weight, gradient.last, arguments))
    copies = [o.nbytes for o in (gradient, image) if not o.is_plain]
    return (*copies, _convolution(image.plain, weight, gradient.plain, arguments))


def _convolution(image: Operand, weight: Operand, features: Operand, arguments: Mapping[str, object]) -> int:
    """Copies of what does not lie as the tensor cores want it: channels last, a multiple of 8 of them.

    The backward makes them for one gradient after the other, and either time of an image, features and
    weights: two that it reads and the one that it writes.
    """
    ordinary = arguments.get("groups") == 1 and arguments.get("transposed") is False
    if not ordinary or weight.itemsize != _HALF or len(weight.shape) != 4 or prod(weight.shape[2:]) == 1:
        return 0
    return _copied(image, (1,)) + _copied(features, (1,)) + _copied(weight, (0, 1))


def _read_as_it_is(image: Operand, weight: Operand, arguments: Mapping[str, object]) -> bool:
    """Whether the forward reads a photograph of a few plain channels where it lies: not if cut in patches."""
    stride = arguments.get("stride")
    patches = isinstance(stride, (list, tuple)) and tuple(stride) == weight.shape[2:]
    return image.shape[1] < _CHANNELS and not image.channels_last and not patches


def _copied(tensor: Operand, channel_dims: Sequence[int]) -> int:
    """Bytes of a tensor's copy with its channels last and padded; 0 where it can be read as it is."""
    padded = [-(-n // _CHANNELS) * _CHANNELS if i in channel_dims else n for i, n in enumerate(tensor.shape)]
    if tensor.channels_last and padded == list(tensor.shape):
        return 0
    return prod(padded) * tensor.itemsize


def _attention(shapes: Sequence[Shape], itemsize: int, row_block: int, expands: bool) -> int:
    """The query gradient in float32 and one float a row; keys and values of grouped queries one by one."""
    (batch, heads, rows, size), (_, kv_heads, keys, _) = shapes[1], shapes[2]
    padded = -(-rows // row_block) * row_block
    expanded = 2 * batch * heads * keys * size * itemsize if expands and kv_heads != heads else 0
    return batch * heads * padded * (size + 1) * _FLOAT + expanded


def _embedding(gradient: Shape, indices: Shape) -> int:
    """Sorted copies of the indices, and a float32 row for each run of up to 10 equal ones."""
    tokens = 1
    for length in indices:
        tokens *= length
    if tokens <= _SORTED_BY_BLOCKS:
        return 0
    return (tokens + tokens // 10) * gradient[-1] * _FLOAT + 6 * 8 * tokens
