"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const text = data.strings, get = id => document.getElementById(id);
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
const ROLES = ["saved", "gradient", "temporary", "returned", "recomputed", "codec", "workspace"];

function size(bytes) {
  let power = 0, number = bytes;
  while (Math.abs(number) >= 1023.5 && power < UNITS.length - 1) { number /= 1024; power++; }
  const digits = power === 0 ? 0 : Math.abs(number) < 10 ? 2 : Math.abs(number) < 100 ? 1 : 0;
  return `${number.toFixed(digits)} ${UNITS[power]}`;
}
const exact = bytes => `${bytes.toLocaleString("en-US")} B`;
const star = path => path.replace(/(^|[^\w])\d+(?![\w])/g, "$1*");

// ------------------------------------------------------------ blocks and tracks

/** Columns of the data as one object a row. */
function rows(columns) {
  const names = Object.keys(columns), count = columns[names[0]].length;
  return Array.from({ length: count }, (_, i) => Object.fromEntries(names.map(n => [n, columns[n][i]])));
}
function where(line) {
  if (line < 0) return { place: "not known", code: "" };
  const [file, number, code] = data.lines[line];
  return { place: `${text[file]}:${number}`, code: text[code] };
}
const decisions = new Map(rows(data.decisions).map(d => [text[d.id], d]));
const tracks = {};
for (const [key, track] of Object.entries(data.tracks)) {
  const steps = track.steps.length, blocks = rows(track.blocks);
  const changes = new Array(steps + 1).fill(0);
  for (const b of blocks) { b.track = key; changes[b.first] += b.nbytes; changes[b.last + 1] -= b.nbytes; }
  let total = 0;
  const totals = changes.slice(0, steps).map(c => (total += c));
  tracks[key] = { key, blocks, totals, steps: track.steps, forward: track.forward_steps, canvas: get(key), order: [] };
}
const keys = Object.keys(tracks), all = Object.values(tracks);
// the highest sum of all, so that both charts have one scale
const top_ = Math.max(1, data.budget || 0, ...all.map(t => t.totals.reduce((a, b) => Math.max(a, b), 0)));

function stepName(track, step) {
  if (step < track.forward) return `forward ${step + 1} of ${track.forward}`;
  const inside = step - track.forward, count = track.steps.length - track.forward - 1;
  return inside ? `backward ${inside} of ${count}` : "between forward and backward";
}
/** Steps with more alive than around them, highest first, not too close to one another. */
function peaksOf(track, most) {
  const t = track.totals, apart = Math.max(2, Math.round(t.length / 12));
  const tops = t.map((_, i) => i).filter(i => t[i] > 0 && t[i] > (t[i - 1] ?? 0) && t[i] >= (t[i + 1] ?? 0));
  tops.sort((a, b) => t[b] - t[a] || a - b);
  const found = [];
  for (const i of tops) {
    if (found.length < most && found.every(f => Math.abs(f - i) >= apart)) found.push(i);
  }
  return found;
}

// ------------------------------------------------------------ groups and colours

let by = "role", groups = [];
function groupOf(b) {
  if (by === "role") return text[b.role];
  if (by === "kind") return b.kind < 0 ? "made by the backward" : text[b.kind];
  return star(text[b.module]) || "(no module)";
}
function regroup() {
  const weight = new Map();
  for (const t of all) for (const b of t.blocks) {
    b.group = groupOf(b);
    weight.set(b.group, (weight.get(b.group) || 0) + b.nbytes * (b.last - b.first + 1));
  }
  groups = [...weight.keys()].sort((a, b) => weight.get(b) - weight.get(a) || (a < b ? -1 : 1));
  if (by === "role") groups = ROLES.filter(r => weight.has(r));
  const rest = groups.slice(9);
  groups = groups.slice(0, 9).concat(rest.length ? ["everything else"] : []);
  const rank = new Map(groups.map((g, i) => [g, i]));
  for (const t of all) {
    for (const b of t.blocks) b.rank = rank.has(b.group) ? rank.get(b.group) : 9;
    t.order = t.blocks.map((_, i) => i).sort((x, y) => t.blocks[x].rank - t.blocks[y].rank
      || t.blocks[x].first - t.blocks[y].first || x - y);
    t.image = null;
  }
  get("legend").replaceChildren(...groups.map((g, i) => {
    const item = document.createElement("li"), swatch = document.createElement("i");
    swatch.style.background = `var(--g${colour(i)})`;
    item.append(swatch, g);
    return item;
  }));
}
/** A use keeps its colour in every plan; other groups have theirs by rank. */
const colour = rank => by === "role" ? ROLES.indexOf(groups[rank]) : rank;

