"""The zoo: one small configuration of each of many architectures, with random weights.

Widths and depths are cut where they only repeat, so that an architecture takes seconds; the kinds of layers
and the ways in which they are put together are the originals'.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_mux.bench.vision import import_torchvision
from torch_mux.bench.workloads import Workload, images, tokens, varied
from torch_mux.bench.zoo_own import AudioCNN, AutoEncoder, UNet, mlp

__all__ = ["ZOO", "Entry", "answer", "entry_of"]

Inputs = Callable[[torch.Generator], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Entry(Workload):
    """A workload with the kind of architecture and the package that it comes from."""

    kind: str = ""
    package: str = ""


def answer(output: Any) -> Tensor:
    """The tensor that answers are compared by: the first floating-point one, looked for in order."""
    found = _first(output)
    if found is None:
        raise TypeError(f"no floating-point tensor in a {type(output).__name__}")
    return found


def _first(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    items = (
        output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    )
    return next((found for found in map(_first, items) if found is not None), None)


def entry_of(name: str) -> Workload:
    """A workload by its name in ``ZOO``, or ``module:attribute`` for one of your own.

    Raises:
        KeyError: it is neither.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        return ZOO[name]
    own = getattr(importlib.import_module(module), attribute)
    if not isinstance(own, Workload):
        raise KeyError(f"{name} is a {type(own).__name__}, no Workload")
    return own


