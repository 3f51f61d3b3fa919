r"""MLP speculators in vLLM, which removed its own support: a proposer for its ``custom_class`` method.

    vllm serve VERIFIER --additional-config '{"mlp_speculator": "DRAFT"}' \
      --speculative-config '{"method": "custom_class", "model": "specforge_mlp.vllm.MLPProposer",
                             "num_speculative_tokens": 3}'

DRAFT is a folder or hub id, in our layout or in ``mlp_speculator``'s. Drafts are greedy chains of at most one token per
head; the engine verifies them losslessly at any temperature.

vLLM passes only token ids to such a proposer, but an MLP speculator reads the verifier's state. It is taken from the
model runner's method ``propose_draft_token_ids``, which is wrapped for this. vLLM does not guarantee this interface,
hence the check of its version.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from specforge.checkpoints.formats import read_draft
from specforge.errors import UsageError
from specforge_mlp.model import MLPSpeculator

TESTED = ("0.32", "0.33")
SETTING = "mlp_speculator"
_METHOD = "propose_draft_token_ids"
_READ = ("sample_hidden_states", "spec_decode_metadata")


class MLPProposer:
    """Drafts with an MLP speculator, inside vLLM.

    Args:
        vllm_config: The engine's settings; ``additional_config["mlp_speculator"]`` names the draft.

    Raises:
        UsageError: The draft is not named, does not match the verifier, or has fewer heads than requested tokens.
        RuntimeError: The version of vLLM is not a tested one.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        _check_version()
        additional = vllm_config.additional_config
        if not isinstance(additional, dict) or SETTING not in additional:
            raise UsageError(f'name the draft: --additional-config \'{{"{SETTING}": "FOLDER"}}\'')
        speculative, model = vllm_config.speculative_config, vllm_config.model_config
        assert speculative is not None
        self._steps: int = speculative.num_speculative_tokens
        self._longest: int = model.max_model_len
        _, draft = read_draft(additional[SETTING])
        if not isinstance(draft, MLPSpeculator):
            raise UsageError(f"{additional[SETTING]} is not an MLP speculator, but a {type(draft).__name__}")
        self._draft = draft
        self._check(model.get_hidden_size(), model.get_vocab_size())
        self._draft.to(device=vllm_config.device_config.device, dtype=model.dtype)
        self._states = torch.empty(0)
        self._num_draft_tokens: list[int] | None = None
        _wrap_model_runner()

    def load_model(self, *_: Any, **__: Any) -> None:
        """Do nothing: the draft is loaded already."""

    def take_states(self, states: Tensor, num_draft_tokens: list[int] | None) -> None:
        """Store the verifier's states, after its final norm, at the indices whose logits it computed.

        Args:
            states: States [indices, H]: for each request, that of its last known token and of each drafted token.
            num_draft_tokens: Number of drafted tokens of each request; None for none.
        """
        self._states = states
        self._num_draft_tokens = num_draft_tokens

    @torch.inference_mode()
    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **_: Any
    ) -> list[list[int]]:
        """Draft a greedy chain for each request.

        Args:
            sampled_token_ids: Tokens that the verifier has just decided for each request; none during prefill.
            num_tokens_no_spec: Number of tokens of each request so far.
            token_ids_cpu: Those tokens; ignored.

        Returns:
            The drafted tokens of each request; none if none were decided or its context is full.
        """
        going = [
            row
            for row, tokens in enumerate(sampled_token_ids)
            if tokens and num_tokens_no_spec[row] + self._steps < self._longest
        ]
        proposals: list[list[int]] = [[] for _ in sampled_token_ids]
        if not going:
            return proposals
        states = self._states[self._last_indices(sampled_token_ids)[going]]
        tokens = torch.tensor([sampled_token_ids[row][-1] for row in going], device=states.device)
        drafted = []
        for step in range(self._steps):
            states = self._draft.advance(states, tokens, step)
            tokens = self._draft.logits(states, step).argmax(-1)
            drafted.append(tokens)
        for row, chain in zip(going, torch.stack(drafted, dim=1).tolist(), strict=True):
            proposals[row] = chain
        return proposals

    def _last_indices(self, sampled_token_ids: list[list[int]]) -> Tensor:
        """Return the index of the state before the last decided token of each request, int64 [requests].

        After n accepted tokens and one of the verifier's own, that is the (n + 1)-th index of the request.
        """
        decided = torch.tensor([len(tokens) for tokens in sampled_token_ids], device=self._states.device)
        drafted = torch.tensor(self._num_draft_tokens or [0] * len(decided), device=self._states.device)
        starts = (drafted + 1).cumsum(0) - (drafted + 1)
        return starts + (decided - 1).clamp(min=0)

    def _check(self, width: int, vocabulary: int) -> None:
        config = self._draft.config
        if (config.hidden_size, config.vocab_size) != (width, vocabulary):
            raise UsageError(
                f"the draft was made for a verifier with a width of {config.hidden_size:,} and a vocabulary of "
                f"{config.vocab_size:,}, this one has {width:,} and {vocabulary:,}"
            )
        if self._steps > config.num_layers:
            raise UsageError(
                f"num_speculative_tokens is {self._steps}, but the draft has only {config.num_layers} heads"
            )


def _check_version() -> None:
    takes = inspect.signature(getattr(GPUModelRunner, _METHOD, _check_version)).parameters
    if not vllm.__version__.startswith(tuple(f"{one}." for one in TESTED)) or not set(_READ) <= takes.keys():
        raise RuntimeError(
            f"specforge_mlp.vllm uses a private method of vLLM {' and '.join(TESTED)} (GPUModelRunner.{_METHOD}), but "
            f"this is vLLM {vllm.__version__}; install vllm=={TESTED[-1]}.*"
        )


@functools.cache
def _wrap_model_runner() -> None:
    """Make model runners pass the verifier's states to a proposer of this module before they call it."""
    original: Callable[..., Any] = getattr(GPUModelRunner, _METHOD)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def propose(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.drafter, MLPProposer):
            given = signature.bind(self, *args, **kwargs).arguments
            metadata = given["spec_decode_metadata"]
            drafted = None if metadata is None else metadata.num_draft_tokens
            self.drafter.take_states(given["sample_hidden_states"], drafted)
        return original(self, *args, **kwargs)

    setattr(GPUModelRunner, _METHOD, propose)
