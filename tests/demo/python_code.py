"""Small Python functions and classes that parse and would run, from templates with free names and numbers."""

from random import Random

NAMES = ("value", "number", "item", "count", "size", "price", "score", "index")
LISTS = ("values", "numbers", "items", "words", "prices", "scores", "rows", "names")
VERBS = ("get", "compute", "find", "make", "check", "update")
CLASSES = ("Counter", "Stack", "Account", "Player", "Box", "Timer", "Queue", "Robot")
MODULES = ("math", "random", "json", "os", "sys", "time")
OPERATORS = ("+", "-", "*")
COMPARE = (">", "<", ">=", "<=", "==", "!=")

FUNCTIONS = (
    "def add_{name}({a}, {b}):\n    return {a} {op} {b}\n",
    'def {verb}_{name}({a}, {b}):\n    """Return the larger {name}."""\n    if {a} > {b}:\n'
    "        return {a}\n    return {b}\n",
    "def sum_{list}({list}):\n    total = 0\n    for {a} in {list}:\n        total += {a}\n    return total\n",
    "def count_{list}({list}):\n    count = 0\n    for {a} in {list}:\n        if {a} {cmp} {n}:\n"
    "            count += 1\n"
    "    return count\n",
    "def print_{list}({list}):\n    for i in range(len({list})):\n        print(i, {list}[i])\n",
    "def {verb}_{name}({a}):\n    while {a} > {n}:\n        {a} = {a} - {m}\n    return {a}\n",
    "def filter_{list}({list}, limit={n}):\n    return [{a} for {a} in {list} if {a} {cmp} limit]\n",
    "def is_{name}({a}):\n    return {a} % {m} == 0\n",
    "def {verb}_{list}({list}):\n    result = []\n    for {a} in {list}:\n"
    "        result.append({a} {op} {n})\n    return result\n",
    "def {verb}_{name}({a}):\n    try:\n        return int({a})\n    except ValueError:\n        return None\n",
    "def read_{list}(path):\n    with open(path) as file:\n        return file.read().split()\n",
)
CLASS_TEMPLATES = (
    "class {cls}:\n    def __init__(self, {a}={n}):\n        self.{a} = {a}\n\n    def update(self, {b}):\n"
    "        self.{a} {op}= {b}\n        return self.{a}\n",
    "class {cls}:\n    def __init__(self):\n        self.{list} = []\n\n    def add(self, {a}):\n"
    "        self.{list}.append({a})\n\n    def size(self):\n        return len(self.{list})\n",
)
LINES = (
    "{list} = [{n}, {m}, {n}]\nprint(len({list}))\n",
    "{a} = {n} {op} {m}\nprint({a})\n",
    "for i in range({n}):\n    print(i {op} {m})\n",
    "if {a} {cmp} {n}:\n    print({a})\nelse:\n    print({m})\n",
)


def block(random: Random) -> str:
    """One function, class or a few lines, ending in a newline."""
    draw = random.random()
    group = FUNCTIONS if draw < 0.65 else CLASS_TEMPLATES if draw < 0.82 else LINES
    a, b = random.sample(NAMES, 2)
    return random.choice(group).format(
        a=a,
        b=b,
        name=random.choice(NAMES),
        list=random.choice(LISTS),
        verb=random.choice(VERBS),
        cls=random.choice(CLASSES),
        op=random.choice(OPERATORS),
        cmp=random.choice(COMPARE),
        n=random.randint(0, 20),
        m=random.randint(1, 9),
    )


def program(random: Random, blocks: int) -> str:
    """``blocks`` blocks, sometimes after an import."""
    head = f"import {random.choice(MODULES)}\n\n" if random.random() < 0.3 else ""
    return head + "\n".join(block(random) for _ in range(blocks))
