"""Rows of Excel's workbooks: the first sheet, its first row that is not empty as the header, formulas as their values.

A cell becomes the text that one fixed form of csv would hold: numbers with a point and Excel's 15 digits, dates as
2025-11-03, times as 14:30:00, TRUE and FALSE. How a cell is displayed plays no part.
"""

from __future__ import annotations

import datetime
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafit.data.sources.files import LINE_LIMIT_BYTES, is_bomb
from lorafit.data.sources.lines import RawRows, too_long
from lorafit.data.sources.tables import Records, name_fields
from lorafit.errors import DataError
from lorafit.kinds.fields import listed

UNPACKED_LIMIT_BYTES = 256 << 20
"""Of all parts of a workbook together: openpyxl holds the texts of its cells."""
_LAST_ROW = 1 << 20


def read_workbook(path: Path, columns: Sequence[str]) -> RawRows:
    """Rows of an xlsx file, known by their number in the sheet. Empty ones are passed over.

    Args:
        columns: Source columns that the recipe maps; numbers mean that there is no header.

    Raises:
        DataError: openpyxl is not installed, or the file is no workbook, damaged or too large.
    """
    return name_fields(_read_records(path), columns, "every value needs a header above it")


def unread_sheets(path: Path) -> str | None:
    """Says which sheets with content are not read, in a file that `read_workbook` reads; None for none."""
    book = _open_book(path)
    try:
        first, *rest = book.worksheets
        others = [sheet.title for sheet in rest if any(any(row) for row in sheet.iter_rows(values_only=True))]
    finally:
        book.close()
    if not others:
        return None
    return f"only the first sheet, '{first.title}', is read, not {listed(others)}; save what is needed as files"


def _read_records(path: Path) -> Records:
    book = _open_book(path)
    width = 0
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # what a writer says of its size may be wrong, and rows are filled up to it
        for number, cells in enumerate(sheet.iter_rows(), start=1):
            if number > _LAST_ROW:
                raise DataError(f"has more than {_LAST_ROW:,} rows", line=number)
            record = _read_cells(cells)
            if isinstance(record, DataError):
                yield number, record
                continue
            while record and not record[-1]:
                record.pop()
            if record:
                width = width or len(record)
                yield number, record + [""] * (width - len(record))
    except DataError:
        raise
    except Exception as error:  # openpyxl lets through whatever its parsers of zip and XML raise
        raise _damaged(error) from None
    finally:
        book.close()


def _read_cells(cells: Sequence[Any]) -> list[str] | DataError:
    wrong = next((cell for cell in cells if cell.data_type == "e"), None)
    if wrong is not None:
        return DataError(f"cell {wrong.coordinate} holds the error {wrong.value}", todo="correct its formula")
    record = [_as_text(cell.value) for cell in cells]
    return too_long() if sum(map(len, record)) > LINE_LIMIT_BYTES else record


def _as_text(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).upper()
        case float():
            return format(value, ".15g")  # what Excel computes with and shows: 0.3, not 0.30000000000000004
        case datetime.datetime():
            return f"{value:%Y-%m-%d}" if value.time() == datetime.time() else f"{value:%Y-%m-%d %H:%M:%S}"
        case datetime.time():
            return f"{value:%H:%M:%S}"
        case datetime.timedelta():
            minutes, seconds = divmod(round(value.total_seconds()), 60)
            return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        case _:
            return str(value).replace("_x000D_", "\r")  # how the file format spells a carriage return


def _open_book(path: Path) -> Any:
    try:
        import openpyxl
    except ImportError:
        todo = 'install it with: pip install "lorafit[xlsx]", or save the sheet as CSV UTF-8'
        raise DataError("is an Excel workbook, and openpyxl is not installed", todo=todo) from None
    warnings.filterwarnings("ignore", module="openpyxl")  # of validations and formats that concern no value
    try:
        with zipfile.ZipFile(path) as packed:
            unpacked_bytes = sum(part.file_size for part in packed.infolist())
        if unpacked_bytes > UNPACKED_LIMIT_BYTES or is_bomb(unpacked_bytes, path.stat().st_size):
            raise DataError(f"unpacks to {unpacked_bytes >> 20:,} MiB", todo="save the sheet as CSV UTF-8")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        if not book.worksheets:
            raise DataError("has no sheet of cells")
        return book
    except DataError:
        raise
    except Exception as error:  # as above
        raise _damaged(error) from None


def _damaged(error: Exception) -> DataError:
    what = " ".join(str(error).split())[:80]
    todo = "open it in Excel and save it anew, without a password, as .xlsx"
    return DataError(f"cannot be read as an Excel workbook: {what or type(error).__name__}", todo=todo)
