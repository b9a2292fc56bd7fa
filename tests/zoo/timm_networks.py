"""The timm networks of the zoo: a name, what makes it smaller, and the pixels of its images."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_THIN = {"embed_dim": 48, "depth": 2, "num_heads": 3}


class Timm(NamedTuple):
    """A network of timm.

    Attributes:
        name: what timm calls it.
        settings: of `timm.create_model`.
        pixels: height and width of the images.
        sized: the class is built for images of one size, and is told that it is `pixels`.
    """

    name: str
    settings: dict[str, Any]
    pixels: int
    sized: bool

    def build(self) -> nn.Module:
        """Return the network with random weights."""
        import timm

        size = {"img_size": self.pixels} if self.sized else {}
        return timm.create_model(self.name, num_classes=10, **size, **self.settings)

    def inputs(self) -> dict[str, Tensor]:
        """Return a batch of two images."""
        return {"x": torch.randn(2, 3, self.pixels, self.pixels)}


def _any_size(name: str, pixels: int = 64, **settings: Any) -> Timm:
    return Timm(name, settings, pixels, sized=False)


def _one_size(name: str, pixels: int = 64, **settings: Any) -> Timm:
    return Timm(name, settings, pixels, sized=True)


_NETWORKS = [
    # Convolutions.
    *map(_any_size, ("resnet10t", "resnext26ts", "legacy_seresnet18", "seresnext26t_32x4d")),
    *map(_any_size, ("skresnet18", "resnest14d", "res2net50_14w_8s", "resnetv2_50x1_bit")),
    *map(_any_size, ("densenet121", "dpn48b", "cspresnet50", "cs3darknet_focus_s", "darknet17")),
    *map(_any_size, ("efficientnet_lite0", "tf_efficientnet_b0", "tinynet_e", "mixnet_s")),
    *map(_any_size, ("mobilenetv1_100", "mobilenetv2_035", "mobilenetv3_small_050")),
    *map(_any_size, ("mobilenetv4_conv_small_035", "mnasnet_small", "spnasnet_100", "fbnetc_100")),
    *map(_any_size, ("lcnet_035", "ghostnet_050", "hardcorenas_a", "semnasnet_075", "rexnet_100")),
    *map(_any_size, ("regnetx_002", "regnety_002", "regnetz_005", "gernet_s", "repvgg_a0")),
    *map(_any_size, ("convnext_atto", "convnextv2_atto", "inception_next_atto", "mambaout_femto")),
    *map(_any_size, ("nf_regnet_b0", "nf_resnet26", "test_nfnet", "mobileone_s0", "dla46_c")),
    *map(_any_size, ("hrnet_w18_small", "ese_vovnet19b_slim_dw", "hgnetv2_b0", "starnet_s1")),
    _any_size("vgg11", mlp_ratio=0.02),
    _any_size("inception_v3", 96),
    # Convolutions and attention.
    *map(_any_size, ("fastvit_t8", "repvit_m0_9", "shvit_s1", "swiftformer_xs")),
    *map(_any_size, ("efficientvit_b0", "efficientvit_m0", "mobilevit_xxs", "mobilevitv2_050")),
    *map(_any_size, ("pvt_v2_b0", "poolformer_s12", "edgenext_xx_small", "tiny_vit_5m_224")),
    _any_size("focalnet_tiny_srf"),
    _any_size("halonet26t", 256),
    *map(_one_size, ("coat_lite_tiny", "coat_tiny", "botnet26t_256", "lambda_resnet26rpt_256")),
    *map(_one_size, ("maxvit_rmlp_pico_rw_256", "coatnet_pico_rw_224", "efficientformerv2_s0")),
    *map(_one_size, ("levit_128s", "gcvit_xxtiny", "visformer_tiny", "vit_tiny_r_s16_p8_224")),
    # Attention, or what takes its place.
    *map(_one_size, ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "eva02_tiny_patch14_224")),
    *map(_one_size, ("convit_tiny", "pit_ti_224", "gmlp_ti16_224", "xcit_nano_12_p16_224")),
    _one_size("deit3_small_patch16_224", **_THIN),
    _one_size("beit_base_patch16_224", **_THIN),
    _one_size("cait_xxs24_224", **_THIN),
    _one_size("swin_tiny_patch4_window7_224", embed_dim=24),
    _one_size("swinv2_tiny_window8_256", embed_dim=24),
    _one_size("swinv2_cr_tiny_ns_224", embed_dim=24),
    _one_size("hiera_tiny_224", embed_dim=24),
    *map(_one_size, ("mixer_s32_224", "tnt_s_patch16_224", "nest_tiny", "sequencer2d_s")),
    _one_size("crossvit_9_240", 240),
]
TIMM = {network.name: network for network in _NETWORKS}
