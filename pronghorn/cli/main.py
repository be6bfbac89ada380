"""The ``pronghorn`` command and its list of commands."""

from __future__ import annotations

import typer

from . import doctor, plan, quickstart, report, version

app = typer.Typer(
    name="pronghorn",
    help="Fine-tune language models and train them by GRPO: one process, one copy of the weights.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
)
app.command(name="doctor")(doctor.doctor)
app.command(name="plan")(plan.plan)
app.command(name="quickstart")(quickstart.quickstart)
app.command(name="report")(report.report)
app.command(name="version")(version.version)


if __name__ == "__main__":
    app()
