"""Thirty families of transformers, each from a small configuration with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        stem: of the names of its configuration and its model.
        settings: of the configuration.
        inputs: arguments of a forward for so many samples.
    """

    stem: str
    settings: dict[str, Any]
    inputs: Callable[[int], dict[str, Tensor]]

    def build(self) -> nn.Module:
        """A model with random weights."""
        import transformers

        config = getattr(transformers, f"{self.stem}Config")(**self.settings)
        model: nn.Module = getattr(transformers, f"{self.stem}Model")(config)
        return model


def _ids(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(batch * 8).reshape(batch, 8) % 60 + 2}


def _both(batch: int) -> dict[str, Tensor]:
    return {**_ids(batch), "decoder_input_ids": _ids(batch)["input_ids"]}


def _picture(batch: int, size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(batch, 3, size, size)}


def _sound(batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 4000)}


def _spectrogram(batch: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(batch, 16, 40),
        "decoder_input_ids": _ids(batch)["input_ids"],
    }


_SOUND = {
    **_TEXT,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}

FAMILIES: dict[str, Family] = {
    # text, encoders
    "bert": Family("Bert", _TEXT, _ids),
    "roberta": Family("Roberta", {**_TEXT, "pad_token_id": 0}, _ids),
    "electra": Family("Electra", {**_TEXT, "embedding_size": 32}, _ids),
    "albert": Family("Albert", {**_TEXT, "embedding_size": 16}, _ids),
    "distilbert": Family(
        "DistilBert",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        _ids,
    ),
    "deberta_v2": Family("DebertaV2", _TEXT, _ids),
    "modernbert": Family("ModernBert", {**_TEXT, "pad_token_id": 0}, _ids),
    "mpnet": Family("MPNet", {**_TEXT, "pad_token_id": 1}, _ids),
    # text, decoders
    "gpt2": Family("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, _ids),
    "gpt_neox": Family("GPTNeoX", _TEXT, _ids),
    "opt": Family(
        "OPT",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        },
        _ids,
    ),
    "bloom": Family(
        "Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, _ids
    ),
    "falcon": Family("Falcon", _TEXT, _ids),
    "llama": Family("Llama", _DECODER, _ids),
    "mistral": Family("Mistral", _DECODER, _ids),
    "gemma": Family("Gemma", _DECODER, _ids),
    "gemma2": Family("Gemma2", _DECODER, _ids),
    "qwen2": Family("Qwen2", _DECODER, _ids),
    "qwen3": Family("Qwen3", _DECODER, _ids),
    "olmo2": Family("Olmo2", _DECODER, _ids),
    "phi3": Family("Phi3", _DECODER, _ids),
    "mamba": Family(
        "Mamba",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        _ids,
    ),
    # text to text
    "t5": Family(
        "T5",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        _both,
    ),
    "bart": Family(
        "Bart",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
        },
        _both,
    ),
    # vision
    "vit": Family("ViT", _VISION, _picture),
    "dinov2": Family("Dinov2", _VISION, _picture),
    "siglip_vision": Family("SiglipVision", _VISION, _picture),
    "clip_vision": Family("CLIPVision", _VISION, _picture),
    "convnext": Family(
        "ConvNext", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}, _picture
    ),
    "convnextv2": Family(
        "ConvNextV2", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}, _picture
    ),
    "swin": Family(
        "Swin",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        _picture,
    ),
    "resnet": Family(
        "ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, _picture
    ),
    # sound
    "wav2vec2": Family("Wav2Vec2", _SOUND, _sound),
    "hubert": Family("Hubert", _SOUND, _sound),
    "whisper": Family(
        "Whisper",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "decoder_start_token_id": 1,
        },
        _spectrogram,
    ),
}