// ------------------------------------------------------------ charts

const LEFT = 64, BOTTOM = 18, TOP = 6;
const state = { track: keys[keys.length - 1], step: 0, block: null, held: false };

/** Where each step is drawn: a step many pixels wide, or many steps in one pixel, of which the highest. */
function columnsOf(track, width) {
  const steps = track.steps.length, found = [];
  if (steps <= width) {
    for (let s = 0; s < steps; s++) found.push([Math.round(s * width / steps), Math.round((s + 1) * width / steps), s]);
    return found;
  }
  for (let x = 0; x < width; x++) {
    let best = Math.floor(x * steps / width);
    for (let s = best; s < Math.floor((x + 1) * steps / width); s++) if (track.totals[s] > track.totals[best]) best = s;
    found.push([x, x + 1, best]);
  }
  return found;
}
function layout(track) {
  const box = track.canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  const width = Math.max(200, Math.round(box.width)), height = Math.max(120, Math.round(box.height));
  Object.assign(track, { width, height, ratio, plot: width - LEFT - 4, tall: height - BOTTOM - TOP });
  track.columns = columnsOf(track, track.plot);
}
const yOf = (track, bytes) => TOP + track.tall * (1 - bytes / (top_ * 1.04));

function paint(track) {
  layout(track);
  const style = getComputedStyle(document.documentElement), css = name => style.getPropertyValue(name);
  const image = document.createElement("canvas"), pen = image.getContext("2d");
  image.width = track.width * track.ratio; image.height = track.height * track.ratio;
  pen.scale(track.ratio, track.ratio);
  const fills = groups.map((_, i) => css(`--g${colour(i)}`));
  const scale = track.tall / (top_ * 1.04), base = TOP + track.tall;
  for (const [x0, x1, step] of track.columns) {
    let sum = 0, from = 0, rank = -1;
    const edges = [];
    const flush = () => {
      if (rank >= 0 && sum > from) {
        pen.fillStyle = fills[rank];
        pen.fillRect(LEFT + x0, base - sum * scale, x1 - x0, (sum - from) * scale);
      }
      from = sum;
    };
    for (const i of track.order) {
      const b = track.blocks[i];
      if (b.first > step || b.last < step) continue;
      if (b.rank !== rank) { flush(); rank = b.rank; }
      sum += b.nbytes;
      if (b.nbytes * scale >= 4) edges.push(sum);
    }
    flush();
    pen.fillStyle = css("--edge");
    for (const e of edges) pen.fillRect(LEFT + x0, base - e * scale, x1 - x0, 1);
  }
  pen.fillStyle = pen.strokeStyle = css("--soft");
  pen.font = "12px system-ui, sans-serif"; pen.textBaseline = "middle"; pen.textAlign = "right"; pen.lineWidth = 1;
  const unit = 2 ** Math.floor(Math.log2(top_ / 3)), tick = top_ / unit > 5 ? unit * 2 : unit;
  pen.globalAlpha = .9;
  for (let v = 0; v <= top_ * 1.04; v += tick) {
    const y = yOf(track, v);
    if (y < TOP + 6 && v) break;
    pen.fillText(size(v), LEFT - 8, y);
    pen.globalAlpha = .25; pen.fillRect(LEFT, Math.round(y), track.plot, 1); pen.globalAlpha = .9;
  }
  const middle = LEFT + track.plot * track.forward / track.steps.length;
  pen.globalAlpha = .7; pen.fillRect(Math.round(middle), TOP, 1, track.tall); pen.globalAlpha = 1;
  pen.textAlign = "left"; pen.fillText("forward", LEFT, base + 10); pen.fillText("backward", middle + 4, base + 10);
  if (data.budget) {
    pen.strokeStyle = pen.fillStyle = css("--budget"); pen.setLineDash([6, 4]);
    const y = yOf(track, data.budget);
    pen.beginPath(); pen.moveTo(LEFT, y); pen.lineTo(LEFT + track.plot, y); pen.stroke();
    pen.textAlign = "right"; pen.fillText("budget", LEFT + track.plot, y - 8);
  }
  track.image = image;
}
function draw(track) {
  if (!track.image) paint(track);
  const canvas = track.canvas, pen = canvas.getContext("2d");
  canvas.width = track.image.width; canvas.height = track.image.height;
  pen.drawImage(track.image, 0, 0);
  pen.scale(track.ratio, track.ratio);
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink");
  if (track.key === state.track) {
    const x = LEFT + (state.step + .5) * track.plot / track.steps.length;
    pen.fillStyle = ink; pen.globalAlpha = .6; pen.fillRect(Math.round(x), TOP, 1, track.tall); pen.globalAlpha = 1;
  }
  const b = state.block;
  if (b && b.track === track.key) outline(track, b, pen, ink);
}
/** The block's shape over its life, on the blocks that are stacked below it. */
function outline(track, b, pen, ink) {
  const upper = [], lower = [];
  for (const [x0, x1, step] of track.columns) {
    if (step < b.first || step > b.last) continue;
    const bottom = below(track, b, step);
    const y0 = yOf(track, bottom + b.nbytes), y1 = Math.max(yOf(track, bottom), y0 + 1.5);
    upper.push([LEFT + x0, y0], [LEFT + x1, y0]);
    lower.unshift([LEFT + x1, y1], [LEFT + x0, y1]);
  }
  if (!upper.length) return;
  pen.beginPath();
  for (const [x, y] of upper.concat(lower)) pen.lineTo(x, y);
  pen.closePath();
  pen.fillStyle = ink; pen.globalAlpha = .35; pen.fill(); pen.globalAlpha = 1;
  pen.strokeStyle = ink; pen.lineWidth = 1.5; pen.stroke();
}
function below(track, block, step) {
  let sum = 0;
  for (const i of track.order) {
    const b = track.blocks[i];
    if (b === block) return sum;
    if (b.first <= step && b.last >= step) sum += b.nbytes;
  }
  return sum;
}
/** What is alive at a step, from the bottom of the stack to its top. */
const stack = (track, step) => track.order.map(i => track.blocks[i]).filter(b => b.first <= step && b.last >= step);

