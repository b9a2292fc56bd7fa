"""The Hugging Face models of the zoo: a class, a tiny config, and inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, PIXELS, SAMPLES = 60, 7, 32, 1600
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
_WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {**_TEXT, **_WIDTH, "intermediate_size": 24}
DECODER = {**ENCODER, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**_WIDTH, "intermediate_size": 24, "image_size": PIXELS, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": PIXELS}
EXPERTS = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
SEQ2SEQ = {
    **{"vocab_size": VOCABULARY, "d_model": 16, "max_position_embeddings": 32, "pad_token_id": 0},
    **{"encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 2},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "bos_token_id": 1, "eos_token_id": 2},
}
SPEECH = {
    **{**_WIDTH, "intermediate_size": 24, "vocab_size": VOCABULARY},
    **{"conv_dim": (8, 8, 8), "conv_stride": (5, 4, 4), "conv_kernel": (10, 4, 4)},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    **{"mask_time_prob": 0.0, "layerdrop": 0.0},
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def tokens() -> dict[str, Tensor]:
    """Return a batch of two texts."""
    return {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH))}


def pairs() -> dict[str, Tensor]:
    """Return a batch for an encoder and a decoder."""
    return {**tokens(), "decoder_input_ids": torch.randint(3, VOCABULARY, (2, LENGTH))}


def images() -> dict[str, Tensor]:
    """Return a batch of two images."""
    return {"pixel_values": torch.randn(2, 3, PIXELS, PIXELS)}


def captions() -> dict[str, Tensor]:
    """Return images with texts."""
    return {**images(), **tokens()}


def sounds() -> dict[str, Tensor]:
    """Return a batch of two sounds."""
    return {"input_values": torch.randn(2, SAMPLES)}


def spectrograms() -> dict[str, Tensor]:
    """Return spectrograms, and the texts so far."""
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids}


class HuggingFace(NamedTuple):
    """A model of transformers.

    Attributes:
        model: its class.
        config: the config's class, without "Config".
        settings: of the config.
        inputs: what the model is called with.
    """

    model: str
    config: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = tokens

    def build(self) -> nn.Module:
        """Return the model with random weights."""
        import transformers

        config = getattr(transformers, f"{self.config}Config")(**self.settings)
        model: nn.Module = getattr(transformers, self.model)(config)
        return model


def _mixer(**settings: Any) -> dict[str, Any]:
    return {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCABULARY, **settings}


HUGGING_FACE = {
    "bert": HuggingFace("BertForSequenceClassification", "Bert", ENCODER),
    "distilbert": HuggingFace(
        "DistilBertForSequenceClassification",
        "DistilBert",
        {**_TEXT, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    ),
    "roberta": HuggingFace("RobertaForMaskedLM", "Roberta", ENCODER),
    "albert": HuggingFace(
        "AlbertForMaskedLM", "Albert", {**ENCODER, "embedding_size": 8, "num_hidden_groups": 1}
    ),
    "deberta-v2": HuggingFace(
        "DebertaV2ForSequenceClassification",
        "DebertaV2",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "electra": HuggingFace(
        "ElectraForSequenceClassification", "Electra", {**ENCODER, "embedding_size": 8}
    ),
    "convbert": HuggingFace(
        "ConvBertForSequenceClassification", "ConvBert", {**ENCODER, "embedding_size": 8}
    ),
    "squeezebert": HuggingFace(
        "SqueezeBertForSequenceClassification",
        "SqueezeBert",
        {
            **{**ENCODER, "embedding_size": 16, "intermediate_groups": 2, "output_groups": 2},
            **{"q_groups": 2, "k_groups": 2, "v_groups": 2},
        },
    ),
    "xlnet": HuggingFace(
        "XLNetForSequenceClassification",
        "XLNet",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    ),
    "modernbert": HuggingFace("ModernBertForMaskedLM", "ModernBert", ENCODER),
    "gpt2": HuggingFace(
        "GPT2LMHeadModel",
        "GPT2",
        {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "gpt-neox": HuggingFace("GPTNeoXForCausalLM", "GPTNeoX", ENCODER),
    "opt": HuggingFace(
        "OPTForCausalLM", "OPT", {**ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 8}
    ),
    "bloom": HuggingFace(
        "BloomForCausalLM",
        "Bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    "falcon": HuggingFace("FalconForCausalLM", "Falcon", ENCODER),
    "llama": HuggingFace("LlamaForCausalLM", "Llama", DECODER),
    "qwen2": HuggingFace("Qwen2ForCausalLM", "Qwen2", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": HuggingFace("Qwen3ForCausalLM", "Qwen3", {**DECODER, "head_dim": 8}),
    "mistral": HuggingFace("MistralForCausalLM", "Mistral", DECODER),
    "mixtral": HuggingFace("MixtralForCausalLM", "Mixtral", {**DECODER, "num_local_experts": 4}),
    "qwen2-moe": HuggingFace(
        "Qwen2MoeForCausalLM", "Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 12}
    ),
    "qwen3-moe": HuggingFace("Qwen3MoeForCausalLM", "Qwen3Moe", {**EXPERTS, "head_dim": 8}),
    "olmoe": HuggingFace("OlmoeForCausalLM", "Olmoe", EXPERTS),
    "gpt-oss": HuggingFace(
        "GptOssForCausalLM",
        "GptOss",
        {
            **{**DECODER, "num_local_experts": 4, "head_dim": 8},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "llama4": HuggingFace(
        "Llama4ForCausalLM",
        "Llama4Text",
        {**DECODER, "num_local_experts": 4, "intermediate_size_mlp": 24, "head_dim": 8},
    ),
    "deepseek-v3": HuggingFace(
        "DeepseekV3ForCausalLM",
        "DeepseekV3",
        {
            **{**DECODER, "num_key_value_heads": 2, "moe_intermediate_size": 12},
            **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
            **{"first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8},
            **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        },
    ),
    "phi": HuggingFace("PhiForCausalLM", "Phi", {**ENCODER, "partial_rotary_factor": 0.5}),
    "phi3": HuggingFace("Phi3ForCausalLM", "Phi3", {**DECODER, "pad_token_id": 0}),
    "gemma": HuggingFace("GemmaForCausalLM", "Gemma", {**DECODER, "head_dim": 8}),
    "gemma2": HuggingFace("Gemma2ForCausalLM", "Gemma2", {**DECODER, "head_dim": 8}),
    "t5": HuggingFace(
        "T5ForConditionalGeneration",
        "T5",
        {
            **{"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2},
            **{"num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0},
        },
        pairs,
    ),
    "bart": HuggingFace("BartForConditionalGeneration", "Bart", SEQ2SEQ, pairs),
    "vit": HuggingFace("ViTForImageClassification", "ViT", VISION, images),
    "deit": HuggingFace("DeiTForImageClassification", "DeiT", VISION, images),
    "beit": HuggingFace(
        "BeitForImageClassification",
        "Beit",
        {**VISION, "use_relative_position_bias": True, "out_indices": None},
        images,
    ),
    "swin": HuggingFace(
        "SwinForImageClassification",
        "Swin",
        {
            **{"image_size": PIXELS, "patch_size": 2, "embed_dim": 8, "depths": [2, 1]},
            **{"num_heads": [2, 2], "window_size": 4},
        },
        images,
    ),
    "dinov2": HuggingFace("Dinov2ForImageClassification", "Dinov2", VISION, images),
    "convnext": HuggingFace("ConvNextForImageClassification", "ConvNext", STAGES, images),
    "resnet": HuggingFace("ResNetForImageClassification", "ResNet", RESNET, images),
    "segformer": HuggingFace(
        "SegformerForSemanticSegmentation",
        "Segformer",
        {
            **{"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "decoder_hidden_size": 8},
            **{"num_attention_heads": [1, 1, 2, 2], "sr_ratios": [4, 2, 1, 1]},
        },
        images,
    ),
    "detr": HuggingFace(
        "DetrForObjectDetection",
        "Detr",
        {
            **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
            **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "use_timm_backbone": False},
            **{"backbone": None, "use_pretrained_backbone": False},
            "backbone_config": {"model_type": "resnet", "out_features": ["stage2"], **RESNET},
        },
        images,
    ),
    "clip": HuggingFace(
        "CLIPModel",
        "CLIP",
        {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 8},
        captions,
    ),
    "siglip": HuggingFace(
        "SiglipModel", "Siglip", {"text_config": ENCODER, "vision_config": VISION}, captions
    ),
    "whisper": HuggingFace(
        "WhisperForConditionalGeneration",
        "Whisper",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16},
        spectrograms,
    ),
    "wav2vec2": HuggingFace("Wav2Vec2ForCTC", "Wav2Vec2", SPEECH, sounds),
    "hubert": HuggingFace("HubertForCTC", "Hubert", SPEECH, sounds),
    "mamba": HuggingFace("MambaForCausalLM", "Mamba", _mixer(state_size=4)),
    "mamba2": HuggingFace(
        "Mamba2ForCausalLM",
        "Mamba2",
        _mixer(state_size=4, num_heads=4, head_dim=8, n_groups=2, chunk_size=4),
    ),
}
