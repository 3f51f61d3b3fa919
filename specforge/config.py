"""The contents of a checkpoint's ``config.json``, in the ``speculators`` layout.

A speculator's configuration holds the algorithm's own fields, the ``transformer_layer_config`` of its decoder layers
and a ``speculators_config``: algorithm, proposal methods and verifier. Unknown fields are kept and written back; fields
with a wrong type or value are rejected by name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from specforge.errors import UsageError, describe_invalid, nearest_path
from specforge.files import whole_file
from specforge.hookspecs import Algorithm, ProposalMethod
from specforge.registry import installed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG_NAME = "config.json"

NOT_COMPUTED = frozenset(
    {
        *("_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version", "is_encoder_decoder"),
        *("output_attentions", "output_hidden_states", "return_dict", "torchscript", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "task_specific_params", "use_cache", "pretraining_tp"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("initializer_range", "attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    }
)
"""Fields of a model's configuration that do not affect what a trained model computes for given tokens."""


class StoredConfig(BaseModel):
    """Base class of everything stored in ``config.json``: keeps unknown fields, checks known ones."""

    model_config = ConfigDict(extra="allow", validate_assignment=True, arbitrary_types_allowed=True)


class VerifierConfig(StoredConfig):
    """Which verifier a speculator belongs to.

    Attributes:
        name_or_path: Hub id or folder of the verifier; None if unknown.
        architectures: Class names of the verifier, from its own ``config.json``.
        fingerprint: Identifies the verifier, see ``specforge.verifier.fingerprint``; not stored if unknown.
    """

    name_or_path: str | None = None
    architectures: list[str] = Field(default_factory=list)
    fingerprint: str | None = None

    @model_serializer(mode="wrap")
    def _without_an_unknown_fingerprint(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {name: one for name, one in values.items() if name != "fingerprint" or one is not None}

    @classmethod
    def from_config(cls, config: PreTrainedConfig, name_or_path: str | None = None) -> Self:
        """Describe a verifier by its transformers configuration.

        Args:
            config: The verifier's configuration.
            name_or_path: Hub id or folder; by default the one that the configuration was loaded from.
        """
        name = name_or_path or getattr(config, "name_or_path", None) or None
        return cls(name_or_path=name, architectures=list(config.architectures or []))

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Describe the verifier in a folder or on the hub.

        Args:
            name_or_path: Hub id or folder.
            **options: Passed to ``transformers.AutoConfig.from_pretrained`` (``revision``, ``trust_remote_code``, ...).
        """
        from transformers import AutoConfig

        return cls.from_config(AutoConfig.from_pretrained(name_or_path, **options), str(name_or_path))


def verifier_difference(stored: str, own: str) -> str:
    """Describe in a few words how two verifiers differ.

    Args:
        stored: A stored fingerprint, see ``specforge.verifier.fingerprint``.
        own: The fingerprint of the current verifier, which differs.
    """
    if re.fullmatch(r"[0-9a-f]{16}", stored):
        return "the first is a fingerprint of an earlier version of specforge, which covered less of a verifier"
    weights, computation = stored.partition("-")[0] != own.partition("-")[0], stored[16:] != own[16:]
    return " and ".join(["different weights"] * weights + ["a different computation in config.json"] * computation)


class TokenProposalConfig(StoredConfig):
    """How a draft proposes candidate tokens; each proposal method has a subclass.

    Attributes:
        proposal_type: Name of the proposal method.
    """

    proposal_type: str


class SpeculatorsConfig(StoredConfig):
    """The part of a speculator's configuration about its algorithm, proposal methods and verifier.

    Attributes:
        algorithm: Name of the algorithm that the draft was trained with.
        proposal_methods: The proposal methods that the draft is meant for, each with its settings.
        default_proposal_method: ``proposal_type`` of the one to use by default.
        verifier: The verifier that the draft belongs to.
    """

    algorithm: str
    proposal_methods: list[SerializeAsAny[TokenProposalConfig]]
    default_proposal_method: str
    verifier: VerifierConfig

    @field_validator("proposal_methods", mode="before")
    @classmethod
    def _typed_proposal_methods(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [_typed_proposal(one) if isinstance(one, dict) else one for one in value]

    @model_validator(mode="after")
    def _default_is_listed(self) -> Self:
        listed = [one.proposal_type for one in self.proposal_methods]
        if self.default_proposal_method not in listed:
            raise ValueError(f"default_proposal_method {self.default_proposal_method!r} is not one of {listed}")
        return self


class SpeculatorModelConfig(StoredConfig):
    """Base class of every speculator's configuration; an algorithm's subclass adds its own fields.

    Attributes:
        speculators_model_type: Identifies the subclass; the name of the algorithm whose plugin provides it.
        architectures: Class names of the draft network.
        speculators_version: Version of the library that wrote the layout.
        dtype: Data type of the stored weights, such as ``"bfloat16"``.
        tie_word_embeddings: Always false: a draft never ties its head to its embeddings.
        speculators_config: Algorithm, proposal methods and verifier; None if unknown.
    """

    model_type_name: ClassVar[str] = ""
    proposal_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that affect only how candidates are chosen, not what the network computes."""

    speculators_model_type: str = ""
    architectures: list[str] = Field(default_factory=list)
    speculators_version: str = "0.9.0"
    dtype: str | None = None
    tie_word_embeddings: bool = False
    speculators_config: SpeculatorsConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _own_type(cls, values: Any) -> Any:
        if isinstance(values, dict) and cls.model_type_name:
            values = {"speculators_model_type": cls.model_type_name, **values}
            given = values["speculators_model_type"]
            if given != cls.model_type_name:
                raise ValueError(f"speculators_model_type is {given!r}, but {cls.__name__} is {cls.model_type_name!r}")
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> Self:
        """Build the configuration from a parsed ``config.json``.

        On the base class, it finds the subclass by ``speculators_model_type`` among the installed plugins.

        Args:
            values: The parsed file.
            where: Source to name in error messages.

        Raises:
            UsageError: A field is missing or wrong, or no installed plugin provides the type.
        """
        target = cls if cls.model_type_name else _subclass_for(values, where)
        try:
            return target.model_validate(dict(values))
        except ValidationError as error:
            raise UsageError(f"{where}: {describe_invalid(error)}") from None

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Read ``config.json`` from a folder or from the hub.

        Args:
            name_or_path: Folder or hub id.
            **options: Passed to ``huggingface_hub.hf_hub_download`` (``revision``, ``token``, ``cache_dir``, ...).

        Raises:
            UsageError: There is no such folder, file or repository, or the file is not a valid configuration.
        """
        path = find_file(name_or_path, CONFIG_NAME, **options)
        return cls.from_dict(read_json(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of the file that ``save_pretrained`` writes, as plain JSON values."""
        return self.model_dump(mode="json")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` into a folder, which is created if needed; the write is atomic."""
        with whole_file(Path(folder) / CONFIG_NAME) as file:
            file.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def network_settings(config: SpeculatorModelConfig) -> dict[str, Any]:
    """Return the fields of a draft's configuration that describe its network: ``{"layers.rope": ...}``.

    Those about its verifier, its proposal methods and the writer are left out.
    """
    values = config.to_dict()
    for name in ("speculators_config", "speculators_version", "dtype", "architectures", "transformers_version"):
        values.pop(name, None)
    return dict(flatten(values))


def flatten(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts with their paths, such as ``"model.draft.num_layers"``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def find_file(name_or_path: str | os.PathLike[str], file_name: str, **options: Any) -> Path:
    """Return the local path of a file in a folder or hub repository; the latter is downloaded.

    Raises:
        UsageError: Neither the folder nor the hub has it.
    """
    folder = Path(name_or_path)
    try:
        if folder.is_dir():
            if not (folder / file_name).is_file():
                raise UsageError(f"{folder} holds no {file_name}")
            # Libraries give misleading errors for files without read permission, so check it here.
            (folder / file_name).open("rb").close()
            return folder / file_name
    except PermissionError as error:
        raise UsageError(f"{folder / file_name} cannot be read: {error.strerror}") from None
    if folder.is_file():
        raise UsageError(f"{folder} is a file; give the folder or hub id that holds {file_name}")
    if folder.is_absolute() or not _looks_like_hub_id(str(name_or_path)):
        raise UsageError(
            f"{name_or_path} is not a folder (working directory {Path.cwd()}), nor a hub id like 'owner/name'."
            f"{nearest_path(folder)}"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(name_or_path), file_name, **options))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{name_or_path} is not a local folder, and {file_name} cannot be downloaded from the hub: {reason}"
            f"{nearest_path(folder)}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        UsageError: It cannot be read, is not valid JSON, or is not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # A lone surrogate can be read, but not written.
        json.dumps(values, ensure_ascii=False).encode()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(part and not part.startswith(".") for part in parts)


def _subclass_for(values: dict[str, Any], where: str) -> type[Any]:
    model_type = values.get("speculators_model_type")
    if not isinstance(model_type, str):
        raise UsageError(
            f"{where}: speculators_model_type is missing, so this is not a checkpoint in the speculators layout; "
            "specforge convert reads other formats"
        )
    try:
        return config_class(model_type)
    except UsageError as error:
        raise UsageError(f"{where}: speculators_model_type: {error}") from None


def config_class(algorithm: str) -> type[SpeculatorModelConfig]:
    """Return the configuration class of an algorithm.

    Raises:
        UsageError: No installed plugin provides it, or the plugin gives it two names.
    """
    descriptor = installed().find(Algorithm, algorithm)
    found: type[SpeculatorModelConfig] = installed().load(descriptor, "config")
    # Another installed algorithm's configuration may be used: its plugin then reads the checkpoints.
    if found.model_type_name not in installed().all(Algorithm):
        raise UsageError(
            f"the plugin of the algorithm {algorithm!r} is inconsistent: model_type_name of {descriptor.config} is "
            f"{found.model_type_name!r}; its checkpoints would not be found again"
        )
    return found


def _typed_proposal(values: dict[str, Any]) -> TokenProposalConfig:
    methods = installed().all(ProposalMethod)
    name = values.get("proposal_type")
    if name not in methods:
        # A method of another tool is kept unchanged.
        return TokenProposalConfig.model_validate(values)
    proposal: TokenProposalConfig = installed().load(methods[name], "config").model_validate(values)
    return proposal
