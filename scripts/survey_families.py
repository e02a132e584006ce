"""Survey all families of reasoning-gym: which are safe in a swarm, and why others are not.

    python scripts/survey_families.py [FAMILY ...]     # about ten minutes

It writes worker/environments/families.json. Each family is made and scored through the project's
own environment, guards included, by two processes with different hash seeds and states of the
global random generators. The survey compares tasks and rewards of both, and measures the seconds to
make a task at each level, the rewards of cheap answers (constants, and text copied from the
question), and the seconds to score hostile text. tests/environments/test_family_survey.py repeats a
part of it in every test run.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

EVALUATE = (
    "its scorer evaluates the answer, which may come from an untrusted peer, as Python (sympy's"
    " parser)"
)
EVALUATING = dict.fromkeys(
    (
        "countdown",
        "intermediate_integration",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
    ),
    EVALUATE,
)
NOT_SURVEYED = {
    "composite": "it mixes other families; name those with weights instead",
    **EVALUATING,
}

MAY_BE_COPIED = {
    "number_format": "one of the numbers in the question is the answer: copying one is a guess",
    "prime_factorization": "a prime is its own factorization",
}
"""Families in which a copied answer may be right."""

NUM_ITEMS = 48
MAX_SECONDS = 1.0
"""Seconds allowed to make a task, on average, and to score one answer, at most."""
MARGIN = 0.1
"""Reward allowed for a copied answer above chance, and for a constant above the best share."""
CONSTANTS = (
    "",
    ".",
    "0",
    "1",
    "-1",
    "2",
    "3",
    "5",
    "10",
    "100",
    "0.5",
    "yes",
    "no",
    "True",
    "False",
    "None",
    "A",
    "B",
    "[]",
    "{}",
    "()",
    "9" * 60,
    "-" + "9" * 20,
    "nan",
    "nan+nanj",
    "inf",
    "yes no",
    "True False",
    "0 1",
    "A B C D",
    "0 1 2 3 4 5 6 7 8 9",
    "I do not know",
    "your answer",
)
HOSTILE_UNITS = (
    "9",
    "(",
    ")",
    "[",
    "[]",
    "{",
    '{"a":',
    "¬",
    "-",
    "1,",
    "A ",
    "→",
    "=",
    ":",
    "F+1 ",
    "R' ",
    "U",
)


def copied(question: str) -> dict[str, str]:
    """Return answers that can be copied from a question, by kind."""
    lines = [line.strip() for line in question.splitlines() if line.strip()] or [""]
    words, numbers = question.split() or [""], re.findall(r"-?\d+(?:\.\d+)?", question) or [""]
    answers = {
        "question": question,
        "first line": lines[0],
        "longest line": max(lines, key=len),
        "first word": words[0],
        "last word": words[-1].strip("'\".?"),
        "first number": numbers[0],
        "last number": numbers[-1],
        "largest number": max(numbers, key=len),
        "all numbers": " ".join(numbers),
    }
    answers.update(
        {f"line {-place} from the end": lines[-place] for place in range(1, min(6, len(lines)) + 1)}
    )
    after_colon = [line.rpartition(":")[2].strip(" '\".") for line in lines if ":" in line]
    answers.update({f"after colon {place}": text for place, text in enumerate(after_colon[-3:])})
    return answers


def hostile(length: int) -> Iterator[str]:
    """Yield texts of `length` characters that make parsers slow or fail in odd ways."""
    for unit in (
        "9",
        "(",
        ")",
        "[",
        "[]",
        "{",
        '{"a":',
        "¬",
        "-",
        "1,",
        "A ",
        "→",
        "=",
        ":",
        "F+1 ",
        "R' ",
        "U",
        "\\(",
    ):
        yield (unit * length)[:length]
    yield "(" * (length // 2) + ")" * (length // 2)
    yield "1/" + "9" * (length - 2)
    yield from (
        "1e999999999",
        "-1e-99999999",
        "1e9999999",
        "9**9**9",
        "x^99999999",
        "sNaN",
        "\udcff\x00",
        "[1e999999999]",
    )


def survey(family: str) -> dict[str, Any]:
    """Survey one family in this process."""
    from reasoning_gym.factory import CURRICULA, create_curriculum

    from worker.environments import Recipe, reasoning_gym

    random.seed(
        int(os.environ["PYTHONHASHSEED"])
    )  # a family that draws from the global generator shows itself
    digests, answers, seconds, scoring = [], Counter[str](), [], 0.0
    constant: dict[str, list[float]] = {}
    copies: dict[str, list[float]] = {}
    for seed in range(NUM_ITEMS):
        recipe = Recipe(family, "{}", 7919 * seed + 1)
        seconds.append(timed(reasoning_gym._make_item, recipe))
        dataset, item = reasoning_gym._make_item(recipe)

        def score(answer: str, dataset: Any = dataset, item: Any = item) -> float:
            return reasoning_gym._score(dataset, item, family, f"<answer>{answer}</answer>")

        for text in CONSTANTS:
            constant.setdefault(text, []).append(score(text))
        for name, text in copied(item["question"]).items():
            copies.setdefault(name, []).append(score(text))
        if seed < 2:
            scoring = max(
                scoring,
                *(timed(score, text) for text in hostile(reasoning_gym._max_answer_length(item))),
            )
        answers[str(item["answer"])] += 1
        rewards = [values[-1] for values in constant.values()]
        digests.append(
            hashlib.sha256(f"{item['question']}{item['answer']}{rewards}".encode()).hexdigest()
        )
    levels: list[float] = []
    if family in CURRICULA:
        levels = [round(pace, 3) for pace in paces(family, create_curriculum(family))]
    best = max(copies, key=lambda name: sum(copies[name]) / NUM_ITEMS)
    return {
        "digest": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "seconds": round(fmean(seconds), 3),
        "scoring": round(scoring, 2),
        "constant": round(max(fmean(values) for values in constant.values()), 3),
        "commonest": round(answers.most_common(1)[0][1] / NUM_ITEMS, 3),
        "copied": round(sum(copies[best]) / NUM_ITEMS, 3),
        "copy": best,
        "levels": levels,
    }


def paces(family: str, curriculum: Any) -> Iterator[float]:
    """Yield the seconds that a task of each level takes, until one is refused or too slow."""
    from worker.environments import reasoning_gym

    num_levels = max(
        (len(attribute.levels) for attribute in curriculum.attributes.values()), default=0
    )
    for level in range(num_levels):
        try:
            config = reasoning_gym._level_config(curriculum, level)
            pace = 0.0
            for seed in range(NUM_ITEMS // 4):
                pace = max(pace, timed(reasoning_gym._draw, family, config, seed))
                if pace > MAX_SECONDS:
                    break
        except reasoning_gym._REFUSALS:
            return
        yield pace
        if pace > MAX_SECONDS:
            return


def timed(function: Callable[..., object], *arguments: object) -> float:
    """Return the processor seconds of a call; infinite after ten."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10.0)
    started = time.process_time()
    try:
        function(*arguments)
    except TimeoutError:
        return float("inf")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return time.process_time() - started


