"""Golden graphs of two blocks after every pass; accept a change with EXPECTTEST_ACCEPT=1 and read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import GraphModule


def _text(module: GraphModule) -> str:
    lines = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            lines.append(f"{node.name} = {str(node.target).removesuffix('.default')}{_shown(node.args)}")
        elif node.op == "output":
            lines.append(f"return {_shown(node.args[0])}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_shown(item) for item in value) + ")"
    return str(value)


def test_residual_block(program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]) -> None:
    def block(x: Tensor, w1: Tensor, w2: Tensor, *norms: Tensor) -> Tensor:
        first, second = norms[:4], norms[4:]
        y = F.relu(F.batch_norm(F.conv2d(x, w1), first[2], first[3], first[0], first[1]))
        y = F.batch_norm(F.conv2d(y, w2, padding=1), second[2], second[3], second[0], second[1])
        return F.relu(y + x)

    values = [torch.randn(1, 8, 4, 4), torch.randn(8, 8, 1, 1), torch.randn(8, 8, 3, 3), *torch.rand(8, 8)]
    module = lowered(program_of(block, values[:1], values[1:]))
    assert_expected_inline(
        _text(module),
        """\
permute_default = aten.permute(arg2_1, [0, 2, 3, 1])
clone_default = aten.clone(permute_default)
permute_default_1 = aten.permute(clone_default, [0, 3, 1, 2])
add_scalar = aten.add.Scalar(arg6_1, 1e-05)
rsqrt_default = aten.rsqrt(add_scalar)
mul_tensor = aten.mul.Tensor(rsqrt_default, arg3_1)
neg_default = aten.neg(arg5_1)
mul_tensor_1 = aten.mul.Tensor(neg_default, mul_tensor)
add_tensor = aten.add.Tensor(mul_tensor_1, arg4_1)
convolution_default_4 = mux.convolution(arg0_1, arg1_1, mul_tensor, add_tensor, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, relu)
add_scalar_1 = aten.add.Scalar(arg10_1, 1e-05)
rsqrt_default_1 = aten.rsqrt(add_scalar_1)
mul_tensor_2 = aten.mul.Tensor(rsqrt_default_1, arg7_1)
neg_default_1 = aten.neg(arg9_1)
mul_tensor_3 = aten.mul.Tensor(neg_default_1, mul_tensor_2)
add_tensor_1 = aten.add.Tensor(mul_tensor_3, arg8_1)
convolution_default_6 = mux.convolution(convolution_default_4, permute_default_1, mul_tensor_2, add_tensor_1, arg0_1, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, relu)
return convolution_default_6""",
    )


def test_transformer_block(program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]) -> None:
    def block(
        x: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, up: Tensor, down: Tensor, *norms: Tensor
    ) -> Tensor:
        y = F.layer_norm(x, (16,), norms[0], norms[1])
        q, k, v = (t.view(1, 5, 2, 8).transpose(1, 2) for t in F.linear(y, qkv, bias).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 5, 16)
        x = x + F.linear(y, out)
        y = F.layer_norm(x, (16,), norms[2], norms[3])
        return x + F.linear(F.gelu(F.linear(y, up)), down)

    shapes = [(48, 16), (48,), (16, 16), (64, 16), (16, 64), (16,), (16,), (16,), (16,)]
    values = [torch.randn(1, 5, 16), *(torch.randn(shape) for shape in shapes)]
    module = lowered(program_of(block, values[:1], values[1:]))
    assert_expected_inline(
        _text(module),
        """\
native_layer_norm = aten.native_layer_norm(arg0_1, [16], arg6_1, arg7_1, 1e-05)
getitem = <built-in function getitem>(native_layer_norm, 0)
linear_default_4 = mux.linear(getitem, arg1_1, None, arg2_1, None, none)
split = aten.split.Tensor(linear_default_4, 16, -1)
getitem_3 = <built-in function getitem>(split, 0)
getitem_4 = <built-in function getitem>(split, 1)
getitem_5 = <built-in function getitem>(split, 2)
view_2 = aten.view(getitem_3, [1, 5, 2, 8])
transpose = aten.transpose.int(view_2, 1, 2)
view_3 = aten.view(getitem_4, [1, 5, 2, 8])
transpose_1 = aten.transpose.int(view_3, 1, 2)
view_4 = aten.view(getitem_5, [1, 5, 2, 8])
transpose_2 = aten.transpose.int(view_4, 1, 2)
attention_default = mux.attention(transpose, transpose_1, transpose_2, None, False, None)
transpose_3 = aten.transpose.int(attention_default, 1, 2)
view_5 = aten.view(transpose_3, [1, 5, 16])
linear_default_5 = mux.linear(view_5, arg3_1, None, None, None, none)
add = aten.add.Tensor(arg0_1, linear_default_5)
native_layer_norm_1 = aten.native_layer_norm(add, [16], arg8_1, arg9_1, 1e-05)
getitem_8 = <built-in function getitem>(native_layer_norm_1, 0)
linear_default_8 = mux.linear(getitem_8, arg4_1, None, None, None, gelu)
linear_default_9 = mux.linear(linear_default_8, arg5_1, None, None, add, none)
return linear_default_9""",
    )


def test_inverted_residual_with_squeeze_and_excite(
    program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]
) -> None:
    def block(
        x: Tensor, wide: Tensor, each: Tensor, down: Tensor, a: Tensor, up: Tensor, b: Tensor, narrow: Tensor,
        *norm: Tensor,
    ) -> Tensor:  # fmt: skip
        y = F.hardswish(F.conv2d(x, wide))
        y = F.conv2d(y, each, padding=1, groups=16)
        y = F.hardswish(F.batch_norm(y, norm[2], norm[3], norm[0], norm[1]))
        squeezed = F.relu(F.conv2d(F.adaptive_avg_pool2d(y, 1), down, a))
        return x + F.conv2d(y * F.hardsigmoid(F.conv2d(squeezed, up, b)), narrow)

    shapes = [(16, 8, 1, 1), (16, 1, 3, 3), (4, 16, 1, 1), (4,), (16, 4, 1, 1), (16,), (8, 16, 1, 1)]
    values = [torch.randn(1, 8, 5, 5), *(torch.randn(shape) for shape in shapes), *torch.rand(4, 16)]
    module = lowered(program_of(block, values[:1], values[1:]))
    assert_expected_inline(
        _text(module),
        """\
