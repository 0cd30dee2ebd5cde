"""Compare a method with its reference arrays: `python tools/check_golden.py METHOD FOLDER`.

FOLDER holds official-key weights, inputs and outputs, and the sizes of the model in `model_config.json`. Weights go
through the method's own conversion. A row per array: largest absolute and relative error, tolerance, ok or FAIL.

Exit status: 0 all rows ok; 1 a FAIL, or an array that no check read; 2 no such method or folder.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from foveate.checkpoints import suggestion
from foveate.errors import FoveateError, InputError
from golden import GoldenFolder, Report


def methods() -> list[str]:
    """Methods that have a check: the modules of tools/golden."""
    return sorted(path.stem for path in (Path(__file__).parent / "golden").glob("[!_]*.py"))


def check(method: str, folder: Path) -> tuple[Report, GoldenFolder]:
    """Run the checks of a method on a folder.

    Raises:
        InputError: unknown method, or a folder that is missing, unreadable or of another layout.
    """
    if method not in methods():
        known = ", ".join(methods())
        raise InputError(f"there is no golden check for {method!r}{suggestion(method, methods())}; there is {known}.")
    folder_of_arrays, report = GoldenFolder(folder), Report()
    importlib.import_module(f"golden.{method}").check(folder_of_arrays, report)
    return report, folder_of_arrays


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a method with its reference arrays.")
    parser.add_argument("method", help="one of: " + ", ".join(methods()))
    parser.add_argument("folder", type=Path, help="folder of reference arrays")
    options = parser.parse_args(arguments)
    try:
        report, folder = check(options.method, options.folder)
    except FoveateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(report.lines()))
    notes = [*report.notes, *(f"nothing depends on the setting {name}" for name in folder.unread_settings())]
    for note in notes:
        print(f"note: {note}")
    unread = folder.unread()
    for name in unread:
        print(f"FAIL: nothing read {name}")
    print(f"{len(report.rows)} arrays compared, {report.failures} failed, {len(unread)} unread")
    return 1 if report.failures or unread else 0


if __name__ == "__main__":
    sys.exit(main())
