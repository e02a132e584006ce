// Draws what /api/swarm says, every two seconds. Peer ids and addresses are the text of strangers: whatever is shown goes
// through textContent or an attribute, never through markup. What is not known any more stays, and is said to be old.
"use strict";

const POLL_MS = 2000;
const ROWS_AT_FIRST = 100;
const SPARK_ROUNDS = 24;
const SVG = "http://www.w3.org/2000/svg";

const at = (id) => document.getElementById(id);
let swarm = null; // the last answer
let lostAt = null; // when the dashboard itself stopped answering
let skew = 0; // how much later it is there than here, in seconds
let showsAll = false;
const drawn = {}; // what each part was made from: what has not changed stays, with what is selected or pointed at

// ---- words

function reward(thousandths, digits = 2) {
  const value = thousandths / 1000;
  // A stranger's contract takes any number.
  if (Math.abs(value) >= 1e7) return value.toExponential(1);
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

const count = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const clipped = (text, head, tail) => (text.length <= head + tail + 1 ? text : `${text.slice(0, head)}…${text.slice(-tail)}`);
const now = () => Date.now() / 1000 + skew;
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hourCycle: "h23" });

function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return count(Math.floor(whole / 86400), "day", "days");
}

// ---- elements

function html(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function svg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function isDrawn(part, from) {
  const text = JSON.stringify(from);
  const isSame = drawn[part] === text;
  drawn[part] = text;
  return isSame;
}

// ---- the state of things

function tell() {
  const isKnown = swarm !== null && swarm.round !== null;
  const isLost = lostAt !== null;
  const error = isLost ? null : swarm?.error;
  at("swarm").hidden = !isKnown;
  at("waiting").hidden = isKnown;
  at("alert").hidden = !isLost && !error;
  const stays = isKnown ? " What is below was known before that." : "";
  if (isLost) {
    at("alert").textContent = `Dashboard unreachable since ${clock(lostAt)}: the page got no answer.${stays}`;
  } else if (error) {
    at("alert").textContent = `Chain unreachable since ${clock(swarm.error_since)}: ${error}.${stays}`;
  }
  at("waiting").textContent = error
    ? "Nothing is known yet: the chain has not answered since the dashboard was started."
    : "Nothing is known yet: the chain is being read.";
  at("fresh").hidden = !swarm?.updated_at;
  at("fresh").classList.toggle("stale", isLost || Boolean(error));
  if (swarm?.updated_at) {
    const age = span(now() - swarm.updated_at);
    at("fresh").textContent = isLost || error ? `as of ${clock(swarm.updated_at)}` : `live, read ${age} ago`;
  }
  if (isKnown) {
    const since = swarm.round_since === null ? "open" : `open for ${span(now() - swarm.round_since)}`;
    const stage = swarm.stage > 0 ? `, stage ${swarm.stage}` : "";
    at("round-note").textContent = isLost || error ? `when last heard${stage}` : since + stage;
  }
}

function drawTiles() {
  const finished = swarm.rounds.filter((each) => each.round < swarm.round);
  const last = finished.at(-1) ?? swarm.rounds.at(-1);
  const before = finished.slice(-6, -1);
  at("org").textContent = swarm.org_id === "hivewright" ? "" : swarm.org_id;
  at("round").textContent = swarm.round.toLocaleString("en");
  at("reporting").textContent = last ? last.num_peers.toLocaleString("en") : "0";
  at("reporting-note").textContent =
    (last ? `in round ${last.round}, ` : "") + `${count(swarm.num_peers, "peer", "peers")} known`;
  at("mean").textContent = last ? reward(last.mean_reward) : "–";
  at("mean-note").replaceChildren(...(last ? trend(last, before) : ["no reward yet"]));
  at("contract").textContent = clipped(swarm.contract, 6, 4);
  at("contract").title = swarm.contract;
  at("contract-note").textContent = `chain ${swarm.chain_id}`;
  at("bootnodes-note").textContent = count(swarm.bootnodes.length, "bootnode", "bootnodes");
  at("bootnodes").replaceChildren(...swarm.bootnodes.map((each) => html("li", {}, html("bdi", {}, each))));
}

function trend(last, before) {
  if (!before.length) return [`in round ${last.round}`];
  const change = last.mean_reward - before.reduce((sum, each) => sum + each.mean_reward, 0) / before.length;
  const them = before.length === 1 ? "the round before" : `the ${before.length} rounds before`;
  if (Math.abs(change) < 5) return [`as in ${them}`];
  const [kind, sign] = change < 0 ? ["worse", "−"] : ["better", "+"];
  return [html("span", { class: kind }, sign + reward(Math.abs(change))), ` on ${them}`];
}

// ---- the curve

function drawCurve() {
  const box = at("curve");
  const [width, height] = [box.clientWidth, box.clientHeight];
  const rounds = swarm.rounds;
  if (isDrawn("curve", [rounds, swarm.round, width, height])) return;
  if (!rounds.length || !width) {
    box.replaceChildren(html("small", {}, "No peer has got a reward yet."));
    return;
  }
  const highest = Math.max(1000, ...rounds.map((each) => each.mean_reward));
  const lowest = Math.min(0, ...rounds.map((each) => each.mean_reward));
  const [left, right, top, bottom, barsHeight] = [highest < 1e5 ? 36 : 56, 2, 10, 22, 30];
  const base = height - bottom - barsHeight - 16; // where a mean reward of 0 is
  const [first, last] = [rounds[0].round, Math.max(swarm.round, rounds[0].round + 1)];
  const most = Math.max(...rounds.map((each) => each.num_peers));
  const step = (width - left - right) / (last - first + 1);
  const barWidth = Math.max(1, Math.min(16, step * 0.62));
  const x = (round) => left + (round - first + 0.5) * step;
  const y = (mean) => base - ((mean - lowest) / (highest - lowest)) * (base - top);
  const points = (some) => some.map((each) => `${x(each.round)},${y(each.mean_reward)}`).join(" ");

  const picture = svg("svg", { role: "img", "aria-label": described(rounds) });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    const mean = lowest + share * (highest - lowest);
    picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(mean), y2: y(mean) }));
    picture.append(svg("text", { x: left - 8, y: y(mean) + 4, "text-anchor": "end" }, reward(mean)));
  }
  for (const each of rounds) {
    const tall = Math.max(1, (each.num_peers / most) * barsHeight);
    const [barX, barY] = [x(each.round) - barWidth / 2, height - bottom - tall];
    const kind = each.round === swarm.round ? "bar open" : "bar";
    picture.append(svg("rect", { class: kind, x: barX, y: barY, width: barWidth, height: tall, rx: Math.min(2, barWidth / 3) }));
  }
  picture.append(svg("text", { x: left - 8, y: height - bottom - barsHeight + 9, "text-anchor": "end" }, most.toLocaleString("en")));

  // The open round is not over: those that report last may change its mean.
  const over = rounds.filter((each) => each.round < swarm.round);
  const open = rounds.at(-1).round === swarm.round ? rounds.at(-1) : null;
  if (over.length > 1) {
    const [from, to] = [x(over[0].round), x(over.at(-1).round)];
    picture.append(svg("polygon", { class: "area", points: `${from},${y(lowest)} ${points(over)} ${to},${y(lowest)}` }));
  }
  picture.append(svg("polyline", { class: "line", points: points(over) }));
  if (open && over.length) picture.append(svg("polyline", { class: "line open", points: points([over.at(-1), open]) }));
  if (step > 24) {
    for (const each of over) picture.append(svg("circle", { class: "dot", cx: x(each.round), cy: y(each.mean_reward), r: 3.5 }));
  }
  if (open) picture.append(svg("circle", { class: "dot open", cx: x(open.round), cy: y(open.mean_reward), r: 4 }));
  for (const round of labelled(first, last, Math.max(2, Math.floor(width / 90)))) {
    picture.append(svg("text", { x: x(round), y: height - 5, "text-anchor": "middle" }, round.toLocaleString("en")));
  }
  box.replaceChildren(picture);
  pointAt(box, picture, rounds, x, [top, height - bottom]);
}

