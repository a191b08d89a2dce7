"""Keeps the copies in the scripts honest.

The scripts share no library: each holds all that it needs. So that the copies stay copies, a
top-level definition that carries the same name in two scripts must have the same text, unless its
name, or "script: name", is in VARY. The root of the collection is ppo.py: its text is the one that
counts, and for a name that it does not have, the text in the first script (by name) that has it.
What stands behind PLUMBING in the root must stand in every script.

    python tests/copies.py          # lists what differs; exit status 1 if anything does
    python tests/copies.py --fix    # copies the text that counts over the others
"""

import ast
import sys
from pathlib import Path

ROOT = "ppo.py"
PLUMBING = "# --- Environment"  # the heading behind which the text is the same in every script
VARY = {
    "Args": "each algorithm has its own flags",
    "check_args": "and its own conditions on them",
    "Agent": "the network is the algorithm's",
    "Transition": "so is what its update needs of a step",
    "rollout": "and how it acts: memory, noise, threads",
    "Acting": "what acting carries from step to step: a memory, running sums",
    "OWN_MEMORIES": "which memory stands in the script",
    "ppo_loss": "of steps, or of sequences that begin with a memory",
    "pqn_loss": "likewise",
    "impala_loss": "likewise",
    "Layer": "of a Transformer, with sums or with gates",
    "TrainState": "each algorithm carries its own state",
    "make_train": "the wiring of the algorithm",
    "update": "what is done with a batch",
    "Actor": "a Gaussian, an action, or log-probs",
    "Critic": "of an action, or of all",
    "critic_loss": "likewise",
    "actor_loss": "what the actor is to raise",
    "Learner": "the networks of the algorithm",
    "make_optimizers": "for each of them",
    "make_replay": "single transitions, or several in a row",
    "sample": "likewise",
    "metric_names": "what the algorithm measures",
    "compute_targets": "what the critic is to learn",
    "losses": "samples or sums",
    "learn": "with priorities or without",
    "next_seen": "a number of an action, or its entries",
    "step_and_learn": "an off-policy step: how to act, what to keep, what is due then",
    "evaluate": "an agent with memory carries it along",
    "check_env": "names the sibling to use instead",
    "ppo_trxl_pmap.py: main": "joins processes, and shares the environments out to devices",
    "dqn.py: gradient_steps_due": "at multiples of a frequency; in sac.py and those after it, a ratio",
    "drqn.py: gradient_steps_due": "as in dqn.py: it has no commentary of its own (docs/build.py)",
    "CALL_STEPS": "off-policy, an iteration is as long as a row should be",
    "impala.py: main": "starts actor threads",
    "impala_lstm.py: main": "likewise, as impala.py does (tests/test_impala.py)",
    "impala.py: compile_training": "not there: what an iteration does is spread over threads",
    "impala_lstm.py: compile_training": "likewise",
}


def definitions(text: str) -> dict[str, tuple[int, int]]:
    """Top-level functions, classes and assigned names -> their first and last line, from 0."""
    spans = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            spans[node.name] = (first - 1, node.end_lineno)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if isinstance(targets[0], ast.Name):
                spans[targets[0].id] = (node.lineno - 1, node.end_lineno)
    return spans


def scripts(folder: Path) -> list[Path]:
    """The scripts of the collection: Python files with a make_train, the root first."""
    found = [path for path in folder.glob("*.py") if "make_train" in definitions(path.read_text())]
    return sorted(found, key=lambda path: (path.name != ROOT, path.name))


def compare(folder: Path, fix: bool = False) -> list[str]:
    """-> "script: name differs from source" or "is missing" for each copy; fix also mends them."""
    source, plumbing, differences = {}, [], []
    for path in scripts(folder):
        text = path.read_text()
        lines, spans = text.splitlines(keepends=True), definitions(text)
        if path.name == ROOT:
            heading = next((n for n, x in enumerate(lines) if x.startswith(PLUMBING)), len(lines))
            plumbing = [name for name, (first, _) in spans.items() if first > heading]
        # From the last to the first, so that mending one leaves the lines before it in place.
        for name, (first, last) in reversed(spans.items()):
            if name in VARY or f"{path.name}: {name}" in VARY:
                continue
            origin, copy = source.setdefault(name, (path.name, lines[first:last]))
            if copy != lines[first:last]:
                differences.append(f"{path.name}: {name} differs from {origin}")
                lines[first:last] = copy
        for before, name in zip(plumbing, plumbing[1:], strict=False):
            if name not in spans and f"{path.name}: {name}" not in VARY:
                differences.append(f"{path.name}: {name} is missing")
                if before in (spans := definitions("".join(lines))):
                    lines[spans[before][1] : spans[before][1]] = ["\n", "\n", *source[name][1]]
        if fix and "".join(lines) != text:
            path.write_text("".join(lines))
    return differences


if __name__ == "__main__":
    fix = sys.argv[1:] == ["--fix"]
    if sys.argv[1:] not in ([], ["--fix"]):
        sys.exit("usage: python tests/copies.py [--fix]")
    differences = compare(Path(__file__).parent.parent, fix)
    print("\n".join(differences) or "all copies agree")
    sys.exit(1 if differences and not fix else 0)
