"""Arguments of transformers' ``generate`` passed to our ``generate``: used, or rejected with advice."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from specforge.decoding.settings import Verification
from specforge.errors import describe_invalid, nearest_name
from specforge.sampling import Sampling

TOKENIZE = (
    'tokenize it first: inputs = tokenizer(text, return_tensors="pt"), then generate(**inputs); for a chat, '
    'tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
)
OTHER_DISTRIBUTION = (
    "it would change the verifier's distribution, which decoding preserves; temperature, top_k and top_p are possible"
)
ONE_TEXT = "each prompt gets one text; for several, repeat the prompt and set do_sample=True"
WHEN_TO_END = "max_new_tokens and eos_token_id (one id or several) set where a text ends"
OWN_CACHE = "decoding manages its own key-value cache"
OTHER_OUTPUT = "return_dict_in_generate=True gives sequences, rounds, accepted_by_position and seconds"
OTHER_INPUT = "give token ids as input_ids, int64 [B, T], and attention_mask if prompts are padded"
# Unsupported arguments of transformers' generate, keyed by what is possible instead.
REFUSED = {
    ONE_TEXT: ("num_beams", "num_beam_groups", "num_return_sequences"),
    OTHER_DISTRIBUTION: (
        *("repetition_penalty", "length_penalty", "diversity_penalty", "encoder_repetition_penalty", "penalty_alpha"),
        *("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "guidance_scale", "no_repeat_ngram_size"),
        *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "logits_processor"),
    ),
    WHEN_TO_END: (
        *("max_length", "max_time", "min_length", "min_new_tokens"),
        *("stopping_criteria", "stop_strings", "tokenizer"),
    ),
    OWN_CACHE: ("use_cache", "past_key_values", "cache_implementation", "cache_config"),
    OTHER_OUTPUT: ("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    OTHER_INPUT: ("inputs", "inputs_embeds", "position_ids", "token_type_ids"),
    "this draft is the assistant; the argument proposal sets how it proposes": ("assistant_model",),
    'proposal="prompt_lookup:speculative_tokens=N" is possible': ("prompt_lookup_num_tokens",),
    "pass its values, such as do_sample, temperature, top_k, top_p and max_new_tokens": ("generation_config",),
}
ADVICE = {name: advice for advice, names in REFUSED.items() for name in names}
# Values that have no effect, as None.
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "encoder_repetition_penalty", "typical_p"), 1),
    **dict.fromkeys(("diversity_penalty", "min_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("min_length", "min_new_tokens"), 0),
    **dict.fromkeys(REFUSED[OTHER_OUTPUT], False),
    "use_cache": True,
}


def check_unsupported(others: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Reject arguments that ``generate`` does not have, unless their value has no effect.

    Args:
        others: Name and value of each.
        known: The arguments it has, by name.

    Raises:
        ValueError: It is an argument of transformers' ``generate``; the message says what is possible instead.
        TypeError: It is not.
    """
    for name, value in others.items():
        if name not in ADVICE:
            raise TypeError(f"generate has no argument {name!r}.{nearest_name(name, [*known, *ADVICE])}")
        has_no_effect = isinstance(value, int | float) and name in NEUTRAL and value == NEUTRAL[name]
        if value is not None and value != [] and not has_no_effect:
            raise ValueError(f"{name} is not possible with a draft: {ADVICE[name]}")


def check_prompt_ids(input_ids: Any, attention_mask: Any, vocabulary: int) -> None:
    """Reject prompts that are not token ids of a verifier.

    Args:
        input_ids: The value of ``input_ids``.
        attention_mask: The value of ``attention_mask``.
        vocabulary: Size of the verifier's vocabulary.

    Raises:
        TypeError: They are not a tensor of integers; the message says what to pass.
        ValueError: Their shape is not [B, T], the mask's shape differs, or an id is out of bounds.
    """
    if isinstance(input_ids, str) or (isinstance(input_ids, list | tuple) and str in map(type, input_ids)):
        raise TypeError(f"generate takes token ids, but got text; {TOKENIZE}")
    if isinstance(input_ids, Mapping):
        raise TypeError("generate takes token ids, but got a tokenizer's output; pass it as generate(**inputs)")
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids is {_kind(input_ids)}; give a tensor, int64 [B, T]: torch.tensor([[...]])")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids has dtype {input_ids.dtype}; token ids are integers, such as torch.int64")
    if input_ids.ndim != 2:
        advice = "add a dimension, input_ids[None]" if input_ids.ndim == 1 else "give prompts as rows"
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}, not [B, T]; {advice}")
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask is {_kind(attention_mask)}; give a tensor with the shape of input_ids")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, but input_ids {list(input_ids.shape)}; both need "
            "the same shape"
        )
    seen = input_ids if attention_mask is None else input_ids[attention_mask.bool()]
    if seen.numel() and not 0 <= int(seen.min()) <= int(seen.max()) < vocabulary:
        raise ValueError(
            f"input_ids holds ids from {int(seen.min())} to {int(seen.max())}, but the verifier's vocabulary is 0 to "
            f"{vocabulary - 1}; tokenize with the verifier's own tokenizer"
        )


def check_integers(**values: Any) -> None:
    """Reject values that are neither None nor an integer of at least 0.

    Raises:
        TypeError: A value is not an integer; for a token as text, the message says how to get its id.
        ValueError: A value is negative.
    """
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            is_token = isinstance(value, str) and name.endswith("token_id")
            advice = "; for a token, give tokenizer.convert_tokens_to_ids(token)" if is_token else ""
            raise TypeError(f"{name} is {value!r}, but must be an integer{advice}")
        if value < 0:
            raise ValueError(f"{name} is {value}; give 0 or more")


def stop_ids(eos_token_id: Any) -> list[int]:
    """Return one id or several as a list; empty for None.

    Raises:
        TypeError: An id is not an integer.
        ValueError: An id is negative.
    """
    found = eos_token_id.tolist() if isinstance(eos_token_id, Tensor) else eos_token_id
    several = list(found) if isinstance(found, list | tuple | set) else [found]
    for one in several:
        check_integers(eos_token_id=one)
    return [one for one in several if one is not None]


def make_verification(method: Any) -> Verification:
    """Return the settings of a verification method.

    Raises:
        ValueError: There is no such method.
    """
    try:
        return Verification(method=method)
    except ValidationError as error:
        raise ValueError(f"verification: {error.errors()[0]['msg']}, got {method!r}") from None


def make_sampling(
    do_sample: bool | None, temperature: float | None, top_k: int | None, top_p: float | None
) -> Sampling:
    """Return the sampling settings for arguments of ``generate``.

    Args:
        do_sample: False always takes the most probable token, as transformers does; None follows the other arguments.
        temperature: None means 1 if ``do_sample`` is True, otherwise 0.
        top_k: Sample from the k most probable tokens; None and 0 for all.
        top_p: Sample from the fewest tokens that hold this much probability; None for all.

    Raises:
        ValueError: A value is out of bounds.
    """
    if temperature is None:
        temperature = 1.0 if do_sample else 0.0
    try:
        found = Sampling(temperature=temperature, top_k=top_k or 0, top_p=1.0 if top_p is None else top_p)
    except ValidationError as error:
        raise ValueError(describe_invalid(error)) from None
    if do_sample is False and not found.is_greedy:
        warnings.warn(
            f"do_sample=False takes the most probable token; temperature={temperature} is ignored", stacklevel=4
        )
        return Sampling()
    return found


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
