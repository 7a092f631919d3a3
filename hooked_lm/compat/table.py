"""The classic library's modules, where their names are here, and what replaces the names that are not."""

from __future__ import annotations

__all__ = ["COMMON", "MISSING", "MISSING_MODULES", "MODULES", "RENAMED"]

# For each group of classic modules, by their paths below the package: our modules that have their names.
_GROUPS: dict[str, str] = {
    "ActivationCache": "hooked_lm.activation_cache",
    "FactoredMatrix": "hooked_lm.factored_matrix",
    "HookedTransformer": "hooked_lm.transformer",
    "HookedTransformerConfig config config.hooked_transformer_config config.transformer_lens_config": (
        "hooked_lm.config"
    ),
    "HookedRootModule hook_points": "hooked_lm.hooks",
    "SVDInterpreter": "hooked_lm.circuits.svd",
    "past_key_value_caching cache cache.key_value_cache cache.key_value_cache_entry": "hooked_lm.kv_cache",
    (
        "components components.abstract_attention components.attention components.embed "
        "components.grouped_query_attention components.layer_norm components.layer_norm_pre components.mlps "
        "components.mlps.can_be_used_as_mlp components.mlps.gated_mlp components.mlps.mlp components.mlps.moe "
        "components.pos_embed components.rms_norm components.rms_norm_pre components.transformer_block "
        "components.unembed"
    ): "hooked_lm.components",
    "evals": "hooked_lm.evals",
    "head_detector": "hooked_lm.head_detector",
    "patching": "hooked_lm.patching",
    "loading loading_from_pretrained supported_models": "hooked_lm.compat.helpers",
    "train": "hooked_lm.training",
    "weight_processing": "hooked_lm.weight_processing",
    (
        "utils utilities utilities.activation_functions utilities.addmm utilities.aliases utilities.attention "
        "utilities.attribute_utils utilities.cache utilities.components_utils utilities.defaults_utils "
        "utilities.devices utilities.exploratory_utils utilities.gpu_utils utilities.hf_utils "
        "utilities.initialization_utils utilities.library_utils utilities.lm_utils utilities.logits_utils "
        "utilities.matrix utilities.multi_gpu utilities.parameter_swap utilities.slice utilities.tensors "
        "utilities.tokenize_utils utilities.typed_module_list"
    ): "hooked_lm.utils",
}

MODULES: dict[str, str] = {"": "hooked_lm", **{path: home for paths, home in _GROUPS.items() for path in paths.split()}}

# Where a name is looked up that its module's home does not have: classic modules also give out what they import.
COMMON = (
    "hooked_lm",
    "hooked_lm.utils",
    "hooked_lm.components",
    "hooked_lm.hooks",
    "hooked_lm.kv_cache",
    "hooked_lm.transformer",
    "hooked_lm.config",
    "hooked_lm.names",
    "hooked_lm.components.activations",
    "hooked_lm.compat.helpers",
)

# Classic names of things that have another name here.
RENAMED: dict[str, str] = {
    "LensHandle": "HookHandle",
    "TransformerLensConfig": "HookedTransformerConfig",
    "TransformerLensKeyValueCache": "HookedTransformerKeyValueCache",
    "TransformerLensKeyValueCacheEntry": "HookedTransformerKeyValueCacheEntry",
    "HookIntrospectionMixin": "HookedRootModule",
    "SUPPORTED_ACTIVATIONS": "ACTIVATIONS",
    "ACTIVATION_FN_DICT": "ACTIVATIONS",
    "get_matrix_corner": "get_corner",
}

# What to use instead of classic modules, given by their paths or the folders they are in.
_MODULE_HINTS: dict[str, str] = {
    (
        "BertNextSentencePrediction HookedAudioEncoder HookedEncoder HookedEncoderDecoder components.bert_block "
        "components.bert_embed components.bert_mlm_head components.bert_nsp_head components.bert_pooler "
        "components.t5_attention components.t5_block components.token_typed_embed"
    ): "only decoders are here",
    "benchmarks": "hooked_lm.verify(name) compares a model with transformers",
    "components.mlps.gpt_oss_moe": "hooked_lm.components.MoE computes it",
    "components.mlps.gated_mlp_4bit utilities.quantization": "quantised checkpoints are dequantised as they are loaded",
    "config.transformer_bridge_config model_bridge utilities.bridge_components": (
        "HookedTransformer.from_pretrained(name), or from_pretrained(hf_model=model), converts the model instead"
    ),
    "conversion_utils pretrained remote_module_loading utilities.heterogeneous_config": (
        "weight_conversion converts checkpoints: HookedTransformer.from_pretrained(name_or_folder)"
    ),
    "factories": "TransformerBlock(cfg, layer) builds a block's parts; config.register_activation adds an activation",
    "lit": "hooked_lm.plotting draws figures",
    "tools.analysis": "hooked_lm.circuits and hooked_lm.patching have such analyses",
    "tools utilities.architectures": "families are known by architecture: weight_conversion.registry.FAMILIES",
    "utilities.tracr": "build a HookedTransformerConfig, and load the weights with load_state_dict",
}

