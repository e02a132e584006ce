// Keeps the page fresh and draws its charts. The server draws everything else, escaped: this script takes the elements with
// `data-live` from the same page, asked for again. A part whose new value is not known stays, and its time shows its age.
// A part without content is hidden; a chart that comes with new content is drawn, and one that was there stays.
"use strict";

const POLL_MS = 5000;
const CURVE_MS = 30000;
const PATIENCE_MS = 10000;
let lostAt = null; // when the dashboard itself stopped answering

const clock = (date) => date.toISOString().slice(11, 19) + " UTC";

async function ask(url) {
  const answer = await fetch(url, { signal: AbortSignal.timeout(PATIENCE_MS) });
  if (!answer.ok) throw new Error(answer.statusText);
  return answer;
}

// ---- what is live

async function look() {
  let text = null; // null: no answer
  try {
    text = await (await ask(location.href)).text();
    lostAt = null;
  } catch {
    lostAt ??= new Date();
  }
  const note = document.getElementById("lost");
  note.hidden = lostAt === null;
  if (lostAt) note.textContent = `Dashboard unreachable since ${clock(lostAt)}: the page got no answer. What is below was known before that.`;
  setTimeout(look, POLL_MS);
  if (text !== null && !document.hidden) take(new DOMParser().parseFromString(text, "text/html"));
}

function take(fresh) {
  const shape = (from) => [...from.querySelectorAll("[data-live]")].map((each) => each.id).join();
  // A page that has other parts now, such as after the first reading of the chain, is loaded again.
  if (shape(fresh) !== shape(document)) {
    location.reload();
    return;
  }
  for (const part of document.querySelectorAll("[data-live]")) {
    const other = fresh.getElementById(part.id);
    const isBusy = part.contains(document.activeElement) || hasSelection(part);
    if (!isBusy) replace(part, other);
  }
}

// Details stay open or closed, charts stay drawn, and wide tables stay where they were scrolled to.
function replace(part, other) {
  part.hidden = other.hidden;
  for (const was of part.querySelectorAll("[id] details")) {
    const is = other.querySelector(`#${CSS.escape(was.closest("[id]").id)} details`);
    if (is) is.open = was.open;
  }
  if (plain(part) === plain(other)) return;
  const drawn = new Map([...part.querySelectorAll("[data-curve]")].map((each) => [each.dataset.curve, each]));
  for (const figure of other.querySelectorAll("[data-curve]")) {
    const before = drawn.get(figure.dataset.curve);
    if (before) figure.replaceWith(before);
  }
  const places = [...part.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
  part.replaceChildren(...other.childNodes);
  part.querySelectorAll(".scroll").forEach((each, index) => (each.scrollLeft = places[index] ?? 0));
  drawAll(part);
}

// The part's content without what is drawn in it.
function plain(part) {
  const copy = part.cloneNode(true);
  for (const figure of copy.querySelectorAll("[data-curve]")) {
    figure.replaceChildren();
    figure.hidden = true;
  }
  return copy.innerHTML;
}

function hasSelection(part) {
  const selection = getSelection();
  return !selection.isCollapsed && selection.containsNode(part, true);
}

// ---- charts

const NAMES = ["--reward", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6"];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function short(value) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1e7) return value.toExponential(1);
  return value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) < 10 ? 2 : 0 });
}

// Steps of the axis of rounds, which are whole numbers.
const WHOLE = [1, 2, 5].flatMap((step) => [0, 1, 2, 3, 4, 5, 6].map((power) => step * 10 ** power)).sort((a, b) => a - b);

function options(figure, curve) {
  const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
  const series = curve.series.map((each, index) => ({
    label: each.name,
    scale: each.name === "peers" ? "peers" : "y",
    stroke: colour(each.name === "peers" ? "--series-5" : NAMES[index % NAMES.length]),
    width: each.name === "peers" ? 1 : 2,
    dash: index >= NAMES.length ? [6, 4] : undefined,
    value: (_, value) => short(value),
  }));
  const axes = [{ ...axis, size: 36, incrs: WHOLE }, { ...axis, size: 56, values: (_, values) => values.map(short) }];
  if (series.some((each) => each.scale === "peers")) {
    axes.push({ ...axis, scale: "peers", side: 1, size: 44, grid: { show: false }, values: (_, values) => values.map(short) });
  }
  return {
    width: figure.clientWidth,
    height: figure.clientWidth < 500 ? 200 : 260,
    scales: { x: { time: false }, peers: { range: (_, __, most) => [0, Math.max(1, most * 2)] } },
    axes,
    series: [{ label: figure.dataset.label, value: (_, value) => short(value) }, ...series],
    cursor: { drag: { x: true, y: false } },
  };
}

// Rewards are thousandths, as on the chain.
function scaled(each) {
  const isReward = each.name === "mean reward";
  return isReward ? each.values.map((value) => (value === null ? null : value / 1000)) : each.values;
}

const watched = new Set(); // figures whose curves are asked for
const charts = new Map(); // by figure: what is drawn, and the curve that it was drawn from

function draw(figure, curve) {
  charts.get(figure)?.chart.destroy();
  const chart = new uPlot(options(figure, curve), [curve.round, ...curve.series.map(scaled)], figure);
  charts.set(figure, { chart, curve, text: JSON.stringify(curve) });
}

async function lookAt(figure) {
  if (!figure.isConnected) {
    charts.get(figure)?.chart.destroy();
    charts.delete(figure);
    watched.delete(figure);
    return;
  }
  let curve = null; // null: no answer; the note above the page says that the dashboard is away
  try {
    curve = await (await ask(figure.dataset.curve)).json();
  } catch {
    // The chart stays as it was.
  }
  setTimeout(() => lookAt(figure), CURVE_MS);
  if (curve === null) return;
  figure.hidden = curve.round.length === 0;
  if (!figure.hidden && charts.get(figure)?.text !== JSON.stringify(curve)) draw(figure, curve);
}

function drawAgain() {
  for (const [figure, { curve }] of charts) if (!figure.hidden) draw(figure, curve);
}

function drawAll(part) {
  for (const figure of part.querySelectorAll("[data-curve]")) {
    if (watched.has(figure)) continue;
    watched.add(figure);
    lookAt(figure);
  }
}

drawAll(document);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) drawAgain();
  width = innerWidth;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);
setTimeout(look, POLL_MS);
