"use strict";
// Draws a figure of figures.py as SVG, as wide as its place. Colours are CSS variables, so themes need no redrawing; text is
// only ever inserted as text.
//
// figure: { hover: "x" | "near", legend, x: axis, y: axis, marks }
// axis:   { range: [low, high], log, format: "number" | "percent" | "whole", title, ticks: [[value, text], ...] }
// marks, by kind:
//   line  x, y, low, high (interval), color, width, dash, dots, faint (no hover), name, named (in the legend), trial, text
//   bars  edges, y, color, name, quiet (no hover)
//   dots  x, y, low, high, colors, texts, trials
//   rule  x or y, text, dash
//   axis  x, label, ticks [[y, text], ...]: an upright axis of parallel coordinates
const ruler = document.createElement("canvas").getContext("2d");
ruler.font = `12px ${getComputedStyle(document.body).fontFamily}`;
let clips = 0;

function textWidth(text) {
  return ruler.measureText(text).width;
}

function element(parent, tag, attributes = {}, style = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  for (const [name, value] of Object.entries(style)) made.style.setProperty(name, value);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

function block(parent, name, text = "") {
  const made = document.createElement("div");
  made.className = name;
  made.textContent = text;
  parent.append(made);
  return made;
}

function number(x, digits = 4) {
  if (x !== 0 && Math.abs(x) < 1e-3) {
    const [mantissa, exponent] = x.toExponential(digits - 1).split("e");
    return `${Number(mantissa)}e${Number(exponent)}`.replace(/^-/, "\u2212");
  }
  if (Math.abs(x) >= 1e9) return x.toExponential(digits - 2).replace("e+", "e").replace(/^-/, "\u2212");
  return x.toLocaleString("en-US", { maximumSignificantDigits: digits }).replace(/^-/, "\u2212");
}

function written(axis, x, digits = 4) {
  if (axis.format === "percent") return `${number(100 * x, digits)} %`;
  return axis.format === "whole" ? Math.round(x).toLocaleString("en-US") : number(x, digits);
}

// Ticks at 1, 2 or 5 times a power of ten; on a logarithmic axis at powers of ten and, if these are few, at 2 and 5 times.
function ticks(axis, most) {
  if (axis.ticks) return axis.ticks;
  const [low, high] = axis.range;
  let values = [];
  if (axis.log) {
    const exponents = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) exponents.push(e);
    const inside = (steps) => exponents.flatMap((e) => steps.map((s) => s * 10 ** e)).filter((v) => v >= low * 0.999 && v <= high * 1.001);
    values = inside([1]).length > 2 ? inside([1]) : inside([1, 2, 5]).length > 1 ? inside([1, 2, 5]) : [low, high];
    values = values.filter((_, i) => i % Math.ceil(values.length / most) === 0);
  } else {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    let step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    if (axis.format === "whole") step = Math.max(1, Math.round(step));
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step && values.length < 50; i++) values.push(i * step);
    values = values.map((v) => Number(v.toPrecision(12)));
  }
  const digits = axis.log ? 2 : Math.min(12, Math.max(2, Math.ceil(Math.log10(Math.max(...values.map(Math.abs), 1e-300) / (high - low) * most)) + 1));
  return values.map((value) => [value, written(axis, value, digits)]);
}

// The pieces of a curve between its gaps, as [index, ...].
function pieces(values) {
  const found = [[]];
  values.forEach((value, i) => { if (value === null || value === undefined) found.push([]); else found.at(-1).push(i); });
  return found.filter((piece) => piece.length);
}