function hit(track, event) {
  const box = track.canvas.getBoundingClientRect();
  const x = event.clientX - box.left - LEFT, y = event.clientY - box.top;
  if (!track.columns || x < 0 || x >= track.plot || y > TOP + track.tall) return null;
  const column = track.columns.find(c => x < c[1]) || track.columns[track.columns.length - 1], step = column[2];
  let left = (1 - (y - TOP) / track.tall) * top_ * 1.04;
  for (const b of stack(track, step)) {
    left -= b.nbytes;
    if (left < 0) return { step, block: b };
  }
  return { step, block: null };
}

// ------------------------------------------------------------ what is chosen

function choose(change) {
  const before = { ...state };
  Object.assign(state, change);
  const track = tracks[state.track];
  state.step = Math.max(0, Math.min(state.step, track.steps.length - 1));
  for (const t of all) if (t.key === state.track || t.key === before.track) draw(t);
  const slider = get("step");
  slider.max = track.steps.length - 1; slider.value = state.step;
  const title = state.track === "planned" ? "Planned" : "Inductor";
  const name = `${title}, ${stepName(track, state.step)}`;
  get("where").textContent = name;
  slider.setAttribute("aria-valuetext", `${name}: ${size(track.totals[state.step])}`);
  for (const button of get("peaks").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", button.dataset.key === `${state.track} ${state.step}`);
  }
  if (state.step !== before.step || state.track !== before.track || !get("alive").children.length) showAlive(track);
  showBlock();
  if (get("which").value === "step") list();
  for (const row of get("storages").querySelectorAll("tbody tr")) {
    row.setAttribute("aria-selected", Boolean(state.block) && row.dataset.id === text[state.block.id]);
  }
}
function showAlive(track) {
  const there = stack(track, state.step).sort((a, b) => b.nbytes - a.nbytes || a.id - b.id);
  get("alive-title").textContent = `${size(track.totals[state.step])} alive in ${there.length} storages at `
    + `${stepName(track, state.step)}`;
  get("alive").replaceChildren(...there.slice(0, 9).map(b => {
    const item = document.createElement("li"), button = document.createElement("button");
    const swatch = document.createElement("i");
    swatch.style.background = `var(--g${colour(b.rank)})`;
    button.append(swatch, ...[size(b.nbytes), text[b.id], where(b.line).place].map(words => {
      const span = document.createElement("span");
      span.textContent = words;
      return span;
    }));
    button.onclick = () => choose({ block: b, held: true });
    item.append(button);
    return item;
  }));
}
function showBlock() {
  const b = state.block, panel = get("block"), heading = document.createElement("h3");
  if (!b) {
    heading.textContent = "No block chosen";
    const hint = document.createElement("p");
    hint.className = "soft";
    hint.textContent = "Point at a chart, or choose a storage from the list or the table.";
    panel.replaceChildren(heading, hint);
    return;
  }
  const track = tracks[b.track], source = where(b.line), decision = decisions.get(text[b.id].replace(/\/(payload|scale|offset|decoded)$/, ""));
  heading.textContent = text[b.id] + (state.held ? " (held: Escape or a tap lets go)" : "");
  const entries = [
    ["bytes", `${size(b.nbytes)} (${exact(b.nbytes)})`],
    ["use", text[b.role] + (b.kind < 0 ? "" : `, ${text[b.kind]}`)],
    ["tensor", b.dtype < 0 ? "" : `${text[b.dtype]} [${text[b.shape]}]`],
    ["codec", b.codec < 0 ? "none" : text[b.codec]],
    ["module", text[b.module] || "none"],
    ["from", source.place],
    ["line", source.code],
    ["alive", `${stepName(track, b.first)} to ${stepName(track, b.last)} (${b.last - b.first + 1} steps)`],
    ["plan", decision ? `${text[decision.action]}: ${text[decision.reason]}` : ""],
  ];
  const details = document.createElement("dl");
  for (const [term, words] of entries) {
    if (!words) continue;
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = term;
    const holder = term === "line" ? document.createElement("code") : dd;
    holder.textContent = words;
    if (holder !== dd) dd.append(holder);
    details.append(dt, dd);
  }
  panel.replaceChildren(heading, details);
}
function onKey(track, event) {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key], near = track.key === state.track ? state.step : 0;
  const turn = { ArrowUp: 1, ArrowDown: -1 }[event.key], jump = { PageDown: 1, PageUp: -1 }[event.key];
  let change = null;
  if (move) change = { step: near + move * (event.shiftKey ? 10 : 1) };
  else if (event.key === "Home") change = { step: 0 };
  else if (event.key === "End") change = { step: track.steps.length - 1 };
  else if (event.key === "Escape") change = { block: null, held: false };
  else if (turn) {
    const there = stack(track, near), at = there.indexOf(state.block);
    const next = at < 0 ? (turn > 0 ? 0 : there.length - 1) : (at + turn + there.length) % there.length;
    change = { block: there[next] || null, held: there.length > 0 };
  } else if (jump) {
    const peaks = track.peaks.slice().sort((a, b) => (a - b) * jump);
    const next = peaks.find(p => (p - near) * jump > 0);
    if (next !== undefined) change = { step: next };
  }
  if (!change) return;
  event.preventDefault();
  choose({ track: track.key, ...change });
}
function drawAll() {
  for (const t of all) { t.image = null; draw(t); }
}
function startCharts() {
  regroup();
  for (const t of all) {
    t.peaks = peaksOf(t, 3);
    const most = t.peaks.length ? t.peaks[0] : 0;
    get(`${t.key}-caption`).textContent = `peak ${size(t.totals[most] || 0)} at ${stepName(t, most)}, `
      + `${t.blocks.length} storages`;
    t.canvas.addEventListener("pointermove", e => {
      const found = e.pointerType === "mouse" && !state.held && hit(t, e);
      if (found && found.block && found.block !== state.block) choose({ track: t.key, ...found });
    });
    t.canvas.addEventListener("pointerdown", e => {
      const found = hit(t, e);
      if (found) choose({ track: t.key, ...found, held: Boolean(found.block) && !(state.held && found.block === state.block) });
    });
    t.canvas.addEventListener("keydown", e => onKey(t, e));
    for (const step of t.peaks) {
      const button = document.createElement("button");
      button.dataset.key = `${t.key} ${step}`;
      button.textContent = `${t.key === "planned" ? "Planned" : "Inductor"} ${size(t.totals[step])}, ${stepName(t, step)}`;
      button.onclick = () => choose({ track: t.key, step, block: null, held: false });
      get("peaks").append(button);
    }
  }
  get("by").onchange = e => { by = e.target.value; regroup(); drawAll(); showAlive(tracks[state.track]); };
  get("step").oninput = e => choose({ step: Number(e.target.value), block: null, held: false });
  const redraw = () => requestAnimationFrame(drawAll);
  new ResizeObserver(redraw).observe(document.body);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  drawAll();
  choose({ step: tracks[state.track].peaks[0] || 0 });
}

