"""Templated word problems with worked answers: the text that the quickstart's verifier is trained and prompted on.

Half of the sources are tasks of the package `reasoning-gym`, with its short answers put into sentences; the other half
are templates written here. Every problem is drawn from seeded generators, so a seed names the same problems anywhere.

    python configs/quickstart/problems.py FOLDER

writes the prompts of the quickstart's rows, train.jsonl and validation.jsonl.
"""

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS as LEGS

HERS = ["Ada", "Beth", "Clara", "Dina", "Elena", "Freya", "Greta", "Hana", "Ines", "Julia", "Kira", "Lena", "Maya"]
HIS = ["Adam", "Boris", "Carl", "Dario", "Emil", "Felix", "Georg", "Hugo", "Ivan", "Jonas", "Karim", "Leo", "Milo"]
GOODS = [
    "apples", "balls", "books", "bricks", "buttons", "candles", "cards", "coins", "cups", "flags", "kites", "lamps",
    "lemons", "marbles", "pencils", "plates", "ribbons", "shells", "spoons", "stamps", "stickers", "tickets", "toys",
]  # fmt: skip
PLACES = ["the bakery", "the beach", "the harbour", "the library", "the market", "the museum", "the park", "the school"]
CONTAINERS = ["bags", "baskets", "bowls", "boxes", "crates", "drawers", "jars", "trays"]
GIFTS = ["bicycle", "camera", "drum", "guitar", "jacket", "radio", "tent", "watch"]
DISHES = ["bread", "curry", "pancakes", "pasta", "porridge", "rice", "soup", "stew"]
CROPS = ["beans", "cabbages", "carrots", "leeks", "onions", "peppers", "pumpkins", "tomatoes"]


@dataclass(frozen=True)
class Problem:
    """One question with the worked answer that the verifier learns to write.

    Attributes:
        source: Name of the task or template that the problem comes from.
        question: What the user asks.
        answer: The worked answer, in full sentences.
    """

    source: str
    question: str
    answer: str


@dataclass(frozen=True)
class Person:
    """A person in a problem.

    Attributes:
        name: First name.
        subject: Pronoun that stands for the name, "she" or "he".
        possessive: Pronoun for what the person owns, "her" or "his".
    """

    name: str
    subject: str
    possessive: str


PEOPLE = [Person(name, "she", "her") for name in HERS] + [Person(name, "he", "his") for name in HIS]


# Templates written here: each draws its values and returns a question with its worked answer. The wording of the
# answer follows from the question, so that a greedy verifier can be fluent and still seldom write the same line twice.


def shopping(random: Random) -> tuple[str, str]:
    """Buys some goods; the change, or the money missing."""
    person, goods = random.choice(PEOPLE), random.choice(GOODS)
    count, price, money = random.randint(2, 12), random.randint(2, 9), random.randint(20, 90)
    cost = count * price
    enough = f"This is less than ${money}, so {person.subject} gets ${money} - ${cost} = ${money - cost} back."
    short = f"This is more than ${money}, so {person.subject} is ${cost} - ${money} = ${cost - money} short."
    exact = f"This is exactly ${money}, so no money is left."
    verdict = exact if cost == money else enough if cost < money else short
    if random.random() < 0.5:
        question = f"{person.name} has ${money} and wants {count} {goods} at ${price} each. Is that enough money?"
        return question, f"The {count} {goods} cost {count} x ${price} = ${cost} in total. {verdict}"
    question = f"One of the {goods} costs ${price}. Can {person.name} pay for {count} of them with ${money}?"
    return question, f"{person.name} needs {count} x ${price} = ${cost} for the {goods}. {verdict}"


def sharing(random: Random) -> tuple[str, str]:
    """Divides goods among friends; some may be left over."""
    person, goods = random.choice(PEOPLE), random.choice(GOODS)
    friends, each = random.randint(2, 9), random.randint(2, 9)
    left = random.randint(0, friends - 1)
    total = friends * each + left
    rest = f"and {left} are left over" if left > 1 else "and one is left over" if left else "and nothing is left over"
    if random.random() < 0.5:
        question = f"{person.name} shares {total} {goods} equally among {friends} friends. How many does each get?"
        return question, f"Since {friends} x {each} = {friends * each}, each friend gets {each} {goods} {rest}."
    container = random.choice(CONTAINERS)
    question = f"{total} {goods} go into {friends} {container}, the same number in each. How many fit in each?"
    answer = f"Divide {total} by {friends}: that makes {each} {goods} in each of the {friends} {container}, {rest}."
    return question, answer


