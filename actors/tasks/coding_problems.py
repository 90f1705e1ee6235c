"""Small programming problems with tests, made to measure: each reads lines and prints lines.

Every family is a sentence with parameters and a function that knows the answer; a problem is one of them, or two in a
row.  There are some hundred thousand.
"""

import itertools
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

Line = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Step:
    """What is done to the text so far."""

    told: str
    apply: Line


@dataclass(frozen=True, slots=True)
class Problem:
    statement: str
    tests: tuple[tuple[str, str], ...]
    """(standard input, standard output), hidden; the statement shows others."""


def make(rng: random.Random, num_tests: int = 8, num_examples: int = 2) -> Problem:
    """One problem, whose tests no constant passes by half.  The same state of `rng` gives the same."""
    inputs: dict[str, str] = {}
    while _commonest(inputs) > len(inputs) / 2 or not inputs:
        told, example, answer = rng.choice((_numbers, _words, _recurrence, _grid))(rng)
        inputs = {}
        while len(inputs) < num_tests + num_examples:
            given = example(rng)
            inputs[given] = answer(given)
    shown = "\n\n".join(
        f"Input:\n{given}\nOutput:\n{out}" for given, out in itertools.islice(inputs.items(), num_examples)
    )
    statement = f"{told}\n\n{shown}"
    return Problem(statement, tuple(itertools.islice(inputs.items(), num_examples, None)))


def _commonest(inputs: dict[str, str]) -> int:
    """How many inputs have the answer that most have."""
    answers = list(inputs.values())
    return max((answers.count(answer) for answer in answers), default=0)


_Family = tuple[str, Callable[[random.Random], str], Line]


def _numbers(rng: random.Random) -> _Family:
    """Choose some of a line of integers, change them, and put them together."""
    k, low, a, b = rng.randint(2, 9), rng.randint(-20, 20), rng.randint(2, 7), rng.randint(-9, 9)
    choices: list[tuple[str, Callable[[list[int]], list[int]]]] = [
        (f"that are divisible by {k}", lambda numbers: [n for n in numbers if n % k == 0]),
        (f"that are greater than {low}", lambda numbers: [n for n in numbers if n > low]),
        (f"at every {k}. place (places {k}, {2 * k}, ...; the first is place 1)", lambda numbers: numbers[k - 1 :: k]),
        ("that are smaller than the number right before them", _descending),
        ("that occur once only", lambda numbers: [n for n in numbers if numbers.count(n) == 1]),
    ]
    changes: list[tuple[str, Callable[[int], int]]] = [
        ("as they are", lambda n: n),
        (f"each multiplied by {a} and then increased by {b}", lambda n: a * n + b),
        ("each squared", lambda n: n * n),
        (f"each replaced by its remainder on division by {a} (from 0 to {a - 1})", lambda n: n % a),
        ("each replaced by the sum of the digits of its absolute value", lambda n: sum(map(int, str(abs(n))))),
    ]
    ends: list[tuple[str, Callable[[list[int]], str]]] = [
        ("Print their sum, 0 if there are none.", lambda numbers: str(sum(numbers))),
        ("Print how many different ones there are.", lambda numbers: str(len(set(numbers)))),
        ("Print them in ascending order, separated by spaces.", lambda numbers: " ".join(map(str, sorted(numbers)))),
        ("Print the largest less the smallest, 0 if there are none.", _spread),
        ("Print the sums of the first one, the first two, and so on, separated by spaces.", _running),
    ]
    told_choice, chosen = rng.choice(choices)
    told_change, changed = rng.choice(changes)
    told_end, ended = rng.choice(ends)

    def example(rng: random.Random) -> str:
        return " ".join(str(rng.randint(-50, 50)) for _ in range(rng.randint(1, 14)))

    def answer(line: str) -> str:
        return ended([changed(n) for n in chosen(list(map(int, line.split())))])

    told = f"The input is one line of integers.  Take those {told_choice}, {told_change}.  {told_end}"
    return told, example, answer


def _descending(numbers: list[int]) -> list[int]:
    return [b for a, b in itertools.pairwise(numbers) if b < a]


def _spread(numbers: list[int]) -> str:
    return str(max(numbers) - min(numbers) if numbers else 0)


def _running(numbers: list[int]) -> str:
    return " ".join(map(str, itertools.accumulate(numbers)))


