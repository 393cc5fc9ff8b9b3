"use strict";
// What Python drew, the page fills with its colours; and the panel, the tables, the switches.
const figures = JSON.parse(document.getElementById("figures").textContent);
const sources = JSON.parse(document.getElementById("sources").textContent);
const config = { displaylogo: false, responsive: true, displayModeBar: false };

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A copy of a figure in which every "var(--name)" is that colour of the current theme. Typed arrays stay as they are.
function coloured(value) {
  if (typeof value === "string") {
    const name = value.match(/^var\((--[a-z0-9-]+)\)$/);
    return name ? css(name[1]) : value;
  }
  if (Array.isArray(value)) return value.map(coloured);
  if (value && typeof value === "object" && !ArrayBuffer.isView(value)) {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item)]));
  }
  return value;
}

const drawn = new Set();

function draw(div) {
  const figure = coloured(figures[div.dataset.figure]);
  figure.layout.font.family = getComputedStyle(document.body).fontFamily;
  figure.layout.autosize = true;
  if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;
  const first = !drawn.has(div);
  drawn.add(div);
  Plotly.react(div, figure.data, figure.layout, config);
  if (first) div.on("plotly_click", (event) => {
    const meta = event.points[0].data.meta;
    const trial = meta && (meta.trial !== undefined ? meta.trial : (meta.trials || [])[event.points[0].pointIndex]);
    if (trial !== undefined) mark(div.closest("main, details.part"), trial);
  });
}

// Plots that are not shown have no size: they are drawn when their part or pane opens.
function drawShown() {
  for (const div of document.querySelectorAll("[data-figure]")) {
    if (!drawn.has(div) && div.offsetParent !== null) draw(div);
  }
}

function redraw() {
  for (const div of drawn) draw(div);
  panel.draw();
  for (const [scope, trial] of marked) for (const div of drawn) if (scope.contains(div)) markIn(div, trial);
}

// --- a trial marked in all plots and the table of its sweep
const marked = new Map();

function mark(scope, trial) {
  const chosen = marked.get(scope) === trial ? null : trial;
  if (chosen === null) marked.delete(scope); else marked.set(scope, chosen);
  for (const row of scope.querySelectorAll("tr[data-trial]")) {
    const is = Number(row.dataset.trial) === chosen;
    row.classList.toggle("is-marked", is);
    row.querySelector(".trial").setAttribute("aria-pressed", String(is));
  }
  const live = scope.querySelector(".marked");
  if (live) live.textContent = chosen === null ? "" : `Trial ${chosen} is marked. Select it again to unmark it.`;
  for (const div of drawn) if (scope.contains(div)) markIn(div, chosen);
}

function markIn(div, chosen) {
  const of = (trace) => trace.meta || {};
  if (div.data.some((trace) => of(trace).trial !== undefined)) {
    Plotly.restyle(div, { opacity: div.data.map((trace) => (chosen === null || of(trace).trial === chosen ? 1 : 0.12)) });
  } else if (div.data.some((trace) => of(trace).trials)) {
    const at = div.data.map((trace) => (chosen === null ? null : [of(trace).trials.indexOf(chosen)].filter((i) => i >= 0)));
    Plotly.restyle(div, { selectedpoints: at });
  }
}

for (const button of document.querySelectorAll(".trial")) {
  button.addEventListener("click", () => {
    mark(button.closest("main, details.part"), Number(button.closest("tr").dataset.trial));
  });
}

// --- switches between plots
for (const box of document.querySelectorAll(".switch")) {
  box.addEventListener("change", (event) => {
    box.querySelectorAll(".pane").forEach((pane, index) => { pane.hidden = index !== Number(event.target.value); });
    drawShown();
    for (const div of box.querySelectorAll(".pane:not([hidden]) [data-figure]")) Plotly.Plots.resize(div);
    for (const [scope, trial] of marked) if (scope.contains(box)) box.querySelectorAll(".pane:not([hidden]) [data-figure]").forEach((div) => markIn(div, trial));
  });
}

