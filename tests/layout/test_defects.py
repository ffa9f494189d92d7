"""Known defects of the published code and of its peers, and for each the test here that fails when we share it.

D1-D29: the code published with the paper (github.com/kevinyaobytedance/llm_unlearn). P: other unlearning projects.
"""

from __future__ import annotations

import ast

import pytest

DEFECTS = {
    "D1 mismatch loss also trains on the prompt": "unit/data/test_packing.py::test_prompt_tokens_never_enter_the_loss",
    "D2 the first answer token is skipped": "unit/data/test_encode.py::test_the_first_answer_token_is_trained",
    "D3 the stop compares a negated loss and never fires":
        "e2e/test_stopping.py::test_a_forget_loss_that_jumps_ends_the_run_at_one_plus_extra_times_that_step",
    "D4 the step limit is tested only between passes":
        "e2e/test_stopping.py::test_max_steps_holds_in_the_middle_of_a_pass_and_of_what_a_rule_asked_for",
    "D5 only the first rows are ever used": "unit/data/test_loader.py::test_every_forget_row_comes_once_an_epoch",
    "D6 the padding id is hard-coded":
        "unit/data/test_packing.py::test_the_stream_is_the_rows_end_to_end_without_padding",
    "D7 padding with the end token removes true ends":
        "unit/data/test_encode.py::test_a_tokenizer_whose_pad_is_its_end_token_still_trains_the_true_end",
    "D8 the KL averages over prompt and padding":
        "unit/data/test_packing.py::test_each_token_carries_the_coefficient_of_its_row_and_each_sequence_its_bound_and_length",
    "D9 log(p + 1e-12) turns into NaN or loses the KL":
        "numerics/test_kl.py::test_series_and_direct_form_agree_with_float64_at_every_distance",
    "D10 dropout in the policy but not in the reference":
        "numerics/test_architectures.py::test_dropout_is_off_even_in_training",
    "D11 no truncation, or a forget loss of nothing":
        "unit/data/test_encode.py::test_a_long_answer_is_cut_and_a_cut_answer_has_no_end_token",
    "D12 the rank of the adapters has no effect":
        "unit/test_lora.py::test_every_adapter_has_the_rank_that_was_asked_for",
    "D13 the question is recovered by splitting decoded text":
        "unit/data/test_loader.py::test_mismatch_rows_have_the_prompts_of_the_forget_rows_of_their_micro_batch",
    "D14 answers have no end token":
        "unit/data/test_encode.py::test_the_span_decodes_to_the_answer_and_ends_in_the_end_token",
    "D15 false and held-out answers in the mismatch pool":
        "unit/scenarios/test_hallucination.py::test_mismatch_answers_are_right_answers_of_normal_training_rows_only",
    "D16 the prompt ends in a space": "unit/data/test_encode.py::test_the_papers_form_has_no_trailing_space",
    "D17 the model cannot be saved on several ranks":
        "e2e/test_run.py::test_two_ranks_measure_the_same_and_the_memorized_model_comes_from_the_cache",
    "D18 the schedule steps once a rank":
        "distributed/test_equivalence.py::test_two_ranks_equal_one_rank_with_twice_the_accumulation",
    "D19 all ranks draw the same mismatch answers":
        "unit/data/test_loader.py::test_prompts_steps_and_ranks_draw_different_mismatch_answers",
    "D20 a second copy of the model as reference with LoRA":
        "distributed/test_references_in_memory.py::test_the_adapter_reference_holds_no_second_model_and_trains_adapters_only",
    "D21 results depend on the number of ranks":
        "unit/data/test_loader.py::test_ranks_and_micro_batches_share_out_the_same_global_batch",
    "D22 a term of weight 0 is still computed":
        "unit/data/test_loader.py::test_a_mismatch_weight_of_zero_produces_no_mismatch_rows",
    "D24 logits of every position": "numerics/test_ops.py::test_logits_of_all_rows_never_exist",
    "D27 fp32 throughout": "numerics/test_ops.py::test_bf16_error_is_at_most_that_of_torch",
    "D28 a reference cache that is keyed by order":
        "unit/test_reference.py::test_a_row_encoded_in_another_way_is_not_served_from_the_cache",
    "P7 new columns break the reader": "unit/data/test_sources.py::test_extra_columns_do_not_hide_a_schema",
    "P13 an attention mask made of ids hides true ends":
        "e2e/test_run.py::test_the_exported_model_generates_what_the_last_evaluation_recorded",
    "P15 evaluation on one process only":
        "e2e/test_run.py::test_two_ranks_measure_the_same_and_the_memorized_model_comes_from_the_cache",
    "P16 no resume, and an order that cannot be restored":
        "e2e/test_resume.py::test_resume_continues_bit_identically",
    "P18 random numbers that differ between processes":
        "unit/data/test_loader.py::test_the_global_random_state_plays_no_part_and_is_left_alone",
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_known_defect_has_its_test(repository, defect):
    file, _, name = DEFECTS[defect].partition("::")
    tree = ast.parse((repository / "tests" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
