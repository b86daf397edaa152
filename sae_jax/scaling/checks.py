"""What to doubt about a fit, in words."""


_WIDE = 10.0  # ratio of the ends of a scale's interval
_SAME_EXPONENT = 0.01
_DEAD = 0.5  # fraction of dead latents above which a run's size is not its dictionary's


def warnings(fit, cost) -> list[str]:
    out = list(fit.results.notes)
    out += _weak(fit)
    out += _estimators(fit)
    out += dead_latents(fit.results)
    if fit.holdout is None:
        out.append(
            "nothing is held out: without the largest budgets too few points would be left to "
            "fit this law, so that its extrapolation is untested"
        )
    if fit.law.name in ("chinchilla", "joint"):
        if fit.frontier is None:
            out.append(
                "the fitted loss does not fall in both d_sae and tokens, so there is no "
                "compute-optimal frontier"
            )
        elif cost is None:
            out.append(
                "the results do not say what a token costs (no column flops, nor d_in); compute "
                "is counted as d_sae x tokens"
            )
    return out


def dead_latents(results) -> list[str]:
    dead = results.columns.get("dead_fraction")
    if dead is None or not (dead > _DEAD).any():
        return []
    return [
        f"{(dead > _DEAD).sum()} of {len(dead)} runs have more than half of their latents dead "
        "(dead_fraction); their d_sae overstates what they use"
    ]


def _weak(fit) -> list[str]:
    out = []
    for (name, value), positive in zip(fit.estimate.params.items(), fit.law.positive, strict=True):
        low, high = fit.ci95[name]
        interval = f"its 95% interval is {low:.4g} to {high:.4g}"
        if positive and name == "E":
            if low < 0.01 * fit.results.loss.min() and value > 0.01 * fit.results.loss.min():
                out.append(
                    f"weakly identified: E is {value:.4g}, but {interval}: these runs do not say "
                    "whether the loss has a floor"
                )
        elif positive and high > _WIDE * max(low, 1e-300):
            out.append(f"weakly identified: {name} is {value:.4g}, but {interval}")
        elif not positive and low < 0 < high:
            out.append(f"weakly identified: {name} is {value:.4g}, but {interval}, and holds 0")
    return out


def _estimators(fit) -> list[str]:
    out = []
    values = fit.exponents(fit.estimate.theta)
    drawn = fit.exponents(fit.drawn.theta)
    for name, what in (("d_sae_exponent", "n*"), ("loss_exponent", "the loss")):
        if name not in values:
            continue
        low, high = fit.spread(drawn[name], values[name])
        others = {e: fit.exponents(other.theta) for e, other in fit.alternatives.items()}
        apart = {
            e: v[name]
            for e, v in others.items()
            if abs(v[name] - values[name]) > _SAME_EXPONENT and not low <= v[name] <= high
        }
        if apart:
            said = ", ".join(f"{v:.3f} by {e}" for e, v in apart.items())
            out.append(
                f"estimators disagree on the exponent of {what} in compute: {values[name]:.3f} by "
                f"{fit.estimate.estimator}, {said}"
            )
    return out
