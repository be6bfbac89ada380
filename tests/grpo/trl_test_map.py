"""Where the behaviours that TRL's own tests ask of its GRPOTrainer (text only) are asked of Pronghorn's.

Keys of `TESTS` are names of TRL 1.x's `tests/test_grpo_trainer.py`; keys of `SINCE` are what 1.15 and 1.16 take beside.
Values are tests of ours, `file::test`, with `[word]` one whose parameters name that setting. `REFUSED` are the
behaviours that Pronghorn refuses by name; their tests hold the refusal. Left out are images (`test_training_vlm*`,
`test_vlm_*`), and `test_tool_completion_idx_injection`, whose feature 1.15 and 1.16 do not have.
"""

from __future__ import annotations

BEHAVIOURS, LOSS, MODEL, DRAWING = "test_trl_behaviours", "test_trl_loss", "test_reward_model", "test_drawing"
SETTING, OPTIONS = f"{BEHAVIOURS}::test_each_setting_trains", f"{LOSS}::test_options"
MASK, REFUSAL = "test_losses::test_high_entropy_tokens", f"{BEHAVIOURS}::test_what_is_not_offered_is_refused_by_name"
NATIVE = f"{BEHAVIOURS}::test_a_folder_and_a_peft_config_on_the_native_engine"

TESTS: dict[str, tuple[str, ...]] = {
    "test_compute_entropy_mask_0": (MASK,),
    "test_compute_entropy_mask_1": (MASK,),
    "test_compute_entropy_mask_lower_threshold": (MASK,),
    "test_compute_entropy_threshold_0": (MASK,),
    "test_compute_entropy_threshold_1": (MASK,),
    "test_compute_entropy_all_masked": (MASK, f"{BEHAVIOURS}::test_truncated_completions_are_masked"),
    "test_init_minimal": (f"{BEHAVIOURS}::test_model_reward_and_data_are_enough",),
    "test_training": (f"{BEHAVIOURS}::test_text_and_chats", f"{BEHAVIOURS}::test_full_fine_tuning_moves_every_weight"),
    "test_get_sapo_token_loss": ("test_losses::test_terms_by_hand[sapo]",),
    "test_training_loss_types": (f"{BEHAVIOURS}::test_each_loss_with_accumulation", f"{LOSS}::test_loss_and_gradients"),
    "test_training_with_eval": (f"{BEHAVIOURS}::test_evaluation",),
    "test_training_with_num_generations_eval": (f"{BEHAVIOURS}::test_evaluation",),
    "test_training_eval_on_start": (f"{BEHAVIOURS}::test_evaluation",),
    "test_training_multiple_iterations": (f"{SETTING}[num_iterations]", OPTIONS),
    "test_training_peft_config": (NATIVE,),
    "test_training_peft_model": (f"{BEHAVIOURS}::test_text_and_chats",),
    "test_training_peft_with_gradient_checkpointing": (f"{SETTING}[gradient_checkpointing]", NATIVE),
    "test_training_different_reward_model": (f"{MODEL}::test_a_run_on_chats_with_a_tokenizer_of_its_own",),
    "test_training_reward_func_standard": (f"{BEHAVIOURS}::test_text_and_chats",),
    "test_training_reward_func_conversational": (f"{BEHAVIOURS}::test_text_and_chats",),
    "test_training_multiple_reward_funcs": (f"{BEHAVIOURS}::test_several_rewards_with_weights",),
    "test_training_sync_and_async_reward_funcs": (f"{BEHAVIOURS}::test_async_and_plain_rewards_together",),
    "test_training_multiple_reward_funcs_with_None_output": (
        f"{BEHAVIOURS}::test_a_reward_that_abstains_beside_one_that_does_not",
    ),
    "test_training_multiple_reward_funcs_with_weights": (f"{BEHAVIOURS}::test_several_rewards_with_weights",),
    "test_training_multiple_mixed_reward_funcs": (f"{MODEL}::test_a_run_with_a_reward_model_and_a_function",),
    "test_training_reward_func_additional_column": (f"{BEHAVIOURS}::test_rewards_see_columns_and_the_trainers_state",),
    "test_training_with_sync_ref_model": (
        f"{BEHAVIOURS}::test_sync_moves_policy_and_reference",
        "test_reference::test_sync_is_trls",
    ),
    "test_training_beta_non_zero": (f"{SETTING}[beta]", f"{LOSS}::test_loss_and_gradients"),
    "test_get_off_policy_mask": ("test_losses::test_off_policy_rows",),
    "test_get_off_policy_mask_padding": ("test_losses::test_off_policy_rows",),  # packed rows have no padding
    "test_training_with_off_policy_mask": (f"{SETTING}[off_policy_mask_threshold]", OPTIONS),
    "test_training_with_bias_correction_kl": (f"{SETTING}[beta]", f"{OPTIONS}[use_bias_correction_kl]"),
    "test_training_with_entropy_filter": (f"{SETTING}[top_entropy_quantile]", OPTIONS),
    "test_training_vllm_importance_sampling_correction": (
        f"{LOSS}::test_sampler_correction",
        "test_trainer::test_a_mismatched_sampler_is_corrected_by_default",
    ),
    "test_training_with_additional_generation_kwargs": (NATIVE,),
    "test_training_normalize_then_sum_aggregation": (f"{SETTING}[normalize_then_sum]", OPTIONS),
    "test_training_scale_rewards": (f"{BEHAVIOURS}::test_each_scaling_trains",),
    "test_training_with_mask_truncated_completions": (f"{BEHAVIOURS}::test_truncated_completions_are_masked",),
    "test_training_with_mask_truncated_completions_all_masked": (
        f"{BEHAVIOURS}::test_truncated_completions_are_masked",
    ),
    "test_warning_raised_all_rewards_none": (f"{BEHAVIOURS}::test_all_rewards_none_warns_and_teaches_nothing",),
    "test_training_num_generations_larger_than_batch_size": (f"{SETTING}[per_device_train_batch_size]",),
    "test_training_delta_clipping": (f"{SETTING}[delta]", f"{OPTIONS}[delta]"),
    "test_training_multiple_dataloader_workers": (f"{SETTING}[dataloader_num_workers]",),
    "test_training_with_reward_func_accessing_trainer_state": (
        f"{BEHAVIOURS}::test_rewards_see_columns_and_the_trainers_state",
    ),
    "test_prepare_input_called_with_correct_data": (f"{BEHAVIOURS}::test_rows_come_in_trls_order",),
    "test_training_sequence_importance_sampling": (f"{SETTING}[importance_sampling_level]", OPTIONS),
    "test_training_with_chat_template_kwargs": (f"{DRAWING}::test_template_variables_reach_the_prompt",),
    "test_training_with_tools": (
        "test_tools::test_the_loop_is_trls",
        "test_tools_end_to_end::test_a_model_calls_the_calculator_reads_it_and_is_trained",
    ),
    "test_mismatched_reward_processing_classes_length": (f"{MODEL}::test_what_is_no_reward_model_is_refused_by_name",),
    "test_correct_reward_processing_classes_list": (f"{MODEL}::test_a_name_and_its_tokenizer_through_the_trainer",),
    "test_single_reward_model_with_single_processing_class": (f"{MODEL}::test_scores_and_name_are_trls",),
    "test_training_vllm": ("test_config::test_the_blogs_config_is_translated_line_by_line", NATIVE),
    "test_training_vllm_and_peft": (NATIVE,),
    "test_training_vllm_with_additional_generation_kwargs": (NATIVE,),
}

