"""A model of every file of timm's, hard ones of all libraries: found, converted, run, reverted.

``python -m tests.zoo`` does the same for every model there is.
"""

from __future__ import annotations

import pytest

from tests.zoo.check import check
from tests.zoo.families import FAMILIES
from tests.zoo.libraries import ZOOS

#: A quick one of every file that has a model with norms.
OF_EVERY_FILE = """
    beitv2_base_patch16_224 lambda_resnet26t test_byobnet cait_s24_224 coat_lite_mini
    convit_base convmixer_1536_20 test_convnext2 cpubone_nano crossvit_9_dagger_240 csatv2
    sedarknet21 cspnext_s davit_tiny deepseek_vit_412m_enc deit_base_patch16_224 densenet121
    dla34 dpn48b edgenext_small_rw efficientformer_l1 efficientformerv2_s0
    test_efficientnet_evos efficientvim_m2_dist efficientvit_l1 efficientvit_m2
    vit_pe_spatial_base_patch16_512 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
    gemma4_vit_570m ghostnet_130 hardcorenas_b hgnet_tiny hiera_tiny_224 hieradet_small
    hrnet_w18_small iformer_s inception_next_atto inception_resnet_v2 inception_v3 inception_v4
    lcnetv2_small levit_conv_512 lowformer_e1 test_mambaout maxxvitv2_nano_rw_256 poolformer_s12
    mixer_s32_224 tf_mobilenetv3_large_minimal_100 mobilenetv5_base mobilevitv2_200 mvitv2_tiny
    naflexvit_base_patch16_radio_v3 nasnetalarge nest_tiny nextvit_small pit_s_distilled_224
    pnasnet5large pvt_v2_b1 qwen3_vit_88m_merge rdnet_tiny regnetx_002 repghostnet_080
    repvit_m0_9 res2net50_48w_2s resnest14d resnet10t resnetv2_50d_frn rexnet_300 selecsls42b
    legacy_seresnet18 sequencer2d_s shvit_s2 skresnet18 starnet_s050 swiftformer_xs
    swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_21m_224
    tnt_s_patch16_224 tresnet_m twins_svt_small vgg11_bn visformer_small vit_base_patch16_xp_224
    vit_tiny_r_s16_p8_224 vit_relpos_base_patch16_224 samvit_base_patch16_224 vitamin_base_224
    volo_d1_224 ese_vovnet39b_evos legacy_xception xception41p xcit_tiny_12_p16_224
""".split()  # noqa: SIM905

#: What is hard to trace, or to find norms in, besides.
HARD = """
    naflexvit_base_patch16_gap gemma4_vit_167m qwen3_vit_88m_enc crossvit_9_240
    samvit_base_patch16 mobilevit_s mobilevitv2_050 efficientvit_m0 efficientvit_b0
    tiny_vit_5m_224 levit_128 mobilenetv5_300m resnetv2_50x1_bit regnetz_b16_evos
    convnextv2_atto caformer_s18 efficientnet_b0 repvgg_a0 swin_tiny_patch4_window7_224
    vit_large_patch16_siglip_512
""".split()  # noqa: SIM905

DETECTORS = ["fcos_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2"]


@pytest.mark.parametrize("name", [*OF_EVERY_FILE, *HARD])
def test_a_model_of_timm(name: str) -> None:
    pytest.importorskip("timm")
    result = check(ZOOS["timm"], name, ["gn", "identity"])
    assert result["problems"] == []
    assert result["norms"]
    assert "not_run" not in result


@pytest.mark.parametrize("name", ["dm_nfnet_f0", "resmlp_12_224"])
def test_what_is_no_norm_is_not_found(name: str) -> None:
    """Weights that are standardized by a norm function, and an affine without statistics."""
    pytest.importorskip("timm")
    result = check(ZOOS["timm"], name, ["identity"])
    assert (result["problems"], result["norms"]) == ([], 0)


@pytest.mark.parametrize("name", ["googlenet", *DETECTORS])
def test_a_model_of_torchvision(name: str) -> None:
    pytest.importorskip("torchvision")
    assert check(ZOOS["torchvision"], name, ["identity"])["problems"] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    result = check(ZOOS["transformers"], name, ["identity", "rms"])
    assert result["problems"] == []
    assert result["norms"]
