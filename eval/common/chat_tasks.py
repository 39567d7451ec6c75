"""Ask a model the problems of nanochat's benchmarks, and judge what it says: a line a problem."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.common.answers import find_family, parse_answer
from eval import sandbox
from eval.common.gsm8k import official_answer
from eval.common.letters import answer_letters
from eval.common.models import ask, mode_kwargs, render
from eval.common.problems import CodeProblem, LetterProblem, NumberProblem, Problem

BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)  # nanochat's, for its literal rule
FENCED = re.compile(
    r"^[ \t]*(?P<fence>```+|~~~+)[^\n`]*\n(?P<code>.*?)(?:^[ \t]*(?P=fence)[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)


@dataclass
class Asking:
    """A model and how it is asked. stops: ids; mode: think, no_think, None for a template without the two."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stops: set[int]
    mode: str | None
    batch_size: int
    max_new_tokens: int
    timeout: float
    unsafe_sandbox: bool


def ask_task(task: str, problems: Sequence[Problem], asking: Asking) -> list[dict]:
    """Return a line a problem of one task: {id, task, answer, correct} and what its kind adds. Raises UsageError."""
    if isinstance(problems[0], LetterProblem):
        return ask_letters(task, problems, asking)
    return ask_written(task, problems, asking)


def ask_letters(task: str, problems: Sequence[LetterProblem], asking: Asking) -> list[dict]:
    """Return lines with the letter that is likeliest where the answer begins, and that of the reference."""
    answers = answer_letters(
        asking.model,
        asking.tokenizer,
        asking.stops,
        problems,
        asking.batch_size,
        task,
        **mode_kwargs(asking.mode),
    )
    lines = []
    for problem, answer in zip(problems, answers, strict=True):
        lines.append(
            {
                "id": problem.id,
                "task": task,
                "answer": answer,
                "reference": problem.answer,
                "correct": answer == problem.answer,
            }
        )
    return lines


def ask_written(task: str, problems: Sequence[NumberProblem | CodeProblem], asking: Asking) -> list[dict]:
    """Return lines with what the model writes, and the verdict on what stands behind its thought.

    cut: no stop token ended the answer, or its thought never ends; what was thought by then is no answer.
    """
    family = find_family(asking.tokenizer.chat_template)
    prompts = [render(asking.tokenizer, problem.prompt, **mode_kwargs(asking.mode)) for problem in problems]
    answers = ask(
        asking.model,
        asking.tokenizer,
        asking.stops,
        [prompt.ids for prompt in prompts],
        asking.batch_size,
        asking.max_new_tokens,
        task,
        asking.timeout,
    )
    lines = []
    for problem, prompt, answer in zip(problems, prompts, answers, strict=True):
        said = parse_answer(answer.text, family, prompt.text)
        line = {
            "id": problem.id,
            "task": task,
            "answer": answer.text,
            "tokens": answer.tokens,
            "stopped": answer.stopped,
            "failed": answer.failed,
            "cut": not answer.stopped or not said.is_complete,
        }
        if answer.failed:
            line |= {"correct": False, "why": answer.failed}
            if isinstance(problem, CodeProblem):
                line["lenient"] = False
        elif isinstance(problem, CodeProblem):
            line |= judge_program(problem, said.content, asking.unsafe_sandbox)
        else:
            line |= judge_number(problem, said.content)
        lines.append(line)
    return lines


# -- verdicts ---------------------------------------------------------------------------------------------------------
def judge_number(problem: NumberProblem, answer: str) -> dict:
    """Return {correct, given, reference} of an answer, by GSM8K's official rule."""
    given = official_answer(answer)
    return {"correct": given == problem.answer, "given": given, "reference": problem.answer}


def judge_program(problem: CodeProblem, answer: str, unsafe: bool) -> dict:
    """Return {correct, why, lenient} of an answer.

    correct: the program that nanochat's rule takes from it passes; why: it did not, "" where it did. lenient: the one
    that find_code takes passes. unsafe: without a sandbox.
    """
    literal = assemble(problem, literal_code(answer))
    result = sandbox.run(literal, unsafe=unsafe)
    verdict = {"correct": result.ok, "why": "" if result.ok else result.reason, "lenient": result.ok}
    lenient = assemble(problem, find_code(answer, problem.entry_point))
    if lenient != literal:
        verdict["lenient"] = sandbox.run(lenient, unsafe=unsafe).ok
    return verdict


def literal_code(answer: str) -> str:
    """Return nanochat's code of an answer: its first block that is marked python or not at all, else all of it."""
    block = BLOCK.search(answer)
    code = answer if block is None else block[1]
    return code.strip()


def find_code(answer: str, entry_point: str) -> str:
    """Return the longest block that defines the entry point, however it is marked; nanochat's code where none does.

    A block that never ends counts, and one that is indented, as in a list.
    """
    definition = re.compile(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", re.MULTILINE)
    blocks = [textwrap.dedent(match["code"]).strip() for match in FENCED.finditer(answer)]
    defining = [block for block in blocks if definition.search(block)]
    if not defining:
        return literal_code(answer)
    return max(defining, key=len)


def assemble(problem: CodeProblem, code: str) -> str:
    """Return the program of an answer's code: the imports of the prompt, the code, the tests and the call of them."""
    imports = []
    for line in problem.prompt[0]["content"].split("\n"):
        line = line.strip()
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n\n".join(["\n".join(imports), code, f"{problem.test}\ncheck({problem.entry_point})"])
