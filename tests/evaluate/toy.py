"""A benchmark of four items, for tests. Its judge is asked all three sorts of questions."""

from evaluate.benchmark import Request, floor, grouped, mean

NAME = "toy"
TITLE = "Four houses"
SOURCE = {"id": "none", "revision": "1", "licence": "Apache-2.0"}
PUBLISHED = [{"system": "X", "figures": {"overall": 0.8}, "judge": "another", "source": "a paper"}]


def requests(items):
    for colour in ("red", "blue", "green", "yellow"):
        yield Request(colour, [{"role": "user", "content": f"Draw a {colour} house."}], {"group": colour[0]})


def score(request, answer, judge):
    told = judge.rating("How clear is the text?", answer.texts[0], low=1, high=5)
    if not answer.pictures:
        return {"colour": floor(0.0), "told": told, "both": floor({"style": 0, "content": 0})}
    picture = answer.pictures[-1]
    return {
        "colour": judge.yes(f"Is there a {request.id} house?", picture),
        "told": told,
        "both": judge.fields("Rate the picture.", picture, keys={"style": (0, 10), "content": (0, 10)}),
    }


def aggregate(rows):
    groups = grouped(rows, lambda row: row["meta"]["group"])
    return {"overall": mean(rows, "colour"), "told": mean(rows, "told")} | {g: mean(r, "colour") for g, r in groups.items()}
