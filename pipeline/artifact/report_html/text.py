"""A report's figures as text, and the recipe in one line."""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.pipeline.artifact.report_html.markup import Markup, tag

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

NONE = "–"
"""Stands where there is no figure."""


def exact(value: float | None, form: str) -> Markup:
    """A figure in a readable form that carries its exact value, for the pointer and for programs."""
    if value is None:
        return tag("span", NONE)
    text = f"{value:{form}}"
    return tag("data", text, value=repr(value), title=None if text == repr(value) else repr(value))


def percent(share: float) -> str:
    """A share with one decimal: `61.3 %`."""
    return f"{100 * share:.1f} %"


def count(number: int, singular: str, plural: str | None = None) -> str:
    """`1 block`, `1,024 blocks`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def power_of_ten(exponent: int) -> str:
    """`10⁻³`; 1 and 10 as they are."""
    return str(10**exponent) if exponent in (0, 1) else "10" + str(exponent).translate(_SUPERSCRIPTS)


def recipe_line(document: Mapping[str, object]) -> str:
    """A recipe in one line: `W3 per channel, GPTQ + low rank 16 (svd, full whitening)`.

    document: as a report holds it, with the recipe under `recipe`. What it does not know or understand it leaves out:
    the page shows the whole recipe elsewhere.
    """
    recipe = _mapping(document.get("recipe"))
    weights = _mapping(recipe.get("weights"))
    if not weights:
        return "recipe below"
    activations = _mapping(recipe.get("activations"))
    if isinstance(weights.get("format"), str):
        inputs = f"A{activations.get('bits', '?')}, " if activations else ""
        return f"{inputs}weights stored as {weights['format']}" + _compensation(recipe)
    bits = f"W{weights.get('bits', '?')}" + (f"A{activations.get('bits', '?')}" if activations else "")
    group = weights.get("group_size")
    parts = [f"{bits} per channel" if group is None else f"{bits} in groups of {group}"]
    if weights.get("symmetric") is False:
        parts.append("asymmetric")
    kind = _mapping(weights.get("quantizer")).get("kind")
    if kind is not None:
        parts.append(str(kind).upper())
    line = ", ".join(parts) + _compensation(recipe)
    overrides = recipe.get("overrides")
    if isinstance(overrides, list | tuple) and overrides:
        line += f"; {count(len(overrides), 'override')}"
    return line


def _compensation(recipe: Mapping[str, object]) -> str:
    compensation, residual = _mapping(recipe.get("compensation")), _mapping(recipe.get("residual"))
    store = f" + residual store of {residual.get('bits', '?')} bits" if residual else ""
    kind = compensation.get("kind", "none")
    if kind == "none":
        return store or ", no compensation"
    traits = [str(kind)]
    whitening = compensation.get("whitening")
    if whitening is not None:
        traits.append("no whitening" if whitening == "none" else f"{whitening} whitening")
    return f" + low rank{_rank(compensation.get('rank'))} ({', '.join(traits)}){store}"


def _rank(rank: object) -> str:
    match rank:
        case {"count": int(number)}:
            return f" {number}"
        case {"fraction": float(share) | int(share)}:
            return f" {100 * share:g} %"
        case dict() if rank:
            return " by " + ", ".join(f"{name} {value}" for name, value in sorted(rank.items()))
    return ""


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
