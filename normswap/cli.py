"""The command line: ``normswap demo``, ``normswap norms`` and ``normswap draw``.

torch and all that needs it is imported inside the commands, so that ``normswap --help`` is quick.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from normswap.demo.settings import FULL, QUICK
from normswap.errors import NormSwapError, OptionError

__all__ = ["app", "main"]

EPOCHS = f"{FULL.epochs}, or {QUICK.epochs} if quick"

app = typer.Typer(
    help="Find every normalization of a PyTorch model and swap it for another one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; what normswap refuses becomes one line on stderr and exit code 1."""
    try:
        app()
    except NormSwapError as error:
        print(f"normswap: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None


@app.command(help="Print every norm that a model's normalizations can be swapped for.")
def norms() -> None:
    """Print `normswap.list_norms`."""
    import normswap

    typer.echo(str(normswap.list_norms()))


@app.command(
    help="Draw what norms pool over, measured from the layers themselves: as text, or as a picture."
)
def draw(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Norms.", show_default="all that are layers of their own"),
    ] = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where a picture goes, a .png file.", dir_okay=False, show_default="text instead"
        ),
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--eval", help="As they are in eval mode, not in training.")
    ] = False,
) -> None:
    """Print `normswap.draw_text`, or draw the same norms as a PNG file.

    Args:
        names: registry names or aliases of norms; all if there are none.
        out: where the picture goes; without it text is printed.
        evaluation: draw them as they are in eval mode.

    Raises:
        UnknownNorm: no norm has one of the names.
        MissingExtra: a picture is asked for, and matplotlib is not installed.
        OptionError: the picture cannot be written where it is to go.
    """
    if out is None:
        import normswap

        typer.echo(normswap.draw_text(*names or (), training=not evaluation))
        return
    _check_target(out)
    from normswap.views.dependence import suited
    from normswap.views.norm_picture import draw_norms

    draw_norms(suited(names or ()), out, training=not evaluation)
    typer.echo(f"Picture: {out}")


@app.command(
    help="Train a small network on handwritten digits, then warm up, convert, calibrate and revert "
    "its norms."
)
def demo(
    *,
    out: Annotated[
        Path,
        typer.Option(help="Where the picture goes, a .png file.", dir_okay=False, writable=True),
    ] = Path("demo.png"),
    epochs: Annotated[
        int | None,
        typer.Option(help="How often to read the training set.", min=1, show_default=EPOCHS),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the batches.", min=0)] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Take few images: seconds instead of a minute.")
    ] = False,
) -> None:
    """Run the demo, print what it measured, and draw it.

    Args:
        out: where the picture goes.
        epochs: how long to train, if not as long as usual.
        seed: of the initial weights and of the order of the batches.
        quick: run on few images, for a look that takes seconds.

    Raises:
        MissingExtra: a library that the demo needs is not installed.
        OptionError: the picture cannot be written where it is to go.
    """
    started = time.perf_counter()
    _check_target(out)
    from normswap.demo.extras import require_extras

    require_extras()
    from normswap.demo.experiments import run
    from normswap.views.demo import draw_demo

    usual = QUICK if quick else FULL
    result = run(replace(usual, seed=seed, epochs=epochs or usual.epochs))
    typer.echo(str(result))
    draw_demo(
        out,
        title=f"normswap demo: {result.architecture}, {result.test_size} handwritten test digits",
        epochs=[(epoch.running, epoch.warmed) for epoch in result.epochs],
        groups=[(row.label, (row.copied, row.matched, row.calibrated)) for row in result.groups],
        original=result.round_trip.original,
        reverted=result.round_trip.reverted,
        samples=[(s.pixels, s.running, s.warmed) for s in result.samples],
    )
    typer.echo(f"\nPicture: {out}\nTime: {time.perf_counter() - started:.0f} s")


def _check_target(out: Path) -> None:
    """Refuse a place for the picture now rather than after the work is done."""
    if out.suffix.lower() != ".png":
        raise OptionError(f"--out={out}: the picture is a PNG; give a name that ends in .png")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OptionError(f"--out={out}: the folder {out.parent} is missing or not writable")