def _vision(path: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """A model of torchvision: a name below ``torchvision.models``, or one of its classes."""

    def make() -> nn.Module:
        import_torchvision()
        module, _, name = f"torchvision.models.{path}".rpartition(".")
        return varied(getattr(importlib.import_module(module), name)(*args, **kwargs).eval())

    return make


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import_torchvision()
        timm: Any = importlib.import_module("timm")
        return varied(timm.create_model(name, pretrained=False, **kwargs).eval())

    return make


def _hf(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A model of transformers by the name of its class, ``-`` before a part to serve instead of the whole."""
    name, _, part = name.partition("-")

    def make() -> nn.Module:
        import_torchvision()
        transformers: Any = importlib.import_module("transformers")
        cls = getattr(transformers, name)
        model = cls(cls.config_class(**{**_sizes(cls.config_class()), **config}))
        return varied((model.get_submodule(part) if part else model).eval())

    return make


#: What a small transformer is made of, under the names that configurations of transformers use.
_SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "use_cache": False,
}


def _sizes(config: Any) -> dict[str, Any]:
    return {name: value for name, value in _SMALL.items() if hasattr(config, name)}


def _resnet(block: str, layers: list[int], **kwargs: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import_torchvision()
        resnet: Any = importlib.import_module("torchvision.models.resnet")
        return varied(resnet.ResNet(getattr(resnet, block), layers, **kwargs).eval())

    return make


def _swin(version: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import_torchvision()
        swin: Any = importlib.import_module("torchvision.models.swin_transformer")
        more = {
            "block": swin.SwinTransformerBlockV2,
            "downsample_layer": swin.PatchMergingV2,
        } if version == "v2" else {}  # fmt: skip
        sizes = {"embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "window_size": [7, 7]}
        return varied(swin.SwinTransformer(patch_size=[4, 4], num_classes=10, **sizes, **more).eval())

    return make


def _convnext() -> nn.Module:
    import_torchvision()
    convnext: Any = importlib.import_module("torchvision.models.convnext")
    block = convnext.CNBlockConfig
    stages = [block(48, 96, 2), block(96, 192, 2), block(192, None, 2)]
    return varied(convnext.ConvNeXt(stages, num_classes=10, layer_scale=1.0).eval())


def _vgg() -> nn.Module:
    import_torchvision()
    vgg: Any = importlib.import_module("torchvision.models.vgg")
    layers = vgg.make_layers([64, "M", 128, "M", 256, 256, "M", 512, 512, "M"], batch_norm=True)
    model = vgg.VGG(layers, num_classes=10)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10))
    return varied(model.eval())


def _mixer(block: str) -> Callable[[], nn.Module]:
    """An MLP-Mixer, or a ResMLP: the same with affine layers for norms."""

    def make() -> nn.Module:
        import_torchvision()
        mixers: Any = importlib.import_module("timm.models.mlp_mixer")
        norms = {"norm_layer": mixers.Affine, "mlp_ratio": 4} if block == "ResBlock" else {}
        sizes = {"img_size": 64, "patch_size": 16, "num_blocks": 2, "embed_dim": 192}
        return varied(mixers.MlpMixer(**sizes, block_layer=getattr(mixers, block), **norms).eval())

    return make


def _convmixer() -> nn.Module:
    import_torchvision()
    convmixer: Any = importlib.import_module("timm.models.convmixer")
    return varied(convmixer.ConvMixer(dim=128, depth=3, kernel_size=7, patch_size=7).eval())


def _segmentation(head: str) -> Callable[[], nn.Module]:
    """A head of torchvision's segmentation over the first stages of a ResNet-18."""

    def make() -> nn.Module:
        torchvision = import_torchvision()
        heads: Any = importlib.import_module(f"torchvision.models.segmentation.{head.lower()}")
        getter: Any = importlib.import_module("torchvision.models._utils").IntermediateLayerGetter
        body = getter(torchvision.models.resnet18(weights=None), {"layer3": "out"})
        made = heads.FCNHead(256, 8) if head == "FCN" else heads.DeepLabHead(256, 8)
        return varied(getattr(heads, head)(body, made, None).eval())

    return make


def _pyramid() -> nn.Module:
    """The backbone of torchvision's detectors: a feature pyramid over a ResNet-18."""
    import_torchvision()
    utils: Any = importlib.import_module("torchvision.models.detection.backbone_utils")
    made: nn.Module = utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=0)
    return varied(made.eval())


def _features(*shape: int) -> Inputs:
    return lambda generator: (torch.randn(*shape, generator=generator),)


def _masked(generator: torch.Generator) -> tuple[Tensor, ...]:
    """An image and the noise that decides which of its 16 patches are dropped: distinct in half precision."""
    noise = torch.randperm(16, generator=generator)[None] / 16
    return torch.randn(1, 3, 32, 32, generator=generator), noise


_CNN: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "resnet18": (_vision("resnet18"), images(64)),
    "resnet50": (_vision("resnet50"), images(64)),
    "resnext": (_resnet("Bottleneck", [1, 1, 1, 1], groups=32, width_per_group=4), images(64)),
    "wide-resnet": (_resnet("Bottleneck", [1, 1, 1, 1], width_per_group=128), images(64)),
    "regnet-x": (_vision("regnet_x_400mf"), images(64)),
    "regnet-y": (_vision("regnet_y_400mf"), images(64)),
    "mobilenet-v2": (_vision("mobilenet_v2"), images(64)),
    "mobilenet-v3": (_vision("mobilenet_v3_small"), images(64)),
    "efficientnet-b0": (_vision("efficientnet_b0"), images(64)),
    "densenet": (_vision("densenet.DenseNet", block_config=(3, 3, 3), num_init_features=64), images(64)),
    "vgg": (_vgg, images(64)),
    "squeezenet": (_vision("squeezenet1_1"), images(64)),
    "shufflenet": (_vision("shufflenet_v2_x1_0"), images(64)),
    "googlenet": (_vision("googlenet", aux_logits=False, init_weights=False), images(64)),
    "inception-v3": (_vision("inception_v3", aux_logits=False, init_weights=False), images(96)),
    "mnasnet": (_vision("mnasnet0_5"), images(64)),
    "convnext": (_convnext, images(64)),
    "r3d": (_vision("video.r3d_18", num_classes=10), _features(1, 3, 4, 32, 32)),
}  # fmt: skip
_SEGMENTATION: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "fcn": (_segmentation("FCN"), images(64)),
    "deeplab-v3": (_segmentation("DeepLabV3"), images(64)),
    "lraspp": (
        _vision("segmentation.lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=8), images(64),
    ),
    "fpn": (_pyramid, images(64)),
}  # fmt: skip
_VIT: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "vit-b": (
        _vision(
            "VisionTransformer", image_size=64, patch_size=16, num_layers=2, num_heads=12, hidden_dim=768,
            mlp_dim=3072,
        ), images(64),
    ),
    "swin": (_swin("v1"), images(56)),
    "swin-v2": (_swin("v2"), images(56)),
    "maxvit": (
        _vision(
            "MaxVit", input_size=(64, 64), stem_channels=32, partition_size=4, block_channels=[32, 64],
            block_layers=[1, 1], head_dim=16, stochastic_depth_prob=0.0,
        ), images(64),
    ),
}  # fmt: skip
_TIMM: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "efficientnet-v2": (_timm("efficientnetv2_s", depth_multiplier=0.4), images(64)),
    "deit": (_timm("deit_tiny_distilled_patch16_224", img_size=64, depth=2), images(64)),
    "beit": (_timm("beit_base_patch16_224", img_size=64, depth=2, embed_dim=192, num_heads=3), images(64)),
    "mixer": (_mixer("MixerBlock"), images(64)),
    "resmlp": (_mixer("ResBlock"), images(64)),
    "poolformer": (_timm("poolformer_s12"), images(64)),
    "convmixer": (_convmixer, images(64)),
    "mobilevit": (_timm("mobilevit_xxs"), images(64)),
    "ghostnet": (_timm("ghostnet_050"), images(64)),
    "repvgg": (_timm("repvgg_a0"), images(64)),
    "nf-resnet": (_timm("nf_resnet26"), images(64)),
    "res2net": (_timm("res2net50_26w_4s", layers=(1, 1, 1, 1)), images(64)),
    "pvt-v2": (_timm("pvt_v2_b0", depths=(1, 1, 1, 1)), images(64)),
    "levit": (_timm("levit_128s", img_size=64, depth=(1, 1, 1)), images(64)),
    "xcit": (_timm("xcit_nano_12_p16_224", img_size=64, depth=2), images(64)),
    "edgenext": (_timm("edgenext_xx_small", depths=(1, 1, 2, 1)), images(64)),
}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
_LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
_VISION = {"image_size": 32, "patch_size": 8}
_HF: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "bert": (_hf("BertModel"), tokens(32, 1000)),
    "roberta": (_hf("RobertaModel"), tokens(32, 1000)),
    "distilbert": (_hf("DistilBertModel", dim=128, n_layers=2, n_heads=4, hidden_dim=512), tokens(32, 1000)),
    "albert": (_hf("AlbertModel", embedding_size=64), tokens(32, 1000)),
    "electra": (_hf("ElectraModel", embedding_size=64), tokens(32, 1000)),
    "mpnet": (_hf("MPNetModel"), tokens(32, 1000)),
    "deberta-v2": (
        _hf("DebertaV2Model", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16),
        tokens(32, 1000),
    ),
    "t5-encoder": (_hf("T5EncoderModel", d_model=128, d_kv=32, d_ff=512, num_layers=2), tokens(32, 1000)),
    "bart-encoder": (_hf("BartModel-encoder", d_model=128, **_HEADS, **_LAYERS), tokens(32, 1000)),
    "gpt2": (_hf("GPT2Model", n_embd=128, n_layer=2, n_head=4), tokens(32, 1000)),
    "opt": (_hf("OPTModel", ffn_dim=512, word_embed_proj_dim=128), tokens(32, 1000)),
    "llama": (_hf("LlamaModel", num_key_value_heads=2), tokens(32, 1000)),
    "qwen2": (_hf("Qwen2Model", num_key_value_heads=2), tokens(32, 1000)),
    "gemma2": (_hf("Gemma2Model", num_key_value_heads=2, head_dim=32), tokens(32, 1000)),
    "whisper-encoder": (
        _hf(
            "WhisperModel-encoder", d_model=128, max_source_positions=32, pad_token_id=0, **_HEADS, **_LAYERS,
        ),
        _features(1, 80, 64),
    ),
    "clip-text": (_hf("CLIPTextModel", eos_token_id=2), tokens(32, 1000)),
    "clip-vision": (_hf("CLIPVisionModel", **_VISION), images(32)),
    "vit-mae": (_hf("ViTMAEModel", **_VISION), _masked),
    "dinov2": (_hf("Dinov2Model", **_VISION), images(32)),
    "segformer": (
        _hf(
            "SegformerModel", depths=[1] * 4, hidden_sizes=[32, 64, 96, 128],
            num_attention_heads=[1, 2, 3, 4],
        ), images(64),
    ),
    "wav2vec2": (
        _hf(
            "Wav2Vec2Model", conv_dim=[64] * 3, conv_stride=[5, 2, 2], conv_kernel=[10, 3, 2],
            num_feat_extract_layers=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        ), _features(1, 1600),
    ),
}  # fmt: skip
_OWN: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "mlp": (mlp, _features(1, 256)),
    "audio-cnn": (lambda: varied(AudioCNN().eval()), _features(1, 1, 4000)),
    "autoencoder": (lambda: varied(AutoEncoder().eval()), images(32)),
    "unet": (lambda: varied(UNet().eval()), images(32)),
}

#: Every architecture by its name on the command line.
ZOO: dict[str, Entry] = {
    name: Entry(name, model, inputs, answer, kind, package)
    for kind, package, group in (
        ("CNN", "torchvision", _CNN),
        ("segmentation, detection", "torchvision", _SEGMENTATION),
        ("vision transformer", "torchvision", _VIT),
        ("timm", "timm", _TIMM),
        ("transformers", "transformers", _HF),
        ("own", "", _OWN),
    )
    for name, (model, inputs) in group.items()
}