function described(rounds) {
  const [first, last] = [rounds[0], rounds.at(-1)];
  return `Mean reward from ${reward(first.mean_reward)} in round ${first.round} to ${reward(last.mean_reward)} in round ${last.round}`;
}

function labelled(first, last, most) {
  const steps = [1, 2, 5].flatMap((digit) => [1, 10, 100].map((power) => digit * power)).sort((a, b) => a - b);
  const step = steps.find((each) => (last - first) / each <= most) ?? 1000;
  const rounds = [];
  for (let round = Math.ceil(first / step) * step; round <= last; round += step) rounds.push(round);
  return rounds;
}

// The round under the pointer, with its figures.
function pointAt(box, picture, rounds, x, [top, bottom]) {
  const tip = html("div", { id: "tip", hidden: "" });
  const hair = svg("line", { class: "hair", y1: top, y2: bottom, visibility: "hidden" });
  picture.append(hair);
  box.append(tip);
  const leave = () => {
    tip.hidden = true;
    hair.setAttribute("visibility", "hidden");
  };
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("pointermove", (event) => {
    const pointer = event.clientX - box.getBoundingClientRect().left;
    const distance = (each) => Math.abs(x(each.round) - pointer);
    const nearest = rounds.reduce((best, each) => (distance(each) < distance(best) ? each : best));
    const where = x(nearest.round);
    hair.setAttribute("visibility", "visible");
    for (const end of ["x1", "x2"]) hair.setAttribute(end, where);
    const state = nearest.round === swarm.round ? " (open)" : "";
    const peers = count(nearest.num_peers, "peer", "peers");
    tip.textContent = `round ${nearest.round}${state}\nmean ${reward(nearest.mean_reward, 3)}\n${peers}`;
    tip.hidden = false;
    tip.style.left = `${Math.min(Math.max(where, 50), box.clientWidth - 50)}px`;
  });
}

