r"""MLP speculators in vLLM, which took its own support out: a proposer for its ``custom_class`` method.

    vllm serve VERIFIER --additional-config '{"mlp_speculator": "DRAFT"}' \
      --speculative-config '{"method": "custom_class", "model": "specforge_mlp.vllm.MLPProposer",
                             "num_speculative_tokens": 3}'

DRAFT is a folder or hub id, in our layout or in ``mlp_speculator``'s. Drafts are greedy chains of up to as many tokens
as there are heads; the engine verifies them losslessly at any temperature.

vLLM hands token ids alone to such a proposer, and an MLP speculator reads the verifier's state. It is taken where the
model runner passes it on, in ``propose_draft_token_ids``, which is wrapped for that. This is no interface that vLLM
promises to keep, hence the check of its version.
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

TESTED = "0.32"
SETTING = "mlp_speculator"
_METHOD = "propose_draft_token_ids"
_READ = ("sample_hidden_states", "spec_decode_metadata")


class MLPProposer:
    """Drafts with an MLP speculator, inside vLLM.

    Args:
        vllm_config: The engine's settings; ``additional_config["mlp_speculator"]`` names the draft.

    Raises:
        UsageError: The draft is not named, does not fit the verifier, or has fewer heads than tokens are asked for.
        RuntimeError: vLLM is of another version than this was tested with.
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
            raise UsageError(f"{additional[SETTING]} is no MLP speculator, but a {type(draft).__name__}")
        self._draft = draft
        self._check(model.get_hidden_size(), model.get_vocab_size())
        self._draft.to(device=vllm_config.device_config.device, dtype=model.dtype)
        self._states = torch.empty(0)
        self._num_draft_tokens: list[int] | None = None
        _hand_over_states()

    def load_model(self, *_: Any, **__: Any) -> None:
        """Do nothing: the draft is there already."""

    def take_states(self, states: Tensor, num_draft_tokens: list[int] | None) -> None:
        """Take the verifier's states, after its final norm, at the places where it was asked for a token.

        Args:
            states: States [places, H]: of each request one behind its last known token and one behind each drafted.
            num_draft_tokens: How many were drafted for each request; None for none.
        """
        self._states = states
        self._num_draft_tokens = num_draft_tokens

    @torch.inference_mode()
    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **_: Any
    ) -> list[list[int]]:
        """Draft a greedy chain for each request.

        Args:
            sampled_token_ids: Tokens that the verifier has just decided of each request; none while it reads a prompt.
            num_tokens_no_spec: Tokens of each request so far.
            token_ids_cpu: Those tokens; not looked at.

        Returns:
            The drafted tokens of each request; none where none were decided, or where its context is full.
        """
        going = [
            row
            for row, tokens in enumerate(sampled_token_ids)
            if tokens and num_tokens_no_spec[row] + self._steps < self._longest
        ]
        proposals: list[list[int]] = [[] for _ in sampled_token_ids]
        if not going:
            return proposals
        states = self._states[self._last_places(sampled_token_ids)[going]]
        tokens = torch.tensor([sampled_token_ids[row][-1] for row in going], device=states.device)
        drafted = []
        for step in range(self._steps):
            states = self._draft.advance(states, tokens, step)
            tokens = self._draft.logits(states, step).argmax(-1)
            drafted.append(tokens)
        for row, chain in zip(going, torch.stack(drafted, dim=1).tolist(), strict=True):
            proposals[row] = chain
        return proposals

    def _last_places(self, sampled_token_ids: list[list[int]]) -> Tensor:
        """Return where the state before the last decided token of each request stands, int64 [requests].

        Behind n accepted tokens and one of the verifier's own, that is the (n + 1)-th place of the request.
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
                f"num_speculative_tokens is {self._steps}, but the draft has {config.num_layers} heads; ask for no more"
            )


def _check_version() -> None:
    takes = inspect.signature(getattr(GPUModelRunner, _METHOD, _check_version)).parameters
    if not vllm.__version__.startswith(f"{TESTED}.") or not set(_READ) <= takes.keys():
        raise RuntimeError(
            f"specforge_mlp.vllm reads what vLLM {TESTED} keeps to itself (GPUModelRunner.{_METHOD}), and this is vLLM "
            f"{vllm.__version__}; install vllm=={TESTED}.*"
        )


@functools.cache
def _hand_over_states() -> None:
    """Let model runners hand the verifier's states to a proposer of this module before they ask it."""
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
