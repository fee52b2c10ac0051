"""The stages of a handover as one page that needs nothing else: no network, and no script to be read.

With its script the page shows one stage at a time and tells of each region what it is; without, it lists all stages, and
the regions' details are their titles and a table. Everything that comes from a plan is escaped.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from crashkernel.memory import format_size
from crashkernel.placement.moves import Check
from crashkernel.report.hazards import VERDICTS, ranges_text, summary, worst_first
from crashkernel.report.picture import FREE, GAP, HOLDERS, KINDS, Picture, describe_rows, headline
from crashkernel.report.svg import LANE_FILLS, escaped
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crashkernel.placement.plan import Hazard, LoadPlan
    from crashkernel.report.picture import Cell, Ruler, Stage

_ROOM = 10_000
"""Units of a bar: hundredths of a per cent."""

_MINIMUM = 150
_PHONE, _DESK = 290, 740
"""Widths of a bar in pixels for which addresses are chosen, so that they do not overlap."""

_CHANGES_SHOWN = 12
_WIDEST = 30
"""The longest label's width, in em; a longer one is cut off at the cell's edge."""

PALETTE = """
:root{color-scheme:light dark;--page:#fff;--text:#1c1c1c;--soft:#5a5a5a;--line:#c9c9c9;--panel:#f4f4f2;--link:#0b57a4;
  --mark:#000}
@media(prefers-color-scheme:dark){:root{--page:#15181b;--text:#e8e8e8;--soft:#a8adb2;--line:#41474d;--panel:#20252a;
  --link:#8ab8f0;--mark:#fff}}
"""
"""The colours of every page, on light and on dark."""

_CSS = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1rem;background:var(--page);color:var(--text);font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:0 0 .25rem}
h2{font-size:1.1rem;margin:0 0 .75rem}
h1,h2,h3,a,.facts,.list,td{overflow-wrap:anywhere}
a{color:var(--link)}
code,pre,.a{font-family:ui-monospace,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);padding:.75rem;border-radius:6px;
  max-height:24rem;overflow:auto;margin:.5rem 0}
.facts{color:var(--soft);margin:0 0 1rem}
.steps{display:none;position:sticky;top:0;z-index:3;background:var(--page);padding:.5rem 0;
  border-bottom:1px solid var(--line);gap:.5rem;align-items:center;margin-bottom:1rem}
.js .steps{display:flex}
.steps input{flex:1;min-width:5rem}
.steps output{font-variant-numeric:tabular-nums;min-width:4.5rem;text-align:right;color:var(--soft)}
.steps button,.save{font:inherit;min-height:2.75rem;min-width:2.75rem;padding:.25rem .9rem;border:1px solid var(--line);
  border-radius:6px;background:var(--panel);color:inherit;cursor:pointer}
.steps button:disabled{opacity:.45;cursor:default}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.stage{margin:0 0 2.5rem;scroll-margin-top:4.5rem}
.js .stage:not(.on){display:none}
.js .stage{margin-bottom:1rem}
.band{display:grid;grid-template-columns:6.5rem 1fr;column-gap:.75rem;margin:0 0 .6rem}
.who{text-align:right;font-size:.85rem;line-height:1.2;padding-top:.35rem}
.who small{display:block;color:var(--soft)}
.bar{position:relative;height:2.6rem}
.lane{grid-column:2;position:relative;height:.5rem;margin-top:2px}
.lane i{position:absolute;top:0;height:100%;min-width:2px;border-radius:2px}
.lanename{font-size:.7rem;line-height:.7rem;text-align:right;color:var(--soft)}
.cell{position:absolute;top:0;height:100%;border:0;border-right:1px solid #fff;padding:0;margin:0;font:inherit;
  font-size:.8rem;overflow:hidden;cursor:help;border-radius:0;container-type:inline-size;text-overflow:clip;
  white-space:nowrap}
.cell:focus-visible{z-index:2;outline-offset:-3px;outline-color:#000;box-shadow:inset 0 0 0 5px #fff}
.cell.now{box-shadow:inset 0 0 0 3px #000,inset 0 0 0 5px #fff}
.cell b,.cell s{font-weight:400;text-decoration:none;display:none}
.cell b::before,.cell s::before{content:attr(data-label)}
.wide::after{content:"";position:absolute;top:3px;left:calc(50% - 2px);width:4px;height:4px;border-radius:50%;
  background:currentColor}
.gap{color:inherit;background:repeating-linear-gradient(-45deg,transparent 0 5px,#9a9a9a 5px 6px)}
.mixed{background-image:repeating-linear-gradient(-45deg,transparent 0 8px,#9a9a9a 8px 9px)}
.break{border-left:3px double #000}
.changed{position:absolute;top:-3px;bottom:-3px;min-width:4px;border:2px solid var(--mark);border-radius:3px;
  pointer-events:none}
.checked{border-style:dashed;border-color:#fff;outline:2px dashed #000;outline-offset:-2px}
.at{grid-column:2;position:relative;height:1.1rem;font-size:.72rem;color:var(--soft)}
.at span{position:absolute;white-space:nowrap}
.at .desk{display:none}
.at .end{right:0}
.flow{position:relative;height:2.4rem;margin:0 0 .2rem calc(6.5rem + .75rem)}
.flow svg{width:100%;height:100%;display:block;overflow:visible}
.flow polygon{fill:var(--text);opacity:.14}
.flow path{fill:none;stroke:var(--text);stroke-width:1.5;vector-effect:non-scaling-stroke}
.head{position:absolute;width:0;height:0;margin-left:-6px;border:6px solid transparent}
.up{top:-1px;border-top:0;border-bottom:9px solid var(--text)}
.down{bottom:-1px;border-bottom:0;border-top:9px solid var(--text)}
.ghost{position:absolute;z-index:4;height:2.6rem;border:2px solid var(--mark);border-radius:3px;pointer-events:none;
  opacity:.75}
.told{display:none;background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem;
  min-height:9rem;margin:0 0 1.25rem;font-size:.9rem}
.js .told{display:block}
.told strong{display:block}
.told dl{display:grid;grid-template-columns:max-content 1fr;gap:0 .8rem;margin:.2rem 0 0}
.told dt{color:var(--soft)}
.told dd{margin:0;overflow-wrap:anywhere}
.list{font-size:.9rem;padding-left:1.2rem;margin:.25rem 0 .75rem}
table{border-collapse:collapse;font-size:.85rem}
td,th{text-align:left;padding:.15rem .9rem .15rem 0;vertical-align:top;border-bottom:1px solid var(--line)}
td.a,td.n{white-space:nowrap}
.scroll{overflow-x:auto}
.key{display:flex;flex-wrap:wrap;gap:.35rem 1.1rem;list-style:none;padding:0;font-size:.85rem}
.key i{display:inline-block;width:1rem;height:1rem;vertical-align:-.15rem;margin-right:.4rem;border:1px solid #808080;
  border-radius:2px}
.key i.l{height:.5rem;vertical-align:0;border:0}
.key i.c{border:2px solid var(--mark)}
summary{cursor:pointer;padding:.5rem 0;color:var(--link)}
.hazard{border-left:5px solid;padding:.1rem 0 .1rem .8rem;margin:0 0 .8rem}
.hazard h3{font-size:1rem;margin:0}
.hazard p{margin:.15rem 0;overflow-wrap:anywhere}
.hazard small{color:var(--soft)}
.badge{display:inline-block;color:#fff;border-radius:4px;padding:0 .45rem;margin-right:.5rem;font-size:.8rem;
  font-weight:600}
nav ol{columns:2 22rem;font-size:.85rem;padding-left:1.6rem;margin:.25rem 0 1rem}
nav a[aria-current]{font-weight:700;color:inherit}
@media(min-width:56rem){.at .desk{display:inline}}
@media(max-width:40rem){body{padding:.75rem}.band{grid-template-columns:1fr}.who{text-align:left;padding:0}
  .who small{display:inline}.lanename{text-align:left}.lane,.at{grid-column:1}.flow{margin-left:0}.bar{height:3rem}
  .told{position:sticky;bottom:.25rem;z-index:3}}
@media print{:root{color-scheme:light;--page:#fff;--text:#000;--soft:#505050;--line:#c0c0c0;--panel:#f4f4f2;
  --link:#0b57a4;--mark:#000}
.steps,.told,nav,.save{display:none!important}.stage,.js .stage:not(.on){display:block!important;
  break-inside:avoid}body{max-width:none;color:#000;background:#fff}*{print-color-adjust:exact;
  -webkit-print-color-adjust:exact}pre{max-height:none}}
@media(prefers-reduced-motion:no-preference){.js .on .changed{animation:seen .5s ease-out 2}
  @keyframes seen{from{opacity:0}}}
"""

_SCRIPT = """
(() => {
  const all = [...document.querySelectorAll('.stage')], links = [...document.querySelectorAll('nav a')];
  const [slider, place, told, back, next, save, plan] =
    ['slider', 'place', 'told', 'back', 'next', 'save', 'plan'].map(id => document.getElementById(id));
  const calm = matchMedia('(prefers-reduced-motion: reduce)');
  const words = ['addresses', 'size', 'these bytes', 'who may write', 'drawn'];
  let now = -1;
  document.documentElement.classList.add('js');
  for (const cell of document.querySelectorAll('.cell')) {
    cell.dataset.told = cell.title;
    cell.setAttribute('aria-label', cell.title.replaceAll('\\n', ', '));
    cell.removeAttribute('title');
  }
  const element = (kind, text) => Object.assign(document.createElement(kind), {textContent: text});
  const tell = cell => {
    for (const old of document.querySelectorAll('.cell.now')) old.classList.remove('now');
    cell.classList.add('now');
    const [name, ...rest] = cell.dataset.told.split('\\n'), list = element('dl', '');
    rest.forEach((text, n) => { if (text) list.append(element('dt', words[n]), element('dd', text)); });
    told.replaceChildren(element('strong', name), list);
  };
  const fly = stage => {
    const ends = ['from', 'to'].map(end => stage.querySelector(`[data-end=${end}]`)).filter(Boolean);
    if (calm.matches || ends.length !== 2 || !stage.animate) return;
    const frame = stage.getBoundingClientRect(), boxes = ends.map(end => end.getBoundingClientRect());
    for (const [from, to] of stage.querySelector('[data-both]') ? [boxes, [...boxes].reverse()] : [boxes]) {
      const ghost = document.createElement('div'), at = box => ({
        left: `${box.left - frame.left}px`, top: `${box.top - frame.top}px`, width: `${Math.max(4, box.width)}px`});
      ghost.className = 'ghost';
      stage.style.position = 'relative';
      stage.append(ghost);
      ghost.animate([at(from), at(to)], {duration: 700, easing: 'ease-in-out'}).finished.finally(() => ghost.remove());
    }
  };
  const show = (wanted, written) => {
    const number = Math.min(Math.max(wanted, 0), all.length - 1);
    if (number === now) return;
    const forward = number === now + 1;
    now = number;
    all.forEach((stage, n) => stage.classList.toggle('on', n === number));
    links.forEach((link, n) => n === number ? link.setAttribute('aria-current', 'step') : link.removeAttribute('aria-current'));
    slider.value = number;
    slider.setAttribute('aria-valuetext', all[number].querySelector('h2').textContent);
    place.textContent = `${number + 1} of ${all.length}`;
    back.disabled = number === 0;
    next.disabled = number === all.length - 1;
    all[number].querySelector('.slot').append(told);
    told.replaceChildren('Point at a region, tap it or move to it with the Tab key.');
    if (written) history.replaceState(null, '', `#${all[number].id}`);
    if (forward) fly(all[number]);
  };
  const asked = () => all.findIndex(stage => `#${stage.id}` === location.hash);
  back.onclick = () => show(now - 1, true);
  next.onclick = () => show(now + 1, true);
  slider.oninput = () => show(+slider.value, true);
  links.forEach((link, n) => link.addEventListener('click', event => { event.preventDefault(); show(n, true); }));
  addEventListener('hashchange', () => { if (asked() >= 0) show(asked(), false); });
  addEventListener('keydown', event => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target === slider) return;
    if (event.target.closest('pre')) return;
    const step = {ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: all.length - 1}[event.key];
    if (step !== undefined) { event.preventDefault(); show(step, true); }
  });
  for (const kind of ['pointerover', 'focusin', 'click'])
    addEventListener(kind, event => { const cell = event.target.closest?.('.cell'); if (cell) tell(cell); });
  save.hidden = false;
  save.onclick = () => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([plan.textContent], {type: 'application/json'}));
    link.download = 'plan.json';
    link.click();
    URL.revokeObjectURL(link.href);
  };
  show(Math.max(asked(), 0), false);
})();
"""


def stages_html(plan: LoadPlan) -> str:
    """A page of all stages of `plan`, its hazards, K2's command line and the plan itself."""
    picture = Picture(plan)
    rulers = [band.ruler(_ROOM, _MINIMUM) for band in picture.bands]
    first, *others = headline(plan)
    last = len(picture.stages) - 1
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Handover to {escaped(first)}</title>",
        f"<style>{PALETTE}{_CSS}{_fills()}{_label_rules()}</style></head><body>",
        f"<header><h1>Handover to {escaped(first)}</h1>",
        f'<p class="facts">{"<br>".join(map(escaped, others))}<br>'
        f'<a href="#hazards">Hazards: {escaped(summary(plan.hazards))}</a></p></header><main>',
        '<div class="steps" role="group" aria-label="Stage"><button id="back" aria-label="Stage before">&larr;</button>'
        f'<input id="slider" type="range" min="0" max="{last}" value="0" aria-label="Stage">'
        '<output id="place" aria-live="polite"></output><button id="next" aria-label="Next stage">&rarr;</button></div>',
    ]
    for number, stage in enumerate(picture.stages):
        parts += _stage(picture, rulers, number, stage)
    parts += [
        '<div id="told" class="told" role="status"></div>',
        *_key(picture, rulers),
        "<nav aria-label='Stages'><h2>All stages</h2><ol>",
        *(f'<li><a href="#stage-{n}">{escaped(stage.title)}</a></li>' for n, stage in enumerate(picture.stages)),
        "</ol></nav>",
        f'<section id="hazards"><h2>Hazards: {escaped(summary(plan.hazards))}</h2>',
        *(_hazard(hazard) for hazard in worst_first(plan.hazards)),
        "</section>",
        f"<section><h2>K2's command line</h2><p>K2 is entered at <code>{plan.entry:#x}</code> with</p>",
        f'<pre tabindex="0">{escaped(plan.cmdline)}</pre></section>',
        '<section><h2>The plan</h2><button id="save" class="save" hidden>Save as plan.json</button>',
        f'<details><summary>Show it</summary><pre id="plan" tabindex="0">{escape(plan.to_json())}</pre></details></section>',
        f"</main><script>{_SCRIPT}</script></body></html>",
        "",
    ]
    return "\n".join(parts)


def _stage(picture: Picture, rulers: Sequence[Ruler], number: int, stage: Stage) -> list[str]:
    whole, low, reserved = rulers
    parts = [f'<section class="stage" id="stage-{number}" aria-labelledby="title-{number}">']
    parts.append(f'<h2 id="title-{number}">{escaped(stage.title)}</h2>')
    parts += _band(picture, whole, stage)
    parts += _band(picture, low, stage)
    parts += _flow(stage, low, reserved)
    parts += _band(picture, reserved, stage)
    parts.append('<div class="slot"></div>')
    changes = picture.changes(number)
    if changes:
        parts.append('<ul class="list">')
        for where, before, after in changes[:_CHANGES_SHOWN]:
            became = "as before" if before == after else f"{escaped(before)} &rarr; {escaped(after)}"
            parts.append(f'<li><span class="a">{where}</span> ({format_size(where.size)}): {became}</li>')
        if len(changes) > _CHANGES_SHOWN:
            parts.append(f"<li>and {len(changes) - _CHANGES_SHOWN} more</li>")
        parts.append("</ul>")
    parts.append("<details><summary>All regions as a table</summary><div class='scroll'><table><thead><tr><th>addresses</th>")
    parts.append("<th>size</th><th>what</th><th>who may write</th></tr></thead><tbody>")
    for where, size, what, piece in describe_rows(stage.pieces):
        parts.append(
            f'<tr><td class="a">{where}</td><td class="n">{format_size(size)}</td><td>{escaped(what)}</td>'
            f"<td>{escaped(HOLDERS[piece.holder])}</td></tr>"
        )
    return [*parts, "</tbody></table></div></details></section>"]


def _band(picture: Picture, ruler: Ruler, stage: Stage) -> list[str]:
    band, cells = ruler.band, ruler.cells(stage)
    bar = [
        f'<div class="who">{escaped(band.title)} <small>{format_size(band.window.size)}</small></div>',
        f'<div class="bar" role="group" aria-label="{escaped(band.title)}, {band.window}">',
        *(_cell(cell) for cell in cells),
    ]
    flow = stage.flow
    for changed in stage.changed:
        if (span := ruler.span(changed)) is not None:
            bar.append(f'<span class="changed" style="{_place(*span)}"></span>')
    if isinstance(stage.move, Check) and (span := ruler.span(stage.move.range)) is not None:
        bar.append(f'<span class="changed checked" style="{_place(*span)}"></span>')
    if flow is not None and band.name != "all":
        both = " data-both" if flow.both else ""
        for end, where in (("from", flow.source), ("to", flow.target)):
            if (span := ruler.span(where)) is not None:
                bar.append(f'<span class="changed" style="{_place(*span)};visibility:hidden" data-end="{end}"{both}></span>')
    bar.append("</div>")
    beside = []
    for lane in picture.lanes(stage, band.window):
        spans = [span for each in lane.ranges if (span := ruler.span(each)) is not None]
        fill = f";background:{LANE_FILLS[lane.name]}"
        beside.append(f'<div class="lanename" title="{escaped(lane.meaning)}">{escaped(lane.label)}</div><div class="lane">')
        beside += [f'<i style="{_place(*span)}{fill}"></i>' for span in spans]
        beside.append("</div>")
    addresses = ['<div class="at a">', *_addresses(ruler, cells), "</div>"]
    # arrows go from the low memory's lower edge
    rows = [*addresses, *beside, *bar] if band.name == "low" else [*bar, *beside, *addresses]
    return ['<div class="band">', *rows, "</div>"]


def _cell(cell: Cell) -> str:
    came_from, holder = cell.details
    size = format_size(sum(piece.range.size for piece in cell.pieces))
    drawn = "wider than to scale" if cell.widened else ""
    told = "\n".join([cell.name, str(cell.range), size, came_from, holder, drawn]).rstrip("\n")
    classes = [
        "cell",
        cell.kind.name,
        *(["mixed"] if cell.mixed else []),
        *(["wide"] if cell.widened else []),
        *(["break"] if cell.broken else []),
    ]
    labels = [label for label in cell.labels if label]
    # what is shown is chosen by width, what is told is the title
    spoken = [f'<b class="w{_width_class(label)}" data-label="{escaped(label)}"></b>' for label in labels if len(label) > 1]
    spoken += [f'<s data-label="{escaped(label)}"></s>' for label in labels if len(label) == 1]
    return (
        f'<button type="button" class="{" ".join(classes)}" style="{_place(cell.left, cell.right)}" title="{escaped(told)}">'
        f"{''.join(spoken)}</button>"
    )


def _width_class(label: str) -> int:
    """Whole em it takes: rules of the style sheet show a label only where it fits, and hide the shorter ones."""
    return min(_WIDEST, max(2, round(len(visible(label)) * 0.56 + 0.9)))


def _label_rules() -> str:
    """Of the labels of a cell, the longest that fits is shown."""
    rules = (
        f"@container(min-width:{width}em){{.cell .w{width}{{display:inline}}.cell .w{width}~*{{display:none}}}}"
        for width in range(2, _WIDEST + 1)
    )
    return "@container(min-width:.8em){.cell s{display:inline}}" + "".join(rules)


def _fills() -> str:
    return "".join(f".{kind.name}{{background-color:{kind.fill};color:{kind.ink}}}" for kind in KINDS if kind is not GAP)


def _place(left: float, right: float) -> str:
    return f"left:{left / 100:g}%;width:{(right - left) / 100:.4g}%"


def _addresses(ruler: Ruler, cells: Sequence[Cell]) -> list[str]:
    end = f"{ruler.edges[-1]:#x}"
    parts = [f'<span class="end">{end}</span>']
    first, *others = cells
    wanted = [first, *sorted(others, key=lambda each: (each.kind is FREE, each.left - each.right))]
    shown: set[int] = set()
    for pixels, style in ((_PHONE, ""), (_DESK, ' class="desk"')):
        letter = 7.2 * _ROOM / pixels
        taken = [(_ROOM - letter * len(end), float(_ROOM))]
        # what a phone shows stays where it is on a desk
        for cell in [*(each for each in wanted if each.range.start in shown), *wanted]:
            text = f"{cell.range.start:#x}"
            span = (float(cell.left), cell.left + letter * (len(text) + 1))
            free = all(span[1] < left or right < span[0] for left, right in taken)
            if cell.range.start in shown:
                taken.append(span)
            elif free:
                taken.append(span)
                shown.add(cell.range.start)
                parts.append(f'<span{style} style="left:{cell.left / 100:g}%">{text}</span>')
    return parts


def _flow(stage: Stage, low: Ruler, reserved: Ruler) -> list[str]:
    """An arrow between the two bars, or an arc beside one."""
    flow = stage.flow
    if flow is None:
        return []
    ends = []
    for where in (flow.source, flow.target):
        upper = low.span(where)
        span = upper or reserved.span(where)
        if span is None:
            return []
        ends.append((span[0], max(span[1], span[0] + 40), upper is not None))
    (x0, x1, up0), (x2, x3, up1) = ends
    source, target = (x0 + x1) / 2, (x2 + x3) / 2
    y0, y1 = (0 if up0 else 100), (0 if up1 else 100)
    arc = f"M{source:g} {y0}C{source:g} {40 if up0 == up1 else 50} {target:g} {40 if up0 == up1 else 50} {target:g} {y1}"
    if up0 == up1:
        arc = f"M{source:g} {y0}C{source:g} {20 if y0 else 80} {target:g} {20 if y0 else 80} {target:g} {y1}"
    ribbon = f'<polygon points="{x0:g},{y0} {x1:g},{y0} {x3:g},{y1} {x2:g},{y1}"/>' if up0 != up1 else ""
    heads = [(target, up1)] + ([(source, up0)] if flow.both else [])
    return [
        '<div class="flow" aria-hidden="true"><svg viewBox="0 0 10000 100" preserveAspectRatio="none">',
        f'{ribbon}<path d="{arc}"/></svg>',
        *(f'<span class="head {"up" if upper else "down"}" style="left:{x / 100:g}%"></span>' for x, upper in heads),
        "</div>",
    ]


def _key(picture: Picture, rulers: Sequence[Ruler]) -> list[str]:
    parts = ['<section><h2>Colours</h2><ul class="key">']
    parts += [f'<li><i class="{kind.name}"></i>{escaped(kind.meaning)}</li>' for kind in picture.kinds]
    parts.append('<li><i class="c"></i>changed by this step</li>')
    lanes = {lane.name: lane for stage in picture.stages for lane in picture.lanes(stage)}
    parts += [
        f'<li><i class="l" style="background:{LANE_FILLS[lane.name]}"></i>{escaped(lane.label)}: {escaped(lane.meaning)}</li>'
        for lane in lanes.values()
    ]
    note = "Each bar is linear, and the same at every stage. Regions with a dot are drawn wider than to scale."
    if any(len(ruler.band.stretches) > 1 for ruler in rulers):
        note += " At the double line in the reserved region the scale changes."
    return [*parts, f'</ul><p class="facts">{note}</p></section>']


def _hazard(hazard: Hazard) -> str:
    word, colour = VERDICTS[hazard.verdict]
    parts = [
        f'<article class="hazard" style="border-color:{colour}"><h3>'
        f'<span class="badge" style="background:{colour}">{word}</span>'
        f"{escaped(hazard.title)} <small>{escaped(hazard.name)}</small></h3><p>{escaped(hazard.reason)}</p>"
    ]
    if hazard.ranges:
        parts.append(f'<p class="a">{ranges_text(hazard)}</p>')
    if hazard.advice:
        parts.append(f"<p><strong>What to do:</strong> {escaped(hazard.advice)}</p>")
    if hazard.source:
        parts.append(f"<p><small>Source: {escaped(hazard.source)}</small></p>")
    return "".join([*parts, "</article>"])