def travelling(random: Random) -> tuple[str, str]:
    """Goes somewhere at a steady speed; the distance or the time."""
    person, place = random.choice(PEOPLE), random.choice(PLACES)
    hours, speed = random.randint(2, 9), random.randint(3, 60)
    vehicle = "walks" if speed < 8 else "cycles" if speed < 25 else "drives"
    distance = hours * speed
    if random.random() < 0.5:
        question = f"{person.name} {vehicle} to {place} at {speed} km per hour for {hours} hours. How far is it?"
        answer = f"In one hour {person.name} {vehicle} {speed} km. In {hours} hours {person.subject} {vehicle} "
        return question, answer + f"{hours} x {speed} = {distance} km, so {place} is {distance} km away."
    question = f"It is {distance} km to {place}. {person.name} {vehicle} {speed} km per hour. How long is the way?"
    answer = f"The way to {place} is {distance} km long. At {speed} km per hour {person.subject} needs "
    return question, answer + f"{distance} / {speed} = {hours} hours."


def saving(random: Random) -> tuple[str, str]:
    """Saves towards a gift; the number of weeks."""
    person, gift = random.choice(PEOPLE), random.choice(GIFTS)
    weekly, weeks, start = random.randint(2, 12), random.randint(2, 12), random.randint(3, 40)
    price = start + weekly * weeks
    missing = weekly * weeks
    if random.random() < 0.5:
        question = f"{person.name} has ${start} and saves ${weekly} a week for a {gift} of ${price}. How many weeks?"
        answer = (
            f"The {gift} costs ${price} and {person.name} already has ${start}, so ${price} - ${start} = ${missing} "
        )
        return question, answer + f"is missing. At ${weekly} a week this takes {missing} / {weekly} = {weeks} weeks."
    question = f"A {gift} costs ${price}. After {weeks} weeks of equal saving, {person.name}, who began with ${start}, "
    answer = f"{person.subject.capitalize()} began with ${start}, so {person.subject} saved ${price} - ${start} = "
    return (
        question + f"can buy it. How much did {person.subject} save a week?",
        answer + f"${missing}. Over {weeks} weeks that is {missing} / {weeks} = ${weekly} a week for the {gift}.",
    )


def reading(random: Random) -> tuple[str, str]:
    """Reads a book over several days; the pages that remain."""
    person = random.choice(PEOPLE)
    first, more, rest = random.randint(5, 40), random.randint(2, 20), random.randint(10, 60)
    second = first + more
    total = first + second + rest
    day, next_day = random.choice([("Monday", "Tuesday"), ("Friday", "Saturday"), ("Sunday", "Monday")])
    question = (
        f"{person.name} reads a book of {total} pages: {first} on {day} and {more} more than that on {next_day}. "
    )
    read = f"{first} + {second} = {first + second} pages"
    if random.random() < 0.5:
        answer = (
            f"On {next_day} {person.subject} reads {first} + {more} = {second} pages. Both days together make {read}, "
        )
        return question + "How many pages remain?", answer + f"so {total} - {first + second} = {rest} pages remain."
    answer = (
        f"{person.name} reads {first} pages on {day} and {first} + {more} = {second} pages on {next_day}, which is "
    )
    return question + f"How many has {person.subject} read?", answer + f"{read} of {person.possessive} book."


def rectangle(random: Random) -> tuple[str, str]:
    """Fences or covers a rectangle; its perimeter or its area."""
    person, place = (
        random.choice(PEOPLE),
        random.choice(["courtyard", "field", "garden", "meadow", "playground", "pond"]),
    )
    length, width = random.randint(5, 20), random.randint(2, 12)
    sides = f"The {place} is {length} m long and {width} m wide."
    if random.random() < 0.5:
        question = f"{sides} How many metres of fence does {person.name} need to go around it?"
        answer = (
            f"Going around the {place} once means two long sides and two short sides: 2 x {length} + 2 x {width} = "
        )
        return question, answer + f"{2 * length} + {2 * width} = {2 * (length + width)} metres of fence."
    question = f"{sides} {person.name} wants to know its area. What is it?"
    answer = f"The area of the {place} is its length times its width, so {length} x {width} = {length * width} square "
    return question, answer + f"metres, {person.name}."


