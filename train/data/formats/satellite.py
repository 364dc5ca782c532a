"""What annotation files of satellite images say of the place and the time: polygons of WKT, dates of ISO 8601.

Numbers that are not given are NaN, the missing value of `models.conditions.numbers`.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from models.conditions.numbers import NumberField

FIELDS = {  # and their ranges, in degrees, metres per pixel, shares, and numbers of the calendar
    "lon": NumberField(-180, 180, cyclic=True),
    "lat": NumberField(-90, 90),
    "gsd": NumberField(0, 10),
    "cloud_cover": NumberField(0, 1),
    "off_nadir_angle": NumberField(0, 90),
    "sun_azimuth": NumberField(0, 360, cyclic=True),
    "sun_elevation": NumberField(-90, 90),
    "target_azimuth": NumberField(0, 360, cyclic=True),
    "year": NumberField(1980, 2100),
    "month": NumberField(0, 12, cyclic=True),
    "day": NumberField(0, 31),
}


def decode_polygon(wkt: str) -> np.ndarray:
    """Reads the outer ring of "POLYGON ((x y, x y, ...))" as (n, 2) float64 without the last point, which is the first.

    ValueError for other text, and for fewer than three corners.
    """
    head, _, rest = wkt.partition("((")
    ring, end, _ = rest.partition(")")
    try:
        points = np.array([[float(number) for number in point.split()] for point in ring.split(",")])
    except ValueError:
        points = np.zeros((0, 2))
    if head.strip().upper() != "POLYGON" or not end or points.ndim != 2 or points.shape[1:] != (2,) or len(points) < 4:
        raise ValueError(f"got {wkt[:60]!r}, wanted POLYGON ((x y, x y, x y, x y)): check the annotation file")
    return points[:-1]


def mean_position(polygons: Sequence[np.ndarray]) -> dict[str, float]:
    """Returns lon and lat of the mean of polygons (n, 2) of longitudes and latitudes, NaN without any.

    Each polygon counts once, at the mean of its corners.
    """
    lon, lat = np.mean([polygon.mean(0) for polygon in polygons], 0) if polygons else (math.nan, math.nan)
    return {"lon": float(lon), "lat": float(lat)}


def decode_date(text: str | None) -> dict[str, float]:
    """Reads "2017-05-21T19:19:19.000Z" as year, month and day, NaN for None and ""; ValueError for no date."""
    if not text:
        return dict.fromkeys(("year", "month", "day"), math.nan)
    try:
        date = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"got the date {text!r}, wanted one such as 2017-05-21T19:19:19Z") from error
    return {"year": float(date.year), "month": float(date.month), "day": float(date.day)}


def decode_years(text: str | None) -> float:
    """Reads a date as a number of years, to the day, such as 2017.39; NaN for None and "", ValueError for no date."""
    date = decode_date(text)
    return date["year"] + (date["month"] - 1) / 12 + (date["day"] - 1) / 365.25


def find_number(content: Mapping[str, Any], name: str) -> float:
    """Returns a number of a JSON object, NaN if it is null or not there; ValueError for anything else."""
    value = content.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"got {name} {value!r}, wanted a number: check the annotation file")
    return float(value)
