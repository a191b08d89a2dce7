"""Makes docs/site/: a page to read for each script, from the script itself, and an index.

    python docs/build.py            # all pages
    python docs/build.py ppo        # one

docs/<script>.md is the commentary: what stands before its first heading opens the page, and what
stands under `## name` goes beside the function or class of this name. A part that is, to the letter,
one of another script has that script's words if it has none of its own. A name that the script does not
have, or a part of the algorithm without commentary, ends the program with status 2 and one line.
Nothing is fetched: formulas become MathML.
"""

import ast
import difflib
import html
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import DiffLexer, PythonLexer

DOCS = Path(__file__).parent
ROOT, SITE = DOCS.parent, DOCS / "site"
sys.path.insert(0, str(ROOT / "benchmarks"))
import tables
from tasks import CONTROL, MEMORY, RESULTS, SCRIPTS, TASKS
from without import CHANGES, POINTS, Change, unchanged

FIRST, LAST = "Networks", "Evaluation"  # sections of the algorithm
IQM, BAR = "IQM [95 % interval]", "seeds at the bar"
CELLS = ("task", "steps", "mean ± std", IQM, BAR, "launch to target", "steps/s", "a run, s")
PARENTS = {  # script: the one that it is written as a change to
    **dict.fromkeys(("a2c", "ppo_continuous", "ppo_lstm", "pqn", "impala"), "ppo"),
    **{"rppo": "ppo_lstm", "rppo_continuous": "rppo", "ppo_trxl": "ppo_lstm", "rpqn": "pqn"},
    **{"ppo_gtrxl": "ppo_trxl", "ppo_trxl_pmap": "ppo_trxl", "impala_lstm": "impala"},
    **{"drqn": "dqn", "td3": "sac", "sacd": "sac", "rsac": "sac", "rsacd": "rsac"},
}


class Part(NamedTuple):
    section: str
    name: str  # of a function or class
    code: str
    line: int  # where it begins in the file


def parts_of(text: str) -> list[Part]:
    """The functions and classes of a script's algorithm, with the comments above them."""
    lines, parts, section = text.splitlines(), [], ""
    headings = {n: x[6:].rstrip(" -") for n, x in enumerate(lines) if x.startswith("# --- ")}
    for node in ast.parse(text).body:
        begin, end = node.lineno - 1, node.end_lineno
        begin = min([begin, *[x.lineno - 1 for x in getattr(node, "decorator_list", [])]])
        while lines[begin - 1].startswith("#") and begin - 1 not in headings:
            begin -= 1
        section = next((headings[n] for n in sorted(headings, reverse=True) if n < begin), "")
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts.append(Part(section, node.name, "\n".join(lines[begin:end]), begin + 1))
        elif parts and parts[-1].section == section:  # constants stay with what they follow
            code = "\n".join(lines[parts[-1].line - 1 : end])
            parts[-1] = parts[-1]._replace(code=code)
    names = list(dict.fromkeys(part.section for part in parts))
    wanted = names[names.index(FIRST) : names.index(LAST) + 1]
    return [part for part in parts if part.section in wanted]


@cache
def texts_of(script: str) -> dict[str, str]:
    """docs/<script>.md -> Markdown by name; "" is what opens the page."""
    opening, *rest = re.split(
        r"^## (\S+)\n", (DOCS / f"{script}.md").read_text(), flags=re.MULTILINE
    )
    return {"": opening} | dict(zip(rest[::2], rest[1::2], strict=True))


@cache
def codes_of(script: str) -> dict[str, str]:
    return {part.name: part.code for part in parts_of((ROOT / f"{script}.py").read_text())}