def cooking(random: Random) -> tuple[str, str]:
    """Scales a recipe to more people."""
    person, dish = random.choice(PEOPLE), random.choice(DISHES)
    people, factor, cups, spoons = (random.randint(2, 5) for _ in range(4))
    many = people * factor
    if random.random() < 0.5:
        question = f"{dish.capitalize()} for {people} people takes {cups} cups of flour and {spoons} spoons of salt. "
        answer = f"{many} people are {factor} times as many as {people}. So the {dish} takes {factor} x {cups} = "
        answer += f"{factor * cups} cups of flour and {factor} x {spoons} = {factor * spoons} spoons of salt."
        return question + f"What does {person.name} need for {many} people?", answer
    question = (
        f"{person.name} cooks {dish} for {many} guests. The recipe is for {people} and says {cups} cups of water. "
    )
    answer = f"{person.name} has {many} / {people} = {factor} times as many guests as the recipe for {dish} says, so "
    answer += f"{person.subject} takes {factor} x {cups} = {factor * cups} cups of water."
    return question + "How much water is needed?", answer


def ages(random: Random) -> tuple[str, str]:
    """Compares two ages, in the future or in the past."""
    older, younger = random.sample(PEOPLE, 2)
    age, gap, years = random.randint(9, 40), random.randint(2, 8), random.randint(2, 8)
    if random.random() < 0.5:
        question = f"{older.name} is {age} and {gap} years older than {younger.name}. How old is {younger.name} in "
        answer = f"{younger.name} is {age} - {gap} = {age - gap} now. In {years} years {younger.subject} will be "
        return question + f"{years} years?", answer + f"{age - gap} + {years} = {age - gap + years} years old."
    question = (
        f"{years} years ago {younger.name} was {age}. {older.name} is {gap} years older. How old is {older.name}?"
    )
    answer = (
        f"Today {younger.name} is {age} + {years} = {age + years} years old. {older.name} is {gap} years older, so "
    )
    return question, answer + f"{older.subject} is {age + years} + {gap} = {age + years + gap}."


def bus(random: Random) -> tuple[str, str]:
    """Passengers get on and off at two stops."""
    start, off, on, last = random.randint(20, 60), random.randint(2, 15), random.randint(2, 15), random.randint(2, 9)
    vehicle, stop = random.choice(["bus", "ferry", "train", "tram"]), random.choice(PLACES)
    middle = start - off + on
    story = f"A {vehicle} carries {start} people. At {stop} {off} get off and {on} get on. "
    if random.random() < 0.5:
        question = story + f"At the next stop {last} more get off. How many are on the {vehicle} now?"
        answer = (
            f"After {stop} there are {start} - {off} + {on} = {middle} people on the {vehicle}. Then {last} leave, "
        )
        return question, answer + f"which makes {middle} - {last} = {middle - last}."
    change = "more" if on > off else "fewer"
    question = story + f"Is the {vehicle} fuller than before?"
    if on == off:
        return question, f"No, {off} people leave and {on} come, so the {vehicle} still carries {start} people."
    answer = (
        f"{'Yes' if on > off else 'No'}, there are {abs(on - off)} {change} people on the {vehicle}: {start} - {off} "
    )
    return question, answer + f"+ {on} = {middle}, which is {change} than {start}."


def harvest(random: Random) -> tuple[str, str]:
    """Plants rows of a crop; some of them are eaten or sold."""
    person, crop = random.choice(PEOPLE), random.choice(CROPS)
    rows, each = random.randint(3, 12), random.randint(4, 12)
    total = rows * each
    gone = random.randint(2, total - 2)
    question = f"{person.name} plants {rows} rows of {each} {crop}. "
    if random.random() < 0.5:
        question += f"Rabbits eat {gone} of the {crop}. How many are left?"
        answer = (
            f"{rows} rows of {each} make {rows} x {each} = {total} {crop}. The rabbits eat {gone}, so {person.name} "
        )
        return question, answer + f"still has {total} - {gone} = {total - gone} {crop}."
    price = random.randint(2, 5)
    question += f"{person.subject.capitalize()} sells all of them for ${price} each. How much money is that?"
    answer = (
        f"There are {rows} x {each} = {total} {crop} in the garden. {person.name} sells them for ${price} each and "
    )
    return question, answer + f"earns {total} x ${price} = ${total * price}."


