"""A campaign as one page that needs nothing else: no network, and no script to be read.

Everything in a database is untrusted. It is escaped, and the page's own policy lets a browser run the page's one script and
fetch nothing at all. The script filters, copies and opens; without it all is there, and `<details>` open by themselves.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

from crashkernel.errors import FormatError
from crashkernel.memory import RangeSet, format_size
from crashkernel.placement.plan import LoadPlan
from crashkernel.report.campaign import STANDINGS, Standing, duration
from crashkernel.report.html import PALETTE
from crashkernel.report.picture import GAP, KINDS
from crashkernel.report.svg import GAP_PATTERN, LANE_FILLS, escaped, moment_style, moment_svg
from crashkernel.report.terminal import tail

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from crashkernel.report.campaign import Campaign, Cell, Drill, Failures, Spread, Table
    from crashkernel.report.svg import Moment

_BEFORE = ("packages", "wait", "K1 boot", "load", "fault")
_AFTER = ("K2 boot", "capture", "verify")
"""Stages of a drill at which K1 still lives, and at which K2 runs or has run."""

_LINES, _LEAST_LINES, _ALL_LINES = 40, 8, 2400
"""Of a console: so many at most, so many in any case, and so many of all consoles together."""
_COLUMNS = 200
_MAPS = 40
"""Different maps on a page, of some 15 KB each."""
_WRONG_SHOWN = 8

_VERDICTS = {0: "all as expected", 1: "NOT as expected", 3: "not complete"}

_PARTS = (
    *("#005faf", "#0a7d78", "#a64800", "#8a3f9e", "#6b6b00", "#b3261e", "#4d6a9a", "#2f7a2f", "#8c5a3c", "#c2185b", "#00798c"),
    *("#a0522d", "#3d5a3c", "#5c3d8f"),
)
"""Colours of the parts of a bar that has a list with their names beside it: on light and on dark."""

_CSS = """
:root{--passed:#dff2e7;--passed-ink:#064a2e;--known:#dcebfa;--known-ink:#0c3f6e;--missing:#ececec;--missing-ink:#454545;
  --error:#f6ecc4;--error-ink:#5c4800;--surprise:#fbe3d0;--surprise-ink:#7a3200;--failed:#b3261e;--failed-ink:#fff;
  --zero:#a64800;--reserved:#005faf}
@media(prefers-color-scheme:dark){:root{--passed:#12402b;--passed-ink:#c9f0db;--known:#15395c;--known-ink:#cfe5fb;
  --missing:#34393e;--missing-ink:#d5d8db;--error:#4d4008;--error-ink:#fbeeb0;--surprise:#5a2c0a;--surprise-ink:#fddfc8;
  --failed:#c4362d;--failed-ink:#fff;--zero:#f29a4a;--reserved:#6cb2f5}}
*{box-sizing:border-box}
html{scroll-padding-top:1rem}
body{margin:0 auto;max-width:76rem;padding:1rem 1.25rem 3rem;background:var(--page);color:var(--text);
  font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.15rem;margin:0;font-weight:600}
h2{font-size:1.3rem;margin:2.75rem 0 .75rem;padding-bottom:.25rem;border-bottom:2px solid var(--line)}
h3{font-size:1rem;margin:0 0 .4rem}
h1,h2,h3,p,li,dd,summary,.list td{overflow-wrap:anywhere}
p{margin:.35rem 0}
a{color:var(--link)}
code,pre{font-family:ui-monospace,monospace;font-size:.8125rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);padding:.6rem .75rem;border-radius:6px;margin:.3rem 0;
  line-height:1.4}
pre code{font-size:inherit}
pre.console{white-space:pre;overflow:auto;overflow-wrap:normal;max-height:28rem;display:flex;flex-direction:column-reverse}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-100rem}.skip:focus{position:static}
.answer{font-size:clamp(1.35rem,4.5vw,2.1rem);line-height:1.25;font-weight:700;margin:.35rem 0 .9rem;text-wrap:balance}
.measures{display:flex;flex-wrap:wrap;gap:.6rem;margin:.75rem 0;padding:0}
.measures div{background:var(--panel);border-radius:8px;padding:.45rem .9rem;flex:1 1 9rem;display:flex;
  flex-direction:column-reverse}
.measures dd{font-size:1.35rem;font-weight:700;margin:0}
.measures dt,.facts,.soft{color:var(--soft);font-size:.875rem}
.facts{margin:.15rem 0}
.share{display:flex;height:1.1rem;border-radius:5px;overflow:hidden;margin:.6rem 0;gap:2px}
.share i{min-width:4px}
nav ul{display:flex;flex-wrap:wrap;gap:.35rem .4rem;list-style:none;padding:0;margin:.9rem 0 0}
nav a{display:block;padding:.4rem .75rem;border:1px solid var(--line);border-radius:99px;text-decoration:none;font-size:.9rem}
.badge{display:inline-block;border-radius:4px;padding:.05rem .5rem;font-size:.85rem;font-weight:600;white-space:nowrap}
.passed{background:var(--passed);color:var(--passed-ink)}.known{background:var(--known);color:var(--known-ink)}
.missing{background:var(--missing);color:var(--missing-ink)}.error{background:var(--error);color:var(--error-ink)}
.surprise{background:var(--surprise);color:var(--surprise-ink)}.failed{background:var(--failed);color:var(--failed-ink)}
.group{border:1px solid var(--line);border-radius:8px;margin:0 0 1rem;padding:.8rem 1rem}
.group.bad{border-left:6px solid var(--failed)}.group.surprised{border-left:6px solid var(--surprise-ink)}
.group>p{margin:.3rem 0 .5rem}
.drill{border-top:1px solid var(--line)}
.drill[open]{padding-bottom:.75rem}
summary{cursor:pointer;padding:.5rem 0;min-height:2.75rem}
.drill summary{font-weight:600}
.inside{padding-left:1rem}
h4{font-size:.9rem;margin:.9rem 0 .2rem}
th small{font-size:.9em}
.about{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .9rem;margin:.2rem 0;font-size:.9rem}
.about dt{color:var(--soft)}.about dd{margin:0}
.scroll{overflow-x:auto;position:relative}
table{border-collapse:collapse;font-size:.875rem;width:100%}
caption{text-align:left;color:var(--soft);padding:0 0 .5rem;caption-side:top}
td,th{text-align:left;padding:.3rem .7rem .3rem .3rem;vertical-align:middle;border-bottom:1px solid var(--line);font-weight:400}
thead th{white-space:nowrap;font-weight:600;color:var(--soft);vertical-align:bottom}
th[scope=rowgroup],th[scope=colgroup]{font-weight:700;color:var(--text)}
th[scope=rowgroup]{padding-top:1rem}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
caption span{display:inline-block;max-width:min(100%,calc(100vw - 2.5rem))}
.matrix th[scope=row]:first-child{position:sticky;left:0;z-index:1;background:var(--page)}
.matrix th[scope=row]{padding-top:.1rem;padding-bottom:.1rem}
.cell{padding:1px 2px}
.cell a{display:flex;flex-wrap:wrap;gap:0 .5rem;align-items:baseline;justify-content:space-between;padding:.1rem .5rem;
  border-radius:5px;text-decoration:none;font-weight:600;min-height:1.6rem}
.cell a:hover{text-decoration:underline}
.cell small{font-weight:400;font-size:.78rem;white-space:nowrap}
.strip{width:100%;min-width:11rem;height:1.5rem;display:block}
.strip line,.strip path{vector-effect:non-scaling-stroke}
.zero{--ink:var(--zero)}.reserved{--ink:var(--reserved)}
.strip path{stroke:var(--ink,var(--text));stroke-width:1;opacity:.45}
.strip rect{fill:var(--ink,var(--text));opacity:.3}
.strip line{stroke:var(--ink,var(--text));stroke-width:1.5}
.strip .median{stroke-width:3}
.dot{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;background:var(--ink,var(--text));margin-right:.4rem}
.sizes{width:auto;min-width:min(100%,40rem)}.sizes td:last-child{width:100%;min-width:5rem}
.sizes i{display:block;height:.9rem;border-radius:3px;background:var(--soft)}.sizes .own i{background:var(--reserved)}
.sizes .own th{font-weight:700}.sizes th{white-space:nowrap}
.map{display:block;width:100%;min-width:44rem;height:auto}
.maps{margin:.3rem 0}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1rem;list-style:none;padding:0;margin:.5rem 0;font-size:.85rem}
.key i{display:inline-block;width:1rem;height:1rem;vertical-align:-.15rem;margin-right:.4rem;border:1px solid #808080;
  border-radius:2px}