// --- tables: numbers as numbers, what is missing always last
function compare(a, b) {
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
}

for (const button of document.querySelectorAll(".sortable thead button")) {
  button.addEventListener("click", () => {
    const table = button.closest("table");
    const header = button.closest("th");
    const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.querySelectorAll("thead th")) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const key = (row) => row.children[Number(button.dataset.column)].dataset.sort;
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
      return direction * compare(key(a), key(b));
    });
    body.append(...rows);
  });
}

// --- copy
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("pre");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);  // no clipboard for this page: selected, to be copied by hand
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

// --- the panel
function number(x) {
  if (x !== 0 && Math.abs(x) < 1e-3) {
    const [mantissa, exponent] = x.toExponential(3).split("e");
    return `${Number(mantissa)}e${Number(exponent)}`.replace(/^-/, "\u2212");
  }
  return x.toLocaleString("en-US", { maximumSignificantDigits: 4 }).replace(/^-/, "\u2212");
}

// value = lambda sigmoid(beta s (r - z0)), loss = lambda - value, and d loss / d r.
function outcome(r, { z0, beta, sign, weight }) {
  const up = 1 / (1 + Math.exp(-beta * sign * (r - z0)));
  const down = 1 / (1 + Math.exp(beta * sign * (r - z0)));
  return { value: weight * up, loss: weight * down, gradient: -weight * sign * beta * up * down };
}

// The share of values at or below x, from the values' quantiles at equal steps.
function below(quantiles, x) {
  if (x < quantiles[0]) return 0;
  let low = 0, high = quantiles.length - 1;
  if (x >= quantiles[high]) return 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (quantiles[middle] <= x) low = middle; else high = middle;
  }
  return (low + (x - quantiles[low]) / (quantiles[high] - quantiles[low])) / (quantiles.length - 1);
}

// Where sigmoid (1 - sigmoid) is a tenth of its greatest value, 1/4.
const SATURATED = Math.log((1 + Math.sqrt(0.9)) / (1 - Math.sqrt(0.9)));

