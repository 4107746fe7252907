"""The suite notices broken tool calling: each mutation of a copy of the source makes the test named with it fail."""

from tests.mutants import Mutation, mutation, mutation_tests

LABELS = "test_tokens.py::test_labels_are_the_assistants_turns_with_their_stop_tokens[qwen2.5]"
CONTROLS = "test_tokens.py::test_control_tokens_in_a_text_are_characters[result-qwen2.5]"
ADDED = "test_tokens.py::test_control_tokens_in_a_text_are_characters[result-qwen3]"
ERRORS = "test_conversation.py::test_errors_are_shown_to_the_model_which_may_try_again"
MUTATIONS = {
    "tool results labelled": mutation(
        "tokens.py",
        "[IGNORED] * len(header) + own + [IGNORED] * len(rest)",
        "[IGNORED] * len(header) + own + rest",
        "test_tokens.py::test_tool_results_are_never_labelled[qwen2.5]",
    ),
    "no stop token to learn": mutation("tokens.py", "reply + stop, after)", "reply, stop + after)", LABELS),
    "the header to learn": mutation("tokens.py", "[IGNORED] * len(header) + own", "header + own", LABELS),
    "control tokens of a tool": mutation("tokens.py", "self._split.sub(", "(lambda _, text: text)(", CONTROLS),
    "added tokens that are not special": Mutation(
        (
            ("tokens.py", 'pieces.append("")', "pass"),
            ("tokens.py", "if found := set(ids) & set(self._controls.values()):", "if False:"),
        ),
        ADDED,
    ),
    "a cut conversation": mutation(
        "tokens.py",
        "if max_length is not None and len(ids) > max_length:",
        "if False:",
        "test_tokens.py::test_too_long_is_refused_and_never_cut",
    ),
    "arguments that datasets filled with None": mutation(
        "messages.py",
        "    if not failed:\n        _check_fits",
        "    if False:\n        _check_fits",
        "test_messages.py::test_conversations_out_of_form_are_refused",
    ),
    "an unread call as an answer": mutation("conversation.py", "if reply.error:", "if False:", ERRORS),
    "unchecked arguments": mutation(
        "toolbox.py",
        "checked = checked_arguments(name, parameters, arguments)",
        "checked = arguments",
        "test_toolbox.py::test_arguments_that_do_not_fit_are_named",
    ),
    "true for a number": mutation(
        "arguments.py",
        "if isinstance(value, bool):  # an int to Python",
        "if False:",
        "test_toolbox.py::test_arguments_that_do_not_fit_are_named",
    ),
    "files for a tool": mutation(
        "isolation.py",
        "if event.startswith(_REFUSED):",
        "if False:",
        "test_toolbox.py::test_forbidden_acts_of_a_tool_become_messages",
    ),
    "a cut answer": mutation(
        "conversation.py",
        '"answer" if {*encoder.stops} & {*ids} else "max_new_tokens"',
        '"answer"',
        "test_conversation.py::test_a_reply_that_was_cut_is_no_answer",
    ),
    "padding that is attended to": mutation(
        "conversation.py",
        "[0] * (width - len(p)) + [1] * len(p)",
        "[1] * width",
        "test_conversation.py::test_batches_say_what_each_says_alone",
    ),
    "items of a union": mutation(
        "schemas.py",
        'elif all(member.keys() == {"type"} for member in members):',
        'elif all("type" in member for member in members):',
        "test_schemas.py::test_a_call_takes_what_the_schema_says",
    ),
    "infinity as a number": mutation(
        "replies.py",
        "parse_float=_finite",
        "parse_float=float",
        "test_replies.py::test_a_call_that_cannot_be_read_is_an_error",
    ),
    "a model's own generation config": mutation(
        "conversation.py",
        "settings = _defaults(model) | {",
        "settings = {",
        "test_conversation.py::test_the_models_own_generation_config_changes_no_reply[settings4]",
    ),
    "keys that repeat": mutation(
        "replies.py",
        "if len(keys) != len(set(keys)):",
        "if False:",
        "test_replies.py::test_a_call_that_cannot_be_read_is_an_error",
    ),
}
FAST = ("tool results labelled", "control tokens of a tool")

runs, test_the_unmutated_copy_passes, test_mutation_is_caught = mutation_tests("tool_calling", MUTATIONS, FAST)