def _words(rng: random.Random) -> _Family:
    """Three things that are done to a line of words, one after the other."""
    k, letter = rng.randint(1, 25), rng.choice(string.ascii_lowercase)
    steps = [
        Step("reverse every word", lambda s: " ".join(word[::-1] for word in s.split())),
        Step("put the words in the opposite order", lambda s: " ".join(s.split()[::-1])),
        Step("sort the words alphabetically", lambda s: " ".join(sorted(s.split()))),
        Step("remove words that occurred before", lambda s: " ".join(dict.fromkeys(s.split()))),
        Step(
            f"remove every letter {letter} (and words of it alone)", lambda s: " ".join(s.replace(letter, "").split())
        ),
        Step(f"move every letter {k} places on in the alphabet (a follows z)", lambda s: s.translate(_caesar(k))),
        Step(f"keep the words of {k % 4 + 3} letters or more", lambda s: _of_length(s, k % 4 + 3)),
    ]
    last = [  # behind these the others would be ambiguous
        Step("write the vowels (a, e, i, o, u) as capitals", lambda s: s.translate(str.maketrans("aeiou", "AEIOU"))),
        Step("write each run of one letter within a word as the letter and the run's length", _run_lengths),
    ]
    taken = rng.sample(steps, 3)
    if rng.random() < 0.5:
        taken[-1] = rng.choice(last)

    def example(rng: random.Random) -> str:
        words = ("".join(rng.choices("aabbcdeeioz" + letter, k=rng.randint(1, 8))) for _ in range(rng.randint(1, 8)))
        return " ".join(words)

    def answer(line: str) -> str:
        for step in taken:
            line = step.apply(line)
        return line

    told = ", then ".join(step.told for step in taken)
    return (
        f"The input is one line of lower-case words.  In this order, {told}.  Print the resulting line.",
        example,
        answer,
    )


def _caesar(places: int) -> dict[int, int]:
    letters = string.ascii_lowercase
    return str.maketrans(letters, letters[places:] + letters[:places])


def _of_length(line: str, least: int) -> str:
    return " ".join(word for word in line.split() if len(word) >= least)


def _run_lengths(line: str) -> str:
    words = (itertools.groupby(word) for word in line.split())
    return " ".join("".join(f"{letter}{len(list(run))}" for letter, run in runs) for runs in words)


def _recurrence(rng: random.Random) -> _Family:
    """A sequence, modulo something, far out."""
    a, b, c, first, second = (rng.randint(1, 9) for _ in range(5))
    modulus = rng.choice((97, 101, 997, 1009, 10007))
    extras: list[tuple[str, Callable[[int], int]]] = [
        ("", lambda n: 0),
        (f" + {c}", lambda n: c),
        (f" + {c} * n", lambda n: c * n),
    ]
    told_extra, extra = rng.choice(extras)

    def example(rng: random.Random) -> str:
        return str(rng.choice((rng.randint(0, 9), rng.randint(10, 5000))))

    def answer(line: str) -> str:
        x, y = first % modulus, second % modulus
        for n in range(2, int(line) + 2):
            x, y = y, (a * y + b * x + extra(n)) % modulus
        return str(x)

    told = (
        f"Let f(0) = {first}, f(1) = {second}, and f(n) = ({a} * f(n-1) + {b} * f(n-2){told_extra}) mod {modulus} for "
        "n >= 2.  The input is n, of at most 5000.  Print f(n)."
    )
    return told, example, answer


def _grid(rng: random.Random) -> _Family:
    """Cells of a map, by their neighbors."""
    around, least, diagonal = rng.choice("#."), rng.randint(1, 4), rng.choice((True, False))
    told_cells, cell = rng.choice([("free cells (.)", "."), ("blocked cells (#)", "#")])
    name = {"#": "blocked", ".": "free"}[around]
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i or j) and (diagonal or not (i and j))]

    def example(rng: random.Random) -> str:
        width = rng.randint(1, 8)
        return "\n".join("".join(rng.choices("#.", k=width)) for _ in range(rng.randint(1, 6)))

    def answer(lines: str) -> str:
        cells = {(i, j): c for i, line in enumerate(lines.split("\n")) for j, c in enumerate(line)}
        counts = {at: sum(cells.get((at[0] + i, at[1] + j)) == around for i, j in steps) for at in cells}
        return str(sum(cells[at] == cell and counts[at] >= least for at in cells))

    told = (
        f"The input is a map, a line for each row, of free (.) and blocked (#) cells.  Print how many {told_cells} "
        f"have at least {least} {name} neighbors.  Neighbors share a side{' or a corner' if diagonal else ''}; what is "
        "off the map is none."
    )
    return told, example, answer