const panel = {
  form: document.querySelector("#panel form"),
  div: document.querySelector("[data-panel]"),
  source: sources[0],

  setUp() {
    const { form } = this;
    this.reset();
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => this.later());
    form.querySelector(".reset").addEventListener("click", () => { this.reset(); this.draw(); });
    if (form.source) form.source.addEventListener("change", () => {
      this.source = sources[Number(form.source.value)];
      this.reset();
      this.draw();
    });
    this.draw();
  },

  // A browser draws at most once a frame, however fast a slider moves.
  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  },

  reset() {
    const { form, source } = this;
    const set = (name, low, high, value) => Object.assign(form[name], { min: low, max: high, value });
    set("r", source.low, source.high, source.r);
    set("z0", 0, Math.max(4 * source.z0, 1 / source.beta), source.z0);
    set("beta", Math.log10(Math.min(0.005, source.beta / 2)), Math.log10(Math.max(2, source.beta * 2)), Math.log10(source.beta));
    set("desirable", 0, Math.max(4, 2 * source.weights[0]), source.weights[0]);
    set("undesirable", 0, Math.max(4, 2 * source.weights[1]), source.weights[1]);
    const of = document.querySelector("#panel .source");
    of.textContent = source.split ? `${source.name} (${source.split} rows)` : `${source.name}, which kept none`;
    const other = document.querySelector("#panel .other-loss");
    other.hidden = source.loss === "kto";
    other.textContent = `This run was trained with the loss ${source.loss}; the panel shows KTO's.`;
  },

  settings() {
    const { form } = this;
    const side = form.side.value;
    return {
      side, sign: side === "desirable" ? 1 : -1, r: form.r.valueAsNumber, z0: form.z0.valueAsNumber,
      beta: 10 ** form.beta.valueAsNumber, weight: form[side].valueAsNumber,
    };
  },

  draw() {
    const { form, source } = this;
    const at = this.settings();
    const here = outcome(at.r, at);
    const texts = { ...at, ...here, desirable: form.desirable.valueAsNumber, undesirable: form.undesirable.valueAsNumber };
    for (const output of form.querySelectorAll("output")) output.textContent = number(texts[output.dataset.of]);
    form.beta.setAttribute("aria-valuetext", number(at.beta));
    document.querySelector("#panel .share").textContent = this.sentence(at);
    const figure = coloured(figures[this.div.dataset.panel]);
    const { data, layout } = figure;
    const low = Math.min(source.low, at.z0), high = source.high;
    const x = Array.from({ length: 241 }, (_, i) => low + ((high - low) * i) / 240);
    const width = (source.high - source.low) / source.bins.desirable.length;
    ["desirable", "undesirable"].forEach((name, index) => {
      const most = Math.max(...source.bins[name], 1);
      data[index].x = source.bins[name].map((_, i) => source.low + (i + 0.5) * width);
      data[index].y = source.bins[name].map((count) => count / most);
      data[index].width = width;
      data[index].showlegend = source.counts[name] > 0;
    });
    const colours = { value: css(`--${at.side}`), loss: css("--ink"), gradient: css("--ink") };
    ["value", "loss", "gradient"].forEach((name, index) => {
      Object.assign(data[2 + index], { x, y: x.map((r) => outcome(r, at)[name]) });
      data[2 + index].line.color = colours[name];
      Object.assign(data[5 + index], { x: [at.r], y: [here[name]] });
      data[5 + index].marker.color = colours[name];
    });
    const upright = (place, dash) => ({ type: "line", x0: place, x1: place, yref: "paper", y0: 0, y1: 1, line: { color: css("--muted"), width: 1, dash } });
    layout.shapes = [upright(at.z0, "solid"), upright(at.r, "dot")];
    layout.annotations = [{ x: at.z0, y: 1, yref: "paper", yanchor: "top", xanchor: at.z0 > (low + high) / 2 ? "right" : "left", text: "z0", xshift: at.z0 > (low + high) / 2 ? -3 : 3, showarrow: false, font: { color: css("--ink") }, bgcolor: css("--halo") }];
    layout.xaxis.range = [low, high];
    layout.font.family = getComputedStyle(document.body).fontFamily;
    layout.dragmode = false;
    Plotly.react(this.div, data, layout, config);
  },

  sentence(at) {
    const { counts, quantiles } = this.source;
    const reach = SATURATED / at.beta;
    const share = (name) => 1 - below(quantiles[name], at.z0 + reach) + below(quantiles[name], at.z0 - reach);
    const present = ["desirable", "undesirable"].filter((name) => counts[name] > 0);
    const far = `A row more than ${number(reach)} nats from z0 has almost no effect on training: less than a tenth of the gradient at z0.`;
    if (!present.length) return far;
    const total = present.reduce((sum, name) => sum + counts[name], 0);
    const all = present.reduce((sum, name) => sum + share(name) * counts[name], 0) / total;
    const percent = (x) => `${(100 * x).toFixed(1)} %`;
    const each = present.map((name) => `${percent(share(name))} of the ${name}`).join(", ");
    return `${far} That is ${percent(all)} of these ${total.toLocaleString("en-US")} rows (${each}).`;
  },
};

// --- themes and paper
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("beforeprint", () => {
  document.documentElement.dataset.theme = "light";
  for (const part of document.querySelectorAll("details.part")) part.open = true;
  drawShown();
  redraw();
});
addEventListener("afterprint", () => {
  delete document.documentElement.dataset.theme;
  redraw();
});
for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", drawShown);
drawShown();
panel.setUp();
document.documentElement.dataset.ready = "true";
