"""Rules for sums of products: matrix products and einsum.

Each dimension of an operand has a letter, as in einsum. The channels of a value lie along one letter; along the letters
of its fixed axes all entries are one channel (the features of an attention head). A result that still has the
channels' letter has them too, since each channel of it is made of the same channel of the operands. A sum over them is
another matter: a channel that nobody's weights read need not be 0, so it has a part in the sum, and all have to stay.
"""

import string
from dataclasses import dataclass
from typing import Any

from torch import fx

from prunetrain_kernels.graph.calls import Outcome, argument
from prunetrain_kernels.graph.channels import Channels
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.operations import OVER_CHANNELS
from prunetrain_kernels.graph.parameters import is_saved_tensor
from prunetrain_kernels.graph.shapes import fixed_axes, spread_over, without_axis

Letters = tuple[str, ...]
ALONE = ""  # the letter of a dimension of size 1 that is broadcast against a longer one


@dataclass(frozen=True)
class Operand:
    """An operand of a sum of products.

    Attributes:
        node: the tensor.
        letters: one for each of its dimensions; no letter is there twice.
        channels: its channels, with one id for each place along `along` only; None where none are known.
        along: the letter that its channels lie along; `ALONE` where none are known.
        fixed: the letters along which all entries are one channel.
    """

    node: fx.Node
    letters: Letters
    channels: Channels | None = None
    along: str = ALONE
    fixed: frozenset[str] = frozenset()

    def dim_of(self, letter: str) -> int:
        """The dimension with this letter."""
        return self.letters.index(letter)


