"""Style and script of the report's page."""

CSS = """
:root {
  color-scheme: light dark; --paper: #fcfcfa; --raised: #f3f2ee; --ink: #1d1f22; --muted: #62666d; --rule: #e0ded8;
  --accent: #2f5fc4; --best: #e4efe4; --best-ink: #1c5b2e; --warn: #fbeedd; --warn-ink: #7a4308;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --raised: #1e2125; --ink: #e7e5e0; --muted: #9ba0a8; --rule: #31353b; --accent: #86a9f5;
    --best: #1d3524; --best-ink: #a5dcb4; --warn: #3a2a14; --warn-ink: #f0c48c;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
.sheet { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
@media (min-width: 72rem) {
  .sheet { display: grid; grid-template-columns: 11rem minmax(0, 1fr); column-gap: 3rem; }
  .sheet > header, .sheet > footer { grid-column: 2; }
  nav.toc { grid-column: 1; grid-row: 1 / span 3; }
  nav.toc ol { position: sticky; top: 2.5rem; flex-direction: column; gap: .45rem; }
}
nav.toc ol { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; }
nav.toc { font-size: .875rem; margin-bottom: 1.5rem; }
nav.toc a { color: var(--muted); text-decoration: none; }
nav.toc a:hover, nav.toc a:focus { color: var(--accent); }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; font-weight: 650; letter-spacing: -.005em; margin: 3.25rem 0 .75rem; }
h3 { font-size: 1rem; font-weight: 650; margin: 2rem 0 .5rem; }
h4 { font-size: .875rem; font-weight: 650; margin: .5rem 0 0; }
p, .sheet li { max-width: 46rem; }
p { margin: .5rem 0 .9rem; }
section > ul { padding-left: 1.2rem; }
section { scroll-margin-top: 1rem; }
section li { margin: .3rem 0; }
.muted, .sub { color: var(--muted); }
.sub { margin: 0; }
.verdict { font-size: 1.1rem; line-height: 1.6; }
small, .small { font-size: .8125rem; }
.wide { overflow-x: auto; margin: 1rem 0; -webkit-overflow-scrolling: touch; }
.wide:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; line-height: 1.4; }
th, td {
  padding: .45rem .8rem; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--rule);
}
th { font-weight: 600; }
thead th { vertical-align: bottom; border-bottom: 1.5px solid var(--ink); }
th[scope=row], th.corner {
  text-align: left; position: sticky; left: 0; background: var(--paper); padding-left: 0; z-index: 1;
}
table.text td { text-align: left; }
table.records { font-size: .8125rem; }
table.records th, table.records td { padding: .35rem .6rem; white-space: normal; min-width: 7rem; max-width: 10rem; }
table.records th[scope=row], table.records th.corner { padding-left: 0; min-width: 9rem; font-weight: 500; }
td small { display: block; color: var(--muted); white-space: nowrap; }
tr.quiet th, tr.quiet td { color: var(--muted); font-weight: 400; }
td.best { background: var(--best); color: var(--best-ink); font-weight: 700; }
td.best small { color: inherit; font-weight: 400; }
td.unequal { background: var(--warn); color: var(--warn-ink); }
.mark { font-size: .75em; margin-right: .3em; }
abbr { text-decoration: none; border-bottom: 1px dotted var(--muted); cursor: help; }
pre {
  background: var(--raised); padding: .9rem 1rem; overflow-x: auto;
  font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
.warn { background: var(--warn); color: var(--warn-ink); padding: .6rem .9rem; max-width: 46rem; }
fieldset.axis {
  border: 0; padding: 0; margin: 0 0 .75rem; display: flex; gap: .25rem 1rem; flex-wrap: wrap; font-size: .875rem;
}
fieldset.axis legend { float: left; margin-right: 1rem; color: var(--muted); }
fieldset.axis label { cursor: pointer; }
fieldset.axis input { accent-color: var(--accent); }
.plot { height: 22rem; width: 100%; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1.5rem; }
.panels .plot { height: 15rem; }
.pictures img, .found img {
  width: 6rem; height: 6rem; object-fit: contain; display: block; background: #fff; border-radius: 3px;
}
.pictures td, .pictures th { border: 0; padding: .25rem .5rem .25rem 0; text-align: left; }
.pictures td {
  white-space: normal; font-size: .8125rem; line-height: 1.35; max-width: 6.5rem; overflow-wrap: break-word;
}
.pictures th[scope=row] { padding-right: 1rem; white-space: normal; width: 7rem; font-size: .8125rem; }
.query { margin: 1.4rem 0; }
.query p { margin: 0 0 .4rem; font-size: .9375rem; }
.found { display: flex; gap: .75rem; list-style: none; padding: 0 0 .25rem; margin: 0; overflow-x: auto; }
.found li {
  flex: 0 0 6rem; max-width: 6rem; font-size: .75rem; line-height: 1.3; color: var(--muted); margin: 0;
}
.found img { border: 3px solid transparent; }
.found .right img { border-color: #2f8f4e; }
.found .right { color: var(--ink); }
.pair { display: flex; gap: 1.25rem; align-items: flex-start; }
.pair ol { margin: 0; padding-left: 1.3rem; font-size: .875rem; }
.pair img { width: 6rem; height: 6rem; object-fit: contain; background: #fff; border-radius: 3px; flex: none; }
li.right b { color: var(--best-ink); }
ol.notes { font-size: .8125rem; color: var(--muted); padding-left: 1.2rem; }
.pair p { margin: 0 0 .3rem; }
details summary { cursor: pointer; color: var(--muted); font-size: .875rem; margin: .75rem 0; }
footer {
  margin-top: 4rem; border-top: 1px solid var(--rule); padding-top: 1rem; font-size: .8125rem; color: var(--muted);
}
@media (max-width: 40rem) {
  .sheet { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  h2 { margin-top: 2.5rem; }
  th, td { padding: .4rem .55rem; }
  .verdict { font-size: 1rem; }
  .plot { height: 19rem; }
  .pictures img, .found img, .pair img { width: 5rem; height: 5rem; }
  .found li { flex-basis: 5rem; max-width: 5rem; }
}
@media print {
  nav.toc, fieldset.axis { display: none; }
  .sheet { display: block; }
}
"""

SCRIPT = """
(() => {
  const plots = [...document.querySelectorAll(".plot")].map(div =>
    ({ div, ...JSON.parse(document.getElementById(div.dataset.figure).textContent) }));
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const words = { samples: "samples seen", flops: "training FLOPs" };
  const chosen = () => document.querySelector("input[name=axis]:checked").value;
  const layout = plot => {
    const line = { gridcolor: colour("--rule"), zerolinecolor: colour("--rule"), automargin: true, fixedrange: true };
    const base = { margin: { l: 52, r: 12, t: 8, b: 44 }, hovermode: "x unified", paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 12, color: colour("--muted") },
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--rule"), font: { color: colour("--ink") } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" } };
    return { ...base, ...plot.layout, yaxis: { ...line, ...plot.layout.yaxis },
      xaxis: { ...line, title: { text: words[chosen()] }, rangemode: "tozero", exponentformat: "SI", nticks: 6 } };
  };
  const draw = () => plots.forEach(plot => Plotly.react(plot.div,
    plot.traces.map((trace, i) => ({ ...trace, x: plot.x[chosen()][i] })), layout(plot),
    { displayModeBar: false, responsive: true }));
  document.querySelectorAll("input[name=axis]").forEach(input => input.addEventListener("change", draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  if (plots.length) draw();
})();
"""