// ------------------------------------------------------------ table

const PAGE = 40;
const COLUMNS = [
  ["storage", s => s.id], ["from", s => s.place], ["use", s => s.use], ["tensor", s => s.tensor],
  ["action", s => s.action], ["Inductor", s => s.before, true], ["planned", s => s.after, true],
  ["full size", s => s.full, true], ["alive when planned", s => s.alive],
];
const table = new Map();
function storage(id, b) {
  const source = where(b.line);
  const made = { id, ...source, use: "", tensor: "", action: "", before: 0, after: 0, full: 0, alive: "", blocks: {} };
  if (b.dtype >= 0) made.tensor = `${text[b.dtype]} [${text[b.shape]}]`;
  table.set(id, made);
  return made;
}
for (const [id, d] of decisions) {
  const row = storage(id, d);
  Object.assign(row, { full: d.nbytes, action: text[d.action], decided: true, use: text[d.kind], before: d.baseline, after: d.saved });
}
for (const t of all) for (const b of t.blocks) {
  const id = text[b.id], row = table.get(id) || storage(id, b);
  row.blocks[t.key] = b;
  row.use = text[b.role] + (b.kind < 0 ? "" : `, ${text[b.kind]}`);
  if (!row.decided) row[t.key === "planned" ? "after" : "before"] = b.nbytes;
  row.full = row.full || b.nbytes;
  if (b.codec >= 0 && !row.action) row.action = text[b.codec];
  const [from, to] = [b.first, b.last].map(step => stepName(t, step).replace(/ of .*/, ""));
  if (t.key === "planned") row.alive = `${from} to ${to}`;
}
const everything = [...table.values()];
for (const s of everything) s.words = [s.id, s.place, s.code, s.use, s.tensor, s.action].join(" ").toLowerCase();
let sorted = 7, falling = true, shown = PAGE;