def comparing(random: Random) -> tuple[str, str]:
    """Compares what three people own."""
    people = [person.name for person in random.sample(PEOPLE, 3)]
    counts, goods = random.sample(range(5, 60), 3), random.choice(GOODS)
    owned = ", ".join(f"{name} has {count}" for name, count in zip(people, counts, strict=True))
    order = sorted(range(3), key=counts.__getitem__)
    least, middle, most = ((people[position], counts[position]) for position in order)
    if random.random() < 0.5:
        answer = f"{most[0]} has the most {goods}, namely {most[1]}. Next comes {middle[0]} with {middle[1]}, and "
        return f"Of {goods}, {owned}. Put them in order.", answer + f"{least[0]} has the fewest, only {least[1]}."
    answer = f"The most is {most[1]} and the fewest is {least[1]}. So {most[0]} has {most[1]} - {least[1]} = "
    answer += f"{most[1] - least[1]} more {goods} than {least[0]}."
    return f"{owned} {goods}. How far apart are the most and the fewest?", answer


def wages(random: Random) -> tuple[str, str]:
    """Earns an hourly wage and spends a part of it."""
    person, job = random.choice(PEOPLE), random.choice(["baker", "driver", "gardener", "painter", "tutor", "waiter"])
    hours, rate = random.randint(2, 9), random.randint(8, 25)
    earned = hours * rate
    spent = random.randint(3, earned - 3)
    gift = random.choice(GIFTS)
    if random.random() < 0.5:
        question = (
            f"As a {job} {person.name} earns ${rate} an hour. After {hours} hours {person.subject} buys a {gift} "
        )
        answer = f"{person.name} earns {hours} x ${rate} = ${earned} as a {job}. After paying ${spent} for the {gift}, "
        answer += f"{person.subject} has ${earned} - ${spent} = ${earned - spent}."
        return question + f"for ${spent}. How much is left?", answer
    question = f"{person.name} the {job} was paid ${earned} for {hours} hours. What is {person.possessive} hourly wage?"
    answer = (
        f"${earned} for {hours} hours is {earned} / {hours} = ${rate} an hour, so {person.name} works as a {job} for "
    )
    return question, answer + f"${rate} an hour."


# Tasks of reasoning-gym: each function turns one entry into a question with a worked answer, or None if the entry
# is too long for the quickstart or has no worked answer.


def word_gsm_symbolic(entry: dict[str, Any]) -> tuple[str, str] | None:
    """Keeps the short school problems and ends their working with a sentence."""
    question = entry["question"].removesuffix(" Give the result as your final answer. Do not include units.")
    working, _, result = entry["metadata"]["answer_cot"].partition("\n#### ")
    is_short = len(question) <= 230 and len(working) <= 210
    if not is_short or not (question + working).isascii():
        return None
    return question, f"{working}\nThe answer is {result.strip()}."


def word_chain_sum(entry: dict[str, Any]) -> tuple[str, str]:
    """Works through a sum from left to right."""
    expression = entry["metadata"]["expression"]
    first, *rest = re.findall(r"[+-]?\d+", expression.replace(" ", ""))
    total, steps = int(first), [f"Start with {first}."]
    for term in map(int, rest):
        total += term
        steps.append(f"{'Add' if term > 0 else 'Subtract'} {abs(term)} to get {total}.")
    return f"What is {expression}?", " ".join([*steps, f"So {expression} = {total}."])


def word_leg_counting(entry: dict[str, Any]) -> tuple[str, str]:
    """Counts the legs of each animal and adds them up."""
    animals = entry["metadata"]["animals"]
    parts = [f"{count} x {LEGS[name]} = {count * LEGS[name]} for the {name}" for name, count in animals.items()]
    terms = " + ".join(str(count * LEGS[name]) for name, count in animals.items())
    question = entry["question"].strip().partition("Now, ")[2]
    return question.capitalize(), f"Legs are {', '.join(parts)}. Together that is {terms} = {entry['answer']} legs."


def word_simple_equations(entry: dict[str, Any]) -> tuple[str, str] | None:
    """Solves a linear equation in two steps."""
    match = re.fullmatch(r"(\d+)\*([a-z]) ([+-]) (\d+) = (\d+)", entry["metadata"]["equation"])
    if match is None:
        return None
    factor, variable, sign, constant, _ = match.groups()
    product = int(factor) * int(entry["answer"])
    first = f"{'Subtract' if sign == '+' else 'Add'} {constant} on both sides: {factor}*{variable} = {product}."
    return entry["question"], f"{first} Then divide both sides by {factor}: {variable} = {entry['answer']}."


def word_time_intervals(entry: dict[str, Any]) -> tuple[str, str]:
    """Computes the hours and minutes between two times of the day."""
    start, end = (entry["metadata"][key][11:16] for key in ("start_time", "end_time"))
    hours, minutes = map(int, entry["answer"].split(":"))
    question = entry["question"].partition("?")[0] + "?"
    answer = f"From {start} to {end} it is {hours} hours and {minutes} minutes, so the answer is "
    return question, answer + f"{hours} h {minutes} min."


