"""The words of sketchbook: English in small, what the user asks, what the assistant says, and talk without pictures.

Every sentence of the assistant before a picture states what the picture shows; `checker.claims` reads it back. A ~ before a
phrasing keeps it out of training: these are HELD_OUT, written without sight of any other list here. They measure how far the
language model understands what it has never been asked, until somebody writes training phrasings after them.
"""

from __future__ import annotations

import re

from scenes import COLOURS, FIGURES, SUBJECTS, Thing, main_part

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PLURALS = {"fish": "fish", "snowman": "snowmen", "butterfly": "butterflies", "ice cream": "ice creams"}


def plural(subject: str) -> str:
    return PLURALS.get(subject, subject + "s")


def a(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def articles(text: str) -> str:
    """'an orange cat' where a template said 'a orange cat'; single spaces."""
    return re.sub(r"\b([Aa]) (?=(?:orange|ice|oval|engine|eye)\b)", r"\1n ", re.sub(r"\s+", " ", text).strip())


def noun_phrase(subject: str, colour: str | None = None, count: int = 1) -> str:
    """'a red house', 'three fish'."""
    words = f"{colour} " if colour else ""
    return a(words + subject) if count == 1 else f"{NUMBERS[count]} {words}{plural(subject)}"


def part_phrase(name: str, colour: str) -> str:
    """'a blue door', 'black wheels'; names in s are plurals (or grass)."""
    return f"{colour} {name}" if name.endswith("s") else a(f"{colour} {name}")


def is_are(name: str) -> str:
    return "are" if name.endswith("s") and name != "grass" else "is"


def listing(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def with_parts(thing: Thing, names=None) -> str:
    """' with a blue roof and a yellow door': the drawn parts but the main one, or those named."""
    parts = SUBJECTS[thing.subject].parts[:thing.drawn]
    said = [part_phrase(p.name, c) for i, (p, c) in enumerate(zip(parts, thing.colours, strict=False))
            if (p.name in names if names is not None else i != main_part(thing.subject))]
    return " with " + listing(said) if said else ""


def sentence(text: str) -> str:
    """Capital and full stop."""
    text = articles(text)
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


# ---------------------------------------------------------------------------------------------------------------------------
# What the two say. {x} is the noun phrase asked for, {s} a subject, {c} a colour, {p} a part, {b} a background.

ASK = {
    "lesson": [
        "How do I draw {x}?", "How can I draw {x}?", "Show me how to draw {x}.", "Teach me to draw {x}.",
        "I want to draw {x}.", "Please show me how to draw {x} step by step.", "How to draw {x}",
        "Can you teach me how to draw {x}?", "Draw {x} step by step.", "A drawing lesson, please: {x}.",
        "What are the steps to draw {x}?", "Step by step, please: {x}.", "I would like to learn how to draw {x}.",
        "Help me draw {x}.", "Explain how to draw {x}.", "Let us draw {x} together.",
        "Take me through the steps of drawing {x}.", "Give me a drawing lesson with {x}.",
        "Lead me through a drawing of {x}.", "I would like to draw {x}. How do I do it?"],
    "one": [
        "Draw {x}.", "Please draw {x}.", "A picture of {x}.", "{x}", "Can you draw {x}?", "Paint {x}.", "I would like {x}.",
        "Show me {x}.", "A photo of {x}", "Make a picture of {x}.", "Could you paint {x} for me?", "An image of {x}",
        "I need {x}.", "Give me a picture of {x}.", "I want to see {x}.", "Let me see {x}.", "Create {x}.",
        "Show {x}, please.", "Drawing of {x}", "Can I have {x}?", "I want {x}, please."],
    "recolour": [
        "Make the {p} {c}.", "Now make the {p} {c}.", "Paint the {p} {c}.", "Change the {p} to {c}.", "Can the {p} be {c}?",
        "I want the {p} to be {c}.", "Turn the {p} {c}.", "Please colour the {p} {c}.", "The {p} should be {c}.",
        "Let the {p} be {c}.", "Colour the {p} in {c}.", "Could you make the {p} {c}?", "Draw the {p} in {c}.",
        "Use the colour {c} for the {p}.", "Please repaint the {p} in {c}.", "I would like the {p} in the colour {c}."],
    "remove": [
        "Remove {x}.", "Take {x} away.", "Please take away {x}.", "Erase {x}.", "I do not want {x}.", "Delete {x}.",
        "Can you remove {x}?", "Take out {x}.", "Please erase {x}.", "Leave out {x}.", "Let {x} go away.",
        "Draw it without {x}.", "I want to be rid of {x}."],
    "add": [
        "Add {x} {r} {y}.", "Put {x} {r} {y}.", "Draw {x} {r} {y} too.", "Please add {x} {r} {y}.",
        "Can you put {x} {r} {y}?", "I also want {x} {r} {y}.", "Place {x} {r} {y}.", "There should be {x} {r} {y}.",
        "Another thing, please: {x} {r} {y}.", "I would like {x} {r} {y}.", "Now put {x} {r} {y}."],
    "add_part": [
        "Add {x} to the {s}.", "The {s} needs {x}.", "Please give the {s} {x}.", "Draw {x} on the {s}.",
        "My {s} has no {p}. Add {x}.", "Finish the {s} with {x}.", "How about {x} on the {s}?", "Could the {s} have {x}?",
        "Give the {s} {x}.", "The {s} should have {x}.", "I miss {x} on the {s}."],
    "move": [
        "Move {x} {to}.", "Put {x} {to}.", "Please move {x} {to}.", "Can you move {x} {to}?", "Shift {x} {to}.",
        "I want {x} {to}.", "Push {x} {to}.", "Let {x} be {to}.", "Could you place {x} {to}?", "Bring {x} {to}.",
        "Move {x} so that it is {to}."],
    "background": [
        "Make the background {b}.", "Change the background to {b}.", "Use a {b} background.", "Now with a {b} background.",
        "Please paint the background {b}.", "I want a {b} background.", "Let the background be {b}.",
        "Paint it on a {b} background.", "Can the background be {b}?", "Give it a {b} background.",
        "Turn the background {b}."],
    "multi": [
        "Put {x} of the first picture {r} {y} of the second.", "Draw {x} from picture one {r} {y} from picture two.",
        "Put both in one picture: {x} {r} {y}.", "Combine the two pictures with {x} {r} {y}.",
        "Place {x} of the first picture {r} {y} of the second.", "Bring both pictures together: {x} {r} {y}.",
        "Make one of the two pictures, {x} {r} {y}."],
    "multi_colour": [
        "Draw the {s} of the first picture in the colour of the {t}.", "Paint the {s} in the colour of the {t}.",
        "Give the {s} the colour of the {t} in picture two.", "Make the first {s} look like the {t} in colour.",
        "Use the colour of the {t} for the {s}.", "The {s} should have the colour of the {t}.",
        "Let the {s} take the colour of the {t}."],
    "story": [
        "Tell me a story about {x}.", "Tell a story about {x}.", "A story about {x}, please.",
        "Write a short story with {x}.", "I want a picture story about {x}.", "Make up a story with {x}.",
        "I would like a story about {x}.", "What did {x} do today?", "Read me a story about {x}.", "What happens to {x}?",
        "Once there was {x}. What happened?"],
}
# ---------------------------------------------------------------------------------------------------------------------------
# What training never says. The keys are those of ASK, the first phrasing in an item of TALK, or names used by what asks.

HELD_OUT = {
    "lesson": [
        "I'd love to learn to draw {x}, one step at a time please",
        "Walk me through drawing {x} slowly, I'm a total beginner.", "step by step instructions for {x}, please",
        "My daughter wants to know how {x} can be drawn, please explain each step", "Give me a drawing lesson on {x}.",
        "Show me bit by bit what to do so I can sketch {x} myself", "tutorial for drawing {x}",
        "What do I draw first and what comes next when making {x} on paper?"],
    "one": [
        "Draw {x} for me, would you?", "i want a picture of {x}", "Could I please have a nice drawing with {x} on it?",
        "Just paint {x}.", "a picture showing {x} pls", "Make me an image of {x}",
        "Let me see {x} in a finished picture, no explanations needed.", "It would be great if you drew {x} for my wall",
        "hey, can u sketch {x}", "My son is asking for {x}, please create one picture of that."],
    "recolour": [
        "Paint the {p} {c}, please.", "can you make the {p} {c} instead", "I would rather have the {p} in {c}.",
        "Change the colour of the {p} to {c}", "Please turn the {p} in this picture {c}.",
        "Would you mind colouring the {p} with {c} for me?", "Use {c} for the {p}, I don't like how it looks now"],
    "remove": [
        "Take {x} out of the picture.", "I don't want {x} in there any more", "Could you get rid of {x} for me?",
        "the same picture but without {x}", "Everything looks good, only {x} has to go, so delete that please."],
    "add": [
        "could you put {x} {r} {y} in this picture please", "I'd like to see {x} {r} {y} as well",
        "There should also be {x} {r} {y}, can you draw that in?", "we still need {x} {r} {y} here",
        "Please place {x} {r} {y} and leave the rest as it is."],
    "add_part": [
        "The {s} is missing {x}, please add that.", "my {s} still needs {x}", "Can you finish the {s} by giving it {x}?",
        "I forgot to draw {x} on my {s}, could you do it for me?", "put {x} on the {s} pls",
        "Something is lacking here: the {s} ought to have {x}. Draw the missing bit."],
    "move": [
        "can you shift {x} {to} please", "I want {x} to go {to} of the picture instead",
        "Please take {x} from where it is now and bring that {to}", "{x} would look better if you pushed it {to}",
        "Would it be possible to slide {x} over {to}?"],
    "background": [
        "could the paper be {b} please", "I'd like a {b} background behind everything", "change the page colour to {b}",
        "Please fill in the whole background with {b} and keep the drawing itself.", "Can you put this on {b} paper instead?"],
    "multi": [
        "From these two pictures make one with {x} {r} {y}.", "can you combine both images so that we see {x} {r} {y}",
        "Put {x} {r} {y} in a single picture, using the two I gave you.",
        "I have two drawings here, please join them: {x} {r} {y}", "one new picture out of these two, {x} {r} {y}",
        "Could you take things from both pictures and show {x} {r} {y} together?"],
    "multi_colour": [
        "Draw the {s} from the first picture in the colour of the {t} from the second.",
        "can the {s} in picture one get the same colour as the {t} in picture two",
        "I want the first picture's {s} painted like the {t} in the second one",
        "Take the colour of the {t} in the second image for the first image's {s}.",
        "Look at the {t} in picture two, then give the {s} of picture one that colour",
        "Please make the {s} (first drawing) match the {t} (second drawing) in colour."],
    "story": [
        "Tell me a story in pictures about {x}.", "i want a picture story with {x}",
        "Could you make a little illustrated story where {x} has an adventure?",
        "Draw a bedtime story about {x} for my kids, several pictures please", "a short comic about {x}",
        "Please think up a tale of {x} and show it picture by picture.", "What happens to {x} one day? Tell it with drawings!",
        "Can we have a series of pictures that tells the story of {x}?"],
    "Hello!": [
        "Hello there, nice to meet you!", "good morning my friend", "Hi, how are you?"],
    "Who are you?": [
        "what is your name and what are you", "Could you please introduce yourself?"],
    "What can you do?": [
        "tell me what you can help me with", "Which kinds of jobs are you able to handle for me?"],
    "What do I need to draw?": [
        "What do I need for drawing?", "which things should I get ready before I draw",
        "Can you list the stuff someone needs to make a drawing?"],
    "What do I paint with?": [
        "What tool do people paint with?", "which thing do you hold in your hand to paint",
        "Tell me what is used to put paint on paper."],
    "How many colours do you know?": [
        "what is the number of colours you can use", "Count the colours you know for me."],
    "Which colours do you know?": [
        "name all your colours please", "Can you give me a list of the colours you are able to use?"],
    "Thank you!": [
        "Thank you so much!", "thanks, that was really helpful", "That's lovely, I am very grateful to you."],
    "Goodbye": [
        "Goodbye, see you tomorrow!", "bye, I have to go now", "That's all for today, take care!"],
    "What colour is grass?": [
        "which colour should i paint the grass", "Tell me the usual colour of grass in a meadow."],
    "What colour is the sky?": [
        "What is the colour of the sky?", "on a sunny day the sky has which colour",
        "Which colour do I take for painting the sky?"],
    "What is a triangle?": [
        "how many sides has a triangle got", "Can you explain to me what triangle means?"],
    "What is a square?": [
        "A square, what is that exactly?", "tell me the number of sides in a square",
        "Do you know how many sides a square has?"],
    "What comes first in a lesson?": [
        "What should I start a drawing with?", "where do i begin when I draw something",
        "Which thing is best to do first in a new drawing?"],
    "How do I clean a brush?": [
        "my paintbrush is dirty, how can I wash it", "What is the right way to get paint out of a brush?"],
    "Is drawing hard?": [
        "do you think it is difficult to learn drawing", "How easy or hard is it to draw, really?"],
    "mix": [
        "What colour do I get when I mix {a} and {b}?", "{a} plus {b} makes what colour",
        "If I stir {a} paint into {b} paint, what will come out?", "Tell me the result of mixing {a} with {b}.",
        "i blend {a} and {b} together, which colour is that then", "Which colour do {a} and {b} give?"],
    "mix_how": [
        "which colours together make {c}", "I have run out of {c} paint, what can I mix to get it?",
        "Tell me what to blend so that {c} comes out.",
        "Is there a way to make {c} from other colours, and which ones do I need?",
        "what goes into {c} when you mix it yourself"],
    "after": [
        "Which number comes after {n}?", "what is the next number following {n}",
        "I'm counting and I've reached {n}, what do I say next?", "Tell me the number right after {n}, please.",
        "when you count up, what follows {n}", "{n}, and then which number?"],
    "sum": [
        "what do {n} and {m} make together", "Please add {n} and {m} for me.",
        "If I have {n} apples and get {m} more, how many are there in all?", "{n} + {m} equals what",
        "Can you tell me the sum of {n} and {m}?"],
    "parts": [
        "What parts does {x} consist of?", "which parts make up {x}", "Name all the parts of {x}, please.",
        "Can you tell me what {x} is made of, piece by piece?", "I'd like a list of every part that belongs to {x}",
        "when drawing {x}, what are the different parts"],
    "part_count": [
        "number of parts in {x} please", "Into how many pieces can {x} be split for drawing?",
        "how many steps does it take to draw {x}", "Could you count the parts of {x} for me?",
        "I wonder how many different parts are needed for {x}."],
    "part_shape": [
        "What shape do I use for the {p} of {x}?", "which shape is best for drawing the {p} of {x}",
        "Tell me the shape of the {p} on {x}.", "For {x}, what shape should I pick when I get to the {p}?",
        "shape for the {p} of {x} please", "Do you draw the {p} of {x} as a circle, a square or something else?"],
    "q_colour": [
        "What colour is the {p} in this picture?", "tell me the colour of the {p}", "Which colour does the {p} have here?",
        "Can you see what colour someone gave the {p}?", "the {p} in the image, what colour has it got",
        "I can't see colours well, so please say which one the {p} is."],
    "q_count": [
        "How many {xs} are in the picture?", "count the {xs} here please", "What number of {xs} do you see in this drawing?",
        "Could you tell me how many {xs} it shows?", "number of {xs} in this image",
        "I see some {xs} on the page, but how many are there exactly?"],
    "q_what": [
        "What is in this picture?", "tell me what you see here", "Which thing does the drawing show?",
        "can you recognise what has been drawn", "Please say what this is a picture of.",
        "I found this image, any idea what it's supposed to be?"],
    "q_background": [
        "which colour has the paper behind the drawing",
        "Tell me the background colour, please.", "Can you see what colour they used for the background of this picture?",
        "background colour of this image", "I'd like to know which colour the page itself is."],
    "q_where": [
        "Where is {x} in the picture?", "on which side can I find {x}", "Can you tell me what part of the image {x} is in?",
        "Please find {x} and say whereabouts on the page that is.", "position of {x} in this drawing",
        "i can't spot {x}, where should I look"],
    "q_is": [
        "Is there {x} in the picture?", "can you see {x} anywhere in this image", "Does the drawing show {x}?",
        "Please check whether {x} can be found here.", "do we have {x} on this page, yes or no",
        "I'm not sure if {x} is in this picture, is it?"],
}


def unseen(key: str, **words) -> list[str]:
    """The held-out phrasings of something asked, marked as such; with words, filled in."""
    return [f"~{t.format(**words) if words else t}" for t in HELD_OUT[key]]


ASK = {key: [*phrasings, *unseen(key)] for key, phrasings in ASK.items()}

RELATION_WORDS = {"left": ["to the left of", "left of", "on the left of"],
                  "right": ["to the right of", "right of", "on the right of"],
                  "above": ["above", "over"], "below": ["below", "under"]}

SAY = {
    "scene": ["Here is {x}{b}.", "This is {x}{b}.", "Here you see {x}{b}.", "I drew {x}{b}.", "Look, {x}{b}.",
              "Sure, here is {x}{b}.", "Of course. This is {x}{b}."],
    "scenes": ["Here are {x}{b}.", "These are {x}{b}.", "Here you see {x}{b}.", "I drew {x}{b}.", "Look, {x}{b}.",
               "Sure, here are {x}{b}."],
    "recolour": ["Now the {p} {is} {c}.", "The {p} {is} {c} now.", "I painted the {p} {c}.", "Sure, the {p} {is} now {c}.",
                 "Here the {p} {is} {c}."],
    "remove": ["I removed {x}.", "{x} is gone.", "I took {x} away.", "Here is the picture without {x}."],
    "add": ["I added {x} {r} {y}.", "Now there is {x} {r} {y}.", "I put {x} {r} {y}."],
    "add_part": ["I added {x} to the {s}.", "Now the {s} has {x}.", "Here is the {s} with {x}."],
    "move": ["Now {x} is {at}.", "I moved {x} {to}.", "{x} is {at} now."],
    "background": ["Now the background is {b}.", "The background is {b} now.", "I painted the background {b}.",
                   "Here it is on a {b} background."],
    "open": ["Sure!", "Let us begin.", "Of course.", "Good idea!", "With pleasure.", "Here we go."],
    "close": ["Your {x} is ready.", "That is all, the {x} is done!", "The {x} is finished.", "Well done!", "And that is {ax}!",
              "Now you have {ax}."],
    "start": ["{lead} draw {look} {where} for the {p}{b}.", "{lead} start with {look} {where} for the {p}{b}.",
              "{lead} paint {look} {where}{b}, this is for the {p}."],
    "part": ["{lead} draw {look} {where} for the {p}.", "{lead} put {look} {where} as the {p}.",
             "{lead} add {look} {where} for the {p}.", "{lead} paint {look} {where} as the {p}.",
             "{lead} place {look} {where} for the {p}."],
    "story alone": ["Then {the} was {place}.", "{the} went on and was {place}.", "Later {the} was alone {place}."],
    "story last": ["At last {the} slept {place}.", "In the end {the} was {place}."],
    "story stood": ["Then {the} stood {r} {y} {place}.", "{the} sat down {r} {y} {place}.", "Soon {the} was {r} {y} {place}."],
    "story met": ["{the} met {y} {place}.", "Then {the} saw {y} {place}.", "{the} found {y} {place}.",
                  "Soon {the} played with {y} {place}."],
}
# How one asks for a move, how one says where it led.
MOVES = {"left": (["to the left side", "to the left"], "on the left side"),
         "right": (["to the right side", "to the right"], "on the right side"),
         "top": (["to the top"], "at the top"), "bottom": (["to the bottom"], "at the bottom")}

# Talk without pictures: questions, answers, words the answer must contain.
TALK = [
    (["Hello!", "Hi", "Hello there"], ["Hello! What shall we draw?", "Hi! What would you like to draw?"],
     ["what", "draw"]),
    (["Good morning", "Good evening!"], ["Good day! What shall we draw?", "Hello! What do you want to draw?"],
     ["what", "draw"]),
    (["Who are you?", "What are you?"],
     ["I am a sketchbook. I teach drawing.", "I am a sketchbook that draws simple pictures."], ["sketchbook"]),
    (["What can you do?", "How can you help me?"],
     ["I can draw pictures, change them and tell stories.", "I can teach you to draw, step by step."], ["can"]),
    (["What do I need to draw?", "What do I need for a drawing?", "Which things does one draw with?"],
     ["You need paper and a pencil.", "One draws on paper with a pencil."],
     ["paper", "pencil"]),
    (["What do I paint with?", "What does a painter use?"], ["You paint with a brush.", "A painter uses a brush and paint."],
     ["brush"]),
    (["How many colours do you know?", "How many colours have you got?"], ["I know nine colours.", "There are nine colours."],
     ["nine"]),
    (["Which colours do you know?", "Name your colours."], ["Red, orange, yellow, green, blue, purple, pink, brown and black."],
     list(COLOURS)),
    (["Thank you!", "Thanks", "Thank you very much.", "That is great, thank you."],
     ["You are welcome!", "With pleasure."], [["welcome", "pleasure"]]),
    (["Goodbye", "Bye!", "See you later."], ["Goodbye!", "Goodbye, see you soon."], ["goodbye"]),
    (["What colour is grass?", "Which colour has grass?"], ["Grass is green."], ["green"]),
    (["What colour is the sky?"], ["The sky is blue."], ["blue"]),
    (["What is a triangle?", "How many sides does a triangle have?"],
     ["A triangle is a shape with three sides.", "A triangle has three sides."], ["three"]),
    (["What is a square?", "How many sides does a square have?"],
     ["A square is a shape with four sides.", "A square has four sides."], ["four"]),
    (["What comes first in a lesson?", "How do I start a drawing?"], ["Start with a big shape.", "Draw a big shape first."],
     ["big", "shape"]),
    (["How do I clean a brush?"], ["Clean the brush with water."], ["water"]),
    (["Is drawing hard?", "Is it hard to draw?"], ["No, it is easy, step by step.", "No, drawing is easy."], ["easy"]),
]
TALK = [([*asks, *(unseen(asks[0]) if asks[0] in HELD_OUT else ())], replies, words) for asks, replies, words in TALK]
MIXES = {("red", "yellow"): "orange", ("blue", "yellow"): "green", ("red", "blue"): "purple", ("red", "green"): "brown"}


def talk_items() -> list[tuple[list[str], list[str], list[str]]]:
    """All talk without pictures, with the facts that follow from the tables: mixtures, sums, the parts of the subjects."""
    items = list(TALK)
    for (one, two), mixed in MIXES.items():
        for x, y in ((one, two), (two, one)):
            items.append(([f"What do I get when I mix {x} and {y}?", f"Which colour do {x} and {y} make?",
                           f"How do I mix {x} with {y}?", *unseen("mix", a=x, b=y)],
                          [f"{x} and {y} make {mixed}.", f"You get {mixed}."], [mixed]))
        items.append(([f"How do I mix {mixed}?", f"How can I make {mixed}?", *unseen("mix_how", c=mixed)],
                      [f"Mix {one} and {two}.", f"You mix {one} with {two}."], [one, two]))
    for i in range(1, 5):
        items.append(([f"What comes after {NUMBERS[i]}?", f"Which number follows {NUMBERS[i]}?",
                       *unseen("after", n=NUMBERS[i])],
                      [f"After {NUMBERS[i]} comes {NUMBERS[i + 1]}."], [NUMBERS[i + 1]]))
        for j in range(1, 6 - i):
            total = NUMBERS[i + j]
            items.append(([f"What is {NUMBERS[i]} and {NUMBERS[j]}?", f"How much is {NUMBERS[i]} plus {NUMBERS[j]}?",
                           *unseen("sum", n=NUMBERS[i], m=NUMBERS[j])],
                          [f"{NUMBERS[i]} and {NUMBERS[j]} make {total}.", f"That is {total}."], [total]))
    for name in FIGURES:
        parts, x = SUBJECTS[name].parts, a(name)
        names = listing([p.name if p.name.endswith("s") else a(p.name) for p in parts])
        items.append(([f"What parts does {x} have?", f"Which parts belong to {x}?", f"What is {x} made of?",
                       *unseen("parts", x=x)], [f"{x} has {names}.", f"It has {names}."], [p.name for p in parts]))
        number = NUMBERS[len(parts)]
        items.append(([f"How many parts does {x} have?", f"How many steps does {x} take?", *unseen("part_count", x=x)],
                      [f"{x} has {number} parts.", f"{x} takes {number} steps."], [number]))
        for part in parts:
            shape, verb = part.look.replace("{} ", ""), is_are(part.name)
            items.append(([f"What shape {verb} the {part.name} of {x}?", f"Which shape {verb} the {part.name} of {x}?",
                           *unseen("part_shape", p=part.name, x=x)],
                          [f"The {part.name} {verb} {shape}.", f"Draw {shape}."], [shape.split()[-1]]))
    return items


TALK_ITEMS = talk_items()