def commentary_of(script: str) -> dict[str, str]:
    """Markdown for each of its parts; "" is what opens the page."""
    texts, codes, found = texts_of(script), codes_of(script), {}
    for name in texts:
        if name and name not in codes:
            fail(f"{script}.md speaks of {name}, which {script}.py does not have: rename it there")
    line = [script]
    while line[-1] in PARENTS:
        line.append(PARENTS[line[-1]])
    for name in ["", *codes]:
        for other in dict.fromkeys([*line, *SCRIPTS]):
            words = texts_of(other).get(name, "").strip()
            if words and (other == script or name and codes_of(other).get(name) == codes[name]):
                found[name] = words
                if other != script:
                    found[name] += f"\n\n*The same in [{other}.py]({other}.html#{name}).*"
                break
        else:
            fail(f"{script}.md says nothing of {name} in {script}.py: add '## {name}'")
    return found


def fail(message: str):
    print(f"build.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- HTML -----------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Markdown with $formulas$ -> HTML."""
    formulas = []
    wide = '<div class="wide" tabindex="0" role="region" aria-label="Table">'

    def keep(match):
        block = match[1] is not None
        formulas.append(convert(match[1] or match[2], display="block" if block else "inline"))
        return f"@formula{len(formulas) - 1}@"

    text = re.sub(r"\$\$(.+?)\$\$|\$(.+?)\$", keep, text, flags=re.DOTALL)
    rendered = scrollable(MarkdownIt("commonmark").enable("table").render(text), "Example")
    rendered = rendered.replace("<table>", f"{wide}<table>").replace("</table>", "</table></div>")
    return re.sub(r"@formula(\d+)@", lambda match: formulas[int(match[1])], rendered)


def linked(text: str, name: str = "") -> str:
    """Scripts that are spoken of lead to their pages, where they have such a part, to it."""

    def link(match):
        if match[1] not in SCRIPTS:
            return match[0]
        place = f"#{name}" if name in codes_of(match[1]) else ""
        return f'<a href="{match[1]}.html{place}">{match[0]}</a>'

    return re.sub(r"<code>(\w+)\.py</code>", link, text)


def scrollable(text: str, label: str) -> str:
    """Code that is wider than the page can be scrolled with the keyboard, too."""
    label = html.escape(label)
    return text.replace("<pre>", f'<pre tabindex="0" role="region" aria-label="{label}">')


def code(text: str, label: str, lexer: Lexer | None = None) -> str:
    """Highlighted; names and punctuation, which have the text's colour, without marks."""
    marked = highlight(text, lexer or PythonLexer(), HtmlFormatter())
    return scrollable(re.sub(r'<span class="[npw]">(.*?)</span>', r"\1", marked), label)


@cache
def style() -> str:
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    own = (DOCS / "style.css").read_text()
    return f"{own}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def page(title: str, body: str, links: str) -> str:
    paper = r'<a href="https://arxiv.org/abs/\1">\g<0></a>'
    body = re.sub(r"arXiv:(\d{4}\.\d{4,5})", paper, body)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style()}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the text</a>