.key i.lane{height:.5rem;vertical-align:0;border:0}
.filter{display:none;flex-wrap:wrap;gap:.6rem;margin:0 0 .75rem;align-items:end}
.js .filter{display:flex}
.filter label{display:flex;flex-direction:column;font-size:.85rem;color:var(--soft);flex:1 1 12rem}
.filter input,.filter select,.copy{font:inherit;color:var(--text);background:var(--page);border:1px solid var(--soft);
  border-radius:6px;padding:.4rem .6rem;min-height:2.75rem;width:100%}
.filter output{flex:1 1 8rem;padding:.6rem 0;font-size:.9rem}
.command b{font-weight:400;display:inline-block;max-width:100%}
.again{display:flex;gap:.5rem;align-items:center}.again pre{flex:1;min-width:0}
.copy{width:auto;cursor:pointer;font-size:.85rem;min-height:2.25rem;padding:.2rem .8rem}
.list td{vertical-align:top}
.list details summary{padding:0;min-height:1.5rem;color:var(--link);font-size:.85rem}
.list tr:target,.drill:target>summary{outline:3px solid var(--link);outline-offset:-1px}
.told{display:block;color:var(--soft);font-size:.85rem}
footer{margin-top:3rem;color:var(--soft);font-size:.85rem;border-top:1px solid var(--line);padding-top:.75rem}
@media(max-width:44rem){body{padding:.75rem .75rem 2rem}td,th{padding:.25rem .4rem .25rem .2rem}table{font-size:.8125rem}
  .wide,.matrix thead .dot{display:none}.inside{padding-left:0}.group{padding:.7rem}.about{grid-template-columns:1fr}
  .about dd{margin:0 0 .3rem}.matrix{font-size:.75rem}.matrix td,.matrix th{padding-left:0;padding-right:.25rem}
  .matrix .cell{padding:1px 0 1px 2px}.cell a{padding:.2rem .25rem;min-height:2.2rem}.cell small{font-size:.7rem}
  .times th,.times td{padding:.25rem .25rem .25rem 0}.strip{min-width:4.5rem}
  .list,.list tbody{display:block}.list thead{display:none}
  .matrix thead th{white-space:normal}
  .list tr{display:flex;flex-wrap:wrap;gap:.1rem .6rem;align-items:center;padding:.5rem .1rem;
    border-bottom:1px solid var(--line)}
  .list tr[hidden]{display:none}.list td{border:0;padding:0}.list td.n{color:var(--soft)}
  .list td:nth-child(3){order:1;flex-basis:100%}.again{flex-wrap:wrap}.again pre{flex-basis:100%}}
