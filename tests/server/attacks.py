"""The attacks and faults that other engines have met, and where each is tested here."""

from __future__ import annotations

# number: what it is, and where it is tested: files below tests/, and functions in them
WHERE: dict[int, tuple[str, dict[str, str]]] = {
    1: ("pickle in weights", {
        "checkpoints/test_folder.py": "test_pickles_are_refused_with_the_remedy",
        "checkpoints/test_hub.py": "test_pickles_are_never_chosen"}),
    2: ("loaders that run code after all", {"server/test_attacks.py": "test_no_code_is_made_of_data"}),
    3: ("GGUF counts and sizes", {
        "checkpoints/test_gguf_file.py": "test_counts_that_the_file_cannot_hold test_extents test_offsets",
        "fuzz/test_fuzz_checkpoints.py": "test_mutated_files_are_read_or_refused"}),
    4: ("GGUF alignment", {"checkpoints/test_gguf_file.py": "test_alignment"}),
    5: ("GGUF vocabulary", {"checkpoints/test_vocab.py": "test_hostile_metadata_is_refused"}),
    6: ("hardening that makes loading slow", {
        "checkpoints/test_gguf_file.py": "test_a_real_vocabulary_opens_quickly_and_in_proportion",
        "checkpoints/test_safetensors.py": "test_opening_many_tensors_is_fast"}),
    7: ("templates that run code", {"checkpoints/test_templates.py": "test_escapes_are_refused"}),
    8: ("templates without end", {
        "checkpoints/test_templates.py": "test_endless_templates_end test_time_is_bounded test_output_is_bounded",
        "server/test_attacks.py": "test_templates_of_requests_are_bounded"}),
    9: ("holes in the sandbox", {
        "checkpoints/test_templates.py": "test_escapes_are_refused", "fuzz/test_fuzz_template.py": "test_mutated_templates"}),
    10: ("code beside a checkpoint", {"server/test_attacks.py": "test_code_beside_a_checkpoint_is_never_run"}),
    11: ("short files, full disks, broken downloads", {
        "checkpoints/test_safetensors.py":
            "test_truncated_at_any_point test_a_file_that_shrinks_while_open_is_refused_not_fatal test_a_full_disk_leaves_nothing",
        "checkpoints/test_gguf_file.py": "test_truncated_at_every_byte test_a_file_that_shrinks_while_open_is_refused_not_fatal",
        "checkpoints/test_hub.py": "test_an_interrupted_download_says_so"}),
    12: ("n without bound", {"server/test_attacks.py": "test_hostile_bodies_are_refused_in_passing"}),
    13: ("logprobs without bound", {"server/test_attacks.py": "test_hostile_bodies_are_refused_in_passing"}),
    14: ("many stop strings", {"server/test_attacks.py": "test_hostile_bodies_are_refused_in_passing"}),
    15: ("tokens outside the vocabulary", {"server/test_attacks.py": "test_hostile_bodies_are_refused_in_passing"}),
    16: ("negative and huge numbers", {"server/test_attacks.py": "test_no_number_breaks_the_way_to_the_worker"}),
    17: ("template variables that replace our own", {"server/test_attacks.py": "test_hostile_bodies_are_refused_in_passing"}),
    18: ("malformed tools, empty prompts", {
        "server/test_attacks.py": "test_hostile_bodies_are_refused_in_passing",
        "server/test_dialects.py": "test_wrong_tools_are_named"}),
    19: ("bad and bomb-like schemas and expressions", {
        "server/test_attacks.py": "test_compile_bombs_are_refused_beside_others",
        "server/test_structured.py": "test_what_cannot_be_kept_to_is_named",
        "engine/test_constrained.py": "test_what_cannot_be_kept_is_refused_with_its_reason test_large_but_harmless"}),
    20: ("constraints that fail open", {
        "engine/test_constrained.py":
            "test_a_matcher_that_fails_ends_the_sequence test_without_the_technique_or_a_tokenizer_requests_are_refused"}),
    21: ("faults inside the grammar engine", {
        "engine/test_constrained.py":
            "test_a_matcher_that_fails_ends_the_sequence test_the_helper_process_is_replaced_when_lost_and_ended_on_close"}),
    22: ("huge headers and bodies, chunks without end", {
        "server/test_guard.py": "test_many_and_long_headers_are_refused test_a_body_too_large_is_refused_by_its_length_unread",
        "server/test_wire.py": "test_a_chunked_body_without_end_is_cut test_headers_without_end_are_cut",
        "server/test_connections.py": "test_tiny_chunks_hold_nobody_up"}),
    23: ("quadratic work over a history", {"server/test_attacks.py": "test_long_texts_hold_nobody_up"}),
    24: ("embedding and base64 bombs", {"server/test_attacks.py": "test_hostile_bodies_are_refused_in_passing"}),
    25: ("pictures, sound and film", {"server/test_attacks.py": "test_media_are_refused_and_nothing_is_fetched"}),
    26: ("requests forged by a media URL", {"server/test_attacks.py": "test_media_are_refused_and_nothing_is_fetched"}),
    27: ("file:// and ways out of a folder", {
        "server/test_attacks.py": "test_media_are_refused_and_nothing_is_fetched test_names_of_models_are_no_paths",
        "checkpoints/test_folder.py": "test_index_cannot_leave_the_folder"}),
    28: ("transfer parameters", {"server/test_attacks.py": "test_hostile_bodies_are_refused_in_passing"}),
    29: ("confused parsers of calls", {
        "server/test_dialects.py":
            "test_cuts_make_no_difference test_no_text_is_lost test_depth_and_number_of_calls_are_bounded test_work_is_linear"}),
    30: ("routes outside the guard", {
        "server/test_attacks.py": "test_every_route_is_guarded",
        "server/test_guard.py": "test_unknown_and_disguised_paths_stay_closed"}),
    31: ("timing of the key comparison", {"server/test_access.py": "test_every_key_is_compared_whole_and_in_constant_time"}),
    32: ("timing of the prefix cache", {
        "server/test_attacks.py": "test_identities_never_share_a_prefix",
        "engine/test_tiers.py": "test_identities_never_share",
        "core/test_radix.py": "test_salts_are_separate_and_vanish_when_empty"}),
    33: ("collisions of prefix hashes", {
        "core/test_blocks.py": "test_tokens_are_compared_and_not_only_their_hash",
        "core/test_radix.py": "test_a_text_that_differs_in_the_middle_ends_there"}),
    34: ("pickle between processes, routes that change weights", {
        "server/test_attacks.py": "test_no_code_is_made_of_data", "server/test_faults.py": "test_only_the_front_listens"}),
    35: ("listeners on all interfaces", {"server/test_faults.py": "test_only_the_front_listens"}),
    36: ("errors that tell internals", {
        "server/test_attacks.py": "test_errors_tell_no_internals",
        "server/test_guard.py": "test_exceptions_become_errors_without_internals"}),
    37: ("pages that act by their address, CORS", {
        "server/test_page.py": "test_the_address_makes_the_page_do_nothing",
        "server/test_guard.py": "test_foreign_pages_are_refused test_cors_is_for_the_origins_listed_and_never_with_credentials",
        "server/test_attacks.py": "test_reading_an_address_changes_nothing"}),
    38: ("paths in requests", {"server/test_attacks.py": "test_only_administrators_name_paths"}),
    39: ("clients who leave", {"server/test_faults.py": "test_clients_may_leave_at_any_moment"}),
    40: ("readers who do not read", {
        "server/test_connections.py": "test_who_does_not_read_a_stream_is_dropped test_who_does_not_read_an_answer_is_cut",
        "server/test_sse.py": "test_who_takes_nothing_is_given_up"}),
    41: ("workers that die or hang", {
        "server/test_supervisor.py":
            "test_kill_9_in_the_middle_of_streams_loses_and_repeats_nothing test_a_worker_that_hangs_is_ended "
            "test_who_ends_the_worker_twice_is_refused_and_its_neighbours_finish "
            "test_too_many_deaths_end_every_stream_with_a_reason",
        "server/test_faults.py": "test_a_lost_grammar_helper_is_replaced"}),
    42: ("reloading under load", {
        "server/test_faults.py": "test_reload_and_unload_lose_no_request",
        "server/test_chat.py": "test_reload_finishes_what_runs_on_the_old_model_and_serves_the_new_one"}),
    43: ("leaks", {
        "server/test_attacks.py": "test_memory_does_not_grow",
        "server/test_faults.py": "test_clients_may_leave_at_any_moment"}),
    44: ("NaN, damaged KV blocks", {
        "server/test_faults.py": "test_numbers_that_overflow_fail_the_request_and_nothing_else",
        "engine/test_engine.py": "test_unusable_logits_fail_only_their_request",
        "models/test_model_loader.py": "test_weights_that_are_no_numbers_are_an_error",
        "engine/test_tiers.py": "test_damaged_blocks_are_dropped_and_never_used"}),
    45: ("wrong instruction set", {"server/test_faults.py": "test_an_unknown_instruction_set_is_told"}),
    46: ("overflow, signals, clocks, ports, disks", {
        "server/test_attacks.py": "test_a_full_queue_says_when_to_come_back test_the_clock_of_the_wall_may_jump",
        "server/test_chat.py": "test_a_prompt_that_is_too_long_has_its_own_code",
        "server/test_faults.py":
            "test_the_first_signal_drains_and_the_second_ends_at_once test_a_port_in_use_is_told",
        "core/test_stores.py": "test_a_full_disk_pauses_writing_and_nothing_else"}),
}  # fmt: skip
