"""The models of the zoo: narrow ones of many architectures; those of the study at their own depths."""

from __future__ import annotations

from dataclasses import replace

from zoo_entry import PIXELS, TOKENS, WORDS, Entry

_EAGER = {"attn_implementation": "eager"}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {**_SMALL, "vocab_size": WORDS, "max_position_embeddings": 64, "pad_token_id": 0}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_TEXT, **_ENDS, "num_key_value_heads": 2, "head_dim": 8}
_NEOX = {**_TEXT, **_ENDS, "rotary_pct": 0.25, "use_parallel_residual": True}
_GPT2 = {**_ENDS, "n_embd": 32, "n_head": 4, "vocab_size": WORDS, "n_positions": 64}
_PATCHES = {**_SMALL, "image_size": PIXELS, "patch_size": 8}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": WORDS, "decoder_start_token_id": 0}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
}
_MAMBA = {"hidden_size": 32, "state_size": 4, "vocab_size": WORDS}
_SPEECH = {
    **_SMALL,
    "conv_dim": [32, 32],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_SERIES = {
    "num_input_channels": 2,
    "context_length": 32,
    "patch_length": 8,
    "patch_stride": 8,
    "prediction_length": 8,
}
_SWIN = {
    "image_size": PIXELS,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}

_STUDY: dict[str, Entry] = {
    "bert-base": Entry("BertForMaskedLM", "words", {**_TEXT, "num_hidden_layers": 12}, padding=True),
    "gpt2-small": Entry("GPT2LMHeadModel", "words", {**_GPT2, "n_layer": 12}),
    "gpt2-medium": Entry("GPT2LMHeadModel", "words", {**_GPT2, "n_layer": 24}),
    "opt-350m": Entry(
        "OPTForCausalLM",
        "words",
        {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 16, "num_hidden_layers": 24, "do_layer_norm_before": False},
    ),
    "phi-2": Entry("PhiForCausalLM", "words", {**_TEXT, **_ENDS, "num_hidden_layers": 32}),
    "pythia-70m": Entry("GPTNeoXForCausalLM", "words", {**_NEOX, "num_hidden_layers": 6}),
    "pythia-160m": Entry("GPTNeoXForCausalLM", "words", {**_NEOX, "num_hidden_layers": 12}),
    "pythia-410m": Entry("GPTNeoXForCausalLM", "words", {**_NEOX, "num_hidden_layers": 24}),
    "pythia-1b": Entry("GPTNeoXForCausalLM", "words", {**_NEOX, "num_hidden_layers": 16}),
    "t5-small": Entry("T5ForConditionalGeneration", "words", {**_T5, "num_layers": 6}),
    "vit-base": Entry("ViTForImageClassification", "images", {**_PATCHES, "num_hidden_layers": 12}),
    "mamba-130m": Entry("MambaForCausalLM", "words", {**_MAMBA, "num_hidden_layers": 24}),
    "mamba-370m": Entry("MambaForCausalLM", "words", {**_MAMBA, "num_hidden_layers": 48}),
    "switch-base-8": Entry(
        "SwitchTransformersForConditionalGeneration",
        "words",
        {**_T5, "num_layers": 12, "num_decoder_layers": 12, "num_experts": 8, "expert_capacity": 64},
    ),
    "resnet50": Entry(
        "ResNetForImageClassification",
        "images",
        {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [3, 4, 6, 3]},
    ),
    "efficientnet-b0": Entry(
        "EfficientNetForImageClassification",
        "images",
        {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320, "image_size": PIXELS},
    ),
    "mobilenetv2": Entry("MobileNetV2ForImageClassification", "images", {"depth_multiplier": 0.25}),
}
_VISION: dict[str, Entry] = {
    "vit eager": Entry("ViTForImageClassification", "images", _PATCHES, implementation=_EAGER),
    "deit": Entry("DeiTForImageClassification", "images", _PATCHES),
    "beit": Entry("BeitForImageClassification", "images", {**_PATCHES, "use_relative_position_bias": True}),
    "swin": Entry("SwinForImageClassification", "images", _SWIN),
    "swinv2": Entry("Swinv2ForImageClassification", "images", _SWIN),
    "convnext": Entry("ConvNextForImageClassification", "images", _STAGES),
    "convnextv2": Entry("ConvNextV2ForImageClassification", "images", _STAGES),
    "dinov2": Entry("Dinov2ForImageClassification", "images", _PATCHES),
    "segformer": Entry(
        "SegformerForSemanticSegmentation",
        "maps",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
        },
    ),
    "clip vision": Entry("CLIPVisionModel", "bare images", _PATCHES),
    "clip": Entry(
        "CLIPModel",
        "pictures and texts",
        {"text_config": {**_TEXT, **_ENDS}, "vision_config": _PATCHES, "projection_dim": 16},
    ),
    "siglip vision": Entry("SiglipVisionModel", "bare images", _PATCHES),
    "mobilevit": Entry(
        "MobileViTForImageClassification",
        "images",
        {"image_size": PIXELS, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]},
    ),
    "mobilenetv1": Entry("MobileNetV1ForImageClassification", "images", {"depth_multiplier": 0.25}),
    "cvt": Entry(
        "CvtForImageClassification",
        "images",
        {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    ),
    "vit-mae": Entry(
        "ViTMAEForPreTraining",
        "noisy images",
        {
            **_PATCHES,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
    ),
    "vit-msn": Entry("ViTMSNForImageClassification", "images", _PATCHES),
    "levit": Entry(
        "LevitForImageClassification",
        "larger images",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
    ),
    "poolformer": Entry(
        "PoolFormerForImageClassification", "images", {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
    ),
    "regnet": Entry("RegNetForImageClassification", "images", {"embedding_size": 8, **_STAGES, "groups_width": 8}),
    "focalnet": Entry(
        "FocalNetForImageClassification",
        "images",
        {
            "image_size": PIXELS,
            "embed_dim": 16,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "hidden_sizes": [16, 32],
        },
    ),
    "yolos": Entry(
        "YolosModel", "bare images", {**_PATCHES, "image_size": [PIXELS, PIXELS], "num_detection_tokens": 5}
    ),
    "videomae": Entry("VideoMAEForVideoClassification", "videos", {**_PATCHES, "num_frames": 4, "tubelet_size": 2}),
    "pvt": Entry(
        "PvtForImageClassification",
        "images",
        {
            "image_size": PIXELS,
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        },
    ),
    "dpt": Entry(
        "DPTForSemanticSegmentation",
        "maps",
        {
            **_PATCHES,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "is_hybrid": False,
            "num_hidden_layers": 4,
        },
    ),
}
_LANGUAGE: dict[str, Entry] = {
    "bert eager": Entry("BertForSequenceClassification", "texts", _TEXT, implementation=_EAGER, padding=True),
    "roberta": Entry("RobertaForMaskedLM", "words", _TEXT, padding=True),
    "deberta": Entry(
        "DebertaForMaskedLM", "words", {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    ),
    "deberta-v2": Entry(
        "DebertaV2ForSequenceClassification",
        "texts",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        padding=True,
    ),
    "deberta-v2 words": Entry(
        "DebertaV2ForMaskedLM",
        "words",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        padding=True,
    ),
    "albert": Entry("AlbertForMaskedLM", "words", {**_TEXT, "embedding_size": 16}, padding=True),
    "electra": Entry("ElectraForSequenceClassification", "texts", {**_TEXT, "embedding_size": 16}, padding=True),
    "distilbert": Entry(
        "DistilBertForMaskedLM",
        "words",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": WORDS},
    ),
    "mpnet": Entry("MPNetForMaskedLM", "words", _TEXT),
    "fnet": Entry("FNetForMaskedLM", "words", _TEXT),
    "modernbert": Entry("ModernBertForMaskedLM", "words", {**_TEXT, **_ENDS, "sep_token_id": 2, "cls_token_id": 1}),
    "llama": Entry("LlamaForCausalLM", "words", _LLAMA, padding=True),
    "llama eager": Entry("LlamaForCausalLM", "words", _LLAMA, implementation=_EAGER, padding=True),
    "mistral": Entry("MistralForCausalLM", "words", {**_LLAMA, "sliding_window": 8}),
    "qwen2": Entry("Qwen2ForCausalLM", "words", _LLAMA),
    "qwen3": Entry("Qwen3ForCausalLM", "words", _LLAMA),
    "gemma": Entry("GemmaForCausalLM", "words", _LLAMA),
    "gemma2": Entry("Gemma2ForCausalLM", "words", _LLAMA),
    "gemma3": Entry("Gemma3ForCausalLM", "words", {**_LLAMA, "sliding_window": 8}),
    "phi3": Entry("Phi3ForCausalLM", "words", _LLAMA),
    "falcon": Entry("FalconForCausalLM", "words", {**_TEXT, **_ENDS}),
    "bloom": Entry("BloomForCausalLM", "words", {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gptj": Entry("GPTJForCausalLM", "words", {**_GPT2, "n_layer": 2, "rotary_dim": 4}),
    "gpt-neo": Entry(
        "GPTNeoForCausalLM",
        "words",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
        },
    ),
    "stablelm": Entry("StableLmForCausalLM", "words", {**_LLAMA}),
    "olmo2": Entry("Olmo2ForCausalLM", "words", _LLAMA),
    "granite": Entry("GraniteForCausalLM", "words", _LLAMA),
    "mixtral": Entry("MixtralForCausalLM", "words", {**_LLAMA, "num_local_experts": 4}),
    "mixtral batched": Entry(
        "MixtralForCausalLM",
        "words",
        {**_LLAMA, "num_local_experts": 4},
        implementation={"experts_implementation": "batched_mm"},
    ),
    "mixtral eager": Entry(
        "MixtralForCausalLM",
        "words",
        {**_LLAMA, "num_local_experts": 4},
        implementation={"experts_implementation": "eager"},
    ),
    "mamba2": Entry(
        "Mamba2ForCausalLM",
        "words",
        {
            "hidden_size": 32,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "num_hidden_layers": 2,
            "vocab_size": WORDS,
        },
    ),
    "rwkv": Entry(
        "RwkvForCausalLM",
        "words",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": WORDS, "attention_hidden_size": 32},
    ),
    "bart": Entry("BartForConditionalGeneration", "words", _BART),
    "pegasus": Entry("PegasusForConditionalGeneration", "words", _BART),
    "mt5": Entry("MT5ForConditionalGeneration", "words", {**_T5, "num_layers": 2}),
    "xlnet": Entry(
        "XLNetLMHeadModel", "words", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": WORDS}
    ),
    "longformer": Entry("LongformerForMaskedLM", "words", {**_TEXT, "attention_window": 8}),
    "xlm-roberta": Entry("XLMRobertaForSequenceClassification", "texts", _TEXT, padding=True),
    "camembert": Entry("CamembertForTokenClassification", "words", {**_TEXT, "num_labels": WORDS}),
    "layoutlm": Entry("LayoutLMForMaskedLM", "words", _TEXT),
    "squeezebert": Entry("SqueezeBertForMaskedLM", "words", {**_TEXT, "embedding_size": 32}),
    "ernie": Entry("ErnieForMaskedLM", "words", _TEXT),
    "convbert": Entry("ConvBertForMaskedLM", "words", {**_TEXT, "embedding_size": 32, "conv_kernel_size": 3}),
}
_OTHERS: dict[str, Entry] = {
    "wav2vec2": Entry("Wav2Vec2ForSequenceClassification", "sounds", _SPEECH),
    "hubert": Entry("HubertForSequenceClassification", "sounds", _SPEECH),
    "wavlm": Entry("WavLMForSequenceClassification", "sounds", _SPEECH),
    "whisper encoder": Entry(
        "WhisperForAudioClassification",
        "features",
        {**_BART, "num_mel_bins": 16, "max_source_positions": TOKENS, "max_target_positions": 16, "pad_token_id": 0},
    ),
    "audio spectrogram": Entry(
        "ASTForAudioClassification",
        "spectra",
        {**_SMALL, "patch_size": 8, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    ),
    "patchtst": Entry(
        "PatchTSTForPrediction",
        "series",
        {
            **_SERIES,
            "d_model": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "loss": "mse",
        },
    ),
    "patchtsmixer": Entry(
        "PatchTSMixerForPrediction",
        "series",
        {
            **_SERIES,
            "d_model": 16,
            "num_layers": 2,
        },
    ),
}
_TIMM: dict[str, Entry] = {
    "timm vit": Entry("timm:vit_tiny_patch16_224", "timm images", {"img_size": PIXELS, "depth": 2, "num_classes": 3}),
    "timm convnext": Entry("timm:convnext_atto", "timm images", {"num_classes": 3}),
    "timm mlp-mixer": Entry(
        "timm:mixer_s32_224", "timm images", {"img_size": PIXELS, "num_blocks": 2, "num_classes": 3}
    ),
}
ZOO: dict[str, Entry] = {
    **{name: replace(entry, study=True) for name, entry in _STUDY.items()},
    **_VISION,
    **_LANGUAGE,
    **_OTHERS,
    **_TIMM,
}
