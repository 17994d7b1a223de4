"""The mode under which every operation that a model runs hands its relevance on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.saliency.relevance.composite import Composite
from secateur.saliency.relevance.rules import Rule, layer_relevance, share, stable, through_softmax


def _named(names: str) -> set[Any]:
    """The functions of these names in torch.nn.functional and torch, and the methods of tensors."""
    places = (F, torch, Tensor)
    return {getattr(place, name) for name in names.split() for place in places if hasattr(place, name)}


CONVOLUTIONS = _named("conv1d conv2d conv3d")
TRANSPOSED = _named("conv_transpose1d conv_transpose2d conv_transpose3d")
PASSED = _named(
    "relu relu_ relu6 gelu silu mish elu celu selu leaky_relu prelu rrelu softplus softsign hardtanh hardswish hardsigmoid"
    " logsigmoid sigmoid sigmoid_ tanh tanhshrink softshrink hardshrink clamp clamp_ clamp_min layer_norm rms_norm group_norm"
    " instance_norm normalize local_response_norm erf pow __pow__ square abs neg __neg__ rsub __rsub__"
)
GATES = _named("sigmoid sigmoid_ hardsigmoid")
SOFTMAX = _named("softmax")
CONSTANT = _named("log_softmax rsqrt sqrt reciprocal __rtruediv__ var std norm argmax") | {
    torch.linalg.norm,
    torch.linalg.vector_norm,
}
SUMS = _named("add add_ __add__ __radd__ __iadd__")
DIFFERENCES = _named("sub sub_ __sub__ __isub__")
PRODUCTS = _named("mul mul_ __mul__ __rmul__ __imul__")
QUOTIENTS = _named("div div_ __truediv__ __itruediv__")
MEANS = _named("mean sum avg_pool1d avg_pool2d avg_pool3d")
MEANS |= _named("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")
MATMULS = _named("matmul __matmul__ mm bmm")

ROUTES = re.compile(
    r"(Rule|View|UnsafeView|ReshapeAlias|Permute|Transpose|T|Mh|MT|Slice|Select|Index|IndexSelect|Gather|Cat|Stack|Split|"
    r"SplitWithSizes|Chunk|Unbind|SafeSplit|Expand|Repeat|RepeatInterleave|SelfRepeatInterleave|Squeeze|Unsqueeze|Clone|Alias|"
    r"ToCopy|ConstantPadNd|ReflectionPad\dD|ReplicationPad\dD|MaxPool\dD\w*|AdaptiveMaxPool\dD|Max|Amax|TopK|Roll|Flip|Rot90|"
    r"AsStrided|Copy|CopySlices|Upsample\w+|PixelShuffle|PixelUnshuffle|Im2Col|Col2Im|Unfold|Where|MaskedFill|MaskedScatter|"
    r"Detach|Diagonal|Movedim|Flatten|Unflatten|AccumulateGrad|IndexPut|Scatter|SliceScatter|Contiguous|NativeDropout|"
    r"Identity|Values|Narrow|Lift|Fill|Zero|ViewAs\w*|Tril|Triu)(Backward\w*)?"
)


def check_rules(output: Tensor, model: nn.Module) -> None:
    """Raises `SecateurError`, naming the operation, where relevance would pass one that has no rule."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not ROUTES.fullmatch(node.name().split("::")[-1].rstrip("0123456789>")):
            raise SecateurError(
                f"there is no relevance rule for {node.name().split('::')[-1].removesuffix('Backward0')}",
                where=type(model).__name__,
                fix="use gradient, normgrad or grad-cam, or another criterion",
            )
        todo += [following for following, _ in node.next_functions]