SINCE: dict[str, tuple[str, ...]] = {
    "loss_type luspo, vespo": (f"{BEHAVIOURS}::test_each_loss_with_accumulation", f"{LOSS}::test_loss_and_gradients"),
    "entropy_coef": (
        f"{BEHAVIOURS}::test_entropy_bonus_and_its_controller_are_logged",
        f"{BEHAVIOURS}::test_an_entropy_bonus_raises_the_entropy",
        f"{OPTIONS}[entropy_coef]",
    ),
    "use_adaptive_entropy": (
        f"{LOSS}::test_adaptive_entropy_over_steps",
        f"{BEHAVIOURS}::test_evaluation_leaves_the_entropy_controller_alone",
    ),
    "vllm_importance_sampling_clip_min": (f"{LOSS}::test_sampler_correction",),
    "an adapter that was trained before as its own reference": (
        "test_reference::test_a_frozen_copy_is_the_policy_as_it_was",
    ),
    "gradient accumulation": (f"{BEHAVIOURS}::test_each_loss_with_accumulation",),
    "log_extra, log_metric": ("test_trainer::test_rewards_see_columns_and_may_log",),
    "rollout_func": ("test_rollout_func::test_rollouts_columns_and_truncation",),
    "max_tool_calling_iterations": ("test_tools::test_the_loop_is_trls[max_tool_calling_iterations]",),
    "disable_dropout": (f"{BEHAVIOURS}::test_disabled_dropout_is_none_at_all",),
    "trust_remote_code": (f"{BEHAVIOURS}::test_remote_code_is_allowed_for_a_model_by_name",),
    "prompts of token ids": (f"{DRAWING}::test_prompts_as_token_ids_pass_as_they_are",),
}

REFUSED: dict[str, tuple[str, ...]] = {
    "test_training_with_cast_lm_head_to_fp32": (f"{REFUSAL}[cast_lm_head_to_fp32]",),
    "test_training_with_generation_kwargs": (
        f"{REFUSAL}[num_beams]",
        f"{DRAWING}::test_generation_kwargs_override_the_fields",
    ),
    "test_training_with_off_policy_mask_with_liger": (f"{REFUSAL}[use_liger_kernel]",),
    "test_training_with_liger_grpo_kernel": (f"{REFUSAL}[use_liger_kernel]",),
    "test_training_with_liger_grpo_kernel_and_peft": (f"{REFUSAL}[use_liger_kernel]",),
    "test_training_with_transformers_paged": (f"{REFUSAL}[use_transformers_paged]",),
    "test_training_vllm_structured_outputs": (f"{REFUSAL}[vllm_structured_outputs_regex]",),
    "transformers' continuous batching": (f"{REFUSAL}[use_transformers_continuous_batching]",),
    "router_aux_loss_coef": (f"{REFUSAL}[router_aux_loss_coef]",),
    "environment_factory": (f"{REFUSAL}[environment_factory]",),
    "quantization_config": (f"{REFUSAL}[quantization_config]",),
    "streamed data sets": (f"{REFUSAL}[IterableDataset]",),
    "a vLLM server": ("test_combinations::test_combinations_that_mean_nothing_raise[vllm_server_host]",),
}