def product(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for `a @ b`, matmul and bmm."""
    a, b = argument(node, 0, "input"), argument(node, 1, "other", "mat2", "tensor2")
    shapes = [tuple(shape) for shape in (flow.shape(a), flow.shape(b)) if shape is not None]
    if len(shapes) < 2:
        return False
    left, right = ["row", "sum"][-len(shapes[0]) :], ["sum", "column"][-len(shapes[1]) :]
    if len(shapes[1]) == 1:
        right = ["sum"]
    outer = [list(shape[:-2]) for shape in shapes]
    length = max(map(len, outer))
    letters: list[Letters] = []
    for sizes, other, inner in zip(outer, reversed(outer), (left, right), strict=True):
        names = [f"batch {length - len(sizes) + i}" for i in range(len(sizes))]
        for place in range(1, min(len(sizes), len(other)) + 1):
            if sizes[-place] == 1 and other[-place] > 1:
                names[-place] = ALONE
        letters.append((*names, *inner))
    result = (*(f"batch {i}" for i in range(length)), *(n for n in ("row", "column") if n in left or n in right))
    return _contraction(flow, node, [Operand(a, letters[0]), Operand(b, letters[1])], result)


def einsum(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for `torch.einsum(equation, ...)`; an equation that takes a diagonal is not followed."""
    equation = argument(node, 0, "equation")
    listed: Any = list(node.args[1:])
    tensors: list[fx.Node] = list(listed[0]) if len(listed) == 1 and isinstance(listed[0], list | tuple) else listed
    shapes = [flow.shape(each) for each in tensors]
    if not isinstance(equation, str) or not tensors or any(shape is None for shape in shapes):
        return False
    terms, arrow, result = equation.replace(" ", "").partition("->")
    letters = [_spelt_out(term, len(shape or ())) for term, shape in zip(terms.split(","), shapes, strict=True)]
    written = [letter for term in letters for letter in term]
    dots = sorted({letter for letter in written if len(letter) > 1}, reverse=True)
    if not arrow:
        result = "..." * bool(dots) + "".join(sorted(n for n in set(written) if written.count(n) == 1 and len(n) == 1))
    after = _spelt_out(result, len(result.replace("...", "")) + len(dots) * ("..." in result))
    if any(len(set(term)) != len(term) for term in [*letters, after]):
        return False
    sizes: dict[str, int] = {}
    for term, shape in zip(letters, shapes, strict=True):
        for letter, size in zip(term, shape or (), strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    operands = []
    for each, term, shape in zip(tensors, letters, shapes, strict=True):
        named = (ALONE if size < sizes[n] else n for n, size in zip(term, shape or (), strict=True))
        operands.append(Operand(each, tuple(named)))
    return _contraction(flow, node, operands, after)


def _spelt_out(term: str, ndim: int) -> Letters:
    """A letter for each dimension; those that `...` stands for are numbered from the last one."""
    before, dots, behind = term.partition("...")
    if not set(before + behind) <= set(string.ascii_letters):
        return ("?", "?")  # as if a letter were there twice
    missing = ndim - len(before) - len(behind) if dots else 0
    return (*before, *(f"...{place}" for place in range(missing, 0, -1)), *behind)


# -- channels ----------------------------------------------------------------------------------------------------------


def _contraction(flow: Flow, node: fx.Node, operands: list[Operand], after: Letters) -> Outcome:
    """Says which channels a sum of products has; `after`: a letter for each dimension of the result."""
    if set(flow.tensors(node)) != {each.node for each in operands} or len(flow.shape(node) or ()) != len(after):
        return False
    known = [_with_channels(flow, each) for each in operands]
    if any(each is None for each in known):
        return False
    sides = [each for each in known if each is not None]
    leading = [each for each in sides if each.channels is not None and not flow.all_stay(each.channels)]
    if not leading:
        leading = [each for each in sides if each.channels is not None and each.along in after][:1]
    if not leading:
        return False
    along = leading[0].along
    if any(each.along not in after for each in leading):
        return f"operation '{getattr(node.target, '__name__', node.target)}' {OVER_CHANNELS}"
    if any(each.along != along for each in leading):
        return False
    ids: tuple[int, ...] = ()
    for side in sides:
        if along in side.letters:
            channels = side.channels if side.along == along else _of_parameter(flow, side, along)
            if channels is None or (ids and len(channels.ids) != len(ids)):
                return False
            ids = flow.join(ids, channels.ids) if ids else channels.ids
    fixed = {letter for side in sides if side.along == along for letter in side.fixed} & set(after)
    dims = tuple(dim for dim, letter in enumerate(after) if letter == along or letter in fixed)
    shape = flow.shape(node) or ()
    grid = tuple(shape[dim] for dim in dims) if len(dims) > 1 else ()
    flow.set(node, spread_over(Channels(ids, dims=(after.index(along),)), dims, grid))
    return True


def _with_channels(flow: Flow, operand: Operand) -> Operand | None:
    """The operand with what is known of its channels; None where they lie along several letters, or one of size 1."""
    value = flow.channels_of(operand.node)
    if value is None:
        return operand
    fixed = fixed_axes(flow, value)
    if len(value.dims) - len(fixed) != 1:
        return None
    for dim in fixed:
        value = without_axis(value, dim)
    value, letters = value.plain(), operand.letters
    along = letters[value.dims[0]]
    if along == ALONE:
        return None
    return Operand(operand.node, letters, value, along, frozenset(letters[dim] for dim in fixed))


def _of_parameter(flow: Flow, operand: Operand, along: str) -> Channels | None:
    """Channels for a tensor of the model along a letter; None for another value, whose size is not known to follow."""
    node: Any = operand.node
    if operand.channels is not None or node.op != "get_attr" or not is_saved_tensor(flow, str(node.target)):
        return None
    return flow.parameter(node, operand.dim_of(along))


def without_heads(flow: Flow, node: fx.Node, tensors: list[Any], mask: Any) -> Outcome:
    """Rule for `F.scaled_dot_product_attention` whose operands have channels, not heads, in their last dimension: those
    of query and key are summed over, those of the value go through."""
    query, key, value = tensors
    after, channels = flow.shape(node), flow.channels_of(value)
    last = len(after or ()) - 1
    if after is None or channels is None or channels.dims != (last,):
        return False
    summed = [each for each in map(flow.channels_of, (query, key)) if each is not None]
    if any(each.dims != (last,) for each in summed):
        return False
    for each in (*summed, *filter(None, [flow.channels_of(mask)])):
        flow.freeze(each, f"operation 'scaled_dot_product_attention' {OVER_CHANNELS}")
    flow.set(node, channels)
    return True