# The same for names, or patterns of names, in whichever module.
_NAME_HINTS: dict[str, str] = {
    (
        "BertNextSentencePrediction HookedAudioEncoder HookedEncoder HookedEncoderDecoder BertBlock BertEmbed "
        "BertMLMHead BertNSPHead BertPooler T5Attention T5Block TokenTypeEmbed"
    ): "only decoders are here",
    "TransformerBridge TransformerBridgeConfig ModelWithCfg collect_aliases_recursive get_pos_offset resolve_alias": (
        "HookedTransformer.from_pretrained(name), or from_pretrained(hf_model=model), converts the model instead"
    ),
    (
        "MIXED_CPU_GPU_ERROR calculate_available_device_cuda_memory cast_floating_params_to_dtype count_unique_devices "
        "determine_available_memory_for_available_devices find_embedding_device find_misplaced_modules "
        "get_best_available_cuda_device get_best_available_device is_mixed_cpu_gpu maybe_cast_floating_params "
        "move_to_and_update_config resolve_device_map sort_devices_based_on_available_memory"
    ): "pass device=, or call model.to(device) or model.spread(devices)",
    (
        "DATASET_LOADERS DATASET_NAMES MMLU_ANSWER_LETTERS MMLU_SUBJECTS download_file_from_hf evaluate "
        "evaluate_on_dataset get_dataset make_code_data_loader make_mmlu_data_loader make_owt_data_loader "
        "make_pile_data_loader make_wiki_data_loader mmlu_eval"
    ): "nothing is downloaded: pass texts that you have to utils.tokenize_and_concatenate",
    (
        "NEED_REMOTE_CODE_MODELS NON_HF_HOSTED_MODEL_NAMES POST_NORM_ARCHITECTURES PYTHIA_CHECKPOINTS "
        "PYTHIA_V0_CHECKPOINTS STANFORD_CRFM_CHECKPOINTS get_checkpoint_labels get_num_params_of_pretrained"
    ): "families are known by architecture: weight_conversion.registry.FAMILIES",
    (
        "Config convert_hf_model_config convert_neel_model_config get_basic_config get_pretrained_model_config"
    ): "HookedTransformer.from_pretrained(name).cfg is a model's config",
    (
        "autoconfig_with_remote_post_init_compat autotokenizer_with_special_token_compat convert_*_weights "
        "enable_hf_numeric_tower get_pretrained_state_dict get_rotary_pct_from_config make_post_init_kwarg_tolerant "
        "select_compatible_kwargs"
    ): "weight_conversion converts checkpoints: HookedTransformer.from_pretrained(name_or_folder)",
    "CACHE_DIR HF_HUB_CACHE call_hf_with_retry clear_huggingface_cache enable_hf_retry get_hf_token": (
        "huggingface_hub has it"
    ),
    "CACHE_WITH_SEQ_LIST_ERR DET_PAT_NOT_SQUARE_ERR INVALID_HEAD_NAME_ERR SEQ_LEN_ERR": (
        "head_detector's errors say what came and what was expected"
    ),
    "batch_addmm clamp_qkv complex_attn_linear simple_attn_linear vanilla_addmm": (
        "torch.nn.functional.linear, or an einsum"
    ),
    "ActivationFunctionFactory ArchitectureAdapter ArchitectureAdapterFactory BaseTensorConversion MLPFactory": (
        "TransformerBlock(cfg, layer) builds a block's parts; weight_conversion.register_family adds a family"
    ),
    "het_safe_view quantization_method unreadable_weight_reason": "loading raises with the reason if it cannot read",
    "gelu_pytorch_tanh xielu": "config.ACTIVATIONS has the activation functions by name",
    "HookedTransformerTrainConfig": "training.TrainingConfig, for training.train(model, batches, config, folder)",
    "LocallyOverridenDefaults": "prepend_bos= and padding_side= of the call, or model.cfg.default_prepend_bos",
    "keep_single_column": "dataset.select_columns([name])",
    "fill_missing_keys": "model.fill_missing_keys(state_dict)",
    "TypedModuleList": "torch.nn.ModuleList",
    "print_gpu_mem": "torch.cuda.memory_allocated()",
    "temporarily_swap_parameter": "torch.func.functional_call runs a model with other parameters",
    "compute_head_attention_similarity_score": "head_detector.detect_head(error_measure=) scores heads",
    "get_supported_heads": "head_detector.HEAD_NAMES",
    "layer_head_pos_pattern_patch_setter": "patching.get_act_patch_attn_head_pattern_by_pos",
    "check_structure": "torch.testing.assert_close compares trees of tensors",
    "warn_if_mps": "torch warns by itself",
    "VECTOR_TYPES": "the names are 'OV', 'w_in' and 'w_out'",
    "OUTPUT_EMBEDDING": "model.W_U",
    "DTYPE_FROM_STRING": "getattr(torch, name)",
    "TensorLike": "torch.Tensor",
}

MISSING_MODULES: dict[str, str] = {path: hint for paths, hint in _MODULE_HINTS.items() for path in paths.split()}
MISSING: dict[str, str] = {name: hint for names, hint in _NAME_HINTS.items() for name in names.split()}
