"""Matched probes as the command line shows them."""

import io

from torch import Tensor

from skipit.theory.pooling import SITES
from skipit.theory.probes import Probes


def probe_table(probes: Probes) -> str:
    """What a linear probe reads of the answer before and after each layer, one line per layer and modality."""
    from rich.console import Console
    from rich.table import Table

    about = probes.about
    title = (
        f"{about['rows']} rows, {about['splits']} splits in halves, penalty {about['penalty']:g}, seed {about['seed']}"
    )
    table = Table(title=title, title_justify="left")
    for name in ("layer", "states", "accuracy in", "out", "gap", "V-information in", "out (nats)", "gap"):
        table.add_column(name, justify="left" if name == "states" else "right")
    for layer in range(len(probes.gain)):
        for k, site in enumerate(SITES):
            if probes.rows[k] == 0:
                continue
            table.add_row(
                str(layer),
                "last token" if site == "last" else f"{site}, mean",
                *(f"{value:.1%}" for value in probes.accuracy[layer : layer + 2, k].tolist()),
                _with_error(probes.accuracy_gain[layer, k], probes.accuracy_gain_error[layer, k], 100, "+.1f"),
                *(f"{value:.3f}" for value in probes.information[layer : layer + 2, k].tolist()),
                _with_error(probes.gain[layer, k], probes.gain_error[layer, k], 1, "+.3f"),
            )
        table.add_section()
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    drawn = "\n".join(line.rstrip() for line in text.getvalue().splitlines())
    kept = "; ".join(
        f"{site}: {int(classes)} answers in {int(rows)} rows, H_V(Z) {float(entropy):.3f} nats"
        for site, classes, rows, entropy in zip(SITES, probes.classes, probes.rows, probes.entropy, strict=True)
        if rows > 0
    )
    return f"{drawn}\n{kept}.\nGaps are out minus in, with their standard error; accuracy in points."


def _with_error(value: Tensor, error: Tensor, scale: float, form: str) -> str:
    return f"{scale * float(value):{form}} ± {scale * float(error):{form[1:]}}"
