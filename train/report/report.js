// --- plots: drawn when their place gets a width, and again when it changes
const figures = JSON.parse(document.getElementById("figures").textContent);
const sources = JSON.parse(document.getElementById("sources").textContent);

function draw(div) {
  drawChart(div, figures[div.dataset.figure]);
  showMarked(div.closest("main, details.part"));
}

const widths = new Map();
const observer = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (widths.get(target) === target.clientWidth) continue;
    widths.set(target, target.clientWidth);
    if (target.dataset.figure === undefined) panel.later(); else if (target.clientWidth) draw(target);
  }
});
for (const div of document.querySelectorAll(".plot")) {
  div.style.height = `${div.dataset.height}px`;
  div.style.minWidth = `${div.dataset.minWidth}px`;
}

// --- a trial marked in all plots and the table of its sweep
const marked = new Map();

function mark(scope, trial) {
  if (marked.get(scope) === trial) marked.delete(scope); else marked.set(scope, trial);
  showMarked(scope);
  const chosen = marked.get(scope), live = scope.querySelector(".marked");
  if (live) live.textContent = chosen === undefined ? "" : `Trial ${chosen} is marked. Select it again to unmark it.`;
}

function showMarked(scope) {
  const chosen = marked.get(scope);
  for (const plot of scope.querySelectorAll(".plot")) plot.classList.toggle("marking", chosen !== undefined);
  for (const one of scope.querySelectorAll("[data-trial]")) one.classList.toggle("is-marked", Number(one.dataset.trial) === chosen);
  for (const button of scope.querySelectorAll(".trial")) {
    button.setAttribute("aria-pressed", String(Number(button.closest("tr").dataset.trial) === chosen));
  }
}

addEventListener("trial", (event) => mark(event.target.closest("main, details.part"), event.detail));
for (const button of document.querySelectorAll(".trial")) {
  button.addEventListener("click", () => {
    mark(button.closest("main, details.part"), Number(button.closest("tr").dataset.trial));
  });
}

// --- switches between plots
for (const box of document.querySelectorAll(".switch")) {
  box.addEventListener("change", (event) => {
    box.querySelectorAll(".pane").forEach((pane, index) => { pane.hidden = index !== Number(event.target.value); });
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
  divs: [...document.querySelectorAll("[data-panel]")],
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
    const low = Math.min(source.low, at.z0), high = source.high;
    const x = Array.from({ length: 241 }, (_, i) => low + ((high - low) * i) / 240);
    const most = Math.max(at.weight, 1e-9), bins = source.bins.desirable.length;
    const edges = Array.from({ length: bins + 1 }, (_, i) => source.low + ((source.high - source.low) * i) / bins);
    const bars = ["desirable", "undesirable"].filter((name) => source.counts[name] > 0).map((name) => ({
      kind: "bars", name: `${name} rows`, edges, color: `var(--${name})`, quiet: true,
      y: source.bins[name].map((count) => (0.45 * most * count) / Math.max(...source.bins[name], 1)),
    }));
    const curve = (name, color, dash) => ({ kind: "line", name, x, y: x.map((r) => outcome(r, at)[name]), color, width: 2, dash });
    const dot = (name, color) => ({ kind: "dots", x: [at.r], y: [here[name]], colors: [color] });
    const rules = [{ kind: "rule", x: at.z0, text: "z0", dash: "none" }, { kind: "rule", x: at.r, dash: "2 3" }];
    const axis = { title: "log-ratio r, nats", range: [low, high], format: "number" };
    const steepest = (at.weight * at.beta) / 4 || 1e-9, gradient = at.sign > 0 ? [-1.1 * steepest, 0] : [0, 1.1 * steepest];
    const mine = `var(--${at.side})`, [outcomes, slope] = this.divs;
    drawChart(outcomes, {
      hover: "x", legend: true, x: axis, y: { range: [0, 1.05 * most], format: "number" },
      marks: [...bars, ...rules, curve("value", mine), curve("loss", "var(--ink)", "7 4"), dot("value", mine), dot("loss", "var(--ink)")],
    });
    drawChart(slope, {
      hover: "x", legend: false, x: axis, y: { range: gradient, format: "number", title: "gradient of the loss" },
      marks: [...rules, curve("gradient", "var(--ink)"), dot("gradient", "var(--ink)")],
    });
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

// --- paper
addEventListener("beforeprint", () => {
  document.documentElement.dataset.theme = "light";
  for (const part of document.querySelectorAll("details.part, details.fold")) part.open = true;
  for (const div of document.querySelectorAll("[data-figure]")) draw(div);
  panel.draw();
});
addEventListener("afterprint", () => { delete document.documentElement.dataset.theme; });

panel.setUp();
for (const div of document.querySelectorAll(".plot")) {
  if (div.dataset.figure !== undefined && div.clientWidth) draw(div);
  widths.set(div, div.clientWidth);
  observer.observe(div);
}
document.documentElement.dataset.ready = "true";
