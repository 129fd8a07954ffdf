"""What the measurements say, in sentences, computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from heddle.report import signed
from heddle.study import _blocks, _budget, _int8


def of(section: str, result: dict[str, Any]) -> list[str]:
    """The sentences on one section's result."""
    name = "budget" if section.startswith("budget") else section
    return {"budget": _of_budget, "blocks": _of_blocks, "int8": _of_int8, "sampling": _of_sampling, "dsa": _of_dsa}[
        name
    ](result)


def _of_budget(result: dict[str, Any]) -> list[str]:
    said = []
    for rival in _budget.RIVALS:
        rows = [row for row in result["rows"] if row["method"] == rival and "loss_against_qk" in row]
        if not rows:
            continue
        loss = _verdicts((row["budget"], row["loss_against_qk"]) for row in rows)
        lower = [row["budget"] for row in rows if row["error_against_qk"] < 0]
        higher = [row["budget"] for row in rows if row["error_against_qk"] > 0]
        what = f"{_budget.LABELS[rival]} against QK at {result['context']:,} tokens"
        if not lower and not higher and not any(row["loss_against_qk"]["mean"] for row in rows):
            said.append(f"{what}: the same keys at every budget.")
            continue
        said.append(
            f"{what}: the loss is lower at {_budgets(loss[-1])}, higher at {_budgets(loss[1])}, and differs by less "
            f"than two standard errors at {_budgets(loss[0])}; the output error is lower at {_budgets(lower)} and "
            f"higher at {_budgets(higher)}."
        )
    share = result["values_longer_than_one"]
    if any(row["method"] == "oam" for row in result["rows"]):
        said.append(
            f"{100 * share:.0f} % of the values are longer than 1; to the others OAM's clipped term adds nothing."
        )
    return said


def _of_blocks(result: dict[str, Any]) -> list[str]:
    said = []
    rows = result["rows"]
    for density in dict.fromkeys(row["wanted_density"] for row in rows if row["wanted_density"] is not None):
        here = [row for row in rows if row["wanted_density"] == density]
        stem = next(row for row in here if row["method"] == "stem")
        verdicts = _verdicts(
            (_blocks.LABELS[row["method"]], row["loss_against_stem"]) for row in here if row["method"] != "stem"
        )
        below = [_blocks.LABELS[row["method"]] for row in here if row["error"] > stem["error"]]
        said.append(
            f"At about {100 * density:.0f} % of the pairs Stem moves the loss by "
            f"{_with_error(stem['loss_difference'])}. Its loss is lower than that of {_list(verdicts[1])}, higher than "
            f"that of {_list(verdicts[-1])}, and within two "
            f"standard errors of {_list(verdicts[0])}. Its output error is below that of {_list(below)}."
        )
    by_name = {row["method"]: row for row in rows if row["wanted_density"] == rows[0]["wanted_density"]}
    for name, what in (("stem_beta_0", "Without the value's term (β = 0)"), ("stem_flat", "Without the decay")):
        if name in by_name:
            row = by_name[name]
            error = row["error"] - by_name["stem"]["error"]
            said.append(
                f"{what} the loss changes by {_with_error(row['loss_against_stem'])}, the output error by "
                f"{100 * error:+.2f} percentage points, at about the same density.".replace("-", "−")
            )
    return said


def _of_int8(result: dict[str, Any]) -> list[str]:
    layers = len(result["rows"][0]["error_by_layer"])
    said = []
    for smooth, name, how in ((False, "plain", "without"), (True, "smooth", "with")):
        mean = {row["scheme"]: row["error"] for row in result["rows"] if row["smooth"] == smooth}
        parts = ", ".join(f"{_int8.LABELS[scheme]} {100 * error:.2f} %" for scheme, error in mean.items())
        order = list(mean.values()) == sorted(mean.values(), reverse=True)
        said.append(
            f"Mean error {how} K smoothing: {parts}. Baseline > B > A {'holds' if order else 'does not hold'} for the "
            f"mean, and in {result['ordered_layers'][name]} of {layers} layers."
        )
    return said


def _of_sampling(result: dict[str, Any]) -> list[str]:
    tests = result["tests"]
    failed = [test["label"] for test in tests if not test["unbiased"]]
    worst = max(tests, key=lambda test: test["largest_z"] / test["limit"])
    said = [
        f"{len(tests) - len(failed)} of {len(tests)} methods pass the test of unbiasedness over {result['seeds']:,} "
        f"seeds, each with a chance of at most {result['false_alarm']:g} of a false alarm; biased: {_list(failed)}. "
        f"The largest z is {worst['largest_z']:.2f} ({worst['label']}), the limit {worst['limit']:.2f}."
    ]
    for row in result["variances"]:
        if row["closed"] is not None:
            said.append(
                f"{row['label']}: variance {row['measured']:.4f} ± {row['se']:.4f}, closed form {row['closed']:.4f} "
                f"(z = {row['z']:+.1f}).".replace("-", "−")
            )
    slopes = ", ".join(f"{row['label']} {row['slope']:.2f}".replace("-", "−") for row in result["slopes"])
    identity = result["identity"]
    said.append(f"Slope of the variance over the number of samples, log-log: {slopes}.")
    said.append(
        f"{identity['differing']} of {identity['variants']} runs with other page sizes, schedules, split sizes and "
        "numbers of threads gave other bits."
    )
    return said


def _of_dsa(result: dict[str, Any]) -> list[str]:
    d = {name: found["mean"] for name, found in result["distributions"].items()}
    between = result["lru_between"]
    return [
        f"With k = {result['budget']} at {result['context']:,} tokens, means over layers and steps: the working set of "
        f"{result['window']} tokens is {d['working_set']:.2f} k, a token stays selected for {d['persistence']:.2f} "
        f"steps, lies {d['look_back']:.2f} k back, {d['new']:.2f} k are new in a step, and the next layer selects "
        f"{d['overlap']:.2f} k of the same.",
        f"LRU lies between FIFO and Belady's optimum at {between['true']} of {between['sizes']} sizes.",
    ]


def _verdicts(pairs: Iterable[tuple[Any, dict[str, float]]]) -> dict[int, list[Any]]:
    """By sign what differs by more than two standard errors; 0 for the rest."""
    found: dict[int, list[Any]] = {-1: [], 0: [], 1: []}
    for name, difference in pairs:
        mean, sure = difference["mean"], abs(difference["mean"]) > 2 * difference["se"]
        found[0 if not sure else 1 if mean > 0 else -1].append(name)
    return found


def _budgets(budgets: Sequence[int]) -> str:
    return f"budget{'s' * (len(budgets) > 1)} {_list(budgets)}" if budgets else "no budget"


def _list(names: Sequence[Any]) -> str:
    names = [str(name) for name in names]
    return ("; " if any("," in name for name in names) else ", ").join(names) or "none"


def _with_error(difference: dict[str, float]) -> str:
    return f"{signed(difference['mean'])} ± {difference['se']:.4f}"