// ---- the peers

function drawPeers() {
  const hasAudit = swarm.audit !== null && swarm.audit.error === null;
  document.body.classList.toggle("no-audit", !hasAudit);
  at("find").hidden = swarm.peers.length <= 10 && !at("find").value;
  const wanted = at("find").value.trim().toLowerCase();
  const found = swarm.peers.map((peer, index) => ({ ...peer, rank: index + 1 })).filter((peer) => matches(peer, wanted));
  found.sort(compared);
  const shown = showsAll ? found : found.slice(0, ROWS_AT_FIRST);
  at("peers-note").textContent = peersNote();
  at("nobody").hidden = found.length > 0;
  at("nobody").textContent = wanted ? "No peer that is shown has this in its name, id or account." : "No peer is registered yet.";
  at("more").hidden = shown.length === found.length;
  at("more").textContent = `Show all ${found.length.toLocaleString("en")}`;
  at("total-title").textContent = swarm.ranked_by === "audited_reward" ? "Audited reward" : "Total reward";
  if (isDrawn("peers", [swarm.round, swarm.ranked_by, shown])) return;
  at("peers").replaceChildren(...shown.map(row));
}

// ---- the order of peers: by a column, the largest first; again: the smallest first

const SORT_KEYS = {
  total: (peer) => -peer.rank,
  last: (peer) => peer.rewards.at(-1)?.[1] ?? -Infinity,
  round: (peer) => peer.last_round ?? -1,
  wins: (peer) => peer.wins,
  voted: (peer) => peer.last_vote ?? -1,
};
let sortedBy = "total";
let isAscending = false;

function compared(one, other) {
  const key = SORT_KEYS[sortedBy];
  const difference = key(other) - key(one) || one.rank - other.rank;
  return isAscending ? -difference : difference;
}

function sortBy(button) {
  isAscending = button.dataset.sort === sortedBy && !isAscending;
  sortedBy = button.dataset.sort;
  showOrder();
  drawPeers();
}