function drawChart(div, figure) {
  const width = div.clientWidth, height = div.clientHeight;
  if (!width) return;
  div.figure = figure;
  div.replaceChildren();
  const parallel = figure.marks.some((mark) => mark.kind === "axis");
  const names = figure.marks.filter((mark) => mark.name && mark.named !== false);
  if (figure.legend && names.length > 1) {
    const legend = block(div, "legend");
    for (const mark of names) {
      const swatch = element(block(legend, "entry", mark.name), "svg", { width: 18, height: 8, "aria-hidden": "true" });
      element(swatch, "line", { x1: 0, x2: 18, y1: 4, y2: 4, "stroke-width": mark.kind === "bars" ? 8 : 2, "stroke-dasharray": mark.dash || "none" },
        { stroke: mark.color, opacity: mark.kind === "bars" ? 0.6 : 1 });
      swatch.parentElement.prepend(swatch);
    }
  }
  const top = parallel ? 22 : figure.y.title ? 20 : 8, bottom = parallel ? 8 : figure.x.title ? 36 : 22;
  const inner = height - (div.querySelector(".legend")?.offsetHeight || 0);
  const yTicks = parallel ? [] : ticks(figure.y, Math.max(2, Math.floor((inner - top - bottom) / 34)));
  const widest = (texts) => Math.max(0, ...texts.map(textWidth));
  const left = parallel ? 14 : Math.min(widest(yTicks.map(([, text]) => text)) + 10, width / 2);
  const last = parallel && figure.marks.filter((mark) => mark.kind === "axis").at(-1);
  const right = last ? Math.max(widest(last.ticks.map(([, text]) => text)) + 10, textWidth(last.label) * 0.6 + 4) : 12;
  const root = element(div, "svg", { viewBox: `0 0 ${width} ${inner}`, "aria-hidden": "true" });
  const scale = (axis, from, to) => {
    const by = axis.log ? Math.log10 : Number, [low, high] = axis.range.map(by);
    return (value) => from + (high === low ? 0.5 : (by(value) - low) / (high - low)) * (to - from);
  };
  const room = figure.x.log || figure.hover === "near" && !parallel ? 8 : 0;  // so that a dot at the end is whole
  const X = scale(figure.x, left + room, width - right - room), Y = scale(figure.y, inner - bottom, top);

  if (!parallel) {
    for (const [value, text] of yTicks) {
      element(root, "line", { x1: left, x2: width - right, y1: Y(value), y2: Y(value) }, { stroke: "var(--grid)" });
      element(root, "text", { x: left - 7, y: Y(value) + 4, "text-anchor": "end" }, {}, text);
    }
    element(root, "line", { x1: left, x2: width - right, y1: inner - bottom, y2: inner - bottom }, { stroke: "var(--rule)" });
    drawUnderneath(root, ticks(figure.x, Math.max(2, Math.floor((width - left) / 58))), X, inner - bottom + 15, width);
    if (figure.x.title) element(root, "text", { x: width - right, y: inner - 4, "text-anchor": "end" }, {}, figure.x.title);
    if (figure.y.title) element(root, "text", { x: 0, y: 12 }, {}, figure.y.title);
  }
  const clip = `clip-${clips++}`;
  element(element(root, "clipPath", { id: clip }), "rect", { x: left - 5, y: parallel ? 0 : top - 5, width: width - left - right + 10, height: inner - bottom - top + 10 });
  const inside = element(root, "g", parallel ? {} : { "clip-path": `url(#${clip})` });
  const points = figure.marks.flatMap((mark) => MARKS[mark.kind](inside, mark, X, Y, { left, right: width - right, top, bottom: inner - bottom, root }));
  hovering(div, root, figure, points, { top, bottom: inner - bottom });
}

// Labels below an axis: each is cut to its place, and left out where even that collides.
function drawUnderneath(root, labels, X, y, width) {
  let end = -Infinity;
  labels.forEach(([value, text], i) => {
    const at = X(value), space = Math.min(...[i - 1, i + 1].filter((j) => labels[j]).map((j) => Math.abs(X(labels[j][0]) - at)), width);
    let shown = text;
    if (!/^[\d\u2212]/.test(text)) while (shown.length > 4 && textWidth(shown) > space - 6) shown = `${shown.slice(0, -2)}…`;
    const half = textWidth(shown) / 2, middle = Math.min(Math.max(at, half), width - half);
    if (middle - half < end + 4) return;
    end = middle + half;
    element(element(root, "text", { x: middle, y, "text-anchor": "middle" }, {}, shown), "title", {}, {}, text);
  });
}

