# ruff: noqa: E501 - a table of sentences reads best with one sentence a line
"""The word-problem templates: question text, the operations, and the sentence that writes each step.

A shape names the operations. Its first character works on {a} and {b} and gives the first result; a second character,
if any, works on that result and {d}: `+ - * /` with the result on the left, `r` for {d} minus the result (change from a
payment), `t` for {a} plus the result (a total with "times as many", which needs no {d}).
In a sentence, {s1} and {s2} stand for the written-out steps, such as "7 * 8 = 56".
"""

from __future__ import annotations

from dataclasses import dataclass

NAMES: tuple[str, ...] = (
    "Tom", "Anna", "Ben", "Lucy", "Sam", "Mia", "Jack", "Emma", "Leo", "Nora",
    "Max", "Ella", "Omar", "Lily", "Noah", "Rosa", "Ivan", "Maya", "Paul", "Zoe",
    "Adam", "Jane", "Luis", "Kate", "Alan", "Ruth", "Carl", "Iris", "Hugo", "Sara",
    "Finn", "Vera", "Dave", "Lena", "Mark", "Nina", "Eric", "Tara", "Ravi", "Yuki",
)  # fmt: skip
ITEMS: tuple[str, ...] = (
    "apples", "pencils", "stickers", "marbles", "books", "cookies", "shells", "stamps", "cards", "coins",
    "beads", "buttons", "oranges", "balloons", "crayons", "flowers", "toys", "cups", "plums", "eggs",
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """One way to ask a problem. `id` is part of a problem's identity, so it never changes once published."""

    id: str
    shape: str
    question: str
    sentences: tuple[str, ...]


_ONE_STEP: tuple[tuple[str, str, str], ...] = (
    ("+", "{name} has {a} {item}. {name} buys {b} more. How many {item} does {name} have now?", "{name} has {s1} {item}."),
    ("+", "{name} has {a} {item} and {other} has {b} {item}. How many {item} do they have together?", "Together they have {s1} {item}."),
    ("+", "There are {a} {item} in a box. {name} puts {b} more into the box. How many {item} are in the box?", "The box has {s1} {item}."),
    ("+", "{name} walks {a} meters to the shop and then {b} meters to the park. How many meters does {name} walk?", "{name} walks {s1} meters."),
    ("+", "{name} pays ${a} for a shirt and ${b} for shoes. How many dollars does {name} pay?", "{name} pays {s1} dollars."),
    ("+", "{name} read {a} pages on Monday and {b} pages on Tuesday. How many pages did {name} read?", "{name} read {s1} pages."),
    ("-", "{name} has {a} {item}. {name} gives {b} to {other}. How many {item} does {name} have left?", "{name} has {s1} {item} left."),
    ("-", "There are {a} {item} on the table. {name} takes {b} of them. How many {item} are left?", "There are {s1} {item} left."),
    ("-", "{name} has ${a} and spends ${b}. How many dollars does {name} have left?", "{name} has {s1} dollars left."),
    ("-", "{name} has {a} {item}. {other} has {b} fewer than {name}. How many {item} does {other} have?", "{other} has {s1} {item}."),
    ("-", "A rope is {a} cm long. {name} cuts off {b} cm. How many cm are left?", "The rope has {s1} cm left."),
    ("-", "{name} wants {a} {item} and already has {b}. How many more {item} does {name} need?", "{name} needs {s1} {item}."),
    ("*", "{name} has {a} boxes with {b} {item} in each box. How many {item} does {name} have?", "{name} has {s1} {item}."),
    ("*", "One ticket costs ${b}. {name} buys {a} tickets. How many dollars does {name} pay?", "{name} pays {s1} dollars."),
    ("*", "{name} reads {b} pages every day. How many pages does {name} read in {a} days?", "{name} reads {s1} pages."),
    ("*", "{name} plants {a} rows of {b} flowers. How many flowers does {name} plant?", "{name} plants {s1} flowers."),
    ("*", "{name} has {a} {item}. {other} has {b} times as many. How many {item} does {other} have?", "{other} has {s1} {item}."),
    ("*", "{name} runs {b} km each day. How many km does {name} run in {a} days?", "{name} runs {s1} km."),
    ("/", "{name} shares {a} {item} equally among {b} friends. How many {item} does each friend get?", "Each friend gets {s1} {item}."),
    ("/", "{name} puts {a} {item} into bags of {b}. How many bags does {name} fill?", "{name} fills {s1} bags."),
    ("/", "{name} pays ${a} for {b} tickets. How many dollars does one ticket cost?", "One ticket costs {s1} dollars."),
    ("/", "{name} cuts a {a} cm ribbon into {b} equal parts. How many cm long is each part?", "Each part is {s1} cm."),
    ("/", "{name} reads a book of {a} pages at {b} pages a day. How many days does {name} need?", "{name} needs {s1} days."),
    ("/", "{name} pours {a} liters of juice equally into {b} jars. How many liters are in each jar?", "Each jar has {s1} liters."),
)  # fmt: skip

_TWO_STEP: tuple[tuple[str, str, str, str], ...] = (
    ("++", "{name} has {a} {item}. {name} finds {b} and then buys {d} more. How many {item} does {name} have?",
     "First {name} has {s1} {item}.", "Then {name} has {s2} {item}."),
    ("++", "{name} drives {a} km on Monday, {b} km on Tuesday and {d} km on Friday. How many km is that in total?",
     "The first two days make {s1} km.", "In total that is {s2} km."),
    ("+-", "{name} has {a} {item} and gets {b} more. Then {name} gives {d} to {other}. How many {item} are left?",
     "First {name} has {s1} {item}.", "Then {s2} {item} are left."),
    ("+-", "{name} saves ${a} in May and ${b} in June, and then spends ${d}. How many dollars are left?",
     "{name} saves {s1} dollars.", "Then {s2} dollars are left."),
    ("-+", "A bus has {a} people. At a stop {b} people get off and {d} get on. How many people are on the bus now?",
     "After {b} get off there are {s1} people.", "Now there are {s2} people."),
    ("-+", "{name} has {a} {item}, loses {b}, and then wins {d}. How many {item} does {name} have now?",
     "After losing {name} has {s1} {item}.", "Now {name} has {s2} {item}."),
    ("--", "{name} has ${a}. A cap costs ${b} and a ball costs ${d}. How many dollars are left after {name} buys both?",
     "After the cap {name} has {s1} dollars.", "After the ball {name} has {s2} dollars."),
    ("--", "There are {a} {item} in a shop. {name} buys {b} and {other} buys {d}. How many {item} are left?",
     "After {name} there are {s1} {item}.", "After {other} there are {s2} {item}."),
    ("*+", "{name} has {a} bags of {b} {item} and {d} more {item}. How many {item} does {name} have in all?",
     "The bags hold {s1} {item}.", "In all {name} has {s2} {item}."),
    ("*+", "{name} buys {a} pens at ${b} each and a book for ${d}. How many dollars does {name} pay?",
     "The pens cost {s1} dollars.", "In all {name} pays {s2} dollars."),
    ("*+", "{name} works {a} hours for ${b} an hour and gets a tip of ${d}. How many dollars does {name} get?",
     "The work pays {s1} dollars.", "With the tip it is {s2} dollars."),
    ("*-", "{name} fills {a} boxes with {b} {item} each. Then {d} {item} break. How many {item} are whole?",
     "The boxes hold {s1} {item}.", "Then {s2} {item} are whole."),
    ("*-", "{name} sells {a} cakes for ${b} each and spends ${d} of the money. How many dollars are left?",
     "The cakes bring {s1} dollars.", "Then {s2} dollars are left."),
    ("*r", "{name} buys {a} {item} for ${b} each and pays with ${d}. How many dollars does {name} get back?",
     "The {item} cost {s1} dollars.", "{name} gets back {s2} dollars."),
    ("*r", "A book has {d} pages. {name} reads {b} pages a day for {a} days. How many pages are left?",
     "{name} reads {s1} pages.", "There are {s2} pages left."),
    ("+r", "{name} needs {d} {item}. {name} has {a} and {other} gives {b}. How many more {item} does {name} need?",
     "{name} has {s1} {item}.", "{name} needs {s2} more {item}."),
    ("+*", "{name} puts {a} red and {b} blue {item} in each box. How many {item} are in {d} boxes?",
     "One box has {s1} {item}.", "All boxes have {s2} {item}."),
    ("-*", "A ticket costs ${a}, but {name} gets ${b} off each. How many dollars do {d} tickets cost {name}?",
     "One ticket costs {s1} dollars.", "The tickets cost {s2} dollars."),
    ("/+", "{name} shares {a} {item} equally with friends, {b} people in all. Then {name} finds {d} more. How many {item} does {name} have?",
     "Each person gets {s1} {item}.", "Then {name} has {s2} {item}."),
    ("/-", "{name} splits {a} {item} into {b} equal piles and takes {d} from one pile. How many {item} are left in that pile?",
     "Each pile has {s1} {item}.", "That pile has {s2} {item} left."),
    ("/*", "{b} pens cost ${a}. How many dollars do {d} pens cost {name}?",
     "One pen costs {s1} dollars.", "{d} pens cost {s2} dollars."),
    ("*/", "{name} has {a} packs of {b} {item} and shares them equally among {d} friends. How many {item} does each friend get?",
     "The packs hold {s1} {item}.", "Each friend gets {s2} {item}."),
    ("+/", "{name} has {a} {item} and {other} has {b}. They put them all into {d} equal bags. How many {item} are in each bag?",
     "Together they have {s1} {item}.", "Each bag has {s2} {item}."),
    ("-/", "{name} has {a} {item}, keeps {b}, and shares the rest equally among {d} friends. How many {item} does each friend get?",
     "The rest is {s1} {item}.", "Each friend gets {s2} {item}."),
    ("*t", "{name} has {a} {item}. {other} has {b} times as many. How many {item} do they have together?",
     "{other} has {s1} {item}.", "Together they have {s2} {item}."),
    ("+t", "{name} has {a} {item}. {other} has {b} more than {name}. How many {item} do they have together?",
     "{other} has {s1} {item}.", "Together they have {s2} {item}."),
    ("-t", "{name} has {a} {item}. {other} has {b} fewer than {name}. How many {item} do they have together?",
     "{other} has {s1} {item}.", "Together they have {s2} {item}."),
)  # fmt: skip

TEMPLATES: tuple[Template, ...] = tuple(
    [Template(f"one-{i:02d}", shape, question, (s1,)) for i, (shape, question, s1) in enumerate(_ONE_STEP)]
    + [Template(f"two-{i:02d}", shape, question, (s1, s2)) for i, (shape, question, s1, s2) in enumerate(_TWO_STEP)]
)