<nav aria-label="Contents">{links}</nav>
<main id="main">
{body}
</main>
</body>
</html>
"""


# --- Figures --------------------------------------------------------------------------------------

LEFT, RIGHT, TOP, BOTTOM = 62, 300, 10, 128  # of training returns, in an SVG of 150
COLUMNS = {"with": 385, "without": 425}  # of greedy scores, beside them


def number(value: float) -> str:
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}").replace("-", "−")


def axis(values: list[float], left: int) -> tuple[Callable, str]:
    """-> the height of a value, and an axis with the lowest and the highest of them."""
    low, high = min(values), max(values)
    y = lambda value: round(BOTTOM - (BOTTOM - TOP) * (value - low) / ((high - low) or 1))
    drawn = f'<path d="M{left},{TOP}V{BOTTOM}"/>'
    for value in {low, high}:
        drawn += f'<text x="{left - 5}" y="{y(value) + 4}" class="end">{number(value)}</text>'
    return y, drawn


def learning(curves: list[tuple[str, list[dict]]]) -> str:
    """Training returns over steps: a line for each kind and rows of a seed."""
    curves = [
        [kind, [(float(x["step"]), float(x["return"])) for x in rows]] for kind, rows in curves
    ]
    right = max(step for _, points in curves for step, _ in points)
    y, drawn = axis([value for _, points in curves for _, value in points], LEFT)
    for kind, points in curves:
        path = " ".join(f"{LEFT + (RIGHT - LEFT) * step / right:.0f},{y(x)}" for step, x in points)
        drawn += f'<polyline class="{kind}" points="{path}"/>'
    steps = f"{right / 1e6:.2g}M" if right > 950_000 else f"{right / 1e3:.0f}k"
    drawn += f'<path d="M{LEFT},{BOTTOM}H{RIGHT}"/><text x="{RIGHT}" y="144" class="end">{steps} steps</text>'
    return f'{drawn}<text transform="translate(12 70) rotate(-90)" class="middle">return</text>'


def greedy(scores: dict[str, list[float]]) -> str:
    """A column of dots for each variant, a dot for each seed."""
    y, drawn = axis(sum(scores.values(), []), COLUMNS["with"] - 20)
    for variant, values in scores.items():
        for value in values:
            drawn += f'<circle class="{variant}" cx="{COLUMNS[variant]}" cy="{y(value)}" r="4"/>'
    return (
        f'{drawn}<text x="{sum(COLUMNS.values()) / 2}" y="144" class="middle">greedy score</text>'
    )


def svg(drawn: str, width: int, told: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} 150" role="img" aria-label="{html.escape(told)}">{drawn}</svg>'
    )


def figures_of(script: str, part: str) -> str:
    """What breaks without a line of this part: a curve for each seed, with it and without."""
    figures, rows = "", tables.read("without")
    for name, change in CHANGES.items():
        both = [[row for row in rows if row["run"] == x] for x in (name, unchanged(change))]
        if all(both) and (change.script, change.part) == (script, part):
            figures += figure(*both, change.what, changed_lines(change), change.flags)
    return figures


def changed_lines(change: Change) -> str:
    """The lines of the part that are changed: as they stand, then as changed."""
    stands = changed = codes_of(change.script)[change.part]
    for old, new in change.replaced.items():
        changed = changed.replace(old, new)
    lines = difflib.unified_diff(stands.splitlines(), changed.splitlines(), n=0)
    return "\n".join(f"{x[0]} {x[1:].strip()}" for x in [*lines][2:] if x[0] in "-+")


def figure(without: list[dict], as_it_is: list[dict], what: str, lines: str, flags: str) -> str:
    """Curves of training and the greedy scores, the changed lines below them."""
    curves, scores = [], {}
    for variant, own in (("with", as_it_is), ("without", without)):
        scores[variant] = [float(row["return"]) for row in own if row["step"] == "greedy"]
        for seed in sorted({row["seed"] for row in own}):
            curve = [row for row in own if row["seed"] == seed and row["step"] != "greedy"]
            curves.append((variant, curve))
    told = f"as it is: {number(mean(scores['with']))}, {what}: {number(mean(scores['without']))}"
    seeds = len({row["seed"] for row in without})
    run = f" Run with <code>{html.escape(flags)}</code>." if flags else ""
    drawn = svg(learning(curves) + greedy(scores), 450, f"Training returns and scores, {told}")
    return (
        f'<figure>{drawn}<figcaption><b class="with">As it is</b> (solid lines, full dots) and '
        f'<b class="without">{html.escape(what)}</b> (dashed, hollow): training returns and greedy scores '
        f"of {seeds} seeds. Mean greedy score {html.escape(told)}.{run}</figcaption>"
        f"{code(lines, f'The line of the figure: {what}', DiffLexer())}</figure>"
    )


# --- Pages ----------------------------------------------------------------------------------------


def picture(name: str) -> str:
    """How the seeds of a task learned; "" if that was not kept."""
    seeds = {}
    for row in tables.read(f"curves_{name}"):
        if float(row["seed"]) in TASKS[name].seeds and row["return"] not in ("", "nan"):
            seeds.setdefault(row["seed"], []).append(row)
    if not seeds:
        return ""
    thinned = [rows[:: -max(1, len(rows) // (2 * POINTS))][::-1] for rows in seeds.values()]
    label = f"{TASKS[name].label}: training returns of {tables.counted(len(seeds), 'seed')}"
    drawn = svg(learning([("with", rows) for rows in thinned]), 310, label)
    return f"<figure>{drawn}<figcaption>{label}.</figcaption></figure>"


def results_table(names: list[str], *left_out: str) -> str:
    """Of these tasks, without the columns that are not wanted or that none of them has."""
    rows = [[TASKS[name].label, *tables.cells_of(name)] for name in names]
    columns = [
        column
        for column in zip(CELLS, *rows, strict=True)
        if any(column[1:]) and column[0] not in left_out
    ]
    heading, *rows = zip(*columns, strict=True)
    return f'<div class="results">{prose(tables.markdown(heading, rows))}</div>'


def results_of(script: str) -> str:
    """Its rows of the README's tables of results, how they were measured, its learning curves."""
    own = {name: task for name, task in TASKS.items() if task.script == f"{script}.py"}
    own = {name: task for name, task in own.items() if any(tables.cells_of(name))}
    if not own:
        return ""
    kinds = [f"{kind}_{name}.csv" for name in own for kind in ("scores", "time_to_solve")]
    rows = [row for row in tables.read("measured") if row["file"] in kinds]
    machines = " or ".join(sorted({row["machine"] for row in rows}))
    commands = {}  # run.py or at_once.py: tasks
    for name in own:
        for row in rows:
            if row["file"] == f"scores_{name}.csv":
                tool = "at_once.py" if "at_once.py" in row["command"] else "run.py scores"
                commands.setdefault(tool, []).append(name)
    said = [f"`python benchmarks/{tool} {' '.join(names)}`" for tool, names in commands.items()]
    words = f"Measured on {machines} (cores x processor) by {' and '.join(said)}."
    if any(tables.launches_of(name) for name in own):
        words += (
            " A launch is timed (`run.py launches`) from typing the command, nothing compiled before, until"
            " the last 100 training episodes average the target: the median, and the slowest."
        )
    if any(tables.speed_of(name) for name in own):
        words += (
            " Steps/s (`run.py speed`) are those while training, without launch and compilation."
        )
    pictures = "".join(map(picture, own))
    return (
        f'<h2 id="section-results">Results</h2>{results_table([*own])}'
        f'{prose(words)}<div class="pictures">{pictures}</div>'
    )