// Each draws a mark and returns its points for the pointer: { x, y, at (value of x), lines: what to say, color, trial }.
const MARKS = {
  line(root, mark, X, Y) {
    const of = mark.trial === undefined ? {} : { "data-trial": mark.trial };
    const group = element(root, "g", of), place = (i) => `${X(mark.x[i]).toFixed(1)},${Y(mark.y[i]).toFixed(1)}`;
    if (mark.low) for (const piece of pieces(mark.low.map((low, i) => (mark.high[i] === null ? null : low)))) {
      const edge = (values) => piece.map((i) => `${X(mark.x[i]).toFixed(1)},${Y(values[i]).toFixed(1)}`);
      element(group, "polygon", { points: [...edge(mark.low), ...edge(mark.high).reverse()].join(" "), class: "band" }, { fill: mark.color });
      if (piece.length === 1) whisker(group, X(mark.x[piece[0]]), Y(mark.low[piece[0]]), Y(mark.high[piece[0]]), mark.color);
    }
    for (const piece of pieces(mark.y)) {
      element(group, "path", { d: `M${piece.map(place).join("L")}`, fill: "none", "stroke-width": mark.width, "stroke-dasharray": mark.dash || "none", "stroke-linejoin": "round", class: mark.faint ? "faint" : "curve" }, { stroke: mark.color });
      if (mark.dots) for (const i of piece) element(group, "circle", { cx: X(mark.x[i]), cy: Y(mark.y[i]), r: mark.width < 3 ? 2.5 : 3.5 }, { fill: mark.color });
    }
    if (mark.faint) return [];
    return pieces(mark.y).flat().map((i) => ({ mark, i, x: X(mark.x[i]), y: Y(mark.y[i]), at: mark.x[i], value: mark.y[i], low: mark.low?.[i], high: mark.high?.[i], trial: mark.trial, color: mark.color, lines: mark.text }));
  },
  bars(root, mark, X, Y) {
    const points = mark.y.map((value, i) => {
      const [from, to] = [X(mark.edges[i]), X(mark.edges[i + 1])];
      if (value > 0) element(root, "rect", { x: from, width: Math.max(to - from, 0.5), y: Y(value), height: Math.max(Y(0) - Y(value), 0), class: "bar" }, { fill: mark.color });
      return { mark, i, x: (from + to) / 2, y: Y(value), at: (mark.edges[i] + mark.edges[i + 1]) / 2, value, color: mark.color };
    });
    return mark.quiet ? [] : points;
  },
  dots(root, mark, X, Y) {
    return mark.x.map((x, i) => {
      const group = element(root, "g", mark.trials ? { "data-trial": mark.trials[i] } : {});
      if (mark.low && mark.low[i] !== null && mark.high[i] !== null) whisker(group, X(x), Y(mark.low[i]), Y(mark.high[i]), mark.colors[i]);
      element(group, "circle", { cx: X(x), cy: Y(mark.y[i]), r: 4.5, class: "dot" }, { fill: mark.colors[i] });
      return { mark, i, x: X(x), y: Y(mark.y[i]), at: x, value: mark.y[i], trial: mark.trials?.[i], lines: mark.texts?.[i], color: mark.colors[i] };
    });
  },
  rule(root, mark, X, Y, { left, right, top, bottom, root: outer }) {
    const upright = mark.x !== undefined;
    const [x1, x2, y1, y2] = upright ? [X(mark.x), X(mark.x), top, bottom] : [left, right, Y(mark.y), Y(mark.y)];
    element(root, "line", { x1, x2, y1, y2, "stroke-dasharray": mark.dash || "5 4", class: "rule" });
    if (mark.text) {
      const end = upright ? (x1 > (left + right) / 2 ? [x1 - 4, "end"] : [x1 + 4, "start"]) : [right - 2, "end"];
      element(outer, "text", { x: end[0], y: upright ? top + 10 : y1 < top + 16 ? y1 + 14 : y1 - 5, "text-anchor": end[1], class: "on-top" }, {}, mark.text);
    }
    return [];
  },
  axis(root, mark, X, Y) {
    element(root, "line", { x1: X(mark.x), x2: X(mark.x), y1: Y(0), y2: Y(1) }, { stroke: "var(--muted)" });
    element(root, "text", { x: X(mark.x), y: 12, "text-anchor": mark.x ? "middle" : "start", class: "name" }, {}, mark.label);
    for (const [y, text] of mark.ticks) element(root, "text", { x: X(mark.x) + 5, y: Y(y) + 4, class: "on-top" }, {}, text);
    return [];
  },
};

