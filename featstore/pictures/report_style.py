"""The style sheet of the report."""

from __future__ import annotations

STYLE = """
:root{--ink:#1c1d22;--soft:#5d6068;--paper:#fff;--rule:#dcdee3;--bar:#5b7cfa;--best:#0f9d6b;--track:#eef0f4}
@media (prefers-color-scheme:dark){
:root{--ink:#e9eaee;--soft:#a2a6b0;--paper:#15161a;--rule:#33363e;--bar:#7b96ff;--best:#38c793;--track:#24262d}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%;overflow-wrap:anywhere}
.wide th,.wide td{overflow-wrap:break-word}
main{max-width:76rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.15rem;margin:2.5rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--rule)}
.lead{font-size:1.05rem;color:var(--soft);margin:.25rem 0 0;max-width:46rem}
.note{color:var(--soft);font-size:.9rem;max-width:46rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .75rem .35rem 0;text-align:left;vertical-align:middle}
thead th{color:var(--soft);font-weight:600;font-size:.85rem;border-bottom:1px solid var(--rule)}
tbody tr+tr td,tbody tr+tr th{border-top:1px solid var(--rule)}
.value{text-align:right;white-space:nowrap}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch}
.scores{width:100%}
.scores th[scope=row]{font-weight:500;overflow-wrap:anywhere;width:34%}
.scores small{display:block;color:var(--soft);font-weight:400}
.std{color:var(--soft);font-size:.85em}
.bar{width:50%;padding-right:0}
.track{display:block;position:relative;height:.85rem;background:var(--track);border-radius:.25rem}
.fill{position:absolute;inset:0 auto 0 0;background:var(--bar);border-radius:.25rem}
.best .fill{background:var(--best)}
.best th[scope=row]{font-weight:700}
.whisker{position:absolute;top:50%;height:2px;margin-top:-1px;background:var(--ink)}
.intervals .track{background:none;border-bottom:1px solid var(--rule)}
.zero{position:absolute;top:0;bottom:0;width:1px;background:var(--soft)}
.line{position:absolute;top:50%;height:3px;margin-top:-1.5px;background:var(--bar);border-radius:2px}
.dot{position:absolute;top:50%;width:.6rem;height:.6rem;margin:-.3rem 0 0 -.3rem;background:var(--ink);
border-radius:50%}
.intervals .std{display:block}
.plate{margin:0}
.plate img{display:block;max-width:100%;height:auto;border-radius:.3rem}
details{border:1px solid var(--rule);border-radius:.3rem;margin:.4rem 0}
summary{cursor:pointer;padding:.4rem .75rem;overflow-wrap:anywhere}
details pre{margin:0;padding:.5rem .75rem;border-top:1px solid var(--rule);overflow-x:auto;font-size:.8rem;
font-family:ui-monospace,Menlo,Consolas,monospace}
.pictures th,.pictures td{padding:.2rem .3rem .2rem 0;border:0!important}
.pictures thead th{font-size:.8rem;max-width:8rem;min-width:5rem;vertical-align:bottom;overflow-wrap:anywhere}
.pictures th[scope=row]{font-size:.8rem;font-weight:500;color:var(--soft);max-width:7rem;overflow-wrap:anywhere}
.pictures img{display:block;width:8rem;height:auto;image-rendering:pixelated;border-radius:.2rem}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1rem;padding:0;margin:.75rem 0;font-size:.85rem}
.chip{display:inline-block;width:.9em;height:.9em;margin-right:.4em;border-radius:.2em;vertical-align:-.08em;
border:1px solid var(--rule)}
.made{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1rem;margin:0;font-size:.9rem}
.made dt{color:var(--soft)}
.made dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap;font-family:ui-monospace,Menlo,Consolas,monospace}
@media (max-width:40rem){
.pictures img{width:5.5rem}
.scores th,.scores td{padding-right:.5rem}
.scores th[scope=row]{width:auto;font-size:.9rem}
.bar{width:28%}
.intervals .bar{width:38%}
.intervals .value{white-space:normal}
.made{grid-template-columns:1fr}
.made dd{margin-bottom:.5rem}}
"""