def judge(family: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the verdict on a family from the surveys of two processes."""
    from worker.environments.guards import GUARDS

    first = found[0]
    quick = [pace <= MAX_SECONDS for pace in first["levels"]]
    row = {
        "verdict": "guarded" if family in GUARDS else "safe",
        "reason": GUARDS[family].reason if family in GUARDS else "",
        "levels": quick.index(False) if False in quick else len(quick),
        **{
            name: first[name]
            for name in ("seconds", "scoring", "constant", "commonest", "copied", "copy")
        },
    }
    if first["digest"] != found[1]["digest"]:
        return row | refused(
            "two processes make different tasks from the same recipe, or score them differently"
        )
    if first["scoring"] > MAX_SECONDS:
        return row | refused(
            f"scoring takes over {MAX_SECONDS:.0f} s for some answers, which may come from"
            " untrusted peers"
        )
    chance = max(first["constant"], first["commonest"])
    if first["copied"] > chance + MARGIN and family not in MAY_BE_COPIED:
        return row | refused(f"copying the {first['copy']} earns {first['copied']}")
    if first["constant"] > first["commonest"] + MARGIN and first["constant"] > 3 * MARGIN:
        return row | refused(f"one constant answer earns {first['constant']}")
    return row


def refused(reason: str) -> dict[str, str]:
    return {"verdict": "refused", "reason": reason}


def run(family: str, hash_seed: int) -> dict[str, Any]:
    """Survey a family in a separate process."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", family],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if child.returncode != 0:
        raise SystemExit(f"{family}: {child.stderr.strip()[-500:]}")
    row: dict[str, Any] = json.loads(child.stdout)
    return row


def main() -> None:
    from reasoning_gym.factory import DATASETS

    from worker.environments.reasoning_gym import FAMILIES_FILE, ReasoningGym

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            found = survey(options.child)
        print(json.dumps(found))
        return
    rows: dict[str, Any] = (
        json.loads(FAMILIES_FILE.read_text())["families"] if options.families else {}
    )
    for family in options.families or sorted(DATASETS):
        if family in NOT_SURVEYED:
            rows[family] = {"levels": 0, **refused(NOT_SURVEYED[family])}
        else:
            rows[family] = judge(family, [run(family, hash_seed) for hash_seed in (1, 2)])
        print(f"{family:26} {rows[family]['verdict']:8} {rows[family]['reason']}", flush=True)
        write(rows, FAMILIES_FILE, ReasoningGym.version.partition(" ")[2])


def write(rows: dict[str, Any], file: Path, version: str) -> None:
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    file.write_text(
        f'{{\n  "version": {json.dumps(version)},\n  "families": {{\n{lines}\n  }}\n}}\n'
    )


if __name__ == "__main__":
    main()