@cache
def difference_of(script: str) -> list[str]:
    """The lines of a diff from its parent's algorithm; [] if it has no parent."""
    if script not in PARENTS:
        return []
    names = (PARENTS[script], script)
    both = [
        "\n\n\n".join(part.code for part in parts_of((ROOT / f"{name}.py").read_text()))
        for name in names
    ]
    changes = difflib.unified_diff(
        *[x.splitlines() for x in both], *[f"{x}.py" for x in names], "", "", 2, ""
    )
    return list(changes)


def size_of_difference(script: str) -> str:
    signs = [line[0] for line in difference_of(script)[2:]]
    return f"{signs.count('+')} lines added, {signs.count('-')} removed"


def header_of(text: str) -> str:
    """The rest of a script's docstring, and its flags, folded."""
    tree = ast.parse(text)
    _, rest = text.split('"""')[1].split("\n\n", 1)  # as written, with its \ at the ends of lines
    rest = re.sub(
        r"^\S.*", lambda line: re.sub(r"(?<![\w/])\w+\.py\b", r"`\g<0>`", line[0]), rest, flags=re.M
    )
    args = next(node for node in tree.body if getattr(node, "name", "") == "Args")
    flags = "\n".join(text.splitlines()[args.decorator_list[0].lineno - 1 : args.end_lineno])
    return (
        f'<h2 id="section-run">Papers, commands, expectations</h2>{linked(prose(rest))}'
        f"<details><summary>Its flags</summary>{code(flags, 'Args')}</details>"
    )