function showOrder() {
  for (const each of document.querySelectorAll("[data-sort]")) {
    const order = each.dataset.sort !== sortedBy ? "none" : isAscending ? "ascending" : "descending";
    each.closest("th").setAttribute("aria-sort", order);
  }
}

function matches(peer, wanted) {
  return [peer.name, peer.peer_id, peer.account ?? ""].some((text) => text.toLowerCase().includes(wanted));
}

function peersNote() {
  const more = swarm.num_peers > swarm.peers.length ? `the best ${swarm.peers.length.toLocaleString("en")} of ` : "";
  const audit = swarm.audit?.error ? `, audit: ${swarm.audit.error}` : "";
  return more + swarm.num_peers.toLocaleString("en") + audit;
}

function row(peer) {
  const last = peer.rewards.at(-1);
  const account = peer.account ?? "";
  return html(
    "tr",
    {},
    html("td", { class: "number rank" }, String(peer.rank)),
    html("td", { class: "peer", title: peer.peer_id }, html("bdi", {}, peer.name), html("bdi", { class: "code" }, clipped(peer.peer_id, 8, 6))),
    total(peer),
    html("td", { class: "last-rewards" }, spark(peer.rewards), html("span", {}, last ? reward(last[1]) : "–")),
    html("td", { class: "number last-round" }, String(peer.last_round ?? "–")),
    html("td", { class: "number wins" }, peer.wins.toLocaleString("en")),
    html("td", { class: "number voted" }, String(peer.last_vote ?? "–")),
    html("td", { class: "audit" }, ...verdicts(peer.audit)),
    html("td", { class: "account code", title: account }, clipped(account, 6, 4)),
  );
}

// The rewards of the last rounds, up to the one that is open; a round without one is a gap.
function spark(rewards) {
  const [width, height, edge] = [120, 26, 3];
  const recent = rewards.filter(([round]) => round > swarm.round - SPARK_ROUNDS);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  if (!recent.length) return picture;
  const first = Math.max(0, swarm.round - SPARK_ROUNDS + 1);
  const highest = Math.max(1000, ...recent.map(([, value]) => value));
  const x = (round) => edge + ((round - first) / Math.max(1, swarm.round - first)) * (width - 2 * edge);
  const y = (value) => height - edge - (Math.max(0, value) / highest) * (height - 2 * edge);
  const pieces = [];
  recent.forEach(([round, value], index) => {
    const isNext = index > 0 && recent[index - 1][0] === round - 1;
    pieces.push(`${isNext ? "L" : "M"}${x(round)} ${y(value)}`);
  });
  const [round, value] = recent.at(-1);
  picture.append(svg("path", { class: "spark", d: pieces.join(""), "vector-effect": "non-scaling-stroke" }));
  picture.append(svg("path", { class: "spark end", d: `M${x(round)} ${y(value)}h0`, "vector-effect": "non-scaling-stroke" }));
  return picture;
}

// The reward that peers are ranked by. A total with unaudited rewards in it is marked.
function total(peer) {
  const isAudited = swarm.ranked_by === "audited_reward";
  const value = isAudited ? peer.audited_reward : peer.total_reward;
  const isMarked = !isAudited && swarm.audit !== null && !(peer.audit !== null && peer.audit.unaudited === 0);
  const title = isMarked ? "with rewards that no audit has recomputed" : "";
  const kind = isMarked ? "number total unaudited" : "number total";
  return html("td", { class: kind, title }, value === null ? "–" : reward(value) + (isMarked ? "*" : ""));
}

function verdicts(counts) {
  if (counts === null) return [html("span", { class: "verdict unaudited" }, "unaudited")];
  const told = ["contradicted", "audited", "unaudited"].filter((name) => counts[name] > 0);
  if (!told.length) return [html("span", { class: "verdict unaudited" }, "unaudited")];
  return told.map((name) => html("span", { class: `verdict ${name}` }, `${counts[name]} ${name}`));
}

// ---- the fleet, if its owner shows it

const FLEET_MS = 10000;
const LEVELS = ["well", "has a problem", "must not train"];

