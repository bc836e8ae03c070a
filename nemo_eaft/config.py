"""Settings of the loss: one frozen, validated dataclass."""

import dataclasses
import difflib
import math
import numbers
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

Gate = Literal["eaft", "none", "dft", "mask", "sigmoid"]

GATES: tuple[str, ...] = get_args(Gate)

# Settings that only one gate reads. Everything else also shapes the reported entropy and conflicts.
_READ_BY_ONE_GATE = {"alpha": "eaft", "gate_slope": "sigmoid", "gate_centre": "sigmoid"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EAFTConfig:
    """How a token's cross-entropy is weighted by the entropy of the model's own prediction.

    Raises ``ValueError`` naming the field, the value and the allowed range. Warns (``UserWarning``)
    when a setting is changed that the chosen gate does not read.
    """

    alpha: float = 1.0
    """Exponent of the normalised entropy in ``weight = (H / normaliser) ** alpha``, at least 0; no unit.
    0 gives plain cross-entropy. Read by ``gate="eaft"`` only."""

    top_k: int | None = 20
    """How many of a row's largest logits the entropy is taken over, at least 2. ``None``: the whole
    vocabulary. A value above the vocabulary size means the whole vocabulary too."""

    normalizer: float | None = None
    """Entropy in nats that gives weight 1, above 0. ``None``: ln K, or ln V when ``top_k`` is None, which is
    the paper's definition and keeps the weight in [0, 1]. 3.0 is what the authors' released code divides
    by; 1.0 leaves the entropy un-normalised, so that weights can exceed 1."""

    gate: Gate = "eaft"
    """What turns cross-entropy and entropy into a weight: see ``nemo_eaft.gates``."""

    gate_slope: float = 10.0
    """Steepness of the sigmoid gate per unit of H / normaliser, above 0. Read by ``gate="sigmoid"`` only."""

    gate_centre: float = 0.5
    """H / normaliser at which the sigmoid gate is one half, at least 0. Read by ``gate="sigmoid"`` only."""

    conflict_probability: float = 0.1
    """A confident conflict has a label probability below this, in [0, 1]. Read by ``gate="mask"`` and
    metrics."""

    conflict_entropy: float = 0.2
    """A confident conflict has H / normaliser below this, at least 0. Read by ``gate="mask"`` and metrics."""

    ignore_index: int = -100
    """Label value of tokens that do not count: loss 0 and gradient 0."""

    def __post_init__(self) -> None:
        self._set("alpha", _real("alpha", self.alpha, "a finite number of at least 0", minimum=0.0))
        if self.top_k is not None:
            allowed = "an integer of at least 2, or None for the whole vocabulary"
            self._set("top_k", _integer("top_k", self.top_k, allowed, minimum=2))
        if self.normalizer is not None:
            allowed = "a finite number of nats above 0, or None for ln K"
            self._set("normalizer", _real("normalizer", self.normalizer, allowed, above=0.0))
        if not isinstance(self.gate, str) or self.gate not in GATES:
            raise _invalid("gate", self.gate, f"one of {', '.join(map(repr, GATES))}")
        self._set("gate_slope", _real("gate_slope", self.gate_slope, "a finite number above 0", above=0.0))
        allowed = "a finite number of at least 0"
        self._set("gate_centre", _real("gate_centre", self.gate_centre, allowed, minimum=0.0))
        self._set(
            "conflict_probability",
            _real(
                "conflict_probability",
                self.conflict_probability,
                "a number in [0, 1]",
                minimum=0.0,
                maximum=1.0,
            ),
        )
        self._set("conflict_entropy", _real("conflict_entropy", self.conflict_entropy, allowed, minimum=0.0))
        allowed = "an integer that fits in 64 bits"
        index = _integer("ignore_index", self.ignore_index, allowed, minimum=-(2**63), maximum=2**63 - 1)
        self._set("ignore_index", index)
        self._warn_without_effect()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "EAFTConfig":
        """Build a config from plain keys and values, such as a parsed YAML section.

        Raises ``ValueError`` for a key that is not a field, with the nearest field as a suggestion, and for
        every invalid value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in mapping:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(names)}"
                raise ValueError(f"unknown EAFT setting {key!r}: {hint}")
        return cls(**mapping)

    def plain(self) -> "EAFTConfig":
        """The same entropy settings with every weight 1: the plain cross-entropy that validation reports."""
        kept = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _READ_BY_ONE_GATE
        }
        return EAFTConfig(**{**kept, "gate": "none"})

    def effective_top_k(self, vocab_size: int) -> int | None:
        """How many logits the entropy is taken over: K, at most ``vocab_size``; None means all of them."""
        return None if self.top_k is None else min(self.top_k, vocab_size)

    def entropy_normalizer(self, vocab_size: int) -> float:
        """Entropy in nats that gives weight 1: ``normalizer`` where set, else ln of the number of logits
        used."""
        return self.entropy_bound(vocab_size) if self.normalizer is None else self.normalizer

    def entropy_bound(self, vocab_size: int) -> float:
        """The largest entropy a row can have, in nats: ln of the number of logits used."""
        return math.log(self.effective_top_k(vocab_size) or vocab_size)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _warn_without_effect(self) -> None:
        for field in dataclasses.fields(self):
            gate = _READ_BY_ONE_GATE.get(field.name)
            if gate is not None and gate != self.gate and getattr(self, field.name) != field.default:
                warnings.warn(
                    f"{field.name}={getattr(self, field.name)!r} has no effect: gate={self.gate!r} does not "
                    f"read it, only gate={gate!r} does",
                    UserWarning,
                    stacklevel=4,
                )


def _invalid(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name} must be {allowed}, got {value!r}")


def _real(
    name: str,
    value: object,
    allowed: str,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
) -> float:
    # bool is a number to Python; a setting of True is a mistake.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _invalid(name, value, allowed)
    number = float(value)
    if not math.isfinite(number) or not minimum <= number <= maximum or number <= above:
        raise _invalid(name, value, allowed)
    return number


def _integer(name: str, value: object, allowed: str, *, minimum: int, maximum: int = 2**63 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _invalid(name, value, allowed)
    number = int(value)
    if not minimum <= number <= maximum:
        raise _invalid(name, value, allowed)
    return number