def word_family_relationships(entry: dict[str, Any]) -> tuple[str, str] | None:
    """Names the marriage that decides the relation, then the relation."""
    first, second, relation = (entry["metadata"][key] for key in ("person1", "person2", "relationship"))
    if "in-law" in relation:  # some of these entries name the relation the wrong way round
        return None
    story, _, question = entry["question"].partition("\n\n")
    question = question.partition("?")[0] + "?"
    names = list(dict.fromkeys(re.findall(r"[A-Z][a-z]+", re.sub(r"\bThey\b", "", story))))
    people = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{story} {question}", f"The family is {people}. In it, {first} is the {relation} of {second}."


def word_syllogism(entry: dict[str, Any]) -> tuple[str, str]:
    """Repeats the premises and says whether the conclusion follows."""
    facts = entry["metadata"]
    first, second, conclusion = (
        facts[key][0].lower() + facts[key][1:] for key in ("premise1", "premise2", "conclusion")
    )
    verdict = "it follows" if facts["is_valid"] else "it does not follow"
    question = f"{facts['premise1']}. {facts['premise2']}. Does it follow that {conclusion}?"
    return question, f"We know that {first} and that {second}. From this {verdict} that {conclusion}."


TEMPLATES: list[Callable[[Random], tuple[str, str]]] = [
    shopping,
    sharing,
    travelling,
    saving,
    reading,
    rectangle,
    cooking,
    ages,
    bus,
    harvest,
    comparing,
    wages,
]
TASKS: dict[str, tuple[Callable[[dict[str, Any]], tuple[str, str] | None], dict[str, Any]]] = {
    "gsm_symbolic": (word_gsm_symbolic, {}),
    "chain_sum": (word_chain_sum, {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2}),
    "leg_counting": (word_leg_counting, {"min_animals": 2, "max_animals": 3, "min_instances": 2, "max_instances": 9}),
    "simple_equations": (word_simple_equations, {"min_terms": 2, "max_terms": 2, "max_value": 20}),
    "time_intervals": (word_time_intervals, {"task_types": ["time"]}),
    "family_relationships": (word_family_relationships, {"max_family_size": 6}),
    "syllogism": (word_syllogism, {}),
}
WEIGHTS = {"gsm_symbolic": 6}  # dozens of templates in one task, so it is drawn more often than the others
SEED_STRIDE = 10_000_000  # reasoning-gym seeds entry i with seed + i, so the seeds of two sets must be far apart


def task_problems(task: str, seed: int) -> Iterator[Problem]:
    """Yields worded problems of a reasoning-gym task without end."""
    word, options = TASKS[task]
    dataset = reasoning_gym.create_dataset(task, seed=seed * SEED_STRIDE, size=SEED_STRIDE, **options)
    for entry in dataset:
        worded = word(entry)
        if worded is not None:
            yield Problem(task, *worded)


def template_problems(template: Callable[[Random], tuple[str, str]], seed: int) -> Iterator[Problem]:
    """Yields problems of a template written here without end."""
    random = Random(f"{template.__name__} {seed}")
    while True:
        yield Problem(template.__name__, *template(random))


def generate(count: int, seed: int, exclude: Collection[str] = frozenset()) -> list[Problem]:
    """Draws problems from all sources.

    Args:
        count: Number of problems to return.
        seed: Names the set of problems; different seeds give independent sets.
        exclude: Questions that must not occur, for example those of another set.

    Returns:
        Problems with pairwise different questions, in random order.
    """
    sources = {task: task_problems(task, seed) for task in TASKS}
    sources |= {template.__name__: template_problems(template, seed) for template in TEMPLATES}
    weights = [WEIGHTS.get(name, 1) for name in sources]
    random = Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = next(sources[random.choices(list(sources), weights)[0]])
        if problem.question not in exclude:
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def write_prompts(problems: list[Problem], path: Path) -> None:
    """Writes the questions as prompts, one JSON object a line."""
    path.write_text("".join(json.dumps({"turns": [problem.question]}) + "\n" for problem in problems))


def main() -> None:
    """Writes the prompts of both splits; no prompt occurs in both."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    train = generate(2000, 101)  # far from the seeds of the verifier's own training and validation problems
    write_prompts(train, folder / "train.jsonl")
    write_prompts(generate(150, 102, exclude={problem.question for problem in train}), folder / "validation.jsonl")


if __name__ == "__main__":
    main()