function drawFleet(fleet) {
  at("fleet").hidden = fleet === null;
  if (fleet === null) return;
  const silent = fleet.processes.filter((each) => each.error !== null).length;
  const note = count(fleet.processes.length, "process", "processes");
  at("fleet-note").textContent = fleet.error ?? (silent ? `${note}, ${silent} without an answer` : note);
  if (isDrawn("fleet", fleet)) return;
  at("processes").replaceChildren(...fleet.processes.map(processRow));
  at("by-family").replaceChildren(...figures("Mean reward by family", fleet.families, (value) => value.toFixed(2)));
  at("by-brier").replaceChildren(...figures("Brier score by family (0 best, 2 worst)", fleet.brier, (value) => value.toFixed(2)));
  at("by-reason").replaceChildren(...figures("Rejected groups by reason", fleet.rejected, (value) => String(value)));
}

function processRow(each) {
  const figure = (value, shown) => html("td", { class: "number" }, value === null ? "–" : shown(value));
  const gpu = [];
  if (each.gpu_temperature !== null) gpu.push(`${each.gpu_temperature.toFixed(0)} °C`);
  if (each.gpu_fault_level) gpu.push(LEVELS[each.gpu_fault_level] ?? "unknown");
  const service = each.slot === null ? each.service : `${each.service} ${each.slot}`;
  const state = each.error === null ? (each.state ?? "running") : `no answer: ${each.error}`;
  return html(
    "tr",
    {},
    html("td", {}, html("bdi", {}, each.host)),
    html("td", {}, html("bdi", {}, service)),
    html("td", { class: each.error === null ? "" : "worse" }, html("bdi", {}, state)),
    figure(each.round, (value) => value.toLocaleString("en")),
    figure(each.reward, (value) => value.toFixed(2)),
    figure(each.peers, String),
    figure(each.external_share, (value) => `${Math.round(value * 100)} %`),
    html("td", {}, gpu.join(", ") || "–"),
    html("td", { class: each.warnings.length ? "worse" : "" }, html("bdi", {}, each.warnings.join(", ") || "none")),
    html("td", {}, html("bdi", {}, each.version ?? "–")),
    figure(each.as_of, clock),
  );
}

function figures(title, table, shown) {
  const names = Object.keys(table);
  if (!names.length) return [];
  const items = names.map((name) => html("li", {}, html("bdi", {}, name), ` ${shown(table[name])}`));
  return [html("h3", {}, title), html("ul", {}, ...items)];
}

async function lookAtFleet() {
  try {
    const answer = await fetch("/api/fleet", { signal: AbortSignal.timeout(10000) });
    if (answer.ok) drawFleet(await answer.json());
  } catch {
    // The rows say as of when they are; the page's alert says that the dashboard is away.
  }
  setTimeout(lookAtFleet, FLEET_MS);
}

// ---- the loop

function draw() {
  tell();
  if (swarm.round === null) return;
  drawTiles();
  drawCurve();
  drawPeers();
}

async function look() {
  const found = await ask();
  if (found === null) {
    lostAt ??= now();
    tell();
  } else {
    lostAt = null;
    // A dashboard that was started anew knows nothing until the chain answers; this page may.
    const isBlank = found.round === null && swarm !== null && swarm.round !== null;
    swarm = isBlank ? { ...swarm, error: found.error, error_since: found.error_since } : found;
    draw();
  }
  setTimeout(look, POLL_MS);
}

// null: no answer
async function ask() {
  try {
    const answer = await fetch("/api/swarm", { signal: AbortSignal.timeout(10000) });
    if (!answer.ok) return null;
    skew = Date.parse(answer.headers.get("Date")) / 1000 - Date.now() / 1000;
    return await answer.json();
  } catch {
    return null;
  }
}

at("find").addEventListener("input", drawPeers);
at("more").addEventListener("click", () => {
  showsAll = true;
  drawPeers();
});
new ResizeObserver(() => swarm?.round != null && drawCurve()).observe(at("curve"));
for (const button of document.querySelectorAll("[data-sort]")) button.addEventListener("click", () => sortBy(button));
showOrder();
setInterval(tell, 1000);
look();
lookAtFleet();
