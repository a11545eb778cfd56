// Live progress of jobs by long polls, and pages that refresh themselves. Without this script, pages show the
// same when reloaded.
"use strict";

const AT_ONCE = 4; // browsers open six HTTP/1.1 connections to a host, and page loads need some
const WAIT_S = 2; // of a poll that finds no end
const PAUSE_S = 5; // after a poll that failed
const ANSWER_S = 10; // for a refresh
const PASSING = new Set([429, 502, 503, 504]);
const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const news = document.getElementById("news");

function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return unit ? `${bytes.toFixed(1)} ${UNITS[unit]}` : `${bytes} B`;
}

function amount(progress) { // as ui/render.py
  if (!progress.items) return `${size(progress.bytes_done)} of ${size(progress.bytes)}`;
  const number = (count) => count.toLocaleString("en");
  const refused = progress.items_failed ? `, ${number(progress.items_failed)} refused` : "";
  return `${number(progress.items_done)} of ${number(progress.items)} items${refused}`;
}

function pause(ms) {
  return new Promise((resume) => setTimeout(resume, ms));
}

// The job, at its end or after WAIT_S; null if the service cannot tell now, undefined if it will not tell.
async function poll(path) {
  try {
    const answer = await fetch(`${path}?wait=${WAIT_S}`, { redirect: "manual" });
    if (answer.ok) return await answer.json();
    return PASSING.has(answer.status) ? null : undefined;
  } catch {
    return null;
  }
}

async function follow(element) {
  const state = element.querySelector(".state");
  const bar = element.querySelector("progress");
  let announced = `${state.textContent} 0`;

  function show(job) {
    const done = job.progress.items ? job.progress.items_done - job.progress.items_failed : job.progress.bytes_done;
    const total = job.progress.items || job.progress.bytes;
    state.textContent = job.state;
    state.dataset.state = job.state;
    element.dataset.state = job.state;
    element.querySelector(".amount").textContent = amount(job.progress);
    if (bar && total) {
      bar.max = total;
      bar.value = done;
    }
    const quarter = total ? Math.floor((4 * done) / total) : 0;
    const announcement = `${job.state} ${quarter}`;
    if (announcement !== announced) { // screen readers read states and quarters, not each item
      announced = announcement;
      news.textContent = `Job ${element.dataset.job}: ${job.state}, ${amount(job.progress)}`;
    }
  }

  while (element.isConnected) {
    const begun = Date.now();
    const job = await poll(element.dataset.poll);
    if (job === undefined) return;
    if (job) show(job);
    if (job && ENDED.has(job.state)) break;
    await pause(begun + 1000 * (job ? WAIT_S : PAUSE_S) - Date.now()); // an answer may come without a wait
  }
  if (element.isConnected && "reload" in element.dataset) location.replace(location.pathname);
}

let shown = Date.now(); // when this state of the page came

// Say how old the page is; that it refreshes itself is true only where this script runs.
function age() {
  const seconds = Math.round((Date.now() - shown) / 1000);
  const minutes = Math.floor(seconds / 60);
  const text = seconds < 120 ? `${seconds} s` : minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h`;
  for (const place of document.querySelectorAll(".age")) place.textContent = `, ${text} ago`;
  for (const place of document.querySelectorAll(".refresh [hidden]")) place.hidden = false;
}

const waiting = [];

async function next() {
  while (waiting.length) await follow(waiting.shift());
}

function followAll() {
  waiting.splice(0, waiting.length, ...document.querySelectorAll("[data-poll]"));
  for (let count = 0; count < AT_ONCE; count += 1) next();
}

// Whether a reader is at work: a form is half filled in, a control has the focus, or text is selected.
function isInUse(main) {
  const fields = Array.from(main.querySelectorAll("input:not([type=hidden]), select"));
  const isChanged = (field) => field.options
    ? Array.from(field.options).some((option) => option.selected !== option.defaultSelected && (option.defaultSelected || option.index))
    : field.value !== field.defaultValue;
  return fields.some((field) => isChanged(field) || field === document.activeElement) || !getSelection().isCollapsed;
}

// Put a new state of the page in place of this one. What is open stays open, and the focus stays on its link.
function replace(main, page) {
  const fresh = document.adoptNode(page.getElementById("main"));
  const kept = main.querySelector("section:has(> #refused)"); // a refresh does not search the audit log
  if (kept && fresh.querySelector("#condition") && !fresh.querySelector("#refused")) fresh.append(kept);
  const text = (summary) => summary.textContent;
  const open = new Set(Array.from(main.querySelectorAll("details[open] > summary"), text));
  for (const summary of fresh.querySelectorAll("summary")) summary.parentElement.open ||= open.has(text(summary));
  const focus = main.contains(document.activeElement) && document.activeElement;
  const same = (one) => focus && one.tagName === focus.tagName && text(one) === text(focus);
  main.replaceWith(fresh);
  shown = Date.now();
  age();
  document.title = page.title;
  Array.from(fresh.querySelectorAll("a, button, summary")).find(same)?.focus({ preventScroll: true });
  followAll();
}

async function refresh() {
  for (;;) {
    const main = document.getElementById("main");
    if (!main.dataset.live) return;
    await pause(1000 * main.dataset.live);
    if (document.hidden || isInUse(main)) continue;
    try {
      const signal = AbortSignal.timeout(1000 * ANSWER_S);
      const answer = await fetch(location.href, { headers: { "X-KMS-Refresh": "1" }, redirect: "manual", signal });
      if (answer.type === "opaqueredirect") return location.reload(); // the session has ended
      replace(main, new DOMParser().parseFromString(await answer.text(), "text/html"));
    } catch {
      const late = main.querySelector(".as-of");
      late.dataset.late = "";
      late.querySelector("span").textContent = news.textContent = "The service does not answer. Still as of";
    }
  }
}

age();
setInterval(age, 1000);
followAll();
refresh();