function matching() {
  const words = get("search").value.toLowerCase().split(/\s+/).filter(Boolean), which = get("which").value;
  return everything.filter(s => words.every(w => s.words.includes(w))
    && (which !== "decided" || s.decided)
    && (which !== "step" || (b => b && b.first <= state.step && b.last >= state.step)(s.blocks[state.track])));
}
function list() {
  const value = COLUMNS[sorted][1], found = matching(), sign = falling ? -1 : 1;
  found.sort((a, b) => (value(a) < value(b) ? -sign : value(a) > value(b) ? sign : 0) || (a.id < b.id ? -1 : 1));
  get("count").textContent = `${found.length} of ${everything.length} storages`;
  get("more").hidden = found.length <= shown;
  get("storages").tBodies[0].replaceChildren(...found.slice(0, shown).map(s => {
    const row = document.createElement("tr");
    row.dataset.id = s.id;
    COLUMNS.forEach(([title, read, number]) => {
      const cell = row.insertCell(), block = s.blocks[state.track] || s.blocks.planned || s.blocks.baseline;
      if (number) { cell.className = "n"; cell.textContent = read(s) ? size(read(s)) : "-"; cell.title = exact(read(s)); return; }
      if (title === "storage" && block) {
        const button = document.createElement("button");
        button.textContent = s.id;
        button.onclick = () => choose({ track: block.track, step: state.step >= block.first && state.step <= block.last
          && block.track === state.track ? state.step : block.first, block, held: true });
        cell.append(button);
      } else cell.textContent = read(s);
      if (title === "from" && s.code) {
        const code = document.createElement("code");
        code.textContent = s.code;
        code.title = s.code;
        cell.append(code);
      }
    });
    return row;
  }));
}
function startTable() {
  const head = get("storages").tHead.insertRow();
  COLUMNS.forEach(([title, , number], i) => {
    const cell = document.createElement("th"), button = document.createElement("button");
    cell.scope = "col"; cell.className = number ? "n" : "";
    button.textContent = title;
    button.onclick = () => { falling = sorted === i ? !falling : Boolean(number); sorted = i; marks(); list(); };
    cell.append(button); head.append(cell);
  });
  const marks = () => [...head.cells].forEach((cell, i) => {
    cell.setAttribute("aria-sort", i !== sorted ? "none" : falling ? "descending" : "ascending");
    cell.firstChild.textContent = COLUMNS[i][0] + (i !== sorted ? "" : falling ? " \u25be" : " \u25b4");
  });
  marks();
  get("search").oninput = get("which").onchange = () => { shown = PAGE; list(); };
  get("more").onclick = () => { shown += PAGE; list(); };
  list();
}
startTable();
if (all.length) startCharts();
})();