permute_default = aten.permute(arg2_1, [2, 3, 0, 1])
clone_default = aten.clone(permute_default)
permute_default_1 = aten.permute(clone_default, [2, 3, 0, 1])
convolution_default_6 = mux.convolution(arg0_1, arg1_1, None, None, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, hardswish)
add_scalar = aten.add.Scalar(arg11_1, 1e-05)
rsqrt_default = aten.rsqrt(add_scalar)
mul_tensor = aten.mul.Tensor(rsqrt_default, arg8_1)
neg_default = aten.neg(arg10_1)
mul_tensor_1 = aten.mul.Tensor(neg_default, mul_tensor)
add_tensor = aten.add.Tensor(mul_tensor_1, arg9_1)
convolution_default_7 = mux.convolution(convolution_default_6, permute_default_1, mul_tensor, add_tensor, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 16, hardswish)
mean = aten.mean.dim(convolution_default_7, [-1, -2], True)
convolution_default_8 = mux.convolution(mean, arg3_1, None, arg4_1, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, relu)
convolution_default_3 = mux.convolution(convolution_default_8, arg5_1, None, arg6_1, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, none)
hardsigmoid = aten.hardsigmoid(convolution_default_3)
mul = aten.mul.Tensor(convolution_default_7, hardsigmoid)
convolution_default_9 = mux.convolution(mul, arg7_1, None, None, arg0_1, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, none)
return convolution_default_9""",
    )


def test_encoder_layer(program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]) -> None:
    """As ``transformers`` writes a BERT layer: queries, keys and values are layers of their own."""

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        q, qb, k, kb, v, vb, out, ob, up, ub, down, db, g1, b1, g2, b2 = weights
        heads = [F.linear(x, w, b).view(1, 5, -1, 8).transpose(1, 2) for w, b in ((q, qb), (k, kb), (v, vb))]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(1, 5, 16).contiguous()
        x = F.layer_norm(F.dropout(F.linear(y, out, ob), 0.1, False) + x, (16,), g1, b1, 1e-12)
        y = F.linear(F.gelu(F.linear(x, up, ub)), down, db)
        return F.layer_norm(F.dropout(y, 0.1, False) + x, (16,), g2, b2, 1e-12)

    square = [(16, 16), (16,)] * 4
    shapes = [*square, (64, 16), (64,), (16, 64), (16,), *[(16,)] * 4]
    values = [torch.randn(1, 5, 16), *(torch.randn(shape) for shape in shapes)]
    module = lowered(program_of(layer, values[:1], values[1:]))
    assert_expected_inline(
        _text(module),
        """\
linears_default = mux.linears(arg0_1, [arg1_1, arg3_1, arg5_1], [arg2_1, arg4_1, arg6_1], none)
getitem_6 = <built-in function getitem>(linears_default, 0)
getitem_7 = <built-in function getitem>(linears_default, 1)
getitem_8 = <built-in function getitem>(linears_default, 2)
view_2 = aten.view(getitem_6, [1, 5, -1, 8])
transpose = aten.transpose.int(view_2, 1, 2)
view_5 = aten.view(getitem_7, [1, 5, -1, 8])
transpose_1 = aten.transpose.int(view_5, 1, 2)
view_8 = aten.view(getitem_8, [1, 5, -1, 8])
transpose_2 = aten.transpose.int(view_8, 1, 2)
attention_default = mux.attention(transpose, transpose_1, transpose_2, None, False, None)
transpose_3 = aten.transpose.int(attention_default, 1, 2)
view_9 = aten.view(transpose_3, [1, 5, 16])
linear_default_9 = mux.linear(view_9, arg7_1, None, arg8_1, None, none)
add = aten.add.Tensor(linear_default_9, arg0_1)
native_layer_norm = aten.native_layer_norm(add, [16], arg13_1, arg14_1, 1e-12)
getitem_2 = <built-in function getitem>(native_layer_norm, 0)
linear_default_12 = mux.linear(getitem_2, arg9_1, None, arg10_1, None, gelu)
linear_default_11 = mux.linear(linear_default_12, arg11_1, None, arg12_1, None, none)
add_1 = aten.add.Tensor(linear_default_11, getitem_2)
native_layer_norm_1 = aten.native_layer_norm(add_1, [16], arg15_1, arg16_1, 1e-12)
getitem_5 = <built-in function getitem>(native_layer_norm_1, 0)
return getitem_5""",
    )
