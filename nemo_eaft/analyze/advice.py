"""One line of advice, by a rule of thumb that is written down here and in docs/analyze.md.

What counts is the part of the push that confident conflicts give under plain fine-tuning (SFT): the sum of their
gradient norms at the logits, divided by that of all tokens. The bounds are chosen, not measured: nobody has shown that
forgetting starts at one of them. So the line says what EAFT would hold back, and not what comes of it.
"""

from __future__ import annotations

from nemo_eaft.analyze.tally import ALPHAS, Tally

LITTLE, MUCH = 0.02, 0.10
"""Below the first EAFT has little to hold back, from the second on much."""
LEFT = 0.01
"""Part of the push that conflicts may keep under the alpha that is suggested."""


def conflict_share(tally: Tally, alpha: float) -> float:
    """Part of the gradient norm that conflicts give under EAFT of `alpha`, one of ALPHAS; 0 without a gradient."""
    total, conflicts = tally.by_alpha[ALPHAS.index(alpha)]
    return float(conflicts / total) if total > 0 else 0.0


def sft_share(tally: Tally, named: dict[str, float]) -> float:
    """The same under SFT. named: sums by name."""
    return named["conflict_gradient"] / named["gradient"] if named["gradient"] > 0 else 0.0


def kept(tally: Tally, named: dict[str, float], alpha: float) -> float:
    """Part of the push of all other tokens that EAFT of `alpha` leaves."""
    total, conflicts = tally.by_alpha[ALPHAS.index(alpha)]
    others = named["gradient"] - named["conflict_gradient"]
    return float((total - conflicts) / others) if others > 0 else 0.0


def suggest(tally: Tally, named: dict[str, float]) -> dict[str, object]:
    """`effect` (little, some, much), `alpha`, and `text`: the line."""
    if tally.tokens == 0:
        return {"effect": "unknown", "alpha": None, "text": "no token in the loss: nothing can be said"}
    share = sft_share(tally, named)
    effect = "little" if share < LITTLE else "some" if share < MUCH else "much"
    alpha = 1.0
    if effect == "much":
        alpha = next((each for each in ALPHAS if each >= 1.0 and conflict_share(tally, each) <= LEFT), ALPHAS[-1])
    left = conflict_share(tally, alpha)
    rest = kept(tally, named, alpha)
    text = (
        f"confident conflicts give {effect} of the push of SFT: {tally.conflicts / tally.tokens:.2%} of the tokens, "
        f"{share:.1%} of the gradient norm; EAFT with alpha={alpha:g} would keep {rest:.0%} of the norm of the others "
        f"and make that of conflicts {left:.1%} of what is left (rule of thumb). Whether it forgets less is to be "
        f"compared with loss=sft: conflicts that repeat may win all the same"
    )
    return {"effect": effect, "alpha": alpha, "text": text}