@media print{@page{margin:14mm}
  :root{color-scheme:light;--page:#fff;--text:#000;--soft:#404040;--line:#b0b0b0;--panel:#f2f2f2;--link:#000;--passed:#dff2e7;
    --passed-ink:#064a2e;--known:#dcebfa;--known-ink:#0c3f6e;--missing:#ececec;--missing-ink:#454545;--error:#f6ecc4;
    --error-ink:#5c4800;--surprise:#fbe3d0;--surprise-ink:#7a3200;--failed:#b3261e;--failed-ink:#fff;--zero:#a64800;
    --reserved:#005faf}
  *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
  body{max-width:none;padding:0;font-size:9.5pt}nav,.filter,.copy,.skip{display:none!important}
  details::details-content{content-visibility:visible!important;display:block!important}
  .list details::details-content{display:none!important;content-visibility:hidden!important}.list details{display:none}
  .scroll{overflow:visible}caption span{max-width:none}.map{min-width:0}.strip{min-width:0}
  .matrix th[scope=row]:first-child{position:static}.matrix thead .dot{display:none}.matrix{font-size:7pt}
  .matrix thead th{white-space:normal}.matrix td,.matrix th{padding:.1rem .2rem .1rem 0}.matrix .cell{padding:1px}
  .cell a{padding:0 .2rem;gap:0 .2rem}.cell small{font-size:6pt}
  table{font-size:8pt}thead{display:table-header-group}tr,.measures,.share,.maps,svg,h3,summary,.about,.again{break-inside:avoid}
  h2,h3,h4,summary,caption,th[scope=rowgroup]{break-after:avoid}
  pre.console{display:block;white-space:pre-wrap;overflow:visible;overflow-wrap:anywhere;max-height:none;font-size:7pt;
    box-decoration-break:clone;-webkit-box-decoration-break:clone}
  .group{break-inside:auto}.list tr[hidden]{display:table-row}
  a{text-decoration:none}.answer{font-size:18pt}pre,code{font-size:8pt}}
"""

_SCRIPT = """
(() => {
  const root = document.documentElement, all = [...document.querySelectorAll('details')];
  root.classList.add('js');
  for (const code of document.querySelectorAll('pre.command')) {
    const button = Object.assign(document.createElement('button'), {type: 'button', className: 'copy', textContent: 'Copy'});
    button.addEventListener('click', async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = 'Copied';
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = 'Selected';
      }
      setTimeout(() => { button.textContent = 'Copy'; }, 2500);
    });
    code.after(button);
  }
  const words = document.getElementById('words'), stands = document.getElementById('stands');
  const shown = document.getElementById('shown'), rows = [...document.querySelectorAll('.list tbody tr')];
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.cells[2].textContent.toLowerCase();
      row.hidden = (stands.value && row.dataset.standing !== stands.value) || !wanted.every(word => text.includes(word));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length}`;
  };
  if (words) {
    for (const control of [words, stands]) for (const kind of ['input', 'change']) control.addEventListener(kind, filter);
    filter();
  }
  const go = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    if (target.hidden) {
      words.value = stands.value = '';
      filter();
    }
    const box = target.closest('details');
    if (box) box.open = true;
    target.scrollIntoView();
  };
  addEventListener('hashchange', go);
  go();
  let closed = [];
  addEventListener('beforeprint', () => {
    closed = all.filter(each => !each.open && !each.closest('.list'));
    for (const each of closed) each.open = true;
  });
  addEventListener('afterprint', () => { for (const each of closed) each.open = false; });
})();
"""


def campaign_html(campaign: Campaign) -> str:
    """The page."""
    return _Page(campaign).render()


class _Page:
    """Draws from top to bottom."""

    def __init__(self, campaign: Campaign) -> None:
        self._campaign = campaign
        blocks = sum(len(group.drills) for group in campaign.failures)
        self._lines = min(_LINES, max(_LEAST_LINES, _ALL_LINES // max(1, blocks)))
        self._maps: dict[str, int] = {}  # of each drawing, the number it is found under
        self._drawn: dict[tuple[str, Moment, RangeSet], str] = {}

    def render(self) -> str:
        campaign = self._campaign
        sections = [
            ("failures", "What did not pass", self._failures()),
            ("matrix", "Drills by configuration", _matrix(campaign.matrix, "drills without a fault")),
            ("faults", "Faults", _matrix(campaign.faults, "drills with a fault")),
            ("placements", "The two placements", self._placements()),
            ("times", "How long it took", _times(campaign)),
            ("sizes", "Smallest reservations found", _sizes(campaign)),
            ("drills", "All drills", _list(campaign)),
        ]
        sections = [(name, title, parts) for name, title, parts in sections if parts]
        digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
        parts = [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escaped(f'{campaign.name}: {campaign.answer}')}</title>",
            f"<style>{PALETTE}{_CSS}{moment_style()}{_kinds()}</style></head><body>",
            '<a class="skip" href="#main">To the results</a>',
            *self._head([(name, title) for name, title, _ in sections]),
            '<main id="main">',
        ]
        for name, title, content in sections:
            parts += [f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>', *content, "</section>"]
        parts += [
            "</main><footer><p>Made by <code>crashkernel report</code> from the results of "
            f"<code>crashkernel campaign run</code>, version {escaped(campaign.version)}. All times are wall time. A drill "
            "is known to fail where the campaign's file says so.</p></footer>",
            f"<script>{_SCRIPT}</script></body></html>",
            "",
        ]
        return "\n".join(parts)

    def _head(self, sections: Sequence[tuple[str, str]]) -> list[str]:
        campaign = self._campaign
        worst: Standing = {0: "passed", 1: "failed", 3: "error"}[campaign.exit_status]  # type: ignore[assignment]
        parts = [
            f'<header><h1>{escaped(campaign.name)} <span class="badge {worst}">{_VERDICTS[campaign.exit_status]}</span></h1>',
            f'<p class="answer">{escaped(campaign.answer)}</p>',
        ]
        if campaign.measures:
            parts.append('<dl class="measures">')
            parts += [f"<div><dt>{escaped(words)}</dt><dd>{escaped(figure)}</dd></div>" for figure, words in campaign.measures]
            parts.append("</dl>")
        parts += [f'<p class="facts">{escaped(fact)}</p>' for fact in campaign.facts]
        links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in sections)
        return [*parts, f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>']

    # ------------------------------------------------------------------------------------------------------- what failed

    def _failures(self) -> list[str]:
        if not self._campaign.failures:
            done = self._campaign.counts["passed"]
            return [f"<p>{'Nothing: every drill that was run passed.' if done else 'No drill has been run yet.'}</p>"]
        parts = []
        for group in self._campaign.failures:
            parts += self._group(group)
        return parts

    def _group(self, group: Failures) -> list[str]:
        count, (_, one, many) = len(group.drills), STANDINGS[group.standing]
        bad = {"failed": " bad", "surprise": " surprised"}.get(group.standing, "")
        parts = [
            f'<article class="group{bad}"><h3><span class="badge {group.standing}">{one if count == 1 else many}</span> '
            f"{count} drill{'s' * (count != 1)}</h3><p>{escaped(group.why)}</p>"
        ]
        for drill in group.drills:
            parts += self._failure(drill, group)
        return [*parts, "</article>"]

    def _failure(self, drill: Drill, group: Failures) -> list[str]:
        result, evidence = drill.result, self._campaign.evidence.get(drill.number)
        assert result is not None, "what was not run is in no group"
        about = [
            ("why", result.reason if group.varied else ""),
            ("stage", result.stage),
            ("likely", evidence.likely if evidence and result.verdict != "PASS" else ""),
            ("took", f"{result.seconds:.1f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.stages)),
            ("kernel", result.release),
            (
                "run",
                " ".join(filter(None, (result.started, "by", result.worker, "on", result.host, f"attempt {result.attempt}"))),
            ),
            *(("fault", told) for told in result.told),
            *(("problem", problem) for problem in (evidence.problems if evidence else ())),
        ]
        parts = [
            f'<details class="drill" id="drill-{drill.number}"><summary>{drill.number}: {escaped(drill.title)}</summary>',
            '<div class="inside"><dl class="about">',
            *(f"<dt>{name}</dt><dd>{escaped(value)}</dd>" for name, value in about if value),
            "</dl><h4>Drill it again</h4>",
            _command(drill.command),
        ]
        if result.verdict != "PASS" and evidence is not None:
            parts += self._console(evidence.console)
            parts += self._memory(drill)
        return [*parts, "</div></details>"]

    def _console(self, console: str) -> list[str]:
        lines = tail(console, self._lines, _COLUMNS)
        if not lines:
            return ["<h4>Console</h4><p>Nothing was kept.</p>"]
        text = "\n".join(escaped(line) for line in lines)
        return [
            f'<h4>Console, its last lines</h4><pre class="console" tabindex="0" aria-label="Console"><code>{text}</code></pre>'
        ]

    def _memory(self, drill: Drill) -> list[str]:
        evidence, result = self._campaign.evidence[drill.number], drill.result
        assert result is not None, "evidence is that of a result"
        after = result.stage in _AFTER
        when = "with K2 running" if after else "as loaded" if result.stage in _BEFORE else "when K1 died"
        parts = [f"<h4>Memory {when}</h4>"]
        wrong = RangeSet(where for where, _ in evidence.wrong)
        if evidence.wrong:
            parts.append("<ul>")
            parts += [f"<li>wrong: {where}, {escaped(what)}</li>" for where, what in evidence.wrong[:_WRONG_SHOWN]]
            more = len(evidence.wrong) - _WRONG_SHOWN
            parts += [*([f"<li>and {more} more ranges</li>"] if more > 0 else []), "</ul>"]
        return [*parts, self._map(evidence.plan, "entered" if after else "loaded", wrong)]

    def _map(self, plan: str, moment: Moment, wrong: RangeSet) -> str:
        """The map, drawn once: where it is needed again, it is shown again."""
        if not plan:
            return "<p>K1 had sent no plan yet.</p>"
        if (plan, moment, wrong) not in self._drawn:
            try:
                self._drawn[plan, moment, wrong] = moment_svg(LoadPlan.from_json(plan), moment, wrong)
            except FormatError as error:
                return f"<p>Its plan cannot be drawn: {escaped(str(error))}.</p>"
        drawing = self._drawn[plan, moment, wrong]
        if (number := self._maps.get(drawing)) is None:
            if len(self._maps) == _MAPS:
                return f"<p>Not drawn: {_MAPS} others are. The command above and <code>--keep DIR</code> give its plan.</p>"
            number = self._maps[drawing] = len(self._maps) + 1
            drawing = drawing.replace("<svg ", f'<svg id="map-{number}" ', 1)
            return f'<div class="scroll maps" tabindex="0">{drawing}</div>'
        size = drawing.partition('viewBox="')[2].partition('"')[0]
        return (
            f'<div class="scroll maps" tabindex="0"><svg class="map" viewBox="{size}" role="img" aria-label="As above">'
            f'<use href="#map-{number}"/></svg></div>'
        )

    # --------------------------------------------------------------------------------------------------- both placements

    def _placements(self) -> list[str]:
        campaign = self._campaign
        placements = campaign.placements
        if not campaign.results:
            return []
        rows: list[tuple[str, list[str]]] = []
        for standing, (_, one, _) in STANDINGS.items():
            if campaign.counts[standing]:
                counted = [sum(d.standing == standing for d in campaign.drills if d.placement == p) for p in placements]
                rows.append((one, [str(count) for count in counted]))
        times = {**campaign.stage_times, "whole drill": campaign.totals}
        for name in ("handover", "K2 boot", "whole drill"):
            if any(times.get(name, {})):
                medians = [f"{times[name][p].median:.2f} s" if p in times[name] else "-" for p in placements]
                rows.append((f"{name}, median", medians))
        head = "".join(f'<th scope="col" class="n"><i class="dot {_own(p)}"></i>{escaped(p)}</th>' for p in placements)
        parts = [
            f'<div class="scroll" tabindex="0"><table><thead><tr><td></td>{head}</tr></thead><tbody>',
            *(
                f'<tr><th scope="row">{escaped(name)}</th>{"".join(f"<td class=n>{value}</td>" for value in values)}</tr>'
                for name, values in rows
            ),
            "</tbody></table></div>",
        ]
        if campaign.pair:
            numbers, same = " and ".join(str(drill.number) for drill in campaign.pair), campaign.pair[0].title
            parts.append(f"<p>Where K2 runs and where K1's memory lies then, in drills {numbers} ({escaped(same)}):</p>")
            for drill in campaign.pair:
                evidence = campaign.evidence.get(drill.number)
                parts.append(f"<h3>{escaped(drill.placement)}</h3>")
                parts.append(self._map(evidence.plan if evidence else "", "entered", RangeSet()))
        if self._maps:
            parts += _key()
        return parts


def _command(command: str) -> str:
    """Its words are elements, so that no line ends behind the dashes of an option."""
    words = " ".join(f"<b>{escaped(word)}</b>" for word in command.split(" "))
    return f'<div class="again"><pre class="command">{words}</pre></div>'


def _own(placement: str) -> str:
    return placement if placement in ("zero", "reserved") else ""


def _kinds() -> str:
    return "".join(f".k-{kind.name}{{background:{kind.fill}}}" for kind in KINDS if kind is not GAP)


def _key() -> list[str]:
    parts = [
        "<details><summary>What the colours of the maps mean</summary>",
        f'<svg width="0" height="0" aria-hidden="true">{GAP_PATTERN}</svg>',
        '<ul class="key">',
    ]
    parts += [f'<li><i class="k-{kind.name}"></i>{kind.meaning}</li>' for kind in KINDS if kind is not GAP]
    lanes = {
        "k2": "K2's own memory",
        "exposed": "K1's memory that becomes K2's",
        "real-mode": "what a CPU reaches with translation off",
        "wrong": "bytes that are wrong in the dump, or a danger that the plan told of",
    }
    parts += [f'<li><i class="lane" style="background:{LANE_FILLS[name]}"></i>{words}</li>' for name, words in lanes.items()]
    return [*parts, "</ul><p class='soft'>Each bar is linear; what has a dot is drawn wider than to scale.</p></details>"]


# ----------------------------------------------------------------------------------------------------------------- matrices


def _matrix(table: Table, what: str) -> list[str]:
    """Rows are grouped by their first name where it names many."""
    if not table.rows:
        return []
    grouped = table.grouped
    heads = table.heads[1:] if grouped else table.heads
    sides = list(dict.fromkeys(side for side, _ in table.columns))
    caption = f"{sum(len(c.drills) for row in table.rows for c in row.cells if c)} {what}"
    caption += f". Where nothing else is said: {'; '.join(table.alike)}" if table.alike else ""
    parts = [
        f'<div class="scroll" tabindex="0"><table class="matrix"><caption><span>{escaped(caption)}.</span></caption><thead>'
    ]
    if sides != [""]:
        blank = f'<td colspan="{len(heads)}"></td>' if heads else ""
        each = len(table.columns) // len(sides)
        parts.append(
            f"<tr>{blank}" + "".join(f'<th scope="colgroup" colspan="{each}">{escaped(s)}</th>' for s in sides) + "</tr>"
        )
    names = "".join(f'<th scope="col">{escaped(name)}</th>' for name in heads)
    places = "".join(f'<th scope="col"><i class="dot {_own(p)}"></i>{escaped(p)}</th>' for _, p in table.columns)
    parts.append(f"<tr>{names}{places}</tr></thead><tbody>")
    before = None
    for row in table.rows:
        if grouped and row.heads[0] != before:
            before = row.heads[0]
            releases = sorted(
                {
                    cell.first.result.release
                    for each in table.rows
                    if each.heads[0] == before
                    for cell in each.cells
                    if cell and cell.first.result and cell.first.result.release
                }
            )
            more = f" <small>{escaped(', '.join(releases))}</small>" if table.heads[0].startswith("K1") else ""
            parts.append("</tbody><tbody>" if row is not table.rows[0] else "")
            wide = len(heads) + len(table.columns)
            parts.append(f'<tr><th scope="rowgroup" colspan="{wide}">{table.heads[0]} {escaped(before)}{more}</th></tr>')
        names = "".join(f'<th scope="row">{escaped(name)}</th>' for name in (row.heads[1:] if grouped else row.heads))
        parts.append(f"<tr>{names}{''.join(map(_cell, row.cells))}</tr>")
    return [*parts, "</tbody></table></div>"]


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return '<td class="cell soft">-</td>'
    first = cell.first
    told = [STANDINGS[cell.standing][1], f"{cell.compared} compared" if cell.compared else ""]
    told += [first.result.reason, f"{first.result.seconds:.1f} s", *first.result.told] if first.result else []
    title = "; ".join(filter(None, told))
    size = f"<small>{escaped(cell.compared)}</small>" if cell.compared else ""
    return (
        f'<td class="cell"><a class="{cell.standing}" href="#drill-{first.number}" title="{escaped(title)}">'
        f"{cell.word}{size}</a></td>"
    )


# -------------------------------------------------------------------------------------------------------------------- times


def _times(campaign: Campaign) -> list[str]:
    parts = []
    if (shares := campaign.shares) is not None:
        names = ("the two boots", "the rest of the drills", "waiting")
        parts += _stacked([(n, share, f"{share:.0%}") for n, share in zip(names, shares, strict=True)], _colours(names))
        parts.append("<p class='soft'>What the workers' time went into.</p>")
    if not campaign.totals:
        return parts
    heads = {"stage": "", "placement": "", "drills": "n wide", "least": "n wide", "median": "n", "95 %": "n wide", "most": "n"}
    parts += [
        '<div class="scroll" tabindex="0"><table class="times"><caption>Seconds of the drills that passed. Each stage has a',
        "scale of its own, from 0 to the longest: a stroke for each drill, a box from quartile to quartile, and a thick line",
        "at the median.</caption><thead><tr>",
        *(f'<th scope="col" class="{style}">{name}</th>' for name, style in heads.items()),
        '<th scope="col">spread</th></tr></thead>',
    ]
    for name, by_placement in {**campaign.stage_times, "whole drill": campaign.totals}.items():
        parts += ["<tbody>", *_stage(name, by_placement), "</tbody>"]
    return [*parts, "</table></div>"]


def _stage(name: str, by_placement: Mapping[str, Spread]) -> list[str]:
    most = max(spread.values[-1] for spread in by_placement.values())
    digits = 2 if most < 10 else 1
    parts = []
    for number, (placement, spread) in enumerate(by_placement.items()):
        head = f'<th scope="rowgroup" rowspan="{len(by_placement)}">{escaped(name)}</th>' if not number else ""
        figures = (spread.values[0], spread.median, spread.quantile(0.95), spread.values[-1])
        styles = ("n wide", "n", "n wide", "n")
        parts += [
            f'<tr class="{_own(placement)}">{head}<th scope="row"><i class="dot"></i>{escaped(placement)}</th>'
            f'<td class="n wide">{len(spread.values)}</td>',
            *(f'<td class="{style}">{figure:.{digits}f}</td>' for figure, style in zip(figures, styles, strict=True)),
            f"<td>{_strip(spread, most)}</td></tr>",
        ]
    return parts


def _strip(spread: Spread, most: float) -> str:
    """A stroke for each value, the quartiles' box, the median, and a line from the least to the most."""

    def at(value: float) -> int:
        return round(value / most * 992) + 4 if most else 4

    strokes = "".join(f"M{x} 5v14" for x in dict.fromkeys(map(at, spread.values)))
    low, median, high = (at(spread.quantile(share)) for share in (0.25, 0.5, 0.75))
    return (
        '<svg class="strip" viewBox="0 0 1000 24" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="{strokes}"/><line x1="{at(spread.values[0])}" y1="12" x2="{at(spread.values[-1])}" y2="12"/>'
        f'<rect x="{low}" y="3" width="{max(2, high - low)}" height="18"/>'
        f'<line class="median" x1="{median}" y1="1" x2="{median}" y2="23"/></svg>'
    )


# -------------------------------------------------------------------------------------------------------------------- sizes


def _sizes(campaign: Campaign) -> list[str]:
    parts = []
    for size in campaign.sizes:
        parts.append(f'<article class="group"><h3>{escaped(size.title)}</h3>')
        parts += [f"<p>{escaped(fact)}</p>" for fact in size.facts]
        most = max(1, *(each for _, each in size.bars))
        parts.append('<div class="scroll" tabindex="0"><table class="sizes"><caption>Beside what others say</caption><tbody>')
        for number, (name, each) in enumerate(size.bars):
            own = ' class="own"' if number < len(size.bars) - len(size.compared) else ""
            parts.append(
                f'<tr{own}><th scope="row">{escaped(name)}</th><td class="n">{format_size(each) if each else "nothing"}</td>'
                f'<td><i style="width:{each / most:.2%}"></i></td></tr>'
            )
        parts.append("</tbody></table></div>")
        fills = _colours(name for _, table in size.peaks for name, _ in table)
        for peak, table in size.peaks:
            parts += [
                f"<h4>Where it went, {peak}</h4>",
                *_stacked([(name, each, format_size(each)) for name, each in table], fills),
            ]
        if size.command:
            parts += ["<h4>Drill it again</h4>", _command(size.command)]
        parts.append("</article>")
    return parts


def _stacked(parts: Sequence[tuple[str, float, str]], fills: Mapping[str, str]) -> list[str]:
    """A bar of all parts (names, how large they are, and the same in words) and the list that names them."""
    bars = "".join(f'<i style="flex:{size:g};background:{fills[name]}"></i>' for name, size, _ in parts)
    listed = (f'<li><i style="background:{fills[name]}"></i>{escaped(name)} {words}</li>' for name, _, words in parts)
    return [f'<div class="share" aria-hidden="true">{bars}</div><ul class="key">', *listed, "</ul>"]


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name; grey for what nothing took."""
    fills = {name: _PARTS[number % len(_PARTS)] for number, name in enumerate(dict.fromkeys(names))}
    return fills | {name: "#8c8c8c" for name in ("free", "waiting") if name in fills}


# ---------------------------------------------------------------------------------------------------------------- all drills


def _list(campaign: Campaign) -> list[str]:
    if not campaign.drills:
        return ["<p>The campaign's file names none.</p>"]
    counts = campaign.counts
    options = "".join(
        f'<option value="{each}">{STANDINGS[each][1]} ({counts[each]})</option>' for each in STANDINGS if counts[each]
    )
    parts = [
        '<div class="filter"><label>Words, all of which a drill must have<input id="words" type="search" autocomplete="off">'
        f'</label><label>Standing<select id="stands"><option value="">all</option>{options}</select></label>'
        '<output id="shown" aria-live="polite"></output></div>',
        '<table class="list"><thead><tr><th scope="col" class="n">number</th><th scope="col">result</th><th scope="col">drill'
        '</th><th scope="col" class="n">compared</th><th scope="col" class="n">seconds</th></tr></thead><tbody>',
    ]
    for drill in campaign.drills:
        result = drill.result
        told = drill.result is not None and drill.standing != "passed"  # above, with all that is known of it
        here = "" if told else f' id="drill-{drill.number}"'
        number = f'<a href="#drill-{drill.number}">{drill.number}</a>' if told else str(drill.number)
        more = "".join(f'<span class="told">{escaped(each)}</span>' for each in (result.told if result else ()))
        if not told:
            more += f"<details><summary>command</summary>{_command(drill.command)}</details>"
        compared = format_size(result.compared) if result and result.compared else ""
        parts.append(
            f'<tr{here} data-standing="{drill.standing}"><td class="n">{number}</td><td><span class="badge {drill.standing}">'
            f"{STANDINGS[drill.standing][0]}</span></td><td>{escaped(drill.title)}{more}</td>"
            f'<td class="n">{compared}</td><td class="n">{duration(result.seconds) if result else ""}</td></tr>'
        )
    return [*parts, "</tbody></table>"]