class RelevanceMode(TorchFunctionMode):
    """Gives every operation that activations pass the backward of its rule; parameters must not require gradients."""

    def __init__(
        self,
        composite: Composite,
        names: Mapping[int, str] | None = None,
        watch: Callable[[str, Tensor], None] | None = None,
    ):
        super().__init__()
        self.composite, self.names, self.watch = composite, names or {}, watch
        self.leaves: list[Tensor] = []
        self._passed_last = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, func = kwargs or {}, plain(func)
        # token ids carry no gradient: relevance of a text ends at its embeddings, which become leaves
        if func is F.embedding:
            found = func(*args, **kwargs)
            if found.is_floating_point() and not found.requires_grad:
                found = found.detach().requires_grad_(True)
                self.leaves.append(found)
                return self._embedded(found, _argument(args, kwargs, 1, "weight"))
            return found
        # what the input does not reach (masks, position tables) is a constant
        if not _carry((*args, *kwargs.values())):
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        # autograd refuses custom functions that write in place: they run on a clone, and the result is copied back
        in_place = (
            bool(kwargs.get("inplace"))
            or (func.__name__.endswith("_") and not func.__name__.startswith("__"))
            or func.__name__ in ("__iadd__", "__isub__", "__imul__", "__itruediv__")
        )
        handler = self._handler(func)
        # operations that only move numbers: their own gradient moves relevance the same way
        if handler is None:
            found = func(*args, **kwargs)
            if isinstance(found, Tensor) and args and getattr(args[0], "_pixels", False):
                found._pixels = True  # type: ignore[attr-defined]
            return found
        if not in_place:
            return handler(func, args, kwargs)
        target, kwargs = args[0], {key: value for key, value in kwargs.items() if key != "inplace"}
        found = handler(OUT_OF_PLACE.get(func, func), (target.clone(), *args[1:]), kwargs)
        return target.copy_(found)

    def _handler(self, func: Any) -> Callable[..., Tensor] | None:
        for known, handler in (
            (CONVOLUTIONS, self._conv),
            (TRANSPOSED, self._conv),
            ({F.linear}, self._linear),
            ({torch.addmm, Tensor.addmm}, self._addmm),
            ({F.batch_norm, torch.batch_norm}, self._batch_norm),
            (PASSED, self._pass),
            (CONSTANT, self._constant),
            (SOFTMAX, self._softmax),
            (SUMS | DIFFERENCES, self._add),
            (PRODUCTS, self._multiply),
            (QUOTIENTS, self._divide),
            (MEANS, self._mean),
            (MATMULS, self._matmul),
            ({torch.einsum}, self._einsum),
            ({F.scaled_dot_product_attention}, self._attention),
        ):
            if func in known:
                return handler
        return None

    # layers

    def _conv(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "weight", "bias")
        x, weight, bias = (_argument(args, kwargs, i, name) for i, name in enumerate(names))
        rest, kwargs = args[3:], {key: value for key, value in kwargs.items() if key not in names}

        def f(x: Tensor, w: Tensor) -> Tensor:
            return func(x, w, None, *rest, **kwargs)

        value = func(x, weight, bias, *rest, **kwargs)
        groups = kwargs.get(
            "groups", rest[4 if func in TRANSPOSED else 3] if len(rest) > 3 + (func in TRANSPOSED) else 1
        )
        out_dim = 1 if func in TRANSPOSED else 0
        return self._layer("conv", f, x, weight, bias, value, out_dim, foldable=out_dim == 0 or groups == 1)

    def _linear(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        x, weight, bias = (
            _argument(args, kwargs, i, name) for i, name in enumerate(("input", "weight", "bias"))
        )
        return self._layer("linear", F.linear, x, weight, bias, F.linear(x, weight, bias), 0)

    def _addmm(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        bias, x, weight = args[:3]
        return self._layer("linear", torch.mm, x, weight, bias, func(*args, **kwargs), 1)

    def _layer(
        self,
        kind: str,
        f: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        value: Tensor,
        out_dim: int,
        foldable: bool = True,
        name: str | None = None,
    ) -> Tensor:
        if not (isinstance(x, Tensor) and x.requires_grad) or weight.requires_grad:
            return value
        c, channels = self.composite, 1 if kind == "conv" else -1
        name = self.names.get(id(weight)) if name is None else name
        rule = c.conv if kind == "conv" else c.linear
        if getattr(x, "_pixels", False) and c.first:
            rule = c.first
        shaped = bias
        if bias is not None and kind == "conv":
            shaped = bias.reshape(-1, *[1] * (value.dim() - 2))

        def back(relevance: Tensor, x: Tensor) -> Tensor:
            own = rule
            if not self._passed_last:
                self._passed_last, own = True, c.last or rule
            if self.watch is not None and name:
                self.watch(name, relevance.movedim(channels, -1))
            return layer_relevance(own, f, x, weight, shaped, relevance, c)

        out = Rule.apply([value.detach()], back, x)
        if foldable:
            out._layer = (out._version, kind, f, x, weight, bias, out_dim, name)
        return out

    def _embedded(self, found: Tensor, weight: Tensor) -> Tensor:
        name = self.names.get(id(weight))

        def back(relevance: Tensor, _: Tensor) -> Tensor:
            if self.watch is not None and name:
                self.watch(name, relevance)
            return relevance

        return Rule.apply([found.detach().clone()], back, found)

    def _batch_norm(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        value = func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        if func is torch.batch_norm:
            names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        given = {**dict(zip(names, args)), **kwargs}
        x, variance = given["input"], given["running_var"]
        layer = getattr(x, "_layer", None)
        if layer is None or layer[0] != x._version or variance is None or given.get("training"):
            return self._identity(x, value)
        _, kind, f, x, weight, bias, out_dim, name = layer
        scale = (variance + given.get("eps", 1e-5)).rsqrt()
        if given.get("weight") is not None:
            scale = scale * given["weight"]
        shift = -given["running_mean"] if bias is None else bias - given["running_mean"]
        shift = shift * scale
        if given.get("bias") is not None:
            shift = shift + given["bias"]
        shape = [1] * weight.dim()
        shape[out_dim] = -1
        folded = (weight * scale.reshape(shape)).detach()
        return self._layer(
            kind, f, x, folded, shift.detach(), value, out_dim, foldable=False, name=name or ""
        )

    # the rest

    def _identity(self, x: Tensor, value: Tensor) -> Tensor:
        if value is x:
            return value

        def back(relevance: Tensor, x: Tensor) -> Tensor:
            return relevance.sum_to_size(x.shape).to(x.dtype)

        return Rule.apply([value.detach()], back, x)

    def _pass(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        value = func(*args, **kwargs)
        x = _argument(args, kwargs, 0, "input")
        out: Any = self._identity(x, value) if x.requires_grad else value
        if func in GATES:
            out._gate = True
        return out

    def _constant(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return func(*args, **kwargs)

    def _softmax(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if self.composite.attention == "values":
            return self._constant(func, args, kwargs)
        x, dim = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "dim")
        value = func(*args, **kwargs).detach()

        def back(relevance: Tensor, x: Tensor) -> Tensor:
            found = x * through_softmax(relevance, value.to(relevance.dtype), dim)
            return found.masked_fill(value == 0, 0).to(x.dtype)  # a masked place is minus infinity

        return Rule.apply([value], back, x)

    def _add(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        x, y = args[0], _argument(args, kwargs, 1, "other")
        value = func(*args, **kwargs)
        both = isinstance(x, Tensor) and isinstance(y, Tensor) and x.requires_grad and y.requires_grad
        if not both:
            return self._identity(x if isinstance(x, Tensor) and x.requires_grad else y, value)
        sign = (-1.0 if func in DIFFERENCES else 1.0) * kwargs.get("alpha", 1)
        epsilon = self.composite.epsilon

        def back(relevance: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            s = relevance / stable(x + sign * y, epsilon)
            return (x * s).sum_to_size(x.shape), (sign * y * s).sum_to_size(y.shape)

        return Rule.apply([value.detach()], back, x, y)

    def _multiply(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        x, y = args[0], _argument(args, kwargs, 1, "other")
        value = func(*args, **kwargs)
        carry = [t for t in (x, y) if isinstance(t, Tensor) and t.requires_grad]
        signals = [t for t in carry if not getattr(t, "_gate", False)] or carry
        if len(signals) == 1:
            return self._identity(signals[0], value)

        def back(relevance: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return (relevance / 2).sum_to_size(x.shape), (relevance / 2).sum_to_size(y.shape)

        return Rule.apply([value.detach()], back, x, y)

    def _divide(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        value = func(*args, **kwargs)
        if not (isinstance(args[0], Tensor) and args[0].requires_grad):
            return value.detach()
        return self._identity(args[0], value)

    def _mean(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        rest, epsilon = args[1:], self.composite.epsilon
        x = _argument(args, kwargs, 0, "input")
        kwargs = {key: value for key, value in kwargs.items() if key != "input"}

        def back(relevance: Tensor, x: Tensor) -> Tensor:
            return share(lambda t: func(t, *rest, **kwargs), x, relevance, epsilon)

        return Rule.apply([func(x, *rest, **kwargs).detach()], back, x)

    def _matmul(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        x, y = args[0], _argument(args, kwargs, 1, "other" if func is not torch.mm else "mat2")
        if not y.requires_grad and (id(y) in self.names or y.dim() == 2):
            return self._layer("linear", func, x, y, None, func(x, y), 1)
        return self._product(func, x, y)

    def _einsum(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        equation, *given = args
        operands = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
        if len(operands) != 2:
            return func(*args, **kwargs)
        return self._product(partial(func, equation), *operands)

    def _product(self, f: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        value = f(x, y)
        if not (x.requires_grad and y.requires_grad):
            moving = x if x.requires_grad else y
            return self._weighted(lambda t: f(t, y) if moving is x else f(x, t), moving, value)
        epsilon = self.composite.epsilon

        def back(relevance: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            half = relevance / 2
            return share(lambda t: f(t, y), x, half, epsilon), share(lambda t: f(x, t), y, half, epsilon)

        return Rule.apply([value.detach()], back, x, y)

    def _attention(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        names = ("query", "key", "value")
        q, k, v = (_argument(args, kwargs, i, name) for i, name in enumerate(names))
        rest, kwargs = args[3:], {key: value for key, value in kwargs.items() if key not in names}
        if self.composite.attention == "softmax":
            mask, _, causal, scale = (
                _argument(rest, kwargs, i, name)
                for i, name in enumerate(("attn_mask", "dropout_p", "is_causal", "scale"))
            )
            return self._written_out(q, k, v, mask, causal, scale)
        q, k = q.detach(), k.detach()
        value = func(q, k, v, *rest, **kwargs)
        if not v.requires_grad:
            return value
        return self._weighted(lambda t: func(q, k, t, *rest, **kwargs), v, value)

    def _written_out(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool | None, scale: float | None
    ) -> Tensor:
        """Attention in operations that have rules."""
        shared = q.shape[-3] // k.shape[-3]  # heads that read the same keys
        with self:
            k, v = (t.repeat_interleave(shared, -3) if shared > 1 else t for t in (k, v))
            scores = torch.matmul(q, k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
            if causal:
                mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            return torch.matmul(F.softmax(scores, -1), v)

    def _weighted(self, f: Callable[[Tensor], Tensor], x: Tensor, value: Tensor) -> Tensor:
        epsilon = self.composite.epsilon

        def back(relevance: Tensor, x: Tensor) -> Tensor:
            return share(f, x, relevance, epsilon)

        return Rule.apply([value.detach()], back, x)


OUT_OF_PLACE: dict[Any, Any] = {
    Tensor.add_: torch.add,
    Tensor.__iadd__: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.__isub__: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.__imul__: torch.mul,
    Tensor.div_: torch.div,
    Tensor.__itruediv__: torch.div,
    Tensor.relu_: torch.relu,
    torch.relu_: torch.relu,
    Tensor.sigmoid_: torch.sigmoid,
    Tensor.clamp_: torch.clamp,
}


def plain(func: Any) -> Any:
    """The function of torch that an ATen operation, as exported programs hold them, is."""
    schema = getattr(func, "_schema", None)
    name = schema.name.removeprefix("aten::") if schema is not None else ""
    return ATEN.get(name, func)


def _by_name(*names: str) -> dict[str, Any]:
    places = (torch, F, Tensor)
    return {n: next(getattr(place, n) for place in places if hasattr(place, n)) for n in names}


ATEN = _by_name(
    *(
        "conv1d",
        "conv2d",
        "conv3d",
        "linear",
        "addmm",
        "matmul",
        "mm",
        "bmm",
        "batch_norm",
        "layer_norm",
        "group_norm",
    ),
    *(
        "add",
        "add_",
        "sub",
        "sub_",
        "mul",
        "mul_",
        "div",
        "div_",
        "mean",
        "sum",
        "avg_pool2d",
        "adaptive_avg_pool2d",
    ),
    *(
        "relu",
        "relu_",
        "relu6",
        "silu",
        "gelu",
        "elu",
        "leaky_relu",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
    ),
    *("tanh", "clamp", "softmax", "rsqrt", "sqrt", "pow", "scaled_dot_product_attention"),
)


def _argument(args: tuple, kwargs: Mapping[str, Any], at: int, name: str) -> Any:
    return args[at] if len(args) > at else kwargs.get(name)


def _carry(values: Any) -> bool:
    """Whether relevance passes any of these: tensors that require gradients, nested or not."""
    return any(
        (isinstance(value, Tensor) and value.requires_grad)
        or (isinstance(value, tuple | list) and _carry(value))
        for value in values
    )


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    *args: Any,
    out_proj_weight: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`F.multi_head_attention_forward` in operations that have rules, for self-attention without masks: [length, N, C]."""
    names = ("bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")
    given = {
        **dict(zip(names, args)),
        "out_proj_weight": out_proj_weight,
        "out_proj_bias": out_proj_bias,
        **kwargs,
    }
    if len(args) > 4:
        given["out_proj_weight"], given["out_proj_bias"] = args[4:6]
    if in_weight is None or query is not key or key is not value or given.get("bias_k") is not None:
        raise SecateurError(
            "there is no relevance rule for this form of nn.MultiheadAttention",
            where="lrp",
            fix="self-attention of one width, without extra keys, has one",
        )
    unbatched = query.dim() == 2
    x = (query.unsqueeze(1) if unbatched else query).transpose(0, 1)
    q, k, v = F.linear(x, in_weight, in_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    mask = given.get("attn_mask")
    if (padding := given.get("key_padding_mask")) is not None:
        raise SecateurError(
            f"a padding mask {tuple(padding.shape)} has no rule", where="lrp", fix="give full inputs"
        )
    mixed = F.scaled_dot_product_attention(q, k, v, mask)
    out = F.linear(mixed.transpose(1, 2).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
    out = out.transpose(0, 1)
    return (out.squeeze(1) if unbatched else out), None
