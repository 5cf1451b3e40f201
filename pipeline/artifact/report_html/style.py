"""The page's style sheet. Colours are Okabe and Ito's, which the colour-blind can tell apart, lightened where it is
dark; what colour says, shape or text says too."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #1c2128; --soft: #59636e; --line: #dde1e6; --grid: #e8ebef;
  --blue: #0072b2; --sky: #56b4e9; --orange: #e69f00; --vermilion: #d55e00; --green: #009e73; --purple: #b0568a;
  --heat0: #fbe3cf; --heat1: #e8eef5; --heat2: #c6dbec; --heat3: #92bfde; --heat4: #4f97c9; --heat5: #08518f;
  --on-blue: #ffffff; --on-light: #1c2128;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #0f1318; --panel: #181d24; --ink: #e6e9ee; --soft: #9ba5b1; --line: #2e353e; --grid: #242a32;
    --blue: #4aa8e0; --sky: #9ad4f7; --orange: #f0b429; --vermilion: #f58549; --green: #2fc397; --purple: #d98fba;
    --heat0: #5c3a22; --heat1: #1d2833; --heat2: #23425c; --heat3: #2a628e; --heat4: #4a98cf; --heat5: #b5def8;
    --on-blue: #0f1318; --on-light: #0f1318;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 2px 0 4px; overflow-wrap: anywhere; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 6px; }
h3 { font-size: 1rem; margin: 20px 0 4px; }
p { margin: 0 0 12px; max-width: 52em; overflow-wrap: anywhere; }
.eyebrow { font-size: 0.8rem; letter-spacing: 0.08em; text-transform: uppercase; color: var(--soft); margin: 0; }
.recipe { font-size: 1.15rem; margin: 0 0 12px; }
.soft, figcaption, .facts dt, .tile .note, .tile .label { color: var(--soft); }
code, pre, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code, .mono { font-size: 0.875em; overflow-wrap: anywhere; }
section { margin-top: 36px; padding-top: 26px; border-top: 1px solid var(--line); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0; }
.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 210px), 1fr));
  gap: 14px; margin: 26px 0 0; padding: 0;
}
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile .label { font-size: 0.85rem; }
.tile .value {
  font-size: 1.9rem; line-height: 1.25;
  font-weight: 650; font-variant-numeric: tabular-nums; letter-spacing: -0.01em;
}
.tile .note { font-size: 0.85rem; line-height: 1.4; }
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  gap: 16px 40px; align-items: start;
}
.pair > * { min-width: 0; }
.pair > figure { margin: 0; }
.pair + p { margin-top: 14px; }
.pair h3:first-child { margin-top: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; }
tbody th code { font-weight: 400; }
thead th { color: var(--soft); font-weight: 500; font-size: 0.85rem; vertical-align: bottom; }
.n td, .n th { text-align: right; }
.n td { white-space: nowrap; }
.n td:first-child, .n th:first-child { text-align: left; }
.n td:last-child, .n th:last-child { padding-right: 4px; }
td code, th code { white-space: nowrap; }
.plain td:last-child { min-width: 9em; }
tr.total > * { font-weight: 650; }
.narrow { max-width: 30em; }
figure { margin: 14px 0 0; }
figcaption { font-size: 0.88rem; margin-top: 6px; max-width: 62em; }
svg.plot { display: block; width: 100%; height: auto; overflow: visible; }
.pair svg.plot { max-width: 560px; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .strong { fill: var(--ink); font-weight: 600; }
svg .unit { font-size: 11.5px; }
svg .inside { fill: var(--on-blue); font-weight: 600; }
svg .on-scales { fill: var(--on-light); }
svg .upright { writing-mode: vertical-rl; text-anchor: middle; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 245px), 1fr)); gap: 16px 18px; }
.panels text { font-size: 11px; }
.natural svg.plot { width: var(--natural); max-width: none; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap;
  gap: 2px 18px; margin: 8px 0 10px; padding: 0; font-size: 0.88rem;
}
.legend li { display: flex; align-items: center; gap: 6px; }
.swatch { width: 13px; height: 13px; flex: none; overflow: visible; }
.grid { stroke: var(--grid); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; opacity: 0.55; }
.reference { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.stem { stroke: var(--soft); stroke-width: 1; opacity: 0.4; }
.original { --colour: var(--soft); } .before { --colour: var(--vermilion); } .after { --colour: var(--blue); }
.prefill { --colour: var(--purple); }
.load { --colour: var(--sky); }
.forward { --colour: var(--blue); }
.solve { --colour: var(--orange); }
.write { --colour: var(--green); }
.host { --colour: var(--blue); } .device { --colour: var(--orange); }
.weights { --colour: var(--blue); }
.scales { --colour: var(--orange); }
.factors { --colour: var(--green); }
.residual { --colour: var(--purple); }
svg .dot, svg .point, svg .median, svg .segment, svg .load, svg .forward, svg .solve,
svg .write, svg .host, svg .device,
.swatch rect, svg path { fill: var(--colour); }
svg .ring { fill: var(--page); stroke: var(--colour); }
svg .range, .swatch rect.range { fill: var(--colour); opacity: 0.38; }
svg .curve { fill: none; stroke: var(--colour); stroke-width: 2; }
svg .bridge { stroke: var(--colour); stroke-width: 3; opacity: 0.35; }
svg .segment { stroke: var(--page); stroke-width: 1.5; }
svg .reused { opacity: 0.4; }
.heat0 { --colour: var(--heat0); } .heat1 { --colour: var(--heat1); } .heat2 { --colour: var(--heat2); }
.heat3 { --colour: var(--heat3); } .heat4 { --colour: var(--heat4); } .heat5 { --colour: var(--heat5); }
.none { --colour: var(--vermilion); }
svg .on-heat0, svg .on-heat1, svg .on-heat2, svg .on-heat3 { fill: var(--ink); }
svg .on-heat4, svg .on-heat5, svg .on-none { fill: var(--page); font-weight: 600; }
details { margin-top: 18px; border: 1px solid var(--line); border-radius: 10px; background: var(--panel); }
details + details { margin-top: 12px; }
summary { cursor: pointer; padding: 10px 16px; font-weight: 600; }
summary:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; border-radius: 10px; }
details > :not(summary) { margin: 0; padding: 0 16px 14px; }
pre { font-size: 0.85rem; line-height: 1.5; overflow-x: auto; white-space: pre; }
.warning { border-left: 4px solid var(--vermilion); padding: 2px 0 2px 12px; }
footer { margin-top: 40px; color: var(--soft); font-size: 0.85rem; }
@media (max-width: 600px) {
  main { padding: 24px 16px 56px; }
  h1 { font-size: 1.6rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 10px 12px; }
  .tile .value { font-size: 1.5rem; }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: 8px; }
  table { font-size: 0.85rem; }
  th, td { padding-right: 10px; }
  .pair svg text { font-size: 15px; }
  .panels text { font-size: 9.5px; }
  .wide svg.plot { width: 640px; }
}
@media print {
  html { font-size: 12.5px; }
  body { font-size: 1rem; }
  main { max-width: none; padding: 0; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .panels { grid-template-columns: repeat(3, 1fr); }
  .pair { grid-template-columns: 1.1fr 1fr; gap: 14px 26px; }
  .pair svg text { font-size: 14px; }
  table { font-size: 0.8rem; }
  th, td { padding: 4px 6px 4px 0; }
  .n td, .n th, td code, th code { white-space: normal; }
  section { break-inside: auto; margin-top: 20px; padding-top: 14px; }
  figure, tr, .tile, svg { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  .natural svg.plot { max-width: 100%; }
  pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
