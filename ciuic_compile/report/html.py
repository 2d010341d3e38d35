"""A plan as one self-contained HTML file: no script, no request to anywhere, light and dark."""

from __future__ import annotations

from typing import Final

from ciuic_compile.report._format import duration, factor, percent, price_sentence, short_file, size
from ciuic_compile.report.summary import KEPT, RECOMPUTED, action_label, reason_of, summarize
from ciuic_compile.types import Plan


def render_html(plan: Plan) -> str:
    """Return the plan as a complete HTML document; everything that came from the user is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(size=size, percent=percent, duration=duration, factor=factor, share=_share)
    environment.globals.update(price_sentence=price_sentence)
    environment.globals.update(label=action_label, reason=reason_of, short_file=short_file, tone=_tone)
    return environment.from_string(_TEMPLATE).render(p=plan, s=summarize(plan)) + "\n"


def _share(part: int, whole: int) -> str:
    """``part`` of ``whole`` in percent for a width, between 0 and 100."""
    return f"{min(max(part / whole, 0.0), 1.0) * 100 if whole > 0 else 0.0:.2f}"


def _tone(label: str) -> str:
    return {KEPT: "kept", RECOMPUTED: "recomputed"}.get(label, "codec")


_TEMPLATE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ciuic plan: {{ p.name }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --soft: #60666d; --line: #d8dce0;
  --base: #b9c0c7; --kept: #8a63d2; --recomputed: #2f8f5b; --codec: #1f6feb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #16191d; --soft: #9aa2aa;
  --line: #343a41; --base: #535b64; --kept: #a98bea; --recomputed: #4fb57e; --codec: #5b9bff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin-top: 2rem; }
p.soft, td.soft { color: var(--soft); } code { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th.n, td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { background: var(--base); height: .7rem; border-radius: 2px; }
.bar i { display: block; height: 100%; border-radius: 2px; }
.kept { background: var(--kept); } .recomputed { background: var(--recomputed); }
.codec { background: var(--codec); }
</style>
</head>
<body>
<h1>ciuic plan: {{ p.name }}</h1>
<p class="soft">Mode {{ p.mode }}{% if p.device %}, {{ p.device }}{% endif %}{% if p.dynamic %},
dynamic shapes (sizes as first traced){% endif %}. All figures are estimates made before the first run.
"Inductor" is its own partition. Parameters and inputs are not counted.</p>
<table>
<tr><th></th><th class="n">Inductor</th><th class="n">planned</th><th>change</th></tr>
<tr><th scope="row">peak</th><td class="n">{{ size(p.baseline_peak_bytes) }}</td>
<td class="n">{{ size(p.planned_peak_bytes) }}</td>
<td>{{ factor(p.baseline_peak_bytes, p.planned_peak_bytes) }}
{% if p.budget_bytes is not none %}; budget {{ size(p.budget_bytes) }}:
{{ "fits" if p.planned_peak_bytes <= p.budget_bytes else "does not fit" }}{% endif %}</td></tr>
<tr><th scope="row">saved</th><td class="n">{{ size(p.baseline_saved_bytes) }}</td>
<td class="n">{{ size(p.planned_saved_bytes) }}</td>
<td>{{ factor(p.baseline_saved_bytes, p.planned_saved_bytes) }}</td></tr>
</table>
<p>Planned cost: {{ duration(p.time_us) }} a step; gradient error {{ percent(p.gradient_error) }} in all,
at most {{ percent(p.gradient_error_bound) }} in any parameter.</p>
{% if price_sentence(p) %}
<p>Price of the budget: {{ price_sentence(p) }}.</p>
{% endif %}
{% for note in p.notes %}
<p>Note: {{ note }}</p>
{% endfor %}
<h2>What happens to the saved tensors</h2>
{% set largest = s.rows | map(attribute="nbytes") | max %}
<table>
<tr><th>action</th><th class="n">tensors</th><th class="n">full size</th><th class="n">Inductor saves</th>
<th class="n">plan saves</th><th>plan saves, of full size</th></tr>
{% for r in s.rows %}
<tr><th scope="row">{{ r.label }}</th><td class="n">{{ r.count }}</td><td class="n">{{ size(r.nbytes) }}</td>
<td class="n">{{ size(r.baseline_bytes) }}</td><td class="n">{{ size(r.saved_bytes) }}</td>
<td><div class="bar" style="width: {{ share(r.nbytes, largest) }}%">\
<i class="{{ tone(r.label) }}" style="width: {{ share(r.saved_bytes, r.nbytes) }}%"></i></div></td></tr>
{% endfor %}
</table>
{% for title, groups in (("Largest compressed or recomputed", s.changed),
("Largest not compressed", s.kept)) if groups %}
<h2>{{ title }}</h2>
<div class="scroll"><table>
<tr><th class="n">full size</th><th class="n">plan saves</th><th>action</th><th class="n">tensors</th>
<th>module</th><th>op</th><th>from</th><th>why</th></tr>
{% for g in groups[:20] %}
<tr><td class="n">{{ size(g.nbytes) }}</td><td class="n">{{ size(g.saved_bytes) }}</td><td>{{ g.label }}</td>
<td class="n">{{ g.count }}</td><td>{{ g.module }}</td><td>{{ g.op }}</td>
<td>{{ g.where }}<br><code>{{ g.code }}</code></td>
<td class="soft">{{ g.reason }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
<h2>All {{ p.decisions | length }} storages, in forward order</h2>
<div class="scroll"><table>
<tr><th>name</th><th>action</th>
<th class="n">full size</th><th class="n">plan saves</th><th class="n">error</th>
<th class="n">time</th><th>kind</th><th>dtype</th><th>shape</th><th>module</th><th>from</th><th>why</th></tr>
{% for d in p.decisions %}
<tr><td>{{ d.storage.name }}</td><td>{{ d.codec or label(d) }}</td>
<td class="n">{{ size(d.storage.nbytes) }}</td>
<td class="n">{{ size(d.saved_bytes) }}</td><td class="n">{{ percent(d.error) }}</td>
<td class="n">{{ duration(d.time_us) }}</td><td>{{ d.storage.kind.value }}</td><td>{{ d.storage.dtype }}</td>
<td>{{ d.storage.shape | join("x") }}</td><td>{{ d.storage.source.module }}</td>
<td title="{{ d.storage.source.code }}">{{ short_file(d.storage.source.file) ~ ":" ~ d.storage.source.line
if d.storage.source.file else "?" }}</td>
<td class="soft">{{ d.reason or d.storage.kept_because or "" }}</td></tr>
{% endfor %}
</table></div>
</body>
</html>
"""
