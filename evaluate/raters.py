"""Ratings of pictures by people, and how well somebody agrees with them: GenAI-Bench (arXiv 2406.13743), as published.

    genai_image.json      {ID: {"prompt": TEXT, "models": {MODEL: [three ratings from 1 to 5]}}}
    MODEL/ID.jpeg         the pictures; .jpg, .png and .webp are read as well

Agreement is rank correlation (Spearman's rho, Kendall's tau-b) over the pictures of each model, over all pictures, over the
models' means, and within prompts: over the pictures of one prompt, and then the mean of all prompts. Where people say the same
of all pictures there is no order to find, and nothing is counted; where only the other side does, it has found none: 0.

How well one person agrees with the others is measured in the same way, each rater against the mean of the other two; the three
are averaged. The file does not say who rated what, so "a rater" is a place in its lists.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from checkpoint import InputError, read_text
from evaluate.benchmark import Figure, average

LOW = 1
HIGH = 5
RATERS = 3
COEFFICIENTS = ("Spearman", "Kendall")
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
FORM = '{"ID": {"prompt": TEXT, "models": {MODEL: [three ratings from 1 to 5]}}}'


class Rated(NamedTuple):
    """A prompt, and what people say of the pictures that models made for it."""

    id: str
    prompt: str
    ratings: dict[str, list[float]]


def correlation(name: str, found: list[float], people: list[float]) -> float | None:
    """See above for what counts where one side says the same of all."""
    if len(set(people)) < 2:
        return None
    if len(set(found)) < 2:
        return 0.0
    stats = scipy_stats()
    measure = stats.spearmanr if name == "Spearman" else stats.kendalltau
    return float(measure(found, people).statistic)


def scipy_stats():
    """Imported where it is needed: nothing else in the repository asks for scipy."""
    try:
        from scipy import stats
    except ImportError:
        raise InputError("scipy is missing, which --human needs: pip install -r evaluate/requirements.txt") from None
    return stats


# ----------------------------------------------------------------------------------------------------------------- reading


def read_ratings(file: Path, n: int | None = None) -> tuple[list[Rated], list[str]]:
    """The first n prompts of a file, and a line for each picture left out because a rating is off the scale.

    The published file has two such ratings, 41 and 33.
    """
    try:
        value = json.loads(read_text(file))
    except ValueError as e:
        raise InputError(f"{file}: not valid JSON ({e})") from None
    if not isinstance(value, dict) or not value:
        raise InputError(f"{file}: must be {FORM}")
    rated = []
    left_out = []
    for id, entry in list(value.items())[:n]:
        if not well_formed(entry) or "/" in id or id.startswith("."):
            raise InputError(f"{file}: {id[:40]!r} is not as it should be, {FORM}")
        ratings = {}
        for model, given in entry["models"].items():
            if all(LOW <= rating <= HIGH for rating in given):
                ratings[model] = given
            else:
                left_out.append(f"{id} of {model} ({', '.join(map(str, given))})")
        rated.append(Rated(id, entry["prompt"], ratings))
    return rated, left_out


def well_formed(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not isinstance(entry.get("models"), dict):
        return False
    return all(is_rating(given) and "/" not in model for model, given in entry["models"].items())


def is_rating(given: object) -> bool:
    """Three numbers; JSON's true is an int to Python, and no rating."""
    if not isinstance(given, list) or len(given) != RATERS:
        return False
    return all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in given)


def find_pictures(folder: Path, rated: list[Rated]) -> dict[tuple[str, str], Path]:
    """{(ID, model): file} of the pictures that are there; InputError if none is."""
    if not folder.is_dir():
        raise InputError(f"--pictures {folder}: no such folder")
    found = {}
    for one in rated:
        for model in one.ratings:
            files = (folder / model / f"{one.id}{suffix}" for suffix in SUFFIXES)
            file = next((file for file in files if file.is_file()), None)
            if file:
                found[one.id, model] = file
    if not found:
        raise InputError(f"--pictures {folder}: holds none of the pictures; as published they lie there as MODEL/ID.jpeg")
    return found


# --------------------------------------------------------------------------------------------------------------- agreement


class Points(NamedTuple):
    """The pictures of one prompt."""

    by_model: dict[str, tuple[float, float]]  # what was found, what people say
    within: dict[str, float | None]  # the correlation over them, by coefficient


def points(by_model: dict[str, tuple[float, float]]) -> Points:
    """Within prompts is computed here, once, and not for every draw of the bootstrap."""
    found = [pair[0] for pair in by_model.values()]
    people = [pair[1] for pair in by_model.values()]
    return Points(by_model, {name: correlation(name, found, people) for name in COEFFICIENTS})


def by_judge(rated: list[Rated], values: dict[tuple[str, str], float]) -> list[Points]:
    """values: {(ID, model): what the judge said}; against the mean of all three raters."""
    rows = []
    for one in rated:
        judged = {model: ratings for model, ratings in one.ratings.items() if (one.id, model) in values}
        rows.append(points({model: (values[one.id, model], sum(three) / RATERS) for model, three in judged.items()}))
    return rows


def by_raters(rated: list[Rated]) -> list[list[Points]]:
    """For every prompt three Points: each rater against the mean of the other two."""

    def against(ratings: list[float], rater: int) -> tuple[float, float]:
        others = [rating for k, rating in enumerate(ratings) if k != rater]
        return ratings[rater], sum(others) / len(others)

    rows = []
    for one in rated:
        places = [{model: against(three, k) for model, three in one.ratings.items()} for k in range(RATERS)]
        rows.append([points(place) for place in places])
    return rows


def agreement(rows: list[Points]) -> dict[str, Figure]:
    """{"MODEL, Spearman": ..., "all pictures, ...", "models' means, ...", "within prompts, ..."}; n counts pictures, for the
    last two models and prompts."""
    models = dict.fromkeys(model for row in rows for model in row.by_model)
    places = {model: [row.by_model[model] for row in rows if model in row.by_model] for model in models}
    every = [pair for pairs in places.values() for pair in pairs]
    means = [tuple(sum(side) / len(side) for side in zip(*pairs, strict=True)) for pairs in places.values()]
    figures = {}
    for place, pairs in {**places, "all pictures": every, "models' means": means}.items():
        for name in COEFFICIENTS:
            value = correlation(name, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
            figures[f"{place}, {name}"] = Figure(math.nan if value is None else value, len(pairs))
    for name in COEFFICIENTS:
        known = [row.within[name] for row in rows if row.within[name] is not None]
        figures[f"within prompts, {name}"] = average(known)
    return figures


def agreement_of_raters(rows: list[list[Points]]) -> dict[str, Figure]:
    """The mean of the three raters."""
    each = [agreement([row[k] for row in rows]) for k in range(RATERS)]
    figures = {}
    for name in each[0]:
        value = sum(one[name].value for one in each) / RATERS
        # Not every rater tells the same prompts' pictures apart.
        figures[name] = Figure(value, min(one[name].n for one in each))
    return figures
