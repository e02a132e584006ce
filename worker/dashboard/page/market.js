// Replaces what the page says by what the server says now. Without this script, load the page again.
"use strict";

const POLL_MS = 5000;

async function renew() {
  try {
    const answer = await fetch("/market", { signal: AbortSignal.timeout(10000) });
    if (answer.ok) replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
  } catch {
    // What is shown says as of when it is.
  }
  setTimeout(renew, POLL_MS);
}

// Questions stay open or closed as they are, and nothing moves under a selection or the keyboard.
function replace(page) {
  const [old, fresh] = [document.getElementById("market"), page.getElementById("market")];
  const isUsed = old.contains(document.activeElement) || !getSelection().isCollapsed;
  if (isUsed || fresh === null || old.innerHTML === fresh.innerHTML) return;
  for (const game of old.querySelectorAll(".game")) {
    const [was, is] = [game.querySelector("details"), fresh.querySelector(`#${game.id} details`)];
    if (was && is) is.open = was.open;
  }
  const tops = [...old.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
  old.replaceWith(document.adoptNode(fresh));
  fresh.querySelectorAll(".scroll").forEach((each, place) => (each.scrollLeft = tops[place] ?? 0));
}

setTimeout(renew, POLL_MS);