function whisker(root, x, low, high, color) {
  element(root, "line", { x1: x, x2: x, y1: low, y2: high, "stroke-width": 1.5, class: "whisker" }, { stroke: color });
}

function hovering(div, root, figure, points, { top, bottom }) {
  if (!points.length) return;
  const tip = block(div, "tip");
  const guide = element(root, "line", { y1: top, y2: bottom, class: "guide" });
  const hide = () => { tip.hidden = true; guide.style.visibility = "hidden"; };
  const found = (event) => {
    const box = root.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const distance = figure.hover === "x" ? (p) => Math.abs(p.x - x) : (p) => Math.hypot(p.x - x, p.y - y);
    const nearest = (some) => some.reduce((best, point) => (distance(point) < distance(best) ? point : best));
    let near = nearest(points);
    // Between dense records, the few points that are drawn are what is looked for.
    const drawn = figure.hover === "x" ? points.filter((point) => point.mark.dots && distance(point) < 6) : [];
    if (drawn.length) near = nearest(drawn);
    return distance(near) < (figure.hover === "x" ? 40 : 24) ? near : null;
  };
  const show = (event) => {
    const near = found(event);
    if (!near) return hide();
    tip.replaceChildren();
    if (figure.hover === "near") {
      const lines = near.lines || [near.mark.name, `${written(figure.x, near.at)}: ${written(figure.y, near.value)}`];
      for (const line of lines) block(tip, "line", line);
    } else {
      block(tip, "line", `${figure.x.title || ""} ${written(figure.x, near.at)}`);
      const by = new Map();  // the nearest point of each curve, if it is about there
      for (const point of points) if (point.mark.name && Math.abs(point.x - near.x) < 6) {
        const other = by.get(point.mark);
        if (!other || Math.abs(point.x - near.x) < Math.abs(other.x - near.x)) by.set(point.mark, point);
      }
      for (const [mark, point] of by) {
        const bounds = typeof point.low === "number" && point.low < point.high ? ` [${written(figure.y, point.low)}, ${written(figure.y, point.high)}]` : "";
        block(tip, "line", `${mark.name}: ${written(figure.y, point.value)}${bounds}`).style.borderColor = point.color;
      }
      guide.setAttribute("x1", near.x);
      guide.setAttribute("x2", near.x);
      guide.style.visibility = "visible";
    }
    tip.hidden = false;
    const offset = near.x > div.clientWidth / 2 ? near.x - tip.offsetWidth - 12 : near.x + 12;
    tip.style.left = `${Math.max(0, Math.min(offset, div.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, div.clientHeight - root.clientHeight + Math.min(near.y, bottom) - tip.offsetHeight / 2)}px`;
  };
  hide();
  root.addEventListener("pointermove", show);
  root.addEventListener("pointerdown", show);
  root.addEventListener("pointerleave", hide);
  root.addEventListener("click", (event) => {
    const trial = found(event)?.trial;
    if (trial !== undefined) div.dispatchEvent(new CustomEvent("trial", { bubbles: true, detail: trial }));
  });
}