def script_page(script: str) -> str:
    text = (ROOT / f"{script}.py").read_text()
    words = commentary_of(script)
    title = html.escape(ast.get_docstring(ast.parse(text)).partition("\n\n")[0])
    body = [
        f"<h1>{script}.py</h1>",
        f"<p class=lead>{title}</p>",
        linked(prose(words[""])),
        header_of(text),
    ]
    links, section = ['<a href="index.html">All scripts</a>', '<a href="#section-run">Run</a>'], ""
    for part in parts_of(text):
        if part.section != section:
            section = part.section
            anchor = f"section-{section.lower().replace(' ', '-')}"  # parts have the plain names
            body.append(f'<h2 id="{anchor}">{section}</h2>')
            links.append(f'<a href="#{anchor}">{section}</a>')
        body.append(
            f'<section class="part" id="{part.name}" aria-labelledby="{part.name}-name">'
            f'<div class="words"><h3 id="{part.name}-name"><a href="#{part.name}">{part.name}</a></h3>'
            f"{linked(prose(words[part.name]), part.name)}{figures_of(script, part.name)}</div>"
            f"{code(part.code, part.name)}</section>"
        )
    if results := results_of(script):
        body.append(results)
        links.append('<a href="#section-results">Results</a>')
    if changes := "\n".join(difference_of(script)):
        what = f"What it changes in {PARENTS[script]}.py"
        body.append(
            f'<details id="section-changes"><summary>{what}: {size_of_difference(script)}</summary>'
            f"{code(changes, what, DiffLexer())}</details>"
        )
        links.append('<a href="#section-changes">Changes</a>')
    total, algorithm = tables.lines_of(script)
    whole = scrollable(f"<pre>{html.escape(text)}</pre>", f"{script}.py")
    body.append(
        f"<details><summary>The whole file: {total:,} lines, of which {algorithm} are the algorithm; "
        f"the rest is the same in every script</summary>{whole}</details>"
    )
    return page(f"{script}.py: {title}", "\n".join(body), " ".join(links))


def card(script: str) -> str:
    """A script on the index: what it is, its size, its first results and how it came to them."""
    own = {name: task for name, task in (RESULTS | MEMORY).items() if task.script == f"{script}.py"}
    own = [name for name in own if any(tables.cells_of(name)) and CONTROL not in TASKS[name].label]
    size = f"{tables.lines_of(script)[1]} lines of algorithm"
    if script in PARENTS:
        what = f"what it changes in {PARENTS[script]}.py"
        changes = size_of_difference(script)
        size += f'; <a href="{script}.html#section-changes">{what}</a>: {changes}'
    return (
        f'<section class="card" id="{script}" aria-labelledby="{script}-name"><div><h2 id="{script}-name">'
        f'<a href="{script}.html">{script}.py</a></h2><p>{SCRIPTS[script]}</p><p class="size">{size}</p>'
        f"</div><div>{results_table(own[:3], IQM, BAR) if own else ''}</div>"
        f"{next(filter(None, map(picture, own)), '')}</section>"
    )


def index_page() -> str:
    about = linked(prose((DOCS / "index.md").read_text()))
    cards = "\n".join(map(card, SCRIPTS))
    return page("unroll", f"{about}\n{cards}", '<a href="index.html">All scripts</a>')


def main(scripts: list[str]) -> None:
    for name in scripts:
        if name not in SCRIPTS:
            fail(f"there is no {name}.py; there are {', '.join(SCRIPTS)}")
    SITE.mkdir(exist_ok=True)
    for name in scripts or SCRIPTS:
        (SITE / f"{name}.html").write_text(script_page(name))
    (SITE / "index.html").write_text(index_page())
    print(f"{SITE}: {len(scripts or SCRIPTS)} pages and an index")


if __name__ == "__main__":
    main(sys.argv[1:])
